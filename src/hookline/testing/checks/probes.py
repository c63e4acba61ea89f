"""Plugins that the checks train beside the plugin under test."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from hookline.interfaces import CallbackInterface
from hookline.marks import hookimpl
from hookline.outputs import collate
from hookline.testing.digest import digest

if TYPE_CHECKING:
    from hookline.trainer import Trainer


class Clipper(CallbackInterface):
    """Clip gradients by their norm."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        torch.nn.utils.clip_grad_norm_(trainer.module.parameters(), 0.1)


class Halver(CallbackInterface):
    """Halve the loss."""

    @hookimpl(wrapper=True)
    def scale_loss(self) -> Generator[None, torch.Tensor, torch.Tensor]:
        return (yield) / 2


@dataclass(eq=False)
class Windows(CallbackInterface):
    """Make steps of several times as many micro-batches, and stop within one."""

    size: int = 2
    stop_at: int | None = None
    """The micro-batch after which training stops, counted over the run."""

    def __post_init__(self) -> None:
        self.batches = 0

    @hookimpl(wrapper=True)
    def get_window_size(self) -> Generator[None, int, int]:
        return (yield) * self.size

    @hookimpl
    def on_end_backward(self, trainer: Trainer) -> None:  # type: ignore[override]
        if trainer.idle:
            return
        self.batches += 1
        if self.batches == self.stop_at:
            trainer.stop("to be continued", within_window=True)


class Gate(CallbackInterface):
    """Refuse every third update, and keep what became of each."""

    def __init__(self) -> None:
        self.refused: list[int] = []
        self.moved: list[int] = []
        """Refused updates at which the weights changed all the same."""
        self.said: dict[int, bool] = {}
        """What each step was told of its update."""
        self._before = ""

    @hookimpl(wrapper=True)
    def should_step(self, trainer: Trainer) -> Generator[None, bool, bool]:
        answer = yield
        if trainer.idle or trainer.global_step % 3 != 1:
            return answer
        self.refused.append(trainer.global_step)
        self._before = digest(dict(trainer.module.named_parameters()))
        return False

    @hookimpl(tryfirst=True)
    def on_end_optimizer_step(self, trainer: Trainer, stepped: bool) -> None:
        if trainer.idle:
            return
        self.said[trainer.global_step] = stepped
        if self.refused and self.refused[-1] == trainer.global_step:
            if digest(dict(trainer.module.named_parameters())) != self._before:
                self.moved.append(trainer.global_step)


class Boom(Exception):
    """What `Raises` raises."""


def raising(hook: str, wrapper: bool) -> CallbackInterface:
    """Return a plugin that raises in an event, or when a verb that it wraps is done."""

    def fail(self: Any) -> None:
        raise Boom(hook)

    def done_and_fail(self: Any) -> Generator[None, None, None]:
        yield
        raise Boom(hook)

    body = {"fail": hookimpl(specname=hook, wrapper=wrapper)(done_and_fail if wrapper else fail)}
    return type("Raises", (CallbackInterface,), body)()  # type: ignore[no-any-return]


class Collectives(CallbackInterface):
    """Count the collectives that are asked for."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl(wrapper=True)
    def all_reduce(self) -> Generator[None, torch.Tensor, torch.Tensor]:
        self.count += 1
        return (yield)

    @hookimpl(wrapper=True)
    def all_gather(self) -> Generator[None, list[Any], list[Any]]:
        self.count += 1
        return (yield)


class Meeting(CallbackInterface):
    """Let the ranks of a launcher talk to each other on CPUs; nothing else of a distributed run."""

    @hookimpl
    def get_ranks(self) -> tuple[int, int, int]:
        return int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])

    @hookimpl
    def on_setup(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")

    @hookimpl
    def all_reduce(self, value: torch.Tensor, op: str) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[op])
        return value

    @hookimpl
    def all_gather(self, trainer: Trainer, value: Any) -> list[Any]:
        values: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(values, value)
        return values

    @hookimpl
    def gather_outputs(self, trainer: Trainer, outputs: list[Any]) -> list[Any]:
        return [collate(column) for column in zip(*self.all_gather(trainer, outputs), strict=True)]

    @hookimpl
    def vote(self, trainer: Trainer, asked: bool, seconds: float) -> tuple[bool, float]:
        said = self.all_gather(trainer, (asked, seconds))
        return any(asked for asked, _ in said), said[0][1]

    @hookimpl
    def rank_zero_first(self, trainer: Trainer) -> AbstractContextManager[None]:
        return _in_turn(trainer.rank)


@contextmanager
def _in_turn(rank: int) -> Generator[None, None, None]:
    if rank:
        dist.barrier()
    yield
    if not rank:
        dist.barrier()


class Mean(CallbackInterface):
    """Train one model on all ranks, by the mean of their gradients."""

    @hookimpl
    def shard_model(self, model: torch.nn.Module) -> torch.nn.Module:
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        return model

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for weight in trainer.module.parameters():
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= trainer.world_size
