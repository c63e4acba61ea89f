"""What `trainer` answers by its arguments, its callbacks and its loggers, with or without a run."""

from __future__ import annotations

import operator
import os
from types import SimpleNamespace
from typing import Any

from hookline_lightning.translating.translation import is_of, writes_checkpoints

WORDS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}  # of precision
USUAL = SimpleNamespace(
    fast_dev_run=False, min_epochs=None, min_steps=None, overfit_batches=0.0, precision="32-true", num_nodes=1,
    max_epochs=None, max_steps=-1, log_every_n_steps=50, num_sanity_val_steps=2, accumulate_grad_batches=1,
    limit_train_batches=1.0, limit_val_batches=1.0, limit_test_batches=1.0, limit_predict_batches=1.0,
    enable_progress_bar=True, barebones=False, gradient_clip_val=None, gradient_clip_algorithm=None,
    val_check_interval=1.0, check_val_every_n_epoch=1, default_root_dir=None,
)  # fmt: skip
SAID = (
    "fast_dev_run", "min_epochs", "min_steps", "overfit_batches", "num_nodes", "limit_train_batches",
    "limit_val_batches", "limit_test_batches", "limit_predict_batches", "barebones",
)  # fmt: skip


class Answers:
    """What arguments, callbacks and loggers say."""

    given: Any = USUAL
    callbacks: list[Any]
    loggers: list[Any]
    ckpt_path: str | None = None
    """The file that the run goes on with, if there is one."""

    @property
    def logger(self) -> Any:
        """The first logger; None where there is none."""
        return self.loggers[0] if self.loggers else None

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """Those that write checkpoints."""
        return [one for one in self.callbacks if writes_checkpoints(one)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first that writes checkpoints, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """Each `EarlyStopping`."""
        return [one for one in self.callbacks if is_of(one, "EarlyStopping")]

    @property
    def early_stopping_callback(self) -> Any:
        """The first `EarlyStopping`, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> None:
        """None: the plugin progress draws."""
        return None

    @property
    def precision(self) -> str:
        """In Lightning's words."""
        return WORDS.get(str(self.given.precision), str(self.given.precision))

    @property
    def node_rank(self) -> int:
        """Of this machine."""
        return int(os.environ.get("GROUP_RANK", os.environ.get("NODE_RANK", "0")))

    @property
    def num_devices(self) -> int:
        """Ranks on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


for _name in SAID:
    setattr(Answers, _name, property(operator.attrgetter(f"given.{_name}"), doc="As it was given."))


class BeforeRun(Answers):
    """A trainer before its first run."""

    current_epoch = global_step = 0
    should_stop = interrupted = sanity_checking = training = validating = testing = predicting = False
    datamodule = model = lightning_module = train_dataloader = val_dataloaders = None

    def __init__(self, given: SimpleNamespace, callbacks: list[Any], loggers: list[Any]) -> None:
        self.given, self.callbacks, self.loggers = given, callbacks, loggers

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer.{name} is known once fit, validate, test or predict has begun a run")

    @property
    def max_epochs(self) -> int:
        """Epochs of the run; -1 for no limit."""
        epochs, steps = self.given.max_epochs, self.given.max_steps
        return (1000 if steps == -1 and self.given.max_time is None else -1) if epochs is None else epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run; -1 for no limit."""
        return int(self.given.max_steps)

    @property
    def optimizers(self) -> list[Any]:
        """None yet."""
        return []

    @property
    def state(self) -> Any:
        """With `fn`, None yet."""
        return SimpleNamespace(fn=None, status="initializing", stage=None)

    @property
    def global_rank(self) -> int:
        """Of this process."""
        return int(os.environ.get("RANK", "0"))

    @property
    def local_rank(self) -> int:
        """Of this process on its machine."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.global_rank == 0

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of one optimizer step."""
        return int(self.given.accumulate_grad_batches)

    @property
    def log_every_n_steps(self) -> int:
        """As it was given."""
        return int(self.given.log_every_n_steps)

    @property
    def default_root_dir(self) -> str:
        """Where folders of runs are made."""
        return os.fspath(self.given.default_root_dir or "runs")


class Loop:
    """A loop of Lightning's, as far as programs read it; nothing of it can be set."""

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the loop of the run has no {name!r}; it has {', '.join(vars(self))}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} of a loop cannot be set: it is an argument of the Trainer")
