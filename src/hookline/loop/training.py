"""Training: epochs, steps, and the boundary after each step, at which the state is consistent."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hookline import data
from hookline.cadence import every, seconds
from hookline.counters import EVALUATIONS, SECONDS, snapshot
from hookline.interfaces import Loader, Stage, plain_name
from hookline.loop.building import epochs_asked, warn_of_module
from hookline.loop.ends import Ends
from hookline.loop.evaluation import Evaluation
from hookline.loop.first import look_at_gradients, say_not_finite, watched
from hookline.loop.window import Window
from hookline.monitored import require_metrics
from hookline.outputs import Collector, Outputs, WindowCut, collate, detached, first
from hookline.randomness import Randomness, set_seed
from hookline.schedulers import is_plateau, wrong_length

if TYPE_CHECKING:
    from hookline.run import Run

log = logging.getLogger("hookline.trainer")


class Training:
    """Trains: sets up, does the epochs and their steps, and brings each step to its boundary."""

    def __init__(self, run: Run, evaluation: Evaluation, ends: Ends, window: Window, randomness: Randomness) -> None:
        self.run, self.evaluation, self.ends, self.window, self.randomness = run, evaluation, ends, window, randomness
        self.built, self.logs = evaluation.built, evaluation.logs
        self.settled = snapshot(run)
        """The counters at the last boundary; a cadence is due if they have crossed a multiple since."""
        self.clock_before = run.counters.seconds
        """The seconds before the last boundary read the clock; a time crossed by it is due until the next boundary."""
        self._unsettled = False  # whether a step has not reached its boundary yet
        self._stepped = True
        self.first_step = "ahead"
        """Whether the first step, which is looked at, is ahead, under way or behind."""
        self._first_loader: Loader | None = None
        self._epoch_outputs = Collector(0)

    def train(self) -> None:
        """Train: what the verb `run` does for `Stage.TRAIN`."""
        run, ends = self.run, self.ends
        self._set_up()
        if ends.finished():
            log.warning("nothing is left to train: the run is at step %d, epoch %d", run.global_step, run.epoch)
            self.logs.flush_interval()  # the run may have been killed between its last save and this flush
            return
        warn_of_module(run)
        ends.begin_training()
        run.plugins.straighten()
        run.hook.on_begin_train(trainer=run, global_step=run.global_step)
        if run.options.sanity_val_steps:
            self.evaluation.check_sanity()
        if not self.randomness.go_on() and run.options.eval_when_start:
            self._evaluate_at_start()
        while not ends.finished():
            self._train_one_epoch()
        self._compare_schedules(ended=ends.over())
        if not run.plugins.logging and run.world_size == 1:  # else what is logged is looked at
            say_not_finite(run)
        if not ends.preempted():  # else the logged values are in the state, and the resumed run flushes them
            self.logs.flush_interval()
            with self.logs.told_at_once():
                run.hook.on_end_train(trainer=run, global_step=run.global_step)

    def _evaluate_at_start(self) -> None:
        """Validate before the first step; no boundary comes after it, so it is not due at that of the first step."""
        run, evaluations = self.run, self.run.counters.evaluations
        self.evaluation.validate()
        if run.counters.evaluations > evaluations:
            require_metrics(run, self.evaluation.metrics)
        self.settled = snapshot(run)

    def _set_up(self) -> None:
        """Build what training needs, and load the state to resume from; a second `train` reuses it."""
        run, fresh = self.run, not self.built.optimizers
        self.build()
        if fresh:
            if run.share:  # in training each share draws its own random numbers
                set_seed(data.mix(run.options.seed, run.share))
            run.hook.restore(trainer=run, stage=Stage.TRAIN)

    def build(self) -> None:
        """Build the model, the loader and the optimizers, in the right order, once."""
        built, options, fresh = self.built, self.run.options, not self.built.optimizers
        if fresh:
            set_seed(data.mix(options.seed, 0))  # all ranks build the same
            built.make_model()
        self._first_loader = built.train_loader()
        built.count_totals(self._first_loader)
        for cadence in (options.evaluate_every, options.log_every):
            self.run.due(cadence)  # raises if a fraction of an epoch lacks the length of the epoch
        max_time = None if options.max_time is None else seconds(options.max_time)
        self.ends.limit(options.max_steps, epochs_asked(options), max_time)
        self.evaluation.plan(options.evaluate_every)
        if fresh:
            built.make_optimizers()

    def extra_loader(self) -> Loader:
        """Return a training loader for steps that are tried before training, which then makes its own anew.

        For plugins that try steps in `on_begin_train_epoch` and afterwards put the state back.
        """
        self._first_loader = None
        return self.built.train_loader()

    # Epochs ---------------------------------------------------------------------------

    def _train_one_epoch(self) -> None:
        run, cursor = self.run, self.run.cursor
        if cursor.epoch != run.epoch:
            cursor.begin_epoch(run.epoch)
        resumed = cursor.position > 0 or bool(self.window.begun)
        run.hook.on_begin_train_epoch(trainer=run, global_step=run.global_step, epoch=run.epoch)
        loader, self._first_loader = self._first_loader, None
        if loader is None or resumed or run.epoch:
            loader = self.built.train_loader()
            self.settled = (*self.settled[:-1], cursor.position)  # which has moved if batches have another size now
        limit = self.built.batches_per_epoch()
        batches = itertools.islice(loader, None if limit is None else max(limit - cursor.position, 0))
        if resumed:
            self.randomness.go_on()  # on_begin_train_epoch ran again, and may have drawn random numbers
        self.randomness.forget_restored()
        self._epoch_outputs = Collector(run.plugins.rooms["on_end_train_epoch"])
        if run.hook.train_epoch(trainer=run, batches=batches):
            self._end_epoch()
        self.settle()

    def _end_epoch(self) -> None:
        run, options = self.run, self.run.options
        if self._ends_with_epoch(options.evaluate_every):
            self.evaluation.validate()
        loss = self.logs.epoch_loss()
        if loss is not None:
            run.best.take("train_loss", loss)
        run.hook.step_schedulers(
            trainer=run, when="epoch", optimizers=self.built.optimizers, metrics=self.evaluation.metrics
        )
        if self._ends_with_epoch(options.log_every):
            self.logs.flush_interval()
        self.logs.flush_epoch()
        outputs = self._epoch_outputs.collate()
        with self.logs.told_at_once():
            run.hook.on_end_train_epoch(trainer=run, global_step=run.global_step, train_step_collated_outputs=outputs)
        self._compare_schedules(ended=False)
        run.counters.epochs += 1
        run.cursor.begin_epoch(run.counters.epochs)
        self._unsettled = True  # also if the rest of the epoch had no batch

    def _ends_with_epoch(self, cadence: str | None) -> bool:
        """Tell whether the end of this epoch crosses a multiple of epochs that its steps have not crossed."""
        if cadence is None or every(cadence).unit != "epochs":
            return False
        passed, cursor = every(cadence).passed, self.run.cursor
        return passed(cursor.epoch + 1, 0, cursor.batches) > passed(cursor.epoch, cursor.position, cursor.batches)

    def _compare_schedules(self, ended: bool) -> None:
        """Warn of schedules whose length differs from that of training."""
        run = self.run
        planned = {"step": self.built.totals.steps, "epoch": self.built.totals.epochs}
        for scheduler, when, _ in self.built.schedulers:
            run.say_once(wrong_length(scheduler, (planned.get(when) or 0) if ended else None))
            if ended and when == "validation" and not run.counters.evaluations and is_plateau(scheduler):
                name = type(scheduler).__name__
                run.say_once(f"{name} has never moved: it follows an evaluation, and there was none")

    # Steps ----------------------------------------------------------------------------

    def take_step(self, window: Sequence[Any]) -> bool:
        """Take one step: update, count, tell; the step before is settled. Return False if the run was cut in it."""
        run, counters, cursor, size = self.run, self.run.counters, self.run.cursor, len(window)
        self._stepped, samples = True, self.window.begin(window)
        try:
            if self.first_step == "behind":
                outputs = run.hook.update(trainer=run, window=window)
            else:
                outputs = self._update_first(window)
        except WindowCut as cut:
            self._keep_cut(cut)
            return False
        finally:
            self.window.end()
        counters.global_step += 1
        counters.batches += size
        cursor.position += size
        cursor.consumed += size * cursor.draw
        if run.shares > 1:  # as if all were full: batches differ between ranks, but what is due must not
            samples = size * run.options.train_batch_size // self.window.size
        counters.samples += samples
        counters.skipped_steps += not self._stepped
        self._unsettled = True
        several = run.world_size > 1  # observers may exist on one rank only; all ranks reduce logged values
        collated: list[Any] = []
        if run.plugins.asking or several:
            self.logs.add_step_losses(outputs)
            room = run.plugins.rooms["on_end_train_step"]
            if room or self._epoch_outputs.room:
                collated = self._collect(outputs, room)
        if run.plugins.heard["on_end_train_step"]:
            told = {"train_step_collated_outputs": collated, "stepped": self._stepped}
            run.hook.on_end_train_step(trainer=run, global_step=counters.global_step, **told)
        if self.evaluation.by_counter and run.due(run.options.evaluate_every):
            self.evaluation.validate()
        if (run.plugins.logging or several) and run.due(run.options.log_every):
            self.logs.flush_interval()
        return True

    def _update_first(self, window: Sequence[Any]) -> list[Outputs]:
        self.first_step = "under way"
        try:
            with watched(self.run, self.built):
                outputs = self.run.hook.update(trainer=self.run, window=window)
        finally:
            self.first_step = "behind"
        return outputs  # type: ignore[no-any-return]

    def _keep_cut(self, cut: WindowCut) -> None:
        """Save a run that stops within a window, with the finished part of the window."""
        run, rooms = self.run, self.run.plugins.rooms
        room = max(1, rooms["on_end_train_step"], rooms["on_end_train_epoch"])
        self.window.cut([detached(row[:room]) for row in cut.outputs])
        assert self.ends.reason is not None
        run.hook.save(trainer=run, reason=self.ends.reason, state=None)

    def _collect(self, outputs: Sequence[Outputs], room: int) -> list[Any]:
        """Keep the outputs of a step for the end of the epoch; return the first `room` of them, collated."""
        padding = self.window.padding
        real = outputs[: len(outputs) - padding] if padding else outputs
        if self._epoch_outputs.room:
            for row in real:
                self._epoch_outputs.add(row)
        if not room:
            return []
        collated = collate([first(row, room) for row in real or outputs], bool(real) and self.window.size == 1)
        return collated if real else [column[:0] for column in collated]  # the usual number of outputs, without samples

    def step(self, optimizers: Sequence[torch.optim.Optimizer] | None = None, closure: Any = None) -> bool:
        """Step optimizers through every gate, then clear all gradients; see `Trainer.step`."""
        run = self.run
        if isinstance(optimizers, torch.optim.Optimizer):
            raise TypeError(f"trainer.step takes a list of optimizers, not one {type(optimizers).__name__}; write [it]")
        chosen = self.built.optimizers if optimizers is None else optimizers
        if self.first_step == "under way" and closure is None:
            look_at_gradients(run, self.built, chosen)
        if closure is not None:
            closure = self._completing(closure, chosen)
        stepped: bool = run.hook.step_optimizers(trainer=run, optimizers=chosen, closure=closure)
        if not stepped:
            self.skip()
        return stepped

    def skip(self) -> None:
        """State that an optimizer has not stepped, so that the step under way is a skipped one."""
        self._stepped = False

    def _completing(self, closure: Any, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
        """Return a closure that calls `on_begin_optimizer_step` after each of its calls.

        Gradients are reduced over all ranks, so the loss is too: otherwise optimizers that read it (a line search)
        would take another path on each rank.
        """
        run = self.run
        several = run.world_size > 1 and bool(run.plugins.performers("shard_model"))

        def complete() -> Any:
            loss = closure()
            run.hook.on_begin_optimizer_step(trainer=run, optimizers=optimizers)
            if several and loss is not None:
                loss = torch.as_tensor(loss, device=run.device).detach()
                loss = run.hook.all_reduce(trainer=run, value=loss, op="sum") / run.shares
            return loss

        return complete

    # Boundaries -----------------------------------------------------------------------

    def settle(self, counted: bool = False) -> bool:
        """Bring the last step to its boundary, once; see `Trainer.settle`."""
        if not (self._unsettled or counted):
            return True  # a request between two steps waits for the boundary of the second
        self._unsettled, self.clock_before = False, self.settled[SECONDS]
        run, ends = self.run, self.ends
        finished = ends.finished(agree=True)
        if finished and run.options.eval_when_finish and not ends.preempted():
            self.evaluation.validate()
        if run.plugins.heard["on_boundary"]:
            run.hook.on_boundary(trainer=run, global_step=run.counters.global_step)
        if run.counters.evaluations != self.settled[EVALUATIONS]:
            require_metrics(run, self.evaluation.metrics, boundary=True)
        back = self.randomness.restored is not None  # a plugin loaded another state: the data continue from there
        if back:
            self.randomness.go_on()
        if ends.reason is not None or back:
            finished = ends.finished()
        if finished or ends.saves:
            run.hook.save(trainer=run, reason=ends.take_saves(), state=None)
        self.settled = snapshot(run)
        return not finished and not back

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the progress of the run, as plain data."""
        run = self.run
        return {
            "counters": dataclasses.asdict(run.counters),
            "cursor": run.cursor.get_state(),
            "best": dataclasses.asdict(run.best),
            **self.evaluation.get_state(),
            "frozen": [name for name, weight in run.module.named_parameters() if not weight.requires_grad],
            "ranks": run.world_size,
        }

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Load what `get_state` returned, a progress at a boundary."""
        run = self.run
        run.counters.update_state(state["counters"])
        run.cursor.update_state(state["cursor"])
        self.settled, self.clock_before = snapshot(run), run.counters.seconds
        run.best.update_state(state["best"])
        self.evaluation.update_state(state)
        if not run.options.reset_optimizers_schedulers:
            frozen = {plain_name(name) for name in state["frozen"]}
            for name, weight in run.module.named_parameters():
                weight.requires_grad_(name not in frozen)
