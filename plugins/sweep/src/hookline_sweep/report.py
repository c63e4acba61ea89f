"""What is shown of a sweep: lines, a table, pictures, and a record that `hookline runs` shows beside its trials."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hookline.commands import table
from hookline.files import make_folder, replacing

STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


def line(trial: FrozenTrial, metric: str) -> str:
    """Return how a trial has ended, on one line."""
    said = f"{metric}={trial.value:.6g}" if trial.value is not None else trial.user_attrs.get("why", "")
    params = " ".join(f"{key}={value}" for key, value in trial.params.items())
    return f"trial {trial.number} {STATES[trial.state]}: {said}  ({params})"


def table_of(trials: Sequence[FrozenTrial], metric: str) -> list[str]:
    """Return a table of trials; why one has failed stands below it."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    rows = [
        [
            str(trial.number),
            STATES[trial.state],
            "-" if trial.value is None else f"{trial.value:.6g}",
            str(len(trial.intermediate_values)),
            *(str(trial.params.get(key, "-")) for key in keys),
        ]
        for trial in trials
    ]
    failed = [f"trial {t.number} failed: {t.user_attrs['why']}" for t in trials if "why" in t.user_attrs]
    return [*table(["trial", "state", metric, "evaluations", *keys], rows, right=(0, 2, 3)), *failed]


def draw(study: optuna.Study, folder: Path, metric: str) -> None:
    """Draw the history and the importance of each key, if matplotlib is there; the latter needs trials that differ."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures without matplotlib: pip install 'hookline-sweep[plots]'", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as pictures

    with warnings.catch_warnings(), matplotlib.rc_context():  # optuna sets a style of its own
        warnings.simplefilter("ignore")  # it calls the pictures experimental
        drawn: dict[str, Any] = {"history": pictures.plot_optimization_history(study, target_name=metric)}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len({trial.value for trial in complete}) > 1:
            drawn["importance"] = pictures.plot_param_importances(study, evaluator=evaluator, target_name=metric)
    for name, axes in drawn.items():
        with replacing(folder / f"{name}.svg") as new:
            axes.figure.savefig(new, format="svg", bbox_inches="tight")


class Record:
    """Writes the sweep as a run into its folder: one step a trial, in the format that hookline-runs documents."""

    def __init__(self, study: optuna.Study, folder: Path, metric: str, asked: Mapping[str, Any]) -> None:
        self.study, self.metric, self.asked = study, metric, asked
        self.file, self.session, self.began = folder / "sweep" / "metrics.jsonl", os.urandom(4).hex(), time.time()
        self.step, self.status = len(study.get_trials(deepcopy=False)), "finished"

    def __enter__(self) -> Record:
        make_folder(self.file.parent)
        self._write("begin", format=1, stage="train", command=["hookline", "sweep"], revision=None, versions={},
                    host=socket.gethostname(), pid=os.getpid(), config=self.asked)  # fmt: skip
        self._write("train", step=self.step, epoch=0, totals={})
        return self

    def add(self, number: int) -> None:
        """Add a trial that is over."""
        trial = self.study.get_trials(deepcopy=False)[number]
        if trial.state is TrialState.COMPLETE:
            self.step = max(self.step, number + 1)
            metrics = {self.metric: trial.value, f"best_{self.metric}": self.study.best_value}
            passed = {"epoch": 0, "batches": 0, "samples": 0, "seconds": round(time.time() - self.began, 3)}
            self._write("log", step=number + 1, metrics=metrics, **passed)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        status = self.status if error is None else "failed"
        self._write("end", step=self.step, status=status, reason="" if error is None else repr(error))

    def _write(self, event: str, **fields: Any) -> None:
        """Append one line by one system call, so that lines of several processes stay whole."""
        record = {"event": event, "session": self.session, "time": round(time.time(), 3), **fields}
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, (json.dumps(record) + "\n").encode())
        finally:
            os.close(descriptor)
