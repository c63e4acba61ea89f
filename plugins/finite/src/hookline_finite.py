"""Stop at, skip or roll back an update whose loss or gradients are not finite, and never let such a state be saved."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from hookline import CallbackInterface, copy_state, every, hookimpl

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.finite")

HOOKS = {  # those of which each policy needs others
    "stop": {"on_end_optimizer_step", "on_boundary"},
    "skip": {"should_step"},
    "rollback": {"on_begin_train_epoch", "take_window", "on_end_optimizer_step", "keep_or_go_back", "on_end_run"},
}


@dataclass(eq=False)
class Finite(CallbackInterface):
    """Look at the loss and the total norm of the gradients of every update.

    With "stop" and "rollback" the verdict stays on the device and is read before each save and at a
    cadence: nothing waits on an ordinary step, and no state that was updated with NaN or inf
    is ever stored. With "skip" it is read before each step, which is then refused.
    """

    policy: str = "stop"
    """stop ends the run by a `FloatingPointError`; skip refuses the update and goes on; rollback goes back to the state
    of the last reading and passes over the data of the bad step."""
    every: str = "50 steps"
    """stop, rollback: the cadence at which the verdict is read, besides before each save."""
    max_skips: int = 10
    """skip: updates refused in a row, rollback: windows passed over in the run, after which it ends as with stop."""

    def __post_init__(self) -> None:
        if self.policy not in HOOKS:
            raise ValueError(f"finite.policy={self.policy!r} must be one of {', '.join(HOOKS)}")
        if self.max_skips < 0:
            raise ValueError(f"finite.max_skips={self.max_skips} must be at least 0")
        try:
            every(self.every)
        except ValueError as error:
            raise ValueError(f"finite.every: {error}") from None
        for hook in set().union(*HOOKS.values()) - HOOKS[self.policy]:
            setattr(self, hook, None)  # hides the method: a hook of another policy costs nothing
        self._losses: list[torch.Tensor] = []
        self._sum: torch.Tensor | None = None
        self._first: torch.Tensor | None = None
        self._skipped = 0
        self._copy: dict[str, Any] | None = None
        self._windows: dict[int, tuple[int, int, int]] = {}  # epoch, position and size by step, since the last reading
        self._passed: list[list[int]] = []  # epoch and position of the windows that are passed over

    @hookimpl
    def on_end_backward(self, loss_tensor: torch.Tensor) -> None:  # type: ignore[override]
        self._losses.append(loss_tensor.detach())

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Add up what must be finite: whatever is not makes the sum so."""
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([here(p.grad) for p in parameters if p.grad is not None])
        self._sum = torch.stack([norm, *(loss.reshape(()).to(norm) for loss in self._losses)]).sum()
        self._losses = []

    @hookimpl(wrapper=True, tryfirst=True)
    def save(self, trainer: Trainer, state: Mapping[str, Any] | None) -> Generator[None, bool, bool]:
        step = self._read(trainer, state)
        if step is not None:
            if self.policy != "rollback" or not trainer.window.begun:
                self._raise(trainer, step)
            self._go_back(trainer, step)  # cut within a window, the run ends behind this save and need not go on here
        return (yield)

    def _read(self, trainer: Trainer, state: Mapping[str, Any] | None = None) -> int | None:
        """Return the first bad step on any rank, None where there is none; one copy off the device.

        Args:
            trainer: whose module is looked at, too.
            state: a run's state that is looked at in place of the module.

        Raises:
            FloatingPointError: no step was bad, and the module is not finite all the same.
        """
        parameters, buffers = tensors_of(trainer.module, state)
        verdict = [
            math.inf if self._first is None else self._first,
            largest(parameters).isfinite(),
            ~largest(buffers).isnan(),  # an infinite buffer may be meant so: a mask
        ]
        stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=trainer.device) for v in verdict])
        first, *sound = trainer.hook.all_reduce(trainer=trainer, value=stacked, op="min").tolist()
        if first < math.inf:
            return int(first)
        if not all(sound):
            bad = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
            bad += [name for name, buffer in buffers.items() if buffer.isnan().any()]
            raise FloatingPointError(
                f"the state after step {trainer.global_step} is not finite, though no update was found to be bad (rank "
                f"{trainer.rank}: {', '.join(bad) or 'all is well here'}); it was not saved. A batch with NaN spoils "
                "running statistics (batch norm) even where its update is refused; go on from the last checkpoint "
                "(`--resume`)"
            )
        return None

    # stop -----------------------------------------------------------------------------

    @hookimpl
    def on_end_optimizer_step(self, trainer: Trainer, stepped: bool) -> None:
        if not stepped or self._sum is None or trainer.idle:  # a step that was refused or only tried did no harm
            return
        if self._first is None:
            self._first = torch.full((), math.inf, dtype=torch.float64, device=self._sum.device)
        step = torch.where(torch.isfinite(self._sum), math.inf, float(trainer.global_step + 1))
        self._first = torch.minimum(self._first, step)

    @hookimpl(tryfirst=True)
    def on_boundary(self, trainer: Trainer) -> None:
        if trainer.due(self.every):
            step = self._read(trainer)
            if step is not None:
                self._raise(trainer, step)

    # skip -----------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def should_step(self, trainer: Trainer) -> Generator[None, bool, bool]:
        others = yield
        assert self._sum is not None
        fine = torch.isfinite(self._sum).float()  # on all ranks, also those with the same share of the data
        if trainer.hook.all_reduce(trainer=trainer, value=fine, op="min").item():
            self._skipped = 0
            return others
        self._skipped += not trainer.idle  # else it is only tried
        if self._skipped > self.max_skips:
            self._raise(trainer, trainer.global_step + 1)
        return False

    # rollback -------------------------------------------------------------------------

    @hookimpl(tryfirst=True)
    def on_begin_train_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Keep the state from which training begins; an evaluation before it, of `eval_when_start`, is in it."""
        if self._copy is None:
            self._keep(trainer)

    @hookimpl(wrapper=True, tryfirst=True)
    def take_window(self, trainer: Trainer, batches: Iterator[Any]) -> Generator[None, list[Any], list[Any]]:
        """Pass over the windows that were bad, and note where the others are."""
        window = yield
        if [trainer.epoch, trainer.position] in self._passed and window:
            trainer.position += len(window)
            if trainer.window.begun:  # a resumed run had been cut within this very window
                trainer.window.go_on()
                self._losses = []
                trainer.zero_grad()
            return trainer.hook.take_window(trainer=trainer, batches=batches)  # type: ignore[no-any-return]
        self._windows[trainer.global_step + 1] = trainer.epoch, trainer.position, len(window)
        return window

    @hookimpl(specname="on_boundary", trylast=True)
    def keep_or_go_back(self, trainer: Trainer) -> None:
        """Read the verdict; behind the others, so that what they do at this boundary is in the copy."""
        if trainer.due(self.every) or trainer.save_asked:
            step = self._read(trainer)
            if step is None:
                self._keep(trainer)
            else:
                self._go_back(trainer, step)

    def _keep(self, trainer: Trainer) -> None:
        self._copy = None  # so that there are never two
        self._copy = copy_state(trainer.hook.get_run_state(trainer=trainer))
        self._windows = {step: window for step, window in self._windows.items() if step > trainer.global_step}

    def _go_back(self, trainer: Trainer, step: int) -> None:
        """Put the last copy back, and have the window of a bad step passed over from now on."""
        if step not in self._windows or len(self._passed) >= self.max_skips:
            self._raise(trainer, step)
        (epoch, position, size), passed = self._windows[step], self._passed
        self._losses, self._first, self._windows = [], None, {}
        state = copy_state(self._copy)  # optimizers keep the tensors that they are given
        trainer.hook.set_run_state(trainer=trainer, state=state, stage=trainer.stage)
        self._passed = [*passed, [epoch, position]]  # behind update_state
        if trainer.rank == 0:
            log.warning(
                "the loss or the gradients of optimizer step %d are not finite: gone back to the state of step %d, "
                "to pass over the batches %d to %d of epoch %d (window %d of at most %d in this run)",
                step, trainer.global_step, position, position + size - 1, epoch, len(self._passed), self.max_skips,
            )  # fmt: skip

    @hookimpl
    def on_end_run(self) -> None:
        self._copy, self._windows = None, {}

    def _raise(self, trainer: Trainer, step: int) -> NoReturn:
        after = f", after {self._skipped - 1} in a row that were skipped," if self._skipped else ""
        if self._passed:
            after = f", after {len(self._passed)} window(s) that were passed over,"
        raise FloatingPointError(
            f"the loss or the gradients of optimizer step {step}{after} are not finite (rank {trainer.rank}, now at "
            f"step {trainer.global_step}); no state since then was saved. Look at its batch, the learning rate and the "
            "precision, and go on from the last checkpoint (`--resume`)"
        )

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return how many updates were refused in a row, which windows are passed over, and the losses of a cut one."""
        state = {"skipped": self._skipped, "passed": self._passed, "losses": self._losses}
        return {name: value for name, value in state.items() if value}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._skipped, self._passed = state.get("skipped", 0), state.get("passed", [])
        self._losses = list(state.get("losses", []))


def tensors_of(
    module: torch.nn.Module, state: Mapping[str, Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the floating parameters and the floating buffers of a module by name, or those of it in a run's state."""
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if state is not None:
        kept = state["module"]
        parameters, buffers = ({n: kept[n] for n in kept if (n in parameters) == own} for own in (True, False))
    return floating(parameters), floating(buffers)


def floating(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what is here of those that are tensors of floating-point numbers, where it is not empty."""
    found = {name: here(t) for name, t in tensors.items() if torch.is_tensor(t) and t.is_floating_point()}
    return {name: tensor for name, tensor in found.items() if tensor.numel()}


def here(tensor: Any) -> torch.Tensor:
    """Return this rank's share of a tensor that ranks share: the verdict is that of all of them, anyway."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def largest(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the largest magnitude in all of them, on their device; NaN where one is, 0 where there are none."""
    return torch.nn.utils.get_total_norm(list(tensors.values()), math.inf)
