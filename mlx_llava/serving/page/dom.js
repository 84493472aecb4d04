// What every part of the page draws with, and how it speaks to people.

export const $ = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A button; one that shows only a sign has a name too.
export function button(text, action, name) {
  const element = make("button", { type: "button", textContent: text });
  if (name) {
    element.setAttribute("aria-label", name);
    element.title = name;
  }
  element.addEventListener("click", action);
  return element;
}

// Tells screen readers something once.
export function announce(text) {
  $("announcer").replaceChildren(make("span", { textContent: text })); // also what was said last
}

// What went wrong, and what can be done about it.
export function showError(text, ...actions) {
  const close = button("", () => showError(""), "Close");
  close.className = "close";
  $("error").replaceChildren(...(text ? [text, ...actions, close] : []));
  $("error").hidden = !text;
}

let leaving = 0;

// What was done, for a while, with a way back.
export function showNotice(text, action) {
  clearTimeout(leaving);
  $("notice").replaceChildren(text, ...(action ? [action] : []));
  $("notice").hidden = !text;
  if (text) leaving = setTimeout(showNotice, 10_000, "");
}

// Whether people agree; Escape is no.
export function confirmed(question, agree) {
  const dialog = $("confirm");
  $("confirm-question").textContent = question;
  $("confirm-agree").textContent = agree;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "agree"), { once: true });
  });
}

// Copies also where the page has no secure address, as on a phone in the same network.
export async function copy(text, pressed) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copySelected(text);
  } catch {
    showError("The browser does not let this page copy; select the text and copy it.");
    return;
  }
  const before = pressed.textContent;
  pressed.textContent = "Copied";
  announce("Copied");
  setTimeout(() => { pressed.textContent = before; }, 2000);
}

function copySelected(text) {
  const field = make("textarea", { className: "unseen", value: text });
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  if (!isCopied) throw new Error("refused");
}

// Gives a file to the browser's downloads.
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// Of many calls within so many milliseconds, does the last.
export function later(milliseconds, action) {
  let waiting = 0;
  return () => {
    clearTimeout(waiting);
    waiting = setTimeout(action, milliseconds);
  };
}
