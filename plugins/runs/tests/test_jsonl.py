"""What the plugin writes, and what `hookline_runs` reads of it, through real runs."""

import csv
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl, tracking
from hookline.testing import Memory, check_plugin
from hookline_runs import Jsonl, jsonl, read_run
from hookline_runs.records import FILE


class Line(ModuleInterface):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)
        self.x = torch.arange(80.0).reshape(20, 4) / 80

    def train_step(self, global_step, batch, device):
        loss = self.net(batch[0]).square().mean()
        self.log(twice=2 * loss)
        return loss

    def val_step(self, global_step, batch, device):
        return self.net(batch[0]).square().mean()

    def get_train_dataloader(self, sampler, batch_size):
        data = torch.utils.data.TensorDataset(self.x)
        return torch.utils.data.DataLoader(data, batch_size, sampler=sampler(data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.1)], []


class Keep(CallbackInterface):
    """Checkpoint after step 4 and at the end, and kill the process after a step."""

    def __init__(self, kill_at=None):
        self.kill_at = kill_at

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if global_step == 4:
            trainer.save("fourth")

    @hookimpl
    def save(self, trainer, reason):
        path = trainer.run_dir / "checkpoints" / f"step-{trainer.global_step}"
        path.mkdir(parents=True, exist_ok=True)
        torch.save(trainer.hook.get_run_state(trainer=trainer), path / "state.pt")
        trainer.hook.on_checkpoint(trainer=trainer, path=path, kind="checkpoint")
        return True

    @hookimpl
    def restore(self, trainer, stage):
        if not trainer.options.resume:
            return False
        state = torch.load(Path(trainer.options.resume) / "checkpoints" / "step-4" / "state.pt", weights_only=False)
        return trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage)


def train(folder, kill_at=None, **options):
    options = {"epochs": 2, "train_batch_size": 4, "val_batch_size": 4, "log_every": "1 step"} | options
    Trainer(Line(), plugins=[Jsonl(), Keep(kill_at)], runs_folder=str(folder), **options).train()


def train_on_a_disk_that_is_full_for_a_while(folder):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    class Disk(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 3:
                room = (trainer.run_dir / FILE).stat().st_size + 100
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
            if global_step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    options = {"train_batch_size": 2, "log_every": "1 step", "evaluate_every": None, "eval_when_finish": False}
    Trainer(Line(), [Jsonl(), Disk()], runs_folder=folder, max_steps=8, **options).train()


def run_in_a_process(what: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, __file__, what, str(folder)], capture_output=True, text=True, timeout=60)


def strict(line: str) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(line, parse_constant=refuse)


def lines_of(folder: Path) -> list[dict]:
    return [strict(line) for line in (folder / FILE).read_text().splitlines()]


class Recorder(CallbackInterface):
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    @hookimpl
    def on_log(self, metrics, global_step):
        self.logged.append((global_step, dict(metrics)))


def test_the_contract_is_kept(tmp_path):
    check_plugin(Jsonl, runs_folder=str(tmp_path))


def test_every_flush_is_a_line_with_the_exact_values(tmp_path):
    recorder = Recorder()
    trainer = Trainer(
        Line(),
        plugins=[Jsonl(), recorder],
        runs_folder=str(tmp_path),
        epochs=2,
        train_batch_size=4,
        log_every="2 steps",
    )
    trainer.train()
    lines = lines_of(trainer.run_dir)
    assert [line["event"] for line in lines] == ["begin", "train", *["log"] * len(recorder.logged), "end"]
    assert [(line["step"], line["metrics"]) for line in lines if line["event"] == "log"] == recorder.logged
    assert len({line["session"] for line in lines}) == 1
    begin, started, end = lines[0], lines[1], lines[-1]
    assert begin["command"] == sys.orig_argv
    assert begin["config"]["trainer"]["train_batch_size"] == 4
    assert begin["versions"]["torch"] == torch.__version__
    assert started["totals"] == {"batches_per_epoch": 5, "steps_per_epoch": 5, "steps": 10, "epochs": 2}
    assert (end["status"], end["reason"], end["step"]) == ("finished", "", 10)

    run = read_run(trainer.run_dir)
    assert (run.status, run.step, run.config) == ("finished", 10, begin["config"])
    merged: dict[int, dict[str, float]] = {}
    for step, metrics in recorder.logged:
        merged.setdefault(step, {}).update(metrics)
    counters = ("step", "epoch", "batches", "samples", "seconds")
    assert {r["step"]: {n: v for n, v in r.items() if n not in counters} for r in run.rows} == merged
    assert [(r["step"], r["epoch"], r["samples"]) for r in run.rows][:3] == [(2, 0, 8), (4, 0, 16), (5, 0, 20)]


def test_numbers_that_json_lacks_come_back(tmp_path):
    class Strange(Line):
        def train_step(self, global_step, batch, device):
            self.log(nan=math.nan, high=math.inf, low=-math.inf)
            return super().train_step(global_step, batch, device)

    trainer = Trainer(Strange(), plugins=[Jsonl()], runs_folder=str(tmp_path), max_steps=1, log_every="1 step")
    trainer.train()
    logged = next(line for line in lines_of(trainer.run_dir) if line["event"] == "log")
    assert [logged["metrics"][name] for name in ("nan", "high", "low")] == ["NaN", "Infinity", "-Infinity"]
    (row,) = read_run(trainer.run_dir).rows
    assert math.isnan(row["nan"])
    assert (row["high"], row["low"]) == (math.inf, -math.inf)


def test_a_killed_and_resumed_run_reads_like_one_that_was_not(tmp_path):
    train(tmp_path / "whole", seed=3)
    killed = run_in_a_process("killed", tmp_path / "torn")
    assert killed.returncode == -9
    folder = tmp_path / "torn" / "run-1"
    before = read_run(folder)
    assert (before.status, before.step) == ("crashed", 7)
    with (folder / FILE).open("a") as file:
        file.write('{"event": "log", "session": "x", "ti')  # killed in the middle of a write

    train(tmp_path / "torn", seed=3, resume=str(folder))
    resumed, whole = read_run(folder), read_run(tmp_path / "whole" / "run-1")
    steps = [
        line["step"] for line in map(_loads, (folder / FILE).read_text().splitlines()) if line.get("event") == "log"
    ]
    assert steps.count(6) == 2  # the file keeps what was done twice
    assert resumed.unreadable == 1
    assert (resumed.status, len(resumed.sessions)) == ("finished", 2)
    without_time = [[{n: v for n, v in row.items() if n != "seconds"} for row in run.rows] for run in (resumed, whole)]
    assert without_time[0] == without_time[1]
    assert resumed.checkpoints == whole.checkpoints
    assert [kept["path"] for kept in resumed.checkpoints] == ["checkpoints/step-4", "checkpoints/step-10"]


def _loads(line: str) -> dict:
    try:
        return json.loads(line)
    except ValueError:
        return {}


def test_a_restart_from_the_beginning_replaces_everything(tmp_path):
    train(tmp_path, seed=1)
    trainer = Trainer(Line(), [Jsonl(), _Anew()], resume=str(tmp_path / "run-1"), max_steps=2, log_every="1 step")
    trainer.train()
    run = read_run(tmp_path / "run-1")
    assert [row["step"] for row in run.rows] == [1, 2]
    assert run.checkpoints == []


class _Anew(CallbackInterface):
    @hookimpl
    def restore(self, trainer):
        return False


def test_a_run_in_progress_is_running(tmp_path):
    seen = []

    class Look(CallbackInterface):
        @hookimpl
        def on_boundary(self, trainer):
            seen.append(read_run(trainer.run_dir).status)

    Trainer(Line(), plugins=[Jsonl(), Look()], runs_folder=str(tmp_path), max_steps=1).train()
    assert seen == ["running"]


@pytest.mark.parametrize("how", ["raise", "stop"])
def test_the_end_says_how_and_why(tmp_path, how):
    class Ender(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 2 and how == "raise":
                raise RuntimeError("loss went through the roof")
            if global_step == 2:
                trainer.stop("that is enough")

    trainer = Trainer(Line(), plugins=[Jsonl(), Ender()], runs_folder=str(tmp_path), log_every="1 step")
    if how == "raise":
        with pytest.raises(RuntimeError, match="roof"):
            trainer.train()
    else:
        trainer.train()
    run = read_run(trainer.run_dir)
    expected = (
        ("failed", "RuntimeError: loss went through the roof") if how == "raise" else ("stopped", "that is enough")
    )
    assert (run.status, run.reason) == expected
    assert run.step == 2


def test_a_failure_before_the_first_step_is_recorded(tmp_path):
    trainer = Trainer(Line(), plugins=[Jsonl()], runs_folder=str(tmp_path), resume=True)
    with pytest.raises(ValueError, match="no plugin can restore"):
        trainer.train()
    run = read_run(trainer.run_dir)
    assert (run.status, run.rows, run.step) == ("failed", [], 0)


def test_the_plan_and_the_cost_of_who_watches_are_recorded(tmp_path):
    class Watch(CallbackInterface):
        observer = True

        @hookimpl
        def on_end_train_step(self):
            pass

    trainer = Trainer(Line(), [Jsonl(), Watch()], runs_folder=str(tmp_path), epochs=100, log_every="1 step")
    trainer.train()
    run, lines = read_run(trainer.run_dir), lines_of(trainer.run_dir)
    took_part = {name for row in run.plan for name in row["wrapped_by"] + row["done_by"]}
    assert took_part - {"core", "module"} == {"jsonl", "watch"}
    assert run.plan == [row for row in trainer.plugins.plan() if row in run.plan]
    assert set(run.cost) == {"jsonl", "watch"}
    assert run.cost["jsonl"] == pytest.approx(trainer.plugins.cost["jsonl"], rel=0.5)
    logs = [line for line in lines if line["event"] == "log"]
    told = [line["time"] for line in logs if "cost" in line]
    assert "cost" in logs[0]
    assert len(told) < len(logs) / 2  # ever more rarely


class Shows(CallbackInterface):
    """Logs an object at each step."""

    def __init__(self, make, name="shown"):
        self.make, self.name = make, name

    @hookimpl
    def on_end_train_step(self, trainer, global_step):
        trainer.log_object(self.name, self.make(global_step))


def showing(folder, make, steps=3, name="shown", resume=False, others=(), **options):
    plugins = {"jsonl": Jsonl(**options), "shows": Shows(make, name)}
    plugins |= {f"another_{number}": plugin for number, plugin in enumerate(others)}
    options = {"max_steps": steps, "epochs": None, "evaluate_every": None, "eval_when_finish": False}
    trainer = Trainer(Line(), plugins=plugins, runs_folder=str(folder), resume=resume, **options)
    trainer.train()
    return trainer.run_dir


def names_in(run_dir):
    return sorted(path.name for path in (run_dir / "objects").glob("*"))


def gray(step):
    return tracking.Image(torch.full((4, 6), step * 10, dtype=torch.uint8))


def test_texts_are_kept_and_other_objects_are_named(tmp_path):
    class Tell(CallbackInterface):
        @hookimpl
        def on_begin_train(self, trainer):
            trainer.log_object("sample", "a line\nand ünother")
            trainer.log_object("numbers", torch.zeros(2))

    trainer = Trainer(Line(), plugins=[Jsonl(), Tell()], runs_folder=str(tmp_path), max_steps=1)
    trainer.train()
    assert read_run(trainer.run_dir).objects == [
        {"step": 0, "name": "sample", "text": "a line\nand ünother"},
        {"step": 0, "name": "numbers", "type": "torch.Tensor"},
    ]
    assert not (trainer.run_dir / "objects").exists()


def test_pictures_are_kept_by_step(tmp_path):
    pictures = pytest.importorskip("PIL.Image")
    run_dir = showing(tmp_path, gray)
    assert read_run(run_dir).objects == [
        {"step": step, "name": "shown", "type": "hookline.tracking.values.Image", "file": f"objects/shown-{step}.png"}
        for step in (1, 2, 3)
    ]
    assert names_in(run_dir) == [f"shown-{step}.png" for step in (1, 2, 3)]
    for step in (1, 2, 3):
        with pictures.open(run_dir / "objects" / f"shown-{step}.png") as picture:
            assert (picture.size, picture.mode) == ((6, 4), "RGB")
            assert numpy.array(picture).tolist() == numpy.full((4, 6, 3), step * 10).tolist()


def test_pictures_of_pil_and_figures_are_kept(tmp_path):
    pictures, figures = pytest.importorskip("PIL.Image"), pytest.importorskip("matplotlib.figure")
    colours = numpy.arange(24, dtype="uint8").reshape(2, 4, 3)
    run_dir = showing(tmp_path, lambda step: pictures.fromarray(colours), steps=1)
    with pictures.open(run_dir / "objects" / "shown-1.png") as picture:
        assert numpy.array(picture).tolist() == colours.tolist()
    run_dir = showing(tmp_path, lambda step: figures.Figure((2, 1), dpi=50, facecolor="#204060"), steps=1)
    with pictures.open(run_dir / "objects" / "shown-1.png") as picture:
        assert (picture.size, picture.getpixel((50, 25))) == ((100, 50), (0x20, 0x40, 0x60))


def test_tables_are_kept(tmp_path):
    rows = [["a,b", 1.5, None], ['"c"', torch.tensor(2), True]]
    run_dir = showing(tmp_path, lambda step: tracking.Table(["name", "value", "flag"], rows), steps=1)
    with (run_dir / "objects" / "shown-1.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "value", "flag"], ["a,b", "1.5", ""], ['"c"', "tensor(2)", "True"]]


@pytest.mark.parametrize(("most", "steps"), [(2, [4, 5]), (1, [5]), (0, []), (100, [1, 2, 3, 4, 5])])
def test_only_the_last_files_of_a_name_are_kept(tmp_path, most, steps):
    run_dir = showing(tmp_path, gray, 5, others=[Shows(gray, "other")], keep_objects=most)
    assert names_in(run_dir) == [f"{name}-{step}.png" for name in ("other", "shown") for step in steps]
    objects = read_run(run_dir).objects
    assert len(objects) == 10  # the record goes on naming those that were removed
    assert all(("file" in one) == (most > 0) for one in objects)


@pytest.mark.parametrize("name", ["../../out", "a/b", "..", ".new-x", "a b", "x" * 300, "ünder", "a-1.png", "a%2Fb"])
def test_a_name_leads_nowhere_else(tmp_path, name):
    run_dir = showing(tmp_path / "runs", gray, 1, name)
    (file,) = (run_dir / "objects").iterdir()
    assert read_run(run_dir).objects[0]["file"] == f"objects/{file.name}"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_names_that_look_alike_have_files_of_their_own(tmp_path):
    names = ["a b", "a_b", "a/b", "a%2Fb", "x" * 300, "x" * 301]
    run_dir = showing(tmp_path, gray, 1, others=[Shows(gray, name) for name in names])
    assert len(names_in(run_dir)) == len(names) + 1


def test_a_link_in_place_of_the_folder_is_not_written_through(tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine-9.png").touch()

    class Links(CallbackInterface):
        @hookimpl
        def on_begin_run(self, trainer):
            (trainer.run_dir / "objects").symlink_to(elsewhere)

    run_dir = showing(tmp_path / "runs", gray, 1, others=[Links()])
    assert [path.name for path in elsewhere.iterdir()] == ["mine-9.png"]
    assert "is a link, and no object is written through it" in caplog.text
    assert read_run(run_dir).status == "finished"


def test_steps_that_are_done_again_leave_no_files_of_before(tmp_path):
    memory = Memory(every="1 steps")
    run_dir = showing(tmp_path, gray, 5, others=[memory])
    (run_dir / "objects" / ".new-shown-5.png-0").touch()  # as a kill leaves it
    again = showing(tmp_path, gray, 5, "again", str(run_dir), [Memory(memory.states[2])])
    assert again == run_dir
    assert names_in(run_dir) == [*(f"again-{step}.png" for step in (3, 4, 5)), "shown-1.png", "shown-2.png"]
    assert {run_dir / one["file"] for one in read_run(run_dir).objects} == set((run_dir / "objects").iterdir())


def test_few_objects_or_none_but_not_fewer():
    with pytest.raises(ValueError, match="jsonl.keep_objects=-1 must be at least 0, which keeps no files"):
        Jsonl(keep_objects=-1)


def test_evaluations_on_their_own_do_not_hide_the_training(tmp_path):
    trainer = Trainer(
        Line(), plugins=[Jsonl()], runs_folder=str(tmp_path), epochs=1, train_batch_size=4, val_batch_size=4
    )
    trainer.train()
    metrics = trainer.validate()
    run = read_run(trainer.run_dir)
    assert run.evaluations == [("val", {"step": 5, **metrics})]
    assert [session.stage for session in run.sessions] == ["train", "val"]
    assert (run.status, [row["step"] for row in run.rows]) == ("finished", [5])


def test_an_evaluation_may_write_into_the_file_of_a_training_that_runs(tmp_path):
    class Beside(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 2:
                other = Trainer(Line(), [Jsonl(), _Anew()], resume=str(trainer.run_dir), val_batch_size=4)
                other.validate()

    options = {"epochs": 1, "train_batch_size": 4, "log_every": "1 step", "evaluate_every": None}
    Trainer(Line(), [Jsonl(), Beside()], runs_folder=str(tmp_path), eval_when_finish=False, **options).train()
    run = read_run(tmp_path / "run-1")
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert [stage for stage, _ in run.evaluations] == ["val"]
    assert not any("val_loss" in row for row in run.rows)


def test_only_rank_zero_writes(tmp_path):
    class Second(CallbackInterface):
        @hookimpl
        def get_ranks(self, trainer):
            return 1, 1, 2

    trainer = Trainer(Line(), plugins=[Jsonl(), Second()], runs_folder=str(tmp_path), train_batch_size=2, max_steps=2)
    trainer.train()
    assert list(tmp_path.iterdir()) == []
    assert [name for name, _ in trainer.plugins.listed()] == ["second"]


def test_what_the_configuration_masks_is_masked_in_the_command(tmp_path):
    command = jsonl.command_line(
        ["hookline", "fit", "plugins.wandb.key=abc", "trainer.epochs=3", "plugins.wandb.project=abc", "--x=1"],
        {"plugins": {"wandb": {"key": "***", "project": "abc"}}, "trainer": {"epochs": 3}},
    )
    assert command == [
        "hookline", "fit", "plugins.wandb.key=***", "trainer.epochs=3", "plugins.wandb.project=abc", "--x=1",
    ]  # fmt: skip
    config = {"vars": {"key": "***", "list": ["***", "b"]}, "module": {"token": "${oc.env:TOKEN}"}}
    for given, kept in {
        "vars={key: abc}": 'vars={"key": "***", "list": ["***", "b"]}',
        "vars[key]=abc": "vars[key]=***",
        "vars.list.0=abc": "vars.list.0=***",
        "+vars.list=[abc, b]": '+vars.list=["***", "b"]',
        "module.token=${oc.env:TOKEN,abc}": "module.token=${oc.env:TOKEN}",
        "vars": "vars",
    }.items():
        assert jsonl.command_line([given], config) == [kept]


def test_a_full_disk_costs_the_lines_that_found_no_room_and_no_others(tmp_path):
    done = run_in_a_process("full disk", tmp_path)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "run-1")
    assert [row["step"] for row in run.rows] == [1, 2, 5, 6, 7, 8]
    assert (run.status, run.unreadable) == ("finished", 1)


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git itself")
def test_the_revision_is_what_git_says(tmp_path):
    def git(*arguments: str, folder: Path = tmp_path / "repo") -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    inner = tmp_path / "repo" / "a" / "b"
    inner.mkdir(parents=True)
    assert jsonl.git_revision(Path("/")) is None
    git("init", "-q")
    assert jsonl.git_revision(inner) is None  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "one")
    revision = git("rev-parse", "HEAD")
    assert jsonl.git_revision(inner) == revision
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    assert jsonl.git_revision(tmp_path / "tree") == revision
    git("pack-refs", "--all")
    assert jsonl.git_revision(inner) == revision
    assert jsonl.git_revision(tmp_path / "tree") == revision
    git("checkout", "-q", "--detach")
    assert jsonl.git_revision(inner) == revision


def test_logging_costs_no_call_on_steps_that_do_not_log(tmp_path):
    calls = []

    class Count(CallbackInterface):
        @hookimpl(tryfirst=True)
        def on_begin_train_epoch(self):
            def profile(frame, event, argument):
                if event == "call" and frame.f_code.co_filename == jsonl.__file__:
                    calls.append(frame.f_code.co_name)

            sys.setprofile(profile)

        @hookimpl
        def on_boundary(self, global_step):
            if global_step == 4:
                sys.setprofile(None)

    Trainer(Line(), [Jsonl(), Count()], runs_folder=str(tmp_path), train_batch_size=4, log_every="50 steps").train()
    assert calls == []


if __name__ == "__main__":
    if sys.argv[1] == "killed":
        train(sys.argv[2], kill_at=7, seed=3)
    else:
        train_on_a_disk_that_is_full_for_a_while(sys.argv[2])


def test_what_is_told_within_validations_is_kept_apart(tmp_path):
    """Also of a run that is gone on with: what is done again stands once."""
    memory = Memory(every="1 steps")
    options = {
        "train_batch_size": 4, "val_batch_size": 4, "log_every": "2 steps", "evaluate_every": "2 steps", "epochs": 2,
        "report_loss_after_eval": False, "runs_folder": str(tmp_path), "device": "cpu",
    }  # fmt: skip
    trainer = Trainer(Line(), [Jsonl(), memory], **options)
    trainer.train()
    whole = read_run(trainer.run_dir)
    lines = [json.loads(line) for line in (trainer.run_dir / FILE).read_text().splitlines()]
    told = [line for line in lines if line["event"] == "batch"]
    assert [(line["batch"], line["step"], line["stage"]) for line in told] == [
        (batch, 2 * ((batch - 1) // 5 + 1), "val") for batch in range(2, 26, 2)
    ]
    assert whole.batches == {line["batch"]: {**line["metrics"], "step": line["step"]} for line in told}
    assert not any("val_loss_batch" in row for row in whole.rows)
    Trainer(Line(), [Jsonl(), Memory(memory.states[5])], **options, resume=str(trainer.run_dir)).train()
    again = read_run(trainer.run_dir)
    assert again.batches == whole.batches
    assert [row["step"] for row in again.rows] == [row["step"] for row in whole.rows]
