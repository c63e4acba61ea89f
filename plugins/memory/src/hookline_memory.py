"""Log the memory of each phase of training, and write a report where memory runs out."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
import torch

from hookline import CallbackInterface, Stage, files, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

PHASES = ("forward", "backward", "optimizer", "evaluation")
MIB, GIB = 2**20, 2**30
LARGEST = 20
"""Tensors in a report."""

CPU_SAYS = "DefaultCPUAllocator: "
"""What torch's error has in it where the host has no more memory; it has no class of its own."""

log = logging.getLogger("hookline.memory")


def measured(verb: str, phase: str) -> Callable[..., Any]:
    """Return a wrapper of a verb that measures the memory of a phase."""

    def wrapper(self: Memory) -> Generator[None, Any, Any]:
        self.begin()
        try:
            return (yield)
        finally:
            self.end(phase)

    wrapper.__name__ = verb
    return hookimpl(wrapper=True)(wrapper)


@dataclass(eq=False)
class Memory(CallbackInterface):
    """Log the memory of forward, backward, optimizer and evaluation with each interval; report where it runs out.

    On a GPU it is the most that tensors took within the phase, by torch's allocator. Elsewhere it is what the process
    had in RAM at the end of the phase. With several ranks it is that of the rank with most.
    """

    def __post_init__(self) -> None:
        self._process = psutil.Process()
        self._gpu: torch.device | None = None
        self._most: dict[str, int] = {}
        self._open: list[int] = []  # of phases under way: the most that was seen before another began within it

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        on_gpu = trainer.device.type == "cuda" and torch.cuda.is_available()  # else it is simulated
        self._gpu = trainer.device if on_gpu else None

    @hookimpl
    def on_begin_train(self) -> None:
        self._most, self._open = {}, []

    # Phases ---------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def call_model(self, stage: Stage) -> Generator[None, Any, Any]:
        if stage is not Stage.TRAIN:
            return (yield)
        self.begin()
        try:
            return (yield)
        finally:
            self.end("forward")

    run_backward = measured("run_backward", "backward")
    step_optimizer = measured("step_optimizer", "optimizer")
    evaluate = measured("evaluate", "evaluation")

    def begin(self) -> None:
        """Begin a phase, perhaps within another."""
        if self._gpu is not None:
            if self._open:
                self._open[-1] = max(self._open[-1], torch.cuda.max_memory_allocated(self._gpu))
            torch.cuda.reset_peak_memory_stats(self._gpu)
        self._open.append(0)

    def end(self, phase: str) -> None:
        """End the phase that began last."""
        now = self._process.memory_info().rss if self._gpu is None else torch.cuda.max_memory_allocated(self._gpu)
        self._most[phase] = max(self._most.get(phase, 0), self._open.pop(), now)

    @hookimpl(wrapper=True)
    def filter_log(self, trainer: Trainer, metrics: Mapping[str, float]) -> Generator[None, Any, Any]:
        ends_interval = trainer.options.train_loss_metric_name in metrics
        logged = yield
        if not ends_interval:
            return logged
        bytes_of = torch.tensor([self._most.get(phase, 0) for phase in PHASES], dtype=torch.float64)
        most = trainer.hook.all_reduce(trainer=trainer, value=bytes_of, op="max").tolist()
        self._most = {}
        kind = "rss" if self._gpu is None else "peak"
        return {**logged, **{f"memory/{phase}_{kind}": b / GIB for phase, b in zip(PHASES, most, strict=True) if b}}

    # Where it runs out ----------------------------------------------------------------

    @hookimpl
    def on_exception(self, trainer: Trainer, exception: BaseException) -> None:
        if not (isinstance(exception, (torch.OutOfMemoryError, MemoryError)) or CPU_SAYS in str(exception)):
            return
        path = trainer.run_dir / f"out-of-memory-rank-{trainer.rank}.txt"
        try:
            with files.replacing(path) as new:
                new.write_text("\n".join(report(trainer, exception)))
        except OSError as error:
            log.warning("memory ran out, and the report of it could not be written: %s", error)
        else:
            log.warning("memory ran out; what took it stands in %s", path)


def report(trainer: Trainer, exception: BaseException) -> Iterator[str]:
    """Give the lines of a report: the error, the largest tensors, torch's own summary, and where it happened."""
    yield f"{type(exception).__name__}: {exception}\n"
    yield f"rank {trainer.rank}, {trainer.device}, step {trainer.global_step + 1}\n"
    names = dict(named(trainer))
    kinds: dict[str, int] = {}
    sizes: dict[int, tuple[int, str]] = {}
    for tensor in (some for some in gc.get_objects() if type(some) in (torch.Tensor, torch.nn.Parameter)):
        if tensor.device.type == trainer.device.type and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            kind, name = names.get(place, ("others that Python holds", ""))
            if place not in sizes:
                kinds[kind] = kinds.get(kind, 0) + size
            sizes[place] = size, f"{kind}: {name or tuple(tensor.shape)} {tensor.dtype}"
    for kind, size in kinds.items():
        yield f"{size / MIB:12.1f} MiB  {kind}"
    yield f"\nThe {LARGEST} largest; what backward alone will need is held by no object of Python, and not among them:"
    for size, words in sorted(sizes.values(), reverse=True)[:LARGEST]:
        yield f"{size / MIB:12.1f} MiB  {words}"
    if trainer.device.type == "cuda" and torch.cuda.is_available():
        yield torch.cuda.memory_summary(trainer.device)
    yield "".join(traceback.format_exception(exception))


def named(trainer: Trainer) -> Iterator[tuple[int, tuple[str, str]]]:
    """Give the place in memory of each tensor of the training, with its kind and its name."""
    names = {}
    for name, parameter in trainer.module.named_parameters():
        names[id(parameter)] = name
        yield place_of(parameter), ("parameters", name)
        if parameter.grad is not None:
            yield place_of(parameter.grad), ("gradients", name)
    for name, buffer in trainer.module.named_buffers():
        yield place_of(buffer), ("buffers", name)
    for optimizer in trainer.optimizers:
        for owner, state in optimizer.state.items():
            for key, value in state.items():
                if torch.is_tensor(value):
                    yield place_of(value), ("states of optimizers", f"{names.get(id(owner), '?')}.{key}")


def place_of(tensor: Any) -> int:
    """Return where the values of a tensor are; of one that ranks share, those of this rank."""
    here = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(here.untyped_storage().data_ptr())
