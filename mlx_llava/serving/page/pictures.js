// Files that people have -> pictures and videos that the server reads, none larger than a model sees.

import { make } from "./dom.js";
import { newId } from "./store.js";

// No model sees more of a picture; what is no larger goes as it is, byte for byte.
const LONGEST_SIDE = 2048;
const THUMBNAIL = 96;
const BEGINNINGS = {
  JPEG: /^\xff\xd8\xff/,
  PNG: /^\x89PNG\r\n\x1a\n/,
  GIF: /^GIF8[79]a/,
  WebP: /^RIFF[^]{4}WEBP/,
};
const ENDINGS = { heic: "HEIC", heif: "HEIC", avif: "AVIF", tif: "TIFF", tiff: "TIFF", bmp: "BMP", svg: "SVG" };
const VIDEOS = /\.(mp4|m4v|mov|webm|mkv)$/i;

const ending = (file) => ENDINGS[file.name.split(".").at(-1).toLowerCase()];
const isVideo = (file) => file.type.startsWith("video/") || (!file.type && VIDEOS.test(file.name));

export const isTaken = (file) => isVideo(file) || file.type.startsWith("image/") || Boolean(ending(file));

// {id, kind, name, blob} of a file; an Error says what to do where there is no way.
export async function prepare(file) {
  const named = { id: newId(), name: file.name };
  if (isVideo(file)) return { ...named, kind: "Video", blob: file };
  const start = await bytes(file.slice(0, 64));
  const format = Object.keys(BEGINNINGS).find((name) => BEGINNINGS[name].test(start));
  const kind = (await isAnimated(file, format)) ? "Animation" : "Picture";
  const image = await decoded(file).catch(() => { throw new Error(unreadable(file, format)); });
  const longest = Math.max(image.width, image.height);
  const isReady = format && (kind === "Animation" || longest <= LONGEST_SIDE);
  return { ...named, kind, blob: isReady ? file : await redrawn(image, file, format) };
}

function unreadable(file, format) {
  const type = ending(file);
  if (format || !type) return `${file.name} is broken, or no picture.`;
  const other = type === "HEIC" ? " Safari can; or" : " Please";
  return `${file.name}: this browser cannot open ${type}.${other} save it as JPEG or PNG first.`;
}

async function bytes(blob) {
  return String.fromCharCode(...new Uint8Array(await blob.arrayBuffer()));
}

async function isAnimated(file, format) {
  if (format === "WebP") return (await bytes(file.slice(30, 34))) === "ANIM";
  if (format !== "GIF") return false;
  const all = new Uint8Array(await file.arrayBuffer());
  let frames = 0; // each begins with a graphic control extension
  for (let i = all.indexOf(0x21); i >= 0 && frames < 2; i = all.indexOf(0x21, i + 1)) {
    if (all[i + 1] === 0xf9 && all[i + 2] === 4 && all[i + 7] === 0) frames += 1;
  }
  return frames > 1;
}

// An image as the browser shows it, turned as it was held.
async function decoded(blob) {
  const url = URL.createObjectURL(blob);
  try {
    const image = make("img", { src: url });
    await image.decode();
    const { naturalWidth: width, naturalHeight: height } = image;
    return { image, width: width || 1024, height: height || 1024 }; // a drawing may have no size
  } finally {
    URL.revokeObjectURL(url);
  }
}

function redrawn({ image, width, height }, file, format) {
  const room = LONGEST_SIDE / Math.max(width, height);
  const scale = ending(file) === "SVG" ? room : Math.min(1, room);
  const isPhotograph = format === "JPEG" || format === "WebP" || ["HEIC", "AVIF"].includes(ending(file));
  return drawn(image, [0, 0, width * scale, height * scale], isPhotograph ? "image/jpeg" : "image/png");
}

// A square from the middle of a picture, for lists.
export async function thumbnail(blob) {
  const { image, width, height } = await decoded(blob);
  const scale = THUMBNAIL / Math.min(width, height);
  const [left, top] = [(THUMBNAIL - width * scale) / 2, (THUMBNAIL - height * scale) / 2];
  return drawn(image, [left, top, width * scale, height * scale], "image/jpeg", THUMBNAIL);
}

// What is transparent is white, as the model sees it.
function drawn(image, [left, top, width, height], type, side) {
  const canvas = make("canvas", { width: side ?? Math.round(width), height: side ?? Math.round(height) });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(image, left, top, width, height);
  return new Promise((resolve, reject) => {
    const refuse = () => reject(new Error("The browser cannot make this picture smaller."));
    canvas.toBlob((blob) => (blob ? resolve(blob) : refuse()), type, 0.95);
  });
}

export function asDataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("A picture of this conversation cannot be read any more."));
    reader.readAsDataURL(blob);
  });
}
