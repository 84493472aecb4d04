// What people set, which this browser keeps.

import { $ } from "./dom.js";

const NAMES = ["system", "temperature", "top_p", "max_tokens", "seed", "shown", "theme", "key"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

export const setting = (name) => $(name).value;

export function set(name, value) {
  $(name).value = value;
  localStorage.setItem(name, value);
}

export function loadSettings(onKey) {
  for (const name of NAMES) {
    const stored = localStorage.getItem(name);
    if (stored !== null) $(name).value = stored;
    $(name).addEventListener("change", () => {
      localStorage.setItem(name, $(name).value);
      if (name === "theme") showTheme();
      if (name === "key") onKey();
    });
  }
  showTheme();
}

function showTheme() {
  const theme = setting("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

// The options of an answer that are set.
export function options() {
  const given = NUMBERS.filter((name) => setting(name) !== "");
  return Object.fromEntries(given.map((name) => [name, Number(setting(name))]));
}

export function headers() {
  const key = setting("key");
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}
