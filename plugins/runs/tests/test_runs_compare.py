"""`hookline runs` and its subcommands over real runs, and the same in Python: `history`."""

import importlib.util
import json
import math
import os
import re
import struct
import subprocess
import sys

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.cli import main
from hookline.testing import Memory, TinyModule, tiny_trainer
from hookline_runs import Jsonl, history, read_run
from hookline_runs.compare import is_better_lower
from hookline_runs.curves import points
from hookline_runs.records import FILE

PLOTS = "pip install 'hookline-runs[plots]'"
needs_plotext = pytest.mark.skipif(importlib.util.find_spec("plotext") is None, reason=PLOTS)
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason=PLOTS)


class Measured(TinyModule):
    def __init__(self):
        super().__init__(samples=32)

    def val_step(self, global_step, batch, device):
        loss = super().val_step(global_step, batch, device)
        self.log(val_accuracy=global_step / 10)
        return loss


def train(folder, name="run", plugins=(), **options):
    options = {"epochs": 2, "log_every": "1 steps", "runs_folder": str(folder), "run_name": name, **options}
    trainer = tiny_trainer([Jsonl(), *plugins], Measured(), **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Train twice, with different seeds, into one folder."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        torch.manual_seed(seed)
        train(folder, seed=seed)
    return folder


@pytest.fixture
def hookline(capsys, runs):
    """Run `hookline runs` in that folder; return its exit code and what it said."""

    def run(*words, folder=runs):
        code = main(["runs", "--folder", str(folder), *map(str, words)])
        out, err = capsys.readouterr()
        assert (code == 0) == (err == "")
        return out if code == 0 else err

    return run


# Lists and pages ------------------------------------------------------------------------


def test_the_list(hookline):
    header, *lines = hookline().splitlines()
    assert " ".join(header.split()) == "run status step best val loss at step duration revision started command"
    assert [line.split()[:3] for line in lines] == [["run-1", "finished", "8/8"], ["run-2", "finished", "8/8"]]
    assert max(map(len, [header, *lines])) <= 120


def test_the_list_for_machines(hookline, runs):
    first, second = json.loads(hookline("--json"))
    assert (first["run"], first["status"], first["step"], first["totals"]["steps"]) == ("run-1", "finished", 8, 8)
    assert (second["folder"], second["best"]["metric"]) == (str(runs / "run-2"), "val_loss")
    assert second["command"] == sys.orig_argv


def test_the_folder_may_be_named_behind_the_subcommand(capsys, runs):
    assert main(["runs", "show", "run-1", "--folder", str(runs)]) == 0
    assert main(["runs", "show", str(runs / "run-1")]) == 0
    first, second = capsys.readouterr().out.split("  folder")[1:]
    assert first == second


def test_a_name_below_the_folder_goes_before_a_folder_without_a_record(capsys, runs, tmp_path, monkeypatch):
    (tmp_path / "run-1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "--folder", str(runs), "show", "run-1"]) == 0
    assert str(runs / "run-1") in capsys.readouterr().out


@needs_plotext
def test_a_page_ends_with_curves(hookline):
    page = hookline("show", "run-1", "--rows", "2")
    assert "logged (the last 2 of 8)\n" in page
    assert "\x1b" not in page
    curves = page[page.index("curves, by step\n") :].splitlines()
    assert curves[2].split("  ")[0] == "train_loss (line), train_loss_epoch (x), val_loss (o)"
    assert curves[2].endswith("val_accuracy (line)")
    assert {"┌", "┤", "o", "x"} < set("".join(curves))
    assert any("⠀" < letter <= "⣿" for letter in "".join(curves))
    assert max(map(len, curves)) <= 120
    assert curves[-1].split()[:5] == ["1", "3", "4", "6", "8"]


def test_the_rows_of_a_page(hookline):
    def steps(*words):
        return [row["step"] for row in json.loads(hookline("show", "run-1", "--json", *words))["rows"]]

    assert steps() == steps("--rows", "all") == [*range(1, 9)]
    assert steps("--rows", "3") == [6, 7, 8]
    assert steps("--rows", "0") == []
    assert "logged" not in hookline("show", "run-1", "--rows", "0")
    assert "--rows some is neither a number from 0 nor all" in hookline("show", "run-1", "--rows", "some")


def test_a_page_for_machines_is_strict_json(hookline, tmp_path):
    class Breaks(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            trainer.log(odd=math.nan if global_step == 3 else -math.inf)

    train(tmp_path, plugins=[Breaks()])

    def refuse(word):
        raise AssertionError(word)

    page = json.loads(hookline("show", "run-1", "--json", folder=tmp_path), parse_constant=refuse)
    assert {row["odd"] for row in page["rows"]} == {"NaN", "-Infinity"}
    assert page["config"]["trainer"]["epochs"] == 2
    assert page["versions"]["torch"] == torch.__version__


def test_without_plotext_a_page_says_how_to_get_curves(hookline, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotext", None)
    assert (
        hookline("show", "run-1").splitlines()[-1] == "curves: `pip install 'hookline-runs[plots]'` has them drawn here"
    )


@needs_plotext
def test_where_the_output_has_no_such_letters_a_page_has_no_curves(runs):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "hookline", "runs", "show", str(runs / "run-1")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("curves: they are drawn here where the output is UTF-8")


@needs_plotext
@pytest.mark.skipif(os.name != "posix", reason="has no such terminals")
def test_in_a_terminal_curves_have_colours_and_fit(runs):
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "hookline", "runs", "show", str(runs / "run-1"), "--rows", "0"]
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    said = b""
    try:
        while more := os.read(ours, 65536):
            said += more
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait(timeout=30) == 0
    curves = said.decode().split("curves, by step")[1]
    assert re.search("\x1b\\[[0-9;]*m[⠁-⣿]", curves)
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", curves).splitlines())) <= 72


@needs_plotext
def test_curves_of_what_is_not_finite_of_one_point_and_of_many(hookline, tmp_path):
    class Logs(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            trainer.log(never=math.nan, hole=math.inf if global_step == 2 else 1.0)
            if global_step == 1:
                trainer.log(once=2.0)
            trainer.log(**{f"more_{n}": n for n in range(6)})

    train(tmp_path, plugins=[Logs()])
    page = hookline("show", "run-1", folder=tmp_path)
    assert "never (never finite)" in page
    assert "hole (line)" in page
    assert "once (x)" in page
    assert page.splitlines()[-1].startswith("and more_3, more_4, more_5: `hookline runs plot ")


# While a run is going on ------------------------------------------------------------------


def test_all_of_it_works_while_a_run_is_going_on(hookline, tmp_path):
    seen = []

    class Looks(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer, global_step):
            if global_step in (2, 5):
                (run,) = json.loads(hookline("--json", folder=tmp_path))
                page = hookline("show", "run-1", folder=tmp_path)
                seen.append((run["status"], run["step"], [row["step"] for row in history(trainer)], "running" in page))

    trainer = train(tmp_path, plugins=[Looks()])
    assert seen == [("running", 2, [1, 2], True), ("running", 5, [1, 2, 3, 4, 5], True)]
    assert [row["step"] for row in history(trainer)] == [*range(1, 9)]


def test_a_line_half_written_is_passed_over(hookline, tmp_path):
    for name in "ab":
        train(tmp_path, name)
        record = tmp_path / f"{name}-1" / FILE
        record.write_bytes(record.read_bytes()[:-30])
    assert [line.split()[0] for line in hookline(folder=tmp_path).splitlines()[1:]] == ["a-1", "b-1"]
    assert "unreadable" in hookline("show", "a-1", folder=tmp_path)
    assert "val_loss (lowest)" in hookline("compare", "a-1", "b-1", folder=tmp_path)


# Comparing ------------------------------------------------------------------------------


def test_compare_shows_what_differs(hookline, runs):
    page = hookline("compare", "run-1", "run-2")
    assert re.search(
        r"parameters that differ \(1; \d\d are equal\)\nparameter +run-1 +run-2\ntrainer.seed +0 +1\n", page
    )
    assert "versions that differ" not in page
    lines = {tuple(line.split()[:2]): line.split() for line in page.splitlines()}
    assert lines["val_accuracy", "(highest)"][2:] == ["run-1", "0.8", "8", "0.8", "8"]
    assert lines["run-2", "0.8"] == ["run-2", "0.8", "+0", "8", "0.8", "+0", "8"]
    assert max(map(len, page.splitlines())) <= 120


def test_compare_for_machines(hookline):
    told = json.loads(hookline("compare", "run-2", "run-1", "--json"))
    rows = {name: json.loads(hookline("show", name, "--json"))["rows"] for name in ("run-1", "run-2")}
    assert told["parameters"] == {"trainer.seed": {"run-2": "1", "run-1": "0"}}
    assert told["versions"] == {}
    last, best = (
        {n: of([r["val_loss"] for r in kept if "val_loss" in r]) for n, kept in rows.items()}
        for of in (lambda v: v[-1], min)
    )
    assert told["metrics"]["val_loss"]["run-1"] == {
        "last": last["run-1"], "last_step": 8, "best": best["run-1"],
        "best_step": next(row["step"] for row in rows["run-1"] if row.get("val_loss") == best["run-1"]),
        "last_difference": last["run-1"] - last["run-2"], "best_difference": best["run-1"] - best["run-2"],
    }  # fmt: skip
    assert [*told["runs"]] == ["run-2", "run-1"]


def test_compare_several_of_other_versions_and_with_a_test(hookline, tmp_path):
    for name in "abc":
        trainer = train(tmp_path, name, val_batch_size={"a": 8, "b": 4, "c": 4}[name])
        if name != "c":
            trainer.test()
    record = tmp_path / "c-1" / FILE
    record.write_text(record.read_text().replace(torch.__version__, "1.0"))
    page = hookline("compare", "a-1", "b-1", "c-1", folder=tmp_path)
    assert re.search(r"of +a-1 +b-1 +c-1\ntorch +[\w.+]+ +[\w.+]+ +1.0\n", page)
    assert re.search(r"trainer.val_batch_size +8 +4 +4\n", page)
    assert re.search(r"test_loss \(lowest\) +a-1 .*\n +b-1 [^\n]+(\n[^ ]|\n*$)", page)


def test_a_parameter_too_long_for_a_column_stands_below(hookline, tmp_path):
    for name in "ab":
        train(tmp_path, name)
        record = tmp_path / f"{name}-1" / FILE
        begin, *rest = record.read_text().splitlines(keepends=True)
        changed = json.loads(begin)
        changed["config"]["data"] = {"path": "/far" * 30 + name}
        record.write_text("".join([json.dumps(changed) + "\n", *rest]))
    page = hookline("compare", "a-1", "b-1", folder=tmp_path)
    assert f"data.path\n  a-1: {'/far' * 30}a\n  b-1: {'/far' * 30}b\n" in page


@pytest.mark.parametrize(
    ("name", "best"),
    [("val_loss", "lowest"), ("nll", "lowest"), ("val_mse/en", "lowest"), ("word_error", "lowest"),
     ("myloss", "lowest"), ("val_accuracy", "highest"),
     ("answer", "highest"), ("f1", "highest"), ("lossless_ratio", "highest")],
)  # fmt: skip
def test_what_is_best_of_a_metric_is_told_by_its_name(name, best):
    assert is_better_lower(name) == (best == "lowest")


# Drawing into files ---------------------------------------------------------------------


def drawn(path):
    """Return the texts of a picture, which stand beside their outlines, and the paths of its curves."""
    svg = path.read_text()
    paths = re.findall(r'<path d="(M[^"]*)" clip-path[^>]*style="fill: none;[^"]* stroke: #(?!b0b0b0)', svg)
    return re.findall(r"<!-- (.*?) -->", svg), paths


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_a_picture_is_what_its_suffix_says(hookline, tmp_path, suffix, begin):
    out = tmp_path / f"curves{suffix}"
    assert hookline("plot", "run-1", "--out", out) == f"wrote {out}\n"
    assert out.read_bytes().startswith(begin)


@needs_matplotlib
def test_a_panel_for_each_metric_and_all_runs_in_one_legend(hookline, tmp_path):
    hookline("plot", "run-1", "run-2", "--out", out := tmp_path / "a.svg")
    texts, paths = drawn(out)
    words = ["loss", "train_loss", "train_loss_epoch", "val_loss", "val_accuracy", "run-1", "run-2"]
    assert [texts.count(word) for word in words] == [1] * 7
    assert texts.count("step") == 2
    assert len(paths) == 2 * 4


@needs_matplotlib
@pytest.mark.parametrize(
    ("named", "texts"),
    [
        (["loss"], {"train_loss", "val_loss"}),
        (["val_loss"], {"val_loss"}),
        (["val_accuracy", "val_loss"], {"val_accuracy"}),
    ],
)
def test_metrics_are_chosen_by_name_or_by_what_they_are_of(hookline, tmp_path, named, texts):
    hookline("plot", "run-1", "--out", out := tmp_path / "a.svg", "--metric", *named)
    assert texts <= {*drawn(out)[0]}
    assert ("val_accuracy" in drawn(out)[0]) == ("val_accuracy" in named)
    assert ("train_loss" in drawn(out)[0]) == ("loss" in named)


@needs_matplotlib
@pytest.mark.parametrize(("by", "last"), [("step", 8), ("samples", 64), ("epoch", 2), ("seconds", None)])
def test_what_goes_to_the_right(hookline, runs, tmp_path, by, last):
    hookline("plot", "run-1", "--out", out := tmp_path / "a.svg", "--by", by)
    assert by in drawn(out)[0]
    places = [place for place, _ in points(read_run(runs / "run-1"), "train_loss", by)]
    assert places == sorted(places)
    assert last in (None, places[-1])


@needs_matplotlib
def test_what_is_not_finite_is_a_gap(hookline, tmp_path):
    class Breaks(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            trainer.log(
                odd={3: math.nan, 6: math.inf}.get(global_step, 1.0 + global_step % 2), even=1.0 + global_step % 2
            )

    train(tmp_path, plugins=[Breaks()])
    hookline("plot", "run-1", "--out", out := tmp_path / "a.svg", "--metric", "odd", "even", folder=tmp_path)
    odd, even = drawn(out)[1]
    assert (odd.count("M"), even.count("M")) == (3, 1)


@needs_matplotlib
def test_names_are_no_formulas(hookline, tmp_path):
    class Logs(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer):
            trainer.log(**{"cost in $ of $_{x": 1.0})

    train(tmp_path, plugins=[Logs()])
    hookline("plot", "run-1", "--out", out := tmp_path / "a.svg", folder=tmp_path)
    assert "cost in $ of $_{x" in drawn(out)[0]


def test_without_matplotlib_plot_says_what_to_install(hookline, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = hookline("plot", "run-1", "--out", tmp_path / "a.png")
    assert said == "hookline: curves in files need matplotlib: `pip install 'hookline-runs[plots]'`\n"


# Errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "show rnu-1",
            r"there is no run 'rnu-1', neither at this path nor in .*, did you mean 'run-1'\?; .* has run-1, run-2",
        ),
        ("compare run-1", "there is nothing to compare run-1 with: name two runs or more"),
        ("compare run-1 run-1", "there is nothing to compare run-1 with"),
        ("compare run-1 run-3", "there is no run 'run-3'"),
        ("plot run-1 --out a.jpg", "--out a.jpg: the suffix says the format, and .jpg is not among .png, .svg, .pdf"),
        ("plot run-1 --out curves", "--out curves: the suffix says the format, and none is not among"),
        (
            "plot run-1 --out a.png --metric val_los",
            "no metric 'val_los' was logged, did you mean 'val_loss'?; there are train_loss, ",
        ),
    ],
)
def test_errors_say_what_is_offered(hookline, words, said):
    assert re.search(said.replace("?;", r"\?;") if "\\" not in said else said, hookline(*words.split()))


def test_a_folder_without_runs_says_where_to_look(hookline, tmp_path):
    assert "name the folder of the runs by --folder" in hookline("show", "run-1", folder=tmp_path / "none")


def test_a_run_without_rows_has_no_curves(hookline, tmp_path):
    tiny_trainer([Jsonl()], Measured(), runs_folder=str(tmp_path)).validate()
    said = hookline("plot", "run-1", "--out", tmp_path / "a.png", folder=tmp_path)
    assert "the run run-1 has logged no metric yet, so there is no curve to draw" in said
    assert "curves" not in hookline("show", "run-1", folder=tmp_path)


@needs_matplotlib
def test_a_picture_that_cannot_be_written_is_an_error(hookline, tmp_path):
    out = tmp_path / "none" / "a.png"
    assert f"--out {out} cannot be written: No such file or directory" in hookline("plot", "run-1", "--out", out)


# In Python ------------------------------------------------------------------------------


def test_history_is_the_table_of_the_run(hookline, tmp_path):
    rows = history(train(tmp_path))
    assert rows == json.loads(hookline("show", "run-1", "--json", folder=tmp_path))["rows"]
    assert [*rows[0]] == ["train_loss", "step", "epoch", "batches", "samples", "seconds"]
    assert rows[-1]["val_accuracy"] == pytest.approx(0.8)


def test_history_of_a_run_that_was_cut_and_gone_on_with(tmp_path):
    class Fails(Measured):
        def train_step(self, global_step, batch, device):
            if global_step > 5:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    def run(module, memory, resume):
        options = {"epochs": 2, "log_every": "1 steps", "runs_folder": str(tmp_path / "cut"), "resume": resume}
        return tiny_trainer([Jsonl(), memory], module, **options)

    torch.manual_seed(0)
    cut = run(Fails(), memory := Memory(every="2 steps"), False)
    with pytest.raises(ZeroDivisionError):
        cut.train()
    assert [row["step"] for row in history(cut)][-1] >= 5
    again = run(Measured(), Memory(memory.state), str(tmp_path / "cut" / "run-1"))
    before = history(again)
    again.train()
    torch.manual_seed(0)
    unbroken = history(train(tmp_path / "whole"))
    assert before == history(cut)[: len(before)]
    kept = [{name: value for name, value in row.items() if name != "seconds"} for row in history(again)]
    assert kept == [{name: value for name, value in row.items() if name != "seconds"} for row in unbroken]


def test_without_a_record_history_says_what_to_add(tmp_path):
    trainer = tiny_trainer([], runs_folder=str(tmp_path))
    trainer.train()
    with pytest.raises(ValueError, match=r"holds no metrics.jsonl: .* add `plugins: \{jsonl: \{\}\}`"):
        history(trainer)
