"""Make the optimizer by configuration; evaluate, save and export schedule-free ones with their averaged weights."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, ModuleInterface, copy_state, hookimpl, instantiate

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.optimizer")

Tensors = dict[str, torch.Tensor]


@dataclass(eq=False)
class Optimizer(CallbackInterface):
    """Make the optimizer by configuration; use the averaged weights of schedule-free ones where weights are used."""

    _target_: str | None = None
    """The dotted path of the class, such as torch.optim.AdamW; null keeps the optimizers that the module returns."""
    lr: float | None = None
    """The learning rate; null for the default of the class."""
    weight_decay: float | None = None
    """The weight decay; null for the default of the class."""
    options: dict[str, Any] = field(default_factory=dict)
    """All other arguments of the class: {betas: [0.9, 0.95]}."""
    fused: bool | None = None
    """Whether torch steps by one fused operation; null wherever torch has it for the optimizer and the device."""
    replace: bool = False
    """Whether to make it in place of what the module returns, instead of refusing a module that returns optimizers."""

    def __post_init__(self) -> None:
        if self._target_ is None:
            for name in ("lr", "weight_decay", "options", "fused", "replace"):
                if getattr(self, name) not in (None, {}, False):
                    raise ValueError(f"optimizer.{name} needs optimizer._target_, such as torch.optim.AdamW")
            self.setup_optimizers = None  # type: ignore[assignment]  # hides the method
        for name in {"params", "lr", "weight_decay", "fused", "_target_"} & self.options.keys():
            raise ValueError(f"optimizer.options.{name}: write it beside options, or leave it to the plugin")
        self.on_setup()

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._modal: list[Any] = []  # optimizers that train with other weights than they evaluate with
        self._restored: Tensors = {}

    # Making it ------------------------------------------------------------------------

    @hookimpl
    def setup_optimizers(self, trainer: Trainer) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        module = trainer.module
        written = type(module).get_optimizers_schedulers is not ModuleInterface.get_optimizers_schedulers
        if written and not self.replace:
            raise ValueError(
                f"optimizer._target_={self._target_}: {type(module).__name__} has get_optimizers_schedulers, too; "
                "remove one of them, or set optimizer.replace=true"
            )
        given = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": self.fused}
        arguments = {**self.options, **{name: value for name, value in given.items() if value is not None}}
        made = None
        if self.fused is None and not any(getattr(part, "sparse", False) for part in module.modules()):
            made = self._make_fused(module, arguments)
        made = made or self._make(module, arguments)
        if trainer.rank == 0:
            ways = [name for name in ("fused", "foreach") if made.defaults.get(name)]
            log.info("%s steps %s", type(made).__name__, " and ".join(ways) or "as torch chooses for the device")
        return [made], []

    def _make(self, module: torch.nn.Module, arguments: dict[str, Any]) -> torch.optim.Optimizer:
        node = {"_target_": self._target_, "params": list(module.parameters()), **arguments}
        made = instantiate(node, "plugins.optimizer")
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer._target_={self._target_} made a {type(made).__name__}, no torch.optim.Optimizer"
            )
        return made

    def _make_fused(self, module: torch.nn.Module, arguments: dict[str, Any]) -> torch.optim.Optimizer | None:
        """Return a fused optimizer; None if the class or the device has none, or other ways are asked for."""
        home, _, name = str(self._target_).rpartition(".")
        known = getattr(torch.optim, name, None) if home == "torch.optim" else None
        others = {"foreach", "differentiable"} & arguments.keys()
        if known is None or others or "fused" not in inspect.signature(known).parameters:
            return None
        with contextlib.suppress(RuntimeError):  # by which torch refuses parameters that it has no operation for
            return self._make(module, {**arguments, "fused": True})
        return None

    # Weights to train with, and weights to use -----------------------------------------

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        self._modal, self._module = [one for one in trainer.optimizers if is_modal(one)], trainer.module
        self._restored = {}
        for optimizer in self._modal:
            optimizer.train()

    # Outermost: `eval()` computes with the weights to train with, which others then replace by an average of theirs.

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, trainer: Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        with self._to_use(trainer.module):
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def export_model(self, trainer: Trainer) -> Generator[None, Tensors, Tensors]:
        with self._to_use(trainer.module):
            state = yield
            return copy_state(state) if self._modal or self._restored else state

    @contextlib.contextmanager
    @torch.no_grad()
    def _to_use(self, module: torch.nn.Module) -> Iterator[None]:
        """Have the weights to use in the module's own tensors, and afterwards the very bits that were there."""
        weights = dict(module.named_parameters()) if self._modal or self._restored else {}
        trained = {name: weight.clone() for name, weight in weights.items()}
        try:
            for optimizer in self._modal:
                optimizer.eval()
            for name in self._restored.keys() & weights.keys():
                weights[name].copy_(self._restored[name])
            yield
        finally:
            for optimizer in self._modal:
                optimizer.train()
            for name, weight in weights.items():
                weight.copy_(trained[name])

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the weights to use, which an evaluation needs that has no optimizer."""
        if not self._modal:
            return {}
        module = self._module
        with self._to_use(module), torch.no_grad():
            return {"weights": {name: weight.clone() for name, weight in module.named_parameters()}}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them, until training begins."""
        self._restored = state.get("weights", {})


def is_modal(optimizer: Any) -> bool:
    """Tell whether an optimizer has weights to train with and others to use: `train()` and `eval()` choose."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
