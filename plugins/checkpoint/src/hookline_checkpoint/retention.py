"""Which checkpoints are made and stay: cadences and rules, and the removal of what no rule keeps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline import ModuleInterface
from hookline import every as cadence
from hookline_checkpoint.ranking import manifests, ranked
from hookline_checkpoint.storage import is_good, listed
from hookline_checkpoint.writing import remove

if TYPE_CHECKING:
    from hookline import Trainer

log = logging.getLogger("hookline.checkpoint")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, besides the newest: all that one of these rules keeps."""

    last: int
    """This many good ones."""
    every: tuple[int, str] | None
    """Those whose step, or whose complete epochs, are a multiple: (number, "steps" or "epochs")."""
    best: int
    """This many good ones by the value of `monitor` in their evaluation."""
    monitor: str
    mode: str


def cadences(given: Any) -> list[str]:
    """Return the cadences of `checkpoint.every`, each of them checked.

    Raises:
        ValueError: one is none, with examples.
    """
    if given is None:
        return []
    texts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not texts:
        raise ValueError("checkpoint.every=[] names no cadence; write null to save nothing")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f'checkpoint.every={given!r}: a cadence is a text such as "epoch", "500 steps" or "10 min", '
                "or a list of them, or null to save nothing"
            )
        try:
            cadence(text)
        except ValueError as error:
            raise ValueError(f"checkpoint.every={given!r}: {error}") from None
    return texts


def refuse_no_evaluations(trainer: Trainer, texts: Sequence[str]) -> None:
    """Refuse cadences that all count evaluations in a training that has none.

    Raises:
        ValueError: nothing would be saved before the end.
    """
    if not texts or any(cadence(text).unit != "evaluations" for text in texts):
        return
    name, options = type(trainer.module).__name__, trainer.options
    why = ""
    if type(trainer.module).get_val_dataloaders is ModuleInterface.get_val_dataloaders:
        why = f"{name} has no get_val_dataloaders"
    elif options.evaluate_every is None:
        why = "trainer.evaluate_every is null"
    if why:
        raise ValueError(
            f"checkpoint.every={', '.join(texts)!r} saves after evaluations, and {why}, so nothing would be saved "
            'before the end: write another cadence, such as "epoch"'
        )


def rules_of(
    keep_last: int | None, keep_every: str | None, keep_best: int, monitor: str, mode: str | None
) -> Retention | None:
    """Return the rules that the options say, each of them checked; None where all checkpoints stay.

    Raises:
        ValueError: an option is none, or does nothing with the others.
    """
    if keep_last is not None and not keep_last >= 1:
        raise ValueError(f"checkpoint.keep_last={keep_last} must be at least 1, or null to keep all")
    kept = None if keep_every is None else _kept_for_ever(keep_every)
    if keep_best < 0:
        raise ValueError(f"checkpoint.keep_best={keep_best} must be at least 0, which keeps none as the best")
    if mode not in ("min", "max", None):
        raise ValueError(f"checkpoint.mode={mode!r} must be min or max, or null")
    if not keep_best and (mode is not None or monitor != "val_loss"):
        raise ValueError(
            f"checkpoint.monitor={monitor!r} and mode={mode!r} say what is the best, and keep_best=0 "
            "keeps none as the best; give keep_best a number, or leave them away"
        )
    if keep_last is not None:
        return Retention(keep_last, kept, keep_best, monitor, mode or "min")
    if kept is not None or keep_best:
        raise ValueError(
            "checkpoint.keep_last=null keeps all checkpoints, so keep_every and keep_best would do nothing; "
            "leave them away, or give keep_last a number"
        )
    return None


def _kept_for_ever(text: str) -> tuple[int, str]:
    """Return the cadence of checkpoints that stay for ever."""
    try:
        kept = cadence(text)
    except ValueError as error:
        raise ValueError(f"checkpoint.keep_every={text!r}: {error}") from None
    if kept.unit not in ("steps", "epochs"):
        raise ValueError(f"checkpoint.keep_every={text!r} counts {kept.unit}; count steps or epochs")
    if not isinstance(kept.number, int):
        raise ValueError(f"checkpoint.keep_every={text!r} is a fraction; checkpoints stay by whole epochs")
    return kept.number, kept.unit


def retain(newest: Path, rules: Retention, good: set[Path]) -> None:
    """Remove what is older than `newest` and kept by no rule; a failure is a warning.

    Args:
        newest: the one just written, which stays; those of later steps, which a run that was
            resumed from an earlier one can find, are none of its business.
        rules: which stay. A damaged one does not count; it stays while it is newer than the
            good ones that `last` keeps.
        good: those known to be good, which need not be read again; more are added.
    """
    older = [path for path in listed(newest.parent) if path.name <= newest.name]
    kept, found = set(), 0
    for path in older:
        if found >= rules.last:
            break
        kept.add(path)
        found += _known_good(path, good)
    if rules.every is not None or rules.best:
        abouts = manifests(older)
        kept.update(path for path, about in abouts.items() if rules.every and _is_multiple(about, rules.every))
        best_first = (path for path in ranked(abouts, rules.monitor, rules.mode) if _known_good(path, good))
        kept.update(itertools.islice(best_first, rules.best))
    for path in reversed(older):  # the oldest first: if this is cut, the newer ones are there
        if path not in kept:
            try:
                remove(path)
            except OSError as error:
                log.warning(
                    "checkpoint %s is not needed any more and cannot be removed now: %s; the next save tries it again",
                    path, error,
                )  # fmt: skip


def _known_good(path: Path, good: set[Path]) -> bool:
    if path not in good and is_good(path):
        good.add(path)
    return path in good


def _is_multiple(about: Mapping[str, Any], every: tuple[int, str]) -> bool:
    number, unit = every
    if about["part"]:
        return False
    if unit == "epochs":  # an epoch is complete where the next one has not begun
        return about.get("position") == 0 and about["epoch"] % number == 0
    return bool(about["step"] % number == 0)
