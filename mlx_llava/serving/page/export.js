// Conversations as files: Markdown to be read, JSON with all that is kept, to be opened again.

import { download } from "./dom.js";
import { asDataUrl, thumbnail } from "./pictures.js";
import * as store from "./store.js";
import { asBlob } from "./upgrade.js";

export async function saveMarkdown(id) {
  const { title, turns } = await store.read(id);
  const parts = turns.flatMap(({ text, pictures, answer, model }) => [
    "**You**",
    ...pictures.map(({ kind, name }) => `*${kind}: ${name}*`),
    text,
    `**${model ?? "Model"}**`,
    answer,
  ]);
  download(`${fileName(title)}.md`, "text/markdown", `${[`# ${title}`, ...parts].join("\n\n")}\n`);
}

export async function saveJson(id) {
  const conversation = await whole(id);
  download(`${fileName(conversation.title)}.json`, "application/json", written([conversation]));
}

export async function saveAll() {
  const all = [];
  for (const { id } of await store.list()) all.push(await whole(id));
  download("conversations.json", "application/json", written(all));
}

const written = (conversations) => JSON.stringify({ version: 2, conversations }, null, 1);

async function whole(id) {
  const { title, at, turns } = await store.read(id);
  return { title, at: new Date(at).toISOString(), turns: await Promise.all(turns.map(wholeTurn)) };
}

async function wholeTurn({ text, pictures, answer, model, finish, took, made }) {
  const shown = await Promise.all(pictures.map(async ({ id, kind, name }) => {
    const blob = await store.picture(id);
    return { kind, name, url: blob ? await asDataUrl(blob) : null };
  }));
  return { at: new Date(made).toISOString(), question: text, pictures: shown, model, answer, finish, took };
}

const fileName = (title) => title.replace(/[^\p{L}\p{N}]+/gu, " ").trim().slice(0, 60) || "conversation";

// --- opening what was saved ----------------------------------------------------------------

// Adds the conversations of a file to those that are kept; how many they are.
export async function openSaved(file) {
  const { version, conversations } = JSON.parse(await file.text());
  if (version !== 2) throw new Error("no conversations");
  for (const conversation of conversations) await openOne(conversation);
  return conversations.length;
}

async function openOne({ title, at, turns }) {
  const conversation = { id: store.newId(), title: String(title), at: Date.parse(at), thumbnail: null };
  for (const turn of turns) {
    const { pictures, ...said } = turn;
    const named = pictures.filter(({ url }) => url).map((picture) => ({ ...picture, id: store.newId() }));
    const blobs = named.map(({ id, url }) => [id, asBlob(url)]);
    const first = named.findIndex(({ kind }) => kind !== "Video");
    if (first >= 0) conversation.thumbnail ??= await thumbnail(blobs[first][1]).catch(() => null);
    await store.save(conversation, opened(said, named), blobs);
  }
}

function opened({ at, question, answer, model, finish, took }, pictures) {
  const made = Date.parse(at);
  const shown = pictures.map(({ id, kind, name }) => ({ id, kind, name }));
  const said = { text: String(question), answer: String(answer), model, finish, took };
  return { id: store.newId(), made, started: made, pictures: shown, ...said };
}
