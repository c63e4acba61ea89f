"""Hyperparameters: epochs, the size of a batch, an optimizer and a schedule by name."""

from __future__ import annotations

import enum
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hookline_accmt import schedules
from hookline_accmt.names import refuse_unknown


class Optimizer(enum.StrEnum):
    """The optimizers that a name may be of; those of torch."""

    Adam = "Adam"
    Adadelta = "Adadelta"
    Adagrad = "Adagrad"
    Adamax = "Adamax"
    AdamW = "AdamW"
    Adafactor = "Adafactor"
    ASGD = "ASGD"
    NAdam = "NAdam"
    RAdam = "RAdam"
    RMSprop = "RMSprop"
    Rprop = "Rprop"
    SGD = "SGD"
    SparseAdam = "SparseAdam"


class Scheduler(enum.StrEnum):
    """The schedules that a name may be of; those of torch, and those that Hugging Face made common."""

    StepLR = "StepLR"
    LinearLR = "LinearLR"
    ExponentialLR = "ExponentialLR"
    CosineAnnealingLR = "CosineAnnealingLR"
    CyclicLR = "CyclicLR"
    OneCycleLR = "OneCycleLR"
    CosineAnnealingWarmRestarts = "CosineAnnealingWarmRestarts"
    CosineWithWarmup = "CosineWithWarmup"
    Constant = "Constant"
    ConstantWithWarmup = "ConstantWithWarmup"
    CosineWithHardRestartsWithWarmup = "CosineWithHardRestartsWithWarmup"
    InverseSQRT = "InverseSQRT"
    LinearWithWarmup = "LinearWithWarmup"
    PolynomialDecayWithWarmup = "PolynomialDecayWithWarmup"


log = logging.getLogger("hookline.accmt")

KEYS = ("epochs", "batch_size", "optim", "scheduler")
WARMUP = "warmup_ratio"
FUSED = ("Adam", "AdamW", "SGD")  # which have a form of one kernel for all parameters


class HyperParameters:
    """How long to train, in batches of what size, by which optimizer and schedule.

    Args:
        epochs: to train.
        batch_size: samples of one batch of one process; or two numbers, of training and of validation; a third, of a
            test set, is not used.
        optim: name of an optimizer, see `Optimizer`.
        optim_kwargs: its arguments; texts that are numbers ("1e-3") are read as such.
        scheduler: name of a schedule, see `Scheduler`; None for a constant learning rate.
        scheduler_kwargs: its arguments, and `warmup_ratio`, the part of all steps that `num_warmup_steps` shall be.
            `num_training_steps` and `total_steps` are filled in where they are left out.
        optimizer: what later versions of ACCMT call `optim`.

    Raises:
        TypeError: an argument that is none, with the nearest that is.
        ValueError: a name that is none, with the nearest that is, or a number that cannot be.
    """

    def __init__(
        self,
        epochs: Any = 1,
        batch_size: Any = 1,
        optim: str = "SGD",
        optim_kwargs: Mapping[str, Any] | None = None,
        scheduler: str | None = None,
        scheduler_kwargs: Mapping[str, Any] | None = None,
        *,
        optimizer: str | None = None,
    ) -> None:
        self.epochs = count("epochs", epochs)
        sizes = list(batch_size) if isinstance(batch_size, (list, tuple)) else [batch_size, batch_size]
        if len(sizes) not in (2, 3):
            raise ValueError(
                f"batch_size={batch_size!r} must be one number, or two: of training and of validation; or a third, of "
                "a test set, which is not used"
            )
        self.batch_size, self.val_batch_size = (count("batch_size", size) for size in sizes[:2])
        if len(sizes) == 3:
            count("batch_size", sizes[2])
            log.warning(
                "batch_size=%r: the third is of a test set, which fit is not given, so it is not used", batch_size
            )
        if optimizer is not None:
            optim = optimizer
        self.optim = known("optim", optim, Optimizer)
        self.optim_kwargs = numbers(optim_kwargs or {})
        refuse_unknown(f"optim {self.optim}", self.optim_kwargs, arguments_of(getattr(torch.optim, self.optim)))
        self.scheduler = None if scheduler is None else known("scheduler", scheduler, Scheduler)
        self.scheduler_kwargs = numbers(scheduler_kwargs or {})
        if self.scheduler is not None:
            offered = arguments_of(self._schedule(self.scheduler))
            if "num_warmup_steps" in offered:
                offered.append(WARMUP)
            refuse_unknown(f"scheduler {self.scheduler}", self.scheduler_kwargs, offered)
            if {WARMUP, "num_warmup_steps"} <= {*self.scheduler_kwargs}:
                raise ValueError(f"scheduler {self.scheduler}: give warmup_ratio or num_warmup_steps, not both")
            if not 0 <= self.scheduler_kwargs.get(WARMUP, 0) <= 1:
                raise ValueError(f"scheduler: warmup_ratio={self.scheduler_kwargs[WARMUP]} must lie between 0 and 1")
        elif self.scheduler_kwargs:
            raise ValueError(f"scheduler_kwargs={self.scheduler_kwargs} are of no scheduler; name one")

    @classmethod
    def read(cls, given: Any) -> HyperParameters:
        """Return what an object, a mapping or a file of YAML or JSON says.

        Raises:
            TypeError, ValueError: it cannot be read, or what it says cannot be.
        """
        if isinstance(given, cls):
            return given
        if isinstance(given, (str, Path)):
            path = Path(given)
            try:
                given = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, yaml.YAMLError) as error:
                said = getattr(error, "strerror", None) or "it is neither YAML nor JSON"
                raise ValueError(f"hps_config={str(path)!r} cannot be read: {said}") from error
        if not isinstance(given, Mapping):
            raise TypeError(
                f"hps_config is a {type(given).__name__}; give a path of YAML or JSON, a mapping or a HyperParameters"
            )
        if [*given] == ["hps"]:
            return cls.read(given["hps"])
        if "optimizer" in given and "optim" not in given:  # as later versions of ACCMT call it
            given = {"optim" if name == "optimizer" else name: value for name, value in given.items()}
        refuse_unknown("hps_config", given, KEYS)
        named = {name: value for name, value in given.items() if name in ("epochs", "batch_size")}
        for name in ("optim", "scheduler"):
            if given.get(name) is not None:
                kind, kwargs = typed(name, given[name])
                named |= {name: kind, f"{name}_kwargs": kwargs}
        return cls(**named)

    def as_config(self) -> dict[str, Any]:
        """Return what a YAML would say."""
        said: dict[str, Any] = {
            "epochs": self.epochs,
            "batch_size": [self.batch_size, self.val_batch_size],
            "optim": {"type": self.optim, **self.optim_kwargs},
        }
        if self.scheduler is not None:
            said["scheduler"] = {"type": self.scheduler, **self.scheduler_kwargs}
        return said

    def make_optimizer(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        """Return the optimizer; on CUDA its fused form, where it has one and nothing else is asked for."""
        kind = getattr(torch.optim, self.optim)
        kwargs = dict(self.optim_kwargs)
        if device.type == "cuda" and self.optim in FUSED and not {"fused", "foreach"} & {*kwargs}:
            kwargs["fused"] = True
        return made(kind, f"optim {self.optim}", parameters, **kwargs)  # type: ignore[no-any-return]

    def make_scheduler(
        self, optimizer: torch.optim.Optimizer, steps_per_epoch: int | None, epochs: int, total: int | None
    ) -> Any:
        """Return the schedule, which moves after each step of the optimizer; None where none is named.

        Args:
            optimizer: whose learning rate it sets.
            steps_per_epoch: of the optimizer, None where nobody knows; so is the next.
            epochs: to train.
            total: steps of the whole run.

        Raises:
            ValueError: it needs the number of steps, which nobody knows.
        """
        if self.scheduler is None:
            return None
        schedule, kwargs = self._schedule(self.scheduler), dict(self.scheduler_kwargs)
        warmup = kwargs.pop(WARMUP, kwargs.get("num_warmup_steps"))
        if isinstance(warmup, float):
            if total is None:
                raise ValueError(
                    f"scheduler {self.scheduler}: warmup_ratio is a part of all steps, and nobody knows how many: the "
                    "loader has no length, or the time alone ends the run; give num_warmup_steps"
                )
            kwargs["num_warmup_steps"] = round(total * warmup) if warmup <= 1 else count("num_warmup_steps", warmup)
        offered = arguments_of(schedule)
        filled: dict[str, int | None] = {"num_training_steps": total, "total_steps": total}
        if {"steps_per_epoch", "epochs"} & {*kwargs}:  # the length is said in these
            filled = {"steps_per_epoch": steps_per_epoch, "epochs": epochs}
        for name, value in filled.items():
            if name in offered and name not in kwargs:
                if value is None:
                    raise ValueError(
                        f"scheduler {self.scheduler}: give {name}, since nobody knows it: the loader has no length, or "
                        "the time alone ends the run"
                    )
                kwargs[name] = value
        return made(schedule, f"scheduler {self.scheduler}", optimizer, **kwargs)

    @staticmethod
    def _schedule(name: str) -> Callable[..., Any]:
        return schedules.BY_NAME.get(name) or getattr(torch.optim.lr_scheduler, name)


def typed(name: str, given: Any) -> tuple[str, dict[str, Any]]:
    """Return the type and the arguments that `optim` or `scheduler` of a configuration says."""
    if isinstance(given, str):
        return given, {}
    if not isinstance(given, Mapping) or "type" not in given:
        raise ValueError(f"{name} needs a type, as in {{type: {'AdamW, lr: 1e-3' if name == 'optim' else 'StepLR'}}}")
    return given["type"], {key: value for key, value in given.items() if key != "type"}


def known(what: str, name: Any, offered: type[enum.StrEnum]) -> str:
    """Return the name of one of several things."""
    names = [member.value for member in offered]
    try:
        refuse_unknown(what, [str(name)], names)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return str(name)


def count(name: str, given: Any) -> int:
    """Return a number of things, at least one."""
    number = numbers(given)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != int(number) or number < 1:
        raise ValueError(f"{name}={given!r} must be a whole number, at least 1")
    return int(number)


def numbers(given: Any) -> Any:
    """Return what is given with texts that are numbers read as such: YAML takes 1e-3 for a text."""
    if isinstance(given, str):
        for kind in (int, float):
            try:
                return kind(given)
            except ValueError:
                pass
    elif isinstance(given, Mapping):
        return {str(name): numbers(value) for name, value in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        return [numbers(value) for value in given]
    return given


def arguments_of(kind: Callable[..., Any]) -> list[str]:
    """Return the arguments of an optimizer or a schedule besides the first, what it is about."""
    return [*inspect.signature(kind).parameters][1:]


def made(kind: Callable[..., Any], where: str, *args: Any, **kwargs: Any) -> Any:
    """Make an optimizer or a schedule; its refusal says which one it is of."""
    try:
        return kind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
