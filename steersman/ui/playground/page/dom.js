// Building the page. Text of others becomes text nodes, never markup.

/**
 * An element. `attributes` may hold `class`, `text`, `on: {event: handler}`, `data: {name: value}`, `style: {"--x": 1}`;
 * true writes an attribute without a value, false, null and undefined leave it out. Strings among the children are text.
 */
export function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (key === "text") node.textContent = value;
    else if (key === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key === "style") for (const [rule, to] of Object.entries(value)) node.style.setProperty(rule, to);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const $ = (id) => document.getElementById(id);

const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const KEPT = new Set(["\u200c", "\u200d"]); // joiners, which scripts and emoji need
const SHORT = { "\r": "\\r", "\t": "\\t" };

/** `text` with its control characters and directions of writing written out, as `steersman.visible` does. */
export function shown(text, newline = "↵") {
  return String(text).replace(HIDDEN, (character) => {
    if (character === "\n") return newline;
    if (KEPT.has(character)) return character;
    if (SHORT[character]) return SHORT[character];
    const hex = character.codePointAt(0).toString(16);
    if (hex.length <= 2) return `\\x${hex.padStart(2, "0")}`;
    return hex.length <= 4 ? `\\u${hex.padStart(4, "0")}` : `\\U${hex.padStart(8, "0")}`;
  });
}

/** Text of others on one line, kept from turning the words around it. */
export const label = (text, attributes = {}) => el("bdi", { ...attributes, text: shown(text) });

/** What an intervention or a feature is called: the id of a feature apart from its label, which may be of any script. */
export function naming(id, text) {
  if (id === undefined) return label(text);
  return el("span", {}, el("span", { class: "id", text: `#${id}` }), " ", label(text));
}

/** A token as it is quoted in a list: with its spaces to be seen. */
export const quoted = (token) => el("span", { class: "token-name", dir: "auto", text: shown(token) });

/** A number to at most three significant digits, without exponents where they would not help. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("-", "−");
  return String(Number(value.toPrecision(Math.max(digits, Math.floor(Math.log10(size || 1)) + 1)))).replace("-", "−");
}

export const percent = (share) => (share === null || share === undefined ? "–" : `${number(100 * share, 2)} %`);

/** A button with a text, or with a sign that a name explains. */
export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", on: { click: onclick }, ...attributes, text });
}

/** A select of `options`, strings or [value, text]. */
export function select(options, value, onchange, attributes = {}) {
  const node = el("select", { on: { change: () => onchange(node.value) }, ...attributes });
  for (const option of options) {
    const [key, text] = Array.isArray(option) ? option : [option, option];
    node.append(el("option", { value: key, selected: key === value, text: shown(text) }));
  }
  return node;
}

/** Calls `action` once the calls have paused for `wait` milliseconds; `.now()` at once. */
export function delayed(action, wait) {
  let timer = 0;
  const later = (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait);
  };
  later.now = (...given) => {
    clearTimeout(timer);
    action(...given);
  };
  return later;
}

/** The one clear line of an error, near what caused it; nothing where `error` is null. */
export function showError(place, error) {
  place.textContent = error ? shown(error.message ?? error) : "";
  place.hidden = !error;
}

/** Says `text` to a screen reader, politely, in one region for the whole page. */
export function announce(text) {
  $("status-live").textContent = shown(text);
}
