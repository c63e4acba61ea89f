"""Train a tiny module in one process or on several ranks, and compare the results."""

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
    """The results of a training in one process."""

    weights: dict[str, torch.Tensor]
    """The result of `export_model`."""
    metrics: dict[str, float]
    again: dict[str, float]
    """The metrics of one more evaluation."""
    states: dict[int, Any]
    """The state of each step, with `keep`; sharded tensors are whole."""
    looked: Any
    """The result of `look`."""


def train_tiny(
    plugins: Mapping[str, Any],
    module: Callable[[], ModuleInterface] = PlainModule,
    *,
    keep: bool = False,
    begin: Sequence[Any] = (),
    look: Callable[[Trainer], Any] | None = None,
    **options: Any,
) -> Trained:
    """Train a module like `tiny_trainer`, and evaluate it; alone, or on each rank by `on_ranks(train_tiny, 2, …)`.

    It uses one thread, because sums over several threads differ in the last bit.

    Args:
        plugins: options or objects by name; objects must be picklable.
        module: makes the module; importable by its name, or a `functools.partial` of such a function.
        keep: keep the state of each step.
        begin: states to resume from, by rank.
        look: a function of the trainer, called at the end; importable by its name.
        options: options of the trainer.
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
    """Assert that all ranks have bit-identical weights and metrics, equal within rounding to those of one process.

    Args:
        ranks: the results of each rank.
        alone: the results of one process.
        rtol: relative tolerance of weights.
        atol: absolute tolerance of weights.
        rtol_of_metrics: relative tolerance of metrics.

    Raises:
        AssertionError: something differs; the message says what.
    """
    for rank, trained in enumerate(ranks):
        assert digest(trained.weights) == digest(ranks[0].weights), f"rank {rank} has other weights than rank 0"
        assert trained.metrics == ranks[0].metrics, f"rank {rank} has {trained.metrics}, and rank 0 {ranks[0].metrics}"
    torch.testing.assert_close(dict(ranks[0].weights), dict(alone.weights), rtol=rtol, atol=atol)
    torch.testing.assert_close(ranks[0].metrics, alone.metrics, rtol=rtol_of_metrics, atol=1e-12)


class _Kept(Memory):
    """Resumes from this rank's own state; options cannot carry it, as they are the same on all ranks."""

    own: Any = None

    @hookimpl
    def restore(self, trainer: Trainer, stage: Stage) -> bool:
        if self.own is None:
            return False
        return bool(trainer.hook.set_run_state(trainer=trainer, state=copy_state(self.own), stage=stage))


def _whole(value: Any) -> Any:
    """Return a state with sharded tensors made whole, on the host; shards cannot be sent to another process."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        return {key: _whole(kept) for key, kept in value.items()}
    return type(value)(map(_whole, value)) if type(value) in (list, tuple) else value
