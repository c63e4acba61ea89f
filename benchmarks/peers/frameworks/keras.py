"""Keras 3 on torch: its `fit` around the same torch network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"
import keras
from benchmarks.peers.work import Work
from torch import nn

WITHOUT = {
    "ranks": "trains on one process with torch (its DataParallel needs JAX)",
    "features": "its fit logs and saves by epochs alone",
}


class Callback(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None: ...


def _model(work: Work) -> tuple[Any, nn.Module]:
    net, accumulate = work.model(), work.accumulate if work.accumulate > 1 else None
    model = keras.Sequential([keras.layers.TorchModuleWrapper(net)])
    model.compile(
        optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=accumulate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model, net


def _endless(work: Work) -> Iterator[Any]:
    """Give batches as Keras wants a generator to: of tuples, and without an end."""
    while True:
        yield from (tuple(batch) for batch in work.loader())


def train(work: Work) -> nn.Module:
    model, net = _model(work)
    callbacks = [Callback() for _ in range(work.callbacks)]
    model.fit(_endless(work), steps_per_epoch=work.steps, epochs=1, verbose=0, callbacks=callbacks)
    return net


def validate(work: Work) -> float:
    return float(_model(work)[0].evaluate(_endless(work), steps=work.steps, verbose=0))
