"""The contract: the events of a callback and the methods of a module, in PyMarlin's words.

`CallbackInterface` has six events. To implement one, override it: the trainer calls it by position, with the
collated outputs as separate arguments, so its parameters may have any names. `hookline.hookspecs` has all other
hooks; a method marked `@hookimpl` implements the hook of its name and gets arguments by name.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hookline.forwards import beside
from hookline.marks import hookimpl

if TYPE_CHECKING:
    from hookline.trainer import Trainer

Loader = Iterable[Any]
"""Anything that yields batches: a `DataLoader`, a list of batches, any iterable."""


class Stage(enum.Enum):
    """What a step is for; hooks and log names use the value."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"
    PREDICT = "predict"


@functools.cache
def seed_call(function: Callable[..., Any]) -> tuple[int, bool]:
    """Return how many outputs an override of a starred event takes, and whether it takes `key`.

    The first two parameters are `self` and the global step. `*outputs` takes all.
    """
    parameters = list(inspect.signature(function).parameters.values())[2:]
    takes_key = any(p.name == "key" or p.kind is p.VAR_KEYWORD for p in parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return sys.maxsize, takes_key
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.name != "key" for p in parameters), takes_key


class CallbackInterface(ABC):
    """The base class of plugins. Override what you need; what you leave out costs nothing.

    A plugin that only watches (a tracker, a progress bar) sets `observer = True`. It may then implement only events.
    An exception in one of its hooks is a warning and does not end the run; after three in a row the trainer no longer
    calls that hook.
    """

    observer: bool = False
    requires: tuple[str, ...] = ()
    """Names of plugins that must come before this one; missing ones join with their defaults."""
    state_of_rank: bool = False
    """Whether each rank saves and gets its own state; else rank 0's is saved, and every rank gets it."""

    # The seed's six events ------------------------------------------------------------

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Run when an epoch of training begins, before its first forward pass.

        Args:
            global_step: completed optimizer steps.
            epoch: index of the epoch, from 0.
        """

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        """Run after the backward pass of a micro-batch.

        Args:
            global_step: completed optimizer steps, without the one under way.
            loss_tensor: the loss of the micro-batch, not detached, divided by the size of the
                accumulation window, not scaled by mixed precision; shape ().
        """

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """Run when one optimizer step is complete.

        Args:
            global_step: completed optimizer steps, including this one.
            train_step_collated_outputs: what `train_step` returned, each output collated over the
                micro-batches of the step: tensors of shape () become a vector, others are concatenated
                along their first dimension, values that are no tensors become a list. If a step has
                one micro-batch, a tensor of shape () stays one: the loss is then a number. Detached,
                on their own device, of this rank only. The trainer collects only as many outputs as
                the override takes.
        """

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Run when the evaluation of one validation loader is complete.

        Args:
            global_step: completed optimizer steps.
            val_step_collated_outputs: what `val_step` returned, collated over the loader and over all
                ranks, in the order of the data set. With a batch sampler of your own, the batches of
                the ranks are interleaved sample by sample.
            key: the loader's key in the dictionary that `get_val_dataloaders` returned.
        """

    def on_end_train_epoch(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """Run when an epoch and its validation are complete.

        Args:
            global_step: completed optimizer steps.
            train_step_collated_outputs: as in `on_end_train_step`, over the whole epoch, so tensors of
                shape () become a vector, even of one element. After a resume in mid-epoch they cover
                only the part since the resume.
        """

    def on_end_train(self, global_step: int) -> None:
        """Run when training is over, also after a stop.

        Args:
            global_step: completed optimizer steps.
        """

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs of this object: tensors and plain Python data."""
        return {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Load what `get_state` returned. Never called with None.

        It may come before `on_begin_train`, which therefore creates only what is missing.
        """

    # The bridges: pluggy calls by name and never fills `*args` or keyword-only parameters, so it
    # gets these instead of the six events above (see `PluginManager.parse_hookimpl_opts`).
    # A starred event has two, so that an override that takes no outputs costs no collecting.

    @hookimpl(specname="on_begin_train_epoch")
    def _call_on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        self.on_begin_train_epoch(global_step, epoch)

    @hookimpl(specname="on_end_backward")
    def _call_on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        self.on_end_backward(global_step, loss_tensor)

    @hookimpl(specname="on_end_train")
    def _call_on_end_train(self, global_step: int) -> None:
        self.on_end_train(global_step)

    @hookimpl(specname="on_end_train_step")
    def _call_on_end_train_step(self, global_step: int) -> None:
        self.on_end_train_step(global_step)

    @hookimpl(specname="on_end_train_step")
    def _spread_on_end_train_step(self, global_step: int, train_step_collated_outputs: Sequence[Any]) -> None:
        room, _ = seed_call(type(self).on_end_train_step)
        self.on_end_train_step(global_step, *train_step_collated_outputs[:room])

    @hookimpl(specname="on_end_train_epoch")
    def _call_on_end_train_epoch(self, global_step: int) -> None:
        self.on_end_train_epoch(global_step)

    @hookimpl(specname="on_end_train_epoch")
    def _spread_on_end_train_epoch(self, global_step: int, train_step_collated_outputs: Sequence[Any]) -> None:
        room, _ = seed_call(type(self).on_end_train_epoch)
        self.on_end_train_epoch(global_step, *train_step_collated_outputs[:room])

    @hookimpl(specname="on_end_val_epoch")
    def _call_on_end_val_epoch(self, global_step: int, key: str) -> None:
        self._spread_on_end_val_epoch(global_step, (), key)

    @hookimpl(specname="on_end_val_epoch")
    def _spread_on_end_val_epoch(self, global_step: int, val_step_collated_outputs: Sequence[Any], key: str) -> None:
        room, takes_key = seed_call(type(self).on_end_val_epoch)
        keyword = {"key": key} if takes_key else {}
        self.on_end_val_epoch(global_step, *val_step_collated_outputs[:room], **keyword)


def plain_name(name: str) -> str:
    """Return the name of a tensor without the `_orig_mod.` that `torch.compile(part)` adds."""
    return name.replace("_orig_mod.", "")


class ModuleInterface(torch.nn.Module, CallbackInterface):
    """A model together with its data, its optimizers and its steps; itself a callback.

    The model consists of the submodules that you assign, as in any `torch.nn.Module`. You must implement the abstract
    methods; the others are optional.
    """

    # Recipes --------------------------------------------------------------------------

    @abstractmethod
    def train_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Return the loss of one micro-batch, alone or as the first of several outputs.

        Called by keyword: the parameters must have these names, in any order.

        Args:
            global_step: number of the optimizer step under way, from 1.
            batch: the batch of the loader, already on `device`.
            device: the device of the model.

        Returns:
            The loss, a floating-point tensor of one element with a graph, or a tuple that
            begins with it. Plugins that take the other outputs get them collated.
        """

    def val_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Return the outputs of one validation batch; gradients are off.

        If the first output is a floating-point scalar tensor, it is taken as the mean loss of the
        batch, and its mean over all samples is logged as `val_loss`.
        """
        raise NotImplementedError(self._unwritten("val_step", "get_val_dataloaders"))

    def test_step(self, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Return the outputs of one test batch; gradients are off."""
        raise NotImplementedError(self._unwritten("test_step", "get_test_dataloaders"))

    def predict_step(self, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Return the prediction for one batch, in any form; gradients are off.

        `on_end_predict_step` gets it; the trainer does not keep it.
        """
        raise NotImplementedError(self._unwritten("predict_step", "get_predict_dataloaders"))

    # Data -----------------------------------------------------------------------------

    @abstractmethod
    def get_train_dataloader(self, sampler: type, batch_size: int) -> Loader:
        """Return the training loader. Called every epoch, by keyword.

        Args:
            sampler: a `torch.utils.data.Sampler` class; `sampler(dataset)` shuffles, shards the data
                over ranks and resumes in mid-epoch without loading what it skips.
            batch_size: samples of one micro-batch on one rank.
        """

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Mapping[str, Loader] | Loader | None:
        """Return the validation loader, or several by key, or None for no validation.

        Called at every evaluation, by keyword. `sampler(dataset)` keeps the order.
        """
        return None

    def get_test_dataloaders(self, sampler: type, batch_size: int) -> Mapping[str, Loader] | Loader | None:
        """Return the test loader, or several by key."""
        return None

    def get_predict_dataloaders(self, sampler: type, batch_size: int) -> Mapping[str, Loader] | Loader | None:
        """Return the loader for prediction, or several by key."""
        return None

    # Optimizers -----------------------------------------------------------------------

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        """Return the optimizers and the learning-rate schedulers.

        Called once, by position, when the model is on its device.

        Args:
            estimated_global_steps_per_epoch: optimizer steps of one epoch, exact if the loader has a
                length; None if it has none and no limit is set.
            epochs: epochs to train.

        Returns:
            An optimizer; or an optimizer and a scheduler, each alone or several in a list; or a
            list of optimizers. A scheduler moves after each optimizer step; a
            `ReduceLROnPlateau` moves after each evaluation, by `val_loss`. A pair
            `(scheduler, "step" | "epoch" | "validation")` overrides this.

        Raises:
            ValueError: it is not written, and no plugin makes the optimizers.
        """
        raise ValueError(f"{type(self).__name__} has no get_optimizers_schedulers: write it, or name plugin optimizer")

    # What is already written ----------------------------------------------------------

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = [base for base in cls.__mro__ if base not in (ModuleInterface, torch.nn.Module)]
        found = [vars(base)["forward"] for base in bases if "forward" in vars(base)]
        if found and (forward := beside(found, ModuleInterface.forward, Stage)) is not None:
            cls.forward = forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **given: Any) -> Any:
        """Call the step of a stage; the loop calls this, so wrappers such as DDP see every step.

        The loop calls `module(stage=…, global_step=…, batch=…, device=…)`. A module may have a `forward` of its own,
        which other calls of the module reach; `forward(self, stage, global_step, batch, device)` wraps this one.

        Raises:
            AttributeError: `stage` is not a `Stage`.
        """
        given |= zip(("stage", "global_step", "batch", "device"), args, strict=False)
        stage = given.pop("stage", None)
        if stage is Stage.TRAIN:
            return self.train_step(**given)
        if stage is Stage.VAL:
            return self.val_step(**given)
        if stage is Stage.TEST:
            return self.test_step(**given)
        if stage is Stage.PREDICT:
            return self.predict_step(**given)
        name = type(self).__name__
        raise AttributeError(
            f"{name} was called, and stage must be a hookline.Stage, not {stage!r:.40}; for calls with other arguments "
            "define forward(self, x)"
        )

    # Names are those of the uncompiled module, even if it compiles a part of itself
    # (`self.net = torch.compile(net)`), so that weights fit runs with and without compilation.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters by name."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield plain_name(name), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the buffers by name."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield plain_name(name), buffer

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return parameters and buffers by name."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        if any("_orig_mod." in name for name in state):
            tensors = [(plain_name(name), tensor) for name, tensor in state.items()]
            state.clear()
            state.update(tensors)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load parameters and buffers by name."""
        compiled = any(name.endswith("_orig_mod") for name, _ in self.named_modules())
        if compiled or any("_orig_mod." in name for name in state_dict):
            own = {plain_name(name): name for name in super().state_dict()}
            state_dict = {own.get(plain_name(name), name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def get_state(self) -> dict[str, Any]:
        """Return the state dict."""
        return self.state_dict()

    def update_state(self, state: dict[str, Any]) -> None:
        """Load a state dict."""
        self.load_state_dict(state)

    _trainer: weakref.ref[Trainer] | None = None

    @property
    def trainer(self) -> Trainer:
        """The trainer of this module; `RuntimeError` before it has one."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} is with no trainer yet: `self.trainer` and `self.log` "
                "work once it has been given to hookline.Trainer(module)"
            )
        return trainer

    def log(self, **values: Any) -> None:
        """Log values by name; takes the arguments of `Trainer.log` too."""
        self.trainer.logs.log_of_module(values)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of a module (in a collating worker, or as an average of weights) has no trainer.
        return {name: value for name, value in self.__dict__.items() if name != "_trainer"}

    def _unwritten(self, step: str, loaders: str) -> str:
        name = type(self).__name__
        return f"{name}.{loaders}() gave data, but {name} has no {step}(global_step, batch, device)"


def join(module: ModuleInterface, trainer: Trainer) -> None:
    """Give a module its trainer, by a weak reference."""
    module._trainer = weakref.ref(trainer)
