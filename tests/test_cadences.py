"""Cadences in a run: fractions of epochs and of times, and whole epochs, at the steps that arithmetic says."""

import itertools
import math
import types
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from hookline import CallbackInterface, hookimpl, sharded
from hookline.testing import Memory, TinyModule, on_ranks, tiny_trainer


@dataclass(eq=False)
class Notes(CallbackInterface):
    """Writes down at which steps a cadence is due at the boundary, validations come, and losses are logged."""

    cadence: str | None = None

    def __post_init__(self):
        self.due, self.validated, self.logged = [], [], []

    @hookimpl
    def on_boundary(self, trainer, global_step):
        if trainer.due(self.cadence):
            self.due.append(global_step)

    @hookimpl
    def on_end_validation(self, global_step):
        self.validated.append(global_step)

    @hookimpl
    def on_log(self, metrics, global_step):
        if "train_loss" in metrics:
            self.logged.append(global_step)


@dataclass(eq=False)
class Windows(CallbackInterface):
    size: int

    @hookimpl
    def get_window_size(self):
        return self.size


def steps_at(fraction, batches, window, epochs):
    """Return the steps that first reach a multiple of a fraction of an epoch."""
    places = [Fraction(0)]
    for epoch in range(epochs):
        places += [epoch + Fraction(min(end, batches), batches) for end in range(window, batches + window, window)]
    return [
        step
        for step, (before, after) in enumerate(itertools.pairwise(places), 1)
        if any(before < number * fraction <= after for number in range(1, math.ceil(epochs / fraction) + 1))
    ]


@pytest.mark.parametrize("samples", [8, 24, 50, 100])  # 1, 3, 7 and 13 batches, the last one short
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("cadence", "fraction"), [("0.25 epoch", "1/4"), ("0.1ep", "1/10"), (".75 epochs", "3/4")])
def test_a_fraction_is_due_at_the_first_step_that_reaches_it(samples, window, cadence, fraction):
    notes = Notes(cadence)
    plugins, options = [notes, Windows(window)], {"evaluate_every": cadence, "log_every": cadence}
    trainer = tiny_trainer(plugins, TinyModule(samples), epochs=3, train_batch_size=8 * window, **options)
    trainer.train()
    expected = steps_at(Fraction(fraction), math.ceil(samples / 8), window, 3)
    end = [] if trainer.global_step in expected else [trainer.global_step]
    assert notes.due == expected
    assert notes.validated == notes.logged == expected + end


def test_a_fraction_counts_the_steps_of_a_limited_epoch():
    notes = Notes("0.5 epoch")
    tiny_trainer([notes], max_train_steps_per_epoch=4, evaluate_every="0.5 epoch").train()
    assert notes.due == notes.validated == [2, 4, 6, 8]


def test_whole_epochs_come_at_their_ends():
    notes = Notes("2.0 epochs")
    tiny_trainer([notes], epochs=5, evaluate_every="2 epochs", log_every="2 epochs").train()
    assert notes.due == [14, 28]
    assert notes.validated == notes.logged == [14, 28, 35]


def test_more_than_one_epoch_and_a_half():
    notes = Notes("1.5 epochs")
    tiny_trainer([notes], epochs=4, evaluate_every="1.5 epochs").train()
    assert notes.due == [11, 21]
    assert notes.validated == [11, 21, 28]


def test_a_resume_at_any_step_keeps_what_is_due():
    options = {"evaluate_every": "0.25 epoch", "log_every": "0.25 epoch"}
    whole, memory = Notes("0.25 epoch"), Memory(every="1 steps")
    tiny_trainer([whole, memory], **options).train()
    assert whole.due == [2, 4, 6, 7, 9, 11, 13, 14]
    for step in range(1, 14):
        notes = Notes("0.25 epoch")
        tiny_trainer([notes, Memory(memory.states[step])], **options).train()
        for name in ("due", "validated", "logged"):
            assert getattr(notes, name) == [at for at in getattr(whole, name) if at > step], (name, step)


def test_a_resume_with_batches_of_half_the_size_repeats_nothing():
    memory = Memory(every="1 steps")
    tiny_trainer([memory], TinyModule(64), epochs=1).train()
    notes = Notes("0.25 epoch")
    resumed = tiny_trainer([notes, Memory(memory.states[5])], TinyModule(64), epochs=1, train_batch_size=4)
    resumed.train()
    assert notes.due == [5 + 2, 5 + 6]  # at 5/8; 12/16 and 16/16 are left


class Endless(IterableDataset):
    def __iter__(self):
        return iter(TinyModule().get_train_dataloader(lambda dataset: None, 1).dataset)


class Stream(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(Endless(), batch_size)


@pytest.mark.parametrize("options", [{"evaluate_every": "0.25 epoch"}, {"log_every": "0.5ep"}, {}])
def test_a_stream_without_a_length_is_refused(options):
    text = '"0.5 epochs" needs' if "evaluate_every" not in options else '"0.25 epochs" needs'
    trainer = tiny_trainer([Notes("0.5 epoch")], Stream(), **options)
    with pytest.raises(ValueError, match=f"{text} the length of an epoch, which the training loader does not tell: "):
        trainer.train()
    assert trainer.global_step == (0 if options else 1)


def test_a_stream_has_the_length_of_its_limit():
    notes = Notes("0.5 epoch")
    tiny_trainer([notes], Stream(), max_train_steps_per_epoch=6).train()
    assert notes.due == [3, 6, 9, 12]
    short = Notes("0.25 epoch")  # the stream ends after 7 of 16 steps: the rest is due at the end
    tiny_trainer([short], Stream(), max_train_steps_per_epoch=16, evaluate_every="0.25 epoch").train()
    assert short.due == short.validated == [4, 7, 11, 14]


class Uneven(TinyModule):
    """Rank 1 has three batches, rank 0 five."""

    def get_train_dataloader(self, sampler, batch_size):
        samples = batch_size * (3 if self.trainer.rank else 5)
        dataset = TinyModule(samples).get_train_dataloader(lambda dataset: None, 1).dataset
        return sharded(DataLoader(dataset, batch_size))


def of_a_rank():
    torch.set_num_threads(1)
    told = []
    for uneven in ("drop", "pad"):
        notes = Notes("0.25 epoch")
        plugins = {"ddp": {}, "distributed": {"uneven": uneven}, "notes": notes}
        tiny_trainer(plugins, Uneven(dropout=0), evaluate_every="0.25 epoch").train()
        told.append((notes.due, notes.validated))
    return told


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_of_other_lengths_agree():
    drop, pad = [1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 7, 8, 9, 10]  # of three, and of five batches
    assert on_ranks(of_a_rank, 2) == [[(drop, drop), (pad, pad)]] * 2


def test_a_time_is_due_at_the_end_of_the_step_after_it_was_reached(monkeypatch):
    class Ticks(TinyModule):
        """Takes 4 seconds a step, by a clock of its own."""

        now = 100.0

        def train_step(self, global_step, batch, device):
            Ticks.now += 4
            return super().train_step(global_step, batch, device)

    class Heard(CallbackInterface):
        observer = True

        def __init__(self):
            self.told, self.boundaries = [], []

        @hookimpl
        def on_log(self, metrics, global_step):
            self.told += [(global_step, name) for name in metrics]

        @hookimpl
        def on_boundary(self, trainer, global_step):
            if trainer.due("10 s"):
                self.boundaries.append(global_step)

    monkeypatch.setattr("hookline.loop.ends.time", types.SimpleNamespace(monotonic=lambda: Ticks.now))
    heard = Heard()
    trainer = tiny_trainer([heard], Ticks(), epochs=1, evaluate_every="10 s", log_every="10 s", eval_when_finish=False)
    trainer.train()
    assert heard.boundaries == [3, 5]  # after 12, 20 and 28 seconds of 7 steps
    assert [step for step, name in heard.told if name == "val_loss"] == [4, 6]
    assert [step for step, name in heard.told if name == "train_loss"] == [4, 6, 7]  # and what is left
    assert trainer.counters.evaluations == 2
