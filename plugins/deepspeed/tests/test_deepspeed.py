"""Two ranks over gloo under DeepSpeed's engine, against loops written by hand, against ddp and against one rank."""

import functools
import importlib.util
import itertools
import logging
import os
import signal

import pytest
import torch

from hookline import Stage, hookimpl, set_seed
from hookline.counters import Cursor
from hookline.data import mix, sampler_class
from hookline.testing import (
    PlainModule,
    TinyModule,
    assert_one_model,
    check_plugin,
    digest,
    hand_written_loop,
    on_ranks,
    run_ranks,
    tiny_trainer,
    train_tiny,
)
from hookline.testing.faults import at_hook, kill
from hookline_deepspeed import Deepspeed

HERE = importlib.util.find_spec("deepspeed") is not None
needed = pytest.mark.skipif(not HERE, reason="deepspeed is not installed: `nox -s deepspeed` brings it")
STAGES = (0, 1, 2)


class Half(PlainModule):
    """Takes its batches in the numbers of its weights."""

    def train_step(self, global_step, batch, device):
        batch = [part.to(self.net[0].weight.dtype) if part.is_floating_point() else part for part in batch]
        return super().train_step(global_step, batch, device)

    def val_step(self, global_step, batch, device):
        batch = [part.to(self.net[0].weight.dtype) if part.is_floating_point() else part for part in batch]
        return super().val_step(global_step, batch, device)


class Groups(PlainModule):
    """Two groups of parameters, one of them with weight decay, and one parameter that is frozen."""

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.net[0].bias.requires_grad_(False)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        weights = [weight for weight in self.parameters() if weight.ndim > 1]
        others = [weight for weight in self.parameters() if weight.ndim == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, 1e-2)], []


def look(trainer):
    return type(trainer.model).__name__, trainer.global_step, trainer.counters.skipped_steps


def train(plugin, states=(), window=1, dropout=0.0, others=None, module=PlainModule, way="deepspeed", **options):
    plugins = {way: plugin, **({"accumulate": {"steps": window}} if window > 1 else {}), **(others or {})}
    options = {"keep": True, "begin": states, "look": look, "train_batch_size": 12 * window, **options}
    return train_tiny(plugins, functools.partial(module, dropout), **options)


def train_all(cases):
    return [train(*arguments, **keywords) for arguments, keywords in cases]


def on_two(*cases):
    """Train each case on two ranks, one after the other; return by case what each rank found."""
    return list(zip(*on_ranks(train_all, 2, cases), strict=True))


def case(*arguments, **keywords):
    return arguments, keywords


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def without_clock(state):
    trainer = {**state["trainer"], "counters": {**state["trainer"]["counters"], "seconds": 0}}
    return digest({**state, "trainer": trainer})


# Parity -------------------------------------------------------------------------------


def by_hand(stage, window, more):
    """Train as one would with the engine."""
    import deepspeed

    rank = int(os.environ["RANK"])
    module = PlainModule(0.3)
    set_seed(mix(0, rank))
    cursor = Cursor(seed=0)
    sampler = sampler_class(cursor, shuffle=True, share=rank, shares=2)
    batches = len(module.get_train_dataloader(sampler, 6))
    (optimizer,), (scheduler,) = module.get_optimizers_schedulers(-(-batches // window), 2)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": window,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        **more,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    for epoch in range(2):
        cursor.begin_epoch(epoch)
        loader = module.get_train_dataloader(sampler, 6)
        loader.generator = torch.Generator()
        iterator = iter(loader)
        while taken := list(itertools.islice(iterator, window)):
            for index, batch in enumerate(taken):
                engine.set_gradient_accumulation_boundary(index + 1 == len(taken))
                loss, _ = engine(stage=Stage.TRAIN, global_step=1, batch=batch, device="cpu")
                engine.backward(loss / len(taken), scale_wrt_gas=False)
            engine.step()
            scheduler.step()
    return dict(module.state_dict())


def both(cases):
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    found = []
    for stage, window, more in cases:
        ours = train({"stage": stage, "config": more}, window=window, dropout=0.3)
        found.append((digest(ours.weights), digest(by_hand(stage, window, more)), ours.looked[0]))
    return found


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_the_same_bits_as_a_loop_written_by_hand():
    cases = [(stage, window, {}) for stage in STAGES for window in (1, 3)]  # of four batches: the last window is short
    cases.append((2, 1, {"gradient_clipping": 0.05}))
    found = on_ranks(both, 2, cases)
    for of_case, of_other_rank in zip(*found, strict=True):
        ours, hand, model = of_case
        assert ours == hand == of_other_rank[0]
        assert model == "DeepSpeedEngine"
    assert found[0][4][0] != found[0][6][0]  # it did clip


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_are_one_and_those_of_ddp_within_rounding():
    stages = [case({"stage": stage}, window=window) for stage in STAGES for window in (1, 2)]
    found = on_two(*stages, case({}, way="ddp"), case({}, way="ddp", window=2))
    alone = [train({}, window=window) for window in (1, 2)]
    for number, (one, other) in enumerate(found):
        expected = alone[number % 2]
        assert_one_model([one, other], expected)
        assert one.metrics == one.again
        assert one.looked[1:] == (expected.looked[1], 0)


# State --------------------------------------------------------------------------------


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("module", [PlainModule, Groups])
def test_a_resume_has_the_same_bits_and_goes_on_elsewhere(module):
    stages = [{"stage": stage} for stage in STAGES]
    keywords = {"dropout": 0.3, "module": module}
    whole = on_two(*(case(stage, **keywords) for stage in stages), case({}, way="ddp", **keywords))
    states = [[rank.states[3] for rank in ranks] for ranks in whole]
    cases = [case(stage, kept, **keywords) for stage, kept in zip(stages, states[:3], strict=True)]
    cases.append(case({}, states[1], way="ddp", **keywords))  # what was stored whole is anybody's
    cases.append(case({"stage": 2}, states[3], **keywords))
    resumed = on_two(*cases)
    for ranks, again in zip(whole[:3], resumed[:3], strict=True):
        for rank, same in zip(ranks, again, strict=True):
            assert without_clock(same.states[8]) == without_clock(rank.states[8])
    for ranks in whole:
        assert digest(ranks[0].states[8]["optimizers"]) == digest(ranks[1].states[8]["optimizers"])
        assert_close(ranks[0].weights, whole[3][0].weights)
    for ranks in resumed[3:]:
        assert_close(ranks[0].weights, whole[3][0].weights)
    named = {name for name, weight in module().named_parameters() if module is PlainModule or name != "net.0.bias"}
    for of_stage in whole[:3]:
        assert {*of_stage[0].states[8]["optimizers"][0]["state"]} == named


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_one_rank_goes_on_with_what_two_have_begun():
    (one, _), (whole, _) = on_two(case({"stage": 2}, max_steps=3), case({"stage": 2}))
    alone = train({}, [one.states[3]])
    assert_close(alone.weights, whole.weights)


def kept(folder, dies, options):
    """Train with checkpoints on a disk; return the weights and where the run stands."""
    torch.set_num_threads(1)
    plugins = {"deepspeed": {"stage": 2}, "checkpoint": {"every": "3 steps"}}
    if dies:
        plugins["fault"] = at_hook("on_begin_optimizer_step", kill if os.environ["RANK"] == "1" else int, nth=6)
    trainer = tiny_trainer(plugins, PlainModule(0.3), train_batch_size=12, runs_folder=folder, **options)
    trainer.train()
    return digest(trainer.export_model()), trainer.global_step


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_run_that_is_killed_goes_on_from_the_disk(tmp_path):
    whole = run_ranks(kept, 2, str(tmp_path / "whole"), False, {})
    died = run_ranks(kept, 2, str(tmp_path / "cut"), True, {"run_name": "cut"})
    assert [outcome.code for outcome in died] == [1, -signal.SIGKILL]
    resumed = run_ranks(kept, 2, str(tmp_path / "cut"), False, {"run_name": "cut", "resume": True})
    assert [outcome.value for outcome in resumed] == [outcome.value for outcome in whole]
    assert resumed[0].value[1] == 8
    checkpoints = tmp_path / "cut" / "cut-1" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == [f"step-{step:012}" for step in (3, 6, 8)]


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_half_precision_keeps_what_it_computes_with_and_what_it_steps():
    half = {"stage": 2, "config": {"bf16": {"enabled": True}}}
    autocast = {"stage": 1, "config": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}}
    (one, other), (cast, _) = on_two(case(half, module=Half, dropout=0.3), case(autocast, dropout=0.3))
    assert {weight.dtype for weight in one.weights.values()} == {torch.bfloat16}
    kept = one.states[3]
    assert {weight.dtype for weight in kept["module"].values()} == {torch.float32}
    ((again, _),) = on_two(case(half, [kept, other.states[3]], module=Half, dropout=0.3))
    assert without_clock(again.states[8]) == without_clock(one.states[8])
    assert {weight.dtype for weight in cast.weights.values()} == {torch.float32}
    rounded = {name: weight.float() for name, weight in one.weights.items()}
    assert_close(cast.weights, rounded, rtol=0.1, atol=0.05)


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_with_an_average_and_states_on_the_host():
    others = {"ema": {"decay": 0.9}}
    (one, other), (offloaded, _) = on_two(
        case({"stage": 2}, others=others), case({"stage": 2, "offload": True}, others=others)
    )
    alone = train({}, others=others)
    for found in (one, other, offloaded):
        assert_close(found.weights, alone.weights)
        assert found.metrics == pytest.approx(alone.metrics)


# What does not fit --------------------------------------------------------------------


class Two(PlainModule):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[3])], []


class Overflow(PlainModule):
    """Has an infinite loss in its third step."""

    def train_step(self, global_step, batch, device):
        loss, *rest = super().train_step(global_step, batch, device)
        return loss * (torch.inf if global_step == 3 else 1), *rest


class Closure(PlainModule):
    """Steps by a closure."""

    @hookimpl
    def update(self, trainer, window):
        outputs = trainer.hook.run_window(trainer=trainer, window=window)
        trainer.step(closure=lambda: outputs[0][0])
        return outputs


WRONG = [
    (case({}, module=Two), "Two.get_optimizers_schedulers returned 2 optimizers; DeepSpeed's engine steps one"),
    (
        case({"stage": 2}, others={"clip": {}}),
        r"deepspeed.stage=2: the gradients are the engine's, and 'clip', which looks at them or refuses steps",
    ),
    (case({}, others={"finite": {}}), "and 'finite', which looks at them or refuses steps"),
    (case({}, others={"amp": {}}), "autocast is on around DeepSpeed's engine, which would turn it off without a word"),
    (case({}, module=Closure), "DeepSpeed's engine cannot step Adam with a closure"),
]


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_does_not_go_with_the_engine(wrong, message):
    for outcome in run_ranks(train_all, 2, [wrong]):
        assert outcome.code == 1
        assert message in outcome.output


@needed
@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_a_step_that_is_left_out_and_gradients_that_others_may_change():
    clip = {"clip": {"max_norm": 0.05}}
    (left_out, _), (clipped, _) = on_two(case({"stage": 2}, module=Overflow), case({"stage": 0}, others=clip))
    assert left_out.looked[1:] == (8, 1)
    assert_close(clipped.weights, train({}, others=clip).weights)


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.skipif(HERE, reason="deepspeed is installed")
def test_what_to_install_is_said():
    for outcome in run_ranks(train_all, 2, [case({})]):
        assert outcome.code == 1
        assert "which cannot be imported (No module named 'deepspeed'): `pip install 'deepspeed" in outcome.output


# Alone --------------------------------------------------------------------------------


@pytest.mark.plugins
def test_contract():
    check_plugin(Deepspeed)


@pytest.mark.plugins
def test_alone_it_changes_nothing_and_says_what_to_do(caplog):
    by_hand, module = TinyModule(), TinyModule()
    hand_written_loop(by_hand)
    with caplog.at_level(logging.WARNING, "hookline"):
        tiny_trainer([Deepspeed()], module).train()
    assert "distributed: this is one process, so there is nobody to share the model with (deepspeed)" in caplog.text
    assert digest(module.state_dict()) == digest(by_hand.state_dict())


@pytest.mark.plugins
@pytest.mark.parametrize("other", ["ddp", "fsdp"])
def test_one_way_to_make_the_model_one_of_all_ranks(other):
    with pytest.raises(ValueError, match=r"both perform 'shard_model', which is done once"):
        tiny_trainer({"deepspeed": {}, other: {}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 3}, r"deepspeed\.stage=3 shares the parameters themselves, .*; take stage 2, or the plugin fsdp"),
        ({"stage": 4}, r"deepspeed\.stage=4 must be 0, 1 or 2"),
        ({"stage": 0, "offload": True}, r"deepspeed\.offload=True needs stage 1 or 2"),
        ({"stage": 0, "config": {"bf16": {"enabled": True}}}, r"deepspeed\.config\.bf16 needs stage 1 or 2"),
        ({"config": {"train_batch_size": 8}}, r"deepspeed\.config\.train_batch_size cannot be given here: it is tr"),
        ({"config": {"zero_optimization": {"stage": 2}}}, r"config\.zero_optimization\.stage .*: it is deepspeed\.st"),
        ({"config": {"fp16": {"enabled": True}}}, r"config\.fp16 .*: the state of its scaler would be in no checkpo"),
        ({"config": {"optimizer": {"type": "Adam"}}}, r"config\.optimizer .*: it is what get_optimizers_schedulers"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Deepspeed(**options)
