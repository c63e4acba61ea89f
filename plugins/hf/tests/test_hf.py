"""Models of transformers train, resume, predict and are kept, all from a configuration and without network."""

import signal
import sys
import types

import pytest
import torch
import transformers
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hookline import CallbackInterface, ModuleInterface, Trainer, hookimpl
from hookline.cli import main
from hookline.testing import TinyModule, check_plugin, digest, hand_written_loop, run_ranks
from hookline.testing.faults import PRELOADED, at_hook, kill, run
from hookline_hf import Hf, HfModule, decay_groups, make_model

PRELOADED += ["transformers.models.gpt2.modeling_gpt2", "hookline_hf"]

CLASSIFIER = "AutoModelForSequenceClassification"
GPT = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "n_positions": 16}
GPT |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BERT = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 32}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 16}


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


class Counting:
    """Texts in which each token is the one before, and one more: a model learns them quickly."""

    def __init__(self, size=40, length=8):
        self.size, self.length = size, length

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index >= self.size:
            raise IndexError(index)
        tokens = [(index + place) % 31 + 1 for place in range(self.length)]
        return {"input_ids": tokens, "labels": tokens}


class Signs(Counting):
    """Texts of several lengths, and whether their first token is small."""

    def __getitem__(self, index):
        tokens = [index * 7 % 31 + 1, *range(1, 3 + index % 4)]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": int(tokens[0] < 16)}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return HfModule(**({"model": GPT, "train_data": Counting(), "val_data": Counting(8), "lr": 1e-2} | options))


def train(module, plugins=(), **options):
    given = {"epochs": 2, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"} | options
    trainer = Trainer(module, plugins, **given)
    trainer.train()
    return trainer


def test_contract():
    check_plugin(Hf)


def test_a_model_from_a_configuration_learns_and_is_kept():
    module = make()
    trainer = train(module, [Hf()], epochs=5)
    assert trainer.metrics["val_loss"] < 2.5  # 3.4 where each of 31 tokens is as likely as any other
    kept = str(trainer.run_dir / "pretrained")
    again = make(model=kept)
    assert digest(again.model.state_dict()) == digest(module.model.state_dict())
    evaluated = Trainer(again, val_batch_size=8, device="cpu").validate()
    assert evaluated == trainer.metrics


class ByHand(ModuleInterface):
    """What `HfModule` does, written by hand for one model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def train_step(self, global_step, batch, device):
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    def get_train_dataloader(self, sampler, batch_size):
        data = Counting()
        return DataLoader(data, batch_size, sampler=sampler(data), collate_fn=transformers.default_data_collator)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        norms = [p for name, p in self.model.named_parameters() if "bias" in name or "ln_" in name]
        others = [p for name, p in self.model.named_parameters() if not ("bias" in name or "ln_" in name)]
        groups = [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        steps = steps_per_epoch * epochs
        return [optimizer], [transformers.get_cosine_schedule_with_warmup(optimizer, round(steps / 4), steps)]


class Losses(CallbackInterface):
    def __init__(self):
        self.values = []

    def on_end_train_step(self, global_step, loss):
        self.values += loss.reshape(-1).tolist()


def test_the_losses_are_those_of_a_loop_by_hand():
    ours, by_hand = make(weight_decay=0.1, warmup_ratio=0.25, scheduler="cosine"), ByHand(make().model)
    losses = Losses()
    train(ours, [losses])
    assert losses.values == hand_written_loop(by_hand)
    assert digest(ours.model.state_dict()) == digest(by_hand.model.state_dict())


def test_biases_and_norms_do_not_decay():
    model = make_model(BERT, CLASSIFIER)
    decayed, spared = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])
    assert not any("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert decay_groups(model.requires_grad_(False), 0.1) == []


def fit(name, *faults, **options):
    module = make()
    plugins = {"checkpoint": {"every": "3 steps"}, **{f"fault{number}": fault for number, fault in enumerate(faults)}}
    train(module, plugins, run_name=name, **options)
    return digest(module.state_dict())


def fit_until_killed():
    fit("cut", at_hook("on_end_backward", kill, nth=8))


@pytest.mark.plugins
def test_a_run_that_is_killed_goes_on_with_the_same_bits():
    assert run(fit_until_killed).code == -signal.SIGKILL
    assert fit("cut", resume=True) == fit("whole")


def on_a_rank(name="ranks", *faults, **options):
    torch.set_num_threads(1)
    module = make()
    given = {f"fault{number}": fault for number, fault in enumerate(faults)}
    plugins = {"ddp": {}, "hf": {}, "checkpoint": {"every": "2 steps"}, **given}
    trainer = train(module, plugins, epochs=1, run_name=name, **options)
    kept = make(model=str(trainer.run_dir / "pretrained")) if trainer.rank == 0 else module
    return digest(module.model.state_dict()), digest(kept.model.state_dict()), trainer.metrics


def on_a_rank_until_killed():
    on_a_rank("cut", at_hook("on_end_backward", kill, nth=4))


def on_a_rank_again():
    return on_a_rank("cut", resume=True)


@pytest.mark.plugins
@pytest.mark.xdist_group("ranks")
def test_two_ranks_train_one_model_and_go_on_after_a_kill():
    one, other = [outcome.value for outcome in run_ranks(on_a_rank, 2)]
    assert one == other
    assert one[0] == one[1]
    assert all(outcome.code != 0 for outcome in run_ranks(on_a_rank_until_killed, 2))
    assert [outcome.value for outcome in run_ranks(on_a_rank_again, 2)] == [one, one]


def test_texts_of_several_lengths_are_padded_and_classified(tmp_path):
    words = [f"w{number}" for number in range(31)]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(["[PAD]", *words])}, unk_token="[PAD]"))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]").save_pretrained(tmp_path / "tokens")
    config = {
        "module": {
            "_target_": "hookline_hf.HfModule",
            "model": BERT,
            "auto": CLASSIFIER,
            "tokenizer": str(tmp_path / "tokens"),
            "train_data": {"_target_": "signs_of_texts.Signs"},
            "val_data": {"_target_": "signs_of_texts.Signs"},
            "lr": 1e-2,
        },
        "trainer": {"epochs": 6, "train_batch_size": 8, "val_batch_size": 8, "device": "cpu"},
        "plugins": {"hf": {}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    sys.modules["signs_of_texts"] = types.SimpleNamespace(Signs=Signs)
    try:
        assert main(["fit", str(tmp_path / "run.yaml")]) == 0
    finally:
        del sys.modules["signs_of_texts"]
    kept = tmp_path / "runs" / "run-1" / "pretrained"
    assert AutoTokenizer.from_pretrained(kept)("w3")["input_ids"] == [4]
    again = HfModule(str(kept), CLASSIFIER, val_data=Signs(), tokenizer=str(kept))
    assert Trainer(again, val_batch_size=8, device="cpu").validate()["val_loss"] < 0.5


class Kept(CallbackInterface):
    def __init__(self):
        self.outputs = []

    @hookimpl
    def on_end_predict_step(self, outputs):
        self.outputs.append(outputs)


def test_predictions_are_generated_or_logits():
    for generate, shape in (
        (None, (4, 8, 32)),
        ({"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}, (4, 11)),
    ):
        kept = Kept()
        module = make(predict_data=Counting(8), generate=generate, collate=with_mask)
        Trainer(module, [kept], val_batch_size=4, device="cpu").predict()
        assert [tuple(outputs.shape) for outputs in kept.outputs] == [shape, shape]


def with_mask(samples):
    batch = transformers.default_data_collator(samples)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def test_blocks_are_those_that_transformers_names():
    assert [type(block).__name__ for block in make().get_blocks()] == ["GPT2Block", "GPT2Block"]


@pytest.mark.plugins
def test_adapters_are_kept_merged_or_not_at_all(caplog):
    llama = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    llama |= {"intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 16}
    module, lora = make(model=llama), {"rank": 2, "targets": ["q_proj", "down_proj"]}
    trainer = train(module, {"lora": {**lora, "export": "merged"}, "hf": {}}, epochs=1)
    tokens = torch.arange(8)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(trainer.run_dir / "pretrained").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, module.eval().model(tokens).logits)
        assert not torch.allclose(merged(tokens).logits, make(model=llama).eval().model(tokens).logits)
    assert "hf keeps nothing" not in caplog.text
    trainer = train(make(model=llama), {"lora": lora, "hf": {}}, epochs=1)
    assert "hf keeps nothing: what is exported lacks lm_head.weight" in caplog.text
    assert not (trainer.run_dir / "pretrained").exists()


# Bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"auto": "AutoModelForCausalML"}, r"AutoModelForCausalML.*did you mean .AutoModelForCausalLM."),
        ({"model": {"n_layer": 2}}, "model.model_type=None is no type of model.*; give one, such as gpt2"),
        ({"model": {"model_type": "gpt22"}}, r"model.model_type='gpt22' .*did you mean 'gpt2'"),
        ({"model": "./nowhere"}, "model='./nowhere' is no folder; `save_pretrained` writes one"),
        ({"scheduler": "lineal"}, r"scheduler='lineal' is none of transformers, did you mean 'linear'"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5 is a part of all steps, from 0 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_built(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_a_model_from_the_configuration_of_a_folder():
    make().model.save_pretrained("kept")
    module = make(1, model={"config": "kept", "n_layer": 1})
    assert len(module.model.transformer.h) == 1
    again = make(model={"config": "kept"})
    assert digest(again.model.state_dict()) == digest(make().model.state_dict())
    with torch.device("meta"), pytest.raises(ValueError, match=r"model='kept' is loaded whole.*model={config: kept}"):
        make(model="kept")


def test_no_data_and_no_labels():
    with pytest.raises(ValueError, match="train_data is not given, so there is nothing to train on"):
        train(make(train_data=None))
    unlabelled = [{"input_ids": [1, 2, 3]}] * 8
    with pytest.raises(ValueError, match="GPT2LMHeadModel gave no loss for a batch of input_ids: it needs `labels`"):
        train(make(train_data=unlabelled))


def test_a_schedule_needs_to_know_how_many_steps():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Counting()[index] for index in range(16)])

    class Streaming(HfModule):
        def get_train_dataloader(self, sampler, batch_size):
            return DataLoader(Stream(), batch_size, collate_fn=self.collate)

    with pytest.raises(ValueError, match=r"scheduler='linear' needs to know how many steps.*trainer.max_steps"):
        train(Streaming(GPT))
    assert train(Streaming(GPT, scheduler="constant"), epochs=1).global_step == 2
    assert train(Streaming(GPT), epochs=None, max_steps=3).global_step == 3
    with pytest.raises(ValueError, match="nobody knows: the loader has no length, or the time alone ends the run"):
        train(make(), epochs=None, max_time="1 h")


def test_a_module_without_a_model_of_transformers_is_told_of(caplog):
    train(TinyModule(), [Hf()])
    assert "hf has nothing to keep: a TinyModule has no `model` of transformers" in caplog.text


def test_a_schedule_ends_where_training_does_and_a_loaded_model_is_in_train_mode(tmp_path, caplog):
    class Modes(HfModule):
        def train_step(self, global_step, batch, device):
            modes.append(all(module.training for module in self.modules()))
            return super().train_step(global_step, batch, device)

    make().model.save_pretrained(tmp_path / "kept")
    modes, module = [], Modes(str(tmp_path / "kept"), train_data=Counting(), val_data=Counting(8))
    assert not module.model.training  # `from_pretrained` gives it so
    trainer = train(module, epochs=None, max_steps=7)
    assert modes == [True] * 7
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0
    assert "eval mode" not in caplog.text
