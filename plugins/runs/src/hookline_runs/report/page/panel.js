// One chart, drawn by uPlot.
"use strict";

const HEIGHT = 246;
const FEW = 100; // points of a curve that are marked whatever lies between them

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

// A short piece of a line as a metric is drawn.
function sample({ dash, width, points }, colour) {
  const line = { x1: 0, y1: 5, x2: 34, y2: 5, stroke: colour, "stroke-width": width, "stroke-dasharray": dash.join(" ") };
  const dots = points ? [drawing("circle", { cx: 17, cy: 5, r: points / 2.2, fill: colour })] : [];
  return drawing("svg", { width: 34, height: 10, "aria-hidden": "true" }, drawing("line", line), ...dots);
}

class Panel {
  constructor(name) {
    this.name = name;
    this.plot = element("div", { className: "plot" });
    this.tip = element("div", { className: "tip", hidden: true });
    this.legend = element("div", { className: "legend" });
    const button = (text, title, action) => {
      const made = element("button", { type: "button", className: "save", textContent: text, title });
      made.addEventListener("click", action);
      return made;
    };
    this.card = element("article", { className: "card" },
      element("h3", {}, element("span", { textContent: name }),
        button("CSV", "save the points of these curves", () => saveCurves(this)),
        button("PNG", "save the chart as a picture", () => savePicture(this))),
      this.legend, this.plot);
    this.card.dataset.panel = name;
    this.key = "";
    this.state = "";
    this.sizes = new ResizeObserver(() => {
      if (this.chart && this.plot.clientWidth > 0) this.chart.setSize({ width: this.plot.clientWidth, height: HEIGHT });
    });
    this.sizes.observe(this.plot);
  }

  remove() {
    this.sizes.disconnect();
    this.chart?.destroy();
    this.card.remove();
  }

  show(curves) {
    const styles = stylesOf(curves);
    this.showLegend(styles);
    const known = curves.filter(({ run, metric }) => {
      const { axis, thin, curves: kept } = data.get(run);
      return axis === view.x && thin === thinning() && kept.get(metric)?.x.length && !view.hide.includes(metric);
    });
    // A mean of those runs alone that came first would be another one.
    const missing = view.runs.some((name) => !data.get(name)?.live) || curves.some((one) => !known.includes(one) && !view.hide.includes(one.metric));
    if (view.group && missing) return;
    const state = JSON.stringify([
      known, view.smooth, view.log, view.zoom, view.runs.map(colourOf), view.group && view.runs.map(groupValue), theme(),
      known.map((one) => [data.get(one.run).changed, data.get(one.run).axis]),
    ]);
    if (state === this.state || this.plot.clientWidth === 0) return;
    this.state = state;
    this.lines = linesOf(known, styles).map((line) => ({ ...line, ...styles.get(line.metric) }));
    this.put();
  }

  put() {
    const weight = Number(view.smooth);
    const visible = (values) => (view.log ? values.map((value) => (value > 0 ? value : null)) : values);
    let at = 1;
    const tables = this.lines.map((line) => {
      const drawn = visible(line.y);
      const columns = weight > 0 ? [drawn, line.val || line.epoch ? drawn : smoothed(drawn, weight)] : [drawn];
      if (line.low) columns.push(visible(line.low), visible(line.high));
      line.at = at + (weight > 0 ? 1 : 0);
      at += columns.length;
      return [line.x, ...columns];
    });
    this.card.dataset.points = String(tables.reduce((sum, one) => sum + one[0].length, 0));
    const joined = tables.length === 0 ? [[]] : uPlot.join(tables);
    const names = this.lines.map(({ run, metric, colour, told, x }) => [run, metric, colour, told, x.length <= FEW]);
    const key = JSON.stringify([names, weight > 0, view.log, view.x, view.group, theme()]);
    if (key !== this.key || !this.chart) {
      this.key = key;
      this.chart?.destroy();
      this.chart = tables.length > 0 ? new uPlot(this.options(weight > 0), joined, this.plot) : null;
      this.chart?.over.append(this.tip);
    } else this.chart.setData(joined, view.zoom.length === 0);
    if (!this.chart || view.zoom.length === 0) return;
    this.chart.setScale("x", { min: view.zoom[0], max: view.zoom[1] });
    this.chart.redraw();
  }

  // Which line is which metric; one that is pressed is hidden, or shown again.
  showLegend(styles) {
    const names = [...styles.keys()];
    const plain = names.length === 1 && names[0] === this.name;
    const colourIn = (number) => (view.runs.length === 1 ? COLOURS[(colours.get(view.runs[0]) + number) % 12] : style("--text"));
    const state = JSON.stringify([[...styles], plain, view.hide, names.map((_, number) => colourIn(number))]);
    if (this.legend.dataset.state === state) return;
    this.legend.dataset.state = state;
    this.legend.hidden = plain;
    this.legend.replaceChildren(...names.map((metric) => {
      const off = view.hide.includes(metric);
      const made = element("button", { type: "button", title: off ? "show it" : "hide it" },
        sample(styles.get(metric), colourIn(styles.get(metric).number)), metric);
      made.setAttribute("aria-pressed", String(!off));
      made.addEventListener("click", () => look({ hide: off ? view.hide.filter((other) => other !== metric) : [...view.hide, metric] }));
      return made;
    }));
  }

  options(weighted) {
    const series = [{}];
    const bands = [];
    for (const { metric, colour, dash, width, points, low, x } of this.lines) {
      const few = points && x.length <= FEW ? { show: true } : {};
      const line = { label: metric, stroke: colour, width, dash, points: points ? { size: points, ...few } : {} };
      if (weighted) series.push({ ...line, alpha: 0.25, width: 1 });
      series.push(line);
      if (!low) continue;
      const edge = { label: metric, stroke: "transparent", width: 0, points: { show: false } };
      series.push(edge, edge);
      bands.push({ series: [series.length - 1, series.length - 2], fill: faded(colour) });
    }
    const faint = style("--faint");
    const axis = { stroke: faint, grid: { stroke: style("--grid"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const named = { label: $("axis").selectedOptions[0].textContent, labelSize: 16, labelGap: -2, labelFont: "11px system-ui, sans-serif" };
    return {
      width: this.plot.clientWidth, height: HEIGHT, series, bands, legend: { show: false }, pxAlign: false,
      scales: { x: { time: false }, y: view.log ? { distr: 3 } : {} },
      axes: [
        { ...axis, ...named, values: (_, ticks) => ticks.map(place), size: 26, space: 70 },
        { ...axis, values: (_, ticks) => ticks.map((tick) => (tick == null ? "" : short(tick))), size: 58 },
      ],
      cursor: {
        sync: { key: "hookline", filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
        points: { size: 6, show: (_, number) => this.lines.some((line) => line.at === number) && markOf() },
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => look({ zoom: [] }) },
      },
      hooks: { setCursor: [(chart) => this.point(chart)], setSelect: [(chart) => this.zoom(chart)] },
    };
  }

  // All charts show the same stretch.
  zoom(chart) {
    const { left, width } = chart.select;
    if (width <= 0) return;
    const ends = [chart.posToVal(left, "x"), chart.posToVal(left + width, "x")];
    chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    look({ zoom: ends.map((end) => Number(end.toPrecision(6))) });
  }

  point(chart) {
    const { left, idx } = chart.cursor;
    if (idx == null || left < 0 || !chart.over.matches(":hover")) {
      this.tip.hidden = true;
      return;
    }
    const told = [element("div", { textContent: `${$("axis").selectedOptions[0].textContent} ${place(chart.data[0][idx])}` })];
    for (const line of this.lines) {
      const values = chart.data[line.at];
      let at = idx;
      while (at > 0 && values[at] === undefined) at -= 1; // another run's place: what this one had before it
      if (values[at] == null) continue;
      const dot = element("span", { className: "dot" });
      dot.style.background = line.colour;
      const spread = line.low ? `  (${short(chart.data[line.at + 1][at])} to ${short(chart.data[line.at + 2][at])})` : "";
      told.push(element("div", {}, dot, `${short(values[at])}${spread}  ${line.metric}${line.told ? `  ${line.told}` : ""}`));
    }
    this.tip.replaceChildren(...told);
    this.tip.hidden = false;
    const right = left > chart.over.clientWidth / 2;
    this.tip.style.left = right ? "" : `${left + 12}px`;
    this.tip.style.right = right ? `${chart.over.clientWidth - left + 12}px` : "";
    this.tip.style.top = "4px";
  }
}

// The mark at the pointer, on the lines themselves and not on the edges of bands.
function markOf() {
  const mark = element("div");
  Object.assign(mark.style, { width: "6px", height: "6px", margin: "-3px 0 0 -3px" });
  return mark;
}

// A colour that what is behind it is seen through.
const faded = (colour) => (colour.startsWith("rgb(") ? colour.replace("rgb(", "rgba(").replace(")", ", 0.18)") : `${colour.slice(0, 7)}2e`);
