"""The command line, as a user types it: real processes."""

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from hookline.cli import main
from hookline.cli.logs import shown

MODULE = """
import torch
from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule


class Mine(TinyModule):
    def __init__(self, samples: int = 16, fail: bool = False, wait: bool = False):
        super().__init__(samples)
        self.fail, self.wait = fail, wait

    def train_step(self, global_step, batch, device):
        if self.fail:
            raise ZeroDivisionError("in the step")
        if self.wait:
            print("training", flush=True)
            import time
            time.sleep(60)
        return super().train_step(global_step, batch, device)

    @hookimpl
    def on_end_predict_step(self, outputs):
        print("predicted", tuple(outputs.shape))

    @hookimpl
    def on_end_run(self, status):
        print("ended", status, flush=True)
"""
CONFIG = """
module: {_target_: mine.Mine}
trainer: {epochs: 1, train_batch_size: 8, val_batch_size: 8, device: cpu}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def process(folder, *arguments, python=()):
    command = [sys.executable, *python, "-m", "hookline", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def hookline(folder, monkeypatch, capsys):
    """Run the command's `main` here, as the installed command does; two seconds quicker than a process."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)

    def run(*arguments):
        try:
            code = main(arguments)
        except SystemExit as stopped:
            code = stopped.code
        return Done(code, *capsys.readouterr())

    return run


def test_fit_keeps_a_configuration_that_does_it_again(folder):
    done = process(folder, "fit", "run.yaml", "trainer.seed=3")
    assert (done.returncode, done.stdout) == (0, "ended finished\n"), done.stderr
    kept = folder / "runs" / "run-1" / "config.yaml"
    assert yaml.safe_load(kept.read_text())["trainer"]["seed"] == 3
    again = process(folder, "fit", str(kept))
    assert again.returncode == 0, again.stderr
    assert (folder / "runs" / "run-2" / "config.yaml").read_text() == kept.read_text()


def test_the_other_doors(folder, hookline):
    validated = hookline("validate", "run.yaml")
    assert json.loads(validated.stdout.removeprefix("ended finished\n")).keys() == {"val_loss"}, validated.stderr
    tested = hookline("test", "run.yaml")
    assert json.loads(tested.stdout.removeprefix("ended finished\n")).keys() == {"test_loss"}
    predicted = hookline("predict", "run.yaml", "module.samples=12")
    assert predicted.stdout.splitlines() == ["predicted (8, 1)", "predicted (4, 1)", "ended finished"] or (
        predicted.stdout.count("predicted") == 12
    )
    assert not (folder / "runs").exists()


@pytest.mark.plugins
def test_print_config_masks_and_does_nothing(folder, hookline):
    done = hookline("fit", "run.yaml", "-p", "clip", "plugins.clip.max_norm=0.5", "--print-config")
    printed = yaml.safe_load(done.stdout)
    options = {"max_norm": 0.5, "norm_type": 2.0, "max_value": None, "max_ratio": None}
    assert printed["plugins"] == {"clip": {**options, "per_parameter": False, "log_norm": False}}
    assert not (folder / "runs").exists()


def test_what_the_user_can_mend_is_one_line_and_exit_code_2(folder, hookline):
    done = hookline("fit", "run.yaml", "trainer.epoch=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hookline: trainer.epoch: unknown key, did you mean 'epochs'?")
    assert done.stderr.count("\n") == 1
    assert hookline("fit", "run.yaml", "epochs").returncode == 2
    assert "unrecognized arguments: --what" in hookline("fit", "run.yaml", "--what").stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "3"], "--epochs is no option of this command; .* without dashes: trainer.epochs=3\n"),
        (["--epochs=3"], "without dashes: trainer.epochs=3\n"),
        (["--trainer.epochs=3"], "without dashes: trainer.epochs=3\n"),
        (["--trainer.epohcs", "3"], "without dashes: trainer.epochs=3\n"),
        (["--train-batch-size", "4"], "without dashes: trainer.train_batch_size=4\n"),
        (["--batch-size", "4"], r"trainer.val_batch_size=4 \(or trainer.train_batch_size=4\)\n"),
        (["--eval-when-start"], "without dashes: trainer.eval_when_start=true\n"),
        (["--samples", "12"], "without dashes: module.samples=12\n"),
        (["-epochs", "3"], "without dashes: trainer.epochs=3\n"),
        (["--nobody-knows", "3"], "unrecognized arguments: --nobody-knows 3"),
    ],
)
def test_options_in_the_style_of_other_programs_are_told_by_their_key(hookline, words, said):
    for command in ("fit", "validate", "plan"):
        done = hookline(command, "run.yaml", "module.samples=8", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.search(said, done.stderr)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "run.yaml"], "there is no command 'train', did you mean 'fit'?; there are fit, validate, test"),
        (["eval", "run.yaml"], "did you mean 'validate'?"),
        (["resume", "run-1"], "did you mean 'fit CONFIG --resume'?"),
        (["run.yaml"], "'run.yaml' is a configuration, and a command is wanted first: `hookline fit run.yaml` trains"),
        (["fit", "rnu.yaml"], "rnu.yaml is no file, did you mean 'run.yaml'?; the configurations in . are run.yaml\n"),
        (["fit", "run.yml"], "did you mean 'run.yaml'?"),
        (["fit", "nowhere/run.yaml"], "nowhere/run.yaml is no file; the configurations in nowhere are none\n"),
        (["fit", "."], ". is no file, did you mean"),
        (["fit", "run.yaml", "epochs=3"], "epochs: unknown key, did you mean 'trainer.epochs'?; the nodes are"),
        (
            ["fit", "run.yaml", "--resume"],
            "there is no run 'run' in runs to resume; it has no run. --resume-or-start beg",
        ),
        (["fit", "run.yaml", "--resume", "--resume-or-start"], "leave --resume and --checkpoint away"),
        (
            ["fit", "run.yaml", "--resume", "nowhere"],
            "resume='nowhere' is no folder of a run, nor a run in runs; runs has",
        ),
    ],
)
def test_a_wrong_word_is_told_with_the_near_one(folder, hookline, words, said):
    done = hookline(*words)
    assert (done.returncode, done.stdout.replace("ended failed\n", "")) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()


RESTORING = CONFIG + "plugins: {checkpoint: {monitor: val_loss, keep_best: 1, keep_last: 1}, jsonl: {}}\n"


@pytest.fixture
def kept(folder, hookline):
    """Return `hookline` where the run `run-1` has checkpoints of steps 4 and 8."""
    (folder / "run.yaml").write_text(RESTORING)
    words = ("trainer.epochs=4", "plugins.checkpoint.every=2 epochs", "plugins.checkpoint.keep_last=null")
    assert hookline("fit", "run.yaml", *words, "plugins.checkpoint.keep_best=0").returncode == 0
    return hookline


@pytest.mark.plugins
def test_a_resume_names_a_run_and_a_checkpoint(kept, folder):
    def validated(*words, code=0):
        done = kept("validate", "run.yaml", *words)
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout[done.stdout.index("{") :])["val_loss"] if code == 0 else done.stderr

    rows = {row["step"]: row for row in json.loads(kept("runs", "show", "run-1", "--json").stdout)["rows"]}
    at = {step: row["val_loss"] for step, row in rows.items()}
    assert at[8] < at[4]
    newest = [
        ["--resume"],
        ["--resume", "run-1"],
        ["--resume", "runs/run-1"],
        ["--resume", "last"],
        ["--resume", "best"],
    ]
    for words in [*newest, ["--checkpoint", "best"], ["--resume", "run-1", "--checkpoint", "last"]]:
        assert validated(*words) == pytest.approx(at[8]), words
    earlier = "runs/run-1/checkpoints/step-000000000004"
    for words in [["--checkpoint", "4"], ["--resume", "4"], ["--checkpoint", earlier], ["trainer.resume=4"]]:
        assert validated(*words) == pytest.approx(at[4]), words
    best_of = ["--resume", "run-1", "--checkpoint", "best", "plugins.checkpoint.mode=max"]
    assert validated(*best_of) == pytest.approx(at[4])
    assert "resume='5': the steps of the checkpoints in runs/run-1/checkpoints are 8, 4" in validated(
        "--checkpoint", "5", code=2
    )
    for wrong in ("rnu-1", "runs/rnu-1"):
        assert "did you mean 'run-1'?; runs has run-1\n" in validated("--resume", wrong, code=2)
    listed = kept("checkpoints", "list", "run-1").stdout.splitlines()
    assert listed[0].split()[-2:] == ["val_loss", "state"]
    assert [line.split()[5:] for line in listed[1:]] == [
        [f"{at[8]:.5g}", "good,", "the", "best"],
        [f"{at[4]:.5g}", "good"],
    ]


@pytest.mark.plugins
def test_the_record_says_what_happened(kept, folder):
    def shown():
        return json.loads(kept("runs", "show", "run-1", "--json").stdout)

    assert kept("fit", "run.yaml", "--resume", "trainer.epochs=5").returncode == 0
    before = shown()
    assert [one["step"] for one in before["checkpoints"]] == [10]  # keep_last: 1
    assert kept("fit", "run.yaml", "--resume", "trainer.epochs=3").returncode == 0  # nothing is left to do
    assert kept("validate", "run.yaml", "--resume").returncode == 0
    wrong = ["trainer.epochs=9", "plugins.checkpoint.every=eval", "trainer.evaluate_every=null"]
    assert kept("fit", "run.yaml", "--resume", *wrong).returncode == 2
    after = shown()
    same = ("config", "step", "totals", "checkpoints")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert [(one["stage"], one["step"]) for one in after["evaluations"]] == [("val", 10)]


@pytest.mark.plugins
def test_a_mistake_in_the_set_up_leaves_no_folder(folder, hookline):
    (folder / "run.yaml").write_text(RESTORING)
    wrong = ["plugins.checkpoint.every=eval", "trainer.evaluate_every=null"]
    with unconfigured():
        done = hookline("fit", "run.yaml", *wrong)
    assert done.returncode == 2
    assert done.stderr.count("saves after evaluations, and trainer.evaluate_every is null") == 1
    assert not (folder / "runs").exists()
    assert hookline("fit", "run.yaml", "--resume-or-start").returncode == 0
    assert hookline("fit", "run.yaml", *wrong).returncode == 2
    assert hookline("fit", "run.yaml", "--resume", "trainer.epochs=2", *wrong).returncode == 2
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]


@pytest.mark.plugins
def test_ctrl_c_says_how_to_go_on(folder, hookline, monkeypatch):
    (folder / "run.yaml").write_text(RESTORING)
    (folder / "cut.py").write_text(CUT)
    words = ("fit", "run.yaml", "trainer.epochs=3", "plugins.cut={_plugin_: cut.Cut, step: 3}", "-q")
    cut = hookline(*words, "--resume-or-start")
    assert cut.returncode == 130
    told = cut.stderr.splitlines()[-1].removeprefix("hookline: interrupted; go on with: hookline ")
    assert shlex.split(told) == [*words, "--resume", "runs/run-1"]
    again = hookline(*shlex.split(told), "plugins.cut.step=5")
    assert again.stderr.splitlines()[
        -1
    ] == f"hookline: interrupted; go on with: hookline {told} plugins.cut.step=5".replace(
        " --resume runs/run-1 plugins.cut.step=5", " plugins.cut.step=5 --resume runs/run-1"
    )
    assert hookline(*shlex.split(told), "plugins.cut=null").returncode == 0
    assert [path.name for path in (folder / "runs").iterdir()] == ["run-1"]
    early = hookline(*words, "plugins.cut.step=1")
    assert early.stderr.endswith("interrupted; no checkpoint was saved yet, so there is nothing to go on with\n")


CUT = """
from dataclasses import dataclass
from hookline import CallbackInterface


@dataclass(eq=False)
class Cut(CallbackInterface):
    step: int

    def on_end_train_step(self, global_step):
        if global_step == self.step:
            raise KeyboardInterrupt
"""


def test_an_error_in_training_keeps_its_traceback(folder):
    done = process(folder, "fit", "run.yaml", "module.fail=true")
    assert done.returncode == 1
    assert "ended failed" in done.stdout
    assert "ZeroDivisionError: in the step" in done.stderr
    assert "mine.py" in done.stderr


def test_ctrl_c_ends_cleanly_with_130(folder):
    command = [sys.executable, "-m", "hookline", "fit", "run.yaml", "module.wait=true", "-q"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "ended failed\n"
    assert err == "hookline: interrupted; nothing is saved, so nothing can go on: `-p checkpoint` saves\n"


WAITING = """
import importlib.abc, sys


class Gate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("torch", "mine") and name not in seen:
            seen.add(name)
            open(f"gate-{name}").read()


seen = set()
sys.meta_path.insert(0, Gate())
from hookline.cli import main

sys.exit(main(["fit", "run.yaml", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a terminal")
def test_what_takes_a_while_is_told_on_a_terminal_before_it_is_done(folder):
    import pty

    for name in ("torch", "mine", "data"):
        os.mkfifo(folder / f"gate-{name}")
    (folder / "mine.py").write_text(
        MODULE + "\n    gates = ['gate-data']\n\n    def get_train_dataloader(self, sampler, batch_size):\n"
        "        self.gates and open(self.gates.pop()).read()\n"
        "        return super().get_train_dataloader(sampler, batch_size)\n"
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        with os.fdopen(ours, encoding="utf-8", errors="replace") as terminal:
            for name, words in (
                ("torch", "hookline: importing torch …"),
                ("mine", "hookline: building the module and the plugins …"),
                ("data", "hookline: preparing the data and the first batch …"),
            ):
                while terminal.readline().strip() != words:
                    assert process.poll() is None
                (folder / f"gate-{name}").write_text("")  # only now it goes on
            assert process.wait(timeout=60) == 0


MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def test_a_run_says_on_standard_error_what_it_does(folder):
    done = process(folder, "fit", "run.yaml")
    begins, ends = done.stderr.splitlines()
    begun = re.escape(f"INFO hookline.trainer: train begins in {Path('runs', 'run-1')} on cpu, rank 0 of 1")
    assert re.fullmatch(f"{MOMENT} {begun}", begins)
    assert re.fullmatch(rf"{MOMENT} INFO hookline\.trainer: train finished at step 2 after [\d.]+ s", ends)


@contextlib.contextmanager
def unconfigured():
    """Be as if nobody had configured logging; pytest has."""
    kept, logging.root.handlers = logging.root.handlers, []
    try:
        yield
    finally:
        logging.root.handlers = kept


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        ([], ["INFO", "INFO"]),
        (["--quiet"], []),
        (["-q"], []),
        (["--log-level", "warning"], []),
        (["--log-level", "error"], []),
        (["--log-level", "debug"], ["INFO", *["DEBUG"] * 3, "INFO"]),
    ],
)
def test_how_much_is_said(hookline, words, levels):
    with unconfigured():
        done = hookline("validate", "run.yaml", *words)
    assert [line.split()[2] for line in done.stderr.splitlines()] == levels
    assert json.loads(done.stdout.removeprefix("ended finished\n")).keys() == {"val_loss"}
    if "debug" in words:
        assert "event on_end_run: wrapped by [], done or heard by ['module']" in done.stderr
        assert re.search(r"hookline\.trainer: val at step 0 took [\d.]+ s\n", done.stderr)


def test_warnings_and_errors_are_told_to_who_wants_quiet(hookline):
    with unconfigured():
        done = hookline("fit", "run.yaml", "-q", "trainer.max_steps=0")
    assert done.stderr.endswith("WARNING hookline.trainer: nothing is left to train: the run is at step 0, epoch 0\n")
    done = hookline("fit", "run.yaml", "-q", "trainer.epoch=1")
    assert (done.returncode, done.stderr.partition(":")[0]) == (2, "hookline")
    assert "--log-level: invalid choice: 'all'" in hookline("fit", "run.yaml", "--log-level", "all").stderr


def test_who_configures_logging_has_it_his_way(hookline, caplog):
    logger = logging.getLogger("hookline")
    before = logger.level, list(logger.handlers)
    done = hookline("fit", "run.yaml")
    assert done.stderr == ""  # the handler is of pytest, and on the root logger
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert (logger.level, logger.handlers) == before
    caplog.clear()
    caplog.set_level(logging.ERROR, "hookline")
    hookline("fit", "run.yaml")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("rank", "level", "said"),
    [
        ("0", None, ["INFO hookline.mine: one", "WARNING hookline.mine: two"]),
        ("1", None, ["WARNING hookline.mine: rank 1: two"]),
        ("1", "debug", ["INFO hookline.mine: rank 1: one", "WARNING hookline.mine: rank 1: two"]),
        ("1", "error", []),
    ],
)
def test_other_ranks_only_warn(capsys, rank, level, said):
    with unconfigured(), shown(level, rank):
        logging.getLogger("hookline.mine").info("one")
        logging.getLogger("hookline.mine").warning("two")
    assert [re.sub(f"^{MOMENT} ", "", line) for line in capsys.readouterr().err.splitlines()] == said


def test_what_the_loop_refuses_is_one_line_too(hookline):
    done = hookline("fit", "run.yaml", "trainer.resume=true")
    assert (done.returncode, done.stdout) == (2, "ended failed\n")
    assert done.stderr.startswith("hookline: resume is asked for, but no plugin can restore a run")
    assert done.stderr.count("\n") == 1


def test_a_warning_is_one_line(folder, hookline, monkeypatch):
    monkeypatch.setattr(warnings, "filters", [])
    (folder / "mine.py").write_text(MODULE.partition("    @hookimpl\n    def on_end_predict_step")[0])
    done = hookline("predict", "run.yaml")
    assert done.stderr.startswith("hookline: nobody hears on_end_predict_step, so the predictions will be dropped")


@pytest.mark.plugins
def test_overrides_may_stand_anywhere(folder, hookline):
    done = hookline("fit", "run.yaml", "-p", "clip", "trainer.seed=4", "--print-config", "trainer.epochs=7")
    trainer = yaml.safe_load(done.stdout)["trainer"]
    assert (trainer["seed"], trainer["epochs"]) == (4, 7)


@pytest.mark.plugins
def test_plan(folder, hookline):
    done = hookline("plan", "run.yaml", "-p", "clip")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["hook", "kind", "wrapped", "by", "done", "or", "heard", "by"]
    assert any(line.split() == ["on_begin_optimizer_step", "event", "clip"] for line in lines)
    rows = json.loads(hookline("plan", "run.yaml", "-p", "clip", "--json").stdout)
    assert {"hook": "update", "kind": "verb", "wrapped_by": [], "done_by": ["core"]} in rows


@pytest.mark.plugins
def test_plugins(folder, hookline):
    listed = hookline("plugins").stdout
    assert any(line.split()[:2] == ["clip", "hookline-clip"] for line in listed.splitlines())
    assert "hears on_begin_optimizer_step" in hookline("plugins", "clip").stdout
    (folder / "more.yaml").write_text(CONFIG + "plugins: {clip: {}}\n")
    assert "clip: Clip the gradients" in hookline("plugins", "more.yaml").stdout
    assert "no plugin named 'clib' is installed, did you mean 'clip'?" in hookline("plugins", "clib").stderr


def test_a_command_that_is_not_there_says_what_may_bring_it(hookline):
    done = hookline("rnus", "show", "run-1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hookline: there is no command 'rnus'")
    assert "; there are fit, validate, test, predict, plan, plugins, hooks, doctor, new" in done.stderr
    assert done.stderr.endswith(". `pip install hookline-rnus` may bring it\n")
    assert "there is no command 'hook', did you mean 'hooks'?; there are fit" in hookline("hook").stderr


@pytest.mark.plugins
def test_help_shows_the_commands_of_plugins(hookline):
    listed = hookline("--help").stdout.partition("commands of plugins (`hookline COMMAND --help`):\n")[2]
    assert [line.split() for line in listed.splitlines()] == [
        ["batch-find", "hookline-batch-find", "0.1.0"],
        ["checkpoints", "hookline-checkpoint", "0.1.0"],
        ["export", "hookline-export", "0.1.0"],
        ["from-lightning", "hookline-lightning", "0.1.0"],
        ["lr-find", "hookline-lr-find", "0.1.0"],
        ["ray", "hookline-ray", "0.1.0"],
        ["runs", "hookline-runs", "0.1.0"],
        ["simulate", "hookline-simulate", "0.1.0"],
        ["sweep", "hookline-sweep", "0.1.0"],
        ["trace", "hookline-profile", "0.1.0"],
        ["verify-resume", "hookline-checkpoint", "0.1.0"],
    ]


def test_hooks(folder, hookline):
    listed = hookline("hooks").stdout.splitlines()
    assert listed[0].split() == ["hook", "kind", "arguments"]
    one = hookline("hooks", "should_step").stdout
    assert "should_step(trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> bool" in one
    assert "did you mean 'on_boundary'?" in hookline("hooks", "on_bound").stderr


def test_new_plugin_is_whole(folder, hookline):
    made = hookline("new", "plugin", "weight-noise")
    assert made.stdout == "wrote weight-noise\n"
    source = folder / "weight-noise" / "src"
    checked = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "weight-noise/tests"],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            ["ruff", *words], cwd=folder / "weight-noise", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
    assert "is there already" in hookline("new", "plugin", "weight-noise").stderr
    assert "cannot be a plugin's name" in hookline("new", "plugin", "Weight Noise").stderr


@pytest.mark.plugins
@pytest.mark.timeout(300)
def test_a_new_project_trains_and_tests_itself_at_once(folder, hookline):
    made = hookline("init", "my-project")
    assert made.stdout == "wrote my-project; train it: cd my-project && hookline fit run.yaml\n"
    project = folder / "my-project"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(
            command, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=110
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("hookline", "fit", "run.yaml", "trainer.epochs=2")
    assert '"val_accuracy": ' in (project / "runs" / "my-project-1" / "metrics.jsonl").read_text()
    assert "2 passed" in run("pytest", "-q", "-p", "no:cacheprovider")
    for file in [file for file in project.rglob("*.*") if file.suffix in (".py", ".md", ".toml", ".yaml")]:
        assert "PROJECT_" not in file.read_text(), file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there", "there is there already"),
        ("My Project", "'My Project' cannot be a project's name: use lower-case words joined by '-' or '_'"),
        ("torch", "'torch' cannot be a project's name: Python knows 'torch' as something else"),
        ("class", "'class' cannot be a project's name"),
        ("tests", "'tests' cannot be a project's name"),
    ],
)
def test_a_project_overwrites_and_hides_nothing(folder, capsys, monkeypatch, name, message):
    monkeypatch.chdir(folder)
    (folder / "there").mkdir()
    assert main(["init", name]) == 2
    assert message in capsys.readouterr().err
    assert list((folder / "there").iterdir()) == []
    assert not (folder / "torch").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["hooks"]])
def test_what_needs_no_torch_imports_none(folder, arguments):
    code = f"""
import sys
from hookline.cli import main
try:
    main({arguments})
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_shows_examples_and_is_quick(folder):
    done = process(folder, "--help", python=("-X", "importtime"))
    assert "hookline fit examples/digits.yaml" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "omegaconf", "rich", "torchmetrics"}


def test_importing_hookline_costs_little_beyond_torch(folder):
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); "
        "import hookline; hookline.Trainer; c = time.perf_counter(); print((c - b) / (b - a))"
    )
    shares = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(shares) < 0.1


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "hookline"
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout == "hookline 0.1.0\n"
    )
