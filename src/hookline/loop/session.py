"""A session: one call of `train`, `validate`, `test` or `predict`; every plugin gets its end, errors included."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from hookline.data import Loaders
from hookline.interfaces import Stage
from hookline.loop.ends import Ends
from hookline.masking import redact
from hookline.randomness import Randomness

if TYPE_CHECKING:
    from hookline.run import Run

log = logging.getLogger("hookline.trainer")


class Session:
    """Does a run, and calls `on_begin_run`, `on_exception` and `on_end_run`."""

    def __init__(self, run: Run, ends: Ends, randomness: Randomness, loaders: Loaders) -> None:
        self.run, self.ends, self.randomness, self.loaders = run, ends, randomness, loaders
        self.stage = Stage.TRAIN
        """The current stage."""
        self.status = "not started"
        """How the last run ended: "finished", "stopped", "preempted" or "failed"; "running" until then."""

    @contextlib.contextmanager
    def at(self, stage: Stage) -> Iterator[None]:
        """Set the stage within the block."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    def do(self, stage: Stage, folder: str) -> None:
        """Do a run of one stage; `folder` is logged if it is already known.

        Raises:
            RuntimeError: a run of this trainer is under way.
        """
        run, began = self.run, time.monotonic()
        if self.status == "running":
            raise RuntimeError(
                f"a run of this trainer ({self.stage.value}) is under way, and another one within it would end it for "
                "its plugins: in a hook, validate by trainer.evaluation.validate(), or ask for the end by trainer.stop"
            )
        self.stage, self.status = stage, "running"
        self.ends.begin_run()
        place = f" in {folder}" if folder else ""
        log.info("%s begins%s on %s, rank %d of %d", stage.value, place, run.device, run.rank, run.world_size)
        for row in run.plugins.plan() if log.isEnabledFor(logging.DEBUG) else ():
            if run.plugins.heard[row["hook"]]:
                log.debug("%(kind)s %(hook)s: wrapped by %(wrapped_by)s, done or heard by %(done_by)s", row)
        with self.randomness.apart():  # the random numbers of a run leave those outside unchanged
            self._tell(stage, began)

    def _tell(self, stage: Stage, began: float) -> None:
        run, first, reason = self.run, None, ""
        try:
            _raise(run.plugins.tell_each("on_begin_run", trainer=run, stage=stage, config=run.config))
            run.hook.run(trainer=run, stage=stage)
            self.status, reason = self.ends.verdict(stage is Stage.TRAIN)
        except BaseException as error:
            self.status = "failed"
            first, reason = error, f"{type(error).__name__}: {error}"
            run.plugins.blame(error)
            _add_notes(error, run.plugins.tell_each("on_exception", trainer=run, exception=error))
            raise
        finally:
            reason = redact(reason)
            ended = {"trainer": run, "stage": stage, "status": self.status, "reason": reason}
            errors = run.plugins.tell_each("on_end_run", **ended)
            run.plugins.report_failures()
            self.loaders.forget()
            status, took = "failed" if errors else self.status, time.monotonic() - began
            why = f": {reason.splitlines()[0]}" if reason and first is None else ""  # who catches the error tells it
            log.info("%s %s at step %d after %.1f s%s", stage.value, status, run.global_step, took, why)
            if first is not None:
                _add_notes(first, errors)
            elif errors:
                self.status = "failed"
                _raise(errors)


def _raise(errors: list[BaseException]) -> None:
    if errors:
        _add_notes(errors[0], errors[1:])
        raise errors[0]


def _add_notes(error: BaseException, others: Iterable[BaseException]) -> None:
    for other in others:
        notes = ", ".join(getattr(other, "__notes__", ()))
        error.add_note(f"and then {type(other).__name__}: {other} ({notes})")
