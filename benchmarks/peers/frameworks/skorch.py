"""skorch's NeuralNet."""

from __future__ import annotations

from typing import Any

import numpy as np
import skorch
import torch
from benchmarks.peers.work import Work
from skorch.callbacks import BatchScoring, Callback, Checkpoint, GradientNormClipping, ProgressBar
from torch import nn

WITHOUT = {
    "ranks": "has none of its own",
    "accumulate": "has none of its own",
    "validate": "evaluates within `fit` alone",
}


class Loss(nn.CrossEntropyLoss):
    """The loss as an object, which skorch makes itself."""


class Nothing(Callback):
    def on_batch_end(self, net: Any, **others: Any) -> None: ...


def _net(work: Work) -> skorch.NeuralNet:
    callbacks: Any = [(f"callback{number}", Nothing()) for number in range(work.callbacks)]
    if work.features:
        scoring = BatchScoring("accuracy", name="train_accuracy", on_train=True, lower_is_better=False)
        saver = Checkpoint(dirname=str(work.folder), monitor=None)
        callbacks = [GradientNormClipping(1.0), scoring, ProgressBar(), saver]
    model = work.model()
    net = skorch.NeuralNetClassifier(
        model, criterion=Loss, optimizer=torch.optim.SGD, lr=0.01, max_epochs=1, train_split=None, verbose=0,
        iterator_train=lambda dataset, **options: work.loader(), callbacks=callbacks, classes=np.arange(10),
    )  # fmt: skip
    return net


def train(work: Work) -> nn.Module:
    net = _net(work)
    net.fit(np.zeros((32 * work.steps, 1), np.float32), np.zeros(32 * work.steps, np.int64))
    return net.module_
