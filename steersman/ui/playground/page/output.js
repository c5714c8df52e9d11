// The texts side by side: tokens coloured by the features that are watched, with every value on hover and focus.

import { get } from "./api.js";
import { $, button, el, naming, number, shown } from "./dom.js";
import { featureRow } from "./features.js";
import { swatch } from "./interventions.js";
import { labelOf, learn, nameOf, store, watched } from "./state.js";

const TITLES = { steered: "Steered", plain: "Unsteered" };
const ENDS = { stop: "the model ended it", length: "length reached", stopped: "stopped", interrupted: "broke off" };

const views = new Map(); // id of a run -> {node, ...}
const tokens = new WeakMap(); // node -> {run, side, token}
let again = () => {};

export function openOutput(actions) {
  again = actions.again;
  const runs = $("runs");
  runs.addEventListener("pointerover", (event) => showTip(event.target.closest(".tok")));
  runs.addEventListener("pointerleave", () => showTip(null));
  runs.addEventListener("focusin", (event) => onFocus(event.target));
  runs.addEventListener("focusout", (event) => onBlur(event.target));
  runs.addEventListener("click", (event) => pick(event.target.closest(".tok")));
  runs.addEventListener("keydown", onKey);
  addEventListener("scroll", () => showTip(null), { passive: true });
  for (const topic of ["interventions", "watch", "colour", "known"]) {
    store.on(topic, showLegend);
    store.on(topic, paintAll);
  }
  for (const topic of ["runs", "mode"]) store.on(topic, showRuns);
  showLegend();
  showRuns();
}

/** The runs of the prompt, newest first, or of the chat, oldest first. */
export function showRuns() {
  const { mode, runs, talk } = store.data;
  const list = mode === "chat" ? talk : runs;
  for (const id of views.keys()) if (![...runs, ...talk].some((run) => run.id === id)) views.delete(id);
  for (const run of list) if (!views.has(run.id)) views.set(run.id, view(run));
  const nodes = list.map((run) => views.get(run.id).node);
  $("runs").replaceChildren(...(nodes.length ? nodes : [welcome(mode)]));
  list.forEach((run, at) => views.get(run.id).place(mode === "chat" && at === list.length - 1));
}

function welcome(mode) {
  const steps = mode === "chat"
    ? ["Write a message above and press Send.", "Add features on the side; the next reply is steered by them.",
      "Each side goes on from its own replies."]
    : ["Write the beginning of a text and press Generate.", "Find a feature, add it, move its slider, generate again.",
      "The newest text stands on top; the last twelve are kept."];
  return el("ol", { class: "empty steps" }, ...steps.map((text) => el("li", { text })));
}

const title = (run) => run.about.map((one) => `${nameOf(store.data, one)} ${one.amount}`).join(", ") || "Nothing steers";

function about(run) {
  if (!run.about.length) return ["Nothing steers: the model alone."];
  return run.about.flatMap((one, at) => [at ? " · " : "", one.kind === "vector" ? naming(undefined, one.name) : naming(one.id, labelOf(store.data, one.id)), ` ${one.amount}`]);
}

function view(run) {
  const boxes = Object.fromEntries(Object.keys(run.sides).map((side) => [side, box(run, side)]));
  const restore = button("Use this setup", () => setUp(run), { class: "quiet" });
  const redo = button("Again, as steered now", () => again(), { class: "quiet" });
  const remove = button("×", () => forget(run), { class: "quiet sign", "aria-label": "Remove this text", title: "Remove" });
  const head = el("div", { class: "row run-head" }, el("p", { class: "small muted about" }, ...about(run)), restore, redo, remove);
  const picked = el("div", { class: "picked", hidden: true });
  const node = el("article", { class: "run", "aria-label": shown(title(run)) });
  if (run.user !== undefined) node.append(el("p", { class: "user", dir: "auto", text: shown(run.user, "↵\n") }));
  const pair = el("div", { class: "pair" }, ...Object.values(boxes).map((one) => one.node));
  node.append(pair, picked, head);
  if (run.user === undefined) node.prepend(head);

  function place(last) {
    restore.hidden = run.user !== undefined;
    redo.hidden = !last;
    remove.hidden = run.user !== undefined && !last;
  }
  return { node, boxes, picked, place };
}

function setUp(run) {
  store.update((data) => Object.assign(data, structuredClone(run.setup)), "interventions", "setup");
}

function forget(run) {
  store.update((data) => {
    data.runs = data.runs.filter((other) => other.id !== run.id);
    data.talk = data.talk.filter((other) => other.id !== run.id);
  }, "runs");
  $("prompt").focus();
}

function box(run, side) {
  const heading = TITLES[side];
  const text = el("div", { class: "text", role: "group", tabindex: "0", dir: "auto", "aria-label": `${heading} text`, "aria-describedby": "legend-hint" });
  const foot = el("p", { class: "foot small muted" });
  const node = el("div", { class: `box ${side}` }, el("h3", { text: heading }), text, foot);
  const nodes = [];
  const state = run.sides[side];
  const prompt = el("span", { class: "of-prompt" });
  text.append(prompt);
  if (run.user !== undefined) {
    const read = el("details", { class: "small" }, el("summary", { text: "as the model read it" }));
    const inside = el("div", { class: "text", dir: "auto" }, prompt);
    read.append(inside);
    text.before(read);
  }

  function readPrompt() {
    prompt.replaceChildren(...state.prompt.map((token) => tokenNode(run, side, token)));
    prompt.childNodes.forEach(paint);
  }
  function grow() {
    for (const token of state.tokens.slice(nodes.length)) {
      const one = tokenNode(run, side, token);
      nodes.push(one);
      text.append(one);
      paint(one);
    }
    finish();
  }
  function refresh(index) {
    if (nodes[index]) paint(nodes[index]);
  }
  function finish() {
    const running = state.reason === null;
    text.setAttribute("aria-busy", String(running));
    node.classList.toggle("running", running);
    const count = state.tokens.length === 1 ? "1 token" : `${state.tokens.length} tokens`;
    const speed = state.speed ? ` · ${number(state.speed, 2)} a second` : "";
    foot.textContent = running ? count : `${count}${speed} · ${ENDS[state.reason] ?? shown(state.reason)}`;
  }
  readPrompt();
  grow();
  return { node, readPrompt, grow, refresh, finish, text };
}

export const boxOf = (run, side) => views.get(run.id)?.boxes[side];

function tokenNode(run, side, token) {
  const node = el("span", { class: token.special ? "tok special" : "tok", tabindex: "-1", text: shown(token.text, "↵\n") });
  if (!token.text) node.classList.add("part");
  tokens.set(node, { run, side, token });
  return node;
}

/** The activations of a token: [id, value]; of a character in several tokens the largest. */
function valuesOf(node) {
  const found = new Map(tokens.get(node).token.features);
  let before = node.previousElementSibling;
  for (; before?.classList.contains("part"); before = before.previousElementSibling) {
    for (const [id, value] of tokens.get(before).token.features) if (!(found.get(id) >= value)) found.set(id, value);
  }
  return found;
}

/** How strong a value is beside the largest one known of the feature. */
function ratio(id, value) {
  const largest = store.data.known[id]?.max_act;
  return largest ? Math.abs(value) / largest : value ? 0.5 : 0;
}

function paint(node) {
  const { colour } = store.data;
  const { special } = tokens.get(node).token; // of a special token the values are outliers: attention sinks
  const ids = special ? [] : colour === "all" ? watched(store.data) : [Number(colour)];
  const values = valuesOf(node);
  let best = { ratio: 0, id: null };
  for (const id of ids) {
    const size = ratio(id, values.get(id) ?? 0);
    if (size > best.ratio) best = { ratio: size, id };
  }
  node.dataset.hue = best.id === null ? "none" : String(store.data.hues[best.id] ?? "none");
  node.style.setProperty("--share", String(Math.min(1, best.ratio)));
}

const paintAll = () => document.querySelectorAll("#runs .tok").forEach(paint);

function showLegend() {
  const ids = watched(store.data);
  const { colour } = store.data;
  if (colour !== "all" && !ids.includes(Number(colour))) store.data.colour = "all";
  const choose = (value) => store.update((data) => (data.colour = value), "colour");
  const chip = (value, ...inside) => {
    const node = button("", () => choose(value), { class: "chip", "aria-pressed": String(store.data.colour === value || ids.length === 1), data: { colour: value } });
    node.append(...inside);
    return node;
  };
  const chips = ids.map((id) => chip(String(id), swatch({ kind: "feature", id }), naming(id, labelOf(store.data, id))));
  const hint = ids.length
    ? "Hover or focus a token for its values; press it for its features."
    : "Tokens take the colours of the features that you steer by or watch. Press a token for its features.";
  const focused = document.activeElement?.dataset?.colour;
  $("legend").replaceChildren(...(ids.length > 1 ? [chip("all", "strongest")] : []), ...chips, el("p", { class: "muted small", id: "legend-hint", text: hint }));
  if (focused) $("legend").querySelector(`[data-colour="${CSS.escape(focused)}"]`)?.focus();
}

function showTip(node) {
  const tip = $("tip");
  const known = node && !node.classList.contains("chosen") && tokens.get(node);
  tip.hidden = !known;
  if (!known) return;
  const values = [...valuesOf(node)];
  const seen = new Set(watched(store.data));
  const rows = values
    .sort(([a, x], [b, y]) => seen.has(b) - seen.has(a) || Math.abs(y) - Math.abs(x))
    .slice(0, 10)
    .map(([id, value]) => {
      const largest = store.data.known[id]?.max_act;
      const share = largest ? `${number(value / largest, 2)} × max` : "";
      return el("li", {}, swatch({ kind: "feature", id: seen.has(id) ? id : -1 }), el("span", { class: "name" }, naming(id, labelOf(store.data, id))),
        el("span", { class: "value", text: number(value) }), el("span", { class: "muted", text: share }));
    });
  const { token } = known;
  const head = el("p", {}, el("b", { class: "token-name", dir: "auto", text: shown(token.text || "(part of a character)") }),
    el("span", { class: "muted", text: ` token ${token.id}` }));
  const none = el("p", { class: "muted", text: token.features.length ? "" : "no activations" });
  tip.replaceChildren(head, rows.length ? el("ul", { class: "plain-list" }, ...rows) : none);
  const at = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = at.bottom + 6 + height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
  tip.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - height - 6)}px`;
}

/** The features of a token, to add and to watch, under its text. */
function pick(node) {
  const known = node && tokens.get(node);
  if (!known) return;
  const { picked } = views.get(known.run.id);
  document.querySelectorAll(".tok.chosen").forEach((other) => other.classList.remove("chosen"));
  node.classList.add("chosen");
  const values = [...valuesOf(node)].filter(([, value]) => value !== 0).sort(([, x], [, y]) => Math.abs(y) - Math.abs(x));
  const rows = values.map(([id, value]) => pickedRow(id, value));
  const close = button("×", () => {
    picked.hidden = true;
    node.classList.remove("chosen");
    node.focus();
  }, { class: "quiet sign", "aria-label": "Close the list", title: "Close" });
  const head = el("div", { class: "row" }, el("p", { class: "small" }, "Features on ", el("b", { class: "token-name", dir: "auto", text: shown(known.token.text) })), close);
  const none = el("p", { class: "muted small", text: "none is known: the values of a text's last token come with the next one" });
  picked.replaceChildren(head, rows.length ? el("ol", { class: "plain-list results" }, ...rows) : none);
  picked.hidden = false;
  showTip(null);
}

/** A feature of a token, with what it is about as soon as the server has said so. */
function pickedRow(id, value) {
  const row = () => featureRow({ id, value, ...store.data.known[id] });
  const node = row();
  if (store.data.known[id]?.max_act === undefined) {
    get(`api/features/${id}`).then((feature) => {
      learn(store.data, feature);
      if (!node.contains(document.activeElement)) node.replaceWith(row());
    }, () => {}); // the row says less
  }
  return node;
}

function onFocus(node) {
  if (!node.classList.contains("tok")) return;
  node.setAttribute("role", "button");
  node.setAttribute("aria-describedby", "tip");
  showTip(node);
}

function onBlur(node) {
  if (!node.classList.contains("tok")) return;
  node.removeAttribute("role");
  node.removeAttribute("aria-describedby");
  showTip(null);
}

function onKey(event) {
  const text = event.target.closest(".text");
  if (!text || event.ctrlKey || event.metaKey || event.altKey) return;
  const all = [...text.querySelectorAll(".tok:not(.part)")];
  const at = all.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? all.length - 1 : at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to !== undefined && all[to]) {
    event.preventDefault();
    all[to].focus();
  } else if (at >= 0 && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    pick(event.target);
    views.get(tokens.get(event.target).run.id).picked.querySelector("button")?.focus();
  }
}
