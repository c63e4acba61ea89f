import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hookline.cli import main
from hookline.testing import TinyModule, digest, on_ranks, tiny_trainer
from hookline_export import Export

onnxruntime = pytest.importorskip("onnxruntime")


class Several(TinyModule):
    """Has a net of two inputs, in batches by name, and a method."""

    def __init__(self):
        super().__init__()
        self.pair = torch.nn.Bilinear(8, 8, 2)

    def scores(self, inputs, scale):
        return {"scores": self.net(inputs) * scale, "pair": self.pair(inputs, inputs)}

    def get_predict_dataloaders(self, sampler, batch_size):
        return {"first": [{"x": self.inputs[:1], "y": self.inputs[1:2], "scale": self.targets[:1]}]}


class Random(TinyModule):
    """Draws at random, so that no export computes the same."""

    def __init__(self):
        super().__init__()
        self.noise = Noise()


class Noise(torch.nn.Module):
    def forward(self, inputs):
        return inputs + torch.rand_like(inputs)


def train(export, module=None, **options):
    trainer = tiny_trainer([export], module, **options)
    trainer.train()
    return trainer, trainer.run_dir / "export"


def expected(trainer, rows):
    net = trainer.module.net.eval()
    with torch.no_grad():
        return net(rows)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be where files may be made."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("samples", [1, 5, 50])
def test_a_graph_of_torch_computes_what_the_net_does(samples):
    trainer, folder = train(Export())
    assert {path.name for path in folder.iterdir()} == {"model.pt2", "README.md"}
    rows = trainer.module.inputs[:samples]
    torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(rows), expected(trainer, rows))


def test_onnx_computes_what_the_net_does():
    trainer, folder = train(Export(["onnx", "safetensors"]))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    for rows in (trainer.module.inputs[:1], trainer.module.inputs):
        (got,) = session.run(None, {given.name: rows.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected(trainer, rows), rtol=1e-4, atol=1e-5)
    assert digest(load_file(folder / "model.safetensors")) == digest(dict(trainer.module.net.state_dict()))


def test_several_inputs_by_name_and_a_batch_of_one_sample():
    trainer, folder = train(Export("pt2", "pair", ["x", "y"], folder="elsewhere"), Several())
    assert not folder.exists()
    rows = trainer.module.inputs
    got = torch.export.load("elsewhere/model.pt2").module()(rows, rows)
    torch.testing.assert_close(got, trainer.module.pair(rows, rows))
    trainer, _ = train(Export("pt2", "pair", {"input2": "x", "input1": "y"}, folder="elsewhere"), Several())
    got = torch.export.load("elsewhere/model.pt2").module()(input1=rows, input2=rows)
    torch.testing.assert_close(got, trainer.module.pair(rows, rows))


def test_a_method_and_given_inputs():
    inputs = {"inputs": torch.ones(3, 8), "scale": torch.ones(3, 1)}
    trainer, folder = train(Export("pt2", "scores", inputs, dynamic_batch=False), Several())
    got = torch.export.load(folder / "model.pt2").module()(**inputs)
    trainer.module.eval()
    torch.testing.assert_close(got, trainer.module.scores(**inputs))


@pytest.mark.plugins
def test_the_average_is_exported():
    trainer = tiny_trainer({"export": {"to": ["pt2", "safetensors"]}, "ema": {"decay": 0.5}})
    trainer.train()
    weights = load_file(trainer.run_dir / "export" / "model.safetensors")
    averaged = {name.removeprefix("net."): one for name, one in trainer.export_model().items()}
    assert digest(weights) == digest(averaged) != digest(dict(trainer.module.net.state_dict()))
    trainer.module.net.load_state_dict(averaged)
    rows = trainer.module.inputs
    got = torch.export.load(trainer.run_dir / "export" / "model.pt2").module()(rows)
    torch.testing.assert_close(got, expected(trainer, rows))


def test_training_and_the_random_states_after_it_stay_the_same():
    draws = []
    for plugins in ([], [Export()]):
        trainer = tiny_trainer(plugins)
        trainer.train()
        draws.append((digest(trainer.module.state_dict()), trainer.validate(), trainer.module.training))
    assert draws[0] == draws[1]


def test_the_card_tells_where_the_net_comes_from():
    trainer, folder = train(Export("safetensors"), run_name="mine")
    card = (folder / "README.md").read_text()
    assert card.startswith("# mine\n")
    assert "| trained for | 14 steps, 2 epochs, 100 samples |" in card
    assert f"| val_loss | {trainer.metrics['val_loss']} |" in card
    assert f"| torch version | {torch.__version__} |" in card
    assert "train_batch_size: 8" in card


# The command --------------------------------------------------------------------------

YAML = """
module: {_target_: hookline.testing.TinyModule}
trainer: {epochs: 1, train_batch_size: 8, val_batch_size: 8, device: cpu, run_name: mine}
plugins: {checkpoint: {}}
"""


@pytest.mark.plugins
def test_the_command_exports_the_newest_checkpoint(capsys):
    Path("run.yaml").write_text(YAML)
    assert main(["export", "run.yaml"]) == 2
    assert "there is no run 'mine' in runs to resume" in capsys.readouterr().err
    assert main(["fit", "run.yaml", "-q"]) == 0
    assert main(["export", "run.yaml", "-p", "no:checkpoint"]) == 2
    assert capsys.readouterr().err.endswith(
        "nobody reads the weights of a run: name the plugin that does, e.g. `-p checkpoint`\n"
    )
    (checkpoint,) = Path("runs/mine-1/checkpoints").glob("step-*")
    trained = {name.removeprefix("net."): one for name, one in load_file(checkpoint / "model.safetensors").items()}
    for what in ("run.yaml", "runs/mine-1"):
        assert main(["export", what, "--to", "pt2", "--to", "safetensors", "plugins.export.module=net"]) == 0
        assert capsys.readouterr().out == "runs/mine-1/export\n"
        folder = Path("runs/mine-1/export")
        assert digest(load_file(folder / "model.safetensors")) == digest(trained)
        assert "| trained for | 7 steps, 1 epochs, 50 samples |" in (folder / "README.md").read_text()
        assert "| val_loss | " in (folder / "README.md").read_text()
        (folder / "model.safetensors").unlink()


# Ranks --------------------------------------------------------------------------------


def train_sharded(to):
    trainer = tiny_trainer(
        {"fsdp": {"wrap": ["Linear"]}, "checkpoint": {}, "export": {"to": to}}, TinyModule(samples=48)
    )
    try:
        trainer.train()
    except ValueError as error:
        return str(error)
    if trainer.rank == 0:
        weights = load_file(trainer.run_dir / "export" / "model.safetensors")
        return {name: tuple(one.shape) for name, one in weights.items()}
    return None


def train_sharded_twice():
    return train_sharded("pt2"), train_sharded("safetensors")


@pytest.mark.plugins
def test_shared_weights_are_exported_whole_and_no_graph_is_made_of_parts():
    for rank, (refused, shapes) in enumerate(on_ranks(train_sharded_twice, 2)):
        assert refused.startswith("export.to=pt2: ranks have parts of the weights of 'net', so no graph")
        assert rank or shapes == {name: tuple(one.shape) for name, one in TinyModule().net.state_dict().items()}


# What is refused ----------------------------------------------------------------------


def test_an_export_that_computes_something_else_is_refused_and_the_old_one_stays():
    _, folder = train(Export("safetensors"))
    before = (folder / "README.md").read_bytes()
    with pytest.raises(ValueError, match="export.to=pt2: the exported net computes something else than the net, by "):
        train(Export(module="noise", folder=str(folder)), Random())
    assert (folder / "README.md").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onx"}, "export.to='onx' must be one of pt2, onnx, safetensors, did you mean"),
        ({"to": []}, "export.to=[] exports nothing: name some of pt2, onnx, safetensors"),
        ({"inputs": "x"}, "export.inputs='x' must be a list of indices or keys of a batch, such as [0]"),
        ({"inputs": []}, "export.inputs=[] must be a list of indices or keys"),
        (
            {"module": "nett"},
            "export.module='nett' is neither a submodule nor a method of Several, did you mean 'net'",
        ),
        (
            {"module": "net.9"},
            "export.module='net.9' is neither a submodule nor a method of Several, did you mean",
        ),
        ({"inputs": ["z"]}, "export.inputs=['z'] does not tell which inputs 'net' takes of a predict batch (keys x, y"),
        ({}, "export.inputs=None does not tell which inputs 'net' takes of a predict batch (keys x, y, scale): list"),
        ({"inputs": {"input": "z"}}, "export.inputs={'input': 'z'} does not tell which inputs 'net' takes"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(Export(**options), Several())
