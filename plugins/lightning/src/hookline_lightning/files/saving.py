"""Checkpoints as files in Lightning's form, written and read without running code."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline.files import make_folder, replacing
from hookline_lightning.files.plain import plain
from hookline_lightning.files.reading import HPARAMS, arguments_of, read
from hookline_lightning.run.bridge import Bridge, call, overridden

log = logging.getLogger("hookline.lightning")

FORMAT = "2.6.0"  # of Lightning, whose keys the files have
RUN = "hookline"  # the key of what a run goes on with


# Writing ----------------------------------------------------------------------------------


def dump(bridge: Bridge, weights_only: bool) -> dict[str, Any]:
    """Return what a checkpoint of Lightning holds of a run; every rank calls it."""
    view, module, core = bridge.view, bridge.module, bridge.trainer
    left_out: list[str] = []
    checkpoint: dict[str, Any] = {
        "epoch": view.current_epoch,
        "global_step": view.global_step,
        "pytorch-lightning_version": FORMAT,
        "state_dict": dict(core.export_model()),
    }
    if not weights_only:
        checkpoint["callbacks"] = {
            str(getattr(one, "state_key", type(one).__qualname__)): state
            for one in view.callbacks
            if (ask := overridden(one, "state_dict")) and (state := ask())
        }
        if not shared(module):  # each rank has a part of them, which is in the run's own checkpoints
            checkpoint["optimizer_states"] = [one.state_dict() for one in view.optimizers]
        checkpoint["lr_schedulers"] = [one.scheduler.state_dict() for one in view.lr_scheduler_configs]
    for thing, key in ((module, HPARAMS), (view.datamodule, f"datamodule_{HPARAMS}")):
        if thing is not None and (hparams := getattr(thing, "hparams", None)):
            checkpoint[key] = plain(hparams, left_out)
            checkpoint[key.replace(HPARAMS, "hparams_name")] = _name_of(thing, hparams)
    if view.datamodule is not None and (ask := overridden(view.datamodule, "state_dict")):
        checkpoint[type(view.datamodule).__qualname__] = ask()
    for callback in view.callbacks if not weights_only else ():
        if save := overridden(callback, "on_save_checkpoint"):
            call(save, view, module, checkpoint)
    if save := overridden(module, "on_save_checkpoint"):
        call(save, checkpoint)
    if left_out:
        core.say_once(
            f"hparams {', '.join(left_out)} are no plain data, and reading them would run code: they are left out of "
            "checkpoints; give them to load_from_checkpoint(path, …=…), or save_hyperparameters(ignore=[…])"
        )
    return checkpoint


def shared(module: torch.nn.Module) -> bool:
    """Tell whether ranks share the weights."""
    return any(hasattr(weight, "device_mesh") for weight in module.parameters())


def _name_of(thing: Any, hparams: Mapping[str, Any]) -> str:
    """Return the argument of `__init__` that takes all parameters as one, or "kwargs" where each is one."""
    takes, more = arguments_of(type(thing))
    wanted = [one.name for one in takes.values() if one.default is one.empty and one.name not in hparams]
    return wanted[0] if len(wanted) == 1 and not more and not hparams.keys() & takes.keys() else "kwargs"


class Files(CallbackInterface):
    """Writes checkpoints as files, and at the next boundary adds what a run needs to go on with them exactly."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self._waiting: dict[Path, dict[str, Any]] = {}

    def write(self, filepath: Any, weights_only: bool | None = None) -> None:
        """Write a file; every rank calls it, rank 0 writes."""
        core, path = self.bridge.trainer, Path(filepath)
        checkpoint = dump(self.bridge, bool(weights_only))
        if core.rank == 0:
            whole = not weights_only and core.world_size == 1 and bool(core.optimizers)
            if whole and core.status != "running":
                checkpoint[RUN] = core.hook.get_run_state(trainer=core)
            elif whole and self.bridge.word == "fit":
                self._waiting[path] = checkpoint
            write(path, checkpoint)
        self.bridge.view.strategy.barrier("save_checkpoint")

    @hookimpl(trylast=True)
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        self._complete(trainer)

    @hookimpl(trylast=True)
    def on_end_run(self, trainer: hookline.Trainer, status: str) -> None:
        if status != "failed":  # what was written behind the last boundary
            self._complete(trainer)
        self._waiting = {}

    def _complete(self, trainer: hookline.Trainer) -> None:
        waiting, self._waiting = self._waiting, {}
        there = {path: one for path, one in waiting.items() if path.exists()}
        if there:
            state = trainer.hook.get_run_state(trainer=trainer)
            for path, checkpoint in there.items():
                write(path, {**checkpoint, RUN: state})


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    make_folder(path.parent)
    with replacing(path) as new:
        torch.save(checkpoint, new)


# Going on ---------------------------------------------------------------------------------


def found(ckpt_path: Any, writer: Any) -> str | bool | Path:
    """Return what to go on with: a run, or a file."""
    if ckpt_path == "last":
        return True
    if ckpt_path == "hpc":
        raise ValueError('ckpt_path="hpc": a run that a cluster has cut goes on by ckpt_path="last" (plugin signals)')
    if ckpt_path == "best":
        ckpt_path = getattr(writer, "best_model_path", "")
        if not ckpt_path:
            raise ValueError(
                'ckpt_path="best": no ModelCheckpoint of this trainer has written a best file; fit before, or give '
                "its path"
            )
    path = Path(ckpt_path)
    if not path.exists():
        raise ValueError(
            f'ckpt_path={str(ckpt_path)!r} is not there: say "last", "best", a file, or the folder of a run or of '
            "a checkpoint of it"
        )
    return str(path) if path.is_dir() else path


class FromFile(CallbackInterface):
    """Begins a run with what a file holds: a training all of it, an evaluation the weights.

    Args:
        path: of the file.
        weights_only: as `read` takes it.
    """

    def __init__(self, path: Path, weights_only: bool | None = None) -> None:
        self.path, self.checkpoint = path, read(path, "cpu", weights_only)

    def require(self, world_size: int) -> None:
        """Refuse to train on with a file that a run cannot go on with.

        Raises:
            ValueError: and what to do instead.
        """
        if RUN not in self.checkpoint:
            raise ValueError(
                f'ckpt_path={str(self.path)!r} has weights and no state that a run goes on with: say "last" for the '
                "newest run, or take the weights alone by Model.load_from_checkpoint(path) and fit without ckpt_path"
            )
        if world_size > 1:
            raise ValueError(
                f'ckpt_path={str(self.path)!r} has the state of one process, and there are {world_size}: say "last"'
            )

    @hookimpl(wrapper=True)
    def find_state(self) -> Generator[None, Mapping[str, Any], Mapping[str, Any]]:
        found = yield
        state = self.checkpoint.get(RUN)
        return state["trainer"] if state is not None else found

    @hookimpl(wrapper=True)
    def restore(self, trainer: hookline.Trainer, stage: Stage) -> Generator[None, bool, bool]:
        done = yield
        module: Any = trainer.module.module
        if stage is Stage.TRAIN:
            self.require(trainer.world_size)
            trainer.hook.set_run_state(trainer=trainer, state=self.checkpoint[RUN], stage=stage)
            return True
        if load := overridden(module, "on_load_checkpoint"):
            call(load, self.checkpoint)
        weights = self.checkpoint["state_dict"]
        if shared(module):
            state = {"module": {f"module.{name}": weight for name, weight in weights.items()}}
            trainer.hook.set_run_state(trainer=trainer, state={**state, "optimizers": [], "plugins": {}}, stage=stage)
        else:
            module.load_state_dict(weights, strict=getattr(module, "strict_loading", True))
        return done
