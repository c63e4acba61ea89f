"""Every two plugins that change a training, in both orders, on two ranks: the order of the list changes no bit."""

import dataclasses
import itertools
import warnings

import pytest
import torch

from hookline.installed import installed, load
from hookline.plugins import build, is_observer
from hookline.testing import TinyModule, digest, run_ranks, tiny_trainer

pytestmark = pytest.mark.plugins
OPTIONS = {  # of those whose defaults would change nothing here
    "accumulate": {"steps": 2},
    "activation_checkpoint": {"wrap": ["Linear"]},
    "backend": {"deterministic": "error", "gc_every": 2},
    "checkpoint": {"every": "2 steps"},
    "clip": {"max_norm": 0.1, "max_ratio": 0.05, "log_norm": True},
    "compile": {"blocks": ["Linear"], "backend": "eager"},
    "distill": {"teacher": {"_target_": "torch.nn.Linear", "in_features": 8, "out_features": 1}, "hidden": {"4": ""}},
    "distributed": {"uneven": "pad"},
    "ema": {"decay": 0.5, "buffers": "average"},
    "export": {"to": "safetensors"},
    "finite": {"policy": "skip"},
    "freeze": {"patterns": "net.0", "unfreeze": {"2 steps": "net.0"}},
    "limits": {"train_batches": 2, "val_batches": 2},
    "lr_schedule": {"schedule": {"step": {"step_size": "2 steps", "gamma": 0.5}}, "replace": True},
    "lr_find": {"steps": 3},
    "metrics": {"val": {"error": {"_target_": "torchmetrics.MeanSquaredError"}}},
    "mix": {"mixup": 0.4},
    "monitor": {"grad_norm": True, "learning_rate": True},
    "pipeline": {"split": ["net.4"]},
    "sampling": {"kind": "length", "by": 2, "bucket": 2},
    "swa": {"begin": 0.0, "every": 1, "evaluate": True},
    "sample": {"method": "extra_repr", "every": "2 steps"},
    "tp": {"plan": {"net.4": "row from whole"}},
}


def make(name, options=None):
    """Return a plugin with these options, or with those that let it change a training."""
    return next(reversed(build({name: OPTIONS.get(name, {}) if options is None else options}).values()))


def made(names, **options):
    """Return plugins by name, some with options of their own."""
    return {name: make(name, options.get(name)) for name in names}


def changes_training(name):
    """Tell whether a plugin is none that only watches, nor one that only makes modules of what is none."""
    if is_observer(load(name)):
        return False
    plugin = make(name)
    return getattr(plugin, "adapt_module", None) is None


class Running(torch.nn.Module):
    """Takes a running mean away: of batches of any size, and another one on each rank."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().float().mean(0), 0.5)
        return x - self.mean


class Module(TinyModule):
    def __init__(self):
        super().__init__(samples=29)
        self.net[1] = Running()


def trained(plugins, folder, module=Module, ranks=2, **options):
    """Return the bits of all that a run ends with, or the words in which it was refused."""
    shares = any(hasattr(plugin, "shard_model") or hasattr(plugin, "split_model") for plugin in plugins.values())
    ddp = {"ddp": {}} if ranks > 1 and not shares else {}
    try:
        trainer = tiny_trainer(plugins | ddp, module(), **{"epochs": 1, "runs_folder": folder, **options})
        trainer.train()
    except (ValueError, RuntimeError, ImportError) as error:
        if "both perform" in str(error):
            return "they are refused together"  # in words that name the first of them first
        return f"{type(error).__name__}: {error}"
    counters = dataclasses.asdict(trainer.counters) | {"seconds": 0}
    exported, weights = trainer.export_model(), dict(trainer.module.named_parameters())
    return {
        "weights": digest({name: tensor for name, tensor in exported.items() if name in weights}),
        "buffers": digest(exported),  # an average of them is each rank's own, and that of rank 0 counts
        "optimizers": digest([here(optimizer.state_dict()["state"]) for optimizer in trainer.optimizers]),
        "metrics": trainer.metrics,
        "counters": counters,
        "random": digest(trainer.randomness.get_state()),
    }


def here(state):
    """Return a state of which this rank has a share as what it has."""
    if isinstance(state, dict):
        return {name: here(value) for name, value in state.items()}
    return state.to_local() if hasattr(state, "to_local") else state


def in_both_orders(folder, with_ddp):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = [name for name in installed() if changes_training(name)]
    names = [name for name in names if isinstance(trained(made([name]), folder), dict)]
    pairs = [pair for pair in itertools.combinations(names, 2) if ("ddp" in pair) is with_ddp]
    return {pair: (trained(made(pair), folder), trained(made(pair[::-1]), folder)) for pair in pairs}


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("with_ddp", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_order_of_two_plugins_changes_no_bit(with_ddp, tmp_path):
    outcomes = run_ranks(in_both_orders, 2, str(tmp_path), with_ddp, timeout=600)
    assert [outcome.code for outcome in outcomes] == [0, 0], "\n".join(outcome.output[-3000:] for outcome in outcomes)
    for outcome in outcomes:
        assert len(outcome.value) > 15
        for pair, (one, other) in outcome.value.items():
            assert one == other, pair
    for pair, (one, _) in outcomes[0].value.items():  # what all ranks have in common
        if isinstance(one, dict):
            other = outcomes[1].value[pair][0]
            assert (one["weights"], one["metrics"]) == (other["weights"], other["metrics"]), pair
