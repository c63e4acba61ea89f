"""A module of Lightning's first year as a module of the core."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

import hookline
from hookline import CallbackInterface, ModuleInterface, Stage, copy_state, hookimpl
from hookline_lightning.early import View
from hookline_lightning.run.bridge import overridden
from hookline_lightning.run.members import calls_itself, member

UNHEARD = (  # methods of later versions of the first year, which change how a run goes
    "optimizer_step", "training_end", "train_dataloader", "configure_apex", "configure_ddp", "init_ddp_connection",
)  # fmt: skip
LOADERS = {Stage.TRAIN: "tng_dataloader", Stage.VAL: "val_dataloader", Stage.TEST: "test_dataloader"}


def refuse_unheard(module: torch.nn.Module) -> None:
    """Refuse hooks that the user has written and nobody would call.

    Raises:
        ValueError: one of the module's methods, by name.
    """
    for name in dir(type(module)):
        asked = name in UNHEARD or name.startswith("on_")
        if asked and callable(overridden(module, name)) and not calls_itself(module, name):
            raise ValueError(
                f"{type(module).__name__}.{name}() is not called here: hooks of the first year stand in no document of "
                "it; write a plugin, or take today's LightningModule"
            )


class Bridge(ModuleInterface):
    """A module of the first year.

    Args:
        module: the user's.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module: Any = module
        self.index = 0
        """Of the micro-batch within its window."""
        self.batch_nb = 0
        """Of the batch under way in an evaluation."""
        self.newest = 0
        """Of the newest batch of training in its epoch."""
        self.outputs: list[Any] = []
        self._loaders: dict[Stage, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_loaders": {}, "outputs": []}

    # Steps ----------------------------------------------------------------------------

    def train_step(self, global_step: int, batch: Any, device: Any) -> torch.Tensor:
        """Return the loss of a batch; what is for progress displays is logged."""
        core, module = self.trainer, self.module
        self.follow(self.index + 1)
        self.newest = core.position + self.index
        returned = module.training_step(batch, self.newest)
        if isinstance(returned, torch.Tensor):
            return returned
        if not isinstance(returned, Mapping) or "loss" not in returned:
            has = f"a mapping with {', '.join(returned)}" if isinstance(returned, Mapping) else type(returned).__name__
            raise ValueError(
                f"{type(module).__name__}.training_step must return a mapping with 'loss', or the loss; it returned "
                f"{has}"
            )
        shown = returned.get("prog", returned.get("tqdm_metrics"))
        own = core.options.train_loss_metric_name  # the run logs the loss itself under this name
        for name, value in (shown or {}).items():
            if name != own:
                core.log(prog=True, reduce="mean" if isinstance(value, torch.Tensor) else "last", **{name: value})
        loss: torch.Tensor = returned["loss"]
        return loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> tuple[Any, ...]:
        """Keep what `validation_step` returns for `validation_end`, or log it where there is none."""
        return self._evaluate("validation", batch)

    def test_step(self, global_step: int, batch: Any, device: Any) -> tuple[Any, ...]:
        """Do the same with `test_step`, or with `validation_step` where there is none."""
        return self._evaluate("test" if hasattr(type(self.module), "test_step") else "validation", batch)

    def _evaluate(self, word: str, batch: Any) -> tuple[Any, ...]:
        number, self.batch_nb = self.batch_nb, self.batch_nb + 1
        returned = getattr(self.module, f"{word}_step")(batch, number)
        if returned is None:
            return ()
        if not isinstance(returned, Mapping):
            raise TypeError(f"{word}_step must return a mapping or None; it returned a {type(returned).__name__}")
        if member(self.module, f"{word}_end"):
            self.outputs.append(returned)
        else:
            self.trainer.log(**returned)
        return ()

    def end(self, stage: Stage) -> None:
        """Have `validation_end` make metrics of the outputs of all batches and ranks."""
        word = "test" if stage is Stage.TEST and hasattr(type(self.module), "test_step") else "validation"
        finish = member(self.module, f"{word}_end")
        if finish is None:
            return
        outputs, self.outputs = gathered(self.trainer, self.outputs), []
        metrics = finish(outputs)
        if metrics is None:
            return
        if not isinstance(metrics, Mapping):
            raise TypeError(f"{word}_end must return a mapping or None; it returned a {type(metrics).__name__}")
        self.trainer.log(prog=True, **metrics)

    def follow(self, ahead: int = 0) -> None:
        """Tell the module where the run is."""
        core, module = self.trainer, self.module
        module.current_epoch, module.global_step = core.epoch, core.counters.batches + ahead

    def connect(self) -> None:
        """Show the run to the module."""
        self.module.trainer, self.module.on_gpu = View(self), not self.trainer.on_cpu
        self.follow()

    def disconnect(self) -> None:
        """Take the run from the module's sight; a module that is kept keeps no run alive."""
        self.module.trainer = None

    # Data and optimizers --------------------------------------------------------------

    def ask_for_loaders(self, stage: Stage) -> Any:
        """Return what a property of the module answers, asked once."""
        if stage not in self._loaders:
            name, owner = LOADERS[stage], type(self.module).__name__
            loader = member(self.module, name)
            if inspect.ismethod(loader):
                raise TypeError(f"{owner}.{name} is a method, and must be a property: write @property above its def")
            if loader is None and stage is Stage.TRAIN:
                raise ValueError(f"{owner}.{name} is None: it must be a loader")
            if isinstance(loader, (list, tuple)) and any(isinstance(one, DataLoader) for one in loader):
                raise ValueError(f"{owner}.{name} is a {type(loader).__name__} of loaders, and one is wanted")
            self._loaders[stage] = loader
        return self._loaders[stage]

    def get_train_dataloader(self, sampler: type, batch_size: int) -> Any:
        """Return the module's loader."""
        return self.ask_for_loaders(Stage.TRAIN)

    def get_val_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the module's loader."""
        return self.ask_for_loaders(Stage.VAL)

    def get_test_dataloaders(self, sampler: type, batch_size: int) -> Any:
        """Return the module's loader."""
        return self.ask_for_loaders(Stage.TEST)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int | None, epochs: int) -> Any:
        """Return the module's optimizers; after one backward each of them steps. Schedulers move after each epoch."""
        made = self.module.configure_optimizers()
        if not isinstance(made, (list, tuple)):
            return [made], []
        if len(made) == 2 and all(isinstance(part, (list, tuple)) for part in made):
            return list(made[0]), [(scheduler, "epoch") for scheduler in made[1]]
        return list(made), []

    # State ----------------------------------------------------------------------------

    def get_own_state(self) -> dict[str, Any]:
        """Return what `get_save_dict` does, and where the run is."""
        save = member(self.module, "get_save_dict")
        if save is None:
            return {}
        saved = save()
        if not isinstance(saved, Mapping):
            raise TypeError(f"get_save_dict must return a mapping; it returned a {type(saved).__name__}")
        counters = self.trainer.counters
        return {"saved": dict(saved), "place": {"epoch": counters.epochs, "global_step": counters.batches}}

    def update_own_state(self, state: Mapping[str, Any]) -> None:
        """Hand a copy of it to `load_model_specific`, together with the place."""
        if load := member(self.module, "load_model_specific"):
            load({**copy_state(state["saved"]), **state["place"]})


class Following(CallbackInterface):
    """Tells a module of the first year where its run is."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge

    @hookimpl
    def on_begin_run(self, stage: Stage) -> None:
        if stage is Stage.TRAIN:  # as after the sanity check of the first year
            self.bridge.train()

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, trainer: hookline.Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        metrics = yield
        if trainer.stage is Stage.TRAIN:  # the first year did so, whatever the modes were
            self.bridge.train()
        return metrics

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        self.bridge.follow()

    @hookimpl
    def on_begin_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        self.bridge.follow()

    @hookimpl(wrapper=True)
    def forward_backward(self, index: int) -> Generator[None, Any, Any]:
        self.bridge.index = index
        return (yield)

    @hookimpl
    def on_begin_evaluation(self, trainer: hookline.Trainer) -> None:
        self.bridge.batch_nb, self.bridge.outputs = 0, []
        self.bridge.follow()

    @hookimpl
    def on_end_val_epoch(self, key: str) -> None:  # type: ignore[override]
        self.bridge.end(Stage.VAL)

    @hookimpl
    def on_end_test_epoch(self, key: str) -> None:
        self.bridge.end(Stage.TEST)

    @hookimpl(wrapper=True)
    def filter_log(self, trainer: hookline.Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        metrics = yield
        update = member(self.bridge.module, "update_tng_log_metrics")
        if update is None or trainer.stage is not Stage.TRAIN:
            return metrics
        updated = update(dict(metrics))
        if not isinstance(updated, dict):
            raise TypeError(f"update_tng_log_metrics must return a dict; it returned a {type(updated).__name__}")
        return updated


def gathered(core: hookline.Trainer, outputs: list[Any]) -> list[Any]:
    """Return the outputs of all ranks, the first batch of each, then the second of each, and so on."""
    if core.shares == 1:
        return outputs
    ranks = core.hook.all_gather(trainer=core, value=(core.share, [_moved(one, "cpu") for one in outputs]))
    shares = list(dict(ranks).values())  # ranks with one share have the same
    most = max(map(len, shares))
    ordered = [kept[place] for place in range(most) for kept in shares if place < len(kept)]
    return [_moved(one, core.device) for one in ordered]


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {key: _moved(one, device) for key, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if isinstance(value, (list, tuple)) else value
