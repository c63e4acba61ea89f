"""Run a step of the module as one stage: what other stages compute is left out, what comes from them is put in.

The module's own code runs from its beginning. Until the stage begins, modules of earlier stages give tensors without
values (on the meta device), so that whatever depends on them has none either and cannot be mistaken for a number.
Where the stage begins, its first module gets what the stage before has sent; where the next one begins, the step ends.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from hookline import set_seed
from hookline_pipeline.absent import is_absent

META = torch.device("meta")
LIKE = {f"{kind}{like}" for kind in ("rand", "randn", "randint") for like in ("", "_like")}
IN_PLACE = {
    f"{kind}_" for kind in ("random", "normal", "uniform", "bernoulli", "exponential", "log_normal", "geometric")
}
DRAWS = LIKE | IN_PLACE | {"randperm", "normal", "bernoulli", "poisson", "multinomial"}


class Cut(Exception):
    """Ends a step where the next stage begins, with the tensors that go to it."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.tensors = tensors


class Made(NamedTuple):
    """What one call of a module has made, without values."""

    outputs: Any
    attributes: list[tuple[str, str, bool]]
    """Where it has set tensors: path of a module in it, name, and whether it has put them into a list there."""


class Pass:
    """One step as one stage.

    Args:
        stage: which.
        received: the tensors of the stage before; none for the first.
        made: what the modules of earlier stages have made, by name and call.
        seed: what random numbers are drawn from once the stage begins.
        keeps: whether to add to `made` what modules of this stage make.
    """

    def __init__(
        self,
        stage: int,
        received: Sequence[torch.Tensor],
        made: dict[str, list[Made]],
        seed: int,
        keeps: bool,
    ) -> None:
        self.stage, self.received, self.made, self.seed, self.keeps = stage, received, made, seed, keeps
        self.inside = stage == 0  # whether the stage has begun
        self.calls: Counter[str] = Counter()  # of modules that are left out


class Staged(torch.nn.Module):
    """A model of which a rank runs some stages: as the whole where no pass is under way.

    Args:
        model: with the parameters of this rank's stages.
        name: of the user's module, for messages.
        names: of the modules at which the stages behind the first begin.
    """

    def __init__(self, model: torch.nn.Module, name: str, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.name, self.names = model, name, list(names)
        self.current: Pass | None = None
        self.left_out: list[str] = []
        """The names of modules that run in one stage alone, each with a dot behind it."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the parameters that this rank has."""
        for name, weight in super().named_parameters(*args, **kwargs):
            if not is_absent(weight):
                yield name, weight

    def forward(self, *args: Any, **given: Any) -> Any:
        """Run the model; in a pass return what goes to the next stage, of the last what the step returned.

        Raises:
            ValueError: the step does not go through the stages in their order, or around one of them.
        """
        current = self.current
        if current is None:
            return self.model(*args, **given)
        with Shapes(current) if current.stage else contextlib.nullcontext():
            try:
                outputs = self.model(*args, **given)
            except (RuntimeError, NotImplementedError) as error:
                if current.stage and "meta" in str(error):
                    error.add_note(around("what was computed there", self.names[current.stage - 1]))
                if "DTensor" in str(error):
                    error.add_note(
                        f"pipeline: parameters of other stages are not here, in stage {current.stage}; a parameter is "
                        f"of the stage that begins last ahead of it in {self.name}, and is used in that stage alone"
                    )
                raise
        if isinstance(outputs, Cut):
            return outputs.tensors
        step = f"{self.name}.{given['stage'].value}_step"
        if current.stage < len(self.names) or not current.inside:
            missing = self.names[current.stage if current.inside else current.stage - 1]
            raise ValueError(f"pipeline: {step} has returned without a call of {missing}, where a stage begins")
        self.refuse_missing(f"what {step} returns", tree_flatten(outputs)[0])
        return outputs

    def refuse_missing(self, what: str, values: Sequence[Any]) -> None:
        """Refuse values that depend on what another stage has.

        Raises:
            ValueError: there is one.
        """
        assert self.current is not None
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in values):
            raise ValueError(around(what, self.names[self.current.stage - 1]))

    # What stands in the model ---------------------------------------------------------

    def take_hold(self, module: torch.nn.Module, stages: Mapping[str, int]) -> None:
        """Let the model end where a stage does, and leave out modules of other stages.

        Args:
            module: the user's, which the model calls.
            stages: by the name of each parameter and buffer.
        """
        for stage, name in enumerate(self.names, 1):
            begin = self._beginning(stage, name)
            module.get_submodule(name).register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
        self._leave_out(module, "", stages)
        whole = module.forward

        def forward(*args: Any, **given: Any) -> Any:
            try:
                return whole(*args, **given)
            except Cut as cut:
                return cut

        module.forward = forward  # here, so that hooks of the module see an end

    def _beginning(self, stage: int, name: str) -> Callable[..., Any]:
        def begin(_: Any, args: Any, kwargs: Any) -> Any:
            current = self.current
            if current is None or stage < current.stage:
                return None
            if stage > current.stage:
                if not current.inside or stage > current.stage + 1:
                    raise ValueError(f"pipeline: {name} is called ahead of a module at which an earlier stage begins")
                leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
                self.refuse_missing(f"what goes to {name}", leaves)
                raise Cut(tuple(leaf.contiguous() for leaf in leaves))
            if current.inside:
                raise ValueError(f"pipeline: {name}, where a stage begins, is called twice in one step")
            current.inside = True
            set_seed(current.seed)
            return self._put_in(name, (args, kwargs))

        return begin

    def _put_in(self, name: str, given: Any) -> Any:
        """Return arguments with the tensors that the stage before has sent."""
        assert self.current is not None
        received = list(self.current.received)
        leaves, form = tree_flatten(given)
        if len(received) != sum(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise ValueError(f"pipeline: {name} gets another number of tensors in one stage than in the next")
        return tree_unflatten([received.pop(0) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], form)

    def _leave_out(self, module: torch.nn.Module, prefix: str, stages: Mapping[str, int]) -> None:
        """Have the outermost modules with parameters of one stage alone do nothing in others.

        One that has nothing but buffers may be called in any stage, and is left out where it gets no values.
        """
        weights = {stages[prefix + name] for name, _ in module.named_parameters(remove_duplicate=False)}
        only_buffers = not weights
        if only_buffers:
            weights = {stages[prefix + name] for name, _ in module.named_buffers(remove_duplicate=False)}
        if not weights:
            return
        if len(weights) > 1 or not prefix:
            for name, child in module.named_children():
                self._leave_out(child, f"{prefix}{name}.", stages)
            return
        stage, compute, name = weights.pop(), module.forward, prefix[:-1]
        self.left_out += [] if only_buffers else [prefix]

        def forward(*args: Any, **kwargs: Any) -> Any:
            current = self.current
            if current is None or (stage == current.stage and not current.keeps):
                return compute(*args, **kwargs)
            if only_buffers and stage != current.stage:
                leaves = tree_flatten((args, kwargs))[0]
                if not any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
                    return compute(*args, **kwargs)
            if stage > current.stage:
                raise ValueError(
                    f"pipeline: {name} is called in stage {current.stage}, and belongs to stage {stage}, the last that "
                    f"begins ahead of it in {self.name}: create modules in the order in which they are called, or "
                    "begin the stage at another module"
                )
            made = current.made.setdefault(name, [])
            if stage == current.stage:
                before = attributes_of(module)
                outputs = compute(*args, **kwargs)
                made.append(Made(tree_map_only(torch.Tensor, without_values, outputs), changed(module, before)))
                return outputs
            call = current.calls[name]
            current.calls[name] += 1
            if call >= len(made):
                raise ValueError(
                    f"pipeline: {name} is called in stage {current.stage}, behind the end of its own, stage {stage}: "
                    "create modules in the order in which they are called, or begin the stage at another module"
                )
            for path, attribute, in_list in made[call].attributes:
                nothing = torch.empty((), device=META)
                setattr(module.get_submodule(path), attribute, [nothing] if in_list else nothing)
            return made[call].outputs

        module.forward = forward


def attributes_of(module: torch.nn.Module) -> dict[tuple[str, str], tuple[Any, int]]:
    """Return the attributes of a module and those in it, but for what torch keeps there."""
    return {
        (path, name): (value, len(value) if isinstance(value, list) else 0)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if not name.startswith("_")
    }


def changed(module: torch.nn.Module, before: Mapping[tuple[str, str], tuple[Any, int]]) -> list[tuple[str, str, bool]]:
    """Return where tensors have come to since `attributes_of`."""
    found = []
    for place, (value, size) in attributes_of(module).items():
        was, length = before.get(place, (None, 0))
        if (value is not was or size != length) and any(torch.is_tensor(leaf) for leaf in tree_flatten(value)[0]):
            found.append((*place, isinstance(value, list)))
    return found


class Shapes(TorchFunctionMode):
    """Until the stage begins, let whatever depends on a tensor without values have none either."""

    def __init__(self, current: Pass) -> None:
        super().__init__()
        self.current = current

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with shapes alone where an argument has no more.

        Raises:
            ValueError: a tensor with values would get some without in place; stages would draw other random numbers.
        """
        kwargs = kwargs or {}
        if self.current.inside:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        name = getattr(func, "__name__", "")
        if not any(tensor.is_meta for tensor in tensors):
            if name in DRAWS and self.current.calls:
                raise ValueError(
                    f"pipeline: the step draws random numbers ({name}) behind a module of an earlier stage, where "
                    "each stage has others: draw them ahead of the first module, where all stages have the same"
                )
            return func(*args, **kwargs)
        if not tensors[0].is_meta and (name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))):
            raise ValueError(around(f"what {name} changes in place", "the module at which the stage begins"))
        args, kwargs = tree_map_only(torch.Tensor, without_values, (args, kwargs))
        args, kwargs = tree_map_only(torch.device, lambda _: META, (args, kwargs))
        return func(*args, **kwargs)


def form_of(tree: Any) -> str | None:
    """Return the shapes of tensors and whole numbers of a tree as text; None where it has what is no plain value."""
    leaves, form = tree_flatten(tree)
    said: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            said.append((tuple(leaf.shape), str(leaf.dtype)))
        elif leaf is None or isinstance(leaf, (int, float, str, bytes)):
            said.append(leaf if isinstance(leaf, int) else type(leaf).__name__)
        else:
            return None
    return f"{form}: {said}"


def without_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape on the meta device."""
    return tensor if tensor.is_meta else torch.empty(tensor.shape, dtype=tensor.dtype, device=META)


def around(what: str, name: str) -> str:
    """Return the message for what goes around the beginning of a stage."""
    return (
        f"pipeline: {what} depends on an earlier stage in another way than through the arguments of {name}, which "
        "alone are sent: give it along as an argument, or begin the stage at another module"
    )
