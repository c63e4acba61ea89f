"""What a plugin must leave as it found it: the process around the run."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hookline.testing.checks.conduct import predict
from hookline.testing.checks.probes import Boom, raising
from hookline.testing.checks.subject import Subject, check
from hookline.testing.digest import digest
from hookline.trainer import Trainer


def world() -> dict[str, Any]:
    """Return what the process has, by its name."""
    root, own = logging.getLogger(), logging.getLogger("hookline")
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_default_device()": torch.get_default_device(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "modes of torch": torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack(),
        "the handlers of signals": [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "sys.excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        "sys.stdout and sys.stderr": (sys.stdout, sys.stderr),
        "sys.path": list(sys.path),
        "sys.getprofile()": sys.getprofile(),
        "the working folder": os.getcwd(),
        "the environment": dict(os.environ),
        "the filters of warnings": list(warnings.filters),
        "warnings.showwarning": warnings.showwarning,
        "the handlers of logging": [*root.handlers, *own.handlers],
        "the levels of logging": (root.level, own.level),
        "gc.callbacks": list(gc.callbacks),
        "gc.isenabled()": gc.isenabled(),
    }


OF_IMPORTS = {
    *("the filters of warnings", "the handlers of logging", "the levels of logging", "the environment", "sys.path"),
}
"""What packages change when they are imported; not held against a run that imports one."""


@contextmanager
def left_alone(subject: Subject) -> Iterator[list[Trainer]]:
    """Assert that what happens inside leaves the process as it was; give a list for the trainers."""
    subject.train(max_steps=1)  # what the first run of a process imports and sets up
    trainers: list[Trainer] = []
    before, threads, modules = world(), set(threading.enumerate()), set(sys.modules)
    yield trainers
    after = world()
    own = before.keys() - (OF_IMPORTS if sys.modules.keys() - modules else set())
    changed = [f"{name}: {before[name]!r} has become {after[name]!r}" for name in own if after[name] != before[name]]
    assert not changed, f"the run leaves behind {'; '.join(changed)[:400]}"
    left = [thread.name for thread in threading.enumerate() if thread not in threads and not _ends(thread)]
    assert not left, f"the run leaves threads behind: {', '.join(left)}"
    for trainer in trainers:
        for name, module in trainer.module.named_modules():
            hooks = [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
            assert not hooks, f"the run leaves a hook on the module {name!r}: remove it by its handle"
        for optimizer in trainer.optimizers:
            hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
            assert not hooks, "the run leaves a hook on an optimizer: remove it by its handle"


def _ends(thread: threading.Thread) -> bool:
    thread.join(2)
    return not thread.is_alive()


@check("leaves the process, the working folder, the module and the optimizers as it found them")
def check_clean(subject: Subject) -> None:
    """Train, validate, test and predict in an empty folder, twice: the first time may import packages."""
    for _ in range(2):
        _run_in_a_folder(subject)


def _run_in_a_folder(subject: Subject) -> None:
    with TemporaryDirectory() as folder, chdir(folder), left_alone(subject) as trainers:
        torch.manual_seed(1)
        random.seed(1)
        drawn = digest(torch.get_rng_state()), random.getstate()
        plugin = subject.make()
        assert (digest(torch.get_rng_state()), random.getstate()) == drawn, "making the plugin draws random numbers"
        trainers.append(subject.train(plugin))
        trainers[0].test()
        predict(trainers[0])
        trainers[0].export_model()
        left = sorted(path.name for path in Path(folder).iterdir())
        assert not left, f"the run leaves in the working folder: {', '.join(left)}; write below trainer.run_dir"


EVENTS = (
    *("on_begin_train", "on_begin_train_epoch", "on_end_backward", "on_begin_optimizer_step", "on_end_optimizer_step"),
    *("on_end_train_step", "on_begin_evaluation", "on_begin_val_epoch", "on_end_val_step", "on_end_val_epoch"),
    *("on_end_validation", "on_boundary", "on_end_train_epoch", "on_end_train"),
)
VERBS = (
    *("take_window", "update", "run_window", "forward_backward", "prepare_batch", "call_model", "scale_loss"),
    *("run_backward", "should_step", "step_optimizer", "step_schedulers", "evaluate", "filter_log"),
)


@check("an error of another plugin, in any hook, ends the run as that error, and nothing is left behind", quick=False)
def check_errors(subject: Subject) -> None:
    """Raise in each event and around each verb, before this plugin and after it."""
    with TemporaryDirectory() as folder, chdir(folder), left_alone(subject) as trainers:
        for hook in (*EVENTS, *VERBS):
            for first in (True, False):
                plugin, breaks = subject.make(), raising(hook, wrapper=hook in VERBS)
                trainers.append(subject.trainer(*([breaks, plugin] if first else [plugin, breaks]), epochs=1))
                error = _error_of(trainers[-1])
                assert error is not None, f"an error that another plugin raises in {hook} is swallowed"
                text = f"an error raised in {hook} comes out as {type(error).__name__}: {error}"
                assert isinstance(error, Boom), text
                told = "plugin 'check.raises'" in " ".join(getattr(error, "__notes__", []))
                assert told, f"an error raised in {hook} is not told as of the plugin that raised it"


def _error_of(trainer: Trainer) -> Exception | None:
    try:
        trainer.train()
    except Exception as error:
        return error
    return None
