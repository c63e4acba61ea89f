"""The trainer of LERNOMATIC: what a subclass overrides, around the core's loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import hookline
from hookline_lernomatic.model.common import LernomaticModel, model_from

KEPT = ("num_epochs", "cur_epoch", "learning_rate", "weight_decay", "momentum", "batch_size", "val_batch_size")
# of the trainer's parameters, in a checkpoint
HISTORY = ("loss_history", "val_loss_history", "acc_history", "loss_iter", "val_loss_iter", "acc_iter", "best_acc")


class Trainer:
    """Trains a model; `train()` is all that others ask of it.

    By default `train()` goes from `start_epoch` to `num_epochs`, each epoch a `train_epoch()` and, where there are
    validation data, a `val_epoch()`. A subclass may override any of the three, and the five `_init_*` and
    `_send_to_device`, which `__init__` calls in the order in which they stand here; what it needs in them it sets
    before `super().__init__()`.

    Args:
        model: what is trained; a subclass with several models has them as attributes of its own, and gives None.
        num_epochs: epochs to train.
        learning_rate: of the optimizer.
        momentum: of the optimizer, where it has one.
        weight_decay: of the optimizer.
        loss_function: the name of a class of `torch.nn`.
        optim_function: the name of a class of `torch.optim`.
        train_dataset: pairs of input and target, by index; so are the others.
        val_dataset: data of the validation.
        test_dataset: data of the test.
        batch_size: of one process.
        val_batch_size: the same unless given.
        shuffle: whether samples come in another order in each epoch.
        num_workers: processes that load.
        drop_last: whether a short last batch of training is left out; validations see every sample.
        device_id: of a CUDA device; -1 for the CPU.
        checkpoint_dir: where the folder of the run is made, and the files of LERNOMATIC lie.
        checkpoint_name: what the run and these files are called.
        save_every: iterations from one checkpoint to the next; -1 for once an epoch, 0 for none.
        save_best: keep the model of the best accuracy as well.
        save_hist: keep the history of each epoch in a file.
        lr_scheduler: a schedule of `hookline_lernomatic.train.schedule`, for the learning rate.
        mtm_scheduler: another, for the momentum.
        stop_when_acc: the accuracy from which on training is over; 0 for none.
        early_stop: `num_epochs` without an accuracy that is better by `improv` end the training.
        print_every: iterations from one log of the loss to the next.
        verbose: show progress.
        resume: go on where the newest run of this name was cut, or the run at a path.
        seed: of all random states.
        plugins: others of hookline, by name.

    Raises:
        TypeError: an unknown argument, with the nearest.
        ValueError: a name or a value that cannot be.
    """

    def __init__(
        self,
        model: LernomaticModel | None = None,
        *,
        num_epochs: int = 10,
        learning_rate: float = 1e-4,
        momentum: float = 0.5,
        weight_decay: float = 1e-5,
        loss_function: str = "CrossEntropyLoss",
        optim_function: str = "Adam",
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        batch_size: int = 64,
        val_batch_size: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        drop_last: bool = True,
        device_id: int = -1,
        checkpoint_dir: str = "checkpoint",
        checkpoint_name: str = "ck",
        save_every: int = -1,
        save_best: bool = False,
        save_hist: bool = True,
        lr_scheduler: Any = None,
        mtm_scheduler: Any = None,
        stop_when_acc: float = 0.0,
        early_stop: Mapping[str, float] | None = None,
        print_every: int = 10,
        verbose: bool = False,
        resume: bool | str = False,
        seed: int = 0,
        plugins: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        known = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", "unknown")]
        for name in unknown:
            raise TypeError(
                f"Trainer has no argument {name!r}{hookline.nearest(name, known)}; it has {', '.join(known)}"
            )
        if early_stop is not None and set(early_stop) != {"num_epochs", "improv"}:
            raise ValueError(f"early_stop={dict(early_stop)} must have num_epochs and improv")
        self.model = model
        self.num_epochs, self.start_epoch, self.cur_epoch = num_epochs, 0, 0
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.loss_function, self.optim_function = loss_function, optim_function
        self.train_dataset, self.val_dataset, self.test_dataset = train_dataset, val_dataset, test_dataset
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.shuffle, self.num_workers, self.drop_last = shuffle, num_workers, drop_last
        self.device_id = device_id
        self.checkpoint_dir, self.checkpoint_name = checkpoint_dir, checkpoint_name
        self.save_every, self.save_best, self.save_hist = save_every, save_best, save_hist
        self.lr_scheduler, self.mtm_scheduler = lr_scheduler, mtm_scheduler
        self.stop_when_acc, self.early_stop = stop_when_acc, early_stop
        self.print_every, self.verbose = print_every, verbose
        self.resume, self.seed, self.plugins = resume, seed, dict(plugins or {})
        self.core: hookline.Trainer | None = None
        """What runs the training: made by the first `train`, `val_epoch` or `test`."""
        self._init_device()
        self._init_optimizer()
        self._init_dataloaders()
        self._init_history()
        self._send_to_device()

    # What a subclass may override, in the order in which it is called --------------------

    def _init_device(self) -> None:
        self.device = torch.device("cpu" if self.device_id < 0 else f"cuda:{self.device_id}")

    def _init_optimizer(self) -> None:
        """Make the loss and the optimizer of their names; there is none without a model."""
        self.criterion = _named(torch.nn, self.loss_function, "loss_function")()
        self.optimizer = None
        if self.model is not None:
            kind = _named(torch.optim, self.optim_function, "optim_function")
            options = {"lr": self.learning_rate, "weight_decay": self.weight_decay, "momentum": self.momentum}
            taken = inspect.signature(kind).parameters
            given = {name: value for name, value in options.items() if name in taken}
            self.optimizer = kind(self.model.get_model_parameters(), **given)

    def _init_dataloaders(self) -> None:
        """Make a loader of each data set; None where there is none."""
        self.train_loader = self._loader(self.train_dataset, self.batch_size, self.shuffle, self.drop_last)
        self.val_loader = self._loader(self.val_dataset, self.val_batch_size)
        self.test_loader = self._loader(self.test_dataset, self.val_batch_size)

    def _loader(self, dataset: Any, batch_size: int, shuffle: bool = False, drop_last: bool = False) -> Any:
        if dataset is None:
            return None
        return DataLoader(dataset, batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=self.num_workers)

    def _init_history(self) -> None:
        """Make room for losses by iteration, on the device, and accuracies by epoch."""
        self.loss_iter, self.val_loss_iter, self.acc_iter = 0, 0, 0
        self.loss_history = torch.zeros(_length(self.train_loader) * self.num_epochs, device=self.device)
        self.val_loss_history = torch.zeros(_length(self.val_loader) * self.num_epochs, device=self.device)
        self.acc_history = torch.zeros(self.num_epochs, dtype=torch.float64)
        self.best_acc = 0.0

    def _send_to_device(self) -> None:
        for model in self.models().values():
            model.send_to(self.device)

    # Training -------------------------------------------------------------------------

    def train(self) -> None:
        """Train from `start_epoch`, where a run that was cut left off, to `num_epochs`."""
        self._core().train()

    def train_epoch(self) -> None:
        """Train one epoch: by the core's loop, with all that it tells.

        A method of a subclass goes through `self.train_loader` itself, and steps `self.optimizer`.
        """
        core = self._core()
        once = {"epochs": self.cur_epoch + 1, "evaluate_every": None, "eval_when_finish": False}
        kept = {name: getattr(core.options, name) for name in once}
        try:
            vars(core.options).update(once)
            core.train()
        finally:
            vars(core.options).update(kept)

    def val_epoch(self) -> None:
        """Validate: by the core's loop, over every sample once.

        A method of a subclass goes through `self.val_loader` itself, and writes `val_loss_history` and `acc_history`.
        """
        core = self._core()
        metrics = core.validate()
        following: Any = core.plugins.get_plugin("lernomatic.following")
        following.judge(core, metrics)

    def test(self) -> dict[str, float]:
        """Evaluate the test data; return loss and accuracy."""
        return self._core().test()

    def batch_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, outputs and targets of a batch: what the core's loop does with one."""
        data, target = batch
        assert self.model is not None
        output = self.model.forward(data)
        return self.criterion(output, target), output, target

    def models(self) -> dict[str, LernomaticModel]:
        """Return the models by the names of their attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, LernomaticModel)}

    def set_num_epochs(self, num_epochs: int) -> None:
        """Have training go on to another epoch, keeping the history."""
        self.num_epochs = num_epochs
        for name, length in (
            ("loss_history", _length(self.train_loader) * num_epochs),
            ("val_loss_history", _length(self.val_loader) * num_epochs),
            ("acc_history", num_epochs),
        ):
            before = getattr(self, name)
            setattr(self, name, torch.cat([before, before.new_zeros(max(length - len(before), 0))]))
        if self.core is not None:
            self.core.options.epochs = num_epochs

    def _core(self) -> hookline.Trainer:
        """Return what runs the training, made of the trainer as it is now."""
        if self.core is None:
            plugins: dict[str, Any] = {"lernomatic": {}, "jsonl": {}}
            if self.verbose:
                plugins["progress"] = {}
            if self.save_every:
                every = "epoch" if self.save_every < 0 else f"{self.save_every} steps"
                plugins["checkpoint"] = {"every": every}
            elif self.resume:
                plugins["checkpoint"] = {"every": None}
            self.core = hookline.Trainer(
                self,
                {**plugins, **self.plugins},
                epochs=self.num_epochs,
                val_batch_size=self.val_batch_size,
                log_every=f"{self.print_every} steps",
                device=str(self.device),
                seed=self.seed,
                resume=self.resume,
                runs_folder=self.checkpoint_dir,
                run_name=self.checkpoint_name,
            )
        return self.core

    # History --------------------------------------------------------------------------

    def get_loss_history(self) -> torch.Tensor:
        """Return the losses of training so far."""
        return self.loss_history[: self.loss_iter]

    def get_val_loss_history(self) -> torch.Tensor:
        """Return the losses of validations so far."""
        return self.val_loss_history[: self.val_loss_iter]

    def get_acc_history(self) -> torch.Tensor:
        """Return the accuracies so far."""
        return self.acc_history[: self.acc_iter]

    def get_cur_loss(self) -> float | None:
        """Return the last loss; None before the first."""
        return self.loss_history[self.loss_iter - 1].item() if self.loss_iter else None

    def get_cur_acc(self) -> float | None:
        """Return the last accuracy; None before the first."""
        return self.acc_history[self.acc_iter - 1].item() if self.acc_iter else None

    def get_history(self) -> dict[str, Any]:
        """Return losses, accuracies and how many of them there are."""
        names = (
            "loss_history",
            "val_loss_history",
            "acc_history",
            "loss_iter",
            "val_loss_iter",
            "acc_iter",
            "best_acc",
        )
        return {name: getattr(self, name) for name in names}

    def set_history(self, history: Mapping[str, Any]) -> None:
        """Take them back, with room for the epochs that are left."""
        for name, value in history.items():
            setattr(self, name, value.to(getattr(self, name).device) if isinstance(value, torch.Tensor) else value)
        self.set_num_epochs(self.num_epochs)

    def save_history(self, fname: str | Path) -> None:
        """Write the history to a file that `torch.load` reads."""
        torch.save(self.get_history(), fname)

    def load_history(self, fname: str | Path) -> None:
        """Take the history of a file."""
        self.set_history(torch.load(fname, weights_only=True))

    # Checkpoints ----------------------------------------------------------------------

    def save_checkpoint(self, fname: str | Path) -> None:
        """Write models, optimizers, history and parameters to a file, of which models are made without their class."""
        torch.save(
            {
                **{name: model.get_params() for name, model in self.models().items()},
                "optim": {name: optimizer.state_dict() for name, optimizer in self.optimizers().items()},
                "history": self.get_history(),
                "trainer_params": {name: getattr(self, name) for name in KEPT},
            },
            fname,
        )

    def load_checkpoint(self, fname: str | Path) -> None:
        """Take models, optimizers, history and parameters of a file; `train` goes on with the epoch after it.

        For a start from a file of another run. A run that was cut goes on exactly where it was by `resume`.

        Raises:
            ValueError: a class may not be imported (`allow_import`), or is not there.
        """
        kept = torch.load(fname, map_location="cpu", weights_only=True)
        self._take_models(kept)
        if self.optimizer is None:
            self._init_optimizer()
        self._send_to_device()
        for name, optimizer in self.optimizers().items():
            optimizer.load_state_dict(kept["optim"][name])
        for name, value in kept["trainer_params"].items():
            setattr(self, name, value)
        self.start_epoch = self.cur_epoch
        self.set_history(kept["history"])

    def load_model_checkpoint(self, fname: str | Path) -> None:
        """Take the models of a file alone."""
        self._take_models(torch.load(fname, map_location="cpu", weights_only=True))
        if self.optimizer is None:
            self._init_optimizer()
        self._send_to_device()

    def _take_models(self, kept: Mapping[str, Any]) -> None:
        """Load weights into the models that there are, and make those that there are not."""
        for name, params in kept.items():
            if isinstance(params, Mapping) and "model_import_path" in params:
                model = getattr(self, name, None)
                if model is None:
                    setattr(self, name, model_from(params))
                else:
                    model.set_net_state_dict(params["model_state_dict"])

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by the names of their attributes; steps of the first are counted."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.optim.Optimizer)}


def _length(loader: Any) -> int:
    return 0 if loader is None else len(loader)


def _named(module: Any, name: str, argument: str) -> Any:
    found = getattr(module, name, None)
    if not isinstance(found, type):
        names = [one for one in dir(module) if isinstance(getattr(module, one), type)]
        raise ValueError(f"{argument}={name!r} is no class of {module.__name__}{hookline.nearest(name, names)}")
    return found
