"""How long a step takes at the least: computation and communication at stated speeds, overlapped as engines do it."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hookline_simulate.world import Collective, World


class Speeds(NamedTuple):
    """What one device does in a second, at the most."""

    half: float
    """Floating-point operations in bfloat16 or float16, of dense matrices."""
    single: float
    """The same in float32."""
    link: float
    """Bytes that it sends to others of its machine."""
    network: float
    """Bytes that it sends to other machines."""

    def __str__(self) -> str:
        """Return them in words."""
        computes = f"{self.half / 1e12:g} TFLOP/s (float32 {self.single / 1e12:g})"
        sends = f"{self.link / 1e9:g} GB/s within a machine, {self.network / 1e9:g} GB/s a device between machines"
        return f"{computes}, {sends}"


DEVICES = {  # of the maker's data sheets, sent one way; a network card of 200 or 400 Gbit/s for each device
    "a100": Speeds(312e12, 19.5e12, 300e9, 25e9),
    "h100": Speeds(989e12, 67e12, 450e9, 50e9),
}
RING = "all_reduce", "all_gather", "reduce_scatter"  # cross a machine's border by the cards of all its ranks at once


class _Sent(NamedTuple):
    """What is on its way."""

    end: float
    row: Collective


class Clock:
    """Follows the computation of one rank, and its links, through the operations of a step in their order."""

    def __init__(self, speeds: Speeds, world: World) -> None:
        self.speeds = speeds
        self.now = self.computing = 0.0
        self.flops = self.of_forward = 0
        self._world = world
        self._phase = ""
        self._free: dict[str, float] = collections.defaultdict(float)  # when a link has sent what it was given
        self._needed: dict[int, _Sent] = {}  # by the storage that a computation is going to use
        self._reduced: dict[int, _Sent] = {}  # gradients by their storage
        self._leaving: list[_Sent] = []  # all gradients of a backward
        self._ahead = 0.0  # when the last block was used: from then on the next one is gathered
        self._behind: _Sent | None = None  # the gradients that were scattered last

    def begin(self, phase: str) -> None:
        """Begin a forward, a backward or ("") what lies behind them; by then all gradients have arrived."""
        for sent in self._leaving:
            self._wait(sent)
        self._leaving.clear()
        self._reduced.clear()
        self._phase, self._ahead, self._behind = phase, self.now, None

    def forget(self, storage: int) -> None:
        """Forget a storage that is gone, whose number another may have next."""
        self._needed.pop(storage, None)
        self._reduced.pop(storage, None)

    def compute(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Do an operation as soon as all that it uses has arrived."""
        self._use(args)
        flops = flops_of(func, args, kwargs, result)
        if flops:
            narrow = next(_tensors(args)).element_size() < 4
            seconds = flops / (self.speeds.half if narrow else self.speeds.single)
            self.now, self.computing, self.flops = self.now + seconds, self.computing + seconds, self.flops + flops
            self.of_forward += flops if self._phase == "forward" else 0

    def send(self, row: Collective, ranks: Sequence[int], size: int, func: Any, tensors: Any) -> None:
        """Do a collective over the link of its ranks, beside the computation where the engines do that.

        Blocks that are gathered come while the one before them is computed, and gradients go while the next ones are;
        of what is scattered one block is under way. What answers a tensor to wait for is waited for at its first use.
        """
        seconds = row.share * size / self._speed(row.kind, ranks)
        row.seconds += seconds
        fetched = self._phase != "" and "allgather_base" in func.__name__
        before = [sent.end for tensor in _tensors(tensors) if (sent := self._reduced.get(storage_of(tensor)))]
        if not fetched:
            self._use(tensors)
        begin = max(self._free[row.where], self._ahead if fetched else self.now, *before)
        sent = _Sent(begin + seconds, row)
        self._free[row.where] = sent.end
        if fetched or func.namespace != "c10d":
            self._needed |= {storage_of(tensor): sent for tensor in _tensors(tensors)}
        elif self._phase == "backward":
            self._reduced |= {storage_of(tensor): sent for tensor in _tensors(tensors)}
            self._leaving.append(sent)
            if row.kind == "reduce_scatter":
                if self._behind is not None:
                    self._wait(self._behind)
                self._behind = sent
        else:
            self._wait(sent)

    def _use(self, tensors: Any) -> None:
        for tensor in _tensors(tensors) if self._needed else ():
            sent = self._needed.pop(storage_of(tensor), None)
            if sent is not None:
                self._wait(sent)
                self._ahead = self.now

    def _wait(self, sent: _Sent) -> None:
        sent.row.exposed += max(sent.end - self.now, 0.0)
        self.now = max(self.now, sent.end)

    def _speed(self, kind: str, ranks: Sequence[int]) -> float:
        here = self._world.here(ranks)
        if here == len(ranks):
            return self.speeds.link
        return min(self.speeds.link, self.speeds.network * (here if kind in RING else 1))


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the floating-point operations of what torch has a formula for, and of attention as the CPU has it."""
    name = func.__name__.partition(".")[0]
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        query, key = args[1:3] if "backward" in name else args[:2]
        products = 10 if "backward" in name else 4  # in backward five products, of which one is done again
        return int(products * query.numel() * key.shape[-2])
    formula = flop_registry.get(func.overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def storage_of(tensor: torch.Tensor) -> int:
    """Return the number by which a storage is known."""
    return id(tensor.untyped_storage())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
