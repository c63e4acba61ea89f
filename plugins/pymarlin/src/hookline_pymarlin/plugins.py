"""The plugins that make up what PyMarlin's trainer does beyond those of the house."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline.files import make_folder, replacing
from hookline_pymarlin.stats import global_stats


@dataclass(eq=False)
class Pymarlin(CallbackInterface):
    """Lead PyMarlin's `global_stats` to the run that is under way, and train in train mode."""

    def __post_init__(self) -> None:
        self._last_key: str | None = None  # of the evaluation under way

    @hookimpl(tryfirst=True)
    def on_begin_run(self, trainer: hookline.Trainer, stage: Stage) -> None:
        global_stats._trainers.append(trainer)
        if stage is Stage.TRAIN:
            trainer.module.train()

    @hookimpl(wrapper=True, tryfirst=True)
    def train_epoch(self, trainer: hookline.Trainer) -> Generator[None, bool, bool]:
        trainer.module.train()  # as PyMarlin does at each epoch, whatever the modes were
        return (yield)

    @hookimpl(trylast=True)
    def on_end_train_step(self, global_step: int) -> None:
        if global_stats.scalars_short or global_stats.multi_short:
            global_stats.log_stats(global_step)

    @hookimpl
    def on_begin_evaluation(self, totals: Mapping[str, int | None]) -> None:
        self._last_key = [None, *totals][-1]

    @hookimpl(trylast=True)
    def on_end_val_epoch(self, global_step: int, key: str) -> None:  # type: ignore[override]
        if key == self._last_key:
            global_stats.log_long_stats(global_step)

    @hookimpl(trylast=True)
    def on_end_test_epoch(self, global_step: int, key: str) -> None:
        if key == self._last_key:
            global_stats.log_long_stats(global_step)

    @hookimpl(trylast=True)
    def on_end_train_epoch(self, global_step: int) -> None:
        global_stats.log_long_stats(global_step)

    @hookimpl(trylast=True)
    def on_end_train(self, global_step: int) -> None:
        global_stats.log_long_stats(global_step)

    @hookimpl(trylast=True)
    def on_end_run(self, trainer: hookline.Trainer) -> None:
        if trainer in global_stats._trainers:
            global_stats._trainers.remove(trainer)


class AutoStats(CallbackInterface):
    """Gives the stats that PyMarlin's own loop gives: `epoch` where one begins, and the `loss` of a step."""

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Give the epoch."""
        global_stats.update("epoch", epoch, frequent=True)

    def on_end_train_step(self, global_step: int, loss: torch.Tensor) -> None:
        """Give the mean loss of the micro-batches of this step, on this rank; copy it off the device if it is due."""
        if loss.numel():
            mean = loss.float().mean()
            due = global_stats.writers and global_step % global_stats.args.log_steps == 0
            global_stats.update("loss", mean.item() if due else mean, frequent=True)


@dataclass(eq=False)
class BatchSizeLimit(CallbackInterface):
    """Make as few micro-batches of a step as keep each within a limit; the batch of a step stays what it is."""

    limit: int = 512
    """Samples of one micro-batch on one rank, at most."""

    @hookimpl
    def get_window_size(self, trainer: hookline.Trainer) -> int:
        return parts_of(trainer.options.train_batch_size, trainer.shares, self.limit)


def parts_of(total: int, shares: int, limit: int) -> int:
    """Return the fewest micro-batches that a step can have on one rank.

    Raises:
        ValueError: the samples of a step do not divide equally.
    """
    if total % shares:
        raise ValueError(f"train_batch_size={total} cannot be shared equally by {shares} ranks")
    of_rank = total // shares
    return next(parts for parts in range(1, of_rank + 1) if of_rank % parts == 0 and of_rank // parts <= limit)


class KeptSeed(CallbackInterface):
    """Keeps the seed of a run in its folder, so that the script need not name it where the run goes on."""

    file = "pymarlin.json"

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        if trainer.rank == 0:
            with replacing(trainer.run_dir / self.file) as new:
                new.write_text(json.dumps({"seed": trainer.options.seed}))

    @classmethod
    def of(cls, checkpoint: str | bool) -> int | None:
        """Return the seed of the run that has a checkpoint, or whose folder it is; None if nobody knows it."""
        folders = [Path(checkpoint), *Path(checkpoint).parents[:2]] if isinstance(checkpoint, str) else []
        kept = [folder / cls.file for folder in folders if (folder / cls.file).is_file()]
        return int(json.loads(kept[0].read_text())["seed"]) if kept else None


class FreshSchedules(CallbackInterface):
    """Makes optimizers and schedules for the epochs that are left, where they begin anew in a run that goes on."""

    @hookimpl
    def setup_optimizers(self, trainer: hookline.Trainer) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        totals = trainer.totals
        epochs = totals.epochs or 1
        left = epochs - (trainer.resuming.epochs if trainer.resuming else 0)
        made = trainer.module.get_optimizers_schedulers(totals.steps_per_epoch, left if left > 0 else epochs)
        return list(made[0]), list(made[1])


@dataclass(eq=False)
class Period(CallbackInterface):
    """Save after the epochs 0, period, 2 · period and so on."""

    period: int = 1

    @hookimpl
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        if trainer.due("epoch") and (trainer.epoch - 1) % self.period == 0:
            trainer.save("epoch")


@dataclass(eq=False)
class ModelFile(CallbackInterface):
    """Save what the module's `get_state` answers when training ends."""

    path: str
    """Where to, with a place for the index of the last epoch."""

    @hookimpl(tryfirst=True)  # it is there when the user's `on_end_train` runs
    def on_end_train(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.write(trainer)

    def write(self, trainer: hookline.Trainer) -> None:
        """Save it, on rank 0."""
        if trainer.rank == 0:
            path = Path(self.path.format(trainer.epoch - 1))
            make_folder(path.parent)
            with replacing(path) as new:
                torch.save(trainer.module.get_state(), new)


class OnHost(CallbackInterface):
    """Hands the outputs of an epoch over on the CPU, as PyMarlin does."""

    @hookimpl(wrapper=True)
    def gather_outputs(self) -> Generator[None, list[Any], list[Any]]:
        return on_host((yield))  # type: ignore[no-any-return]


class WholeEpoch(CallbackInterface):
    """Hands the outputs of a training epoch over as those of all ranks, as PyMarlin's ddp does."""

    @hookimpl(tryfirst=True)
    def on_end_train_epoch(  # type: ignore[override]
        self, trainer: hookline.Trainer, train_step_collated_outputs: list[Any]
    ) -> None:
        train_step_collated_outputs[:] = gathered(trainer, train_step_collated_outputs)


def on_host(value: Any) -> Any:
    """Return outputs on the CPU."""
    if isinstance(value, list):
        return [on_host(one) for one in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def gathered(trainer: hookline.Trainer, outputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of all ranks for those of this one."""
    own = list(outputs)
    return list(trainer.hook.gather_outputs(trainer=trainer, outputs=own, stage=Stage.TRAIN, key="default"))


class Outputs(CallbackInterface):
    """Keeps the collated outputs of the last validation loader."""

    outputs: Sequence[Any] = ()

    @hookimpl
    def on_end_val_epoch(self, val_step_collated_outputs: Sequence[Any]) -> None:  # type: ignore[override]
        self.outputs = val_step_collated_outputs
