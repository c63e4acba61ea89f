"""Trials report and stop as their sweep says; a sweep outlives kills, and says what it has found."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from hookline import config
from hookline.cli import main as hookline
from hookline.testing import TinyModule, digest, on_ranks, tiny_trainer, train_tiny
from hookline_sweep import TRIAL, Sweep
from hookline_sweep.commands import main
from hookline_sweep.space import overrides, split
from hookline_sweep.study import NAME, Claims, Told, storage_of

SPACE = {"module.lr": FloatDistribution(0, 1)}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be where files may be made, and say nothing of trials."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)
    sys.modules.pop("swept", None)


# What is searched -----------------------------------------------------------------------


def test_each_kind_is_read():
    words = ["a.b=uniform(0, 0.5)", "c=loguniform(1e-4,1e-1)", "d=int(1,3)", "e=logint(1,100)"]
    space, others = split([*words, "f=choice(8, 1e-3, mean, true, null)", "trainer.epochs=3"])
    assert space == {
        "a.b": FloatDistribution(0, 0.5),
        "c": FloatDistribution(1e-4, 1e-1, log=True),
        "d": IntDistribution(1, 3),
        "e": IntDistribution(1, 100, log=True),
        "f": CategoricalDistribution([8, 1e-3, "mean", True, None]),
    }
    assert others == ["trainer.epochs=3"]
    Path("run.yaml").write_text("module: {_target_: hookline.testing.TinyModule}")
    values = {"vars.a": 1e-05, "vars.b": 0.1 + 0.2, "vars.c": "true", "vars.d": True, "vars.e": None, "vars.f": "ü:"}
    read = config.load_config("run.yaml", overrides(values))
    assert {f"vars.{key}": value for key, value in read.vars.items()} == values


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lr=unifrom(0,1)", r"'lr=unifrom\(0,1\)' cannot be searched: there is no kind 'unifrom', did you mean"),
        ("lr=uniform(1)", "uniform takes two numbers, the lowest and the highest value"),
        ("lr=uniform(0,inf)", "uniform takes finite numbers"),
        ("lr=uniform(0,one)", "could not convert string to float: 'one'"),
        ("lr=loguniform(0,1)", r"'lr=loguniform\(0,1\)' cannot be searched: .*low"),
        ("lr=int(3,1)", r"'lr=int\(3,1\)' cannot be searched: .*low"),
        ("lr=choice()", "choice takes values that differ"),
        ("lr=choice(1,true)", "choice takes values that differ"),
        ("lr=choice([1],[2])", r"\[1\] is neither a number nor a text"),
        ("lr=choice(!!python/name:os.system '')", "cannot be searched: could not determine a constructor"),
        ("lr=3", "there is nothing to search: write at least one KEY=KIND"),
    ],
)
def test_what_cannot_be_searched_is_said(word, message):
    with pytest.raises(ValueError, match=message):
        split([word])


def test_a_key_is_searched_once():
    with pytest.raises(ValueError, match="lr is searched twice"):
        split(["lr=uniform(0,1)", "lr=uniform(0,2)"])


# One trial ------------------------------------------------------------------------------


def study_of(folder, values=()):
    """Return a study with complete trials that had these values in each evaluation, and a new trial."""
    study = optuna.create_study(study_name=NAME, storage=storage_of(folder))
    for value in values:
        trial = study.ask(SPACE)
        for evaluation in range(1, 4):
            trial.report(value, evaluation)
        study.tell(trial, value)
    return study, study.ask(SPACE).number


def begin(monkeypatch, folder, number, metric="val_loss"):
    facts = {"folder": str(folder), "trial": number, "metric": metric, "pruner": "median"}
    monkeypatch.setenv(TRIAL, json.dumps(facts))


def test_a_trial_reports_each_evaluation_and_trains_as_without(monkeypatch, tmp_path):
    alone = tiny_trainer([Sweep()])
    alone.train()
    study, number = study_of(tmp_path)
    begin(monkeypatch, tmp_path, number)
    trainer = tiny_trainer(["sweep"])
    trainer.train()
    (trial,) = study.trials
    assert trial.state is TrialState.COMPLETE
    assert sorted(trial.intermediate_values) == [1, 2]
    assert trial.value == trial.intermediate_values[2] == trainer.metrics["val_loss"] == alone.metrics["val_loss"]
    assert trial.user_attrs["run"] == str(trainer.run_dir)
    assert digest(trainer.module.state_dict()) == digest(alone.module.state_dict())


def test_a_hopeless_trial_is_pruned_at_an_evaluation_and_ends_as_stopped(monkeypatch, tmp_path):
    study, number = study_of(tmp_path, [0.0] * 5)
    begin(monkeypatch, tmp_path, number)
    trainer = tiny_trainer(["sweep"])
    trainer.train()
    assert (trainer.status, trainer.global_step) == ("stopped", 7)
    assert study.trials[-1].state is TrialState.PRUNED
    assert study.trials[-1].value == trainer.metrics["val_loss"]


class Strange(TinyModule):
    """Raises, or has a loss that is not a number, in the second epoch."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def val_step(self, global_step, batch, device):
        if self.trainer.epoch == 0:
            return super().val_step(global_step, batch, device)
        if self.how == "raise":
            raise RuntimeError("out of order\nand more")
        if self.how == "interrupt":
            raise KeyboardInterrupt
        return torch.tensor(math.nan)


@pytest.mark.parametrize(
    ("how", "state", "why"),
    [
        ("raise", TrialState.FAIL, "RuntimeError: out of order"),
        ("nan", TrialState.FAIL, "val_loss is nan in evaluation 2"),
        ("interrupt", TrialState.RUNNING, None),
    ],
)
def test_a_failed_trial_says_why_and_an_interrupted_one_stays_open(monkeypatch, tmp_path, how, state, why):
    study, number = study_of(tmp_path)
    begin(monkeypatch, tmp_path, number)
    trainer = tiny_trainer(["sweep"], Strange(how), epochs=3)
    if how == "nan":
        trainer.train()
        assert trainer.global_step == 14
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            trainer.train()
    (trial,) = study.trials
    assert trial.state is state
    assert trial.user_attrs.get("why") == why
    assert trial.user_attrs.get("interrupted", False) == (how == "interrupt")


def test_a_trial_without_its_metric_says_what_there_is(monkeypatch, tmp_path):
    study, number = study_of(tmp_path)
    begin(monkeypatch, tmp_path, number, "val_accuracy")
    with pytest.raises(ValueError, match="sweep --metric: the evaluation has no metric 'val_accuracy'; it has"):
        tiny_trainer(["sweep"]).train()
    number = study.ask(SPACE).number
    begin(monkeypatch, tmp_path, number)
    tiny_trainer(["sweep"], evaluate_every=None, eval_when_finish=False).train()
    told = optuna.load_study(study_name=NAME, storage=storage_of(tmp_path)).trials
    assert [trial.user_attrs["why"][:24] for trial in told] == ["ValueError: sweep --metr", "it has evaluated nothing"]


@pytest.mark.plugins
@pytest.mark.slow
def test_ranks_are_pruned_together(monkeypatch, tmp_path):
    study, number = study_of(tmp_path, [0.0] * 5)
    begin(monkeypatch, tmp_path, number)
    ranks = on_ranks(train_tiny, 2, {"ddp": {}, "sweep": {}}, look=step_of)
    assert [rank.looked for rank in ranks] == [4, 4]
    assert study.trials[-1].state is TrialState.PRUNED


def step_of(trainer):
    return trainer.global_step


# Who runs which -------------------------------------------------------------------------


def claims_of(folder, sampler="tpe"):
    study = optuna.create_study(study_name=NAME, storage=(storage := storage_of(folder)), load_if_exists=True)
    return Claims(study, storage, folder, SPACE, sampler, 0)


def test_a_trial_is_run_by_one_process_and_continued_when_that_is_dead(tmp_path):
    one, other = claims_of(tmp_path), claims_of(tmp_path)
    first, second = one.claim(2), other.claim(2)
    assert (first.number, second.number) == (0, 1)
    assert one.claim(2) is other.claim(2) is None
    os.close(first.lock)  # as the system does for a process that is dead
    again = other.claim(2)
    assert again.number == 0
    Told(other.storage, 0, "none").note("attempts", 3)
    os.close(again.lock)
    assert other.claim(2) is None  # it was killed too often
    assert one.study.trials[0].user_attrs["why"] == "its processes were killed 3 times"
    os.close(second.lock)


def test_a_sweep_in_parts_proposes_what_a_whole_one_does(tmp_path):
    proposed = []
    for name, parts in (("whole", [4]), ("parts", [1, 2, 3, 4])):
        (tmp_path / name).mkdir()
        for most in parts:
            claims = claims_of(tmp_path / name)
            while claimed := claims.claim(most):
                claims.study.tell(claimed.number, 1.0)
                os.close(claimed.lock)
        proposed.append([trial.params["module.lr"] for trial in claims.counted()])
    assert proposed[0] == proposed[1]
    assert len(set(proposed[0])) == 4


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp", "qmc", "all"])
def test_each_sampler_proposes_other_values(tmp_path, sampler):
    study = optuna.create_study(study_name=NAME, storage=(storage := storage_of(tmp_path)))
    claims = Claims(study, storage, tmp_path, {"a": CategoricalDistribution([*range(9)])}, sampler, 0)
    while claimed := claims.claim(4):
        claims.study.tell(claimed.number, 1.0)
        os.close(claimed.lock)
    proposed = [trial.params["a"] for trial in claims.counted()]
    assert len(proposed) == 4
    assert len(set(proposed)) > (3 if sampler == "all" else 1)


# The command ----------------------------------------------------------------------------

MODULE = """
import os, signal
from hookline import hookimpl
from hookline.testing import TinyModule

class Module(TinyModule):
    def __init__(self, how="fine"):
        super().__init__()
        self.how = how

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step == 10 and os.path.exists("door"):
            with open("door", "w"):  # waits for who reads
                signal.pause()
"""
RUN = """
module: {_target_: swept.Module}
trainer: {epochs: 2, train_batch_size: 8, val_batch_size: 8, device: cpu}
plugins: {jsonl: {}, checkpoint: {}}
"""


def prepare(folder):
    (folder / "swept.py").write_text(MODULE)
    (folder / "run.yaml").write_text(RUN)


@pytest.mark.plugins
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("sent", "code", "attempts", "trials"),
    [
        (signal.SIGKILL, -signal.SIGKILL, 2, ["fine"]),
        pytest.param(signal.SIGINT, 130, 1, ["fine", "die"], marks=pytest.mark.slow),  # that is no attempt
    ],
)
def test_a_sweep_goes_on_after_a_kill_and_counts_each_trial_once(tmp_path, capfd, sent, code, attempts, trials):
    prepare(tmp_path)
    os.mkfifo("door")
    words = ["run.yaml", "--trials", str(len(trials)), "--sampler", "all", f"module.how=choice({','.join(trials)})"]
    killed = subprocess.Popen([sys.executable, "-m", "hookline", "sweep", *words], start_new_session=True)
    with open("door"):
        os.killpg(killed.pid, sent)  # the command and its trial, in the middle of a step
    assert killed.wait() == code
    os.unlink("door")
    assert main(words) == 0

    shown = capfd.readouterr().out
    ends = {}
    for trial in optuna.load_study(study_name=NAME, storage=storage_of(tmp_path / "sweeps" / "run")).trials:
        assert ends.setdefault(trial.params["module.how"], trial) is trial
    assert sorted(ends) == sorted(trials)
    if "die" in ends:
        assert ends["die"].state is TrialState.FAIL
        assert f"trial {ends['die'].number} failed: killed by signal 9" in shown
    by_hand = tiny_trainer()
    by_hand.train()
    number = ends["fine"].number
    assert ends["fine"].value == by_hand.metrics["val_loss"]
    assert ends["fine"].user_attrs["attempts"] == attempts
    folder = tmp_path / "sweeps" / "run"
    assert (folder / "history.svg").read_text().startswith("<?xml")
    assert [path.name for path in folder.glob(f"trial-{number}-*")] == [f"trial-{number}-1"]  # it was continued
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["module"] == {"_target_": "swept.Module", "how": "fine"}
    assert hookline(["runs", "show", "sweep", "--folder", str(folder)]) == 0
    assert hookline(["fit", str(folder / "best.yaml"), "-q"]) == 0
    shown = capfd.readouterr().out
    assert f"best val_loss  {ends['fine'].value:.5g} at step {number + 1}" in shown
    assert (tmp_path / "runs" / "run-1" / "config.yaml").exists()


@pytest.mark.plugins
@pytest.mark.slow
def test_two_processes_share_a_sweep(tmp_path):
    prepare(tmp_path)
    command = [sys.executable, "-m", "hookline", "sweep", "run.yaml", "--trials", "4", "trainer.seed=int(0,9999)"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    study = optuna.load_study(study_name=NAME, storage=storage_of(tmp_path / "sweeps" / "run"))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    ran = [line.split()[1] for text in told for line in text.splitlines() if " complete: " in line]
    assert sorted(ran) == ["0", "1", "2", "3"]
    assert len({trial.params["trainer.seed"] for trial in study.trials}) == 4


def test_what_would_not_be_comparable_is_refused(tmp_path, capsys):
    prepare(tmp_path)
    from hookline_sweep.commands import _keep

    asked = {"metric": "val_loss", "search": {"module.lr": "uniform(0,1)"}, "config": {"module": {"lr": 0.0, "d": 1}}}
    _keep(tmp_path / "sweep.yaml", asked)
    _keep(tmp_path / "sweep.yaml", asked)
    other = {**asked, "config": {"module": {"lr": 0.5, "d": 2}}}
    with pytest.raises(ValueError, match=r"another config.module.d \(1, now 2\)\. Continue it with what"):
        _keep(tmp_path / "sweep.yaml", other)


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trials", "0"], "--trials=0 must be at least 1"),
        (["trainer.epocs=2"], "trainer.epocs: unknown key, did you mean 'epochs'"),
        (
            ["--metric", "val_score"],
            "whether the smallest or the largest value of 'val_score' is the best",
        ),
        (["module.wrong=int(1,2)"], "module.wrong: unknown key"),
    ],
)
def test_what_is_wrong_is_said_once_before_any_trial(tmp_path, capsys, words, message):
    prepare(tmp_path)
    assert hookline(["sweep", "run.yaml", "module.how=choice(fine,die)", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()
