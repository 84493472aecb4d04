// What an answer took, in words.

import { $ } from "./dom.js";

const count = (number) => number.toLocaleString("en");

// What a stream's last chunk tells, as it is kept with a turn.
export function figures({ usage, timings }, seconds, context) {
  const wrote = usage.completion_tokens;
  return {
    read: usage.prompt_tokens,
    remembered: usage.prompt_tokens_details.cached_tokens,
    wrote,
    context,
    first: timings.encode + timings.prefill,
    speed: wrote > 1 ? (wrote - 1) / timings.decode : null,
    seconds,
  };
}

// What is told below an answer: how it ended, where it did not end by itself, and what it took.
export function inWords(turn) {
  return [turn.problem ?? ending(turn), ...(turn.took ? taken(turn.took) : [])].filter(Boolean).join(" · ");
}

function taken({ read, remembered, wrote, context, first, speed, seconds }) {
  return [
    `read ${count(read)} tokens${context ? ` of ${count(context)}` : ""}` +
      (remembered ? ` (${count(remembered)} remembered)` : ""),
    `wrote ${count(wrote)}`,
    `first word after ${first.toFixed(2)} s`,
    speed && `${speed.toFixed(1)} tokens per second`,
    `${seconds.toFixed(2)} s in all`,
  ];
}

export const isFull = (took) => took?.context && took.read + took.wrote >= took.context;

const ENDINGS = {
  stop: "",
  stopped: "stopped",
  lost: "cut off, as the connection was lost",
  length: "cut off at the longest length of an answer",
};

function ending({ finish, took }) {
  if (finish === "length" && isFull(took)) return "cut off, as the model's context is full";
  return ENDINGS[finish] ?? "not finished";
}

// How much of a model's context a conversation fills.
export function showContext(took) {
  $("context").hidden = !took?.context;
  if (!took?.context) return;
  const used = took.read + took.wrote;
  Object.assign($("context-meter"), { max: took.context, high: took.context * 0.8, value: used });
  $("context-text").textContent = `${count(used)} of ${count(took.context)} tokens`;
}
