"""The floating-point operations of a step, and how many of them a device can do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from hookline import hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

# Words of a device's name, and its peaks in 1e12 FLOP/s without sparsity: of half precision (bf16, fp16), of TF32.
# From the data sheets of NVIDIA (which print those with sparsity from the H100 on: twice as much) and of AMD.
PEAKS = [
    ({"A10"}, 125, 62.5),
    ({"A30"}, 165, 82),
    ({"A40"}, 149.7, 74.8),
    ({"A100"}, 312, 156),
    ({"L4"}, 121, 60),
    ({"L40S"}, 362, 183),
    ({"H100", "PCIe"}, 756, 378),
    ({"H100", "NVL"}, 835.5, 417.5),
    ({"H100", "HBM3"}, 989.5, 494.5),
    ({"H200", "NVL"}, 835.5, 417.5),
    ({"H200"}, 989.5, 494.5),
    ({"B200"}, 2250, 1125),
    ({"MI300X"}, 1307.4, 653.7),
]
Counted = dict[torch.dtype | None, int]
"""FLOPs by the kind of numbers that come out."""
HALF = (torch.bfloat16, torch.float16)


def peak_of(device: str, dtype: torch.dtype | None) -> float | None:
    """Return the peak FLOP/s of a device for a kind of numbers; None where it is not known.

    Single precision counts as TF32, also where that is not allowed: what is said of its use is then too little.
    """
    words = set(re.findall(r"\w+", device))
    found = [row for row in PEAKS if row[0] <= words and "MIG" not in words]  # a part of a GPU has less
    if not found or dtype not in (*HALF, torch.float32):
        return None
    _, half, single = max(found, key=lambda row: len(row[0]))
    return 1e12 * (half if dtype in HALF else single)


def attention(query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    """Return the FLOPs of the CPU's attention, of which torch's counter knows nothing."""
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    """Return the FLOPs of its backward pass."""
    shapes = gradient.shape, query.shape, key.shape, value.shape
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


ALSO = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def seconds_at_peak(trainer: Trainer, counted: Counted, given: float | None) -> float | None:
    """Return how long a device takes for FLOPs at its peak; None where that is not known, which a warning says.

    Args:
        trainer: on the device.
        counted: the FLOPs.
        given: the peak that the user gives, for all kinds of numbers.
    """
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else trainer.device.type
    seconds = 0.0
    for dtype, number in counted.items():
        peak = given or peak_of(name, dtype)
        if peak is None:
            trainer.say_once(
                f"monitor.mfu: the peak of {name!r} for {dtype} is not known, so no share of it is logged; give it as "
                "monitor.peak_flops, in FLOP per second without sparsity"
            )
            return None
        seconds += number / peak
    return seconds


class Counting:
    """Counts the FLOPs of one optimizer step, by kind of numbers, while the run does it anyway."""

    def __init__(self, done: Callable[[Trainer, Counted, Sequence[Any]], None]) -> None:
        self._done = done

    @hookimpl(wrapper=True)
    def update(self, trainer: Trainer, window: Sequence[Any]) -> Generator[None, Any, Any]:
        if trainer.padding:
            return (yield)
        flops: Counted = {}
        with counting(flops):
            outputs = yield
        self._done(trainer, flops, window)
        return outputs


@contextlib.contextmanager
def counting(flops: Counted) -> Iterator[None]:
    """Count FLOPs within the block by the kind of numbers that come out; nothing is compiled meanwhile."""

    def watched(formula: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, out_val: Any = None, **more: Any) -> int:
            number = int(formula(*args, out_val=out_val, **more))
            dtype = getattr(out_val[0] if isinstance(out_val, tuple) else out_val, "dtype", None)
            flops[dtype] = flops.get(dtype, 0) + number
            return number

        count._get_raw = True  # type: ignore[attr-defined]
        return count

    formulas = {operation: watched(formula) for operation, formula in {**flop_registry, **ALSO}.items()}
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False, custom_mapping=formulas):
        yield


def is_compiled(trainer: Trainer) -> bool:
    """Tell whether something compiles the model, or parts of it."""
    parts = trainer.module.modules()
    return bool(trainer.plugins.performers("compile_model")) or any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts
    )
