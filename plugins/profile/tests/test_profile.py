"""What is in the traces and tables, for which steps and ranks; and that recording changes nothing."""

import json
import logging
from collections import Counter

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import PlainModule, TinyModule, check_plugin, digest, on_ranks, tiny_trainer
from hookline_profile import Profile

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "save")


class Objects(CallbackInterface):
    """Keeps the texts that are logged."""

    observer = True

    def __init__(self):
        self.texts = []

    @hookimpl
    def on_log_object(self, name, value):
        assert name == "profile"
        self.texts.append(value)


def train(folder, plugin, *others, module=None, **options):
    quiet = {"evaluate_every": None, "eval_when_finish": False, "runs_folder": str(folder)}
    trainer = tiny_trainer([plugin, *others], module, **{**quiet, **options})
    trainer.train()
    return trainer


def traces(folder):
    return sorted(path.name for path in folder.glob("run-1/profile/*.json"))


def events(folder, name):
    return json.loads((folder / "run-1" / "profile" / name).read_text())["traceEvents"]


def counted(events):
    return Counter(event["name"] for event in events if event["name"] in PHASES and event["cat"] == "user_annotation")


def test_contract(tmp_path):
    check_plugin(Profile, runs_folder=str(tmp_path))
    check_plugin(Profile, wait=0, active=1, memory=True, shapes=True, runs_folder=str(tmp_path))


@pytest.mark.plugins
def test_the_phases_of_the_loop_are_in_the_trace_by_name(tmp_path):
    from hookline_accumulate import Accumulate

    train(tmp_path, Profile(wait=1, active=2), Accumulate(2), evaluate_every="1 steps")
    found = events(tmp_path, "steps-3-4-rank-0.json")
    evaluated = 2 * 7  # batches

    assert counted(found) == {
        "data": 2,
        "forward": 2 * 2 + evaluated,
        "backward": 2 * 2,
        "optimizer": 2,
        "evaluation": 2,
    }
    steps = [event for event in found if event["name"].startswith("ProfilerStep") and event["cat"] == "user_annotation"]
    assert len(steps) == 2
    inside = [event for event in found if event["name"] == "backward" and event["cat"] == "user_annotation"]
    for event in inside:
        assert any(s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] for s in steps)
    (first, *_) = inside
    within = [e for e in found if e.get("ts", 0) >= first["ts"] and e.get("ts", 0) < first["ts"] + first["dur"]]
    assert any("AddmmBackward" in event["name"] for event in within)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"wait": 2, "warmup": 1, "active": 1, "repeat": 0}, ["12-12", "4-4", "8-8"]),
        ({"wait": 2, "warmup": 1, "active": 1, "repeat": 2}, ["4-4", "8-8"]),
        ({"wait": 0, "warmup": 2, "active": 3}, ["3-5"]),
        ({"wait": 10, "warmup": 1, "active": 9}, ["12-14"]),  # the run ends within it
    ],
)
def test_which_steps(options, expected, tmp_path):
    trainer = train(tmp_path, Profile(**options))
    assert traces(tmp_path) == [f"steps-{steps}-rank-0.json" for steps in expected]
    for name, steps in zip(traces(tmp_path), expected, strict=True):
        first, last = map(int, steps.split("-"))
        assert counted(events(tmp_path, name))["optimizer"] == last - first + 1
    assert "profile.phases" not in dict(trainer.plugins.listed())


def test_the_table_goes_to_the_log_the_record_and_a_file(tmp_path, caplog):
    objects = Objects()
    with caplog.at_level(logging.INFO, "hookline.profile"):
        train(tmp_path, Profile(wait=1, active=1), objects)
    (text,) = objects.texts
    path = tmp_path / "run-1" / "profile" / "steps-3-3-rank-0.json"
    assert path.with_suffix(".txt").read_text() == text
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"steps 3 to 3 are in {path}, for ui.perfetto.dev or chrome://tracing\n{text}"
    for name in ("forward", "backward", "aten::addmm", "Self CPU time total"):
        assert name in text
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, path.with_suffix(".txt").name]


def test_what_options_add(tmp_path):
    train(tmp_path / "plain", Profile(wait=1, active=1))
    train(tmp_path / "more", Profile(wait=1, active=1, memory=True, shapes=True, stacks=True))
    plain, more = (events(tmp_path / name, "steps-3-3-rank-0.json") for name in ("plain", "more"))
    for found, there in ((plain, False), (more, True)):
        assert any(event["name"] == "[memory]" for event in found) is there
        assert any("Input Dims" in event.get("args", {}) for event in found) is there
        assert any(event.get("cat") == "python_function" for event in found) is there


class Fails(TinyModule):
    """Fails in its fifth step."""

    def train_step(self, global_step, batch, device):
        if global_step == 5:
            raise RuntimeError("no")
        return super().train_step(global_step, batch, device)


def test_a_run_that_fails_within_a_recording_leaves_what_there_is(tmp_path):
    module = Fails()
    with pytest.raises(RuntimeError, match="no"):
        train(tmp_path, Profile(wait=1, active=9), module=module)
    assert traces(tmp_path) == ["steps-3-4-rank-0.json"]
    with torch.profiler.profile():  # nothing still records
        pass


def test_a_run_that_ends_before_a_recording(tmp_path, caplog):
    train(tmp_path, Profile(wait=13, active=1))
    assert [record.getMessage() for record in caplog.records if record.name == "hookline.profile"] == [
        "profile has recorded nothing: the run ended after 14 steps, and a recording begins after 14 "
        "(profile.wait=13, profile.warmup=1)"
    ]
    assert traces(tmp_path) == []


def test_training_is_the_same_with_it(tmp_path):
    def trained(*plugins):
        module = TinyModule()
        trainer = tiny_trainer([*plugins], module, evaluate_every="2 steps", runs_folder=str(tmp_path))
        trainer.train()
        return digest([dict(module.state_dict()), trainer.randomness.get_state()]), module.seen, trainer.metrics

    assert trained(Profile(wait=1, active=2, repeat=0)) == trained()


def test_a_profiler_that_runs_already(tmp_path, caplog):
    with torch.profiler.profile() as outer:
        trainer = train(tmp_path, Profile(wait=1, active=1, repeat=0))
    assert trainer.status == "finished"
    (said,) = [record.getMessage() for record in caplog.records if "another profiler" in record.getMessage()]
    assert said == "profile does not record: another profiler of torch runs already, in which all of it is"
    assert traces(tmp_path) == []
    assert any(event.key == "aten::addmm" for event in outer.key_averages())


def on_a_rank(folder):
    torch.set_num_threads(1)
    objects = Objects()
    for name, ranks in (("one", [1]), ("all", None)):
        plugins = {"ddp": {}, "profile": Profile(wait=1, active=1, ranks=ranks), "objects": objects}
        quiet = {"evaluate_every": None, "eval_when_finish": False}
        tiny_trainer(plugins, PlainModule(), epochs=1, runs_folder=f"{folder}/{name}", **quiet).train()
    return len(objects.texts)


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks(tmp_path):
    assert on_ranks(on_a_rank, 2, str(tmp_path)) == [1, 0]
    assert traces(tmp_path / "one") == ["steps-3-3-rank-1.json"]
    assert traces(tmp_path / "all") == ["steps-3-3-rank-0.json", "steps-3-3-rank-1.json"]
    assert counted(events(tmp_path / "all", "steps-3-3-rank-1.json"))["forward"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wait": -1}, r"profile\.wait=-1 must be at least 0 optimizer steps"),
        ({"warmup": 0}, r"profile\.warmup=0 must be at least 1 optimizer step"),
        ({"active": 0}, r"profile\.active=0 must be at least 1 optimizer step"),
        ({"repeat": -1}, r"profile\.repeat=-1 must be at least 0 recordings; 0 goes on until the run ends"),
        ({"ranks": []}, r"profile\.ranks=\[\] must name ranks, such as \[0\]; null records all"),
        ({"ranks": [-1]}, r"profile\.ranks=\[-1\] must name ranks"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Profile(**options)


def test_refuses_ranks_that_are_not_there():
    with pytest.raises(ValueError, match=r"profile\.ranks=\[0, 2\]: this run has the ranks 0 to 0"):
        tiny_trainer([Profile(ranks=[0, 2])])
