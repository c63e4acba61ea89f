"""Replayed steps train the bits of Python's, and what cannot be replayed says why; on a device that is not there."""

import copy
import dataclasses
import random
import sys
from pathlib import Path

import pytest
import torch
from tests.told import Told
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from hookline import CallbackInterface, hookimpl
from hookline.testing import ByClosure, Memory, TinyModule, digest, fake_cuda, tiny_trainer
from hookline_cudagraph import CudaGraph

EPOCHS, WARM = 4, 3
STEPS = 7 * EPOCHS  # the last of each epoch has a batch of another shape
QUICK = {"evaluate_every": None, "eval_when_finish": False}
RAN = []
"""The numbers of the steps whose `train_step` ran in Python; not an attribute, which would be seen to change."""


class Net(TinyModule):
    """Draws random numbers, keeps running statistics, logs and returns outputs."""

    def train_step(self, global_step, batch, device):
        RAN.append(self.trainer.global_step + 1)
        inputs, targets, _ = batch
        predictions = self.net(inputs)
        self.log(error=(predictions - targets).abs().mean(), over="epoch")
        self.trainer.log(largest=predictions.max(), reduce="max")
        return torch.nn.functional.mse_loss(predictions, targets), predictions, targets, "a text"

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
        return [optimizer], [(StepLR(optimizer, step_size=2, gamma=0.5), "epoch")]


class Rated(Net):
    """Steps by AdamW, with another rate in each step."""

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        rate = torch.tensor(0.01, device=self.trainer.device)
        optimizer = torch.optim.AdamW(self.parameters(), lr=rate, capturable=True)
        return [optimizer], [CosineAnnealingLR(optimizer, STEPS)]


class Replays(CallbackInterface):
    """Counts the replays of each CUDA graph."""

    def __init__(self):
        self.counts = {}

    @hookimpl(tryfirst=True)
    def on_begin_train(self):
        replay, counts = torch.cuda.CUDAGraph.replay, self.counts

        def counted(graph):
            counts[graph] = counts.get(graph, 0) + 1
            return replay(graph)

        torch.cuda.CUDAGraph.replay = counted


def train(module=Net, plugged=True, state=None, others=None, every=None, **options):
    """Train on the fake device; return the trainer, with what was told and the states that were kept."""
    RAN.clear()
    memory, told, replays = Memory(state=state, every=every), Told(), Replays()
    plugins = {"memory": memory, "told": told, **(others or {})}
    if plugged:
        plugins |= {"replays": replays, "cudagraph": plugged if isinstance(plugged, CudaGraph) else CudaGraph()}
    with fake_cuda() as device:
        given = {"device": "cuda", "epochs": EPOCHS, "log_every": "1 steps", **QUICK} | options
        trainer = tiny_trainer(plugins, module() if callable(module) else module, **given)
        trainer.train()
        trainer.result = result(trainer, told, device)
    trainer.states, trainer.replays, trainer.ran = memory.states, [*replays.counts.values()], [*RAN]
    return trainer


def result(trainer, told, device):
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    state = {name: value for name, value in dataclasses.asdict(trainer.counters).items() if name != "seconds"}
    random_state = digest([device.random, trainer.randomness.get_state()])
    return digest([trainer.export_model(), optimizers]), told.all, trainer.metrics, state, random_state


def warnings_in(caplog):
    return [record.message for record in caplog.records if record.message.startswith("cudagraph: ")]


# The same bits ------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Net, Rated])
def test_replayed_steps_train_and_tell_what_python_does(module, caplog):
    often = {"evaluate_every": "5 steps", "log_every": "3 steps"}
    plain, replayed = train(module, plugged=False, **often), train(module, **often)
    assert replayed.result == plain.result
    assert warnings_in(caplog) == []
    assert plain.ran == [*range(1, STEPS + 1)]
    # Warmed up, rehearsed, captured, and compared in replays 1, 2, 4, 8 and 16; the short batch comes at 7, 14, 21, 28.
    full = [1, 2, 3, 4, 4, 4, 5, 8, 12, 22]
    assert replayed.ran == sorted([*full, 7, 14, 21, 28, 28, 28])
    assert max(replayed.replays) > STEPS // 2


def test_no_python_of_the_user_runs_in_a_replayed_step():
    counted = []

    class Watch(CallbackInterface):
        @hookimpl(tryfirst=True)
        def on_begin_train_epoch(self, trainer, epoch):
            if epoch == 2:  # its first six steps are replayed, and the last is the third of its kind
                sys.setprofile(lambda frame, event, _: counted.append(frame.f_code.co_qualname))

        @hookimpl
        def on_end_train_step(self, global_step):
            if global_step == 20:
                sys.setprofile(None)

    train(others={"watch": Watch()})
    assert "Replay.forward" in counted
    assert not any("train_step" in name and "CapturedStep" not in name for name in counted if name.startswith("Net"))
    assert "Linear.forward" not in counted


class Watched(CallbackInterface):
    """Watches the device in steps 15 to 20, of which all are replayed and none is compared."""

    def __init__(self, device):
        self.device = device

    @hookimpl
    def on_end_train_step(self, global_step):
        self.device.watching = 14 <= global_step < 20


def test_a_replayed_step_waits_for_nothing():
    RAN.clear()
    with fake_cuda() as device:
        plugins = {"watched": Watched(device), "cudagraph": {}}
        tiny_trainer(plugins, Rated(), device="cuda", epochs=3, max_steps=20, log_every="1 epoch", **QUICK).train()
        assert device.waits == []
        assert RAN[-1] == 14


def test_windows_of_several_micro_batches_add_their_gradients():
    others = {"accumulate": {"steps": 3}, "clip": {"max_norm": 0.5}}  # also the second of three is compared with Python
    plain = train(plugged=False, others=others, train_batch_size=24, epochs=3)
    replayed = train(others=others, train_batch_size=24, epochs=3)
    assert replayed.result == plain.result
    assert len(replayed.ran) < len(plain.ran)


def test_a_resumed_run_ends_with_the_same_bits():
    whole = train(Rated, every="1 steps")
    for step in (2, 9):
        resumed = train(Rated, state=copy.deepcopy(whole.states[step]))
        assert resumed.result[0] == whole.result[0]
        assert resumed.result[2:] == whole.result[2:]
        assert resumed.replays


@pytest.mark.parametrize("module", [Net, Rated])
def test_a_state_that_is_put_back_in_a_run_is_trained_on(module):
    class Back(CallbackInterface):
        """Goes back once, as a plugin does that rolls back: the tensors of the optimizer are others then."""

        @hookimpl
        def on_boundary(self, trainer, global_step):
            kept = trainer.plugins.get_plugin("memory").states
            if global_step == 18 and not hasattr(self, "done"):
                self.done = trainer.hook.set_run_state(
                    trainer=trainer, state=copy.deepcopy(kept[16]), stage=trainer.stage
                )

    plain = train(module, plugged=False, others={"back": Back()}, every="8 steps")
    replayed = train(module, others={"back": Back()}, every="8 steps")
    assert replayed.result == plain.result


class Thawed(Net):
    """Trains its first layer from the third epoch on."""

    @hookimpl
    def on_begin_train_epoch(self, epoch):
        self.net[0].requires_grad_(epoch >= 2)


def test_weights_that_join_later_are_of_another_kind():
    plain, replayed = train(Thawed, plugged=False), train(Thawed)
    assert replayed.result == plain.result
    assert len(replayed.ran) < len(plain.ran)


def test_a_second_training_and_a_copy_of_the_module():
    trainer = train()
    assert "train_step" not in vars(trainer.module)
    assert "step" not in vars(trainer.optimizers[0]) or not hasattr(trainer.optimizers[0].step, "graphs")

    class Copies(CallbackInterface):
        @hookimpl
        def on_end_train(self, trainer):
            self.made = copy.copy(trainer.module.train_step)

    copies = Copies()
    train(others={"copies": copies})
    assert copies.made.__func__ is Net.train_step  # of a module that is copied, the method that was there before


# What stays Python, and why -----------------------------------------------------------


def line(mark):
    """Return the place of the line of this file that ends with a mark."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [number for number, text in enumerate(lines, 1) if text.endswith(f"# {mark}")]
    return f"{__file__}:{number} ({lines[number - 1].strip()})"


class Waiting(Net):
    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        if loss.item() > 1e9:  # waits
            raise OverflowError
        return loss, *others


class Masking(Net):
    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        return loss + others[0][others[0] > 0].sum(), *others  # masks


class Numbered(Net):
    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        return loss / (1 + global_step), *others  # numbered


class Asking(Net):
    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        return loss / (1 + self.trainer.global_step), *others


class Counting(Net):
    steps = 0

    def train_step(self, global_step, batch, device):
        self.steps += 1
        return super().train_step(global_step, batch, device)


class Listing(Net):
    def __init__(self):
        super().__init__()
        self.losses = []

    def train_step(self, global_step, batch, device):
        outputs = super().train_step(global_step, batch, device)
        self.losses.append(outputs[0].detach())
        return outputs


class Rebinding(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        self.mean = self.mean * 0.9 + loss.detach() * 0.1
        return loss + self.mean, *others


class Rolling(Net):
    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        return loss * random.random(), *others


class Hooking(Net):
    def __init__(self):
        super().__init__()
        self.net[0].register_forward_hook(lambda *_: RAN.append(0))


class Writing(Net):
    def train_step(self, global_step, batch, device):
        outputs = super().train_step(global_step, batch, device)
        self.trainer.log_object("note", "a text")
        return outputs


class Stating(Net):
    """Asks for the state of the random numbers of the device, as recomputing in backward does."""

    def train_step(self, global_step, batch, device):
        torch.cuda.get_rng_state()  # states
        return super().train_step(global_step, batch, device)


class Box:
    def __init__(self, batch):
        self.batch = batch


class Boxed(Net):
    @hookimpl(wrapper=True)
    def prepare_batch(self):
        return Box((yield))

    def train_step(self, global_step, batch, device):
        return super().train_step(global_step, batch.batch, device)

    def val_step(self, global_step, batch, device):
        return super().val_step(global_step, batch.batch, device)


class Staying(Net):
    @hookimpl(wrapper=True)
    def prepare_batch(self, batch):
        inputs, targets, _ = yield
        return inputs, targets, batch[2]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Waiting, f"it waits for the device at {line('waits')}"),
        (Masking, f"it waits for the device at {line('masks')}"),
        (Numbered, f"it reads global_step at {line('numbered')}"),
        (Counting, "it changes the attribute steps, which a replay does not"),
        (Listing, "it changes the attribute losses, which a replay does not"),
        (Rebinding, "it changes the attribute mean, which a replay does not"),
        (Rolling, "it draws random numbers of the CPU, which would be the same in each replay"),
        (Hooking, "net.0 has hooks, and Python that they run would not run"),
        (Writing, "it logs the object note"),
        (Stating, f"during CUDA graph capture) at {line('states')}"),
        (Boxed, "the batch has a Box, neither tensor nor number nor text"),
        (Staying, "a tensor of the batch is on cpu"),
        (Asking, "in step 5 a replay has another value of output 0 and"),
    ],
)
def test_a_step_that_cannot_be_replayed_runs_in_python_and_says_why(module, reason, caplog):
    plain = train(module, plugged=False, epochs=2)
    caplog.clear()
    ours = train(module, epochs=2)
    assert ours.result == plain.result
    (told,) = [text for text in warnings_in(caplog) if "train_step" in text]
    assert told.startswith("cudagraph: train_step is not captured: ")
    assert reason in told
    assert {*ours.ran} >= {*range(1, 15)}


def with_optimizer(make):
    class Optimized(Net):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            return make(self.parameters())

    return Optimized


def stepped_down(weights):
    optimizer = torch.optim.SGD(weights, 0.01)
    return [optimizer], [CosineAnnealingLR(optimizer, STEPS)]


class Own(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda weights: torch.optim.Adam(weights), "Adam.step is not captured: it computes numbers in Python;"),
        (lambda weights: torch.optim.Adagrad(weights), "Adagrad.step is not captured: torch cannot capture it"),
        (lambda weights: Own(weights, 0.01), "Own.step is not captured: it is none of torch's optimizers"),
        (stepped_down, "SGD.step is not captured so far: lr of group 0 changes from step to step; a rate may be a"),
        (
            lambda weights: torch.optim.SGD(weights, torch.tensor(0.01, device="cuda")),
            "SGD.step is not captured: it asks the device for lr, which is a tensor",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_replayed_steps_in_python_and_says_why(make, reason, caplog):
    plain = train(with_optimizer(make), plugged=False, epochs=3)
    caplog.clear()
    ours = train(with_optimizer(make), epochs=3)
    assert ours.result == plain.result
    (told,) = warnings_in(caplog)
    assert told.startswith(f"cudagraph: {reason}")
    assert len(ours.ran) < len(plain.ran)  # train_step is replayed all the same


def test_the_hooks_of_an_optimizer_run_in_each_step():
    steps = []

    class Hooked(Net):
        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            optimizers, schedulers = super().get_optimizers_schedulers(estimated_global_steps_per_epoch, epochs)
            optimizers[0].register_step_pre_hook(lambda *_: steps.append("before"))
            optimizers[0].register_step_post_hook(lambda *_: steps.append("after"))
            return optimizers, schedulers

    trainer = train(Hooked, epochs=2)
    assert steps == ["before", "after"] * 14
    assert len(trainer.replays) == 3  # forward, backward and the optimizer's


class Closing(ByClosure, Net):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)], []


def test_an_optimizer_with_a_closure_runs_it_in_python(caplog):
    plain = train(Closing, plugged=False, epochs=1)
    caplog.clear()
    assert train(Closing, epochs=1).result == plain.result
    assert warnings_in(caplog) == ["cudagraph: LBFGS.step is not captured: torch cannot capture it"]


def test_without_cuda_it_does_nothing_and_says_so(caplog):
    plain, ours = TinyModule(), TinyModule()
    tiny_trainer([], plain).train()
    tiny_trainer([CudaGraph()], ours).train()
    assert digest(ours.state_dict()) == digest(plain.state_dict())
    assert warnings_in(caplog) == ["cudagraph: nothing is captured: the run is on cpu, and graphs are CUDA's"]


def test_kinds_beyond_the_limit_run_in_python(caplog):
    plain = train(plugged=False)
    ours = train(plugged=CudaGraph(kinds=1))
    assert ours.result == plain.result
    (told,) = warnings_in(caplog)
    assert told.startswith("cudagraph: steps of more than cudagraph.kinds=1 kinds come often")
    assert ours.ran.count(28) == 1  # the fourth short batch
    assert len(ours.ran) < len(plain.ran)


def test_a_run_of_which_nothing_was_captured_says_so(caplog):
    train(epochs=1, max_steps=3)
    assert warnings_in(caplog) == [
        "cudagraph: no step was captured: none of its kind came more than 3 times (shapes, values in the batch "
        "that are no tensors), or nobody called train_step with gradients"
    ]


# Frozen numbers -----------------------------------------------------------------------


class Late(Net):
    """Takes another loss from its twentieth step on, by a number that only Python knows."""

    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        return loss * (2.0 if self.trainer.global_step >= 19 else 1.0), *others


def test_a_number_that_freezes_later_ends_the_run_at_the_next_comparison():
    message = (
        r"cudagraph: steps after step 12 may have been trained wrongly, and train_step must not be captured: in step "
        r"22 a replay has another value of output 0 and \d+ more than Python: a number that Python computes.*Begin "
        r"from a state before, with `plugins.cudagraph: null`"
    )
    with pytest.raises(ValueError, match=message):
        train(Late)


class LoggingItsRate(Net):
    def train_step(self, global_step, batch, device):
        self.log(progress=self.trainer.global_step / STEPS)
        return super().train_step(global_step, batch, device)


def test_a_logged_number_that_freezes_is_seen(caplog):
    plain = train(LoggingItsRate, plugged=False, epochs=1)
    assert train(LoggingItsRate, epochs=1).result == plain.result
    (told,) = warnings_in(caplog)
    assert "in step 5 a replay has another value of the logged progress" in told


# Backward -----------------------------------------------------------------------------


class Twice(Net):
    """Wants the gradients of two forward passes at once."""

    def __init__(self):
        super().__init__()
        del self.net[1]  # the batch norm, which two passes would change

    @hookimpl
    def run_window(self, trainer, window):
        batch = trainer.hook.prepare_batch(trainer=trainer, batch=window[0], stage=trainer.stage)
        first, second = [trainer.hook.call_model(trainer=trainer, batch=batch, stage=trainer.stage) for _ in range(2)]
        (first[0] + second[0]).backward()
        return [first]


class Others(Net):
    """Trains by an output that is not the loss."""

    @hookimpl(wrapper=True)
    def call_model(self, stage):
        outputs = yield
        return (outputs[0] + outputs[1].mean(), *outputs[1:]) if stage.value == "train" else outputs


class Again(Net):
    @hookimpl
    def run_backward(self, loss):
        loss.backward(retain_graph=True)
        loss.backward()
        return True


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Twice, r"the memory of this backward pass is overwritten: train_step was called again, or backward has run"),
        (Again, r"the memory of this backward pass is overwritten: train_step was called again, or backward has run"),
        (Others, r"captures the backward pass of the loss alone, and somebody wants the gradient of another output"),
    ],
)
def test_gradients_that_replays_do_not_have_are_an_error(module, message):
    with pytest.raises(RuntimeError, match=f"cudagraph:? {message}"):
        train(module)


class Copying(Net):
    """Copies from memory that is not pinned, without waiting: only a capture refuses that."""

    def train_step(self, global_step, batch, device):
        loss, *others = super().train_step(global_step, batch, device)
        return loss * torch.ones(1).to(device, non_blocking=True).sum(), *others


def test_what_only_a_capture_refuses_ends_the_run_with_advice():
    with pytest.raises(RuntimeError, match="operation failed due to a previous error during capture") as raised:
        train(Copying)
    assert "train without it (`plugins.cudagraph: null`)" in raised.value.__notes__[0]
    assert "not pinned" in str(raised.value.__cause__)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"cudagraph\.warmup=2 must be at least 3"):
        CudaGraph(warmup=2)
    with pytest.raises(ValueError, match=r"cudagraph\.kinds=0 must be at least 1"):
        CudaGraph(kinds=0)


# On a device --------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("module", [Net, Rated])
def test_on_a_device_replayed_steps_train_what_python_does(module, caplog):
    found = []
    for plugins in ({}, {"cudagraph": {}}):
        trainer = tiny_trainer(plugins, module(), device="cuda", epochs=EPOCHS)
        trainer.train()
        found.append({name: value.cpu() for name, value in trainer.export_model().items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert warnings_in(caplog) == []
