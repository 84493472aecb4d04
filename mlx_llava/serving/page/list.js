// The list of conversations: by day, searched, renamed, forgotten.

import { $, announce, button, confirmed, later, make, showError, showNotice } from "./dom.js";
import { openSaved, saveAll, saveJson, saveMarkdown } from "./export.js";
import * as store from "./store.js";

const NARROW = matchMedia("(max-width: 40rem)");
const DAY = 86_400_000;

let actions = {}; // {currentId, open, leave}
let shown = ""; // what the list has, to draw it only where that changes
let asked = 0; // how often the list was asked for
let named = null; // the conversation whose options are open
const urls = [];

export function setActions(given) {
  actions = given;
}

// --- drawing -------------------------------------------------------------------------------

export async function showList() {
  if ($("history").hidden) return;
  asked += 1;
  const mine = asked;
  const words = $("search").value.trim();
  const stored = await store.list().catch(() => []);
  const found = words ? await store.search(words) : null;
  if (mine !== asked) return; // what was asked since comes too
  const listed = found ? stored.filter(({ id }) => found.has(id)) : stored;
  const days = listed.map(({ at }) => day(at));
  const drawn = JSON.stringify([actions.currentId(), listed.map(({ id, title }, i) => [id, title, days[i]])]);
  $("nothing").hidden = Boolean(listed.length);
  $("nothing").textContent = words ? "No conversation has these words." : "No conversations yet.";
  if (drawn !== shown) draw(listed, days);
  shown = drawn;
}

function draw(listed, days) {
  const focused = document.activeElement.dataset.of;
  urls.splice(0).forEach((url) => URL.revokeObjectURL(url));
  const parts = [...new Set(days)].map((name) => {
    const items = listed.filter((_, i) => days[i] === name).map(item);
    return [make("h2", { textContent: name }), make("ul", {}, ...items)];
  });
  $("conversations").replaceChildren(...parts.flat());
  if (focused) document.querySelector(`[data-of="${CSS.escape(focused)}"]`)?.focus();
}

function item(conversation) {
  const { id, title, at, thumbnail } = conversation;
  const open = button("", () => { actions.open(id); if (NARROW.matches) close(); });
  open.append(small(thumbnail), make("span", { textContent: title, dir: "auto" }));
  open.title = `${title}\n${new Date(at).toLocaleString()}`;
  if (id === actions.currentId()) open.setAttribute("aria-current", "true");
  const more = button("⋯", () => showOptions(conversation), `Options of ${title}`);
  const remove = button("×", () => forget(id), `Forget ${title}`);
  [open, more, remove].forEach((element, i) => { element.dataset.of = `${i}${id}`; });
  return make("li", {}, open, more, remove);
}

function small(thumbnail) {
  if (!thumbnail) return make("i");
  urls.push(URL.createObjectURL(thumbnail));
  return make("img", { src: urls.at(-1), alt: "", loading: "lazy" });
}

function day(at) {
  const now = new Date();
  const midnight = (date) => new Date(date).setHours(0, 0, 0, 0);
  const ago = Math.round((midnight(now) - midnight(at)) / DAY);
  if (ago < 1) return "Today";
  if (ago < 2) return "Yesterday";
  const year = new Date(at).getFullYear() === now.getFullYear() ? {} : { year: "numeric" };
  const date = ago < 7 ? { weekday: "long", day: "numeric", month: "long" } : { month: "long", ...year };
  return new Date(at).toLocaleDateString("en", date);
}

// --- opening and closing -------------------------------------------------------------------

export function toggle() {
  if (!$("history").hidden) return close();
  $("history").hidden = $("shade").hidden = false;
  $("show-history").setAttribute("aria-expanded", "true");
  if (NARROW.matches) $("history").focus();
  return showList();
}

function close() {
  $("history").hidden = $("shade").hidden = true;
  $("show-history").setAttribute("aria-expanded", "false");
  $("show-history").focus();
}

// Whether there was a list over the conversation to be closed.
export function closeDrawer() {
  if ($("history").hidden || !NARROW.matches) return false;
  close();
  return true;
}

// --- what people do ------------------------------------------------------------------------

async function forget(id) {
  const records = await store.forget(id);
  actions.leave(id);
  await showList();
  $("history").focus();
  const undo = button("Undo", async () => {
    await store.restore(records);
    showNotice("");
    await actions.open(id);
  });
  showNotice("Forgotten.", undo);
}

async function forgetAll() {
  const count = (await store.list()).length;
  const what = count === 1 ? "the conversation" : `all ${count} conversations`;
  if (!(await confirmed(`Forget ${what}, pictures included? Nothing brings them back.`, "Forget"))) return;
  await store.forgetAll();
  actions.leave();
  await showList();
  announce("All is forgotten.");
}

function showOptions(conversation) {
  named = conversation;
  $("options").returnValue = "";
  $("title").value = conversation.title;
  $("options").showModal();
}

$("options").addEventListener("close", async () => {
  const title = $("title").value.trim();
  if (!title || title === named.title || $("options").returnValue !== "done") return;
  await store.change(named.id, { title });
  await showList();
});
$("open-saved").addEventListener("change", async () => {
  const [file] = $("open-saved").files;
  try {
    showNotice(`Opened ${await openSaved(file)} of ${file.name}.`);
  } catch {
    showError(`${file.name} has no conversations that were saved here.`);
  }
  $("open-saved").value = "";
  await showList();
});
$("save-markdown").addEventListener("click", () => saveMarkdown(named.id));
$("save-json").addEventListener("click", () => saveJson(named.id));
$("save-all").addEventListener("click", saveAll);
$("forget").addEventListener("click", forgetAll);
$("search").addEventListener("input", later(150, showList));
$("show-history").addEventListener("click", toggle);
$("shade").addEventListener("click", close);
