"""A plugin that keeps what a training tells, to be compared with that of another."""

import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import digest


class Told(CallbackInterface):
    """Keeps what is logged, and what the outputs of each step and of each epoch are."""

    def __init__(self):
        self.all = []

    @hookimpl
    def on_log(self, metrics, global_step):
        self.all.append((global_step, dict(metrics)))

    def on_end_train_step(self, global_step, *outputs):
        self.all.append((global_step, digest([*outputs])))

    def on_end_train_epoch(self, global_step, *outputs):
        self.all.append((global_step, digest([one for one in outputs if isinstance(one, torch.Tensor)])))
