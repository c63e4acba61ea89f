// The charts of the chosen runs: one for each metric, in groups that fold.
"use strict";

const SYSTEM = /^(cpu|gpu|process|memory)([_/]|$)/; // figures of the machine
const DASHES = { train: [[], [12, 3], [2, 2], [9, 3, 2, 3]], val: [[6, 4], [2, 4], [10, 4, 2, 4], [6, 2, 2, 2, 2, 2]] };

function groupOf(metric) {
  if (SYSTEM.test(metric.panel)) return "system";
  return metric.panel.includes("/") ? metric.panel.slice(0, metric.panel.indexOf("/")) : "metrics";
}

const rankOf = (name) => (name === "metrics" ? 0 : name === "system" ? 2 : name === "time" ? 3 : 1);

function isOpen(name, charts) {
  if (view.open.includes(name)) return true;
  return !view.shut.includes(name) && rankOf(name) < 3 && charts <= 60;
}

// Remember what was folded or unfolded where it is not so by itself.
function fold(name, open, charts) {
  if (open === isOpen(name, charts)) return;
  const without = { open: view.open.filter((other) => other !== name), shut: view.shut.filter((other) => other !== name) };
  Object.assign(view, without);
  if (open !== isOpen(name, charts)) without[open ? "open" : "shut"].push(name);
  look(without);
}

// How each metric of a chart is drawn, so that they can be told apart without colours.
function stylesOf(curves) {
  const kinds = { train: 0, val: 0 };
  const found = new Map();
  const order = (one) => (one.val ? 2 : one.epoch ? 1 : 0);
  for (const one of [...curves].sort((a, b) => order(a) - order(b) || a.metric.localeCompare(b.metric))) {
    if (found.has(one.metric)) continue;
    const kind = one.val ? "val" : "train";
    const dash = one.epoch ? [] : DASHES[kind][kinds[kind]++ % DASHES[kind].length];
    found.set(one.metric, { dash, width: one.epoch ? 2.5 : 1.5, points: one.val ? 5 : one.epoch ? 8 : 0, number: found.size });
  }
  return found;
}

function draw() {
  const shown = view.runs.filter((name) => data.get(name)?.live);
  $("empty").hidden = view.runs.length > 0;
  $("parameters").hidden = $("details").hidden = shown.length === 0;
  const found = new Map(); // panel: its group and its curves
  for (const name of shown) {
    for (const metric of data.get(name).live.metrics) {
      if (!matches(metric.panel, view.metrics)) continue;
      if (!found.has(metric.panel)) found.set(metric.panel, { group: groupOf(metric), curves: [] });
      found.get(metric.panel).curves.push({ run: name, metric: metric.name, val: metric.val, epoch: metric.epoch });
    }
  }
  drawKey(shown);
  drawGroups(found);
  drawObjects(shown);
  drawParameters(shown);
  drawDetails(shown);
}

function drawGroups(found) {
  const loss = (name) => (name === "loss" ? 0 : name.includes("loss") ? 1 : found.get(name).curves.some((c) => c.val) ? 2 : 3);
  const inGroups = new Map();
  for (const [name, { group }] of found) inGroups.set(group, [...(inGroups.get(group) ?? []), name]);
  for (const [name, panel] of panels) if (!found.has(name)) { panel.remove(); panels.delete(name); }
  for (const [name, group] of groups) if (!inGroups.has(name)) { group.remove(); groups.delete(name); }
  const order = [...inGroups.keys()].sort((a, b) => rankOf(a) - rankOf(b) || a.localeCompare(b));
  order.forEach((name, number) => {
    const listed = inGroups.get(name).sort((a, b) => loss(a) - loss(b));
    if (!groups.has(name)) groups.set(name, makeGroup(name));
    const group = groups.get(name);
    group.dataset.charts = String(listed.length);
    group.open = isOpen(name, listed.length);
    if ($("charts").children[number] !== group) $("charts").insertBefore(group, $("charts").children[number] ?? null);
    setText(group.querySelector("small"), `${listed.length} chart${listed.length === 1 ? "" : "s"}`);
    const grid = group.querySelector(".grid");
    listed.forEach((panelName, at) => {
      if (!panels.has(panelName)) panels.set(panelName, new Panel(panelName));
      const panel = panels.get(panelName);
      if (grid.children[at] !== panel.card) grid.insertBefore(panel.card, grid.children[at] ?? null);
      if (group.open && view.tab === "curves") panel.show(found.get(panelName).curves);
    });
  });
}

function makeGroup(name) {
  const made = element("details", {}, element("summary", {}, name, element("small")), element("div", { className: "grid" }));
  made.addEventListener("toggle", () => fold(name, made.open, Number(made.dataset.charts)));
  return made;
}

// What the colours mean, where they do not just tell runs apart.
function drawKey(shown) {
  const state = JSON.stringify([view.group, view.colour, shown.map((name) => [colourOf(name), groupValue(name), valueOf(name, view.colour)])]);
  if ($("key").dataset.state === state) return;
  $("key").dataset.state = state;
  const by = view.group || view.colour;
  $("key").hidden = !by || shown.length === 0;
  if (!by) return;
  const dot = (colour, text) => {
    const made = element("span", { className: "dot" });
    made.style.background = colour;
    return element("span", { className: "one" }, made, text);
  };
  const found = new Map();
  for (const name of shown) {
    const value = view.group ? groupValue(name) : short(valueOf(name, by));
    found.set(value, { colour: colourOf(name), count: (found.get(value)?.count ?? 0) + 1 });
  }
  const told = view.group ? "mean of the chosen runs with the same " : "coloured by ";
  const band = view.group ? ", where all of them have a value; the band is from the lowest to the highest" : "";
  const parts = [...found].map(([value, { colour, count }]) => dot(colour, `${value}${view.group ? ` (${count} run${count > 1 ? "s" : ""})` : ""}`));
  $("key").replaceChildren(element("span", {}, `${told}${nameOf(by)}${band}:`), ...parts);
}
