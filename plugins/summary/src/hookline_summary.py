"""Show the layers of a model: shapes, parameters, buffers and FLOPs."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hookline import CallbackInterface, Stage, commands, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

HEAD = ("layer", "type", "parameters", "frozen", "buffers", "input", "output", "FLOPs")

log = logging.getLogger("hookline.summary")


def attention_flops(query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    """Return the FLOPs of the CPU's attention, of which torch's counter knows nothing."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


ALSO = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


@dataclass(eq=False)
class Summary(CallbackInterface):
    """Show each layer's shapes, parameters, buffers and FLOPs, when the first batch has gone through the model."""

    depth: int = 3
    """Levels of submodules to show; 0 shows the whole model in one line."""

    observer = True

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"summary.depth={self.depth} must be at least 0; 0 shows the whole model in one line")
        self._forward: FirstForward | None = None

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        if trainer.rank:
            trainer.plugins.unregister(self)

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        if is_compiled(trainer):
            self._show(trainer, {}, "no shapes and FLOPs: a look into a compiled model would change how it is compiled")
        else:
            self._forward = FirstForward(trainer, functools.partial(self._show, trainer))

    @hookimpl
    def on_end_run(self, trainer: Trainer) -> None:
        if self._forward is not None and self._forward.leave() and trainer.status != "failed":
            self._show(
                trainer, {}, f"no shapes and FLOPs: no batch went through {type(trainer.module).__name__} itself"
            )
        self._forward = None

    def _show(self, trainer: Trainer, layers: Mapping[str, Layer], note: str = "") -> None:
        text = "\n".join([*rows(trainer.module, layers, self.depth), *[note] * bool(note)])
        log.info("the model:\n%s", text)
        trainer.log_object("summary", text)


@dataclass(eq=False)
class Layer:
    """What was seen of one layer in a forward pass."""

    taken: str
    """The shapes of what its first call got."""
    given: str = ""
    """The shapes of what its first call returned."""
    flops: int = 0
    """Those of all its calls."""


class FirstForward:
    """Looks at the layers during the first forward pass of training, and makes none of its own."""

    def __init__(self, trainer: Trainer, done: Callable[[Mapping[str, Layer]], None]) -> None:
        self._trainer, self._done = trainer, done
        self._layers: dict[str, Layer] = {}
        self._counter = FlopCounterMode(display=False, custom_mapping=ALSO)
        self._counting = contextlib.ExitStack()
        self._began: list[int] = []  # the FLOPs when each of the layers under way was called
        module = trainer.module
        self._handles = [
            module.register_forward_pre_hook(self._begin, with_kwargs=True),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def leave(self) -> bool:
        """Take the hooks away; return whether they still waited for a batch."""
        waiting, self._handles = self._handles, []
        for handle in waiting:
            handle.remove()
        return bool(waiting)

    def _begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if self._trainer.stage is not Stage.TRAIN or self._trainer.idle:
            return
        self._counting.enter_context(torch.compiler.set_stance("force_eager"))  # else torch compiles nothing later
        self._counting.enter_context(self._counter)
        for name, layer in module.named_modules():
            if not isinstance(layer, torch.jit.ScriptModule) and name:
                before, after = functools.partial(self._enter, name), functools.partial(self._exit, name)
                self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                self._handles.append(layer.register_forward_hook(after, always_call=True))
        self._enter("", module, args, kwargs)

    def _end(self, module: torch.nn.Module, args: Any, result: Any) -> None:
        if "" in self._layers:
            self._exit("", module, args, result)
            self._counting.close()
            self.leave()
            if result is not None:  # else it has raised
                self._done(self._layers)

    def _enter(self, name: str, layer: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._layers.setdefault(name, Layer(shapes((args, kwargs))))
        self._began.append(self._counter.get_total_flops())

    def _exit(self, name: str, layer: torch.nn.Module, args: Any, result: Any) -> None:
        seen = self._layers[name]
        seen.given = seen.given or shapes(result)
        seen.flops += self._counter.get_total_flops() - self._began.pop()


def shapes(value: Any) -> str:
    """Return the shapes of all tensors in what a layer got or returned."""
    return ", ".join("×".join(map(str, tensor.shape)) or "number" for tensor in tensors(value))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Give the tensors in tuples, lists and mappings, at any depth."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(inner)


def rows(module: torch.nn.Module, layers: Mapping[str, Layer], depth: int) -> list[str]:
    """Return the lines of the table; where no layer was seen at work, without the columns for that."""
    lines = []
    for name, layer in module.named_modules():
        if (name.count(".") + 1 if name else 0) <= depth:
            seen = layers.get(name)
            worked = [seen.taken, seen.given, f"{seen.flops:,}"] if seen else ["not called", "", ""]
            frozen = (parameter for parameter in layer.parameters() if not parameter.requires_grad)
            held = [f"{elements(some):,}" for some in (layer.parameters(), frozen, layer.buffers())]
            lines.append([name or "(all)", type(layer).__name__, *held, *(worked if layers else ())])
    return commands.table(HEAD[: len(lines[0])], lines, right=(2, 3, 4, 7))


def elements(tensors: Iterable[torch.Tensor]) -> int:
    """Return how many elements tensors have together."""
    return sum(tensor.numel() for tensor in tensors)


def is_compiled(trainer: Trainer) -> bool:
    """Tell whether something compiles the model, or parts of it."""
    parts = trainer.module.modules()
    return bool(trainer.plugins.performers("compile_model")) or any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None for part in parts
    )
