"""Lightning's first year: modules with `tng_dataloader`, `validation_end` and `get_save_dict`, and their trainer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

import hookline


class LightningModule(torch.nn.Module):
    """A module in the words of Lightning's first year.

    Args:
        hparams: parameters, as an argument parser gives them.
    """

    def __init__(self, hparams: Any = None) -> None:
        super().__init__()
        self.hparams = hparams
        self.current_epoch = 0
        self.global_step = 0
        """Batches trained on; within a step that of the step, from 1."""
        self.trainer: Any = None
        """Within a run its `View`."""
        self.experiment: Any = None
        self.example_input_array: Any = None
        self.on_gpu = False
        self._tng_dataloader: Any = None
        self._val_dataloader: Any = None
        self._test_dataloader: Any = None

    @property
    def tng_dataloader(self) -> Any:
        """The training loader."""
        raise NotImplementedError(f"{type(self).__name__} has no property tng_dataloader")

    @property
    def val_dataloader(self) -> Any:
        """The validation loader; None for no validation."""
        return None

    @property
    def test_dataloader(self) -> Any:
        """The test loader; None for no test."""
        return None

    @classmethod
    def load_from_metrics(cls, weights_path: Any, tags_csv: Any, *more: Any, **options: Any) -> None:
        """Refuse: such a file is a pickle, which may run code."""
        raise NotImplementedError(
            f"{cls.__name__}.load_from_metrics is not here, as reading its file could run code: make the module from "
            'your own hparams, and module.load_state_dict(hookline_checkpoint.load_foreign(path)["state_dict"])'
        )

    def freeze(self) -> None:
        """Have no parameter require gradients."""
        self.requires_grad_(False)

    def unfreeze(self) -> None:
        """Have all parameters require gradients."""
        self.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}  # a copy is with no run


def data_loader(method: Callable[[Any], Any]) -> property:
    """Make a property of a method that gives a loader; the method is called once."""
    kept = f"_lazy_{method.__name__}"

    def loader(self: Any) -> Any:
        if kept not in vars(self):
            vars(self)[kept] = method(self)
        return vars(self)[kept]

    return property(loader, doc=method.__doc__)


class View:
    """What `self.trainer` is within a run: the names of the first year; others are those of `hookline.Trainer`.

    A copy or a pickle of it is with no run.
    """

    use_dp = use_ddp2 = single_gpu = False
    """Several devices of one process are used by no plugin, so that outputs are never lists of devices."""

    def __init__(self, bridge: hookline.ModuleInterface | None = None) -> None:
        self._bridge = None if bridge is None else weakref.ref(bridge)

    def __reduce__(self) -> Any:
        return View, ()

    @property
    def bridge(self) -> Any:
        """What adapts the module; `RuntimeError` where there is no run."""
        bridge = None if self._bridge is None else self._bridge()
        if bridge is None:
            raise RuntimeError("this trainer is one of a copy of a module, or its run is no more")
        return bridge

    @property
    def core(self) -> hookline.Trainer:
        """The `hookline.Trainer` itself."""
        core: hookline.Trainer = self.bridge.trainer
        return core

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.core, name)

    @property
    def batch_nb(self) -> int:
        """Index of the newest batch of training in its epoch."""
        newest: int = self.bridge.newest
        return newest

    @property
    def global_step(self) -> int:
        """Batches trained on; within a step that of the step, from 1."""
        return self.bridge.module.global_step  # type: ignore[no-any-return]

    @property
    def current_epoch(self) -> int:
        """Index of the epoch."""
        return self.core.epoch

    @property
    def max_nb_epochs(self) -> int | None:
        """Epochs of the run."""
        return self.core.options.epochs

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches of one optimizer step."""
        return self.core.window_size

    @property
    def nb_tng_batches(self) -> int | None:
        """Batches of an epoch on this rank; None where nobody can know."""
        return self.core.totals.batches_per_epoch

    @property
    def proc_rank(self) -> int:
        """Of this process."""
        return self.core.rank  # type: ignore[no-any-return]

    @property
    def use_ddp(self) -> bool:
        """Whether there are several processes."""
        return self.core.world_size > 1  # type: ignore[no-any-return]

    data_parallel = use_ddp

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on no CPU."""
        return not self.core.on_cpu

    @property
    def lr_schedulers(self) -> list[Any]:
        """The schedulers."""
        return [one.scheduler for one in self.core.schedulers]


def is_mine(module: Any) -> bool:
    """Tell whether a module is one of the first year."""
    return hasattr(type(module), "tng_dataloader") and hasattr(type(module), "training_step")
