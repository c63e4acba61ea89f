"""What a module of today's Lightning and its callbacks hear of their run."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl, kept_rng
from hookline_lightning.run.bridge import LONG, Bridge, call, overridden
from hookline_lightning.run.events import LONG_STEPS
from hookline_lightning.run.values import INSTEAD


class Following(CallbackInterface):
    """Tells a module of today's Lightning and its callbacks of their run."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._keys: list[str] = []
        self._known: dict[str, float] = {}  # of the evaluation under way, when its loaders are done
        self._started = False

    # Training -------------------------------------------------------------------------

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        self._started, self.bridge.cut = False, 0
        self.bridge.tell_between("on_fit_start")

    @hookimpl
    def on_begin_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        if not self._started:  # behind the sanity check; a run that goes on has random states of its own
            self._started = True
            with kept_rng() if trainer.global_step else nullcontext():
                self.bridge.tell_between("on_train_start")
        self.bridge.tell_between("on_train_epoch_start")

    @hookimpl(wrapper=True)
    def forward_backward(self, index: int, size: int) -> Generator[None, Any, Any]:
        bridge = self.bridge
        bridge.now.index = index
        outputs = yield
        if index + 1 < size:
            bridge.end_batch()
        elif not (bridge.hears_behind or bridge.now.within_closure):
            bridge.values.begin_batch(None)  # whose memory is free for the next one
        return outputs

    @hookimpl(wrapper=True)
    def should_step(self) -> Generator[None, bool, bool]:
        return (yield) and (self.bridge.now.beside or not self.bridge.now.skipped)

    @hookimpl(wrapper=True, tryfirst=True)
    def step_schedulers(self, trainer: hookline.Trainer, when: str) -> Generator[None, bool, bool]:
        if when == "epoch":  # the last moment at which values of this epoch can be logged
            self._end_epoch(trainer)
        return (yield)

    def _end_epoch(self, trainer: hookline.Trainer) -> None:
        """Have the values of an epoch known, then tell its end; callbacks that decide by a value hear it last."""
        bridge, values = self.bridge, self.bridge.values
        values.begin_batch(None)
        bridge.look()
        values.log_metrics(known=True)
        values.ending = True
        trainer.logs.flush_epoch()
        values.ending = False
        values.sync()
        bridge.tell_between("on_train_epoch_end")
        values.log_metrics(known=True)
        values.sync()
        bridge.tell_between("on_train_epoch_end late")
        values.reset_metrics(training=True)

    @hookimpl
    def on_end_train(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        if trainer.position:  # a limit or a stop has cut the epoch short, which is an end of it in Lightning
            self._end_epoch(trainer)
            self.bridge.cut = 1
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
        bridge, values, view = self.bridge, self.bridge.values, self.bridge.view
        before, self._known = (view.values, view.logged, view.shown), {}
        if trainer.sanity_checking:
            values.forget()
        elif stage is Stage.VAL and bridge.word == "fit":
            bridge.clear_before_validation()
        rest = yield
        metrics = {**self._known, **rest}
        values.put_evaluation(metrics)
        word = LONG[stage]
        if f"on_{word}_end" in bridge.listeners:
            with trainer.evaluation.under_way(stage):
                bridge.tell_known(f"on_{word}_end")
        values.reset_metrics(training=False)
        if trainer.sanity_checking:
            bridge.tell("on_sanity_check_end")
            values.forget()
            view.values, view.logged, view.shown = before
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
        bridge.loader_number = (bridge.loader_idx,) if len(self._keys) > 1 else ()
        if bridge.loader_idx == 0:
            self._of_all(f"on_{word}_start")
            self._of_all(f"on_{word}_epoch_start")

    def _of_all(self, event: str) -> None:
        """Tell an event that is of all loaders: what is logged in it has no loader's key."""
        with self.bridge.trainer.logs.suffixed(""):
            self.bridge.tell_between(event)

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
        self.bridge.tell(f"on_{word}_batch_end", outputs, batch, index, *self.bridge.loader_number)

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
        values, logs = self.bridge.values, self.bridge.trainer.logs
        values.begin_batch(None)
        values.log_metrics()
        if key == self._keys[-1]:
            self._known = logs.collect()
            values.put_evaluation(self._known)
            self._of_all(f"on_{word}_epoch_end")
            with logs.suffixed(""):
                values.log_metrics()

    # Values ---------------------------------------------------------------------------

    @hookimpl
    def on_log(self, metrics: Mapping[str, float]) -> None:
        self.bridge.values.put_others(metrics)

    @hookimpl(wrapper=True)
    def filter_log(self, trainer: hookline.Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        metrics, values = (yield), self.bridge.values
        own = f"{trainer.options.train_loss_metric_name}_epoch"
        if self.bridge.lossless:  # several ranks have a mean of it all the same
            metrics.pop(own, None)
        if INSTEAD in metrics:
            metrics[own] = metrics.pop(INSTEAD)
        if values.ending:
            values.put_epoch(metrics)
        return {name: value for name, value in metrics.items() if not values.hides(name)}

    def get_state(self) -> dict[str, Any]:
        """Return the newest values, which schedulers and callbacks look at."""
        return self.bridge.values.get_state()

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back, for training that goes on."""
        if self.bridge.word == "fit":
            self.bridge.values.update_state(state)

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

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.clips = overridden(bridge.module, "configure_gradient_clipping")
        heard = {hook for event in LONG_STEPS.keys() & bridge.listeners.keys() for hook in LONG_STEPS[event]}
        if self.clips:
            heard.add("on_begin_optimizer_step")
        if bridge.own_zero_grad:
            heard.add("on_end_optimizer_step")
        if bridge.manual:  # gradients stay where they are, and nobody clears them but the module
            heard.discard("on_end_optimizer_step")
        for hook in {hook for hooks in LONG_STEPS.values() for hook in hooks} - heard:
            setattr(self, hook, None)  # an attribute hides the method: nobody is called for nothing

    @hookimpl(wrapper=True)
    def run_backward(self, loss: torch.Tensor) -> Generator[None, bool, bool]:
        if not self.bridge.now.no_loss:
            self.bridge.tell("on_before_backward", loss)
        return (yield)

    @hookimpl
    def on_end_backward(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        if not self.bridge.now.no_loss:
            self.bridge.tell("on_after_backward")

    @hookimpl
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        view = self.bridge.view
        for optimizer in optimizers:
            self.bridge.tell("on_before_optimizer_step", optimizer)
            if self.clips and not self.bridge.manual:
                call(self.clips, optimizer, view.gradient_clip_val, view.gradient_clip_algorithm)

    @hookimpl
    def on_end_optimizer_step(self, trainer: hookline.Trainer) -> None:
        """Keep the gradients, which the run clears now and Lightning before the next backward."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.bridge.gradients = {
            one: one.grad for group in groups for one in group["params"] if one.grad is not None
        }  # fmt: skip

    @hookimpl
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        bridge = self.bridge
        bridge.show_gradients()
        bridge.end_batch()
        if bridge.gradients:
            trainer.zero_grad()
        if not (bridge.own_zero_grad or "on_before_zero_grad" in bridge.listeners):
            bridge.gradients = {}

    def get_state(self) -> dict[str, Any]:
        """Return gradients that an `optimizer_zero_grad` of the module may leave as they are."""
        bridge = self.bridge
        if not bridge.own_zero_grad:
            return {}
        named = bridge.named_parameters()
        return {"gradients": {name: bridge.gradients[one] for name, one in named if one in bridge.gradients}}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        named = dict(self.bridge.named_parameters())
        self.bridge.gradients = {
            named[name]: one.to(named[name].device, copy=True) for name, one in state.get("gradients", {}).items()
        }
