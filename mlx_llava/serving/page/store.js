// Conversations that this browser keeps, in IndexedDB: a record for each conversation, each turn
// and each picture, so that tabs write beside each other, and what is forgotten stays so.

import { upgrade } from "./upgrade.js";

const ALL = ["conversations", "turns", "pictures"];
const channel = new BroadcastChannel("mlx_llava");
let opening = null;

const LONGEST_TITLE = 200;

export const titleOf = (question) => question.trim().split("\n")[0].slice(0, LONGEST_TITLE);
export const newId = () => crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mlx_llava", 2);
    request.onupgradeneeded = ({ oldVersion }) => upgrade(request.result, request.transaction, oldVersion);
    request.onerror = () => reject(request.error);
    request.onsuccess = () => resolve(request.result);
  });
  opening.then(
    (database) => { database.onversionchange = database.onclose = () => { database.close(); opening = null; }; },
    () => { opening = null; },
  );
  return opening;
}

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// Does all of something or nothing of it, on the three stores.
async function transact(mode, action) {
  const database = await open();
  const transaction = database.transaction(ALL, mode);
  const stores = Object.fromEntries(ALL.map((name) => [name, transaction.objectStore(name)]));
  const ended = new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = () => reject(transaction.error ?? new Error("The browser stored nothing."));
  });
  const result = action(stores).catch((error) => { abort(transaction); throw error; });
  const [, value] = await Promise.all([ended, result]);
  return value;
}

function abort(transaction) {
  try { transaction.abort(); } catch { /* it has ended already */ }
}

// --- several tabs --------------------------------------------------------------------------

// Calls back with {id, isForgotten} where another tab has changed a conversation; no id is for all.
export function onChange(action) {
  channel.addEventListener("message", ({ data }) => action(data));
}

const tell = (id, isForgotten = false) => channel.postMessage({ id, isForgotten });

// --- reading -------------------------------------------------------------------------------

// All conversations, without what was said, the newest first.
export async function list() {
  const stored = await transact("readonly", ({ conversations }) => done(conversations.getAll()));
  return stored.sort((a, b) => b.at - a.at);
}

// A conversation with its turns; nothing where it was forgotten.
export const read = (id) => transact("readonly", async ({ conversations, turns }) => {
  const conversation = await done(conversations.get(id));
  const said = await done(turns.index("conversation").getAll(id));
  return conversation && { ...conversation, turns: said.sort((a, b) => a.made - b.made) };
});

export const picture = (id) =>
  transact("readonly", async ({ pictures }) => (await done(pictures.get(id)))?.blob);

// Which conversations have some words in them.
export async function search(words) {
  const wanted = words.toLowerCase();
  const has = (text) => text.toLowerCase().includes(wanted);
  const [named, said] = await transact("readonly", async ({ conversations, turns }) => [
    await done(conversations.getAll()), await done(turns.getAll()),
  ]);
  const found = said.filter((turn) => has(turn.text) || has(turn.answer));
  return new Set([...named.filter(({ title }) => has(title)).map(({ id }) => id), ...found.map((t) => t.conversation)]);
}

// --- writing -------------------------------------------------------------------------------

// Keeps a turn and its pictures, unless its conversation was forgotten meanwhile. What another
// tab has begun to answer since stays, and this turn comes to stand beside it.
export async function save({ id, title, at, thumbnail, isStored }, turn, blobs) {
  const isKept = await transact("readwrite", async ({ conversations, turns, pictures }) => {
    const stored = await done(conversations.get(id));
    if (isStored && !stored) return false;
    const other = await done(turns.get(turn.id));
    if (other?.started > turn.started) turn.id = newId();
    conversations.put({ id, title, thumbnail, at, ...stored, ...newer(stored, { at, thumbnail }) });
    turns.put({ ...turn, conversation: id });
    for (const [picture, blob] of blobs) pictures.put({ id: picture, conversation: id, blob });
    return true;
  });
  if (isKept) tell(id);
  return isKept;
}

const newer = (stored, { at, thumbnail }) => ({
  at: Math.max(at, stored?.at ?? 0),
  thumbnail: stored?.thumbnail ?? thumbnail,
});

// Changes some fields of a conversation that is there.
export async function change(id, fields) {
  await transact("readwrite", async ({ conversations }) => {
    const stored = await done(conversations.get(id));
    if (stored) conversations.put({ ...stored, ...fields });
  });
  tell(id);
}

export async function removeTurn(conversation, turn) {
  await transact("readwrite", async ({ turns, pictures }) => {
    turns.delete(turn.id);
    for (const { id } of turn.pictures) pictures.delete(id);
  });
  tell(conversation.id);
}

// Forgets a conversation; what it was, to be restored.
export async function forget(id) {
  const records = await transact("readwrite", async (stores) => {
    const { conversations, turns, pictures } = stores;
    const removed = {
      conversations: [await done(conversations.get(id))].filter(Boolean),
      turns: await done(turns.index("conversation").getAll(id)),
      pictures: await done(pictures.index("conversation").getAll(id)),
    };
    for (const name of ALL) removed[name].forEach((record) => stores[name].delete(record.id));
    return removed;
  });
  tell(id, true);
  return records;
}

export async function restore(records) {
  await transact("readwrite", async (stores) => {
    for (const name of ALL) records[name].forEach((record) => stores[name].put(record));
  });
  for (const { id } of records.conversations) tell(id);
}

export async function forgetAll() {
  await transact("readwrite", async (stores) => ALL.forEach((name) => stores[name].clear()));
  tell(undefined, true);
}
