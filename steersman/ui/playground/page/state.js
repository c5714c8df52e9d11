// What the person has set up and what the model answered: one object, kept in this tab and for the next one.

import { delayed } from "./dom.js";

const VERSION = "steersman-playground-1";
const KEPT_RUNS = 12;

const EMPTY = {
  mode: "prompt", // or "chat"
  prompt: "",
  system: "",
  message: "", // what is being written to the chat
  generation: { max_new_tokens: 40, temperature: 0, top_p: null, seed: 0 },
  compare: true,
  interventions: [], // {key, on, kind, id | name, strength, mode, units, scope, include_bos}
  watch: [], // features coloured without being steered by
  known: {}, // id -> {label, max_act} of features that were met
  hues: {}, // id -> which of the colours
  colour: "all", // or the id of the one feature that colours
  runs: [], // of the prompt, newest first: {id, about, sides: {steered, plain}}; a side: {prompt, tokens, reason, speed}
  talk: [], // of the chat, oldest first: the same with {user}; a token: {id, text, special, features: [[id, value]]}
  search: { by: "words", text: "", like: "", sort: "" },
  panel: "dose",
  dose: { key: "", strengths: "" }, // strengths as written; multiples of the intervention's own where nothing is
  target: {},
  decompose: { of: "", method: "", k: 8 },
  single_keys: true,
};

export const HUES = 6;

/** `saved` where it has the shape of `model`, `model` elsewhere: what an older page kept does no harm. */
function fitted(model, saved) {
  if (model === null) return saved === undefined || typeof saved === "number" ? (saved ?? null) : model;
  if (saved === undefined || saved === null || typeof saved !== typeof model) return model;
  if (Array.isArray(model)) return Array.isArray(saved) ? saved : model;
  if (typeof model !== "object") return saved;
  if (!Object.keys(model).length) return saved;
  return Object.fromEntries(Object.entries(model).map(([key, value]) => [key, fitted(value, saved[key])]));
}

class Store {
  constructor() {
    this.data = structuredClone(EMPTY);
    this.listeners = [];
    this.name = "";
    this.keep = delayed(() => this.#write(), 250);
    addEventListener("pagehide", () => this.keep.now());
    addEventListener("visibilitychange", () => document.hidden && this.keep.now());
  }

  /** What was set up for this model and SAE: in this tab, else what was last set up anywhere; else
   *  `defaults`. Says whether anything was. */
  open(name, defaults) {
    this.name = `${VERSION}:${name}`;
    const fresh = fitted(EMPTY, { ...structuredClone(EMPTY), ...defaults });
    this.data = structuredClone(fresh);
    let restored = false;
    for (const place of places()) {
      try {
        const saved = JSON.parse(place.getItem(this.name));
        if (saved) {
          this.data = fitted(fresh, saved);
          restored = true;
          break;
        }
      } catch {
        continue; // not ours, or damaged
      }
    }
    for (const run of [...this.data.runs, ...this.data.talk]) {
      for (const side of Object.values(run.sides)) side.reason ??= "interrupted";
    }
    return restored;
  }

  /** Change the state by `change(data)` and tell the parts of the page that look at `topics`. */
  update(change, ...topics) {
    change(this.data);
    this.data.runs.length = Math.min(this.data.runs.length, KEPT_RUNS);
    this.keep();
    this.tell(...topics);
  }

  tell(...topics) {
    for (const [topic, listener] of this.listeners) if (topics.includes(topic)) listener(this.data);
  }

  on(topic, listener) {
    this.listeners.push([topic, listener]);
  }

  #write() {
    if (!this.name) return;
    for (const place of places()) {
      let text = JSON.stringify(this.data);
      for (let runs = this.data.runs.length; runs >= 0; runs = runs ? runs >> 1 : -1) {
        try {
          place.setItem(this.name, text);
          break;
        } catch {
          text = JSON.stringify({ ...this.data, runs: this.data.runs.slice(0, runs >> 1) }); // full: fewer old runs
        }
      }
    }
  }
}

/** This tab's own storage before the one that all tabs share, so that two tabs never mix; none where both are shut. */
function places() {
  try {
    return [sessionStorage, localStorage];
  } catch {
    return [];
  }
}

export const store = new Store();

let count = 0;
export const newKey = () => `${Date.now().toString(36)}-${(count++).toString(36)}`;

/**
 * Remember what is known of a feature: its label; its largest activation (null: none; not there: not asked); and a hint
 * for one without a label, the tokens that it fires on, else those that it promotes.
 */
export function learn(data, { id, label, max_act, fires_on, promotes }) {
  const before = data.known[id] ?? { label: "", hint: "" };
  const [sign, tokens] = fires_on?.length ? ["", fires_on] : ["→ ", promotes ?? []];
  const hint = tokens.length ? sign + tokens.slice(0, 3).map((token) => token.trim()).join(", ") : before.hint;
  data.known[id] = { ...before, label: label || before.label, hint };
  if (max_act !== undefined) data.known[id].max_act = max_act;
}

/** What a feature is about: its label, else its hint. */
export function labelOf(data, id) {
  const found = data.known[id];
  return found ? found.label || found.hint : "";
}

/** Put a feature to use: remember it and give it a colour of its own while there are any. */
export function useFeature(data, feature) {
  learn(data, feature);
  if (data.hues[feature.id] !== undefined) return;
  const taken = watched(data).map((other) => data.hues[other]);
  const free = [...Array(HUES).keys()].find((hue) => !taken.includes(hue));
  data.hues[feature.id] = free ?? feature.id % HUES;
}

/** The features whose activations are asked for and coloured: those steered by and those watched, each once. */
export function watched(data) {
  const steered = data.interventions.filter((one) => one.kind === "feature").map((one) => one.id);
  return [...new Set([...steered, ...data.watch])];
}

/** The panel as the API takes it: of the prompt, or of `messages`. */
export function apiState(data, messages = null) {
  return {
    ...(messages ? { messages } : { prompt: data.prompt }),
    interventions: data.interventions.filter((one) => one.on).map(apiIntervention),
    generation: { ...data.generation, top_p: data.generation.temperature > 0 ? data.generation.top_p : null },
    watch: watched(data),
  };
}

function apiIntervention({ kind, id, name, strength, mode, units, scope, include_bos }) {
  const place = { strength, scope, include_bos };
  return kind === "feature" ? { kind, id, mode, units, ...place } : { kind, name, ...place };
}

/** The state of what is on the page now: the prompt; or the chat with what is being written to it, else up to its last
 *  question. */
export function currentState(data) {
  if (data.mode !== "chat") return apiState(data);
  const last = data.talk.at(-1);
  if (data.message.trim() || !last) return apiState(data, messagesOf(data, "steered", data.message));
  return apiState(data, messagesOf({ ...data, talk: data.talk.slice(0, -1) }, "steered", last.user));
}

/** The conversation as one side of the page had it, ending with what the person says `now`. */
export function messagesOf(data, side, now) {
  const messages = data.system.trim() ? [{ role: "system", content: data.system }] : [];
  for (const turn of data.talk) {
    const reply = turn.sides[side] ?? turn.sides.steered ?? turn.sides.plain;
    messages.push({ role: "user", content: turn.user });
    if (reply) messages.push({ role: "assistant", content: textOf(reply) });
  }
  return [...messages, { role: "user", content: now }];
}

export const textOf = (side) => side.tokens.map((token) => token.text).join("");

/** What a feature is called: its id and what it is about. */
export const featureName = (data, id) => `#${id} ${labelOf(data, id)}`.trim();

export const nameOf = (data, one) => (one.kind === "vector" ? one.name : featureName(data, one.id));

/** What steers, as {kind, id | name, amount} each: what a run was made with. */
export function summary(data) {
  const signs = { max_act: "× max", norm_frac: "× norm" };
  return data.interventions
    .filter((one) => one.on)
    .map(({ kind, id, name, mode, units, strength }) => {
      if (kind === "vector") return { kind, name, amount: `× ${strength}` };
      return { kind, id, amount: [mode === "add" ? "" : mode, strength, signs[units] ?? ""].join(" ").trim() };
    });
}
