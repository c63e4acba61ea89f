"""The small parts: outputs, logs, cadences, data, state."""

import dataclasses
import math
import random
from collections import namedtuple
from fractions import Fraction

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from hookline import data, every
from hookline.cadence import seconds
from hookline.counters import Cursor
from hookline.loop.reductions import FOLD_AT, LogBuffer, Reduction, as_number, to_floats
from hookline.outputs import Collector, as_outputs, collate, with_loss
from hookline.randomness import get_rng_state, set_rng_state, set_seed
from hookline.schedulers import schedule_all
from hookline.state import get_optimizer_state, set_optimizer_state
from hookline.testing import digest

# Outputs ------------------------------------------------------------------------------


def test_outputs_in_every_form():
    one = torch.ones(())
    assert as_outputs(one, "train_step") == (one,)
    assert as_outputs((one, "text"), "train_step") == (one, "text")
    assert as_outputs(None, "val_step") == ()
    with pytest.raises(
        TypeError, match=r"train_step returned a dict with keys \['loss'\]: return the tensors themselves"
    ):
        as_outputs({"loss": one}, "train_step")


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((), "it is missing"),
        ((1.5,), "it is a float"),
        ((torch.ones(2, requires_grad=True),), r"a tensor of shape \(2,\), requires_grad=True"),
        ((torch.ones(()),), r"a tensor of shape \(\), requires_grad=False"),
    ],
)
def test_a_first_output_that_is_no_loss(outputs, words):
    with pytest.raises(TypeError, match=f"the first output of train_step must be the loss.*{words}"):
        with_loss(outputs)


def test_collating_columns():
    rows = [
        (torch.tensor(1.0), torch.ones(2, 3), "a", torch.ones(2)),
        (torch.tensor(2.0), torch.ones(1, 3), "b", torch.ones(1, 1)),
    ]
    scalars, matrices, texts, ragged = collate(rows)
    assert scalars.tolist() == [1.0, 2.0]
    assert matrices.shape == (3, 3)
    assert texts == ["a", "b"]
    assert [tuple(tensor.shape) for tensor in ragged] == [(2,), (1, 1)]


def test_a_collector_keeps_no_graph_and_no_more_than_its_room():
    collector = Collector(room=1)
    collector.add((torch.ones((), requires_grad=True) * 2, "not wanted"))
    (column,) = collector.collate()
    assert not column.requires_grad
    assert collector.rows == []


# Logs ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-99, 99), st.integers(1, 9)), min_size=1, max_size=3 * FOLD_AT),
    st.sampled_from(["mean", "sum", "min", "max", "last"]),
    st.booleans(),
)
def test_reductions_equal_python_whatever_is_folded_in_between(pairs, reduce, tensors):
    reduction = Reduction(reduce)
    for value, weight in pairs:
        reduction.add(torch.tensor(float(value)) if tensors else value, weight)
    values = [value for value, _ in pairs]
    expected = {
        "mean": sum(v * w for v, w in pairs) / sum(w for _, w in pairs),
        "sum": sum(values),
        "min": min(values),
        "max": max(values),
        "last": values[-1],
    }[reduce]
    again = Reduction.from_state(reduction.get_state())
    assert reduction.value().item() == again.value().item() == expected


def test_nan_is_shown():
    buffer = LogBuffer()
    buffer.reduction("loss").add(torch.tensor(math.nan))
    assert math.isnan(to_floats(buffer.collect())["loss"])


def test_what_is_reduced_over_all_ranks_is_the_same_on_each():
    here, there = LogBuffer(), LogBuffer()
    for buffer, names in ((here, "zac"), (there, "ba")):
        for name in names:
            buffer.reduction(name, "sum").sync = name != "c"
            buffer.reduction(name, "sum").add(1)
    said = [here.synced(), there.synced()]
    assert said == [{"z": "sum", "a": "sum"}, {"b": "sum", "a": "sum"}]
    orders, names = [], []
    for buffer in (here, there):
        buffer.agree(said)
        orders.append([])
        values = buffer.collect(lambda value, op: orders[-1].append((op, value[0].item())) or value)
        names.append(list(values))
    assert names == [["a", "b", "c", "z"], ["a", "b", "z"]]
    assert orders == [
        [("sum", 1.0), ("sum", 0.0), ("sum", 1.0)],
        [("sum", 1.0), ("sum", 1.0), ("sum", 0.0)],
    ]


@pytest.mark.parametrize(("reduce", "nothing"), [("sum", 0.0), ("min", math.inf), ("max", -math.inf)])
def test_nothing_changes_no_reduction(reduce, nothing):
    assert Reduction(reduce).value().item() == nothing


def test_one_name_with_two_reductions():
    buffer = LogBuffer()
    buffer.reduction("x", "mean")
    with pytest.raises(ValueError, match="'x' is logged with reduce='mean' and with reduce='sum' before one flush"):
        buffer.reduction("x", "sum")


def test_what_is_not_one_number():
    assert as_number("x", numpy.float32(1.5)) == 1.5
    with pytest.raises(TypeError, match=r"log\(x=…\) takes one number, not a Tensor of shape \(2,\); reduce it first"):
        as_number("x", torch.ones(2))
    with pytest.raises(TypeError, match="not a str"):
        as_number("x", "1")


# Cadences -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("epoch", 1, "epochs"),
        ("2 epochs", 2, "epochs"),
        ("30ep", 30, "epochs"),
        ("50 steps", 50, "steps"),
        ("50ST", 50, "steps"),
        ("100 batches", 100, "batches"),
        ("eval", 1, "evaluations"),
        ("1eval", 1, "evaluations"),
        ("3 evaluations", 3, "evaluations"),
        (" 1000 samples ", 1000, "samples"),
        ("10 min", 600, "seconds"),
        ("1h", 3600, "seconds"),
        ("90 s", 90, "seconds"),
        ("2 days", 172800, "seconds"),
        ("0.25 epoch", Fraction(1, 4), "epochs"),
        (".1ep", Fraction(1, 10), "epochs"),
        ("2.0 epochs", 2, "epochs"),
        ("1.5 h", 5400, "seconds"),
        ("0.5s", 0.5, "seconds"),
    ],
)
def test_cadences(text, number, unit):
    assert every(text) == (number, unit)


@pytest.mark.parametrize("text", ["", "1000", "3 fortnights", "0 steps", "0.0 epochs", "-1 steps", "steps 3", 5, None])
def test_what_is_no_cadence(text):
    with pytest.raises((ValueError, TypeError), match='is not a cadence; write one like "epoch", "2 epochs"|has no'):
        every(text)


@pytest.mark.parametrize("text", ["0.5 steps", "1.5 batches", "2.5 samples", "0.5 eval"])
def test_only_epochs_and_times_have_fractions(text):
    with pytest.raises(ValueError, match=f"'{text}' is not a cadence; .*; only epochs and times have fractions"):
        every(text)


def test_durations():
    assert seconds("2h") == 7200
    assert seconds("1.5 min") == 90
    assert seconds("0.25 s") == 0.25
    with pytest.raises(ValueError, match="'2 epochs' is not a duration"):
        seconds("2 epochs")


@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 500))
def test_a_cadence_is_due_when_a_multiple_is_crossed(number, before, more):
    crossed = any(count % number == 0 for count in range(before + 1, before + more + 1))
    assert every(f"{number} steps").crossed(before, before + more) == crossed


# Data ---------------------------------------------------------------------------------


def drawn(length, cursor, rank=0, world=1, shuffle=True):
    return list(data.sampler_class(cursor, shuffle, rank, world)(range(length)))


@given(st.integers(1, 200), st.integers(0, 3), st.integers(1, 4), st.integers(0, 9))
@settings(deadline=None)
def test_ranks_share_one_order_and_a_resume_goes_on_in_it(length, epoch, world, batches):
    whole = drawn(length, Cursor(seed=1, epoch=epoch))
    assert sorted(whole) == list(range(length))
    consumed = min(batches * world, length)
    shares = [drawn(length, Cursor(seed=1, epoch=epoch, consumed=consumed), rank, world) for rank in range(world)]
    assert sorted(sum(shares, whole[:consumed])) == list(range(length))
    assert shares[0] == whole[consumed::world]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [drawn(50, Cursor(seed=s, epoch=e)) for s in range(2) for e in range(2)]
    assert len({tuple(order) for order in orders}) == 4
    assert drawn(50, Cursor(), shuffle=False) == list(range(50))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_another_order_is_shared_and_continued_like_the_core_s(world):
    def order(self):
        return torch.randint(self.length, (9,), generator=self.generator())

    def shares(cursor):
        kinds = [data.sampler_class(cursor, True, rank, world) for rank in range(world)]
        return [list(type("Drawn", (kind,), {"order": order})(range(5))) for kind in kinds]

    whole = torch.randint(5, (9,), generator=torch.Generator().manual_seed(data.mix(3, 2))).tolist()
    assert shares(Cursor(seed=3, epoch=2)) == [whole[rank::world] for rank in range(world)]
    assert shares(Cursor(seed=3, epoch=2, consumed=4)) == [whole[4 + rank :: world] for rank in range(world)]


class Noisy(Dataset):
    """Draws from all three random states; the epoch decides."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index + torch.rand(()).item() + random.random() + numpy.random.rand()


def noisy_collate(items):
    return torch.tensor(items, dtype=torch.float64) + torch.rand(())


def noisy_batches(workers, cursor, persistent=False, epochs=1):
    dataset = Noisy()
    sampler = data.sampler_class(cursor, True, 0, 1)
    loader = DataLoader(
        dataset,
        4,
        sampler=sampler(dataset),
        num_workers=workers,
        collate_fn=noisy_collate,
        persistent_workers=persistent,
    )
    batches = []
    for epoch in range(epochs):
        cursor.epoch = epoch
        batches.append(torch.cat(list(data.RunLoader(loader, cursor))))
    return torch.stack(batches)


def test_randomness_of_loading_depends_on_seed_epoch_and_index_alone():
    set_seed(0)
    before = digest(get_rng_state())
    alone = noisy_batches(0, Cursor(seed=3), epochs=2)
    assert digest(get_rng_state()) == before  # loading does not disturb the run
    set_seed(1)
    with_workers = noisy_batches(2, Cursor(seed=3), persistent=True, epochs=2)
    assert torch.equal(alone, with_workers)
    assert not torch.equal(alone[0].sort().values, alone[1].sort().values)
    rest = Cursor(seed=3, consumed=8)
    assert torch.equal(noisy_batches(0, rest)[0], alone[0, 8:])
    assert rest.position == 2


def test_a_loader_in_order_skips_without_loading():
    loaded = []

    class Counting(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            loaded.append(index)
            return index

    loader = data.RunLoader(DataLoader(Counting(), 2), Cursor(position=4))
    assert [batch.tolist() for batch in loader] == [[8, 9]]
    assert loaded == [8, 9]
    assert len(loader) == 5


@pytest.mark.parametrize("make", [lambda: [1, 2, 3], lambda: iter([1, 2, 3]), lambda: DataLoader(Stream(), None)])
def test_other_iterables_are_begun_at_the_cursor_by_dropping(make):
    assert [int(batch) for batch in data.RunLoader(make(), Cursor(position=1))] == [2, 3]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([1, 2, 3])


def test_lengths():
    assert data.length([1, 2]) == 2
    assert data.length(DataLoader(Stream(), None)) is None
    assert data.length(iter([])) is None


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    names: list


class HasTo:
    def __init__(self):
        self.where = None

    def to(self, device):
        self.where = device
        return self


def test_every_kind_of_batch_is_moved():
    device = torch.device("meta")
    own = HasTo()
    batch = {
        "pair": Pair(torch.ones(2), [torch.ones(2)]),
        "sample": Sample(torch.ones(2, 3), ["x"]),
        "own": own,
        "text": "t",
    }
    moved = data.to_device(batch, device)
    assert moved["pair"].a.device == moved["pair"].b[0].device == moved["sample"].image.device == device
    assert isinstance(moved["pair"], Pair)
    assert moved["sample"].names == ["x"]
    assert own.where == device
    assert moved["text"] == "t"


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.ones(5, 2), 5),
        ((torch.ones(4), torch.ones(9)), 4),
        ({"x": torch.ones(3)}, 3),
        (Sample(torch.ones(7, 1), []), 7),
        (["a", "b"], 2),
        (((torch.ones(6),),), 6),
        (torch.ones(()), 1),
        (object(), 1),
    ],
)
def test_samples_of_a_batch(batch, samples):
    assert data.count_samples(batch) == samples


# State --------------------------------------------------------------------------------


def test_random_states_come_back():
    set_seed(5)
    torch.rand(3), random.random(), numpy.random.randn()
    state = get_rng_state()
    first = torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.randn(3).tolist()
    set_rng_state(state)
    assert first == (torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy.random.randn(3).tolist())


def test_optimizer_states_are_kept_by_name():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    optimizer = torch.optim.Adam([{"params": net[0].parameters()}, {"params": net[1].parameters(), "lr": 0.5}])
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = get_optimizer_state(optimizer, names)
    assert set(state["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    # Another order of the same parameters finds its own state by name.
    other = torch.optim.Adam([{"params": [net[0].bias, net[0].weight]}, {"params": net[1].parameters(), "lr": 0.5}])
    set_optimizer_state(other, names, state)
    assert torch.equal(other.state[net[0].weight]["exp_avg"], optimizer.state[net[0].weight]["exp_avg"])
    alone = torch.optim.Adam(net[0].parameters())
    with pytest.raises(
        ValueError, match=r"the saved Adam is over other parameters than this one.*only saved \['1.bias', '1.weight'\]"
    ):
        set_optimizer_state(alone, names, state)


def test_when_schedulers_move():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    step = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert [entry.when for entry in schedule_all([step, plateau, (step, "epoch")])] == ["step", "validation", "epoch"]
    with pytest.raises(ValueError, match="pairs StepLR with 'batch'; a scheduler moves after each \"step\""):
        schedule_all([(step, "batch")])
