"""The contract: what a callback hears and what a module offers, in PyMarlin's words.

`CallbackInterface` has six events. Overriding one is implementing it, and it is called as
that contract calls it: positionally, with the collated outputs spread, so that
parameters may bear any name. Whatever else the loop says and asks stands in
`hookline.hookspecs`; a method that is marked `@hookimpl` answers to it by the names of its
parameters.
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

from hookline.marks import hookimpl

if TYPE_CHECKING:
    from hookline.trainer import Trainer

Loader = Iterable[Any]
"""Anything that gives batches: a `DataLoader`, a list of batches, a generator's owner."""


class Stage(enum.Enum):
    """What a step is taken for; the value is the word that hooks and log names use."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"
    PREDICT = "predict"


@functools.cache
def seed_call(function: Callable[..., Any]) -> tuple[int, bool]:
    """Tell how many outputs an override of a starred event has room for, and whether it takes `key`.

    The first two parameters are `self` and the global step. `*outputs` has room for all.
    """
    parameters = list(inspect.signature(function).parameters.values())[2:]
    takes_key = any(p.name == "key" or p.kind is p.VAR_KEYWORD for p in parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return sys.maxsize, takes_key
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.name != "key" for p in parameters), takes_key


class CallbackInterface(ABC):
    """What a plugin hears of a run. Override what you need; what you leave costs nothing.

    A plugin that only watches (a tracker, a progress bar) says `observer = True`: it then
    implements events only, an exception in one of its hooks is a warning instead of the
    end of the run, and after a few of them it is no longer called.
    """

    observer: bool = False
    requires: tuple[str, ...] = ()
    """Names of plugins that must stand before this one; they join with their defaults."""
    state_of_rank: bool = False
    """Whether each rank has a state of its own, and gets it back; else that of rank 0 is stored, and given to all."""

    # The seed's six events ------------------------------------------------------------

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Hear that an epoch of training begins, before the first forward of it.

        Args:
            global_step: optimizer steps completed.
            epoch: index of the epoch, from 0.
        """

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        """Hear that one micro-batch has been through backward.

        Args:
            global_step: optimizer steps completed, not counting the one under way.
            loss_tensor: that micro-batch's loss, not detached, divided by the size of the
                accumulation window, not scaled by mixed precision; shape ().
        """

    def on_end_train_step(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """Hear that one optimizer step is complete.

        Args:
            global_step: optimizer steps completed, this one included.
            train_step_collated_outputs: what `train_step` returned, each output collated
                over the micro-batches of the step: tensors of one element per batch become
                a vector, others are concatenated along their first dimension. Detached, on
                their own device, of this rank only. Collected only as far as the
                override has room for them.
        """

    def on_end_val_epoch(self, global_step: int, *val_step_collated_outputs: Any, key: str = "default") -> None:
        """Hear that one validation loader is through.

        Args:
            global_step: optimizer steps completed.
            val_step_collated_outputs: what `val_step` returned, collated over the loader,
                of all ranks, in the order of the data set; where a batch sampler of the user's makes
                batches, ranks' batches are interleaved sample by sample.
            key: the loader's key in the dictionary that `get_val_dataloaders` returned.
        """

    def on_end_train_epoch(self, global_step: int, *train_step_collated_outputs: Any) -> None:
        """Hear that an epoch is complete, its validation included.

        Args:
            global_step: optimizer steps completed.
            train_step_collated_outputs: as in `on_end_train_step`, over the whole epoch.
                After a resume in mid-epoch they cover what was trained since.
        """

    def on_end_train(self, global_step: int) -> None:
        """Hear that training has come to its end, by itself or because someone stopped it.

        Args:
            global_step: optimizer steps completed.
        """

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return what a resumed run needs of this object: tensors and plain Python data."""
        return {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take back what `get_state` returned. Never called with None.

        It may come before `on_begin_train`, which therefore creates only what is missing.
        """

    # The bridges: pluggy calls by name and never fills `*args` or keyword-only parameters,
    # so it is given these instead of the six above (see `PluginManager.parse_hookimpl_opts`).
    # A starred event has two, so that an override without room costs no collecting.

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
    """Return the name of a tensor as if nothing was compiled: `torch.compile(part)` puts `_orig_mod.` into it."""
    return name.replace("_orig_mod.", "")


class ModuleInterface(torch.nn.Module, CallbackInterface):
    """A model together with its data, its optimizers and its steps; itself a callback.

    The model is whatever submodules you assign, as in any `torch.nn.Module`. What is
    abstract must be written; the others may.
    """

    # Recipes --------------------------------------------------------------------------

    @abstractmethod
    def train_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Return the loss of one micro-batch, alone or as the first of several outputs.

        Called by keyword, so the parameters keep these names, in any order.

        Args:
            global_step: number of the optimizer step under way, from 1.
            batch: what the loader gave, already on `device`.
            device: where the model is.

        Returns:
            The loss, a floating-point tensor of one element with a graph, or a tuple that
            begins with it. The other outputs are collated for those who ask for them.
        """

    def val_step(
        self, global_step: int, batch: Any, device: torch.device | str | int
    ) -> torch.Tensor | tuple[Any, ...]:
        """Return what shall be collected of one validation batch; gradients are off.

        If the first output is a scalar tensor it is taken for the mean loss of the batch,
        and its mean over all samples is logged as `val_loss`.
        """
        raise NotImplementedError(self._unwritten("val_step", "get_val_dataloaders"))

    def test_step(self, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Return what shall be collected of one test batch; gradients are off."""
        raise NotImplementedError(self._unwritten("test_step", "get_test_dataloaders"))

    def predict_step(self, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Return the prediction for one batch, in any form; gradients are off.

        It is handed to `on_end_predict_step` and then forgotten.
        """
        raise NotImplementedError(self._unwritten("predict_step", "get_predict_dataloaders"))

    # Data -----------------------------------------------------------------------------

    @abstractmethod
    def get_train_dataloader(self, sampler: type, batch_size: int) -> Loader:
        """Return the training loader. Called every epoch, by keyword.

        Args:
            sampler: a `torch.utils.data.Sampler` class; `sampler(dataset)` shuffles, shares
                between ranks and resumes in mid-epoch without loading what it skips.
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
        """Return the loader of what shall be predicted, or several by key."""
        return None

    # Optimizers -----------------------------------------------------------------------

    @abstractmethod
    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int | None, epochs: int
    ) -> tuple[Iterable[torch.optim.Optimizer], Iterable[Any]]:
        """Return the optimizers and the learning-rate schedulers.

        Called once, positionally, when the model stands on its device.

        Args:
            estimated_global_steps_per_epoch: optimizer steps of one epoch, exact where the
                loader has a length; None where it has none and no limit is set.
            epochs: epochs to train.

        Returns:
            Optimizers, and schedulers. A scheduler moves after each optimizer step; a
            `ReduceLROnPlateau` after each evaluation, on `val_loss`. A pair
            `(scheduler, "step" | "epoch" | "validation")` says otherwise.
        """

    # What is already written ----------------------------------------------------------

    def forward(self, stage: Stage, global_step: int, batch: Any, device: torch.device | str | int) -> Any:
        """Take the step of `stage`. This is what the loop calls, so wrappers see every step.

        Raises:
            AttributeError: `stage` is none of `Stage`.
        """
        if stage is Stage.TRAIN:
            return self.train_step(global_step=global_step, batch=batch, device=device)
        if stage is Stage.VAL:
            return self.val_step(global_step=global_step, batch=batch, device=device)
        if stage is Stage.TEST:
            return self.test_step(global_step=global_step, batch=batch, device=device)
        if stage is Stage.PREDICT:
            return self.predict_step(global_step=global_step, batch=batch, device=device)
        raise AttributeError(f"stage must be a hookline.Stage, not {stage!r}")

    # Names are those of a module of which nothing is compiled, also where it compiles a part of itself
    # (`self.net = torch.compile(net)`), so that weights fit runs with and without.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Give the parameters by name."""
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield plain_name(name), parameter

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the buffers by name."""
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
        """The trainer that this module is with; `RuntimeError` before there is one."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} is with no trainer yet: `self.trainer` and `self.log` "
                "work once it has been given to hookline.Trainer(module)"
            )
        return trainer

    def log(self, **values: Any) -> None:
        """Log values by name; see `Trainer.log`, whose options this takes too."""
        self.trainer.log(**values)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of a module (a worker that collates, an average of weights)
        # is with no trainer.
        return {name: value for name, value in self.__dict__.items() if name != "_trainer"}

    def _unwritten(self, step: str, loaders: str) -> str:
        name = type(self).__name__
        return f"{name}.{loaders}() gave data, but {name} has no {step}(global_step, batch, device)"


def join(module: ModuleInterface, trainer: Trainer) -> None:
    """Have a module be with a trainer, which it does not keep alive."""
    module._trainer = weakref.ref(trainer)
