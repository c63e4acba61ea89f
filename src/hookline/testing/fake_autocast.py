"""Autocast of the CUDA device that is not there.

torch's own casts what C++ knows to be on CUDA, which tensors of the fake device are not. So these kernels stand in the
place of torch's while the device is there, by the same lists of which operator runs in which precision.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

KEY = "AutocastCUDA"
HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
POLICIES = {  # torch's lists by what they cast to; those that set a dtype for their result give what a cast gives
    "LOWER_PRECISION_FP": lambda tensors: torch.get_autocast_dtype("cuda"),
    "FP32": lambda tensors: torch.float32,
    "FP32_SET_OPT_DTYPE": lambda tensors: torch.float32,
    "DIFFERENT_REDISPATCH_SIGNATURE": lambda tensors: torch.float32,
    "PROMOTE": lambda tensors: max((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize),
}


def listed() -> dict[str, str]:
    """Return the policy of each operator that autocast knows, by the operator's name."""
    found = {}
    for policy, rows in re.findall(r"#define AT_FORALL_(\w+)\(_\)(.*?)\n\n", HEADER.read_text(), re.S):
        if policy in POLICIES:
            names = re.findall(r'"([\w.]+)"', rows) or re.findall(r"_\(([\w, ]+)\)", rows)
            found.update({name.replace(", ", "."): policy for name in names})
    return found


@contextlib.contextmanager
def fake_autocast(on_device: Callable[[Any], bool]) -> Iterator[None]:
    """Have `torch.autocast("cuda")` cast within.

    Args:
        on_device: tells whether a tensor is on the device.
    """
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators, .* may also be overridden")
            for name, policy in listed().items():
                library.impl(name, _kernel(name, POLICIES[policy], on_device), KEY)
        yield
    finally:
        library._destroy()


def _kernel(name: str, dtype_for: Callable[[list[torch.Tensor]], torch.dtype], on_device: Callable[[Any], bool]) -> Any:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))

    def casts(value: Any) -> bool:
        return on_device(value) and value.is_floating_point() and value.dtype != torch.float64

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            cast = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and casts(leaf)]
            if cast:
                dtype = dtype_for(cast)
                args, kwargs = tree_map_only(
                    torch.Tensor, lambda one: one.to(dtype) if casts(one) else one, (args, kwargs)
                )
            return operator(*args, **kwargs)

    return kernel
