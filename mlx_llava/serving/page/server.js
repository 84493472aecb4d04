// The server's side: which models there are, and answers as they are made.

import { headers } from "./settings.js";

const MANY_BYTES = 20_000_000;
const FEWER = "Send fewer pictures or shorter videos, or start the server with a larger --max-body.";

// What the server does not do, in its words; `code` is for what can be done about it.
class Refusal extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { headers: headers(), ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(unreachable(options.body ?? ""), "unreachable");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const { message = `The server answered ${response.status}.`, code } = Object(told.error);
  throw new Refusal(code === "request_too_large" ? `${message} ${FEWER}` : message, code);
}

function unreachable(body) {
  const large = `, or the ${Math.round(body.length / 1e6)} MB of pictures are too much for it (--max-body)`;
  return (
    `The server at ${location.host} cannot be reached${body.length > MANY_BYTES ? large : ""}. ` +
    "Is it still running? Start it again, then try again; nothing is lost."
  );
}

export async function modelNames() {
  const { data } = await (await send("v1/models")).json();
  return data.map((model) => model.id);
}

const known = new Map();

// A model's context length, and whether it knows videos; nothing where the server does not tell.
export async function about(model) {
  if (!known.has(model)) {
    const body = JSON.stringify({ model });
    const told = await send("api/show", { method: "POST", body }).then((r) => r.json(), () => null);
    if (!told) return {};
    const length = Object.entries(told.model_info).find(([name]) => name.endsWith(".context_length"));
    known.set(model, { context: length?.[1], knowsVideos: told.capabilities.includes("video") });
  }
  return known.get(model);
}

// The objects of an answer's stream of events.
export async function* chunks(request, signal) {
  const stream = { stream: true, stream_options: { include_usage: true } };
  const body = JSON.stringify({ ...request, ...stream });
  const response = await send("v1/chat/completions", { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refusal("The connection was lost.", "unreachable");
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message, chunk.error.code);
      yield chunk;
    }
  }
}
