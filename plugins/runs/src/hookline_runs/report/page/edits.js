// What people write on runs, and deleting them: for those who opened the address that the command printed.
"use strict";

let edited = ""; // the run in the dialog

const canEdit = () => !inlined && editable && key !== "";

async function send(path, told) {
  const answer = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json", "X-Hookline-Key": key }, body: JSON.stringify({ name: edited, ...told }),
  });
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error);
}

function openEdits(name) {
  edited = name;
  const { title, tags, note, archived, problem } = runs.get(name).notes;
  setText($("edited"), name);
  $("edit-title").value = title;
  $("edit-tags").value = tags.join(", ");
  $("edit-note").value = note;
  $("edit-archived").checked = archived;
  setText($("edit-problem"), problem);
  $("question").hidden = true;
  $("delete").hidden = false;
  setText($("question-text"), `Delete ${name} with its record, checkpoints, pictures and all else in ${folder}/${name}? Nothing brings it back.`);
  $("edits").showModal();
}

// Do something with the run in the dialog, and close it; say there what went wrong.
async function finish(action) {
  try {
    await action();
    $("edits").close();
    wake();
  } catch (error) {
    setText($("edit-problem"), error.message);
  }
}

function listenToEdits() {
  $("save").addEventListener("click", () => finish(() => send("api/notes", {
    title: $("edit-title").value, note: $("edit-note").value, archived: $("edit-archived").checked,
    tags: $("edit-tags").value.split(",").map((tag) => tag.trim()).filter(Boolean),
  })));
  $("cancel").addEventListener("click", () => $("edits").close());
  $("delete").addEventListener("click", () => { $("question").hidden = false; $("delete").hidden = true; $("keep").focus(); });
  $("keep").addEventListener("click", () => { $("question").hidden = true; $("delete").hidden = false; });
  $("really").addEventListener("click", () => finish(() => send("api/delete", { confirmed: edited })));
}
