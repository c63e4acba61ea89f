"""What a training comes to, on one process or on each of several ranks, and whether that is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hookline.interfaces import ModuleInterface, Stage
from hookline.marks import hookimpl
from hookline.state import copy_state
from hookline.testing.digest import digest
from hookline.testing.memory import Memory
from hookline.testing.tiny import PlainModule, tiny_trainer

if TYPE_CHECKING:
    from hookline.trainer import Trainer


class Trained(NamedTuple):
    """What a training has come to, as one process sees it."""

    weights: dict[str, torch.Tensor]
    """What `export_model` answers."""
    metrics: dict[str, float]
    again: dict[str, float]
    """The metrics of one more evaluation."""
    states: dict[int, Any]
    """The state by step, where it was kept; what ranks have shares of is whole."""
    looked: Any
    """What `look` has answered."""


def train_tiny(
    plugins: Mapping[str, Any],
    module: Callable[[], ModuleInterface] = PlainModule,
    *,
    keep: bool = False,
    begin: Sequence[Any] = (),
    look: Callable[[Trainer], Any] | None = None,
    **options: Any,
) -> Trained:
    """Train a module as `tiny_trainer` does, and evaluate it; alone, or on a rank by `on_ranks(train_tiny, 2, …)`.

    In one thread, since sums of several are others in the last bit.

    Args:
        plugins: by name; as objects they can be pickled.
        module: makes the module; importable by its name, or a `functools.partial` of what is.
        keep: keep the state of each step.
        begin: states to go on from, by rank.
        look: is given the trainer at the end; importable by its name.
        options: of the trainer.
    """
    torch.set_num_threads(1)
    memory = _Kept(every="1 steps" if keep else None)
    memory.own = begin[int(os.environ.get("RANK", "0"))] if begin else None
    kept = {"memory": memory} if keep or begin else {}
    trainer = tiny_trainer({**plugins, **kept}, module(), **{"train_batch_size": 12, **options})
    trainer.train()
    return Trained(
        weights=copy_state(trainer.export_model()),
        metrics=dict(trainer.metrics),
        again=dict(trainer.validate()),
        states=_whole(memory.states),
        looked=None if look is None else look(trainer),
    )


def assert_one_model(
    ranks: Sequence[Trained], alone: Trained, *, rtol: float = 1e-5, atol: float = 1e-6, rtol_of_metrics: float = 1e-6
) -> None:
    """Assert that all ranks have the same weights and metrics bit for bit, and one process the same within rounding.

    Args:
        ranks: what each rank has come to.
        alone: what one process has come to.
        rtol: how much of itself a weight may differ by.
        atol: and besides.
        rtol_of_metrics: how much of itself a metric may differ by.

    Raises:
        AssertionError: what differs.
    """
    for rank, trained in enumerate(ranks):
        assert digest(trained.weights) == digest(ranks[0].weights), f"rank {rank} has other weights than rank 0"
        assert trained.metrics == ranks[0].metrics, f"rank {rank} has {trained.metrics}, and rank 0 {ranks[0].metrics}"
    torch.testing.assert_close(dict(ranks[0].weights), dict(alone.weights), rtol=rtol, atol=atol)
    torch.testing.assert_close(ranks[0].metrics, alone.metrics, rtol=rtol_of_metrics, atol=1e-12)


class _Kept(Memory):
    """Begins from a state of this rank's own, which is no option: those are the same on all ranks."""

    own: Any = None

    @hookimpl
    def restore(self, trainer: Trainer, stage: Stage) -> bool:
        if self.own is None:
            return False
        return bool(trainer.hook.set_run_state(trainer=trainer, state=copy_state(self.own), stage=stage))


def _whole(value: Any) -> Any:
    """Return a state with all tensors put together of which ranks have shares, on the host: those cannot be sent."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: _whole(kept) for key, kept in value.items()}
    return type(value)(map(_whole, value)) if type(value) in (list, tuple) else value
