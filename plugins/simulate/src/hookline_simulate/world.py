"""A world of so many ranks, and what was found of one of them, as text and as plain data."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

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


class Collective(NamedTuple):
    """All collectives of one kind among so many ranks."""

    kind: str
    ranks: int
    where: str
    calls: int
    bytes: int
    """What is reduced, gathered or scattered, whole."""

    @property
    def sent(self) -> int:
        """What each rank sends of it."""
        return int(SENT[self.kind] * self.bytes * (self.ranks - 1) / self.ranks) if self.kind in SENT else self.bytes


@dataclasses.dataclass
class Plan:
    """What was found of one rank; sizes are in bytes."""

    world: World
    meshes: list[str] = dataclasses.field(default_factory=list)
    batch: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    """Of one step."""
    missing: str = ""
    """Why the step could not be simulated."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "world": {"machines": self.world.machines, "devices": self.world.devices},
            "mesh": self.meshes,
            "batch": self.batch,
            "memory": self.memory,
            "collectives": [collective._asdict() | {"sent": collective.sent} for collective in self.collectives],
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
        if not self.collectives:
            yield "no communication"
            return
        rows = [
            [one.kind, str(one.ranks), one.where, str(one.calls), readable(one.bytes), readable(one.sent)]
            for one in self.collectives
        ]
        yield from table(["communication of a step", "ranks", "on", "calls", "size", "sent"], rows, right=[1, 3, 4, 5])


def readable(size: int) -> str:
    """Return a number of bytes as one reads it."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B"
