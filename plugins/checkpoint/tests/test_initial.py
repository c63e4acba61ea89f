"""`checkpoint.initial`: a run begins with the weights of a folder in Hugging Face's format, or says why it does not."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hookline import ModuleInterface, Trainer
from hookline.cli import main
from hookline.testing import digest, on_ranks
from hookline.testing.faults import PRELOADED

PRELOADED += [__name__, "hookline_fsdp", "hookline_checkpoint.sharded", "torch.distributed.checkpoint"]
HEADS, WIDTH = 2, 8
NAMES = {
    "blocks.*.qkv": {"to": ["layers.*.q", "layers.*.k", "layers.*.v"], "sizes": [8, 4, 4]},
    ("blocks.*.gate", "blocks.*.up"): "layers.*.gate_up",
    "blocks.*.turned": {"to": "layers.*.turned", "order": [1, 0]},
    "blocks.*.rotary": {"to": "layers.*.rotary", "view": [HEADS, -1, 2, WIDTH], "order": [1, 2, 0, 3]},
    "head": "lm_head",
    "embedding": "embed",
    "steps": None,
}
SHAPES = {"qkv": (16, 8), "gate": (6, 8), "up": (4, 8), "turned": (4, 8), "rotary": (8, 8)}


class Model(ModuleInterface):
    """Weights that are laid out as other programs do not lay them out; two of them are tied."""

    names = NAMES
    lr = 0.01

    def __init__(self, seed=0):
        super().__init__()
        self.data = torch.zeros(8, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(seed)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ParameterDict({name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()})
            for _ in range(2)
        )
        self.embedding = torch.nn.Parameter(torch.randn(5, WIDTH, generator=generator))
        self.head = self.embedding

    def train_step(self, global_step, batch, device):
        return sum(weight.square().mean() for weight in self.parameters())

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return torch.utils.data.DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), self.lr)], []

    def get_hf_format(self):
        return {"config": {"model_type": "mine"}, "names": self.names}


class Plain(Model):
    """Its names are those of the files."""

    get_hf_format = property()  # hides it


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(module, initial=None, resume=False, strict=True, lr=0.01, **plugins):
    module.lr = lr
    given = {"every": "1 step", "initial": initial, "initial_strict": strict}
    plugins = {"checkpoint": given, **plugins}
    options = {"run_name": "it", "train_batch_size": 4, "val_batch_size": 4, "device": "cpu", "evaluate_every": None}
    trainer = Trainer(module, plugins, resume=resume, **options)
    trainer.train()
    return trainer


@pytest.fixture
def folder():
    """Return a folder that was exported from a run, and the weights that this run ended with."""
    module = Model(1)
    train(module)
    assert main(["checkpoints", "export", "it-1", "--to", "out", "--format", "hf", "--max-shard-size", "300B"]) == 0
    return {name: weight for name, weight in module.state_dict().items() if name != "steps"}


def weights_of(module):
    return {name: weight for name, weight in module.state_dict().items() if name != "steps"}


class Looking(Model):
    """Keeps the weights of its first step."""

    def train_step(self, global_step, batch, device):
        if not hasattr(self, "first"):
            self.first = digest(weights_of(self))
        return super().train_step(global_step, batch, device)

    val_step = train_step


def test_what_was_exported_is_what_a_run_begins_with(folder, caplog):
    module = Looking(2)
    with caplog.at_level(logging.INFO, "hookline"):
        train(module, "out")
    assert module.first == digest(folder)
    assert digest(weights_of(module)) != digest(folder)
    assert "begins with the weights of out" in caplog.text
    evaluated = Looking(2)
    Trainer(evaluated, {"checkpoint": {"initial": "out"}}, val_batch_size=4, device="cpu").validate()
    assert evaluated.first == digest(folder)


def test_a_run_that_is_resumed_goes_on_with_its_own(folder):
    first = Looking(2)
    train(first, "out", lr=0.1)
    again = Looking(3)
    Path("out/config.json").unlink()
    trainer = train(again, "nowhere", resume="it-2")
    assert trainer.global_step == 2
    assert digest(weights_of(again)) == digest(weights_of(first))


def begin_shared():
    torch.set_num_threads(1)
    trainer = train(Model(2), "out", lr=0.0, fsdp={})
    weights = trainer.export_model()
    weights.pop("steps")
    return digest(weights)


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_ranks_take_their_shares_of_parts_and_of_turned_weights(folder):
    assert on_ranks(begin_shared, 2) == [digest(folder)] * 2


# What is refused ----------------------------------------------------------------------


def changed(change):
    """Write a folder of one file with the names of the module, changed."""
    Path("in").mkdir()
    tensors = dict(Plain(1).state_dict())
    del tensors["head"]  # tied
    change(tensors)
    save_file(tensors, "in/model.safetensors")


def lacking(tensors):
    tensors["embeding"] = tensors.pop("embedding")


def shaped(tensors):
    tensors["embedding"] = torch.zeros(6, WIDTH)


def counted(tensors):
    tensors["embedding"] = torch.zeros(5, WIDTH, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lacking, r"checkpoint.initial='in': it lacks embedding, head of the module \(near embedding: embeding\); it "
                  r"has embeding, which the module does not have; checkpoint.initial_strict=false warns of that"),
        (shaped, r"embedding is \[6, 8\] and embedding of the module \[5, 8\]"),
        (counted, r"embedding is torch.int64 and embedding of the module torch.float32"),
    ],
)  # fmt: skip
def test_weights_that_are_not_those_of_the_module(change, said):
    changed(change)
    with pytest.raises(ValueError, match=said):
        train(Plain(), "in")


def test_what_is_lacking_stays_as_it_is_where_that_is_said(caplog):
    changed(lacking)
    module = Plain(2)
    train(module, "in", strict=False, lr=0.0)
    assert torch.equal(module.embedding, Plain(2).embedding)
    assert torch.equal(module.blocks[0]["qkv"], Plain(1).blocks[0]["qkv"])
    assert "checkpoint.initial='in': it lacks embedding, head of the module (near embedding: embeding)" in caplog.text


def test_of_tied_weights_one_is_enough_and_rounding_is_told(caplog):
    changed(lambda tensors: tensors.update(embedding=tensors["embedding"].double()))
    module = Plain(2)
    train(module, "in/model.safetensors", lr=0.0)
    assert torch.equal(module.head, Plain(1).embedding)
    assert "rounded: embedding (float64 to float32)" in caplog.text
    assert caplog.text.count("checkpoint.initial=") == 1


def short(name):
    path = Path(name)
    path.write_bytes(path.read_bytes()[:-8])


def spoil(how):
    index = Path("out/model.safetensors.index.json")
    where = json.loads(index.read_text())
    if how == "a file":
        Path("out/model-00002-of-00012.safetensors").unlink()
    elif how == "a tensor":
        where["weight_map"]["more"] = "model-00001-of-00012.safetensors"
        index.write_text(json.dumps(where))
    elif how == "above":
        where["weight_map"]["embed"] = "../x.safetensors"
        index.write_text(json.dumps(where))
    elif how == "an index":
        index.write_text("[]")
    elif how == "an end":
        short("out/model-00002-of-00012.safetensors")
    elif how == "twice":
        embed = load_file(f"out/{where['weight_map']['embed']}")["embed"]
        other = next(file for file in where["weight_map"].values() if file != where["weight_map"]["embed"])
        save_file({**load_file(f"out/{other}"), "embed": embed}, f"out/{other}")
    elif how == "a pickle":
        for path in Path("out").iterdir():
            path.unlink()
        torch.save({}, "out/pytorch_model.bin")
    elif how == "nothing":
        for path in Path("out").glob("model*"):
            path.unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a file", r"model.safetensors.index.json lists model-00002-of-00012.safetensors, which the folder does not"),
        ("a tensor", r"index.json lists more, and model-00001-of-00012.safetensors has no such tensor"),
        ("above", r"index.json lists ../x.safetensors, which the folder does not have"),
        ("an index", r"out/model.safetensors.index.json cannot be understood: "),
        ("an end", r"model-00002-of-00012.safetensors: .* is not where the head says; the file is damaged"),
        ("twice", r"out: embed stands in two files"),
        ("a pickle", r"out holds pytorch_model.bin, a pickle, .*`hookline checkpoints import out/pytorch_model.bin --"
                     r"to out/model.safetensors` writes it as safetensors"),
        ("nothing", r"out has neither model.safetensors nor model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_read(how, said, folder):
    spoil(how)
    with pytest.raises(ValueError, match=f"checkpoint.initial='out': .*{said}"):
        train(Model(), "out")


def test_a_folder_that_is_not_there():
    with pytest.raises(ValueError, match="checkpoint.initial='nowhere': there is no folder or file nowhere"):
        train(Model(), "nowhere")


def test_names_that_do_not_fit_the_module(folder):
    class Other(Model):
        names = {key: there for key, there in NAMES.items() if key != "embedding"}

    with pytest.raises(ValueError, match=r"get_hf_format\(\) of the module has no name for embedding"):
        train(Other(), "out")

    class Turned(Model):
        names = NAMES | {"blocks.*.turned": {"to": "layers.*.turned", "order": [1, 0, 2]}}

    with pytest.raises(ValueError, match=r"get_hf_format\(\) does not fit layers.0.turned, of which blocks.0"):
        train(Turned(), "out")
