"""What a prediction gives: the places of its samples, and all of it by `collect=True`, on any number of ranks."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from hookline import CallbackInterface, hookimpl, named_rows
from hookline.testing import TinyModule, on_ranks, tiny_trainer


class Nested(TinyModule):
    """Predicts several outputs, of two loaders, one of which makes batches of its own."""

    def predict_step(self, global_step, batch, device):
        inputs, _, ids = batch
        words = [f"sample {number}" for number in ids.tolist()]
        return {"y": self.net(inputs), "of": (ids, words), "none": None}

    def get_predict_dataloaders(self, sampler, batch_size):
        dataset = TensorDataset(self.inputs, self.targets, torch.arange(len(self.inputs)))
        uneven = [[0, 1, 2], [3], [4, 5, 6, 7, 8], [9, 10]]
        return {
            "a": DataLoader(dataset, batch_size, sampler=sampler(dataset)),
            "b": DataLoader(dataset, batch_sampler=Given(uneven)),
        }


class Given(BatchSampler):
    """Gives batches of these indices."""

    def __init__(self, batches):
        super().__init__(SequentialSampler(range(11)), 1, False)
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@dataclass(eq=False)
class Places(CallbackInterface):
    """Keep the places of the samples of each batch."""

    def __post_init__(self):
        self.places = []

    @hookimpl
    def on_end_predict_step(self, key, places):
        self.places.append((key, [*places]))


def predicted(samples=19):
    places = Places()
    trainer = tiny_trainer({"distributed": {}, "places": places}, Nested(samples))
    return trainer.predict(collect=True), places.places


def test_predictions_come_in_the_form_of_a_step_and_the_order_of_the_data():
    module = Nested(samples=19)
    trainer = tiny_trainer(module=module)
    got = trainer.predict(collect=True)
    module.eval()
    assert got.keys() == {"a", "b"}
    with torch.no_grad():
        torch.testing.assert_close(got["a"]["y"], module.net(module.inputs))
    assert got["a"]["of"][0].tolist() == [*range(19)]
    assert got["b"]["of"][1] == [f"sample {number}" for number in range(11)]
    assert got["a"]["none"] is None
    assert not got["a"]["y"].requires_grad


def test_a_tensor_alone_comes_as_one_and_nothing_is_kept_without_being_asked():
    trainer = tiny_trainer([Places()])
    got = trainer.predict(collect=True)
    assert got["default"].shape == (50, 1)
    assert trainer.predict() is None


def test_rows_of_several_lengths_come_as_a_list():
    class Ragged(TinyModule):
        def predict_step(self, global_step, batch, device):
            return torch.ones(len(batch[0]), 1 + int(batch[2][0]))

    got = tiny_trainer(module=Ragged(samples=10)).predict(collect=True)["default"]
    assert [len(row) for row in got] == [1] * 8 + [9] * 2


@pytest.mark.plugins
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_collect_what_one_process_predicts(world_size):
    (alone, places), ranks = predicted(), on_ranks(predicted, world_size)
    assert [place for key, own in places if key == "a" for place in own] == [*range(19)]
    assert [own for key, own in places if key == "b"] == [[0] * 3, [1], [2] * 5, [3] * 2]
    for got, _ in ranks:
        assert got["a"]["of"][0].tolist() == alone["a"]["of"][0].tolist()
        assert [got[key]["of"][1] for key in got] == [alone[key]["of"][1] for key in alone]
        torch.testing.assert_close([got[key]["y"] for key in got], [alone[key]["y"] for key in alone])
    assert sorted(place for _, said in ranks for key, own in said if key == "a" for place in own) == [*range(19)]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (
            torch.zeros(()),
            "predict_step returned a tensor of shape (), requires_grad=False as 'prediction'",
        ),
        ({"y": (torch.zeros(3), "word")}, "predict_step returned a str as 'y.1', which has no row for each sample"),
        ({"y": torch.zeros(4, 3)}, "predict_step returned 4 rows as 'y' for a batch of 3 samples: return one row for"),
        ({"a": {"b": [1, 2, 3]}, "a.b": [1, 2, 3]}, "predict_step returned two outputs of the name 'a.b'"),
    ],
)
def test_what_has_no_row_for_each_sample_is_refused(outputs, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        named_rows(outputs, 3)


def test_rows_by_name():
    rows = named_rows({"a": (torch.ones(2, 3, requires_grad=True), None), 4: ["x", "y"], "n": torch.ones(2).numpy()}, 2)
    assert [*rows] == ["a.0", "4", "n"]
    assert not rows["a.0"].requires_grad
    assert torch.equal(rows["n"], torch.ones(2))


def test_batches_with_other_outputs_are_refused():
    class Changing(TinyModule):
        def predict_step(self, global_step, batch, device):
            return {f"from {int(batch[2][0])}": batch[0]}

    with pytest.raises(ValueError, match="returned .'from 8'. for a batch, and .'from 0'. for the first"):
        tiny_trainer(module=Changing()).predict(collect=True)
