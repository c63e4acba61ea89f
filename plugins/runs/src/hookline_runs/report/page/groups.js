// Colours by a column, and the mean and the spread of the curves of runs that have the same value.
"use strict";

const SHADES = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
const MOST_PLACES = 1500;
const GREY = "#888888";
const colourings = new Map(); // by column

const groupValue = (name) => (view.group ? short(valueOf(name, view.group)) : "");

function shade(part) {
  const [from, to] = theme() ? [0.25, 1] : [0, 0.94]; // the darkest is not seen on black, the lightest not on white
  const at = (from + Math.min(Math.max(part, 0), 1) * (to - from)) * (SHADES.length - 1);
  const [one, other] = [SHADES[Math.floor(at)], SHADES[Math.ceil(at)]];
  const mixed = one.map((value, number) => Math.round(value + (other[number] - value) * (at - Math.floor(at))));
  return `rgb(${mixed.join(", ")})`;
}

// A function from a run to its colour by a column, the same wherever it is shown: shades for numbers, else one for each value.
function colouring(column, deal = byValue) {
  const state = `${deal.name} ${listToken} ${tableToken} ${theme()}`;
  const kept = colourings.get(column);
  if (kept?.state === state) return kept.colour;
  const values = new Map([...runs.keys()].map((name) => [name, valueOf(name, column)]));
  colourings.set(column, { state, colour: deal(values) });
  return colourings.get(column).colour;
}

const byValue = (values) => shading(values) ?? dealing(values);

function shading(values) {
  const numbers = [...values.values()].filter((value) => Number.isFinite(value));
  if (numbers.length === 0 || [...values.values()].some((value) => typeof value === "string")) return null;
  const [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  const scale = low > 0 && high / low > 100 ? Math.log : (value) => value;
  const part = (value) => (high > low ? (scale(value) - scale(low)) / (scale(high) - scale(low)) : 0.5);
  return (name) => (Number.isFinite(values.get(name)) ? shade(part(values.get(name))) : GREY);
}

function dealing(values) {
  const kinds = [...new Set([...values.values()].map(short))].sort(new Intl.Collator(undefined, { numeric: true }).compare);
  return (name) => COLOURS[Math.max(kinds.indexOf(short(values.get(name))), 0) % COLOURS.length];
}

function colourOf(name) {
  if (view.group) return colouring(view.group, dealing)(name);
  if (view.colour) return colouring(view.colour)(name);
  return colours.has(name) ? COLOURS[colours.get(name)] : GREY;
}

// Values of a curve at places, between its points by a straight line; null outside, and beside a gap.
function between(x, y, places) {
  let at = 0;
  return places.map((place) => {
    while (at < x.length - 1 && x[at + 1] <= place) at += 1;
    if (place < x[0] || place > x[x.length - 1]) return null;
    if (x[at] === place || at === x.length - 1) return y[at];
    if (y[at] == null || y[at + 1] == null) return null;
    return y[at] + ((y[at + 1] - y[at]) * (place - x[at])) / (x[at + 1] - x[at]);
  });
}

// The mean, the lowest and the highest of some curves, at the places of all of them.
function together(curves) {
  let places = [...new Set(curves.flatMap(({ x }) => Array.from(x)))].sort((a, b) => a - b);
  if (places.length > MOST_PLACES) {
    const size = Math.ceil(places.length / MOST_PLACES);
    places = places.filter((_, number) => number % size === 0 || number === places.length - 1);
  }
  const all = curves.map(({ x, y }) => between(x, y, places));
  const made = { x: places, mean: [], low: [], high: [] };
  places.forEach((_, number) => {
    const values = all.map((one) => one[number]);
    const whole = values.every((value) => value != null);
    made.mean.push(whole ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
    made.low.push(whole ? Math.min(...values) : null);
    made.high.push(whole ? Math.max(...values) : null);
  });
  return made;
}

// The curves of a chart as lines: one for each curve, or for each group of runs and metric.
function linesOf(known, styles) {
  const curve = ({ run, metric }) => data.get(run).curves.get(metric);
  if (!view.group) {
    const alone = view.runs.length === 1; // then metrics are told apart by colours too
    return known.map((one) => {
      const number = styles.get(one.metric).number;
      const colour = alone && number > 0 ? COLOURS[(colours.get(one.run) + number) % 12] : colourOf(one.run);
      return { ...one, ...curve(one), colour, told: view.runs.length > 1 ? one.run : "" };
    });
  }
  const found = new Map();
  for (const one of known) {
    const name = JSON.stringify([groupValue(one.run), one.metric]);
    found.set(name, [...(found.get(name) ?? []), one]);
  }
  return [...found.values()].map((members) => {
    const { x, mean, low, high } = together(members.map(curve));
    const told = `${groupValue(members[0].run)} (${members.length})`;
    return { ...members[0], x, y: mean, low, high, colour: colourOf(members[0].run), told };
  });
}
