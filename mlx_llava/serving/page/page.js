// A conversation about pictures. What the model says is text and is only ever set as text.

import { forgetAll, forget, list, save } from "./history.js";

const $ = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed", "shown", "theme", "key"];

let model = null;
let conversation = empty();
let pending = []; // pictures and videos that go with the next question, as data: URLs
let running = null; // the AbortController of the answer that is being made

// conversation: {id, turns: [{text, pictures, answer, figures}]}
function empty() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), turns: [] };
}

// --- settings ------------------------------------------------------------------------------

function loadSettings() {
  for (const name of SETTINGS) {
    const field = $(name);
    const stored = localStorage.getItem(name);
    if (stored !== null) field.value = stored;
    field.addEventListener("change", () => {
      localStorage.setItem(name, field.value);
      if (name === "theme") showTheme();
      if (name === "key") loadModel();
    });
  }
  showTheme();
}

function showTheme() {
  const theme = $("theme").value;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

function request() {
  const body = { model, messages: messages(), stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const value = $(name).value;
    if (value !== "") body[name] = Number(value);
  }
  return body;
}

function messages() {
  const last = conversation.turns.findLast((turn) => turn.pictures.length);
  const said = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  for (const turn of conversation.turns) {
    const shown = $("shown").value === "all" || turn === last ? turn.pictures : [];
    const parts = shown.map((url) => (isVideo(url) ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } }));
    said.push({ role: "user", content: [...parts, { type: "text", text: turn.text }] });
    if (turn !== conversation.turns.at(-1)) {
      said.push({ role: "assistant", content: turn.answer });
    }
  }
  return said;
}

// --- the server ----------------------------------------------------------------------------

async function refusal(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function loadModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw new Error(await refusal(response));
    model = (await response.json()).data[0].id;
    $("model").textContent = document.title = model;
    showError("");
  } catch (error) {
    showError(error.message);
  }
}

// The objects of an answer's stream of events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The connection was lost.");
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(turn) {
  const mine = conversation;
  const before = { answer: turn.answer, figures: turn.figures };
  const started = performance.now();
  running = new AbortController();
  Object.assign(turn, { answer: "", figures: "" });
  showRunning();
  showError("");
  const shown = draw().at(-1);
  shown.setAttribute("aria-busy", "true");
  try {
    const body = JSON.stringify(request());
    const options = { method: "POST", headers: headers(), body, signal: running.signal };
    const response = await fetch("v1/chat/completions", options);
    if (!response.ok) throw new Error(await refusal(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice?.delta.content) addText(turn, shown, choice.delta.content);
      if (chunk.usage) turn.figures = figures(chunk, performance.now() - started);
    }
  } catch (error) {
    turn.figures = "stopped";
    if (error.name !== "AbortError") showError(error.message);
    if (error.name !== "AbortError" && !turn.answer) takeBack(turn, before);
  }
  running = null;
  showRunning();
  draw();
  await remember(mine);
  $("question").focus();
}

// A question that was refused goes back to where it was written; an old answer comes back.
function takeBack(turn, before) {
  Object.assign(turn, before);
  if (before.answer) return;
  conversation.turns.pop();
  $("question").value = turn.text;
  pending = turn.pictures;
  grow();
  showPending();
}

function figures({ usage, timings }, milliseconds) {
  const { encode, prefill, decode } = timings;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const speed = usage.completion_tokens > 1 ? (usage.completion_tokens - 1) / decode : 0;
  return [
    `${usage.prompt_tokens} + ${usage.completion_tokens} tokens` + (cached ? `, ${cached} known` : ""),
    `first after ${(encode + prefill).toFixed(2)} s`,
    ...(speed ? [`${speed.toFixed(1)} tokens/s`] : []),
    `${(milliseconds / 1000).toFixed(2)} s in all`,
  ].join(" · ");
}

// --- what is seen --------------------------------------------------------------------------

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function button(text, action) {
  const element = make("button", "", text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

function draw() {
  const isLast = (turn) => turn === conversation.turns.at(-1);
  const drawn = conversation.turns.flatMap((turn) => [drawQuestion(turn), drawAnswer(turn, isLast(turn))]);
  $("log").replaceChildren(...(drawn.length ? drawn : [$welcome]));
  $("log").scrollTop = $("log").scrollHeight;
  return drawn;
}

function drawQuestion(turn) {
  const article = make("article", "turn user");
  article.append(make("p", "who", "You"));
  if (turn.pictures.length) {
    const shown = make("div", "shown");
    shown.append(...turn.pictures.map((url, i) => picture(url, `${kind(url)} ${i + 1}`)));
    article.append(shown);
  }
  article.append(make("p", "text", turn.text));
  return article;
}

function drawAnswer(turn, isLast) {
  const article = make("article", "turn assistant");
  article.append(make("p", "who", model ?? "Model"), make("p", "text", turn.answer));
  const tools = make("div", "tools");
  if (!(running && isLast)) {
    tools.append(button("Copy", () => copy(turn.answer)));
    if (isLast) tools.append(button("Again", () => running || answer(turn)));
    tools.append(make("span", "figures", turn.figures));
  }
  article.append(tools);
  return article;
}

function isVideo(url) {
  return url.startsWith("data:video/");
}

function kind(url) {
  return isVideo(url) ? "Video" : "Picture";
}

function picture(url, name) {
  if (!isVideo(url)) return Object.assign(make("img"), { src: url, alt: name });
  const video = Object.assign(make("video"), { src: url, muted: true, controls: true, preload: "metadata" });
  video.setAttribute("aria-label", name);
  return video;
}

function addText(turn, shown, text) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  turn.answer += text;
  shown.querySelector(".text").append(text);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function showPending() {
  const items = pending.map((url, i) => {
    const item = make("li");
    const remove = button("×", () => { pending.splice(i, 1); showPending(); });
    remove.setAttribute("aria-label", `Remove ${kind(url).toLowerCase()} ${i + 1}`);
    item.append(picture(url, `${kind(url)} ${i + 1}`), remove);
    return item;
  });
  $("pictures").replaceChildren(...items);
  $("log").scrollTop = $("log").scrollHeight;
}

function showRunning() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    showError("The browser does not let this page copy.");
  }
}

// --- pictures ------------------------------------------------------------------------------

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function add(files) {
  const pictures = [...files].filter((file) => /^(image|video)\//.test(file.type));
  if (files.length && !pictures.length) showError("Only pictures and videos can be added.");
  try {
    pending.push(...await Promise.all(pictures.map(asDataUrl)));
  } catch (error) {
    showError(error.message);
  }
  showPending();
}

// --- history -------------------------------------------------------------------------------

async function remember(conversation) {
  if (!conversation.turns.length) return;
  try {
    await save({ ...conversation, at: Date.now() });
  } catch {
    return; // private windows may refuse to store
  }
  await showHistory();
}

async function showHistory() {
  const stored = await list().catch(() => []);
  const items = stored.map((old) => {
    const item = make("li");
    const open = button(old.turns[0].text || "A picture", () => show(old));
    if (old.id === conversation.id) open.setAttribute("aria-current", "true");
    const remove = button("×", async () => {
      await forget(old.id);
      if (old.id === conversation.id) show(empty());
      else await showHistory();
    });
    remove.setAttribute("aria-label", `Forget ${open.textContent}`);
    item.append(open, remove);
    return item;
  });
  $("conversations").replaceChildren(...items);
}

function show(other) {
  running?.abort();
  conversation = other;
  showError("");
  draw();
  showHistory();
  $("question").focus();
}

// --- what people do ------------------------------------------------------------------------

async function ask() {
  if (!model) await loadModel();
  const text = $("question").value.trim();
  if (!model || running || !(text || pending.length)) return;
  const turn = { text: text || "Describe the picture.", pictures: pending, answer: "", figures: "" };
  conversation.turns.push(turn);
  pending = [];
  $("question").value = "";
  grow();
  showPending();
  answer(turn);
}

function grow() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

const $welcome = $("welcome");
$("form").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.abort();
});
$("file").addEventListener("change", async () => { await add($("file").files); $("file").value = ""; });
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) {
    event.preventDefault();
    add(event.clipboardData.files);
  }
});
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").hidden = false; });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  add(event.dataTransfer.files);
});
$("new").addEventListener("click", () => show(empty()));
$("show-settings").addEventListener("click", () => $("settings").showModal());
$("show-history").addEventListener("click", () => {
  $("history").hidden = !$("history").hidden;
  $("show-history").setAttribute("aria-expanded", String(!$("history").hidden));
});
$("forget").addEventListener("click", async () => { await forgetAll(); show(empty()); });

loadSettings();
loadModel();
showHistory();
