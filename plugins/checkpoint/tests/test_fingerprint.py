"""A resume that cannot be exact says so before the first step, or is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline_checkpoint import Checkpoint, storage, writing


class Line(ModuleInterface):
    samples = 16

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.trained: list[int] = []

    def train_step(self, global_step, batch, device):
        self.trained.append(global_step)
        return self.net(batch).mean()

    def val_step(self, global_step, batch, device):
        return self.net(batch).mean()

    def get_train_dataloader(self, sampler, batch_size):
        data = torch.arange(float(self.samples)).reshape(-1, 1)
        return torch.utils.data.DataLoader(data, batch_size, sampler=sampler(data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01)], []


class Longer(Line):
    samples = 24


@dataclass(eq=False)
class Doubler(CallbackInterface):
    """Makes windows of two micro-batches."""

    @hookimpl
    def get_window_size(self):
        return 2


@dataclass(eq=False)
class Watcher(CallbackInterface):
    """Only watches."""

    observer = True


def make(folder: Path, *plugins: Any, module: Any = None, strict: bool = False, **options: Any) -> Trainer:
    given = {"epochs": 2, "train_batch_size": 4, "seed": 1, "runs_folder": str(folder), "resume": True} | options
    return Trainer(module or Line(), [Checkpoint("1 step", strict=strict), *plugins], **given)


def cut(folder: Path) -> Path:
    """Train three steps; return the checkpoint of the last one."""
    make(folder, max_steps=3).train()
    return folder / "run-1/checkpoints/step-000000000003"


def warnings(caplog: Any) -> list[str]:
    return [record.message for record in caplog.records if "an unbroken run" in record.message]


def test_it_stands_in_the_manifest(tmp_path):
    kept = storage.verify(cut(tmp_path))["fingerprint"]
    assert kept["torch"] == torch.__version__
    assert {
        key: kept[key] for key in ("world_size", "train_batch_size", "window_size", "batches_per_epoch", "seed")
    } == {
        "world_size": 1,
        "train_batch_size": 4,
        "window_size": 1,
        "batches_per_epoch": 4,
        "seed": 1,
    }
    assert (kept["module"], kept["plugins"], kept["device"]) == ("Line", ["checkpoint"], "cpu")


def test_the_same_run_says_nothing(tmp_path, caplog):
    cut(tmp_path)
    make(tmp_path, Watcher(), strict=True, epochs=3, log_every="7 steps").train()
    assert warnings(caplog) == []


CHANGES = {
    "batch": ({"train_batch_size": 8}, [], Line, "train_batch_size: was 4, is 8; batches_per_epoch: was 4, is 2"),
    "seed": ({"seed": 2}, [], Line, "seed: was 1, is 2"),
    "data": ({}, [], Longer, "batches_per_epoch: was 4, is 6; samples: was 16, is 24; module: was Line, is Longer"),
    "window": (
        {},
        [Doubler],
        Line,
        "window_size: was 1, is 2; batches_per_epoch: was 4, is 8; plugins: now with doubler",
    ),
}


@pytest.mark.parametrize(("options", "plugins", "module", "said"), CHANGES.values(), ids=CHANGES)
def test_differences_are_said_once_before_the_first_step(options, plugins, module, said, tmp_path, caplog):
    path = cut(tmp_path)
    given = [plugin() for plugin in plugins]
    trainer = make(tmp_path, *given, module=module(), strict=True, **options)
    with pytest.raises(ValueError, match="or turn checkpoint.strict off to go on nevertheless") as raised:
        trainer.train()
    assert said in str(raised.value)
    assert trainer.module.trained == []
    trainer = make(tmp_path, *[plugin() for plugin in plugins], module=module(), **options)
    trainer.train()
    assert warnings(caplog) == [
        f"what follows is not what an unbroken run would do, since {path} was written otherwise: {said}"
    ]
    assert trainer.status == "finished"


def test_a_plugin_that_is_gone(tmp_path, caplog):
    @dataclass(eq=False)
    class Extra(CallbackInterface):
        pass

    @dataclass(eq=False)
    class Keeps(Extra):
        def get_state(self):
            return {"kept": 1}

    make(tmp_path, Extra(), Keeps(), max_steps=1).train()
    make(tmp_path, Doubler(), max_steps=2).train()
    assert "plugins: now without extra, keeps (its state is not used) and with doubler" in warnings(caplog)[0]


def test_evaluations_ask_for_nothing_of_it(tmp_path, caplog):
    cut(tmp_path)
    make(tmp_path, strict=True, seed=5).validate()
    assert warnings(caplog) == []


def test_a_checkpoint_without_a_fingerprint_is_taken(tmp_path, caplog):
    path = cut(tmp_path)
    about = storage.read_manifest(path)
    contents = {name: (path / name).read_bytes() for name in about["files"]}
    writing.remove(path)
    writing.write(
        path.parent, 3, ((name, [content]) for name, content in contents.items()), {"world_size": about["world_size"]}
    )
    make(tmp_path, strict=True, seed=5).train()
    assert warnings(caplog) == []
