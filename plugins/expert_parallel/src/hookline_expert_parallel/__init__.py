"""Mixtures of experts: a layer of them, its losses and loads, and the experts on several ranks.

`layer` is the layer, `balance` the losses, `exchange` has ranks exchange tokens, and the plugin, here, has all of them
done in a run.
"""

from __future__ import annotations

import fnmatch
import itertools
import logging
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hookline import CallbackInterface, Stage, hookimpl
from hookline_expert_parallel.balance import balance_loss, dropped, load_of, relative, router_z_loss
from hookline_expert_parallel.exchange import Exchange, split, whole
from hookline_expert_parallel.layer import Experts, MixtureOfExperts, Routed, Router

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"
__all__ = ["ExpertParallel", "Experts", "MixtureOfExperts", "Routed", "Router"]

DIMENSION = "expert"  # of the experts' own mesh: ranks with different experts
COPIES = "copies"  # and ranks with the same ones
KNOWN = ("replicate", "data", "tensor")  # dimensions of the mesh of all ranks; the first two have data of their own

log = logging.getLogger("hookline.expert_parallel")


@dataclass(eq=False)
class ExpertParallel(CallbackInterface):
    """Split the experts of a model over ranks that work on different data, and keep their loads in balance."""

    size: int = 0
    """How many ranks share the experts between them, neighbours; 0 for all that have data of their own."""
    experts: list[str] = field(default_factory=list)
    """Names of modules of your own whose parameters are stacked over experts, in which `*` stands for one part of a
    name; modules of the class `Experts` are found without it."""
    balance: float = 0.01
    """Weight of the load-balancing loss, which is added to the loss of training; 0 for none."""
    router_z: float = 0.0
    """Weight of the mean square of the logsumexp of a router's logits, which keeps them small; 0 for none."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"expert_parallel.size={self.size} must be a number of ranks, or 0 for all")
        for name in ("balance", "router_z"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expert_parallel.{name}={getattr(self, name)} must be 0 or above")
        self._mesh: Any = None
        self._exchanges: dict[str, Exchange] = {}
        self._routers: dict[str, Router] = {}
        self._seen: dict[str, list[Routed]] = {}
        self._handles: list[Any] = []
        self._listening = False
        self._added = False  # whether the losses have been added in this step

    # The model ------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def split_model(self, trainer: Trainer) -> Generator[None, torch.nn.Module, torch.nn.Module]:
        model = yield
        self._routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        self._listen()
        found = self._find(model)
        size = self.size or trainer.shares
        if trainer.shares % size:
            raise ValueError(f"expert_parallel.size={size} does not divide the {trainer.shares} ranks with data")
        if size == 1:
            return model
        if not found:
            raise ValueError(
                "expert_parallel finds no experts: build the model with hookline_expert_parallel.MixtureOfExperts, or "
                "name modules of your own in expert_parallel.experts"
            )
        if not trainer.plugins.performers("shard_model"):
            raise ValueError(
                "expert_parallel splits the experts alone, and no plugin makes one model of the rest: add ddp or fsdp"
            )
        self._mesh = mesh_of(trainer.hook.get_mesh(trainer=trainer), size, trainer.device.type)
        trainer.hook.on_make_groups(trainer=trainer, groups=self._mesh.get_all_groups())
        begins = [weight for module in found.values() for weight in module.parameters()]
        trainer.hook.broadcast(trainer=trainer, tensors=begins)
        self._exchanges = {name: split(name, module, self._mesh[DIMENSION]) for name, module in found.items()}
        log.info("expert_parallel: the experts of %d modules over %d ranks", len(found), size)
        return model

    def _find(self, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
        """Return the modules whose experts are split, by name.

        Raises:
            ValueError: `experts` names one that is not there.
        """
        modules = dict(model.named_modules())
        found: dict[str, torch.nn.Module] = {n: module for n, module in modules.items() if isinstance(module, Experts)}
        for pattern in self.experts:
            depth = pattern.count(".")
            meant = [name for name in modules if name.count(".") == depth and fnmatch.fnmatchcase(name, pattern)]
            if not meant:
                raise ValueError(f"expert_parallel.experts names {pattern!r}, and the model has no such module")
            found |= {name: modules[name] for name in meant}
        return found

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed
    def get_shard_meshes(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        meshes = yield
        return {**meshes, **{name: self._mesh[COPIES] for name in self._exchanges}}  # noqa: C420 - there may be no mesh

    # Losses and loads -----------------------------------------------------------------

    @hookimpl
    def on_begin_run(self) -> None:
        """Listen again to the routers of a model that an earlier run of this trainer has made."""
        self._listen()

    def _listen(self) -> None:
        self._handles = [router.register_forward_hook(self._hear(name)) for name, router in self._routers.items()]

    def _hear(self, name: str) -> Any:
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def hear(router: torch.nn.Module, inputs: Any, routed: Routed) -> None:
            if self._listening:  # else in backward, which recomputes a forward, or in an evaluation
                self._seen.setdefault(name.removesuffix(".router"), []).append(routed)

        return hear

    @hookimpl
    def on_end_run(self) -> None:
        """Leave the module without hooks: the user may copy or save it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @hookimpl(wrapper=True)
    def call_model(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        """Add the losses of the routers to that of the step."""
        if stage is not Stage.TRAIN or not self._routers:
            return (yield)
        self._listening, self._seen = True, {}
        try:
            returned = yield
        finally:
            self._listening = False
        seen, self._seen, self._added = self._seen, {}, True
        added = self._losses(trainer, seen) if seen else 0
        if isinstance(returned, (tuple, list)):
            return (returned[0] + added, *returned[1:])
        return returned + added

    def _losses(self, trainer: Trainer, seen: dict[str, list[Routed]]) -> Any:
        """Log the loads, and return what the routers add to the loss: by the loads of all ranks."""
        own = [load_of(calls) for calls in seen.values()]
        loads = torch.cat(own) * (not trainer.idle)  # what only fills up a window is no load
        if trainer.world_size > 1:
            dist.all_reduce(loads)
        balances, zs = [], []
        for (name, calls), load in zip(seen.items(), torch.split(loads, [*map(len, own)]), strict=True):
            by_expert = relative(load)
            balances.append(balance_loss(calls, by_expert))
            zs.append(router_z_loss(calls))
            logged: dict[str, Any] = {"max": by_expert.max(), "min": by_expert.min()}
            trainer.log(**{f"expert_load_{which}/{name}": value for which, value in logged.items()})
        balance, z = torch.stack(balances).sum(), torch.stack(zs).sum()
        trainer.log(balance_loss=balance.detach(), router_z_loss=z.detach(), sync=True)
        over = dropped([*itertools.chain(*seen.values())])
        if over is not None:
            trainer.log(dropped_tokens=over, reduce="sum", sync=True)
        return sum(weight * loss for weight, loss in ((self.balance, balance), (self.router_z, z)) if weight)

    @hookimpl
    def on_begin_optimizer_step(self) -> None:
        if self._routers and not self._added and (self.balance or self.router_z):
            raise ValueError(
                f"expert_parallel.balance={self.balance} and router_z={self.router_z} were added to no loss in this "
                "step: what computes it here does not call `trainer.hook.call_model`; set both to 0"
            )
        self._added = False

    # Evaluation -----------------------------------------------------------------------

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed
    def computes_together(self) -> Generator[None, bool, bool]:
        return (yield) or bool(self._exchanges)

    @hookimpl(trylast=True, optionalhook=True)  # of distributed; behind fsdp, whose parameters may be of another type
    def on_compute_apart(self, apart: bool) -> None:
        for exchange in self._exchanges.values():
            exchange.put_together(apart)

    # Export ---------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return {name: whole(value) for name, value in state.items()}


def mesh_of(mesh: DeviceMesh, size: int, device_type: str) -> DeviceMesh:
    """Return the mesh of all ranks with those that have data in two dimensions: the same experts, and different ones.

    Raises:
        ValueError: ranks are laid out in ways that are not known here.
    """
    names = mesh.mesh_dim_names or ()
    unknown = [name for name in names if name not in KNOWN]
    if unknown:
        raise ValueError(f"expert_parallel does not know how ranks of the mesh's dimension {unknown[0]!r} share tokens")
    shape = dict(zip(names, mesh.shape, strict=True))
    if shape["data"] % size:
        raise ValueError(
            f"expert_parallel.size={size} does not divide the {shape['data']} ranks of the mesh's dimension 'data'"
        )
    return DeviceMesh(
        device_type,
        mesh.mesh.reshape(-1, size, shape.get("tensor", 1)),
        mesh_dim_names=(COPIES, DIMENSION, "tensor"),
    )
