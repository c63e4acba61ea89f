"""One optimizer step of a run, simulated as rank 0 of any number: what it holds in memory and what it sends.

The trainer's own loop runs with all its plugins over tensors that have shapes and no values (`FakeTensor`), in a
process group whose collectives do nothing. Whole numbers keep their values: places in a mesh, indices, lengths.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

from hookline import Stage, Trainer, config, instantiate, set_seed
from hookline_simulate.clock import Clock, Speeds
from hookline_simulate.shapes import Shapes, bytes_of
from hookline_simulate.step import NO_VALUES, Simulated, Simulation, told
from hookline_simulate.world import Plan, World

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


def simulate(loaded: DictConfig, world: World, speeds: Speeds) -> Plan:
    """Simulate a step of a configuration on devices of these speeds.

    Raises:
        ValueError: the configuration cannot run in this world.
    """
    found, mode = Plan(world, speeds=str(speeds)), Shapes(world, Clock(speeds, world))
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


def _build(loaded: DictConfig, mode: Shapes, simulation: Any, folder: str) -> Trainer:
    """Return the trainer of a configuration, its module without values from the beginning, however large it is."""
    tree = config.resolve(loaded)
    options = {**tree["trainer"], **LEFT_OUT, "runs_folder": folder, "epochs": tree["trainer"]["epochs"] or 1}
    set_seed(options["seed"])

    def without_values(module: Any, name: str, parameter: Any) -> Any:
        return parameter if torch.nn.parameter.is_lazy(parameter) else mode.emptied(parameter)

    def make() -> Any:
        handle = register_module_parameter_registration_hook(without_values)
        try:
            module = instantiate(tree["module"], "module")
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
        if getattr(plugin, "observer", False) is True:
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
        _tell_time(mode, found)


def _tell_time(mode: Shapes, found: Plan) -> None:
    """Say how long the step takes; the model's own FLOPs are three times those of its forward, as MFU counts them."""
    clock = mode.clock
    sending, exposed = (sum(getattr(one, name) for one in found.collectives) for name in ("seconds", "exposed"))
    found.time = {"computation": clock.computing, "communication": sending, "exposed": exposed, "step": clock.now}
    found.flops = {"step": clock.flops, "model": min(3 * clock.of_forward, clock.flops)}
    found.mfu = found.flops["model"] / (clock.speeds.half * clock.now) if clock.now else 0.0


def _is_ours(error: BaseException) -> bool:
    *_, last = traceback.walk_tb(error.__traceback__)
    return isinstance(error, ValueError) and last[0].f_globals.get("__name__", "").startswith("hookline")


def _mesh_of(parameter: DTensor) -> str:
    mesh = parameter.device_mesh
    names = mesh.mesh_dim_names or [f"dimension {number}" for number in range(mesh.ndim)]
    return " x ".join(f"{name} {size}" for name, size in zip(names, mesh.shape, strict=True))
