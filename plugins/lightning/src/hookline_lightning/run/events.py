"""Which events of Lightning's modules and callbacks are told, and which are not."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable
from typing import Any

from hookline import nearest
from hookline_lightning.run.bridge import Bridge, call, overridden
from hookline_lightning.run.members import calls_itself
from hookline_lightning.translating.translation import HOMES

log = logging.getLogger("hookline.lightning")

STAGED = [
    f"on_{stage}_{event}"
    for stage in ("validation", "test", "predict")
    for event in ("start", "end", "epoch_start", "epoch_end", "batch_start", "batch_end")
]
BOTH = [
    "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end", *STAGED,
    "on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad",
    "on_save_checkpoint", "on_load_checkpoint",
]  # fmt: skip
OF_CALLBACKS = [*BOTH, "on_sanity_check_start", "on_sanity_check_end", "on_exception"]
OF_MODULES = [
    *BOTH, "on_before_batch_transfer", "on_after_batch_transfer",
    "on_validation_model_eval", "on_validation_model_train", "on_test_model_eval", "on_test_model_train",
    "on_predict_model_eval", "on_predict_model_train", "on_validation_model_zero_grad",
]  # fmt: skip
OF_DATA = [
    "on_before_batch_transfer", "on_after_batch_transfer", "on_save_checkpoint", "on_load_checkpoint", "on_exception"
]  # fmt: skip
SEPARATELY = ("setup", "teardown", "on_save_checkpoint", "on_load_checkpoint", "on_exception")  # told by the plugin
LONG_STEPS = {  # event: the hooks that it needs, of those within a step
    "on_before_backward": ["run_backward"],
    "on_after_backward": ["on_end_backward"],
    "on_before_optimizer_step": ["on_begin_optimizer_step"],
    "on_before_zero_grad": ["on_end_optimizer_step"],
    "on_train_batch_end": ["on_end_optimizer_step", "on_end_train_step"],
}
DECIDING = ("EarlyStopping", "Checkpoint")  # callbacks that hear the end of a training epoch last, as in Lightning
MODES = "the run sets modes before and after each evaluation, and puts every submodule back to what it was"
GONE = {  # that once were events of Lightning's, or are of callbacks alone
    "on_epoch_start", "on_epoch_end", "on_batch_start", "on_batch_end", "on_pretrain_routine_start",
    "on_pretrain_routine_end", "on_init_start", "on_init_end", "on_keyboard_interrupt", "on_train_dataloader",
    "on_val_dataloader", "on_test_dataloader", "on_predict_dataloader", "on_hpc_save", "on_hpc_load",
    "on_sanity_check_start", "on_sanity_check_end", "on_exception",
}  # fmt: skip
REFUSED = {  # methods of modules, and why
    "on_validation_model_eval": MODES, "on_validation_model_train": MODES, "on_test_model_eval": MODES,
    "on_test_model_train": MODES, "on_predict_model_eval": MODES, "on_predict_model_train": MODES,
    "configure_sharded_model": "it is gone from Lightning; write configure_model",
    "training_step_end": "it is gone from Lightning; do it in training_step",
    "validation_step_end": "it is gone from Lightning; do it in validation_step",
    "training_epoch_end": "it is gone from Lightning; keep outputs yourself and use on_train_epoch_end",
    "validation_epoch_end": "it is gone from Lightning; keep outputs yourself and use on_validation_epoch_end",
    "test_epoch_end": "it is gone from Lightning; keep outputs yourself and use on_test_epoch_end",
    "predict_epoch_end": "it is gone from Lightning; keep outputs yourself and use on_predict_epoch_end",
    "tbptt_split_batch": "it is gone from Lightning; split the batch in training_step",
}  # fmt: skip
OWN = {  # callbacks of the real package, or ours in their place, that do not run, and what does the same here
    "LearningRateMonitor": "the plugin monitor with learning_rate: true",
    "DeviceStatsMonitor": "the plugin monitor with gpu_utilization and cpu_utilization",
    "ThroughputMonitor": "the plugin monitor with throughput: true",
    "TQDMProgressBar": "the plugin progress",
    "RichProgressBar": "the plugin progress",
    "ProgressBar": "the plugin progress",
    "GradientAccumulationScheduler": "the plugin accumulate, whose window is the same all along",
    "StochasticWeightAveraging": "the plugin swa",
    "WeightAveraging": "the plugin ema",
    "EMAWeightAveraging": "the plugin ema",
    "ModelSummary": "the plugin summary",
    "RichModelSummary": "the plugin summary",
    "ModelPruning": "torch.nn.utils.prune in a callback of your own",
    "BatchSizeFinder": "the plugin batch_find",
    "LearningRateFinder": "the plugin lr_find",
    "SpikeDetection": "the plugin finite or guard",
}
RUNNING = {  # those that run beside a module of Lightning, and what does the same for other modules
    "ModelCheckpoint": "the plugin checkpoint with keep_best and monitor, or model_saving",
    "EarlyStopping": "the plugin early_stop",
    "Timer": "the option max_time",
}


def refuse_unheard(bridge: Bridge, callbacks: Iterable[Any]) -> None:
    """Refuse what the user has written and nobody would call.

    Raises:
        ValueError: a method of the module or of a callback, by name.
    """
    module = bridge.module
    for name, why in REFUSED.items():
        if overridden(module, name):
            raise ValueError(f"{type(module).__name__}.{name}() is not called here: {why}")
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__module__.startswith(HOMES) and kind.__name__ in OWN:
                raise ValueError(
                    f"the callback {type(callback).__name__} is not called here: it is {OWN[kind.__name__]}; "
                    "hookline_lightning.Trainer(callbacks=[…]) takes it as that"
                )
    data = [] if bridge.view.datamodule is None else [(bridge.view.datamodule, OF_DATA)]
    for thing, known in [(module, OF_MODULES), *((callback, OF_CALLBACKS) for callback in callbacks), *data]:
        for name in dir(type(thing)):
            if not name.startswith("on_") or name in known or not callable(overridden(thing, name)):
                continue
            if calls_itself(thing, name):
                continue  # a helper that the user's own code calls
            said = f"{type(thing).__name__}.{name}() is no event that is told here"
            meant = name in GONE or difflib.get_close_matches(name, known, 1, 0.8)
            if meant and known is not OF_DATA:  # Lightning's own data modules have few events
                raise ValueError(f"{said}{nearest(name, known)}; name it otherwise if it is none")
            log.warning("%s, and nothing in its class calls it", said)


def listeners(bridge: Bridge, callbacks: Iterable[Any]) -> dict[str, list[Callable[..., Any]]]:
    """Return who hears which event: callbacks in their order, then the module.

    Those that stop or save by a value hear the end of a training epoch last: what the module logs in it is known then.
    """
    found: dict[str, list[Callable[..., Any]]] = {}
    for callback in callbacks:
        for name in OF_CALLBACKS:
            if name not in SEPARATELY and (method := overridden(callback, name)):
                late = name == "on_train_epoch_end" and any(k.__name__ in DECIDING for k in type(callback).__mro__)
                found.setdefault(f"{name} late" if late else name, []).append(_bound(method, bridge))
    for name in OF_MODULES:
        if name not in SEPARATELY and (method := overridden(bridge.module, name)):
            found.setdefault(name, []).append(_trimmed(method))
    return found


def _bound(method: Callable[..., Any], bridge: Bridge) -> Callable[..., Any]:
    return lambda *arguments: call(method, bridge.view, bridge.module, *arguments)


def _trimmed(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: call(method, *arguments)
