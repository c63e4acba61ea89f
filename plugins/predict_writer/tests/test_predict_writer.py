import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule, on_ranks, run_ranks, tiny_trainer
from hookline.testing.faults import at_file, failing, kill, run
from hookline_predict_writer import PredictWriter

parquet = pytest.importorskip("pyarrow.parquet")


class Several(TinyModule):
    """Predicts several outputs of two loaders; what it computes is the same in a batch of any size."""

    texts, ragged, noise, fault = False, False, False, (0, None)

    def __init__(self, samples=31, **more):
        super().__init__(samples)
        self.predicted = 0
        vars(self).update(more)

    def predict_step(self, global_step, batch, device):
        inputs, _, ids = batch
        self.predicted += 1
        if self.predicted == self.fault[0]:
            self.fault[1]()
        outputs = {"twice": 2 * inputs, "of": (ids, None if self.texts or self.ragged else inputs.bfloat16())}
        if self.noise:
            outputs["noise"] = torch.rand(len(ids), 2)
        if self.texts:
            outputs["text"] = [f"zweiundzwanzig ä {number}" for number in ids.tolist()]
            outputs["found"] = [{"boxes": torch.ones(number % 3, 2), "score": 0.5} for number in ids.tolist()]
        if self.ragged:
            outputs["long"] = torch.arange(len(ids) * 3 * len(ids)).view(len(ids), 3, len(ids))
        return outputs

    def get_predict_dataloaders(self, sampler, batch_size):
        dataset = TensorDataset(self.inputs, self.targets, torch.arange(len(self.inputs)))
        own = BatchSampler(SequentialSampler(range(11)), 2, False)
        own = DataLoader(dataset, batch_sampler=Given([[0, 1, 2], [3], [4, 5, 6, 7, 8], [9, 10]], own))
        return {"a": DataLoader(dataset, batch_size, sampler=sampler(dataset)), "b/c": own}


class Given(BatchSampler):
    """Gives batches of these indices."""

    def __init__(self, batches, like):
        super().__init__(like.sampler, 1, False)
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def predict(folder, form="npy", fault=(0, None), **module):
    """Predict with parts of two batches; return how many batches were predicted."""
    plugins = {"distributed": {}, "predict_writer": {"format": form, "folder": str(folder), "part": "300B"}}
    trainer = tiny_trainer(plugins, module := Several(fault=fault, **module), val_batch_size=4)
    trainer.predict()
    return module.predicted


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


INPUTS = Several().inputs
BOXES = [{"boxes": [[1.0, 1.0]] * (number % 3), "score": 0.5} for number in range(31)]


def test_safetensors(tmp_path):
    predict(tmp_path, "safetensors")
    assert contents(tmp_path).keys() == {"a.safetensors", "b%2Fc.safetensors"}
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors.keys() == {"twice", "of.0", "of.1"}
    assert torch.equal(tensors["twice"], 2 * INPUTS)
    assert torch.equal(tensors["of.1"], INPUTS.bfloat16())
    assert load_file(tmp_path / "b%2Fc.safetensors")["of.0"].tolist() == [*range(11)]


def test_npy(tmp_path):
    module = TinyModule()
    trainer = tiny_trainer([PredictWriter()], module, runs_folder=str(tmp_path))
    trainer.predict()
    written = np.load(trainer.run_dir / "predictions" / "default" / "prediction.npy", mmap_mode="r")
    assert np.array_equal(written, trainer.predict(collect=True)["default"].numpy())
    assert written.shape == (50, 1)


def test_parquet(tmp_path):
    predict(tmp_path, "parquet", texts=True, ragged=True)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert str(table.schema.field("twice").type) == "list<element: float>"
    assert table.column("twice").to_pylist() == (2 * INPUTS).tolist()
    assert table.column("of.0").to_pylist() == [*range(31)]
    assert table.column("text").to_pylist() == [f"zweiundzwanzig ä {number}" for number in range(31)]
    assert table.column("found").to_pylist() == BOXES
    long = table.column("long").to_pylist()
    assert long[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert long[30] == [[18, 19, 20], [21, 22, 23], [24, 25, 26]]  # the last batch has three samples


def test_jsonl(tmp_path):
    predict(tmp_path, "jsonl", texts=True, ragged=True)
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [*rows[0]] == ["twice", "of.0", "text", "found", "long"]
    assert [row["twice"] for row in rows] == (2 * INPUTS).tolist()
    assert [row["found"] for row in rows] == BOXES
    assert [len(row["long"][2]) for row in rows] == [4] * 28 + [3] * 3


# Ranks --------------------------------------------------------------------------------


def predict_all(folder):
    predict(folder, "safetensors")
    predict(folder, "jsonl", texts=True)
    if "RANK" in os.environ:
        trainer = tiny_trainer({"distributed": {}, "predict_writer": {"folder": f"{folder}-more"}}, Repeating(11))
        with pytest.raises((ValueError, RuntimeError), match="ranks predicted 12 samples of the 11 of the loader 'de"):
            trainer.predict()


class Repeating(TinyModule):
    """Gives all ranks as many samples, the first ones twice."""

    def get_predict_dataloaders(self, sampler, batch_size):
        dataset = TensorDataset(self.inputs)
        own = DistributedSampler(dataset, self.trainer.shares, self.trainer.share, shuffle=False)
        return DataLoader(dataset, batch_size, sampler=own)


def test_three_ranks_write_what_one_process_writes(tmp_path):
    predict_all(tmp_path / "one")
    on_ranks(predict_all, 3, tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_two_ranks_that_are_killed_go_on(tmp_path):
    predict(tmp_path / "one", "jsonl", texts=True)
    killed = run_ranks(functools.partial(predict, texts=True), 2, tmp_path / "two", "jsonl", (5, kill), timeout=100)
    assert -signal.SIGKILL in {outcome.code for outcome in killed}
    assert not [*(tmp_path / "two").glob("*.jsonl")]
    batches = on_ranks(predict, 2, tmp_path / "two", "jsonl", texts=True)
    assert batches == [3, 3]  # of four and two: the complete parts that both have are kept
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


# Kills --------------------------------------------------------------------------------


def predict_and_die_at_the_end(folder):
    with at_file(folder, "rename a.safetensors", kill):
        predict(folder, "safetensors", noise=True)


@pytest.mark.parametrize(("fault", "left"), [(2, 12), (6, 8), (10, 6), (None, 3)])
def test_a_killed_prediction_goes_on_to_the_same_bytes(tmp_path, fault, left):
    assert predict(tmp_path / "whole", "safetensors", noise=True) == 12
    dying = (predict_and_die_at_the_end, tmp_path / "cut")
    if fault is not None:
        dying = (predict_noise, tmp_path / "cut", fault)
    outcome = run(*dying)
    assert outcome.code == -signal.SIGKILL, outcome.output
    assert not [*(tmp_path / "cut").glob("*.safetensors")]
    assert predict(tmp_path / "cut", "safetensors", noise=True) == left
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def predict_noise(folder, fault):
    predict(folder, "safetensors", (fault, kill), noise=True)


def cut(folder, form="safetensors", **options):
    fault = 6, failing(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        predict(folder, form, fault, **options)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"lr": 1.0}, None),
        ({"weights": 1.0}, "weights"),
        ({"samples": 30}, "data"),
        ({"val_batch_size": 8}, "batch size, data"),
        ({"seed": 1}, "seed"),
    ],
    ids=str,
)
def test_what_is_no_longer_the_same_prediction_begins_anew(tmp_path, caplog, change, what):
    module = Several(change.pop("samples", 31), lr=change.pop("lr", 0.1))
    with torch.no_grad():
        module.net[4].bias += change.pop("weights", 0.0)
    cut(tmp_path)
    plugins = {"distributed": {}, "predict_writer": {"format": "safetensors", "folder": str(tmp_path), "part": "300B"}}
    tiny_trainer(plugins, module, **{"val_batch_size": 4, **change}).predict()
    begun = f"begins anew, as the prediction that was cut had another {what}"
    assert (begun in caplog.text) == (what is not None)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["twice"], 2 * module.inputs)
    if what is None:
        assert module.predicted == 4 + 4  # of eight batches, and four of the other loader


@dataclass(eq=False)
class Others(CallbackInterface):
    """Put other weights in for the evaluation."""

    @hookimpl(wrapper=True)
    def evaluate(self, trainer):
        with torch.no_grad():
            trainer.module.net[4].bias += trainer.module.by
        return (yield)


def test_weights_that_are_put_in_for_the_evaluation_are_another_model(tmp_path, caplog):
    for by, fault in ((1.0, (5, failing(ZeroDivisionError()))), (5.0, (0, None))):
        plugins = {"others": Others(), "predict_writer": PredictWriter("safetensors", str(tmp_path), "300B")}
        trainer = tiny_trainer(plugins, Several(by=by, fault=fault), val_batch_size=4)
        with contextlib.suppress(ZeroDivisionError):
            trainer.predict()
    assert "another weights" in caplog.text


def test_another_format_takes_the_parts_that_are_there(tmp_path):
    with pytest.raises(ValueError, match="predict_writer.format=npy cannot hold 'long', which has rows of several"):
        predict(tmp_path, ragged=True)
    assert predict(tmp_path, "jsonl", ragged=True) < 12
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 31


# Memory -------------------------------------------------------------------------------


MUCH = """
import resource, sys
from hookline.testing import TinyModule, tiny_trainer
from hookline_predict_writer import PredictWriter

class Large(TinyModule):
    def predict_step(self, global_step, batch, device):
        return batch[0][:, :1].expand(-1, 64 * 1024).contiguous()  # 2 MB

tiny_trainer([PredictWriter("parquet", sys.argv[1], "4MB")], Large(int(sys.argv[2]))).predict()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_predictions_are_never_in_memory_together(tmp_path):
    """A process that predicts 240 MB needs as much memory as one that predicts 40 MB."""
    peaks = []
    for samples in ("160", "960"):
        command = [sys.executable, "-c", MUCH, str(tmp_path / samples), samples]  # a fork would begin with our memory
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 60e6
    assert parquet.read_metadata(tmp_path / "960" / "default.parquet").num_rows == 960


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "parket"}, "predict_writer.format='parket' must be one of npy, safetensors, parquet, jsonl, did"),
        ({"part": "much"}, "predict_writer.part='much' is no size; write one like"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PredictWriter(**options)
