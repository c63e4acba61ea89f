"""The table against numbers counted by hand and against torchinfo; and that looking changes nothing."""

import logging
import re

import pytest
import torch
import torchinfo

from hookline import CallbackInterface, hookimpl
from hookline.testing import PlainModule, TinyModule, check_plugin, digest, on_ranks, tiny_trainer
from hookline_summary import Summary

ONE_STEP = {"epochs": 1, "max_steps": 1, "eval_when_finish": False, "evaluate_every": None}


class Objects(CallbackInterface):
    """Keeps the texts that are logged."""

    observer = True

    def __init__(self):
        self.texts, self.steps = [], []

    @hookimpl
    def on_log_object(self, name, value, global_step):
        assert name == "summary"
        self.texts.append(value)
        self.steps.append(global_step)


def shown(module, depth=3, plugins=(), **options):
    """Train a step; return the table by layer, each line by column, and what is written below it."""
    objects = Objects()
    tiny_trainer([Summary(depth), *plugins, objects], module, **{**ONE_STEP, **options}).train()
    (text,) = objects.texts
    return parsed(text)


def parsed(text):
    head, *lines = text.splitlines()
    notes = [line for line in lines if line.startswith("no shapes")]
    cells = [re.split(r"  +", line) for line in lines if line not in notes]
    return {line[0]: dict(zip(head.split(), line, strict=False)) for line in cells}, notes


class Net(TinyModule):
    """Trains a given network on the sum of what it returns."""

    def __init__(self, net, shape, **more):
        super().__init__(samples=4)
        self.net, self.shape = net, shape
        for name, part in more.items():
            setattr(self, name, part)

    def train_step(self, global_step, batch, device):
        torch.manual_seed(0)
        return self.net(torch.randn(self.shape)).sum()


def test_contract():
    check_plugin(Summary)
    check_plugin(Summary, depth=0)


def test_the_numbers_are_those_counted_by_hand():
    module = TinyModule()
    module.net[0].weight.requires_grad_(False)
    table, notes = shown(module)
    assert notes == []
    assert list(table) == ["(all)", "net", "net.0", "net.1", "net.2", "net.3", "net.4"]
    assert table["net.0"] == {
        "layer": "net.0",
        "type": "Linear",
        "parameters": "144",
        "frozen": "128",
        "buffers": "0",
        "input": "8×8",
        "output": "8×16",
        "FLOPs": f"{2 * 8 * 8 * 16:,}",
    }
    assert table["net.1"]["buffers"] == str(16 + 16 + 1)
    assert table["(all)"]["input"] == "8×8, 8×1, 8"
    assert table["(all)"]["output"] == "number, 8×1"
    assert table["(all)"]["parameters"] == "193"
    assert table["(all)"]["FLOPs"] == f"{2 * 8 * 8 * 16 + 2 * 8 * 16:,}"


@pytest.mark.parametrize(("depth", "layers"), [(0, ["(all)"]), (1, ["(all)", "net"])])
def test_depth(depth, layers):
    table, _ = shown(TinyModule(), depth)
    assert list(table) == layers
    assert table["(all)"]["FLOPs"] == "2,304"


def networks():
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.Sequential(torch.nn.Conv2d(8, 4, 1), torch.nn.ReLU(), torch.nn.Dropout(0.1)),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 8 * 8, 10),
    )
    encoder = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return [pytest.param(conv, (2, 3, 16, 16), id="conv"), pytest.param(encoder, (2, 5, 16), id="attention")]


@pytest.mark.parametrize(("net", "shape"), networks())
def test_what_torchinfo_says_of_the_same_network(net, shape):
    table, _ = shown(Net(net, shape), depth=9)
    names = {module: f"net.{name}".rstrip(".") for name, module in net.named_modules()}
    compared = 0
    for layer in torchinfo.summary(net, input_data=torch.randn(shape), verbose=0, mode="train").summary_list:
        ours = table[names[layer.module]]
        assert ours["type"] == layer.class_name
        assert ours["parameters"] == f"{layer.num_params:,}"
        assert int(ours["frozen"].replace(",", "")) == layer.num_params - layer.trainable_params
        if ours["output"] != "not called" and "," not in ours["output"]:
            assert ours["output"] == "×".join(map(str, layer.output_size))
            compared += 1
    assert compared > 4


def test_flops_of_convolutions_and_attention_by_hand():
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert shown(Net(conv, (2, 3, 16, 16)))[0]["net"]["FLOPs"] == f"{2 * 2 * 16 * 16 * 8 * 3 * 3 * 3:,}"

    class Attention(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    net = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), Attention())
    table, _ = shown(Net(net, (2, 4, 8, 16)))
    assert table["net.1"]["FLOPs"] == f"{2 * 2 * (2 * 4) * 8 * 8 * 16:,}"


class Twice(torch.nn.Module):
    """Calls a layer twice, the second time on fewer rows, one that shares its weights, and one never."""

    def __init__(self):
        super().__init__()
        self.layer, self.twin, self.idle = (torch.nn.Linear(4, 4, bias=False) for _ in range(3))
        self.twin.weight = self.layer.weight

    def forward(self, x):
        return self.twin(self.layer(self.layer(x)[:2]))


def test_layers_that_are_called_twice_or_never_or_share_weights():
    table, _ = shown(Net(Twice(), (3, 4)))
    assert table["net.layer"]["FLOPs"] == str(2 * (3 + 2) * 16)
    assert (table["net.layer"]["input"], table["net.layer"]["output"]) == ("3×4", "3×4")
    assert table["net.twin"]["parameters"] == table["net.layer"]["parameters"] == "16"
    assert table["net.idle"]["input"] == "not called"
    assert table["net"]["parameters"] == "32"  # shared weights once
    assert table["net"]["FLOPs"] == str(2 * (3 + 2 + 2) * 16)


def test_layers_that_take_and_return_more_than_a_tensor():
    class Dictionary(torch.nn.Module):
        def forward(self, given, scale, name):
            return {"one": given["x"] * scale, "other": [given["x"][0], name]}

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = Dictionary(), torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.inner({"x": x * self.weight}, scale=2.0, name="n")["one"]

    table, _ = shown(Net(Outer(), (2, 3)))
    assert (table["net.inner"]["input"], table["net.inner"]["output"]) == ("2×3", "2×3, 3")
    assert table["net"]["parameters"] == "3"
    assert table["net.inner"]["parameters"] == "0"


@pytest.mark.plugins
def test_training_is_the_same_with_it():
    def trained(plugins, accumulate=True):
        plugins = {**plugins, "amp": {}, **({"accumulate": {"steps": 2}} if accumulate else {})}
        trainer = tiny_trainer(plugins, sanity_val_steps=1, evaluate_every="2 steps")
        trainer.train()
        states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
        return digest([dict(trainer.module.state_dict()), states, trainer.randomness.get_state()]), trainer

    (alone, trainer), (watched, other) = trained({}), trained({"summary": {}})
    assert watched == alone
    assert other.metrics == trainer.metrics
    assert other.module.seen == trainer.module.seen


def test_it_is_shown_before_the_first_update_and_leaves_nothing(caplog):
    objects, module = Objects(), TinyModule()
    with caplog.at_level(logging.INFO, "hookline.summary"):
        trainer = tiny_trainer([Summary(), objects], module, sanity_val_steps=1)
        trainer.train()
    assert objects.steps == [0]
    assert [record.getMessage() for record in caplog.records] == [f"the model:\n{objects.texts[0]}"]
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks


def test_a_pass_that_fails_leaves_nothing_either():
    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            self.net(batch[0])
            raise RuntimeError("no")

    module, objects = Fails(), Objects()
    with pytest.raises(RuntimeError, match="no"):
        tiny_trainer([Summary(), objects], module).train()
    assert objects.texts == []
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


class InParts(TinyModule):
    """Calls its network itself."""

    @hookimpl
    def update(self, trainer, window):
        loss = self.net(window[0][0]).square().mean()
        loss.backward()
        trainer.step()
        return [(loss.detach(),)]


def test_a_model_that_is_called_in_parts():
    table, notes = shown(InParts())
    assert notes == ["no shapes and FLOPs: no batch went through InParts itself"]
    assert list(table["net.0"]) == ["layer", "type", "parameters", "frozen", "buffers"]
    assert table["(all)"]["parameters"] == "193"


class Inner(torch.nn.Module):
    """Calls a network; torch compiles no Sequential in place."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


class Compiles(TinyModule):
    """Compiles its network, and counts how often."""

    def __init__(self, way):
        super().__init__()
        self.compiled = 0
        if way == "a module":
            self.net = torch.compile(self.net, backend=self.count)
        elif way == "in place":
            self.net = Inner(self.net)
            self.net.compile(backend=self.count)
        else:
            net, self.parts = self.net, [self.net]
            self.call = torch.compile(lambda x: net(x), backend=self.count)

    def count(self, graph, inputs):
        self.compiled += 1
        return graph.forward

    def train_step(self, global_step, batch, device):
        predictions = getattr(self, "call", self.net)(batch[0])
        return torch.nn.functional.mse_loss(predictions, batch[1])


@pytest.mark.parametrize("way", ["a module", "in place", "a function"])
def test_what_is_compiled_stays_compiled(way):
    torch.compiler.reset()
    plain, watched, objects = Compiles(way), Compiles(way), Objects()
    options = {"evaluate_every": None, "eval_when_finish": False, "max_steps": 3}
    tiny_trainer(module=plain, **options).train()
    torch.compiler.reset()
    tiny_trainer([Summary(), objects], watched, **options).train()
    assert plain.compiled == watched.compiled > 0
    assert digest(watched.state_dict()) == digest(plain.state_dict())
    assert ("no shapes and FLOPs: a look into a compiled model" in objects.texts[0]) == (way != "a function")


@pytest.mark.plugins
def test_with_the_plugin_that_compiles():
    _, notes = shown(TinyModule(), plugins=[make_compile()])
    assert notes == ["no shapes and FLOPs: a look into a compiled model would change how it is compiled"]


def make_compile():
    from hookline_compile import Compile

    return Compile(backend="eager")


@pytest.mark.plugins
def test_with_blocks_that_are_computed_twice():
    from hookline_activation_checkpoint import ActivationCheckpoint

    def trained(*plugins):
        module = PlainModule(0.2)
        tiny_trainer([ActivationCheckpoint(["Linear", "Sequential"]), *plugins], module, **ONE_STEP).train()
        return digest(dict(module.state_dict()))

    table, notes = shown(PlainModule(), plugins=[ActivationCheckpoint(["Linear", "Sequential"])])
    assert (table["net.0"]["FLOPs"], notes) == ("2,048", [])  # of the forward pass, not of backward
    assert trained(Summary()) == trained()


def on_a_rank():
    torch.set_num_threads(1)
    texts = []
    for strategy in ("ddp", "fsdp"):
        objects = Objects()
        tiny_trainer({strategy: {}, "summary": Summary(), "objects": objects}, PlainModule(), **ONE_STEP).train()
        texts.append(objects.texts)
    return texts


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_show_the_whole_model_once():
    first, second = on_ranks(on_a_rank, 2)
    assert second == [[], []]
    for (text,) in first:
        table, notes = parsed(text)
        assert notes == []
        assert table["(all)"]["parameters"] == "161"
        assert table["net.0"]["parameters"] == "144"
        assert table["net.0"]["input"] == "4×8"
        assert table["net.0"]["FLOPs"] == f"{2 * 4 * 8 * 16:,}"


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match=r"summary\.depth=-1 must be at least 0; 0 shows the whole model in one line"):
        Summary(-1)
