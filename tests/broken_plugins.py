"""Broken plugins, each with the check of `hookline.testing` that is meant for its fault, and one thing wrong."""

import logging
import os
import signal
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from hookline import CallbackInterface, hookimpl

BROKEN = {}
"""Plugin classes by name."""


def broken(check, **how):
    """Keep a class with the check that must catch it, and with arguments for `check_plugin`."""

    def keep(cls):
        cls._caught_by, cls._how = check, how
        BROKEN[cls.__name__] = cls
        return cls

    return keep


# contract -----------------------------------------------------------------------------


@broken("contract")
@dataclass
class ComparesByValue(CallbackInterface):
    """Cannot be told from another with the same options."""


@broken("contract")
class NoDataclass(CallbackInterface):
    """Takes options that nobody knows."""

    def __init__(self, strength=1):
        self.strength = strength


@broken("contract")
@dataclass(eq=False)
class NoDocstring(CallbackInterface):
    pass


NoDocstring.__doc__ = None


@broken("contract")
@dataclass(eq=False)
class ForgottenMark(CallbackInterface):
    """Has a hook that nobody would call."""

    def should_step(self):
        return False


@broken("contract")
@dataclass(eq=False)
class UnknownArgument(CallbackInterface):
    """Asks for what the hook does not give."""

    @hookimpl
    def on_boundary(self, loss):
        pass


@broken("contract")
@dataclass(eq=False)
class MisspeltHook(CallbackInterface):
    """Waits for an event that never comes."""

    @hookimpl
    def on_end_of_train_step(self):
        pass


@broken("contract")
@dataclass(eq=False)
class WrapperWithoutYield(CallbackInterface):
    """Wraps a verb, and never asks it."""

    @hookimpl(wrapper=True)
    def should_step(self):
        return True


@broken("contract")
@dataclass(eq=False)
class WatchingPerformer(CallbackInterface):
    """Says that it watches, and decides."""

    observer = True

    @hookimpl
    def should_step(self):
        return True


# configuration ------------------------------------------------------------------------


@broken("configuration")
@dataclass(eq=False)
class SharedList(CallbackInterface):
    """Keeps what all objects share."""

    seen = []

    @hookimpl
    def on_boundary(self, global_step):
        self.seen.append(global_step)


@broken("configuration")
@dataclass(eq=False)
class NoOption(CallbackInterface):
    """Has an option that no configuration can set."""

    strength = 0.5


@broken("configuration")
@dataclass(eq=False)
class UnknownType(CallbackInterface):
    """Has an option of a type that YAML cannot say."""

    dtype: torch.Generator = field(default_factory=torch.Generator)
    """Of what."""


# documentation ------------------------------------------------------------------------


@broken("documentation")
@dataclass(eq=False)
class Unexplained(CallbackInterface):
    """Has an option without a word."""

    momentum: float = 0.5


@broken("documentation", readme="| option | meaning |\n|---|---|\n| `strenght` | how strong |\n")
@dataclass(eq=False)
class OtherReadme(CallbackInterface):
    """Has a README of another version."""

    strength: float = 0.5
    """How strong."""


# state --------------------------------------------------------------------------------


@dataclass(eq=False)
class Counts(CallbackInterface):
    """Count steps, and keep the number as it should be; base of those that do not."""

    def __post_init__(self):
        self.count = 0

    @hookimpl
    def on_end_train_step(self, stepped):
        self.count += 1

    def get_state(self):
        return {"count": self.count}

    def update_state(self, state):
        self.count = state["count"]


@broken("state")
@dataclass(eq=False)
class ForgetsState(Counts):
    """Takes nothing back."""

    def update_state(self, state):
        pass


@broken("state")
@dataclass(eq=False)
class NoUpdateState(CallbackInterface):
    """Keeps what it cannot take back."""

    def get_state(self):
        return {"count": 1}


@broken("state")
@dataclass(eq=False)
class ForgetsOne(Counts):
    """Takes back a part."""

    def __post_init__(self):
        self.count = self.sum = 0

    @hookimpl
    def on_boundary(self, global_step):
        self.sum += global_step

    def get_state(self):
        return {"count": self.count, "sum": self.sum}


@broken("state")
@dataclass(eq=False)
class ResetsAtTheBeginning(Counts):
    """Overwrites what came back."""

    @hookimpl
    def on_begin_train(self):
        self.count = 0


@broken("state")
@dataclass(eq=False)
class ObjectInState(Counts):
    """Keeps what must be executed to be read."""

    def get_state(self):
        return {"count": self.count, "path": Path()}


@broken("state")
@dataclass(eq=False)
class NumberOfNumpy(Counts):
    """Keeps a number that a checkpoint refuses."""

    def get_state(self):
        return {"count": numpy.float64(self.count)}


@broken("state")
@dataclass(eq=False)
class TupleKeys(Counts):
    """Keeps keys that JSON does not know."""

    def get_state(self):
        return {("count", 1): self.count}

    def update_state(self, state):
        self.count = state["count", 1]


@broken("state")
@dataclass(eq=False)
class ListState(Counts):
    """Keeps values without names."""

    def get_state(self):
        return [self.count]


@broken("state")
@dataclass(eq=False)
class StateOfTraining(Counts):
    """Has a state only while it trains."""

    def __post_init__(self):
        pass

    @hookimpl
    def on_begin_train(self):
        if not hasattr(self, "count"):
            self.count = 0


@broken("state")
@dataclass(eq=False)
class SharedState(CallbackInterface):
    """Writes into what it was given."""

    def __post_init__(self):
        self.seen = []

    @hookimpl
    def on_boundary(self, global_step):
        self.seen.append(global_step)

    def get_state(self):
        return {"seen": self.seen}

    def update_state(self, state):
        self.seen = state["seen"]


@broken("state")
@dataclass(eq=False)
class SharedTensor(CallbackInterface):
    """Averages into the tensors that it was given."""

    def __post_init__(self):
        self.mean = None

    @hookimpl
    def on_end_train_step(self, trainer):
        weight = next(trainer.module.parameters()).detach()
        self.mean = weight.clone() if self.mean is None else self.mean.lerp_(weight, 0.1)

    def get_state(self):
        return {} if self.mean is None else {"mean": self.mean}

    def update_state(self, state):
        self.mean = state["mean"]


# resume -------------------------------------------------------------------------------


@broken("resume")
@dataclass(eq=False)
class CountsWithoutState(CallbackInterface):
    """Does something by a number that it does not keep."""

    def __post_init__(self):
        self.count = 0

    @hookimpl(wrapper=True)
    def scale_loss(self):
        loss = yield
        self.count += 1
        return loss * (1 + 0.1 * (self.count % 3))


@broken("resume")
@dataclass(eq=False)
class ForgetsTheWindow(CallbackInterface):
    """Weighs the micro-batches of a window by a number that it does not keep."""

    def __post_init__(self):
        self.index = 0

    @hookimpl(wrapper=True)
    def scale_loss(self):
        loss = yield
        self.index += 1
        return loss * self.index

    @hookimpl
    def on_end_optimizer_step(self):
        self.index = 0


@broken("resume")
@dataclass(eq=False)
class OwnGenerator(CallbackInterface):
    """Draws by a generator that it does not keep."""

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(1)

    @hookimpl(wrapper=True)
    def scale_loss(self):
        return (yield) * (1 + torch.rand(1, generator=self.generator)[0])


@broken("resume")
@dataclass(eq=False)
class CountsEpochsTwice(Counts):
    """Counts an epoch that goes on as another one."""

    on_end_train_step = None

    @hookimpl
    def on_begin_train_epoch(self):
        self.count += 1


# stages -------------------------------------------------------------------------------


@broken("stages")
@dataclass(eq=False)
class FailsInTests(CallbackInterface):
    """Cannot test."""

    @hookimpl
    def on_end_test_step(self):
        raise RuntimeError("no test was thought of")


@broken("stages")
@dataclass(eq=False)
class NeedsOptimizers(CallbackInterface):
    """Takes every evaluation for one of a training."""

    @hookimpl
    def on_begin_evaluation(self, trainer):
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]


@broken("stages")
@dataclass(eq=False)
class OnlyOnce(CallbackInterface):
    """Works in one run."""

    @hookimpl
    def on_begin_train(self):
        if hasattr(self, "begun"):
            raise RuntimeError("begun twice")
        self.begun = True


@broken("stages")
@dataclass(eq=False)
class EvaluationTrains(CallbackInterface):
    """Changes weights in an evaluation, and leaves them so."""

    @hookimpl
    def on_begin_evaluation(self, trainer):
        for weight in trainer.module.parameters():
            weight.detach().mul_(0.99)


@broken("stages")
@dataclass(eq=False)
class ExportsWhatWasTrained(CallbackInterface):
    """Exports what only a training makes."""

    @hookimpl
    def on_begin_train(self, trainer):
        self.weights = {name: weight.detach().clone() for name, weight in trainer.module.named_parameters()}

    @hookimpl(wrapper=True)
    def export_model(self):
        return (yield) | self.weights


@broken("stages")
@dataclass(eq=False)
class NoisyMetrics(CallbackInterface):
    """Evaluates other data each time."""

    def __post_init__(self):
        self.batches = 0

    @hookimpl(wrapper=True)
    def prepare_batch(self, stage):
        batch = yield
        self.batches += 1
        return batch if stage.value == "train" else [batch[0] + self.batches, *batch[1:]]


# clean --------------------------------------------------------------------------------


def leaving(name, doc, act):
    """Make a plugin that does something when training begins, and leaves it so."""

    def on_begin_train(self, trainer):
        act(trainer)

    body = {"on_begin_train": hookimpl(on_begin_train), "__doc__": doc, "__module__": __name__}
    return broken("clean")(dataclass(eq=False)(type(name, (CallbackInterface,), body)))


def wait_for_ever():
    threading.Event().wait(60)


leaving("LeavesHook", "Leaves a hook.", lambda trainer: trainer.module.net.register_forward_hook(lambda *_: None))
leaving("LeavesThread", "Leaves a thread.", lambda _: threading.Thread(target=wait_for_ever, daemon=True).start())
leaving("LeavesHandler", "Leaves a handler.", lambda _: logging.getLogger().addHandler(logging.NullHandler()))
leaving("LeavesFilter", "Leaves a filter.", lambda _: warnings.simplefilter("ignore", ImportWarning))
leaving("LeavesSignal", "Leaves a handler.", lambda _: signal.signal(signal.SIGUSR1, lambda *_: None))
leaving("LeavesVariable", "Leaves a variable.", lambda _: os.environ.update(HOOKLINE_LEFT=str(len(os.environ))))
leaving("LeavesSwitch", "Leaves a switch.", lambda _: torch.set_float32_matmul_precision("medium"))
leaving("LeavesFile", "Writes into the working folder.", lambda _: Path("notes.txt").write_text("here"))
leaving(
    "LeavesStepHook",
    "Leaves a hook on an optimizer.",
    lambda trainer: trainer.optimizers[0].register_step_post_hook(lambda *_: None),
)


@broken("clean")
@dataclass(eq=False)
class DrawsWhenMade(CallbackInterface):
    """Makes another run of the script around it."""

    def __post_init__(self):
        self.number = torch.rand(1).item()


# device -------------------------------------------------------------------------------


@broken("device")
@dataclass(eq=False)
class LooksAtLoss(CallbackInterface):
    """Waits for the device in each step."""

    @hookimpl
    def on_end_backward(self, loss_tensor):
        self.loss = loss_tensor.item()


@broken("device")
@dataclass(eq=False)
class KeepsOnCpu(CallbackInterface):
    """Takes a weight to be where it made its own tensor."""

    @hookimpl
    def on_begin_train(self, trainer):
        self.sums = [torch.zeros(weight.shape) for weight in trainer.module.parameters()]

    @hookimpl
    def on_end_train_step(self, trainer):
        for total, weight in zip(self.sums, trainer.module.parameters(), strict=True):
            total += weight.detach()


@broken("other_device")
@dataclass(eq=False)
class TakesAllElseForCpu(CallbackInterface):
    """Copies to the host what is on CUDA, and takes what is not to be there."""

    @hookimpl
    def on_end_train_step(self, trainer):
        weights = [weight.detach() for weight in trainer.module.parameters()]
        self.sums = [float((one.cpu() if one.is_cuda else one).numpy().sum()) for one in weights]


@broken("other_device")
@dataclass(eq=False)
class DrawsOnDevice(CallbackInterface):
    """Adds noise whose random numbers are of the device."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        for weight in trainer.module.parameters():
            weight.grad += torch.randn_like(weight)


# errors -------------------------------------------------------------------------------


@broken("errors")
@dataclass(eq=False)
class Swallows(CallbackInterface):
    """Takes an error in an evaluation for no metrics."""

    @hookimpl(wrapper=True)
    def evaluate(self):
        try:
            return (yield)
        except Exception:
            return {}


@broken("errors")
@dataclass(eq=False)
class Renames(CallbackInterface):
    """Tells errors of others as its own."""

    @hookimpl(wrapper=True)
    def run_backward(self):
        try:
            return (yield)
        except Exception:
            raise RuntimeError("backward failed") from None


@broken("errors")
@dataclass(eq=False)
class CleansAtTheEnd(CallbackInterface):
    """Cleans up after a run that ends well."""

    @hookimpl
    def on_begin_train(self):
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")

    @hookimpl
    def on_end_train(self):
        torch.set_float32_matmul_precision(self.before)


# observer -----------------------------------------------------------------------------


@broken("observer")
@dataclass(eq=False)
class WatcherDraws(CallbackInterface):
    """Draws from the run's random state."""

    observer = True

    @hookimpl
    def on_end_train_step(self):
        torch.rand(1)


@broken("observer")
@dataclass(eq=False)
class WatcherTouches(CallbackInterface):
    """Clears a gradient that it has looked at."""

    observer = True

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        next(trainer.module.parameters()).grad.zero_()


@broken("observer")
@dataclass(eq=False)
class WatcherFails(CallbackInterface):
    """Fails, and nobody sees."""

    observer = True

    @hookimpl
    def on_boundary(self):
        raise KeyError("loss")


@broken("observer")
@dataclass(eq=False)
class WatcherSetsOption(CallbackInterface):
    """Changes an option of the run."""

    observer = True

    @hookimpl
    def on_begin_train(self, trainer):
        trainer.options.log_every = "3 steps"


# order --------------------------------------------------------------------------------


class Clips(CallbackInterface):
    """Clip by norm: what `GrowsGradients` must not depend on."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        torch.nn.utils.clip_grad_norm_(trainer.module.parameters(), 0.1)


@broken("order", beside=[Clips])
@dataclass(eq=False)
class GrowsGradients(CallbackInterface):
    """Changes gradients in the band of those who change them."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        for weight in trainer.module.parameters():
            weight.grad.mul_(10)


@broken("order")
@dataclass(eq=False)
class SquaresTheLoss(CallbackInterface):
    """Does to the loss what does not commute with scaling it."""

    @hookimpl(wrapper=True)
    def scale_loss(self):
        return (yield) ** 2


# gates --------------------------------------------------------------------------------


@broken("gates")
@dataclass(eq=False)
class OverridesGates(CallbackInterface):
    """Asks the others, and steps whatever they say."""

    @hookimpl(wrapper=True)
    def should_step(self):
        yield
        return True


@broken("gates")
@dataclass(eq=False)
class StepsItself(CallbackInterface):
    """Makes up for an update that was refused."""

    @hookimpl(tryfirst=True)
    def on_end_optimizer_step(self, optimizers, stepped):
        if not stepped:
            for optimizer in optimizers:
                optimizer.step()


# cost ---------------------------------------------------------------------------------


@broken("cost")
@dataclass(eq=False)
class WaitsEachStep(CallbackInterface):
    """Waits for the device."""

    @hookimpl
    def on_end_backward(self, loss_tensor):
        self.last = loss_tensor.item()


@broken("cost", readme="Budget: 5 Python calls a step; no host sync.")
@dataclass(eq=False)
class Slow(CallbackInterface):
    """Calls more than it says."""

    @hookimpl
    def on_boundary(self):
        for _ in range(50):
            self.nothing()

    def nothing(self):
        pass


@broken("cost")
@dataclass(eq=False)
class TalksEachStep(CallbackInterface):
    """Has every step wait for the slowest rank."""

    @hookimpl
    def on_end_train_step(self, trainer, stepped):
        self.mean = trainer.hook.all_reduce(trainer=trainer, value=torch.ones(1), op="sum")


# ranks --------------------------------------------------------------------------------


@broken("ranks")
@dataclass(eq=False)
class NoiseOfRank(CallbackInterface):
    """Draws other noise on each rank, behind the mean of gradients."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        for weight in trainer.module.parameters():
            weight.grad.add_(torch.randn(1) * (1 + trainer.rank))


@broken("ranks")
@dataclass(eq=False)
class StateOfRank(CallbackInterface):
    """Keeps what differs by rank as if it were equal."""

    def __post_init__(self):
        self.sum = 0

    @hookimpl
    def on_end_backward(self, trainer):
        self.sum += trainer.rank

    def get_state(self):
        return {"sum": self.sum}

    def update_state(self, state):
        self.sum = state["sum"]


@broken("ranks")
@dataclass(eq=False)
class FailsElsewhere(CallbackInterface):
    """Knows rank 0 alone."""

    @hookimpl
    def on_begin_train(self, trainer):
        self.folder = {0: trainer.run_dir}[trainer.rank]


@broken("ranks")
@dataclass(eq=False)
class ReducesAlone(CallbackInterface):
    """Has rank 0 wait for nobody."""

    @hookimpl
    def on_boundary(self, trainer):
        if trainer.rank == 0:
            trainer.hook.all_reduce(trainer=trainer, value=torch.ones(1), op="sum")


@broken("ranks")
@dataclass(eq=False)
class StateTalks(CallbackInterface):
    """Has who asks for its state wait for the other ranks."""

    def get_state(self) -> dict[str, Any]:
        return {"sum": self.trainer.hook.all_reduce(trainer=self.trainer, value=torch.ones(1), op="sum")}

    def update_state(self, state):
        pass

    @hookimpl
    def on_setup(self, trainer):
        self.trainer = trainer
