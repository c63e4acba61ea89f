// What all parts of the page share. What comes from a record is set as text (textContent), never as HTML.
"use strict";

const MOST = 24; // runs at once: as many as there are colours, and as the server keeps in memory
const COLOURS = [
  "#3b82d6", "#e08a1e", "#2f9e5c", "#d6455d", "#8a63d2", "#1aa3a3",
  "#c2569f", "#93a01f", "#a3683f", "#6b8299", "#5b5fe0", "#d0a700",
  "#7fb2ec", "#f0b878", "#7cc79b", "#e98c9b", "#b89ce6", "#6fcaca",
  "#dd98c5", "#c0cb62", "#c99b7b", "#a3b3c2", "#9a9df0", "#e6c95a",
];
const EVERY = 1500; // milliseconds

const $ = (id) => document.getElementById(id);
const inlined = $("inlined") ? JSON.parse($("inlined").textContent) : null; // of a page that needs no server
const runs = new Map(); // by name: what the list shows
const data = new Map(); // by name of a chosen run: what is known of it
const table = new Map(); // by name: the last and best values of its metrics, as far as they were read
const colours = new Map(); // by name of a chosen run: a place in COLOURS
const panels = new Map(); // by name: its card
const groups = new Map(); // by name: its <details>
let lower = {}; // by metric: whether its best value is the lowest

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, attributes);
  made.append(...children);
  return made;
}

function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Put options into a <select>; one that is chosen is among them, whether it is known or not.
function fillSelect(select, options, value) {
  const all = options.some(([known]) => known === value) ? options : [...options, [value, nameOf(value)]];
  const state = JSON.stringify(all);
  if (select.dataset.state !== state) {
    select.dataset.state = state;
    select.replaceChildren(...all.map(([known, text]) => element("option", { value: known, textContent: text })));
  }
  select.value = value;
}

// Text of numbers

function short(value) {
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value !== "number") return value == null ? "-" : String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3).replace(/\.?0*e\+?/, "e");
  return String(Number(value.toPrecision(5)));
}

const two = (number) => String(number).padStart(2, "0");

function duration(seconds) {
  const whole = Math.max(0, Math.floor(Number(seconds) || 0));
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

function moment(seconds) {
  if (!Number.isFinite(seconds)) return "-";
  const at = new Date(seconds * 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

const place = (value) => (view.x === "seconds" ? duration(value) : short(value));
const theme = () => matchMedia("(prefers-color-scheme: dark)").matches;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Asking the server, or the page itself

async function ask(path, words) {
  if (inlined) return answered(path, words);
  const answer = await fetch(`${path}?${new URLSearchParams(words)}`, { cache: "no-store" });
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}

function answered(path, words) {
  if (path === "api/runs") return inlined.list;
  if (path === "api/table") return inlined.table;
  const one = Object.fromEntries(words);
  const { live, facts, curves } = inlined.runs[one.name];
  const told = words.filter(([word, name]) => word === "fresh" && curves[name]).map(([, name]) => {
    const { x, y } = curves[name][one.thin] ?? curves[name].extremes;
    return [name, { from: 0, x: x[one.x], y }];
  });
  return { token: "inlined", anew: false, live, facts, curves: Object.fromEntries(told) };
}

// What is known of runs by column: "name", "p:" and a parameter, "m:", a metric, and ":best" or ":last"

const FIXED = { name: "name", began: "started", best: "best", status: "status", step: "step", seconds: "duration", tags: "tags" };

function nameOf(key) {
  if (key.startsWith("p:")) return key.slice(2);
  if (key.startsWith("m:")) return key.slice(2).replace(/:(best|last)$/, " ($1)");
  return FIXED[key] ?? key;
}

// A number, a text, or null where there is none.
function valueOf(name, key) {
  const run = runs.get(name);
  if (!run) return null;
  if (key.startsWith("p:")) return asNumber(run.parameters[key.slice(2)] ?? null);
  if (key.startsWith("m:")) {
    const at = key.lastIndexOf(":");
    const told = table.get(name)?.metrics[key.slice(2, at)];
    return told ? Number(told[key.slice(at + 1)]) : null;
  }
  if (key === "best") return run.best ? Number(run.best.value) : null;
  if (key === "tags") return run.notes.tags.join(", ") || null;
  return run[key] ?? null;
}

const asNumber = (text) => (text !== null && text.trim() !== "" && !Number.isNaN(Number(text)) ? Number(text) : text);

// The parameters that are not the same in all of some runs.
function differing(names) {
  const known = names.map((name) => runs.get(name)?.parameters).filter(Boolean);
  const all = new Set(known.flatMap((parameters) => Object.keys(parameters)));
  return [...all].filter((key) => known.some((parameters) => parameters[key] !== known[0][key]));
}

function columnsKnown() {
  const metrics = [...new Set([...table.values()].flatMap((one) => Object.keys(one.metrics)))];
  const parameters = new Set([...runs.values()].flatMap((run) => Object.keys(run.parameters)));
  return {
    parameters: [...parameters].map((name) => `p:${name}`),
    metrics: metrics.flatMap((name) => [`m:${name}:best`, `m:${name}:last`]),
  };
}
