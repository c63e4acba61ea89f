"""Evaluations in which each forward is one of all ranks, which may have different numbers of batches."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer


class Together(CallbackInterface):
    """Has ranks with fewer batches take part in the forwards that others have more of, where a plugin needs that."""

    def __init__(self) -> None:
        self._needed = False
        self._last: dict[str, Any] = {}  # batch of each loader of an evaluation
        self._behind: dict[str, int] = {}

    @hookimpl(wrapper=True)
    def setup_loader(self, trainer: Trainer, stage: Stage, key: str) -> Generator[None, Any, Any]:
        loader = yield
        if stage is Stage.TRAIN:
            return loader
        self._needed = trainer.hook.computes_together(trainer=trainer)
        return Remembering(loader, key, self._last) if self._needed else loader

    @hookimpl(wrapper=True, trylast=True)  # who swaps other weights in does that in the shares
    def evaluate(self, trainer: Trainer) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self._last.clear()
            if self._needed:
                trainer.hook.on_compute_apart(trainer=trainer, apart=False)

    @hookimpl(tryfirst=True)
    def on_begin_evaluation(self, trainer: Trainer, totals: Mapping[str, int | None]) -> None:
        """Find out how many batches of each loader this rank has less than another.

        Where one has none, or does not know, each rank computes by itself.
        """
        if not self._needed:
            return
        ranks = trainer.hook.all_gather(trainer=trainer, value=dict(totals))
        self._behind = {key: max(rank[key] or 0 for rank in ranks) - (own or 0) for key, own in totals.items()}
        if not all(total for rank in ranks for total in rank.values()):
            self._behind = {}
            trainer.hook.on_compute_apart(trainer=trainer, apart=True)

    @hookimpl(wrapper=True, tryfirst=True)
    def gather_outputs(self, trainer: Trainer, stage: Stage, key: str) -> Generator[None, list[Any], list[Any]]:
        self._keep_up(trainer, stage, key)
        return (yield)

    @hookimpl(tryfirst=True)
    def on_end_predict_epoch(self, trainer: Trainer, key: str) -> None:
        self._keep_up(trainer, Stage.PREDICT, key)

    def _keep_up(self, trainer: Trainer, stage: Stage, key: str) -> None:
        """Take part in the forwards that other ranks have more of: with the last batch again, which counts nowhere."""
        for _ in range(self._behind.pop(key, 0)):
            with trainer.idling():
                batch = trainer.hook.prepare_batch(trainer=trainer, batch=self._last[key], stage=stage)
                trainer.hook.call_model(trainer=trainer, batch=batch, stage=stage)


class Remembering:
    """A loader that leaves its last batch behind, by its key."""

    def __init__(self, loader: Any, key: str, last: dict[str, Any]) -> None:
        self.loader, self.key, self.last = loader, key, last

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            self.last[self.key] = batch
            yield batch
