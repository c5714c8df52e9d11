// A vector, or a feature's direction, as signed features of the SAE.

import { post } from "./api.js";
import { $, el, number, percent, select, shown, showError } from "./dom.js";
import { nameOf, store } from "./state.js";
import { featureCell, figure, table, worker } from "./tabs.js";

export function openDecompose(about) {
  const error = el("p", { class: "error", hidden: true });
  const choice = el("span");
  const result = el("div", { class: "result" });
  const { decompose } = store.data;
  if (!about.decompose_methods.includes(decompose.method)) decompose.method = about.decompose_methods.includes("omp") ? "omp" : about.decompose_methods[0];
  const method = select(about.decompose_methods, decompose.method, (to) => store.update((data) => (data.decompose.method = to)), { id: "decompose-method" });
  const k = el("input", { type: "number", id: "decompose-k", min: "1", step: "1", value: decompose.k,
    on: { input: () => store.update((data) => (data.decompose.k = k.valueAsNumber || data.decompose.k)) } });
  const run = worker("Take apart", work, (problem) => showError(error, problem), { id: "decompose-run" });
  const empty = el("p", { class: "empty", text: "Add a feature, load a vector with --vector, or make one under SAE-TS target." });
  const form = el("div", { class: "row" }, el("label", {}, "Direction ", choice), el("label", {}, "Method ", method), el("label", {}, "Features ", k), run);
  const intro = el("p", { class: "muted small", text: "Which features of the SAE make up a direction, with which signs, and how much of it they explain." });
  $("panel-decompose").append(intro, form, empty, error, result);

  function options() {
    const vectors = about.vectors.map(({ name }) => [`vector ${name}`, name]);
    const features = store.data.interventions.filter((one) => one.kind === "feature").map((one) => [`feature ${one.id}`, nameOf(store.data, one)]);
    const all = [...new Map([...vectors, ...features])];
    empty.hidden = all.length > 0;
    form.hidden = !all.length;
    if (!all.some(([key]) => key === store.data.decompose.of)) store.data.decompose.of = all[0]?.[0] ?? "";
    choice.replaceChildren(select(all, store.data.decompose.of, (to) => store.update((data) => (data.decompose.of = to)), { id: "decompose-of", "aria-label": "Direction" }));
  }

  async function work(signal) {
    const { of, method: chosen } = store.data.decompose;
    const kind = of.slice(0, of.indexOf(" "));
    const name = of.slice(of.indexOf(" ") + 1);
    const what = kind === "vector" ? { vector: name } : { feature: Number(name) };
    const found = await post("api/decompose", { ...what, method: chosen, k: k.valueAsNumber }, signal);
    const columns = [
      ["feature", featureCell, false],
      ["coefficient", (row) => row.coefficient, true],
      ["strength", (row) => row.strength ?? null, true],
      ["cosine", (row) => row.cosine, true],
      ["density", (row) => percent(row.density), true],
    ];
    const text = `${found.rows.length} features · explained variance ${number(found.explained_variance)} · cosine ${number(found.cosine)}`;
    const warnings = found.warnings.map((warning) => el("li", { text: shown(warning) }));
    result.replaceChildren(el("p", { text }), table("Features of the direction", columns, found.rows), figure(found.figure));
    if (warnings.length) result.append(el("ul", { class: "muted small" }, ...warnings));
  }

  store.on("interventions", options);
  store.on("vectors", options);
  options();
}
