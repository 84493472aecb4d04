// Keeping conversations in the browser while they are held, and going on.

import { showNotice } from "./dom.js";
import { blobOf } from "./media.js";
import { thumbnail } from "./pictures.js";
import * as store from "./store.js";

const CUT = "cut"; // where what a reload cuts off is kept until the page is back

export const unkept = new Set(); // ids of pictures that are not stored yet

// conversation: {id, title, at, thumbnail, turns, isStored, isForgotten, behind, keeping}, of which
// `behind` are the turns that are not stored as they are, and `keeping` ends when all else is.
// turn: {id, made, started, text, pictures, answer, model, finish, took, problem}
function held(conversation) {
  return { ...conversation, behind: new Set(), keeping: Promise.resolve() };
}

export function fresh() {
  return held({ id: store.newId(), title: "", at: 0, thumbnail: null, isStored: false, turns: [] });
}

export async function read(id) {
  const kept = await store.read(id).catch(() => null);
  return kept && held({ ...kept, isStored: true });
}

// Keeps a turn after all that is being kept; whether the conversation is then stored as it is.
export function remember(conversation, turn) {
  conversation.behind.add(turn);
  conversation.keeping = conversation.keeping.then(() => keepAll(conversation));
  return conversation.keeping;
}

async function keepAll(conversation) {
  for (const turn of [...conversation.behind]) {
    conversation.behind.delete(turn);
    if (conversation.isForgotten || !conversation.turns.includes(turn)) continue;
    try {
      conversation.isForgotten = !(await keep(conversation, turn));
    } catch (error) {
      conversation.behind.add(turn);
      tellUnkept(error);
      return false;
    }
  }
  return !conversation.isForgotten;
}

// Whether it was kept, and not forgotten meanwhile.
async function keep(conversation, turn) {
  const fresh = turn.pictures.filter(({ id }) => unkept.has(id));
  const blobs = await Promise.all(fresh.map(async (picture) => [picture.id, await blobOf(picture)]));
  conversation.thumbnail ??= await thumbnailOf(fresh);
  if (!(await store.save(conversation, turn, blobs))) return false;
  conversation.isStored = true;
  fresh.forEach(({ id }) => unkept.delete(id));
  return true;
}

async function thumbnailOf(pictures) {
  const first = pictures.find(({ kind }) => kind !== "Video");
  return first ? thumbnail(await blobOf(first)).catch(() => null) : null;
}

function tellUnkept(error) {
  showNotice(
    error.name === "QuotaExceededError"
      ? "The browser has no room left: this conversation is not kept. Forget others, or pictures in them."
      : "The browser does not keep this conversation: private windows may not.",
  );
}

// Keeps what answers are so far when the page goes away, where nothing can be waited for.
export function keepCut(runs) {
  const cut = [...runs].map(({ conversation, turn }) => [conversation.id, turn.id, turn.answer]);
  sessionStorage.setItem(CUT, JSON.stringify(cut));
}

// Stores what was being answered when the page went away.
export async function recover() {
  const cut = JSON.parse(sessionStorage.getItem(CUT) ?? "[]");
  sessionStorage.removeItem(CUT);
  for (const [id, turnId, answer] of cut) {
    const kept = await read(id);
    const turn = kept?.turns.find((one) => one.id === turnId);
    if (turn && !turn.finish) await remember(kept, Object.assign(turn, { answer }));
  }
}
