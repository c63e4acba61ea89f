"""Checkpoints of a model that ranks share: each rank writes its share, and any number of ranks reads it."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from hookline import CallbackInterface, copy_state, hookimpl
from hookline.cli import main
from hookline.testing import TinyModule, digest, on_ranks, run_ranks, tiny_trainer
from hookline.testing.faults import PRELOADED, at_file, failing, kill
from hookline.testing.ranks import Ranks
from hookline_checkpoint import CheckpointError, storage
from hookline_checkpoint.compare import differences
from hookline_checkpoint.layout import unpack
from hookline_fsdp import whole

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [__name__, "hookline_fsdp", "hookline_checkpoint.sharded", "torch.distributed.checkpoint"]

SOON = 20  # seconds in which all are gone
OTHERS = {"clip": {"max_norm": 0.05}, "ema": {"decay": 0.9}, "finite": {"every": "1 steps"}}
MODELS = {"fsdp": {"fsdp": {"wrap": ["Block"]}}, "ddp": {"ddp": {}}, "one": {}}


class Block(torch.nn.Linear):
    """A layer that is shared by itself."""


class Tied(TinyModule):
    """Without batch norm, so that two ranks do what one does, but for rounding; with weights that are tied."""

    def __init__(self, dropout=0.0, width=16):
        super().__init__(samples=48)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = Block(8, width), torch.nn.ReLU(), torch.nn.Dropout(dropout), Block(width, 8)
            self.net = torch.nn.Sequential(*layers, torch.nn.Linear(8, 1))
        self.tied = torch.nn.Linear(8, 1, bias=False)
        self.tied.weight = self.net[4].weight
        self.register_buffer("steps", torch.zeros(3))

    def train_step(self, global_step, batch, device):
        self.steps += 1
        return super().train_step(global_step, batch, device)


class Looking(CallbackInterface):
    """Notes what a run begins with, and what stays in memory of the state when it is saved."""

    @hookimpl
    def on_begin_train(self, trainer):
        self.begins = whole(copy_state(trainer.module.state_dict()))

    @hookimpl(wrapper=True)
    def get_run_state(self):
        state = yield
        self.held = sum(tensor.to_local().nbytes for tensor in shared(state))
        self.all = sum(tensor.nbytes for tensor in shared(state))
        return state


def shared(tree):
    if isinstance(tree, DTensor):
        yield tree
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from shared(value)


def train(folder, model="fsdp", checkpoint=None, others=None, dropout=0.0, fault=None, **options):
    """Train on this rank; return what it has come to. `fault` is (rank, point, action, nth) of a file operation."""
    torch.set_num_threads(1)
    looking = Looking()
    plugins = {
        **(MODELS[model] if isinstance(model, str) else model),
        "checkpoint": {"every": "1 steps", "keep_last": None, "timeout": "8 s", **(checkpoint or {})},
        "looking": looking,
        **(OTHERS if others is None else others),
    }
    trainer = tiny_trainer(plugins, Tied(dropout), train_batch_size=12, runs_folder=str(folder), **options)
    trouble = contextlib.nullcontext()
    if fault is not None and os.environ.get("RANK", "0") in fault[0]:
        trouble = at_file(Path(folder), fault[1], fault[2], fault[3])
    with trouble:
        trainer.train()
    return {
        "begins": looking.begins,
        "weights": copy_state(whole(trainer.module.state_dict())),
        "exported": copy_state(trainer.export_model()),
        "step": trainer.global_step,
        "held": looking.held,
        "all": looking.all,
    }


def on(ranks, *arguments, **keywords):
    """Train on some ranks; return what each has come to."""
    return on_ranks(train, ranks, *arguments, **keywords)


def outputs(outcomes):
    return "\n".join(f"--- rank {rank}\n{outcome.output}" for rank, outcome in enumerate(outcomes))


def checkpoints(folder):
    return storage.listed(Path(folder) / "run-1" / "checkpoints")


def at(folder, step):
    return Path(folder) / "run-1" / "checkpoints" / f"step-{step:012d}"


def weights_of(path):
    return unpack(path, 0)["module"]


assert_close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of a run of two ranks with a checkpoint at each of its 8 steps, and what it has come to."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, on(2, folder, dropout=0.3)


def test_each_rank_writes_its_share(saved):
    folder, (one, other) = saved
    path = at(folder, 8)
    about = storage.verify(path)
    assert {"shards-0000.safetensors", "shards-0001.safetensors", "shards.json"} < about["files"].keys()
    assert {file.name for file in path.iterdir()} == {*about["files"], "manifest.json"}
    heads = [storage.read_head(path, f"shards-000{rank}.safetensors") for rank in range(2)]
    names = [key for head in heads for key in head]
    begins_ends = [entry["data_offsets"] for head in heads for entry in head.values()]
    stored_once = one["all"] - one["weights"]["tied.weight"].nbytes
    assert sum(end - begin for begin, end in begins_ends) == stored_once
    assert max(one["held"], other["held"]) < 0.6 * one["all"]
    assert {*storage.read_head(path, "model.safetensors")} == {"steps"}
    assert len(names) == len(set(names)) > 2 * len(one["weights"])
    assert not [name for name in names if name.startswith("module/tied.weight")]  # it is net.4.weight
    state = unpack(path, 0)
    assert digest(state["module"]) == digest(one["weights"]) == digest(other["weights"])
    assert state["module"]["tied.weight"] is state["module"]["net.4.weight"]


def resumed(source, step, folder, ranks=2, **keywords):
    """Go on in another folder with what a run had at a step; return what each rank has come to."""
    (folder / "run-1" / "checkpoints").mkdir(parents=True)
    shutil.copytree(at(source, step), at(folder, step))
    return on(ranks, folder, resume=True, **keywords)


def assert_the_same_end(one, other):
    assert {line.partition(":")[0] for line in differences(at(one, 8), at(other, 8))} <= {"trainer.counters.seconds"}


def test_a_resume_has_the_same_bits(saved, tmp_path):
    folder, before = saved
    after = resumed(folder, 3, tmp_path, dropout=0.3)
    assert_the_same_end(folder, tmp_path)
    for rank in range(2):
        assert digest(after[rank]["begins"]) == digest(weights_of(at(folder, 3)))
        assert digest(after[rank]["exported"]) == digest(before[rank]["exported"])


def test_in_the_background_the_same_is_written(saved, tmp_path):
    folder, before = saved
    after = on(2, tmp_path, checkpoint={"asynchronous": True}, dropout=0.3)
    assert digest([rank["weights"] for rank in after]) == digest([rank["weights"] for rank in before])
    assert [path.name for path in checkpoints(tmp_path)] == [path.name for path in checkpoints(folder)]
    for step in range(1, 9):
        storage.verify(at(tmp_path, step))
        different = differences(at(folder, step), at(tmp_path, step))
        assert {line.partition(":")[0] for line in different} <= {"trainer.counters.seconds"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return folder and end of runs without dropout by model, each made once."""

    @functools.cache
    def make(model):
        folder = tmp_path_factory.mktemp(model)
        return folder, on(1 if model == "one" else 2, folder, model)

    return make


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("fsdp", "one"),
        ("one", "fsdp"),
        pytest.param("fsdp", "ddp", marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_or_another_way_to_share_goes_on(model, other, undisturbed, tmp_path):
    folder, whole_run = undisturbed(model)
    after = resumed(folder, 3, tmp_path, 1 if other == "one" else 2, model=other)
    for rank in after:
        assert digest(rank["begins"]) == digest(weights_of(at(folder, 3)))
        assert rank["step"] == 8
        assert_close(rank["weights"], whole_run[0]["weights"])
        assert_close(rank["exported"], whole_run[0]["exported"])
    if "fsdp" in (model, other) and other != "fsdp":
        assert "shards.json" not in storage.read_manifest(at(tmp_path, 8))["files"]


@pytest.mark.slow
def test_copies_of_a_sharded_model_are_stored_once(saved, tmp_path):
    """Four ranks that hold two copies write what two ranks write, and two go on with it."""
    copies = {"fsdp": {"wrap": ["Block"], "replicas": 2}}
    on(4, tmp_path, copies)
    files = storage.verify(at(tmp_path, 8))["files"]
    two = storage.verify(at(saved[0], 8))["files"]
    size, expected = (sum(f["size"] for n, f in each.items() if n.startswith("shards-0")) for each in (files, two))
    assert len([name for name in files if name.startswith("shards-0")]) == 4
    assert abs(size - expected) < 0.1 * expected
    again = tmp_path / "again"
    (four,) = {digest(rank["begins"]) for rank in resumed(tmp_path, 3, again, 4, model=copies)}
    assert four == digest(weights_of(at(tmp_path, 3)))
    assert_the_same_end(tmp_path, again)
    for rank in resumed(tmp_path, 3, tmp_path / "two"):
        assert digest(rank["begins"]) == four
        assert_close(rank["weights"], weights_of(at(tmp_path, 8)))


@pytest.mark.slow
def test_layers_that_are_split_as_well_are_stored_in_their_parts(undisturbed, tmp_path):
    """Two ranks share what two others have split; one process and two go on with it."""
    both = {"fsdp": {"wrap": ["Block"]}, "tp": {"size": 2, "plan": {"net.0": "column", "net.3": "row"}}}
    alone = undisturbed("one")[1][0]
    four = on(4, tmp_path, both)
    assert_close(weights_of(at(tmp_path, 8)), alone["weights"])
    assert digest(weights_of(at(tmp_path, 8))) == digest(four[0]["weights"])
    again = tmp_path / "again"
    stored = digest(weights_of(at(tmp_path, 3)))
    assert {digest(rank["begins"]) for rank in resumed(tmp_path, 3, again, 4, model=both)} == {stored}
    assert_the_same_end(tmp_path, again)
    for ranks, model in ((2, "fsdp"), (1, "one")):
        for rank in resumed(tmp_path, 3, tmp_path / model, ranks, model=model):
            assert digest(rank["begins"]) == stored
            assert_close(rank["weights"], alone["weights"])


# Rolling back -------------------------------------------------------------------------


class Spoiled(CallbackInterface):
    """Makes the loss of the fifth step not finite, once."""

    @hookimpl(wrapper=True)
    def scale_loss(self, trainer):
        loss = yield
        return loss * float("nan") if trainer.global_step == 4 and trainer.position == 0 else loss


def test_finite_goes_back_to_shares(tmp_path):
    others = {**OTHERS, "finite": {"policy": "rollback", "every": "2 steps"}, "spoiled": Spoiled(), "guard": {}}
    after = on(2, tmp_path / "two", others=others)
    (alone,) = on(1, tmp_path / "one", "one", others=others)
    assert digest(after[0]["weights"]) == digest(after[1]["weights"])
    assert all(tensor.isfinite().all() for tensor in after[0]["weights"].values())
    assert_close(after[0]["weights"], alone["weights"])
    assert_close(after[0]["exported"], alone["exported"])


# Faults -------------------------------------------------------------------------------


def flip(path):
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_ranks_go_back_together_where_one_finds_damage(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for step, name in ((8, "shards-0001.safetensors"), (7, "shards-0000.safetensors"), (6, "shards.json")):
        flip(at(tmp_path, step) / name)
    (at(tmp_path, 5) / "shards-0001.safetensors").unlink()
    outcomes = run_ranks(functools.partial(train, dropout=0.3, resume=True), 2, tmp_path, timeout=60)
    assert [outcome.code for outcome in outcomes] == [0, 0], outputs(outcomes)
    for outcome in outcomes:
        assert f"going back to {at(tmp_path, 4)}, because newer checkpoints are damaged" in outcome.output
        assert "rank 1: shards-0001.safetensors has not the SHA-256" in outcome.output
        assert "rank 0: shards-0000.safetensors has not the SHA-256" in outcome.output
        assert "shards.json has not the SHA-256" in outcome.output
        assert "shards-0001.safetensors cannot be read" in outcome.output
    assert_the_same_end(folder, tmp_path)


FULL = failing(OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize(
    ("rank", "point", "background"),
    [
        ("1", "write shards-0001.safetensors", False),
        ("1", "write shards-0001.safetensors", True),
        pytest.param("0", "write shards-0000.safetensors", False, marks=pytest.mark.slow),
        pytest.param("0", "write shards.json", False, marks=pytest.mark.slow),
        pytest.param("0", "write model.safetensors", False, marks=pytest.mark.slow),
        pytest.param("0", "mkdir .tmp-*", False, marks=pytest.mark.slow),
        pytest.param("0", "rename step-*", True, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_of_one_rank_is_an_error_of_all(rank, point, background, tmp_path):
    began = time.monotonic()
    keywords = {"checkpoint": {"every": "2 steps", "asynchronous": background}}
    outcomes = run_ranks(full_disk, 2, tmp_path, rank, point, keywords)
    assert time.monotonic() - began < SOON
    assert [outcome.code for outcome in outcomes] == [1, 1], outputs(outcomes)
    for outcome in outcomes:
        assert "No space left on device" in outcome.output
    assert [path.name for path in (tmp_path / "run-1" / "checkpoints").iterdir()] == [at(tmp_path, 2).name]
    storage.verify(at(tmp_path, 2))


def full_disk(folder, rank, point, keywords):
    nth = 3 if point.startswith("mkdir") else 2  # the lock's is one more
    return train(folder, fault=(rank, point, FULL, nth), **keywords)


def test_a_run_that_goes_on_without_a_checkpoint_writes_the_next(tmp_path):
    keywords = {"checkpoint": {"every": "2 steps", "on_error": "go_on"}}
    outcomes = run_ranks(full_disk, 2, tmp_path, "1", "write shards-0001.safetensors", keywords)
    assert [outcome.code for outcome in outcomes] == [0, 0], outputs(outcomes)
    for outcome in outcomes:
        assert "no checkpoint could be written: rank 1: [Errno 28] No space left on device" in outcome.output
    assert [storage.step_of(path) for path in checkpoints(tmp_path)] == [8, 6, 2]


def killed(folder, ranks, point, keywords):
    return train(folder, fault=(ranks, point, kill, 4), **keywords)


@pytest.mark.parametrize(
    ("ranks", "point", "background"),
    [
        ("1", "fsync shards-000?.safetensors", False),
        ("01", "write shards-000?.safetensors", True),
        pytest.param("0", "fsync shards-000?.safetensors", True, marks=pytest.mark.slow),
        pytest.param("0", "rename step-*", False, marks=pytest.mark.slow),
        pytest.param("0", "fsync manifest.json", True, marks=pytest.mark.slow),
        pytest.param("1", "open shards-000?.safetensors", True, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_are_killed_in_a_save_leave_whole_checkpoints(ranks, point, background, saved, tmp_path):
    keywords = {"checkpoint": {"asynchronous": background}, "dropout": 0.3}
    began = time.monotonic()
    outcomes = run_ranks(killed, 2, tmp_path, ranks, point, keywords)
    assert time.monotonic() - began < SOON
    for rank, outcome in enumerate(outcomes):
        assert outcome.code == (-signal.SIGKILL if str(rank) in ranks else 1), outputs(outcomes)
    assert [storage.step_of(path) for path in checkpoints(tmp_path)] == [3, 2, 1]
    for path in checkpoints(tmp_path):
        storage.verify(path)
    on(2, tmp_path, resume=True, **keywords)
    assert [path.name for path in (tmp_path / "run-1" / "checkpoints").iterdir() if path.name[0] == "."] == []
    assert_the_same_end(saved[0], tmp_path)


def stopped(folder, keywords):
    def stop():
        os.kill(os.getpid(), signal.SIGSTOP)

    return train(folder, fault=("1", "write shards-0001.safetensors", stop, 2), **keywords)


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_stands_still_in_a_save_is_not_waited_for_without_end(background, tmp_path):
    checkpoint = {"timeout": "3 s", "asynchronous": background}
    others = {**OTHERS, "distributed": {"timeout": "3 s"}}  # in the background, the next step meets it first
    ranks = Ranks(stopped, 2, tmp_path, {"checkpoint": checkpoint, "others": others})
    ended = ranks.children[0].wait(2 * SOON)
    assert ended.code == 1, ended.output
    ranks.children[1].signal(signal.SIGKILL)
    assert ranks.children[1].wait().code == -signal.SIGKILL
    assert [storage.step_of(path) for path in checkpoints(tmp_path)] == [1]


# One process --------------------------------------------------------------------------


def test_the_commands_read_shares_in_one_process(saved, tmp_path, capsys):
    folder, (one, _) = saved
    path = str(at(folder, 8))
    assert main(["checkpoints", "verify", path]) == 0
    assert main(["checkpoints", "list", str(folder / "run-1")]) == 0
    assert capsys.readouterr().out.count("good") == 9
    assert main(["checkpoints", "show", path]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"net\.0\.weight +float32 +16x8 +512 B", shown), shown
    assert re.search(r"tied\.weight +float32 +1x8 +0 B  is net\.4\.weight", shown)
    assert re.search(r"0\.state\.net\.0\.weight\.exp_avg +float32 +16x8", shown)
    to = tmp_path / "weights.safetensors"
    assert main(["checkpoints", "export", path, "--to", str(to)]) == 0
    exported = load_file(to)
    assert digest(exported) == digest({name: one["weights"][name] for name in exported})
    assert {*one["weights"]} - {*exported} == {"tied.weight"}
    assert main(["checkpoints", "diff", path, path]) == 0
    capsys.readouterr()
    assert main(["checkpoints", "diff", path, str(at(folder, 7)), "--section", "module"]) == 1
    assert "module.net.0.weight: 1" in capsys.readouterr().out


def rewrite(path, change):
    """Change what `shards.json` says, and have the manifest list it as what was written."""
    index = json.loads((path / "shards.json").read_text())
    change(index["module"]["net.0.weight"])
    content = json.dumps(index).encode()
    (path / "shards.json").write_bytes(content)
    body = json.loads(json.loads((path / "manifest.json").read_text())["body"])
    body["files"]["shards.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(body)
    manifest = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: about["pieces"].pop(), "shards.json lists other pieces of net.0.weight than the whole of it"),
        (lambda about: about["pieces"][0].update(offsets=[9, 0]), "shards.json lists other pieces of net.0.weight"),
        (lambda about: about["pieces"][0].update(sizes=[-8, 8]), r"shards.json lists \[-8, 8\], which is no size"),
        (lambda about: about.update(shape=[10**12, 8]), "shards.json lists other pieces of net.0.weight"),
        (lambda about: about.update(dtype="load"), "torch.load is no dtype"),
        (lambda about: about["pieces"][0].update(file="../../x"), "lists no ../../x"),
        (
            lambda about: about["pieces"][0].update(file="model.safetensors"),
            "model.safetensors has no such piece of module",
        ),
        (lambda about: about["pieces"][0].update(key="x"), "shards-0000.safetensors has no such piece of module/net"),
        (lambda about: about.pop("shape"), "cannot be understood: 'shape'"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(change, said, saved, tmp_path):
    path = tmp_path / at(saved[0], 8).name
    shutil.copytree(at(saved[0], 8), path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=said):
        unpack(path, 0)


def test_what_a_stored_tensor_is_read_into():
    trainer = tiny_trainer(module=Tied())
    ask = functools.partial(trainer.hook.allocate, trainer=trainer, shape=(16, 8), dtype=torch.float64)
    with torch.no_grad():
        trainer.module.net[0].weight.set_(torch.randn(8, 16).t())
    made = ask(path=("optimizers", 0, "state", "net.0.weight", "exp_avg"))
    assert (made.dtype, made.shape, made.stride(), made.requires_grad) == (torch.float64, (16, 8), (1, 16), False)
    for path in (("module", "net.3.weight"), ("module", "elsewhere"), ("plugins", 0, ""), ("module", "net")):
        assert ask(path=path).stride() == (8, 1)
