"""Figures against memory that was really taken, and reports of real errors."""

import os

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import PlainModule, TinyModule, check_plugin, digest, on_ranks, tiny_trainer
from hookline_memory import Memory

RSS = {f"memory/{phase}_rss" for phase in ("forward", "backward", "optimizer", "evaluation")}
LARGE = 0.25  # GiB


class Logs(CallbackInterface):
    """Keeps what is logged of memory."""

    observer = True

    def __init__(self):
        self.logged = {}

    @hookimpl
    def on_log(self, metrics, global_step):
        found = {name: value for name, value in metrics.items() if name.startswith("memory/")}
        if found:
            self.logged[global_step] = found


class Holds(PlainModule):
    """Holds much memory in some steps, from the forward pass to the end of the backward pass."""

    def __init__(self, steps=(1,), rank=None):
        super().__init__()
        self.steps, self.held = steps, None
        self.mine = rank is None or os.environ["RANK"] == str(rank)

    def train_step(self, global_step, batch, device):
        if global_step in self.steps and self.mine:
            self.held = torch.ones(int(LARGE * 2**28))  # of four bytes each, and written to
        return super().train_step(global_step, batch, device)

    @hookimpl
    def on_begin_optimizer_step(self):
        self.held = None


def train(*plugins, module=None, **options):
    logs = Logs()
    quiet = {"epochs": 1, "evaluate_every": None, "eval_when_finish": False, "log_every": "2 steps"}
    trainer = tiny_trainer([*plugins, logs], module, **{**quiet, **options})
    trainer.train()
    return logs.logged, trainer


def test_contract():
    check_plugin(Memory)


def test_each_phase_has_what_was_held_at_its_end_and_each_interval_its_own():
    logged, _ = train(Memory(), module=Holds(steps=(1, 5)))
    assert list(logged) == [2, 4, 6]
    for step, there in ((2, True), (4, False), (6, True)):
        figures = logged[step]
        assert set(figures) == RSS - {"memory/evaluation_rss"}
        more = {
            figures[f"memory/{phase}_rss"] - figures["memory/optimizer_rss"] > 0.9 * LARGE
            for phase in ("forward", "backward")
        }
        assert more == {there}
        assert 0.05 < figures["memory/optimizer_rss"] < 64


def test_evaluations_have_their_own_and_do_not_count_as_forward():
    class Evaluates(Holds):
        def val_step(self, global_step, batch, device):
            self.held = torch.ones(int(LARGE * 2**28))
            return super().val_step(global_step, batch, device)

    module = Evaluates(steps=())
    logged, trainer = train(Memory(), module=module, evaluate_every="2 steps")
    for figures in logged.values():
        assert set(figures) == RSS
    first = logged[2]
    assert first["memory/evaluation_rss"] - first["memory/forward_rss"] > 0.9 * LARGE
    assert not any(name.startswith("memory") for name in trainer.metrics)


def test_an_optimizer_that_runs_the_model_within_its_step():
    class Line(PlainModule):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            return [torch.optim.LBFGS(self.parameters(), max_iter=2)], []

        @hookimpl
        def update(self, trainer, window):
            def closure():
                trainer.zero_grad()
                (outputs,) = trainer.hook.run_window(trainer=trainer, window=window)
                return outputs[0]

            trainer.step(closure=closure)
            return [(torch.zeros(()),)]

    logged, _ = train(Memory(), module=Line())
    assert all(set(figures) == RSS - {"memory/evaluation_rss"} for figures in logged.values())


@pytest.mark.plugins
def test_training_is_the_same_with_it():
    def trained(*plugins):
        from hookline_accumulate import Accumulate
        from hookline_amp import Amp

        trainer = tiny_trainer([Amp(), *plugins, Accumulate(2)], TinyModule(), evaluate_every="2 steps")
        trainer.train()
        state = trainer.hook.get_run_state(trainer=trainer)
        state["trainer"]["counters"]["seconds"] = 0
        return digest(state)

    assert trained(Memory()) == trained()


class Counts(CallbackInterface):
    """Counts what ranks exchange of four numbers."""

    exchanged = 0

    @hookimpl(wrapper=True)
    def all_reduce(self, value):
        self.exchanged += value.numel() == 4
        return (yield)


def on_a_rank():
    torch.set_num_threads(1)
    counts = Counts()
    from hookline_ddp import Ddp

    logged, _ = train(Ddp(), Memory(), counts, module=Holds(steps=(1,), rank=1), log_every="3 steps")
    return logged, counts.exchanged


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_log_that_of_the_larger_and_only_when_it_is_logged():
    (first, exchanged), (second, _) = on_ranks(on_a_rank, 2)
    assert first == second
    assert list(first) == [3, 6]
    assert exchanged == 2
    assert first[3]["memory/forward_rss"] - first[6]["memory/forward_rss"] > 0.8 * LARGE


# Out of memory ------------------------------------------------------------------------


class Takes(TinyModule):
    """Takes more than there is in its third step."""

    def __init__(self, take):
        super().__init__()
        self.take = take
        self.register_buffer("table", torch.zeros(3 * 2**18))
        self.large = torch.nn.Linear(512, 512)

    def train_step(self, global_step, batch, device):
        if global_step == 3:
            self.take()
        loss, predictions = super().train_step(global_step, batch, device)
        return loss + self.large.weight.sum(), predictions


@pytest.mark.parametrize(
    ("take", "error"),
    [
        pytest.param(lambda: torch.empty(2**58), RuntimeError, id="torch"),
        pytest.param(lambda: bytearray(2**60), MemoryError, id="Python"),
        pytest.param(lambda: {}[0], KeyError, id="another error"),
    ],
)
def test_a_report_of_what_took_the_memory(take, error, tmp_path, caplog):
    trainer = tiny_trainer([Memory()], Takes(take), runs_folder=str(tmp_path))
    with pytest.raises(error):
        trainer.train()
    path = tmp_path / "run-1" / "out-of-memory-rank-0.txt"
    assert path.exists() == (error is not KeyError)
    if path.exists():
        said = [record.getMessage() for record in caplog.records if record.name == "hookline.memory"]
        assert said == [f"memory ran out; what took it stands in {path}"]
        text = path.read_text()
        lines = text.splitlines()
        assert lines[0].startswith(f"{error.__name__}: ")
        assert "rank 0, cpu, step 3" in lines
        assert any(line.split() == ["3.0", "MiB", "buffers"] for line in lines)
        assert "         3.0 MiB  buffers: table torch.float32" in lines
        assert "states of optimizers: large.weight.exp_avg torch.float32" in text
        assert "parameters: large.weight torch.float32" in text
        assert "in train_step" in text


def test_a_report_that_cannot_be_written_hides_no_error(tmp_path, caplog):
    trainer = tiny_trainer([Memory()], Takes(lambda: bytearray(2**60)), runs_folder=str(tmp_path))
    (trainer.run_dir / "out-of-memory-rank-0.txt").mkdir()
    with pytest.raises(MemoryError):
        trainer.train()
    assert any("the report of it could not be written: " in record.getMessage() for record in caplog.records)


# GPUs ---------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_phase_on_a_gpu():
    class Peaks(PlainModule):
        def train_step(self, global_step, batch, device):
            if global_step == 1:
                torch.ones(int(LARGE * 2**28), device=device)  # is let go of at once
            return super().train_step(global_step, batch, device)

    logged, _ = train(Memory(), module=Peaks(), device="cuda")
    assert logged[2]["memory/forward_peak"] - logged[2]["memory/backward_peak"] > 0.9 * LARGE
    assert logged[4]["memory/forward_peak"] < 0.1 * LARGE
