"""Every event with every argument, marked, as of hookline 0.1.

Kept as it is for ever: a plugin that was written so goes on working. Do not mend, shorten or reformat it for a newer
hookline; `docs/hook-api.md` says what may change instead.
"""

from hookline import CallbackInterface, hookimpl


class Events(CallbackInterface):
    """Hears every event, and keeps the arguments of the last call."""

    def __init__(self):
        self.heard = {}

    @hookimpl
    def on_setup(self, trainer):
        self.heard["on_setup"] = (trainer,)

    @hookimpl
    def on_begin_run(self, trainer, stage, config):
        self.heard["on_begin_run"] = (
            trainer,
            stage,
            config,
        )

    @hookimpl
    def on_begin_train(self, trainer, global_step):
        self.heard["on_begin_train"] = (
            trainer,
            global_step,
        )

    @hookimpl
    def on_begin_train_epoch(self, trainer, global_step, epoch):
        self.heard["on_begin_train_epoch"] = (
            trainer,
            global_step,
            epoch,
        )

    @hookimpl
    def on_end_backward(self, trainer, global_step, loss_tensor):
        self.heard["on_end_backward"] = (
            trainer,
            global_step,
            loss_tensor,
        )

    @hookimpl
    def on_begin_optimizer_step(self, trainer, optimizers):
        self.heard["on_begin_optimizer_step"] = (
            trainer,
            optimizers,
        )

    @hookimpl
    def on_end_optimizer_step(self, trainer, optimizers, stepped):
        self.heard["on_end_optimizer_step"] = (
            trainer,
            optimizers,
            stepped,
        )

    @hookimpl
    def on_end_train_step(self, trainer, global_step, train_step_collated_outputs, stepped):
        self.heard["on_end_train_step"] = (
            trainer,
            global_step,
            train_step_collated_outputs,
            stepped,
        )

    @hookimpl
    def on_begin_evaluation(self, trainer, stage, totals):
        self.heard["on_begin_evaluation"] = (
            trainer,
            stage,
            totals,
        )

    @hookimpl
    def on_begin_val_epoch(self, trainer, key):
        self.heard["on_begin_val_epoch"] = (
            trainer,
            key,
        )

    @hookimpl
    def on_end_val_step(self, trainer, outputs, batch, key, index):
        self.heard["on_end_val_step"] = (
            trainer,
            outputs,
            batch,
            key,
            index,
        )

    @hookimpl
    def on_end_val_epoch(self, trainer, global_step, val_step_collated_outputs, key):
        self.heard["on_end_val_epoch"] = (
            trainer,
            global_step,
            val_step_collated_outputs,
            key,
        )

    @hookimpl
    def on_begin_test_epoch(self, trainer, key):
        self.heard["on_begin_test_epoch"] = (
            trainer,
            key,
        )

    @hookimpl
    def on_end_test_step(self, trainer, outputs, batch, key, index):
        self.heard["on_end_test_step"] = (
            trainer,
            outputs,
            batch,
            key,
            index,
        )

    @hookimpl
    def on_end_test_epoch(self, trainer, global_step, test_step_collated_outputs, key):
        self.heard["on_end_test_epoch"] = (
            trainer,
            global_step,
            test_step_collated_outputs,
            key,
        )

    @hookimpl
    def on_begin_predict_epoch(self, trainer, key):
        self.heard["on_begin_predict_epoch"] = (
            trainer,
            key,
        )

    @hookimpl
    def on_end_predict_step(self, trainer, outputs, batch, key, index, places):
        self.heard["on_end_predict_step"] = (
            trainer,
            outputs,
            batch,
            key,
            index,
            places,
        )

    @hookimpl
    def on_end_predict_epoch(self, trainer, key):
        self.heard["on_end_predict_epoch"] = (
            trainer,
            key,
        )

    @hookimpl
    def on_end_validation(self, trainer, global_step, metrics):
        self.heard["on_end_validation"] = (
            trainer,
            global_step,
            metrics,
        )

    @hookimpl
    def on_end_train_epoch(self, trainer, global_step, train_step_collated_outputs):
        self.heard["on_end_train_epoch"] = (
            trainer,
            global_step,
            train_step_collated_outputs,
        )

    @hookimpl
    def on_boundary(self, trainer, global_step):
        self.heard["on_boundary"] = (
            trainer,
            global_step,
        )

    @hookimpl
    def on_end_train(self, trainer, global_step):
        self.heard["on_end_train"] = (
            trainer,
            global_step,
        )

    @hookimpl
    def on_checkpoint(self, trainer, path, kind):
        self.heard["on_checkpoint"] = (
            trainer,
            path,
            kind,
        )

    @hookimpl
    def on_log(self, trainer, metrics, global_step):
        self.heard["on_log"] = (
            trainer,
            metrics,
            global_step,
        )

    @hookimpl
    def on_log_object(self, trainer, name, value, global_step):
        self.heard["on_log_object"] = (
            trainer,
            name,
            value,
            global_step,
        )

    @hookimpl
    def on_exception(self, trainer, exception):
        self.heard["on_exception"] = (
            trainer,
            exception,
        )

    @hookimpl
    def on_end_run(self, trainer, stage, status, reason):
        self.heard["on_end_run"] = (
            trainer,
            stage,
            status,
            reason,
        )
