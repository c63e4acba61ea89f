"""Forward and backward of one kind of step as CUDA graphs, and what makes sure that they do what Python would."""

from __future__ import annotations

import collections
import contextlib
import linecache
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from hookline import kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

TOLERANCE = 1e-3
"""The part of the largest number of a tensor by which a replay may differ from Python, by the order of sums."""
SURE = 2
"""The replays that are compared in a row: no replay before them was trusted, so training may go on without."""
OURS = ("torch", "hookline", "hookline_cudagraph", "contextlib")
OF_TORCH = frozenset(vars(torch.nn.Module()))  # attributes of every module
PLAIN = (int, float, str, bool, type(None))

Run = Callable[[list[Any], Any], Any]


class Uncapturable(Exception):
    """A step that cannot be replayed; the text says why."""


class Graph:
    """One kind of step. Calling it replays the forward pass; the backward pass of its loss replays the other graph.

    Replays 1, 2, 4, 8 and so on are compared with a step in Python that does not count.

    Args:
        trainer: the trainer.
        run: `train_step`, called with the leaves of a batch and the number of the step.
        leaves: of the first batch.
        stream: on which it is captured.

    Raises:
        Uncapturable: `train_step` does what a replay would not do.
    """

    def __init__(self, trainer: Trainer, run: Run, leaves: list[Any], stream: Any) -> None:
        self.trainer, self.module, self.run = trainer, trainer.module, run
        self.weights = {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}
        self.replays = 0
        self.awaited: int | None = None
        """The replay of the forward pass whose backward pass may come, since its memory is still there."""
        self.compared = 0
        hooked = [name for name, part in self.module.named_modules() if name and has_hooks(part)]
        if hooked:
            raise Uncapturable(f"{hooked[0]} has hooks, and Python that they run would not run")
        self._in_python(leaves, Unread())
        self._capture(leaves, stream)

    def _capture(self, leaves: list[Any], stream: Any) -> None:
        pool = torch.cuda.graph_pool_handle()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.given = tree_map_only(torch.Tensor, torch.Tensor.clone, leaves)
        torch.clear_autocast_cache()  # else weights that this step has cast already would be cast in no replay
        with self.trainer.logs.apart() as logged, captured(self.forward, pool, stream):
            outputs = self.run(self.given, Unread())
        made, self.form = tree_flatten(outputs)
        self.gradient = torch.ones_like(made[0])
        with captured(self.backward, pool, stream):
            self.gradients = gradients(made[0], [*self.weights.values()], self.gradient)
        torch.clear_autocast_cache()  # of garbage
        self.follow = [leaf.requires_grad for leaf in made if isinstance(leaf, torch.Tensor)]
        self.made, self.logged = tree_map_only(torch.Tensor, torch.Tensor.detach, (made, logged))

    # A step ---------------------------------------------------------------------------

    def __call__(self, global_step: int, leaves: list[Any]) -> Any:
        self.replays += 1
        if self.replays & (self.replays - 1) == 0:
            self._compare(global_step, leaves)
        self._fill(leaves)
        tensors = iter(Replay.apply(self, *self.weights.values()))  # type: ignore[no-untyped-call]
        outputs = [next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.made]
        for values, options in tree_map_only(torch.Tensor, torch.Tensor.clone, self.logged):
            self.module.log(**values, **options)
        return tree_unflatten(outputs, self.form)

    def _fill(self, leaves: list[Any]) -> None:
        for kept, leaf in zip(self.given, leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                kept.copy_(leaf, non_blocking=True)

    def replay_forward(self) -> list[torch.Tensor]:
        """Replay the forward pass; return its tensors, which the next replay does not overwrite."""
        self.awaited = self.replays
        self.forward.replay()
        return [leaf.clone() for leaf in self.made if isinstance(leaf, torch.Tensor)]

    def replay_backward(self, replay: int, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """Replay the backward pass of a replay of the forward pass; return the gradients of the weights."""
        if replay != self.awaited:
            raise RuntimeError(
                "cudagraph: the memory of this backward pass is overwritten: train_step was called again, or backward "
                "has run already; turn it off (`plugins.cudagraph: null`)"
            )
        self.awaited = None
        self._replay_backward(gradient)
        return [None if kept is None else kept.detach() for kept in self.gradients]

    def _replay_backward(self, gradient: torch.Tensor) -> None:
        for weight, kept in zip(self.weights.values(), self.gradients, strict=True):
            if weight.grad is not None and kept is not None and weight.grad.data_ptr() == kept.data_ptr():
                weight.grad = weight.grad.clone()  # of an earlier micro-batch of this window, which lies there
        self.gradient.copy_(gradient)
        self.backward.replay()

    # Whether it does what Python would -------------------------------------------------

    def _compare(self, global_step: int, leaves: list[Any]) -> None:
        """Compare a replay with Python, both of which do not count.

        Raises:
            Uncapturable: it differs, and no replay was trusted yet.
            ValueError: it differs, and some were.
        """
        try:
            expected = self._in_python(leaves, global_step)
            differing = different(self._replayed(leaves), expected)
            if differing:
                again = different(self._in_python(leaves, global_step), expected)  # kernels that add in any order
                differing = [name for name in differing if name not in again]
            if differing:
                more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
                raise Uncapturable(
                    f"in step {global_step} a replay has another value of {differing[0]}{more} than Python: a number "
                    "that Python computes, as from a count of steps, stays as it was in the capture; compute it by "
                    "tensors on the device"
                )
        except Uncapturable as why:
            if self.replays <= SURE:
                raise
            raise ValueError(
                f"cudagraph: steps after step {self.compared} may have been trained wrongly, and train_step must not "
                f"be captured: {why}. Begin from a state before, with `plugins.cudagraph: null`"
            ) from None
        self.compared = global_step

    def _in_python(self, leaves: list[Any], global_step: Any) -> dict[str, Any]:
        """Do a step in Python that does not count; return by name all that it computes.

        Raises:
            Uncapturable: it raised, waited for the device, or did what a replay would not do.
        """
        with kept_rng(), self.trainer.idling(), self.trainer.logs.apart() as logged:
            before, drawn = held(self.module), draws()
            try:
                with no_waiting():
                    made = tree_leaves(self.run(leaves, global_step))
                if not made or not isinstance(made[0], torch.Tensor) or not made[0].requires_grad:
                    raise Uncapturable("its first output is no loss")
                computed = gradients(made[0], [*self.weights.values()], torch.ones_like(made[0]))
            except Uncapturable:
                raise
            except Exception as error:
                raise Uncapturable(f"{said(error)} at {place(error)}") from error
            if changed := different_objects(before, held(self.module)):
                raise Uncapturable(f"it changes the attribute {changed}, which a replay does not")
            if drawn != draws():
                raise Uncapturable("it draws random numbers of the CPU, which would be the same in each replay")
            return self._named(made, logged, computed)

    def _replayed(self, leaves: list[Any]) -> dict[str, Any]:
        """Do both replays, which do not count; return by name all that they compute."""
        with kept_rng(), self.trainer.idling():
            self._fill(leaves)
            self.forward.replay()
            self._replay_backward(torch.ones_like(self.gradient))
            return self._named(self.made, self.logged, self.gradients)

    def _named(self, made: list[Any], logged: list[Any], computed: Any) -> dict[str, Any]:
        found = {f"output {number}": leaf for number, leaf in enumerate(made)}
        for values, options in logged:
            found |= {f"the logged {name} ({number})": value for number, (name, value) in enumerate(values.items())}
            found |= {f"the weight of {' '.join(values)}": options.get("weighted_by")}
        found |= {f"the gradient of {name}": one for name, one in zip(self.weights, computed, strict=True)}
        found |= {f"the buffer {name}": one for name, one in self.module.named_buffers()}
        return {name: one.detach().cpu() if isinstance(one, torch.Tensor) else one for name, one in found.items()}


class Replay(torch.autograd.Function):
    """The two graphs as one operation of autograd: of the weights, with all outputs of `train_step`."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = graph.replay_forward()
        ctx.graph, ctx.replay = graph, graph.awaited
        ctx.mark_non_differentiable(*(one for one, follows in zip(tensors, graph.follow, strict=True) if not follows))
        ctx.set_materialize_grads(False)
        return tuple(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *others: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if gradient is None or any(other is not None for other in others):
            raise RuntimeError(
                "cudagraph captures the backward pass of the loss alone, and somebody wants the gradient of another "
                "output of train_step; turn it off (`plugins.cudagraph: null`)"
            )
        return None, *ctx.graph.replay_backward(ctx.replay, gradient)


# Capturing ----------------------------------------------------------------------------


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph, pool: Any, stream: Any) -> Iterator[None]:
    """Capture a block.

    Raises:
        Uncapturable: the block raised, and the capture has ended well.
        RuntimeError: CUDA refused it.
    """
    failed: Exception | None = None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                yield
            except Exception as error:
                failed = error
    except RuntimeError as error:
        error.add_note("cudagraph: CUDA refused the capture: train without it (`plugins.cudagraph: null`)")
        raise error from failed
    if isinstance(failed, Uncapturable):
        raise failed
    if failed is not None:
        raise Uncapturable(f"{said(failed)} at {place(failed)}") from failed


def gradients(loss: torch.Tensor, weights: list[Any], of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of weights, None for those on which the loss does not depend."""
    with torch.autocast("cuda", enabled=False):  # as where the loop runs backward
        return torch.autograd.grad(loss, weights, of_loss, allow_unused=True)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raise within the block where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class StepRead(Exception):
    """Somebody has read the number of the step."""


class Unread:
    """In the place of the number of a step where it would stay what it is: reading it raises."""

    def _read(self, *_: Any) -> Any:
        raise StepRead

    __bool__ = __index__ = __int__ = __float__ = __str__ = __repr__ = __format__ = __hash__ = _read
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __abs__ = _read
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __divmod__ = _read
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _read


def said(error: Exception) -> str:
    """Return what an error says, in a few words."""
    if isinstance(error, StepRead):
        return "it reads global_step"
    if "synchronizing CUDA operation" in str(error):
        return "it waits for the device"
    return f"it raised {type(error).__name__} ({str(error).strip().partition(chr(10))[0]:.200})"


def place(error: Exception) -> str:
    """Return the file, the line and its text where an error came from, in the user's code if it comes by there."""
    frames = [*traceback.walk_tb(error.__traceback__)]
    own = [one for one in frames if one[0].f_globals.get("__name__", "").partition(".")[0] not in OURS]
    frame, line = (own or frames)[-1]
    file = frame.f_code.co_filename
    return f"{file}:{line} ({linecache.getline(file, line).strip()})"


# What a replay does not do ------------------------------------------------------------


def has_hooks(part: torch.nn.Module) -> bool:
    """Tell whether calling a module runs hooks."""
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def held(module: torch.nn.Module) -> dict[str, list[Any]]:
    """Return the attributes and buffers of a module by name; with a list, a dictionary or a set also its items."""
    found: dict[str, list[Any]] = {}
    for path, part in module.named_modules():
        own = {name: value for name, value in vars(part).items() if name not in OF_TORCH}
        for name, value in {**own, **dict(part.named_buffers(recurse=False))}.items():
            items = value.values() if isinstance(value, dict) else value
            has_items = isinstance(value, (list, dict, set, collections.deque))
            found[f"{path}.{name}".removeprefix(".")] = [value, *(items if has_items else ())]
    return found


def different_objects(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> str:
    """Return the name of an attribute that is another object, or has other items; "" if there is none."""
    for name in {**before, **after}:
        one, other = before.get(name, []), after.get(name, [])
        pairs = zip(one, other, strict=False)
        if len(one) != len(other) or not all(a is b or (type(a) in PLAIN and a == b) for a, b in pairs):
            return name
    return ""


def draws() -> tuple[Any, ...]:
    """Return the states of the random numbers of the CPU."""
    numpy = sys.modules.get("numpy")
    of_numpy = "" if numpy is None else repr(numpy.random.get_state()[1:])
    return random.getstate(), torch.get_rng_state().tolist(), of_numpy


def different(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of values that differ by more than rounding, or that only one has."""
    names = [name for name in {**expected, **found} if name not in found or name not in expected]
    return names + [name for name in expected if name not in names and not close(found[name], expected[name])]


def close(one: Any, other: Any) -> bool:
    """Tell whether two values are equal, tensors within the tolerance."""
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return type(one) is type(other) and bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    finite = other[other.isfinite()].abs()
    largest = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=TOLERANCE * largest, equal_nan=True)
