"""Batches are mixed as a loop by hand would, in training alone, and go on exactly after a resume."""

import collections
import random

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from hookline import Stage
from hookline.testing import Memory, TinyModule, check_plugin, digest, hand_written_loop, on_ranks, tiny_trainer
from hookline_mix import Mix, cutmix, mixup


def train(plugin, module=None, *plugins, **options):
    trainer = tiny_trainer([*plugins, plugin], module, **options)
    trainer.train()
    return trainer


class Pictures(TinyModule):
    """Tells 48 pictures apart, each of one value, its number; `batches` has what each step got."""

    def __init__(self, wrap=tuple):
        super().__init__()
        self.labels = torch.arange(48)
        self.pictures = self.labels.float().view(-1, 1, 1, 1).expand(-1, 3, 12, 10)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(360, 48))
        torch.nn.init.zeros_(self.net[1].weight)
        torch.nn.init.zeros_(self.net[1].bias)
        self.batches, self.validated, self.wrap = [], [], wrap

    def step(self, batch, kept):
        inputs, targets, *_ = batch.values() if isinstance(batch, dict) else batch
        kept.append((inputs, targets))
        return torch.nn.functional.cross_entropy(self.net(inputs / 48), targets)

    def train_step(self, global_step, batch, device):
        self.kept = batch
        return self.step(batch, self.batches)

    def val_step(self, global_step, batch, device):
        return self.step(batch, self.validated)

    def get_train_dataloader(self, sampler, batch_size):
        dataset = TensorDataset(self.pictures, self.labels, torch.arange(48))
        return DataLoader(
            dataset, batch_size, sampler=sampler(dataset), collate_fn=lambda rows: self.wrap(default_collate(rows))
        )


def test_contract():
    check_plugin(Mix, mixup=0.2)
    check_plugin(Mix, mixup=0.2, until=1, epochs=2)


# What is mixed ------------------------------------------------------------------------


def test_mixup_has_the_bits_of_a_loop_by_hand():
    class ByHand(TinyModule):
        def train_step(self, global_step, batch, device):
            inputs, targets, ids = batch
            share = random.Random(torch.randint(2**62, (1,)).tolist()[0]).betavariate(0.4, 0.4)
            mixed = [share * part + (1 - share) * part.roll(1, 0) for part in (inputs, targets)]
            return super().train_step(global_step, (*mixed, ids), device)

    by_hand, ours = ByHand(), TinyModule()
    hand_written_loop(by_hand)
    train(Mix(0.4), ours)
    assert digest(ours.state_dict()) == digest(by_hand.state_dict())
    plain = TinyModule()
    tiny_trainer(module=plain).train()
    assert digest(ours.state_dict()) != digest(plain.state_dict())


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}], ids=str)
def test_targets_are_shares_of_what_is_in_the_inputs(options):
    module = Pictures()
    train(Mix(**options, classes=48), module, epochs=1)
    assert len(module.batches) == 6
    for inputs, targets in module.batches:
        assert targets.shape == (8, 48)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        torch.testing.assert_close((targets * torch.arange(48)).sum(1), inputs.mean(dim=(1, 2, 3)))
    assert any(0 < targets.max() < 1 for _, targets in module.batches)


def test_cutmix_takes_a_box_and_its_share_is_its_area():
    draws = random.Random(3)
    inputs = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 10, 8)
    for _ in range(20):
        mixed, share = cutmix(inputs, draws.random(), draws)
        foreign = mixed != inputs
        assert foreign.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([1 - share] * 4)
        assert torch.equal(mixed[foreign], inputs.roll(1, 0)[foreign])
        rows, columns = (foreign[0, 0].any(dim) for dim in (1, 0))
        assert torch.equal(foreign[0, 0], rows[:, None] & columns[None])
    assert cutmix(inputs, 1.0, draws)[1] == 1.0
    assert mixup(inputs, 0.25, draws)[0][0].unique().item() == 0.75 * 3


def test_both_come_in_turn():
    module = Pictures()
    train(Mix(1.0, 1.0, classes=48), module, epochs=6)
    boxes = sum(whole(inputs) for inputs, _ in module.batches)
    assert 10 < boxes < 26  # of 36


def whole(inputs):
    """Tell whether each value of a batch is one of a picture: cut, and not averaged."""
    return torch.equal(inputs, inputs.round())


def test_evaluations_and_the_last_epochs_are_plain():
    module = Pictures()
    train(Mix(1.0, classes=48, until=1), module)
    assert [targets.is_floating_point() for _, targets in module.batches] == [True] * 6 + [False] * 6
    assert not any(targets.is_floating_point() for _, targets in module.validated)
    assert all(whole(inputs) for inputs, _ in module.validated)


Pair = collections.namedtuple("Pair", ["inputs", "targets", "ids"])


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (tuple, {}),
        (list, {}),
        (lambda parts: Pair(*parts), {}),
        (
            lambda parts: dict(zip(("image", "label", "ids"), parts, strict=True)),
            {"inputs": "image", "targets": "label"},
        ),
    ],
    ids=["tuple", "list", "named tuple", "dictionary"],
)
def test_a_batch_keeps_its_form_and_its_other_parts(wrap, options):
    module, plain = Pictures(wrap), Pictures()
    train(Mix(1.0, classes=48, **options), module, epochs=1)
    train(Mix(1.0, classes=48), plain, epochs=1)
    assert type(module.kept) is type(wrap(plain.kept))
    assert digest(module.state_dict()) == digest(plain.state_dict())
    ids = module.kept["ids"] if options else module.kept[2]
    assert torch.equal(ids, plain.kept[2])


class Scale:
    """A transform of a batch, as other packages have them."""

    def __init__(self, most=1.0):
        self.most = most

    def __call__(self, batch):
        inputs, *others = batch
        return inputs * torch.rand(()) * self.most, *others


def test_any_transform_is_applied():
    by_path, by_hand = TinyModule(), TinyModule()
    path = "torch.nn.Identity"
    train(Mix(transform={"_target_": path}), by_path)
    tiny_trainer(module=by_hand).train()
    assert digest(by_path.state_dict()) == digest(by_hand.state_dict())
    scaled = TinyModule()
    train(Mix(transform=Scale(0.5)), scaled)
    assert digest(scaled.state_dict()) != digest(by_hand.state_dict())


# Resuming and ranks -------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: Mix(0.3), lambda: Mix(0.3, until=1), lambda: Mix(transform=Scale())],
    ids=["mixup", "switched off", "transform"],
)
def test_a_resume_at_each_step_ends_with_the_same_bits(make):
    memory = Memory(every="1 steps")
    whole = train(make(), None, memory)
    for step in range(1, 14):
        resumed = train(make(), None, Memory(memory.states[step]))
        assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict()), step


@pytest.mark.parametrize("others", [{"accumulate": {"steps": 2}, "amp": {}, "clip": {}}], ids=str)
def test_the_order_of_plugins_changes_no_bit(others):
    ends = set()
    for names in ([*others, "mix"], ["mix", *others]):
        trainer = tiny_trainer({name: others.get(name, {"mixup": 0.3}) for name in names})
        trainer.train()
        ends.add(digest(trainer.module.state_dict()))
    assert len(ends) == 1


def on_a_rank():
    found = []
    for plugin in (Mix(1.0, classes=48), Mix(cutmix=1.0, classes=48, until=1)):
        module = Pictures()
        trainer = tiny_trainer({"distributed": {}, "ddp": {}, "mix": plugin}, module)
        trainer.train()
        share = module.batches[0][1].max().item()
        found.append((digest(trainer.export_model()), trainer.metrics["val_loss"], share))
    return found


@pytest.mark.xdist_group("ranks")
def test_ranks_draw_for_themselves_and_train_one_model():
    first, second = on_ranks(on_a_rank, 2)
    assert [end[:2] for end in first] == [end[:2] for end in second]
    assert first[0][2] != second[0][2]


# Mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mix has nothing to do: give mixup, cutmix or both"),
        ({"mixup": 0}, "mix.mixup=0 must be above 0, or null"),
        ({"mixup": 0.2, "until": 0}, "mix.until=0 must be above 0, or null"),
        ({"mixup": 0.2, "transform": Scale()}, "mix.transform and mix.mixup are both given: leave one out"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mix(**options)


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"mixup": 0.2}, Pictures, "mix.targets=1 are torch.int64, which cannot be mixed: give the number of classes"),
        ({"mixup": 0.2, "inputs": 2}, TinyModule, "mix.inputs=2 is torch.int64: only floating tensors can be mixed"),
        ({"mixup": 0.2, "inputs": "x"}, TinyModule, "mix.inputs='x' is not in the batch, which has type list"),
        (
            {"mixup": 0.2, "targets": "y", "inputs": "image"},
            lambda: Pictures(lambda parts: {"image": parts[0], "label": parts[1]}),
            r"mix.targets='y' is not in the batch, which has keys \['image', 'label'\]",
        ),
        ({"cutmix": 0.2}, TinyModule, r"mix.cutmix cuts boxes out of the last two dimensions; .* shape \(8, 8\)"),
        (
            {"mixup": 0.2},
            lambda: Pictures(lambda parts: (parts[0], parts[1].tolist())),
            "mix.targets=1 is a list; it must be a tensor",
        ),
        ({"transform": {"_target_": "no_such.Thing"}}, TinyModule, "mix.transform._target_: 'no_such.Thing' cannot be"),
    ],
    ids=["classes", "inputs", "place", "key", "shape", "list", "target"],
)
def test_wrong_batches_are_refused(options, module, message):
    with pytest.raises(ValueError, match=message):
        train(Mix(**options), module())


def test_only_training_is_mixed():
    trainer = tiny_trainer([Mix(0.2)])
    trainer.train()
    batch = next(iter(trainer.module.get_val_dataloaders(torch.utils.data.SequentialSampler, 8)))
    for stage in (Stage.VAL, Stage.TEST, Stage.PREDICT):
        assert trainer.hook.prepare_batch(trainer=trainer, batch=batch, stage=stage) is batch
