"""`hookline simulate`: what one rank of many holds and sends, against real ranks and against arithmetic."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookline import CallbackInterface, hookimpl
from hookline.cli import main
from hookline.testing import PlainModule, TinyModule, run_ranks, tiny_trainer
from hookline_expert_parallel import MixtureOfExperts
from hookline_simulate.commands import EXAMPLES, _parser
from hookline_simulate.world import World

ROOT = Path(__file__).parents[3]

MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface


class Block(torch.nn.Linear):
    pass


class Mine(ModuleInterface):
    def __init__(self, width=16, blocks=2, samples=32, asks="", data=True, tells=False):
        super().__init__()
        layers = [layer for _ in range(blocks) for layer in (Block(width, width), torch.nn.Tanh())]
        self.net = torch.nn.Sequential(*layers)
        self.width, self.samples, self.asks, self.data = width, samples, asks, data
        if tells:
            self.scale = self.net[0].weight.std().item()

    def train_step(self, global_step, batch, device):
        inputs, numbers = batch
        outputs = self.net(inputs)
        if self.asks == "item" and outputs.sum() > 0:
            outputs = outputs + 1
        if self.asks == "nonzero":
            outputs = outputs[outputs > 0]
        if self.asks == "wrong":
            outputs = outputs @ outputs
        if int(numbers.max()) < 0:
            raise ValueError("whole numbers keep their values")
        return outputs.square().mean(),

    def get_train_dataloader(self, sampler, batch_size):
        if not self.data:
            raise FileNotFoundError("no folder /data")
        dataset = TensorDataset(torch.randn(self.samples, self.width), torch.arange(self.samples))
        return DataLoader(dataset, batch_size, sampler=sampler(dataset))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        if self.asks == "refuse":
            raise ValueError("no optimizer of mine")
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, (steps_per_epoch or 1) * epochs)]
"""
CONFIG = "module: {_target_: planned.Mine}\ntrainer: {train_batch_size: 512}\n"
NAMES = "ddp", "checkpoint", "jsonl", "progress", "guard", "watchdog", "finite", "clip", "amp"
WEIGHTS = 2 * (16 * 16 + 16) * 4  # bytes of Mine as it is


def line_of(code):
    """Return where in the module something stands, as messages say it."""
    lines = MODULE.splitlines()
    return f"planned.py, line {next(number for number, line in enumerate(lines, 1) if code in line)}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planned", raising=False)
    (tmp_path / "planned.py").write_text(MODULE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def plan(folder, capsys):
    """Make a plan as the command line does; return exit code, output (read where it is JSON) and errors."""

    def make(world, *words, form="--json"):
        code = main(["simulate", "--world", world, "run.yaml", *words, *([form] if form else [])])
        out, err = capsys.readouterr()
        return code, json.loads(out) if form and out else out, err

    return make


def collectives(found):
    return {(one["kind"], one["ranks"], one["where"]): (one["calls"], one["bytes"]) for one in found["collectives"]}


# Against real ranks -------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts what real collectives are given: (calls, bytes) by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.counted = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace == "c10d":
            calls, size = self.counted.get(func.__name__.partition(".")[0], (0, 0))
            sizes = [sum(t.nbytes for t in tree_leaves(part) if isinstance(t, torch.Tensor)) for part in args[:2]]
            self.counted[func.__name__.partition(".")[0]] = calls + 1, size + max(sizes)
        return func(*args, **(kwargs or {}))


def here(tensors):
    """Return the bytes of what this rank has of tensors."""
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


class Look(CallbackInterface):
    """Keeps the sizes in the last step."""

    @hookimpl(wrapper=True, tryfirst=True)
    def update(self, trainer):
        self.parameters = here(trainer.module.parameters())
        with Count() as count:
            answer = yield
        self.counted = count.counted
        return answer

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        self.gradients = here(p.grad for p in trainer.module.parameters())

    @hookimpl
    def on_end_optimizer_step(self, trainer):
        states = trainer.optimizers[0].state.values()
        self.states = here(t for state in states for t in state.values())


class Routed(PlainModule):
    """Has experts, each of which takes as many tokens as any other."""

    def __init__(self):
        super().__init__()
        self.net[1] = MixtureOfExperts(16, 24, experts=4, capacity_factor=1.0)


def measure(plugins, module):
    torch.set_num_threads(1)
    look = Look()
    tiny_trainer({"look": look, **plugins}, module(), epochs=1, max_steps=3).train()
    return {"parameters": look.parameters, "gradients": look.gradients, "optimizer states": look.states}, look.counted


SHARED = {"broadcast": "broadcast_", "all_gather": "_allgather_base_", "reduce_scatter": "_reduce_scatter_base_"}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("plugins", "module", "counted"),
    [
        ({"ddp": {}}, TinyModule, {"broadcast": "broadcast_", "all_reduce": "allreduce_"}),
        ({"ddp": {}, "accumulate": {"steps": 2}}, TinyModule, {"broadcast": "broadcast_", "all_reduce": "allreduce_"}),
        (
            {"fsdp": {"wrap": ["Linear"]}},
            TinyModule,
            SHARED,
        ),
        ({"fsdp": {"wrap": ["Linear"], "reshard_after_forward": False}}, TinyModule, SHARED),
        (
            {"ddp": {}, "expert_parallel": {}},
            Routed,
            {"all_to_all": "alltoall_base_", "all_reduce": "allreduce_"},
        ),
    ],
    ids=["ddp", "ddp in windows", "fsdp", "zero 1", "experts"],
)
@pytest.mark.plugins
def test_a_plan_is_what_two_ranks_measure(plan, folder, plugins, module, counted):
    (folder / "run.yaml").write_text(
        f"module: {{_target_: {module.__module__}.{module.__name__}}}\ntrainer: {{train_batch_size: 8}}\n"
        f"plugins: {json.dumps(plugins)}\n"
    )
    code, found, err = plan("2")
    assert (code, err) == (0, "")
    outcomes = run_ranks(measure, 2, plugins, module)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].output
    memory, moved = outcomes[0].value
    assert {name: found["memory"][name] for name in memory} == pytest.approx(memory, rel=0.05)
    assert {name: found["memory"][name] for name in memory} == memory  # it is exact, as long as both count the same
    by_kind = {one["kind"]: (one["calls"], one["bytes"]) for one in found["collectives"]}
    assert by_kind == {kind: moved[name] for kind, name in counted.items()}
    assert set(moved) == set(counted.values())


# Against arithmetic -------------------------------------------------------------------


def test_one_rank(plan):
    code, found, err = plan("1")
    assert (code, err) == (0, "")
    assert found["world"] == {"machines": 1, "devices": 1}
    assert found["batch"] == {"samples": 512, "micro-batch(es) a rank": 1, "sample(s) in each": 512}  # of 32 at hand
    memory = found["memory"]
    assert (memory["parameters"], memory["buffers"], memory["gradients"]) == (WEIGHTS, 0, WEIGHTS)
    assert memory["optimizer states"] == 2 * WEIGHTS + 4 * 4  # and a number of steps for each parameter
    kept = 2 * 512 * 16 * 4  # what each Tanh has answered
    assert memory["activations"] == pytest.approx(kept, rel=0.05)
    assert memory["peak"] > 4 * WEIGHTS + kept
    assert (found["mesh"], found["collectives"], found["missing"]) == ([], [], "")


@pytest.mark.plugins
def test_states_of_few_bits_take_what_their_parts_take(folder):
    optimizer = ["plugins.optimizer._target_=torchao.optim.AdamW8bit", "plugins.optimizer.replace=true"]
    words = ["simulate", "--world", "1", "run.yaml", "--json", "module.width=64", *optimizer]
    done = subprocess.run(  # in a process of its own: torchao works a table out once, here without values
        [sys.executable, "-m", "hookline", *words], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    blocks = 64 * 64 // 256
    weight, bias = 2 * (64 * 64 + 4 * blocks + 4 * 256) + 4, 2 * 4 * 64 + 4  # codes, scales and their table; a step
    assert found["memory"]["optimizer states"] == 2 * (weight + bias)


@pytest.mark.plugins
def test_ddp_reduces_its_gradients(plan):
    _, found, _ = plan("8x64", "-p", "ddp")
    assert found["batch"]["sample(s) in each"] == 1
    assert collectives(found) == {("all_reduce", 512, "between machines"): (1, WEIGHTS)}
    assert found["collectives"][0]["sent"] == int(2 * WEIGHTS * 511 / 512)


@pytest.mark.plugins
def test_fsdp_gathers_twice_and_scatters_once(plan):
    _, found, _ = plan("1x8", "-p", "fsdp", "plugins.fsdp.wrap=[Block]")
    assert found["mesh"] == ["data 8"]
    assert {name: found["memory"][name] for name in ("parameters", "gradients")} == {
        "parameters": WEIGHTS / 8,
        "gradients": WEIGHTS / 8,
    }
    assert collectives(found) == {
        ("all_gather", 8, "one machine"): (4, 2 * WEIGHTS),
        ("reduce_scatter", 8, "one machine"): (2, WEIGHTS),
    }


@pytest.mark.plugins
def test_zero_1_sends_what_ddp_sends(plan):
    words = ["-p", "fsdp", "plugins.fsdp.wrap=[Block]", "plugins.fsdp.reshard_after_forward=false"]
    _, found, _ = plan("1x8", *words)
    assert found["memory"]["optimizer states"] == pytest.approx(2 * WEIGHTS / 8, abs=4 * 4)
    assert collectives(found) == {
        ("all_gather", 8, "one machine"): (2, WEIGHTS),
        ("reduce_scatter", 8, "one machine"): (2, WEIGHTS),
    }
    _, of_ddp, _ = plan("1x8", "-p", "ddp")
    assert sum(one["sent"] for one in found["collectives"]) == of_ddp["collectives"][0]["sent"]


@pytest.mark.plugins
def test_a_module_that_is_made_without_memory_is_the_same(plan):
    words = ["-p", "fsdp", "plugins.fsdp.wrap=[Block]"]
    assert plan("8", *words, "plugins.fsdp.meta=true") == plan("8", *words)


@pytest.mark.plugins
def test_replicas_keep_what_is_gathered_within_machines(plan):
    words = ["-p", "fsdp", "plugins.fsdp.replicas=4", "plugins.fsdp.param_dtype=bfloat16", "plugins.fsdp.wrap=[Block]"]
    _, found, _ = plan("4x8", *words)
    assert found["mesh"] == ["replicate 4 x data 8"]
    assert collectives(found) == {
        ("all_gather", 8, "one machine"): (4, WEIGHTS),  # in half precision
        ("reduce_scatter", 8, "one machine"): (2, WEIGHTS / 2),
        ("all_reduce", 4, "between machines"): (2, WEIGHTS / 2 / 8),
    }


@pytest.mark.plugins
def test_a_window_is_forward_and_backward_again_and_again(plan):
    _, found, _ = plan("8", "-p", "fsdp", "-p", "accumulate", "plugins.accumulate.steps=4")
    assert found["batch"] == {"samples": 512, "micro-batch(es) a rank": 4, "sample(s) in each": 16}
    assert collectives(found)["reduce_scatter", 8, "one machine"] == (1, WEIGHTS)
    assert collectives(found)["all_gather", 8, "one machine"] == (8, 8 * WEIGHTS)


@pytest.mark.plugins
def test_layers_that_are_split(plan, folder):
    (folder / "run.yaml").write_text(CONFIG + "plugins: {fsdp: {}, tp: {size: 2, plan: {net.0: column, net.2: row}}}\n")
    code, found, err = plan("2x4")
    assert (code, err) == (0, "")
    assert found["mesh"] == ["data 4 x tensor 2"]
    assert found["batch"]["sample(s) in each"] == 128
    assert collectives(found)["all_reduce", 2, "one machine"][1] == 128 * 16 * 4


@pytest.mark.plugins
def test_billions_of_parameters_take_no_memory(plan):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = ["module.width=16384", "module.blocks=12", "-p", "fsdp", "plugins.fsdp.wrap=[Block]"]
    code, found, _ = plan("8x8", *words)
    weights = 12 * (16384 * 16384 + 16384) * 4  # 13 GB
    assert code == 0
    assert found["memory"]["parameters"] * 64 == weights
    assert found["memory"]["optimizer states"] * 64 == pytest.approx(2 * weights, rel=1e-3)
    assert found["memory"]["peak"] > 3 * weights / 64
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.plugins
def test_what_plugins_keep_is_in_the_peak(plan):
    _, without, _ = plan("1")
    _, found, _ = plan("1", "-p", "ema")
    assert found["memory"]["peak"] == without["memory"]["peak"] + WEIGHTS


@pytest.mark.plugins
def test_half_precision_keeps_less(plan):
    _, without, _ = plan("1", "trainer.train_batch_size=8192")
    _, found, _ = plan("1", "trainer.train_batch_size=8192", "-p", "amp")
    assert found["memory"]["activations"] < 0.8 * without["memory"]["activations"]
    assert found["memory"]["parameters"] == without["memory"]["parameters"]


# What a plan is told ------------------------------------------------------------------


@pytest.mark.parametrize("world", ["", "0", "8x", "x8", "8x0", "2x2x2", "eight", "-1", "1.5", "99999"])
def test_what_is_no_world(plan, world):
    code, out, err = plan(world)
    assert (code, out) == (2, "")
    assert err == (
        f"hookline: --world={world} is no world; write MACHINESxDEVICES, e.g. 8x64, or the number of ranks on one "
        "machine\n"
    )


@pytest.mark.plugins
def test_a_batch_that_the_world_does_not_divide(plan):
    code, out, err = plan("3", "-p", "ddp")
    assert (code, out) == (2, "")
    assert err.startswith("hookline: train_batch_size=512 cannot be shared equally by 3 rank(s)")
    assert err.count("\n") == 1


def test_nobody_makes_one_run_of_them(plan):
    code, out, err = plan("2x2")
    assert (code, out) == (2, "")
    assert err == (
        "hookline: --world=2x2 is 4 processes, and no plugin makes one run of them: name one that does, e.g. `-p ddp`\n"
    )


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        ("item", f"it needs the value of a tensor ({line_of('outputs.sum() > 0')}), and here tensors have none"),
        ("nonzero", f"it needs the value of a tensor ({line_of('outputs[outputs > 0]')}), and here tensors have none"),
        ("wrong", "RuntimeError: "),
    ],
    ids=["item", "nonzero", "wrong"],
)
@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
@pytest.mark.plugins
def test_a_forward_that_needs_values(plan, asks, says, plugin):
    code, found, err = plan("2", "-p", plugin, f"module.asks={asks}")
    assert code == 1
    assert f"hookline: Mine.train_step could not be simulated: {says}" in err
    assert err.count("\n") == 1
    assert ("compute it with tensors alone (torch.where, a mask)" in err) == (asks != "wrong")
    share = WEIGHTS if plugin == "ddp" else WEIGHTS / 2
    assert found["memory"].keys() == {"parameters", "buffers", "gradients", "optimizer states"}
    assert found["memory"]["parameters"] == found["memory"]["gradients"] == share
    assert found["memory"]["optimizer states"] == pytest.approx(2 * share, rel=0.01)


@pytest.mark.plugins
def test_data_that_are_not_at_hand(plan):
    code, found, err = plan("2", "-p", "fsdp", "module.data=false")
    assert code == 1
    where = line_of("raise FileNotFoundError")
    assert err == f"hookline: no step could be simulated: FileNotFoundError: no folder /data ({where})\n"
    assert found["memory"]["gradients"] == WEIGHTS / 2
    code, found, err = plan("2", "-p", "ddp", "module.samples=0")
    assert (code, err) == (1, "hookline: no step could be simulated: the training loader gave no batch\n")
    assert found["memory"]["gradients"] == WEIGHTS


def test_what_the_module_raises_keeps_its_traceback(plan):
    code, out, err = plan("1", "module.asks=refuse")
    assert (code, out) == (1, "")
    assert err.startswith("Traceback (most recent call last):\n")
    assert line_of('ValueError("no optimizer')[len("planned.py, ") :] in err
    assert err.splitlines()[-1] == "ValueError: no optimizer of mine"


def test_a_module_that_looks_at_its_weights(plan):
    code, out, err = plan("1", "module.tells=true")
    assert (code, out) == (2, "")
    assert err.startswith(f"hookline: module: it needs the value of a tensor ({line_of('.std().item()')}), and here")


# What a plan shows and leaves ---------------------------------------------------------


@pytest.mark.plugins
def test_it_is_shown(plan):
    code, out, _ = plan("2x4", "-p", "fsdp", form=None)
    lines = out.splitlines()
    assert code == 0
    assert lines[:3] == [
        "world: 2 machine(s) x 4 device(s) = 8 rank(s)",
        "mesh: data 8",
        "step: 512 samples, 1 micro-batch(es) a rank, 64 sample(s) in each",
    ]
    assert lines[4].split() == ["memory", "of", "rank", "0", "size"]
    assert [line.split("  ")[0] for line in lines[5:11]] == [
        "parameters", "buffers", "gradients", "optimizer states", "activations", "peak",
    ]  # fmt: skip
    assert lines[5].endswith("272 B")
    assert lines[12].split()[-5:] == ["ranks", "on", "calls", "size", "sent"]
    assert lines[13].split() == ["all_gather", "8", "between", "machines", "2", "4.25", "KiB", "3.72", "KiB"]
    assert plan("1", form=None)[1].endswith("\nno communication\n")
    assert "mesh: none, each rank has the whole model" in plan("2", "-p", "ddp", form=None)[1]


@pytest.mark.plugins
def test_it_trains_nothing_and_leaves_nothing(plan, folder):
    before = {*folder.iterdir()}, dict(os.environ), torch.UntypedStorage.resize_
    options = {"max_steps": 1, "log_every": "1 steps", "sanity_val_steps": 1, "device": "cuda"}
    words = [f"trainer.{key}={value}" for key, value in options.items()]
    words += [word for name in NAMES for word in ("-p", name)]
    code, found, err = plan("2", *words, "plugins.amp.precision=fp16")
    assert (code, err) == (0, "")
    assert found["memory"]["parameters"] == WEIGHTS
    names = {path for path in folder.iterdir() if path.name != "__pycache__"}
    assert (names, dict(os.environ), torch.UntypedStorage.resize_) == before
    assert not dist.is_initialized()


@pytest.mark.plugins
def test_the_page_on_scaling_shows_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "scaling.md").read_text()
    (command,) = re.findall(r"^hookline (simulate .* examples/chars.yaml .*)$", page, re.M)
    (shown,) = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    assert main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_the_commands_of_the_documentation_are_understood():
    pages = [ROOT / "docs" / "scaling.md", Path(__file__).parents[1] / "README.md"]
    text = "\n".join(page.read_text() for page in pages) + EXAMPLES
    shown = re.findall(r"^ *hookline simulate (.*?)(?:  .*)?$", text, re.M)
    assert len(shown) > 8
    for words in shown:
        options = _parser().parse_intermixed_args(shlex.split(words))
        assert options.config == "run.yaml" or (ROOT / options.config).exists()
        assert World(options.world).size > 1


def test_help_needs_no_torch():
    code = """
import sys
from hookline.cli import main
try:
    main(["simulate", "--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: hookline simulate ")
    assert done.stdout.splitlines()[-1] == "False"
