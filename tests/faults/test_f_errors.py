"""Row F of the fault catalogue: errors in user code and plugins end the run in order, and never with exit code 0.

`os._exit(0)` by user code cannot be told from success by the exit code; the record of the run can.
"""

import ctypes
import faulthandler
import functools
import inspect
import io
import itertools
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import pytest
import torch
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from hookline import CallbackInterface, hookimpl, hookspecs
from hookline.cli import main
from hookline.installed import installed, load
from hookline.plugins import FAILURES_ALLOWED, is_observer
from hookline.testing import Memory, TinyModule, digest, tiny_trainer
from hookline.testing.faults import PRELOADED, at_hook, failing, run
from hookline_checkpoint import Checkpoint, storage
from hookline_checkpoint.compare import differences
from hookline_checkpoint.layout import unpack
from hookline_runs import read_run

pytestmark = pytest.mark.plugins
PRELOADED += [__name__, "hookline.config", "hookline_guard", "hookline_runs.jsonl", "hookline_watchdog"]


class Broken(Exception):
    pass


class Sentinel(CallbackInterface):
    """Hears the ends of runs."""

    def __init__(self):
        self.told = []

    @hookimpl
    def on_exception(self, exception):
        self.told.append(exception)

    @hookimpl
    def on_end_run(self, status):
        self.told.append(status)


class Module(TinyModule):
    """Returns targets for metrics, and comes to the hooks that are reached where somebody asks for it."""

    def train_step(self, global_step, batch, device):
        return *super().train_step(global_step, batch, device), batch[1]

    @hookimpl
    def on_end_train(self, trainer):
        trainer.log_object("note", "a text")
        trainer.export_model()
        trainer.hook.vote(trainer=trainer, asked=False, seconds=0.0)
        trainer.hook.find_state(trainer=trainer, stage=trainer.stage)
        with trainer.rank_zero_first():
            pass
        of_distributed = {"get_mesh_shape": {}, "shadow": {}, "get_replicated": {"buffers": True}}
        of_distributed |= {"get_shard_meshes": {}, "computes_together": {}, "on_compute_apart": {"apart": False}}
        of_distributed["on_make_groups"] = {"groups": []}
        for brought, given in of_distributed.items():
            if brought in trainer.plugins.heard:
                getattr(trainer.hook, brought)(trainer=trainer, **given)

    @hookimpl
    def on_end_predict_step(self): ...


def good_checkpoints(folder):
    """Return the steps of the checkpoints of a run folder, the newest first, when each of them is whole."""
    paths = storage.listed(folder / "checkpoints")
    for path in paths:
        storage.verify(path)
    return [storage.step_of(path) for path in paths]


# F5 -----------------------------------------------------------------------------------

METRIC = {"_target_": "torchmetrics.MeanSquaredError"}
VARIANTS = {  # options with which a plugin implements all of its hooks; one that is not named here is taken as it is
    "accumulate": [{"steps": 2}],
    "amp": [{"precision": "fp16"}],
    "backend": [{"channels_last": True, "gc_every": 2}],
    "best": [{}, {"metric": "train_loss"}],
    "checkpoint": [{"every": "2 steps", "asynchronous": True, "keep_best": 1}, {"every": "2 steps", "initial": "it"}],
    "compile": [{"scope": "window", "backend": "eager"}],
    "distributed": [{}, {"uneven": "pad"}],
    "distill": [{"teacher": {"_target_": "torch.nn.Linear", "in_features": 8, "out_features": 1}}],
    "early_stop": [{}, {"metric": "train_loss", "threshold": -1.0}],
    "ema": [{}, {"suffix": "_ema"}],
    "finite": [{}, {"policy": "skip"}, {"policy": "rollback", "every": "2 steps"}],
    "ft": [{}, {"sync_every": 2}],
    "freeze": [{"patterns": "net.0", "unfreeze": {"6 steps": "net.0"}}],
    "guard": [{"every": "1 steps"}],
    "limits": [{"overfit_batches": 3}],
    "lr_schedule": [{"replace": True}],
    "metrics": [{"train": {"error": METRIC}, "val": {"error": METRIC}, "test": {"error": METRIC}}],
    "mix": [{"mixup": 0.2}],
    "model_saving": [{"policy": ["best_valid_loss", "best_train_loss", "always"]}],
    "monitor": [{"learning_rate": True, "grad_norm": True, "throughput": True, "plugin_time": True}],
    "notify": [{"secret_urls": "json://localhost:9", "stalled": "30 min"}],
    "param_groups": [{"layer_decay": 1.0, "layers": ["Linear"]}],
    "progress": [{"force_terminal": True, "refresh": 1e-9}],
    "sample": [{"method": "extra_repr"}, {"method": "extra_repr", "every": "2 steps"}],
    "sampling": [{"by": 2}],
    "signals": [{"within_window": True}],
    "swa": [{"begin": 5, "every": 2, "lr": 0.1}],
}
DOORS = ("train", "validate", "test", "predict")
BEFORE_A_RUN = ("get_ranks", "get_share", "get_device", "adapt_module", "on_setup")
SLOW = ("aim", "clearml", "comet", "dvclive", "mlflow", "wandb")  # to start their services; csv is a tracker, too
ELSEWHERE = {  # methods that this run does not come to: they want other ranks, Ray, a module of a certain kind, or a
    # plugin that asks
    "accmt": {"get_mode", "on_checkpoint"},
    "compile": {"compile_function"},
    "ddp": {"average_gradients"},
    "distributed": {"get_mesh"},
    "ema": {"convert_model"},
    "fsdp": {"adapt_module"},
    "metrics": {"get_mode"},
    "mixture": {"join_loaders"},
    "monitor": {"update"},
    "optimizer": {"setup_optimizers"},
    "ray": {"on_end_validation", "on_checkpoint"},
    "sweep": {"get_watched_metrics", "on_begin_train", "on_boundary", "on_checkpoint", "on_end_run"},
}


def marked(plugin_class):
    """Return the methods of a class that implement hooks, as a user would see them."""
    bridges = ("_call_on_", "_spread_on_")
    names = [name for name in dir(plugin_class) if hasattr(getattr(plugin_class, name), "hookline_impl")]
    return {name for name in names if not name.startswith(bridges)}


def implementations(trainer, name):
    """Yield registered name, class, method and hook of each implementation that a plugin, or what it registers, has."""
    package = type(trainer.plugins.get_plugin(name)).__module__.partition(".")[0]
    for hook, caller in vars(trainer.plugins.hook).items():
        for impl in caller.get_hookimpls():
            if type(impl.plugin).__module__.partition(".")[0] == package:
                bridged = impl.function.__name__.startswith(("_call_on_", "_spread_on_"))
                yield impl.plugin_name, type(impl.plugin), hook if bridged else impl.function.__name__, hook


def raising(method, error, raised):
    """Return what raises in place of a method, and is called as it is; each time is noted in `raised`."""

    def fail(self, *outputs):
        raised.append(self)
        raise error

    def wrap(self):
        fail(self)
        yield

    def hear(self):
        fail(self)

    options = getattr(method, "hookline_impl", None)
    if options is None:  # an override of the seed's, called by position
        return fail
    replaced = wrap if options["wrapper"] else hear
    replaced.hookline_impl = options
    return replaced


def noting(method, told):
    """Return a teardown that notes that it was reached."""

    @functools.wraps(method)
    def teardown(self, *arguments):
        told.append(self)
        return method(self, *arguments)

    return teardown


@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """Return where a run was cut after step 4, so that `restore` has something to do."""
    folder = tmp_path_factory.mktemp("cut")
    tiny_trainer({"checkpoint": {"every": "2 steps"}}, Module(), max_steps=4, runs_folder=str(folder)).train()
    return folder


@pytest.fixture
def quiet(monkeypatch):
    """Have bars drawn, but not here."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())


def trainer_with(name, plugin, folder, *, error_for=None):
    """Return a trainer with a plugin between two sentinels, in a run that is gone on with; its sentinels as well."""
    ends = Sentinel(), Sentinel()
    plugins = {"first": ends[0], name: plugin, "last": ends[1]}
    if name != "checkpoint":
        plugins["checkpoint"] = {"every": "2 steps"}
    if error_for is not None:
        plugins["other"] = at_hook("on_boundary", failing(error_for), nth=3)
    options = {"epochs": 2, "log_every": "1 steps", "runs_folder": str(folder), "resume": True}
    return tiny_trainer(plugins, Module(), **options), ends


NAMES = [name for name in installed() if name != "lora"]  # which trains other weights than the run that was cut has


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NAMES])
def test_f5_each_hook_of_each_plugin_raises(name, cut_run, tmp_path, monkeypatch, quiet, caplog):
    own = load(name)
    numbers, missed = itertools.count(), marked(own) - ELSEWHERE.get(name, set())
    for options in VARIANTS.get(name, [{}]):
        shutil.copytree(cut_run, first := tmp_path / str(next(numbers)))
        found = implementations(trainer_with(name, options, first)[0], name)
        targets = [target for target in found if target[2] not in ELSEWHERE.get(name, ())]
        for registered, owner, attribute, hook in targets:
            shutil.copytree(cut_run, folder := tmp_path / str(next(numbers)))
            caplog.clear()
            plugin = own(**options)  # before its methods are replaced: it may call its own
            with monkeypatch.context() as patch:
                failing_one = raising(getattr(owner, attribute), error := Broken("on purpose"), raised := [])
                patch.setattr(owner, attribute, failing_one)
                case = hook, registered, error
                if is_observer(owner) and hook != "on_setup":
                    goes_on_without_an_observer(case, trainer_with(name, plugin, folder)[0], caplog)
                else:
                    ends_in_order(case, name, plugin, folder, patch)
                assert raised, f"{case} was never reached"
            if owner is own:
                missed.discard(attribute)
    assert not missed, f"no variant of {name} implements these: add one to VARIANTS"


def ends_in_order(case, name, plugin, folder, patch):
    hook, registered, error = case
    told, first = [], Broken("the first one") if hook == "on_exception" else None
    owner = load(name)
    if hook != "on_end_run" and hasattr(owner, "on_end_run"):
        patch.setattr(owner, "on_end_run", noting(inspect.getattr_static(owner, "on_end_run"), told))
    notes = f"raised in {hook} by plugin {registered!r} ("
    if hook in BEFORE_A_RUN:  # there is none that could end
        with pytest.raises(Broken) as refused:
            trainer_with(name, plugin, folder)
        assert any(note.startswith(notes) for note in refused.value.__notes__), (case, refused.value.__notes__)
        return
    trainer, ends = trainer_with(name, plugin, folder, error_for=first)
    raised = raised_by(trainer, ends)
    assert raised is (first or error), case
    assert any(notes in note for note in raised.__notes__), (case, raised.__notes__)
    assert (trainer.status, trainer.exit_code) == ("failed", 1), case
    status = "finished" if hook == "on_end_run" else "failed"
    for sentinel in ends:
        assert sentinel.told == ([] if hook == "on_end_run" else [raised]) + [status], case
    if "on_end_run" in [kept for _, _, kept, _ in implementations(trainer, name)] and hook != "on_end_run":
        assert plugin in told, case
    assert good_checkpoints(trainer.run_dir)[0] >= 4, case


def raised_by(trainer, ends):
    """Return what the first door raises that does."""
    for door in DOORS:
        for sentinel in ends:
            sentinel.told.clear()
        try:
            getattr(trainer, door)()
        except BaseException as raised:
            return raised
    raise AssertionError("nothing was raised")


def goes_on_without_an_observer(case, trainer, caplog):
    _, registered, _ = case
    for door in DOORS:
        getattr(trainer, door)()
        assert (trainer.status, trainer.exit_code) == ("finished", 0), case
    said = [entry.getMessage() for entry in caplog.records if f"plugin {registered!r}" in entry.getMessage()]
    assert said, case
    assert any(" failed in " in line for line in said), case
    assert any(" lost " in line for line in said), case
    switched_off = [line.partition(" after ")[0] for line in said if "is switched off in" in line]
    assert len(switched_off) == len(set(switched_off)), case


def test_f5_every_teardown_is_reached_and_the_first_error_is_raised(tmp_path):
    class Stubborn(CallbackInterface):
        def __init__(self, error):
            self.error, self.told = error, 0

        @hookimpl
        def on_end_run(self):
            self.told += 1
            raise self.error

    errors = [Broken("one"), KeyboardInterrupt(), Broken("three")]
    plugins = {f"stubborn_{number}": Stubborn(error) for number, error in enumerate(errors)}
    trainer = tiny_trainer({**plugins, "checkpoint": Checkpoint()}, runs_folder=str(tmp_path))
    with pytest.raises(Broken, match="one") as raised:
        trainer.train()
    assert [plugin.told for plugin in plugins.values()] == [1, 1, 1]
    notes = "\n".join(raised.value.__notes__)
    assert "raised in on_end_run by plugin 'stubborn_0'" in notes
    assert "and then KeyboardInterrupt:  (raised in on_end_run by plugin 'stubborn_1'" in notes
    assert "and then Broken: three (raised in on_end_run by plugin 'stubborn_2'" in notes
    assert (trainer.status, trainer.exit_code) == ("failed", 1)
    assert good_checkpoints(trainer.run_dir) == [14, 7]


# F6 -----------------------------------------------------------------------------------


class Tracker(CallbackInterface):
    """Sends what is logged to a service that fails."""

    observer = True

    def __init__(self, error, hooks):
        self.error, self.hooks, self.calls = error, hooks, 0

    def fail(self, hook):
        if hook in self.hooks:
            self.calls += 1
            raise self.error

    @hookimpl
    def on_begin_train(self):
        self.fail("on_begin_train")

    @hookimpl
    def on_log(self):
        self.fail("on_log")

    @hookimpl
    def on_end_train_step(self):
        self.fail("on_end_train_step")

    @hookimpl
    def on_end_run(self):
        self.fail("on_end_run")


def end_of(trainer, memory):
    state = dict(memory.state["trainer"])
    counters = {**state.pop("counters"), "seconds": 0}
    others = {name: section for name, section in memory.state.items() if name != "trainer"}
    return digest([trainer.module.state_dict(), others, state, counters])


@pytest.mark.parametrize("error", [Broken("on purpose"), ConnectionError("no network"), TimeoutError("too late")])
@pytest.mark.parametrize("hooks", [["on_log"], ["on_begin_train", "on_end_train_step"]])
def test_f6_a_tracker_that_fails_is_switched_off_and_training_goes_on(error, hooks, caplog):
    ends = []
    for plugins in ([Tracker(error, [])], [tracker := Tracker(error, hooks)]):
        trainer = tiny_trainer([*plugins, memory := Memory()], log_every="1 steps")
        trainer.train()
        ends.append(end_of(trainer, memory))
    assert ends[0] == ends[1]
    often, seldom = hooks[-1], hooks[:-1]
    assert (trainer.status, tracker.calls) == ("finished", FAILURES_ALLOWED + len(seldom))
    said = [entry for entry in caplog.records if "tracker" in entry.getMessage()]
    what = f"{type(error).__name__}: {error}"
    lost = {"on_log": 18, "on_end_train_step": 14}[often]
    assert [entry.getMessage() for entry in said] == [
        *(f"plugin 'tracker' failed in {hook}, and the run goes on: {what}" for hook in hooks),
        f"plugin 'tracker' is switched off in {often} after {FAILURES_ALLOWED} failures in a row: {what}",
        *(f"plugin 'tracker' lost 1 call(s) of {hook}" for hook in seldom),
        f"plugin 'tracker' lost {lost} call(s) of {often}; it is switched off there since {what}",
    ]
    assert {entry.levelname for entry in said} == {"WARNING"}


def test_f6_a_tracker_that_fails_once_is_told_of_at_the_end(caplog):
    tracker = Tracker(ConnectionError("no network"), ["on_end_run"])
    trainer = tiny_trainer([tracker])
    trainer.train()
    assert trainer.status == "finished"
    said = [entry.getMessage() for entry in caplog.records if "tracker" in entry.getMessage()]
    assert said == [
        "plugin 'tracker' failed in on_end_run, and the run goes on: ConnectionError: no network",
        "plugin 'tracker' lost 1 call(s) of on_end_run",
    ]


@pytest.mark.parametrize("hook", ["on_log", "on_end_run"])
def test_f6_ctrl_c_in_a_tracker_is_no_failure_of_it(hook):
    trainer = tiny_trainer([Tracker(KeyboardInterrupt(), [hook]), sentinel := Sentinel()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.status == "failed"
    assert len(sentinel.told) == (1 if hook == "on_end_run" else 2)


# F8 -----------------------------------------------------------------------------------

HARD = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit(0)": functools.partial(SystemExit, 0),
    "SystemExit(3)": functools.partial(SystemExit, 3),
    "GeneratorExit": GeneratorExit,
    "CheckpointException": functools.partial(CheckpointException, "of torch.distributed", {}),
}
NEVER = ("on_exception", "all_gather", "all_reduce")  # only where something was raised, or where there are ranks


@functools.cache
def hooks_of_a_training():
    """Return the hooks that a run of TinyModule reaches, with one plugin that saves."""
    reached = []
    for hook in vars(hookspecs):
        if hasattr(getattr(hookspecs, hook), "hookline_spec") and hook not in NEVER:
            plugin = at_hook(hook, functools.partial(reached.append, hook))
            tiny_trainer([plugin, Memory(every="1 steps")], log_every="1 steps").train()
    return list(dict.fromkeys(reached))


def raises_everywhere(make, hooks):
    for hook in hooks:
        error, ends, caught = make(), (Sentinel(), Sentinel()), None
        fault = at_hook(hook, failing(error))
        plugins = {"first": ends[0], "fault": fault, "memory": Memory(every="1 steps"), "last": ends[1]}
        try:
            trainer = tiny_trainer(plugins, log_every="1 steps")
            trainer.train()
        except BaseException as raised:
            caught = raised
        assert caught is error, hook
        assert any(note.startswith(f"raised in {hook} by plugin 'fault'") for note in error.__notes__), hook
        if hook not in BEFORE_A_RUN:
            assert (trainer.status, trainer.exit_code) == ("failed", 1), hook
            told = ["finished"] if hook == "on_end_run" else [error, "failed"]
            assert [sentinel.told for sentinel in ends] == [told, told], hook


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in ("SystemExit(3)", "GeneratorExit") else [])
        for name in HARD
    ],
)
def test_f8_is_never_swallowed(name):
    hooks = hooks_of_a_training()
    assert len(hooks) > 35
    raises_everywhere(HARD[name], hooks)


@dataclass(eq=False)
class FaultAt(CallbackInterface):
    """Raise one of HARD where a hook is reached for the `nth` time."""

    hook: str = "update"
    error: str = "KeyboardInterrupt"
    nth: int = 3

    @hookimpl
    def on_setup(self, trainer):
        fault = at_hook(self.hook, failing(HARD[self.error]()), self.nth)
        if self.hook == "on_setup":
            raise HARD[self.error]()
        trainer.plugins.register(fault, "the fault")


def fit(folder, *words):
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    sys.exit(main(["fit", "run.yaml", *words]))


def prepared(folder, plugins=None, **module):
    config = {
        "module": {"_target_": "hookline.testing.TinyModule", **module},
        "trainer": {"epochs": 2, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"},
        "plugins": {"checkpoint": {"every": "4 steps"}, "jsonl": {}, **(plugins or {})},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def record(folder):
    return read_run(folder / "runs" / "run-1")


@dataclass(eq=False)
class Unanswered(CallbackInterface):
    """Waits for the answer of a service."""

    observer = True

    @hookimpl
    def on_log(self):
        time.sleep(60)


def test_f6_a_tracker_that_hangs_is_ended_by_the_watchdog(tmp_path):
    plugins = {"watchdog": {"timeout": "3 s"}, "tracker": {"_plugin_": f"{__name__}.Unanswered"}}
    outcome = run(fit, prepared(tmp_path, plugins), timeout=30)
    assert outcome.code == 124, outcome.output
    assert "no sign of life for 3 s (watchdog.timeout); phase: training, after step 7" in outcome.output
    assert "in on_log" in outcome.output
    assert good_checkpoints(tmp_path / "runs" / "run-1") == [4]
    resumed = run(fit, tmp_path, "plugins.tracker=null", "--resume")
    assert (resumed.code, record(tmp_path).status) == (0, "finished"), resumed.output


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("KeyboardInterrupt", 130, "hookline: interrupted"),
        ("SystemExit(0)", 1, "hookline: the run was left by SystemExit(0) before it was done\n  raised in update by"),
        ("SystemExit(3)", 3, ""),
        ("GeneratorExit", 1, "GeneratorExit\nraised in update by plugin 'the fault'"),
        ("CheckpointException", 1, "raised in update by plugin 'the fault'"),
    ],
)
def test_f8_the_command_never_ends_with_0(name, code, said, tmp_path):
    fault = {"_plugin_": f"{__name__}.FaultAt", "error": name, "nth": 6}
    outcome = run(fit, prepared(tmp_path, {"fault": fault}))
    assert outcome.code == code, outcome.output
    assert said in outcome.output
    assert (record(tmp_path).status, record(tmp_path).step) == ("failed", 5)
    assert good_checkpoints(tmp_path / "runs" / "run-1") == [4]


@pytest.mark.parametrize("hook", ["on_setup", "on_begin_run", "setup_optimizers", "on_end_train", "on_end_run"])
def test_f8_sys_exit_of_0_is_no_success_anywhere(hook, tmp_path):
    fault = {"_plugin_": f"{__name__}.FaultAt", "error": "SystemExit(0)", "hook": hook, "nth": 1}
    outcome = run(fit, prepared(tmp_path, {"fault": fault}))
    assert outcome.code == 1, outcome.output
    assert "the run was left by SystemExit(0) before it was done" in outcome.output
    assert f"raised in {hook} by plugin" in outcome.output


# F9 -----------------------------------------------------------------------------------


class OutOfMemory(torch.autograd.Function):
    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class HalfWay(torch.optim.Adam):
    """Updates half of its parameters in one of its steps, and has no memory for the rest."""

    left = None

    def step(self, closure=None):
        if self.left is None:
            return super().step(closure)
        self.left -= 1
        if self.left:
            return super().step(closure)
        (group,) = self.param_groups
        group["params"], rest = group["params"][: len(group["params"]) // 2], group["params"]
        super().step(closure)
        group["params"] = rest
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Greedy(TinyModule):
    """Runs out of memory in the step of this number, at one of three places; 0 is never."""

    def __init__(self, place="forward", at=0):
        super().__init__()
        self.place, self.at = place, at

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)  # batch norm and randomness have moved
        if global_step == self.at and self.place == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if global_step == self.at and self.place == "backward":
            loss = OutOfMemory.apply(loss)
        return loss, predictions

    def get_optimizers_schedulers(self, steps, epochs):
        optimizer = HalfWay(self.parameters(), self.lr)
        optimizer.left = self.at if self.at and self.place == "optimizer" else None
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)]


def comparable(state):
    """Return one digest for each section of a state that does not depend on who saves it."""
    trainer = {**state["trainer"], "counters": {**state["trainer"]["counters"], "seconds": 0}}
    sections = {**state, "trainer": trainer}
    return {name: digest(sections[name]) for name in ("trainer", "module", "optimizers", "schedulers", "rng")}


@pytest.fixture(scope="module")
def boundaries():
    """Return the states of an undisturbed run by their step."""
    memory = Memory(every="1 steps")
    tiny_trainer([memory], Greedy()).train()
    return {step: comparable(state) for step, state in memory.states.items()}


PLACES = ["forward", "backward", "optimizer"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("every", "at", "saved"),
    [
        ("4 steps", 11, 8),
        pytest.param("1 steps", 10, 9, marks=pytest.mark.slow),
        pytest.param("1 steps", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_f9_what_guard_saves_is_the_state_of_a_boundary(every, at, saved, place, tmp_path, boundaries, caplog):
    plugins = {"checkpoint": {"every": "100 steps"}, "guard": {"every": every, "errors": ["out_of_memory"]}}
    trainer = tiny_trainer(plugins, Greedy(place, at), runs_folder=str(tmp_path))
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        trainer.train()
    assert (trainer.status, trainer.exit_code) == ("failed", 1)
    assert f"guard had the state of step {saved} saved; the run raised after step {at - 1}" in caplog.text
    assert good_checkpoints(trainer.run_dir) == [saved]
    (path,) = storage.listed(trainer.run_dir / "checkpoints")
    assert storage.read_manifest(path)["reason"] == f"OutOfMemoryError after step {at - 1}"
    assert comparable(unpack(path, 0)) == boundaries[saved]
    if place == "optimizer":
        assert digest(trainer.module.state_dict()) != boundaries[at - 1]["module"]  # it was half-updated
    goes_on_to_the_same_bits(tmp_path, boundaries)


@pytest.mark.parametrize("place", PLACES)
def test_f9_without_guard_the_periodic_checkpoint_is_good(place, tmp_path, boundaries):
    trainer = tiny_trainer({"checkpoint": {"every": "4 steps"}}, Greedy(place, 11), runs_folder=str(tmp_path))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert good_checkpoints(trainer.run_dir) == [8, 4]
    newest, *_ = storage.listed(trainer.run_dir / "checkpoints")
    assert comparable(unpack(newest, 0)) == boundaries[8]
    goes_on_to_the_same_bits(tmp_path, boundaries)


def goes_on_to_the_same_bits(folder, boundaries):
    trainer = tiny_trainer({"checkpoint": {"every": "100 steps"}}, Greedy(), runs_folder=str(folder), resume=True)
    trainer.train()
    newest, *_ = storage.listed(trainer.run_dir / "checkpoints")
    assert comparable(unpack(newest, 0)) == boundaries[14]


def test_f9_the_command_says_it(tmp_path):
    module = {"_target_": f"{__name__}.Greedy", "place": "optimizer", "at": 6}
    outcome = run(fit, prepared(tmp_path, {"guard": {"every": "1 steps"}}, **module))
    assert outcome.code == 1
    assert "OutOfMemoryError: CUDA out of memory" in outcome.output
    assert "guard had the state of step 5 saved; the run raised after step 5" in outcome.output
    assert good_checkpoints(tmp_path / "runs" / "run-1") == [5, 4]


# F10 ----------------------------------------------------------------------------------


def recurse():
    return recurse()


DEATHS = {
    "recursion": recurse,
    "exit 0": functools.partial(os._exit, 0),
    "exit 3": functools.partial(os._exit, 3),
    "segfault": faulthandler._sigsegv,
    "abort": os.abort,
    "interpreter held": functools.partial(ctypes.PyDLL(None).sleep, 60),
}


class Dying(TinyModule):
    """Dies in step 10."""

    def __init__(self, by=""):
        super().__init__()
        self.by = by

    def train_step(self, global_step, batch, device):
        if global_step == 10 and self.by:
            DEATHS[self.by]()
        return super().train_step(global_step, batch, device)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = prepared(tmp_path_factory.mktemp("whole"))
    assert run(fit, folder).code == 0
    return folder


@pytest.mark.parametrize(
    ("by", "code", "status"),
    [
        ("recursion", 1, "failed"),
        ("exit 0", 0, "crashed"),  # no process can tell how it will end; the record has no end
        ("exit 3", 3, "crashed"),
        ("segfault", -signal.SIGSEGV, "crashed"),
        ("abort", -signal.SIGABRT, "crashed"),
        ("interpreter held", 1, "crashed"),  # the watchdog ends it
    ],
)
def test_f10_a_process_that_dies_is_seen_and_gone_on_with(by, code, status, tmp_path, whole, capsys, monkeypatch):
    watched = {"watchdog": {"timeout": "3 s"}} if by == "interpreter held" else {}
    folder = prepared(tmp_path, watched, _target_=f"{__name__}.Dying", by=by)
    outcome = run(fit, folder, timeout=30)
    assert outcome.code == code, outcome.output
    assert ("RecursionError" in outcome.output) is (by == "recursion")
    assert ("Timeout (" in outcome.output) is (by == "interpreter held")
    assert (record(folder).status, record(folder).step) == (status, 8 if status == "crashed" else 9)
    monkeypatch.chdir(folder)
    assert main(["runs"]) == 0
    assert status in capsys.readouterr().out
    assert good_checkpoints(folder / "runs" / "run-1") == [8, 4]
    resumed = run(fit, folder, "module.by=''", "--resume")
    assert resumed.code == 0, resumed.output
    ends = [storage.listed(path / "runs" / "run-1" / "checkpoints")[0] for path in (whole, folder)]
    assert [line.partition(":")[0] for line in differences(*ends)] == ["trainer.counters.seconds"]
    assert record(folder).status == "finished"
