"""The trainer of LERNOMATIC: what a subclass overrides, around the core's loop."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import hookline
from hookline_lernomatic.model.common import LernomaticModel
from hookline_lernomatic.train.checkpoints import Checkpoints
from hookline_lernomatic.train.settings import Settings
from hookline_lernomatic.train.setup import length

SEED_AT_IMPORT = torch.initial_seed()  # another one later is that of a script's torch.manual_seed


class Trainer(Checkpoints, Settings):
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
        test_batch_size: that of validations unless given.
        shuffle: whether samples come in another order in each epoch.
        num_workers: processes that load.
        drop_last: whether a short last batch of training is left out; validations see every sample.
        device_id: of a CUDA device; -1 for the CPU.
        device_map: LERNOMATIC has this argument and never read it; None alone is taken.
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
        tb_writer: a `SummaryWriter` that gets losses and accuracies, too.
        resume: go on where the newest run of this name was cut, or the run at a path.
        seed: of all random states; 0 unless given, whatever `torch.manual_seed` says.
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
        test_batch_size: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        drop_last: bool = True,
        device_id: int = -1,
        device_map: None = None,
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
        tb_writer: Any = None,
        resume: bool | str = False,
        seed: int | None = None,
        plugins: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        known = [name for name in inspect.signature(Trainer.__init__).parameters if name not in ("self", "unknown")]
        for name in unknown:
            raise TypeError(
                f"Trainer has no argument {name!r}{hookline.nearest(name, known)}; it has {', '.join(known)}"
            )
        if device_map is not None:
            raise ValueError(f"device_map={device_map!r} has no effect in LERNOMATIC: give device_id=, or a plugin")
        if early_stop is not None and set(early_stop) != {"num_epochs", "improv"}:
            raise ValueError(f"early_stop={dict(early_stop)} must have num_epochs and improv")
        self.model = model
        self.num_epochs, self.start_epoch, self.cur_epoch = num_epochs, 0, 0
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.loss_function, self.optim_function = loss_function, optim_function
        self.train_dataset, self.val_dataset, self.test_dataset = train_dataset, val_dataset, test_dataset
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.test_batch_size = test_batch_size or self.val_batch_size
        self.shuffle, self.num_workers, self.drop_last = shuffle, num_workers, drop_last
        self.device_id, self.device_map = device_id, device_map
        self.checkpoint_dir, self.checkpoint_name = checkpoint_dir, checkpoint_name
        self.save_every, self.save_best, self.save_hist = save_every, save_best, save_hist
        self.lr_scheduler, self.mtm_scheduler = lr_scheduler, mtm_scheduler
        self.stop_when_acc, self.early_stop = stop_when_acc, early_stop
        self.print_every, self.verbose, self.tb_writer = print_every, verbose, tb_writer
        self.resume, self.seed, self.plugins = resume, seed, dict(plugins or {})
        self.best_acc = 0.0
        self.core: hookline.Trainer | None = None
        """What runs the training: made by the first `train`, `val_epoch` or `test`."""
        self._ahead = 0
        """By how much `cur_epoch` is ahead of the epochs of `core`, because `start_epoch` was set."""
        self._epochs = (0, 0)
        """`start_epoch` and `cur_epoch` as the trainer has set them."""
        self._within: Any = None
        """What does a `train_epoch` or a `val_epoch` of the base that one of a subclass calls, while it is called."""
        self._by_base = False
        """Whether the base does the epoch under way, though a subclass has a method of its own for it."""
        self._init_device()
        self._init_optimizer()
        self._init_dataloaders()
        self.iter_per_epoch = length(self.train_loader)
        self._init_history()
        self._send_to_device()
        if self._owns("train"):  # it writes files itself
            Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        params = (f"\t [{name}] : {value}\n" for name, value in self.get_trainer_params().items())
        return "".join([f"{self!r} :\n", *params])

    # Training -------------------------------------------------------------------------

    def train(self) -> None:
        """Train to `num_epochs`: from `start_epoch` or `cur_epoch` where one was set, else from where training is.

        Raises:
            ValueError: there are no data to train on.
        """
        self._require_init()
        (start, start_before), (now, now_before) = zip((self.start_epoch, self.cur_epoch), self._epochs, strict=True)
        both = max(start, now) if now != now_before else start
        self._ready(both if start != start_before else now, self.num_epochs).train()

    def train_epoch(self) -> None:
        """Train one epoch, `cur_epoch`: by the core's loop, with all that it tells.

        A method of a subclass may call it and do more; or it goes through `self.train_loader` itself, and steps
        `self.optimizer`.

        Raises:
            ValueError: there are no data to train on; or `resume` is asked for by a `train` of a subclass.
            RuntimeError: the epoch before was stopped, by a plugin or a signal.
        """
        self._require_init()
        if self._within is not None:
            self._within.by_base()
            return
        if self.resume and (self.core is None or not self.core.optimizers):
            raise ValueError(
                f"resume={self.resume!r} goes on with a training that train() of the base does; a train() of one's own "
                "goes on by load_checkpoint(file)"
            )
        if self.core is not None and self.core.status in ("stopped", "preempted"):
            raise RuntimeError(
                f"this training was stopped ({self.core.stop_reason}): a train() of one's own ends where "
                'self.core.status is no more "finished"'
            )
        begun = self.start_epoch, self.cur_epoch
        core = self._ready(self.cur_epoch, self.cur_epoch + 1)
        once = {"evaluate_every": None, "eval_when_finish": False}
        kept = {name: getattr(core.options, name) for name in once}
        self._by_base = True
        try:
            vars(core.options).update(once)
            core.train()
        finally:
            vars(core.options).update(kept)
            self._by_base = False
            self.start_epoch, self.cur_epoch = self._epochs = begun

    def val_epoch(self) -> None:
        """Validate: by the core's loop, over every sample once.

        A method of a subclass may call it and do more; or it goes through `self.val_loader` itself, and writes
        `val_loss_history` and `acc_history`.

        Raises:
            ValueError: there are no data to validate on.
        """
        self._require_init()
        if self._within is not None:
            self._within.by_base()
            return
        if self.val_loader is None:
            raise ValueError(f"{self!r} has no data to validate on: give val_dataset, or make val_loader")
        core = self._core()
        self._by_base = True
        try:
            metrics = core.validate()
        finally:
            self._by_base = False
        self._keep_accuracy(metrics)
        self._keep_best(metrics)

    def test(self) -> dict[str, float]:
        """Evaluate the test data; return loss and accuracy."""
        self._require_init()
        if self.test_loader is None:
            raise ValueError(f"{self!r} has no data to test on: give test_dataset, or make test_loader")
        return self._core().test()

    def batch_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, outputs and targets of a batch: what the core's loop does with one."""
        data, target = batch
        if self.model is None:
            raise ValueError(f"{self!r} has no `model`: with several models, train_epoch and val_epoch are yours")
        output = self.model.forward(data)
        return self.criterion(output, target), output, target

    def _owns(self, method: str) -> bool:
        """Tell whether a subclass has a method of its own in the place of one of the base."""
        return getattr(type(self), method) is not getattr(Trainer, method)

    def _keep_accuracy(self, metrics: Mapping[str, float]) -> None:
        """Take the accuracy of a validation of the base into the history."""
        accuracy = metrics.get("val_acc")
        if accuracy is not None:
            self.make_room("acc_history", 1)
            self.acc_history[self.acc_iter] = accuracy
            self.acc_iter += 1
        if self.tb_writer is not None and self._rank == 0:
            for name in ("val_loss", "val_acc"):
                if name in metrics:
                    self.tb_writer.add_scalar(name, metrics[name], self.cur_epoch)

    def _keep_best(self, metrics: Mapping[str, float]) -> None:
        """Keep the model whose accuracy is the best so far."""
        accuracy = metrics.get("val_acc", 0.0)
        if accuracy > self.best_acc:
            self.best_acc = accuracy
            if self.save_best and self._rank == 0:
                self.save_checkpoint(self._file(f"best_{self.checkpoint_name}"))

    def _stand(self, start: int, now: int) -> None:
        """Set where training has begun and where it is."""
        self.start_epoch, self.cur_epoch = self._epochs = start, now

    @property
    def _rank(self) -> int:
        """The rank of this process."""
        return 0 if self.core is None else self.core.rank

    def _file(self, name: str) -> str:
        """Return the path of a file in `checkpoint_dir`."""
        return str(Path(self.checkpoint_dir) / f"{name}.pkl")

    # The core -------------------------------------------------------------------------

    def _ready(self, start: int, end: int) -> hookline.Trainer:
        """Return what trains, and say from which epoch to which."""
        core = self._core()
        if self.train_loader is None:
            raise ValueError(f"{self!r} has no data to train on: give train_dataset, or make train_loader")
        if self.seed is None and torch.initial_seed() != SEED_AT_IMPORT:
            core.say_once(
                f"torch.manual_seed({torch.initial_seed()}) does not reach the order of samples and the random numbers "
                f"of this training, which are a function of seed=0: give seed={torch.initial_seed()} to the trainer"
            )
        self._ahead = start - core.epoch
        core.options.epochs = max(end - self._ahead, 0)
        self.make_room_for_epochs(max(end - start, 0))
        return core

    def _core(self) -> hookline.Trainer:
        """Return what runs the training, made of the trainer as it is now, and anew where its models are others."""
        bridge: Any = None if self.core is None else self.core.module
        if self.core is None or not bridge.serves(self):
            self.core = hookline.Trainer(
                self,
                {**self._plugins(), **self.plugins},
                epochs=self.num_epochs,
                val_batch_size=self.val_batch_size,
                log_every=f"{self.print_every} steps" if self.print_every > 0 else "epoch",
                device=str(self.device),
                seed=self.seed or 0,
                resume=self.resume if self.core is None else False,
                runs_folder=self.checkpoint_dir,
                run_name=re.sub(r"^\.|[^\w.-]", "_", self.checkpoint_name or "ck"),
            )
        return self.core

    def _require_init(self) -> None:
        if "core" not in vars(self):
            raise RuntimeError(
                f"{type(self).__name__}.__init__ has to call super().__init__(model, **kwargs), which makes optimizer, "
                "loaders and history"
            )

    def _plugins(self) -> dict[str, Any]:
        plugins: dict[str, Any] = {"lernomatic": {}, "jsonl": {}}
        if self.verbose:
            plugins["progress"] = {}
        if self.save_every:
            plugins["checkpoint"] = {"every": "epoch" if self.save_every < 0 else f"{self.save_every} steps"}
        elif self.resume:
            plugins["checkpoint"] = {"every": None}
        return plugins
