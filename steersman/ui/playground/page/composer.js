// What the model continues: a prompt, or a chat with a system message; and how it generates.

import { $, showError } from "./dom.js";
import { generate, stop } from "./generate.js";
import { store } from "./state.js";

const NUMBERS = ["max_new_tokens", "temperature", "top_p", "seed"];

export function openComposer(about) {
  if (!about.chat) {
    $("mode-chat").disabled = true;
    $("chat-reason").hidden = false;
    $("chat-reason").textContent = about.chat_reason || "no chat: this model has no chat template";
    store.data.mode = "prompt";
  }
  $("max_new_tokens").max = about.limits.max_new_tokens;
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", () => store.update((data) => (data.mode = radio.value), "mode"));
  }
  $("prompt").addEventListener("input", () => {
    showError($("prompt-error"), null);
    store.update((data) => (data[writing(data)] = $("prompt").value), "text");
    grow($("prompt"));
  });
  $("system").addEventListener("input", () => {
    store.update((data) => (data.system = $("system").value), "text");
    grow($("system"));
  });
  for (const name of NUMBERS) $(name).addEventListener("input", () => setNumber(name));
  $("compare").addEventListener("change", () => store.update((data) => (data.compare = $("compare").checked), "text"));
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("composer").noValidate = true; // the server's limits, in its words, beside the field
  $("stop").addEventListener("click", stop);
  $("talk-clear").addEventListener("click", () => {
    store.update((data) => (data.talk = []), "runs");
    $("prompt").focus();
  });
  for (const topic of ["mode", "setup", "sent", "runs"]) store.on(topic, show);
  show();
}

const writing = (data) => (data.mode === "chat" ? "message" : "prompt");

function setNumber(name) {
  const field = $(name);
  const value = field.value === "" && name === "top_p" ? null : field.valueAsNumber;
  const wrong = value !== null && !Number.isFinite(value);
  if (wrong) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
  showError($("settings-error"), wrong ? `${field.labels[0].textContent.trim()} must be a number` : null);
  if (!wrong) store.update((data) => (data.generation[name] = value), "generation");
}

function show() {
  const { data } = store;
  const chat = data.mode === "chat";
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.checked = radio.value === data.mode;
  const prompt = $("prompt");
  if (prompt.value !== data[writing(data)]) prompt.value = data[writing(data)];
  prompt.placeholder = chat ? "Write a message" : "The beginning of a text, such as: Once upon a time";
  prompt.rows = chat ? 2 : 3;
  $("prompt-label").textContent = chat ? "Message" : "Prompt";
  $("system-row").hidden = !chat;
  $("system").value = data.system;
  $("talk-clear").hidden = !chat || !data.talk.length;
  $("generate").textContent = chat ? "Send" : "Generate";
  for (const name of NUMBERS) if (document.activeElement !== $(name)) $(name).value = data.generation[name] ?? "";
  $("compare").checked = data.compare;
  const [first, second] = chat ? [$("runs"), $("composer")] : [$("composer"), $("runs")];
  if (first.compareDocumentPosition(second) & Node.DOCUMENT_POSITION_PRECEDING) arrange(chat);
  document.body.classList.toggle("chatting", chat);
  grow(prompt);
  grow($("system"));
}

/** The composer above the texts of a prompt, below those of a chat: moved for real, so that the focus goes in that order. */
function arrange(chat) {
  const focused = document.activeElement;
  const talk = $("talk");
  if (chat) talk.append($("composer"));
  else talk.prepend($("talk-title"), $("composer"));
  if (talk.contains(focused)) focused.focus({ preventScroll: true });
}

/** A field as high as its text, up to a third of the window. */
function grow(field) {
  if (field.value.length > 20_000) {
    field.style.height = `${innerHeight / 3}px`; // not measured: laying out a huge text takes seconds
    return;
  }
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight / 3)}px`;
}
