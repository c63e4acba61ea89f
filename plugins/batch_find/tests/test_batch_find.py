"""The size that fits on all ranks is found, trained as with accumulate, and kept by a resume."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from hookline import CallbackInterface, Stage, hookimpl
from hookline.cli import main
from hookline.testing import (
    Memory,
    PlainModule,
    TinyModule,
    assert_one_model,
    digest,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_batch_find import BatchFind


class Sizes(CallbackInterface):
    """Notes the sizes of the batches that pass the model, while they are tried and in training."""

    def __init__(self):
        self.tried, self.trained = [], []

    @hookimpl
    def prepare_batch(self, trainer, batch, stage):
        if stage is Stage.TRAIN:
            (self.tried if trainer.idle else self.trained).append(len(batch[0]))
        return batch


class Limited(TinyModule):
    """Runs out of memory in batches of more than so many samples, in the forward or in the backward."""

    def __init__(self, limit, backward=False, samples=96):
        super().__init__(samples=samples)
        self.limit, self.backward = limit, backward

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        if len(batch[0]) > self.limit:
            if not self.backward:
                raise torch.OutOfMemoryError("out of memory in the forward")
            loss.register_hook(out_of_memory)
        self.log(size=float(len(batch[0])))
        return loss, predictions


def out_of_memory(gradient):
    raise torch.OutOfMemoryError("out of memory in the backward")


def train(plugins, module, **options):
    trainer = tiny_trainer(plugins, module, **{"train_batch_size": 24, "evaluate_every": None, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("limit", "tried", "size"),
    [
        (100, [2, 4, 8, 12, 24], 24),
        (23, [2, 4, 8, 12, 24], 12),
        (8, [2, 4, 8, 12], 8),
        (7, [2, 4, 8, 6], 6),
        (3, [2, 4, 3], 3),
        (2, [2, 4, 3], 2),
    ],
)
def test_finds_the_largest_divisor_that_fits(limit, tried, size, backward):
    batch_find, sizes = BatchFind(), Sizes()
    trainer = train([batch_find, sizes], Limited(limit, backward))
    assert list(dict.fromkeys(sizes.tried)) == tried
    assert set(sizes.trained) == {size}
    assert (batch_find.size, trainer.window_size) == (size, 24 // size)
    assert trainer.totals.steps == trainer.global_step == 8
    assert trainer.totals.batches_per_epoch == trainer.counters.batches / 2 == 96 / size


def test_tries_no_smaller_ones_than_are_wanted():
    sizes = Sizes()
    assert train([BatchFind(smallest=6), sizes], Limited(100)).window_size == 1
    assert sizes.tried[0] == 6
    with pytest.raises(
        ValueError, match=r"batch_find: micro-batches of 6 sample\(s\) do not fit into memory, and smalle"
    ):
        train([BatchFind(smallest=6)], Limited(5))
    assert train([BatchFind(smallest=100)], Limited(100)).window_size == 1


SETTINGS = [
    {},
    {"ema": {"decay": 0.5}, "clip": {"max_norm": 0.1}, "finite": {}},
    {"amp": {"precision": "fp16", "init_scale": 256.0}, "sam": {}},
    {"lr_find": {"low": 1e-4, "high": 1.0, "steps": 5}},
]


@pytest.mark.plugins
@pytest.mark.parametrize("plugins", SETTINGS, ids=["plain", "ema", "fp16", "lr_find"])
def test_training_has_the_bits_of_accumulate(plugins):
    ends = []
    for decides in ({"batch_find": {}}, {"accumulate": {"micro_batch_size": 8}}):
        memory = Memory(every="1 steps")
        trainer = train({**plugins, **decides, "memory": memory}, Limited(8), log_every="1 steps")
        for state in memory.states.values():
            state["trainer"]["counters"]["seconds"] = 0
            state["plugins"].pop("batch_find", None)
        ends.append((digest(memory.states), trainer.module.seen, trainer.totals))
    assert ends[0] == ends[1]


def test_a_run_resumes_at_each_step_with_the_same_bits_and_searches_no_more():
    whole = Memory(every="1 steps")
    expected = train([BatchFind(), whole], Limited(8)).module
    for step, state in whole.states.items():
        if step < 8:
            sizes, more_room = Sizes(), Limited(100)
            train([BatchFind(), Memory(state), sizes], more_room)
            assert sizes.tried == []
            assert set(sizes.trained) == {8}
            assert digest(more_room.state_dict()) == digest(expected.state_dict()), step


def test_an_object_that_another_trainer_had_searches_anew():
    batch_find = BatchFind()
    train([batch_find], Limited(8))
    train([batch_find], Limited(5))
    assert batch_find.size == 4


# Ranks --------------------------------------------------------------------------------


class OneIsSmall(PlainModule):
    """Has less memory on rank 1."""

    def train_step(self, global_step, batch, device):
        if len(batch[0]) > (2 if self.trainer.rank else 3):
            raise torch.OutOfMemoryError("out of memory")
        return super().train_step(global_step, batch, device)


def size_of(trainer):
    return dict(trainer.plugins.listed())["batch_find"].size


@pytest.mark.plugins
def test_ranks_take_what_fits_on_all_of_them():
    ranks = on_ranks(train_tiny, 2, {"batch_find": {}, "ddp": {}}, OneIsSmall, look=size_of)
    assert [rank.looked for rank in ranks] == [2, 2]
    assert_one_model(ranks, train_tiny({}))
    assert digest(ranks[0].weights) == digest(
        on_ranks(train_tiny, 2, {"accumulate": {"steps": 3}, "ddp": {}})[0].weights
    )


class Shared(CallbackInterface):
    """Says that there are two ranks, which share a weight."""

    @hookimpl
    def get_ranks(self):
        return 0, 0, 2

    @hookimpl
    def on_begin_train(self, trainer):
        next(trainer.module.parameters()).device_mesh = "a mesh"


def test_refuses_weights_that_ranks_share():
    with pytest.raises(ValueError, match="batch_find: ranks share the weights here, so all of them are needed in each"):
        train([BatchFind(), Shared()], Limited(8))


# The command --------------------------------------------------------------------------

CONFIG = """
module: {_target_: test_batch_find.Limited, limit: 7}
trainer: {train_batch_size: 24, device: cpu}
plugins:
  accumulate: {steps: 2}
  checkpoint: {}
"""


@pytest.mark.plugins
def test_the_command_prints_the_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert main(["batch-find", "run.yaml"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("micro-batches of 6 samples fit: 4 of them make a step on each rank. Write\n")
    assert told.endswith("plugins:\n  accumulate: {micro_batch_size: 6}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert main(["batch-find", "run.yaml", "module.limit=1"]) == 2
    assert "micro-batches of 2 sample(s) do not fit into memory" in capsys.readouterr().err


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0.0}, "batch_find.memory=0.0 must be above 0 and at most 1, such as 0.9"),
        ({"memory": 1.1}, "batch_find.memory=1.1 must be above 0 and at most 1"),
        ({"smallest": 0}, "batch_find.smallest=0 must be at least 1 sample"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BatchFind(**options)


def test_refuses_a_loader_that_goes_by_itself():
    class Own(Limited):
        def get_train_dataloader(self, sampler, batch_size):
            return super().get_train_dataloader(sampler, 24)

    with pytest.raises(
        ValueError, match=r"batch_find asked the training loader for batches of 2, and it gave one of 24"
    ):
        train([BatchFind()], Own(8))


def test_refuses_another_number_of_steps():
    class Drops(Limited):
        def get_train_dataloader(self, sampler, batch_size):
            dataset = super().get_train_dataloader(sampler, batch_size).dataset
            return DataLoader(dataset, batch_size, sampler=sampler(dataset), drop_last=True)

    with pytest.raises(
        ValueError, match=r"batch_find: 8 samples fit, but with them an epoch has 4 steps, .* made for 3"
    ):
        train([BatchFind()], Drops(8, samples=85))


@pytest.mark.plugins
def test_refuses_accumulate_beside_it():
    with pytest.raises(ValueError, match="both perform"):
        train({"batch_find": {}, "accumulate": {"steps": 2}}, Limited(8))
