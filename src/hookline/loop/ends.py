"""The end of training: its limits, requests to stop or save, and the agreement of ranks on them."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookline.run import Run


class Ends:
    """Decides when training is over, and what the next boundary saves."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reason: str | None = None
        """The reason of a requested stop, or None."""
        self.exit_code = 1
        """The exit code of the command line, if the run is preempted."""
        self.cutting = False
        """Whether training stops after the current micro-batch instead of the step."""
        self._status = "stopped"
        self._agreed = True  # whether all ranks know `reason`
        self.saves: list[str] = []
        """The reasons to save at the next boundary."""
        self._alone: list[str] = []  # reasons of this rank that the others do not know yet
        self._steps = self._epochs = self._seconds = math.inf  # the limits
        self._began = time.monotonic()

    def begin_run(self) -> None:
        """Forget the requests of the previous run."""
        self.reason, self._status, self.cutting = None, "stopped", False
        self._alone, self._agreed = [], True

    def limit(self, steps: int | None, epochs: int | None, seconds: float | None) -> None:
        """Set the optimizer steps, epochs and seconds after which training is over; None for no limit."""
        self._steps, self._epochs, self._seconds = (
            math.inf if limit is None else limit for limit in (steps, epochs, seconds)
        )

    def begin_training(self) -> None:
        """Count seconds from here on, after those of earlier sessions."""
        self._began = time.monotonic() - self.run.counters.seconds

    # Asking ---------------------------------------------------------------------------

    def stop(self, reason: str, status: str, exit_code: int, *, alone: bool, within_window: bool) -> None:
        """Take a request to stop; see `Trainer.stop`."""
        if within_window and self.run.world_size == 1:
            performers = self.run.plugins.performers
            self.cutting = not any(performers(hook) for hook in ("train_epoch", "update", "run_window"))
        agreed = not alone or self.run.world_size == 1
        if self.reason is None or (agreed and not self._agreed):
            self.reason, self._status, self.exit_code = reason, status, exit_code
            self._agreed = agreed

    def save(self, reason: str, alone: bool = False) -> None:
        """Take a request to save; see `Trainer.save`."""
        (self._alone if alone and self.run.world_size > 1 else self.saves).append(reason)

    @property
    def save_asked(self) -> bool:
        """Whether this boundary saves."""
        return bool(self.saves) or self.finished()

    def take_saves(self) -> str:
        """Return the reasons to save at this boundary, "" for none, and forget them."""
        reasons, self.saves = self.saves, []
        if self.finished():
            reasons.append((self._stopping() and self.reason) or "end of training")
        return ", ".join(dict.fromkeys(reasons))

    # Knowing --------------------------------------------------------------------------

    def _agree(self) -> None:
        """Let all ranks know the requests that single ranks made alone."""
        stop = self.reason, self._status, self.exit_code
        ballots = self.run.hook.all_gather(trainer=self.run, value=(stop, self._alone))
        self._alone = []
        self.saves += [reason for _, saves in ballots for reason in saves]
        stops = [stop for stop, _ in ballots if stop[0] is not None]
        if stops:  # of several requests the lowest rank's counts
            (self.reason, self._status, self.exit_code), self._agreed = stops[0], True

    def finished(self, agree: bool = False) -> bool:
        """Tell whether training ends here, because of a limit or of a request.

        Args:
            agree: first read the clock and exchange the requests of ranks. All ranks do so at each boundary.
        """
        run, counters = self.run, self.run.counters
        if agree:
            counters.seconds = time.monotonic() - self._began
            if run.world_size > 1:
                asked = not self._agreed or bool(self._alone)
                some, counters.seconds = run.hook.vote(trainer=run, asked=asked, seconds=counters.seconds)
                if some:
                    self._agree()
        if self.reason is not None and self._agreed:
            return True
        return (  # `over` inlined, to save a call in each step
            counters.global_step >= self._steps or counters.epochs >= self._epochs or counters.seconds >= self._seconds
        )

    def over(self) -> bool:
        """Tell whether a limit of training is reached."""
        counters = self.run.counters
        return (
            counters.global_step >= self._steps or counters.epochs >= self._epochs or counters.seconds >= self._seconds
        )

    def preempted(self) -> bool:
        """Tell whether the run is to be resumed later; a run that has reached its limits is not."""
        return self._stopping() and self._status == "preempted" and not self.over()

    def verdict(self, training: bool) -> tuple[str, str]:
        """Return the status of the run, and the reason."""
        if self.reason is None or (training and self.over()):
            return "finished", ""
        return self._status, self.reason

    def _stopping(self) -> bool:
        """Tell whether a stop is requested, and all ranks know it."""
        return self.reason is not None and self._agreed
