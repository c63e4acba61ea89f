// The list of runs: which are there, which are chosen, in which order.
"use strict";

const entries = new Map(); // by name: its elements in the list

function choose(names) {
  absent = [];
  look({ runs: names.slice(0, MOST) });
}

// Give each chosen run a colour, and keep nothing of the others; runs that are not there are not chosen.
function settle() {
  const missing = view.runs.filter((name) => !runs.has(name));
  if (missing.length) absent = missing;
  view.runs = view.runs.filter((name) => runs.has(name)).slice(0, MOST);
  for (const name of [...data.keys()]) if (!view.runs.includes(name)) data.delete(name);
  for (const name of [...colours.keys()]) if (!view.runs.includes(name)) colours.delete(name);
  for (const name of view.runs) {
    if (colours.has(name)) continue;
    const taken = new Set(colours.values());
    colours.set(name, COLOURS.findIndex((_, number) => !taken.has(number)));
  }
}

function matches(text, filter) {
  return filter.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));
}

// A column by what people call it: a parameter or a metric, or the end of its name; null if there is none, or several.
function columnCalled(word) {
  if (word === "tag") return "tags";
  if (word in FIXED) return word;
  const { parameters, metrics } = columnsKnown();
  const keys = [...parameters, ...metrics];
  const exact = [`p:${word}`, `m:${word}`, `m:${word}:best`].find((known) => keys.includes(known));
  if (exact) return exact;
  const ends = parameters.filter((known) => known.endsWith(`.${word}`));
  return ends.length === 1 ? ends[0] : null;
}

// Read a filter: words that are looked for, and comparisons such as lr>0.1 or status=failed; what is not understood.
function readFilter(text) {
  const tests = [];
  const unknown = [];
  for (const word of text.split(/\s+/).filter(Boolean)) {
    const [, called, sign, given] = word.match(/^([^<>=!]+)(<=|>=|!=|=|<|>)(.+)$/) ?? [];
    if (!called) {
      tests.push((run) => matches(wordsOf(run), word));
      continue;
    }
    const column = columnCalled(called);
    if (column === null) unknown.push(called);
    else tests.push((run) => compared(valueOf(run.name, column), sign, asNumber(given), column));
  }
  return { unknown, fits: (run) => tests.every((test) => test(run)) };
}

const wordsOf = (run) => [
  run.name, run.status, run.command, run.notes.title, ...run.notes.tags, run.notes.note,
  ...Object.entries(run.parameters).map((pair) => pair.join("=")),
].join(" ");

function compared(value, sign, given, column) {
  if (column === "tags") return (value ?? "").split(", ").includes(String(given)) === (sign === "=");
  if (value === null) return sign === "!=";
  if (sign === "=") return value === given || String(value) === String(given);
  if (sign === "!=") return value !== given && String(value) !== String(given);
  if (typeof value !== "number" || typeof given !== "number") return false;
  return sign === "<" ? value < given : sign === "<=" ? value <= given : sign === ">" ? value > given : value >= given;
}

// Numbers by size and texts by name; what is not known or no number comes last, whichever way.
function sorted(names, by) {
  const down = by.startsWith("-");
  const column = down ? by.slice(1) : by;
  const texts = new Intl.Collator(undefined, { numeric: true });
  const values = new Map(names.map((name) => [name, valueOf(name, column)]));
  const missing = (value) => value === null || Number.isNaN(value);
  return [...names].sort((one, other) => {
    const [a, b] = [values.get(one), values.get(other)];
    if (missing(a) || missing(b)) return missing(a) - missing(b) || texts.compare(one, other);
    const both = typeof a === "number" && typeof b === "number";
    const order = both ? a - b : texts.compare(String(a), String(b));
    return (down ? -order : order) || texts.compare(one, other);
  });
}

function shownRuns() {
  const { fits } = readFilter(view.filter);
  const kept = [...runs.values()].filter((run) => (view.archived === "1" || !run.notes.archived) && fits(run));
  return sorted(kept.map((run) => run.name), view.sort);
}

function drawList() {
  const shown = shownRuns();
  for (const [name, entry] of entries) if (!runs.has(name)) { entry.item.remove(); entries.delete(name); }
  const differs = differing([...runs.keys()]).filter((name) => name !== "trainer.run_name");
  const items = shown.map((name) => {
    if (!entries.has(name)) entries.set(name, makeEntry(name));
    const entry = entries.get(name);
    showEntry(entry, runs.get(name), differs);
    return entry.item;
  });
  const list = $("list");
  if (items.length !== list.children.length || items.some((item, number) => list.children[number] !== item))
    list.replaceChildren(...items);
  setText($("count"), counted(shown));
  const lost = absent.length ? `The address names runs that are not in this folder: ${absent.join(", ")}. ` : "";
  setText($("absent"), lost);
}

function counted(shown) {
  if (runs.size === 0) return "No run has a record yet: the plugin jsonl keeps one.";
  const { unknown } = readFilter(view.filter);
  const archived = [...runs.values()].filter((run) => run.notes.archived).length;
  const waits = needsTable() ? [...runs.keys()].filter((name) => !table.get(name)?.complete).length : 0;
  return [
    `${shown.length === runs.size ? "" : `${shown.length} of `}${runs.size} runs, ${view.runs.length} chosen`,
    view.runs.length >= MOST ? ", the most at once" : "",
    archived && view.archived !== "1" ? `, ${archived} archived` : "",
    waits ? `; metrics of ${waits} are still read` : "",
    unknown.length ? `; no parameter or metric is called ${unknown.join(", ")}` : "",
  ].join("");
}

function showEntry(entry, run, differs) {
  const is = view.runs.includes(run.name);
  entry.box.checked = is;
  entry.box.style.accentColor = is ? colourOf(run.name) : "";
  entry.box.disabled = !is && view.runs.length >= MOST;
  setText(entry.title, run.notes.title ? `${run.notes.title} (${run.name})` : run.name);
  setText(entry.status, run.notes.archived ? `archived, ${run.status}` : run.status);
  entry.status.className = `status ${/^[a-z]+$/.test(run.status) ? run.status : ""}`;
  const best = run.best ? `best ${short(run.best.value)}` : run.complete ? "" : "reading …";
  const steps = run.steps == null ? `step ${run.step}` : `step ${run.step}/${run.steps}`;
  setText(entry.figures, [steps, best, duration(run.seconds), (run.revision ?? "").slice(0, 8)].filter(Boolean).join(" · "));
  const own = differs.filter((name) => name in run.parameters);
  setText(entry.own, own.map((name) => `${name.slice(name.lastIndexOf(".") + 1)}=${run.parameters[name]}`).join("  "));
  entry.own.hidden = own.length === 0;
  if (entry.tags.textContent !== run.notes.tags.join("")) {
    entry.tags.replaceChildren(...run.notes.tags.map((tag) => element("span", { className: "tag", textContent: tag })));
  }
  entry.tags.hidden = run.notes.tags.length === 0;
  setText(entry.command, run.command);
  entry.edit.hidden = !canEdit();
  entry.item.title = [
    moment(run.began), run.reason, run.notes.note || run.notes.problem, ...own.map((name) => `${name}=${run.parameters[name]}`),
    run.command, run.revision,
  ].filter(Boolean).join("\n");
}

function makeEntry(name) {
  const box = element("input", { type: "checkbox", name });
  box.addEventListener("change", () => toggle(name));
  const made = { box };
  for (const part of ["figures", "own", "tags", "command"]) made[part] = element("span", { className: `more ${part}` });
  made.status = element("span", { className: "status" });
  made.title = element("span", { className: "name" });
  made.edit = element("button", { type: "button", className: "edit", textContent: "…", title: "title, tags, note, archive, delete" });
  made.edit.setAttribute("aria-label", `change ${name}`);
  made.edit.addEventListener("click", () => openEdits(name));
  const label = element("label", {}, box, made.title, made.status, made.figures, made.own, made.tags, made.command);
  made.item = element("li", {}, label, made.edit);
  return made;
}

const toggle = (name) => choose(view.runs.includes(name) ? view.runs.filter((other) => other !== name) : [...view.runs, name]);
