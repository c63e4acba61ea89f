"""What saving and restoring a module and Adam's state of it costs, beside `torch.save` and `torch.load`.

    python -m benchmarks.peers.saving accelerate 1000 FOLDER

Each does what its documentation shows, in turns with `torch.save`, and each file is then flushed to the disk by
`os.sync`: the time till a save returns, and till it is on the disk. Restoring ends with the values in a module and an
optimizer. The page cache is warm. Prints one object of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.checkpoint import Clock, Large
from benchmarks.peers.measure import path_of
from benchmarks.peers.work import silence

ROUNDS = 2
WITHOUT = {
    "transformers": "saves its own kind of module alone",
    "ignite": "saves by `torch.save`",
    "torchtnt": "its checkpoints need torchsnapshot",
    "skorch": "saves by `torch.save`",
    "pytorch_accelerated": "saves by `torch.save`",
    "keras": "does not save the state of a torch network",
}

Seconds = tuple[float, float, float]
"""Of a save till it returns, of the same till it is on the disk, of restoring."""


def stepped(module: Large) -> torch.optim.Optimizer:
    """Return an optimizer that has a state, as after a step."""
    optimizer = torch.optim.Adam(module.parameters())
    module.train_step(0, None, None).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def around(save: Callable[[], Any], restore: Callable[[], Any]) -> Seconds:
    os.sync()
    returned = timed(save)
    flushed = timed(os.sync)
    return returned, returned + flushed, timed(restore)


def by_hand(megabytes: int, folder: Path) -> Seconds:
    module = Large(megabytes)
    optimizer = stepped(module)

    def restore() -> None:
        given = torch.load(folder / "state.pt", weights_only=True)
        module.load_state_dict(given["module"])
        optimizer.load_state_dict(given["optimizer"])

    states = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    return around(lambda: torch.save(states, folder / "state.pt"), restore)


def dcp(megabytes: int, folder: Path) -> Seconds:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    module = Large(megabytes)
    optimizer = stepped(module)

    def save() -> None:
        states = dict(zip(("module", "optimizer"), get_state_dict(module, optimizer), strict=True))
        checkpoint.save(states, checkpoint_id=folder / "dcp")

    def restore() -> None:
        states = dict(zip(("module", "optimizer"), get_state_dict(module, optimizer), strict=True))
        checkpoint.load(states, checkpoint_id=folder / "dcp")
        set_state_dict(module, optimizer, model_state_dict=states["module"], optim_state_dict=states["optimizer"])

    return around(save, restore)


def accelerate(megabytes: int, folder: Path) -> Seconds:
    from accelerate import Accelerator

    accelerator, module = Accelerator(cpu=True), Large(megabytes)
    accelerator.prepare(module, stepped(module))
    place = str(folder / "accelerate")
    return around(lambda: accelerator.save_state(place), lambda: accelerator.load_state(place))


def fabric(megabytes: int, folder: Path) -> Seconds:
    from lightning.fabric import Fabric

    whole = Fabric(accelerator="cpu", devices=1)
    module, optimizer = whole.setup(plain := Large(megabytes), stepped(plain))
    states, place = {"module": module, "optimizer": optimizer}, folder / "fabric.ckpt"
    return around(lambda: whole.save(place, states), lambda: whole.load(place, states))


def lightning(megabytes: int, folder: Path) -> Seconds:
    """Save from a callback; restoring is what a run takes longer to its first step when it goes on."""
    import lightning as framework

    place = folder / "lightning.ckpt"

    class Module(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.began, self.seconds = Large(megabytes), 0.0, (0.0, 0.0)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.large.train_step(0, batch, None)

        def on_train_start(self) -> None:
            self.began = time.perf_counter()
            assert self.trainer.global_step == place.exists(), "the checkpoint was not restored"

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not place.exists():
                self.seconds = around(lambda: self.trainer.save_checkpoint(place), lambda: None)[:2]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    def run(module: Module, steps: int, **options: Any) -> float:
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = framework.Trainer(accelerator="cpu", devices=1, max_steps=steps, enable_model_summary=False, **off)
        begin = time.perf_counter()
        trainer.fit(module, Large(0).get_train_dataloader(object, 1), **options)
        return module.began - begin

    first = Module()
    fresh = run(first, 1)
    return *first.seconds, run(Module(), 2, ckpt_path=place) - fresh


def hookline(megabytes: int, folder: Path) -> Seconds:
    """Save by the plugin, which flushes; restoring is what a run takes longer to its first step when it goes on."""
    from hookline import Trainer
    from hookline_checkpoint import Checkpoint

    def run(steps: int, **options: Any) -> tuple[float, float]:
        module, clock = Large(megabytes), Clock()
        plugins = {"clock": clock, "checkpoint": Checkpoint("1 step", keep_last=1)}
        trainer = Trainer(module, plugins, max_steps=steps, device="cpu", runs_folder=str(folder), **options)
        begin = time.perf_counter()
        trainer.train()
        (saved,) = clock.seconds  # two, if nothing were restored
        return clock.began - begin, saved

    os.sync()
    fresh, saved = run(1)
    flushed = timed(os.sync)
    resumed, _ = run(2, resume=True)
    return saved, saved + flushed, resumed - fresh


WAYS = {
    "hookline": hookline, "by_hand": by_hand, "dcp": dcp, "accelerate": accelerate, "fabric": fabric,
    "lightning": lightning,
}  # fmt: skip


def main(name: str, megabytes: int, within: Path) -> None:
    found: dict[str, list[Seconds]] = {"by_hand": [], name: []}
    stored = 0
    for _ in range(ROUNDS + 1):
        for way in dict.fromkeys(("by_hand", name)):
            folder = within / way
            folder.mkdir()
            with silence():
                found[way].append(WAYS[way](megabytes, folder))
            stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            shutil.rmtree(folder)
    figures = {"bytes": stored}
    for number, what in enumerate(("save", "on_disk", "restore")):
        hand, own = ([seconds[number] for seconds in found[way][1:]] for way in ("by_hand", name))  # the first warms up
        ratio = statistics.median(b / a for a, b in zip(hand, own, strict=True))
        figures |= {f"{what}_s": round(statistics.median(own), 3), f"{what}_ratio": round(ratio, 2)}
    print(json.dumps(figures))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    sys.path[:] = path_of(sys.argv[1])
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
