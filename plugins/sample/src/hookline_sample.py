"""Let the module generate samples while it trains, and hand them to the trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hookline import CallbackInterface, Stage, every, hookimpl, kept_rng, nearest, set_seed

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


@dataclass(eq=False)
class Sample(CallbackInterface):
    """Call a method of the module every cadence, and log what it returns: texts, images, a rollout.

    The method runs in eval mode, without gradients, under a seed of its own. Training gives the same bits without it.
    """

    method: str = "sample"
    """The name of the method of the module; it takes no arguments."""
    every: str = "eval"
    """When. "eval": within a validation, by the weights that are validated, an average's say; else at a boundary."""
    seed: int = 0
    """Of each call, so that samples of one prompt can be compared."""
    all_ranks: bool | None = None
    """Whether all ranks call the method; false: rank 0 alone; null: all if they share the weights out (fsdp, tp)."""

    def __post_init__(self) -> None:
        number, unit = every(self.every)
        self._number = int(number)
        if unit == "evaluations":
            self.on_boundary = None  # type: ignore[assignment,method-assign]
        else:
            self.on_begin_evaluation = None  # type: ignore[assignment,method-assign]

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        module = trainer.module
        if not callable(getattr(module, self.method, None)):
            own = [name for name, one in vars(type(module)).items() if callable(one) and not name.startswith("_")]
            raise ValueError(
                f"sample.method={self.method!r} is no method of {type(module).__name__}{nearest(self.method, own)}: "
                f"write `def {self.method}(self):` that returns what is to be logged, or name another"
            )
        shared = any(hasattr(weight, "full_tensor") for weight in module.parameters())
        if shared and self.all_ranks is False:
            raise ValueError(
                "sample.all_ranks=false: the ranks share the weights out, so rank 0 cannot call the model alone; leave "
                "it at null, or set it to true"
            )
        self._together = shared if self.all_ranks is None else self.all_ranks
        if shared and torch.distributed.is_available():
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(
                module, self.method
            )  # which gathers the weights; of no FSDP model it does nothing
        if not trainer.plugins.heard["on_log_object"]:
            trainer.say_once(
                "sample: nobody hears on_log_object, so the samples will be dropped; name a plugin that does, such as "
                "jsonl or tensorboard"
            )

    @hookimpl
    def on_begin_evaluation(self, trainer: Trainer, stage: Stage) -> None:
        """Sample within a validation: who has put other weights in has done it."""
        done = trainer.counters.evaluations + 1
        if trainer.stage is Stage.TRAIN and not trainer.sanity_checking and done % self._number == 0:
            self._sample(trainer)

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.due(self.every):
            self._sample(trainer)

    def _sample(self, trainer: Trainer) -> None:
        with contextlib.nullcontext() if self._together else trainer.rank_zero_first():
            if not self._together and trainer.rank != 0:
                return
            with apart(trainer, self.seed):
                try:
                    made = getattr(trainer.module, self.method)()
                except Exception as error:
                    error.add_note(
                        f"{type(trainer.module).__name__}.{self.method}() was called by the plugin sample at step "
                        f"{trainer.global_step} (every: {self.every})"
                    )
                    raise
        if trainer.rank == 0 and made is not None:
            for name, value in (made if isinstance(made, Mapping) else {"": made}).items():
                trainer.log_object(f"{self.method}/{name}" if name else self.method, value)


@contextlib.contextmanager
def apart(trainer: Trainer, seed: int) -> Iterator[None]:
    """Leave no trace within: restore modes, buffers and random states, and log no number."""
    modes = [(module, module.training) for module in trainer.module.modules()]
    with kept_rng(), trainer.idling(), torch.no_grad():
        set_seed(seed)
        trainer.module.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
