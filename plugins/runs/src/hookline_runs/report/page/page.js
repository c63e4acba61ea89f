// The page of runs: it asks for what is new, again and again, and shows it.
"use strict";

let listToken = "";
let tableToken = "";
let folder = "";
let editable = false;
let timer = 0;
let busy = false;
let again = false;

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
      const counted = !needsTable() || await refreshTable();
      wait = !counted ? 20 : complete ? EVERY : 200;
      for (const name of [...view.runs]) {
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
  if (!document.hidden && !inlined) timer = setTimeout(tick, wait);
}

async function refreshList() {
  const answer = await ask("api/runs", { since: listToken });
  const first = listToken === "";
  listToken = answer.token;
  ({ folder, editable } = answer);
  setText($("folder"), folder);
  const present = new Set(answer.names);
  const gone = [...runs.keys()].filter((name) => !present.has(name));
  for (const name of gone) { runs.delete(name); table.delete(name); }
  for (const run of answer.runs) runs.set(run.name, run);
  if (first && view.runs.length === 0 && runs.size) view.runs = inlined ? sorted([...runs.keys()], view.sort) : [sorted([...runs.keys()], "-began")[0]];
  settle();
  if (first) writeAddress();
  if (first || gone.length || answer.runs.length) showAll();
  return answer.complete;
}

async function refreshTable() {
  const answer = await ask("api/table", { since: tableToken });
  tableToken = answer.token;
  lower = answer.lower;
  for (const one of answer.runs) table.set(one.name, one);
  if (answer.runs.length) showAll();
  return answer.complete;
}

const thinning = () => (view.group ? "mean" : "extremes");

function wanted(known) {
  const charts = (name) => Number(groups.get(name)?.dataset.charts ?? 0);
  const shown = (metric) => matches(metric.panel, view.metrics) && isOpen(groupOf(metric), charts(groupOf(metric)));
  return known.live && view.tab === "curves" ? known.live.metrics.filter(shown).map((metric) => metric.name) : [];
}

async function refreshRun(name) {
  const [axis, thin] = [view.x, thinning()];
  let known = data.get(name);
  if (!known || known.axis !== axis || known.thin !== thin) {
    known = { axis, thin, token: "", live: known?.live, facts: known?.facts, curves: new Map(), changed: 1 };
    data.set(name, known);
  }
  for (let round = 0; round < 2; round++) {
    const names = wanted(known);
    for (const kept of known.curves.keys()) if (!names.includes(kept)) known.curves.delete(kept);
    const words = [["name", name], ["x", axis], ["thin", thin], ["since", known.token]];
    for (const metric of names) words.push([known.curves.has(metric) ? "metric" : "fresh", metric]);
    const answer = await ask("api/run", words);
    if (answer === null || !view.runs.includes(name)) return;
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

document.body.classList.toggle("inlined", inlined !== null);
if (!inlined) key = sessionStorage.getItem(KEY) ?? "";
readAddress();
writeAddress();
listen();
listenToEdits();
$("find").addEventListener("input", () => drawPicker(columnsShown()));
$("usual").addEventListener("click", () => look({ columns: [] }));
$("save-table").addEventListener("click", saveTable);
$("save-page").addEventListener("click", savePage);
for (const name of ["scatter", "parallel"]) $(`save-${name}`).addEventListener("click", () => saveDrawing(name, $(name)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const panel of panels.values()) panel.state = "";
  showAll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
tick();
