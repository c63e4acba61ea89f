// What is known of the chosen runs beside their curves: parameters, hook plan and cost.
"use strict";

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

// What is told of a run, row by row; the parameters that differ come before the command, all others behind it.
function columnOf(name, differs) {
  const { facts, live } = data.get(name);
  const run = runs.get(name);
  const best = run.best ? `${short(run.best.value)} at step ${run.best.step}` : null;
  const { title, tags, note, problem } = run.notes;
  const noted = [["title", title], ["tags", tags.join(", ")], ["note", note], ["problem", problem]].filter(([, text]) => text);
  return new Map([
    ...noted,
    ["status", run.reason ? `${run.status}: ${run.reason}` : run.status],
    ["step", run.steps == null ? run.step : `${run.step} of ${run.steps}`],
    [`best ${run.best?.name ?? "val_loss"}`, best],
    ...facts.config.filter(([parameter]) => differs.includes(parameter)),
    ["started", moment(run.began)],
    ["duration", duration(run.seconds) + (facts.sessions > 1 ? ` in ${facts.sessions} sessions` : "")],
    ["command", run.command], ["revision", run.revision],
    ["versions", Object.entries(facts.versions).map((pair) => pair.join(" ")).join(", ")],
    ["checkpoints", live.checkpoints.join(", ")],
    ...(live.unreadable ? [["unreadable lines", live.unreadable]] : []),
    ...facts.config.filter(([parameter]) => !differs.includes(parameter)),
  ]);
}

function drawParameters(listed) {
  const shown = listed.filter((name) => runs.has(name));
  const differs = differing(shown);
  const columns = shown.map((name) => columnOf(name, differs));
  const several = columns.length > 1;
  $("differing").hidden = !several;
  const rows = [];
  for (const name of new Set(columns.flatMap((column) => [...column.keys()]))) {
    const values = columns.map((column) => column.get(name) ?? "-");
    const differ = several && values.some((value) => value !== values[0]);
    if (differ || !several || view.all === "1") rows.push({ differs: differ && view.all === "1", row: [name, ...values] });
  }
  rows.sort((one, other) => differs.includes(other.row[0]) - differs.includes(one.row[0]));
  fill($("table"), ["", ...shown], rows);
  shown.forEach((name, number) => {
    $("table").tHead.rows[0].cells[number + 1].style.color = several ? colourOf(name) : "";
  });
}

function drawDetails(shown) {
  const of = shown.includes(view.of) ? view.of : shown[0] ?? "";
  if (of) fillSelect($("of"), shown.map((name) => [name, name]), of);
  $("which").hidden = shown.length < 2;
  const known = data.get(of);
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
