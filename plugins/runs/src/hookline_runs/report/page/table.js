// All runs: a table of their parameters and of what their metrics came to.
"use strict";

const SHOWN = 8; // parameters, and metrics, in the table unless others are picked

const needsTable = () => view.tab === "all" || /[<>=]/.test(view.filter) ||
  [view.sort.replace(/^-/, ""), view.group, view.colour].some((column) => column.startsWith("m:"));

// The columns of the table: those that were picked; else the parameters that differ, and the metrics that matter most.
function columnsShown() {
  if (view.columns.length) return view.columns;
  const { metrics } = columnsKnown();
  const differs = differing([...runs.keys()]).filter((name) => name !== "trainer.run_name").map((name) => `p:${name}`);
  const rank = (key) => (/^m:(val|test)[_/]/.test(key) ? 0 : /loss/.test(key) ? 1 : SYSTEM.test(key.slice(2)) || key.startsWith("m:time/") ? 9 : 2);
  const best = metrics.filter((key) => (/^m:(val|test)[_/]/.test(key) ? key.endsWith(":best") : key.endsWith(":last")));
  const told = best.filter((key) => rank(key) < 9).sort((a, b) => rank(a) - rank(b));
  return [...differs.slice(0, SHOWN), ...told.slice(0, SHOWN)];
}

function drawAll() {
  if (view.tab !== "all") return;
  const names = shownRuns();
  const columns = columnsShown();
  const dealt = view.group ? dealtOut(names) : [[null, names]];
  const state = JSON.stringify([
    names.map((name) => [name, colourOf(name), view.runs.includes(name), ...["status", "tags", ...columns].map((key) => valueOf(name, key)), runs.get(name).notes]),
    columns, view.sort, view.group, canEdit(),
  ]);
  if ($("runs-table").dataset.state !== state) {
    $("runs-table").dataset.state = state;
    const body = dealt.flatMap(([value, members]) => [
      ...(value === null ? [] : [groupRow(value, members, columns)]), ...members.map((name) => rowOf(name, columns)),
    ]);
    $("runs-table").replaceChildren(element("thead", {}, headOf(columns)), element("tbody", {}, ...body));
  }
  drawPicker(columns);
  drawScatter(names);
  drawLines(names, columns);
}

// Runs by what they have in the column that they are grouped by.
function dealtOut(names) {
  const found = new Map();
  for (const name of names) found.set(groupValue(name), [...(found.get(groupValue(name)) ?? []), name]);
  return [...found];
}

function headOf(columns) {
  const head = (column, ...inside) => {
    const down = view.sort === `-${column}`;
    const made = element("button", { type: "button" }, nameOf(column), view.sort === column ? " ↑" : down ? " ↓" : "");
    made.addEventListener("click", () => look({ sort: view.sort === column ? `-${column}` : column }));
    const cell = element("th", { scope: "col", className: column.startsWith("m:") ? "number" : "" }, ...inside, made);
    cell.dataset.column = column;
    if (column.endsWith(":best")) cell.title = lower[column.slice(2, -5)] ? "the lowest value" : "the highest value";
    return cell;
  };
  const names = shownRuns().filter((name) => runs.has(name));
  const box = element("input", { type: "checkbox", checked: names.length > 0 && names.slice(0, MOST).every((name) => view.runs.includes(name)) });
  box.setAttribute("aria-label", `choose the first ${MOST}`);
  box.title = `choose the first ${MOST} of them, or none`;
  box.addEventListener("change", () => choose(box.checked ? names : []));
  return element("tr", {}, head("name", box), head("status"), head("tags"), ...columns.map((column) => head(column)));
}

function cellOf(value, className = "") {
  return element("td", { className: `${className} ${typeof value === "number" ? "number" : ""}`, textContent: short(value) });
}

function rowOf(name, columns) {
  const run = runs.get(name);
  const box = element("input", { type: "checkbox", checked: view.runs.includes(name), name });
  box.disabled = !box.checked && view.runs.length >= MOST;
  box.addEventListener("change", () => toggle(name));
  const dot = element("span", { className: "dot" });
  dot.style.background = colourOf(name);
  const label = element("label", {}, box, dot, run.notes.title ? `${run.notes.title} (${name})` : name);
  const cells = columns.map((column) => {
    const made = cellOf(valueOf(name, column));
    if (column === view.colour && made.classList.contains("number")) made.style.boxShadow = `inset .3rem 0 ${colouring(column)(name)}`;
    const told = column.startsWith("m:") ? table.get(name)?.metrics[column.slice(2, column.lastIndexOf(":"))] : null;
    if (told) made.title = `at step ${told[column.endsWith(":best") ? "best_step" : "last_step"]}`;
    return made;
  });
  const made = element("tr", {}, element("th", { scope: "row" }, label), cellOf(run.status), cellOf(run.notes.tags.join(", ")), ...cells);
  made.dataset.run = name;
  return made;
}

// What a group comes to: of each metric the mean, and by how much runs are apart from it (standard deviation).
function groupRow(value, members, columns) {
  const cells = columns.map((column) => {
    const values = members.map((name) => valueOf(name, column));
    if (column.startsWith("p:")) return cellOf(new Set(values.map(short)).size === 1 ? values[0] : "…");
    const numbers = values.filter((number) => Number.isFinite(number));
    if (numbers.length < members.length || numbers.length === 0) return cellOf(null, "number");
    const mean = numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
    const spread = Math.sqrt(numbers.reduce((sum, number) => sum + (number - mean) ** 2, 0) / Math.max(numbers.length - 1, 1));
    return cellOf(numbers.length > 1 ? `${short(mean)} ± ${short(Number(spread.toPrecision(2)))}` : mean, "number");
  });
  const head = element("th", { scope: "row", colSpan: 3, textContent: `${nameOf(view.group)} = ${value} (${members.length})` });
  return element("tr", { className: "group" }, head, ...cells);
}

// Which columns there are, to be picked.
function drawPicker(columns) {
  const { parameters, metrics } = columnsKnown();
  const all = [...new Set([...parameters, ...metrics, ...columns])];
  const found = all.filter((column) => matches(nameOf(column), $("find").value));
  const state = JSON.stringify([found, columns]);
  if ($("columns-list").dataset.state === state) return;
  $("columns-list").dataset.state = state;
  $("columns-list").replaceChildren(...found.map((column) => {
    const box = element("input", { type: "checkbox", name: column, checked: columns.includes(column) });
    box.addEventListener("change", () => look({ columns: box.checked ? [...columns, column] : columns.filter((other) => other !== column) }));
    return element("label", {}, box, nameOf(column));
  }));
}

function saveTable() {
  const columns = columnsShown();
  const rows = shownRuns().map((name) => [
    name, ...["status", "tags", ...columns].map((column) => valueOf(name, column)), runs.get(name).notes.title, runs.get(name).notes.note,
  ]);
  download("runs.csv", asCsv([["run", "status", "tags", ...columns.map(nameOf), "title", "note"], ...rows]));
}
