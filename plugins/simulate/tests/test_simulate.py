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
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hookline import CallbackInterface, hookimpl, instantiate
from hookline.cli import main
from hookline.config import build_trainer, load_config
from hookline.testing import PlainModule, on_ranks
from hookline_expert_parallel import MixtureOfExperts
from hookline_simulate.clock import DEVICES
from hookline_simulate.commands import EXAMPLES, _parser
from hookline_simulate.simulate import simulate
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
        if self.asks == "recv":
            torch.distributed.recv(numbers, 1)
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
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and "tensor_autograd" not in name and name != "wait_tensor":
            calls, size = self.counted.get(name, (0, 0))
            parts = args[:2] if func.namespace == "c10d" else (args[0], result)
            sizes = [sum(t.nbytes for t in tree_leaves(part) if isinstance(t, torch.Tensor)) for part in parts]
            self.counted[name] = calls + 1, size + max(sizes)
        return result


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


def measure(config):
    torch.set_num_threads(1)
    look = Look()
    trainer = build_trainer(load_config(config, ["trainer.max_steps=3"]))
    trainer.plugins.register(look)
    trainer.train()
    return {"parameters": look.parameters, "gradients": look.gradients, "optimizer states": look.states}, look.counted


def plan_of(config, ranks):
    """Return the plan of a configuration, made in a process of its own: torch keeps what it knows of meshes."""
    return simulate(load_config(config), World(str(ranks)), DEVICES["h100"]).as_json()


TRAINER = "trainer: {train_batch_size: 8, evaluate_every: null, eval_when_finish: false}\n"
TINY = "module: {_target_: hookline.testing.TinyModule}\n" + TRAINER
ROUTED = f"module: {{_target_: {__name__}.Routed}}\n" + TRAINER
LLAMA = "module: {_target_: examples.llm.llama.Llama, context: 16, blocks: 2}\n" + TRAINER
DDP = {"broadcast_": "broadcast", "allreduce_": "all_reduce"}
FSDP = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
TP = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter", "all_reduce": "all_reduce"}


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("ranks", "module", "plugins", "names"),
    [
        (2, TINY, {"ddp": {}}, DDP),
        (2, TINY, {"ddp": {}, "accumulate": {"steps": 2}}, DDP),
        (2, TINY, {"fsdp": {"wrap": ["Linear"]}}, {"broadcast_": "broadcast", **FSDP}),
        (2, TINY, {"fsdp": {"wrap": ["Linear"], "reshard_after_forward": False}}, {"broadcast_": "broadcast", **FSDP}),
        (2, ROUTED, {"ddp": {}, "expert_parallel": {}}, {"alltoall_base_": "all_to_all", "allreduce_": "all_reduce"}),
        (4, LLAMA, {"tp": {"size": 2}, "fsdp": {}}, {**FSDP, **TP}),
        pytest.param(
            *(4, LLAMA, {"tp": {"size": 2}, "fsdp": {"replicas": 2}}, {**FSDP, **TP, "allreduce_": "all_reduce"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(4, LLAMA, {"fsdp": {"replicas": 2}, "clip": {}}, {**FSDP, "allreduce_": "all_reduce", **TP}),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ddp", "ddp in windows", "fsdp", "zero 1", "experts", "fsdp2 x tp2", "dp2 x tp2", "dp2 x fsdp2"],
)
@pytest.mark.plugins
def test_a_plan_is_what_ranks_measure(folder, ranks, module, plugins, names):
    config = folder / "run.yaml"
    config.write_text(f"{module}plugins: {json.dumps(plugins)}\n")
    (found,) = on_ranks(plan_of, 1, config, ranks)
    (memory, moved), *_ = on_ranks(measure, ranks, config)
    assert found["missing"] == ""
    assert {name: found["memory"][name] for name in memory} == memory  # it is exact, as long as both count the same
    assert summed((one["kind"], one["calls"], one["bytes"]) for one in found["collectives"]) == summed(
        (names[name], *counted) for name, counted in moved.items()
    )


def summed(counted):
    """Return calls and bytes by the kind of collective."""
    together = {}
    for kind, calls, size in counted:
        before = together.get(kind, (0, 0))
        together[kind] = before[0] + calls, before[1] + size
    return together


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


# Time ---------------------------------------------------------------------------------

PRODUCT = 2 * 64 * 16 * 16  # FLOPs of a layer of Mine for the 64 samples that each of 8 ranks has
PARTS = WEIGHTS / 2 * 7 / 8  # what a rank sends to gather a block, or to scatter its gradients


def times(plan, *words):
    _, found, _ = plan("8", f"--link={PARTS}", *words)  # so that a block takes one second
    exposed = {one["kind"]: one["exposed"] for one in found["collectives"]}
    assert sum(exposed.values()) == pytest.approx(found["time"]["exposed"])
    assert found["time"]["computation"] + found["time"]["exposed"] == pytest.approx(found["time"]["step"])
    return found, exposed


@pytest.mark.plugins
def test_what_a_long_computation_hides_of_fsdp(plan):
    found, exposed = times(plan, "-p", "fsdp", "plugins.fsdp.wrap=[Block]", f"--flops={PRODUCT / 4}")
    # exposed: the first block of forward, the first of backward, the last gradients; computed: five products of 4 s
    assert exposed == pytest.approx({"all_gather": 2.0, "reduce_scatter": 1.0})
    assert found["time"] == pytest.approx({"computation": 20.0, "communication": 6.0, "exposed": 3.0, "step": 23.0})
    assert found["flops"] == {"step": 5 * PRODUCT, "model": 5 * PRODUCT}  # the first layer's input needs no gradient
    assert found["mfu"] == pytest.approx(20 / 23)


@pytest.mark.plugins
def test_what_a_short_computation_hides_of_fsdp(plan):
    words = ["-p", "fsdp", "plugins.fsdp.wrap=[Block]", "module.blocks=3", f"--flops={PRODUCT * 4}"]
    found, exposed = times(plan, *words)
    # forward: 1 s, then 0.75 s behind each product of 0.25 s; backward: 1 s, 0.5 s behind two products, and 1 s, as
    # the gradients of the last block are sent first
    assert exposed["all_gather"] == pytest.approx(1 + 0.75 + 0.75 + 1 + 0.5 + 1)
    # one scattering may be under way: each waits for the rest of the one before it, and the end for the last one
    assert exposed["reduce_scatter"] == pytest.approx(0.5 + 0.75 + 1)
    assert found["time"]["step"] == pytest.approx(9.25)


@pytest.mark.plugins
def test_gradients_of_ddp_that_leave_in_one_bucket_are_exposed(plan):
    found, exposed = times(plan, "-p", "ddp", f"--flops={PRODUCT}")
    assert exposed == pytest.approx({"all_reduce": 4.0})
    assert found["time"]["step"] == pytest.approx(5 + 4)


@pytest.mark.plugins
def test_what_is_split_within_layers_is_exposed(plan, folder):
    (folder / "run.yaml").write_text(CONFIG + "plugins: {tp: {plan: {net.0: column, net.2: row}}}\n")
    found, _ = times(plan, "--flops=1e3")
    assert 0 < found["time"]["exposed"] == pytest.approx(found["time"]["communication"])


@pytest.mark.plugins
def test_machines_are_left_by_the_cards_of_all_ranks_that_take_part(plan):
    words = ["-p", "fsdp", "plugins.fsdp.replicas=2", "plugins.fsdp.wrap=[Block]", "--link=8", "--network=1"]
    _, within, _ = plan("2x4", *words)  # copies on two machines: each rank has its own card for its gradients
    (reduced,) = (one for one in within["collectives"] if one["kind"] == "all_reduce")
    assert reduced["seconds"] == pytest.approx(reduced["sent"] / 1)
    _, across, _ = plan("2x4", "-p", "ddp", "--link=8", "--network=1")
    (reduced,) = across["collectives"]
    assert reduced["seconds"] == pytest.approx(reduced["sent"] / 4)


def test_speeds_that_are_none(plan):
    code, _, err = plan("1", "--device", "abacus")
    assert (code, err) == (
        2,
        "hookline: --device=abacus is not known; take one of a100, h100, and state other speeds by --flops, --link and "
        "--network\n",
    )
    assert plan("1", "--network", "0")[::2] == (2, "hookline: --network=0 must be above 0\n")


# A published model --------------------------------------------------------------------

BLOCK = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # the matrices of a block of Llama 3 8B
READ = 4096 * 128256


def test_the_shape_of_llama_3_8b():
    config = OmegaConf.to_container(load_config(ROOT / "examples" / "llm" / "8b.yaml").module)
    with torch.device("meta"):
        module = instantiate(config, "module")
    assert sum(p.numel() for p in module.parameters()) == 32 * BLOCK + 2 * READ + 65 * 4096 == 8_030_261_248


@pytest.mark.plugins
def test_a_plan_of_llama_3_8b_is_the_arithmetic_of_its_shape(capsys):
    blocks = 2  # each of the 32 is as another
    config = str(ROOT / "examples" / "llm" / "8b.yaml")
    assert main(["simulate", "--world", "64x8", "--json", config, f"module.blocks={blocks}"]) == 0
    found = json.loads(capsys.readouterr().out)
    padded = 4096 * 251 * 512  # a matrix of 128256 rows, of which each of 512 ranks has as many as rank 0
    weights, tokens = blocks * BLOCK + 2 * padded + (2 * blocks + 1) * 4096, 8192
    assert found["memory"]["parameters"] == found["memory"]["gradients"] == 4 * weights / 512
    assert found["memory"]["optimizer states"] == pytest.approx(8 * weights / 512, rel=1e-4)  # and counts of steps
    assert found["flops"]["model"] == tokens * (6 * (blocks * BLOCK + READ) + 12 * blocks * 4096 * tokens)
    sizes = {one["kind"]: one["bytes"] for one in found["collectives"]}
    assert (sizes["all_gather"], sizes["reduce_scatter"]) == (2 * 2 * weights, 4 * weights)


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
        ("recv", "RuntimeError: it waits for numbers that another rank sends, and here is nobody else"),
        ("wrong", "RuntimeError: "),
    ],
    ids=["item", "nonzero", "recv", "wrong"],
)
@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
@pytest.mark.plugins
def test_a_forward_that_needs_values(plan, asks, says, plugin):
    code, found, err = plan("2", "-p", plugin, f"module.asks={asks}")
    assert code == 1
    assert f"hookline: Mine.train_step could not be simulated: {says}" in err
    assert err.count("\n") == 1
    assert ("compute it with tensors alone (torch.where, a mask)" in err) == (asks in ("item", "nonzero"))
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
    assert lines[12].split()[-7:] == ["ranks", "on", "calls", "size", "sent", "time", "exposed"]
    assert lines[13].split()[:9] == ["all_gather", "8", "between", "machines", "2", "4.25", "KiB", "3.72", "KiB"]
    assert lines[13].split()[9:] == ["0.02", "us", "0.02", "us"]
    assert [line.split()[0] for line in lines[17:21]] == ["computation", "communication", "exposed", "step"]
    assert lines[22] == ("at 989 TFLOP/s (float32 67), 450 GB/s within a machine, 50 GB/s a device between machines")
    assert re.fullmatch(r"MFU: \d+\.\d% at most", lines[23])
    assert "\nno communication\n" in plan("1", form=None)[1]
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


@pytest.mark.plugins
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_on_language_models_shows_the_plan_of_8_billion_parameters(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "language-model.md").read_text()
    (command,) = re.findall(r"^hookline (simulate .*)$", page, re.M)
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
