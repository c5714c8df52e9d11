// Shortcuts: Ctrl+Enter and Esc everywhere, single letters where nothing is being written and only if wanted.

import { $ } from "./dom.js";
import { generate, isRunning, stop } from "./generate.js";
import { store } from "./state.js";

const LETTERS = {
  "/": () => $("search").closest("[hidden]") ? $("find-text").focus() : $("search").focus(),
  p: () => $("prompt").focus(),
  s: () => document.querySelector("#interventions input[type=range]")?.focus(),
  "?": () => $("help").showModal(),
};

export function openKeys() {
  $("single-keys").checked = store.data.single_keys;
  $("single-keys").addEventListener("change", () => store.update((data) => (data.single_keys = $("single-keys").checked)));
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("help-close").addEventListener("click", () => $("help").close());
  addEventListener("keydown", (event) => {
    if ($("help").open) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    } else if (event.key === "Escape") {
      $("tip").hidden = true;
      if (isRunning()) stop();
    } else if (!event.ctrlKey && !event.metaKey && !event.altKey && store.data.single_keys && !writing(event.target)) {
      const action = LETTERS[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    }
  });
}

const writing = (node) => node.matches("textarea, select, input:not([type=range], [type=checkbox], [type=radio], [type=file])");
