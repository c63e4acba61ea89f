"""Each kind draws what it says, goes on exactly after a resume, and is shared by ranks."""

import itertools
import re

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, WeightedRandomSampler

from hookline import CallbackInterface, hookimpl
from hookline.data import mix
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    assert_one_model,
    check_plugin,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_sampling import Sampling

CLASSES = torch.tensor([0] * 32 + [1] * 8 + [2] * 8)
RANKS = {"distributed": {}, "ddp": {}}


def classes(dataset):
    """Return one class for each of 48 samples, the first of which is large."""
    return CLASSES[: len(dataset)]


def sizes(dataset):
    """Return a value of each sample: its square."""
    return torch.arange(len(dataset)) ** 2


OPTIONS = [
    {"kind": "balanced", "by": classes},
    {"kind": "weighted", "by": sizes, "samples": 36},
    {"kind": "temperature", "by": classes, "temperature": 3.0},
    {"kind": "length", "by": sizes, "bucket": 2},
    {"kind": "curriculum", "by": sizes, "until": 2, "begin": 0.3},
]
KINDS = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["kind"])


def train(options, module=None, *plugins, **more):
    """Train, and return the samples of each batch."""
    trainer = tiny_trainer([*plugins, Sampling(**options)], module or PlainModule(), **more)
    trainer.train()
    return trainer.module.seen


def drawn(options, **more):
    return list(itertools.chain(*train(options, **more)))


def test_contract():
    for options in OPTIONS:
        check_plugin(Sampling, **{**options, "by": 2}, epochs=1)


# What is drawn ------------------------------------------------------------------------


def test_weighted_draws_what_torch_draws_in_a_loop_by_hand():
    class ByHand(TinyModule):
        """Has the sampler of torch that one would write; `epochs` counts the calls, the first of which only asks."""

        calls = -1

        def get_train_dataloader(self, sampler, batch_size):
            dataset = super().get_train_dataloader(sampler, batch_size).dataset
            epoch, self.calls = max(self.calls, 0), self.calls + 1
            generator = torch.Generator().manual_seed(mix(0, epoch))
            drawn = WeightedRandomSampler(sizes(dataset).double(), len(dataset), generator=generator)
            return DataLoader(dataset, batch_size, sampler=drawn)

    by_hand, ours = ByHand(), TinyModule()
    hand_written_loop(by_hand)
    seen = train({"kind": "weighted", "by": sizes}, ours)
    assert seen == by_hand.seen
    assert digest(ours.state_dict()) == digest(by_hand.state_dict())


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"kind": "balanced"}, [1 / 3, 1 / 3, 1 / 3]),
        ({"kind": "temperature", "temperature": float("inf")}, [1 / 3, 1 / 3, 1 / 3]),
        ({"kind": "temperature", "temperature": 2.0}, [0.5, 0.25, 0.25]),  # roots of 32, 8 and 8
        ({"kind": "temperature", "temperature": 1.0}, [2 / 3, 1 / 6, 1 / 6]),
    ],
    ids=str,
)
def test_classes_are_drawn_in_proportion(options, shares):
    found = drawn({**options, "by": classes, "samples": 9600}, train_batch_size=960, epochs=1)
    assert len(found) == 9600
    counts = CLASSES[found].bincount() / len(found)
    torch.testing.assert_close(counts, torch.tensor(shares), atol=0.02, rtol=0)


def test_classes_may_be_texts():
    texts = [("de", "en", "fr")[number] for number in CLASSES]
    assert drawn({"by": lambda dataset: texts}) == drawn({"by": classes})


def test_batches_have_similar_lengths_in_random_order():
    seen = train({"kind": "length", "by": sizes}, TinyModule(50), epochs=2)
    first, second = seen[:7], seen[7:]
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(50))
        assert [len(batch) for batch in epoch] == [8] * 6 + [2]
        assert max(max(batch) - min(batch) for batch in epoch[:-1]) <= 10  # two are of the short batch
        begins = [batch[0] for batch in epoch[:-1]]
        assert begins != sorted(begins)
    assert first[-1] != second[-1]  # what is left over is drawn anew
    seen = train({"kind": "length", "by": sizes, "bucket": 1}, TinyModule(50), epochs=1)
    assert min(max(batch) - min(batch) for batch in seen[:-1]) > 10


def test_a_curriculum_begins_with_the_easiest_and_ends_with_all():
    seen = train({"kind": "curriculum", "by": sizes, "begin": 0.25, "until": 3}, epochs=5, train_batch_size=48)
    assert [len(epoch) for epoch in seen] == [48] * 5  # as long as ever
    assert [sorted({*epoch}) for epoch in seen] == [list(range(number)) for number in (12, 24, 36, 48, 48)]
    assert sorted(seen[0]) == sorted([*range(12)] * 4)
    plain = PlainModule()
    tiny_trainer([], plain, epochs=5, train_batch_size=48).train()
    assert seen[3:] == plain.seen[3:]


@KINDS
def test_epochs_and_seeds_differ_and_a_run_repeats(options):
    seen = train(options)
    assert seen == train(options)
    assert seen != train(options, seed=1)
    assert seen[: len(seen) // 2] != seen[len(seen) // 2 :]


def test_evaluations_stay_in_order():
    class Looks(PlainModule):
        def val_step(self, global_step, batch, device):
            self.validated = [*getattr(self, "validated", []), *batch[2].tolist()]
            return super().val_step(global_step, batch, device)

    module = Looks()
    train(OPTIONS[0], module, epochs=1)
    assert module.validated == list(range(48))


# Resuming and ranks -------------------------------------------------------------------


@KINDS
def test_a_resume_at_each_step_ends_with_the_same_bits(options):
    memory, whole = Memory(every="1 steps"), TinyModule(48)
    seen = train(options, whole, memory)
    for step in range(1, len(seen)):
        module = TinyModule(48)
        assert train(options, module, Memory(memory.states[step])) == seen[step:]
        assert digest(module.state_dict()) == digest(whole.state_dict()), step


def look(trainer):
    return trainer.module.seen


def differently(dataset):
    """Return other values on each rank."""
    import os

    return torch.arange(len(dataset)) + int(os.environ["RANK"])


def on_a_rank():
    kinds = [train_tiny({**RANKS, "sampling": Sampling(**each)}, keep=True, look=look) for each in OPTIONS]
    with pytest.raises(ValueError, match="gives other values on other ranks") as refused:
        train_tiny({**RANKS, "sampling": Sampling("weighted", by=differently)})
    return kinds, str(refused.value)


@pytest.mark.xdist_group("ranks")
def test_ranks_train_together_on_what_one_process_trains_on():
    ranks = on_ranks(on_a_rank, 2)
    assert "sampling.by=" in ranks[0][1]
    for options, *two in zip(OPTIONS, ranks[0][0], ranks[1][0], strict=True):
        alone = train_tiny({"sampling": Sampling(**options)}, look=look)
        together = [
            [index for pair in zip(*batches, strict=True) for index in pair]
            for batches in zip(*(rank.looked for rank in two), strict=True)
        ]
        assert together == alone.looked
        assert_one_model(two, alone)
        resumed = train_tiny({"sampling": Sampling(**options)}, begin=[two[0].states[2]], look=look)
        assert resumed.looked == alone.looked[2:]  # on one rank, what two had begun


def test_a_resume_that_cannot_be_exact_is_told(caplog):
    memory = Memory(every="1 steps")
    train(OPTIONS[1], None, memory)
    train({**OPTIONS[1], "samples": 30}, None, Memory(memory.states[2]))
    assert "sampling draws otherwise than before the resume" in caplog.text
    caplog.clear()
    train({**OPTIONS[1], "samples": 30}, None, Memory(memory.states[5]))  # between two epochs
    assert "sampling" not in caplog.text


# Where values come from ---------------------------------------------------------------


class Labelled(Dataset):
    """Samples with an attribute and a column, as data sets of torchvision and Hugging Face have them."""

    column_names = ["label", "shape"]

    def __init__(self, labels=CLASSES):
        self.targets, self.shape = labels.tolist(), "no values"
        generator = torch.Generator().manual_seed(0)
        self.samples = [(torch.randn(8, generator=generator), torch.zeros(1), index) for index in range(len(labels))]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(index, str):
            return {"label": self.targets, "shape": self.targets}[index]
        return self.samples[index]

    def lengths(self):
        return self.targets


class Given(PlainModule):
    def __init__(self, dataset, make=None):
        super().__init__()
        self.dataset, self.make = dataset, make

    def get_train_dataloader(self, sampler, batch_size):
        if self.make:
            return self.make(self.dataset, sampler, batch_size)
        return DataLoader(self.dataset, batch_size, sampler=sampler(self.dataset))

    def get_val_dataloaders(self, sampler, batch_size):
        return None

    def kinds_of(self, dataset):
        return dataset.targets


@pytest.mark.parametrize("by", ["targets", "label", "shape", "kinds_of", "operator.attrgetter"], ids=str)
def test_values_are_found(by, monkeypatch):
    if by == "operator.attrgetter":  # a function at a dotted path
        import operator

        monkeypatch.setattr(operator, "attrgetter", lambda dataset: dataset.targets)
    assert drawn({"by": by}, module=Given(Labelled())) == drawn({"by": classes}, module=Given(Labelled()))


def test_values_are_found_through_subsets_and_concatenations():
    one, other = Labelled(CLASSES[:20]), Labelled(CLASSES[20:])
    both = ConcatDataset([one, other])
    part = Subset(both, list(range(0, 48, 2)))
    expected = drawn({"by": lambda dataset: CLASSES[::2]}, module=Given(part))
    assert drawn({"by": "targets"}, module=Given(part)) == expected


def test_columns_of_hugging_face_are_found():
    datasets = pytest.importorskip("datasets")
    columns = {"x": torch.randn(48, 8).tolist(), "label": CLASSES.tolist(), "source": list(map(str, CLASSES.tolist()))}
    dataset = datasets.Dataset.from_dict(columns).with_format("torch")

    class Reads(Given):
        def train_step(self, global_step, batch, device):
            self.seen.append(batch["label"].tolist())
            return self.net(batch["x"]).mean()

    seen = train({"by": "source"}, Reads(dataset), epochs=1)
    assert seen == train({"by": "label"}, Reads(dataset), epochs=1)
    counts = torch.tensor(list(itertools.chain(*seen))).bincount()
    assert counts.max() < 24  # of 48, where 32 of 48 are of one class


@pytest.mark.parametrize("more", [{"shuffle": True}, {}], ids=str)
def test_a_loader_without_the_sampler_is_drawn_from_too(more):
    module = Given(Labelled(), lambda dataset, sampler, batch_size: DataLoader(dataset, batch_size, **more))
    assert train({"by": "targets"}, module) == train({"by": "targets"}, Given(Labelled()))


def test_a_loader_that_is_kept_is_drawn_from_in_each_epoch():
    expected = train({"by": "targets"}, Given(Labelled()))
    assert train({"by": "targets"}, Given(Labelled()), keep_loaders=True) == expected
    kept = []

    def keep(dataset, sampler, batch_size):
        kept.append(DataLoader(dataset, batch_size, sampler=sampler(dataset)))
        return kept[0]

    assert train({"by": "targets"}, Given(Labelled(), keep)) == expected


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "balance"}, "sampling.kind='balance' must be one of balanced, .*, did you mean 'balanced'"),
        ({"samples": 0}, "sampling.samples=0 must be at least 1"),
        ({"kind": "length", "bucket": 0}, "sampling.bucket=0 must be at least 1"),
        (
            {"kind": "length", "samples": 9},
            "sampling.samples does nothing with kind=length: .* balanced or weighted or",
        ),
        ({"temperature": 3.0}, "sampling.temperature does nothing with kind=balanced: .* set kind to temperature"),
        ({"kind": "temperature", "temperature": 0.0}, "sampling.temperature=0.0 must be above 0; 1 keeps"),
        ({"kind": "curriculum", "begin": 0.0}, "sampling.begin=0.0 is a share of the data"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "sampling.by='targets': the TensorDataset has no such attribute or column, and PlainModule no such method",
        ),
        ({"by": 7}, "sampling.by=7: the TensorDataset has no such"),
        ({"by": "no_such.thing"}, "sampling.by='no_such.thing' cannot be imported: No module named 'no_such'"),
        ({"by": lambda dataset: [1, 2]}, r"must give one value for each of the 48 samples; it gave \(2,\)"),
        ({"by": lambda dataset: torch.ones(48, 2)}, r"it gave \(48, 2\)"),
        ({"by": lambda dataset: [1.0] * 47 + [float("nan")]}, "the value of sample 47 is not finite"),
        ({"kind": "weighted", "by": lambda dataset: torch.arange(48) - 1}, "weights must be at least 0 .* is -1"),
        ({"kind": "weighted", "by": lambda dataset: torch.zeros(48)}, "weights must be at least 0 and not all 0"),
        ({"kind": "weighted", "by": lambda dataset: ["a"] * 48}, "gives no numbers, but values such as 'a'"),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(options)


class Stream(IterableDataset):
    def __iter__(self):
        yield from Labelled()


@pytest.mark.parametrize(
    ("options", "make", "message"),
    [
        (
            {},
            lambda dataset, sampler, size: DataLoader(Stream(), size),
            "sampling: the DataLoader of Given.* an order of",
        ),
        (
            {},
            lambda dataset, sampler, size: DataLoader(dataset, size, sampler=WeightedRandomSampler(torch.ones(48), 48)),
            "an order of its own, so nothing would be drawn",
        ),
        (
            {"kind": "length"},
            lambda dataset, sampler, size: DataLoader(dataset, 5, sampler=sampler(dataset)),
            "sampling.kind=length makes batches of 8, and the loader has 5",
        ),
    ],
    ids=["stream", "sampler", "batch size"],
)
def test_loaders_that_would_not_be_drawn_from_are_refused(options, make, message):
    with pytest.raises(ValueError, match=message):
        train({"by": "targets", **options}, Given(Labelled(), make))


class Reversed(CallbackInterface):
    """Decides the order too."""

    @hookimpl(wrapper=True, tryfirst=True)
    def get_sampler(self):
        sampler = yield
        return type("Reversed", (sampler,), {"order": lambda self: torch.arange(self.length).flip(0)})


def test_two_that_decide_the_order_are_refused():
    with pytest.raises(ValueError, match="sampling and another plugin both decide the order"):
        train(OPTIONS[0], None, Reversed())


def test_overfitting_wants_the_order_of_the_data(caplog):
    trainer = tiny_trainer({"sampling": {"by": 2}, "limits": {"overfit_batches": 2}})
    trainer.train()
    assert trainer.module.seen == [list(range(8)), list(range(8, 16))] * 2
    assert len(re.findall("sampling does nothing", caplog.text)) == 1
