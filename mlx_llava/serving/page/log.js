// The conversation as it is seen. Only what changes is drawn again.

import { $, announce, button, copy, make } from "./dom.js";
import { names, waiting } from "./attachments.js";
import { inWords, isFull, showContext } from "./figures.js";
import { showMarkdown } from "./markdown.js";
import { enlargeable, holdOnly } from "./media.js";

const $welcome = $("welcome");
const AT_END = 40;

let actions = {}; // what the buttons of a turn do: {again, proceed, edit, remove, isRunning}
let drawn = new Map(); // {question, answer} by turn

export function setActions(given) {
  actions = given;
}

// --- where people read -------------------------------------------------------------------

const $log = $("log");
let isAtEnd = true; // and stays there, whatever grows; who reads further up is left there
let top = 0; // where it was scrolled to when that was known

function scrollToEnd() {
  isAtEnd = true;
  $log.scrollTop = $log.scrollHeight;
  top = $log.scrollTop;
}

// Who has just scrolled up may do so before the browser tells it.
const stay = () => isAtEnd && $log.scrollTop > top - AT_END && scrollToEnd();

// Only who scrolls up leaves the end: where it moves away meanwhile, it is followed.
$log.addEventListener("scroll", () => {
  const isNear = $log.scrollHeight - $log.scrollTop - $log.clientHeight < AT_END;
  isAtEnd = isNear || (isAtEnd && $log.scrollTop >= top);
  top = $log.scrollTop;
});
$log.addEventListener("load", stay, true);
$log.addEventListener("loadedmetadata", stay, true);
new ResizeObserver(stay).observe($log);

// --- drawing -------------------------------------------------------------------------------

// Draws a conversation anew.
export function draw(turns) {
  drawn = new Map();
  holdOnly([...waiting(), ...turns.flatMap((turn) => turn.pictures)]);
  $log.replaceChildren(...(turns.length ? [] : [$welcome]));
  turns.forEach(append);
  showTurns(turns);
  scrollToEnd();
}

export function add(turns) {
  $welcome.remove();
  append(turns.at(-1));
  showTurns(turns);
  scrollToEnd();
}

function append(turn) {
  const question = make("article", { className: "turn user" });
  const answer = make("article", { className: "turn assistant", tabIndex: -1 });
  const text = make("div", { className: "text" });
  const tools = make("div", { className: "tools" });
  answer.append(make("p", { className: "who" }), text, tools);
  drawn.set(turn, { question, answer });
  $log.append(question, answer);
  drawQuestion(turn);
}

function drawQuestion(turn) {
  const { question } = drawn.get(turn);
  const labels = names(turn.pictures);
  const shown = make("div", { className: turn.pictures.length > 2 ? "shown many" : "shown" });
  shown.append(...turn.pictures.map((picture, i) => enlargeable(picture, labels[i])));
  const tools = make("div", { className: "tools" }, button("Edit", () => edit(turn)));
  const text = make("p", { className: "text", dir: "auto", textContent: turn.text });
  const who = make("p", { className: "who", textContent: "You" });
  question.replaceChildren(who, ...(turn.pictures.length ? [shown] : []), text, tools);
}

// Shows how the answers are: whether they are being made, and what can be done with them.
export function showTurns(turns) {
  turns.forEach((turn) => showAnswer(turn, turn === turns.at(-1)));
  showContext(turns.findLast((turn) => turn.took)?.took);
}

function showAnswer(turn, isLast) {
  const { answer, question } = drawn.get(turn);
  const isRunning = actions.isRunning(turn);
  if (isRunning) answer.setAttribute("aria-busy", "true");
  else answer.removeAttribute("aria-busy");
  question.querySelector(".tools").hidden = isRunning;
  answer.querySelector(".who").textContent = turn.model ?? "Model";
  showText(turn);
  const shown = answer.querySelector(".tools");
  const state = isRunning ? "" : JSON.stringify([isLast, !turn.answer, inWords(turn)]);
  if (shown.dataset.state === state) return; // and leave the focus on its buttons
  shown.dataset.state = state;
  shown.replaceChildren(...(isRunning ? [] : tools(turn, isLast)));
  stay();
}

function tools(turn, isLast) {
  const copied = button("Copy", () => copy(turn.answer, copied));
  const goesOn = turn.answer && turn.finish !== "stop" && !isFull(turn.took);
  return [
    ...(turn.answer ? [copied] : []),
    ...(isLast && goesOn ? [button("Continue", () => actions.proceed(turn))] : []),
    ...(isLast ? [button("Again", () => actions.again(turn))] : []),
    ...(turn.problem ? [button("Remove", () => actions.remove(turn))] : []),
    make("span", { className: "figures", textContent: inWords(turn) }),
  ];
}

// Shows what an answer is so far.
export function showText(turn) {
  const element = drawn.get(turn)?.answer.querySelector(".text");
  if (!element) return;
  showMarkdown(element, turn.answer);
  stay();
}

// Says an answer once, to those who do not see it.
export function announceAnswer(turn) {
  announce(drawn.get(turn)?.answer.querySelector(".text").innerText ?? "");
}

export function focusAnswer(turn) {
  drawn.get(turn)?.answer.focus({ preventScroll: true });
}

// --- editing -------------------------------------------------------------------------------

function edit(turn) {
  const { question } = drawn.get(turn);
  const field = make("textarea", { value: turn.text, dir: "auto", rows: 3 });
  field.setAttribute("aria-label", "Edit the question");
  const leave = () => {
    drawQuestion(turn);
    question.querySelector(".tools button").focus();
  };
  const save = () => {
    drawQuestion(turn);
    actions.edit(turn, field.value.trim() || turn.text);
  };
  field.addEventListener("keydown", (event) => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key) || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    (event.key === "Enter" ? save : leave)();
  });
  question.querySelector(".text").replaceWith(field);
  question.querySelector(".tools").replaceChildren(button("Ask", save), button("Cancel", leave));
  field.focus();
  question.lastChild.scrollIntoView({ block: "nearest" });
}

$log.addEventListener("click", ({ target }) => {
  if (target.matches(".copy-code")) copy(target.nextSibling.innerText, target);
});
