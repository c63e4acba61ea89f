"""Sources are mixed as asked, go on exactly after a resume, and are shared by ranks."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    assert_one_model,
    check_plugin,
    digest,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_mixture import Mixture

LENGTHS = {"a": 40, "b": 13, "c": 7}
BEGINS = {"a": 0, "b": 100, "c": 200}
RANKS = {"distributed": {}, "ddp": {}}


def source(key, length):
    """Return a data set whose samples have ids that tell their source."""
    generator = torch.Generator().manual_seed(BEGINS[key])
    inputs = torch.randn(length, 8, generator=generator)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True), torch.arange(length) + BEGINS[key])


class Sources(TinyModule):
    """Trains on several sources; `seen` has the ids of each batch by source."""

    def __init__(self, lengths=LENGTHS, make=None):
        super().__init__()
        del self.net[1]  # batch norm of ranks
        self.net[2].p = 0.0
        self.lengths, self.make = lengths, make

    def get_train_dataloader(self, sampler, batch_size):
        def loader(key, length):
            data = source(key, length)
            return DataLoader(data, batch_size, sampler=sampler(data))

        return {key: (self.make or loader)(key, length) for key, length in self.lengths.items()}

    def get_val_dataloaders(self, sampler, batch_size):
        data = source("a", 16)
        return DataLoader(data, batch_size, sampler=sampler(data))

    def train_step(self, global_step, batch, device):
        self.seen.append({key: ids.tolist() for key, (_, _, ids) in named(batch).items()})
        inputs, targets = (torch.cat([part[place] for part in named(batch).values()]) for place in (0, 1))
        return torch.nn.functional.mse_loss(self.net(inputs), targets)


def named(batch):
    return batch if isinstance(batch, dict) else {"": batch}


class Noisy(Sources):
    """With dropout, so that random states count."""

    def __init__(self):
        super().__init__()
        self.net[2].p = 0.3


def train(options, module=None, *plugins, **more):
    trainer = tiny_trainer([*plugins, Mixture(**options)], module or Sources(), **more)
    trainer.train()
    return trainer.module.seen


def ids_of(seen):
    """Return all ids, by the key of their source."""
    ids = sorted(itertools.chain(*(ids for batch in seen for ids in batch.values())))
    return {key: [i - begin for i in ids if begin <= i < begin + 100] for key, begin in BEGINS.items()}


OPTIONS = [
    {},
    {"batches": "one", "weights": {"a": 2, "b": 1, "c": 1}},
    {"batches": "each", "weights": {"a": 2, "b": 1, "c": 1}, "until": "shortest"},
]
KINDS = pytest.mark.parametrize("options", OPTIONS, ids=str)


def test_contract():
    check_plugin(Mixture)
    check_plugin(Mixture, batches="each", until="shortest", epochs=1)


# What is mixed ------------------------------------------------------------------------


def test_without_weights_each_sample_comes_once():
    seen = train({}, epochs=1)
    assert ids_of(seen) == {key: list(range(length)) for key, length in LENGTHS.items()}
    assert [len(batch[""]) for batch in seen] == [8] * 7 + [4]
    assert len({number // 100 for number in seen[0][""]}) > 1  # mixed


@pytest.mark.parametrize(
    ("until", "counts"),
    [("longest", {"a": 40, "b": 40, "c": 40}), ("shortest", {"a": 7, "b": 7, "c": 7})],
)
def test_shares_are_exact_and_short_sources_are_repeated_evenly(until, counts):
    seen = train({"weights": {"a": 0.1, "b": 0.1, "c": 0.1}, "until": until}, epochs=1)
    for key, ids in ids_of(seen).items():
        assert len(ids) == counts[key]
        times = torch.tensor(ids).bincount(minlength=LENGTHS[key])
        assert times.max() - times.min() <= 1


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 1, "b": 3, "c": 2}], ids=str)
def test_weights_are_shares(weights):
    counts = {key: len(ids) for key, ids in ids_of(train({"weights": weights}, epochs=1)).items()}
    total = sum(counts.values())
    for key, weight in weights.items():
        assert abs(counts[key] - total * Fraction(weight) / Fraction(sum(weights.values()))) <= 1
    assert any(counts[key] == LENGTHS[key] for key in counts)
    assert all(counts[key] >= LENGTHS[key] for key in counts)


def test_batches_of_one_source_come_with_its_key():
    seen = train({"batches": "one"}, epochs=1)
    assert all(len(batch) == 1 and len(next(iter(batch.values()))) == 8 for batch in seen)
    counts = {key: sum(key in batch for batch in seen) for key in LENGTHS}
    assert counts == {"a": 5, "b": 2, "c": 1}
    assert all(set(ids) == set(range(LENGTHS[key])) for key, ids in ids_of(seen).items())  # nothing is left out
    keys = [next(iter(batch)) for batch in seen]
    assert keys != sorted(keys)


def test_batches_of_one_source_until_the_shortest_repeat_nothing():
    lengths = {"a": 40, "b": 13}
    seen = train({"batches": "one", "until": "shortest"}, Sources(lengths), epochs=2)
    first, second = ids_of(seen[: len(seen) // 2]), ids_of(seen[len(seen) // 2 :])
    assert len(first["a"]) == 40
    assert len({*first["b"]}) == len(first["b"]) == 8
    assert first["b"] != second["b"]  # another part is left out


@pytest.mark.parametrize(("until", "steps"), [("longest", 5), ("shortest", 1)])
def test_each_step_has_a_batch_of_each_source(until, steps):
    seen = train({"batches": "each", "until": until}, epochs=1)
    assert len(seen) == steps
    rows = [{key: len(ids) for key, ids in batch.items()} for batch in seen]
    assert rows == [{"a": size, "b": size, "c": size} for size in ([8] * 5 if until == "longest" else [7])]
    if until == "longest":
        assert ids_of(seen)["a"] == list(range(40))
        turns = [number for batch in seen for number in batch["c"]]
        assert sorted(turns[:7]) == sorted(turns[7:14])
        assert turns[:7] != turns[7:14]  # shuffled anew when it is repeated


def test_a_source_may_have_more_samples_in_each_step():
    seen = train({"batches": "each", "weights": {"a": 3, "b": 1, "c": 1}}, epochs=1)
    assert [{key: len(ids) for key, ids in batch.items()} for batch in seen] == [
        {"a": 24, "b": 8, "c": 8},
        {"a": 18, "b": 6, "c": 6},
    ]
    assert {*ids_of(seen)["a"]} == {*range(40)}


@KINDS
def test_epochs_and_seeds_differ_and_a_run_repeats(options):
    seen = train(options)
    assert seen == train(options)
    assert seen == train(options, keep_loaders=True)
    assert seen != train(options, seed=1)
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]


def test_mixed_samples_have_the_bits_of_one_concatenated_data_set():
    class Concatenated(Sources):
        def get_train_dataloader(self, sampler, batch_size):
            data = torch.utils.data.ConcatDataset([source(*item) for item in self.lengths.items()])
            drawn = [number for batch in seen[len(self.seen) :] for number in batch[""]]
            places = {int(sample[2]): place for place, sample in enumerate(data)}
            return DataLoader(data, batch_size, sampler=[places[number] for number in drawn[:60]])

    mixed, alone = Sources(), Concatenated()
    seen = train({}, mixed)
    trainer = tiny_trainer(module=alone)
    trainer.train()
    assert alone.seen == seen
    assert digest(mixed.state_dict()) == digest(alone.state_dict())


def test_data_sets_need_no_loader_and_workers_are_those_of_the_first_loader():
    def make(key, length):
        return DataLoader(source(key, length), 8, num_workers=1) if key == "b" else source(key, length)

    assert train({"batches": "one"}, Sources(make=make), epochs=1) == train({"batches": "one"}, epochs=1)


def test_each_source_is_collated_as_its_loader_does():
    def make(key, length):
        def doubled(samples):
            inputs, targets, ids = torch.utils.data.default_collate(samples)
            return inputs, targets, ids * (1 if key == "a" else -1)

        return DataLoader(source(key, length), 8, collate_fn=doubled)

    (batch,) = train({"batches": "each"}, Sources({"a": 8, "b": 8}, make), epochs=1)
    assert min(batch["a"]) == 0
    assert max(batch["b"]) == -100
    with pytest.raises(ValueError, match="mixture.batches=mixed .* loaders a, b differ in collate_fn: give them the"):
        train({}, Sources({"a": 8, "b": 8}, make))


# Resuming and ranks -------------------------------------------------------------------


@KINDS
def test_a_resume_at_each_step_ends_with_the_same_bits(options):
    memory, whole = Memory(every="1 steps"), Noisy()
    seen = train(options, whole, memory)
    for step in range(1, len(seen)):
        module = Noisy()
        assert train(options, module, Memory(memory.states[step])) == seen[step:]
        assert digest(module.state_dict()) == digest(whole.state_dict()), step


def test_a_resume_that_cannot_be_exact_is_told(caplog):
    memory = Memory(every="1 steps")
    train({}, None, memory)
    train({}, Sources({"a": 40, "b": 14, "c": 7}), Memory(memory.states[2]))
    assert "mixture mixes otherwise than before the resume" in caplog.text
    caplog.clear()
    train({}, Sources({"a": 40, "b": 14, "c": 7}), Memory(memory.states[8]))  # between two epochs
    assert "mixture" not in caplog.text


def look(trainer):
    return trainer.module.seen


EVEN = {"a": 48, "b": 24, "c": 12}


def even():
    return Sources(EVEN)


def on_a_rank():
    return [train_tiny({**RANKS, "mixture": Mixture(**each)}, even, keep=True, look=look) for each in OPTIONS]


@pytest.mark.xdist_group("ranks")
def test_ranks_train_together_on_what_one_process_trains_on():
    ranks = on_ranks(on_a_rank, 2)
    for options, *two in zip(OPTIONS, *ranks, strict=True):
        alone = train_tiny({"mixture": Mixture(**options)}, even, look=look)
        together = [
            {key: sorted(one[key] + other[key]) for key in one}
            for one, other in zip(*(rank.looked for rank in two), strict=True)
        ]
        expected = [{key: sorted(ids) for key, ids in batch.items()} for batch in alone.looked]
        assert together == expected
        assert_one_model(two, alone)
        resumed = train_tiny({"mixture": Mixture(**options)}, even, begin=[two[0].states[2]], look=look)
        assert resumed.looked == alone.looked[2:]  # on one rank, what two had begun


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": "mix"}, "mixture.batches='mix' must be one of mixed, one, each, did you mean 'mixed'"),
        ({"until": "end"}, "mixture.until='end' must be one of longest, shortest"),
        ({"weights": {"a": 0}}, "mixture.weights.a=0 must be above 0; leave a source out in the module"),
        ({"batches": "each", "weights": {"a": 0.5}}, "mixture.weights.a=0.5: with batches=each .* a whole number"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**options)


class Stream(IterableDataset):
    def __iter__(self):
        yield from source("a", 8)


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        (
            {},
            lambda key, length: DataLoader(Stream(), 8),
            "the source 'a' .DataLoader of Stream. has no samples by index",
        ),
        ({}, lambda key, length: iter(()), "the source 'a' .tuple_iterator of tuple_iterator. has no samples by index"),
        (
            {},
            lambda key, length: DataLoader(
                source(key, length), 8, sampler=WeightedRandomSampler(torch.ones(length), length)
            ),
            "the loader 'a' has an order of its own .WeightedRandomSampler., which mixing would lose",
        ),
        ({}, lambda key, length: DataLoader(source(key, length), 5), "the loader 'a' makes batches of 5 instead of 8"),
        (
            {"weights": {"a": 1, "x": 2}},
            source,
            "weights has \\['a', 'x'\\], and get_train.* returned \\['a', 'b', 'c'\\]",
        ),
        ({}, lambda key, length: source(key, 0), "mixture: a source is empty; .*{'a': 0, 'b': 0, 'c': 0} samples"),
        (
            {"batches": "one", "until": "shortest"},
            source,
            "nothing of 'c' .7 samples. would be in an epoch .* 8 samples",
        ),
    ],
    ids=["stream", "iterator", "sampler", "batch size", "keys", "empty", "nothing"],
)
def test_wrong_sources_are_refused(options, make, message):
    with pytest.raises(ValueError, match=message):
        train(options, Sources(make=make))


def test_one_loader_is_trained_on_and_one_warning_says_so(caplog):
    mixed, plain = PlainModule(), PlainModule()
    train({}, mixed)
    assert "mixture does nothing: get_train_dataloader returned one loader" in caplog.text
    tiny_trainer(module=plain).train()
    assert digest(mixed.state_dict()) == digest(plain.state_dict())


def test_sampling_is_refused_and_overfitting_takes_the_order_of_the_data():
    with pytest.raises(ValueError, match="sampling and another plugin both decide the order"):
        tiny_trainer({"mixture": {}, "sampling": {"by": 2}}, Sources()).train()
    module = Sources({"a": 16, "b": 8})
    trainer = tiny_trainer({"mixture": {}, "limits": {"overfit_batches": 2}}, module, evaluate_every=None)
    trainer.train()
    assert module.seen == [{"": list(range(8))}, {"": list(range(8, 16))}] * 2
    assert trainer.metrics["val_loss"] > 0
