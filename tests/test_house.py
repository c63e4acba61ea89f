"""The whole house together: every plugin keeps the contract, all train in one run, and a real kill costs nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hookline.installed import installed, load
from hookline.testing import CHECKS, TinyModule, check_plugin, digest, tiny_trainer

pytestmark = pytest.mark.plugins
ROOT = Path(__file__).parent.parent
NEEDED = {  # else it has nothing to do, takes long, or refuses what the tiny module has
    "accumulate": {"steps": 2},
    "backend": {"deterministic": "error"},
    "compile": {"backend": "eager"},
    "distill": {"teacher": {"_target_": "torch.nn.Linear", "in_features": 8, "out_features": 1}},
    "export": {"to": "safetensors"},
    "freeze": {"patterns": "net.0", "unfreeze": {"10 steps": "net.0"}},
    "lr_find": {"steps": 3},
    "lr_schedule": {"replace": True},
    "mix": {"mixup": 0.2},
    "notify": {"secret_urls": "json://127.0.0.1:1", "stalled": "1 h"},  # where nobody listens
    "sample": {"method": "extra_repr"},
    "sampling": {"by": 2},
}
ALIKE = {"batch_find", "deepspeed", "fsdp", "swa"}  # which do what accumulate, ddp and ema do
ALONE = {"optimizer_in_backward"}  # refuses who needs all gradients at once
TOGETHER = sorted(set(installed()) - ALIKE - ALONE)
ITSELF = "it saves and restores runs itself, in the place of the kit's memory"
NOT_FOR = {  # checks that a plugin is not held against, with the reason
    "accmt": {"documentation": "its options are ACCMT's arguments, which its README has in a table with their tests"},
    "checkpoint": {"state": ITSELF, "resume": ITSELF},
    "context_parallel": {"ranks": "the tiny module has no sequences; its own tests train on ranks"},
    "deepspeed": {"ranks": "its SDK is in the environment of `nox -s deepspeed`, whose tests train on ranks"},
    "expert_parallel": {"ranks": "the tiny module has no experts; its own tests train on ranks"},
    "oom": {"ranks": "it refuses several ranks, and says why"},
    "optimizer_in_backward": {
        "resume": "it refuses windows of several micro-batches, within which the kit cuts; its own tests resume",
        "ranks": "it refuses ranks of which each averages gradients behind backward; its own tests train with fsdp",
        **dict.fromkeys(("order", "gates", "errors"), "it refuses who may refuse a step, as the kit does"),
    },
    "pipeline": {"ranks": "the tiny module has no blocks between which it could be cut; its own tests train on ranks"},
    "tp": {"ranks": "the tiny module has no layers that it could split; its own tests train on ranks"},
}
QUICK = {name for name, one in CHECKS.items() if one.quick}
SLOW = ("aim", "clearml", "comet", "dvclive", "mlflow", "wandb")  # to start their services
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(installed())]


@pytest.fixture(scope="session")
def needed(tmp_path_factory):
    """Return the options by name: MLflow takes seconds to make a store, so it has one for all runs."""
    return {**NEEDED, "mlflow": {"tracking_uri": f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"}}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be where files may be made."""
    monkeypatch.chdir(tmp_path)


def kit(name, needed, checks):
    """Do checks of the conformance kit on a first-party plugin, against its README."""
    folder = installed()[name].dist.name.removeprefix("hookline-").replace("-", "_")
    readme = (ROOT / "plugins" / folder / "README.md").read_text()
    check_plugin(load(name), checks=checks, skip=NOT_FOR.get(name), readme=readme, **needed.get(name, {}))


@pytest.mark.parametrize("name", EACH)
def test_every_installed_plugin_keeps_the_contract(name, needed, caplog):
    kit(name, needed, QUICK)
    assert "is switched off" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted(CHECKS.keys() - QUICK - {"cost"}))
@pytest.mark.parametrize("name", sorted(installed()))
def test_every_installed_plugin_keeps_the_long_checks(name, check, needed):
    kit(name, needed, [check])


def test_all_plugins_together(needed, tmp_path):
    options = {**{name: needed.get(name, {}) for name in TOGETHER}, "limits": {"train_batches": 6}}
    trainer = tiny_trainer(options, TinyModule(), runs_folder=str(tmp_path), log_every="1 steps", epochs=2)
    trainer.train()
    assert trainer.status == "finished"
    assert trainer.global_step == 6
    assert (tmp_path / "run-1" / "metrics.jsonl").exists()
    assert len(list((tmp_path / "run-1" / "checkpoints").glob("step-*"))) == 2


def test_the_order_of_the_list_changes_no_bit(needed, tmp_path):
    def trained(names, folder):
        options = {**{name: needed.get(name, {}) for name in names}, "accumulate": {"steps": 2}}
        trainer = tiny_trainer(options, TinyModule(), runs_folder=str(tmp_path / folder))
        trainer.train()
        return digest(trainer.module.state_dict())

    names = [name for name in TOGETHER if name != "accumulate"]
    assert trained(names, "a") == trained(names[::-1], "b")


KILLER = '''
import os, signal
from dataclasses import dataclass
from hookline import CallbackInterface, hookimpl

@dataclass(eq=False)
class Killer(CallbackInterface):
    """Kill this process in the middle of an update."""

    at: int = 0

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
'''


def test_the_same_command_with_resume_ends_with_the_same_bits(tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = [
        *(sys.executable, "-m", "hookline", "fit", str(ROOT / "examples" / "digits.yaml")),
        *("trainer.epochs=3", "plugins.checkpoint.every=10 steps", "-p", "no:progress"),
    ]

    def fit(*more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    whole = fit("trainer.run_name=whole")
    assert whole.returncode == 0, whole.stderr
    killed = fit("trainer.run_name=cut", "plugins.killer={_plugin_: killer.Killer, at: 37}")
    assert killed.returncode == -signal.SIGKILL
    resumed = fit("trainer.run_name=cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr

    ends = [tmp_path / "runs" / run / "checkpoints" / "step-000000000069" for run in ("whole-1", "cut-1")]
    for name in ("model.safetensors", "optim.safetensors", "rank-0000.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    states = [json.loads((end / "state.json").read_text()) for end in ends]
    for state in states:
        state["others"]["trainer"]["counters"]["seconds"] = None
    assert states[0] == states[1]
    shown = subprocess.run(
        [*command[:3], "runs", "show", "cut-1"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "finished" in shown.stdout
