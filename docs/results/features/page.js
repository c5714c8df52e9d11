// Arrow keys lead from feature to feature; contexts stand on one line each, or wrapped.
"use strict";

addEventListener("keydown", event => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
  const link = rel && document.querySelector(`a[rel=${rel}]`);
  if (link) location.href = link.href;
});

const wrap = document.createElement("button");
wrap.type = "button";
function show(wrapped) {
  document.body.classList.toggle("wrapped", wrapped);
  wrap.ariaPressed = String(wrapped);
}
wrap.textContent = "Wrap contexts";
wrap.addEventListener("click", () => {
  show(!document.body.classList.contains("wrapped"));
  sessionStorage.setItem("wrapped", wrap.ariaPressed);
});
document.querySelector("nav").append(wrap);
show(sessionStorage.getItem("wrapped") === "true");
