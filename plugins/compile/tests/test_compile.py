"""Blocks that are compiled: the same bits where the backend has them, names as before, and no endless compiling."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.utils import counters

from hookline.testing import Memory, TinyModule, check_plugin, digest, run_ranks, tiny_trainer
from hookline_compile import Compile

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, which it hides


@pytest.fixture(autouse=True)
def _afresh():
    torch._dynamo.reset()
    counters.clear()


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Dropout(0.2))

    def forward(self, x):
        return x + self.inner(x)


class Deep(TinyModule):
    """Four blocks in a list, and steps that log, count and read values, as users' do."""

    def __init__(self, block=Block):
        super().__init__(samples=50)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = torch.nn.ModuleList([block() for _ in range(4)])
            self.ends = torch.nn.ModuleDict({"first": torch.nn.Linear(8, 16), "last": torch.nn.Linear(16, 1)})
            del self.net

    def net_of(self, x):
        x = self.ends["first"](x)
        for block in self.blocks:
            x = block(x)
        return self.ends["last"](x)

    def train_step(self, global_step, batch, device):
        inputs, targets, ids = batch
        self.seen.append(ids.tolist())
        predictions = self.net_of(inputs)
        loss = torch.nn.functional.mse_loss(predictions, targets)
        self.log(loss=loss.item())
        return loss, predictions

    def val_step(self, global_step, batch, device):
        predictions = self.net_of(batch[0])
        return torch.nn.functional.mse_loss(predictions, batch[1]), predictions


class Answering(Deep):
    def get_blocks(self):
        return list(self.blocks)[:2]


def train(plugin=None, module=Deep, others=None, state=None, **options):
    torch.set_num_threads(1)
    memory = Memory(state=state, every="1 steps")
    plugins = {"memory": memory, **({"compile": plugin} if plugin else {}), **(others or {})}
    trainer = tiny_trainer(plugins, module(), **options)
    trainer.train()
    return trainer, memory.states


def result(trainer):
    return digest([trainer.export_model(), dict(trainer.metrics), trainer.module.seen])


def test_contract():
    check_plugin(Compile, backend="eager")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("options", "module", "graphs"),
    [
        ({"blocks": ["Block"], "fullgraph": True}, Deep, 1),
        ({}, Answering, 1),
        ({}, Deep, 3),  # two ends, and blocks that are alike
        ({}, TinyModule, 1),
        ({"blocks": ["Sequential", "Block"]}, Deep, 1),  # the outer alone
    ],
)
def test_the_same_bits_and_the_same_names(backend, options, module, graphs):
    plain, _ = train(module=module)
    trainer, _ = train(Compile(backend=backend, **options), module)
    assert result(trainer) == result(plain)
    assert list(trainer.module.state_dict()) == list(plain.module.state_dict())
    # The first shape, all others, and both again for evaluation, which is without gradients.
    assert graphs <= counters["stats"]["unique_graphs"] <= 4 * graphs


def test_a_short_batch_and_other_sizes_of_evaluation_do_not_compile_for_ever():
    compiled = {}
    for epochs in (1, 2, 4):
        torch._dynamo.reset()
        counters.clear()
        plugin = Compile(blocks=["Block"], backend="eager")
        train(plugin, epochs=epochs, train_batch_size=8, val_batch_size=13)  # 50 samples: last batches of 2 and 11
        compiled[epochs] = counters["stats"]["unique_graphs"]
    assert 1 <= compiled[1] <= 4
    assert compiled[1] == compiled[2] == compiled[4]


def test_what_is_alike_is_compiled_once_and_what_is_not_does_not_run_out():
    """Torch compiles no more than eight times for one piece of code, and leaves the ninth as it is."""

    class Many(TinyModule):
        def __init__(self):
            super().__init__()
            layers = [torch.nn.Sequential(torch.nn.Linear(8, 8 + n), torch.nn.Linear(8 + n, 8)) for n in range(12)]
            self.net = torch.nn.Sequential(*[Part(layer) for layer in layers], torch.nn.Linear(8, 1))

    class Part(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    train(Compile(blocks=["Part"], backend="eager"), Many, epochs=1, evaluate_every=None, eval_when_finish=False)
    assert 12 <= counters["stats"]["unique_graphs"] <= 24


def test_a_resume_has_the_same_bits_and_fits_a_run_without():
    whole, states = train(Compile(blocks=["Block"], backend="aot_eager"))
    for plugin in (Compile(blocks=["Block"], backend="aot_eager"), None):
        resumed, again = train(plugin, state=copy.deepcopy(states[5]))
        assert digest(resumed.export_model()) == digest(whole.export_model())
        assert again[14]["module"].keys() == states[14]["module"].keys()


def test_a_copy_is_not_compiled_and_has_weights_of_its_own():
    trainer, _ = train(Compile(backend="eager"), TinyModule)
    module = trainer.module.net.eval()
    counters.clear()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "Compiled" not in type(other.forward).__name__
        assert torch.equal(other(torch.ones(3, 8)), module(torch.ones(3, 8)))
        with torch.no_grad():
            for weight in other.parameters():
                weight.zero_()
        assert not other(torch.ones(2, 8)).any()
        assert module(torch.ones(2, 8)).any()


@pytest.mark.plugins
@pytest.mark.parametrize(
    "others", [{"amp": {}}, {"accumulate": {"steps": 2}, "ema": {}, "clip": {}}], ids=["amp", "window"]
)
def test_with_other_plugins(others):
    plain, _ = train(others=others)
    trainer, _ = train(Compile(backend="eager", blocks=["Block"], fullgraph=True), others=others)
    assert result(trainer) == result(plain)


def train_on(plugin, others):
    trainer, _ = train(plugin, others=others, train_batch_size=16)
    return digest(trainer.export_model()), dict(trainer.metrics), counters["stats"]["unique_graphs"]


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.slow
@pytest.mark.parametrize("others", [{"ddp": {}}, {"fsdp": {"wrap": ["Block"]}}], ids=["ddp", "fsdp"])
def test_on_two_ranks(others):
    runs = []
    for plugin in (None, Compile(blocks=["Block"], backend="aot_eager", fullgraph=True)):
        outcomes = run_ranks(train_on, 2, plugin, others)
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
        runs.append([outcome.value for outcome in outcomes])
    for plain, compiled in zip(*runs, strict=True):
        assert compiled[:2] == plain[:2]
        assert 1 <= compiled[2] <= 6


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # of torch's own imports
def test_the_compiler_itself():
    """It fuses, so sums are in another order."""
    plain, _ = train(epochs=1, module=NoDropout)
    trainer, _ = train(Compile(), epochs=1, module=NoDropout)
    for name, weight in plain.export_model().items():
        torch.testing.assert_close(trainer.export_model()[name], weight, rtol=1e-4, atol=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 12
    assert trainer.metrics == pytest.approx(plain.metrics, rel=1e-4)


class NoDropout(Deep):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.inner[2].p = 0.0


# What is refused ----------------------------------------------------------------------


def test_an_option_of_another_backend():
    with pytest.raises(ValueError, match=r"compile\.mode='max-autotune' is an option of inductor, and"):
        Compile(backend="eager", mode="max-autotune")


class Stranger(Deep):
    def get_blocks(self):
        return [torch.nn.Linear(1, 1)]


class Bare(TinyModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8, 1))
        del self.net


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"blocks": ["Blok"]}, Deep, r"compile\.blocks names Blok, and the model has none; it has Block, Deep, D"),
        ({}, Stranger, r"Stranger\.get_blocks\(\) answers a Linear that is no part of the model"),
        ({}, Bare, r"compile: Bare has no submodule with parameters, so there is nothing to compile"),
    ],
)
def test_blocks_that_do_not_fit(options, module, message):
    with pytest.raises(ValueError, match=message):
        train(Compile(backend="eager", **options), module)


class Reading(Block):
    """Reads a value in the middle."""

    def forward(self, x):
        return x + self.inner(x) * (2.0 if x.sum().item() > 0 else 1.0)


class Broken(Deep):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.blocks[2] = Reading()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"fullgraph": True, "backend": "eager"}, "data-dependent"), ({"backend": "refuses"}, "no such hardware")],
)
def test_what_cannot_be_compiled_is_named(options, said):
    if "refuses" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(refuses, name="refuses")
    with pytest.raises(Exception, match=said) as caught:
        train(Compile(blocks=["Reading"], **options), Broken)
    notes = " ".join(caught.value.__notes__)
    assert "compile: this is the block 'blocks.2' (Reading). Leave it out by naming others in `compile.blocks`" in notes
    assert "`compile.fullgraph: false` runs in Python what cannot be compiled" in notes


def refuses(graph, inputs):
    raise RuntimeError("no such hardware")


def test_a_block_that_cannot_be_compiled_in_one_piece_still_trains():
    plain, _ = train(module=Broken)
    trainer, _ = train(Compile(blocks=["Reading"], backend="eager"), Broken)
    assert result(trainer) == result(plain)


def test_an_error_of_the_block_itself_has_no_such_note():
    class Wrong(Deep):
        def __init__(self):
            super().__init__()
            self.ends["last"] = torch.nn.Linear(17, 1)

    with pytest.raises(RuntimeError) as caught:
        train(Compile(blocks=["Block"], backend="eager"), Wrong)
    assert not any("compile:" in note for note in getattr(caught.value, "__notes__", ()))
