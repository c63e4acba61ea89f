"""Train a model to answer as a teacher does: its outputs, and what stands in layers on the way."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hookline import CallbackInterface, Stage, hookimpl, instantiate, kept_rng, nearest

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from hookline import Trainer

__version__ = "0.1.0"

OUTPUT = "the output of the teacher"
SAMPLE = 4096  # elements of each weight of the teacher that tell it from others


@dataclass(eq=False)
class Distill(CallbackInterface):
    """Add to the loss how far a part of the model answers from how a frozen teacher does.

    The teacher gets what that part is called with, before it is. The loss of a training step is the module's own, plus
    weight * temperature² * KL(teacher, student), plus hidden_weight * the mean squared errors of the named layers.
    """

    teacher: Any = None
    """A module, or the `_target_` that makes one; null for a copy of the student's part, with `weights`."""
    weights: str | None = None
    """A file of weights, or a folder that has one (of a model, or a checkpoint), for the teacher."""
    teacher_part: str = ""
    """The part of the teacher that answers as the student's does, by its name; empty for all of it."""
    student: str = ""
    """The part of the module whose outputs are logits, by its name; empty if the module has only one part."""
    temperature: float = 2.0
    """Logits are divided by it before they are compared."""
    weight: float = 1.0
    """Of the divergence of the outputs; 0 to compare only hidden layers."""
    hidden: dict[str, str] = field(default_factory=dict)
    """Layers whose outputs are compared, by names within the parts: `{student's: teacher's}`."""
    hidden_weight: float = 1.0
    """Of the mean squared errors of hidden layers."""

    def __post_init__(self) -> None:
        if self.teacher is None and self.weights is None:
            raise ValueError("distill has no teacher: give teacher (a module or its _target_), weights, or both")
        if not self.temperature > 0:
            raise ValueError(f"distill.temperature={self.temperature} must be above 0")
        for name in ("weight", "hidden_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"distill.{name}={getattr(self, name)} must be at least 0")
        weights = {"distill_kl": self.weight, "distill_hidden": self.hidden_weight if self.hidden else 0}
        self._weights = {name: weight for name, weight in weights.items() if weight}
        if not self._weights:
            raise ValueError("distill has nothing to compare: weight is 0, and no hidden layers have a weight")
        self._expected = ""
        self._fingerprint = ""
        self._teacher: torch.nn.Module | None = None
        self._student: torch.nn.Module | None = None
        self._layers: dict[str, torch.nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._taught: dict[str, Any] = {}
        self._parts: dict[str, list[torch.Tensor]] = {}

    # Building -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def convert_model(self, trainer: Trainer, model: torch.nn.Module) -> Generator[None, Any, Any]:
        """Make the teacher from the model as it was given, and listen to the converted one."""
        name = self.student or only_part(model)
        with kept_rng():  # the random numbers of training stay those without a teacher
            torch.manual_seed(trainer.options.seed)
            self._teacher = self._make(model, name).to(trainer.device)
        self._fingerprint, self._expected = fingerprint(self._teacher), ""
        hidden = self.hidden if self.hidden_weight else {}
        for theirs in hidden.values():
            find(self._teacher, theirs, "distill.hidden").register_forward_hook(self._keep(theirs))
        model = yield
        self._student = find(model, name, "distill.student")
        self._layers = {theirs: find(self._student, ours, "distill.hidden") for ours, theirs in hidden.items()}
        self._listen()
        return model

    def _listen(self) -> None:
        """Put hooks on the student and its layers."""
        student = self._student
        assert student is not None
        self._handles = [
            student.register_forward_pre_hook(self._teach, with_kwargs=True),
            *(layer.register_forward_hook(self._compare_hidden(name)) for name, layer in self._layers.items()),
            student.register_forward_hook(self._compare_outputs),
        ]

    @hookimpl
    def on_begin_run(self) -> None:
        """Listen again to a model that an earlier run of this trainer has made."""
        if self._student is not None:
            self._listen()

    @hookimpl
    def on_end_run(self) -> None:
        """Leave the module without hooks: the user may copy or save it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _make(self, model: torch.nn.Module, name: str) -> torch.nn.Module:
        """Return the teacher's part, frozen and in eval mode."""
        state = {} if self.weights is None else read(Path(self.weights))
        if self.teacher is None:
            teacher = whole = copy.deepcopy(find(model, name, "distill.student"))
            state = {key.removeprefix(f"{name}."): w for key, w in state.items() if key.startswith(f"{name}.")}
        else:
            whole = instantiate(self.teacher, "distill.teacher")
            if not isinstance(whole, torch.nn.Module):
                raise ValueError(f"distill.teacher is a {type(whole).__name__}, and no torch.nn.Module")
            teacher = find(whole, self.teacher_part, "distill.teacher_part")
        if self.weights is not None:
            load(whole, state, self.weights)
        return teacher.eval().requires_grad_(False)

    @hookimpl
    def on_begin_train(self) -> None:
        """Refuse another teacher than that of the checkpoint."""
        if self._expected and self._expected != self._fingerprint:
            raise ValueError(
                "distill: this run was begun with another teacher: the weights that it has now are not those of then. "
                "Give the same teacher and weights, or begin a new run"
            )

    # Comparing ------------------------------------------------------------------------

    def _keep(self, name: str) -> Any:
        def keep(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            self._taught[name] = output

        return keep

    def _teach(self, student: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Ask the teacher before the student: it may change its inputs in place."""
        if self._active:
            assert self._teacher is not None
            with torch.no_grad():
                self._taught[OUTPUT] = self._teacher(*args, **kwargs)

    def _compare_hidden(self, name: str) -> Any:
        def compare(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            if self._active and name in self._taught:
                ours, theirs = tensor_of(output).float(), tensor_of(self._taught[name]).float()
                refuse_shapes(ours, theirs, "distill.hidden", name)
                self._parts.setdefault("distill_hidden", []).append(F.mse_loss(ours, theirs))

        return compare

    def _compare_outputs(self, student: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self._active and self.weight:
            ours, theirs = tensor_of(output).float(), tensor_of(self._taught[OUTPUT]).float()
            refuse_shapes(ours, theirs, "distill.student", self.student)
            mine, goal = (F.log_softmax(one / self.temperature, dim=-1).flatten(0, -2) for one in (ours, theirs))
            divergence = F.kl_div(mine, goal, log_target=True, reduction="batchmean") * self.temperature**2
            self._parts.setdefault("distill_kl", []).append(divergence)
        self._taught = {}

    @hookimpl(wrapper=True)
    def call_model(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        if stage is not Stage.TRAIN:
            return (yield)
        self._active, self._parts = True, {}
        try:
            returned = yield
        finally:
            self._active = False
        parts = {name: torch.stack(each).sum() for name, each in self._parts.items()}
        self._parts = {}
        if parts.keys() != self._weights.keys():
            if trainer.idle:  # the model stands still, only to keep ranks in step
                return returned
            raise ValueError(
                f"distill.student={self.student!r}: train_step of {type(trainer.module).__name__} has not called this "
                "part of the model; name the part that it calls"
            )
        logged: dict[str, Any] = {name: part.detach() for name, part in parts.items()}
        trainer.log(**logged)
        added = sum(self._weights[name] * part for name, part in parts.items())
        if isinstance(returned, (tuple, list)):
            return (returned[0] + added, *returned[1:])
        return returned + added

    # State ----------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return what tells the teacher from others; its weights are where it was made from."""
        return {"teacher": self._fingerprint} if self._fingerprint else {}

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it, to compare it when training begins."""
        self._expected = state["teacher"]


def only_part(model: torch.nn.Module) -> str:
    """Return the name of the only part of a module.

    Raises:
        ValueError: it has none, or several.
    """
    names = [name for name, _ in model.named_children()]
    if len(names) != 1:
        raise ValueError(
            f"distill.student must name the part of {type(model).__name__} whose outputs are logits; its parts are "
            f"{', '.join(names) or 'none'}"
        )
    return names[0]


def find(model: torch.nn.Module, name: str, option: str) -> torch.nn.Module:
    """Return a part of a model.

    Raises:
        ValueError: there is none of this name.
    """
    parts: dict[str, torch.nn.Module] = dict(model.named_modules())
    if name not in parts:
        raise ValueError(f"{option}={name!r} is no part of {type(model).__name__}{nearest(name, list(parts))}")
    return parts[name]


def tensor_of(output: Any) -> torch.Tensor:
    """Return the tensor of an output: itself, `.logits` as models of transformers have it, or the first of several."""
    if isinstance(output, torch.Tensor):
        return output.full_tensor() if hasattr(output, "full_tensor") else output  # of ranks that split a layer
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"distill: a part answers with a {type(output).__name__}, in which there are no logits")
    return found


def refuse_shapes(ours: torch.Tensor, theirs: torch.Tensor, option: str, name: str) -> None:
    """Refuse outputs that cannot be compared number by number.

    Raises:
        ValueError: they have other shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{option}: student and teacher answer with shapes {tuple(ours.shape)} and {tuple(theirs.shape)} "
            f"({name or 'outputs'}), which cannot be compared"
        )


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a file, or of the files of a model or a checkpoint in a folder.

    Raises:
        ValueError: there are none.
    """
    found = [path]
    if path.is_dir():
        found = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model.pt"))
    if not found or not all(file.is_file() for file in found):
        raise ValueError(f"distill.weights={str(path)!r} is no file, and no folder with model.safetensors in it")
    state: dict[str, torch.Tensor] = {}
    for file in found:
        state |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return state


def load(module: torch.nn.Module, state: Mapping[str, torch.Tensor], where: str) -> None:
    """Load weights; a tied one may be there under one of its names.

    Raises:
        ValueError: weights are missing or others, or have another shape.
    """
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"distill.weights={where!r}: {error}") from error
    own = module.state_dict()
    loaded = {own[name].data_ptr() for name in own if name not in missing}
    missing = [name for name in missing if own[name].data_ptr() not in loaded]
    if missing or unexpected:
        raise ValueError(
            f"distill.weights={where!r} are not those of {type(module).__name__}: "
            f"missing {', '.join(missing) or 'none'}; unknown {', '.join(unexpected) or 'none'}"
        )


def fingerprint(model: torch.nn.Module) -> str:
    """Return a number that tells the weights of a model from others by some elements of each."""
    told = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        some = tensor.detach().flatten()[:SAMPLE].cpu().contiguous()
        told.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        told.update(some.view(torch.uint8).numpy().tobytes())
    return told.hexdigest()
