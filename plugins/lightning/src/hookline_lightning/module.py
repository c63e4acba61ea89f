"""What users of today's Lightning derive from, without its package: a module, a data module, a callback."""

from __future__ import annotations

import builtins
import functools
import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader, IterableDataset

from hookline_lightning.bases import DataHooks, Events, ModuleHooks, nothing
from hookline_lightning.hparams import HasHparams
from hookline_lightning.run.view import View


class Doors:
    """What a module calls of the run that it is in; bound to modules of the real package, too."""

    _trainer: View | None

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value: a number, a tensor of one element, or a metric object of torchmetrics.

        Tensors stay on their device until the interval or the epoch ends.

        Args:
            name: of the value.
            value: what is logged.
            prog_bar: show it on progress displays.
            logger: False keeps it from trackers, unless `prog_bar` shows it.
            on_step: the mean of each interval of `log_every`; by default in `training_step`.
            on_epoch: over the epoch; by default everywhere else.
            reduce_fx: "mean", "sum", "min" or "max" of an epoch.
            enable_graph: True is refused, values are detached.
            sync_dist: over all ranks (an evaluation always is).
            sync_dist_group: others than None are refused.
            add_dataloader_idx: append the key of the loader where there are several.
            batch_size: how much the value weighs in a mean; unless given, the first dimension of the batch's first
                tensor, as in Lightning.
            metric_attribute: the name of an object of torchmetrics that is no attribute of the module.
            rank_zero_only: only rank 0 logs it.

        Raises:
            ValueError: a reduction, a name, a graph or a group of ranks that cannot be.
        """
        if enable_graph or sync_dist_group is not None:
            raise ValueError(
                f"self.log({name!r}): enable_graph=True and sync_dist_group are not here: values are detached, and "
                "reduced over all ranks; keep the tensor yourself, or reduce it before you log it"
            )
        connected(self).bridge.values.take(
            name, value, prog_bar=prog_bar, logger=logger, on_step=on_step, on_epoch=on_epoch, reduce_fx=reduce_fx,
            sync=sync_dist, with_key=add_dataloader_idx, first_rank=rank_zero_only, batch_size=batch_size,
            metric_attribute=metric_attribute,
        )  # fmt: skip

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **options: Any) -> None:
        """Log several values; see `log`."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **options)

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or a list of several; their `step` goes through the gates of the run."""
        view = connected(self)
        found = view.bridge.wrapped() if use_pl_optimizer else view.optimizers
        return found[0] if len(found) == 1 else found

    def lr_schedulers(self) -> Any:
        """Return the scheduler, a list of several, or None."""
        found = [config.scheduler for config in connected(self).lr_scheduler_configs]
        return found[0] if len(found) == 1 else found or None

    def manual_backward(self, loss: torch.Tensor, *args: Any, **options: Any) -> None:
        """Compute gradients in manual optimisation; what is said besides goes to `Tensor.backward`."""
        connected(self).bridge.backward(loss, *args, **options)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of an optimizer, by "norm" or by "value"; by default as the trainer was told to."""
        view = connected(self)
        gradient_clip_algorithm = gradient_clip_algorithm or view.gradient_clip_algorithm
        gradient_clip_val = view.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm not in (None, "norm", "value"):
            raise ValueError(f"gradient_clip_algorithm={gradient_clip_algorithm!r} must be norm or value")
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        clip([parameter for group in optimizer.param_groups for parameter in group["params"]], gradient_clip_val)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Have only the parameters of this optimizer require gradients, until `untoggle_optimizer`."""
        connected(self).bridge.toggle(optimizer)

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Have parameters require gradients as before `toggle_optimizer`."""
        connected(self).bridge.untoggle()

    @contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Generator[None, None, None]:
        """Toggle an optimizer within."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return the tensors of all ranks, stacked; without gradients.

        Raises:
            ValueError: gradients are asked for.
        """
        if sync_grads:
            raise ValueError("all_gather(sync_grads=True): gradients do not go through the gather of a run")
        return connected(self).gather(data)

    def print(self, *args: Any, **options: Any) -> None:
        """Print on rank 0."""
        if connected(self).is_global_zero:
            builtins.print(*args, **options)


DOORS = [name for name in vars(Doors) if not name.startswith("_")]


def connected(module: Any) -> View:
    """Return the view that a module has of its run.

    Raises:
        RuntimeError: it is with none.
    """
    view = module._trainer
    if view is None or not view.is_connected:
        raise RuntimeError(
            f"{type(module).__name__} is with no trainer yet: `self.log`, `self.optimizers` and the like work once it "
            "has been given to hookline.Trainer or hookline_lightning.Trainer"
        )
    return view  # type: ignore[no-any-return]


class LightningModule(Doors, HasHparams, ModuleHooks, torch.nn.Module):
    """A module in Lightning's words: `training_step`, `configure_optimizers`, and what else it needs."""

    _trainer: View | None = None
    automatic_optimization = True
    strict_loading = True
    example_input_array: Any = None
    """Arguments of `forward`: a tensor, a tuple, or a dictionary."""

    @property
    def trainer(self) -> View:
        """The run, as far as Lightning's modules know it."""
        return connected(self)

    @trainer.setter
    def trainer(self, trainer: View | None) -> None:
        self._trainer = trainer

    @property
    def current_epoch(self) -> int:
        """Index of the epoch; 0 before there is a run."""
        return self._trainer.current_epoch if self._trainer and self._trainer.is_connected else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps completed; 0 before there is a run."""
        return self._trainer.global_step if self._trainer and self._trainer.is_connected else 0

    @property
    def global_rank(self) -> int:
        """Of this process; 0 before there is a run."""
        return self._trainer.global_rank if self._trainer and self._trainer.is_connected else 0

    @property
    def local_rank(self) -> int:
        """Of this process on its machine; 0 before there is a run."""
        return self._trainer.local_rank if self._trainer and self._trainer.is_connected else 0

    @property
    def logger(self) -> Any:
        """What logs values by `log_metrics`; None before there is a run."""
        return self._trainer.logger if self._trainer and self._trainer.is_connected else None

    @property
    def loggers(self) -> list[Any]:
        """The same, as a list."""
        return self._trainer.loggers if self._trainer and self._trainer.is_connected else []

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """That of the first parameter of numbers with a fraction."""
        return next((one.dtype for one in self.parameters() if one.is_floating_point()), torch.get_default_dtype())

    @property
    def on_gpu(self) -> bool:
        """Whether the first parameter is on a GPU."""
        return self.device.type == "cuda"

    @property
    def fabric(self) -> None:
        """None, as for every module that a trainer trains."""
        return None

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        raise ValueError("self.fabric = …: Fabric is not here; a loop of your own needs no adapter of modules")

    def freeze(self) -> Self:
        """Have no parameter require gradients, and be in eval mode."""
        return self.requires_grad_(False).eval()

    def unfreeze(self) -> Self:
        """Have all parameters require gradients, and be in train mode."""
        return self.requires_grad_(True).train()

    @torch.no_grad()
    def to_onnx(self, file_path: Any = None, input_sample: Any = None, **options: Any) -> Any:
        """Write `forward` as ONNX, by `torch.onnx.export`.

        Args:
            file_path: of the file.
            input_sample: arguments of `forward`; `example_input_array` unless given.
            options: of `torch.onnx.export`.

        Raises:
            ValueError: there is no sample.
        """
        sample = self.example_input_array if input_sample is None else input_sample
        if sample is None:
            raise ValueError("to_onnx needs input_sample, or self.example_input_array in the module")
        mode = self.training
        try:
            return torch.onnx.export(self.eval(), sample, file_path, **options)
        finally:
            self.train(mode)

    def to_torchscript(self, *arguments: Any, **options: Any) -> None:
        """Refuse: torch.jit is on its way out of torch, and Lightning's method on its way out of Lightning."""
        raise NotImplementedError(
            "to_torchscript is not here: torch.jit is deprecated. Take torch.export.export(module, (inputs,)), or the "
            "plugin export, which compares what it has written with the module"
        )


class LightningDataModule(HasHparams, DataHooks):
    """Data in Lightning's words: `prepare_data`, `setup(stage)` and the loaders."""

    trainer: View | None = None
    name: str | None = None
    on_exception = load_state_dict = nothing

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept in a checkpoint."""
        return {}

    @classmethod
    def from_datasets(
        cls, train_dataset: Any = None, val_dataset: Any = None, test_dataset: Any = None, predict_dataset: Any = None,
        batch_size: int = 1, num_workers: int = 0, **options: Any,
    ) -> Self:  # fmt: skip
        """Return a data module with loaders of data sets, of which those of training are shuffled.

        Args:
            train_dataset: a data set, or a list or mapping of several; so the others.
            val_dataset: for validation.
            test_dataset: for tests.
            predict_dataset: for predictions.
            batch_size: of each loader.
            num_workers: of each loader.
            options: of the class itself, which gets `batch_size` and `num_workers`, too, if it takes them.
        """
        data = {"train": train_dataset, "val": val_dataset, "test": test_dataset, "predict": predict_dataset}
        loading = {"batch_size": batch_size, "num_workers": num_workers}
        taken = inspect.signature(cls.__init__).parameters
        with_all = any(one.kind is one.VAR_KEYWORD for one in taken.values())
        made = cls(**options, **{name: one for name, one in loading.items() if with_all or name in taken})
        for stage, datasets in data.items():
            if datasets is not None:
                setattr(made, f"{stage}_dataloader", functools.partial(_loaders, datasets, stage == "train", loading))
        return made


def _loaders(datasets: Any, shuffled: bool, loading: Mapping[str, int]) -> Any:
    if isinstance(datasets, Mapping):
        return {key: _loaders(one, shuffled, loading) for key, one in datasets.items()}
    if isinstance(datasets, (list, tuple)):
        return [_loaders(one, shuffled, loading) for one in datasets]
    shuffle = shuffled and not isinstance(datasets, IterableDataset)
    return DataLoader(datasets, shuffle=shuffle, **loading)  # type: ignore[arg-type]


class Callback(Events):
    """What hears of a run in Lightning's words: `on_train_start(trainer, pl_module)` and so on."""

    setup = teardown = on_sanity_check_start = on_sanity_check_end = on_exception = nothing
    on_save_checkpoint = on_load_checkpoint = load_state_dict = nothing

    @property
    def state_key(self) -> str:
        """Under which its state is kept; other than that of others of its class where these differ."""
        return type(self).__qualname__

    def _generate_state_key(self, **values: Any) -> str:
        return f"{type(self).__qualname__}{values!r}"

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept in a checkpoint."""
        return {}
