"""A look, before the first step, whether a model in parts computes what it computes on one rank."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from hookline import Stage, hookspecs, kept_rng
from hookline_context_parallel.attention import SEQUENCE, instead
from hookline_context_parallel.parts import Parts, named_in, with_tensors

if TYPE_CHECKING:
    from hookline import Trainer

IGNORED = -100  # the label that torch's losses ignore
SHORT = 8  # positions of each piece of the sequence that are looked at
SAME = {torch.float32: 1e-4, torch.float64: 1e-4}  # by how much of itself a loss may differ
ROUGH = 2e-2  # the same, where numbers are shorter
THREE = ("queries", "keys", "values")
WHY = (
    "Each position must be computed by itself but for torch.nn.functional.scaled_dot_product_attention, called as an "
    "attribute of that module. Look for positions that train_step counts (take them from the batch, or name their "
    "table in context_parallel.buffers), for labels that it shifts (shift them in the data), for other attention, and "
    "for a loss that is no mean over what get_weight counts. context_parallel.verify=false goes on without a look"
)


def refuse_ignored(named: Mapping[str, torch.Tensor]) -> None:
    """Refuse labels that do not count, where nobody says how many do; those on other devices are not waited for.

    Raises:
        ValueError: the first tensor that has some.
    """
    for name, tensor in named.items():
        if tensor.device.type == "cpu" and not tensor.is_floating_point() and not bool((tensor != IGNORED).all()):
            raise ValueError(
                f"context_parallel: {name} has labels of {IGNORED}, which losses ignore, so the parts of a sequence do "
                "not count as much as each other: let a method get_weight(self, batch) of the module, marked "
                f"@hookimpl, answer how many count, such as (batch[…] != {IGNORED}).sum()"
            )


def compare(
    trainer: Trainer, parts: Parts, batch: Any, dims: Mapping[str, int], in_parts: Callable[[Trainer, Parts, Any], Any]
) -> None:
    """Compare what the first positions of a batch come to in parts with what one rank computes of them.

    Raises:
        ValueError: attention is given something else, or the loss is another.
    """
    named = named_in(batch, dims, parts.pieces)
    short = {name: min(SHORT * parts.pieces, some.shape[dims[name]]) for name, some in named.items()}
    batch = with_tensors(batch, {name: some.narrow(dims[name], 0, short[name]) for name, some in named.items()})
    seen: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad(), kept_rng(), trainer.idling(), evaluating(trainer.model):
        with instead(functools.partial(seeing, seen[0])):
            whole = loss_of(hookspecs.call_model(trainer=trainer, batch=batch, stage=Stage.TRAIN))
        with instead(functools.partial(seeing, seen[1])):
            together = loss_of(in_parts(trainer, parts, batch))
    near = max(SAME.get(tensor.dtype, ROUGH) for tensor in (*trainer.model.parameters(), *seen[0]))
    said = f"context_parallel: over {parts.mesh.size()} ranks,"
    for place, (one, part) in enumerate(itertools.zip_longest(*seen)):
        other = None if part is None else parts.whole(here(part), SEQUENCE)
        if one is None or other is None or not (one - other).norm() <= 10 * near * one.norm():
            raise ValueError(
                f"{said} attention number {place // 3 + 1} gets other {THREE[place % 3]} than on one rank. {WHY}"
            )
    if not torch.isclose(whole.double(), together.double(), rtol=near, atol=0, equal_nan=True).all():
        raise ValueError(f"{said} a loss is {together.item():.6g} that is {whole.item():.6g} on one rank. {WHY}")


def seeing(seen: list[torch.Tensor], attend: Any) -> Any:
    """Return an attention that keeps what it is given."""

    def see(query: Any, key: Any, value: Any, *more: Any, **options: Any) -> Any:
        seen.extend((query, key, value))
        return attend(query, key, value, *more, **options)

    return see


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def loss_of(outputs: Any) -> torch.Tensor:
    """Return the loss of a training step."""
    loss = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
    return loss.full_tensor() if isinstance(loss, DTensor) else loss


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Have a model drop nothing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
