"""How many batches the loaders of evaluations give."""

from __future__ import annotations

from typing import Any

from hookline import Stage

NAMES = {Stage.VAL: "val", Stage.TEST: "test", Stage.PREDICT: "predict"}


class Lengths:
    """What `trainer` answers of them."""

    given: Any
    core: Any
    bridge: Any

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of each validation loader on this rank."""
        return self._lengths(Stage.VAL)

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Batches of each validation loader in the sanity check."""
        return [min(one, self.core.options.sanity_val_steps) for one in self._lengths(Stage.VAL)]

    @property
    def num_test_batches(self) -> list[float]:
        """Batches of each test loader on this rank."""
        return self._lengths(Stage.TEST)

    @property
    def num_predict_batches(self) -> list[float]:
        """Batches of each loader of a prediction on this rank."""
        return self._lengths(Stage.PREDICT)

    def _lengths(self, stage: Stage) -> list[float]:
        asked = self.bridge.loaders.get(stage)
        named = list(asked.values()) if isinstance(asked, dict) else asked
        limit = self.given.overfit_batches if stage is Stage.VAL and self.given.overfit_batches else None
        limit = getattr(self.given, f"limit_{NAMES[stage]}_batches") if limit is None else limit
        limit = int(self.given.fast_dev_run) if self.given.fast_dev_run else limit
        found = []
        for loader in [] if named is None else named if isinstance(named, (list, tuple)) else [named]:
            batches = -(-len(loader) // self.core.shares) if hasattr(loader, "__len__") else float("inf")
            found.append(int(batches * limit) if isinstance(limit, float) and batches < float("inf") else batches)
            found[-1] = min(found[-1], limit) if isinstance(limit, int) else found[-1]
        return found
