// What goes with the next question: chosen, pasted or dropped.

import { $, announce, button, make, showError } from "./dom.js";
import { hold, media } from "./media.js";
import { isTaken, prepare } from "./pictures.js";
import { asBlob } from "./upgrade.js";

let pending = [];
let preparing = Promise.resolve();

const ELSEWHERE =
  "That picture is on another site, which this page may not read. Save it first, or copy the " +
  "picture itself and paste it here.";

// Waits until all pictures that were added are there.
export const ready = () => preparing;
export const waiting = () => pending;

export function take() {
  const taken = pending;
  put([]);
  return taken;
}

export function put(pictures) {
  pending = pictures;
  show();
}

export function names(pictures) {
  return pictures.map(({ kind }, i) => `${kind} ${i + 1}`);
}

// One after the other: large photographs take much memory while they are made smaller.
export function add(files) {
  preparing = preparing.then(() => addAll([...files]));
  return preparing;
}

async function addAll(files) {
  const taken = files.filter(isTaken);
  const problems = taken.length < files.length ? ["Only pictures and videos can be added."] : [];
  $("pictures").setAttribute("aria-busy", "true");
  for (const file of taken) {
    try {
      const picture = await prepare(file);
      hold(picture);
      put([...pending, picture]);
    } catch (error) {
      problems.push(error.message);
    }
  }
  $("pictures").removeAttribute("aria-busy");
  if (problems.length) showError(problems.join("\n"));
  announce(`${pending.length} to send`);
}

function show() {
  const labels = names(pending);
  const items = pending.map((picture, i) => {
    const remove = button("×", () => removeAt(i), `Remove ${labels[i].toLowerCase()}`);
    return make("li", {}, media(picture, labels[i]), remove);
  });
  $("pictures").replaceChildren(...items);
}

function removeAt(i) {
  put(pending.filter((_, other) => other !== i));
  ($("pictures").querySelectorAll("button")[i] ?? $("question")).focus();
}

// --- what is dragged and pasted ------------------------------------------------------------

const isPicture = (data) => data.types.includes("Files") || data.types.includes("text/uri-list");

function addDropped(data) {
  if (data.files.length) return add(data.files);
  const source = /<img[^>]*\ssrc="(data:image[^"]*)"/i.exec(data.getData("text/html"));
  const url = source?.[1] ?? data.getData("text/uri-list");
  if (!url.startsWith("data:image/")) return showError(ELSEWHERE);
  return add([new File([asBlob(url)], "picture", { type: asBlob(url).type })]);
}

$("file").addEventListener("change", async () => { await add($("file").files); $("file").value = ""; });
document.addEventListener("paste", (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  add(event.clipboardData.files);
});
document.addEventListener("dragover", (event) => {
  if (!isPicture(event.dataTransfer)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!isPicture(event.dataTransfer)) return;
  event.preventDefault();
  addDropped(event.dataTransfer);
});
