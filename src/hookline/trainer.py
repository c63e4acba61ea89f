"""The trainer: the life of a run, and what everyone in it may ask.

What a step, a window, an epoch and an evaluation are stands in `hookline.hookspecs`, as the
bodies of its verbs. Here stands what surrounds them: setting up, counting, boundaries,
logging, stopping, and the end whatever happens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import logging
import math
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hookline import data
from hookline.idle import untouched
from hookline.interfaces import Loader, ModuleInterface, Stage, plain_name
from hookline.logs import FOLD_AT, REDUCTIONS, LogBuffer, Reduction, as_number, is_number, to_floats, wide
from hookline.masking import mask
from hookline.monitored import require_metrics
from hookline.options import make_options, run_folder
from hookline.outputs import Collector, Outputs, WindowCut, as_outputs, collate, detached, kept
from hookline.plugins import MODULE, PluginManager, build, options_of
from hookline.schedule import Every, every, seconds
from hookline.schedules import Scheduled, is_plateau, schedule_all, wrong_length
from hookline.state import (
    UNITS,
    Best,
    Counters,
    Totals,
    get_rng_state,
    kept_rng,
    set_rng_state,
    set_seed,
    snapshot,
)

log = logging.getLogger("hookline.trainer")

KEYWORDS = {  # what a module is asked by keyword
    **{f"{stage.value}_step": ("global_step", "batch", "device") for stage in Stage},
    "get_train_dataloader": ("sampler", "batch_size"),
    **{f"get_{word}_dataloaders": ("sampler", "batch_size") for word in ("val", "test", "predict")},
}


class Trainer:
    """Runs a module: `train`, `validate`, `test`, `predict`.

    Args:
        module: a `ModuleInterface`, or a function that makes one, or what an adapter among the plugins
            makes one of.
        plugins: plugin objects and names in the order in which they shall be called; or a
            mapping of names to objects, to options, or to None for one that is turned off.
        config: the configuration this run was built from, already without secrets; it is handed to
            those who keep records.
        options: the fields of `Options`, by keyword.

    Raises:
        TypeError: an unknown option, or a module that nothing can adapt.
        ValueError: plugins that do not fit together.
    """

    def __init__(
        self,
        module: Any,
        plugins: Sequence[Any] | Mapping[str, Any] = (),
        *,
        config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.options = make_options(options)
        self.counters = Counters()
        self.settled = snapshot(self.counters)
        """The counters at the last boundary; a cadence is due when a multiple lies between the two."""
        self.cursor = data.Cursor(seed=self.options.seed)
        self.loaders = data.Loaders(self)
        self.best = Best()
        self.metrics: dict[str, float] = {}
        """The metrics of the last evaluation."""
        self.optimizers: list[torch.optim.Optimizer] = []
        self.schedulers: list[Scheduled] = []
        self.totals = Totals(None, None, None, self.options.epochs)
        self.window_size = 1
        self.stage = Stage.TRAIN
        self.sanity_checking = False
        self.shown: set[str] = set()
        """Names of values that were logged with `prog=True`."""
        self.status = "not started"
        """How the last run ended: "finished", "stopped", "preempted" or "failed"; "running" until then."""
        self.stop_reason: str | None = None
        self.restored_rng: Mapping[str, Any] | None = None
        self.begun: list[Outputs] = []
        """The outputs of the window under way, where a run was cut within one; else empty."""
        self.cutting = False
        """Whether training stops behind the micro-batch under way instead of the step."""
        self.padding = 0
        """How many micro-batches at the end of this window only keep ranks in step: their outputs are dropped."""
        self.weight = 1.0
        """How much a value weighs that is logged now: the samples of the batch under way, or what `get_weight` says."""
        self.weights: list[float] = []
        """The same, of each micro-batch of the window under way."""
        self.parts: list[float] | None = None
        """How much each micro-batch of the window under way weighs in it, where somebody performs `get_weight`."""
        self.idle = False
        """Whether the micro-batch under way is one of these: what is logged in it is dropped."""
        self._stop_status = "stopped"
        self._preempted_code = 1
        self._save_reasons: list[str] = []
        self._asked_alone: list[str] = []
        self._agreed = True  # whether all ranks know of `stop_reason`
        self._settling_due = False
        self._stepped = True
        self._evaluated_at: int | None = None
        self._interval = LogBuffer()
        self._epoch = LogBuffer()
        self._evaluation: LogBuffer | None = None
        self.log_suffix = ""
        """What an evaluation of several loaders appends to the names of logged values."""
        self._told_at_once: LogBuffer | None = None  # of what is logged where something ends
        self._train_loss = self.options.train_loss_metric_name
        self._own_names = {
            self._train_loss,
            f"{self._train_loss}_epoch",
            self.options.val_loss_metric_name,
            "test_loss",
        }
        self._logged_by_user: set[tuple[Stage, str]] = set()  # of these names: then it is the user's value that counts
        self._losses: list[tuple[torch.Tensor, float]] = []  # and weights of the last steps, summed up at FOLD_AT
        self._rng: Any = None  # the random states of this run, while it is not under way
        self._said: set[str] = set()  # what is said once
        self._followed: dict[str, str] = {}  # metrics that schedulers follow, and which
        self._first_loader: Loader | None = None
        self._evaluation_cadence: Every | None = None
        self._evaluates_by_counter = False
        self._ends: list[float] = []  # optimizer steps, epochs and seconds at which training is over
        self._epoch_outputs = Collector(0)
        self._session_began = time.monotonic()

        self.plugins = PluginManager()
        self.hook = self.plugins.routes
        named = build(plugins)
        for name, plugin in named.items():
            if getattr(plugin, "hookspecs", None) is not None:
                self.plugins.add_contract(plugin.hookspecs, f"{name}.hookspecs")
        self._register(named)
        try:
            self.rank, self.local_rank, self.world_size = self.hook.get_ranks(trainer=self)
            self.share, self.shares = self.hook.get_share(trainer=self)
            self.device: torch.device = self.hook.get_device(trainer=self)
            self.on_cpu = self.device.type == "cpu"
            self.module = self._adapt(module)
            # pluggy calls last whom it met first: the module's own hooks are the innermost.
            for name in named:
                self.plugins.unregister(name=name)
            self.plugins.register(self.module, MODULE)
            self._register(named)
            self.model: torch.nn.Module = self.module
            self._model_stands = False
            self.config = dict(config) if config is not None else self._own_config(named)
            self.plugins.hook.on_setup.call_historic(kwargs={"trainer": self})
        except BaseException as error:
            self.plugins.blame(error)
            raise

    def _register(self, named: Mapping[str, Any]) -> None:
        for name, plugin in reversed(list(named.items())):
            self.plugins.register(plugin, name)

    def _adapt(self, module: Any) -> ModuleInterface:
        adapted = self.hook.adapt_module(trainer=self, module=module)
        if not isinstance(adapted, ModuleInterface):
            given = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
            if adapted is not module:
                given += f" that made a {type(adapted).__name__}"
            raise TypeError(
                f"Trainer got {given}, which is no object of a ModuleInterface, and no plugin adapts it: "
                "subclass hookline.ModuleInterface, or name the adapter of its framework in plugins"
            )
        for method, names in KEYWORDS.items():
            try:
                inspect.signature(getattr(adapted, method)).bind(**dict.fromkeys(names))
            except TypeError as error:
                raise TypeError(
                    f"{type(adapted).__name__}.{method}() is called by keyword and must take "
                    f"{', '.join(names)} by these names, in any order: {error}"
                ) from None
        adapted._trainer = weakref.ref(self)
        return adapted

    # Doors ----------------------------------------------------------------------------

    def train(self) -> None:
        """Train until the epochs, the steps or the time are over, or somebody stops it.

        Raises:
            Whatever is raised in it, with a note that says by which plugin.
        """
        self._run(Stage.TRAIN)

    def validate(self) -> dict[str, float]:
        """Evaluate the validation loaders; return the metrics."""
        self._run(Stage.VAL)
        return self.metrics

    def test(self) -> dict[str, float]:
        """Evaluate the test loaders; return the metrics."""
        self._run(Stage.TEST)
        return self.metrics

    def predict(self) -> None:
        """Predict; each batch's outputs are handed to `on_end_predict_step` and not kept."""
        if not self.plugins.heard["on_end_predict_step"]:
            warnings.warn(
                "nobody hears on_end_predict_step, so the predictions will be dropped: implement it in the module "
                "or in a plugin, marked @hookimpl",
                stacklevel=2,
            )
        self._run(Stage.PREDICT)

    def stop(
        self,
        reason: str,
        status: str = "stopped",
        exit_code: int = 1,
        *,
        alone: bool = True,
        within_window: bool = False,
    ) -> None:
        """Ask for the end of training; it comes at the next boundary. Anyone may ask.

        Args:
            reason: said to the user and to `on_end_run`.
            status: "stopped", or "preempted" where the run shall be gone on with later.
            exit_code: of the command line, where the run is preempted.
            alone: of several ranks this one alone may ask (a signal), so all end at the boundary at which
                they have agreed. Otherwise all of them ask at the same step, for the same reason, such as
                a value that is reduced over them, and end at the next boundary. What only some ask for so is a hang.
            within_window: do not wait for the boundary, but save and end behind the micro-batch under
                way, its window half done. Only on one rank, and where the core itself does the window; whoever
                performs `update`, `run_window` or `train_epoch` comes to the boundary first.
        """
        if within_window and self.world_size == 1:
            others = any(self.plugins.performers(hook) for hook in ("train_epoch", "update", "run_window"))
            self.cutting = not others
        agreed = not alone or self.world_size == 1
        if self.stop_reason is None or (agreed and not self._agreed):
            self.stop_reason, self._stop_status, self._preempted_code = reason, status, exit_code
            self._agreed = agreed

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0 only for a run that is done."""
        return {"finished": 0, "stopped": 0, "preempted": self._preempted_code}.get(self.status, 1)

    def save(self, reason: str, alone: bool = False) -> None:
        """Ask for the state to be stored; done at the next boundary, once for all who ask.

        Args:
            reason: stands in what is stored.
            alone: this rank alone may know of it (a signal), so it is done at the boundary at which
                all ranks have agreed. Otherwise all ranks ask at the same step.
        """
        (self._asked_alone if alone and self.world_size > 1 else self._save_reasons).append(reason)

    @property
    def save_asked(self) -> bool:
        """Whether somebody has asked for the state to be stored at this boundary, or training ends at it."""
        return bool(self._save_reasons) or self._finished()

    def export_model(self) -> dict[str, torch.Tensor]:
        """Return the portable weights of the model alone."""
        return self.hook.export_model(trainer=self)  # type: ignore[no-any-return]

    def rank_zero_first(self, each_machine: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return a context that rank 0 goes through alone, and the others after it, to find what it has prepared.

        All ranks come to it, from `on_setup` on: `with self.trainer.rank_zero_first(): download()`. They wait as long
        as it takes; where rank 0 fails in it, all fail.

        Args:
            each_machine: have the first rank of each machine go first, for what machines do not share.
        """
        return self.hook.rank_zero_first(trainer=self, each_machine=each_machine)  # type: ignore[no-any-return]

    # The run --------------------------------------------------------------------------

    def _run(self, stage: Stage) -> None:
        """Do a run and tell its beginning and its end, the end to every plugin whatever happened."""
        self.stage = stage
        self.stop_reason, self._stop_status, self.cutting = None, "stopped", False
        self._asked_alone, self._agreed = [], True
        self.status, reason, first, began = "running", "", None, time.monotonic()
        folder = f" in {self.run_dir}" if "run_dir" in vars(self) else ""  # asking for it makes it
        log.info("%s begins%s on %s, rank %d of %d", stage.value, folder, self.device, self.rank, self.world_size)
        for row in self.plugins.plan() if log.isEnabledFor(logging.DEBUG) else ():
            if self.plugins.heard[row["hook"]]:
                log.debug("%(kind)s %(hook)s: wrapped by %(wrapped_by)s, done or heard by %(done_by)s", row)
        outside = get_rng_state()  # what a run draws does not leak out of it
        if self._rng is not None:
            set_rng_state(self._rng)
            self._rng = None
        try:
            self._raise(self.plugins.tell_each("on_begin_run", trainer=self, stage=stage, config=self.config))
            self.hook.run(trainer=self, stage=stage)
            self.status, reason = self._verdict()
        except BaseException as error:
            self.status = "failed"
            first, reason = error, f"{type(error).__name__}: {error}"
            self.plugins.blame(error)
            self._add_notes(error, self.plugins.tell_each("on_exception", trainer=self, exception=error))
            raise
        finally:
            ended = {"trainer": self, "stage": stage, "status": self.status, "reason": reason}
            errors = self.plugins.tell_each("on_end_run", **ended)
            self.plugins.report_failures()
            self._rng = get_rng_state()
            set_rng_state(outside)
            self.loaders.forget()
            status, took = "failed" if errors else self.status, time.monotonic() - began
            why = f": {reason.splitlines()[0]}" if reason else ""
            log.info("%s %s at step %d after %.1f s%s", stage.value, status, self.global_step, took, why)
            if first is not None:
                self._add_notes(first, errors)
            elif errors:
                self.status = "failed"
                self._raise(errors)

    def _raise(self, errors: list[BaseException]) -> None:
        if errors:
            self._add_notes(errors[0], errors[1:])
            raise errors[0]

    @staticmethod
    def _add_notes(error: BaseException, others: Iterable[BaseException]) -> None:
        for other in others:
            notes = ", ".join(getattr(other, "__notes__", ()))
            error.add_note(f"and then {type(other).__name__}: {other} ({notes})")

    def _verdict(self) -> tuple[str, str]:
        if self.stop_reason is None or (self.stage is Stage.TRAIN and self._is_over()):
            return "finished", ""
        return self._stop_status, self.stop_reason

    def run_training(self) -> None:
        """Train: what the verb `run` does for `Stage.TRAIN`."""
        self._set_up_training()
        if self._finished():
            log.warning("nothing is left to train: the run is at step %d, epoch %d", self.global_step, self.epoch)
            self._flush(self._interval)  # it may have been killed between its last save and this
            return
        self._warn_of_modes()
        self._session_began = time.monotonic() - self.counters.seconds
        self.hook.on_begin_train(trainer=self, global_step=self.global_step)
        if self.options.sanity_val_steps:
            self._check_sanity()
        if self.restored_rng is not None:
            set_rng_state(self.restored_rng)
        elif self.options.eval_when_start:
            self._evaluate()
        while not self._finished():
            self._train_one_epoch()
        self._compare_schedules(ended=self._is_over())
        if not self._preempted():  # else what was logged so far is in the state, and told when it is due
            self._flush(self._interval)
            with self._logged_at_once():
                self.hook.on_end_train(trainer=self, global_step=self.global_step)

    def _warn_of_modes(self) -> None:
        """Say that modules are trained in eval mode: modes are the user's, and this one may have been forgotten."""
        idle = [
            name or "the module itself"
            for name, module in self.module.named_modules()
            if not module.training and any(weight.requires_grad for weight in module.parameters())
        ]
        if idle and self.rank == 0:
            log.warning(
                "%d module(s) with weights to train are in eval mode, and stay in it in training (no dropout, batch "
                "norm as it is): %s. Where that is not meant, call .train() on them before training",
                len(idle), ", ".join(idle[:3]) + (" …" if len(idle) > 3 else ""),
            )  # fmt: skip

    def run_evaluation(self, stage: Stage) -> None:
        """Evaluate on its own: what the verb `run` does for the other stages."""
        if not self.optimizers:  # else this trainer has trained, and what it trained is evaluated
            set_seed(data.mix(self.options.seed, 0))
            self._set_up_model()
            self.hook.restore(trainer=self, stage=stage)
        with kept_rng():  # the same whether it comes behind a training or not
            set_seed(data.mix(self.options.seed, self.share))
            metrics = self._measure(stage, self.options.max_val_steps_per_epoch if stage is Stage.VAL else None)
        if metrics is None:
            raise ValueError(
                f"{type(self.module).__name__} has no data for this: get_{stage.value}_dataloaders() returned None"
            )
        self._tell_log(metrics)

    # Setting up -----------------------------------------------------------------------

    def _set_up_training(self) -> None:
        """Build what training needs, in the one order that is right; a second `train` goes on with it."""
        hook = self.hook
        if self.optimizers:
            self.totals = self._count_totals()
            return
        set_seed(data.mix(self.options.seed, 0))  # what is built is the same on all ranks
        self._set_up_model()
        self.totals = self._count_totals()
        self.optimizers, schedulers = hook.setup_optimizers(trainer=self)
        if not self.optimizers:
            raise ValueError(f"{type(self.module).__name__}.get_optimizers_schedulers returned no optimizer")
        self.schedulers = schedule_all(schedulers, self.options.val_loss_metric_name)
        self._followed = {metric: type(one).__name__ for one, _, metric in self.schedulers if metric is not None}
        if self.share:  # what is drawn while training is each rank's own
            set_seed(data.mix(self.options.seed, self.share))
        hook.restore(trainer=self, stage=Stage.TRAIN)

    def _set_up_model(self) -> None:
        if self._model_stands:
            return
        hook, model = self.hook, self.module
        self.window_size = hook.get_window_size(trainer=self)
        self.loaders.begin_windows(self.window_size)
        for change in (hook.convert_model, hook.split_model, hook.compile_model, hook.shard_model):
            model = change(trainer=self, model=model)
        self.model, self._model_stands = model, True

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch on one rank: what `get_train_dataloader` is asked for."""
        total, parts = self.options.train_batch_size, self.shares * self.window_size
        if total % parts:
            raise ValueError(
                f"train_batch_size={total} cannot be shared equally by {self.shares} rank(s) × "
                f"{self.window_size} micro-batch(es) = {parts}; it leaves {total % parts} over"
            )
        return int(total // parts)

    def _count_totals(self) -> Totals:
        """Work out how long the run will be, and what the options say of its ends and evaluations."""
        options = self.options
        self._first_loader = loader = self._train_loader()
        batches = self.limited(data.length(loader), self._max_batches_per_epoch)
        steps_per_epoch = None if batches is None else math.ceil(batches / self.window_size)
        asked = options.epochs
        if asked is None and options.max_steps is None and options.max_time is None:
            asked = 1
        epochs = asked
        if epochs is None and options.max_steps is not None and steps_per_epoch:
            epochs = math.ceil(options.max_steps / steps_per_epoch)  # no end: later epochs may have another length
        steps = None if steps_per_epoch is None or epochs is None else steps_per_epoch * epochs
        self._evaluation_cadence = None if options.evaluate_every is None else every(options.evaluate_every)
        self._evaluates_by_counter = self._evaluation_cadence is not None and self._evaluation_cadence.unit != "epochs"
        limits = options.max_steps, asked, None if options.max_time is None else seconds(options.max_time)
        self._ends = [math.inf if limit is None else limit for limit in limits]
        return Totals(batches, steps_per_epoch, self.limited(steps, options.max_steps), epochs)

    @property
    def _max_batches_per_epoch(self) -> int | None:
        steps = self.options.max_train_steps_per_epoch
        return None if steps is None else steps * self.window_size

    @staticmethod
    def limited(total: int | None, limit: int | None) -> int | None:
        """Return the lesser of two numbers either of which may be unknown."""
        return min((number for number in (total, limit) if number is not None), default=None)

    def get_loaders(self, stage: Stage) -> dict[str, Loader]:
        """Return the loaders of a stage by key, ready to iterate; none where the module has none.

        The module is asked anew each time, unless `keep_loaders` says otherwise.
        """
        return self.loaders.get(stage)

    def say_once(self, text: str, about: str = "") -> None:
        """Warn in the log, once in the life of this trainer; "" says nothing.

        Args:
            text: what there is to say.
            about: what it is about, where the text differs from time to time.
        """
        if text and (about or text) not in self._said:
            self._said.add(about or text)
            log.warning("%s", text)

    def _train_loader(self) -> Loader:
        loaders = self.get_loaders(Stage.TRAIN)
        if list(loaders) != ["default"]:
            raise ValueError(
                f"{type(self.module).__name__}.get_train_dataloader() must return one loader; it returned "
                f"{'None' if not loaders else f'loaders by key {list(loaders)}'}"
            )
        return loaders["default"]

    # Training -------------------------------------------------------------------------

    def _train_one_epoch(self) -> None:
        hook, counters = self.hook, self.counters
        if self.cursor.epoch != counters.epochs:
            self.cursor.begin_epoch(counters.epochs)
        resumed = self.cursor.position > 0 or bool(self.begun)
        hook.on_begin_train_epoch(trainer=self, global_step=self.global_step, epoch=self.epoch)
        loader, self._first_loader = self._first_loader, None
        if loader is None or resumed or self.epoch:
            loader = self._train_loader()
        limit = self._max_batches_per_epoch
        batches = itertools.islice(loader, None if limit is None else max(limit - self.cursor.position, 0))
        if resumed and self.restored_rng is not None:
            set_rng_state(self.restored_rng)  # on_begin_train_epoch was told again, and may have drawn
        self.restored_rng = None
        self._epoch_outputs = Collector(self.plugins.rooms["on_end_train_epoch"])
        complete = hook.train_epoch(trainer=self, batches=batches)
        if complete:
            self._end_epoch()
        self.settle()

    def _end_epoch(self) -> None:
        hook, counters = self.hook, self.counters
        cadence = self._evaluation_cadence
        if cadence is not None and cadence.unit == "epochs" and cadence.crossed(self.epoch, self.epoch + 1):
            self._evaluate()
        self._fold_losses()
        name = f"{self._train_loss}_epoch"  # with several ranks also where this one has had no batch
        train_loss = self._epoch.reductions.get(name) if self.world_size == 1 else self._epoch.reduction(name)
        if train_loss is not None:
            train_loss.sync = True  # ranks that disagreed on the best could not decide anything together
            self.best.take("train_loss", train_loss.value(self._all_reduce).item())
        hook.step_schedulers(trainer=self, when="epoch", optimizers=self.optimizers, metrics=self.metrics)
        self._flush(self._epoch)
        outputs = self._epoch_outputs.collate()
        with self._logged_at_once():
            hook.on_end_train_epoch(trainer=self, global_step=self.global_step, train_step_collated_outputs=outputs)
        self._compare_schedules(ended=False)
        counters.epochs += 1
        self.cursor.begin_epoch(counters.epochs)
        self._settling_due = True  # also where nothing was trained of what was left of the epoch

    def advance(self, window: Sequence[Any]) -> bool:
        """Settle the step before, then take one: update, count, tell; answer False if training stops instead.

        Public for performers of `train_epoch`.
        """
        if not self.settle():
            return False
        hook, counters, cursor, size = self.hook, self.counters, self.cursor, len(window)
        self._stepped = True
        samples, self.weights, self.parts = 0, [], None
        for batch in window:
            count = hook.count_samples(trainer=self, batch=batch, stage=Stage.TRAIN)
            samples += count
            self.weights.append(float(count))
        if self.plugins.heard["get_weight"]:
            self._weigh(window)
        try:
            outputs = hook.update(trainer=self, window=window)
        except WindowCut as cut:
            room = max(1, self.plugins.rooms["on_end_train_step"], self.plugins.rooms["on_end_train_epoch"])
            self.begun = [detached(row[:room]) for row in cut.outputs]
            assert self.stop_reason is not None
            hook.save(trainer=self, reason=self.stop_reason, state=None)
            return False
        self.weight = 1.0
        counters.global_step += 1
        counters.batches += size
        cursor.position += size
        cursor.consumed += size * cursor.draw
        if self.shares == 1:
            counters.samples += samples
        else:  # as if all were full: batches of ranks may differ in size, and what is due must not
            counters.samples += size * self.micro_batch_size * self.shares
        if not self._stepped:
            counters.skipped_steps += 1
        self._settling_due = True
        several = self.world_size > 1  # who watches may be there on one rank alone; all of them reduce what is logged
        collated = self._collect(outputs) if self.plugins.asking or several else []
        hook.on_end_train_step(
            trainer=self,
            global_step=counters.global_step,
            train_step_collated_outputs=collated,
            stepped=self._stepped,
        )
        if self._evaluates_by_counter and self.due(self.options.evaluate_every):
            self._evaluate()
        if (self.plugins.logging or several) and self.due(self.options.log_every):
            self._flush(self._interval)
        return True

    def _weigh(self, window: Sequence[Any]) -> None:
        """Find out how much each micro-batch weighs in a window, of all ranks, where somebody says it."""
        weigh = functools.partial(self.hook.get_weight, trainer=self, stage=Stage.TRAIN)
        real = len(window) - self.padding
        self.weights = [float(weigh(batch=batch)) if i < real else 0.0 for i, batch in enumerate(window)]
        total = sum(self.weights)
        if self.world_size > 1:
            total = self._all_reduce(torch.tensor(total, dtype=torch.float64), "sum").item()
        self.parts = [weight * self.shares / total if total else 0.0 for weight in self.weights]

    def _collect(self, outputs: Sequence[Outputs]) -> list[Any]:
        """Keep of a step's outputs what somebody will ask for; return what its end is asked for, collated."""
        for row in outputs:
            if type(row) is not tuple:
                raise TypeError(
                    "the verb 'update' must answer a list with one tuple per micro-batch, the loss first; it answered "
                    f"a {type(outputs).__name__} of {type(row).__name__}"
                )
        real = outputs[: len(outputs) - self.padding] if self.padding else outputs
        weights = self.weights if len(self.weights) == len(outputs) else itertools.repeat(1.0)
        for row, weight in zip(real, weights, strict=False):
            if row:
                loss = row[0]
                fresh = loss.grad_fn is not None and not loss._is_view()  # `kept`, without a call in each step
                self._losses.append((loss.detach() if fresh else kept(loss), weight))
        if len(self._losses) >= FOLD_AT:
            self._fold_losses()
        if self._epoch_outputs.room:
            for row in real:
                self._epoch_outputs.add(row)
        room = self.plugins.rooms["on_end_train_step"]
        if not room:
            return []
        collated = collate([detached(row[:room]) for row in real or outputs])
        return collated if real else [column[:0] for column in collated]  # as many as ever, of no sample

    def _fold_losses(self) -> None:
        """Hand the losses of the last steps to the log buffers."""
        kept_losses, self._losses = [pair for pair in self._losses if pair[1]], []  # without means of nothing
        if not kept_losses:
            return
        losses, weights = zip(*kept_losses, strict=True)
        values = wide(torch.stack([loss.reshape(()) for loss in losses]))
        total, weight = (values * torch.tensor(weights, dtype=values.dtype, device=values.device)).sum(), sum(weights)
        if (Stage.TRAIN, self._train_loss) not in self._logged_by_user:
            interval = self._interval.reduction(self._train_loss)
            interval.sync = True
            interval.add_sum(total, weight)
        if (Stage.TRAIN, f"{self._train_loss}_epoch") not in self._logged_by_user:
            self._epoch.reduction(f"{self._train_loss}_epoch").add_sum(total, weight)

    def _compare_schedules(self, ended: bool) -> None:
        """Say of schedules that they are as long as training is not."""
        planned = {"step": self.totals.steps, "epoch": self.totals.epochs}
        for scheduler, when, _ in self.schedulers:
            self.say_once(wrong_length(scheduler, (planned.get(when) or 0) if ended else None))
            if ended and when == "validation" and not self.counters.evaluations and is_plateau(scheduler):
                name = type(scheduler).__name__
                self.say_once(f"{name} has never moved: it follows an evaluation, and there was none")

    def step(self, optimizers: Sequence[torch.optim.Optimizer] | None = None, closure: Any = None) -> bool:
        """Step optimizers, all by default, through every gate; return whether all of them stepped.

        Public for performers of `update`, who say which optimizers step and when. Afterwards
        the gradients of all optimizers are cleared: one network's backward dirties another's.

        Args:
            optimizers: those whose gradients are complete.
            closure: recomputes loss and gradients and returns the loss, for optimizers that want
                one (every one of `optimizers` is given it). The gradients are then complete after
                each call of it, and that is when `on_begin_optimizer_step` is told; gates are asked
                before the first. The optimizer is given the mean of the losses of all ranks.
        """
        hook = self.hook
        if isinstance(optimizers, torch.optim.Optimizer):
            raise TypeError(f"trainer.step takes a list of optimizers, not one {type(optimizers).__name__}; write [it]")
        chosen = self.optimizers if optimizers is None else optimizers
        if closure is None:
            hook.on_begin_optimizer_step(trainer=self, optimizers=chosen)
        else:
            closure = self._completing(closure, chosen)
        stepped = bool(hook.should_step(trainer=self, optimizers=chosen))
        if stepped:
            for optimizer in chosen:
                if not hook.step_optimizer(trainer=self, optimizer=optimizer, closure=closure):
                    stepped = False
        hook.on_end_optimizer_step(trainer=self, optimizers=chosen, stepped=stepped)
        if stepped:
            hook.step_schedulers(trainer=self, when="step", optimizers=chosen, metrics=self.metrics)
        else:
            self._stepped = False
        self.zero_grad()
        return stepped

    def _completing(self, closure: Any, optimizers: Sequence[torch.optim.Optimizer]) -> Any:
        """Return a closure after whose every call the gradients are told to be complete.

        Gradients are those of all ranks, so the loss is as well: optimizers that look at it (a line search) would take
        another way on each rank.
        """
        several = self.world_size > 1 and bool(self.plugins.performers("shard_model"))

        def complete() -> Any:
            loss = closure()
            self.hook.on_begin_optimizer_step(trainer=self, optimizers=optimizers)
            if several and loss is not None:
                loss = self._all_reduce(torch.as_tensor(loss, device=self.device).detach(), "sum") / self.shares
            return loss

        return complete

    def zero_grad(self) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def settle(self, counted: bool = False) -> bool:
        """Bring the last step to its boundary, once: tell it, serve what was asked for; return whether to go on.

        Public for performers of `train_epoch` that take steps in a way of their own: they count them in `counters` and
        `position`, and say after each that it is `counted`.
        """
        if self._settling_due or counted:
            self._settling_due = False
            self.counters.seconds = time.monotonic() - self._session_began
            if self.world_size > 1:
                self._vote()
            if self._finished() and self.options.eval_when_finish and not self._preempted():
                self._evaluate()
            self.hook.on_boundary(trainer=self, global_step=self.counters.global_step)
            if self._followed and self.due("eval"):
                require_metrics(self, self.metrics, self._followed, boundary=True)
            back = self.restored_rng  # another state was put back, so the data go on where that one stood
            if back is not None:
                set_rng_state(back)
            finished = self._finished()
            if finished:
                self._save_reasons.append((self._stopping() and self.stop_reason) or "end of training")
            if self._save_reasons:
                reasons, self._save_reasons = self._save_reasons, []
                self.hook.save(trainer=self, reason=", ".join(dict.fromkeys(reasons)), state=None)
            self.settled = snapshot(self.counters)
            return not finished and back is None
        return True  # what was asked for between two steps is served at the boundary of the second

    def _vote(self) -> None:
        """Have all ranks know of what some of them have asked for alone."""
        asked = not self._agreed or bool(self._asked_alone)
        some, self.counters.seconds = self.hook.vote(trainer=self, asked=asked, seconds=self.counters.seconds)
        if not some:
            return
        stop = self.stop_reason, self._stop_status, self._preempted_code
        ballots = self.hook.all_gather(trainer=self, value=(stop, self._asked_alone))
        self._asked_alone = []
        self._save_reasons += [reason for _, saves in ballots for reason in saves]
        stops = [stop for stop, _ in ballots if stop[0] is not None]
        if stops:  # several may have asked: the lowest rank's counts
            (self.stop_reason, self._stop_status, self._preempted_code), self._agreed = stops[0], True

    def _stopping(self) -> bool:
        """Tell whether somebody has asked for the end, and all ranks know it."""
        return self.stop_reason is not None and self._agreed

    def _finished(self) -> bool:
        """Tell whether training ends here, by itself or because someone asked for it."""
        if self.stop_reason is not None and self._agreed:
            return True
        counters, (steps, epochs, limit) = self.counters, self._ends  # `_is_over`, without two calls in each step
        return counters.global_step >= steps or counters.epochs >= epochs or counters.seconds >= limit

    def _is_over(self) -> bool:
        """Tell whether all that was to be trained has been trained."""
        counters, (steps, epochs, time_limit) = self.counters, self._ends
        return counters.global_step >= steps or counters.epochs >= epochs or counters.seconds >= time_limit

    def _preempted(self) -> bool:
        """Tell whether the run shall be gone on with later; one that is over by itself cannot be."""
        return self._stopping() and self._stop_status == "preempted" and not self._is_over()

    def due(self, cadence: str | None) -> bool:
        """Tell whether a cadence ("50 steps", "epoch", "10 min") has become due since the last boundary."""
        if cadence is None:
            return False
        number, unit = every(cadence)
        place = UNITS.index(unit)
        return bool(snapshot(self.counters)[place] // number > self.settled[place] // number)

    # Evaluation -----------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Validate during training, once per step."""
        if self._evaluated_at == self.global_step:
            return
        self._evaluated_at = self.global_step
        with kept_rng():  # training is the same, whatever is evaluated and how often
            metrics = self._measure(Stage.VAL, self.options.max_val_steps_per_epoch)
            if metrics is None:
                return
            self.counters.evaluations += 1
            self.best.take("valid_loss", metrics.get(self.options.val_loss_metric_name, math.nan))
            self._tell_log(metrics)
            with self._logged_at_once(metrics):
                self.hook.on_end_validation(trainer=self, global_step=self.global_step, metrics=metrics)
            self.hook.step_schedulers(trainer=self, when="validation", optimizers=self.optimizers, metrics=metrics)

    def _measure(self, stage: Stage, limit: int | None) -> dict[str, float] | None:
        """Evaluate a stage; None where the module has no loader for it."""
        loaders = self.get_loaders(stage)
        if not loaders:
            return None
        began = time.monotonic()
        self.metrics = self.hook.evaluate(trainer=self, stage=stage, loaders=loaders, limit=limit)
        log.debug("%s at step %d took %.3f s", stage.value, self.global_step, time.monotonic() - began)
        return self.metrics

    def _check_sanity(self) -> None:
        """Try the validation on a few batches and leave no trace: metrics are dropped, randomness is put back."""
        metrics, self.sanity_checking = self.metrics, True
        try:
            with kept_rng():
                tried = self._measure(Stage.VAL, self.options.sanity_val_steps)
            if tried is not None:
                require_metrics(self, tried, self._followed)
        finally:
            self.sanity_checking = False
        self.metrics = metrics

    @contextlib.contextmanager
    def evaluating(self, stage: Stage) -> Iterator[None]:
        """Be in an evaluation: no gradients, every submodule in eval mode and back to what it was, logs apart."""
        modes = [(module, module.training) for module in self.model.modules()]
        outer, self.stage, self._evaluation = self.stage, stage, LogBuffer()
        self._in_training = outer is Stage.TRAIN and stage is Stage.VAL and not self.sanity_checking
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
            self.stage, self._evaluation, self.log_suffix = outer, None, ""

    def evaluate_batches(self, stage: Stage, key: str, batches: Iterable[Any]) -> None:
        """Take one loader's batches through the model and tell of each: the inner loop of `evaluate`."""
        hook, index = self.hook, -1
        tell = getattr(hook, f"on_end_{stage.value}_step")
        collector = Collector(self.plugins.rooms.get(f"on_end_{stage.value}_epoch", 0))
        for index, batch in enumerate(batches):
            weight = self.weight = float(hook.get_weight(trainer=self, batch=batch, stage=stage))
            batch = hook.prepare_batch(trainer=self, batch=batch, stage=stage)
            outputs = hook.call_model(trainer=self, batch=batch, stage=stage)
            if stage is not Stage.PREDICT:
                outputs = as_outputs(outputs, f"{stage.value}_step")
                self._take_loss(stage, outputs, weight)
                if collector.room:
                    collector.add(outputs)
            tell(trainer=self, outputs=outputs, batch=batch, key=key, index=index)
        self.weight = 1.0
        if index < 0:
            warnings.warn(f"the {stage.value} loader {key!r} gave no batch, so nothing is known of it", stacklevel=2)
        if stage is Stage.PREDICT:
            hook.on_end_predict_epoch(trainer=self, key=key)
        else:
            outputs = hook.gather_outputs(trainer=self, outputs=collector.collate(), stage=stage, key=key)
            collated = {f"{stage.value}_step_collated_outputs": outputs}
            ended = getattr(hook, f"on_end_{stage.value}_epoch")
            ended(trainer=self, global_step=self.global_step, key=key, **collated)

    def _take_loss(self, stage: Stage, outputs: Outputs, weight: float) -> None:
        """Log the loss of an evaluation batch: its first output, where that is one number.

        Where the mean so far is told, it is of this rank alone, as others may have fewer batches, and of a copy, as to
        fold the values here would round them otherwise.
        """
        if outputs and is_number(outputs[0]):
            assert self._evaluation is not None
            name = self.options.val_loss_metric_name if stage is Stage.VAL else f"{stage.value}_loss"
            loss = as_number(name, outputs[0])
            if getattr(outputs[0], "ndim", 0) and weight == 1:
                self.say_once(
                    f"{stage.value}_step returns a first output of one element for a batch of one sample: it is taken "
                    f"for the loss ({name}). Return the loss as a tensor of shape (), and what is no loss behind it"
                )
            names = dict.fromkeys((name, name + self.log_suffix))  # of all loaders together, and of each
            by_user = (stage, name) in self._logged_by_user
            for full_name in names if not by_user else ():
                reduction = self._evaluation.reduction(full_name)
                reduction.sync = True
                reduction.add(loss, weight)
            if self._in_training and not self.options.report_loss_after_eval and not by_user:
                batch = self.counters.evaluation_batches = self.counters.evaluation_batches + 1
                if batch % every(self.options.log_every).number == 0 and self.plugins.heard["on_log"]:
                    mean = Reduction.from_state(reduction.get_state()).value().item()
                    self._tell_log({f"{name}_batch{self.log_suffix}": mean}, batch)

    def collect_metrics(self) -> dict[str, float]:
        """Return what this evaluation has logged, over all ranks."""
        assert self._evaluation is not None
        return self._floats(self._evaluation)

    # Logging --------------------------------------------------------------------------

    def log(
        self,
        *,
        over: str = "interval",
        reduce: str = "mean",
        sync: bool = False,
        prog: bool = False,
        weighted_by: float | torch.Tensor | None = None,
        **values: Any,
    ) -> None:
        """Log values by name, from anywhere; tensors stay on their device until the flush.

        In an evaluation the values belong to it, and of several loaders each gets the loader's key into its
        name. What is logged where an epoch, a validation or training ends is told right after it. Means are
        weighted by the samples of the batch under way. Dropped while `idle`.

        Args:
            over: "interval", until `log_every` is due, or "epoch", until the epoch's end.
            reduce: "mean", "sum", "min", "max" or "last" of what is logged under one name.
            sync: reduce over all ranks too (an evaluation always does).
            prog: have progress displays show it.
            weighted_by: how much these values weigh in a mean, where that is not the samples of the batch.
            values: numbers, or tensors of one element.

        Raises:
            TypeError: a value that is not one number.
            ValueError: an unknown `over` or `reduce`, or one name with two reductions.
        """
        if over not in ("interval", "epoch") or reduce not in REDUCTIONS:
            raise ValueError(
                f"log(over={over!r}, reduce={reduce!r}): over is interval or epoch, reduce is {', '.join(REDUCTIONS)}"
            )
        if self.idle:
            return
        buffer, suffix = self._evaluation, self.log_suffix
        if buffer is None:
            buffer, suffix = self._told_at_once, ""
        if buffer is None:
            buffer = self._epoch if over == "epoch" else self._interval
        weight = self.weight if weighted_by is None else float(weighted_by)
        self._logged_by_user |= {(self.stage, name) for name in values.keys() & self._own_names}
        for name, value in values.items():
            both = (name, name + suffix) if suffix and name in self._own_names else (name + suffix,)
            for full_name in both:  # the loss counts over all loaders, too
                reduction = buffer.reduction(full_name, reduce)
                reduction.sync = reduction.sync or sync or self._evaluation is not None
                reduction.add(as_number(name, value), weight)
            if prog:
                self.shown.add(name + suffix)

    def log_object(self, name: str, value: Any) -> None:
        """Hand something that is no number (a text, a figure, an image, a table) to who keeps records."""
        self.hook.on_log_object(trainer=self, name=name, value=value, global_step=self.global_step)

    @contextlib.contextmanager
    def _logged_at_once(self, metrics: dict[str, float] | None = None) -> Iterator[None]:
        """Have what is logged within belong to where that is: tell it right afterwards, and add it to `metrics`."""
        self._told_at_once = buffer = LogBuffer()
        try:
            yield
        finally:
            self._told_at_once = None
        if metrics is not None:
            for reduction in buffer.reductions.values():
                reduction.sync = True  # as in the evaluation
        if self.world_size > 1 or buffer:
            values = self._floats(buffer)
            if metrics is not None:
                metrics.update(values)
            self._tell_log(values)

    def _flush(self, buffer: LogBuffer) -> None:
        """Copy the values of a buffer off the device, once for all, if anybody wants to see them."""
        self._fold_losses()
        if self.world_size > 1 or (buffer and self.plugins.heard["on_log"]):
            self._tell_log(self._floats(buffer))
        buffer.clear()

    def _floats(self, buffer: LogBuffer) -> dict[str, float]:
        """Empty a buffer; return its values, over all ranks where they are to be."""
        if self.world_size > 1:
            buffer.agree(self.hook.all_gather(trainer=self, value=buffer.synced()))
        return to_floats(buffer.collect(self._all_reduce))

    def _all_reduce(self, value: torch.Tensor, op: str) -> torch.Tensor:
        return self.hook.all_reduce(trainer=self, value=value, op=op)  # type: ignore[no-any-return]

    def _tell_log(self, metrics: dict[str, float], batch: int | None = None) -> None:
        metrics = self.hook.filter_log(trainer=self, metrics=dict(metrics))
        if metrics:
            self.hook.on_log(trainer=self, metrics=metrics, global_step=self.global_step if batch is None else batch)

    @contextlib.contextmanager
    def idling(self) -> Iterator[None]:
        """Take a batch that only keeps ranks in step: say so (`idle`), and have it count nowhere in the module."""
        self.idle = True
        try:
            with untouched(self.module):
                yield
        finally:
            self.idle = False

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the trainer's own part of the run's state."""
        cursor = self.cursor
        return {
            "counters": dataclasses.asdict(self.counters),
            "cursor": {"epoch": cursor.epoch, "position": cursor.position, "consumed": cursor.consumed},
            "best": dataclasses.asdict(self.best),
            "evaluated_at": self._evaluated_at,
            "metrics": self.metrics,
            "frozen": [name for name, weight in self.module.named_parameters() if not weight.requires_grad],
            "ranks": self.world_size,
        }

    def update_state(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.counters = Counters(**state["counters"])
        self.settled = snapshot(self.counters)
        for name, value in state["cursor"].items():
            setattr(self.cursor, name, value)
        self.best = Best(**state["best"])
        self._evaluated_at = state["evaluated_at"]
        self.metrics = dict(state["metrics"])
        if not self.options.reset_optimizers_schedulers:
            frozen = {plain_name(name) for name in state["frozen"]}
            for name, weight in self.module.named_parameters():
                weight.requires_grad_(name not in frozen)

    def rng_state(self) -> Mapping[str, Any]:
        """Return the random states of this run, which are not those of the process while it is not under way."""
        return self._rng or get_rng_state()

    def warn_of_lost(self, state: Mapping[str, Any]) -> None:
        """Say what of a run's state nobody takes, because it is of ranks that are not there any more."""
        ranks, plugins = state["trainer"].get("ranks", 1), state.get("own_plugins")
        if ranks > self.world_size and plugins and self.rank == 0:
            log.warning(
                "this run has %d rank(s), and had %d before: what ranks from %d on kept for themselves (%s) is lost",
                self.world_size, ranks, self.world_size, ", ".join(plugins),
            )  # fmt: skip

    def get_logs(self) -> dict[str, Any]:
        """Return what has been logged and not told yet, by this rank."""
        return {
            "losses": torch.stack([loss.reshape(()) for loss, _ in self._losses]) if self._losses else None,
            "weights": torch.tensor([weight for _, weight in self._losses], dtype=torch.float64),
            "interval": self._interval.get_state(),
            "epoch": self._epoch.get_state(),
        }

    def update_logs(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        losses = [] if state.get("losses") is None else list(state["losses"].unbind())
        weights = state["weights"].tolist() if "weights" in state else [1.0] * len(losses)
        self._losses = list(zip(losses, weights, strict=True))
        self._interval.update_state(state.get("interval", {}))
        self._epoch.update_state(state.get("epoch", {}))

    @property
    def global_step(self) -> int:
        """Optimizer steps completed."""
        return self.counters.global_step

    @property
    def epoch(self) -> int:
        """Index of the epoch under way, which is the number of epochs completed."""
        return self.counters.epochs

    @property
    def position(self) -> int:
        """Micro-batches of this epoch trained on."""
        return self.cursor.position

    @position.setter
    def position(self, batches: int) -> None:
        self.cursor.position, self.cursor.consumed = batches, batches * self.cursor.draw

    @functools.cached_property
    def resuming(self) -> Counters | None:
        """The counters of the state that this run goes on from, before it is there; None for a run that begins.

        For modules that become others while they train (layers that join, or are unfrozen): ask it, on all ranks, where
        the model and its optimizers are made.
        """
        found = self.hook.find_state(trainer=self, stage=self.stage)
        return Counters(**found["counters"]) if found else None

    @functools.cached_property
    def run_dir(self) -> Path:
        """The folder of this run, made when it is first asked for: nobody who writes nothing leaves one."""
        path = run_folder(self.options, training=self.stage is Stage.TRAIN)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _own_config(self, plugins: Mapping[str, Any]) -> dict[str, Any]:
        """Describe a run that was built in Python as a configuration would."""
        described = {
            "module": {"_target_": f"{type(self.module).__module__}.{type(self.module).__qualname__}"},
            "trainer": dataclasses.asdict(self.options),
            "plugins": {name: options_of(plugin) for name, plugin in plugins.items()},
        }
        return mask(described)  # type: ignore[no-any-return]
