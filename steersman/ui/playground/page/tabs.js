// The tools under the texts: tabs by the keyboard's rules, and what all of them show.

import { $, announce, el, label, number, shown } from "./dom.js";
import { addFeature } from "./interventions.js";
import { labelOf, store } from "./state.js";

const NAMES = ["dose", "target", "decompose", "code"];

export function openTabs() {
  for (const name of NAMES) $(`tab-${name}`).addEventListener("click", () => openTab(name));
  $("tabs").addEventListener("keydown", (event) => {
    const at = NAMES.indexOf(store.data.panel);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: NAMES.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    openTab(NAMES.at(to % NAMES.length));
    $(`tab-${store.data.panel}`).focus();
  });
  openTab(NAMES.includes(store.data.panel) ? store.data.panel : NAMES[0]);
}

export function openTab(chosen) {
  store.update((data) => (data.panel = chosen), "panel");
  for (const name of NAMES) {
    const open = name === chosen;
    $(`tab-${name}`).setAttribute("aria-selected", String(open));
    $(`tab-${name}`).tabIndex = open ? 0 : -1;
    $(`panel-${name}`).hidden = !open;
  }
}

/** A button that waits for `work(signal)`, says so, and can be pressed again to give up. */
export function worker(text, work, error, attributes = {}) {
  let controller = null;
  const node = el("button", { type: "button", class: "primary", ...attributes, text });
  node.addEventListener("click", async () => {
    if (controller) return controller.abort();
    controller = new AbortController();
    node.textContent = "Cancel";
    error(null);
    announce("Working…");
    try {
      await work(controller.signal);
      announce(`${text}: done, the result is below`);
    } catch (problem) {
      if (problem.name === "AbortError") announce("Given up");
      else {
        error(problem);
        announce(problem.message);
      }
    } finally {
      controller = null;
      node.textContent = text;
    }
  });
  return node;
}

/** A table of `columns` [title, what of a row, is it a number]. */
export function table(caption, columns, rows) {
  const head = el("tr", {}, ...columns.map(([title, , numeric]) => el("th", { scope: "col", class: numeric ? "number" : null, text: title })));
  const cell = (row, [, value, numeric]) => {
    const found = value(row);
    if (found instanceof Node) return el("td", {}, found);
    return el("td", { class: numeric ? "number" : null, dir: numeric ? null : "auto", text: typeof found === "number" || found === null ? number(found) : shown(found) });
  };
  const body = rows.map((row) => el("tr", {}, ...columns.map((column) => cell(row, column))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("caption", { class: "behind", text: caption }), el("thead", {}, head), el("tbody", {}, ...body)));
}

/** A figure of the server's. */
export const figure = ({ src, alt }) => el("img", { class: "figure", src: src.replace(/^\//, ""), alt: shown(alt) });

/** A feature in a table: its id, its label and a button to steer by it. */
export const featureCell = (feature) =>
  el("span", { class: "feature-cell" },
    el("button", { type: "button", class: "quiet", "aria-label": `Add feature ${feature.id} to steering`, title: "Add to steering", on: { click: () => addFeature(feature) }, text: `#${feature.id}` }),
    " ", label(feature.label || labelOf(store.data, feature.id)));
