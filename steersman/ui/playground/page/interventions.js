// What steers: one card for each feature or vector, with its slider, its mode, units and scope.

import { withoutPlace } from "./api.js";
import { $, announce, button, el, label, naming, number, select, shown, showError } from "./dom.js";
import { labelOf, nameOf, newKey, store, useFeature } from "./state.js";

const FACTORS = { scale: [0, 4], project_out: [0, 1] }; // modes whose strength is a plain factor
const RISING = ["floor", "cap"]; // modes of which a strength below 0 is rare
const OTHER = "other";

let about = null;
const cards = new Map(); // key -> {node, fill, error}

export function openInterventions(server) {
  about = server;
  $("vector-add").addEventListener("click", () => addVector($("vector").value));
  showVectors();
  store.on("interventions", show);
  store.on("mode", show);
  store.on("known", show);
  show();
}

export function addFeature(feature, strength = null) {
  const { interventions } = store.data;
  const there = interventions.find((one) => one.kind === "feature" && one.id === feature.id);
  if (there) return goTo(there.key, `feature ${feature.id} steers already`);
  const { mode, scope } = about.defaults;
  const largest = feature.max_act ?? store.data.known[feature.id]?.max_act;
  const units = largest === 0 || largest === null ? "raw" : about.defaults.units; // undefined: not known yet
  add({ kind: "feature", id: feature.id, mode, units, scope, strength: strength ?? about.defaults.strength }, feature);
}

export function addVector(name, strength = 1) {
  add({ kind: "vector", name, scope: about.defaults.scope, strength: Number(strength.toPrecision(4)) });
}

function add(one, feature = null) {
  if (store.data.interventions.length >= about.limits.features) {
    return showError($("steering-error"), `at most ${about.limits.features} at once: remove one first`);
  }
  const key = newKey();
  store.update(
    (data) => {
      if (feature) useFeature(data, feature);
      data.interventions.push({ key, on: true, include_bos: false, ...one });
    },
    "interventions",
  );
  announce(`${nameOf(store.data, one)} added to steering`);
}

/** A vector that the server holds now; it can be added from the menu. */
export function newVector(vector) {
  about.vectors = [...about.vectors.filter((other) => other.name !== vector.name), vector];
  showVectors();
  store.tell("vectors");
}

function showVectors() {
  $("vector-row").hidden = !about.vectors.length;
  const options = about.vectors.map((v) => el("option", { value: v.name, text: shown(v.name) }));
  $("vector").replaceChildren(...options);
}

function goTo(key, text) {
  announce(text);
  const { node } = cards.get(key);
  node.scrollIntoView({ block: "nearest" });
  node.querySelector("input[type=range]").focus({ preventScroll: true });
}

/** The cards as the state has them; those that are there already stay, and with them the focus and the slider held. */
function show() {
  const { interventions } = store.data;
  showError($("steering-error"), null);
  for (const [key, card] of cards) {
    if (interventions.some((one) => one.key === key)) continue;
    card.node.remove();
    cards.delete(key);
  }
  for (const one of interventions) {
    if (!cards.has(one.key)) {
      cards.set(one.key, card(one.key));
      $("interventions").append(cards.get(one.key).node);
    }
    cards.get(one.key).fill();
  }
  $("steering-empty").hidden = interventions.length > 0;
  const off = interventions.filter((one) => !one.on).length;
  const count = interventions.length === 1 ? "1 intervention" : `${interventions.length} interventions`;
  $("steering-count").textContent = interventions.length ? count + (off ? `, ${off} off` : "") : "";
}

const find = (key) => store.data.interventions.find((one) => one.key === key);

function card(key) {
  const first = find(key);
  const isFeature = first.kind === "feature";
  const name = shown(isFeature ? `feature ${first.id}` : first.name);
  const called = () => (isFeature ? naming(first.id, labelOf(store.data, first.id)) : label(first.name));
  const change = (fields, ...topics) => store.update(() => Object.assign(find(key), fields), ...topics);

  const on = el("input", { type: "checkbox", "aria-label": `${name}: on`, on: { change: () => change({ on: on.checked }, "interventions") } });
  const slider = el("input", { type: "range", "aria-label": `${name}: strength`, on: { input: () => strength(Number(slider.value)) } });
  const field = el("input", {
    type: "number", step: "any", inputmode: "decimal", "aria-label": `${name}: strength, exact`,
    on: { input: () => typed() },
  });
  const title = el("span", { class: "name clamped" });
  const worth = el("span", { class: "muted small worth" });
  const error = el("p", { class: "error", hidden: true });
  const settings = el("div", { class: "settings menus" });
  const node = el(
    "li", { class: "intervention", data: { key } },
    el("div", { class: "row" }, on, swatch(first), title, worth,
      button("×", () => remove(key), { class: "quiet sign", "aria-label": `${name}: remove`, title: "Remove" })),
    el("div", { class: "row strength" }, slider, field),
    settings, error,
  );

  function strength(value) {
    change({ strength: value }, "strength");
    if (document.activeElement !== field) field.value = value;
    slider.value = value;
    showWorth();
    showError(error, null);
    field.removeAttribute("aria-invalid");
  }

  function typed() {
    const value = field.valueAsNumber;
    if (!Number.isFinite(value)) {
      field.setAttribute("aria-invalid", "true");
      return showError(error, "the strength must be a number");
    }
    fitSlider({ ...find(key), strength: value });
    strength(value);
  }

  function fitSlider(one) {
    const [low, high] = range(one);
    Object.assign(slider, { min: low, max: high, step: (high - low) / 160, value: one.strength });
    slider.classList.toggle("two-sided", low < 0);
  }

  function showWorth() {
    const one = find(key);
    const largest = isFeature ? store.data.known[one.id]?.max_act : null;
    if (!largest || one.units === "norm_frac" || FACTORS[one.mode]) worth.textContent = "";
    else if (one.units === "raw") worth.textContent = `${number(one.strength / largest, 2)} × max`;
    else worth.textContent = `${number(one.strength * largest)} raw`;
  }

  function fill() {
    const one = find(key);
    title.replaceChildren(called());
    title.title = shown(nameOf(store.data, one));
    on.checked = one.on;
    node.classList.toggle("off", !one.on);
    fitSlider(one);
    if (document.activeElement !== field) field.value = one.strength;
    showWorth();
    settings.replaceChildren(...menus(one, name, (fields) => change(fields, "interventions")));
  }

  return { node, fill, error };
}

/** The square in a feature's colour; of a vector none. */
export function swatch(one) {
  const hue = one.kind === "vector" ? "none" : store.data.hues[one.id];
  return el("span", { class: "swatch", "aria-hidden": "true", data: { hue: hue ?? "none" } });
}

function menus(one, name, change) {
  const nodes = [];
  if (one.kind === "feature") {
    const modes = about.modes.map((mode) => mode.name);
    const units = unitsOf(one.mode);
    nodes.push(
      menu("mode", select(modes, one.mode, (mode) => change(inMode(one, mode)), named(name, "mode", aboutOf(about.modes, one.mode)))),
      menu("units", select(units, one.units, (to) => change(inUnits(one, to)), named(name, "units"))),
    );
  }
  const chat = store.data.mode === "chat";
  const scopes = about.scopes.filter((scope) => chat || !scope.chat).map((scope) => scope.name);
  const own = !scopes.includes(one.scope);
  const write = el("input", {
    type: "text", value: one.scope, class: "scope-text", spellcheck: "false", autocomplete: "off", ...named(name, "scope, written"),
    on: { change: () => write.value.trim() && change({ scope: write.value.trim() }) },
  });
  const pick = select([...scopes, OTHER], own ? OTHER : one.scope, (to) => {
    if (to !== OTHER) return change({ scope: to });
    if (!write.isConnected) pick.parentElement.after(write);
    write.focus();
    write.select();
  }, named(name, "scope", aboutOf(about.scopes, one.scope)));
  nodes.push(menu("scope", pick));
  if (own) nodes.push(write);
  return nodes;
}

const named = (name, what, about) => ({ "aria-label": `${name}: ${what}`, title: about || null });
const aboutOf = (list, name) => list.find((other) => other.name === name)?.about;
const menu = (what, node) => el("label", {}, el("span", { class: "small", text: what }), node);
const unitsOf = (mode) => about.modes.find((other) => other.name === mode)?.units ?? about.units;

/** The same strength in another mode, whose units it may force. */
function inMode(one, mode) {
  const units = unitsOf(mode);
  const factor = FACTORS[mode] !== undefined;
  if (factor !== (FACTORS[one.mode] !== undefined)) return { mode, units: units[0], strength: factor ? (mode === "scale" ? 0 : 1) : 0 };
  return units.includes(one.units) ? { mode } : { mode, ...inUnits(one, units[0]) };
}

/** The same push in other units, where the largest activation says what that is; otherwise a first guess. */
function inUnits(one, units) {
  const largest = store.data.known[one.id]?.max_act;
  const both = [one.units, units].sort().join();
  if (both !== "max_act,raw" || !largest) return { units, strength: units === "norm_frac" ? 0.1 : about.defaults.strength };
  const strength = units === "raw" ? one.strength * largest : one.strength / largest;
  return { units, strength: Number(strength.toPrecision(4)) };
}

/** From where to where a slider goes, wide enough for the strength it shows. */
function range(one) {
  const largest = store.data.known[one.id]?.max_act;
  let span = 4;
  if (one.kind === "feature" && one.units === "raw" && largest && !FACTORS[one.mode]) span = round(4 * largest);
  if (one.kind === "feature" && one.units === "norm_frac") span = 1;
  let [low, high] = FACTORS[one.mode] ?? (RISING.includes(one.mode) ? [0, span] : [-span, span]);
  if (one.strength > high) high = round(1.5 * one.strength);
  if (one.strength < low) low = -round(-1.5 * one.strength);
  if (low < 0 && !FACTORS[one.mode]) low = -(high = Math.max(high, -low));
  return [low, high];
}

/** The next number of one digit. */
function round(value) {
  const tens = 10 ** Math.floor(Math.log10(value));
  return Math.ceil(value / tens) * tens;
}

function remove(key) {
  const at = store.data.interventions.findIndex((one) => one.key === key);
  const [gone] = store.data.interventions.slice(at, at + 1);
  store.update((data) => data.interventions.splice(at, 1), "interventions");
  const undo = button("Undo", () => {
    store.update((data) => data.interventions.splice(at, 0, gone), "interventions");
    $("interventions").append(...store.data.interventions.map((one) => cards.get(one.key).node));
    undone.remove();
    goTo(gone.key, `${nameOf(store.data, gone)} is back`);
  });
  document.querySelector(".undo")?.remove();
  const undone = el("p", { class: "undo small" }, label(nameOf(store.data, gone)), " removed ", undo);
  $("interventions").after(undone);
  undo.focus();
}

/**
 * Show an error of the server at the card that it is about: the one that it counts among those that are on, or whose
 * feature it names. False where it is about none.
 */
export function showInterventionError(message) {
  const on = store.data.interventions.filter((one) => one.on);
  const counted = /^state\.interventions\[(\d+)\]/.exec(message);
  const named = /\bfeature (?:id )?(\d+)\b/.exec(message);
  const one = counted ? on[Number(counted[1])] : on.find((other) => other.kind === "feature" && other.id === Number(named?.[1]));
  if (!one) return false;
  const { node, error } = cards.get(one.key);
  showError(error, withoutPlace(message));
  node.scrollIntoView({ block: "nearest" });
  return true;
}

export function clearInterventionErrors() {
  for (const { error } of cards.values()) showError(error, null);
}
