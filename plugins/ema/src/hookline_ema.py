"""Keep an exponential moving average of the weights, to evaluate with and to export, or in a teacher network."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from hookline import CallbackInterface, Stage, copy_state, hookimpl, hookspecs, kept_rng

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

BUFFERS = ("copy", "average")

Tensors = dict[str, torch.Tensor]

move_by = functools.lru_cache(maxsize=4)(get_ema_multi_avg_fn)  # made once for a decay, not at every step


@dataclass(eq=False)
class Ema(CallbackInterface):
    """Keep an exponential moving average of the weights; evaluate with it, and export it.

    After each optimizer step of the run: average = decay * average + (1 - decay) * weight. It begins
    as the weights after the first step that counts.
    """

    decay: float = 0.999
    """What is left of the average at each update of it: the nearer to 1, the longer it remembers."""
    warmup: bool = False
    """Use `min(decay, (1 + n) / (10 + n))` at the update after n of them: the first weights are soon forgotten."""
    begin: int = 0
    """Optimizer steps before averaging begins; until then the average is the weights themselves."""
    every: int = 1
    """Update the average after each so many optimizer steps."""
    offset: int = 0
    """Update at the steps that leave this remainder when divided by `every`."""
    buffers: str = "copy"
    """Floating buffers (running statistics): "copy" takes the current ones, "average" averages them too."""
    evaluate: bool = True
    """Whether to evaluate with the average; what is exported is the average in any case."""
    suffix: str = ""
    """Evaluate the trained weights too: their metrics have the plain names, those of the average have this suffix."""
    into: dict[str, str] = field(default_factory=dict)
    """Average a network of the module into another one of it, by their paths: {student: teacher}."""

    averages = True  # as every plugin does that evaluates and exports an average of the weights

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must be from 0 to below 1, such as 0.999")
        if self.begin < 0:
            raise ValueError(f"ema.begin={self.begin} must be at least 0 optimizer steps")
        if self.every < 1:
            raise ValueError(f"ema.every={self.every} must be at least 1 optimizer step")
        if not 0 <= self.offset < self.every:
            raise ValueError(f"ema.offset={self.offset} must be from 0 to below ema.every={self.every}")
        if self.buffers not in BUFFERS:
            raise ValueError(f"ema.buffers={self.buffers!r} must be one of {', '.join(BUFFERS)}")
        if self.suffix and (self.into or not self.evaluate or "/" in self.suffix):
            raise ValueError(
                f"ema.suffix={self.suffix!r} must have no slash, and goes with neither ema.evaluate=false nor "
                "ema.into, which evaluate no average"
            )
        self._hide_what_is_not_asked_for()
        self.on_setup()

    def _hide_what_is_not_asked_for(self) -> None:
        wanted = {
            "convert_model": bool(self.into),
            "evaluate_both": bool(self.suffix),
            "evaluate_the_average": self.evaluate and not self.suffix and not self.into,
            "export_model": not self.into,
        }
        for hook in [hook for hook, asked in wanted.items() if not asked]:
            setattr(self, hook, None)

    # Averaging ------------------------------------------------------------------------

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._average: Tensors = {}
        self._parameters: Tensors | None = None
        self._updates = 0

    @hookimpl(wrapper=True)
    def convert_model(self, trainer: Trainer) -> Generator[None, Any, Any]:
        """Freeze the teachers, when the networks stand and nobody has wrapped them or made optimizers."""
        model = yield
        for student, teacher in self.into.items():
            freeze(trainer.module, student, teacher)
        return model

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        if self.suffix and self.buffers == "average" and trainer.world_size > 1:
            raise ValueError("ema.suffix: averaged buffers differ between ranks; set ema.buffers=copy")
        if self.suffix and not trainer.options.report_loss_after_eval:
            raise ValueError("ema.suffix: with report_loss_after_eval=false two losses so far would have one name")
        for name, buffer in self._averaged_buffers(trainer.module).items():
            if not buffer.isfinite().all():
                raise ValueError(
                    f"ema.buffers={self.buffers!r} cannot average the buffer {name!r}: it has infinite values or NaN "
                    "(a mask?), whose average is NaN; set ema.buffers=copy"
                )
        for teacher in self.into.values():
            trainer.module.get_submodule(teacher).requires_grad_(False)  # a state may say otherwise
        if self.into and not self._updates:
            self._copy(trainer.module)

    @hookimpl
    def on_begin_train_epoch(self) -> None:  # type: ignore[override]
        """Look the parameters up anew, since some may have been added."""
        self._parameters = None

    @hookimpl(trylast=True)
    def on_end_train_step(self, trainer: Trainer, global_step: int, stepped: bool) -> None:  # type: ignore[override]
        """Move the average towards the weights, behind those who still change them."""
        if not stepped:
            return
        if global_step <= self.begin:
            if self.into:
                self._copy(trainer.module)
        elif global_step % self.every == self.offset:
            n = self._updates
            self._update(trainer.module, min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay)
            self._updates += 1

    @torch.no_grad()
    def _copy(self, module: torch.nn.Module) -> None:
        """Let the teachers be their students."""
        self._update(module, 0.0)
        self._updates = 1

    def _update(self, module: torch.nn.Module, decay: float) -> None:
        buffers = self._averaged_buffers(module)
        if self._parameters is None:  # looked up once, not at every step
            self._parameters = self._of_the_trained(module, parameters_of)
            self._shared = any(hasattr(parameter, "to_local") for parameter in self._parameters.values())
            current = self._parameters | buffers  # a state that was restored is on the CPU
            self._average = {n: average.to(current[n].device) for n, average in self._average.items() if n in current}
            for student, teacher in self.into.items():
                tensors = parameters_of(network := module.get_submodule(teacher)) | buffers_of(network)
                self._average |= {f"{student}.{name}": tensor for name, tensor in tensors.items()}
        averages, targets = [], []
        for name, tensor in (self._parameters | buffers).items():
            average = self._average.get(name)
            if average is not None:
                averages.append(average)
                targets.append(tensor.detach().to(average.dtype))
            elif tensor.requires_grad or name in buffers:  # what is frozen is its own average
                # With half precision the small steps of an average would be rounded away.
                dtype = torch.float32 if tensor.itemsize < 4 else tensor.dtype
                self._average[name] = tensor.detach().to(dtype, copy=True)
        if self._shared:  # torch moves no list of tensors that ranks share in several ways
            averages, targets = ([here(tensor) for tensor in tensors] for tensors in (averages, targets))
        if averages:
            move_by(decay)(averages, targets, 0)
        for student, teacher in self.into.items():
            for name, buffer in module.get_submodule(student).named_buffers():
                if f"{student}.{name}" not in buffers:
                    module.get_submodule(teacher).get_buffer(name).copy_(buffer)

    def _of_the_trained(self, module: torch.nn.Module, tensors_of: Callable[[torch.nn.Module], Tensors]) -> Tensors:
        """Return tensors of the networks that are averaged, by their names in the module."""
        networks = {f"{student}.": module.get_submodule(student) for student in self.into} or {"": module}
        return {prefix + name: t for prefix, network in networks.items() for name, t in tensors_of(network).items()}

    def _averaged_buffers(self, module: torch.nn.Module) -> Tensors:
        return {} if self.buffers == "copy" else self._of_the_trained(module, buffers_of)

    # Evaluating and exporting ---------------------------------------------------------

    @hookimpl(wrapper=True, specname="evaluate")
    def evaluate_the_average(self, trainer: Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        with self._swapped_in(trainer.module):
            return (yield)

    @hookimpl(specname="evaluate")
    def evaluate_both(
        self, trainer: Trainer, stage: Stage, loaders: Mapping[str, Any], limit: int | None
    ) -> dict[str, float]:
        """Evaluate the trained weights and then the average, with the same random numbers; predict with the average."""
        arguments: dict[str, Any] = {"trainer": trainer, "stage": stage, "loaders": loaders, "limit": limit}
        trained: dict[str, float] = {}
        if stage is not Stage.PREDICT:
            with kept_rng():
                trained = hookspecs.evaluate(**arguments)
        with self._swapped_in(trainer.module):
            averaged = hookspecs.evaluate(**arguments)
        named = (name.partition("/") for name in averaged)  # the key of a loader stays behind
        suffixed = [f"{name}{self.suffix}{slash}{key}" for name, slash, key in named]
        return trained | dict(zip(suffixed, averaged.values(), strict=True))

    @hookimpl(wrapper=True)
    def export_model(self, trainer: Trainer) -> Generator[None, Tensors, Tensors]:
        with self._swapped_in(trainer.module):
            state = yield
            return copy_state(state) if self._average else state

    @contextlib.contextmanager
    @torch.no_grad()
    def _swapped_in(self, module: torch.nn.Module) -> Iterator[None]:
        """Have the average in the module's own tensors, and afterwards the very bits that were there."""
        current = parameters_of(module) | self._averaged_buffers(module)
        swapped = {name: tensor for name, tensor in current.items() if name in self._average}
        trained = {name: tensor.clone() for name, tensor in swapped.items()}
        try:
            for name, tensor in swapped.items():
                tensor.copy_(self._average[name])
            yield
        finally:
            for name, tensor in swapped.items():
                tensor.copy_(trained[name])

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the average by the names of parameters and buffers, also where it has not begun."""
        return {"average": {} if self.into else dict(self._average), "updates": self._updates}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._average, self._parameters = {}, None
        for name, average in state["average"].items():
            plain = name.replace(
                "_orig_mod.", ""
            )  # names with what torch.compile put into them are of an older version
            self._average[plain] = average.clone()
        self._updates = state.get("updates", 0)


def parameters_of(module: torch.nn.Module) -> Tensors:
    """Return the parameters that can be averaged by name; one that is tied stands there once."""
    return {name: parameter for name, parameter in module.named_parameters() if can_be_averaged(parameter)}


def buffers_of(module: torch.nn.Module) -> Tensors:
    """Return the buffers that can be averaged by name."""
    return {name: buffer for name, buffer in module.named_buffers() if can_be_averaged(buffer)}


def freeze(module: torch.nn.Module, student: str, teacher: str) -> None:
    """Let nobody train a teacher.

    Raises:
        ValueError: a path leads to no network, or the two are not alike, or are one.
    """
    tensors: list[Tensors] = []
    for path in (student, teacher):
        try:
            network = module.get_submodule(path)
        except AttributeError:
            names = ", ".join(name for name, _ in module.named_children())
            raise ValueError(f"ema.into: the module has no network {path!r}; it has {names}") from None
        tensors.append(dict(network.named_parameters()) | dict(network.named_buffers()))
    one, other = ({name: tuple(tensor.shape) for name, tensor in of_one.items()} for of_one in tensors)
    different = sorted(name for name, _ in one.items() ^ other.items())
    shared = {*map(id, tensors[0].values())} & {*map(id, tensors[1].values())}
    if different or shared:
        why = f"differ in {different[0]}" if different else "share weights"
        raise ValueError(f"ema.into: {student} and {teacher} {why}; make it by copy.deepcopy(self.{student})")
    network.requires_grad_(False)


def here(tensor: Any) -> torch.Tensor:
    """Return this rank's share of a tensor that ranks share."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


def can_be_averaged(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds numbers between which there are others."""
    return tensor.is_floating_point() or tensor.is_complex()
