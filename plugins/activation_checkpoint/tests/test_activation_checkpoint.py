"""Blocks that are computed twice: the same bits, and less kept in between."""

import copy
import os
import pickle

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule, check_plugin, digest, run_ranks, tiny_trainer
from hookline_activation_checkpoint import ActivationCheckpoint


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(16, 64)
        self.down = torch.nn.Linear(64, 16)
        self.drop = torch.nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.drop(self.down(torch.relu(self.up(x))))


class Deep(TinyModule):
    def __init__(self, blocks=4):
        super().__init__(samples=28)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inner = [Block() for _ in range(blocks)]
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), *inner, torch.nn.Linear(16, 1))

    def blocks(self):
        return [module for module in self.modules() if isinstance(module, Block)]


class Answering(Deep):
    def get_blocks(self):
        return self.blocks()[1:3]


class Kept(CallbackInterface):
    """Counts the numbers that forward keeps for backward, and the gradients of each step."""

    def __init__(self):
        self.numbers, self.gradients = [], []

    @hookimpl(wrapper=True, tryfirst=True)
    def call_model(self):
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with saved_tensors_hooks(count, lambda tensor: tensor):
            answer = yield
        self.numbers.append(kept)
        return answer

    @hookimpl(trylast=True)
    def on_begin_optimizer_step(self, trainer):
        self.gradients.append(digest([local(weight.grad) for weight in trainer.module.parameters()]))


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def train(plugin=None, others=None, module=Deep, **options):
    torch.set_num_threads(1)
    kept = Kept()
    plugins = {"kept": kept, **({"activation_checkpoint": plugin} if plugin else {}), **(others or {})}
    trainer = tiny_trainer(plugins, module(), **options)
    trainer.train()
    return {
        "numbers": kept.numbers[0],
        "gradients": kept.gradients,
        "weights": digest(trainer.export_model()),
        "names": [name for name, _ in trainer.module.named_parameters()],
        "calls": [getattr(block, "calls", None) for block in trainer.module.blocks()],
        "metrics": dict(trainer.metrics),
        "trainer": trainer if os.environ.get("RANK") is None else None,
    }


def same_run(one, other):
    return all(one[key] == other[key] for key in ("gradients", "weights", "names", "metrics"))


def test_contract():
    check_plugin(ActivationCheckpoint)


@pytest.mark.parametrize(
    ("options", "module", "twice"),
    [
        ({"wrap": ["Block"]}, Deep, [0, 1, 2, 3]),
        ({"wrap": ["Block"], "every": 2}, Deep, [0, 2]),
        ({"wrap": ["Block"], "save": ["addmm"]}, Deep, [0, 1, 2, 3]),
        ({}, Answering, [1, 2]),
    ],
)
def test_the_same_bits_and_less_kept(options, module, twice):
    without, with_it = train(module=module), train(ActivationCheckpoint(**options), module=module)
    assert same_run(with_it, without)
    trained, evaluated = 8, 8  # steps and validation batches of 4, of two epochs
    once = trained + evaluated
    assert without["calls"] == [once] * 4
    assert with_it["calls"] == [once + trained * (place in twice) for place in range(4)]
    a_block = 8 * (16 + 16 * 64 // 8 + 64 + 64 * 16 // 8 + 16)  # inputs, hidden, dropout's mask: more than this
    assert with_it["numbers"] < without["numbers"] - len(twice) * a_block / 2


def test_a_list_of_operators_keeps_their_results():
    """Torch keeps them outside of the graph: what shows is that they are not computed again."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    def products(**options):
        with Products() as counter:
            train(ActivationCheckpoint(wrap=["Block"], **options), epochs=1, evaluate_every=None)
        return counter.count

    none = products(every=4)
    assert products() - none == 4 * 3 * 2
    assert products(save=["addmm"]) - none < 0


def test_a_copy_has_weights_of_its_own():
    module = train(ActivationCheckpoint(wrap=["Block"]))["trainer"].module.net
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        assert not other.eval()(torch.ones(2, 8)).any()
        assert module.eval()(torch.ones(2, 8)).any()


@pytest.mark.plugins
@pytest.mark.parametrize("others", [{"amp": {}}, {"accumulate": {"steps": 2}, "ema": {}}], ids=["amp", "window"])
def test_with_other_plugins(others):
    without, with_it = train(others=others), train(ActivationCheckpoint(wrap=["Block"]), others)
    assert same_run(with_it, without)
    assert with_it["numbers"] < without["numbers"]


@pytest.mark.plugins
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, which it hides
def test_within_a_compiled_block():
    compiled = {"compile": {"blocks": ["Block"], "backend": "aot_eager", "fullgraph": True}}
    without, with_it = train(), train(ActivationCheckpoint(wrap=["Block"]), compiled, module=Uncounted)
    assert same_run(with_it, without)


class UncountedBlock(Block):
    def forward(self, x):
        return x + self.drop(self.down(torch.relu(self.up(x))))


UncountedBlock.__name__ = "Block"


class Uncounted(Deep):
    """Blocks that change nothing, which a compiler would refuse within a checkpoint."""

    def __init__(self):
        super().__init__()
        for block in self.blocks():
            block.__class__ = UncountedBlock


@pytest.mark.plugins
def test_a_compiler_that_repeats_no_random_numbers_is_refused():
    message = r"compile\.backend=eager does not repeat random numbers.*take aot_eager or inductor"
    with pytest.raises(ValueError, match=message):
        train(ActivationCheckpoint(wrap=["Block"]), {"compile": {"backend": "eager"}})


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.slow
@pytest.mark.parametrize("others", [{"ddp": {}}, {"fsdp": {"wrap": ["Block"]}}], ids=["ddp", "fsdp"])
def test_on_two_ranks(others):
    runs = []
    for plugin in (None, ActivationCheckpoint(wrap=["Block"])):
        outcomes = run_ranks(train, 2, plugin, others)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
        runs.append([outcome.value for outcome in outcomes])
    for without, with_it in zip(*runs, strict=True):
        assert with_it["weights"] == without["weights"]
        assert with_it["metrics"] == without["metrics"]
        assert with_it["numbers"] < without["numbers"]


# What is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, r"activation_checkpoint\.every=0 must be at least 1"),
        ({"save": ["mn"]}, r"activation_checkpoint\.save names 'mn', which is no operator of torch; write one like mm"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ActivationCheckpoint(**options)


class Stranger(Deep):
    def get_blocks(self):
        return [torch.nn.Linear(1, 1)]


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"wrap": ["Blok"]}, Deep, r"wrap names Blok, and the model has none; it has Block, Deep, Dropout, Linear, Se"),
        ({"wrap": ["Sequential"]}, TinyModule, r"block 'net' has a batch normalization, 'net\.1', which would"),
        ({}, Stranger, r"Stranger\.get_blocks\(\) answers a Linear that is no part of the model"),
    ],
)
def test_blocks_that_do_not_fit(options, module, message):
    trainer = tiny_trainer([ActivationCheckpoint(**options)], module())
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_no_blocks_are_worth_a_word(caplog):
    tiny_trainer([ActivationCheckpoint()]).train()
    assert "activation_checkpoint: there are no blocks, so it does nothing; name their classes in `wrap`" in caplog.text
