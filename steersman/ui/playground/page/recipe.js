// What was set up, to take along: as Python, as a command, as a recipe; and a recipe back.

import { post } from "./api.js";
import { $, announce, button, delayed, el, shown, showError } from "./dom.js";
import { currentState, newKey, store, useFeature } from "./state.js";
import { openTab } from "./tabs.js";

export function openRecipe() {
  const panel = $("panel-code");
  const error = el("p", { class: "error", hidden: true });
  const blocks = { python: block("Python", "python"), command: block("Command", "command") };
  const files = el("p", { class: "small" });
  panel.append(error, ...Object.values(blocks).map((one) => one.node), files);

  const refresh = delayed(async () => {
    if (panel.hidden) return;
    try {
      fill(await code());
      showError(error, null);
    } catch (problem) {
      showError(error, problem);
    }
  }, 200);
  for (const topic of ["interventions", "strength", "text", "generation", "mode", "panel", "setup", "sent", "watch"]) store.on(topic, () => refresh());

  function fill(found) {
    for (const [kind, one] of Object.entries(blocks)) one.text.textContent = found[kind];
    const links = found.files.flatMap((name) => [" ", el("a", { href: `api/vectors/${encodeURIComponent(name)}.safetensors`, download: true, text: shown(name) })]);
    files.replaceChildren(...(links.length ? ["Vectors made here, to lie beside it:", ...links] : []));
  }

  for (const kind of ["python", "command"]) {
    $(`copy-${kind}`).addEventListener("click", () => attempt(async () => {
      const found = await code();
      fill(found);
      const done = await copy(found[kind]);
      if (done) return note(kind === "python" ? "Copied as Python." : "Copied as a command.");
      openTab("code");
      getSelection().selectAllChildren(blocks[kind].text);
      note("The browser refuses the clipboard: the text is selected below, copy it with Ctrl+C.");
    }));
  }
  $("recipe-save").addEventListener("click", () => attempt(async () => {
    const { recipe, files: needed } = await post("api/recipe/save", { state: currentState(store.data) });
    const link = el("a", { href: URL.createObjectURL(new Blob([recipe], { type: "text/yaml" })), download: "recipe.yaml" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
    note(`Saved as recipe.yaml: open it with “steersman steer --recipe recipe.yaml”${needed.length ? `; beside it lies ${needed.join(", ")}, to download under Code` : ""}.`);
  }));
  $("recipe-file").addEventListener("change", () => attempt(async () => {
    const [file] = $("recipe-file").files;
    $("recipe-file").value = "";
    if (!file) return;
    if (file.size > 200_000) throw new Error(`${file.name} is too large for a recipe: ${file.size.toLocaleString("en")} bytes`);
    const { state } = await post("api/recipe/load", { text: await file.text() });
    useState(state);
    note(`Loaded ${file.name}.`);
  }));
}

const code = () => post("api/code", { state: currentState(store.data) });

/** Set the page up as a state of the API says. */
export function useState(state) {
  store.update((data) => {
    for (const one of state.interventions ?? []) if (one.kind === "feature") useFeature(data, { id: one.id });
    data.interventions = (state.interventions ?? []).map((one) => ({ key: newKey(), on: true, include_bos: false, ...one }));
    Object.assign(data.generation, state.generation ?? {});
    if (state.prompt) [data.prompt, data.mode] = [state.prompt, "prompt"];
    if (state.messages) useMessages(data, state.messages);
    data.watch = state.watch ?? data.watch;
    state.watch?.forEach((id) => useFeature(data, { id }));
  }, "interventions", "watch", "mode", "setup");
}

function useMessages(data, messages) {
  data.mode = "chat";
  data.system = messages.find((message) => message.role === "system")?.content ?? "";
  data.message = messages.at(-1)?.role === "user" ? messages.at(-1).content : "";
}

async function attempt(action) {
  showError($("bar-error"), null);
  note("");
  try {
    await action();
  } catch (error) {
    showError($("bar-error"), error);
    announce(error.message);
  }
}

function note(text) {
  $("bar-note").textContent = shown(text);
  $("bar-note").hidden = !text;
  if (text) announce(text);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false; // no clipboard outside https and this machine
  }
}

function block(title, kind) {
  const text = el("pre", { tabindex: "0", role: "region", "aria-label": title });
  const node = el("div", { class: "code" },
    el("div", { class: "row" }, el("h3", { text: title }), button("Copy", () => $(`copy-${kind}`).click(), { class: "quiet end", "aria-label": `Copy as ${kind === "python" ? "Python" : "command"}` })), text);
  return { node, text };
}
