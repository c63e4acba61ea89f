"""Split single layers of a model over ranks (tensor and sequence parallel), by a plan: styles by names of modules."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import itertools
import logging
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from hookline import CallbackInterface, hookimpl, instantiate

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

DIMENSION = "tensor"  # of the mesh
LAYOUTS = {"whole": Replicate(), "sequence": Shard(1), "features": Shard(-1), "logits": Shard(-1)}
STYLE = re.compile(r"(column|row|sequence|input|output)(?: from (\w+))?(?: to (\w+))?")
SAID, MOVED = (None, "whole", "sequence", "features"), ("whole", "sequence", "features")
KINDS: dict[str, set[Any]] = {  # from what and to what each may be said to be
    "column": set(itertools.product(SAID, (*SAID, "logits"))),
    "row": set(itertools.product(SAID, SAID)),
    "sequence": {(None, None)},
    "input": set(itertools.permutations(MOVED, 2)),
    "output": set(itertools.permutations(MOVED, 2)),
}
OFFERED = (
    "'column', 'row', 'sequence', 'input from X to Y', 'output from X to Y', the first two also with 'from X' or 'to "
    "Y', where X and Y are whole, sequence or features (Y of a column also logits), and styles of torch"
)
HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads", "num_key_value_heads", "num_kv_heads")
SAME = 1e-2  # by how much of themselves gradients of two ranks may differ that compute the same in another order

log = logging.getLogger("hookline.tp")


@dataclass(eq=False)
class Tp(CallbackInterface):
    """Split layers over ranks that work on the same data, each with a part of the features or of the sequence."""

    size: int = 0
    """How many ranks split a layer between them, neighbours; 0 for all."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Styles by names of modules, in which `*` stands for one part of a name; else what `get_tp_plan()` of the module
    answers."""

    requires = ("distributed",)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"tp.size={self.size} must be a number of ranks, or 0 for all")
        self._own = {
            name: style if isinstance(style, str) else instantiate(style, f"tp.plan.{name}")
            for name, style in self.plan.items()
        }
        for name, style in self._own.items():
            read_style(style, f"tp.plan: {name!r}")
        self._mesh: Any = None
        self._compared = False

    # Ranks ----------------------------------------------------------------------------

    def _size_of(self, trainer: Trainer) -> int:
        return 1 if trainer.world_size == 1 else self.size or trainer.world_size

    @hookimpl
    def get_share(self, trainer: Trainer) -> tuple[int, int]:
        size = self._size_of(trainer)
        if trainer.world_size % size:
            raise ValueError(f"tp.size={size} does not divide the {trainer.world_size} ranks")
        return trainer.rank // size, trainer.world_size // size

    @hookimpl(wrapper=True, optionalhook=True)  # of distributed, which may be the later one to come
    def get_mesh_shape(self, trainer: Trainer) -> Generator[None, dict[str, int], dict[str, int]]:
        shape = yield
        return {**shape, DIMENSION: self._size_of(trainer)}

    # The model ------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run(self, trainer: Trainer) -> Generator[None, bool, bool]:
        texts = [style for style in self._styles(trainer.module).values() if isinstance(style, str)]
        with losses_of_parts() if any("to logits" in text for text in texts) else contextlib.nullcontext():
            return (yield)

    def _styles(self, module: torch.nn.Module) -> Mapping[str, Any]:
        if self._own or not hasattr(module, "get_tp_plan"):
            return self._own
        return module.get_tp_plan()  # type: ignore[no-any-return, operator]

    @hookimpl
    def split_model(self, trainer: Trainer, model: torch.nn.Module) -> torch.nn.Module:
        size = self._size_of(trainer)
        chosen = choose(self._styles(trainer.module), model, size)
        if size == 1:
            return model
        if not chosen:
            raise ValueError(
                f"tp has no plan: give tp.plan, or {type(trainer.module).__name__} a method get_tp_plan() that answers "
                "one, such as {'blocks.*.up': 'column', 'blocks.*.down': 'row'}"
            )
        if trainer.shares > 1 and not trainer.plugins.performers("shard_model"):
            raise ValueError(
                f"tp.size={size} leaves {trainer.shares} models over the {trainer.world_size} ranks, and no plugin "
                "makes one of them: add fsdp, or set tp.size=0 for all ranks"
            )
        self._mesh = trainer.hook.get_mesh(trainer=trainer)[DIMENSION]
        begins = [*model.parameters(), *model.buffers()]  # modules that were built apart may begin apart
        trainer.hook.broadcast(trainer=trainer, tensors=begins)
        split(model, self._mesh, chosen)
        log.info("tp: %d modules over %d ranks", len(chosen), size)
        return model

    # The step -------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def call_model(self) -> Generator[None, Any, Any]:
        """Put outputs together that are in parts: the loss of parts of the logits, above all."""
        return whole((yield))

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer: Trainer, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Sum up what ranks know of the gradients of weights that all have, before anyone looks at them."""
        if self._mesh is None:
            return
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    gradient = weight.grad
                    if isinstance(gradient, DTensor) and gradient.placements != weight.placements:
                        weight.grad = gradient.redistribute(placements=weight.placements)
        if not self._compared:
            self._compare(trainer)
            self._compared = True

    def _compare(self, trainer: Trainer) -> None:
        """Look once whether weights that are not split have the same gradients on all ranks, which nothing sums up.

        Raises:
            ValueError: which have others.
        """
        others: list[str] = []
        for name, weight in trainer.module.named_parameters():
            names = weight.device_mesh.mesh_dim_names if isinstance(weight, DTensor) else ()
            if weight.grad is None or DIMENSION in (names or ()):
                continue
            own = here(weight.grad)
            first = own.clone()
            dist.broadcast(first, group=self._mesh.get_group(), group_src=0)
            if (own - first).norm() > SAME * first.norm():
                others.append(name)
        found = sorted({name for names in trainer.hook.all_gather(trainer=trainer, value=others) for name in names})
        if found:
            raise ValueError(
                f"ranks that split layers have other gradients of {', '.join(found)}: these are not in the plan, and "
                "see a part of the features or of the sequence alone. Name their modules in tp.plan ('sequence' for a "
                "norm), or put together what comes to them ('input from sequence to whole')"
            )

    @hookimpl(wrapper=True)
    def step_optimizer(self, optimizer: torch.optim.Optimizer) -> Generator[None, bool, bool]:
        """Have weights that ranks share in several ways stepped apart: torch does not step a list of both at once."""
        groups = optimizer.param_groups
        if self._mesh is None or not all("foreach" in group for group in groups):  # such as step each weight by itself
            return (yield)
        finer = [{**group, "params": weights} for group in groups for weights in by_mesh(group["params"])]
        optimizer.param_groups = finer
        try:
            return (yield)
        finally:
            optimizer.param_groups = groups

    # Export ---------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        state = yield
        return {name: whole(value).cpu() if isinstance(value, DTensor) else value for name, value in state.items()}


# The plan -----------------------------------------------------------------------------


class Style(NamedTuple):
    """What a text in a plan says: the kind, and from what and to what, None where it does not say."""

    kind: str
    before: str | None
    behind: str | None


def read_style(style: Any, where: str) -> Style | ParallelStyle:
    """Return what a text says, or the object of torch that was given in place of one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(style, ParallelStyle):
        return style
    match = STYLE.fullmatch(style) if isinstance(style, str) else None
    said = Style(*match.groups()) if match else None
    if said is None or said[1:] not in KINDS[said.kind]:
        raise ValueError(f"{where}: {style!r} is no style; there are {OFFERED}")
    return said


def choose(styles: Mapping[str, Any], model: torch.nn.Module, size: int) -> dict[str, Any]:
    """Return what is to be done with a model by the full names of its modules.

    Raises:
        ValueError: a name is that of no module, a module has two styles, or one that does not fit it.
    """
    modules = dict(model.named_modules())
    chosen: dict[str, Any] = {}
    named_by: dict[str, str] = {}
    for pattern, given in styles.items():
        style = read_style(given, f"tp.plan: {pattern!r}")
        found = [name for name in modules if name and matches(pattern, name)]
        if not found:
            near = difflib.get_close_matches(pattern, filter(None, modules), n=3, cutoff=0.0)
            raise ValueError(f"tp.plan names {pattern!r}, and the model has no such module; near it: {', '.join(near)}")
        for name in found:
            if name in named_by:
                raise ValueError(f"tp.plan: {name!r} is meant by {named_by[name]!r} and by {pattern!r}; name it once")
            named_by[name] = pattern
            if isinstance(style, Style):
                check(name, style, modules, size)
            chosen[name] = style
    return chosen


def matches(pattern: str, name: str) -> bool:
    """Tell whether a name has the parts that a pattern asks for."""
    asked, parts = pattern.split("."), name.split(".")
    return len(asked) == len(parts) and all(map(fnmatch.fnmatchcase, parts, asked))


def check(name: str, style: Style, modules: Mapping[str, torch.nn.Module], size: int) -> None:
    """Refuse what cannot be split so.

    Raises:
        ValueError: a module that is no layer of that kind, or numbers that `size` does not divide.
    """
    module = modules[name]
    if style.kind not in ("column", "row"):
        return
    linear = isinstance(module, torch.nn.Linear)
    if not linear and not isinstance(module, torch.nn.Embedding):
        raise ValueError(
            f"tp.plan: {name!r} is a {type(module).__name__}, and '{style.kind}' splits a Linear or an Embedding"
        )
    numbers = {
        ("column", True): "out_features",
        ("row", True): "in_features",
        ("column", False): "embedding_dim",
        ("row", False): "num_embeddings",
    }
    owner = modules[name.rpartition(".")[0]]
    counts = [(module, name, numbers[style.kind, linear])]
    counts += [(owner, name.rpartition(".")[0], heads) for heads in HEADS if linear]
    for counted, where, attribute in counts:
        count = getattr(counted, attribute, None)
        if isinstance(count, int) and count % size:
            raise ValueError(
                f"tp.plan: {name!r} cannot be split by {style.kind} over {size} ranks: {attribute}={count} of "
                f"{where or 'the model'!r} is no multiple of them"
            )


# Splitting ----------------------------------------------------------------------------


def split(model: torch.nn.Module, mesh: Any, chosen: Mapping[str, Any]) -> None:
    """Split the modules that are chosen; weights that were one stay one, and what is frozen stays so.

    Raises:
        ValueError: weights that are one are split in two ways.
    """
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    tied: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(weight), []).append(name)
    for name, style in chosen.items():
        module = model.get_submodule(name)
        if isinstance(style, Style):
            refuse_remainders(name, style, module, mesh.size())
            style = as_torch(style, module)
        parallelize_module(module, mesh, style)
    for first, *others in tied.values():
        weight = model.get_parameter(first)
        weight.requires_grad_(first not in frozen)
        for other in others:
            if layout(model.get_parameter(other)) != layout(weight):
                raise ValueError(
                    f"{first} and {other} are one weight, and tp.plan splits them in two ways: give both modules such "
                    "styles that it is split alike ('row' for an Embedding, 'column' for the Linear), or none"
                )
            owner, _, attribute = other.rpartition(".")
            setattr(model.get_submodule(owner), attribute, weight)


def as_torch(style: Style, module: torch.nn.Module) -> ParallelStyle:
    """Return torch's style for what a text says; all of them take and give plain tensors, but for logits."""
    before, behind = (None if said is None else LAYOUTS[said] for said in style[1:])
    if style.kind == "sequence":
        return SequenceParallel(use_local_output=True)
    if style.kind == "input":
        return PrepareModuleInput(input_layouts=before, desired_input_layouts=behind, use_local_output=True)
    if style.kind == "output":
        assert before is not None
        assert behind is not None
        return PrepareModuleOutput(output_layouts=before, desired_output_layouts=behind)
    if style.kind == "row":
        if before is None and isinstance(module, torch.nn.Embedding):
            before = LAYOUTS["whole"]  # numbers of words have no features
        return RowwiseParallel(input_layouts=before, output_layouts=behind)
    as_parts = style.behind == "logits"
    return ColwiseParallel(input_layouts=before, output_layouts=behind, use_local_output=not as_parts)


def refuse_remainders(name: str, style: Style, module: torch.nn.Module, size: int) -> None:
    """Have a module refuse a sequence that cannot be cut into equal parts, at which ranks would wait for each other."""
    if style.behind != "sequence" or style.before == "sequence":
        return

    def look(whole: Any) -> None:
        length = whole.shape[1]
        if length % size:
            raise ValueError(
                f"tp.plan: {name!r} is to cut a sequence of {length} over {size} ranks, which do not divide it: pad it"
            )

    if style.kind == "output":
        module.register_forward_hook(lambda _, __, output: look(output))
    else:
        module.register_forward_pre_hook(lambda _, inputs: look(inputs[0]))


@contextlib.contextmanager
def losses_of_parts() -> Iterator[None]:
    """Have cross entropy take logits of which ranks have parts."""
    error = None
    with loss_parallel():
        try:
            yield
        except BaseException as raised:  # torch's own would last for ever behind it
            error = raised
    if error is not None:
        raise error


# Parts --------------------------------------------------------------------------------


def here(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def by_mesh(weights: Sequence[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Return weights with those together that are on the same mesh, or on none."""
    together: dict[Any, list[torch.Tensor]] = {}
    for weight in weights:
        together.setdefault(weight.device_mesh if isinstance(weight, DTensor) else None, []).append(weight)
    return together.values()


def layout(tensor: torch.Tensor) -> Any:
    """Return how a tensor is split; None where it is not."""
    return tensor.placements if isinstance(tensor, DTensor) else None


def whole(value: Any) -> Any:
    """Return outputs with those put together of which ranks have parts."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {key: whole(kept) for key, kept in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(whole, value))
    return value
