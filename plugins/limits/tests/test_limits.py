import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface, Stage, Trainer, hookimpl
from hookline.testing import Memory
from hookline_limits import Limits


class Recording(ModuleInterface):
    """A module that remembers which samples each stage was given."""

    def __init__(self, samples=20):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Linear(1, 1)
        self.samples = torch.arange(float(samples))
        self.seen = {stage: [] for stage in Stage}

    def forward(self, stage, global_step, batch, device):
        self.seen[stage].append(batch[0].tolist())
        return super().forward(stage, global_step, batch, device)

    def train_step(self, global_step, batch, device):
        return self.net(batch[0].unsqueeze(1) / 10).square().mean()

    def val_step(self, global_step, batch, device):
        return self.train_step(global_step, batch, device)

    test_step = predict_step = val_step

    def get_train_dataloader(self, sampler, batch_size):
        data = TensorDataset(self.samples)
        return DataLoader(data, batch_size, sampler=sampler(data))

    def get_val_dataloaders(self, sampler, batch_size):
        data = TensorDataset(self.samples + 100)
        return {"one": DataLoader(data, batch_size, sampler=sampler(data)), "other": DataLoader(data, 10)}

    def get_test_dataloaders(self, sampler, batch_size):
        return DataLoader(TensorDataset(self.samples + 200), batch_size)

    def get_predict_dataloaders(self, sampler, batch_size):
        return DataLoader(TensorDataset(self.samples + 300), batch_size)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        self.estimated = estimated_global_steps_per_epoch
        return [torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)], []

    @hookimpl
    def on_end_predict_step(self, index):
        pass


class WithoutLength(Recording):
    def get_train_dataloader(self, sampler, batch_size):
        return (batch for batch in super().get_train_dataloader(sampler, batch_size))


class Accumulating:
    @hookimpl
    def get_window_size(self):
        return 2


def make(module, plugins, **options):
    return Trainer(module, plugins=plugins, device="cpu", **{"train_batch_size": 2, "val_batch_size": 4} | options)


def train(module, plugins, **options):
    trainer = make(module, plugins, **options)
    trainer.train()
    return trainer


def assert_same_weights(one, other):
    for name, weights in one.state_dict().items():
        assert torch.equal(weights, other.state_dict()[name]), name


def test_limits_each_stage_by_its_own_number():
    module = Recording()
    trainer = train(module, [Limits(train_batches=3, val_batches=2, test_batches=1, predict_batches=4)], epochs=2)
    assert (len(module.seen[Stage.TRAIN]), trainer.counters.global_step) == (6, 6)
    assert (trainer.totals.batches_per_epoch, trainer.totals.steps, module.estimated) == (3, 6, 3)
    assert module.seen[Stage.VAL] == 2 * [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        list(range(100, 110)),
        list(range(110, 120)),
    ]
    trainer.test()
    trainer.predict()
    assert module.seen[Stage.TEST] == [[200, 201, 202, 203]]
    assert len(module.seen[Stage.PREDICT]) == 4


def test_a_limited_epoch_is_the_beginning_of_the_whole_one():
    limited, whole = Recording(), Recording()
    train(limited, [Limits(train_batches=3)], epochs=2)
    train(whole, [], epochs=2)
    assert limited.seen[Stage.TRAIN] == whole.seen[Stage.TRAIN][:3] + whole.seen[Stage.TRAIN][10:13]


@pytest.mark.parametrize(("fraction", "batches"), [(0.3, 3), (0.25, 2), (0.29, 3), (0.001, 1), (1.0, 10)])
def test_a_fraction_is_of_the_loader(fraction, batches):
    module = Recording()
    trainer = train(module, [Limits(train_batches=fraction)])
    assert len(module.seen[Stage.TRAIN]) == trainer.totals.batches_per_epoch == batches


def test_a_number_above_the_length_is_no_limit():
    module = Recording()
    assert train(module, [Limits(train_batches=99)]).totals.batches_per_epoch == 10
    assert len(module.seen[Stage.TRAIN]) == 10


def test_a_number_limits_a_loader_without_a_length():
    module = WithoutLength()
    assert train(module, [Limits(train_batches=4)]).totals.batches_per_epoch == 4
    assert len(module.seen[Stage.TRAIN]) == 4


def test_counts_micro_batches():
    module = Recording()
    trainer = train(module, [Limits(train_batches=5), Accumulating()])
    assert [len(batch) for batch in module.seen[Stage.TRAIN]] == [1] * 5
    assert (trainer.counters.global_step, trainer.totals.steps) == (3, 3)


@pytest.mark.parametrize("limits", [{"train_batches": 5}, {"overfit_batches": 5}])
def test_a_run_resumed_in_mid_epoch_ends_where_it_would_have(limits):
    whole = Recording()
    train(whole, [Limits(**limits)], epochs=3)
    first, second, memory = Recording(), Recording(), Memory()
    train(first, [Limits(**limits), memory], epochs=3, max_steps=7)
    trainer = train(second, [Limits(**limits), Memory(memory.state)], epochs=3)
    assert first.seen[Stage.TRAIN] + second.seen[Stage.TRAIN] == whole.seen[Stage.TRAIN]
    assert trainer.counters.global_step == 15
    assert_same_weights(second, whole)


def test_overfits_the_same_batches_and_validates_on_them():
    module = Recording()
    train(module, [Limits(overfit_batches=2)], epochs=3)
    assert module.seen[Stage.TRAIN] == 3 * [[0, 1], [2, 3]]
    assert module.seen[Stage.VAL] == 6 * [[0, 1], [2, 3]]  # for each of two loaders


def test_overfits_a_fraction():
    module = Recording()
    train(module, [Limits(overfit_batches=0.3)], epochs=2, evaluate_every="3 steps")
    assert module.seen[Stage.TRAIN] == 2 * [[0, 1], [2, 3], [4, 5]]
    assert module.seen[Stage.VAL] == module.seen[Stage.TRAIN] * 2


def test_overfitting_leaves_tests_alone():
    module = Recording()
    make(module, [Limits(overfit_batches=1)]).test()
    assert len(module.seen[Stage.TEST]) == 5


@pytest.mark.parametrize(("given", "batches"), [(True, 1), (3, 3)])
def test_fast_dev_run_tries_everything_once_in_a_folder_apart(given, batches, tmp_path):
    module = Recording()
    trainer = train(
        module,
        [Limits(fast_dev_run=given, train_batches=7)],
        epochs=5,
        evaluate_every=None,
        sanity_val_steps=2,
        runs_folder=str(tmp_path),
        run_name="digits",
    )
    assert len(module.seen[Stage.TRAIN]) == trainer.counters.global_step == batches
    assert len(module.seen[Stage.VAL]) == batches + min(batches, 2)
    assert trainer.counters.epochs == trainer.totals.epochs == 1
    assert not math.isnan(trainer.metrics["val_loss"])
    assert trainer.run_dir == tmp_path / "digits-dev-1"
    trainer.test()
    assert len(module.seen[Stage.TEST]) == batches


def test_fast_dev_run_begins_a_run_of_its_own(tmp_path):
    with pytest.warns(UserWarning, match=r"limits\.fast_dev_run begins a run of its own, so resume=True is left aside"):
        trainer = make(Recording(), [Limits(fast_dev_run=True)], resume=True, runs_folder=str(tmp_path))
    trainer.train()
    assert trainer.counters.global_step == 1


def test_no_fast_dev_run_changes_nothing():
    trainer = make(Recording(), [Limits(fast_dev_run=False)], epochs=2)
    assert (trainer.options.epochs, trainer.options.run_name) == (2, "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fast_dev_run": -1}, r"limits\.fast_dev_run=-1 must be a number of batches, true or false"),
        ({"train_batches": 0}, r"limits\.train_batches=0 must be at least 1 batch; null is no limit"),
        ({"val_batches": 2.0}, r"limits\.val_batches=2\.0 is a fraction, which must be above 0 and at most 1; write a"),
        ({"test_batches": 0.0}, r"limits\.test_batches=0\.0 is a fraction, which must be above 0"),
        ({"predict_batches": -3}, r"limits\.predict_batches=-3 must be at least 1 batch"),
        ({"overfit_batches": math.nan}, r"limits\.overfit_batches=nan is a fraction"),
        ({"overfit_batches": 2, "train_batches": 3}, r"limits\.train_batches and limits\.overfit_batches both say how"),
        (
            {"overfit_batches": 2, "val_batches": 3},
            r"limits\.val_batches and limits\.overfit_batches both say how many",
        ),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


@pytest.mark.parametrize("option", ["train_batches", "overfit_batches"])
def test_refuses_a_fraction_of_a_loader_without_a_length(option):
    message = (
        rf"limits\.{option}=0\.5 is a fraction, but the train loader 'default' does not know how many batches it has"
    )
    with pytest.raises(ValueError, match=message):
        train(WithoutLength(), [Limits(**{option: 0.5})])
