// What is saved of the page: points and tables as CSV, charts as pictures, the view as a page.
"use strict";

function download(name, blob) {
  const link = element("a", { href: blob instanceof Blob ? URL.createObjectURL(blob) : blob, download: name });
  link.click();
  if (blob instanceof Blob) setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const asFile = (name) => name.replace(/[^\w.-]+/g, "_");

function asCsv(rows) {
  const cell = (value) => {
    const text = value == null ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return new Blob([rows.map((row) => `${row.map(cell).join(",")}\n`).join("")], { type: "text/csv" });
}

// All points of the curves of a chart, from the server; a page without one has the points that it draws.
function saveCurves(panel) {
  const metrics = [...new Set(panel.lines.map((line) => line.metric))];
  if (!inlined) {
    const words = [...view.runs.map((name) => ["name", name]), ...metrics.map((name) => ["metric", name])];
    download(`${asFile(panel.name)}.csv`, `api/curves.csv?${new URLSearchParams(words)}`);
    return;
  }
  const rows = view.runs.flatMap((run) => metrics.flatMap((metric) => {
    const curve = data.get(run)?.curves.get(metric) ?? { x: [], y: [] };
    return Array.from(curve.x, (x, number) => [run, metric, x, curve.y[number]]);
  }));
  download(`${asFile(panel.name)}-as-drawn.csv`, asCsv([["run", "metric", view.x, "value"], ...rows]));
}

// A chart with its name, its metrics and its runs.
function savePicture(panel) {
  const { canvas } = panel.chart.ctx;
  const scale = devicePixelRatio;
  const runsTold = new Map(panel.lines.map((line) => [line.told || line.run, line.colour]));
  const metrics = [...new Map(panel.lines.map((line) => [line.metric, line])).values()];
  const lines = 1 + metrics.length + runsTold.size;
  const made = element("canvas", { width: canvas.width, height: canvas.height + 18 * lines * scale + 10 * scale });
  const pen = made.getContext("2d");
  pen.fillStyle = style("--card");
  pen.fillRect(0, 0, made.width, made.height);
  pen.scale(scale, scale);
  const write = (text, number, left, font = "12px system-ui, sans-serif") => {
    Object.assign(pen, { font, fillStyle: style("--text") });
    pen.fillText(text, left, 18 + 18 * number);
  };
  write(panel.name, 0, 8, "bold 13px system-ui, sans-serif");
  metrics.forEach(({ metric, dash, width }, number) => {
    Object.assign(pen, { strokeStyle: style("--text"), lineWidth: width });
    pen.setLineDash(dash);
    pen.beginPath();
    pen.moveTo(8, 32 + 18 * number);
    pen.lineTo(42, 32 + 18 * number);
    pen.stroke();
    write(metric, 1 + number, 50);
  });
  [...runsTold].forEach(([name, colour], number) => {
    pen.fillStyle = colour;
    pen.fillRect(8, 9 + 18 * (1 + metrics.length + number), 34, 9);
    write(name, 1 + metrics.length + number, 50);
  });
  pen.setTransform(1, 0, 0, 1, 0, 0);
  pen.drawImage(canvas, 0, (18 * lines + 10) * scale);
  made.toBlob((blob) => download(`${asFile(panel.name)}.png`, blob));
}

// A drawing, with the colours that it has on the page.
function saveDrawing(name, picture) {
  const copy = picture.cloneNode(true);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("font-family", "system-ui, sans-serif");
  copy.prepend(drawing("rect", { width: "100%", height: "100%", fill: style("--card") }));
  const text = new XMLSerializer().serializeToString(copy).replaceAll("currentColor", style("--text"));
  download(`${name}.svg`, new Blob([text], { type: "image/svg+xml" }));
}

// The chosen runs, or all that are shown where all runs are looked at, as a page of their own.
function savePage() {
  const names = view.tab === "all" ? shownRuns() : view.runs;
  if (names.length === 0) return;
  download("runs.html", `api/page?${new URLSearchParams([...names.map((name) => ["name", name]), ["view", address()]])}`);
}
