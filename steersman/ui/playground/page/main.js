// The playground: asks the server what there is, restores what was set up, and opens the parts.

import { get } from "./api.js";
import { openComposer } from "./composer.js";
import { openDecompose } from "./decompose.js";
import { $, el, label, shown, showError } from "./dom.js";
import { openDose } from "./dose.js";
import { openFeatures } from "./features.js";
import { again } from "./generate.js";
import { openInterventions } from "./interventions.js";
import { openKeys } from "./keys.js";
import { openOutput } from "./output.js";
import { openRecipe, useState } from "./recipe.js";
import { store } from "./state.js";
import { openTabs } from "./tabs.js";
import { openTarget } from "./target.js";

if (location.search) history.replaceState(null, "", location.pathname); // the token leaves the address

try {
  await open(await get("api/about"));
} catch (error) {
  $("about").textContent = "";
  showError($("bar-error"), error);
}

async function open(about) {
  document.title = `${shown(about.model)} · Steersman`;
  const facts = [about.model, about.hook, `${about.d_sae.toLocaleString("en")} features`];
  if (about.n_labels) facts.push(`${about.n_labels.toLocaleString("en")} labels`);
  $("about").replaceChildren(...facts.flatMap((fact, at) => [at ? el("span", { "aria-hidden": "true", text: " · " }) : "", label(fact)]));
  $("about").title = shown(about.sae);
  const name = [about.model, about.hook, about.sae, about.d_sae, about.recipe ? JSON.stringify(about.recipe) : ""];
  const started = store.open(name.join(" "), { generation: about.defaults.generation });
  if (!started && about.recipe) useState(about.recipe);
  const held = new Set(about.vectors.map((vector) => vector.name));
  const gone = store.data.interventions.filter((one) => one.kind === "vector" && !held.has(one.name));
  store.data.interventions = store.data.interventions.filter((one) => !gone.includes(one));
  openInterventions(about);
  if (gone.length) showError($("steering-error"), `left out, this server does not hold it: ${gone.map((one) => one.name).join(", ")}`);
  openComposer(about);
  openOutput({ again });
  openFeatures(about);
  openTabs();
  openDose(about);
  openTarget(about);
  openDecompose(about);
  openRecipe();
  openKeys();
  document.body.classList.add("ready");
}
