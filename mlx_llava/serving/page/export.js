// Conversations as files: Markdown to be read, JSON with all that is kept.

import { download } from "./dom.js";
import { asDataUrl } from "./pictures.js";
import * as store from "./store.js";

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
