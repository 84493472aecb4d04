// Pictures and videos as they are seen, from blobs that are held or kept.

import { $, make } from "./dom.js";
import * as store from "./store.js";

const held = new Map(); // blobs that are shown or wait, by the id of their picture
const urls = new Map();

export const hold = ({ id, blob }) => held.set(id, blob);

// The blob of a picture; nothing where the browser has lost it.
export async function blobOf({ id }) {
  if (!held.has(id)) held.set(id, await store.picture(id));
  return held.get(id);
}

// Lets go of all pictures but those of some turns.
export function holdOnly(pictures) {
  const wanted = new Set(pictures.map(({ id }) => id));
  for (const id of held.keys()) if (!wanted.has(id)) held.delete(id);
  for (const [id, url] of urls) {
    if (wanted.has(id)) continue;
    URL.revokeObjectURL(url);
    urls.delete(id);
  }
}

async function urlOf(picture) {
  const blob = await blobOf(picture);
  if (blob && !urls.has(picture.id)) urls.set(picture.id, URL.createObjectURL(blob));
  return urls.get(picture.id);
}

// An element for a picture, which it gets as soon as it is read.
export function media(picture, name) {
  const isVideo = picture.kind === "Video";
  const element = isVideo
    ? make("video", { muted: true, controls: true, preload: "metadata" })
    : make("img", { alt: name });
  element.setAttribute("aria-label", name);
  element.title = picture.name;
  urlOf(picture).then((url) => { if (url) element.src = url; });
  return element;
}

// A small picture that a press makes large; videos have controls of their own.
export function enlargeable(picture, name) {
  const small = media(picture, name);
  if (picture.kind === "Video") return small;
  const press = make("button", { type: "button", className: "enlarge" }, small);
  press.setAttribute("aria-label", `Enlarge ${name.toLowerCase()}`);
  press.addEventListener("click", () => {
    $("viewer-picture").replaceChildren(media(picture, name));
    $("viewer").showModal();
  });
  return press;
}
