"""The state of all stages in one: on each rank with every name, and with the tensors of its own stages."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hookline_pipeline.absent import absent, held, is_absent

SECTIONS = ("module", "optimizers", "plugins", "window")


class Shares:
    """Knows which ranks have which tensors of a run's state.

    Args:
        module: the user's.
        places: by the name of each parameter and buffer, the place in the line of the ranks that have it.
        place: of this rank.
        meshes: of the ranks at each place.
        group: of the ranks of this rank's line, in the order of places.
    """

    def __init__(
        self, module: torch.nn.Module, places: Mapping[str, int], place: int, meshes: Sequence[Any], group: Any
    ) -> None:
        self.module, self.places, self.place, self.meshes, self.group = module, places, place, meshes, group

    # To be stored ---------------------------------------------------------------------

    def of_all(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of all stages, of which each tensor is on its own ranks; all ranks come to this."""
        whole = dict(state)
        whole["optimizers"] = [{**one, "state": self._joined(one["state"])} for one in state["optimizers"]]
        if "window" in state:
            gradients = {name: {"": gradient} for name, gradient in state["window"]["gradients"].items()}
            joined = {name: kept[""] for name, kept in self._joined(gradients).items()}
            whole["window"] = {**state["window"], "gradients": joined}
        tied: dict[tuple[int, int], Any] = {}
        for name, weight in self.module.named_parameters(remove_duplicate=False):
            if is_absent(weight):  # those that are one at their place are one here
                key = id(weight), self.places[name]
                tied.setdefault(key, absent(weight.shape, weight.dtype, self.meshes[self.places[name]]))
                whole["module"] = {**whole["module"], name: tied[key]}
        return {key: self._share(value) if key in SECTIONS else value for key, value in whole.items()}

    def _joined(self, own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return what all stages keep by parameter: of tensors of other ranks shape and type, of numbers the value."""
        said = {
            name: {
                key: (value.shape, value.dtype) if isinstance(value, torch.Tensor) and value.ndim else value
                for key, value in kept.items()
            }
            for name, kept in own.items()
            if self.places[name] == self.place
        }
        ranks: list[Any] = [None] * len(self.meshes)
        dist.all_gather_object(ranks, said, group=self.group)
        joined: dict[str, dict[str, Any]] = {}
        for place, of_place in enumerate(ranks):
            for name, kept in of_place.items():
                joined[name] = dict(own[name]) if place == self.place else {
                    key: absent(value[0], value[1], self.meshes[place]) if isinstance(value, tuple) else value
                    for key, value in kept.items()
                }  # fmt: skip
        return joined

    def _share(self, value: Any, name: str | None = None, inner: bool = False) -> Any:
        """Return a part of a state with the tensors that belong to a parameter as those of the ranks that have it."""
        if isinstance(value, Mapping):
            other: Any = copy.copy(value)  # keeps its kind, and what is attached to a state dict
            for key, kept in value.items():
                known = isinstance(key, str) and key in self.places
                other[key] = self._share(kept, key if known else name, not known and name is not None)
            return other
        if type(value) in (list, tuple):
            return type(value)([self._share(kept, name, inner) for kept in value])
        if name is None or not isinstance(value, torch.Tensor) or is_absent(value) or (inner and not value.ndim):
            return value
        place = self.places[name]
        mesh = self.meshes[place]
        return held(value, mesh) if place == self.place else absent(value.shape, value.dtype, mesh)

    # To be loaded ---------------------------------------------------------------------

    def of_this_rank(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state with what this rank's stages take, whole or shared among the ranks of its stage."""
        gone = {name for name, weight in self.module.named_parameters(remove_duplicate=False) if is_absent(weight)}
        here = {key: self._take(value, gone) if key in SECTIONS else value for key, value in state.items()}
        for kept in [*here["optimizers"], *([here["window"]] if "window" in here else [])]:
            for part in ("state", "gradients"):
                if part in kept:
                    kept[part] = {name: one for name, one in kept[part].items() if name not in gone}
        return here

    def _take(self, value: Any, gone: set[str], name: str | None = None) -> Any:
        if isinstance(value, Mapping):
            other: Any = copy.copy(value)  # keeps its kind, and what is attached to a state dict
            for key, kept in value.items():
                other[key] = self._take(kept, gone, key if isinstance(key, str) and key in self.places else name)
            return other
        if type(value) in (list, tuple):
            return type(value)([self._take(kept, gone, name) for kept in value])
        if not isinstance(value, torch.Tensor) or name is None:
            return value
        like = named(self.module, name)
        if name in gone:
            return like.detach() if value.shape == like.shape else value
        if is_absent(value):  # a weight that another stage has too, and gives this one
            return like.detach()
        if isinstance(value, DTensor) and value.device_mesh is self.meshes[self.place]:
            return value.to_local()
        return value

    def allocate(self, path: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> DTensor | None:
        """Return what a tensor that belongs to another stage is read into, which is nothing; None for any other."""
        for name in reversed(path):
            if isinstance(name, str) and name in self.places:
                like = named(self.module, name)
                if is_absent(like) and like.shape == torch.Size(shape):
                    return absent(like.shape, dtype, like.device_mesh)
                return None
        return None

    # Whole ----------------------------------------------------------------------------

    def gathered(self, state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Return, on all ranks, weights by name with those of all stages, whole and on the host."""
        ids = {name: id(weight) for name, weight in self.module.named_parameters(remove_duplicate=False)}
        made: dict[int, torch.Tensor] = {}
        whole = dict(state)
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or name not in self.places:
                continue
            key = ids.get(name, id(value))
            if key not in made:
                place = self.places[name]
                if place == self.place:
                    full = (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()
                else:
                    full = torch.empty(value.shape, dtype=value.dtype, device=device)
                dist.broadcast(full, group=self.group, group_src=place)
                made[key] = full.cpu()
            whole[name] = made[key]
        return whole


def named(module: torch.nn.Module, name: str) -> Any:
    """Return the parameter or buffer of a name."""
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)
