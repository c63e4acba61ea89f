"""The ends of a training: its limits, who asks for its end or for a save, and what ranks agree on."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hookline.run import Run


class Ends:
    """Knows when training is over or shall end, and what is to be saved at the next boundary."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reason: str | None = None
        """Why somebody asked for the end; None while nobody has."""
        self.exit_code = 1
        """Of the command line, where the run is preempted."""
        self.cutting = False
        """Whether training stops behind the micro-batch under way instead of the step."""
        self._status = "stopped"
        self._agreed = True  # whether all ranks know of `reason`
        self.saves: list[str] = []
        """Why the state is to be saved at the next boundary."""
        self._alone: list[str] = []  # why this rank wants it, of which the others do not know yet
        self._steps = self._epochs = self._seconds = math.inf  # at which training is over
        self._began = time.monotonic()

    def begin_run(self) -> None:
        """Forget what was asked of the run before."""
        self.reason, self._status, self.cutting = None, "stopped", False
        self._alone, self._agreed = [], True

    def limit(self, steps: int | None, epochs: int | None, seconds: float | None) -> None:
        """Set at how many optimizer steps, epochs and seconds training is over; None is never."""
        self._steps, self._epochs, self._seconds = (
            math.inf if limit is None else limit for limit in (steps, epochs, seconds)
        )

    def begin_training(self) -> None:
        """Count seconds from here on, behind those of the sessions before."""
        self._began = time.monotonic() - self.run.counters.seconds

    # Asking ---------------------------------------------------------------------------

    def stop(self, reason: str, status: str, exit_code: int, *, alone: bool, within_window: bool) -> None:
        """Take a request for the end; see `Trainer.stop`."""
        if within_window and self.run.world_size == 1:
            performers = self.run.plugins.performers
            self.cutting = not any(performers(hook) for hook in ("train_epoch", "update", "run_window"))
        agreed = not alone or self.run.world_size == 1
        if self.reason is None or (agreed and not self._agreed):
            self.reason, self._status, self.exit_code = reason, status, exit_code
            self._agreed = agreed

    def save(self, reason: str, alone: bool = False) -> None:
        """Take a request for a save; see `Trainer.save`."""
        (self._alone if alone and self.run.world_size > 1 else self.saves).append(reason)

    @property
    def save_asked(self) -> bool:
        """Whether there is something to save at this boundary."""
        return bool(self.saves) or self.finished()

    def take_saves(self) -> str:
        """Return why the state is to be saved at this boundary, "" where it is not, and forget it."""
        reasons, self.saves = self.saves, []
        if self.finished():
            reasons.append((self._stopping() and self.reason) or "end of training")
        return ", ".join(dict.fromkeys(reasons))

    # Knowing --------------------------------------------------------------------------

    def _vote(self) -> None:
        """Have all ranks know of what some of them have asked for alone."""
        run = self.run
        asked = not self._agreed or bool(self._alone)
        some, run.counters.seconds = run.hook.vote(trainer=run, asked=asked, seconds=run.counters.seconds)
        if not some:
            return
        stop = self.reason, self._status, self.exit_code
        ballots = run.hook.all_gather(trainer=run, value=(stop, self._alone))
        self._alone = []
        self.saves += [reason for _, saves in ballots for reason in saves]
        stops = [stop for stop, _ in ballots if stop[0] is not None]
        if stops:  # several may have asked: the lowest rank's counts
            (self.reason, self._status, self.exit_code), self._agreed = stops[0], True

    def finished(self, agree: bool = False) -> bool:
        """Tell whether training ends here, by itself or because someone asked for it.

        Args:
            agree: read the clock first, and hear what other ranks ask for. All ranks do so at each boundary.
        """
        counters = self.run.counters
        if agree:
            counters.seconds = time.monotonic() - self._began
            if self.run.world_size > 1:
                self._vote()
        if self.reason is not None and self._agreed:
            return True
        return (  # as in `over`, without another call in each step
            counters.global_step >= self._steps or counters.epochs >= self._epochs or counters.seconds >= self._seconds
        )

    def over(self) -> bool:
        """Tell whether all that was to be trained has been trained."""
        counters = self.run.counters
        return (
            counters.global_step >= self._steps or counters.epochs >= self._epochs or counters.seconds >= self._seconds
        )

    def preempted(self) -> bool:
        """Tell whether the run shall be gone on with later; one that is over by itself cannot be."""
        return self._stopping() and self._status == "preempted" and not self.over()

    def verdict(self, training: bool) -> tuple[str, str]:
        """Return how the run has ended, and why."""
        if self.reason is None or (training and self.over()):
            return "finished", ""
        return self._status, self.reason

    def _stopping(self) -> bool:
        """Tell whether somebody has asked for the end, and all ranks know it."""
        return self.reason is not None and self._agreed
