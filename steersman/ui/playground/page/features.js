// Finding features: by words of their labels and tokens, or by a text that activates them; and what each is about.

import { get, post } from "./api.js";
import { $, announce, button, delayed, el, label, number, percent, quoted, shown, showError } from "./dom.js";
import { addFeature } from "./interventions.js";
import { currentState, learn, store, useFeature, watched } from "./state.js";

const PAGE = 50;

let about = null;
const pending = new Set(); // ids of features that are being asked for
let asked = new AbortController();

export function openFeatures(server) {
  about = server;
  const { search } = store.data;
  $("search").value = search.text;
  if (search.sort) $("sort").value = search.sort;
  $("find-text").value = search.like;
  for (const radio of document.querySelectorAll("input[name=by]")) {
    radio.checked = radio.value === search.by;
    radio.addEventListener("change", () => choose(radio.value));
  }
  const soon = delayed(() => byWords(), 200);
  $("search").addEventListener("input", () => {
    store.update((data) => (data.search.text = $("search").value));
    soon();
  });
  $("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter") soon.now();
    if (event.key === "ArrowDown") $("results").querySelector("button")?.focus();
  });
  $("sort").addEventListener("change", () => {
    store.update((data) => (data.search.sort = $("sort").value));
    byWords();
  });
  $("find-text").addEventListener("input", () => store.update((data) => (data.search.like = $("find-text").value)));
  $("find-run").addEventListener("click", () => byText({ text: $("find-text").value }));
  $("find-prompt").addEventListener("click", () => {
    const { prompt, messages } = currentState(store.data);
    byText(messages ? { messages } : { text: prompt });
  });
  $("find-more").addEventListener("click", () => byWords($("results").childElementCount));
  for (const topic of ["interventions", "watch"]) {
    store.on(topic, marks);
    store.on(topic, complete);
  }
  complete();
  choose(search.by);
}

/** Ask for the largest activations of features in use of which they are not known: those of a text, of a recipe. */
async function complete() {
  const missing = watched(store.data).filter((id) => store.data.known[id]?.max_act === undefined && !pending.has(id));
  for (const id of missing) {
    pending.add(id);
    try {
      const feature = await get(`api/features/${id}`);
      store.update((data) => learn(data, feature), "known");
    } catch {
      pending.delete(id); // asked again when something changes
    }
  }
}

function choose(by) {
  store.update((data) => (data.search.by = by));
  $("by-words").hidden = by !== "words";
  $("by-text").hidden = by !== "text";
  if (by === "words") return byWords();
  asked.abort();
  fill([], "");
}

async function byWords(offset = 0) {
  const { text, sort } = store.data.search;
  const found = await ask((signal) =>
    get("api/features", { q: text.trim(), sort: sort || "match", limit: PAGE, offset }, signal));
  if (!found) return;
  const count = found.total === 1 ? "1 feature" : `${found.total.toLocaleString("en")} features`;
  const nothing = text.trim() ? `no feature with “${text.trim()}” in its label or tokens; try “by a text”` : "no features";
  fill(found.features, found.total ? count : nothing, offset > 0);
  $("find-more").hidden = $("results").childElementCount >= found.total;
}

async function byText(given) {
  if (given.text?.trim() === "") return showError($("find-error"), "write a text first");
  const found = await ask((signal) => post("api/activating", given, signal));
  if (found) fill(found.features, found.features.length ? "strongest first" : "no feature is active on this text");
}

/** What the last question that was asked is answered; null for an earlier one, and after an error. */
async function ask(question) {
  asked.abort();
  asked = new AbortController();
  $("results").setAttribute("aria-busy", "true");
  try {
    const found = await question(asked.signal);
    showError($("find-error"), null);
    return found;
  } catch (error) {
    if (error.name === "AbortError") return null;
    showError($("find-error"), error);
    fill([], "");
    return null;
  } finally {
    $("results").removeAttribute("aria-busy");
  }
}

function fill(features, count, more = false) {
  store.update((data) => features.filter(({ id }) => data.known[id]).forEach((feature) => learn(data, feature)));
  const rows = features.map(featureRow);
  if (more) $("results").append(...rows);
  else $("results").replaceChildren(...rows);
  $("find-count").textContent = shown(count);
  $("find-more").hidden = true;
  if (more) rows[0]?.querySelector("button").focus();
}

/** A feature in a list: what it is about in a line, buttons to steer by it and to watch it, and more when opened. */
export function featureRow(feature) {
  const name = `feature ${feature.id}`;
  const detail = el("div", { class: "detail", hidden: true });
  const open = button("", () => toggle(feature, open, detail), { class: "open", "aria-expanded": "false" });
  open.append(el("span", { class: "id", text: `#${feature.id}` }), " ", title(feature));
  const add = button("Add", () => addFeature(feature), { "aria-label": `Add ${name} to steering` });
  const watch = button("Watch", () => toggleWatch(feature), { class: "quiet watch", "aria-label": `Watch ${name}`, "aria-pressed": "false" });
  const node = el(
    "li", { class: "feature", data: { id: feature.id } },
    el("div", { class: "row" }, open, watch, add), el("p", { class: "muted small facts", text: facts(feature) }), detail,
  );
  mark(node);
  return node;
}

function title(feature) {
  if (feature.label) return label(feature.label, { class: "label clamped", title: shown(feature.label) });
  if (feature.hint) return label(feature.hint, { class: "label clamped muted" });
  const [sign, tokens] = feature.fires_on?.length ? ["", feature.fires_on] : ["→ ", feature.promotes ?? []];
  if (!tokens.length) return el("span", { class: "muted", text: feature.dead ? "never active" : "no label" });
  return el("span", { class: "label muted" }, sign, ...tokens.slice(0, 4).flatMap((token) => [quoted(token), " "]));
}

function facts({ value, token, count, density, max_act, dead }) {
  const parts = [];
  if (value !== undefined) parts.push(`${number(value)} here`);
  if (token !== undefined) parts.push(`at “${shown(token)}”`);
  if (count > 1) parts.push(`on ${count} tokens`);
  if (dead) parts.push("never active on the store");
  else if (max_act !== undefined && max_act !== null) parts.push(`max ${number(max_act)}`);
  if (density !== undefined && density !== null && !dead) parts.push(`on ${percent(density)} of tokens`);
  return parts.join(" · ");
}

async function toggle(feature, open, detail) {
  const opening = detail.hidden;
  open.setAttribute("aria-expanded", String(opening));
  detail.hidden = !opening;
  if (!opening || detail.childElementCount) return;
  detail.append(el("p", { class: "muted small", text: "reading…" }));
  try {
    const full = await get(`api/features/${feature.id}`);
    detail.replaceChildren(...describe(full));
  } catch (error) {
    detail.replaceChildren(el("p", { class: "error", text: shown(error.message) }));
  }
}

function describe(feature) {
  const tokens = (list) => el("dd", {}, ...list.slice(0, 8).flatMap((token) => [quoted(token), " "]));
  const list = el("dl", { class: "facts-list small" });
  const row = (name, value) => list.append(el("dt", { text: name }), value);
  if (feature.source) row("label from", el("dd", { text: shown(feature.source) }));
  if (feature.fires_on?.length) row("fires on", tokens(feature.fires_on));
  if (feature.promotes?.length) row("promotes", tokens(feature.promotes));
  if (feature.suppresses?.length) row("suppresses", tokens(feature.suppresses));
  const nodes = [list];
  if (feature.contexts?.length) {
    const contexts = feature.contexts.map((context) =>
      el("li", { class: "context", dir: "auto" },
        el("span", { class: "value", text: number(context.activation) }),
        shown(context.before), el("mark", { text: shown(context.token) }), shown(context.after)));
    nodes.push(el("ul", { class: "plain-list contexts", "aria-label": "Contexts" }, ...contexts));
  }
  if (feature.neighbours?.length) {
    const near = feature.neighbours.map((other) =>
      el("li", {}, button(`#${other.id}`, () => searchFor(other.id), { class: "quiet", "aria-label": `Look up feature ${other.id}` }),
        label(other.label || ""), el("span", { class: "muted", text: ` ${number(other.cosine, 2)}` })));
    nodes.push(el("p", { class: "small muted", text: "nearest, by the cosine of their directions" }),
      el("ul", { class: "plain-list near small" }, ...near));
  }
  return nodes;
}

export function searchFor(text) {
  document.querySelector("input[name=by][value=words]").checked = true;
  $("search").value = text;
  store.update((data) => (data.search.text = String(text)));
  choose("words");
  $("search").focus();
}

export function toggleWatch(feature) {
  const watching = store.data.watch.includes(feature.id);
  if (!watching && store.data.watch.length >= about.limits.watch) {
    return showError($("find-error"), `at most ${about.limits.watch} watched at once`);
  }
  store.update((data) => {
    if (watching) data.watch = data.watch.filter((id) => id !== feature.id);
    else {
      useFeature(data, feature);
      data.watch.push(feature.id);
    }
  }, "watch");
  announce(watching ? `feature ${feature.id} is no longer watched` : `feature ${feature.id} is watched`);
}

const marks = () => document.querySelectorAll("li.feature").forEach(mark);

function mark(node) {
  const id = Number(node.dataset.id);
  const steers = store.data.interventions.some((one) => one.kind === "feature" && one.id === id);
  const watched = store.data.watch.includes(id);
  node.classList.toggle("steers", steers);
  const watch = node.querySelector(".watch");
  watch.setAttribute("aria-pressed", String(watched));
  watch.textContent = watched ? "Watched" : "Watch";
}
