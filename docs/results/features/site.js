// The table of features: search, sort, pages of rows. Text goes in as text, never as markup.
"use strict";

const PAGE_ROWS = 100;
const n = FEATURES.label.length;
const byId = id => document.getElementById(id);
const heads = [...byId("table").tHead.rows[0].cells];
const columns = heads.map(head => ({ key: head.dataset.key, kind: head.dataset.kind, head }));
const body = byId("table").tBodies[0];
const places = [...Array(n).keys()];  // rows of the table's data; FEATURES.id has the features' own numbers

const haystack = places.map(i =>
  [FEATURES.id[i], FEATURES.label[i], ...FEATURES.fires[i], ...FEATURES.promotes[i]].join("\n").toLowerCase());
const scale = new Map(columns.filter(c => c.kind === "number").map(c =>
  [c.key, FEATURES[c.key].reduce((top, value) => Math.max(top, Math.abs(value ?? 0)), 0)]));

const state = { q: "", sort: "typical", down: true, page: 0, dead: false };
let shown = [];

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  state.q = given.get("q") ?? "";
  state.sort = columns.some(c => c.key === given.get("sort")) ? given.get("sort") : "typical";
  state.down = given.get("down") !== "0";
  state.page = Math.max(0, (parseInt(given.get("page"), 10) || 1) - 1);
  state.dead = given.get("dead") === "1";
}

function keep() {
  const given = new URLSearchParams();
  if (state.q) given.set("q", state.q);
  if (state.sort !== "typical") given.set("sort", state.sort);
  if (!state.down) given.set("down", "0");
  if (state.page) given.set("page", state.page + 1);
  if (state.dead) given.set("dead", "1");
  history.replaceState(null, "", `#${given}`);
}

function ascending(a, b, kind) {
  if (kind === "text") return a.localeCompare(b);
  if (kind === "tokens") return (a[0] ?? "").trim().localeCompare((b[0] ?? "").trim());
  return a - b;
}

function find() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = columns.find(c => c.key === state.sort).kind;
  const values = FEATURES[state.sort];
  const empty = value => value === null || value === "" || value.length === 0;
  const number = words.length === 1 && /^\d+$/.test(words[0]) ? Number(words[0]) : -1;
  shown = places.filter(i =>
    (state.dead || FEATURES.density[i] > 0 || FEATURES.id[i] === number) && words.every(word => haystack[i].includes(word)));
  const sign = state.down ? -1 : 1;
  shown.sort((i, j) => {
    const named = FEATURES.id[i] === number;
    if (named !== (FEATURES.id[j] === number)) return named ? -1 : 1;
    const [a, b] = [values[i], values[j]];
    if (empty(a) || empty(b)) return empty(a) - empty(b) || i - j;  // what is not known comes last either way
    return sign * ascending(a, b, kind) || i - j;
  });
}

function cell(i, column) {
  const made = document.createElement("td");
  const value = FEATURES[column.key][i];
  if (column.kind === "id") {
    const link = document.createElement("a");
    link.href = `features/${value}.html`;
    link.textContent = value;
    made.append(link);
  } else if (column.kind === "tokens") {
    for (const token of value) {
      const one = document.createElement("code");
      one.textContent = token;
      made.append(one, " ");
    }
  } else if (column.kind === "text") {
    const text = document.createElement("bdi");
    text.textContent = value;
    made.append(text);
  } else {
    made.className = "number";
    made.textContent = column.kind === "share" ? share(value) : value === null ? "" : figure(value);
    // Densities on a logarithmic scale from one in a million; other figures against the largest of their column.
    const part = column.kind === "share" ? 1 + Math.log10(Math.max(value, 1e-6)) / 6 : value / scale.get(column.key);
    made.style.setProperty("--part", `${100 * Math.max(0, Math.min(1, part || 0))}%`);
  }
  made.dataset.key = column.key;
  return made;
}

function figure(value) {
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
}

function share(value) {
  return `${value ? figure(100 * value) : 0} %`;
}

function draw() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE_ROWS));
  state.page = Math.min(state.page, pages - 1);
  const first = state.page * PAGE_ROWS;
  const part = shown.slice(first, first + PAGE_ROWS);
  body.replaceChildren(...part.map(i => {
    const row = document.createElement("tr");
    row.append(...columns.map(column => cell(i, column)));
    return row;
  }));
  for (const { key, head } of columns)
    if (key === state.sort) head.ariaSort = state.down ? "descending" : "ascending";
    else head.removeAttribute("aria-sort");
  byId("count").textContent = `${shown.length.toLocaleString("en")} of ${n.toLocaleString("en")} features`;
  byId("page").textContent = part.length
    ? `${(first + 1).toLocaleString("en")} to ${(first + part.length).toLocaleString("en")}` : "none found";
  byId("back").disabled = state.page === 0;
  byId("forward").disabled = state.page + 1 >= pages;
  byId("search").value = state.q;
  byId("dead").checked = state.dead;
}

function change(given) {
  Object.assign(state, { page: 0 }, given);
  if (!("page" in given)) find();
  draw();
  keep();
}

for (const { key, kind, head } of columns)
  head.querySelector("button").addEventListener("click", () => {
    const first = !["id", "text", "tokens"].includes(kind);  // figures from the largest, words from A
    change({ sort: key, down: state.sort === key ? !state.down : first });
  });
byId("search").addEventListener("input", event => change({ q: event.target.value }));
byId("dead").addEventListener("change", event => change({ dead: event.target.checked }));
document.querySelector("form").addEventListener("submit", event => event.preventDefault());
for (const [id, step] of [["back", -1], ["forward", 1]])
  byId(id).addEventListener("click", () => {
    change({ page: state.page + step });
    byId("table").scrollIntoView({ block: "start" });
  });
addEventListener("hashchange", () => { read(); find(); draw(); });
addEventListener("keydown", event => {
  if (event.key === "/" && !/^(input|select|textarea)$/i.test(event.target.tagName)) {
    event.preventDefault();
    byId("search").focus();
  }
});
read();
find();
draw();
