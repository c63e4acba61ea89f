"""ACCMT's module: a plain object with a model, and how its steps are called."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from hookline_accmt.later import METHODS

log = logging.getLogger("hookline.accmt")


class AcceleratorModule:
    """What to train: a subclass sets `self.model`, and needs no `super().__init__()`.

    It has `training_step(batch)` and `validation_step(batch)`, or one `step(batch)` in place of what is missing; each
    may take `status_dict` behind the batch. `validation_step` returns the loss, or a dictionary with it under "loss"
    and, under the names of metrics, tuples (predictions, references) or numbers.

    It may have `forward(x)`, `collate_fn(samples)`, `get_optimizer()`, `get_scheduler(optimizer, steps_per_epoch,
    epochs)`, `get_train_dataloader()`, `get_validation_dataloader()`, and `get_metrics()`, which answers the
    `torchmetrics.Metric` of each name. `self.teacher` is a model that is not trained. `self.status_dict` says how far
    training is, `self.device` where the model is.
    """

    device: torch.device
    teacher: torch.nn.Module | None = None
    _owner: torch.nn.Module | None = None  # who has the model as its own, from `fit` on

    @property
    def model(self) -> Any:
        """The model that is trained, with what plugins have replaced of it."""
        if self._owner is not None:
            return self._owner.model
        if "model" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no self.model yet: set it in __init__")
        return vars(self)["model"]

    @model.setter
    def model(self, model: Any) -> None:
        if self._owner is not None:
            self._owner.model = model
        else:
            vars(self)["model"] = model

    @property
    def status_dict(self) -> dict[str, Any]:
        """How far training is: the one dictionary of a run, which the trainer writes, to add keys of your own to."""
        if self._owner is not None:
            return self._owner.status  # type: ignore[return-value]
        if "status_dict" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no status_dict before fit")
        return vars(self)["status_dict"]  # type: ignore[no-any-return]

    @status_dict.setter
    def status_dict(self, status: dict[str, Any]) -> None:
        vars(self)["status_dict"] = status

    def __getstate__(self) -> dict[str, Any]:
        """Return what `pickle` and `copy` take: the module without the run that it was in."""
        state = dict(vars(self))
        if state.pop("_owner", None) is not None:
            state |= {"model": self.model, "status_dict": dict(self.status_dict)}
        return state

    def log(self, values: Mapping[str, Any], log_kwargs: Mapping[str, Any] | None = None) -> None:
        """Log numbers by name, as the trainer logs its losses.

        Raises:
            ValueError: arguments of one tracker, which several are not given.
            RuntimeError: there is no run.
        """
        if log_kwargs:
            raise ValueError(f"log: log_kwargs={log_kwargs!r} are of one tracker, and values go to all of them")
        if self._owner is None:
            raise RuntimeError(f"{type(self).__name__}.log is for within fit")
        self._owner.trainer.log(**values)  # type: ignore[operator]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do `forward`."""
        forward = getattr(self, "forward", None)
        if forward is None:
            raise TypeError(
                f"{type(self).__name__} is called, and has no forward(self, x); write it, or call self.model"
            )
        return forward(*args, **kwargs)

    def __len__(self) -> int:
        """Return the number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def __bool__(self) -> bool:
        return True  # a model without parameters is one, too

    @classmethod
    def from_hf(cls, path: str, type: Any = "AutoModelForCausalLM", **kwargs: Any) -> AcceleratorModule:
        """Return a module around a model of transformers, whose loss is the model's own.

        Args:
            path: a folder, or a name on the hub.
            type: a class of transformers, or its name.
            kwargs: of its `from_pretrained`.

        Raises:
            ValueError: transformers is not installed, or has no such class.
        """
        if isinstance(type, str):
            try:
                import transformers

                type = getattr(transformers, type)
            except ImportError as error:
                raise ValueError(f"from_hf needs transformers ({error}): `pip install transformers`") from error
            except AttributeError:
                raise ValueError(f"transformers has no class {type!r}, such as AutoModelForCausalLM") from None
        return Pretrained(type.from_pretrained(path, **kwargs))


class Pretrained(AcceleratorModule):
    """A model of transformers, trained by its own loss."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        """Return what the model does."""
        return self.model(**inputs)

    def step(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of the model."""
        loss: torch.Tensor = self.model(**batch).loss
        return loss


def check(module: AcceleratorModule) -> None:
    """Refuse a module that cannot be trained.

    Raises:
        TypeError, ValueError: what it lacks.
    """
    name = type(module).__name__
    if not isinstance(module.model, torch.nn.Module):
        raise TypeError(f"{name}.model is a {type(module.model).__name__}; it must be a torch.nn.Module")
    if not (hasattr(module, "training_step") or hasattr(module, "step")):
        raise TypeError(f"{name} has neither training_step(self, batch) nor step(self, batch); write one of them")
    for method, instead in METHODS.items():
        if hasattr(module, method):
            raise TypeError(f"{name}.{method}() would not be called: {instead}")
    if hasattr(module, "test_step"):
        log.warning("%s.test_step() is not called: fit trains and validates", name)
    teacher = module.teacher
    if teacher is None:
        return
    if not isinstance(teacher, torch.nn.Module):
        raise TypeError(f"{name}.teacher is a {type(teacher).__name__}; it must be a torch.nn.Module")
    own = {id(parameter) for parameter in module.model.parameters()}
    shared = [n for n, parameter in teacher.named_parameters() if id(parameter) in own]
    if shared:
        raise ValueError(
            f"{name}.teacher has parameters of self.model ({shared[0]}), and a teacher is never trained; "
            "give it a copy of its own (copy.deepcopy)"
        )
