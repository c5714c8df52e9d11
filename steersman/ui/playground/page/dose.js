// Dose and response: the same text at several strengths of one intervention, what it costs and what it does.

import { post, withoutPlace } from "./api.js";
import { $, el, select, showError } from "./dom.js";
import { showInterventionError } from "./interventions.js";
import { currentState, nameOf, store } from "./state.js";
import { figure, table, worker } from "./tabs.js";

export function openDose(about) {
  const error = el("p", { class: "error", hidden: true });
  const choice = el("span");
  const strengths = el("input", { type: "text", id: "dose-strengths", inputmode: "text", spellcheck: "false", autocomplete: "off" });
  const result = el("div", { class: "result" });
  const run = worker("Measure", measure, (problem) => show(problem), { id: "dose-run" });
  strengths.addEventListener("input", () => store.update((data) => (data.dose.strengths = strengths.value)));
  const empty = el("p", { class: "empty", text: "Add a feature or a vector first: this measures what its strengths do to the text." });
  const form = el("div", { class: "row" },
    el("label", {}, "Intervention ", choice), el("label", { for: "dose-strengths" }, "Strengths "), strengths, run);
  const intro = el("p", { class: "muted small", text: "The prompt is continued at each strength, in the units of the intervention, greedily and beside the others that are on. KL says how far the next-token distributions move; the loss, how strange the text is to the unsteered model." });
  $("panel-dose").append(intro, form, empty, error, result);

  function show(problem) {
    if (problem) showInterventionError(problem.message);
    showError(error, problem && withoutPlace(problem.message));
  }

  /** What is written, or multiples of the strength that the slider has. */
  function guess() {
    const { key, strengths: written } = store.data.dose;
    const own = store.data.interventions.find((one) => one.key === key)?.strength || 1;
    const multiples = about.defaults.strengths.map((share) => Number((share * own).toPrecision(3)));
    if (document.activeElement !== strengths) strengths.value = written || multiples.join(", ");
  }

  function options() {
    const on = store.data.interventions.filter((one) => one.on);
    empty.hidden = on.length > 0;
    form.hidden = !on.length;
    if (!on.some((one) => one.key === store.data.dose.key)) store.data.dose.key = on[0]?.key ?? "";
    choice.replaceChildren(select(on.map((one) => [one.key, nameOf(store.data, one)]), store.data.dose.key,
      (key) => store.update((data) => (data.dose = { key, strengths: "" }), "strength"), { id: "dose-of", "aria-label": "Intervention" }));
  }

  async function measure(signal) {
    const given = strengths.value.split(/[\s,;]+/).filter(Boolean).map(Number);
    if (!given.length || !given.every(Number.isFinite)) throw new Error("strengths are numbers with commas between, such as 0, 0.5, 1, 2");
    const on = store.data.interventions.filter((one) => one.on);
    const intervention = on.findIndex((one) => one.key === store.data.dose.key);
    const found = await post("api/dose", { state: currentState(store.data), intervention, strengths: given }, signal);
    const columns = [
      ["strength", (row) => row.strength, true],
      ["KL per token", (row) => row.kl, true],
      ["loss, unsteered model", (row) => row.nll, true],
      ["activation", (row) => row.activation, true],
      ["repetition", (row) => row.repetition, true],
      ["text", (row) => row.text, false],
    ].filter(([title]) => title !== "activation" || found.rows.some((row) => row.activation !== null));
    const title = `Dose and response of ${nameOf(store.data, on[intervention])}`;
    result.replaceChildren(figure(found.figure), table(title, columns, found.rows));
  }

  store.on("interventions", options);
  for (const topic of ["interventions", "strength"]) store.on(topic, guess);
  options();
  guess();
}
