"""PyMarlin's trainer: a translation of its arguments to options and plugins."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

import hookline
from hookline import ModuleInterface, Stage
from hookline_pymarlin.arguments import DefaultCheckpointerArguments, TrainerArguments
from hookline_pymarlin.backends import TrainerBackend, known_backend, refuse_alone
from hookline_pymarlin.checkpointer import AbstractCheckpointer, Checkpointed, DefaultCheckpointer
from hookline_pymarlin.overridden import OwnEpoch, OwnValidation, refuse_overrides, takes_outputs, validate_within
from hookline_pymarlin.plugins import AutoStats, KeptSeed, ModelFile, OnHost, Outputs, Pymarlin, WholeEpoch, parts_of
from hookline_pymarlin.ranks import DistributedTrainingArguments, rank_zero_only
from hookline_pymarlin.stats import BasicStats, global_stats


class Trainer:
    """Trains and validates a PyMarlin module.

    A subclass may override `train`, `validate` and `train_epoch`, which the run then calls.

    Args:
        module: a `ModuleInterface`, which is the core's own contract.
        args: what to do.
        trainer_backend: SingleProcess(), SingleProcessAmp() or DDPTrainerBackend(…), or the name of one, in place of
            `args.backend`.
        checkpointer: one of the user's own, or a `DefaultCheckpointer`, in place of `args.checkpointer_args`.

    Raises:
        ValueError, TypeError: what cannot be done.
    """

    _seen_seed = 0  # torch's, when one of these was last at work; runs set it, too

    def __init__(
        self,
        module: ModuleInterface,
        args: TrainerArguments,
        trainer_backend: TrainerBackend | str | None = None,
        checkpointer: AbstractCheckpointer | None = None,
    ) -> None:
        refuse_overrides(type(self), Trainer)
        self.args = args
        backend = self.trainer_backend = known_backend(args.backend if trainer_backend is None else trainer_backend)
        if trainer_backend is not None:
            args = replace(args, backend=backend.name)
        refuse_alone(args.backend)
        backend.trainer = self
        self.checkpointer = checkpointer or DefaultCheckpointer(args.checkpointer_args)
        self.logger = logging.getLogger("hookline.pymarlin")
        self._bases: dict[str, Callable[[], Any]] = {}  # what a method of a subclass calls by `super()`
        writers, own = args.own_writers(), Checkpointed(checkpointer) if checkpointer else None
        resume = False if own else args.checkpointer_args.resume()
        kept = own.seed if own else KeptSeed.of(resume)
        self.core = hookline.Trainer(module, self._plugins(module, args, own), **args.options(kept), resume=resume)
        self.module = self.core.module
        self.args.distributed_training_args = ranks = DistributedTrainingArguments()
        ranks.local_rank, ranks.global_rank, ranks.world_size = (
            self.core.local_rank, self.core.rank, self.core.world_size
        )  # fmt: skip
        rank_zero_only.rank = self.core.rank
        self._asked = contents(self.args)
        Trainer._seen_seed = torch.initial_seed()
        if self.is_main_process:
            global_stats.rebuild(args.stats_args, writers)
            global_stats.writer_args = args.writer_args
            if checkpointer is None and args.checkpointer_args.checkpoint:
                self._say_where(args.checkpointer_args)

    def _say_where(self, checkpoints: DefaultCheckpointerArguments) -> None:
        """Say where checkpoints are, which are not where PyMarlin has them."""
        self.logger.warning(
            "checkpoints are folders in %s/%s-<number>/checkpoints, not files %s_<epoch>.%s; "
            "Trainer(…, checkpointer=DefaultCheckpointer(checkpointer_args)) writes such files",
            checkpoints.save_dir, checkpoints.file_prefix, checkpoints.file_prefix, checkpoints.file_ext,
        )  # fmt: skip

    def _plugins(self, module: Any, args: TrainerArguments, checkpointed: Checkpointed | None) -> dict[str, Any]:
        plugins = {"pymarlin": Pymarlin(), "auto_stats": AutoStats(), **args.plugins()}
        if checkpointed is not None:
            for name in ("checkpoint", "period", "model_file"):
                plugins.pop(name, None)
            plugins["checkpoint"] = checkpointed
        if type(self).validate is not Trainer.validate:
            plugins["own_validation"] = OwnValidation(self)
        if type(self).train_epoch is not Trainer.train_epoch:
            plugins["own_epoch"] = OwnEpoch(self)
        elif takes_outputs(module):
            plugins["whole_epoch"] = WholeEpoch()
        return {**plugins, "on_host": OnHost()}

    # Runs -----------------------------------------------------------------------------

    def train(self) -> None:
        """Train."""
        self._check_unchanged()
        with self._logging():
            self.core.train()

    def validate(self) -> Sequence[Any]:
        """Validate, also from a callback; return the collated outputs of the last loader.

        In a subclass that overrides it, also the validation that is due in a run: call it as `super().validate()`.
        """
        kept = Outputs()
        self.core.plugins.register(kept, "outputs")
        try:
            if base := self._bases.get("validate"):
                base()
            elif self.core.status == "running":
                with self.within("asked", lambda: None):
                    validate_within(self.core)
            else:
                self._check_unchanged()
                with self._logging():
                    self.core.validate()
        finally:
            self.core.plugins.unregister(kept)
        return kept.outputs

    def train_epoch(self) -> Sequence[Any]:
        """Do the epoch under way of a run; return its collated outputs. For subclasses: `super().train_epoch()`.

        Raises:
            RuntimeError: no run has called it.
        """
        if "train_epoch" not in self._bases:
            raise RuntimeError("train_epoch() is called by train(), once in each epoch; call train()")
        return self._bases["train_epoch"]()  # type: ignore[no-any-return]

    @property
    def asked(self) -> bool:
        """Whether a call of `validate` is what validates now, and not the run."""
        return self.core.stage is Stage.VAL or "asked" in self._bases

    @contextlib.contextmanager
    def within(self, method: str, base: Callable[[], Any]) -> Iterator[None]:
        """Let a method of a subclass call by `super()` what the run would do without it."""
        self._bases[method] = base
        try:
            yield
        finally:
            del self._bases[method]

    def save_checkpoint(self, force: bool = False) -> None:
        """Request a checkpoint, from within a run; the boundary of the step under way saves it.

        Raises:
            RuntimeError: there is no run under way; the end of training has been saved already.
        """
        if self.core.status != "running":
            raise RuntimeError("save_checkpoint() is for callbacks of a run; the end of training is saved by itself")
        self.core.save("save_checkpoint")

    def save_model_checkpoint(self) -> None:
        """Save what the module's `get_state` answers in `model_state_save_dir`, now."""
        if self.args.checkpointer_args.checkpoint and self.args.checkpointer_args.model_state_save_dir:
            ModelFile(self.args.checkpointer_args.model_path).write(self.core)

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Have hookline log from `args.log_level` on."""
        levels = {"hookline": self.args.log_level, "hookline.checkpoint": self.args.checkpointer_args.log_level}
        before = {name: logging.getLogger(name).level for name in levels}
        try:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            yield
        finally:
            for name, number in before.items():
                logging.getLogger(name).setLevel(number)
            Trainer._seen_seed = torch.initial_seed()

    def plan(self) -> list[dict[str, Any]]:
        """Return who does what in the run behind it, as `hookline plan` shows it."""
        return self.core.plugins.plan()

    # What would be lost ---------------------------------------------------------------

    def _check_unchanged(self) -> None:
        """Refuse arguments that have changed since, and say that a seed comes too late."""
        for name, now in contents(self.args).items():
            if now != self._asked[name]:
                raise ValueError(
                    f"{name} was {self._asked[name]!r} in the arguments of Trainer(…) and is {now!r} now, which would "
                    "have no effect: make another Trainer"
                )
        if self.args.seed is None and torch.initial_seed() != self._seen_seed:
            self.logger.warning(
                "torch.manual_seed(%d) came after Trainer(…), which has taken the seed %d already: it has no effect; "
                "call it before", torch.initial_seed(), self.core.options.seed,
            )  # fmt: skip

    # Where it is ----------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.core.device

    @property
    def global_steps_finished(self) -> int:
        """The optimizer steps completed."""
        return self.core.global_step

    @property
    def total_steps_finished(self) -> int:
        """The micro-batches completed."""
        return self.core.counters.batches

    @property
    def last_epoch(self) -> int:
        """The index of the last epoch completed; -1 before the first."""
        return self.core.epoch - 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.core.rank == 0)

    @property
    def is_distributed(self) -> bool:
        """Whether there are several ranks."""
        return bool(self.core.world_size > 1)

    @property
    def pergpu_global_batch_size(self) -> int:
        """Samples of one optimizer step on one rank."""
        return self.args.train_batch_size // int(self.core.shares)

    @property
    def gradient_accumulation(self) -> int:
        """Micro-batches of one optimizer step."""
        return parts_of(self.args.train_batch_size, self.core.shares, self.args.gpu_batch_size_limit)

    @property
    def train_step_batch_size(self) -> int:
        """Samples of one micro-batch on one rank."""
        return self.pergpu_global_batch_size // self.gradient_accumulation

    @property
    def val_step_batch_size(self) -> int:
        """Samples of one validation batch on one rank."""
        return self.args.val_batch_size

    @property
    def train_sampler(self) -> type:
        """The sampler class that `get_train_dataloader` gets."""
        return self.core.hook.get_sampler(trainer=self.core, stage=Stage.TRAIN)  # type: ignore[no-any-return]

    @property
    def val_sampler(self) -> type:
        """The sampler class that `get_val_dataloaders` gets."""
        return self.core.hook.get_sampler(trainer=self.core, stage=Stage.VAL)  # type: ignore[no-any-return]

    @property
    def estimated_global_steps_per_epoch(self) -> int | None:
        """The optimizer steps of an epoch; known from the beginning of training on."""
        self._began("estimated_global_steps_per_epoch")
        return self.core.totals.steps_per_epoch

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers; made when training begins."""
        self._began("optimizers")
        return self.core.optimizers

    @property
    def schedulers(self) -> list[Any]:
        """The schedulers; made when training begins."""
        self._began("schedulers")
        return [scheduled.scheduler for scheduled in self.core.schedulers]

    @property
    def stats(self) -> BasicStats:
        """The stats of this process."""
        return global_stats

    def get_state(self) -> dict[str, Any]:
        """Return the last epoch, and the states of optimizers and schedulers."""
        return {
            "last_epoch": self.last_epoch,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Refuse: a run loads its state when it begins.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("update_state() is not here: give load_dir in checkpointer_args, or a checkpointer's load()")

    def _began(self, name: str) -> None:
        if not self.core.optimizers:
            raise RuntimeError(f"{name} is known from the beginning of training on, in callbacks and after train()")


def contents(args: Any, path: str = "") -> dict[str, Any]:
    """Return the fields of arguments by name, those of arguments within them too."""
    held: dict[str, Any] = {}
    for one in fields(args):
        value = getattr(args, one.name)
        if is_dataclass(value) and not isinstance(value, type):
            held.update(contents(value, f"{path}{one.name}."))
        else:
            held[f"{path}{one.name}"] = list(value) if isinstance(value, list) else value
    return held
