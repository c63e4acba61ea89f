"""The trainer: what a user and a plugin may ask of a run.

What a step, a window, an epoch and an evaluation are stands in `hookline.hookspecs`, as the
bodies of its verbs. What surrounds them stands in `hookline.loop`, whose parts the trainer holds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hookline import data
from hookline.cadence import every
from hookline.counters import UNITS, Best, Counters, Cursor, Totals, snapshot
from hookline.interfaces import Stage, join
from hookline.loop.building import Built, adapt_module
from hookline.loop.ends import Ends
from hookline.loop.evaluation import Evaluation
from hookline.loop.idle import untouched
from hookline.loop.logs import Logs
from hookline.loop.session import Session
from hookline.loop.training import Training
from hookline.loop.window import Window
from hookline.options import make_options, run_folder
from hookline.plugins import MODULE, PluginManager, build, describe
from hookline.randomness import Randomness
from hookline.schedulers import Scheduled

log = logging.getLogger("hookline.trainer")


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
        self.counters, self.cursor, self.best = Counters(), Cursor(seed=self.options.seed), Best()
        self.idle = False
        """Whether the micro-batch under way only keeps ranks in step: what is logged in it is dropped."""
        self._said: set[str] = set()
        self.plugins = PluginManager()
        self.hook = self.plugins.routes
        # The parts of the loop, each of which owns its state; arrows lead from the later to the earlier.
        self.loaders, self.randomness = data.Loaders(self), Randomness()
        self.window, self.ends = Window(self), Ends(self)
        self.session = Session(self, self.ends, self.randomness, self.loaders)
        self.built = Built(self, self.loaders, self.window)
        self.logs = Logs(self, self.window)
        self.evaluation = Evaluation(self, self.session, self.built, self.logs)
        self.training = Training(self, self.evaluation, self.ends, self.window, self.randomness)
        try:
            self._begin(module, build(plugins), config)
        except BaseException as error:
            self.plugins.blame(error)
            raise

    def _begin(self, module: Any, named: Mapping[str, Any], config: Mapping[str, Any] | None) -> None:
        """Register the plugins, find out where this process is, and make the module."""
        self.plugins.register_all(named)
        self.rank, self.local_rank, self.world_size = self.hook.get_ranks(trainer=self)
        self.share, self.shares = self.hook.get_share(trainer=self)
        self.device: torch.device = self.hook.get_device(trainer=self)
        self.on_cpu = self.device.type == "cpu"
        self.module = adapt_module(self, module)
        join(self.module, self)
        self.built.use_model(self.module)
        # pluggy calls last whom it met first: the module's own hooks are the innermost.
        for name in named:
            self.plugins.unregister(name=name)
        self.plugins.register(self.module, MODULE)
        self.plugins.register_all(named)
        self.config = dict(config) if config is not None else describe(self.module, self.options, named)
        self.plugins.hook.on_setup.call_historic(kwargs={"trainer": self})

    # Runs -----------------------------------------------------------------------------

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

    def _run(self, stage: Stage) -> None:
        folder = str(self.run_dir) if "run_dir" in vars(self) else ""  # asking for it makes it
        self.session.do(stage, folder)

    # What anyone may ask for ------------------------------------------------------------

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
        self.logs.log(values, over=over, reduce=reduce, sync=sync, prog=prog, weighted_by=weighted_by)

    def log_object(self, name: str, value: Any) -> None:
        """Hand something that is no number (a text, a figure, an image, a table) to who keeps records."""
        self.hook.on_log_object(trainer=self, name=name, value=value, global_step=self.global_step)

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
        self.ends.stop(reason, status, exit_code, alone=alone, within_window=within_window)

    def save(self, reason: str, alone: bool = False) -> None:
        """Ask for the state to be stored; done at the next boundary, once for all who ask.

        Args:
            reason: stands in what is stored.
            alone: this rank alone may know of it (a signal), so it is done at the boundary at which
                all ranks have agreed. Otherwise all ranks ask at the same step.
        """
        self.ends.save(reason, alone)

    def due(self, cadence: str | None) -> bool:
        """Tell whether a cadence ("50 steps", "epoch", "10 min") has become due since the last boundary."""
        if cadence is None:
            return False
        number, unit = every(cadence)
        place = UNITS.index(unit)
        return bool(snapshot(self.counters)[place] // number > self.training.settled[place] // number)

    def say_once(self, text: str, about: str = "") -> None:
        """Warn in the log, once in the life of this trainer; "" says nothing.

        Args:
            text: what there is to say.
            about: what it is about, where the text differs from time to time.
        """
        if text and (about or text) not in self._said:
            self._said.add(about or text)
            log.warning("%s", text)

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

    # For performers of the loop's verbs -------------------------------------------------

    def advance(self, window: Sequence[Any]) -> bool:
        """Settle the step before, then take one: update, count, tell; answer False if training stops instead.

        Public for performers of `train_epoch`.
        """
        return self.training.advance(window)

    def settle(self, counted: bool = False) -> bool:
        """Bring the last step to its boundary, once: tell it, serve what was asked for; return whether to go on.

        Public for performers of `train_epoch` that take steps in a way of their own: they count them in `counters` and
        `position`, and say after each that it is `counted`.
        """
        return self.training.settle(counted)

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
        return self.training.step(optimizers, closure)

    def zero_grad(self) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.built.optimizers:
            optimizer.zero_grad()

    @contextlib.contextmanager
    def idling(self) -> Iterator[None]:
        """Take a batch that only keeps ranks in step: say so (`idle`), and have it count nowhere in the module."""
        self.idle = True
        try:
            with untouched(self.module):
                yield
        finally:
            self.idle = False

    @property
    def model(self) -> torch.nn.Module:
        """What the loop calls: the module, converted, split, compiled and sharded as plugins say."""
        return self.built.model

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers, in the module's order; empty before training is set up."""
        return self.built.optimizers

    @property
    def schedulers(self) -> list[Scheduled]:
        """The schedulers, each with when it moves and the metric that it follows."""
        return self.built.schedulers

    @property
    def totals(self) -> Totals:
        """How long the run will be."""
        return self.built.totals

    # Where the run is -------------------------------------------------------------------

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
        self.cursor.move_to(batches)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the last evaluation."""
        return self.evaluation.metrics

    @property
    def sanity_checking(self) -> bool:
        """Whether the evaluation under way only tries whether it works."""
        return self.evaluation.sanity_checking

    @property
    def window_size(self) -> int:
        """Micro-batches of one optimizer step; the last window of an epoch may have fewer."""
        return self.window.size

    @property
    def padding(self) -> int:
        """How many micro-batches at the end of this window only keep ranks in step: their outputs are dropped."""
        return self.window.padding

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch on one rank: what `get_train_dataloader` is asked for."""
        return self.window.micro_batch_size

    @property
    def stop_reason(self) -> str | None:
        """Why somebody has asked for the end; None while nobody has."""
        return self.ends.reason

    @property
    def save_asked(self) -> bool:
        """Whether somebody has asked for the state to be stored at this boundary, or training ends at it."""
        return self.ends.save_asked

    @property
    def stage(self) -> Stage:
        """What is done now: training, or an evaluation, also one within a training."""
        return self.session.stage

    @property
    def status(self) -> str:
        """How the last run ended: "finished", "stopped", "preempted" or "failed"; "running" until then."""
        return self.session.status

    @property
    def exit_code(self) -> int:
        """What the command line ends with: 0 only for a run that is done."""
        return {"finished": 0, "stopped": 0, "preempted": self.ends.exit_code}.get(self.status, 1)

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

    def use_run_dir(self, folder: Path) -> None:
        """Have the folder of another rank."""
        self.run_dir = folder
