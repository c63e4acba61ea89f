"""How records are read and laid out, from files written by hand."""

import json
import math
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hookline_runs import list_runs, read_run
from hookline_runs.commands import EXAMPLES, _parser
from hookline_runs.pages import render_run, render_runs
from hookline_runs.records import FILE

ROOT = Path(__file__).parents[3]
BEGIN = {
    "event": "begin", "session": "a", "time": 1000.0, "format": 1, "stage": "train", "command": ["python", "fit me.py"],
    "revision": "0123456789abcdef", "host": "elsewhere", "pid": 1, "versions": {"hookline": "0.1.0"},
    "config": {"trainer": {"epochs": 2, "run_name": "run"}, "plugins": {"jsonl": {}, "clip": {"max_norm": None}}},
}  # fmt: skip
TRAIN = {"event": "train", "session": "a", "time": 1001.0, "step": 0, "epoch": 0, "totals": {"steps": 8, "epochs": 2}}
END = {"event": "end", "session": "a", "time": 4661.0, "step": 8, "status": "finished", "reason": ""}


def log(step: int, time: float = 1002.0, session: str = "a", **metrics: float | str) -> dict:
    counters = {"step": step, "epoch": step // 5, "batches": step, "samples": step, "seconds": float(step)}
    return {"event": "log", "session": session, "time": time, **counters, "metrics": metrics}


def write(folder, *records) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text("".join(json.dumps(record) + "\n" for record in records))


HEAVY = ("torch", "rich", "omegaconf", "numpy", "matplotlib", "plotext")


def test_reading_needs_no_torch_and_no_rich(tmp_path):
    write(tmp_path / "a", BEGIN, TRAIN, log(1, x=1.0))
    write(tmp_path / "b", BEGIN, TRAIN, log(1, x=2.0))
    script = f"""
import sys
from hookline.cli import main
for words in ([], ["compare", "a", "b"], ["show", "a", "--json"]):
    assert main(["runs", "--folder", {str(tmp_path)!r}, *words]) == 0
print([module for module in {HEAVY} if module in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_help_needs_no_torch():
    code = """
import sys
from hookline.cli import main
try:
    main(["runs", "--help"])
finally:
    print([module for module in HEAVY if module in sys.modules])
""".replace("HEAVY", repr(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: hookline runs ")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_commands_of_the_documentation_are_understood():
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("plugins/*/README.md"), ROOT / "README.md"]
    shown = re.findall(r"^hookline runs\b([^#\n]*)", "\n".join(page.read_text() for page in pages), re.M)
    shown += re.findall(r"^  hookline runs\b(.*?)(?:  .*)?$", EXAMPLES, re.M)
    assert len(shown) > 12
    for words in shown:
        assert callable(_parser().parse_args(shlex.split(words)).command), words


def test_a_table_of_runs(tmp_path):
    losses = [log(4, val_loss=0.5, train_loss=1.0), log(6, val_loss=0.25), log(7, val_loss="NaN"), log(8, val_loss=0.3)]
    write(tmp_path / "run-1", BEGIN, TRAIN, *losses, END)
    later = {"session": "b", "time": 2000.0}
    write(
        tmp_path / "run-10",
        {**BEGIN, **later, "revision": None, "command": ["/bin/python3", "/bin/hookline", "fit", "a.yaml"]},
        {**TRAIN, **later},
        log(3, 2003.0, "b", train_loss=1.0),
    )
    (tmp_path / "not-a-run").mkdir()
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "<moment>".ljust(16), render_runs(list_runs(tmp_path)))
    assert text.splitlines() == [
        "run     status    step  best val loss  at step  duration  revision  started           command",
        "run-1   finished   8/8           0.25        6   1:01:01  01234567  <moment>          python 'fit me.py'",
        "run-10  unknown    3/8              -        -   0:00:03  -         <moment>          hookline fit a.yaml",
    ]


def test_a_page_on_one_run(tmp_path):
    objects = [
        {"event": "object", "session": "a", "time": 1002.0, "step": 4, "name": "said", "text": "hello"},
        {"event": "object", "session": "a", "time": 1002.0, "step": 4, "name": "drawn", "type": "a.Figure"},
        *(
            {
                "event": "object",
                "session": "a",
                "time": 1002.0,
                "step": step,
                "name": "kept",
                "type": "b",
                "file": f"objects/kept-{step}.png",
            }
            for step in (2, 4)
        ),
        {
            "event": "checkpoint",
            "session": "a",
            "time": 1002.0,
            "step": 8,
            "path": "checkpoints/8",
            "kind": "checkpoint",
        },
    ]
    write(tmp_path, BEGIN, TRAIN, log(2, train_loss=1.5), log(4, train_loss=0.75, val_loss=0.5), *objects, END)
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "kept-4.png").touch()
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    page = render_run(read_run(tmp_path))
    assert "  step 2: kept: objects/kept-2.png (removed)\n  step 4: kept: objects/kept-4.png\n" in page
    assert "  command        python 'fit me.py'\n" in page
    assert "  best val_loss  0.5 at step 4\n" in page
    assert "hyper-parameters\n  trainer.epochs         2\n  trainer.run_name       run\n" in page
    assert "  plugins.jsonl          {}\n  plugins.clip.max_norm  null\n" in page
    assert "  step 8: checkpoints/8 (checkpoint)\n" in page
    assert "  step 4: said = hello\n  step 4: drawn (a.Figure, not kept)\n" in page
    assert page.split("\n\n")[-1].splitlines() == [
        "logged",
        "step  epoch  train_loss  val_loss",
        "   2      0         1.5",
        "   4      0        0.75       0.5",
    ]


def test_long_and_wide_tables_are_cut_to_size(tmp_path):
    rows = [log(step, **{f"metric_{n}": n + step / 10 for n in range(6)}) for step in range(1, 9)]
    write(tmp_path, BEGIN, TRAIN, *rows)
    table = render_run(read_run(tmp_path), rows=2, width=50).split("logged")[1].splitlines()
    assert table[0] == " (the last 2 of 8)"
    assert [line for line in table if "metric" in line] == [
        "step  epoch  metric_0  metric_1  metric_2",
        "step  epoch  metric_3  metric_4  metric_5",
    ]
    assert max(map(len, table)) <= 50
    assert "logged\n" in render_run(read_run(tmp_path), rows=None)
    assert "logged" not in render_run(read_run(tmp_path), rows=0)


def test_a_command_is_cut_to_the_width_that_is_left(tmp_path):
    words = ["python", "-m", "hookline", "fit", "digits.yaml", *(f"trainer.option_{n}=1" for n in range(9))]
    write(tmp_path / "run-1", {**BEGIN, "command": words}, TRAIN)
    for width in (120, 140):
        lines = render_runs(list_runs(tmp_path), width).splitlines()
        assert max(map(len, lines)) == width
        assert lines[1].endswith("...")
        assert "  hookline fit digits.yaml" in lines[1]


def test_later_sessions_replace_the_steps_that_they_did_again(tmp_path):
    again = {"session": "b", "time": 3000.0}
    write(
        tmp_path, BEGIN, TRAIN, log(2, x=1.0), log(4, x=1.0), log(6, x=1.0), log(7, x=1.0),
        {**BEGIN, **again}, {**TRAIN, **again, "step": 4}, log(6, 3001.0, "b", x=2.0), log(8, 3002.0, "b", x=2.0),
        {**END, "session": "b", "time": 3003.0},
    )  # fmt: skip
    run = read_run(tmp_path)
    assert [(row["step"], row["x"]) for row in run.rows] == [(2, 1.0), (4, 1.0), (6, 2.0), (8, 2.0)]
    assert run.seconds == pytest.approx(2.0 + 3.0)  # what lay between the sessions does not count


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_resume_that_trains_nothing_changes_nothing_of_the_run(tmp_path, status):
    write(tmp_path, BEGIN, TRAIN, log(8, x=1.0), END)
    before = read_run(tmp_path)
    begun = BEGIN | {"session": "b", "command": ["fit", "--resume"], "config": {}, "versions": {}, "revision": None}
    trained = [TRAIN | {"session": "b", "step": 8, "totals": {"steps": 2}}] if status == "finished" else []
    end = END | {"session": "b", "step": 8 if trained else 0, "status": status, "cost": {"jsonl": 1.0}}
    write(tmp_path, BEGIN, TRAIN, log(8, x=1.0), END, begun, *trained, end)
    after = read_run(tmp_path)
    for name in ("command", "config", "versions", "revision", "step", "totals", "cost", "rows"):
        assert getattr(after, name) == getattr(before, name), name
    assert (after.status, len(after.sessions)) == (status, 2)
    write(tmp_path, BEGIN, TRAIN, log(8, x=1.0), END, begun, *trained, log(9, session="b", x=1.0), end | {"step": 9})
    assert (read_run(tmp_path).command == ["fit", "--resume"]) == bool(trained)


def test_only_checkpoints_that_are_there_are_listed_each_once(tmp_path):
    saved = [
        {
            "event": "checkpoint",
            "session": "a",
            "time": 1002.0,
            "step": step,
            "path": f"checkpoints/{step}",
            "kind": kind,
        }
        for step, kind in ((2, "checkpoint"), (4, "checkpoint"), (4, "again"))
    ]
    write(tmp_path, BEGIN, TRAIN, *saved)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    assert read_run(tmp_path).checkpoints == [{"step": 4, "path": "checkpoints/4", "kind": "again"}]


def test_a_counter_is_not_shadowed_by_a_metric_of_its_name(tmp_path):
    write(tmp_path, BEGIN, TRAIN, {**log(2), "metrics": {"step": 77.0, "epoch": 0.4}})
    (row,) = read_run(tmp_path).rows
    assert (row["step"], row["epoch"]) == (2, 0)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_file_cut_anywhere_can_be_read(tmp_path, cut):
    write(tmp_path, BEGIN, TRAIN, log(2, x=1.0), log(3, x="Infinity"))
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-cut])
    run = read_run(tmp_path)
    assert [row["step"] for row in run.rows] == ([2, 3] if cut == 1 else [2])
    assert run.unreadable == (0 if cut == 1 else 1)
    assert "run" in render_runs([run])


def test_a_file_of_something_else_is_no_reason_to_fall(tmp_path):
    write(tmp_path / "other", [1, 2], {"loss": 1}, {"event": "log", "session": "a", "time": 1.0})
    (run,) = list_runs(tmp_path)
    assert (run.rows, run.unreadable) == ([], 3)
    assert "3 line(s) of metrics.jsonl" in render_run(run)


def test_the_best_follows_the_name_of_the_configuration_and_never_nan(tmp_path):
    config = {"trainer": {"val_loss_metric_name": "nll"}}
    write(
        tmp_path, {**BEGIN, "config": config}, TRAIN, log(1, nll="NaN", val_loss=0.0), log(2, nll=3.0), log(3, nll=4.0)
    )
    best = read_run(tmp_path).best
    assert best is not None
    assert (best["step"], best["nll"]) == (2, 3.0)
    assert math.isnan(read_run(tmp_path).rows[0]["nll"])


def test_a_process_that_is_gone_has_crashed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write(tmp_path, {**BEGIN, "host": socket.gethostname(), "pid": gone.pid}, TRAIN)
    assert read_run(tmp_path).status == "crashed"


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no folder of runs '.*none'; training makes it"):
        list_runs(tmp_path / "none")
    (tmp_path / "run-1").mkdir()
    with pytest.raises(
        ValueError, match=r"'.*run-1' holds no metrics.jsonl: .*plugins: \{jsonl: \{\}\}.*hookline-runs"
    ):
        read_run(tmp_path / "run-1")
    write(tmp_path / "run-2", BEGIN)
    with pytest.raises(ValueError, match=r"there is no run folder '.*rnu-2'; .* has run-2"):
        read_run(tmp_path / "rnu-2")
    assert "no runs with a record yet" in render_runs([])
