"""Evaluation: validation in training, and separate evaluations."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hookline import data
from hookline.cadence import every
from hookline.interfaces import Stage
from hookline.loop.building import Built
from hookline.loop.logs import Logs
from hookline.loop.reductions import Reduction, as_number, is_number
from hookline.loop.session import Session
from hookline.monitored import require_metrics
from hookline.outputs import Collector, Outputs, Predictions, as_outputs, merged
from hookline.randomness import kept_rng, set_seed

if TYPE_CHECKING:
    from hookline.run import Run

log = logging.getLogger("hookline.trainer")


def places_of(before: int, samples: int, whole: bool, share: int, shares: int) -> Sequence[int]:
    """Return the places of a batch's samples in the data; those of a batch that was dealt as a whole are one place.

    Args:
        before: samples, or batches that were dealt as a whole, that this rank had before.
        samples: of the batch.
        whole: whether ranks are dealt whole batches.
        share: this rank's share of the data.
        shares: the number of shares.
    """
    first = share + before * shares
    return [first] * samples if whole else range(first, first + samples * shares, shares)


class Evaluation:
    """Evaluates: in training when it is due, and when the user calls `validate`, `test` or `predict`."""

    def __init__(self, run: Run, session: Session, built: Built, logs: Logs) -> None:
        self.run, self.session, self.built, self.logs = run, session, built, logs
        self.metrics: dict[str, float] = {}
        """The metrics of the last evaluation."""
        self.sanity_checking = False
        """Whether the evaluation under way is the sanity check before training."""
        self.by_counter = False
        """Whether validation is due by steps, batches, samples, time or parts of an epoch, so within an epoch too."""
        self.collected: dict[str, Any] | None = None
        """The predictions of all ranks by loader; None if they are not to be collected."""
        self._validated_at: int | None = None  # the optimizer step
        self._reports_so_far = False

    def plan(self, cadence: str | None) -> None:
        """Set the cadence of validation in training."""
        number, unit = (0, "epochs") if cadence is None else every(cadence)
        self.by_counter = unit != "epochs" or not isinstance(number, int)

    # Whole evaluations ----------------------------------------------------------------

    def validate(self) -> None:
        """Validate during training, at most once per step."""
        run = self.run
        if self._validated_at == run.global_step:
            return
        self._validated_at = run.global_step
        with kept_rng():  # training gives the same bits, whatever is evaluated and how often
            metrics = self._measure(Stage.VAL, run.options.max_val_steps_per_epoch)
            if metrics is None:
                return
            run.counters.evaluations += 1
            run.best.take("valid_loss", metrics.get(run.options.val_loss_metric_name, math.nan))
            self.logs.tell(metrics)
            with self.logs.told_at_once(metrics):
                run.hook.on_end_validation(trainer=run, global_step=run.global_step, metrics=metrics)
            run.hook.step_schedulers(trainer=run, when="validation", optimizers=self.built.optimizers, metrics=metrics)

    def check_sanity(self) -> None:
        """Validate a few batches and leave no trace: drop the metrics and restore the RNG states."""
        metrics, self.sanity_checking = self.metrics, True
        try:
            with kept_rng():
                tried = self._measure(Stage.VAL, self.run.options.sanity_val_steps)
            if tried is not None:
                require_metrics(self.run, tried)
        finally:
            self.sanity_checking = False
        self.metrics = metrics

    def evaluate(self, stage: Stage) -> None:
        """Run a separate evaluation: what the verb `run` does for stages other than training.

        Raises:
            ValueError: the module has no data for it.
        """
        run = self.run
        if not self.built.optimizers:  # else this trainer has trained: evaluate the trained weights
            set_seed(data.mix(run.options.seed, 0))
            self.built.make_model()
            run.hook.restore(trainer=run, stage=stage)
        with kept_rng():  # the same result with and without a training before
            set_seed(data.mix(run.options.seed, run.share))
            metrics = self._measure(stage, run.options.max_val_steps_per_epoch if stage is Stage.VAL else None)
        if metrics is None:
            raise ValueError(
                f"{type(run.module).__name__} has no data for this: get_{stage.value}_dataloaders() returned None"
            )
        self.logs.tell(metrics)

    def _measure(self, stage: Stage, limit: int | None) -> dict[str, float] | None:
        """Evaluate a stage; return None if the module has no loader for it."""
        run = self.run
        loaders = self.built.loaders.get(stage)
        if not loaders:
            return None
        began = time.monotonic()
        self.metrics = run.hook.evaluate(trainer=run, stage=stage, loaders=loaders, limit=limit)
        log.debug("%s at step %d took %.3f s", stage.value, run.global_step, time.monotonic() - began)
        return self.metrics

    def predict(self, collect: bool, folder: str) -> dict[str, Any] | None:
        """Predict; return the predictions by loader if they are to be collected."""
        if not collect and not self.run.plugins.heard["on_end_predict_step"]:
            warnings.warn(
                "nobody hears on_end_predict_step, so the predictions will be dropped: implement it in the module or "
                "in a plugin, marked @hookimpl; or collect them, by trainer.predict(collect=True)",
                stacklevel=3,
            )
        self.collected = {} if collect else None
        try:
            self.session.do(Stage.PREDICT, folder)
            return self.collected
        finally:
            self.collected = None

    # Within one -----------------------------------------------------------------------

    @contextlib.contextmanager
    def under_way(self, stage: Stage) -> Iterator[None]:
        """Evaluate within: no gradients, all submodules in eval mode and restored afterwards, separate logs."""
        run = self.run
        modes = [(module, module.training) for module in self.built.model.modules()]
        in_training = run.stage is Stage.TRAIN and stage is Stage.VAL and not self.sanity_checking
        self._reports_so_far = in_training and not run.options.report_loss_after_eval
        try:
            with self.session.at(stage), self.logs.in_evaluation(), torch.no_grad():
                self.built.model.eval()
                yield
        finally:
            for module, training in modes:
                module.training = training

    def take_batches(self, stage: Stage, key: str, batches: Iterable[Any]) -> None:
        """Run the model on the batches of one loader and call the hooks of each."""
        run, hook, heard, index, word = self.run, self.run.hook, self.run.plugins.heard, -1, stage.value
        weigh = hook.get_weight if heard["get_weight"] else hook.count_samples
        collector = Collector(run.plugins.rooms.get(f"on_end_{word}_epoch", 0))
        predictions, seen, whole = Predictions(), 0, self.built.loaders.deals_batches(stage, key)
        for index, batch in enumerate(batches):
            weight = float(weigh(trainer=run, batch=batch, stage=stage))
            self.logs.weigh(weight)
            more: dict[str, Any] = {}
            if stage is Stage.PREDICT:
                samples = hook.count_samples(trainer=run, batch=batch, stage=stage)
                more["places"] = places_of(index if whole else seen, samples, whole, run.share, run.shares)
                seen += samples
            batch = hook.prepare_batch(trainer=run, batch=batch, stage=stage)
            outputs = hook.call_model(trainer=run, batch=batch, stage=stage)
            if stage is not Stage.PREDICT:
                outputs = (outputs,) if isinstance(outputs, torch.Tensor) else as_outputs(outputs, f"{word}_step")
                self._take_loss(stage, outputs, weight)
                if collector.room:
                    collector.add(outputs)
            elif self.collected is not None:
                predictions.add(outputs, more["places"])
            if heard[f"on_end_{word}_step"]:
                more |= {"outputs": outputs, "batch": batch, "key": key, "index": index}
                getattr(hook, f"on_end_{word}_step")(trainer=run, **more)
        self.logs.weigh(None)
        if index < 0:
            warnings.warn(f"the {word} loader {key!r} gave no batch, so nothing is known of it", stacklevel=2)
        if stage is Stage.PREDICT:
            if self.collected is not None:
                ranks = dict(reversed(hook.all_gather(trainer=run, value=(run.share, predictions.own()))))
                self.collected[key] = merged([ranks[share] for share in sorted(ranks)])
            hook.on_end_predict_epoch(trainer=run, key=key)
        else:
            outputs = hook.gather_outputs(trainer=run, outputs=collector.collate(), stage=stage, key=key)
            collated = {f"{word}_step_collated_outputs": outputs}
            ended = getattr(hook, f"on_end_{word}_epoch")
            ended(trainer=run, global_step=run.global_step, key=key, **collated)

    def _take_loss(self, stage: Stage, outputs: Outputs, weight: float) -> None:
        """Log the loss of an evaluation batch: its first output, if that is one number and no count.

        The mean so far covers only this rank, as others may have fewer batches. It is computed from a copy, because
        folding the values here would round them differently.
        """
        run, first = self.run, outputs[0] if outputs else None
        name = run.options.val_loss_metric_name if stage is Stage.VAL else f"{stage.value}_loss"
        one = first.numel() == 1 and first.is_floating_point() if isinstance(first, torch.Tensor) else is_number(first)
        if not one:
            return
        if getattr(first, "ndim", 0) and weight == 1:
            run.say_once(
                f"{stage.value}_step returns a first output of one element for a batch of one sample: it is taken "
                f"for the loss ({name}). Return the loss as a tensor of shape (), and what is no loss behind it"
            )
        so_far = self.logs.add_evaluation_loss(name, as_number(name, first), weight)
        if self._reports_so_far and so_far is not None:
            run.counters.evaluation_batches += 1
            batch = run.counters.evaluation_batches
            if batch % every(run.options.log_every).number == 0 and run.plugins.heard["on_log"]:
                mean = Reduction.from_state(so_far.get_state()).value().item()
                self.logs.tell({f"{name}_batch{self.logs.suffix}": mean}, batch)

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the metrics of the last evaluation, and the step of the last validation."""
        return {"evaluated_at": self._validated_at, "metrics": self.metrics}

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Load what `get_state` returned."""
        self._validated_at, self.metrics = state["evaluated_at"], dict(state["metrics"])
