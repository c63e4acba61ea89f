"""What a module of today's Lightning and its callbacks hear of their run."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline_lightning.bridge import INSTEAD, LONG, Bridge, call, overridden
from hookline_lightning.events import LONG_STEPS


class Following(CallbackInterface):
    """Tells a module of today's Lightning and its callbacks of their run."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._keys: list[str] = []

    # Training -------------------------------------------------------------------------

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        self.bridge.tell_between("on_fit_start")
        self.bridge.tell_between("on_train_start")

    @hookimpl
    def on_begin_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell_between("on_train_epoch_start")

    @hookimpl(wrapper=True)
    def forward_backward(self, index: int) -> Generator[None, Any, Any]:
        self.bridge.index = index
        return (yield)

    @hookimpl(wrapper=True)
    def should_step(self) -> Generator[None, bool, bool]:
        return (yield) and not self.bridge.skipped

    @hookimpl(wrapper=True, tryfirst=True)
    def step_schedulers(self, when: str) -> Generator[None, bool, bool]:
        if when == "epoch":  # the last moment at which values of this epoch can be logged
            self.bridge.tell_between("on_train_epoch_end")
            self.bridge.log_epoch_metrics()
        return (yield)

    @hookimpl
    def on_end_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell_between("on_train_epoch_end late")

    @hookimpl
    def on_end_train(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell_between("on_train_end")
        self.bridge.tell_between("on_fit_end")

    # Evaluation -----------------------------------------------------------------------

    @hookimpl
    def on_begin_evaluation(self, trainer: hookline.Trainer, totals: Mapping[str, int | None]) -> None:
        self._keys = list(totals)
        if trainer.sanity_checking:
            self.bridge.tell("on_sanity_check_start")

    @hookimpl(wrapper=True)
    def evaluate(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, dict[str, float], dict[str, float]]:
        bridge = self.bridge
        metrics = yield
        word = LONG[stage]
        if not trainer.sanity_checking:
            self._take(bridge.view.values, metrics)
        if f"on_{word}_end" in bridge.listeners:
            with trainer.evaluation.under_way(stage):
                bridge.tell_known(f"on_{word}_end")
        if trainer.sanity_checking:
            bridge.tell("on_sanity_check_end")
        return metrics

    @hookimpl
    def on_begin_val_epoch(self, key: str) -> None:
        self._begin("validation", key)

    @hookimpl
    def on_begin_test_epoch(self, key: str) -> None:
        self._begin("test", key)

    @hookimpl
    def on_begin_predict_epoch(self, key: str) -> None:
        self._begin("predict", key)

    def _begin(self, word: str, key: str) -> None:
        bridge = self.bridge
        bridge.batch_idx, bridge.loader_idx = 0, self._keys.index(key)
        if bridge.loader_idx == 0:
            self._of_all(f"on_{word}_start")
            self._of_all(f"on_{word}_epoch_start")

    def _of_all(self, event: str) -> None:
        """Tell an event that is of all loaders: what is logged in it has no loader's key."""
        with self.bridge.trainer.logs.suffixed(""):
            self.bridge.tell(event)

    @hookimpl
    def on_end_val_step(self, outputs: Any, batch: Any, index: int) -> None:
        self._end_batch("validation", outputs[0].value, batch, index)

    @hookimpl
    def on_end_test_step(self, outputs: Any, batch: Any, index: int) -> None:
        self._end_batch("test", outputs[0].value, batch, index)

    @hookimpl
    def on_end_predict_step(self, outputs: Any, batch: Any, index: int) -> None:
        self._end_batch("predict", outputs, batch, index)

    def _end_batch(self, word: str, outputs: Any, batch: Any, index: int) -> None:
        self.bridge.tell(f"on_{word}_batch_end", outputs, batch, index, self.bridge.loader_idx)

    @hookimpl
    def on_end_val_epoch(self, key: str) -> None:  # type: ignore[override]
        self._end("validation", key)

    @hookimpl
    def on_end_test_epoch(self, key: str) -> None:
        self._end("test", key)

    @hookimpl
    def on_end_predict_epoch(self, key: str) -> None:
        self._end("predict", key)

    def _end(self, word: str, key: str) -> None:
        self.bridge.log_epoch_metrics()
        if key == self._keys[-1]:
            self._of_all(f"on_{word}_epoch_end")
            with self.bridge.trainer.logs.suffixed(""):
                self.bridge.log_epoch_metrics()

    # Values ---------------------------------------------------------------------------

    @hookimpl
    def on_log(self, metrics: Mapping[str, float]) -> None:
        view = self.bridge.view
        self._take(view.values, metrics)
        view.logged.update(metrics)

    @hookimpl(wrapper=True)
    def filter_log(self, trainer: hookline.Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        metrics, hidden = (yield), self.bridge.hidden
        own = f"{trainer.options.train_loss_metric_name}_epoch"
        if self.bridge.lossless:  # several ranks have a mean of it all the same
            metrics.pop(own, None)
        if INSTEAD in metrics:
            metrics[own] = metrics.pop(INSTEAD)
        if not hidden:
            return metrics
        kept = {name: one for name, one in metrics.items() if name.split("/dataloader_idx_")[0] not in hidden}
        self._take(self.bridge.view.values, {name: one for name, one in metrics.items() if name not in kept})
        return kept

    def _take(self, values: dict[str, float], metrics: Mapping[str, float]) -> None:
        values.update(metrics)
        for name in self.bridge.forked & metrics.keys():  # what is logged both ways is known by its plain name, too
            values[name.removesuffix("_epoch")] = metrics[name]

    def get_state(self) -> dict[str, Any]:
        """Return the newest values, which schedulers and callbacks look at."""
        view = self.bridge.view
        return {"values": dict(view.values), "logged": dict(view.logged)}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.bridge.view.values, self.bridge.view.logged = dict(state["values"]), dict(state["logged"])

    @hookimpl
    def on_exception(self, exception: BaseException) -> None:
        for callback in self.bridge.view.callbacks:
            if method := overridden(callback, "on_exception"):
                call(method, self.bridge.view, self.bridge.module, exception)
        data = self.bridge.view.datamodule
        if data is not None and (method := overridden(data, "on_exception")):
            call(method, exception)


class Steps(CallbackInterface):
    """Tells of what happens within a step; only where somebody listens."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.clips = overridden(bridge.module, "configure_gradient_clipping")
        for event, hook in LONG_STEPS.items():  # an attribute hides the method: nobody is called for nothing
            if event not in bridge.listeners and not (event == "on_before_optimizer_step" and self.clips):
                setattr(self, hook, None)

    @hookimpl(wrapper=True)
    def run_backward(self, loss: torch.Tensor) -> Generator[None, bool, bool]:
        self.bridge.tell("on_before_backward", loss)
        return (yield)

    @hookimpl
    def on_end_backward(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.tell("on_after_backward")

    @hookimpl
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        view = self.bridge.view
        for optimizer in optimizers:
            self.bridge.tell("on_before_optimizer_step", optimizer)
            if self.clips and not self.bridge.manual:
                call(self.clips, optimizer, view.gradient_clip_val, view.gradient_clip_algorithm)

    @hookimpl
    def on_end_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            self.bridge.tell("on_before_zero_grad", optimizer)

    @hookimpl
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        window, self.bridge.window = self.bridge.window, []
        for outputs, batch, index, samples in window:
            self.bridge.samples = samples
            self.bridge.tell("on_train_batch_end", outputs, batch, index)
        self.bridge.samples = None
