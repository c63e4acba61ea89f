"""Batches that are loaded ahead train the same bits, are resumed from where training was, and leave nothing behind."""

import functools
import gc
import multiprocessing
import random
import threading
import traceback

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hookline import CallbackInterface, Stage, hookimpl
from hookline.testing import Memory, PlainModule, TinyModule, digest, on_ranks, tiny_trainer, train_tiny
from hookline_prefetch import Prefetch

LAST = 14  # steps of `tiny_trainer`: two epochs of seven batches


class Noisy(TensorDataset):
    """Draws in torch and in Python for each sample."""

    def __getitem__(self, index):
        inputs, *others = super().__getitem__(index)
        return inputs + torch.randn(8) * random.random(), *others


class Augmented(TinyModule):
    """Trains on samples that are drawn upon, by loading workers or without."""

    workers = 0

    def get_train_dataloader(self, sampler, batch_size):
        data = Noisy(*super().get_train_dataloader(sampler, batch_size).dataset.tensors)
        return DataLoader(data, batch_size, sampler=sampler(data), num_workers=self.workers)


class Ahead(Augmented):
    workers = 2


class Stream(IterableDataset):
    """Gives samples in an order drawn anew, and counts them."""

    def __init__(self, tensors):
        self.tensors, self.loaded = tensors, 0

    def __iter__(self):
        for index in torch.randperm(len(self.tensors[0])).tolist():
            self.loaded += 1
            yield tuple(tensor[index] for tensor in self.tensors)


class Streamed(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        self.stream = Stream(super().get_train_dataloader(sampler, batch_size).dataset.tensors)
        return DataLoader(self.stream, batch_size)


class Stateful:
    """Goes on from its own state, and would give other batches from another one."""

    def __init__(self, tensors, size):
        self.parts, self.place = [torch.split(tensor, size) for tensor in tensors], 0

    def __iter__(self):
        while self.place < len(self.parts[0]):
            self.place += 1
            yield [part[self.place - 1] for part in self.parts]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Stated(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        return Stateful(super().get_train_dataloader(sampler, batch_size).dataset.tensors, batch_size)

    def get_val_dataloaders(self, sampler, batch_size):
        return super().get_train_dataloader(sampler, batch_size)


def trained(plugins, module, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


def children():
    gc.collect()  # what other tests have left
    return [*multiprocessing.active_children(), *threading.enumerate()]


# The same bits ------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Augmented, Ahead, Streamed, Stated])
@pytest.mark.parametrize("options", [{"batches": 1}, {"batches": 30}])
def test_the_bits_are_those_of_a_run_without_it(module, options):
    plain, ahead = trained([], module()), trained([Prefetch(**options)], module())
    assert digest(ahead.module.state_dict()) == digest(plain.module.state_dict())
    assert ahead.module.seen == plain.module.seen
    assert ahead.metrics == plain.metrics
    assert digest(ahead.randomness.get_state()) == digest(plain.randomness.get_state())


def test_windows_limits_and_evaluations_are_the_same():
    def run(*plugins):
        others = {"accumulate": {"steps": 3}, "limits": {"train_batches": 5, "val_batches": 2}}
        found = trained({**others, **dict(plugins)}, Augmented(), evaluate_every="1 steps", train_batch_size=24)
        return digest(found.module.state_dict()), found.module.seen, found.metrics, found.counters.samples

    assert run() == run(("prefetch", {}))


def lines(samples):
    """Collate to lists of samples, of which nobody can guess that they are samples."""
    return {"rows": [tuple(sample) for sample in samples], "note": "text"}


class Lists(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        data = super().get_train_dataloader(sampler, batch_size).dataset
        return DataLoader(data, batch_size, sampler=sampler(data), collate_fn=lines)

    def train_step(self, global_step, batch, device):
        inputs, targets, ids = (torch.stack(column) for column in zip(*batch["rows"], strict=True))
        return super().train_step(global_step, (inputs, targets, ids), device)

    val_step = train_step


def test_the_loader_still_says_how_many_samples_a_batch_has():
    plain, ahead = (trained(plugins, Lists(), evaluate_every="2 steps") for plugins in ([], [Prefetch(batches=3)]))
    assert ahead.counters.samples == plain.counters.samples == 2 * 50
    assert ahead.metrics == plain.metrics


# A resume -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", [Augmented, Streamed, Stated])
def test_a_resume_goes_on_behind_the_batches_that_were_trained_on(module):
    memory, whole = Memory(every="1 steps"), module()
    trained([memory, Prefetch(batches=3)], whole)
    for step in (2, 6, 7, 12):
        resumed = module()
        trained([Memory(memory.states[step]), Prefetch(batches=3)], resumed)
        assert resumed.seen == whole.seen[step:]
        assert digest(resumed.state_dict()) == digest(whole.state_dict())
        alone = module()  # and one without the plugin goes on with the same state
        trained([Memory(memory.states[step])], alone)
        assert digest(alone.state_dict()) == digest(whole.state_dict())


# What is loaded, and when -------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3])
def test_no_more_batches_than_asked_for_are_loaded_ahead(batches):
    module, loaded = Streamed(), []

    class Look(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, global_step):
            loaded.append(module.stream.loaded / 8)

    trained([Look(), Prefetch(batches=batches)], module, epochs=1)
    assert [min(step + 1 + batches, 6.25) for step in range(7)] == loaded


class Failing(TensorDataset):
    def __getitem__(self, index):
        if index == 33:
            raise OSError("sample 33 cannot be read")
        return super().__getitem__(index)


class Broken(TinyModule):
    def get_train_dataloader(self, sampler, batch_size):
        data = Failing(*super().get_train_dataloader(sampler, batch_size).dataset.tensors)
        return DataLoader(data, batch_size, sampler=range(len(data)))


def test_an_error_in_loading_ends_the_run_at_its_step():
    before = children()
    for plugins in ([], [Prefetch(batches=4)]):
        trainer = tiny_trainer(plugins, Broken(), evaluate_every=None)
        with pytest.raises(OSError, match="sample 33 cannot be read") as raised:
            trainer.train()
        assert trainer.global_step == 4
        said = "".join(traceback.format_exception(raised.value))
        assert "while loading samples [32, 33, 34" in said  # of a worker the text holds it
        assert "__getitem__" in said
        assert "by plugin 'prefetch'" not in said
        del raised, trainer
    assert children() == before


def test_what_lies_behind_a_limit_is_not_missed():
    trainer = trained({"limits": {"train_batches": 4, "val_batches": 4}, "prefetch": {"batches": 4}}, Broken())
    assert trainer.global_step == 8


# The end ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_nothing_runs_on_when_training_ends_in_an_epoch(how):
    class End(CallbackInterface):
        @hookimpl
        def on_end_train_step(self, trainer, global_step):
            if global_step == 3:
                if how == "interrupt":
                    raise KeyboardInterrupt
                trainer.stop("enough")

    before, plugin = children(), Prefetch()
    trainer = tiny_trainer([End(), plugin])
    if how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
        assert trainer.global_step == 3
    assert children() == before
    assert trainer.validate() == tiny_trainer([], trainer.module).validate()
    assert children() == before


def test_the_loaders_of_the_user_stay_as_they_were():
    loader = DataLoader(TensorDataset(*TinyModule().get_train_dataloader(list, 8).dataset.tensors), 8)

    class Kept(TinyModule):
        def get_train_dataloader(self, sampler, batch_size):
            return loader

    before = dict(vars(loader))
    trained([Prefetch()], Kept(), evaluate_every=None)
    assert vars(loader) == before


def test_a_batch_that_another_plugin_makes_is_moved_as_ever():
    moved = []

    class Doubled(CallbackInterface):
        @hookimpl(wrapper=True)
        def take_window(self):
            return [[tensor * 2 if tensor.is_floating_point() else tensor for tensor in batch] for batch in (yield)]

        @hookimpl(wrapper=True)
        def prepare_batch(self, batch, stage):
            made = yield
            if stage is Stage.TRAIN:
                moved.append(made is batch)
            return made

    plain, ahead = trained([Doubled()], TinyModule()), trained([Doubled(), Prefetch()], TinyModule())
    assert digest(plain.module.state_dict()) == digest(ahead.module.state_dict())
    assert moved == [True] * 2 * LAST


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="prefetch.batches=0 must be at least 1"):
        Prefetch(batches=0)


# Ranks --------------------------------------------------------------------------------


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("uneven", [pytest.param("drop", marks=pytest.mark.slow), "pad"])
def test_ranks_with_uneven_ends_train_the_same(uneven):
    module = functools.partial(PlainModule, samples=43)
    plugins = {"ddp": {}, "distributed": {"uneven": uneven}}
    plain = on_ranks(train_tiny, 2, plugins, module)
    ahead = on_ranks(train_tiny, 2, {**plugins, "prefetch": {"batches": 3}}, module)
    assert [digest(rank.weights) for rank in ahead] == [digest(rank.weights) for rank in plain]
    assert [rank.metrics for rank in ahead] == [rank.metrics for rank in plain]
