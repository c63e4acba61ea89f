"""A student trains as by hand with a teacher, which nothing moves, saves or exports."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hookline.testing import (
    Memory,
    TinyModule,
    assert_one_model,
    check_plugin,
    digest,
    hand_written_loop,
    on_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline_distill import Distill

LAST = 14
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 8, "out_features": 1}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Sorts(TinyModule):
    """Tells four classes apart."""

    def __init__(self, **options):
        super().__init__(**options)
        self.targets = self.targets.squeeze(1).long() % 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net[4] = nn.Linear(16, 4)
        self.net[0].bias.requires_grad_(False)  # before a batch norm it has no gradient but rounding

    def train_step(self, global_step, batch, device):
        inputs, targets, ids = batch
        self.seen.append(ids.tolist())
        logits = self.net(inputs)
        return F.cross_entropy(logits, targets), logits

    def val_step(self, global_step, batch, device):
        inputs, targets, _ = batch
        return F.cross_entropy(self.net(inputs), targets)


def teacher():
    """Return a network of the same layers with weights and statistics of its own."""
    net = Sorts().net
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return net


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module or Sorts(), **options)
    trainer.train()
    return trainer


def test_contract():
    check_plugin(Distill, teacher=LINEAR)
    check_plugin(Distill, teacher=LINEAR, weight=0.0, hidden={"4": ""}, hidden_weight=0.5, epochs=1)


class ByHand(Sorts):
    """Writes out what the plugin adds."""

    def __init__(self, kl, hidden):
        super().__init__()
        self.weights = kl, hidden
        self.others = [teacher().eval()]  # in a list, so that it is no part of the module

    def train_step(self, global_step, batch, device):
        inputs, targets, _ = batch
        first = self.net[0](inputs)
        logits = self.net[1:](first)
        with torch.no_grad():
            their_first = self.others[0][0](inputs)
            their_logits = self.others[0][1:](their_first)
        kl = F.kl_div(
            F.log_softmax(logits / 3, dim=1), F.softmax(their_logits / 3, dim=1).log(), log_target=True, reduction="sum"
        )
        added = self.weights[0] * 9 * kl / len(inputs) + self.weights[1] * (first - their_first).square().mean()
        return F.cross_entropy(logits, targets) + added


@pytest.mark.parametrize(("kl", "hidden"), [(0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_a_student_trains_as_by_hand(kl, hidden):
    by_hand = ByHand(kl, hidden)
    hand_written_loop(by_hand)
    theirs = teacher()
    before = digest(theirs.state_dict())
    layers = {"0": "0"} if hidden else {}
    plugin = Distill(theirs, temperature=3.0, weight=kl, hidden=layers, hidden_weight=hidden)
    trainer = train(plugin)
    for name, tensor in trainer.module.state_dict().items():
        torch.testing.assert_close(tensor, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert digest(theirs.state_dict()) == before
    assert not theirs.training


class Exactly(Sorts):
    """Does with the operators of the plugin what it does, so that bits can be compared."""

    def train_step(self, global_step, batch, device):
        inputs, targets, _ = batch
        with torch.no_grad():
            theirs = TEACHER(inputs)
        logits = self.net(inputs)
        logs = [F.log_softmax(each / 2.0, dim=-1) for each in (logits, theirs)]
        kl = F.kl_div(*logs, log_target=True, reduction="batchmean") * 4.0
        return F.cross_entropy(logits, targets) + 1.0 * kl


TEACHER = teacher().eval()


def test_a_student_has_the_bits_of_the_loop_by_hand():
    by_hand = Exactly()
    losses = hand_written_loop(by_hand)
    trainer = train(Distill(teacher()))
    assert digest(trainer.module.state_dict()) == digest(by_hand.state_dict())
    assert len(losses) == LAST


def test_the_teacher_is_in_no_optimizer_state_or_export():
    memory = Memory(every="1 steps")
    trainer = train(Distill(teacher()), memory)
    names = list(Sorts().state_dict())
    assert list(trainer.export_model()) == list(memory.states[3]["module"]) == names
    assert sum(len(group["params"]) for group in trainer.optimizers[0].param_groups) == len(list(Sorts().parameters()))
    assert list(memory.states[3]["plugins"]["distill"]) == ["teacher"]


def test_evaluations_are_those_of_the_student_alone():
    trainer = train(Distill(teacher()))
    alone = tiny_trainer([], copy.deepcopy(trainer.module))
    assert trainer.validate() == alone.validate()


def test_a_resume_is_exact_at_every_step():
    memory = Memory(every="1 steps")
    whole = train(Distill(teacher(), hidden={"0": "0"}), memory)
    for step in range(1, LAST + 1):
        resumed = train(Distill(teacher(), hidden={"0": "0"}), Memory(memory.states[step]))
        assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict()), step
    with pytest.raises(ValueError, match="distill: this run was begun with another teacher"):
        train(Distill(Sorts().net, hidden={"0": "0"}), Memory(memory.states[5]))


def test_the_losses_are_logged(tmp_path):
    logged = {}
    trainer = tiny_trainer([Distill(teacher(), hidden={"0": "0"})], Sorts(), log_every="1 steps")
    from hookline import CallbackInterface, hookimpl

    class Hear(CallbackInterface):
        @hookimpl
        def on_log(self, metrics):
            logged.update(metrics)

    trainer.plugins.register(Hear(), "hear")
    trainer.train()
    assert logged["distill_kl"] > 0
    assert logged["distill_hidden"] > 0
    assert logged["train_loss"] > logged["distill_kl"] + logged["distill_hidden"]


@pytest.mark.plugins
def test_a_teacher_comes_from_what_other_plugins_have_saved(tmp_path):
    first = train("checkpoint", "model_saving")
    (run,) = tmp_path.glob("runs/run-1")
    model = run / "models" / "best_valid_loss"
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    torch.save(first.module.state_dict(), tmp_path / "weights.pt")
    net = first.module.net
    ends = []
    for options in (
        {"teacher": net},
        {"weights": str(checkpoint)},
        {"weights": str(checkpoint / "model.safetensors")},
        {"weights": str(tmp_path / "weights.pt")},
        {"teacher": Sorts(), "teacher_part": "net", "weights": str(model)},
    ):
        ends.append(digest(train(Distill(**options)).module.state_dict()))
    assert ends[:4] == [ends[0]] * 4
    assert digest(train(Distill(weights=str(model))).module.state_dict()) == ends[4]


@pytest.mark.plugins
def test_what_is_trained_does_not_depend_on_the_order():
    plugins = {
        "amp": {"precision": "bf16"},
        "clip": {"max_norm": 0.1},
        "accumulate": {"steps": 2},
        "ema": {"decay": 0.5},
    }
    ends = []
    for reverse in (False, True):
        listed = {**plugins, "distill": Distill(teacher(), hidden={"0": "0"})}
        trainer = tiny_trainer(dict(reversed(listed.items())) if reverse else listed, Sorts())
        trainer.train()
        ends.append(digest(trainer.module.state_dict()))
    assert ends[0] == ends[1]


@pytest.mark.plugins
def test_a_compiled_student_is_compared_too():
    plain = train(Distill(teacher(), hidden={"0": "0"}))
    compiled = tiny_trainer(
        {"compile": {"blocks": ["Sequential"], "backend": "eager"}, "distill": Distill(teacher(), hidden={"0": "0"})},
        Sorts(),
    )
    compiled.train()
    for name, tensor in compiled.module.state_dict().items():
        torch.testing.assert_close(tensor, plain.module.state_dict()[name])


OF_RANKS = {"teacher": LINEAR, "weight": 0.0, "hidden": {"3": ""}}


@pytest.mark.plugins
def test_ranks_train_what_one_process_trains():
    ranks = on_ranks(train_tiny, 2, {"ddp": {}, "distill": OF_RANKS})
    assert_one_model(ranks, train_tiny({"distill": OF_RANKS}))


@pytest.mark.plugins
@pytest.mark.slow
def test_shards_train_what_one_process_trains():
    ranks = on_ranks(train_tiny, 2, {"fsdp": {"wrap": ["Linear"]}, "distill": OF_RANKS})
    assert_one_model(ranks, train_tiny({"distill": OF_RANKS}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "distill has no teacher: give teacher"),
        ({"teacher": LINEAR, "temperature": 0.0}, "distill.temperature=0.0 must be above 0"),
        ({"teacher": LINEAR, "weight": -1.0}, "distill.weight=-1.0 must be at least 0"),
        ({"teacher": LINEAR, "weight": 0.0}, "distill has nothing to compare"),
        ({"teacher": {}}, "distill.teacher is a dict, and no torch.nn.Module"),
        ({"teacher": {"_target_": "torch.nn.Liner"}}, "distill.teacher._target_: .*Liner"),
        ({"teacher": LINEAR, "student": "nets"}, "distill.student='nets' is no part of Sorts, did you mean 'net'"),
        ({"teacher": LINEAR, "teacher_part": "a"}, "distill.teacher_part='a' is no part of Linear"),
        ({"teacher": LINEAR, "hidden": {"9": ""}}, "distill.hidden='9' is no part of Sequential"),
        ({"teacher": LINEAR}, r"answer with shapes \(8, 4\) and \(8, 1\)"),
        ({"weights": "nowhere"}, "distill.weights='nowhere' is no file, and no folder with model.safetensors"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(Distill(**options))


class Apart(Sorts):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)


def test_a_part_that_is_not_plain_or_not_called_is_said():
    with pytest.raises(ValueError, match="distill.student must name the part of Apart whose .* parts are net, head"):
        train(Distill(teacher()), module=Apart())
    with pytest.raises(ValueError, match="distill.student='head': train_step of Apart has not called this part"):
        train(Distill(teacher(), student="head"), module=Apart())


def test_other_weights_are_said(tmp_path):
    torch.save({"weight": torch.zeros(1, 8), "more": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="are not those of Linear: missing bias; unknown more"):
        train(Distill(LINEAR, weights="w.pt"))
