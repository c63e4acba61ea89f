"""The benchmark beside other frameworks: what it counts, when it refuses, what it writes."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.checkpoint import First, Many
from benchmarks.peers import __main__ as peers
from benchmarks.peers import measure, report, resuming, saving
from benchmarks.peers.frameworks import contract, hookline
from benchmarks.peers.work import WORKS

from hookline import Trainer

ROOT = Path(__file__).parent.parent
SHORT = replace(WORKS["mlp"], counted=(10, 30))
pytestmark = pytest.mark.plugins


@pytest.mark.parametrize("row", ["mlp", "features", "accumulate", "callbacks", "validate"])
def test_hookline_ends_where_the_loop_by_hand_does(row):
    assert measure.difference(hookline, WORKS[row]) < peers.CLOSE


def test_a_step_costs_calls_but_neither_operators_nor_waiting():
    plain, ours = (measure.counts(framework, SHORT) for framework in (contract, hookline))
    assert ours["operators"] == plain["operators"]
    assert ours["syncs"] == ours["collectives"] == ours["bytes_sent"] == 0
    assert 5 < ours["python_calls"] - plain["python_calls"] <= 30  # `tests/budgets.json` has them exactly


def test_what_a_framework_adds_is_counted():
    def train(work):
        for inputs, targets in work.loader():
            work.loss(inputs[:, :10], targets).item()

    def train_and_more(work):
        for inputs, targets in work.loader():
            work.loss(inputs[:, :10], targets).item()
            work.loss(inputs[:, :10], targets).item()
            torch.zeros(4)

    less, more = (measure.counts(SimpleNamespace(train=function), SHORT) for function in (train, train_and_more))
    loss = less["operators"]
    assert more == {
        **{name: 2 * value for name, value in less.items()},
        "operators": 2 * loss + 1,
        "c_calls": more["c_calls"],
        "allocations": 2 * less["allocations"] + 1,
    }
    assert (less["syncs"], more["syncs"]) == (1, 2)


def told(*steps):
    """Return a framework whose batches take so many seconds, another number in each run."""
    left = itertools.cycle(steps)

    def train(work):
        step = next(left)
        for number in range(work.steps):
            work.heard(number * step)

    return SimpleNamespace(train=train)


def test_a_loop_by_hand_that_varies_leaves_no_times():
    quiet = measure.times(told(0.3), WORKS["mlp"], 0.1, hand=told(0.1))
    assert (quiet["ratio"], quiet["noise"]) == (3.0, 0.0)
    loud = measure.times(told(0.3), WORKS["mlp"], 0.1, hand=told(0.1, 0.1, 0.2))
    kept = peers.judged({**loud, "difference": 0.0, "counts": {}}, 0.1, ("counts", "times"))
    assert "too loud: the loop by hand varies by" in kept["loud"]
    assert not set(peers.TIMES) & kept.keys()
    assert kept["dates"].keys() == {"counts"}
    assert peers.judged(quiet, 0.1, ("times",))["ratio"] == 3.0


def test_other_weights_than_by_hand_leave_no_figures():
    found = peers.judged({"difference": 0.5, "counts": {"python_calls": 1}}, 0.1, ("counts",))
    assert found == {"failed": "other weights than by hand: 0.5"}


def test_what_is_not_installed_is_said_by_name():
    missing = peers.absent(["hookline", "other"], {"hookline": "hookline", "other": "no-such-framework"})
    assert missing == {"other": "no-such-framework is not installed: `nox -s peers` installs it"}


def figures(calls, **others):
    return {"beyond_by_hand": {"python_calls": calls, "syncs": 0.0}, "dates": {"counts": "2026-01-02"}, **others}


def test_figures_are_merged_and_written_between_the_marks(tmp_path):
    file, place = tmp_path / "peers.json", tmp_path / "results.md"
    about = {"date": "2026-01-02", "machine": "a machine", "versions": {"torch": "2"}}
    report.merge(file, about, {"mlp": {"hookline": figures(20), "fabric": figures(64)}})
    late = {"ratio": 1.1, "dates": {"times": "2026-01-03"}}
    report.merge(file, about, {"mlp": {"hookline": late, "fabric": {"failed": "no memory"}, "keras": {"failed": "no"}}})
    whole = json.loads(file.read_text())
    assert whole["rows"]["mlp"]["hookline"] == {
        **figures(20),
        "ratio": 1.1,
        "dates": {"counts": "2026-01-02", "times": "2026-01-03"},
    }
    assert whole["rows"]["mlp"]["fabric"] == figures(64)  # a failure takes nothing away
    place.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):  # again and again
        peers.write(whole, tmp_path)
    text = place.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "Counts of 2026-01-02, times of 2026-01-03." in text
    assert "| hookline | 20 |" in text
    assert "| keras | no |" in text
    assert (tmp_path / "peers.svg").read_text().lstrip().startswith("<?xml")
    place.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the tables"):
        report.put(place, "section")


def test_targets_are_judged_by_the_figures():
    rows = {"mlp": {"hookline": figures(20), "contract": figures(5), "fabric": figures(66)}}
    rows["features"] = {"hookline": figures(50, extra_us=8.0), "keras": {"without": "it has none"}}
    rows["instructions"] = {"hookline": {"instructions": 104}, "contract": {"instructions": 100}}
    rows["start"] = {"hookline": {"extra_s": 0.01}, "accelerate": {"extra_s": -0.01}}
    lines = report.targets(rows).splitlines()
    assert "| 15 | yes |" in lines[2]
    assert "| not measured | |" in lines[3]
    assert "| 1.04 | yes |" in lines[4]
    assert "| 8 | yes |" in lines[5]
    assert "| 50 | **no** |" in lines[6]
    assert "| 0.303 | yes |" in lines[9]
    assert "| the next peer costs nothing | **no** |" in lines[12]


class Collecting(First):
    def train_step(self, global_step, batch, device):
        self.given.append(batch)
        return super().train_step(global_step, batch, device)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's
@pytest.mark.parametrize("name", resuming.WAYS)
def test_the_batch_that_comes_after_a_resume_is_the_one_of_the_epoch(name):
    if name == "torchdata":
        stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
        epoch = list(stateful(Many(2_000), resuming.BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)))
    elif name != "hookline":
        if name == "accelerate":
            pytest.importorskip("accelerate")
        epoch = list(resuming.loader(Many(2_000)))
    else:
        module = Collecting(Many(2_000))
        epoch = module.given = []
        Trainer(module, train_batch_size=resuming.BATCH, device="cpu").train()
    fresh, resumed = (resuming.first_batch(name, 2_000, late) for late in (False, True))
    assert (fresh["batch"], resumed["batch"]) == (epoch[0].tolist(), epoch[18].tolist())
    assert resumed["computed"] <= 200


def test_saves_are_timed_beside_torch_save(tmp_path, capfd):
    saving.main("hookline", 3, tmp_path)
    found = json.loads(capfd.readouterr().out)
    assert found.keys() == {
        "bytes",
        *(f"{what}_{figure}" for what in ("save", "on_disk", "restore") for figure in ("s", "ratio")),
    }
    assert 3_000_000 <= found["bytes"] < 3_200_000
    assert found["on_disk_s"] >= found["save_s"] > 0


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path):
    (tmp_path / "results.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    rows = ["--rows", "mlp", "ranks", "plugins", "resume", "--plugins", "clip", "--samples", "10000"]
    command = [sys.executable, "-m", "benchmarks.peers", "--only", "hookline", "--what", "counts", "times", *rows]
    done = subprocess.run(
        [*command, "--noise", "9", "--write", "--into", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert rows["ranks"]["hookline"]["counts"]["bytes_sent"] > 10_000  # gradients of 2762 numbers
    assert rows["mlp"]["hookline"]["ratio"] > 0.5
    assert rows["plugins"]["clip"]["steps"] in (1_000, 10_000)
    assert rows["resume"].keys() == {"hookline", "by_hand"}


def test_the_page_says_what_the_figures_say():
    figures = json.loads((ROOT / "benchmarks" / "peers.json").read_text())
    assert report.page(figures, peers.ROWS, "peers.svg") in (ROOT / "benchmarks" / "results.md").read_text()
