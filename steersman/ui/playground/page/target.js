// SAE-TS: the vector that raises chosen features and little else, read off measured effects.

import { post } from "./api.js";
import { $, button, el, label, naming, number, showError } from "./dom.js";
import { addVector, newVector } from "./interventions.js";
import { labelOf, learn, store, watched } from "./state.js";
import { featureCell, table, worker } from "./tabs.js";

export function openTarget(about) {
  const panel = $("panel-target");
  const intro = el("p", { class: "muted small", text: "SAE-Targeted Steering looks for the vector whose measured effect on text is the features chosen here, and little else." });
  if (!about.effects) {
    const how = el("p", { class: "empty" }, "This server holds no effects map. Measure one with ", el("code", { text: "steersman effects" }),
      " and start the playground with ", el("code", { text: "--effects FOLDER" }), ".");
    panel.append(intro, how);
    return;
  }
  const error = el("p", { class: "error", hidden: true });
  const rows = el("ul", { class: "plain-list" });
  const result = el("div", { class: "result" });
  const run = worker("Make the vector", make, (problem) => showError(error, problem), { id: "target-run" });
  const empty = el("p", { class: "empty", text: "Add or watch a feature first: those are offered here as targets." });
  panel.append(intro, empty, rows, el("div", { class: "row" }, run), error, result);

  function show() {
    const ids = watched(store.data);
    empty.hidden = ids.length > 0;
    run.hidden = !ids.length;
    if (ids.length && !ids.some((id) => store.data.target[id])) store.data.target = { [ids[0]]: 1 };
    rows.replaceChildren(...ids.map(row));
  }

  function row(id) {
    const field = el("input", { type: "number", step: "0.5", value: store.data.target[id] ?? 0, on: { input: () => set(id, field.valueAsNumber) } });
    return el("li", {}, el("label", { class: "row" }, field, naming(id, labelOf(store.data, id))));
  }

  function set(id, weight) {
    store.update((data) => {
      delete data.target[id];
      if (weight) data.target[id] = weight;
    });
  }

  async function make(signal) {
    const features = Object.fromEntries(Object.entries(store.data.target).filter(([id, weight]) => weight && watched(store.data).includes(Number(id))));
    if (!Object.keys(features).length) throw new Error("give one of the features a weight: how much it is to rise, beside the others");
    const found = await post("api/target", { features }, signal);
    newVector(found.vector);
    store.update((data) => [...found.rows, ...found.others].forEach((feature) => learn(data, feature)));
    const { name, norm } = found.vector;
    const head = el("div", { class: "row" }, el("p", {}, el("b", {}, label(name)), ` · norm ${number(norm)}`),
      button("Add to steering", () => addVector(name, found.scale ?? 1), { class: "primary" }),
      el("a", { class: "button quiet", href: `api/vectors/${encodeURIComponent(name)}.safetensors`, download: true, text: "Download" }));
    const columns = [
      ["feature", featureCell, false],
      ["weight", (one) => one.weight ?? null, true],
      ["predicted effect", (one) => one.predicted, true],
      ["signal", (one) => one.signal ?? null, true],
    ];
    result.replaceChildren(head, table("What was asked for", columns, found.rows));
    if (found.others.length) {
      result.append(el("h3", { text: "What else it is predicted to do" }), table("Other features", [columns[0], columns[2]], found.others));
    }
  }

  store.on("interventions", show);
  store.on("watch", show);
  show();
}
