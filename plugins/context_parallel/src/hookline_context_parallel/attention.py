"""Attention over a sequence of which each rank has a part: torch's ring, in the place of its attention of one device.

The ring, what goes around in it and what is computed of it are those of `torch.distributed.tensor.experimental`, which
brings them for the kernels of CUDA. The kernel of CPUs is given to it here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.nn.attention import SDPBackend, sdpa_kernel

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]  # no other is exact
Attention = Callable[..., Any]
SEQUENCE = 2  # dimension of queries, keys and values: (batch, heads, sequence, features)


@contextlib.contextmanager
def settings(rotate: str, balanced: bool) -> Iterator[None]:
    """Have the ring work as options say, on CPUs too, and no attention go past it."""
    options, fast = ring._cp_options, torch.backends.mha.get_fastpath_enabled()
    before = options.rotate_method, options.enable_load_balance
    ring.set_rotate_method(rotate)
    options.enable_load_balance = balanced
    torch.backends.mha.set_fastpath_enabled(False)  # of nn.TransformerEncoder, which calls no attention by itself
    ring.custom_ops.update(OF_CPUS)
    ring._enable_context_parallel_dispatcher()
    try:
        yield
    finally:
        ring._disable_context_parallel_dispatcher()
        options.rotate_method, options.enable_load_balance = before
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def instead(make: Callable[[Attention], Attention]) -> Iterator[None]:
    """Have another function stand in for `scaled_dot_product_attention`, made of the one that is there."""
    alone = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = make(alone)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = alone


def around(mesh: Any, length: int, balanced: bool, alone: Attention) -> Attention:
    """Return an attention that takes the parts of a sequence, `length` positions on each rank, for the whole."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        refuse(query, key, attn_mask is not None, dropout_p, is_causal, length, balanced)
        if enable_gqa:
            key, value = (some.repeat_interleave(query.shape[1] // some.shape[1], 1) for some in (key, value))
        parts = [DTensor.from_local(part, mesh, [Shard(SEQUENCE)], run_check=False) for part in (query, key, value)]
        with sdpa_kernel(KERNELS):
            return alone(*parts, is_causal=is_causal, scale=scale).to_local()  # type: ignore[no-any-return]

    return attend


def refuse(
    query: torch.Tensor,
    key: torch.Tensor,
    masked: bool,
    dropout: float,
    causal: bool,
    length: int,
    balanced: bool,
) -> None:
    """Refuse an attention that the ring does not compute.

    Raises:
        ValueError: which, and what can be done.
    """
    said = "context_parallel: scaled_dot_product_attention is called with"
    if masked:
        raise ValueError(f"{said} attn_mask, which torch's ring does not take: leave it away, and write is_causal=True")
    if dropout:
        raise ValueError(f"{said} dropout_p={dropout}, which torch's ring does not repeat in backward: make it 0")
    if query.ndim != 4:
        raise ValueError(f"{said} {query.ndim} dimensions; the ring takes (batch, heads, sequence, features)")
    lengths = {query.shape[SEQUENCE], key.shape[SEQUENCE]}
    if lengths != {length}:
        raise ValueError(
            f"{said} {query.shape[SEQUENCE]} queries and {key.shape[SEQUENCE]} keys, and this rank has {length} "
            "positions of the sequence: attention must be that of the sequence to itself, and what is cut off or "
            "shifted (the next token as the label) has to be so in the data already"
        )
    if balanced and not causal:
        raise ValueError(f"{said} is_causal=False: set context_parallel.balance=false, or is_causal=True")


def _on_parts(operator: Any, arguments: Any, options: Any) -> tuple[DTensor, ...]:
    """Compute one of the two operators of CPUs by the ring; called by torch with the parts of all ranks as one."""
    mesh = arguments[0].device_mesh
    parts: Any = [some.to_local() if isinstance(some, DTensor) else some for some in arguments]
    results = (_forward if operator is FORWARD else _backward)(mesh.get_group(), *parts, **options)
    return tuple(DTensor.from_local(part, mesh, [Shard(SEQUENCE)], run_check=False) for part in results)


def _forward(
    group: Any, query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **options: Any
) -> tuple[torch.Tensor, ...]:
    return ring._templated_ring_attention(group, SEQUENCE, FORWARD, query, key, value, is_causal, **options)


def _backward(
    group: Any, gradient: Any, query: Any, key: Any, value: Any, out: Any, sums: Any, dropout_p: float,
    is_causal: bool, **options: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    known = query, key, value, out, sums, is_causal
    return ring._templated_ring_attention_backward(
        group, SEQUENCE, BACKWARD, gradient, "grad_out", *known, dropout_p=dropout_p, **options
    )


OF_CPUS: dict[Any, Any] = {FORWARD: _on_parts, BACKWARD: _on_parts}
