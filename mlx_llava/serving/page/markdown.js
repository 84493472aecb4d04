// What a model says, as Markdown: never as HTML, and nothing of it is fetched.

import { button, make } from "./dom.js";
import "./vendor/markdown-it.min.js";
import "./vendor/purify.min.js";

const TAGS = [
  ..."p br hr strong em s a code pre blockquote ul ol li".split(" "),
  ..."h1 h2 h3 h4 h5 h6 table thead tbody tr th td".split(" "),
];
const SAFE = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "align", "start"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
const BLOCKS = "p, li, h1, h2, h3, h4, h5, h6, blockquote, th, td";

const reader = globalThis.markdownit({ html: false, linkify: true, breaks: true }).disable("image");
reader.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
// The page's policy allows no style="text-align:right".
reader.core.ruler.push("align", ({ tokens }) => {
  for (const token of tokens) {
    const style = token.attrGet("style");
    if (style) token.attrs = [["align", style.replace("text-align:", "")]];
  }
});

function render(text) {
  const fragment = globalThis.DOMPurify.sanitize(reader.render(text), SAFE);
  for (const block of fragment.querySelectorAll(BLOCKS)) block.dir = "auto";
  for (const link of fragment.querySelectorAll("a")) {
    Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
  }
  for (const code of fragment.querySelectorAll("pre")) {
    const frame = make("div", { className: "code", dir: "ltr" });
    code.replaceWith(frame);
    const press = button("Copy", () => {}, "Copy code");
    press.className = "copy-code";
    code.tabIndex = 0; // to be scrolled with the keyboard
    frame.append(press, code);
  }
  return fragment;
}

// Shows a text in an element. What has not changed is left as it is, so that a selection stays
// where it was while the text grows.
export function showMarkdown(element, text) {
  morph(element, render(text));
}

function morph(into, from) {
  const nodes = [...from.childNodes];
  nodes.forEach((wanted, i) => {
    const found = into.childNodes[i];
    if (!found) into.append(wanted);
    else if (!found.isEqualNode(wanted)) change(found, wanted);
  });
  while (into.childNodes.length > nodes.length) into.lastChild.remove();
}

function change(found, wanted) {
  const isAlike = found.nodeName === wanted.nodeName;
  if (isAlike && found.nodeType === Node.TEXT_NODE) {
    if (wanted.data.startsWith(found.data)) found.appendData(wanted.data.slice(found.length));
    else found.data = wanted.data;
  } else if (isAlike && found.cloneNode().isEqualNode(wanted.cloneNode())) {
    morph(found, wanted);
  } else {
    found.replaceWith(wanted);
  }
}
