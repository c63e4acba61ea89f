"""The study of a sweep, in SQLite in its folder: which trials there are, and who runs which."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

from hookline_sweep.space import Space

NAME = "sweep"  # of the study in its storage
ATTEMPTS = 3
"""How often a trial is begun whose processes are killed."""
SAMPLERS = {
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
    "gp": optuna.samplers.GPSampler,
    "qmc": optuna.samplers.QMCSampler,
    "all": optuna.samplers.BruteForceSampler,
}
PRUNERS = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}


def storage_of(folder: Path) -> optuna.storages.RDBStorage:
    """Return the storage of a sweep; a process that writes waits up to a minute for another one."""
    return optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db", {"connect_args": {"timeout": 60}})


def sampler_of(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler; optuna calls some of them experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = SAMPLERS[name](seed=seed)
    return sampler


class Told:
    """One trial, as its own process tells of it."""

    def __init__(self, storage: optuna.storages.RDBStorage, trial: int, pruner: str) -> None:
        self.storage, self.trial = storage, trial
        self.study = optuna.load_study(study_name=NAME, storage=storage, pruner=PRUNERS[pruner]())
        self.id = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(NAME), trial)

    def note(self, key: str, value: Any) -> None:
        """Keep a fact of the trial."""
        self.storage.set_trial_user_attr(self.id, key, value)

    def report(self, evaluation: int, value: float) -> bool:
        """Keep the value of an evaluation; return whether the pruner gives the trial up."""
        self.storage.set_trial_intermediate_value(self.id, evaluation, value)
        return self.study.pruner.prune(self.study, self.storage.get_trial(self.id))

    def fail(self, why: str) -> None:
        """Tell that the trial has failed."""
        self.note("why", why.partition("\n")[0])
        self.study.tell(self.trial, state=TrialState.FAIL)

    def end(self, pruned: bool) -> None:
        """Tell that the trial is over, with the value of its last evaluation."""
        kept = self.storage.get_trial(self.id)
        if kept.last_step is None:
            self.fail("it has evaluated nothing")
        elif pruned:
            self.study.tell(self.trial, state=TrialState.PRUNED)
        else:
            self.study.tell(self.trial, kept.intermediate_values[kept.last_step])


class Claimed(NamedTuple):
    """A trial that this process is to run."""

    number: int
    lock: int
    """Descriptor of a locked file: who has it open is at work on the trial."""


class Claims:
    """Hands out the trials of a sweep, each to one process at a time."""

    def __init__(
        self,
        study: optuna.Study,
        storage: optuna.storages.RDBStorage,
        folder: Path,
        space: Space,
        sampler: str,
        seed: int,
    ) -> None:
        self.study, self.storage, self.folder = study, storage, folder
        self.space, self.sampler, self.seed = space, sampler, seed

    def counted(self) -> list[FrozenTrial]:
        """Return the trials that have all their values: a kill may have come before."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if len(trial.params) == len(self.space)]

    def claim(self, most: int) -> Claimed | None:
        """Return the next trial: one that a dead process has left, else a new one, if there are fewer than `most`."""
        with locked(self.folder):
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if (lock := self._lock(trial.number)) is not None:
                    if self._goes_on(trial):
                        return Claimed(trial.number, lock)
                    os.close(lock)
            if len(self.counted()) >= most:
                return None
            # By the seed and the number of the trial: a sweep that is continued proposes what a whole one would.
            self.study.sampler = sampler_of(self.sampler, self.seed + len(self.study.get_trials(deepcopy=False)))
            number = self.study.ask(self.space).number
            lock = self._lock(number)
            assert lock is not None
            return Claimed(number, lock)

    def _lock(self, number: int) -> int | None:
        """Return the lock of a trial, or None if another process has it."""
        descriptor = os.open(self.folder / f"trial-{number}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _goes_on(self, trial: FrozenTrial) -> bool:
        """Tell whether a trial that was left is to be continued; else it is a failed one."""
        often = trial.user_attrs.get("attempts", 0) >= ATTEMPTS
        if len(trial.params) == len(self.space) and not often:
            return True
        why = f"its processes were killed {ATTEMPTS} times" if often else "killed before it had all its values"
        Told(self.storage, trial.number, "none").fail(why)
        return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time do what is within."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
