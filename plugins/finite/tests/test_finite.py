import os
import subprocess
import sys

import pytest
import torch

from hookline import CallbackInterface, copy_state, hookimpl
from hookline.testing import Memory, TinyModule, check_plugin, digest, tiny_trainer
from hookline_finite import Finite


class Exploding(TinyModule):
    """Gives a bad loss at some steps."""

    def __init__(self, at=(), value=float("nan")):
        super().__init__()
        self.at, self.value = at, value

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return (loss * self.value if global_step in self.at else loss), predictions


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_contract_and_a_healthy_run_keeps_its_bits(policy):
    check_plugin(Finite, policy=policy)
    plain, watched = tiny_trainer(), tiny_trainer([Finite(policy)])
    plain.train()
    watched.train()
    assert digest(plain.module.state_dict()) == digest(watched.module.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stops_at_the_next_reading_and_names_the_step(value):
    with pytest.raises(
        FloatingPointError, match=r"of optimizer step 3 are not finite \(rank 0, now at step 5\)"
    ) as caught:
        tiny_trainer([Finite(every="5 steps")], Exploding({3}, value)).train()
    assert "on_boundary by plugin 'finite' (hookline-finite" in caught.value.__notes__[0]


def test_no_bad_state_is_ever_saved():
    memory = Memory(every="2 steps")
    with pytest.raises(FloatingPointError, match="of optimizer step 3 .*now at step 4"):
        tiny_trainer([memory, Finite()], Exploding({3})).train()
    assert list(memory.states) == [2]
    assert all(weight.isfinite().all() for weight in memory.state["module"].values())


def test_the_end_of_training_reads_the_verdict_too():
    with pytest.raises(FloatingPointError, match="of optimizer step 14 "):
        tiny_trainer([Finite()], Exploding({14})).train()


class Spoils(CallbackInterface):
    """Makes one gradient of the second step infinite."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer, optimizers):
        if trainer.global_step == 1:
            optimizers[0].param_groups[0]["params"][0].grad[0, 0] = float("inf")


def test_f2_an_infinite_gradient_without_a_scaler_is_as_bad_as_a_loss():
    with pytest.raises(FloatingPointError, match="of optimizer step 2 "):
        tiny_trainer([Finite(every="1 steps"), Spoils()]).train()
    memory = Memory(every="1 steps")
    with pytest.raises(FloatingPointError, match="of optimizer step 2 "):
        tiny_trainer([Finite(), Spoils(), memory]).train()
    assert list(memory.states) == [1]
    skipping = tiny_trainer([Finite("skip"), Spoils()])
    skipping.train()
    assert skipping.counters.skipped_steps == 1


@pytest.mark.plugins
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_f2_an_infinite_gradient_with_a_scaler_is_skipped_and_counted_by_the_scaler(policy):
    def trained(**plugins):
        amp = {"precision": "fp16", "init_scale": 2.0**20, "growth_interval": 4}
        trainer = tiny_trainer({"amp": amp, **plugins})
        trainer.train()
        return trainer

    alone, watched = trained(), trained(finite=Finite(policy, "1 steps"))
    assert 1 < alone.counters.skipped_steps < 14
    assert (watched.global_step, watched.counters.skipped_steps) == (14, alone.counters.skipped_steps)
    assert digest(watched.module.state_dict()) == digest(alone.module.state_dict())


def test_a_step_that_somebody_else_refused_does_no_harm():
    class Refuses(CallbackInterface):
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step != 2

    trainer = tiny_trainer([Finite(every="1 steps"), Refuses()], Exploding({3}))
    trainer.train()
    assert trainer.counters.skipped_steps == 1


def test_skips_and_counts():
    trainer = tiny_trainer([Finite("skip")], Exploding({3, 5, 6}))
    trainer.train()
    assert (trainer.global_step, trainer.counters.skipped_steps) == (14, 3)
    assert all(weight.isfinite().all() for weight in trainer.module.net.parameters())


def test_skips_no_more_than_so_many_in_a_row():
    with pytest.raises(
        FloatingPointError, match="of optimizer step 5, after 2 in a row that were skipped, are not finite"
    ):
        tiny_trainer([Finite("skip", max_skips=2)], Exploding({3, 4, 5})).train()
    trainer = tiny_trainer([Finite("skip", max_skips=2)], Exploding({3, 4, 6, 7}))
    trainer.train()
    assert trainer.counters.skipped_steps == 4


def test_the_count_in_a_row_survives_a_resume():
    memory = Memory(every="1 steps")
    with pytest.raises(FloatingPointError):
        tiny_trainer([memory, Finite("skip", max_skips=2)], Exploding({3, 4, 5})).train()
    with pytest.raises(FloatingPointError, match="of optimizer step 5"):
        tiny_trainer([Memory(memory.states[4]), Finite("skip", max_skips=2)], Exploding({5})).train()


class NaNInTheData(TinyModule):
    """Gives batch norm NaN to count into its running statistics, at one step."""

    def train_step(self, global_step, batch, device):
        inputs, *others = batch
        return super().train_step(global_step, (inputs * float("nan" if global_step == 3 else 1), *others), device)


def test_running_statistics_that_a_skipped_batch_has_spoilt_are_never_saved():
    memory = Memory(every="2 steps")
    words = r"the state after step 4 is not finite, .*\(rank 0: net\.1\.running_mean, net\.1\.running_var\); it was not"
    with pytest.raises(FloatingPointError, match=words):
        tiny_trainer([memory, Finite("skip")], NaNInTheData()).train()
    assert list(memory.states) == [2]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_weight_that_something_else_has_spoilt_is_never_saved(policy):
    class Breaks(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 6:
                trainer.module.net[4].bias.data.fill_(float("inf"))

    memory = Memory(every="2 steps")
    with pytest.raises(FloatingPointError, match=r"the state after step 6 is not finite, .*\(rank 0: net\.4\.bias\)"):
        tiny_trainer([memory, Finite(policy), Breaks()]).train()
    assert list(memory.states) == [2, 4]


def test_a_copy_that_is_handed_to_save_is_looked_at_in_place_of_the_module():
    trainer = tiny_trainer([memory := Memory(), Finite()])
    trainer.train()
    good, bad = (copy_state(trainer.hook.get_run_state(trainer=trainer)) for _ in range(2))
    bad["module"]["net.1.running_var"][0] = float("nan")
    bad["trainer"]["counters"]["global_step"] = 5
    with pytest.raises(FloatingPointError, match="is not finite"):
        trainer.hook.save(trainer=trainer, reason="a copy", state=bad)
    trainer.module.net[4].bias.data.fill_(float("inf"))
    assert trainer.hook.save(trainer=trainer, reason="a copy", state=good)
    assert list(memory.states) == [14]


def test_an_infinite_buffer_may_be_meant_so():
    class Masked(TinyModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
            self.register_buffer("none", torch.empty(0))
            self.register_buffer("count", torch.tensor(3))

    trainer = tiny_trainer([Memory(every="2 steps"), Finite()], Masked())
    trainer.train()
    assert trainer.status == "finished"


MODULE = """
from hookline.testing import TinyModule


class Bad(TinyModule):
    def __init__(self, value: str = "nan"):
        super().__init__()
        self.value = float(value)

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return loss * (self.value if global_step == 5 else 1), predictions
"""
CONFIG = """
module: {_target_: bad.Bad}
trainer: {epochs: 2, train_batch_size: 8, val_batch_size: 8, device: cpu}
plugins: {finite: {}, checkpoint: {every: 2 steps}}
"""


@pytest.mark.plugins
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_f1_a_bad_loss_ends_the_command_before_a_save(value, tmp_path):
    from safetensors.torch import load_file

    (tmp_path / "bad.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "hookline", "fit", "run.yaml", f"module.value={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "of optimizer step 5 are not finite (rank 0, now at step 6)" in ended.stderr
    assert "raised in save by plugin 'finite' (hookline-finite" in ended.stderr
    checkpoints = sorted((tmp_path / "runs" / "run-1" / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000000000002", "step-000000000004"]
    for name in ("model.safetensors", "optim.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoints[-1] / name).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": "ignore"}, r"finite\.policy='ignore' must be one of stop, skip, rollback"),
        ({"every": "often"}, r"finite\.every: 'often' is not a cadence"),
        ({"max_skips": -1}, r"finite\.max_skips=-1 must be at least 0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Finite(**options)


def test_stop_waits_for_nothing_on_an_ordinary_step():
    from hookline.testing import calls_per_step

    def run(steps):
        module = TinyModule(samples=8 * steps)
        options = {"epochs": 1, "evaluate_every": None, "eval_when_finish": False}
        tiny_trainer([Finite(every="99999 steps")], module, **options).train()

    plain = calls_per_step(lambda steps: tiny_trainer((), TinyModule(8 * steps), epochs=1, evaluate_every=None).train())
    assert calls_per_step(run).syncs <= plain.syncs


def test_two_optimizers_in_turn():
    class Two(TinyModule):
        def get_optimizers_schedulers(self, steps, epochs):
            first, last = self.net[0].parameters(), self.net[4].parameters()
            return [torch.optim.SGD(first, 0.01), torch.optim.SGD(last, 0.01)], []

        @hookimpl
        def update(self, trainer, window):
            for optimizer in trainer.optimizers:
                outputs = trainer.hook.run_window(trainer=trainer, window=window)
                trainer.step([optimizer])
            return outputs

    trainer = tiny_trainer([Finite(every="1 steps")], Two())
    trainer.train()
    assert trainer.global_step == 14
