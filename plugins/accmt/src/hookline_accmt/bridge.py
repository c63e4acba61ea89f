"""The bridge: ACCMT's plain object as the module that the core trains."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch

from hookline import ModuleInterface, Stage, Trainer, every, hookimpl, kept_rng
from hookline_accmt import data
from hookline_accmt.metrics import Accuracy, Collected
from hookline_accmt.module import AcceleratorModule, check
from hookline_accmt.options import Options
from hookline_accmt.status import StatusDict, cadences
from hookline_accmt.steps import step_of

log = logging.getLogger("hookline.accmt")


class Bridge(ModuleInterface):
    """Owns the model of an `AcceleratorModule`, and asks that for all else.

    Args:
        user: the module.
        accmt: what the run is told besides.
        trainer: whose run it is.
    """

    def __init__(self, user: AcceleratorModule, accmt: Options, trainer: Trainer) -> None:
        super().__init__()
        check(user)
        self.model = user.model
        vars(user).pop("model", None)
        user._owner = self
        self.user = user
        self.accmt = accmt
        self._place = accmt.place
        self._run = weakref.ref(trainer)
        vars(user).pop("status_dict", None)
        user.device = trainer.device
        step = step_of(user, "training_step")
        assert step is not None
        self._step_name, self._training_step = step
        self._validation = step_of(user, "validation_step")
        self._collected = Collected(accmt.metrics)
        self._begun = 0  # what makes a place in the epoch of one in the run
        self._loaders: dict[str, Any] = {}
        self._told: set[str] = set()  # names of pairs that no metric has
        if user.teacher is not None:
            user.teacher.requires_grad_(False).eval().to(trainer.device)

    def set_up(self, trainer: Trainer) -> None:
        """Refuse data that are missing, or that nothing can be done with.

        Raises:
            TypeError: what is missing.
        """
        name = type(self.user).__name__
        if self.accmt.made["train_dataset"] is None and not hasattr(self.user, "get_train_dataloader"):
            raise TypeError(f"there is nothing to train on: give fit a train_dataset, or {name} get_train_dataloader()")
        if self.has_validation and self._validation is None:
            raise TypeError(f"there are validation data, and {name} has neither validation_step(batch) nor step(batch)")
        if self.accmt.hyperparameters is None and not hasattr(self.user, "get_optimizer"):
            raise TypeError(f"there is no optimizer: name one in hps, or give {name} get_optimizer()")
        for argument in ("train_dataset", "val_dataset"):
            if self.accmt.made[argument] is not None:
                data.check_dataset(argument, self.accmt.made[argument])
        if not self.has_validation:
            self._refuse_cadence()

    def _refuse_cadence(self) -> None:
        """Refuse checkpoints that come after evaluations alone, in a training without any.

        Raises:
            ValueError: nothing would be saved before the end.
        """
        asked = cadences(self.trainer)
        if asked and all(every(one).unit == "evaluations" for one in asked):
            raise ValueError(
                f"checkpoint_every={', '.join(asked)!r} saves after evaluations, and there are no validation data: "
                f'give fit a val_dataset, or {type(self.user).__name__} get_validation_dataloader(), or write "epoch"'
            )

    @property
    def has_validation(self) -> bool:
        """Whether there are data to validate on."""
        return self.accmt.made["val_dataset"] is not None or hasattr(self.user, "get_validation_dataloader")

    @property
    def status(self) -> StatusDict:
        """How far training is."""
        trainer = self._run()
        if trainer is not None:  # else it is over, and so is its status
            self.accmt.status.refresh(trainer, self._place)
        return self.accmt.status

    # Steps ----------------------------------------------------------------------------

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        """Take a batch through the module's `training_step`."""
        place, status = self._place, self.accmt.status
        place.epoch_step = status["epoch_step"] = self._begun + place.global_step
        loss = self._training_step(batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TypeError(
                f"{type(self.user).__name__}.{self._step_name} must return the loss, a tensor of one element that was "
                f"computed with gradients; it returned {shown(loss)}"
            )
        place.global_step += 1
        status["global_step"] = place.global_step
        return loss

    def val_step(self, global_step: int, batch: Any, device: Any) -> tuple[Any, ...]:
        """Take a batch through the module's `validation_step`; return the loss, and pairs by name."""
        assert self._validation is not None
        step_name, step = self._validation
        answer = step(batch)
        if self.trainer.stage is Stage.VAL:
            self._place.eval_global_step += 1
            self.accmt.status["eval_global_step"] = self._place.eval_global_step
        named = answer if isinstance(answer, Mapping) else {"loss": answer}
        loss = named.get("loss")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TypeError(
                f"{type(self.user).__name__}.{step_name} must return the loss, a tensor of one element, or "
                f"a dictionary with it under 'loss'; it returned {shown(answer)}"
            )
        pairs: dict[str, tuple[Any, ...]] = {}
        for name, value in named.items():
            if name in self._collected.metrics:
                self._collected.add(name, value)
            elif isinstance(value, (tuple, list)) and len(value) > 1:
                pairs[name] = tuple(value)
            elif name != "loss":
                self._log_number(name, value, step_name)
        if not loss.is_floating_point():  # which the core would take for a count
            loss = loss.double()
        return loss.reshape(()), self._given_to_metrics(pairs)

    def _log_number(self, name: str, value: Any, step_name: str) -> None:
        try:
            self.trainer.log(**{f"val_{name}": value})
        except TypeError as error:
            raise TypeError(
                f"{step_name} returned a {type(value).__name__} for {name!r}; it must be a tuple "
                f"(predictions, references), or a number ({error})"
            ) from None

    def _given_to_metrics(self, pairs: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """Return the pairs, without those that have no metric: an "accuracy" is computed, of others it is said once."""
        for name in sorted({*pairs} - self._told):
            self._told.add(name)
            metrics = self.trainer.plugins.get_plugin("metrics")
            if metrics is not None and name in {**getattr(metrics, "val", {}), **self.get_metrics(Stage.VAL)}:
                continue
            if name == "accuracy" and len(pairs[name]) == 2 and Accuracy.can_compute(*pairs[name]):
                self._collected.metrics[name] = Accuracy(name)
                self._collected.add(name, pairs.pop(name))
                continue
            log.warning(
                "%s.validation_step returns predictions and references for %r, and no metric has this name, so they "
                "are dropped: give Trainer metrics=[…] with a Metric of this name, or have get_metrics() answer one of "
                "torchmetrics", type(self.user).__name__, name,
            )  # fmt: skip
        return pairs

    @hookimpl
    def on_end_val_epoch(self, trainer: Trainer) -> None:  # type: ignore[override]
        """Compute the metrics of what this loader has given."""
        if self._collected.metrics or trainer.world_size > 1:
            for name, value in self._collected.compute(trainer).items():
                values: dict[str, Any] = {f"val_{name}": value}
                trainer.log(reduce="max", **values)  # which are the same on all ranks

    def get_metrics(self, stage: Stage) -> Any:
        """Return the module's metrics of what its `validation_step` returns pairs for."""
        return self.user.get_metrics() if stage is Stage.VAL and hasattr(self.user, "get_metrics") else {}

    # Data -----------------------------------------------------------------------------

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        """Return the module's own loader, or one of the dataset."""
        given, accmt = self._own_loader("get_train_dataloader", "train_dataset", "sampler"), self.accmt
        dataset, samplers = accmt.made["train_dataset"], accmt.made["sampler"]
        if given is not None:
            return given
        return data.loader(dataset, batch_size, sampler, accmt.shuffle_train, samplers, **self._loading())

    def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        """Return the module's own loader, or one of the dataset; None where there is neither."""
        given = self._own_loader("get_validation_dataloader", "val_dataset")
        dataset = self.accmt.made["val_dataset"]
        if given is not None or dataset is None:
            return given
        return data.loader(dataset, batch_size, sampler, self.accmt.shuffle_validation, **self._loading())

    def _own_loader(self, name: str, *instead_of: str) -> Any:
        """Return what a method of the module gives, which is asked once; say what it is taken in the place of."""
        if not hasattr(self.user, name):
            return None
        if name not in self._loaders:
            self._loaders[name] = getattr(self.user, name)()
            unused = [argument for argument in instead_of if self.accmt.made[argument] is not None]
            if unused and self._loaders[name] is not None:
                kind = type(self.user).__name__
                have = "has" if len(unused) == 1 else "have"
                log.warning("%s.%s() gives the loader, so %s %s no effect", kind, name, " and ".join(unused), have)
        return self._loaders[name]

    def _loading(self) -> dict[str, Any]:
        accmt = self.accmt
        user: Any = self.user
        return {
            "collate_fn": user.collate_fn if "collate_fn" in dir(user) else accmt.made["collate_fn"],
            "num_workers": accmt.dataloader_num_workers,
            "pin_memory": accmt.dataloader_pin_memory and self.trainer.device.type == "cuda",
        }

    # Optimizers -----------------------------------------------------------------------

    def get_optimizers_schedulers(
        self, estimated_global_steps_per_epoch: int | None, epochs: int
    ) -> tuple[Iterable[torch.optim.Optimizer], Iterable[Any]]:
        """Return the module's own, or those of the hyperparameters."""
        hps, user = self.accmt.hyperparameters, self.user
        optimizer = user.get_optimizer() if hasattr(user, "get_optimizer") else None
        if optimizer is None:
            if hps is None:
                raise TypeError(f"{type(user).__name__}.get_optimizer() gave None, and hps names no optimizer")
            optimizer = hps.make_optimizer(self.model.parameters(), self.trainer.device)
        refuse_other(f"{type(user).__name__}.get_optimizer()", optimizer, "one optimizer", ("step", "param_groups"))
        scheduler = None
        if hasattr(user, "get_scheduler"):
            scheduler = user.get_scheduler(optimizer, estimated_global_steps_per_epoch, epochs)
        if scheduler is not None:
            refuse_other(f"{type(user).__name__}.get_scheduler()", scheduler, "one scheduler", ("step", "state_dict"))
        if scheduler is None and hps is not None:
            scheduler = hps.make_scheduler(
                optimizer, estimated_global_steps_per_epoch, epochs, self.trainer.totals.steps
            )
        if not self.accmt.set_to_none:
            clear = optimizer.zero_grad
            optimizer.zero_grad = lambda set_to_none=False: clear(set_to_none=set_to_none)  # type: ignore[method-assign]
        return [optimizer], [] if scheduler is None else [scheduler]

    # What is heard --------------------------------------------------------------------

    @hookimpl
    def on_begin_run(self, stage: Stage) -> None:
        if stage is Stage.TRAIN:
            self.model.train()

    @hookimpl(wrapper=True, tryfirst=True)
    def train_epoch(self) -> Generator[None, bool, bool]:
        self.model.train()  # as ACCMT does at each epoch and after each evaluation, whatever the modes were
        return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, trainer: Trainer) -> Generator[None, dict[str, float], dict[str, float]]:
        self.accmt.status.refresh(trainer, self._place)
        metrics = yield
        if trainer.stage is Stage.TRAIN:
            self.model.train()
        return metrics

    @hookimpl
    def on_end_run(self, trainer: Trainer) -> None:
        self.accmt.status.refresh(trainer, self._place)

    @hookimpl
    def on_begin_train(self, trainer: Trainer) -> None:
        with kept_rng():
            if self.accmt.made["val_dataset"] is None and self._own_loader("get_validation_dataloader") is None:
                self._refuse_cadence()
        for name in self.accmt.zeroed:  # gradients of zero are no gradients that are not there
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.accmt.zeroed = []

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        """Say which epoch it is, and where in it the run is."""
        trainer, place = self.trainer, self._place
        begun = trainer.position + len(trainer.window.begun)
        place.global_step = trainer.counters.batches + len(trainer.window.begun)
        self._begun = begun - place.global_step
        place.epoch, place.skip_batches = epoch, begun
        self.accmt.status.refresh(trainer, place)

    @hookimpl(wrapper=True)
    def save(self, trainer: Trainer) -> Generator[None, bool, bool]:
        stored = yield
        if stored:
            self._place.skip_batches = trainer.position
            self.accmt.status.refresh(trainer, self._place)
        return stored

    @hookimpl(wrapper=True)
    def compile_model(self, trainer: Trainer, model: torch.nn.Module) -> Generator[None, Any, Any]:
        compiled = yield
        if self.user.teacher is not None and not isinstance(model, _Held):
            trainer.hook.compile_model(trainer=trainer, model=_Held(self.user.teacher))
        return compiled

    @hookimpl(wrapper=True)
    def export_model(self) -> Generator[None, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        weights = yield
        return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def refuse_other(where: str, given: Any, wanted: str, methods: Iterable[str]) -> None:
    """Refuse what lacks a method.

    Raises:
        TypeError: what it is.
    """
    if not all(hasattr(given, method) for method in methods):
        raise TypeError(f"{where} must return {wanted}; it returned a {type(given).__name__}")


def shown(answer: Any) -> str:
    """Return what an answer is, in short."""
    if isinstance(answer, torch.Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    return f"{answer!r:.80}" if isinstance(answer, Mapping) else f"a {type(answer).__name__}"


class _Held(torch.nn.Module):
    """A model to be compiled beside the one that is trained."""

    def __init__(self, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
