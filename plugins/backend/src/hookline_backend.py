"""Set torch's and Python's global switches for the time of a run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.backends import cudnn

from hookline import CallbackInterface, Stage, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

CHOICES = {"deterministic": ("error", "warn"), "matmul_precision": ("highest", "high", "medium")}
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
SAYS = "use_deterministic_algorithms"
"""What all warnings of torch about what is not deterministic have in them."""

log = logging.getLogger("hookline.backend")


@dataclass(eq=False)
class Backend(CallbackInterface):
    """Set switches of torch and Python for the time of the run, and put all back afterwards, also after an error."""

    deterministic: str | None = None
    """What is not deterministic: "error" raises, "warn" reports it at the end; null leaves torch's choice alone."""
    cudnn_benchmark: bool | None = None
    """Whether cuDNN tries which algorithm is the fastest for each shape; null leaves it as it is."""
    matmul_precision: str | None = None
    """Of matrix products of float32: highest, high (TF32) or medium; null leaves it as it is."""
    tf32: bool | None = None
    """Whether cuDNN (convolutions, recurrent layers) may take TF32 for float32; null leaves it as it is."""
    channels_last: bool = False
    """Whether weights and batches of images have the channels last in memory."""
    gc_every: int | None = None
    """Let Python collect garbage after each so many optimizer steps and not when it likes; null leaves that to it."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(
                    f"backend.{name}={value!r} must be one of {', '.join(choices)}, or null to leave it alone"
                )
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError(
                f"backend.deterministic={self.deterministic!r} and backend.cudnn_benchmark=true exclude each other: "
                "which algorithm is the fastest differs from run to run"
            )
        if self.gc_every is not None and self.gc_every < 1:
            raise ValueError(f"backend.gc_every={self.gc_every} must be at least 1 optimizer step, or null")
        options = dataclasses.fields(self)
        if all(getattr(self, option.name) == option.default for option in options):
            names = ", ".join(option.name for option in options)
            raise ValueError(f"backend has nothing to do: give one or some of {names}")
        if not self.channels_last:
            self.convert_model = self.prepare_batch = None  # type: ignore[assignment,method-assign]
        if self.gc_every is None:
            self.on_end_train_step = None  # type: ignore[assignment,method-assign]

    @hookimpl(wrapper=True, tryfirst=True)
    def run(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        with contextlib.ExitStack() as stack:
            for switch in self._switches(stage):
                stack.enter_context(switch)
            if self.deterministic:
                stack.enter_context(deterministic(trainer, warn=self.deterministic == "warn"))
            return (yield)

    def _switches(self, stage: Stage) -> Iterator[contextlib.AbstractContextManager[None]]:
        if self.deterministic or self.cudnn_benchmark is not None:
            benchmark = bool(self.cudnn_benchmark)
            yield switched(lambda: cudnn.benchmark, functools.partial(setattr, cudnn, "benchmark"), benchmark)
        if self.matmul_precision is not None:
            yield switched(
                torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, self.matmul_precision
            )
        if self.tf32 is not None:
            yield switched(lambda: cudnn.allow_tf32, functools.partial(setattr, cudnn, "allow_tf32"), self.tf32)
        if self.gc_every is not None and stage is Stage.TRAIN:
            yield switched(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), False)

    @hookimpl(wrapper=True, tryfirst=True)
    def convert_model(self) -> Generator[None, Any, Any]:
        model = yield
        return model.to(memory_format=torch.channels_last)

    @hookimpl(wrapper=True, tryfirst=True)
    def prepare_batch(self) -> Generator[None, Any, Any]:
        return with_channels_last((yield))

    @hookimpl
    def on_end_train_step(self, global_step: int) -> None:
        if self.gc_every is not None and global_step % self.gc_every == 0:
            gc.collect()


@contextlib.contextmanager
def switched(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """Have a switch at a value within the block."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def deterministic(trainer: Trainer, warn: bool) -> Iterator[None]:
    """Have torch's algorithms deterministic within the block; with `warn`, report afterwards which are not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    given, kept = os.environ.get(WORKSPACE), cudnn.deterministic
    if given is None and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        trainer.say_once(
            f"backend.deterministic: CUDA was used before the run, so cuBLAS may not see {WORKSPACE} any more; set "
            f"{WORKSPACE}=:4096:8 in the environment of the program"
        )
    os.environ.setdefault(WORKSPACE, ":4096:8")
    cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=warn)
    try:
        with collected(trainer) if warn else contextlib.nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic = kept
        if given is None:
            os.environ.pop(WORKSPACE, None)


@contextlib.contextmanager
def collected(trainer: Trainer) -> Iterator[None]:
    """Collect the warnings about what is not deterministic within the block; report each once at its end."""
    found: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f"(?s).*{SAYS}")
        show = warnings.showwarning

        def take(message: Warning | str, *others: Any, **more: Any) -> None:
            if SAYS in str(message):
                found[str(message).partition(" does not have a deterministic implementation")[0]] += 1
            else:
                show(message, *others, **more)

        warnings.showwarning = take
        try:
            yield
        finally:
            if found:
                lines = [f"{number} times: {name}" for name, number in found.most_common()]
                text = "\n".join(["operations that are not deterministic were done:", *lines])
                log.warning("%s", text)
                trainer.log_object("not deterministic", text)


def with_channels_last(batch: Any) -> Any:
    """Return a batch whose images, tensors of four dimensions, have the channels last in memory."""
    if isinstance(batch, torch.Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, Mapping):
        return type(batch)({key: with_channels_last(value) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(with_channels_last, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(with_channels_last, batch))
    return batch
