// Which model answers: the server's only one, or the one that is chosen.

import { $, button, make, showError } from "./dom.js";
import { modelNames } from "./server.js";

let names = [];
let isFailing = false;

export const model = () => (names.length ? $("models").value : null);

export async function loadModels() {
  try {
    names = await modelNames();
  } catch (error) {
    isFailing = true;
    showError(error.message, button("Try again", loadModels));
    return;
  }
  $("models").replaceChildren(...names.map((name) => make("option", { textContent: name })));
  const chosen = localStorage.getItem("model");
  if (names.includes(chosen)) $("models").value = chosen;
  $("models").hidden = names.length < 2;
  $("model").classList.toggle("unseen", names.length > 1);
  show();
  if (isFailing) showError("");
  isFailing = false;
}

function show() {
  $("model").textContent = document.title = model();
}

$("models").addEventListener("change", () => {
  localStorage.setItem("model", $("models").value);
  show();
});
