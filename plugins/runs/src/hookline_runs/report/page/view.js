// What is looked at, and how: all of it stands in the address.
"use strict";

const DEFAULTS = {
  runs: [], tab: "curves", x: "step", smooth: "0", log: "", metrics: "", zoom: [], hide: [], open: [], shut: [],
  sort: "-began", filter: "", archived: "", group: "", colour: "", columns: [], across: "", up: "", lines: [],
  all: "", of: "", at: "",
};
const CONTROLS = {
  x: "axis", smooth: "smooth", log: "log", metrics: "metrics", sort: "sort", filter: "runs", archived: "archived",
  group: "group", colour: "colour", across: "across", up: "up", all: "every", of: "of",
};
const QUIET = ["smooth", "log", "zoom", "hide", "all", "of", "at", "columns", "across", "up", "lines"]; // need nothing new
const view = structuredClone(DEFAULTS);
const KEY = "hookline-key";
let key = ""; // lets this page change runs
let absent = []; // runs that the address names, and that are not there
let writing = 0;

// The address as it was before there was more than runs in it still leads there.
function readAddress() {
  const text = location.hash.slice(1) || (inlined ? inlined.view : "");
  const plain = (word) => {
    try {
      return decodeURIComponent(word);
    } catch {
      return word;
    }
  };
  Object.assign(view, structuredClone(DEFAULTS));
  for (const part of (text && !text.includes("=") ? `runs=${text}` : text).split("&")) {
    const at = part.indexOf("=");
    const name = part.slice(0, Math.max(at, 0));
    const words = part.slice(at + 1).split(",").filter(Boolean).map(plain);
    if (name === "key") keepKey(words[0] ?? "");
    else if (name in DEFAULTS) view[name] = Array.isArray(DEFAULTS[name]) ? words : words[0] ?? "";
  }
  view.zoom = view.zoom.map(Number).filter(Number.isFinite);
  if (view.zoom.length !== 2) view.zoom = [];
  if (!["step", "samples", "epoch", "seconds"].includes(view.x)) view.x = DEFAULTS.x;
  if (!["curves", "all"].includes(view.tab)) view.tab = DEFAULTS.tab;
  if (!(Number(view.smooth) >= 0 && Number(view.smooth) < 1)) view.smooth = DEFAULTS.smooth;
}

// It stays with this tab, and out of addresses that are passed on.
function keepKey(given) {
  if (inlined || !given) return;
  key = given;
  sessionStorage.setItem(KEY, given);
}

function address() {
  const parts = Object.keys(DEFAULTS).filter((name) => JSON.stringify(view[name]) !== JSON.stringify(DEFAULTS[name]));
  return parts.map((name) => `${name}=${[view[name]].flat().map(encodeURIComponent).join(",")}`).join("&");
}

function writeAddress() {
  clearTimeout(writing); // browsers take no hundred addresses a second
  writing = setTimeout(() => {
    if (location.hash.slice(1) === address()) return;
    try {
      history.replaceState(null, "", `#${address()}`);
    } catch (error) { // a frame in a notebook has no address
      if (error.name !== "SecurityError") throw error;
    }
  }, 100);
}

// Set what is looked at, and show it.
function look(changes) {
  if ("x" in changes) view.zoom = [];
  Object.assign(view, changes);
  writeAddress();
  showAll();
  if (Object.keys(changes).some((name) => !QUIET.includes(name))) wake();
}

function showAll() {
  for (const [name, id] of Object.entries(CONTROLS)) {
    const control = $(id);
    if (control.type === "checkbox") control.checked = view[name] === "1";
    else if (control.value !== view[name]) control.value = view[name];
  }
  setText($("smoothed"), view.smooth);
  for (const name of ["curves", "all"]) {
    $(`tab-${name}`).setAttribute("aria-selected", String(view.tab === name));
    $(`on-${name}`).hidden = view.tab !== name;
  }
  fillChoices();
  drawList();
  draw();
  drawAll();
}

function fillChoices() {
  const { parameters, metrics } = columnsKnown();
  const differs = differing([...runs.keys()]).map((name) => `p:${name}`);
  const own = metrics.map((name) => [name, nameOf(name)]);
  const told = (keys) => keys.map((name) => [name, nameOf(name)]);
  fillSelect($("sort"), [
    ["-began", "newest"], ["began", "oldest"], ["best", "best"], ["name", "name"],
    ...[...differs, ...metrics].flatMap((name) => [[name, `${nameOf(name)} ↑`], [`-${name}`, `${nameOf(name)} ↓`]]),
  ], view.sort);
  const others = parameters.filter((name) => !differs.includes(name));
  fillSelect($("group"), [["", "-"], ["tags", "tags"], ["status", "status"], ...told(differs), ...told(others)], view.group);
  fillSelect($("colour"), [["", "run"], ["status", "status"], ["tags", "tags"], ...told(differs), ...own], view.colour);
}

function listen() {
  for (const [name, id] of Object.entries(CONTROLS)) {
    const control = $(id);
    control.addEventListener("input", () => {
      look({ [name]: control.type === "checkbox" ? (control.checked ? "1" : "") : control.value });
    });
  }
  for (const name of ["curves", "all"]) $(`tab-${name}`).addEventListener("click", () => look({ tab: name }));
  $("clear").addEventListener("click", () => choose([]));
  window.addEventListener("hashchange", () => {
    readAddress();
    settle();
    look({ runs: view.runs });
  });
}
