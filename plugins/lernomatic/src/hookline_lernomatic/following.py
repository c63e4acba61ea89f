"""Keeps a trainer of LERNOMATIC in step with the run: its attributes, its history, its files and its stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import hookline
from hookline import CallbackInterface, Stage, hookimpl
from hookline_lernomatic.own import begin_base_epoch


class Following(CallbackInterface):
    """Keeps a trainer's attributes and files in step with the run."""

    def __init__(self, facade: Any) -> None:
        self.facade = facade

    @hookimpl
    def on_begin_train(self, trainer: hookline.Trainer) -> None:
        facade, bridge = self.facade, cast(Any, trainer.module)
        bridge.give_back()
        facade._stand(facade._ahead + trainer.epoch, facade._ahead + trainer.epoch)
        self._check(trainer)
        Path(facade.checkpoint_dir).mkdir(parents=True, exist_ok=True)

    def _check(self, trainer: hookline.Trainer) -> None:
        """Find before the first step what would fail or have no effect after it."""
        facade = self.facade
        if (facade.save_every or facade.save_best) and not facade._owns("save_checkpoint"):
            facade.get_trainer_params()
            for model in facade.models().values():
                model.get_params()
        if facade.val_loader is None:
            for name, off in (("stop_when_acc", 0.0), ("early_stop", None), ("save_best", False)):
                if getattr(facade, name) != off:
                    trainer.say_once(f"{name}={getattr(facade, name)} has no effect: there are no data to validate on")

    @hookimpl
    def on_begin_run(self, stage: Stage) -> None:
        if stage is Stage.TRAIN and self._base_trains():  # before the core warns of models in eval mode
            for model in self.facade.models().values():
                model.set_train()

    @hookimpl
    def on_begin_train_epoch(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        cast(Any, trainer.module).require_same()
        self.facade._stand(self.facade.start_epoch, self.facade._ahead + trainer.epoch)
        if self._base_trains():
            begin_base_epoch(self.facade, trainer)

    def _base_trains(self) -> bool:
        """Tell whether the base does the epochs; one of the user's begins as its user says."""
        return bool(self.facade._by_base or not self.facade._owns("train_epoch"))

    @hookimpl
    def on_end_train_step(self, trainer: hookline.Trainer) -> None:  # type: ignore[override]
        facade, index = self.facade, trainer.position - 1
        if facade.tb_writer is not None and trainer.rank == 0 and index > 0 and index % facade.print_every == 0:
            facade.tb_writer.add_scalar("train_loss", facade.get_cur_loss(), facade.loss_iter - 1)

    @hookimpl
    def on_begin_val_epoch(self) -> None:
        for model in self.facade.models().values():  # which may have a `set_eval` of its own
            model.set_eval()

    @hookimpl
    def on_begin_test_epoch(self) -> None:
        self.on_begin_val_epoch()

    @hookimpl
    def on_end_val_step(self, trainer: hookline.Trainer, outputs: Any) -> None:
        facade = self.facade
        if not trainer.sanity_checking:
            facade.make_room("val_loss_history", 1)
            facade.val_loss_history[facade.val_loss_iter] = outputs[0]
            facade.val_loss_iter += 1

    @hookimpl
    def on_end_validation(self, trainer: hookline.Trainer, metrics: Mapping[str, float]) -> None:
        facade = self.facade
        if facade._by_base or not facade._owns("val_epoch"):
            facade._keep_accuracy(metrics)
        facade._keep_best(metrics)
        self._judge(trainer, metrics)

    def _judge(self, trainer: hookline.Trainer, metrics: Mapping[str, float]) -> None:
        """Stop where the accuracy of a validation says so."""
        facade = self.facade
        asked = [name for name in ("stop_when_acc", "early_stop", "save_best") if getattr(facade, name)]
        if (accuracy := metrics.get("val_acc")) is None:
            if asked:
                trainer.say_once(
                    f"{', '.join(asked)} has no effect: the validation gives no accuracy, which the base knows where "
                    "outputs are (samples, classes) and targets are classes; a val_epoch of your own writes acc_history"
                )
            return
        history = facade.get_acc_history()
        if 0 < facade.stop_when_acc <= accuracy:
            trainer.stop(f"the accuracy is {accuracy:.4g} (stop_when_acc={facade.stop_when_acc})", alone=False)
        elif facade.early_stop is not None and len(history) > (waited := int(facade.early_stop["num_epochs"])):
            if history[-waited:].max() < history[:-waited].max() + facade.early_stop["improv"]:
                trainer.stop(f"{waited} epochs without a better accuracy (early_stop)", alone=False)

    @hookimpl
    def on_boundary(self, trainer: hookline.Trainer) -> None:
        facade = self.facade
        facade._stand(facade.start_epoch, facade._ahead + trainer.epoch)
        if trainer.rank:
            return
        if facade.save_every and trainer.due("epoch" if facade.save_every < 0 else f"{facade.save_every} steps"):
            name = f"{facade.checkpoint_name}_epoch_{facade.cur_epoch}_iter_{trainer.global_step}"
            facade.save_checkpoint(facade._file(name))
        if facade.save_hist and trainer.due("epoch"):
            facade.save_history(facade._file(f"{facade.checkpoint_name}_history"))
