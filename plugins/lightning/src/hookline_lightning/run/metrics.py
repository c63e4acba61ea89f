"""The state of torchmetrics' objects in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hookline
from hookline import CallbackInterface
from hookline_lightning.run.bridge import Bridge
from hookline_lightning.run.values import is_metric


class Metrics(CallbackInterface):
    """Keeps what objects of torchmetrics have seen so far, for a run that is cut in mid-epoch."""

    state_of_rank = True

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    def _named(self) -> Iterator[tuple[str, Any]]:
        return ((name, one) for name, one in self.bridge.named_modules() if is_metric(one))

    def get_state(self) -> dict[str, Any]:
        """Return it by the names of the objects."""
        return {
            name: {"values": dict(one.metric_state), "count": one.update_count}
            for name, one in self._named()
            if one.update_count
        }

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        for name, one in self._named():
            if name in state:
                for key, value in hookline.copy_state(state[name]["values"]).items():
                    setattr(one, key, value)
                # `compute` warns without updates and answers what it has kept, and only `reset` sets both in public
                one._update_count, one._computed = state[name]["count"], None
