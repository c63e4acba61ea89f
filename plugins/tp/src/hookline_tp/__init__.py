"""Split single layers of a model over ranks (tensor and sequence parallel), by a plan: styles by names of modules.

`plan` reads it, `parts` splits a model by it, and the plugin, here, has both done on the ranks of a run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, hookimpl, instantiate
from hookline_tp.parts import here, losses_of_parts, split, whole
from hookline_tp.plan import choose, read_style

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DIMENSION = "tensor"  # of the mesh
SAME = 1e-2  # by how much of themselves gradients of two ranks may differ that compute the same in another order

log = logging.getLogger("hookline.tp")


@dataclass(eq=False)
class Tp(CallbackInterface):
    """Split layers over ranks that work on the same data, each with a part of the features or of the sequence."""

    size: int = 0
    """How many ranks split a layer between them, neighbours; 0 for all."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Styles by names of modules, in which `*` stands for one part of a name; else what `get_tp_plan()` of the module
    answers."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"tp.size={self.size} must be a number of ranks, or 0 for all")
        self._own = {
            name: style if isinstance(style, str) else instantiate(style, f"tp.plan.{name}")
            for name, style in self.plan.items()
        }
        for name, style in self._own.items():
            read_style(style, f"tp.plan: {name!r}")
        self._mesh: Any = None
        self._compared = False

    # Ranks ----------------------------------------------------------------------------

    def _size_of(self, trainer: Trainer) -> int:
        return 1 if trainer.world_size == 1 else self.size or trainer.world_size

    @hookimpl
    def get_share(self, trainer: Trainer) -> tuple[int, int]:
        size = self._size_of(trainer)
        if trainer.world_size % size:
            raise ValueError(f"tp.size={size} does not divide the {trainer.world_size} ranks")
        return trainer.rank // size, trainer.world_size // size

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed, which may be the later one to come
    def get_mesh_shape(self, trainer: Trainer) -> Generator[None, dict[str, int], dict[str, int]]:
        shape = yield
        return {**shape, DIMENSION: self._size_of(trainer)}

    # The model ------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run(self, trainer: Trainer) -> Generator[None, bool, bool]:
        texts = [style for style in self._styles(trainer.module).values() if isinstance(style, str)]
        with losses_of_parts() if any("to logits" in text for text in texts) else contextlib.nullcontext():
            return (yield)

    def _styles(self, module: torch.nn.Module) -> Mapping[str, Any]:
        if self._own or not hasattr(module, "get_tp_plan"):
            return self._own
        return module.get_tp_plan()  # type: ignore[no-any-return, operator]

    @hookimpl
    def split_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        size = self._size_of(trainer)
        chosen = choose(self._styles(trainer.module), model, size)
        if size == 1:
            return model
        if not chosen:
            raise ValueError(
                f"tp has no plan: give tp.plan, or {type(trainer.module).__name__} a method get_tp_plan() that answers "
                "one, such as {'blocks.*.up': 'column', 'blocks.*.down': 'row'}"
            )
        if trainer.shares > 1 and not trainer.plugins.performers("shard_model"):
            raise ValueError(
                f"tp.size={size} leaves {trainer.shares} models over the {trainer.world_size} ranks, and no plugin "
                "makes one of them: add fsdp, or set tp.size=0 for all ranks"
            )
        self._mesh = trainer.hook.get_mesh(trainer=trainer)[DIMENSION]
        begins = [*model.parameters(), *model.buffers()]  # modules that were built apart may begin apart
        trainer.hook.broadcast(trainer=trainer, tensors=begins)
        split(model, self._mesh, chosen)
        log.info("tp: %d modules over %d ranks", len(chosen), size)
        return model

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def call_model(self) -> Generator[None, Any, Any]:
        """Put outputs together that are in parts: the loss of parts of the logits, above all."""
        return whole((yield))

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Sum up what ranks know of the gradients of weights that all have, before anyone looks at them."""
        if self._mesh is None:
            return
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    gradient = weight.grad
                    if isinstance(gradient, DTensor) and gradient.placements != weight.placements:
                        weight.grad = gradient.redistribute(placements=weight.placements)
        if not self._compared:
            self._compare(trainer)
            self._compared = True

    def _compare(self, trainer: Trainer) -> None:
        """Look once whether weights that are not split have the same gradients on all ranks, which nothing sums up.

        Raises:
            ValueError: which have others.
        """
        others: list[str] = []
        for name, weight in trainer.module.named_parameters():
            names = weight.device_mesh.mesh_dim_names if isinstance(weight, DTensor) else ()
            if weight.grad is None or DIMENSION in (names or ()):
                continue
            own = here(weight.grad)
            first = own.clone()
            dist.broadcast(first, group=self._mesh.get_group(), group_src=0)
            if (own - first).norm() > SAME * first.norm():
                others.append(name)
        found = sorted({name for names in trainer.hook.all_gather(trainer=trainer, value=others) for name in names})
        if found:
            raise ValueError(
                f"ranks that split layers have other gradients of {', '.join(found)}: these are not in the plan, and "
                "see a part of the features or of the sequence alone. Name their modules in tp.plan ('sequence' for a "
                "norm), or put together what comes to them ('input from sequence to whole')"
            )

    # Export ---------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return {name: whole(value).cpu() if isinstance(value, DTensor) else value for name, value in state.items()}
