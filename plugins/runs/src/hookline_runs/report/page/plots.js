// All runs in pictures: one column against another, and many columns side by side. Drawn as SVG.
"use strict";

const FRAME = { width: 760, height: 380, left: 70, right: 20, top: 16, bottom: 46 };

// A scale of a column among runs: numbers by size, by powers of ten where they go over many, else one place a text.
function scaleOf(names, column, from, to) {
  const values = names.map((name) => valueOf(name, column)).filter((value) => value !== null && !Number.isNaN(value));
  const span = (part) => from + (to - from) * part;
  if (values.length === 0) return null;
  if (values.some((value) => typeof value !== "number")) {
    const kinds = [...new Set(values.map(short))].sort(new Intl.Collator(undefined, { numeric: true }).compare);
    const at = (value) => span((kinds.indexOf(short(value)) + 0.5) / kinds.length);
    const every = Math.ceil(kinds.length / 12);
    return { at, ticks: kinds.filter((_, number) => number % every === 0).map((kind) => [at(kind), kind]) };
  }
  const finite = values.filter(Number.isFinite);
  if (finite.length === 0) return null;
  const [low, high] = [Math.min(...finite), Math.max(...finite)];
  const logarithmic = low > 0 && high / low > 100;
  const bend = logarithmic ? Math.log10 : (value) => value;
  const at = (value) => (Number.isFinite(value) ? span(high > low ? (bend(value) - bend(low)) / (bend(high) - bend(low)) : 0.5) : null);
  const parts = high > low ? [0, 0.25, 0.5, 0.75, 1] : [0];
  const back = (part) => (logarithmic ? 10 ** (bend(low) + part * (bend(high) - bend(low))) : low + part * (high - low));
  return { at, ticks: parts.map((part) => [at(back(part)), short(Number(back(part).toPrecision(4)))]), logarithmic };
}

const word = (x, y, text, more = {}) => drawing("text", { x, y, "font-size": 11, fill: "currentColor", ...more }, text);
const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function picked(id, columns, first) {
  const value = view[id] || first || "";
  fillSelect($(id), columns.map((column) => [column, nameOf(column)]), value);
  return value;
}

function drawScatter(names) {
  const { parameters, metrics } = columnsKnown();
  const columns = [...differing([...runs.keys()]).map((name) => `p:${name}`), ...metrics, "step", "seconds", "began"];
  const shown = columnsShown();
  const first = shown.find((column) => column.startsWith("p:") && typeof valueOf(names[0], column) === "number") ?? columns[0];
  const across = picked("across", columns, first);
  const up = picked("up", columns, shown.find((column) => column.startsWith("m:")) ?? metrics[0] ?? "seconds");
  const { width, height, left, right, top, bottom } = FRAME;
  const [x, y] = [scaleOf(names, across, left + 12, width - right - 12), scaleOf(names, up, height - bottom - 8, top + 8)];
  const parts = [];
  let missing = names.length;
  if (x && y) {
    for (const [at, text] of x.ticks) {
      parts.push(drawing("line", { x1: at, x2: at, y1: top, y2: height - bottom, stroke: "currentColor", "stroke-opacity": 0.12 }));
      parts.push(word(at, height - bottom + 15, cut(text, 14), { "text-anchor": "middle" }));
    }
    for (const [at, text] of y.ticks) {
      parts.push(drawing("line", { y1: at, y2: at, x1: left, x2: width - right, stroke: "currentColor", "stroke-opacity": 0.12 }));
      parts.push(word(left - 6, at + 4, cut(text, 10), { "text-anchor": "end" }));
    }
    for (const name of names) {
      const [a, b] = [valueOf(name, across), valueOf(name, up)];
      const [cx, cy] = [a === null ? null : x.at(a), b === null ? null : y.at(b)];
      if (cx === null || cy === null) continue;
      missing -= 1;
      const chosen = view.runs.includes(name);
      const dot = drawing("circle", { cx, cy, r: chosen ? 6 : 4.5, fill: colourOf(name), stroke: chosen ? "currentColor" : "none", "stroke-width": 1.5 },
        drawing("title", {}, `${name}\n${nameOf(across)} ${short(a)}\n${nameOf(up)} ${short(b)}`));
      dot.dataset.run = name;
      dot.addEventListener("click", () => toggle(name));
      parts.push(dot);
    }
  }
  const told = (scale, column) => nameOf(column) + (scale?.logarithmic ? " (logarithmic)" : "");
  parts.push(word((left + width) / 2, height - 10, told(x, across), { "text-anchor": "middle" }));
  parts.push(word(0, 0, told(y, up), { "text-anchor": "middle", transform: `translate(14 ${height / 2}) rotate(-90)` }));
  $("scatter").replaceChildren(...parts);
  setText($("scattered"), missing ? `${missing} of ${names.length} runs have no such values` : "");
}

// A vertical axis for each column, a line for each run.
function drawLines(names, columns) {
  const shown = columns.filter((column) => names.some((name) => valueOf(name, column) !== null)).slice(0, 14);
  const { height, top, bottom } = FRAME;
  const width = Math.max(FRAME.width, shown.length * 120);
  $("parallel").setAttribute("viewBox", `0 0 ${width} ${height}`);
  $("parallel").style.minWidth = `${Math.min(width, shown.length * 90)}px`;
  const axes = shown.map((column, number) => ({
    column, at: 60 + (number * (width - 140)) / Math.max(shown.length - 1, 1), scale: scaleOf(names, column, height - bottom, top + 18),
  })).filter(({ scale }) => scale);
  const parts = [];
  let missing = 0;
  const inFront = [...names].sort((one, other) => view.runs.includes(one) - view.runs.includes(other));
  for (const name of axes.length > 1 ? inFront : []) {
    const places = axes.map(({ column, at, scale }) => {
      const value = valueOf(name, column);
      return value === null ? null : [at, scale.at(value)];
    });
    if (places.some((one) => one === null || one[1] === null)) {
      missing += 1;
      continue;
    }
    const chosen = view.runs.includes(name);
    const line = drawing("polyline", {
      points: places.map((pair) => pair.map((value) => value.toFixed(1)).join(",")).join(" "), fill: "none", stroke: colourOf(name),
      "stroke-width": chosen ? 2.5 : 1.3, "stroke-opacity": chosen ? 1 : 0.7,
    }, drawing("title", {}, [name, ...axes.map(({ column }) => `${nameOf(column)} ${short(valueOf(name, column))}`)].join("\n")));
    line.dataset.run = name;
    line.addEventListener("click", () => toggle(name));
    parts.push(line);
  }
  axes.forEach(({ column, at, scale }, number) => {
    parts.push(drawing("line", { x1: at, x2: at, y1: top + 18, y2: height - bottom, stroke: "currentColor", "stroke-opacity": 0.5 }));
    for (const [place, text] of scale.ticks) parts.push(word(at + 4, place + 4, cut(text, 12), { stroke: style("--card"), "stroke-width": 3, "paint-order": "stroke" }));
    const label = cut(column.startsWith("p:") ? nameOf(column).split(".").slice(-2).join(".") : nameOf(column), 24);
    parts.push(word(at, number % 2 ? height - bottom + 34 : height - bottom + 18, label, { "text-anchor": "middle" }));
  });
  $("parallel").replaceChildren(...parts);
  const few = axes.length < 2 ? "Two columns or more of the table are drawn; pick them above. " : "";
  setText($("paralleled"), few + (missing ? `${missing} of ${names.length} runs lack one of these values` : ""));
}
