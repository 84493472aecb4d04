// Turns -> what the server reads.

import { blobOf } from "./media.js";
import { asDataUrl } from "./pictures.js";
import { setting } from "./settings.js";

// The messages up to a turn, whose answer they begin if it has begun.
export async function messages(turns, turn, knowsVideos) {
  const upTo = turns.slice(0, turns.indexOf(turn) + 1).filter((one) => one === turn || !one.problem);
  const newest = upTo.findLast(({ pictures }) => pictures.length);
  const system = setting("system");
  const said = system ? [{ role: "system", content: system }] : [];
  for (const one of upTo) {
    const shown = setting("shown") === "all" || one === newest ? one.pictures : [];
    const parts = await Promise.all(shown.map((picture) => part(picture, knowsVideos)));
    said.push({ role: "user", content: [...parts, { type: "text", text: one.text }] });
    if (one.answer) said.push({ role: "assistant", content: one.answer });
  }
  return said;
}

// An animation is a video to models that know videos; others see its first picture.
async function part(picture, knowsVideos) {
  const blob = await blobOf(picture);
  if (!blob) throw new Error(`${picture.name} is not in this browser's storage any more.`);
  const url = await asDataUrl(blob);
  const isVideo = picture.kind === "Video" || (picture.kind === "Animation" && knowsVideos);
  return isVideo ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };
}
