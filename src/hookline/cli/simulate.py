"""One optimizer step of a run, simulated as rank 0 of any number: what it holds in memory and what it sends.

The trainer's own loop runs with all its plugins over tensors that have shapes and no values (`FakeTensor`), in a
process group whose collectives do nothing. Whole numbers keep their values: places in a mesh, indices, lengths.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import json
import logging
import os
import re
import sys
import tempfile
import traceback
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hookline import config, data
from hookline.cli.layout import table
from hookline.interfaces import CallbackInterface, Stage
from hookline.marks import hookimpl
from hookline.plugins import is_observer
from hookline.randomness import set_seed
from hookline.trainer import Trainer

NO_VALUES = DataDependentOutputException, DynamicOutputShapeException
LEFT_OUT = {  # what would end the simulated run before its step, write into a real run's folder, or need the device
    "device": "cpu",
    "resume": False,
    "max_steps": None,
    "max_train_steps_per_epoch": None,
    "max_time": None,
    "evaluate_every": None,
    "eval_when_start": False,
    "sanity_val_steps": 0,
}
STEPS = 3  # the last is measured: in the first states are made, before the second DDP lays out its gradients anew
SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""How often (n-1)/n of its bytes a rank sends in a collective of n ranks that goes around in a ring."""


class World:
    """So many machines with so many devices each."""

    def __init__(self, text: str) -> None:
        """Read "8x64", or "4" for one machine.

        Raises:
            ValueError: it is neither.
        """
        match = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})", text)
        if match is None:
            raise ValueError(
                f"--world={text} is no world; write MACHINESxDEVICES, e.g. 8x64, or the number of ranks on one machine"
            )
        self.machines, self.devices = int(match[1] or 1), int(match[2])
        self.size = self.machines * self.devices

    def __str__(self) -> str:
        """Return it in words."""
        return f"{self.machines} machine(s) x {self.devices} device(s) = {self.size} rank(s)"

    def where(self, ranks: Iterable[int]) -> str:
        """Return whether ranks are on one machine."""
        return "one machine" if len({rank // self.devices for rank in ranks}) == 1 else "between machines"


class Collective(NamedTuple):
    """All collectives of one kind among so many ranks."""

    kind: str
    ranks: int
    where: str
    calls: int
    bytes: int
    """What is reduced, gathered or scattered, whole."""

    @property
    def sent(self) -> int:
        """What each rank sends of it."""
        return int(SENT[self.kind] * self.bytes * (self.ranks - 1) / self.ranks) if self.kind in SENT else self.bytes


@dataclasses.dataclass
class Plan:
    """What was found of one rank; sizes are in bytes."""

    world: World
    meshes: list[str] = dataclasses.field(default_factory=list)
    batch: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    """Of one step."""
    missing: str = ""
    """Why the step could not be simulated."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "world": {"machines": self.world.machines, "devices": self.world.devices},
            "mesh": self.meshes,
            "batch": self.batch,
            "memory": self.memory,
            "collectives": [collective._asdict() | {"sent": collective.sent} for collective in self.collectives],
            "missing": self.missing,
        }

    def lines(self) -> Iterator[str]:
        """Give it as text."""
        yield f"world: {self.world}"
        yield f"mesh: {'; '.join(self.meshes) or 'none, each rank has the whole model'}"
        if self.batch:
            yield "step: " + ", ".join(f"{number} {what}" for what, number in self.batch.items())
        yield ""
        yield from table(["memory of rank 0", "size"], [[n, readable(s)] for n, s in self.memory.items()], right=[1])
        if self.missing:
            return
        yield ""
        if not self.collectives:
            yield "no communication"
            return
        rows = [
            [one.kind, str(one.ranks), one.where, str(one.calls), readable(one.bytes), readable(one.sent)]
            for one in self.collectives
        ]
        yield from table(["communication of a step", "ranks", "on", "calls", "size", "sent"], rows, right=[1, 3, 4, 5])


def readable(size: int) -> str:
    """Return a number of bytes as one reads it."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):.2f} {unit}"
    return f"{size} B"


# The simulation -----------------------------------------------------------------------


class Simulated(Exception):
    """The step has been simulated, or cannot be; the run ends here."""


def plan(loaded: Any, world: World) -> Plan:
    """Simulate a step of a configuration.

    Raises:
        ValueError: the configuration cannot run in this world.
    """
    found, mode = Plan(world), Shapes(world)
    with _alone(world), tempfile.TemporaryDirectory(prefix="hookline-") as folder, mode.resizes():
        trainer = _build(loaded, mode, Simulation(mode, found), folder)
        if trainer.world_size != world.size:
            raise ValueError(
                f"--world={world.machines}x{world.devices} is {world.size} processes, and no plugin makes one run of "
                "them: name one that does, e.g. `-p ddp`"
            )
        with torch.compiler.set_stance("force_eager"):
            try:
                _run(trainer)
            except Simulated:
                pass
            except Exception as error:
                if not mode.sharded or _is_ours(error):
                    trainer.plugins.blame(error)
                    raise
                found.missing = f"no step could be simulated: {told(error)}"
            _measure(trainer, mode, found)
    return found


def _run(trainer: Trainer) -> None:
    """Train as `trainer.train` does, but tell nobody that what ends it is an exception."""
    about = {"trainer": trainer, "stage": Stage.TRAIN}
    try:
        for error in trainer.plugins.tell_each("on_begin_run", **about, config=trainer.config):
            raise error
        trainer.hook.run(**about)
    finally:
        trainer.plugins.tell_each("on_end_run", **about, status="stopped", reason="simulated")


@contextlib.contextmanager
def _alone(world: World) -> Iterator[None]:
    """Be rank 0 of a world of which there is nobody else."""
    if dist.is_initialized():
        raise ValueError("a plan is made in a process of its own, and this one belongs to a process group already")
    said = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world.size)}
    new_group = dist.new_group

    def new_fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake", "pg_options": None})

    chatty = logging.getLogger("torch._subclasses.fake_tensor")  # of what is raised as well
    with (
        mock.patch.dict(os.environ, said),
        mock.patch.object(dist, "new_group", new_fake_group),
        mock.patch.object(chatty, "disabled", True),
    ):
        if world.size > 1:
            dist.init_process_group("fake", rank=0, world_size=world.size, store=FakeStore())
        try:
            yield
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _build(loaded: Any, mode: Shapes, simulation: Any, folder: str) -> Trainer:
    """Return the trainer of a configuration, its module without values from the beginning, however large it is."""
    tree = config.resolve(loaded)
    options = {**tree["trainer"], **LEFT_OUT, "runs_folder": folder, "epochs": tree["trainer"]["epochs"] or 1}
    set_seed(options["seed"])

    def without_values(module: Any, name: str, parameter: Any) -> Any:
        return parameter if torch.nn.parameter.is_lazy(parameter) else mode.emptied(parameter)

    def make() -> Any:
        handle = register_module_parameter_registration_hook(without_values)
        try:
            module = config.instantiate(tree["module"], "module")
        except NO_VALUES as error:
            raise ValueError(
                f"module: {told(error)}; a plan needs a module that is built without looking at its weights"
            ) from None
        finally:
            handle.remove()
        seen: dict[int, Any] = {}
        for part in module.modules() if isinstance(module, torch.nn.Module) else ():
            for kept in (part._parameters, part._buffers):
                kept.update({name: seen.setdefault(id(tensor), mode.emptied(tensor)) for name, tensor in kept.items()})
        return module

    plugins = {"simulation": simulation, **tree["plugins"]}
    trainer = Trainer(make, plugins=plugins, config=config.masked(loaded), **options)
    for name, plugin in trainer.plugins.listed():
        if is_observer(plugin):
            trainer.plugins.unregister(name=name)  # it shows or keeps what is no run
    return trainer


def _measure(trainer: Trainer, mode: Shapes, found: Plan) -> None:
    """Put together what is known of parameters, gradients and optimizer states, whether there was a step or not."""
    module = trainer.module
    parameters = mode.parameters or list(module.parameters())  # a forward that has failed may have put them together
    found.meshes = list(dict.fromkeys(_mesh_of(p) for p in parameters if isinstance(p, DTensor)))
    if found.missing:
        with mode:
            optimizers = trainer.optimizers or trainer.hook.setup_optimizers(trainer=trainer)[0]
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            for optimizer in optimizers:
                optimizer.step()
        mode.gradients = bytes_of(p.grad for p in parameters if p.grad is not None)
        mode.states = bytes_of(optimizer.state for optimizer in optimizers)
    found.memory = {
        "parameters": bytes_of(parameters),
        "buffers": bytes_of(module.buffers()),
        "gradients": mode.gradients,
        "optimizer states": mode.states,
    }
    if not found.missing:
        if mode.activations is not None:
            found.memory["activations"] = mode.activations
        found.memory["peak"] = mode.peak
        found.collectives = mode.collectives


def _mesh_of(parameter: DTensor) -> str:
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or [f"dimension {number}" for number in range(mesh.ndim)]
    return " x ".join(f"{name} {size}" for name, size in zip(names, mesh.shape, strict=True))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of(tree: Any) -> int:
    """Return the bytes of the tensors in nested containers that this rank has; what is tied counts once."""
    leaves = tree_leaves([dict(kept) if isinstance(kept, Mapping) else kept for kept in tree])
    tensors = {id(leaf): local(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def told(error: BaseException) -> str:
    """Return an error in one line, with the place in the user's code."""
    frames = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not re.match(r"(torch|pluggy|hookline\w*)(\.|$)", name := frame.f_globals.get("__name__", ""))
        and name.partition(".")[0] not in sys.stdlib_module_names
    ]
    where = f" ({frames[-1]})" if frames else ""
    if isinstance(error, NO_VALUES):
        return f"it needs the value of a tensor{where}, and here tensors have none"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}{where}"


def _is_ours(error: BaseException) -> bool:
    *_, last = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and last[0].f_globals.get("__name__", "").startswith("hookline")


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has tensors without values wherever numbers are not whole, and counts what they hold and what is sent."""

    def __init__(self, world: World) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._world = world
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.sharded = self.in_forward = self.counting = False
        self.live = self.peak = self.gradients = self.states = 0
        self.activations: int | None = None
        self.parameters: list[torch.nn.Parameter] = []
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, Any] = {}
        self._counted: dict[tuple[str, int, str], list[int]] = collections.defaultdict(list)

    def emptied(self, value: Any) -> Any:
        """Return a tensor without its values, if its numbers are not whole."""
        has_values = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and not value.is_meta
        if not has_values or not value.is_floating_point():
            return value
        with self, torch.no_grad():
            fake = self._empty(torch.empty_like, value)
            return torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake

    def _empty(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Do an operation without values."""
        with self.fake:
            result = func(*args, **kwargs)
        self.fake.fake_tensor_converter.tensor_memo.clear()  # its references would forbid `module.to(...)`
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do an operation with values where all tensors have them, else without."""
        plain = torch._C._disabled_torch_dispatch_impl
        if any(kind is not FakeTensor and kind.__torch_dispatch__ is not plain for kind in types):
            return NotImplemented  # e.g. a DTensor: what it does with its parts comes by here again
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        empty = any(isinstance(tensor, FakeTensor) for tensor in tensors) or (not tensors and _is_float(func, kwargs))
        if not empty:
            result = func(*args, **kwargs)
        elif func is torch.ops.aten._local_scalar_dense.default and not self.in_forward:
            return {torch.bool: True, torch.int64: 0}.get(tensors[0].dtype, 0.0)  # a flag says that all is well
        elif func is torch.ops.aten._pin_memory.default:
            result = args[0]
        elif func.namespace == "c10d":
            result = _do_nothing(func, args)
        else:
            result = self._empty(func, *args, **kwargs)
        self._note(tensors)
        self._note(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        if self.counting and func.namespace in ("c10d", "_c10d_functional", "_dtensor"):
            self._count(func, args, result)
        return result

    # Memory ---------------------------------------------------------------------------

    def find(self) -> None:
        """Look for what lives already, made while nobody listened: what plugins keep, an average of weights."""
        gc.collect()
        fakes = [found for found in gc.get_objects() if issubclass(type(found), FakeTensor)]
        self._note(fake for fake in fakes if fake.fake_mode is self.fake)

    def _note(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._resized(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._sizes:

            def freed(_: Any) -> None:
                self.live -= self._sizes.pop(key)
                del self._watched[key]

            self._watched[key] = weakref.ref(storage, freed)
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Hear of memory that is given back, or taken again, while its tensor lives on."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if id(storage) in self._sizes:
                self._resized(storage)
                self.peak = max(self.peak, self.live)
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield

    # Communication --------------------------------------------------------------------

    def _count(self, func: Any, args: Any, result: Any) -> None:
        group = next(filter(None, map(_group, args)), None)
        if group is None or "barrier" in func.__name__:
            return
        name = func.__name__.partition(".")[0].strip("_")
        kind = next((known for known in SENT if known.replace("_", "") in name.replace("_", "")), name)
        ranks = dist.get_process_group_ranks(group)
        size = max(bytes_of([part]) for part in (*args[:2], result))  # in and out: one of them is the whole
        self._counted[kind, len(ranks), self._world.where(ranks)] += [size]

    @property
    def collectives(self) -> list[Collective]:
        """What has been counted."""
        return [Collective(*key, len(sizes), sum(sizes)) for key, sizes in self._counted.items()]


def _is_float(func: Any, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether what makes a tensor out of nothing makes one whose numbers are not whole."""
    if torch.device(kwargs.get("device") or "cpu").type == "meta":  # somebody else's shapes
        return False
    dtype = kwargs.get("dtype")
    if dtype is None:
        return not func.__name__.startswith(("arange", "randint", "randperm"))
    return bool(dtype.is_floating_point or dtype.is_complex)


def _do_nothing(func: Any, args: Any) -> Any:
    """Return what a collective returns that has not changed its tensors."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(args[0] if isinstance(args[0], list) else [args[0]])
    work = torch._C._distributed_c10d._create_work_from_future(future).boxed()  # type: ignore[attr-defined]
    return work if len(func._schema.returns) == 1 else (args[0], work)


def _group(argument: Any) -> Any:
    """Return the process group that an argument of a collective names."""
    if isinstance(argument, torch.ScriptObject):
        with contextlib.suppress(RuntimeError):
            return ProcessGroup.unbox(argument)
    if isinstance(argument, str):
        with contextlib.suppress(RuntimeError):
            return _resolve_process_group(argument)  # type: ignore[arg-type]
    return argument if isinstance(argument, dist.ProcessGroup) else None


class Simulation(CallbackInterface):
    """Does a step with what the ones before it have left behind: states, gradients' buffers; and ends the run."""

    def __init__(self, mode: Shapes, found: Plan) -> None:
        self._mode = mode
        self._found = found
        self._before = 0
        self._name = ""

    @hookimpl
    def on_setup(self, trainer: Trainer) -> None:
        self._name = type(trainer.module).__name__  # FSDP gives it another class

    @hookimpl(wrapper=True, tryfirst=True)
    def convert_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def split_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def compile_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def shard_model(self) -> Generator[None, Any, Any]:
        with self._mode:
            model = yield
        self._mode.sharded = True
        return model

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_optimizers(self) -> Generator[None, Any, Any]:
        with self._mode:
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def get_sampler(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        """Have enough samples for this rank, however few there are."""
        sampler = yield
        ours = stage is Stage.TRAIN and issubclass(sampler, data.ResumableSampler)
        return type("AtHand", (AtHand, sampler), {"trainer": trainer}) if ours else sampler

    @hookimpl(wrapper=True, tryfirst=True)
    def train_epoch(self, trainer: Trainer, batches: Iterator[Any]) -> Generator[None, bool, bool]:
        mode, found = self._mode, self._found
        mode.parameters = list(trainer.module.parameters())
        window = trainer.hook.take_window(trainer=trainer, batches=batches)
        found.batch = {
            "samples": trainer.options.train_batch_size,
            "micro-batch(es) a rank": len(window),
            "sample(s) in each": data.count_samples(window[0]) if window else 0,
        }
        if not window:
            found.missing = "no step could be simulated: the training loader gave no batch"
            raise Simulated
        window = tree_map_only(torch.Tensor, mode.emptied, window)
        try:
            with mode:
                for step in range(STEPS):
                    if step == STEPS - 1:
                        mode.find()
                        mode.counting, mode.peak = True, mode.live
                    trainer.advance(window)
                    trainer.training._unsettled = (
                        False  # what is due at a boundary, a vote or a save, is no part of a step
                    )
        except Exception as error:
            what = f"{self._name}.train_step" if mode.in_forward else "the step"
            found.missing = f"{what} could not be simulated: {told(error)}"
            if isinstance(error, NO_VALUES):
                found.missing += "; compute it with tensors alone (torch.where, a mask), or from whole numbers"
        finally:
            mode.counting = False
        raise Simulated
        yield

    @hookimpl(wrapper=True, tryfirst=True)
    def call_model(self) -> Generator[None, Any, Any]:
        self._before, self._mode.in_forward = self._mode.live, True
        answer = yield  # where it raises, that was in the forward
        self._mode.in_forward = False
        return answer

    @hookimpl(wrapper=True, tryfirst=True)
    def run_backward(self) -> Generator[None, bool, bool]:
        mode = self._mode
        mode.activations = max(mode.activations or 0, mode.live - self._before)
        return (yield)

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        gradients = [p.grad for p in trainer.module.parameters() if p.grad is not None]
        self._mode.gradients = max(self._mode.gradients, bytes_of(gradients))

    @hookimpl
    def on_end_optimizer_step(self, trainer: Trainer) -> None:
        self._mode.states = max(self._mode.states, bytes_of(optimizer.state for optimizer in trainer.optimizers))


class AtHand(data.ResumableSampler):
    """Begins the data set anew where it ends too early."""

    trainer: Trainer

    def __iter__(self) -> Iterator[int]:
        """Give indices in order."""
        return (number % self.length for number in range(len(self)) if self.length)

    def __len__(self) -> int:
        """Return how many."""
        return max(super().__len__(), STEPS * self.trainer.window_size * self.trainer.micro_batch_size)


def show(loaded: Any, world: str, as_json: bool) -> int:
    """Print a plan; return the command's exit code: 1 where the step could not be simulated."""
    found = plan(loaded, World(world))
    print(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(found.lines()))
    if found.missing:
        print(f"hookline: {found.missing}", file=sys.stderr)
    return 1 if found.missing else 0
