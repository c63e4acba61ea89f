"""What a module returned as a loader, and is none that gives batches; and batches of another size than asked for."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from hookline.data.batches import counted
from hookline.data.cursor import ResumableSampler
from hookline.data.sampling import PLAIN


def refuse(loader: Any, method: str, size: int) -> None:
    """Refuse what does not give batches.

    Args:
        loader: what the user has returned, or one of several.
        method: the name of the method that has returned it.
        size: samples of a batch, as it was asked for.

    Raises:
        TypeError: the message says what to write instead.
    """
    what, cure = f"a {type(loader).__name__}", "DataLoader(dataset, batch_size, sampler=sampler(dataset))"
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        wrong = f"{what}, a data set: its samples would be taken for batches"
    elif isinstance(loader, type) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        wrong = f"{getattr(loader, '__qualname__', what)}, which gives no batches"
    elif hasattr(loader, "shape") or is_columns(loader, size):
        wrong = f"{what} of data: its parts would be taken for batches"
        cure += " of a data set, such as TensorDataset(inputs, targets)"
    elif isinstance(loader, DataLoader) and (told := wrong_sampler(loader)):
        wrong, cure = told
    else:
        return
    raise TypeError(f"{method}() returned {wrong}; write {cure}")


def is_columns(loader: Any, size: int) -> bool:
    """Tell whether a list holds the inputs and the targets of a data set, not batches."""
    if not isinstance(loader, (list, tuple)) or len(loader) < 2 or not all(getattr(one, "ndim", 0) for one in loader):
        return False
    other = len({(one.ndim, one.dtype) for one in loader}) > 1 or len(loader[0]) > size > 1
    return len({len(one) for one in loader}) == 1 and other and len({(one.dtype, one.shape[1:]) for one in loader}) > 1


def wrong_sampler(loader: DataLoader[Any]) -> tuple[str, str] | None:
    """Return what is wrong with the samplers of a loader, and what to write; None if they are as torch wants them."""
    batches = loader.batch_sampler
    for sampler in (loader.sampler, batches):
        if isinstance(sampler, type):
            return f"a loader whose sampler is the class {sampler.__name__}", "sampler=sampler(dataset)"
    if isinstance(batches, (*PLAIN, ResumableSampler)):
        return (
            f"a loader whose batch_sampler ({type(batches).__name__}) draws samples, not batches",
            "sampler=…",
        )
    if isinstance(loader.sampler, BatchSampler) and loader.batch_size is not None:
        return "a loader whose sampler (BatchSampler) draws batches, to make batches of", "batch_sampler=…"
    return None


def other_size(loader: Any, size: int) -> int | None:
    """Return how many samples the batches of a loader have, if they are not as many as were asked for."""
    own = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if isinstance(loader, (list, tuple)) and len(loader) > 1:
        samples, doubt = counted(loader[0])
        own = None if doubt else samples
    return own if isinstance(own, int) and own != size else None
