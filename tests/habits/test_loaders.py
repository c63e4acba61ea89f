"""Loaders as users make and keep them: each sample as often as in their own loop, and the loader as it was."""

import itertools
import random

import pytest
import torch
from tests.habits.common import ByEpoch, Ids, Seen, Stream, attributes, flat, own_loop, train, tried, two
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from hookline import data
from hookline.testing import Memory

N = 22  # no multiple of 4


class Buckets(Sampler):
    """A batch sampler with an order by epoch, in `DistributedSampler`'s contract."""

    def __init__(self, length, size):
        self.length, self.size, self.epoch = length, size, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        yield from (order[at : at + self.size] for at in range(0, self.length, self.size))

    def __len__(self):
        return -(-self.length // self.size)


class EvenFirst(Sampler):
    """A sampler of the user's, in an order that never changes."""

    def __iter__(self):
        return iter([*range(0, N, 2), *range(1, N, 2)])

    def __len__(self):
        return N


class Own(DataLoader):
    """A subclass that adds what a project needs, and iterates as torch does."""

    purpose = "training"


class Doubling(DataLoader):
    """A subclass that makes something of each batch while it iterates."""

    def __iter__(self):
        for ids, draws in super().__iter__():
            yield ids * 2, draws


class ShuffledStream(Stream):
    """A stream whose order is by epoch, as that of `datasets`."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = random.Random(self.epoch).sample(range(self.length), self.length)
        return ((torch.tensor(float(index)), torch.rand(())) for index in order)


class Batched(Dataset):
    """A data set whose items are batches."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return -(-N // self.size)

    def __getitem__(self, index):
        return torch.arange(N)[index * self.size : (index + 1) * self.size].float()


weights = torch.arange(N, dtype=torch.float64).clamp(max=3)  # sample 0 is never drawn
LOADERS = {
    # name: (loader of a batch size; in which order; on two ranks)
    #   "own": batch for batch what the user's loop gets; "once": each sample as often; "drawn": as many draws
    "in order": (lambda size: DataLoader(Ids(N), size), "own", "shared"),
    "in order, the last dropped": (lambda size: DataLoader(Ids(24), size, drop_last=True), "own", "shared"),
    "shuffle": (lambda size: DataLoader(Ids(N), size, shuffle=True), "once", "shared"),
    "shuffle, own generator": (
        lambda size: DataLoader(Ids(N), size, shuffle=True, generator=torch.Generator().manual_seed(3)),
        "once",
        "shared",
    ),
    "a subset, shuffled": (lambda size: DataLoader(Subset(Ids(40), range(N)), size, shuffle=True), "once", "shared"),
    "SubsetRandomSampler": (
        lambda size: DataLoader(Ids(40), size, sampler=SubsetRandomSampler(range(N))),
        "once",
        "shared",
    ),
    "WeightedRandomSampler": (
        lambda size: DataLoader(Ids(N), size, sampler=WeightedRandomSampler(weights, 30)),
        "drawn",
        "shared",
    ),
    "RandomSampler with replacement": (
        lambda size: DataLoader(Ids(N), size, sampler=RandomSampler(Ids(N), True, 30)),
        "drawn",
        "shared",
    ),
    "RandomSampler of fewer": (
        lambda size: DataLoader(Ids(N), size, sampler=RandomSampler(Ids(N), num_samples=10)),
        "drawn",
        "shared",
    ),
    "a list of indices": (lambda size: DataLoader(Ids(N), size, sampler=[3, 1, 4, 1, 5, 9, 2, 6]), "own", "shared"),
    "own sampler": (lambda size: DataLoader(Ids(N), size, sampler=EvenFirst()), "own", "shared"),
    "own sampler by epoch": (lambda size: DataLoader(Ids(N), size, sampler=ByEpoch(N)), "own", "shared"),
    "DistributedSampler of one": (
        lambda size: DataLoader(Ids(N), size, sampler=DistributedSampler(Ids(N), 1, 0)),
        "own",
        "shared",
    ),
    "own batch sampler": (lambda size: DataLoader(Ids(N), batch_sampler=Buckets(N, size)), "own", "shared"),
    "BatchSampler": (
        lambda size: DataLoader(Ids(N), batch_sampler=BatchSampler(SequentialSampler(Ids(N)), size, False)),
        "own",
        "shared",
    ),
    "BatchSampler of own sampler": (
        lambda size: DataLoader(Ids(N), batch_sampler=BatchSampler(EvenFirst(), size, False)),
        "own",
        "shared",
    ),
    "lists of batches as batch sampler": (
        lambda size: DataLoader(Ids(N), batch_sampler=[[0, 1], [2], [3, 4, 5], [6]]),
        "own",
        "shared",
    ),
    "single samples": (lambda size: DataLoader(Ids(N), batch_size=None), "own", "shared"),
    "a data set of batches": (lambda size: DataLoader(Batched(size), batch_size=None), "own", "shared"),
    "a data set of batches, shuffled": (
        lambda size: DataLoader(Batched(size), batch_size=None, shuffle=True),
        "once",
        "shared",
    ),
    "a subclass": (lambda size: Own(Ids(N), size), "own", "shared"),
    "a subclass, shuffled": (lambda size: Own(Ids(N), size, shuffle=True), "once", "shared"),
    "a subclass with own iteration": (lambda size: Doubling(Ids(N), size), "own", "refused"),
    "workers": (lambda size: DataLoader(Ids(N), size, num_workers=2), "own", "shared"),
    "a stream": (lambda size: DataLoader(Stream(N), size), "own", "refused"),
    "a stream by epoch": (lambda size: DataLoader(ShuffledStream(N), size), "own", "refused"),
    "a list of batches": (lambda size: [torch.arange(4.0), torch.arange(4.0, 6.0)], "own", "refused"),
}
OUT_OF_ORDER = (  # on two ranks, which are dealt whole batches: what they give is put together sample by sample
    "own batch sampler", "lists of batches as batch sampler", "a data set of batches",
)  # fmt: skip
EPOCHS = 3


def program(name):
    """Train and validate on one kept loader by the table; return what was seen, and whether the loader is as it was."""
    kept, val = LOADERS[name][0](4), LOADERS[name][0](4)
    before = attributes(kept), attributes(val)
    module = Seen(kept, val)
    trainer = train(module, {"ddp": {}} if data_ranks() > 1 else {}, epochs=EPOCHS, keep_loaders=name == "workers")
    same = (attributes(kept), attributes(val)) == before
    logged = trainer.metrics["val_loss"], len(set(module.draws)), trainer.global_step
    return module.seen, module.validated, same, module.gathered, *logged


def data_ranks():
    """Return how many ranks there are, as a launcher has said."""
    import os

    return int(os.environ.get("WORLD_SIZE", 1))


@pytest.mark.filterwarnings("ignore:the training loader draws its order from a sampler of its own")
@pytest.mark.parametrize("name", LOADERS)
def test_a_kept_loader_gives_what_the_users_own_loop_gets(name):
    make, order, _ = LOADERS[name]
    seen, validated, same, gathered, val_loss, draws, steps = program(name)
    hand = own_loop(make(4), EPOCHS)
    assert same
    assert steps == sum(map(len, hand.values()))
    if order == "own":
        assert seen == hand
        assert validated[-1] == hand[0]  # of an evaluation nobody says which epoch it is
    else:
        counts = [len(flat(batches)) for batches in seen.values()]
        assert counts == [len(flat(batches)) for batches in hand.values()]
        assert len({str(batches) for batches in seen.values()}) == EPOCHS
    if order == "once":
        assert all(flat(seen[epoch]) == flat(hand[epoch]) for epoch in hand)
        assert flat(validated[-1]) == flat(hand[0])
    samples = flat(validated[-1])
    assert gathered == [*itertools.chain(*validated[-1])]
    assert val_loss == pytest.approx(sum(samples) / len(samples), abs=1e-12)
    if draws:  # no two loads were given the same random numbers
        assert draws == sum(len(flat(batches)) for batches in seen.values())
    if name == "WeightedRandomSampler":
        assert 0 not in flat(itertools.chain(*seen.values()))


def programs():
    """Run the whole table, what is refused last."""
    names = sorted(LOADERS, key=lambda name: LOADERS[name][2] == "refused")
    return {name: tried(program, name) for name in names}


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_share_what_the_users_own_loop_gets(subtests):
    of_two = two(programs)
    for name, (make, order, ranks) in LOADERS.items():
        with subtests.test(name):
            found = [values[name] for values in of_two]
            if ranks == "refused":
                assert found[0] == found[1]
                assert found[0].startswith("ValueError: ranks would all be given the same batches")
                continue
            assert not isinstance(found[0], str), found[0]
            alone = tried(program, name) if order == "drawn" else None
            hand = own_loop(make(4), EPOCHS) if alone is None else alone[0]
            validated = flat(hand[0] if alone is None else alone[1][-1])
            assert all(rank[2] for rank in found)
            for epoch in range(EPOCHS):
                batches = [rank[0].get(epoch, []) for rank in found]
                assert flat(itertools.chain(*batches)) == flat(hand[epoch])
                assert batches[0] != batches[1]
            assert flat(itertools.chain(*(rank[1][-1] for rank in found))) == validated
            for rank in found:
                in_order = rank[3] == ([*itertools.chain(*hand[0])] if order == "own" else found[0][3])
                assert in_order == (name not in OUT_OF_ORDER)
                assert sorted(rank[3]) == validated
                assert rank[4] == pytest.approx(sum(validated) / len(validated), abs=1e-12)


# Kept loaders -------------------------------------------------------------------------

KEPT = {
    "in order": lambda: DataLoader(Ids(40), 10),
    "shuffled": lambda: DataLoader(Ids(40), 10, shuffle=True),
    "by epoch": lambda: DataLoader(Ids(40), batch_sampler=Buckets(40, 10)),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_loader_given_to_one_trainer_after_another_is_whole_for_each(kind):
    """As in a cross validation, a sweep, or a cell of a notebook that is run twice."""
    loader = KEPT[kind]()
    train(Seen(loader), train_batch_size=10, max_steps=3)  # ends in mid-epoch
    assert len(flat(own_loop(loader)[0])) == 40
    again = Seen(loader)
    trainer = train(again, train_batch_size=10, epochs=2)
    assert (trainer.global_step, trainer.totals.steps) == (8, 8)
    assert [flat(batches) for batches in again.seen.values()] == [[*range(40)]] * 2
    other = Seen(loader)
    train(other, train_batch_size=10, epochs=2, seed=1)
    assert not set(again.draws) & set(other.draws)  # the augmentation is that of the second run's seed
    first = Seen(KEPT[kind]())
    train(first, train_batch_size=10, epochs=2)
    assert (first.seen, first.draws) == (again.seen, again.draws)


@pytest.mark.parametrize("kind", KEPT)
def test_one_loader_for_training_and_validation(kind):
    loader = KEPT[kind]()
    module = Seen(loader, loader)
    trainer = train(module, train_batch_size=10, evaluate_every="1 steps", sanity_val_steps=1)
    assert flat(module.seen[0]) == [*range(40)]
    assert [len(flat(batches)) for batches in module.validated] == [10, 40, 40, 40, 40]
    assert trainer.metrics["val_loss"] == 19.5


def test_a_trainer_that_trains_twice_goes_on_where_it_was():
    loader = DataLoader(Ids(40), 10, shuffle=True)
    module = Seen(loader)
    trainer = train(module, train_batch_size=10, epochs=2)
    trainer.options.epochs = 3
    trainer.train()
    assert [flat(batches) for batches in module.seen.values()] == [[*range(40)]] * 3


# Which epoch it is --------------------------------------------------------------------


class OfTransformers:
    """A wrapper of another library's around a loader, which passes the epoch on."""

    def __init__(self, dataloader):
        self.dataloader = dataloader

    def __iter__(self):
        return iter(self.dataloader)

    def __len__(self):
        return len(self.dataloader)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Ids(8), batch_sampler=Buckets(8, 4)),
        lambda: DataLoader(Ids(8), 4, sampler=ByEpoch(8)),
        lambda: DataLoader(Ids(8), 4, sampler=DistributedSampler(Ids(8), 1, 0)),
        lambda: DataLoader(ShuffledStream(8), 4),
        lambda: OfTransformers(DataLoader(ShuffledStream(8), 4)),
        lambda: ShuffledBatches(8),
    ],
    ids=["batch sampler", "sampler", "DistributedSampler", "stream", "wrapped", "no DataLoader"],
)
def test_set_epoch_is_called(make, fresh):
    kept = make()
    module = Seen(lambda sampler, batch_size: make() if fresh else kept)
    train(module, epochs=3)
    hand = make()
    assert module.seen == own_loop(getattr(hand, "dataloader", hand), 3)
    assert len({str(batches) for batches in module.seen.values()}) == 3


class ShuffledBatches:
    """Gives batches, and is told the epoch itself."""

    def __init__(self, length):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = torch.tensor(random.Random(self.epoch).sample(range(self.length), self.length))
        return iter(order.float().split(4))


def test_set_epoch_by_hand_counts():
    class ByHand(Seen):
        def on_begin_train_epoch(self, global_step, epoch):
            self.loaders[0].batch_sampler.set_epoch(10 + epoch)

    module = ByHand(DataLoader(Ids(8), batch_sampler=Buckets(8, 4)))
    train(module, epochs=3)
    sampler = Buckets(8, 4)
    for epoch, batches in module.seen.items():
        sampler.set_epoch(10 + epoch)
        assert batches == [*sampler]


# Data sets ----------------------------------------------------------------------------


class Curriculum(Ids):
    """A data set of which attributes are written: from the loop, and where a worker begins."""

    difficulty, opened = 0, -1

    def __getitem__(self, index):
        return torch.tensor([index, self.difficulty, self.opened])


def open_file(worker):
    get_worker_info().dataset.opened = 100 + worker


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_written_into_a_data_set_is_there_when_it_loads(workers):
    class Harder(Seen):
        def on_begin_train_epoch(self, global_step, epoch):
            self.loaders[0].dataset.difficulty = epoch

        def train_step(self, global_step, batch, device):
            self.validated += batch.tolist()
            return super().train_step(global_step, batch[:, 0].float(), device)

    dataset = Curriculum(8)
    loader = DataLoader(dataset, 4, num_workers=workers, worker_init_fn=open_file)
    module = Harder(loader)
    train(module, epochs=3)
    begun = [100, 101] if workers else [-1, -1]
    hand = [[i, epoch, begun[i // 4]] for epoch in range(3) for i in range(8)]
    assert module.validated == hand
    assert (loader.dataset, dataset.difficulty, dataset.opened) == (dataset, 2, -1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_sample_drawn_twice_is_augmented_twice(size, workers):
    often = WeightedRandomSampler([100.0] + [1.0] * 7, 32)
    module = Seen(DataLoader(Ids(8), size, sampler=often, num_workers=workers))
    train(module, train_batch_size=size, epochs=2)
    assert flat(itertools.chain(*module.seen.values())).count(0) > 32
    assert len(set(module.draws)) == len(module.draws) == 64


def test_what_loading_draws_depends_on_no_number_of_workers():
    found = []
    for workers in (0, 1, 2):
        module = Seen(DataLoader(Ids(N), 4, shuffle=True, num_workers=workers))
        train(module, epochs=2)
        found.append((module.seen, module.draws))
    assert found[0] == found[1] == found[2]


# Refused ------------------------------------------------------------------------------


def two_loaders(sampler, batch_size):
    return [DataLoader(Ids(8), batch_size), DataLoader(Ids(8), batch_size)]


def test_what_is_no_loader_is_refused():
    loader = DataLoader(Ids(8), 4)
    with pytest.raises(ValueError, match="returned loaders by key \\['0', '1'\\]: .*mixture"):
        train(Seen(two_loaders))
    with pytest.raises(ValueError, match="get_train_dataloader\\(\\) must return one loader; it returned None"):
        train(Seen(lambda sampler, batch_size: None))
    with pytest.raises(ValueError, match="must return one loader; it returned loaders by key \\['a', 'b'\\]"):
        train(Seen(lambda sampler, batch_size: {"a": loader, "b": loader}))
    with pytest.raises(ValueError, match="the training loader gave no batch"):
        train(Seen(DataLoader(TensorDataset(torch.empty(0, 1)), 4)))
    with pytest.raises(ValueError, match="the training loader gave no batch"):
        train(Seen(DataLoader(Ids(3), 4, drop_last=True)))
    once = (torch.arange(4.0) for _ in range(2))
    with pytest.raises(ValueError, match="the training loader gave no batch"):
        train(Seen(once), epochs=2)


MISTAKES = {  # what is returned in place of a loader: the message
    "a data set": (
        Ids(8),
        "get_train_dataloader\\(\\) returned a Ids, a data set: .* write DataLoader\\(data",
    ),
    "a subset": (Subset(Ids(8), range(4)), "returned a Subset, a data set: its samples would be taken for batches"),
    "the class": (lambda sampler, size: DataLoader, "returned DataLoader, which gives no batches"),
    "a method": (lambda sampler, size: Ids(8).__len__, "returned Ids.__len__, which gives no batches"),
    "a number": (8, "returned a int, which gives no batches"),
    "a tensor": (torch.ones(8, 2), "returned a Tensor of data: .* of a data set, such as TensorD"),
    "inputs and targets": ((torch.ones(8, 2), torch.ones(8)), "returned a tuple of data"),
    "inputs and targets in a list": ([torch.ones(8, 2), torch.ones(8, 1)], "returned a list of data"),
    "inputs and classes": ([torch.ones(2, 2), torch.ones(2, 2).int()], "returned a list of data"),
    "the class of a sampler": (
        lambda sampler, size: DataLoader(Ids(8), size, sampler=sampler),
        "returned a loader whose sampler is the class RunSampler; write sampler=sampler\\(dataset\\)",
    ),
    "the class of a batch sampler": (DataLoader(Ids(8), batch_sampler=BatchSampler), "is the class BatchSampler"),
    "a sampler for batches": (
        lambda sampler, size: DataLoader(Ids(8), batch_sampler=sampler(Ids(8))),
        "whose batch_sampler \\(RunSampler\\) draws samples, not batches; write sampler=…",
    ),
    "torch's sampler for batches": (DataLoader(Ids(8), batch_sampler=RandomSampler(Ids(8))), "RandomSampler\\) draws"),
    "batches for samples": (
        DataLoader(Ids(8), 4, sampler=BatchSampler(range(8), 4, False)),
        "whose sampler \\(BatchSampler\\) draws batches, to make batches of; write batch_sampler=…",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_gives_no_batches_is_refused_with_what_to_write(name):
    given, message = MISTAKES[name]
    given = given if callable(given) else lambda sampler, size, loader=given: loader
    with pytest.raises(TypeError, match=message):
        train(Seen(given))
    with pytest.raises(TypeError, match=message.replace("train_dataloader", "val_dataloaders")):
        train(Seen(DataLoader(Ids(8), 4), given))
    with pytest.raises(TypeError, match=message.replace("train_dataloader", "val_dataloaders")):
        train(
            Seen(DataLoader(Ids(8), 4), lambda sampler, size: {"a": DataLoader(Ids(8), 4), "b": given(sampler, size)})
        )


def test_a_list_of_loaders_has_numbers_for_keys():
    one, other = DataLoader(Ids(8), 4), DataLoader(Ids(4), 4)
    metrics = train(Seen([one], [one, other])).metrics
    assert metrics == {"val_loss/0": 3.5, "val_loss/1": 1.5, "val_loss": (8 * 3.5 + 4 * 1.5) / 12}
    assert train(Seen(one, (other,))).metrics == {"val_loss": 1.5}


def test_an_iterator_is_a_loader_for_one_evaluation():
    loader = DataLoader(Ids(8), 4)
    assert train(Seen(loader, lambda sampler, size: iter(loader)), epochs=3).metrics == {"val_loss": 3.5}
    with pytest.raises(ValueError, match="get_val_dataloaders gave the iterator .* of the evaluation before, which"):
        train(Seen(loader, iter(loader)), epochs=3, max_val_steps_per_epoch=1)
    endless = itertools.cycle([torch.arange(4.0), torch.arange(4.0, 8.0)])
    assert train(Seen(endless), epochs=3, max_train_steps_per_epoch=2).global_step == 6
    with pytest.raises(ValueError, match="gave no batch: .* or an iterator that has ended"):
        train(Seen(iter(loader)), epochs=2)


@pytest.mark.parametrize(
    ("loader", "options", "said"),
    [
        (lambda size: DataLoader(Ids(8), 2), {}, ["get_train_dataloader() was asked for batches of 4", "of 2, which"]),
        (lambda size: [torch.arange(2.0)] * 4, {}, ["(trainer.train_batch_size=4), and its loader has batches of 2"]),
        (lambda size: DataLoader(Stream(8), 8), {}, ["and its loader has batches of 8"]),
        (lambda size: DataLoader(Ids(8), batch_sampler=BatchSampler(range(8), 2, False)), {}, ["has batches of 2"]),
        (lambda size: DataLoader(Ids(8), size), {}, []),
        (lambda size: DataLoader(Ids(8), 2), {"train_batch_size": 1}, []),  # the default: nobody has asked
        (lambda size: DataLoader(Ids(8), batch_sampler=[[0, 1], [2]]), {}, []),
        (lambda size: [torch.arange(2.0)], {}, []),  # a short data set has one short batch
    ],
)
def test_batches_of_another_size_than_asked_for_are_said_once(loader, options, said, caplog):
    train(Seen(lambda sampler, size: loader(size)), epochs=2, **options)
    assert len(caplog.records) == bool(said)
    assert all(part in caplog.text for part in said)


def test_a_data_set_that_ends_too_early_is_an_error():
    class Short(Ids):
        def __getitem__(self, index):
            if index == 6:
                raise StopIteration
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="StopIteration while loading samples .*6.*would end the epoch in silence"):
        train(Seen(DataLoader(Short(12), 4)))


# On several ranks, said by the user ---------------------------------------------------


class SharedStream(Stream):
    """A stream that takes one rank's part, by the trainer that it is with."""

    def __init__(self, length, share, shares):
        super().__init__(length)
        self.place = share, shares

    def __iter__(self):
        return data.shard(super().__iter__(), *self.place)


class OnShares(Seen):
    """Trains and validates on a stream of which each rank takes its part."""

    def __init__(self, workers):
        super().__init__(None)
        self.workers = workers

    def get_train_dataloader(self, sampler, batch_size):
        stream = SharedStream(N, self.trainer.share, self.trainer.shares)
        return data.sharded(DataLoader(stream, batch_size, num_workers=self.workers))

    get_val_dataloaders = get_train_dataloader


def shared_streams():
    """Train with and without loading workers; return what came."""
    found = []
    for workers in (0, 2):
        module = OnShares(workers)
        trainer = train(module, {"ddp": {}}, epochs=2)
        found.append((module.seen, module.validated, trainer.metrics["val_loss"], module.draws))
    return found


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_stream_that_is_said_to_be_shared_is_trained_on_once():
    for first, second in zip(*two(shared_streams), strict=True):
        for epoch in range(2):
            assert flat(first[0][epoch] + second[0][epoch]) == [*range(N)]
        assert flat(first[1][-1] + second[1][-1]) == [*range(N)]
        assert first[2] == second[2] == pytest.approx((N - 1) / 2, abs=1e-12)
        assert not set(first[3]) & set(second[3])  # each rank draws for itself


# torchdata ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", ["in order", "shuffled", "stream by epoch"])
def test_a_stateful_loader_of_torchdata(kind):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def make():
        dataset = ShuffledStream(N) if kind == "stream by epoch" else Ids(N)
        return stateful.StatefulDataLoader(dataset, 4, shuffle=kind == "shuffled")

    loader = make()
    before = attributes(loader)
    module = Seen(loader, make())
    trainer = train(module, epochs=3)
    hand = own_loop(make(), 3)
    assert trainer.global_step == 18
    assert [flat(batches) for batches in module.seen.values()] == [[*range(N)]] * 3
    assert trainer.metrics["val_loss"] == pytest.approx((N - 1) / 2, abs=1e-12)
    after = attributes(loader)
    if kind == "stream by epoch":  # iterated itself, to say where it is: it knows its iterator, as after a loop by hand
        after["itself", "_iterator"] = None
    assert after == before
    if kind != "shuffled":
        assert module.seen == hand
    train(Seen(loader), max_steps=2)
    assert flat(own_loop(loader)[0]) == [*range(N)]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("kind", ["in order", "shuffled", "stream by epoch", "the run's sampler"])
def test_a_stateful_loader_of_torchdata_resumes_at_every_step(kind):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def loader(sampler, batch_size):
        dataset = ShuffledStream(N) if kind == "stream by epoch" else Ids(N)
        drawn = {"sampler": sampler(dataset)} if kind == "the run's sampler" else {"shuffle": kind == "shuffled"}
        return stateful.StatefulDataLoader(dataset, batch_size, **drawn)

    memory = Memory(every="1 steps")
    whole = train(Seen(loader), [memory], epochs=2)
    for at in range(1, 12):
        resumed = train(Seen(loader), [Memory(memory.states[at])], epochs=2)
        batches = [batch for epoch in sorted(resumed.module.seen) for batch in resumed.module.seen[epoch]]
        assert batches == [*whole.module.seen[0], *whole.module.seen[1]][at:], at
        assert resumed.module.draws == whole.module.draws[-len(resumed.module.draws) :], at
