"""Export the trained net for use without hookline: torch.export, ONNX, safetensors, with a model card."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, ModuleInterface, Stage, hookimpl, kept_rng, nearest
from hookline.files import clear, make_folder, replacing
from hookline.files.weights import owned, untie
from hookline_export.card import card

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "safetensors": "model.safetensors"}

log = logging.getLogger("hookline.export")


@dataclass(eq=False)
class Export(CallbackInterface):
    """Export a part of the module when training ends: its graph, its weights, a model card.

    The weights are those of `trainer.export_model()`. Graphs are made on the CPU, in eval mode, and compared with the
    net before the files appear.
    """

    to: Any = "pt2"
    """pt2 (torch.export), onnx, safetensors, or a list of them."""
    module: str = "net"
    """The path of a submodule, such as `net` or `net.encoder`, or the name of a method of the module."""
    inputs: Any = None
    """The arguments of the net: a list of indices or keys of a batch, or a mapping of parameters to them; null: the
    batch if it is a tensor, else its first item. In Python tensors may stand in their place."""
    dynamic_batch: bool = True
    """Whether the first dimension of every input may have any size; false: that of the example."""
    folder: str | None = None
    """For the files, which replaces what is there; null: `export` in the run folder."""

    def __post_init__(self) -> None:
        self._forms = [self.to] if isinstance(self.to, str) else [*self.to]
        for form in self._forms:
            if form not in FILES:
                raise ValueError(f"export.to={form!r} must be one of {', '.join(FILES)}{nearest(form, FILES)}")
        if not self._forms:
            raise ValueError(f"export.to=[] exports nothing: name some of {', '.join(FILES)}")
        if self.inputs is not None and (isinstance(self.inputs, (str, int)) or not len(self.inputs)):
            raise ValueError(f"export.inputs={self.inputs!r} must be a list of indices or keys of a batch, such as [0]")

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        self.check(trainer)

    @hookimpl
    def on_end_train(self, trainer: Trainer) -> None:  # type: ignore[override]
        self.export(trainer)

    def check(self, trainer: Trainer) -> None:
        """Refuse early what cannot be exported later.

        Raises:
            ImportError: a package is missing.
            ValueError: there is no such part, or its weights are shared out to ranks.
        """
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if "onnx" in self._forms and missing:
            raise ImportError(
                f"export.to=onnx needs {' and '.join(missing)}: `pip install 'hookline-export[onnx]'`, or choose pt2"
            )
        owner, _ = self._part(trainer)
        if self._forms != ["safetensors"] and any(hasattr(one, "full_tensor") for one in owner.parameters()):
            raise ValueError(
                f"export.to={self.to}: ranks have parts of the weights of {self.module!r}, so no graph can be made "
                "when training ends: choose safetensors, and `hookline export RUN` in one process afterwards"
            )

    def _part(self, trainer: Trainer) -> tuple[torch.nn.Module, str]:
        """Return the submodule that holds what is exported, and its path: "" for the whole module, of a method."""
        module = trainer.module
        with contextlib.suppress(AttributeError):
            if self.module:
                return module.get_submodule(self.module), self.module
        own = [name for name in vars(type(module)) if callable(getattr(module, name)) and not name.startswith("_")]
        if not self.module.startswith("_") and callable(getattr(module, self.module, None)):
            return module, ""
        parts = [name for name, _ in module.named_children()]
        raise ValueError(
            f"export.module={self.module!r} is neither a submodule nor a method of {type(module).__name__}"
            f"{nearest(self.module, [*parts, *own])}; it has the submodules {', '.join(parts) or 'none'}"
        )

    def export(self, trainer: Trainer) -> None:
        """Write the files; all ranks call it.

        Raises:
            ValueError: the inputs cannot be found, or what is exported computes something else than the net.
        """
        weights = trainer.export_model()  # by all ranks, which may have a part of it each
        before = trainer.resuming  # by all ranks too
        counters = before if before is not None and not trainer.global_step else trainer.counters
        stage = stage_of(trainer.module)
        sampler = trainer.hook.get_sampler(trainer=trainer, stage=stage)
        with trainer.rank_zero_first():
            if trainer.rank == 0:
                path = Path(self.folder) if self.folder is not None else trainer.run_dir / "export"
                make_folder(path.parent)
                clear(path.parent)
                with replacing(path) as new, kept_rng():
                    new.mkdir()
                    self._write(new, trainer, weights, stage, sampler)
                    about = card(trainer, self.module, self._forms, self._own(trainer, weights), counters)
                    (new / "README.md").write_text(about, encoding="utf-8")
                log.info("export: %s in %s", ", ".join(self._forms), path)

    def _own(self, trainer: Trainer, weights: Mapping[str, Any]) -> dict[str, Any]:
        """Return the weights of what is exported, by its own names."""
        prefix = f"{path}." if (path := self._part(trainer)[1]) else ""
        return {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}

    def _write(self, new: Path, trainer: Trainer, weights: Mapping[str, Any], stage: Stage, sampler: type) -> None:
        owner, path = self._part(trainer)
        own = self._own(trainer, weights)
        if "safetensors" in self._forms:
            from safetensors.torch import save_file

            tensors, tied = untie(own)
            save_file(owned(tensors, tensors), new / FILES["safetensors"], {**tied, "format": "pt"})
        if self._forms != ["safetensors"]:
            net = copy.deepcopy(owner).cpu()
            net.load_state_dict({name: one.cpu() if torch.is_tensor(one) else one for name, one in own.items()})
            net = (net if path else Method(net, self.module)).eval().requires_grad_(False)
            args, keywords = self._example(trainer, stage, sampler)
            with torch.no_grad():
                write_graph(new, self._forms, net, args, keywords, self.dynamic_batch)

    def _example(self, trainer: Trainer, stage: Stage, sampler: type) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments of the net: given ones, or from the first batch of a loader."""
        which = self.inputs
        wanted = [*which.values()] if isinstance(which, Mapping) else which
        batch = (
            None if wanted is not None and all(map(torch.is_tensor, wanted)) else first_batch(trainer, stage, sampler)
        )
        if which is None:
            which, batch = [0], [batch] if torch.is_tensor(batch) else batch
        try:
            if isinstance(which, Mapping):
                return (), {name: item_of(batch, one) for name, one in which.items()}
            return tuple(item_of(batch, one) for one in which), {}
        except (KeyError, IndexError, TypeError):
            has = f"keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"export.inputs={self.inputs!r} does not tell which inputs {self.module!r} takes of a {stage.value} "
                f"batch ({has}): list indices or keys of it, or map the net's parameters to them"
            ) from None


def item_of(batch: Any, which: Any) -> Any:
    """Return an item of a batch; a tensor is one already."""
    return which if torch.is_tensor(which) else batch[which]


def first_batch(trainer: Trainer, stage: Stage, sampler: type) -> Any:
    """Return the first batch of the first loader of a stage."""
    ask = getattr(trainer.module, "get_train_dataloader" if stage is Stage.TRAIN else f"get_{stage.value}_dataloaders")
    loaders = ask(sampler=sampler, batch_size=trainer.options.val_batch_size)
    return next(iter(next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders))


class Method(torch.nn.Module):
    """A method of a module as a module."""

    def __init__(self, owner: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.owner, self.name = owner, name

    def forward(self, *args: Any, **keywords: Any) -> Any:
        """Call it."""
        return getattr(self.owner, self.name)(*args, **keywords)


def stage_of(module: ModuleInterface) -> Stage:
    """Return the first stage of which the module has data, predictions first."""
    for stage in (Stage.PREDICT, Stage.VAL):
        name = f"get_{stage.value}_dataloaders"
        if getattr(type(module), name) is not getattr(ModuleInterface, name):
            return stage
    return Stage.TRAIN


def write_graph(
    new: Path,
    forms: Sequence[str],
    net: torch.nn.Module,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    dynamic: bool,
) -> None:
    """Write the graph of a net, and compare what it computes with the net, for other sizes of a batch too."""
    several = sized(args, 2), sized(keywords, 2)
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    if dynamic:
        args, keywords = several  # one of one sample would be taken for a constant
        for tensor in {id(one): one for one in tensors_in((args, keywords)) if one.ndim}.values():
            shapes[tensor] = {0: torch.export.Dim("batch")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporters warn of their own calls
        shape_of = shapes.dynamic_shapes(net, args, keywords) if dynamic else None  # type: ignore[no-untyped-call]
        exported = torch.export.export(net, args, keywords, dynamic_shapes=shape_of)
        examples = [(args, keywords), (sized(args, 3), sized(keywords, 3))] if dynamic else [(args, keywords)]
        if "pt2" in forms:
            torch.export.save(exported, new / FILES["pt2"])
            compare("pt2", torch.export.load(new / FILES["pt2"]).module(), net, examples)
        if "onnx" in forms:
            program = torch.onnx.export(exported, dynamo=True, verbose=False)
            assert program is not None
            program.save(new / FILES["onnx"])
            if importlib.util.find_spec("onnxruntime") is not None:
                compare("onnx", program, net, examples)
            else:
                log.warning("export: the ONNX model was not compared with the net, as onnxruntime is not installed")


def sized(value: Any, size: int) -> Any:
    """Return inputs with the first `size` samples, repeated where there are fewer."""
    if torch.is_tensor(value):
        return torch.cat([value.cpu()] * (size // max(len(value), 1) + 1))[:size] if value.ndim else value.cpu()
    if isinstance(value, Mapping):
        return {key: sized(one, size) for key, one in value.items()}
    return type(value)(sized(one, size) for one in value) if isinstance(value, (tuple, list)) else value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of inputs or outputs."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(one)


def compare(form: str, exported: Any, net: torch.nn.Module, examples: Sequence[tuple[Any, Any]]) -> None:
    """Compare what an exported net computes.

    Raises:
        ValueError: it is something else.
    """
    for args, keywords in examples:
        expected, got = list(tensors_in(net(*args, **keywords))), list(tensors_in(exported(*args, **keywords)))
        far = [
            (one.double() - other.double()).abs().max().item()
            for one, other in zip(expected, got, strict=True)
            if one.numel()
        ]
        largest = max((one.double().abs().max().item() for one in expected if one.numel()), default=0.0)
        if not max(far, default=0.0) <= 1e-3 * max(largest, 1e-6):
            raise ValueError(
                f"export.to={form}: the exported net computes something else than the net, by {max(far):.3g} where its "
                f"largest output is {largest:.3g}; it may branch on values, or draw at random"
            )
