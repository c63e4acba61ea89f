"""SAM has the bits of a loop by hand, counts each sample once, and keeps ranks equal."""

import math
import re

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, hookimpl
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    assert_one_model,
    count_syncs,
    digest,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_sam import Sam

LAST = 14  # steps of `tiny_trainer`
NOTHING = 1e-30  # a rho that moves no weight


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def train_by_hand(batches, window=1, rho=0.05, adaptive=False, clip=None, autocast=False):
    """Train without a framework; dropout and running statistics are of the first pass."""
    module = TinyModule()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, -(-len(batches) // window))
    statistics = module.net[1]
    torch.manual_seed(5)

    def backward(taken):
        losses = []
        for inputs, targets, _ in taken:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = torch.nn.functional.mse_loss(module.net(inputs), targets)
            (loss / len(taken) if len(taken) > 1 else loss).backward()
            losses.append(loss.item())
        return losses

    losses = []
    for begin in range(0, len(batches), window):
        taken = batches[begin : begin + window]
        drawn = torch.get_rng_state()
        losses += backward(taken)
        weights = [weight for weight in module.parameters() if weight.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        scale = rho / (norm([w.abs() * w.grad if adaptive else w.grad for w in weights]) + 1e-12)
        with torch.no_grad():
            for weight in weights:
                weight += (weight.pow(2) * weight.grad if adaptive else weight.grad) * scale
        optimizer.zero_grad()
        kept = {name: buffer.clone() for name, buffer in statistics.named_buffers()}
        torch.set_rng_state(drawn)
        backward(taken)
        with torch.no_grad():
            for name, buffer in statistics.named_buffers():
                buffer.copy_(kept[name])
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return module, losses


class OnList(TinyModule):
    """Has its batches in a list, and draws as the loop by hand does."""

    def __init__(self):
        super().__init__()
        dataset = TensorDataset(self.inputs, self.targets, torch.arange(50))
        self.batches = list(DataLoader(dataset, 8))
        self.heard = []

    def get_train_dataloader(self, sampler, batch_size):
        return self.batches

    @hookimpl
    def on_begin_train(self):
        torch.manual_seed(5)

    @hookimpl
    def on_end_train_step(self, train_step_collated_outputs):
        self.heard += train_step_collated_outputs[0].reshape(-1).tolist()


# The bits -----------------------------------------------------------------------------


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("options", "plugins", "by_hand"),
    [
        ({}, {}, {}),
        ({"rho": 0.5}, {}, {"rho": 0.5}),
        ({"rho": 1.0, "adaptive": True}, {}, {"rho": 1.0, "adaptive": True}),
        ({}, {"accumulate": {"steps": 3}}, {"window": 3}),
        ({}, {"clip": {"max_norm": 0.1}}, {"clip": 0.1}),
        ({}, {"amp": {}}, {"autocast": True}),
        (
            {},
            {"clip": {"max_norm": 0.1}, "amp": {}, "accumulate": {"steps": 2}},
            {"clip": 0.1, "autocast": True, "window": 2},
        ),
    ],
    ids=["default", "rho", "adaptive", "accumulate", "clip", "amp", "all"],
)
@pytest.mark.parametrize("first", [True, False])
def test_has_the_bits_of_a_loop_by_hand(options, plugins, by_hand, first):
    sam = {"sam": options}
    trainer = tiny_trainer({**sam, **plugins} if first else {**plugins, **sam}, OnList(), epochs=1, train_batch_size=24)
    trainer.train()
    module, losses = train_by_hand(trainer.module.batches, **by_hand)
    assert digest(trainer.module.state_dict()) == digest(module.state_dict())
    assert trainer.module.heard == losses


def test_moves_the_weights_and_puts_them_back():
    class Watching(CallbackInterface):
        def __init__(self):
            self.before, self.moved, self.stepping = [], [], []

        @hookimpl
        def on_end_backward(self, trainer):
            weights = [weight.detach().clone() for weight in trainer.module.parameters()]
            (self.moved if trainer.idle else self.before).append(weights)

        @hookimpl
        def on_begin_optimizer_step(self, trainer):
            self.stepping.append(digest(list(trainer.module.parameters())))

    watching = Watching()
    train(watching, Sam(0.3))
    assert watching.stepping == [digest(weights) for weights in watching.before]
    for moved, weights in zip(watching.moved, watching.before, strict=True):
        distance = norm([one - other for one, other in zip(moved, weights, strict=True)])
        torch.testing.assert_close(distance, torch.tensor(0.3))


# What counts --------------------------------------------------------------------------


class Counting(TinyModule):
    """Counts in every way in which a module can, and says what it logs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.steps = 0

    def train_step(self, global_step, batch, device):
        self.count += len(batch[0])
        self.steps += 1
        loss, predictions = super().train_step(global_step, batch, device)
        self.log(shown=loss)
        self.log(drawn=torch.rand(()), reduce="sum")
        return loss, predictions


class Heard(CallbackInterface):
    def __init__(self):
        self.logs, self.outputs = [], []

    @hookimpl
    def on_log(self, metrics):
        self.logs.append(dict(metrics))

    @hookimpl
    def on_end_train_step(self, train_step_collated_outputs):
        self.outputs.append(digest(train_step_collated_outputs))


@pytest.mark.plugins
@pytest.mark.parametrize("plugins", [{}, {"accumulate": {"steps": 2}}], ids=str)
def test_each_sample_counts_once(plugins):
    """A move too small to change a weight leaves the bits of a training without SAM, in all that is counted."""
    ends = []
    for sam in ({}, {"sam": {"rho": NOTHING}}):
        memory, heard = Memory(), Heard()
        options = {"log_every": "1 steps", "train_batch_size": 16}
        trainer = tiny_trainer({**sam, **plugins, "memory": memory, "heard": heard}, Counting(), **options)
        trainer.train()
        state = memory.state
        state["trainer"]["counters"]["seconds"] = 0
        ends.append((digest(state), trainer.module.steps, trainer.module.seen, heard.logs, heard.outputs))
    assert ends[0] == ends[1]


def test_a_moved_training_is_another_one():
    assert digest(train(Sam()).module.state_dict()) != digest(train().module.state_dict())


def test_waits_for_nothing():
    assert count_syncs(lambda: train(Sam())) == count_syncs(train)


# Together -----------------------------------------------------------------------------


class Spoilt(TinyModule):
    """Has a loss of NaN in one step."""

    def train_step(self, global_step, batch, device):
        loss, _ = super().train_step(global_step, batch, device)
        return loss * (math.nan if global_step == 3 else 1)


@pytest.mark.plugins
@pytest.mark.parametrize(
    "plugin", [{"finite": {"policy": "skip"}}, {"amp": {"precision": "fp16", "init_scale": 256.0}}], ids=str
)
def test_a_step_whose_gradients_are_not_finite_is_skipped(plugin):
    class Keeping(Spoilt):
        def __init__(self):
            super().__init__()
            self.kept = {}

        @hookimpl
        def on_boundary(self, global_step):
            self.kept[global_step] = digest(list(self.parameters()))

    trainer = tiny_trainer({"sam": {}, **plugin}, Keeping())
    trainer.train()
    assert trainer.counters.skipped_steps == 1
    assert trainer.module.kept[3] == trainer.module.kept[2] != trainer.module.kept[4]
    assert all(weight.isfinite().all() for weight in trainer.module.parameters())


@pytest.mark.plugins
def test_the_scale_of_fp16_does_not_change_the_move():
    class Single(PlainModule):  # the layers themselves in float32, so that only the scale is there
        def train_step(self, global_step, batch, device):
            with torch.autocast("cpu", enabled=False):
                return super().train_step(global_step, batch, device)

    plain = train(Sam(0.5), module=Single())
    scaled = tiny_trainer({"amp": {"precision": "fp16", "init_scale": 1024.0}, "sam": {"rho": 0.5}}, Single())
    scaled.train()
    torch.testing.assert_close(dict(scaled.module.state_dict()), dict(plain.module.state_dict()), rtol=1e-5, atol=1e-6)


class Weighing(TinyModule):
    """Has a loss that is a sum over weights; the weight of a batch is that of its samples."""

    @hookimpl
    def get_weight(self, batch):
        return float(batch[2].sum()) + 1


@pytest.mark.plugins
def test_weights_of_micro_batches_hold_in_both_passes():
    ends = []
    for plugins in ({}, {"sam": {"rho": NOTHING}}):
        trainer = tiny_trainer({**plugins, "accumulate": {"steps": 2}}, Weighing(), train_batch_size=16)
        trainer.train()
        ends.append(digest(trainer.module.state_dict()))
    assert ends[0] == ends[1]


# State --------------------------------------------------------------------------------


@pytest.mark.plugins
def test_a_resumed_run_ends_with_the_same_bits():
    def end(memory):
        plugins = {"sam": {}, "accumulate": {"steps": 2}, "memory": memory}
        tiny_trainer(plugins, train_batch_size=16, evaluate_every="3 steps").train()
        memory.state["trainer"]["counters"]["seconds"] = 0
        return digest(memory.state)

    whole = Memory(every="1 steps")
    expected, states = end(whole), dict(whole.states)
    assert len(states) == 8
    for step, state in states.items():
        if step < 8:
            assert end(Memory(state)) == expected, step


@pytest.mark.plugins
def test_a_stop_within_a_window_waits_for_the_step_and_the_resumed_run_has_the_same_bits():
    class Stops(TinyModule):
        stops = True

        def on_end_backward(self, global_step, loss_tensor):
            if self.stops and global_step == 2:
                self.trainer.stop("enough", "preempted", within_window=True)

    class Whole(Stops):
        stops = False

    def run(module, memory):
        trainer = tiny_trainer({"sam": {}, "accumulate": {"steps": 2}, "memory": memory}, module, train_batch_size=16)
        trainer.train()
        return trainer, digest(trainer.module.state_dict())

    memory = Memory()
    cut, _ = run(Stops(), memory)
    assert (cut.status, cut.global_step) == ("preempted", 3)
    assert "window" not in memory.state
    assert run(Whole(), Memory(memory.state))[1] == run(Whole(), Memory())[1]


@pytest.mark.plugins
def test_a_window_that_was_cut_without_it_is_completed_with_it():
    class Stops(TinyModule):
        def on_end_backward(self, global_step, loss_tensor):
            if global_step == 2:
                self.trainer.stop("enough", "preempted", within_window=True)

    memory = Memory()
    tiny_trainer({"accumulate": {"steps": 2}, "memory": memory}, Stops(dropout=0.0), train_batch_size=16).train()
    assert len(memory.state["window"]["outputs"]) == 1
    ends = []
    for sam in ({}, {"sam": {"rho": NOTHING}}):
        module = TinyModule(dropout=0.0)
        plugins = {**sam, "accumulate": {"steps": 2}, "memory": Memory(memory.state)}
        tiny_trainer(plugins, module, train_batch_size=16).train()
        ends.append(digest(module.state_dict()))
    assert ends[0] == ends[1]


# Ranks --------------------------------------------------------------------------------


@pytest.mark.plugins
def test_two_ranks_move_and_step_alike():
    """Under ddp and fsdp; the perturbation is that of the gradients of both ranks."""
    alone = train_tiny({"sam": {"rho": 0.5}, "clip": {"max_norm": 0.5}})
    for plugins in (
        {"sam": {"rho": 0.5}, "ddp": {}, "clip": {"max_norm": 0.5}},
        {"fsdp": {"wrap": ["Linear"]}, "clip": {"max_norm": 0.5}, "sam": {"rho": 0.5}, "accumulate": {"steps": 2}},
    ):
        assert_one_model(on_ranks(train_tiny, 2, plugins), alone, rtol=1e-4, atol=1e-5, rtol_of_metrics=1e-4)


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_rho_that_cannot_be(rho):
    with pytest.raises(ValueError, match=re.escape(f"sam.rho={rho} must be above 0 and finite, such as 0.05")):
        Sam(rho)


def test_refuses_sparse_gradients():
    class Looked(TinyModule):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(50, 1, sparse=True)

        def train_step(self, global_step, batch, device):
            return super().train_step(global_step, batch, device)[0] + self.table(batch[2]).mean()

        def get_optimizers_schedulers(self, steps, epochs):
            return [torch.optim.SGD(self.parameters(), 0.1)], []

    with pytest.raises(ValueError, match=r"sam takes no sparse gradients, as table\.weight has; make its layer with"):
        train(Sam(), module=Looked())


def test_refuses_gradients_that_are_nowhere():
    class Elsewhere(TinyModule):
        @hookimpl
        def run_backward(self):
            return True

    with pytest.raises(ValueError, match="sam: no weight of the optimizers has a gradient after the first pass"):
        train(Sam(), module=Elsewhere())
