"""The trainer: the interface of a run for users and plugins.

The bodies of the verbs in `hookline.hookspecs` define a step, a window, an epoch and an evaluation. The parts in
`hookline.loop`, which the trainer holds, do the rest.
"""

from __future__ import annotations

import contextlib
import functools
import logging
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
        module: a `ModuleInterface`, or a function that makes one, or an object that an adapter among the plugins
            converts into one.
        plugins: plugin objects and names in the order of their calls; or a mapping of names to objects, to
            options, or to None to turn one off.
        config: the configuration that this run was built from, with its secrets masked; plugins that keep
            records get it.
        options: the fields of `Options`, by keyword.

    Raises:
        TypeError: an unknown option, or a module that no plugin can adapt.
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
        """Whether the pass under way does not count, as within `idling`; `log` drops values during it."""
        self._said: set[str] = set()
        self.plugins = PluginManager()
        self.hook = self.plugins.routes
        # The parts of the loop, each of which owns its state; a part may use those made before it.
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
        """Register the plugins, find the rank and the device of this process, and make the module."""
        self.plugins.register_all(named)
        self.rank, self.local_rank, self.world_size = self.hook.get_ranks(trainer=self)
        self.share, self.shares = self.hook.get_share(trainer=self)
        self.device: torch.device = self.hook.get_device(trainer=self)
        self.on_cpu = self.device.type == "cpu"
        self.module = adapt_module(self, module)
        join(self.module, self)
        self.built.use_model(self.module)
        # pluggy calls the first registered plugin last: the module's own hooks are innermost.
        for name in named:
            self.plugins.unregister(name=name)
        self.plugins.register(self.module, MODULE)
        self.plugins.register_all(named)
        self.config = dict(config) if config is not None else describe(self.module, self.options, named)
        self.plugins.hook.on_setup.call_historic(kwargs={"trainer": self})

    # Runs -----------------------------------------------------------------------------

    def train(self) -> None:
        """Train until the epochs, the steps or the time are over, or until a stop is requested.

        Raises:
            BaseException: whatever is raised in the run, with a note that names the plugin that raised it.
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

    def predict(self, collect: bool = False) -> dict[str, Any] | None:
        """Predict; pass each batch's outputs to `on_end_predict_step`.

        Args:
            collect: return the outputs of all ranks by loader, in the order of the data, on the host.
        """
        return self.evaluation.predict(collect, self._folder())

    def _run(self, stage: Stage) -> None:
        self.session.do(stage, self._folder())

    def _folder(self) -> str:
        return str(self.run_dir) if "run_dir" in vars(self) else ""  # reading it would make it

    # For the module and every plugin -----------------------------------------------------

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

        In an evaluation the values belong to it; with several loaders the loader's key is appended to each name. Values
        logged at the end of an epoch, a validation or training are flushed right after it. Means are weighted by the
        samples of the current batch. Values logged while `idle` are dropped.

        Args:
            over: "interval", until `log_every` is due, or "epoch", until the epoch's end.
            reduce: "mean", "sum", "min", "max" or "last" of the values logged under one name.
            sync: reduce over all ranks too (an evaluation always does).
            prog: show it in progress displays.
            weighted_by: the weight of these values in a mean, if not the number of samples of the batch.
            values: numbers, or tensors of one element.

        Raises:
            TypeError: a value that is not one number.
            ValueError: an unknown `over` or `reduce`, or one name with two reductions.
        """
        self.logs.log(values, over=over, reduce=reduce, sync=sync, prog=prog, weighted_by=weighted_by)

    def log_object(self, name: str, value: Any) -> None:
        """Pass a text, a figure, an image or a table to the plugins that implement `on_log_object`, unless `idle`."""
        if not self.idle:
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
        """Request the end of training, from anywhere; it comes at the next boundary.

        Args:
            reason: for the user and `on_end_run`.
            status: "stopped", or "preempted" if the run is to be resumed later.
            exit_code: of the command line, if the run is preempted.
            alone: with several ranks, perhaps only this rank stops (a signal); all ranks end at the boundary at which
                they have agreed. False: all ranks call it at the same step, for the same reason, such as a value that
                is reduced over them; they end at the next boundary. If only some ranks do so, the run hangs.
            within_window: save and end after the current micro-batch, in the middle of the window. Only on one rank,
                and only if the core does `update`, `run_window` and `train_epoch`; else training ends at the boundary.
        """
        self.ends.stop(reason, status, exit_code, alone=alone, within_window=within_window)

    def save(self, reason: str, alone: bool = False) -> None:
        """Request a save; the next boundary does it, once for all requests.

        Args:
            reason: stored with the state.
            alone: perhaps only this rank calls it (a signal), so it is done at the boundary at which all ranks have
                agreed. False: all ranks call it at the same step.
        """
        self.ends.save(reason, alone)

    def due(self, cadence: str | None) -> bool:
        """Tell whether a cadence ("50 steps", "0.5 epoch", "10 min") has become due since the last boundary."""
        if cadence is None:
            return False
        number, unit = asked = every(cadence)
        now, settled, place, batches = snapshot(self), self.training.settled, UNITS.index(unit), self.cursor.batches
        if unit == "epochs" and type(number) is not int:
            return asked.passed(now[place], now[-1], batches) > asked.passed(settled[place], settled[-1], batches)
        before = self.training.clock_before if unit == "seconds" else settled[place]
        return bool(now[place] // number > before // number)

    def say_once(self, text: str, about: str = "") -> None:
        """Log a warning, once in the life of this trainer; "" logs nothing.

        Args:
            text: the warning.
            about: identifies the warning, if its text varies.
        """
        if text and (about or text) not in self._said:
            self._said.add(about or text)
            log.warning("%s", text)

    def export_model(self) -> dict[str, torch.Tensor]:
        """Return only the portable weights of the model."""
        return self.hook.export_model(trainer=self)  # type: ignore[no-any-return]

    def rank_zero_first(self, each_machine: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return a context that rank 0 executes first, alone, and the other ranks after it, to use what it prepared.

        All ranks enter it, from `on_setup` on: `with self.trainer.rank_zero_first(): download()`. They wait as long as
        it takes; if rank 0 fails in it, all ranks fail.

        Args:
            each_machine: let the first rank of each machine go first, for files that machines do not share.
        """
        return self.hook.rank_zero_first(trainer=self, each_machine=each_machine)  # type: ignore[no-any-return]

    # For performers of the loop's verbs -------------------------------------------------

    def advance(self, window: Sequence[Any]) -> bool:
        """Bring the previous step to its boundary, then do one step; return False if training stops instead.

        For performers of `train_epoch`.
        """
        return self.training.settle() and self.training.take_step(window)

    def settle(self, counted: bool = False) -> bool:
        """Bring the last step to its boundary, once: call `on_boundary`, save, stop; return whether to continue.

        For performers of `train_epoch` that do steps of their own: count each step in `counters` and `position`, then
        call this with `counted=True`.
        """
        return self.training.settle(counted)

    def step(self, optimizers: Sequence[torch.optim.Optimizer] | None = None, closure: Any = None) -> bool:
        """Step optimizers, all by default, through every gate; return whether all of them stepped.

        For performers of `update`, which choose the optimizers and the moment. It then clears the gradients of all
        optimizers, because the backward pass of one network adds gradients to others.

        Args:
            optimizers: those whose gradients are complete.
            closure: recomputes loss and gradients and returns the loss, for optimizers that need one (each of
                `optimizers` gets it). The gradients are then complete after each call of it, and
                `on_begin_optimizer_step` comes then; gates are called before the first call. The optimizer gets the
                mean loss over all ranks.
        """
        return self.training.step(optimizers, closure)

    def zero_grad(self) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.built.optimizers:
            optimizer.zero_grad()

    @contextlib.contextmanager
    def idling(self) -> Iterator[None]:
        """Set `idle` within, for a pass that does not count; restore what the module has counted. May be nested."""
        before, self.idle = self.idle, True
        try:
            with untouched(self.module):
                yield
        finally:
            self.idle = before

    @property
    def model(self) -> torch.nn.Module:
        """The model that the loop calls: the module after plugins converted, split, compiled and sharded it."""
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
        """The expected length of the run."""
        return self.built.totals

    # Where the run is -------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Completed optimizer steps."""
        return self.counters.global_step

    @property
    def epoch(self) -> int:
        """Index of the current epoch, which is the number of completed epochs."""
        return self.counters.epochs

    @property
    def position(self) -> int:
        """Trained micro-batches of this epoch."""
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
        """Whether the evaluation under way is the sanity check before training."""
        return self.evaluation.sanity_checking

    @property
    def window_size(self) -> int:
        """Micro-batches of one optimizer step; the last window of an epoch may have fewer."""
        return self.window.size

    @property
    def padding(self) -> int:
        """Micro-batches at the end of this window that only keep ranks in step; their outputs are dropped."""
        return self.window.padding

    @property
    def micro_batch_size(self) -> int:
        """Samples of one micro-batch on one rank: the `batch_size` of `get_train_dataloader`."""
        return self.window.micro_batch_size

    @property
    def stop_reason(self) -> str | None:
        """The reason of a requested stop, or None."""
        return self.ends.reason

    @property
    def save_asked(self) -> bool:
        """Whether this boundary saves, because of a request or because training ends."""
        return self.ends.save_asked

    @property
    def stage(self) -> Stage:
        """The current stage: training, or an evaluation, also one within training."""
        return self.session.stage

    @property
    def status(self) -> str:
        """How the last run ended: "finished", "stopped", "preempted" or "failed"; "running" until then."""
        return self.session.status

    @property
    def exit_code(self) -> int:
        """The exit code of the command line: 0 only for a run that is done."""
        return {"finished": 0, "stopped": 0, "preempted": self.ends.exit_code}.get(self.status, 1)

    @functools.cached_property
    def resuming(self) -> Counters | None:
        """The counters of the checkpoint of a resumed run, even before it is loaded; None for a new run.

        For modules that change while they train (layers that join, or are unfrozen): read it, on all ranks, where you
        make the model and its optimizers.
        """
        found = self.hook.find_state(trainer=self, stage=self.stage)
        return Counters(**found["counters"]) if found else None

    @functools.cached_property
    def run_dir(self) -> Path:
        """The folder of this run; the first access makes it, so a run that writes nothing leaves none."""
        path = run_folder(self.options, training=self.stage is Stage.TRAIN)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def use_run_dir(self, folder: Path) -> None:
        """Use the run folder of another rank."""
        self.run_dir = folder
