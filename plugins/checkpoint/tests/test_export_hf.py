"""`hookline checkpoints export --format hf`: names, fused and turned weights, files, memory, and what is refused."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hookline import ModuleInterface, Trainer
from hookline.cli import main
from hookline.testing import TinyModule
from hookline.testing.faults import at_file, failing, run

HEADS, WIDTH = 2, 8
NAMES = {
    "blocks.*.qkv": {"to": ["layers.*.q", "layers.*.k", "layers.*.v"], "sizes": [8, 4, 4]},
    ("blocks.*.gate", "blocks.*.up"): "layers.*.gate_up",
    "blocks.*.turned": {"to": "layers.*.turned", "order": [1, 0]},
    "blocks.*.rotary": {"to": "layers.*.rotary", "view": [HEADS, -1, 2, WIDTH], "order": [0, 2, 1, 3]},
    "head": "lm_head",
    "embedding": "embed",
    "steps": None,
}
SHAPES = {"qkv": (16, 8), "gate": (6, 8), "up": (6, 8), "turned": (4, 8), "rotary": (8, 8)}


class Model(TinyModule):
    """A tiny net beside weights that are laid out as other programs do not lay them out; two of them are tied."""

    names = NAMES
    files = {"tokenizer.json": "{}", "tokenizer.model": b"\x00\xff"}

    def __init__(self):
        super().__init__(samples=8)
        for name in [name for name, _ in self.named_children()]:
            delattr(self, name)
        self.blocks = torch.nn.ModuleList(
            torch.nn.ParameterDict({name: torch.randn(shape) for name, shape in SHAPES.items()}) for _ in range(2)
        )
        self.embedding = torch.nn.Parameter(torch.randn(5, WIDTH))
        self.head = self.embedding
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def train_step(self, global_step, batch, device):
        return sum(weight.square().mean() for weight in self.parameters())

    val_step = train_step

    def get_hf_format(self):
        return {"config": {"model_type": "mine", "layers": 2}, "names": self.names, "files": self.files}


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(module=None, **plugins):
    module = module or Model()
    plugins = {"checkpoint": {}, **plugins}
    Trainer(module, plugins, run_name="it", train_batch_size=4, device="cpu", evaluate_every=None).train()
    return module


def export(capsys, *words, run="it-1", to="out"):
    code = main(["checkpoints", "export", run, "--to", to, "--format", "hf", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_names_parts_and_turned_weights(capsys):
    module = train()
    assert export(capsys)[0] == 0
    state = module.state_dict()
    expected = {"embed": state["embedding"], "lm_head": state["embedding"]}
    for layer in ("0", "1"):
        block = {name: state[f"blocks.{layer}.{name}"] for name in SHAPES}
        expected |= dict(zip([f"layers.{layer}.{one}" for one in "qkv"], block["qkv"].split([8, 4, 4]), strict=True))
        expected[f"layers.{layer}.gate_up"] = torch.cat([block["gate"], block["up"]])
        expected[f"layers.{layer}.turned"] = block["turned"].T
        rows = [head * 4 + 2 * pair + part for head in range(HEADS) for part in range(2) for pair in range(2)]
        expected[f"layers.{layer}.rotary"] = block["rotary"][rows]
    written = load_file("out/model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    assert json.loads(Path("out/config.json").read_text()) == {"model_type": "mine", "layers": 2, "dtype": "float32"}
    assert (Path("out/tokenizer.json").read_text(), Path("out/tokenizer.model").read_bytes()) == ("{}", b"\x00\xff")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"
    ]  # fmt: skip


def test_shards_of_another_dtype(capsys):
    module = train()
    code, said = export(capsys, "--dtype", "bfloat16", "--max-shard-size", "300B")
    assert code == 0
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    files = {name: load_file(f"out/{name}") for name in {*index["weight_map"].values()}}
    assert len(files) > 3
    assert all(sum(one.nbytes for one in tensors.values()) <= 300 for tensors in files.values())
    loaded = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert torch.equal(loaded["embed"], module.embedding.bfloat16())
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in loaded.values())}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert f"out/{min(files)}" in said


def test_an_average_stands_for_the_weights_and_keeps_their_dtype(capsys):
    module = Model()
    module.embedding.data = module.embedding.data.bfloat16()
    train(module, ema={"decay": 0.5})
    assert export(capsys, "--average", "ema")[0] == 0
    averages = load_file("runs/it-1/checkpoints/step-000000000002/state.safetensors")
    written = load_file("out/model.safetensors")
    average = averages["plugins.ema.average.embedding"]
    assert average.dtype is torch.float32
    assert not torch.equal(average.bfloat16(), module.embedding)
    assert torch.equal(written["embed"], average.bfloat16())
    assert torch.equal(written["lm_head"], average.bfloat16())
    assert main(["checkpoints", "export", "it-1", "--to", "it.pt", "--format", "torch", "--average", "ema"]) == 0
    state = torch.load("it.pt", weights_only=True)
    assert state["head"].data_ptr() == state["embedding"].data_ptr()
    assert torch.equal(state["head"], average.bfloat16())
    code, said = export(capsys, "--average", "swa", to="other")
    assert code == 2
    assert "--average=swa: no such plugin keeps an average of the weights in this checkpoint; ema does" in said


def test_an_average_has_no_statistics_of_batch_norm(capsys):
    class Norm(TinyModule):
        def get_hf_format(self):
            return {"config": {}}

    train(Norm(), ema={"decay": 0.5})
    code, said = export(capsys, "--average", "ema")
    assert (code, "has statistics of the trained weights" in said and "`hookline export` evaluates" in said) == (
        2,
        True,
    )


# Places -------------------------------------------------------------------------------


def test_a_folder_appears_whole_and_is_replaced_only_when_told(capsys):
    train()
    assert export(capsys)[0] == 0
    before = Path("out/model.safetensors").read_bytes()
    code, said = export(capsys, "--max-shard-size", "300B")
    assert (code, "is there already; name another place, or say --force" in said) == (2, True), said
    full = failing(OSError(28, "No space left on device"))
    with at_file(Path("."), "write *.safetensors*", full, nth=4):
        code, said = export(capsys, "--max-shard-size", "300B", "--force")
    assert (code, "No space left" in said) == (2, True), said
    assert Path("out/model.safetensors").read_bytes() == before
    assert {path.name for path in Path.cwd().iterdir()} == {"out", "runs"}
    assert export(capsys, "--max-shard-size", "300B", "--force")[0] == 0
    assert not Path("out/model.safetensors").exists()
    Path("out/notes.txt").write_text("mine")
    code, said = export(capsys, "--force")
    assert (code, "--to=out holds notes.txt, which no export has written; name another folder" in said) == (2, True)
    Path("file").write_text("")
    assert "--to=file is a file; --format hf writes a folder" in export(capsys, to="file")[1]


def test_damage_is_found_before_anything_is_written(capsys):
    train()
    file = Path("runs/it-1/checkpoints/step-000000000002/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, said = export(capsys, run=str(file.parent))
    assert (code, "model.safetensors has not the SHA-256 that it was written with" in said) == (2, True), said
    assert not Path("out").exists()


# What a module says -------------------------------------------------------------------


def renamed(**names):
    return type("Model", (Model,), {"names": {**NAMES, **names}})


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (TinyModule, r"does not say how its weights are called.*the module had no get_hf_format\(\).*--format safeten"),
        (type("Model", (Model,), {"names": {"head": "lm_head"}}),
         r"get_hf_format\(\) of the module has no name for embedding; nearest is 'head': give it one, or None"),
        (renamed(head="embed"), r"embedding and head would both be embed: correct get_hf_format\(\)"),
        (renamed(other="more"), r"names other, and the checkpoint does not have it \(1 in all\): it does not hold the"),
        (renamed(**{"blocks.*.qkv": {"to": ["q.*", "k.*"], "sizes": [8, 4]}}),
         r"does not fit blocks.0.qkv \[16, 8\], of which q.0 is to be made: .* has 16 in dimension 0, and the parts "
         r"are \[8, 4\]"),
    ],
)  # fmt: skip
def test_formats_that_do_not_fit_the_checkpoint(module, said, capsys):
    train(module())
    code, heard = export(capsys)
    assert code == 2
    assert re.search(said, heard), heard
    assert not Path("out").exists()


def says(**given):
    return type("Model", (Model,), {"get_hf_format": lambda self: given})


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (says(names={}), r"Model.get_hf_format\(\) must return a mapping with `config`, and perhaps `names` and"),
        (says(config={}, tokens=1), "must return a mapping with `config`"),
        (says(config={"dtype": torch.float32}), "`config` is what config.json holds, plain data: .*dtype"),
        (says(config={}, files={"../x": ""}), "texts or bytes by plain file names, and '../x' is not"),
        (says(config={}, names={"a.*": "b"}), r"'a.\*' and 'b' must have equally many \*"),
        (says(config={}, names={("a", "b"): ["c", "d"]}), "are several tensors, so they become one, and .* is not one"),
        (says(config={}, names={"a": {"to": "b", "dims": 1}}), "'a' has dims; there are to, dim, sizes, view, order"),
        (says(config={}, names={"a": {"to": "b", "view": [1]}}), "has `view` without `order`, which changes nothing"),
        (says(config={}, names={"a": 3}), "3 is no name and no tuple or list of names"),
    ],
)
def test_formats_that_cannot_be_are_refused_before_the_first_step(module, said):
    with pytest.raises(ValueError, match=said):
        train(module())


# Memory -------------------------------------------------------------------------------

LARGE, TENSORS = 2**20, 48  # numbers in each of so many


class Wide(Model):
    names = {"*": "*"}

    def __init__(self):
        ModuleInterface.__init__(self)
        self.data = torch.zeros(8, 1)
        self.weights = torch.nn.ParameterList([torch.full([LARGE], float(number)) for number in range(TENSORS)])

    def get_train_dataloader(self, sampler, batch_size):
        return torch.utils.data.DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), lr=0.0)], []


def peak_of(words):
    """Return by how many bytes this process grew at most while a command ran, beside the code that it needs."""
    assert main(["checkpoints", "export", "it-1", "--to", "small/", *words]) == 0

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    assert main(["checkpoints", "export", "it-2", "--to", "large/", *words]) == 0
    return status("VmHWM") - before


def test_the_memory_of_an_export_is_that_of_some_tensors():
    train()
    train(Wide())
    peak = run(functools.partial(peak_of, ["--format", "hf", "--max-shard-size", "16MB"])).value
    written = list(Path("large").glob("model-*.safetensors"))
    assert len(written) == 16
    assert all(torch.equal(load_file(path)[f"weights.{int(path.name[6:11]) * 3 - 1}"],
                           torch.full([LARGE], int(path.name[6:11]) * 3 - 1.0)) for path in written)  # fmt: skip
    assert peak < 64 * 10**6 < TENSORS * LARGE * 4 / 3
