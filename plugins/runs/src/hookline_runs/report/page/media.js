// Pictures, tables and texts that were logged: a card for each, as it was at a step.
"use strict";

const MOST_ROWS = 200;

const addressOf = (run, file) => (inlined ? inlined.files[`${run}\n${file}`] : `api/object?${new URLSearchParams({ name: run, file })}`);

async function contentOf(run, name, step, file) {
  if (inlined) {
    if (file === undefined) return inlined.runs[run].texts[`${name}\n${step}`];
    const bytes = Uint8Array.from(atob(addressOf(run, file).split(",")[1]), (letter) => letter.charCodeAt(0));
    return new TextDecoder().decode(bytes);
  }
  const path = file === undefined ? `api/text?${new URLSearchParams({ name: run, object: name, step })}` : addressOf(run, file);
  const answer = await fetch(path);
  return answer.ok ? answer.text() : "it is gone";
}

function drawObjects(shown) {
  const objects = shown.flatMap((run) => data.get(run).live.objects.map((one) => ({ run, ...one })));
  $("objects").hidden = objects.length === 0;
  const steps = [...new Set(objects.flatMap((one) => one.steps ?? []))].sort((a, b) => a - b);
  $("at").max = String(Math.max(steps.length - 1, 0));
  const chosen = view.at === "" ? steps.length - 1 : steps.findLastIndex((step) => step <= Number(view.at));
  $("at").disabled = steps.length < 2;
  $("at").value = String(Math.max(chosen, 0));
  const step = steps[Math.max(chosen, 0)];
  setText($("step"), steps.length === 0 ? "" : view.at === "" ? `step ${step}, the last` : `step ${step}`);
  $("at").oninput = () => {
    const number = Number($("at").value);
    look({ at: number === steps.length - 1 ? "" : String(steps[number]) });
  };
  const state = JSON.stringify([objects, step, shown.map(colourOf)]);
  if ($("shown").dataset.state === state) return;
  $("shown").dataset.state = state;
  const cards = new Map([...$("shown").children].map((card) => [card.dataset.key, card]));
  $("shown").replaceChildren(...objects.map((one) => card(one, step, shown.length > 1, cards)));
  const left = inlined?.left_out ? `${inlined.left_out} files of earlier steps had no room in this page. ` : "";
  setText($("left"), left);
}

// The card of an object, with what it was at a step or before; one that shows the same already stays.
function card({ run, name, kind, type, steps = [], files = [], logged }, step, several, cards) {
  const at = steps.findLastIndex((other) => other <= step);
  const key = JSON.stringify([run, name, kind, steps[at], files[at]]);
  const kept = cards.get(key);
  const told = at < 0 ? "" : `step ${steps[at]}${several ? `  ${run}` : ""}`;
  if (kept) {
    setText(kept.querySelector("small"), told);
    return kept;
  }
  const made = element("article", { className: "card object" },
    element("h3", {}, element("span", { textContent: name }), element("small", { textContent: told })));
  made.dataset.object = name;
  made.dataset.key = key;
  made.querySelector("small").style.color = several ? colourOf(run) : "";
  const nothing = kind === "none" ? `${type}: its type has no picture, table or text, and nothing of it was kept`
    : logged > 0 && steps.length === 0 ? "its files are gone" : at < 0 ? `nothing until step ${steps[0]}` : "";
  if (nothing) made.append(element("p", { className: "faint", textContent: nothing }));
  else fillCard(made, run, name, steps[at], kind === "file" ? files[at] : undefined);
  return made;
}

function fillCard(made, run, name, step, file) {
  if (file?.endsWith(".png")) {
    const picture = element("img", { src: addressOf(run, file), alt: `${name} at step ${step}`, loading: "lazy" });
    made.append(element("a", { href: picture.src, download: file.slice(file.lastIndexOf("/") + 1), title: "save the picture" }, picture));
    return;
  }
  const inside = element("div", { className: "scroll" });
  made.append(inside);
  contentOf(run, name, step, file).then((text) => {
    if (file === undefined) {
      inside.append(element("pre", { textContent: text }));
      return;
    }
    const [head, ...rows] = readCsv(text);
    const shown = rows.slice(0, MOST_ROWS);
    const numbers = head.map((_, at) => at).filter((at) => shown.length && shown.every((row) => typeof asNumber(row[at] ?? "") === "number"));
    const listed = element("table");
    fill(listed, head, shown.map((row) => ({ row })), numbers);
    inside.append(listed);
    if (rows.length > MOST_ROWS) made.append(element("p", { className: "faint", textContent: `the first ${MOST_ROWS} of ${rows.length} rows` }));
    made.append(element("a", { href: addressOf(run, file), download: file.slice(file.lastIndexOf("/") + 1), textContent: "CSV" }));
  });
}

// The rows of a text of comma-separated values.
function readCsv(text) {
  const rows = [[]];
  for (const [, quoted, bare, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(quoted === undefined ? bare : quoted.replaceAll('""', '"'));
    if (end === "") break;
    if (end !== ",") rows.push([]);
  }
  if (rows.at(-1).length === 1 && rows.at(-1)[0] === "") rows.pop();
  return rows.length ? rows : [[]];
}
