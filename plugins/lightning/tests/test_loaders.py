"""Several training loaders at a time, several of an evaluation, and loaders of any kind; after a kill, too."""

import itertools
import os
import signal
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, WeightedRandomSampler

import hookline
from hookline.testing import run_ranks
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_lightning import CombinedLoader, LightningDataModule, LightningModule, Trainer

PRELOADED += ["hookline_lightning"]
pytestmark = pytest.mark.plugins
QUIET = {"enable_progress_bar": False, "logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False}
Pair = namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def plain(batch):
    """Return a batch with lists in the place of tensors."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(plain, batch))
    return type(batch)(map(plain, batch)) if isinstance(batch, (list, tuple)) else batch


class Seen(LightningModule):
    """Keeps the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.evaluated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(plain(batch))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.append((plain(batch), batch_idx, dataloader_idx))
        self.log("index", float(dataloader_idx))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return plain(batch), dataloader_idx

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(IterableDataset):
    def __init__(self, number):
        self.number = number

    def __iter__(self):
        return iter(range(100, 100 + self.number))


class Again:
    """An iterable of no special kind."""

    def __iter__(self):
        return iter([torch.tensor([7]), torch.tensor([8])])


def loader(number, size, **options):
    return DataLoader(range(number), size, **options)


def cut(number, size):
    """Return the batches of the numbers up to this one."""
    return [list(range(begin, min(begin + size, number))) for begin in range(0, number, size)]


def cycled(first, second):
    return itertools.islice(itertools.cycle(first), max(len(first), len(second)))


short, long = cut(6, 2), cut(10, 2)  # of 3 and of 5 batches
TRAINING = {  # name: what is given, and the batches of an epoch
    "a mapping": (lambda: {"a": loader(6, 2), "b": loader(10, 2)}, [
        {"a": a, "b": b} for a, b in zip(cycled(short, long), long, strict=True)
    ]),
    "a list": (lambda: [loader(10, 2), loader(6, 2)], [
        [b, a] for a, b in zip(cycled(short, long), long, strict=True)
    ]),
    "a tuple with a name": (lambda: Pair(loader(6, 2), loader(10, 2)), [
        Pair(a, b) for a, b in zip(cycled(short, long), long, strict=True)
    ]),
    "one inside another": (lambda: OrderedDict(x=[loader(6, 2), loader(2, 1)], y=loader(10, 2)), [
        {"x": [a, c], "y": b} for a, b, c in zip(cycled(short, long), long, cycled([[0], [1]], long), strict=True)
    ]),
    "a list of one": (lambda: [loader(6, 2)], [[a] for a in short]),
    "the shortest": (lambda: CombinedLoader({"a": loader(6, 2), "b": loader(10, 2)}, "min_size"), [
        {"a": a, "b": b} for a, b in zip(short, long, strict=False)
    ]),
    "the longest": (lambda: CombinedLoader([loader(6, 2), loader(10, 2)], "max_size"), [
        [a, b] for a, b in itertools.zip_longest(short, long)
    ]),
    "one alone": (lambda: CombinedLoader(loader(6, 2), "max_size_cycle"), short),
    "a stream": (lambda: {"a": DataLoader(Counts(3), 2), "b": loader(10, 2)}, [
        {"a": a, "b": b} for a, b in zip(cycled([[100, 101], [102]], long), long, strict=True)
    ]),
    "any iterable": (lambda: [Again(), loader(10, 2)], [
        [a, b] for a, b in zip(cycled([[7], [8]], long), long, strict=True)
    ]),
    "samples and batches": (lambda: [DataLoader(range(6), batch_size=None), loader(9, 4)], [
        [a, b] for a, b in zip(range(6), cycled(cut(9, 4), range(6)), strict=True)
    ]),
    "numbers": (lambda: [1, 2, 3], [1, 2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINING)
def test_several_training_loaders_give_their_batches_together(name):
    make, expected = TRAINING[name]
    module = Seen()
    trainer = Trainer(max_epochs=2, **QUIET)
    trainer.fit(module, make())
    assert module.seen == expected * 2
    assert trainer.core.totals.batches_per_epoch == (None if name in ("a stream", "any iterable") else len(expected))


def test_a_combined_loader_is_iterated_as_lightnings():
    combined = CombinedLoader({"a": loader(6, 2), "b": loader(10, 2)}, "max_size_cycle")
    assert len(combined) == 5
    given = [(plain(batch), index, number) for batch, index, number in combined]
    assert given == [(batch, index, 0) for index, batch in enumerate(TRAINING["a mapping"][1])]
    sequential = CombinedLoader([loader(6, 2), loader(10, 2)], "sequential")
    assert len(sequential) == 8
    assert [(plain(batch), index, number) for batch, index, number in sequential] == [
        *((batch, index, 0) for index, batch in enumerate(short)),
        *((batch, index, 1) for index, batch in enumerate(long)),
    ]  # fmt: skip


def test_loaders_that_shuffle_do_so_anew_each_time_that_they_are_begun():
    module = Seen()
    Trainer(max_epochs=2, **QUIET).fit(module, {"a": loader(4, 2, shuffle=True), "b": loader(40, 4, shuffle=True)})
    assert len(module.seen) == 20
    for epoch in (module.seen[:10], module.seen[10:]):
        assert sorted(itertools.chain(*(batch["b"] for batch in epoch))) == [*range(40)]
        rounds = [tuple(epoch[at]["a"] + epoch[at + 1]["a"]) for at in range(0, 10, 2)]
        assert {tuple(sorted(one)) for one in rounds} == {(0, 1, 2, 3)}
        assert len({*rounds}) > 1
    assert module.seen[:10] != module.seen[10:]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_made_by_the_collation_of_their_loader(workers):
    begun = []
    made = {
        "sum": loader(6, 2, collate_fn=sum, num_workers=workers, worker_init_fn=begun.append if workers else None),
        "list": loader(6, 3, drop_last=True, collate_fn=list, sampler=[5, 4, 3, 2, 1]),
    }
    module = Seen()
    Trainer(max_epochs=1, **QUIET).fit(module, made)
    assert module.seen == [{"sum": total, "list": [5, 4, 3]} for total in (1, 5, 9)]


class Epochs(torch.utils.data.Dataset):
    """Samples that are the epoch that it was told."""

    epoch = 0

    def __len__(self):
        return 2

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return self.epoch


def test_data_sets_and_samplers_are_told_the_epoch():
    told = DistributedSampler(range(2), num_replicas=1, rank=0)
    module = Seen()
    Trainer(max_epochs=3, **QUIET).fit(module, [DataLoader(Epochs(), 2), DataLoader(range(2), 2, sampler=told)])
    assert [batch[0] for batch in module.seen] == [[0, 0], [1, 1], [2, 2]]
    assert told.epoch == 2


def test_a_limit_of_batches_and_a_fraction_of_an_epoch_are_of_all_of_them():
    module = Seen()
    Trainer(max_epochs=1, limit_train_batches=0.4, **QUIET).fit(module, {"a": loader(6, 2), "b": loader(10, 2)})
    assert [batch["b"] for batch in module.seen] == long[:2]
    module = Seen()
    trainer = Trainer(max_epochs=1, val_check_interval=0.5, **QUIET)
    trainer.fit(module, {"a": loader(6, 2), "b": loader(20, 2)}, loader(2, 1))
    assert len(module.evaluated) == 2 * 2
    assert trainer.core.options.train_batch_size == 2


def test_overfitting_is_on_the_same_batches_each_time():
    module = Seen()
    Trainer(max_epochs=3, overfit_batches=2, **QUIET).fit(module, {"a": loader(6, 2, shuffle=True), "b": loader(9, 3)})
    assert module.seen == [{"a": [0, 1], "b": [0, 1, 2]}, {"a": [2, 3], "b": [3, 4, 5]}] * 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CombinedLoader([loader(2, 1)], "sequential"), "mode='sequential'., with which nothing can be trained"),
        (lambda: [loader(2, 1), object()], "among several training loaders is a object, which gives no batches"),
        (lambda: [loader(2, 1), loader(0, 1)], "loader 1 of several has no batch, so it cannot be begun anew"),
    ],
)
def test_training_loaders_that_cannot_be(make, words):
    with pytest.raises(ValueError, match=words):
        Trainer(max_epochs=1, **QUIET).fit(Seen(), make())


@pytest.mark.parametrize("of_data", [False, True])
def test_a_property_in_the_place_of_a_method_is_refused_and_a_mistake_in_it_comes_out(of_data):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader(2, 1)

    def fit(written):
        data = type("Data", (Data,), {"val_dataloader": written} if of_data else {})()
        module = Seen() if of_data else type("Mine", (Seen,), {"val_dataloader": written})()
        Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)

    with pytest.raises(TypeError, match="val_dataloader must be a method that gives loaders"):
        fit(property(lambda self: loader(2, 1)))
    with pytest.raises(AttributeError, match="no attribute 'misspelt'"):
        fit(property(lambda self: loader(2, self.trainer.__class__.misspelt)))
    with pytest.raises(AttributeError, match="no attribute 'misspelt'"):
        fit(lambda self: loader(2, self.misspelt))


def test_modes_that_cannot_be():
    with pytest.raises(ValueError, match="CombinedLoader.mode='all'. must be one of min_size, max_size_cycle"):
        CombinedLoader([], "all")
    with pytest.raises(ValueError, match="mode='min_size'.; predictions are made with mode='sequential' alone"):
        Trainer(**QUIET).predict(Seen(), CombinedLoader([loader(2, 1)], "min_size"))


# Evaluations ----------------------------------------------------------------------------

EVALUATED = {  # name: what is given, and the batches of each loader
    "one": (lambda: loader(6, 2), [short]),
    "a list": (lambda: [loader(6, 2), loader(10, 2)], [short, long]),
    "a mapping": (lambda: {"x": loader(6, 2), "y": loader(10, 2)}, [short, long]),
    "one inside another": (lambda: {"x": [loader(6, 2), loader(2, 1)], "y": loader(10, 2)}, [short, [[0], [1]], long]),
    "in sequence": (lambda: CombinedLoader([loader(6, 2), loader(10, 2)], "sequential"), [short, long]),
    "together": (
        lambda: CombinedLoader([loader(6, 2), loader(10, 2)], "min_size"),
        [[[a, b] for a, b in zip(short, long, strict=False)]],
    ),
}


@pytest.mark.parametrize("name", EVALUATED)
def test_several_loaders_of_an_evaluation_come_one_after_the_other(name):
    make, expected = EVALUATED[name]
    module, trainer = Seen(), Trainer(max_epochs=1, **QUIET)
    steps = [(batch, at, number) for number, batches in enumerate(expected) for at, batch in enumerate(batches)]
    several = len(expected) > 1
    named = {f"index/dataloader_idx_{n}" if several else "index": float(n) for n in range(len(expected))}
    trainer.fit(module, loader(2, 2), make())
    assert module.evaluated == steps
    assert {key: value for key, value in trainer.callback_metrics.items() if key.startswith("index")} == named
    assert trainer.test(module, make()) == [{name: value} for name, value in named.items()]  # of each loader
    if name != "together":
        predicted = trainer.predict(module, make())
        expected = [[(batch, number) for batch in batches] for number, batches in enumerate(expected)]
        assert predicted == (expected if several else expected[0])


# After a kill, and on several ranks -------------------------------------------------------


class Noisy(torch.utils.data.Dataset):
    """Samples with noise."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return index + torch.rand(())


def several(kind):
    weights = torch.arange(1.0, 13.0)
    made = {
        "a": DataLoader(Noisy(8), 2, shuffle=True),
        "b": [
            DataLoader(Noisy(28), 4, shuffle=True),
            DataLoader(Noisy(12), 3, sampler=WeightedRandomSampler(weights, 9)),
        ],
    }
    return {**made, "c": DataLoader(Counts(9), 2)} if kind == "stream" else made


def fit(kind, name, *faults, resume=False):
    module = Seen()
    plugins = {f"fault{number}": fault for number, fault in enumerate(faults)}
    data = LightningDataModule()
    data.train_dataloader = lambda: several(kind)
    plugins |= {"lightning": {"datamodule": data}, "checkpoint": {"every": "2 steps"}}
    hookline.Trainer(module, plugins, epochs=3, run_name=name, resume=resume).train()
    return module.seen


def cut_short(kind):
    fit(kind, "cut", at_hook("on_end_backward", kill, nth=12))


@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_a_run_of_several_loaders_that_is_killed_goes_on_with_the_same_batches(kind):
    assert run(cut_short, kind).code == -signal.SIGKILL
    whole, rest = fit(kind, "whole"), fit(kind, "cut", resume=True)
    assert len(whole) == 21
    assert rest == whole[10:]


def on_two_ranks(kind):
    torch.set_num_threads(1)
    module = Seen()
    share = {"num_replicas": 2, "rank": int(os.environ["RANK"])}
    given = {
        "dealt": lambda: {"a": loader(8, 2), "b": loader(24, 4, shuffle=True)},
        "own": lambda: {
            "a": loader(8, 2, sampler=DistributedSampler(range(8), **share)),
            "b": loader(24, 4, sampler=DistributedSampler(range(24), **share)),
        },
        "sharded": lambda: {"a": hookline.sharded(Again()), "b": hookline.sharded(Again())},
        "mixed": lambda: {"a": loader(8, 2), "b": loader(24, 4, sampler=DistributedSampler(range(24), **share))},
        "stream": lambda: {"a": DataLoader(Counts(8), 2), "b": loader(24, 4)},
    }[kind]
    try:
        Trainer(max_epochs=1, strategy="ddp", accelerator="cpu", **QUIET).fit(module, given())
    except ValueError as error:
        return str(error)
    return module.seen


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "kind", ["dealt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("own", "sharded", "mixed", "stream"))]
)
def test_ranks_take_shares_of_several_loaders(kind):
    ranks = run_ranks(on_two_ranks, 2, kind)
    assert [outcome.code for outcome in ranks] == [0, 0], ranks[0].output
    seen = [outcome.value for outcome in ranks]
    if kind in ("mixed", "stream"):
        words = {"mixed": "some give this rank's share alone and some do not", "stream": "is a stream"}[kind]
        assert all(words in text for text in seen)
        return
    assert [len(one) for one in seen] == ([2, 2] if kind == "sharded" else [3, 3])
    if kind != "sharded":
        assert sorted(itertools.chain(*(batch["b"] for one in seen for batch in one))) == [*range(24)]
