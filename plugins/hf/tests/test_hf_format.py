"""Models of transformers go from checkpoints of any layout into Hugging Face's format and back, bit by bit."""

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers

from hookline import Trainer
from hookline.cli import main
from hookline.testing import digest, on_ranks
from hookline.testing.faults import PRELOADED
from hookline_hf import HfModule

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("ranks")]
PRELOADED += [
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama", "hookline_hf",
    "hookline_fsdp", "hookline_tp", "hookline_checkpoint.sharded", "torch.distributed.checkpoint",
]  # fmt: skip

GPT = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
GPT |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA |= {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 16}
PLAN = {f"model.model.layers.*.self_attn.{name}_proj": "column" for name in "qkv"}
PLAN |= {"model.model.layers.*.self_attn.o_proj": "row", "model.model.layers.*.mlp.down_proj": "row"}
PLAN |= {f"model.model.layers.*.mlp.{name}_proj": "column" for name in ("gate", "up")}
LAYOUTS = {
    "llama-fsdp": (LLAMA, {"fsdp": {}}),
    "llama-tp": (LLAMA, {"tp": {"size": 2, "plan": PLAN}}),
    "gpt2-fsdp": (GPT, {"fsdp": {}, "ema": {"decay": 0.5}}),  # tied: the embedding is the head
    "gpt2-ddp": (GPT, {"ddp": {}}),
}
BEGUN = {
    "meta": {"fsdp": {"meta": True}},
    "tp": {"tp": {"size": 2, "plan": PLAN}},
    "both": {"tp": {"size": 2, "plan": PLAN}, "fsdp": {}},
    "ddp": {"ddp": {}},
}
TOKENS = torch.arange(20).reshape(2, 10) % 32


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = [(index + place) % 31 + 1 for place in range(8)]
        return {"input_ids": tokens, "labels": tokens}


def train(name, model, plugins, **options):
    """Train two steps; return the weights that are trained, the average if there is one, and the logits of both."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = HfModule(model, train_data=Counting(), lr=1e-2)
    plugins = {**plugins, "checkpoint": {}}
    trainer = Trainer(module, plugins, run_name=name, train_batch_size=4, device="cpu", epochs=1, **options)
    trainer.train()
    exported = {name: weight.clone() for name, weight in trainer.export_model().items()}
    return exported, logits_of(model, exported)


def on_a_rank():
    return {name: train(name, *LAYOUTS[name]) for name in LAYOUTS}, {name: begin(name) for name in BEGUN}


def begin(name):
    """Begin with a folder in some layout, on other weights; return those that it has then."""
    torch.manual_seed(1)
    make = functools.partial(HfModule, {"config": "folder"}, train_data=Counting(), lr=0.0)
    plugins = {**BEGUN[name], "checkpoint": {"every": None, "initial": "folder"}}
    trainer = Trainer(make, plugins, run_name=f"begun-{name}", train_batch_size=4, device="cpu", max_steps=1)
    trainer.train()
    return digest(trainer.export_model())


@torch.no_grad()
def logits_of(model, weights):
    module = HfModule(model)
    module.load_state_dict(weights)
    return module.eval().model(TOKENS).logits


def command(capsys, *words):
    code = main(["checkpoints", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_two_ranks_that_share_in_any_way_give_the_same_logits_and_begin_with_the_same_weights(capsys):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    model.save_pretrained("folder", max_shard_size="6KB")
    expected = digest({f"model.{name}": tensor for name, tensor in model.state_dict().items()})
    (trained, begun), (_, other) = on_ranks(on_a_rank, 2)
    assert begun == other == dict.fromkeys(BEGUN, expected)
    for name, (weights, logits) in trained.items():
        average = ["--average", "ema"] if name == "gpt2-fsdp" else []
        code, said = command(capsys, "export", f"{name}-1", "--to", f"out/{name}", "--format", "hf", *average,
                             "--max-shard-size", "6kB")  # fmt: skip
        assert code == 0, said
        loaded, about = transformers.AutoModelForCausalLM.from_pretrained(f"out/{name}", output_loading_info=True)
        assert not any(about.values()), about
        with torch.no_grad():
            assert torch.equal(loaded.eval()(TOKENS).logits, logits), name
        assert digest({f"model.{name}": one for name, one in loaded.state_dict().items()}) == digest(weights)
        written = sorted(path.name for path in Path(f"out/{name}").iterdir())
        index = json.loads(Path(f"out/{name}/model.safetensors.index.json").read_text())
        assert len({*index["weight_map"].values()}) == sum("-of-" in file for file in written) > 3
        assert {"config.json", "generation_config.json"} < set(written)
