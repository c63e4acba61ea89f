// The live report. What comes from a record is set as text (textContent), never as HTML.
"use strict";

const MOST = 12; // runs at once: as many as there are colours
const COLOURS = [
  "#3b82d6", "#e08a1e", "#2f9e5c", "#d6455d", "#8a63d2", "#1aa3a3",
  "#c2569f", "#93a01f", "#a3683f", "#6b8299", "#5b5fe0", "#d0a700",
];
const EVERY = 1500; // milliseconds
const SYSTEM = /^(cpu|gpu|process|memory)([_/]|$)/; // figures of the machine

const $ = (id) => document.getElementById(id);
const runs = new Map(); // by name: what the list shows
const data = new Map(); // by name of a chosen run: what is known of it
const colours = new Map(); // by name of a chosen run: a place in COLOURS
const entries = new Map(); // by name: its elements in the list
const panels = new Map(); // by name: its card
const groups = new Map(); // by name: its <details>
let chosen = [];
let listToken = "";
let timer = 0;
let busy = false;
let again = false;
let zoomed = false;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  Object.assign(made, attributes);
  made.append(...children);
  return made;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Text of numbers

function short(value) {
  if (typeof value !== "number") return value == null ? "-" : String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(3).replace(/\.?0*e\+?/, "e");
  return String(Number(value.toPrecision(5)));
}

function duration(seconds) {
  const whole = Math.max(0, Math.floor(Number(seconds) || 0));
  const two = (number) => String(number).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

function moment(seconds) {
  if (!Number.isFinite(seconds)) return "-";
  const two = (number) => String(number).padStart(2, "0");
  const at = new Date(seconds * 1000);
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`;
}

const place = (value) => ($("axis").value === "seconds" ? duration(value) : short(value));

// Asking the server

async function ask(path, words) {
  const answer = await fetch(`${path}?${new URLSearchParams(words)}`, { cache: "no-store" });
  if (answer.status === 404) return null;
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return answer.json();
}

function wake() {
  again = true;
  if (!busy) tick();
}

async function tick() {
  clearTimeout(timer);
  busy = true;
  let wait = EVERY;
  try {
    do {
      again = false;
      const complete = await refreshList();
      wait = complete ? EVERY : 200;
      for (const name of [...chosen]) {
        await refreshRun(name);
        draw();
        if (again) break;
      }
    } while (again);
    draw();
    setText($("note"), "");
  } catch (error) {
    setText($("note"), `no answer (${error.message}); trying again`);
    console.info(error);
    wait = 2 * EVERY;
  }
  busy = false;
  if (!document.hidden) timer = setTimeout(tick, wait);
}

async function refreshList() {
  const answer = await ask("api/runs", { since: listToken });
  const first = listToken === "";
  listToken = answer.token;
  setText($("folder"), answer.folder);
  const present = new Set(answer.names);
  for (const name of runs.keys()) if (!present.has(name)) runs.delete(name);
  for (const run of answer.runs) runs.set(run.name, run);
  if (first) {
    chosen = chosen.filter((name) => runs.has(name));
    if (chosen.length === 0) {
      const newest = sorted([...runs.values()], "began")[0];
      if (newest) choose([newest.name]);
    } else choose(chosen);
  } else if (chosen.some((name) => !runs.has(name))) choose(chosen.filter((name) => runs.has(name)));
  if (first || answer.runs.length || entries.size !== runs.size) drawList();
  return answer.complete;
}

function wanted(known) {
  const open = (metric) => {
    const group = groups.get(groupOf(metric));
    return matches(metric.panel, $("metrics").value) && (!group || group.open);
  };
  return known.live ? known.live.metrics.filter(open).map((metric) => metric.name) : [];
}

async function refreshRun(name) {
  const axis = $("axis").value;
  let known = data.get(name);
  if (!known || known.axis !== axis) {
    known = { axis, token: "", live: known?.live, facts: known?.facts, curves: new Map(), changed: 1 };
    data.set(name, known);
  }
  for (let round = 0; round < 2; round++) {
    const names = wanted(known);
    for (const kept of known.curves.keys()) if (!names.includes(kept)) known.curves.delete(kept);
    const words = [["name", name], ["x", axis], ["since", known.token]];
    for (const metric of names) words.push([known.curves.has(metric) ? "metric" : "fresh", metric]);
    const answer = await ask("api/run", words);
    if (answer === null || !chosen.includes(name)) return;
    known.token = answer.token;
    if (answer.live) take(known, answer);
    if (wanted(known).every((metric) => known.curves.has(metric))) return;
  }
}

function take(known, answer) {
  known.changed += 1;
  known.live = answer.live;
  if (answer.facts) known.facts = answer.facts;
  if (answer.anew) known.curves.clear();
  for (const [metric, more] of Object.entries(answer.curves)) {
    const curve = known.curves.get(metric) ?? { x: [], y: [] };
    curve.x = curve.x.slice(0, more.from).concat(more.x);
    curve.y = curve.y.slice(0, more.from).concat(more.y);
    known.curves.set(metric, curve);
  }
}

// Which runs

function choose(names) {
  chosen = names.slice(0, MOST);
  for (const name of [...data.keys()]) if (!chosen.includes(name)) data.delete(name);
  for (const name of [...colours.keys()]) if (!chosen.includes(name)) colours.delete(name);
  for (const name of chosen) {
    if (colours.has(name)) continue;
    const taken = new Set(colours.values());
    colours.set(name, COLOURS.findIndex((_, number) => !taken.has(number)));
  }
  history.replaceState(null, "", `#${chosen.map(encodeURIComponent).join(",")}`);
  drawList();
  draw();
  wake();
}

function fromAddress() {
  return location.hash.slice(1).split(",").filter(Boolean).map((word) => {
    try {
      return decodeURIComponent(word);
    } catch {
      return word;
    }
  });
}

const colourOf = (name) => COLOURS[colours.get(name)] ?? COLOURS[0];

function matches(text, filter) {
  return filter.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));
}

function sorted(listed, by) {
  const names = new Intl.Collator(undefined, { numeric: true });
  const best = (run) => (run.best && typeof run.best.value === "number" ? run.best.value : Infinity);
  return listed.sort((a, b) => {
    if (by === "began" && a.began !== b.began) return (b.began ?? 0) - (a.began ?? 0);
    if (by === "best" && best(a) !== best(b)) return best(a) < best(b) ? -1 : 1;
    return names.compare(a.name, b.name);
  });
}

function drawList() {
  const shown = sorted([...runs.values()], $("sort").value)
    .filter((run) => matches(`${run.name} ${run.status} ${run.command}`, $("runs").value));
  for (const [name, entry] of entries) if (!runs.has(name)) { entry.item.remove(); entries.delete(name); }
  const items = shown.map((run) => {
    if (!entries.has(run.name)) entries.set(run.name, makeEntry(run.name));
    const entry = entries.get(run.name);
    const is = chosen.includes(run.name);
    entry.box.checked = is;
    entry.box.style.accentColor = is ? colourOf(run.name) : "";
    entry.box.disabled = !is && chosen.length >= MOST;
    setText(entry.status, run.status);
    entry.status.className = `status ${/^[a-z]+$/.test(run.status) ? run.status : ""}`;
    const best = run.best ? `best ${short(run.best.value)}` : run.complete ? "" : "reading …";
    const steps = run.steps == null ? `step ${run.step}` : `step ${run.step}/${run.steps}`;
    setText(entry.figures, [steps, best, duration(run.seconds), (run.revision ?? "").slice(0, 8)].filter(Boolean).join(" · "));
    setText(entry.command, run.command);
    entry.item.title = [moment(run.began), run.reason, run.command, run.revision].filter(Boolean).join("\n");
    return entry.item;
  });
  const list = $("list");
  if (items.length !== list.children.length || items.some((item, number) => list.children[number] !== item))
    list.replaceChildren(...items);
  const full = chosen.length >= MOST ? `, the most at once` : "";
  setText($("count"), runs.size === 0
    ? "No run has a record yet: the plugin jsonl keeps one."
    : `${shown.length === runs.size ? "" : `${shown.length} of `}${runs.size} runs, ${chosen.length} chosen${full}`);
}

function makeEntry(name) {
  const box = element("input", { type: "checkbox", name });
  box.addEventListener("change", () => choose(box.checked ? [...chosen, name] : chosen.filter((other) => other !== name)));
  const status = element("span", { className: "status" });
  const figures = element("span", { className: "more" });
  const command = element("span", { className: "more command" });
  const label = element("label", {}, box, element("span", { className: "name", textContent: name }), status, figures, command);
  return { item: element("li", {}, label), box, status, figures, command };
}

// Charts

function groupOf(metric) {
  if (SYSTEM.test(metric.panel)) return "system";
  return metric.panel.includes("/") ? metric.panel.slice(0, metric.panel.indexOf("/")) : "metrics";
}

function draw() {
  const shown = chosen.filter((name) => data.get(name)?.live);
  $("empty").hidden = chosen.length > 0;
  $("parameters").hidden = $("details").hidden = shown.length === 0;
  const found = new Map(); // panel: its group and its curves
  for (const name of shown) {
    for (const metric of data.get(name).live.metrics) {
      if (!matches(metric.panel, $("metrics").value)) continue;
      if (!found.has(metric.panel)) found.set(metric.panel, { group: groupOf(metric), curves: [] });
      found.get(metric.panel).curves.push({ run: name, metric: metric.name, val: metric.val });
    }
  }
  const rank = (name) => (name === "metrics" ? 0 : name === "system" ? 2 : name === "time" ? 3 : 1);
  const loss = (name) => (name === "loss" ? 0 : name.includes("loss") ? 1 : found.get(name).curves.some((c) => c.val) ? 2 : 3);
  const inGroups = new Map();
  for (const [name, { group }] of found) inGroups.set(group, [...(inGroups.get(group) ?? []), name]);
  for (const [name, panel] of panels) if (!found.has(name)) { panel.remove(); panels.delete(name); }
  for (const [name, group] of groups) if (!inGroups.has(name)) { group.remove(); groups.delete(name); }
  const order = [...inGroups.keys()].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  order.forEach((name, number) => {
    if (!groups.has(name)) {
      const made = element("details", { open: rank(name) < 3 && inGroups.get(name).length <= 60 },
        element("summary", {}, name, element("small")), element("div", { className: "grid" }));
      made.addEventListener("toggle", wake);
      groups.set(name, made);
    }
    const group = groups.get(name);
    if ($("charts").children[number] !== group) $("charts").insertBefore(group, $("charts").children[number] ?? null);
    const listed = inGroups.get(name).sort((a, b) => loss(a) - loss(b));
    setText(group.querySelector("small"), `${listed.length} chart${listed.length === 1 ? "" : "s"}`);
    const grid = group.querySelector(".grid");
    listed.forEach((panelName, at) => {
      if (!panels.has(panelName)) panels.set(panelName, new Panel(panelName));
      const panel = panels.get(panelName);
      if (grid.children[at] !== panel.card) grid.insertBefore(panel.card, grid.children[at] ?? null);
      if (group.open) panel.show(found.get(panelName).curves);
    });
  });
  drawObjects(shown);
  drawParameters(shown);
  drawDetails(shown);
}

function smoothed(values, weight) {
  let mean = 0;
  let sum = 0;
  return values.map((value) => {
    if (value == null) return value;
    mean = weight * mean + (1 - weight) * value;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}

class Panel {
  constructor(name) {
    this.told = element("small");
    this.plot = element("div", { className: "plot" });
    this.tip = element("div", { className: "tip", hidden: true });
    this.card = element("article", { className: "card" },
      element("h3", {}, element("span", { textContent: name }), this.told), this.plot);
    this.card.dataset.panel = name;
    this.key = "";
    this.state = "";
    this.sizes = new ResizeObserver(() => {
      if (this.chart && this.plot.clientWidth > 0) this.chart.setSize({ width: this.plot.clientWidth, height: 230 });
    });
    this.sizes.observe(this.plot);
  }

  remove() {
    this.sizes.disconnect();
    this.chart?.destroy();
    this.card.remove();
  }

  show(curves) {
    const known = curves.filter(({ run, metric }) => {
      const { axis, curves: kept } = data.get(run);
      return axis === $("axis").value && kept.get(metric)?.x.length;
    });
    const weight = Number($("smooth").value);
    const log = $("log").checked;
    const state = JSON.stringify([known, weight, log, known.map((c) => [data.get(c.run).changed, data.get(c.run).axis])]);
    if (state === this.state || this.plot.clientWidth === 0) return;
    this.state = state;
    this.known = known;
    const tables = known.map((curve) => {
      const { x, y } = data.get(curve.run).curves.get(curve.metric);
      const drawn = log ? y.map((value) => (value > 0 ? value : null)) : y;
      return weight > 0 ? [x, drawn, smoothed(drawn, curve.val ? 0 : weight)] : [x, drawn]; // evaluations are few
    });
    this.card.dataset.points = String(tables.reduce((sum, table) => sum + table[0].length, 0));
    const hasVal = known.some((curve) => curve.val);
    const hasTrain = known.some((curve) => !curve.val);
    setText(this.told, hasVal && hasTrain ? "── train  ╌╌ val" : "");
    const joined = tables.length === 0 ? [[]] : uPlot.join(tables);
    const key = JSON.stringify([known, weight > 0, log, $("axis").value, known.map((c) => colourOf(c.run)), theme()]);
    if (key === this.key && this.chart) {
      this.chart.setData(joined, !zoomed);
      if (zoomed) this.chart.redraw();
      return;
    }
    this.key = key;
    this.chart?.destroy();
    this.chart = null;
    if (tables.length > 0) this.chart = new uPlot(this.options(known, weight > 0, log), joined, this.plot);
    if (this.chart) this.chart.over.append(this.tip);
  }

  options(known, weighted, log) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const series = [{}];
    for (const curve of known) {
      const line = {
        label: curve.metric, stroke: colourOf(curve.run), width: 1.5, dash: curve.val ? [6, 4] : undefined,
        points: curve.val ? { size: 5 } : {},
      };
      if (weighted) series.push({ ...line, alpha: 0.25, width: 1 });
      series.push(line);
    }
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    return {
      width: this.plot.clientWidth, height: 230, series, legend: { show: false }, pxAlign: false,
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [
        { ...axis, values: (_, ticks) => ticks.map(place), size: 26, space: 70 },
        { ...axis, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : short(tick))), size: 58 },
      ],
      cursor: { sync: { key: "hookline" }, points: { size: 6 }, drag: { x: true, y: false } },
      hooks: {
        setCursor: [(chart) => this.point(chart)],
        setSelect: [(chart) => { if (chart.select.width > 0) zoomed = true; }],
        ready: [(chart) => chart.over.addEventListener("dblclick", () => { zoomed = false; })],
      },
    };
  }

  point(chart) {
    const { left, idx } = chart.cursor;
    if (idx == null || left < 0 || !chart.over.matches(":hover")) {
      this.tip.hidden = true;
      return;
    }
    const each = (chart.series.length - 1) / this.known.length;
    const lines = [element("div", { textContent: `${$("axis").selectedOptions[0].textContent} ${place(chart.data[0][idx])}` })];
    this.known.forEach((curve, number) => {
      const values = chart.data[(number + 1) * each];
      let at = idx;
      while (at > 0 && values[at] === undefined) at -= 1; // another run's place: what this one had before it
      if (values[at] == null) return;
      const dot = element("span", { className: "dot" });
      dot.style.background = colourOf(curve.run);
      lines.push(element("div", {}, dot, `${short(values[at])}  ${curve.metric}${chosen.length > 1 ? `  ${curve.run}` : ""}`));
    });
    this.tip.replaceChildren(...lines);
    this.tip.hidden = false;
    const right = left > chart.over.clientWidth / 2;
    this.tip.style.left = right ? "" : `${left + 12}px`;
    this.tip.style.right = right ? `${chart.over.clientWidth - left + 12}px` : "";
    this.tip.style.top = "4px";
  }
}

const theme = () => matchMedia("(prefers-color-scheme: dark)").matches;

// Tables

function fill(table, head, rows, number = []) {
  const state = JSON.stringify([head, rows]);
  if (table.dataset.state === state) return;
  table.dataset.state = state;
  const cells = (row, tag) => row.map((cell, at) => {
    const made = element(at === 0 ? "th" : tag, { className: number.includes(at) ? "number" : "" });
    made.append(String(cell ?? "-"));
    return made;
  });
  const body = rows.map(({ differs, row }) => element("tr", { className: differs ? "differs" : "" }, ...cells(row, "td")));
  table.replaceChildren(
    element("thead", {}, element("tr", {}, ...cells(head, "th"))), element("tbody", {}, ...body));
}

// The last value of each object: a picture, a text, or a link to a table.
function drawObjects(shown) {
  const objects = shown.flatMap((run) => data.get(run).live.objects.map((one) => ({ run, ...one })));
  $("objects").hidden = objects.length === 0;
  const state = JSON.stringify([objects, shown.map(colourOf)]);
  if ($("shown").dataset.state === state) return;
  $("shown").dataset.state = state;
  $("shown").replaceChildren(...objects.map(({ run, name, step, text, file }) => {
    const words = new URLSearchParams({ name: run, file: file ?? "", step });
    const address = `api/object?${words}`;
    const made = file == null ? element("pre", { textContent: text })
      : file.endsWith(".png") ? element("img", { src: address, alt: name, loading: "lazy" })
        : element("a", { href: address, textContent: file, target: "_blank" });
    const told = element("small", { textContent: `step ${step}${shown.length > 1 ? `  ${run}` : ""}` });
    told.style.color = shown.length > 1 ? colourOf(run) : "";
    const card = element("article", { className: "card object" },
      element("h3", {}, element("span", { textContent: name }), told), made);
    card.dataset.object = name;
    return card;
  }));
}

function drawParameters(shown) {
  const columns = shown.map((name) => {
    const { facts, live } = data.get(name);
    const run = runs.get(name) ?? {};
    const best = run.best ? `${short(run.best.value)} at step ${run.best.step}` : null;
    return new Map([
      ["status", run.reason ? `${run.status}: ${run.reason}` : run.status],
      ["step", run.steps == null ? run.step : `${run.step} of ${run.steps}`],
      [`best ${run.best?.name ?? "val_loss"}`, best],
      ["started", moment(run.began)],
      ["duration", duration(run.seconds) + (facts.sessions > 1 ? ` in ${facts.sessions} sessions` : "")],
      ["command", run.command], ["revision", run.revision],
      ["versions", Object.entries(facts.versions).map((pair) => pair.join(" ")).join(", ")],
      ["checkpoints", live.checkpoints.join(", ")],
      ...(live.unreadable ? [["unreadable lines", live.unreadable]] : []),
      ...facts.config,
    ]);
  });
  const several = columns.length > 1;
  $("differing").hidden = !several;
  const rows = [];
  for (const name of new Set(columns.flatMap((column) => [...column.keys()]))) {
    const values = columns.map((column) => column.get(name) ?? "-");
    const differs = several && values.some((value) => value !== values[0]);
    if (differs || !several || !$("diff").checked) rows.push({ differs: differs && !$("diff").checked, row: [name, ...values] });
  }
  fill($("table"), ["", ...shown], rows);
  shown.forEach((name, number) => {
    $("table").tHead.rows[0].cells[number + 1].style.color = several ? colourOf(name) : "";
  });
}

function drawDetails(shown) {
  const of = $("of");
  if ([...of.options].map((option) => option.value).join("\n") !== shown.join("\n")) {
    const before = of.value;
    of.replaceChildren(...shown.map((name) => element("option", { value: name, textContent: name })));
    if (shown.includes(before)) of.value = before;
  }
  $("which").hidden = shown.length < 2;
  const known = data.get(of.value);
  if (!known?.live) return;
  fill($("plan"), ["hook", "kind", "wrapped by", "done or heard by"],
    known.facts.plan.map((row) => ({ row: [row.hook, row.kind, row.wrapped_by.join(", "), row.done_by.join(", ")] })));
  drawCost(known);
}

// Two kinds of cost: what the plugin monitor sees of all (time/NAME, a share), and what who only watches took in all.
function drawCost({ live }) {
  const shares = new Map(Object.entries(live.shares));
  const percent = (share) => (typeof share === "number" ? `${(100 * share).toFixed(2)} %` : "-");
  const order = (name) => shares.get(name) ?? live.cost[name] / live.session;
  const names = [...new Set([...shares.keys(), ...Object.keys(live.cost)])].sort((a, b) => order(b) - order(a));
  const rows = names.map((name) => {
    const seconds = live.cost[name];
    const share = seconds == null || !(live.session > 0) ? null : seconds / live.session;
    return { row: [name, percent(shares.get(name)), seconds == null ? "-" : `${short(seconds)} s`, percent(share)] };
  });
  fill($("cost"), ["plugin", "share of time, lately", "watching, in all", "of the session"], rows, [1, 2, 3]);
}

// Controls

for (const id of ["axis", "metrics"]) $(id).addEventListener("input", () => { zoomed = false; draw(); wake(); });
for (const id of ["smooth", "log", "diff", "of"]) $(id).addEventListener("input", draw);
$("smooth").addEventListener("input", () => setText($("smoothed"), $("smooth").value));
for (const id of ["runs", "sort"]) $(id).addEventListener("input", drawList);
$("clear").addEventListener("click", () => choose([]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const panel of panels.values()) panel.state = "";
  draw();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
window.addEventListener("hashchange", () => choose(fromAddress().filter((name) => runs.has(name))));
chosen = fromAddress();
tick();
