"""Find the operations for which Python waits until the device has computed a value."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ = {f"aten::{name}" for name in ("_local_scalar_dense", "equal", "bincount")}
SIZED = {  # the size of what they return depends on values
    f"aten::{name}" for name in ("nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive")
}
COPIES = {"aten::_to_copy", "aten::copy_"}
TO_HOST = (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist)


def waits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Tell whether an operation waits for the device that its tensors are on."""
    tensors = [one for one in args if isinstance(one, torch.Tensor)]
    if name in COPIES:
        blocking = not kwargs.get("non_blocking", False) and True not in args[2:3]
        return blocking and result.device.type == "cpu" and any(one.device.type != "cpu" for one in tensors)
    if name in ("aten::index", "aten::index_put_") and len(args) > 1:
        return any(torch.is_tensor(index) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in READ or name in SIZED


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `found` for each operation that waits.

    Args:
        on_cpu: whether the run is on a CPU, where the operations count that would wait on another device.
        host: identities of tensors that are in the memory of the host on every device.
    """

    def __init__(self, found: Callable[[], None], on_cpu: bool, host: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found, self._on_cpu, self._host = found, on_cpu, host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if waits(func.name().partition(".")[0], args, kwargs, result):
            tensors = [one for one in args if isinstance(one, torch.Tensor) and id(one) not in self._host]
            if any(self._on_cpu or one.device.type != "cpu" for one in tensors):
                self._found()
        return result


class Calls(TorchFunctionMode):
    """Calls `found` for each call that copies to the host, which is no operation where the tensor is there already."""

    def __init__(self, found: Callable[[], None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TO_HOST:
            self._found()
        return func(*args, **(kwargs or {}))
