// Generating: the job, its place in the queue, its tokens as they come, and its end.

import { ApiError, events, post, withoutPlace } from "./api.js";
import { $, announce, showError } from "./dom.js";
import { clearInterventionErrors, showInterventionError } from "./interventions.js";
import { boxOf } from "./output.js";
import { apiState, learn, messagesOf, newKey, store, summary, textOf } from "./state.js";

const FIELDS = ["max_new_tokens", "temperature", "top_p", "seed"];

let running = null; // {job, stopping, controller}

export const isRunning = () => running !== null;

/** Continue the prompt, or send the message of the chat, as the page stands. */
export async function generate() {
  if (running) return;
  clearErrors();
  const { data } = store;
  const chat = data.mode === "chat";
  if (chat && !data.message.trim()) return fail("write a message first", $("prompt-error"));
  const steers = data.interventions.some((one) => one.on);
  const sides = !steers ? ["plain"] : data.compare ? ["steered", "plain"] : ["steered"];
  const run = {
    id: newKey(),
    about: summary(data),
    sides: Object.fromEntries(sides.map((side) => [side, { prompt: [], tokens: [], reason: null, speed: null }])),
    setup: structuredClone({ prompt: data.prompt, interventions: data.interventions, generation: data.generation }),
  };
  const parts = chat ? conversations(data, sides) : [{ sides, state: apiState(data) }];
  if (chat) run.user = data.message;
  running = { job: null, stopping: false, controller: new AbortController() };
  buttons();
  progress("sending…");
  try {
    for (const part of parts) {
      if (!running.stopping) await follow(run, part);
    }
  } catch (error) {
    if (error.name !== "AbortError") failed(error);
  }
  for (const side of Object.values(run.sides)) side.reason ??= running.stopping ? "stopped" : "interrupted";
  running = null;
  buttons();
  const { runs, talk } = store.data;
  if (![...runs, ...talk].includes(run)) return progress("");
  sides.forEach((side) => boxOf(run, side)?.finish());
  store.keep();
  progress("");
  const ends = sides.map((side) => `${side === "plain" ? "Unsteered" : "Steered"}: ${textOf(run.sides[side])}`);
  announce(`Done. ${ends.join(" ")}`);
}

/** One request where both sides have said the same so far; otherwise each goes on from its own replies. */
function conversations(data, sides) {
  const parts = sides.map((side) => ({ sides: [side], state: apiState(data, messagesOf(data, side, data.message)) }));
  const same = parts.every(({ state }) => JSON.stringify(state) === JSON.stringify(parts[0].state));
  return same ? [{ sides, state: parts[0].state }] : parts;
}

async function follow(run, { sides, state }) {
  const stream = events("api/generate", { state, sides }, running.controller.signal);
  for await (const { event, data } of stream) {
    if (event === "error") throw new ApiError(data.message ?? data.error);
    handlers[event]?.(run, data);
    if (event === "done") return;
  }
  throw new ApiError("the server ended the text early");
}

const handlers = {
  queued(run, { job, ahead }) {
    running.job = job;
    begin(run);
    const text = ahead === 0 ? "next in the queue" : ahead === 1 ? "1 job ahead of yours" : `${ahead} jobs ahead of yours`;
    progress(text);
    if (ahead) announce(text);
  },
  start(run, { job }) {
    running.job = job;
    begin(run);
    progress("generating…");
    announce("Generating");
  },
  prompt(run, { side, tokens }) {
    run.sides[side].prompt = tokens.map((token) => kept(token));
    boxOf(run, side)?.readPrompt();
  },
  token(run, { side, index, id, text }) {
    run.sides[side].tokens[index] = { id, text, special: false, features: [] };
    boxOf(run, side)?.grow();
    const counts = Object.values(run.sides).map(({ tokens }) => tokens.length);
    progress(`generating… ${Math.max(...counts)} of ${store.data.generation.max_new_tokens} tokens`);
  },
  features(run, { side, index, features }) {
    const token = run.sides[side].tokens[index];
    if (!token) return;
    token.features = kept({ features }).features;
    boxOf(run, side)?.refresh(index);
  },
  end(run, { side, reason, tokens_per_second }) {
    Object.assign(run.sides[side], { reason, speed: tokens_per_second ?? null });
    boxOf(run, side)?.finish();
  },
};

/** A token with its activations as [id, value]; the labels are learned on the way. */
function kept({ id, text, special = false, features }) {
  features.forEach((feature) => learn(store.data, feature));
  return { id, text, special, features: features.map(({ id, value }) => [id, Number(value.toPrecision(4))]) };
}

/** The run stands on the page once the server has taken it. */
function begin(run) {
  const { runs, talk } = store.data;
  if (runs.includes(run) || talk.includes(run)) return;
  store.update((data) => {
    if (run.user === undefined) data.runs.unshift(run);
    else {
      data.talk.push(run);
      data.message = "";
    }
  }, "runs", "sent");
  boxOf(run, Object.keys(run.sides)[0])?.node.scrollIntoView({ block: "nearest" });
}

/** The last message of the chat once more, steered as the page stands now. */
export async function again() {
  const last = store.data.talk.at(-1);
  if (running || !last) return;
  const draft = store.data.message;
  store.update((data) => {
    data.talk.pop();
    data.message = last.user;
  }, "runs");
  await generate();
  const taken = store.data.talk.at(-1)?.user === last.user;
  store.update((data) => {
    if (!taken) data.talk.push(last);
    data.message = draft;
  }, "runs", "sent");
}

export async function stop() {
  if (!running || running.stopping) return;
  running.stopping = true;
  progress("stopping…");
  const { job, controller } = running;
  if (!job) return controller.abort();
  try {
    const { stopped } = await post("api/stop", { job });
    if (!stopped) controller.abort();
  } catch (error) {
    controller.abort();
    failed(error);
  }
}

function buttons() {
  $("generate").setAttribute("aria-disabled", String(running !== null));
  $("stop").setAttribute("aria-disabled", String(running === null));
  document.body.classList.toggle("generating", running !== null);
}

const progress = (text) => ($("progress").textContent = text);

/** An error beside what caused it: a card, a field of the generation, the prompt; else under the button. */
function failed(error) {
  const { message } = error;
  announce(message);
  if (showInterventionError(message)) return fail("not sent: see Steering", $("generate-error"), false);
  const text = withoutPlace(message);
  const field = FIELDS.find((name) => text.includes(name));
  field && $(field).setAttribute("aria-invalid", "true");
  const ofPrompt = /\b(prompt|messages)\b/.test(text) || error.status === 413;
  fail(text, $(field ? "settings-error" : ofPrompt ? "prompt-error" : "generate-error"));
}

function fail(message, place) {
  showError(place, message);
  place.scrollIntoView({ block: "nearest" });
}

function clearErrors() {
  for (const id of ["prompt-error", "settings-error", "generate-error"]) showError($(id), null);
  for (const name of FIELDS) $(name).removeAttribute("aria-invalid");
  clearInterventionErrors();
}
