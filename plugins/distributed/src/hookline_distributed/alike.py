"""What ranks have in common: given to all by rank 0; compared when they meet, with loaders, evaluations and saves."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

Described = dict[str, dict[str, Any]]
AT_ONCE = 32 << 20  # bytes of small tensors that are given in one exchange
PLAIN = (torch.Tensor, torch.nn.Parameter)  # of what is a kind of tensor of its own nobody can tell how it is stored


class Hidden(str):
    """A text that is compared, and that messages show as asterisks."""

    def __format__(self, spec: str) -> str:
        return "***"


def compare(trainer: Trainer, subject: str, own: Described, beside: Any = None) -> list[Any]:
    """Refuse, on all ranks, those that would do something else than rank 0.

    Args:
        trainer: whose ranks they are.
        subject: what is compared, in words.
        own: what this rank has.
        beside: what else all ranks want to know of each other, at no further exchange; it is returned of each.

    Raises:
        ValueError: what is different, and on which rank.
    """
    ranks = trainer.hook.all_gather(trainer=trainer, value=(tuple(own), own, beside))
    end = "; all ranks of a run must have the same"
    for rank, said in enumerate(ranks):  # a rank that has a loader more comes here before the others
        if not isinstance(said, tuple) or said[:1] != (tuple(own),):
            raise ValueError(
                f"rank {rank} is at another place of the run than rank {trainer.rank}, whose {subject} is compared: "
                "all ranks of a run must come to the same places, with the same loaders"
            )
    first_of = ranks[0][1]
    for rank, (_, other, _) in enumerate(ranks):
        for kind, first in first_of.items():
            for name in [*first, *other[kind]]:
                values = [each[kind].get(name, "missing") for each in (other, first_of)]
                if values[0] != values[1]:
                    raise ValueError(
                        f"rank {rank} has another {subject} than rank 0: {kind}.{name} is {values[0]} instead of "
                        f"{values[1]}{end}"
                    )
            for place, (name, wanted) in enumerate(zip(other[kind], first, strict=True)):
                if name != wanted:
                    raise ValueError(
                        f"rank {rank} has another {subject} than rank 0: number {place} of {kind} is {name} instead of "
                        f"{wanted}, of the same in another order, as a set gives it, whose order is another in each "
                        "process; sort it: ranks average and exchange by order"
                    )
    return [beside for _, _, beside in ranks]


def describe(trainer: Trainer) -> Described:
    """Return what must be the same on all ranks, as texts; plugins that only watch may be there on one alone."""
    plugins = {name: plugin for name, plugin in trainer.plugins.listed() if not getattr(plugin, "observer", False)}
    tensors = {"parameters": trainer.module.named_parameters(), "buffers": trainer.module.named_buffers()}
    return {
        "trainer": {name: as_text(value) for name, value in asdict(trainer.options).items()},
        "plugins": {name: type(plugin).__name__ for name, plugin in plugins.items()},
        "options": {
            f"{name}.{field.name}": (Hidden if field.metadata.get("secret") else str)(
                as_text(getattr(plugin, field.name))
            )
            for name, plugin in plugins.items()
            if is_dataclass(plugin)
            for field in fields(plugin)
            if field.init
        },
        **{kind: {name: f"{str(one.dtype)[6:]}{list(one.shape)}" for name, one in of} for kind, of in tensors.items()},
    }


def as_text(value: Any) -> str:
    """Return a value as text, of objects only the class: what else they show may depend on the process."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_text(one)}' for key, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_text, value))}]"
    return str(value) if isinstance(value, (int, float, str, Path, type(None))) else type(value).__name__


# Loaders ------------------------------------------------------------------------------


def describe_loader(loader: Any, key: str) -> Described:
    """Return what must be the same on all ranks of a loader as the module made it."""
    return {"loader": {"key": key, "class": type(loader).__name__, "samples": shared_samples(loader)}}


def shared_samples(loader: Any) -> int | None:
    """Return how many samples the run's own sampler shares out between ranks; None where the user does it."""
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        sampler: Any = getattr(holder, "sampler", None)
        if hasattr(sampler, "shares"):
            return int(sampler.length)
    return None


# Weights ------------------------------------------------------------------------------


def give(tensors: Iterable[torch.Tensor], device: torch.device, group: Any = None) -> None:
    """Give all ranks the tensors of rank 0, in few exchanges; not those of which they have shares, or without values.

    Args:
        tensors: the same on all ranks; changed in place.
        device: where tensors are exchanged.
        group: the ranks, whose first gives; None for all.
    """
    for same in _together(tensors):
        flat = torch.cat([tensor.flatten() for tensor in same]).to(device)
        dist.broadcast(flat, group=group, group_src=0)
        for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _together(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Give tensors of one type and device, as many as may be copied into one."""
    kinds: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, DTensor) or tensor.is_meta:
            continue
        same = kinds.setdefault((tensor.dtype, tensor.device), [])
        if same and sum(other.nbytes for other in same) + tensor.nbytes > AT_ONCE:
            yield same.copy()
            same.clear()
        same.append(tensor.detach())
    yield from kinds.values()


class Alike(CallbackInterface):
    """End a run whose ranks do not hold one model any more, before an evaluation or a save goes by it.

    Sums of bits, so that they are the same in any order of summing, and NaN is NaN.
    """

    @hookimpl
    def on_begin_evaluation(self, trainer: Trainer) -> None:
        self._compare(trainer, "an evaluation", buffers=True)

    @hookimpl(wrapper=True, tryfirst=True)
    def save(self, trainer: Trainer, state: Mapping[str, Any] | None) -> Generator[None, bool, bool]:
        if state is None:  # else it is kept of another boundary, and this rank may be alone with it
            self._compare(trainer, "a save", buffers=False)
        return (yield)

    def _compare(self, trainer: Trainer, moment: str, buffers: bool) -> None:
        """Raise on all ranks where some hold other bits.

        Raises:
            ValueError: the first tensor that differs, and on which rank.
        """
        sums = sums_of(trainer.hook.get_replicated(trainer=trainer, buffers=buffers))
        said = {(place, digest([*of_place])): digest(of_place) for place, of_place in sums.items()}
        if not differing(compare(trainer, "model", {}, said)):
            return
        each = {(place, name): total for place, of_place in sums.items() for name, total in of_place.items()}
        found = differing(compare(trainer, "model", {}, each))
        (_, name), rank, other = found[0]
        raise ValueError(
            f"rank {rank} has another {name} than rank {other} before {moment}, at step {trainer.global_step}: "
            f"{len(found)} of the {len(each)} tensors that ranks hold alike differ, so they do not "
            "train one model any more. Something changes it on one rank alone, or otherwise on each; what is meant to "
            "be each rank's own, a plugin takes out by wrapping `get_replicated`, and "
            "`distributed.verify_model: false` compares nothing"
        )


def digest(value: Any) -> bytes:
    """Return what tells plain values apart."""
    return hashlib.blake2b(repr(value).encode()).digest()


def differing(ranks: Sequence[Mapping[Any, Any]]) -> list[tuple[Any, int, int]]:
    """Return what two ranks have under one name and not alike: the name, the rank, and the first that has another."""
    first: dict[Any, tuple[int, Any]] = {}
    found: dict[Any, tuple[Any, int, int]] = {}
    for rank, own in enumerate(ranks):
        for name, value in own.items():
            other, wanted = first.setdefault(name, (rank, value))
            if value != wanted:
                found.setdefault(name, (name, rank, other))
    return list(found.values())


def sums_of(tensors: Mapping[str, torch.Tensor]) -> dict[tuple[int, ...], dict[str, int]]:
    """Return the sum of the bits of each tensor by name, under the place of those that other ranks hold as well.

    Of a tensor that ranks share in one direction and replicate in another, the place is that of the share; one that
    is shared in all is left out. One reading of the tensors, and one copy off each device.
    """
    rows: dict[torch.device, list[tuple[tuple[int, ...], str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        place: tuple[int, ...] = ()
        if isinstance(tensor, DTensor):
            shares = [not placement.is_replicate() for placement in tensor.placements]
            if all(shares):
                continue
            place = tuple(itertools.compress(tensor.device_mesh.get_coordinate() or (), shares))
            tensor = tensor.to_local()
        if type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_meta:
            rows.setdefault(tensor.device, []).append((place, name, words(tensor).sum()))
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for of_device in rows.values():
        sums = torch.stack([total for *_, total in of_device]).tolist()
        for (place, name, _), total in zip(of_device, sums, strict=True):
            found.setdefault(place, {})[name] = total
    return found


def words(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor as whole numbers of 64 bits, with zeros behind the last; a view where that can be."""
    raw = tensor.detach().reshape(-1).view(torch.uint8)
    if raw.numel() % 8 or raw.storage_offset() % 8:
        raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 8))
    return raw.view(torch.int64)
