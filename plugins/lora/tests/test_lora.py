"""Adapters train as peft's by hand, alone; checkpoints and exports hold them alone, and survive."""

import pytest
import torch

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
from hookline_lora import Lora

LAST = 14


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(*plugins, module=None, **options):
    trainer = tiny_trainer(plugins, module, **options)
    trainer.train()
    return trainer


def by_hand(targets, **options):
    """Return a module with adapters that peft has made, and what it has trained."""
    import peft

    module = TinyModule()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, **options), module)
    hand_written_loop(module)
    return module


def test_contract():
    check_plugin(Lora)
    check_plugin(Lora, targets=["net.4"], rank=2, alpha=3.0, dropout=0.1, export="merged", epochs=1)


@pytest.mark.parametrize("targets", [None, ["net.0", "4"], r"net\.[04]"])
def test_adapters_have_the_bits_of_peft_by_hand(targets):
    theirs = by_hand(["net.0", "net.4"], r=4, lora_alpha=8, lora_dropout=0.1)
    trainer = train(Lora(targets, rank=4, dropout=0.1))
    assert digest(trainer.module.state_dict()) == digest(theirs.state_dict())


def test_only_adapters_are_trained():
    given = TinyModule().state_dict()
    trainer = train(Lora(["net.4"]))
    trained = {name for name, weight in trainer.module.named_parameters() if weight.requires_grad}
    assert trained == {"net.4.lora_A.default.weight", "net.4.lora_B.default.weight"}
    for name, weight in trainer.module.named_parameters():
        assert name in trained or torch.equal(weight, given[name.replace(".base_layer", "")])
    (optimizer,) = trainer.optimizers
    moved = {id(parameter) for parameter in optimizer.state}
    assert moved == {id(weight) for name, weight in trainer.module.named_parameters() if name in trained}


def test_the_state_holds_no_weight_of_the_base_and_a_resume_is_exact_at_every_step():
    memory = Memory(every="1 steps")
    whole = train(Lora(dropout=0.1), memory)
    kept = memory.states[5]["module"]
    buffers = {name for name, _ in whole.module.named_buffers()}
    assert {name for name in kept if ".lora_" not in name} == buffers
    for step in range(1, LAST + 1):
        resumed = train(Lora(dropout=0.1), Memory(memory.states[step]))
        assert digest(resumed.module.state_dict()) == digest(whole.module.state_dict()), step


@pytest.mark.plugins
def test_a_checkpoint_is_small_and_another_base_is_refused(tmp_path):
    train(Lora(), "checkpoint")
    (file, *_) = sorted(tmp_path.glob("runs/run-1/checkpoints/*/model.safetensors"))
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        assert not [name for name in weights.keys() if "base_layer" in name]  # noqa: SIM118
    other = TinyModule()
    with torch.no_grad():
        other.net[0].weight += 1
    with pytest.raises(ValueError, match="lora: the adapters of this checkpoint were trained on other weights"):
        train(Lora(), "checkpoint", module=other, resume=True)


def test_the_adapters_that_are_exported_are_those_that_peft_loads():
    import peft

    trainer = train(Lora(rank=4))
    exported = trainer.export_model()
    assert {name for name in exported if "lora" not in name} == {name for name, _ in trainer.module.named_buffers()}
    fresh = TinyModule()
    config = peft.LoraConfig(target_modules=["net.0", "net.4"], r=4, lora_alpha=8)
    peft.inject_adapter_in_model(config, fresh)
    peft.set_peft_model_state_dict(fresh, exported)
    fresh.load_state_dict({n: t for n, t in exported.items() if "lora" not in n}, strict=False)
    assert digest(fresh.state_dict()) == digest(trainer.module.state_dict())


def test_the_merged_model_is_one_without_adapters():
    trainer = train(Lora(export="merged"))
    plain = TinyModule()
    assert list(trainer.export_model()) == list(plain.state_dict())
    plain.load_state_dict(trainer.export_model())
    inputs = plain.inputs
    torch.testing.assert_close(plain.eval().net(inputs), trainer.module.eval().net(inputs))
    assert digest(plain.state_dict()) != digest(TinyModule().state_dict())


@pytest.mark.plugins
def test_an_average_of_adapters_is_what_is_exported():
    trainer = train(Lora(export="merged"), "ema")
    plain = train(Lora(export="merged"))
    assert digest(trainer.module.state_dict()) == digest(plain.module.state_dict())
    assert digest(trainer.export_model()) != digest(plain.export_model())
    ours = train("ema", Lora(export="merged")).export_model()
    assert digest(ours) == digest(trainer.export_model())


@pytest.mark.plugins
def test_what_is_trained_does_not_depend_on_the_order():
    plugins = {"amp": {}, "clip": {"max_norm": 0.1}, "accumulate": {"steps": 2}, "lora": {"dropout": 0.1}}
    ends = []
    for names in (list(plugins), list(plugins)[::-1]):
        trainer = tiny_trainer({name: plugins[name] for name in names})
        trainer.train()
        ends.append(digest(trainer.module.state_dict()))
    assert ends[0] == ends[1]


@pytest.mark.plugins
def test_ranks_train_the_same_adapters():
    ranks = on_ranks(train_tiny, 2, {"ddp": {}, "lora": {}})
    assert_one_model(ranks, train_tiny({"lora": {}}))


@pytest.mark.plugins
@pytest.mark.slow
def test_shards_train_the_same_adapters():
    plugins = {"fsdp": {"wrap": ["Linear"]}, "lora": {}}
    assert_one_model(on_ranks(train_tiny, 2, plugins), train_tiny({"lora": {}}))
    with pytest.raises(AssertionError, match="lora.export=merged needs whole weights"):
        on_ranks(train_tiny, 2, {"fsdp": {}, "lora": {"export": "merged"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be above 0, or null for twice the rank"),
        ({"dropout": 1.0}, "lora.dropout=1.0 must be from 0 to below 1"),
        ({"export": "whole"}, "lora.export='whole' must be one of adapters, merged"),
        ({"targets": []}, "lora.targets is empty"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


class Convolutions(PlainModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 8)), torch.nn.Conv1d(1, 1, 8), torch.nn.Flatten())


@pytest.mark.parametrize(
    ("targets", "make", "message"),
    [
        (["head"], TinyModule, r"lora.targets=\['head'\]: Target modules .*head.* not found"),
        (None, Convolutions, "lora.targets=null means all linear layers, and the model has none"),
    ],
)
def test_layers_that_are_not_there_are_said(targets, make, message):
    with pytest.raises(ValueError, match=message):
        train(Lora(targets), module=make())


def test_other_layers_are_adapted_and_merged():
    trainer = train(Lora(["net.1"], rank=2, export="merged"), module=Convolutions())
    plain = Convolutions()
    plain.load_state_dict(trainer.export_model())
    torch.testing.assert_close(plain.net(plain.inputs), trainer.module.eval().net(plain.inputs))


def test_a_model_without_values_is_refused():
    tiny = TinyModule()
    tiny.net = torch.nn.Linear(8, 1, device="meta")
    with pytest.raises(ValueError, match="lora: the model has no values yet"):
        train(Lora(), module=tiny)


# Bases of few bits --------------------------------------------------------------------


class Wide(PlainModule):
    """Has one layer whose weight is large enough for nf4."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [torch.nn.Linear(8, 128), torch.nn.Tanh(), torch.nn.Linear(128, 128), torch.nn.Tanh()]
            self.net = torch.nn.Sequential(*layers, torch.nn.Linear(128, 1))


FEW = {"int8": "Int8Tensor", "nf4": "NF4Tensor"}


def parts(weight):
    return {name: getattr(weight, name).tolist() for name in weight.__tensor_flatten__()[0]}


@pytest.mark.parametrize("bits", FEW)
def test_a_base_of_few_bits_is_torchaos_and_stays_as_it_is(bits, caplog):
    trainer = train(Lora(quantize=bits), module=Wide())
    weight = trainer.module.net[2].base_layer.weight
    given = Wide().net[2].weight.detach()
    torchao = pytest.importorskip("torchao.quantization")
    by_hand = {
        "nf4": lambda: torchao.NF4Tensor.from_tensor(given, 64, 256),
        "int8": lambda: torchao.Int8Tensor.from_hp(given, granularity=torchao.PerRow()),
    }[bits]()
    assert type(weight).__name__ == FEW[bits]
    assert digest(parts(weight)) == digest(parts(by_hand))
    assert (f"lora.quantize={bits} leaves net.0, net.4 as they are" in caplog.text) is (bits == "nf4")
    whole = train(Lora(), module=Wide())
    assert 0 < abs(trainer.metrics["val_loss"] - whole.metrics["val_loss"]) < 0.1 * whole.metrics["val_loss"]


@pytest.mark.parametrize("bits", FEW)
def test_adapters_on_a_base_of_few_bits_are_saved_resumed_and_merged(bits, monkeypatch):
    memory = Memory(every="1 steps")
    whole = train(Lora(quantize=bits, export="merged"), memory, module=Wide())
    assert all(".lora_" in name for name in memory.states[5]["module"])
    resumed = train(Lora(quantize=bits, export="merged"), Memory(memory.states[5]), module=Wide())
    merged = whole.export_model()
    assert digest(resumed.export_model()) == digest(merged)
    (plain := Wide()).load_state_dict(merged)
    assert tiny_trainer([], plain).validate()["val_loss"] == pytest.approx(whole.metrics["val_loss"], rel=1e-4)
    with pytest.raises(ValueError, match="the adapters of this checkpoint were trained on other weights"):
        train(Lora(), Memory(memory.states[5]), module=Wide())


def test_wrong_bits():
    with pytest.raises(ValueError, match="lora.quantize='int4' must be one of int8, nf4, or null"):
        Lora(quantize="int4")


def with_few_bits(sharding):
    try:
        return train_tiny({sharding: {}, "lora": Lora(quantize="nf4")}, Wide)
    except ValueError as error:
        return str(error)


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_train_adapters_on_a_base_of_few_bits():
    assert_one_model(on_ranks(with_few_bits, 2, "ddp"), train_tiny({"lora": Lora(quantize="nf4")}, Wide))
    for said in on_ranks(with_few_bits, 2, "fsdp"):
        assert "lora.quantize=nf4: ranks cannot share weights of few bits; take ddp" in said
