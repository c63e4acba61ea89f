"""The first step of training: what it does not train is said, and a `train_step` that steps by itself is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from hookline.interfaces import Stage
from hookline.loop.building import Built

if TYPE_CHECKING:
    from hookline.run import Run


@contextlib.contextmanager
def watched(run: Run, built: Built) -> Iterator[None]:
    """Refuse within the block a `train_step` that does what the loop does.

    Who performs `update` may do it, and who adapts modules.
    """
    before: list[Any] = []  # while the module's step is under way
    handles: list[Any] = []

    def refuse(*_: Any) -> None:
        if before:
            raise TypeError(
                f"{type(run.module).__name__}.train_step has called backward(), zero_grad() or step(), which the loop "
                "does behind it, so it would be done twice: only return the loss. For steps of your own implement "
                "update(self, trainer, window), marked @hookimpl"
            )

    def begin(_: Any, __: Any, given: dict[str, Any]) -> None:
        if given.get("stage") is Stage.TRAIN:
            before[:] = [marks(built)]

    def end(_: Any, __: Any, given: dict[str, Any], outputs: Any) -> None:
        if given.get("stage") is Stage.TRAIN:
            if before != [marks(built)]:
                refuse()
            before.clear()

    if not (run.plugins.performers("update") or run.plugins.heard["adapt_module"]):
        handles.append(run.module.register_forward_pre_hook(begin, with_kwargs=True))
        # First: a hook before another that removes itself, as those of plugins may, makes torch lose a step's error.
        handles.append(run.module.register_forward_hook(end, with_kwargs=True, prepend=True))
        torch_own = [one for one in built.optimizers if isinstance(one, torch.optim.Optimizer)]
        handles += [optimizer.register_step_pre_hook(refuse) for optimizer in torch_own]
    try:
        yield
    except RuntimeError as error:
        if "tensors to be on the same device" in str(error) or ") and weight type (" in str(error):
            error.add_note(
                f"{type(run.module).__name__} is on {run.device}, and a tensor that meets its weights is not. The loop "
                "moves a batch (prepare_batch): make other tensors on `device`, or keep them by register_buffer"
            )
        raise
    finally:
        for handle in handles:
            handle.remove()


def marks(built: Built) -> list[Any]:
    """Return what backward, the clearing of gradients and a step of a scheduler change."""
    gradients = [weight.grad for weight in weights_of(built.optimizers) if weight.grad is not None]
    moves = [getattr(scheduler, "last_epoch", 0) for scheduler, *_ in built.schedulers]
    return [*moves, *((id(gradient), gradient._version) for gradient in gradients)]


def weights_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Return the parameters of optimizers."""
    return [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]


def look_at_gradients(run: Run, built: Built, stepped: Sequence[torch.optim.Optimizer]) -> None:
    """Say which parameters are not trained by the first step.

    Raises:
        ValueError: none is.
    """
    named = {name: weight for name, weight in run.module.named_parameters() if weight.requires_grad}
    trained, now = ({id(weight) for weight in weights_of(some)} for some in (built.optimizers, stepped))
    left = [name for name, weight in named.items() if id(weight) not in trained]
    grads = {name: weight.grad for name, weight in named.items() if id(weight) in now}
    without = [name for name, grad in grads.items() if grad is None]
    kind = type(run.module).__name__
    if run.plugins.performers("run_backward") or run.plugins.heard["adapt_module"]:  # gradients may be elsewhere
        without = []
    if without and len(without) == len(grads):
        raise ValueError(
            f"the loss that {kind}.train_step returned depends on no parameter of the optimizers, so nothing would be "
            "trained: compute it by the module's own parameters, not by a copy of them"
        )
    for names, said in (
        (left, "are in no optimizer, so they are not trained"),
        (without, "have no gradient in the first step: the loss does not depend on them"),
    ):
        first = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        text = f"{len(names)} parameter(s) of {kind} that require gradients {said}: {first}. "
        run.say_once(text + "Freeze what shall not be trained: requires_grad_(False)" if names and not run.rank else "")


def say_not_finite(run: Run) -> None:
    """Say which parameters are not finite at the end of a training whose losses nobody has looked at."""
    made = {name: weight for name, weight in run.module.named_parameters() if not is_lazy(weight)}
    few_bits = {
        name for name, weight in made.items() if hasattr(weight, "__tensor_flatten__") and not weight.requires_grad
    }
    bad = [name for name, weight in made.items() if name not in few_bits and not weight.isfinite().all()]
    if bad:
        run.say_once(f"{len(bad)} parameter(s) are not finite after training, {bad[0]} for one: look at the loss")
