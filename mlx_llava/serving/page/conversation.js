// The conversation that is open, and the answers that are being made, in whichever conversations.

import * as attachments from "./attachments.js";
import { $, button, showError, showNotice } from "./dom.js";
import { figures } from "./figures.js";
import { fresh, keepCut, read, remember, unkept } from "./keeping.js";
import * as log from "./log.js";
import { blobOf, hold } from "./media.js";
import { messages } from "./messages.js";
import { loadModels, model } from "./models.js";
import { about, chunks } from "./server.js";
import { options, set, setting } from "./settings.js";
import * as store from "./store.js";

// How often an answer is kept while it is made, in milliseconds.
const KEEP_EVERY = 1000;
const FRAME = 16;
const TOO_MUCH = ["context_length_exceeded", "too_many_images", "request_too_large"];

let current = fresh();
let changed = () => {};
const runs = new Map(); // {conversation, turn, controller} by the id of the conversation

export const currentId = () => current.id;
export const isRunning = () => runs.has(current.id);
export const stop = () => runs.get(current.id)?.controller.abort();

// Calls back where the list of conversations is no longer what it was.
export function whenChanged(action) {
  changed = action;
}

// --- which one is open ---------------------------------------------------------------------

function show(conversation) {
  current = conversation;
  const { pathname, search } = location;
  history.replaceState(null, "", current.turns.length ? `#${current.id}` : pathname + search);
  showError("");
  log.draw(current.turns);
  showRunning();
  changed();
}

export const start = () => show(fresh());

export async function open(id) {
  const kept = runs.get(id)?.conversation ?? (await read(id));
  show(kept ?? fresh());
}

// Takes over what another tab has written.
export async function refresh(id) {
  if (id !== current.id || isRunning() || current.behind.size) return;
  const kept = await read(id);
  if (!kept || id !== current.id || isRunning()) return;
  const isSame = kept.turns.map((turn) => turn.id).join() === current.turns.map((turn) => turn.id).join();
  if (!isSame) {
    current = kept;
    log.draw(current.turns);
    return;
  }
  current.turns.forEach((turn, i) => Object.assign(turn, kept.turns[i]));
  log.showTurns(current.turns);
}

// Lets go of a conversation that is forgotten, or of all: of its answer nothing is kept any more.
export function leave(id) {
  for (const { conversation, controller } of runs.values()) {
    if (id && conversation.id !== id) continue;
    conversation.isForgotten = true;
    controller.abort();
  }
  if (!id || id === current.id) start();
}

function showRunning() {
  const focused = document.activeElement;
  $("send").hidden = isRunning();
  $("stop").hidden = !isRunning();
  if (focused === $("send") && isRunning()) $("stop").focus();
  if (focused === $("stop") && !isRunning()) $("question").focus();
}

// --- what people do ------------------------------------------------------------------------

export async function ask(text) {
  const conversation = current;
  const pictures = attachments.take();
  const named = pictures.map(({ id, kind, name }) => ({ id, kind, name }));
  pictures.forEach(({ id }) => unkept.add(id));
  const turn = { id: store.newId(), made: Date.now(), text, pictures: named, answer: "" };
  conversation.turns.push(turn);
  conversation.title ||= store.titleOf(text);
  conversation.at = turn.made;
  history.replaceState(null, "", `#${conversation.id}`);
  await run(conversation, turn, { isNew: true });
}

async function again(turn) {
  await run(current, turn);
}

async function proceed(turn) {
  await run(current, turn, { prefill: turn.answer });
}

// Asks another question in place of one. What followed on it stays, in a conversation of its own.
async function edit(turn, text) {
  if (isRunning()) return;
  const isLast = turn === current.turns.at(-1);
  if (!isLast) {
    await copyUpTo(turn);
    showNotice("The conversation as it was is kept; this is a new one.");
  }
  const edited = current.turns.at(-1);
  if (current.title === store.titleOf(edited.text)) await rename(current, store.titleOf(text));
  edited.text = text;
  log.draw(current.turns);
  await run(current, edited);
}

async function rename(conversation, title) {
  conversation.title = title;
  if (conversation.isStored) await store.change(conversation.id, { title }).catch(() => {});
}

async function copyUpTo(turn) {
  const turns = current.turns.slice(0, current.turns.indexOf(turn) + 1);
  const { title, thumbnail } = current;
  const copied = { ...fresh(), title, thumbnail, at: Date.now(), turns: await Promise.all(turns.map(copyTurn)) };
  for (const one of copied.turns) await remember(copied, one);
  show(copied);
}

async function copyTurn(turn) {
  const pictures = await Promise.all(turn.pictures.map(async (picture) => {
    const copied = { ...picture, id: store.newId() };
    hold({ ...copied, blob: await blobOf(picture) });
    unkept.add(copied.id);
    return copied;
  }));
  return { ...turn, id: store.newId(), pictures };
}

async function remove(turn) {
  current.turns = current.turns.filter((other) => other !== turn);
  await dropTurn(current, turn);
  if (current.turns.length) log.draw(current.turns);
  else start();
}

async function dropTurn(conversation, turn) {
  if (!conversation.isStored) return;
  const isEmpty = !conversation.turns.length;
  await (isEmpty ? store.forget(conversation.id) : store.removeTurn(conversation, turn)).catch(() => {});
  if (isEmpty) conversation.isStored = false;
}

log.setActions({ again, proceed, edit, remove, isRunning: (turn) => runs.get(current.id)?.turn === turn });

// --- an answer -----------------------------------------------------------------------------

async function run(conversation, turn, { prefill = "", isNew = false } = {}) {
  if (runs.has(conversation.id)) return;
  const before = { ...turn };
  const controller = new AbortController();
  runs.set(conversation.id, { conversation, turn, controller });
  const begun = { started: Date.now(), answer: prefill, model: model() };
  Object.assign(turn, begun, { finish: null, took: null, problem: null });
  showError("");
  if (isNew) log.add(conversation.turns);
  else showTurns(conversation);
  showRunning();
  if (!isNew) log.focusAnswer(turn);
  await remember(conversation, turn);
  changed();
  const error = await receive(conversation, turn, controller.signal).then(() => null, (error) => error);
  runs.delete(conversation.id);
  if (error) await settle(error, conversation, turn, { before, prefill, isNew });
  const isKept = await remember(conversation, turn);
  showTurns(conversation);
  showRunning();
  if (isKept) await refresh(conversation.id); // another tab may have written meanwhile
  if (conversation === current) log.announceAnswer(turn);
}

function showTurns(conversation) {
  if (conversation === current) log.showTurns(conversation.turns);
}

async function receive(conversation, turn, signal) {
  const began = performance.now();
  const { context, knowsVideos } = await about(turn.model);
  const said = await messages(conversation.turns, turn, knowsVideos);
  const request = { model: turn.model, messages: said, ...options() };
  let kept = began;
  for await (const { choices: [choice], usage, timings } of chunks(request, signal)) {
    if (choice?.delta.content) grow(turn, choice.delta.content);
    turn.finish = choice?.finish_reason ?? turn.finish;
    if (usage) turn.took = figures({ usage, timings }, (performance.now() - began) / 1000, context);
    if (performance.now() - kept < KEEP_EVERY) continue;
    kept = performance.now();
    remember(conversation, turn);
  }
}

let isWaiting = false;
let cost = 0; // of drawing, in milliseconds

// Draws what came since the last time: once a frame, or as often as takes a fifth of the time.
function grow(turn, text) {
  turn.answer += text;
  if (isWaiting) return;
  isWaiting = true;
  setTimeout(drawGrown, Math.max(FRAME, 4 * cost));
}

function drawGrown() {
  isWaiting = false;
  const began = performance.now();
  if (isRunning()) log.showText(runs.get(current.id).turn);
  cost = performance.now() - began;
}

// What becomes of a turn whose answer did not come, or not whole.
async function settle(error, conversation, turn, { before, prefill, isNew }) {
  if (error.name === "AbortError") {
    turn.finish = "stopped";
    return;
  }
  const isBegun = turn.answer !== prefill;
  if (isBegun) turn.finish = "lost";
  else if (isNew && isBlank() && conversation === current) await takeBack(conversation, turn);
  else Object.assign(turn, before, { problem: before.answer ? null : error.message });
  if (conversation === current) showError(error.message, ...remedies(error, turn));
}

const isBlank = () => !$("question").value.trim() && !attachments.waiting().length;

// A question that was refused goes back to where it was written, unless another is there by now.
async function takeBack(conversation, turn) {
  conversation.turns.pop();
  await dropTurn(conversation, turn);
  if (!conversation.turns.length) conversation.title = "";
  $("question").value = turn.text;
  $("question").dispatchEvent(new Event("input"));
  attachments.put(turn.pictures);
  log.draw(conversation.turns);
  changed();
}

function remedies({ code }, turn) {
  const retry = () => (current.turns.includes(turn) ? again(turn) : $("form").requestSubmit());
  const shown = [...current.turns.map(({ pictures }) => pictures), attachments.waiting()];
  const hasEarlier = shown.filter(({ length }) => length).length > 1;
  if (code === "unreachable") {
    return [button("Try again", async () => { await loadModels(); retry(); })];
  }
  if (TOO_MUCH.includes(code) && hasEarlier && setting("shown") === "all") {
    return [button("Show the model only the newest pictures", () => { set("shown", "last"); retry(); })];
  }
  return [];
}

addEventListener("pagehide", () => keepCut(runs.values()));
