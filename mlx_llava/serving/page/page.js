// A conversation about pictures: what people press and type, and what follows from it.

import * as attachments from "./attachments.js";
import * as conversation from "./conversation.js";
import { $ } from "./dom.js";
import { recover } from "./keeping.js";
import * as list from "./list.js";
import { loadModels, model } from "./models.js";
import { loadSettings } from "./settings.js";
import { onChange } from "./store.js";

const DRAFT = "draft";

async function ask() {
  await attachments.ready();
  if (!model()) await loadModels();
  const text = $("question").value.trim();
  const isEmpty = !text && !attachments.waiting().length;
  if (!model() || conversation.isRunning() || isEmpty) return;
  $("question").value = "";
  showDraft();
  conversation.ask(text || "Describe the picture.");
}

// The field grows with what is written, which a reload does not lose.
function showDraft() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
  sessionStorage.setItem(DRAFT, field.value);
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("input", showDraft);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", conversation.stop);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (!list.closeDrawer()) conversation.stop();
});
$("new").addEventListener("click", () => { conversation.start(); $("question").focus(); });
$("show-settings").addEventListener("click", () => $("settings").showModal());

list.setActions(conversation);
conversation.whenChanged(list.showList);
onChange(async ({ id, isForgotten }) => {
  if (isForgotten) conversation.leave(id);
  else await conversation.refresh(id);
  await list.showList();
});

loadSettings(loadModels);
loadModels();
$("question").value = sessionStorage.getItem(DRAFT) ?? "";
showDraft();
await recover();
if (location.hash) conversation.open(location.hash.slice(1));
