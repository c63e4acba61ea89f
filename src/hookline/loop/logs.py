"""Logged values: collected per interval, epoch or evaluation, and flushed to `on_log`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hookline.interfaces import Stage
from hookline.loop.reductions import FOLD_AT, REDUCTIONS, LogBuffer, Reduction, as_number, stacked, to_floats, wide
from hookline.loop.window import Window
from hookline.outputs import Outputs, kept

if TYPE_CHECKING:
    from hookline.run import Run

COUNTED = {"step", "epoch", "batches", "samples", "seconds"}


class Logs:
    """Keeps logged values, reduced and on their device, until their flush is due."""

    def __init__(self, run: Run, window: Window) -> None:
        self.run, self.window = run, window
        self.shown: set[str] = set()
        """Names of values that were logged with `prog=True`."""
        self.suffix = ""
        """The suffix of the names of logged values, in an evaluation of several loaders."""
        options = run.options
        self._train_loss = train_loss = options.train_loss_metric_name
        own = {train_loss: Stage.TRAIN, f"{train_loss}_epoch": Stage.TRAIN, options.val_loss_metric_name: Stage.VAL}
        self._own_names: dict[str, Stage] = {**own, "test_loss": Stage.TEST}
        self._by_module = False
        self._later: list[tuple[bool, dict[str, Any], dict[str, Any]]] | None = None
        self._owners: dict[str, bool] = {}  # whether the module has logged a name first, or somebody else
        self._weight: float | None = None  # of the evaluation batch under way
        self._logged_by_user: set[tuple[Stage, str]] = set()  # of these names: the user's value replaces the core's
        self._interval = LogBuffer()
        self._epoch = LogBuffer()
        self._evaluation: LogBuffer | None = None
        self._told_at_once: LogBuffer | None = None  # at the end of an epoch, a validation or training
        self._losses: list[tuple[torch.Tensor, float]] = []  # of the last steps, with weights; summed up at FOLD_AT

    # Taking ---------------------------------------------------------------------------

    def log(
        self,
        values: Mapping[str, Any],
        *,
        over: str = "interval",
        reduce: str = "mean",
        sync: bool = False,
        prog: bool = False,
        weighted_by: float | torch.Tensor | None = None,
    ) -> None:
        """Take values by name; see `Trainer.log`."""
        if self._later is not None:
            self._note(False, values, over=over, reduce=reduce, sync=sync, prog=prog, weighted_by=weighted_by)
            return
        if over not in ("interval", "epoch") or reduce not in REDUCTIONS:
            raise ValueError(
                f"log(over={over!r}, reduce={reduce!r}): over is interval or epoch, reduce is {', '.join(REDUCTIONS)}"
            )
        if self.run.idle:
            return
        buffer, suffix = self._evaluation, self.suffix
        if buffer is None:
            buffer, suffix = self._told_at_once, ""
        if buffer is None:
            buffer = self._epoch if over == "epoch" else self._interval
        weight = self.weight if weighted_by is None else float(weighted_by)
        self._logged_by_user |= {(self.run.stage, name) for name in values.keys() & self._own_names.keys()}
        for name, value in values.items():
            if self._owners.setdefault(name, self._by_module) is not self._by_module:
                self.run.say_once(
                    f"{name} is logged by the module and by a plugin (or by trainer.log), so what is told is of both; "
                    "give one of them another name",
                    about=f"{name} twice",
                )
            both = (name, name + suffix) if suffix and name in self._own_names else (name + suffix,)
            for full_name in both:  # the loss is also logged over all loaders
                reduction = buffer.reduction(full_name, reduce)
                reduction.sync = reduction.sync or sync or self._evaluation is not None
                reduction.add(as_number(name, value), weight)
            if prog:
                self.shown.add(name + suffix)

    def log_of_module(self, values: dict[str, Any]) -> None:
        """Take what a module logs, with the options of `Trainer.log`; say once which names are taken already."""
        if self._later is not None:
            self._note(True, values)
            return
        run, self._by_module = self.run, True
        for name in values.keys() & self._own_names.keys():
            if run.stage is self._own_names[name]:
                said = "takes the place of the mean that the loop logs"
            else:
                said = f"is the loop's name for a loss of {self._own_names[name].value}: both are in one curve"
            run.say_once(f"self.log({name}=…) in {run.stage.value} {said}; take another name where that is not meant")
        for name in values.keys() & COUNTED:
            run.say_once(f"self.log({name}=…): records have the run's own counter of this name; take another name")
        try:
            run.log(**values)
        finally:
            self._by_module = False

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[tuple[dict[str, Any], dict[str, Any]]]]:
        """Keep the values logged within the block apart, each with its options, for who logs them in another form."""
        logged: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.log = lambda values, **options: logged.append((values, options))  # type: ignore
        try:
            yield logged
        finally:
            del self.log

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Note what is logged within the block, and log it at its end, in order.

        For a block that a compiler traces: noting is plain enough to be compiled with it, logging is not.
        """
        noted, self._later = [], []
        try:
            yield
            noted = self._later
        finally:
            self._later = None
        for by_module, values, options in noted:
            self.log_of_module(values) if by_module else self.log(values, **options)

    def _note(self, by_module: bool, values: Mapping[str, Any], **options: Any) -> None:
        """Note values as they are now, without their graphs."""
        assert self._later is not None
        now = {
            name: value.detach().clone() if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        self._later.append((by_module, now, options))

    def weigh(self, weight: float | None) -> None:
        """Set the weight of values logged in the current evaluation batch; None between batches."""
        self._weight = weight

    @property
    def weight(self) -> float:
        """The weight of a value logged now: the samples of the current batch, or the result of `get_weight`."""
        return self.window.weight if self._weight is None else self._weight

    def add_step_losses(self, outputs: Sequence[Outputs]) -> None:
        """Take the losses of a training step, the first of each micro-batch's outputs.

        Raises:
            TypeError: what a plugin's `update` has returned are no outputs.
        """
        window = self.window
        real = outputs[: len(outputs) - window.padding] if window.padding else outputs
        weights = window.weights if len(window.weights) == len(outputs) else itertools.repeat(1.0)
        for row, weight in zip(real, weights, strict=False):
            if not isinstance(row, tuple):
                raise TypeError(
                    "the verb 'update' must answer a list with one tuple per micro-batch, the loss first; it answered "
                    f"a {type(outputs).__name__} of {type(row).__name__}"
                )
            if row:
                loss = row[0]
                fresh = loss.grad_fn is not None and not loss._is_view()  # `kept` inlined, to save a call in each step
                self._losses.append((loss.detach() if fresh else kept(loss), weight))
        if len(self._losses) >= FOLD_AT:
            self._fold_losses()

    def add_evaluation_loss(self, name: str, loss: Any, weight: float) -> Reduction | None:
        """Take the loss of an evaluation batch; return its loader's mean so far, None if the user logs it."""
        assert self._evaluation is not None
        if self._logged_by_user and (self.run.stage, name) in self._logged_by_user:
            return None
        for full_name in dict.fromkeys((name, name + self.suffix)):  # over all loaders, and of each
            reduction = self._evaluation.reduction(full_name)
            reduction.sync = True
            reduction.add(loss, weight)
        return reduction

    @contextlib.contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Log within the block into an evaluation; `collect` returns its metrics."""
        self._evaluation = LogBuffer()
        try:
            yield
        finally:
            self._evaluation = self._weight = None

    @contextlib.contextmanager
    def suffixed(self, suffix: str) -> Iterator[None]:
        """Append a suffix to the names of values logged within the block, in an evaluation."""
        before, self.suffix = self.suffix, suffix
        try:
            yield
        finally:
            self.suffix = before

    @contextlib.contextmanager
    def told_at_once(self, metrics: dict[str, float] | None = None) -> Iterator[None]:
        """Flush the values logged within the block right after it, and add them to `metrics`."""
        self._told_at_once = buffer = LogBuffer()
        try:
            yield
        finally:
            self._told_at_once = None
        if metrics is not None:
            for reduction in buffer.reductions.values():
                reduction.sync = True  # as in the evaluation
        if self.run.world_size > 1 or buffer:
            values = self._floats(buffer)
            if metrics is not None:
                metrics.update(values)
            self.tell(values)

    # Telling --------------------------------------------------------------------------

    def tell(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Call `filter_log`, then `on_log`, with values."""
        run = self.run
        metrics = run.hook.filter_log(trainer=run, metrics=dict(metrics))
        for name, value in metrics.items() if run.rank == 0 else ():
            if not math.isfinite(value):
                run.say_once(
                    f"{name} is {value} at step {run.global_step} (said once): look at the data, the learning rate and "
                    "the precision; `plugins: {finite: {}}` would end the run at such a loss or gradient",
                    about=f"{name} not finite",
                )
        if metrics:
            run.hook.on_log(trainer=run, metrics=metrics, global_step=run.global_step if step is None else step)

    def flush_interval(self) -> None:
        """Flush the values of the interval, and the mean loss of its steps."""
        self._flush(self._interval)

    def flush_epoch(self) -> None:
        """Flush the values of the epoch, and its mean loss."""
        self._flush(self._epoch)

    def collect(self) -> dict[str, float]:
        """Return the metrics of the current evaluation, over all ranks."""
        assert self._evaluation is not None
        return self._floats(self._evaluation)

    def epoch_loss(self) -> float | None:
        """Return the mean training loss of the epoch so far, over all ranks; None if losses are not collected."""
        self._fold_losses()
        name = f"{self._train_loss}_epoch"  # with several ranks also if this one had no batch
        loss = self._epoch.reductions.get(name) if self.run.world_size == 1 else self._epoch.reduction(name)
        if loss is None:
            return None
        loss.sync = True  # ranks that decide by the best value must agree on it
        return loss.value(self._all_reduce).item()

    def _flush(self, buffer: LogBuffer) -> None:
        """Copy the values of a buffer off the device, all at once, if a plugin implements `on_log`."""
        self._fold_losses()
        if self.run.world_size > 1 or (buffer and self.run.plugins.heard["on_log"]):
            self.tell(self._floats(buffer))
        buffer.clear()

    def _floats(self, buffer: LogBuffer) -> dict[str, float]:
        """Empty a buffer; return its values, reduced over ranks if they are logged so."""
        if self.run.world_size > 1:
            buffer.agree(self.run.hook.all_gather(trainer=self.run, value=buffer.synced()))
        return to_floats(buffer.collect(self._all_reduce))

    def _all_reduce(self, value: torch.Tensor, op: str) -> torch.Tensor:
        return self.run.hook.all_reduce(trainer=self.run, value=value, op=op)  # type: ignore[no-any-return]

    def _fold_losses(self) -> None:
        """Add the losses of the last steps to the buffers."""
        pairs, self._losses = [pair for pair in self._losses if pair[1]], []  # without means of nothing
        if not pairs:
            return
        losses, weights = zip(*pairs, strict=True)
        values = wide(stacked([loss.reshape(()) for loss in losses]))
        total, weight = (values * torch.tensor(weights, dtype=values.dtype, device=values.device)).sum(), sum(weights)
        if (Stage.TRAIN, self._train_loss) not in self._logged_by_user:
            interval = self._interval.reduction(self._train_loss)
            interval.sync = True
            interval.add_sum(total, weight)
        if (Stage.TRAIN, f"{self._train_loss}_epoch") not in self._logged_by_user:
            self._epoch.reduction(f"{self._train_loss}_epoch").add_sum(total, weight)

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the values of this rank that are not flushed yet."""
        return {
            "losses": stacked([loss.reshape(()) for loss, _ in self._losses]) if self._losses else None,
            "weights": torch.tensor([weight for _, weight in self._losses], dtype=torch.float64),
            "interval": self._interval.get_state(),
            "epoch": self._epoch.get_state(),
        }

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Load what `get_state` returned."""
        losses = [] if state.get("losses") is None else list(state["losses"].unbind())
        weights = state["weights"].tolist() if "weights" in state else [1.0] * len(losses)
        self._losses = list(zip(losses, weights, strict=True))
        self._interval.update_state(state.get("interval", {}))
        self._epoch.update_state(state.get("epoch", {}))
