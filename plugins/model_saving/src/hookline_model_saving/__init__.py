"""Save the model alone: the best by one value or several, or always the newest."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hookline
from hookline import CallbackInterface, hookimpl
from hookline.files import bytes_of, clear, make_folder, replacing
from hookline.files.weights import Tensors, untie
from hookline_model_saving.weights import refuse_others, write_pt, write_safetensors

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

FOLDER = "models"
VALID, TRAIN, ALWAYS = "best_valid_loss", "best_train_loss", "always"
OFFERED = f'"{VALID}", "{TRAIN}", "best_<metric>" such as "best_val_accuracy", "{ALWAYS}", a list of them, or null'

log = logging.getLogger("hookline.model_saving")


def policies(given: Any) -> list[str]:
    """Return the names in `model_saving.policy`, each of them checked.

    Raises:
        ValueError: one is none, or two would have one folder.
    """
    if given is None:
        return []
    names = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not names:
        raise ValueError("model_saving.policy=[] names nothing; write null to save nothing")
    folders: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not (name == ALWAYS or re.fullmatch(r"best_.{1,200}", name)):
            raise ValueError(f"model_saving.policy={given!r}: {name!r} is no policy; there are {OFFERED}")
        if (other := folders.setdefault(folder_name(name), name)) != name or names.count(name) > 1:
            raise ValueError(
                f"model_saving.policy={given!r}: {name!r} and {other!r} would be saved in one folder; name one of them"
            )
    return names


def folder_name(policy: str) -> str:
    """Return the folder of a policy; the metric of one loader of several has a slash in its name."""
    return re.sub(r"[^\w.-]", "_", policy)


def by_policy(option: str, given: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return what an option says for each of some policies: one value for all of them, or a mapping.

    Raises:
        ValueError: there are no such policies, or the mapping names another.
    """
    if given is None:
        return {}
    wrong = [name for name in given if name not in names] if isinstance(given, Mapping) else []
    if wrong or not names:
        raise ValueError(
            f"model_saving.{option}={given!r} is for {', '.join(map(repr, wrong)) or 'no policy'}; among the policies "
            f"of this run it can be for {', '.join(names) or 'none'}: correct it, or leave it away"
        )
    return dict(given) if isinstance(given, Mapping) else dict.fromkeys(names, given)


def mode_of(trainer: Trainer, name: str) -> str:
    """Return what is best of a metric that a policy names, with or without its "val_".

    Raises:
        ValueError: nobody knows, or the two names say different things.
    """
    said: dict[str, str] = {}
    errors = []
    for metric in (name, f"val_{name}"):
        try:
            said[metric] = trainer.hook.get_mode(trainer=trainer, metric=metric)
        except ValueError as error:
            errors.append(error)
    if not said:
        raise errors[0]
    if len({*said.values()}) > 1:
        both = " and ".join(f"{mode} of {metric!r}" for metric, mode in said.items())
        raise ValueError(
            f'the best is the {both}, and the policy may mean either; give the option mode: "min" or "max"'
        )
    return next(iter(said.values()))


@dataclass(eq=False)
class ModelSaving(CallbackInterface):
    """Save the weights of the model alone into `<run folder>/models/<policy>`, for use elsewhere.

    What is saved is what `export_model` answers, so an average of the weights is saved where there is one.
    """

    policy: Any = VALID
    """best_valid_loss, best_train_loss, best_<metric>, always, a list of several, or null for none."""
    mode: Any = None
    """What is best of a best_<metric>: min or max, or a mapping by policy; null: what the verb get_mode answers."""
    below: Any = None
    """Save only values below this one; a number, or a mapping by policy."""
    above: Any = None
    """Save only values above this one; a number, or a mapping by policy."""
    safe_serialization: bool = True
    """Write safetensors; false writes `pytorch_model.pt`."""
    max_shard_size: str = "10GB"
    """Size from which a model is split into several files."""

    def __post_init__(self) -> None:
        self._policies = policies(self.policy)
        ranked = [name for name in self._policies if name != ALWAYS]
        of_metrics = [name for name in ranked if name not in (VALID, TRAIN)]
        self._limit = bytes_of(self.max_shard_size, "model_saving.max_shard_size")
        self._below = by_policy("below", self.below, ranked)
        self._above = by_policy("above", self.above, ranked)
        for option, bounds in (("below", self._below), ("above", self._above)):
            for bound in bounds.values():
                if type(bound) not in (int, float) or not math.isfinite(bound):
                    raise ValueError(f"model_saving.{option}={getattr(self, option)!r}: {bound!r} is no finite number")
        for name in ranked:
            low, high = self._above.get(name, -math.inf), self._below.get(name, math.inf)
            if low >= high:
                raise ValueError(f"model_saving: no value of {name!r} is above {low} and below {high}")
        self._modes = dict.fromkeys(set(ranked) & {VALID, TRAIN}, "min") | by_policy("mode", self.mode, of_metrics)
        for name, mode in self._modes.items():
            if mode not in ("min", "max"):
                raise ValueError(f'model_saving.mode={self.mode!r}: {mode!r} for {name} must be "min" or "max"')
        self._best: dict[str, float] = {}  # the best value by policy, where there has been one
        self._saved: dict[str, int] = {}  # the step of the model that was saved last, by policy
        self._names: dict[str, str] = {}  # of the metrics, by policy, as the first evaluation had them
        self._epoch_ended = False  # since the last boundary
        if TRAIN not in self._policies:
            self._turn_off("on_end_train_epoch")
        if self._policies in ([], [TRAIN]):
            self._turn_off("get_watched_metrics")
        if not self._policies:
            self._turn_off("on_begin_train", "on_boundary", "on_end_train")

    def _turn_off(self, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, None)

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        """Make ready.

        Raises:
            ValueError: nobody knows which value of a metric is the best.
        """
        for policy in self._policies:
            if policy not in (ALWAYS, *self._modes):
                try:
                    self._modes[policy] = mode_of(trainer, policy.removeprefix("best_"))
                except ValueError as error:
                    raise ValueError(f"model_saving.policy={self.policy!r}: {error}") from None
        if TRAIN in self._policies:  # the trainer keeps it, over a resume too
            self._best[TRAIN] = trainer.best.train_loss
        if trainer.rank == 0:
            make_folder(trainer.run_dir / FOLDER)
            clear(trainer.run_dir / FOLDER)

    @hookimpl(wrapper=True)
    def get_watched_metrics(self, trainer: Trainer) -> Generator[None, dict[str, str], dict[str, str]]:
        metrics = {self._metric(trainer, policy): policy for policy in self._policies if policy not in (TRAIN, ALWAYS)}
        return (yield) | {name: f"model_saving.policy={policy!r}" for name, policy in metrics.items()}

    def _metric(self, trainer: Trainer, policy: str) -> str:
        """Return the name of a policy's metric, once an evaluation has it, with the "val_" that the policy may lack."""
        if policy == VALID:
            return trainer.options.val_loss_metric_name
        name = policy.removeprefix("best_")
        for there in (name, f"val_{name}"):
            if there in trainer.metrics:
                return self._names.setdefault(policy, there)
        return self._names.get(policy, name)

    @hookimpl
    def on_end_train_epoch(self) -> None:  # type: ignore[override]
        self._epoch_ended = True

    @hookimpl
    def on_boundary(self, trainer: Trainer, global_step: int) -> None:
        ended, self._epoch_ended = self._epoch_ended, False
        due: dict[str, tuple[str | None, float | None]] = {}
        if trainer.due("eval"):
            metrics = trainer.metrics
            for policy in self._policies:
                name = self._metric(trainer, policy)
                if policy == ALWAYS:
                    due[policy] = None, None
                elif policy != TRAIN and self._is_best(policy, metrics.get(name, math.nan)):
                    due[policy] = name, metrics[name]
        if ended and self._is_best(TRAIN, trainer.best.train_loss):
            due[TRAIN] = trainer.options.train_loss_metric_name, trainer.best.train_loss
        if due:
            self._save(trainer, global_step, due)

    def _is_best(self, policy: str, value: float) -> bool:
        """Keep a value that is the best so far in mind; answer whether it is one to save the model for."""
        best = self._best.get(policy)
        better = best is None or (value < best if self._modes[policy] == "min" else value > best)
        if not (better and math.isfinite(value)):
            return False
        self._best[policy] = value
        return bool(self._above.get(policy, -math.inf) < value < self._below.get(policy, math.inf))

    def _save(self, trainer: Trainer, global_step: int, due: Mapping[str, tuple[str | None, float | None]]) -> None:
        weights = trainer.export_model()  # by all ranks, which may have a part of it each
        self._saved |= dict.fromkeys(due, global_step)
        if trainer.rank != 0:
            return
        refuse_others(weights)
        tensors, tied = untie(weights)
        for policy, (metric, value) in due.items():
            path = trainer.run_dir / FOLDER / folder_name(policy)
            about = {
                "format": "hookline-model/1",
                "policy": policy,
                "step": global_step,
                "epoch": trainer.epoch,
                "metric": metric,
                "value": value,
                "tied": tied,
                "hookline": hookline.__version__,
            }
            self._write(path, tensors, tied, about)
            log.info("saved %s%s", path, "" if metric is None else f" ({metric} {value:.6g})")
            trainer.hook.on_checkpoint(trainer=trainer, path=path, kind="model")

    def _write(self, path: Path, tensors: Tensors, tied: Mapping[str, str], about: Mapping[str, Any]) -> None:
        try:
            with replacing(path) as folder:
                folder.mkdir()
                if self.safe_serialization:
                    write_safetensors(folder, tensors, tied, self._limit)
                else:
                    write_pt(folder, tensors, tied, self._limit)
                (folder / "model.json").write_text(json.dumps(about, indent=2, allow_nan=False) + "\n")
        except Exception as error:
            error.add_note(f"while saving {path}; what was saved there before is still there")
            raise

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Say which policies have saved nothing, and why."""
        for policy in self._policies if trainer.rank == 0 else ():
            if policy not in self._saved:
                log.warning("model_saving.policy=%r has saved no model: %s", policy, self._reason(trainer, policy))

    def _reason(self, trainer: Trainer, policy: str) -> str:
        best = self._best.get(policy, math.inf)
        if math.isfinite(best):
            limits = {"above": self._above.get(policy), "below": self._below.get(policy)}
            said = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
            return f"the best value was {best:.6g}" + (f", and it had to be {said}" if said else "")
        if policy == TRAIN:
            return "no epoch came to its end with a finite training loss"
        if policy == ALWAYS or not trainer.counters.evaluations:
            return (
                "there was no evaluation after a step; give the module get_val_dataloaders, set "
                f'trainer.evaluate_every, or save "{TRAIN}"'
            )
        return f"no evaluation after a step gave a finite {self._metric(trainer, policy)}"

    def get_state(self) -> dict[str, Any]:
        """Return the best values, and the steps of what was saved."""
        return {"best": dict(self._best), "saved": dict(self._saved)} if self._policies else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back; a policy that has joined since begins anew."""
        self._epoch_ended = False  # after a roll back its weights are gone
        for mine, kept in ((self._best, state["best"]), (self._saved, state["saved"])):
            mine.update(
                {name: value for name, value in kept.items() if name in self._policies and math.isfinite(value)}
            )
