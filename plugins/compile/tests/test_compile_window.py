"""The whole window, compiled: what it trains, what it tells, and that it does not compile for ever."""

import copy
import logging
import pickle
from pathlib import Path

import pytest
import torch
from tests.told import Told
from torch._dynamo.utils import counters

from hookline import CallbackInterface, hookimpl
from hookline.testing import ByClosure, Memory, TinyModule, digest, on_ranks, run_ranks, tiny_trainer
from hookline_compile import Compile

pytestmark = [  # torch's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
STEPS = 14  # two epochs of TinyModule


@pytest.fixture(autouse=True)
def _afresh():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    counters.clear()


class Net(TinyModule):
    """Logs in its step, returns outputs, draws random numbers; its rates, powers of two, make sums exact."""

    def __init__(self):
        super().__init__(samples=50)  # the last batch of an epoch has two
        self.net.append(torch.nn.Dropout(0.2))

    def train_step(self, global_step, batch, device):
        inputs, targets, _ = batch
        predictions = self.net(inputs)
        loss = torch.nn.functional.mse_loss(predictions, targets)
        self.log(error=(predictions - targets).abs().mean(), over="epoch")
        self.trainer.log(largest=predictions.max(), reduce="max")
        return loss, predictions

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=2**-6, momentum=0.9, weight_decay=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)]


def train(options=None, module=Net, others=None, state=None, **given):
    """Train with the window compiled, or without where `options` is None; return the trainer and its states."""
    memory, told = Memory(state=state, every="1 steps"), Told()
    window = {} if options is None else {"compile": Compile(**{"scope": "window", "backend": "eager"} | options)}
    plugins = {"memory": memory, "told": told, **window, **(others or {})}
    trainer = tiny_trainer(plugins, module(), **{"log_every": "1 steps"} | given)
    trainer.train()
    trainer.told, trainer.states = told.all, memory.states
    return trainer


def result(trainer):
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    return digest([trainer.export_model(), optimizers]), trainer.told, trainer.metrics


def graphs():
    return counters["stats"]["unique_graphs"]


def test_the_window_trains_tells_and_keeps_what_a_run_without_does():
    plain = train()
    compiled = train({"fullgraph": True, "backend": "aot_eager"})  # logging and outputs break nothing
    assert result(compiled) == result(plain)
    assert len({rate for state in compiled.states.values() for rate in rates(state)}) > 5  # none is frozen
    assert 2 <= graphs() <= 5  # forward and optimizer, the first shape and all others


def rates(state):
    return [group["lr"] for optimizer in state["optimizers"] for group in optimizer["param_groups"]]


@pytest.mark.slow
def test_nothing_is_compiled_anew_in_later_epochs_and_a_resume_has_the_same_bits():
    counts = []
    for epochs in (2, 4):
        torch._dynamo.reset()
        counters.clear()
        trainer = train({"backend": "aot_eager"}, epochs=epochs)
        counts.append(graphs())
    assert counts[0] == counts[1]
    torch._dynamo.reset()
    resumed = train({"backend": "aot_eager"}, state=copy.deepcopy(trainer.states[5]), epochs=4)
    assert digest(resumed.export_model()) == digest(trainer.export_model())


class Sizes(Net):
    """Batches of eleven sizes."""

    def get_train_dataloader(self, sampler, batch_size):
        ids = torch.arange(len(self.inputs))
        return [(self.inputs[:size], self.targets[:size], ids[:size]) for size in (8, 5, 9, 2, 7, 12, 3, 11, 4, 10, 6)]

    def get_val_dataloaders(self, sampler, batch_size):
        return super().get_train_dataloader(sampler, batch_size)


@pytest.mark.slow
def test_batches_of_many_sizes_are_compiled_twice_or_torch_says_that_it_stops(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch._dynamo"), "propagate", True)
    plain = train(module=Sizes)
    assert result(train({"backend": "aot_eager"}, Sizes)) == result(plain)
    assert graphs() <= 4  # of train_step and of the optimizer, each for the first size and for all
    assert not [record for record in caplog.records if record.name.startswith("torch._dynamo")]
    torch._dynamo.reset()
    counters.clear()
    assert result(train({"backend": "aot_eager", "dynamic": False}, Sizes)) == result(plain)
    assert 8 <= graphs() <= 10
    said = next(record.message for record in caplog.records if record.name.startswith("torch._dynamo"))
    assert "hit config.recompile_limit (8)" in said
    assert "function: 'Net.train_step'" in said


class Counting(Net):
    """Its loss is by the number of the step."""

    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        return loss * (0.5 if global_step % 4 == 0 else 1.0) / (1 + global_step), predictions


@pytest.mark.slow
def test_a_step_that_reads_its_number_compiles_for_each_way_not_for_each_number():
    plain = train(module=Counting, epochs=4)
    compiled = train({"fullgraph": True}, Counting, epochs=4)
    torch.testing.assert_close(compiled.export_model(), plain.export_model(), rtol=1e-6, atol=1e-7)
    assert graphs() <= 8


class Breaking(Net):
    def train_step(self, global_step, batch, device):
        loss, predictions = super().train_step(global_step, batch, device)
        if loss.item() > 1e9:  # breaks here
            raise OverflowError
        self.log(after=loss * 2)
        return loss, predictions


def test_breaks_are_told_by_their_line_and_reason_once(caplog):
    plain = train(module=Breaking)
    caplog.clear()
    compiled = train({}, Breaking)
    assert result(compiled) == result(plain)
    lines = Path(__file__).read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if text.endswith("# breaks here")]
    (said,) = [record.message for record in caplog.records if "breaks into pieces" in record.message]
    assert f"compile: train_step breaks into pieces at {__file__}:{line} (if loss.item() > 1e9:" in said
    assert "Tensor" in said.rpartition(": ")[2]
    with pytest.raises(Exception, match=r"item\(\)") as caught:
        train({"fullgraph": True}, Breaking)
    assert "compile: this is train_step. `compile.scope: blocks` leaves it" in " ".join(caught.value.__notes__)


@pytest.mark.plugins
@pytest.mark.parametrize(
    "others",
    [
        {"accumulate": {"steps": 2}, "clip": {"max_norm": 0.5, "log_norm": True}, "finite": {}, "ema": {"decay": 0.5}},
        pytest.param({"amp": {}, "monitor": {"grad_norm": True, "learning_rate": True}}, marks=pytest.mark.slow),
        pytest.param({"amp": {"precision": "fp16"}, "guard": {}}, marks=pytest.mark.slow),
        pytest.param(
            {"sam": {}, "freeze": {"patterns": "net.0", "unfreeze": {"6 steps": "net.0"}}}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda others: "-".join(others),
)
def test_other_plugins_take_part_as_without(others):
    plain = train(others=others)
    compiled = train({}, others=others)
    assert result(compiled) == result(plain)


@pytest.mark.slow
def test_every_step_of_a_plugin_that_skips_updates_is_skipped():
    class Skips(CallbackInterface):
        @hookimpl(wrapper=True)
        def should_step(self, trainer):
            return (yield) and trainer.global_step % 2 == 0

    compiled = train({}, others={"skips": Skips()})
    assert compiled.counters.skipped_steps == STEPS // 2
    assert result(compiled) == result(train(others={"skips": Skips()}))


# What other plugins compute -------------------------------------------------------------


@pytest.mark.plugins
@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 0.1, "log_norm": True},
        pytest.param({"max_norm": 0.1, "norm_type": float("inf")}, marks=pytest.mark.slow),
        pytest.param({"max_norm": 0.1, "max_value": 0.05, "max_ratio": 0.02}, marks=pytest.mark.slow),
        pytest.param({"max_norm": 0.1, "per_parameter": True}, marks=pytest.mark.slow),
    ],
)
def test_a_clip_is_compiled_and_has_the_same_bits(options):
    plain = train(others={"clip": options})
    assert digest(plain.export_model()) != digest(train().export_model())
    torch._dynamo.reset()
    counters.clear()
    train({"backend": "aot_eager"})
    without = graphs()
    torch._dynamo.reset()
    counters.clear()
    compiled = train({"backend": "aot_eager", "fullgraph": True}, others={"clip": options})
    assert result(compiled) == result(plain)
    assert graphs() == without + 1


def halve(gradients, asked):
    total = torch.stack([gradient.sum() for gradient in gradients]).sum()
    if asked and total.item() > 1e9:  # breaks there
        raise OverflowError
    for gradient in gradients:
        gradient.mul_(0.5)
    return total


class Halving(CallbackInterface):
    """A stranger that computes at each step, and keeps what it has been given to call."""

    def __init__(self, asked=False):
        self.asked, self.totals = asked, []

    @hookimpl
    def on_begin_train(self, trainer):
        self.halve = trainer.hook.compile_function(trainer=trainer, function=halve)

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        self.totals.append(self.halve([weight.grad for weight in trainer.module.parameters()], self.asked).item())


@pytest.mark.parametrize("options", [None, {"scope": "blocks", "blocks": ["Linear"]}])
def test_without_a_compiled_window_a_function_stays_what_it_is(options):
    stranger = Halving()
    train(options, others={"stranger": stranger})
    assert stranger.halve is halve


def test_a_function_of_a_stranger_is_compiled_and_its_breaks_are_told(caplog):
    plain, whole, broken = Halving(), Halving(), Halving(asked=True)
    bits = result(train(others={"stranger": plain}))
    assert result(train({"fullgraph": True}, others={"stranger": whole})) == bits
    assert whole.totals == plain.totals
    assert not [record for record in caplog.records if "breaks into pieces" in record.message]
    assert result(train({"fullgraph": True}, others={"stranger": broken})) == bits
    assert broken.totals == plain.totals
    lines = Path(__file__).read_text().splitlines()
    (line,) = [number for number, text in enumerate(lines, 1) if text.endswith("# breaks there")]
    (said,) = [record.message for record in caplog.records if "breaks into pieces" in record.message]
    assert f"{__name__}.halve breaks into pieces at {__file__}:{line} (" in said
    assert pickle.loads(pickle.dumps(whole.halve)) is halve is copy.deepcopy(whole).halve


class Rows(Net):
    """An embedding with sparse gradients, of other rows in each batch."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.ones(50, 1), freeze=False, sparse=True)

    def train_step(self, global_step, batch, device):
        predictions = self.net(batch[0]) + self.table(batch[2])
        return torch.nn.functional.mse_loss(predictions, batch[1]), predictions

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return torch.optim.SGD(self.parameters(), lr=2**-6), []


@pytest.mark.plugins
@pytest.mark.slow
def test_sparse_gradients_are_clipped_as_without():
    plain, compiled = (train(options, Rows, {"clip": {"max_norm": 0.1, "max_ratio": 0.05}}) for options in (None, {}))
    assert result(compiled) == result(plain)


# Optimizers -----------------------------------------------------------------------------


class Two(Net):
    """Two optimizers, one of which nobody at torch has written."""

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        class Own(torch.optim.SGD):
            pass

        first, *rest = self.net
        return [torch.optim.SGD(first.parameters(), 2**-6), Own(torch.nn.ModuleList(rest).parameters(), 2**-6)], []


def test_an_optimizer_that_is_not_of_torch_steps_in_python_and_says_so(caplog):
    assert result(train({}, Two)) == result(train(module=Two))
    said = "compile: Own.step is not compiled: it is none of torch's optimizers"
    assert [record.message for record in caplog.records].count(said) == 1


class Hooked(Net):
    """An optimizer with hooks, which count its steps."""

    steps = 0

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        (optimizer,), schedulers = super().get_optimizers_schedulers(estimated_global_steps_per_epoch, epochs)
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "steps", self.steps + 1))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "steps", self.steps + 100))
        return [optimizer], schedulers


class Closing(ByClosure, Net):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        return [torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2)], []


@pytest.mark.slow
def test_hooks_of_optimizers_are_called_and_closures_run_in_python(caplog):
    assert train({}, Hooked).module.steps == STEPS * 101
    assert result(train({}, Closing, epochs=1)) == result(train(module=Closing, epochs=1))
    said = "compile: LBFGS.step is not compiled: it gets a closure, which runs the whole window"
    assert said in [record.message for record in caplog.records]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Rprop", "Adafactor"],
)
def test_optimizers_of_torch_step_alike_within_rounding(name):
    """Bias corrections are calculated in float32 where a step is compiled, else in Python's double precision."""

    class Smooth(Net):
        def __init__(self):
            super().__init__()
            del self.net[1]  # behind a batch norm, gradients of a bias are rounding alone

        def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
            optimizer = getattr(torch.optim, name)(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    plain, compiled = train(module=Smooth), train({}, Smooth)
    torch.testing.assert_close(compiled.export_model(), plain.export_model(), rtol=1e-4, atol=1e-5)
    assert compiled.optimizers[0].state_dict()["param_groups"] == plain.optimizers[0].state_dict()["param_groups"]
    assert graphs() <= 6


class Cycling(Net):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch, epochs):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=STEPS)


@pytest.mark.slow
def test_another_option_that_changes_each_step_gives_the_right_numbers_without_endless_compiling():
    plain, compiled = train(module=Cycling), train({}, Cycling)
    torch.testing.assert_close(compiled.export_model(), plain.export_model(), rtol=1e-5, atol=1e-6)
    assert graphs() <= 11  # torch stops at eight of one kind, and says so


# Ranks, and the compiler itself ---------------------------------------------------------


def train_on(options, others):
    return result(train(options, others=others, train_batch_size=20))


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
@pytest.mark.slow
def test_on_two_ranks_and_what_is_refused():
    runs = []
    for options in (None, {}):
        outcomes = run_ranks(train_on, 2, options, {"ddp": {}, "clip": {"max_norm": 0.1}})
        assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output + outcomes[1].output
        runs.append([outcome.value for outcome in outcomes])
    assert runs[0] == runs[1]
    for outcome in run_ranks(train_on, 2, {}, {"fsdp": {}}):
        assert "compile.scope='window' cannot compile weights that are shared out over ranks, as net." in outcome.output


# What is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "windows"}, r"compile\.scope='windows' must be one of blocks, window, did you mean"),
        ({"scope": "window", "blocks": ["Linear"]}, r"compile\.blocks=\['Linear'\] names what compile\.scope: blocks"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        Compile(**options)


class Otherwise(Net):
    """Trains by a method of another name."""

    def forward(self, stage, **given):
        return Net.train_step(self, **given) if stage.value == "train" else super().forward(stage=stage, **given)


def test_a_module_whose_train_step_nobody_calls_is_refused():
    with pytest.raises(ValueError, match=r"compile\.scope='window' compiles train_step, and this step has not called"):
        train({}, Otherwise)


# The compiler itself ----------------------------------------------------------------------


SHORT = {"epochs": 1, "max_train_steps_per_epoch": 4, "evaluate_every": None, "eval_when_finish": False}


def by_inductor():
    """Return the weights that inductor trains in a process of its own, and what it found in its cache."""
    torch.set_num_threads(1)
    weights = train({"backend": "inductor"}, Calm, {"clip": {"max_norm": 0.1}}, **SHORT).export_model()
    return weights, graphs(), counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


class Calm(Net):
    def __init__(self):
        super().__init__()
        for layer in self.net:
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0  # inductor draws other random numbers


@pytest.mark.plugins
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_rounds_otherwise_and_a_second_process_finds_what_the_first_has_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (first,) = on_ranks(by_inductor, 1, timeout=300)
    (second,) = on_ranks(by_inductor, 1, timeout=300)
    weights, compiled, *found = first
    plain = train(module=Calm, others={"clip": {"max_norm": 0.1}}, **SHORT).export_model()
    torch.testing.assert_close(weights, plain, rtol=1e-4, atol=1e-5)
    assert found == [0, compiled + 1]  # train_step is two, forward and backward
    again, *found = second
    assert found == [compiled, compiled + 1, 0]
    assert digest(again) == digest(weights)
