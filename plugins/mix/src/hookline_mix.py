"""Mix the samples of each training batch: mixup, cutmix, or any transform of a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, Stage, hookimpl, instantiate

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"


@dataclass(eq=False)
class Mix(CallbackInterface):
    """Mix the samples of each training batch, on the device: mixup, cutmix, or any transform of a batch.

    What it draws comes from the random state of torch, which a checkpoint has.
    """

    mixup: float | None = None
    """Alpha of mixup: both parameters of the beta distribution that the share of each sample is drawn from."""
    cutmix: float | None = None
    """The same for cutmix; with both, each batch gets one or the other, with equal chances."""
    transform: Any = None
    """Instead of these: a callable that takes a batch and returns one, or the `_target_` of one."""
    classes: int | None = None
    """How many classes targets have if they are class indices, which become shares of each class."""
    until: int | None = None
    """Mix in so many first epochs, and train the last ones on plain samples; null for all epochs."""
    inputs: Any = 0
    """Key or place of the inputs in a batch."""
    targets: Any = 1
    """Key or place of the targets in a batch."""

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "classes", "until"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"mix.{name}={value} must be above 0, or null")
        given = [name for name in ("mixup", "cutmix", "transform") if getattr(self, name) is not None]
        if not given:
            raise ValueError("mix has nothing to do: give mixup, cutmix or both, such as mixup: 0.2, or a transform")
        if "transform" in given and len(given) > 1:
            raise ValueError(f"mix.transform and mix.{given[0]} are both given: leave one out")

    @hookimpl
    def on_begin_train(self) -> None:
        made = instantiate(self.transform, "mix.transform") if isinstance(self.transform, dict) else self.transform
        self._apply: Callable[[Any], Any] = self._mix if made is None else made

    @hookimpl(wrapper=True, tryfirst=True)
    def prepare_batch(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        """Mix behind all who prepare the batch."""
        batch = yield
        if stage is not Stage.TRAIN or (self.until is not None and trainer.epoch >= self.until):
            return batch
        return self._apply(batch)

    def _mix(self, batch: Any) -> Any:
        inputs, targets = self._part(batch, "inputs"), self._part(batch, "targets")
        if not torch.is_tensor(inputs) or not inputs.is_floating_point():
            kind = getattr(inputs, "dtype", type(inputs).__name__)
            raise ValueError(f"mix.inputs={self.inputs!r} is {kind}: only floating tensors can be mixed")
        targets = self._shares(targets)
        draws = random.Random(
            torch.randint(2**62, (1,)).tolist()[0]
        )  # threads of trackers draw from Python's own state
        alpha, mixing = self.mixup, mixup
        if self.mixup is None or (self.cutmix is not None and draws.random() < 0.5):
            alpha, mixing = self.cutmix, cutmix
        assert alpha is not None
        inputs, share = mixing(inputs, draws.betavariate(alpha, alpha), draws)
        targets = share * targets + (1 - share) * targets.roll(1, 0)
        if isinstance(batch, Mapping):
            return {**batch, self.inputs: inputs, self.targets: targets}
        parts = list(batch)
        parts[self.inputs], parts[self.targets] = inputs, targets
        return getattr(type(batch), "_make", type(batch))(parts)

    def _part(self, batch: Any, name: str) -> Any:
        try:
            return batch[getattr(self, name)]
        except (KeyError, IndexError, TypeError):
            found = f"keys {list(batch)}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
            raise ValueError(
                f"mix.{name}={getattr(self, name)!r} is not in the batch, which has {found}: name the {name} there, or "
                "give mix.transform"
            ) from None

    def _shares(self, targets: Any) -> torch.Tensor:
        """Return targets that can be mixed: numbers as they are, classes as shares of each."""
        if not torch.is_tensor(targets):
            raise ValueError(f"mix.targets={self.targets!r} is a {type(targets).__name__}; it must be a tensor")
        if targets.is_floating_point():
            return targets
        if self.classes is None:
            raise ValueError(
                f"mix.targets={self.targets!r} are {targets.dtype}, which cannot be mixed: give the number of classes "
                "(mix.classes), of which train_step then gets the shares, as cross_entropy takes them"
            )
        return torch.nn.functional.one_hot(targets, self.classes).to(torch.get_default_dtype())


def mixup(inputs: torch.Tensor, share: float, draws: random.Random) -> tuple[torch.Tensor, float]:
    """Return each sample mixed with the one before it, and its share."""
    return share * inputs + (1 - share) * inputs.roll(1, 0), share


def cutmix(inputs: torch.Tensor, share: float, draws: random.Random) -> tuple[torch.Tensor, float]:
    """Return each sample with a box from the one before it, and the share of its area that is its own."""
    if inputs.ndim < 3:
        raise ValueError(
            f"mix.cutmix cuts boxes out of the last two dimensions; inputs have shape {tuple(inputs.shape)}"
        )
    height, width = inputs.shape[-2:]
    half = (1 - share) ** 0.5 / 2
    middle = draws.randrange(height), draws.randrange(width)
    top, bottom = max(0, middle[0] - int(height * half)), min(height, middle[0] + int(height * half))
    left, right = max(0, middle[1] - int(width * half)), min(width, middle[1] + int(width * half))
    mixed = inputs.clone()
    mixed[..., top:bottom, left:right] = inputs.roll(1, 0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)
