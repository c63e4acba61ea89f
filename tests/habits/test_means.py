"""Means are over samples, or over what the module says: whatever a batch looks like, however it is cut into parts."""

import dataclasses

import numpy
import pytest
import torch
from tests.habits.common import Keep, Seen, train, two
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.data import DataLoader, Dataset

from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.testing import Memory

# Forms of batches ---------------------------------------------------------------------


class Samples(Dataset):
    """Ten samples that a function makes of their numbers."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return self.make(index)


class Graphs:
    """A batch as torch_geometric has it: an object with `.to` and a length."""

    def __init__(self, samples):
        self.samples = samples

    def to(self, device):
        return self

    def __len__(self):
        return len(self.samples)


@dataclasses.dataclass
class Record:
    """A batch as a dataclass, whose first field is no tensor."""

    task: str
    values: torch.Tensor


def number(index):
    return torch.tensor(float(index))


def image(index):
    return torch.full((3, 5 + index % 2, 5), float(index))


def detection(index):
    return image(index), {"boxes": torch.rand(index + 1, 4), "id": index}


FORMS = {  # name: (sample of a number, collation, the numbers of a batch)
    "a tensor": (number, torch.stack, lambda b: b.tolist()),
    "detection, zipped": (detection, lambda b: tuple(zip(*b, strict=True)), lambda b: [t["id"] for t in b[1]]),
    "a list of dicts": (lambda i: {"x": image(i), "id": i}, lambda b: b, lambda b: [s["id"] for s in b]),
    "a list of pairs": (lambda i: (image(i), i), lambda b: b, lambda b: [s[1] for s in b]),
    "a dict, a text first": (number, lambda b: {"task": "a", "x": torch.stack(b)}, lambda b: b["x"].tolist()),
    "a dict, a number first": (number, lambda b: {"n": len(b), "x": torch.stack(b)}, lambda b: b["x"].tolist()),
    "a number and a tensor": (number, lambda b: (len(b), torch.stack(b)), lambda b: b[1].tolist()),
    "a scalar and a tensor": (number, lambda b: (torch.tensor(1.0), torch.stack(b)), lambda b: b[1].tolist()),
    "time first": (number, lambda b: torch.stack(b).expand(7, len(b)), lambda b: b[0].tolist()),
    "an object": (float, Graphs, lambda b: b.samples),
    "a dataclass": (number, lambda b: Record("a", torch.stack(b)), lambda b: b.values.tolist()),
    "an array": (float, numpy.asarray, lambda b: b.tolist()),
    "arrays": (float, lambda b: (numpy.asarray(b), numpy.asarray(b)), lambda b: b[0].tolist()),
    "texts": (str, lambda b: b, lambda b: [float(text) for text in b]),
    "packed": (
        lambda i: torch.full((i % 3 + 1,), float(i)),
        lambda b: pack_sequence(b, enforce_sorted=False),
        lambda b: [sequence[0].item() for sequence in unpack_sequence(b)],
    ),
    "nested": (
        lambda i: torch.full((i % 3 + 1,), float(i)),
        lambda b: torch.nested.nested_tensor(b, layout=torch.jagged),
        lambda b: [sequence[0].item() for sequence in b.unbind()],
    ),
    "some left out": (
        number,
        lambda b: torch.stack([x for x in b if x != 2 and x != 9] or [number(0)]),
        lambda b: b.tolist(),
    ),
}


class Form(ModuleInterface):
    """Has the numbers of its samples for losses; logs them in training, and keeps when it is evaluated."""

    def __init__(self, form):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        make, self.collate, self.numbers = FORMS[form]
        self.data, self.evaluated = Samples(make), []

    def loader(self, sampler, batch_size):
        order = sampler(self.data)
        order.shuffle = False
        return DataLoader(self.data, batch_size, sampler=order, collate_fn=self.collate)

    get_train_dataloader = get_val_dataloaders = loader

    def train_step(self, global_step, batch, device):
        mean = torch.tensor(self.numbers(batch), dtype=torch.float64).mean()
        self.log(seen=mean, over="epoch")
        return self.net(torch.ones(1, 1)).sum() * 0 + mean

    def val_step(self, global_step, batch, device):
        self.evaluated.append(global_step)
        mean = torch.tensor(self.numbers(batch), dtype=torch.float64).mean()
        self.log(seen_again=mean)
        return mean

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.0)], []


def means(form, plugins=()):
    """Train and validate on ten samples in batches of 4, 4 and 2; return all means and the count."""
    keep = Keep()
    trainer = train(Form(form), {**dict(plugins), "keep": keep})
    logged = [keep.get(name)[-1][1] for name in ("train_loss_epoch", "seen", "val_loss", "seen_again")]
    return logged, trainer.counters.samples


@pytest.mark.parametrize("form", FORMS)
def test_means_are_over_samples_whatever_a_batch_looks_like(form, caplog):
    kept = [i for i in range(10) if form != "some left out" or i not in (2, 9)]
    logged, samples = means(form)
    assert logged == pytest.approx([sum(kept) / len(kept)] * 4, abs=1e-6)
    assert samples == len(kept)
    assert "it is not plain how many samples" not in caplog.text


@dataclasses.dataclass(eq=False)
class Windows(CallbackInterface):
    size: int

    @hookimpl
    def get_window_size(self):
        return self.size


@pytest.mark.parametrize("window", [1, 2, 3])
def test_the_losses_of_windows_of_unequal_batches_are_over_samples(window):
    batches = [
        torch.arange(float(begin), begin + size) ** 2 for begin, size in ((0, 5), (5, 3), (8, 1), (9, 4), (13, 2))
    ]
    by_step = [torch.cat(batches[begin : begin + window]).mean().item() for begin in range(0, 5, window)]
    whole, memory = Keep(), Memory(every="1 steps")
    options = {"train_batch_size": 2 * window, "log_every": "1 steps", "epochs": 2}
    train(Seen(batches), [whole, memory, Windows(window)], **options)
    assert [value for _, value in whole.get("train_loss")] == pytest.approx(by_step * 2)
    assert [value for _, value in whole.get("train_loss_epoch")] == pytest.approx(
        [torch.cat(batches).mean().item()] * 2
    )
    for step, state in memory.states.items():
        resumed = Keep()
        train(Seen(batches), [resumed, Memory(state), Windows(window)], **options)
        assert resumed.rows == [row for row in whole.rows if row[0] > step], step


def all_forms():
    torch.set_num_threads(1)
    return {form: means(form, {"ddp": {}}) for form in FORMS if form != "some left out"}


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_means_are_over_samples_of_all_ranks(subtests):
    for (form, first), second in zip((of_two := two(all_forms))[0].items(), of_two[1].values(), strict=True):
        with subtests.test(form):
            assert first[0] == pytest.approx([4.5, first[0][1], 4.5, 4.5], abs=1e-6)
            assert (first[0][0], first[0][2:]) == (second[0][0], second[0][2:])


@pytest.mark.parametrize("form", ["detection, zipped", "a list of pairs", "time first", "an object"])
def test_cadences_in_samples_come_when_they_are_due(form):
    module = Form(form)
    trainer = train(module, epochs=2, evaluate_every="8 samples", eval_when_finish=False, val_batch_size=10)
    assert (trainer.counters.samples, module.evaluated) == (20, [2, 5])  # 4, 8, 10, 14, 18, 20


# Said by the module -------------------------------------------------------------------


def test_a_module_says_how_many_samples_there_are():
    class Twins(Seen):
        """Each item of whose batches is two samples."""

        @hookimpl
        def count_samples(self, batch):
            return 2 * len(batch)

    batches = [torch.arange(4.0), torch.arange(4.0, 6.0)]
    trainer = train(Twins(batches, batches))
    assert trainer.counters.samples == 12
    assert trainer.metrics["val_loss"] == 2.5


@pytest.mark.parametrize("second", [4, 2])
def test_doubt_is_said_once(second, caplog):
    class Doubtful(Seen):
        def ids(self, batch):
            return batch["x"]

    batches = [{"mask": torch.ones(7, n), "x": torch.arange(float(n))} for n in (4, second)]
    train(Doubtful(batches, batches), epochs=3)
    said = [record.getMessage() for record in caplog.records if "it is not plain" in record.getMessage()]
    assert "tensors in it begin with dimensions [7, 4]. 7 is taken, and means are weighted by it" in said[0]
    assert "Say it by a method count_samples(self, batch) of the module, marked @hookimpl" in said[0]
    assert len(said) == 1


def test_a_sample_of_two_numbers_is_doubted(caplog):
    loader = DataLoader([(torch.tensor(float(i)), torch.tensor(0.5)) for i in range(10)], batch_size=None)
    assert train(Seen(loader), train_batch_size=1).counters.samples == 20
    (said,) = [record.getMessage() for record in caplog.records if "it is not plain" in record.getMessage()]
    assert "its 2 numbers may be as many samples, or one. 2 is taken" in said

    class Pairs(Seen):
        @hookimpl
        def count_samples(self, batch):
            return 1

    assert train(Pairs(loader), train_batch_size=1).counters.samples == 10


def test_a_value_is_weighted_by_what_is_said_where_it_is_logged():
    class Scores(Seen):
        def val_step(self, global_step, batch, device):
            positive = batch[batch > 2]
            self.log(precision=positive.sum() / len(positive), weighted_by=len(positive))
            return batch.double().mean()

        def train_step(self, global_step, batch, device):
            self.log(pairs=batch.mean(), weighted_by=torch.tensor(len(batch) ** 2), over="epoch")
            return self.net(batch[:, None]).mean()

    batches, keep = [torch.arange(4.0), torch.arange(4.0, 9.0)], Keep()
    trainer = train(Scores(batches, batches), [keep])
    assert trainer.metrics["precision"] == pytest.approx((3 + 4 + 5 + 6 + 7 + 8) / 6)
    assert trainer.metrics["val_loss"] == 4
    assert keep.get("pairs")[-1][1] == pytest.approx((1.5 * 16 + 6 * 25) / 41)


# Tokens -------------------------------------------------------------------------------


class Language(ModuleInterface):
    """A language model over padded texts, whose loss is a mean over tokens; says so by `get_weight`."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.data = []
        for length in torch.randint(1, 32, (24,), generator=generator).tolist():
            inputs, targets = torch.zeros(32, dtype=torch.long), torch.full((32,), -100)
            inputs[:length] = torch.randint(20, (length,), generator=generator)
            targets[:length] = torch.randint(20, (length,), generator=generator)
            self.data.append((inputs, targets))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)).double()

    def train_step(self, global_step, batch, device):
        inputs, targets = batch
        return cross_entropy(self.net(inputs).flatten(0, 1), targets.flatten())

    val_step = train_step

    @hookimpl
    def get_weight(self, batch):
        return int((batch[1] != -100).sum())

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=1.0)], []


def language(steps=1, plugins=(), val_batch_size=4):
    """Take two steps over all texts, each in so many parts; return the weights, val_loss and train_loss_epoch."""
    keep = Keep()
    parts = {"accumulate": {"steps": steps}} if steps > 1 else {}
    options = {"train_batch_size": 24, "val_batch_size": val_batch_size, "epochs": 2}
    trainer = train(Language(), {**dict(plugins), **parts, "keep": keep}, **options)
    weights = torch.cat([weight.detach().flatten() for weight in trainer.module.parameters()])
    return weights.tolist(), trainer.metrics["val_loss"], keep.get("train_loss_epoch")[-1][1]


def by_hand(epochs=2):
    """Take the same steps in the loop that one would write, in one batch each."""
    module = Language()
    (optimizer,), _ = module.get_optimizers_schedulers(1, 2)
    batch = tuple(map(torch.stack, zip(*module.data, strict=True)))
    losses = []
    for _ in range(epochs):
        losses.append(module.train_step(0, batch, "cpu"))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = torch.cat([weight.detach().flatten() for weight in module.parameters()])
    return weights.tolist(), module.val_step(0, batch, "cpu").item(), losses[-1].item()


@pytest.mark.plugins
@pytest.mark.parametrize("steps", [1, 2, 6, 24])
def test_a_window_of_tokens_is_one_batch_in_however_many_parts(steps):
    for found, hand in zip(language(steps), by_hand(), strict=True):
        assert found == pytest.approx(hand, abs=1e-12)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_a_validation_over_tokens_does_not_depend_on_its_batch_size(size):
    assert language(val_batch_size=size)[1] == pytest.approx(by_hand()[1], abs=1e-12)


@pytest.mark.plugins
@pytest.mark.parametrize("value", ["val_loss", "train_loss_epoch"])
def test_a_batch_without_a_token_weighs_nothing(value):
    class Empty(Language):
        def __init__(self):
            super().__init__()
            self.data.append((torch.zeros(32, dtype=torch.long), torch.full((32,), -100)))

    keep = Keep()
    train(Empty(), {"accumulate": {"steps": 25}, "keep": keep}, train_batch_size=25, val_batch_size=1, epochs=1)
    hand = by_hand(epochs=1)
    assert keep.get(value)[-1][1] == pytest.approx({"val_loss": hand[1], "train_loss_epoch": hand[2]}[value], abs=1e-12)


def languages():
    torch.set_num_threads(1)
    return [language(steps, {"ddp": {}}) for steps in (1, 2, 12)]


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_tokens_are_weighed_over_all_ranks():
    for found in (run for rank in two(languages) for run in rank):
        for ours, hand in zip(found, by_hand(), strict=True):
            assert ours == pytest.approx(hand, abs=1e-12)
