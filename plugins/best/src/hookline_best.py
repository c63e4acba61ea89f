"""Keep the best weights in memory, and load them back when training ends."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookline import CallbackInterface, Stage, Watched, copy_state, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.best")


@dataclass(eq=False)
class Best(CallbackInterface):
    """Keep the best weights in memory, and load them back when training ends.

    After training the module, `test()` and `export_model()` have the best weights. Checkpoints have those that are
    trained, and the best beside them.
    """

    metric: str = "val_loss"
    """Metric of the evaluations; one whose name begins with "train" is one that training logs."""
    mode: str | None = None
    """Whether the smallest ("min") or the largest ("max") is the best; null: what the verb get_mode answers."""
    min_delta: Any = 0.0
    """By how much a value must be better than the best to replace it: a number, or a share of it ("1%")."""

    def __post_init__(self) -> None:
        self.on_setup()
        hidden = "get_watched_metrics" if self._watched.of_training else "on_log"
        setattr(self, hidden, None)

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._watched = Watched("best", self.metric, self.mode, self.min_delta)
        self._step: int | None = None
        self._kept: dict[str, Any] | None = None  # the best weights
        self._last: dict[str, Any] | None = None  # the last ones, where the best have replaced them
        self._trains = False

    @hookimpl(wrapper=True)
    def run(self, trainer: Trainer, stage: Stage) -> Generator[None, bool, bool]:
        """Load the best weights also where nothing was left to train."""
        self._trains = False
        answer = yield
        if stage is Stage.TRAIN and not self._trains and self._last is None:
            self._load_best(trainer)
        return answer

    @hookimpl(wrapper=True)
    def restore(self, trainer: Trainer, stage: Stage) -> Generator[None, bool, bool]:
        """Evaluate the best weights of a state, not the last."""
        restored = yield
        if stage is not Stage.TRAIN:
            self._load_best(trainer)
        return restored

    @hookimpl(tryfirst=True)
    def on_begin_train(self, trainer: Trainer) -> None:
        """Go on with the last weights, where this trainer has trained before.

        Raises:
            ValueError: nobody knows which value of the metric is the best.
        """
        self._trains = True
        self._watched.begin(trainer)
        if self._last is not None:
            load(trainer, self._last)
            self._last = None

    @hookimpl(wrapper=True)
    def get_watched_metrics(self) -> Generator[None, dict[str, str], dict[str, str]]:
        return (yield) | self._watched.wanted()

    @hookimpl
    def on_log(self, metrics: Mapping[str, float]) -> None:
        self._watched.hear(metrics)

    @hookimpl
    def on_boundary(self, trainer: Trainer, global_step: int) -> None:
        value = self._watched.take(trainer)
        if value is not None and self._watched.improves(value):
            self._step, self._kept = global_step, weights_of(trainer)

    @hookimpl(tryfirst=True)
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Load the best weights before others use them; the last checkpoint is written already."""
        if self._kept is None:
            if trainer.rank == 0:
                log.warning("best has kept no weights: no finite value of %r came after a step", self.metric)
            return
        self._last = weights_of(trainer)
        self._load_best(trainer)

    def _load_best(self, trainer: Trainer) -> None:
        if self._kept is not None:
            load(trainer, self._kept)
            if trainer.rank == 0:
                log.info("the weights are the best, of step %s: %s=%.6g", self._step, self.metric, self._watched.best)

    def get_state(self) -> dict[str, Any]:
        """Return the best value, its step and its weights."""
        return {"best": self._watched.best, "step": self._step, "kept": self._kept}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._watched.best, self._step, self._kept = state["best"], state["step"], state["kept"]
        self._last = None


def weights_of(trainer: Trainer) -> dict[str, Any]:
    """Return a copy of the weights on the host, and of the state of plugins that export others (an average)."""
    state = trainer.hook.get_run_state(trainer=trainer)
    export = next(row for row in trainer.plugins.plan() if row["hook"] == "export_model")
    plugins = {name: kept for name, kept in state["plugins"].items() if name in export["wrapped_by"]}
    return copy_state({"module": state["module"], "plugins": plugins})  # type: ignore[no-any-return]


def load(trainer: Trainer, kept: Mapping[str, Any]) -> None:
    """Load what `weights_of` returned."""
    trainer.hook.set_run_state(trainer=trainer, state={**kept, "optimizers": []}, stage=Stage.VAL)
