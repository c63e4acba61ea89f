"""A world of so many ranks, and what was found of one of them, as text and as plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from hookline.commands import table

SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""How often (n-1)/n of its bytes a rank sends in a collective of n ranks that goes around in a ring."""


class World:
    """So many machines with so many devices each."""

    def __init__(self, text: str) -> None:
        """Read "8x64", or "4" for one machine.

        Raises:
            ValueError: it is neither.
        """
        match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})", text)
        if match is None:
            raise ValueError(
                f"--world={text} is no world; write MACHINESxDEVICES, e.g. 8x64, or the number of ranks on one machine"
            )
        self.machines, self.devices = int(match[1] or 1), int(match[2])
        self.size = self.machines * self.devices

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.machines} machine(s) x {self.devices} device(s) = {self.size} rank(s)"

    def where(self, ranks: Iterable[int]) -> str:
        """Return whether ranks are on one machine."""
        return "one machine" if len({rank // self.devices for rank in ranks}) == 1 else "between machines"

    def here(self, ranks: Iterable[int]) -> int:
        """Return how many of the ranks are on the machine of rank 0."""
        return sum(rank < self.devices for rank in ranks)


@dataclasses.dataclass
class Collective:
    """All collectives of one kind among so many ranks."""

    kind: str
    ranks: int
    where: str
    calls: int = 0
    bytes: int = 0
    """What is reduced, gathered or scattered, whole."""
    seconds: float = 0.0
    exposed: float = 0.0
    """Seconds in which the computation waits for it."""

    @property
    def share(self) -> float:
        """What each rank sends of one byte."""
        return SENT[self.kind] * (self.ranks - 1) / self.ranks if self.kind in SENT else 1.0

    @property
    def sent(self) -> int:
        """What each rank sends of it."""
        return int(self.share * self.bytes)


@dataclasses.dataclass
class Plan:
    """What was found of one rank; sizes are in bytes."""

    world: World
    meshes: list[str] = dataclasses.field(default_factory=list)
    batch: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    """Of one step."""
    speeds: str = ""
    time: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of one step, at the least."""
    flops: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of this rank in one step."""
    mfu: float = 0.0
    """The share of the device's FLOP/s that the model's own have, at the most."""
    missing: str = ""
    """Why the step could not be simulated."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "world": {"machines": self.world.machines, "devices": self.world.devices},
            "mesh": self.meshes,
            "batch": self.batch,
            "memory": self.memory,
            "collectives": [dataclasses.asdict(one) | {"sent": one.sent} for one in self.collectives],
            "time": self.time,
            "flops": self.flops,
            "mfu": self.mfu,
            "missing": self.missing,
        }

    def lines(self) -> Iterator[str]:
        """Give it as text."""
        yield f"world: {self.world}"
        yield f"mesh: {'; '.join(self.meshes) or 'none, each rank has the whole model'}"
        if self.batch:
            yield "step: " + ", ".join(f"{number} {what}" for what, number in self.batch.items())
        yield ""
        yield from table(["memory of rank 0", "size"], [[n, readable(s)] for n, s in self.memory.items()], right=[1])
        if self.missing:
            return
        yield ""
        rows = [
            [
                *(one.kind, str(one.ranks), one.where, str(one.calls), readable(one.bytes), readable(one.sent)),
                *(spoken(one.seconds), spoken(one.exposed)),
            ]
            for one in self.collectives
        ]
        head = ["communication of a step", "ranks", "on", "calls", "size", "sent", "time", "exposed"]
        yield from table(head, rows, right=[1, 3, 4, 5, 6, 7]) if rows else ["no communication"]
        yield ""
        yield from table(["time of a step", "at least"], [[n, spoken(s)] for n, s in self.time.items()], right=[1])
        yield ""
        yield f"at {self.speeds}"
        yield f"MFU: {self.mfu:.1%} at most"


def spoken(seconds: float) -> str:
    """Return a time as one reads it."""
    for power, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= power:
            return f"{seconds / power:.2f} {unit}"
    return f"{seconds * 1e6:.2f} us"


def readable(size: int) -> str:
    """Return a number of bytes as one reads it."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B"
