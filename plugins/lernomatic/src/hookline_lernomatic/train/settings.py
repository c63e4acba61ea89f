"""What a trainer is asked and told between its trainings: rates, schedules, data, parameters of its model."""

from __future__ import annotations

from typing import Any

from hookline_lernomatic.model.common import LernomaticModel
from hookline_lernomatic.train.setup import Setup


class Settings(Setup):
    """The getters and setters of LERNOMATIC."""

    _applied = False
    """Whether a schedule has been applied."""

    def get_num_epochs(self) -> int:
        """Return the epochs to train."""
        return self.num_epochs

    def get_cur_epoch(self) -> int:
        """Return the current epoch, from 0."""
        return self.cur_epoch

    def get_model(self) -> LernomaticModel | None:
        """Return the model."""
        return self.model

    def get_model_params(self) -> dict[str, Any] | None:
        """Return the weights of the model; None without one."""
        return None if self.model is None else self.model.get_net_state_dict()

    def freeze_to(self, layer_num: int) -> None:
        """Train none of the model's first `layer_num` parameters."""
        _there(self.model).freeze_to(layer_num)

    def unfreeze_to(self, layer_num: int) -> None:
        """Train the model's first `layer_num` parameters."""
        _there(self.model).unfreeze_to(layer_num)

    # Data -----------------------------------------------------------------------------

    def set_batch_size(self, batch_size: int) -> None:
        """Make the loaders anew, with training batches of this size."""
        self.batch_size = batch_size
        self._init_dataloaders()

    def set_train_dataset(self, train_dataset: Any) -> None:
        """Make the loaders anew, with other data to train on."""
        self.train_dataset = train_dataset
        self._init_dataloaders()

    def set_val_dataset(self, val_dataset: Any) -> None:
        """Make the loaders anew, with other data to validate on."""
        self.val_dataset = val_dataset
        self._init_dataloaders()

    def set_test_dataset(self, test_dataset: Any) -> None:
        """Make the loaders anew, with other data to test on."""
        self.test_dataset = test_dataset
        self._init_dataloaders()

    # Rates ----------------------------------------------------------------------------

    def get_learning_rate(self) -> float:
        """Return the learning rate of the first group of the first optimizer."""
        return next(iter(self.optimizers().values())).param_groups[0]["lr"]  # type: ignore[no-any-return]

    def set_learning_rate(self, lr: float, param_zero: bool = True) -> None:
        """Set the learning rate of each optimizer: of its first group, or of all its groups."""
        for optimizer in self.optimizers().values():
            for group in optimizer.param_groups[: 1 if param_zero else None]:
                group["lr"] = lr

    def get_momentum(self) -> float | None:
        """Return the momentum of the first optimizer, which of Adam is its first beta; None where it has none."""
        group = next(iter(self.optimizers().values())).param_groups[0]
        return group.get("momentum", group.get("betas", (None,))[0])  # type: ignore[no-any-return]

    def set_momentum(self, momentum: float) -> None:
        """Set the momentum of all optimizers that have one."""
        for optimizer in self.optimizers().values():
            for group in optimizer.param_groups:
                if "momentum" in group:
                    group["momentum"] = momentum
                elif "betas" in group:
                    group["betas"] = (momentum, *group["betas"][1:])

    # Schedules ------------------------------------------------------------------------

    def get_lr_scheduler(self) -> Any:
        """Return the schedule of the learning rate."""
        return self.lr_scheduler

    def set_lr_scheduler(self, lr_scheduler: Any) -> None:
        """Schedule the learning rate."""
        self.lr_scheduler = lr_scheduler

    def get_mtm_scheduler(self) -> Any:
        """Return the schedule of the momentum."""
        return self.mtm_scheduler

    def set_mtm_scheduler(self, mtm_scheduler: Any) -> None:
        """Schedule the momentum."""
        self.mtm_scheduler = mtm_scheduler

    def apply_lr_schedule(self) -> None:
        """Set the learning rate that the schedule has for this place.

        A `train_epoch` of the base calls it before each iteration; one of a subclass calls it where it wants it.
        """
        self.set_learning_rate(self._scheduled(self.lr_scheduler))

    def apply_mtm_schedule(self) -> None:
        """Set the momentum that the schedule has for this place; called as `apply_lr_schedule` is."""
        self.set_momentum(self._scheduled(self.mtm_scheduler))

    def _scheduled(self, schedule: Any) -> float:
        self._applied = True
        rate = getattr(schedule, "rate_for", None)
        return schedule.get_lr(self.loss_iter) if rate is None else rate(self)  # type: ignore[no-any-return]

    # Watching -------------------------------------------------------------------------

    def set_tb_writer(self, writer: Any) -> None:
        """Write losses and accuracies to a `SummaryWriter`, too."""
        self.tb_writer = writer


def _there(model: LernomaticModel | None) -> LernomaticModel:
    if model is None:
        raise ValueError("this trainer has no `model`: freeze the models that it has by themselves")
    return model
