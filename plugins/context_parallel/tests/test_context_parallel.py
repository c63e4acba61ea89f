"""Ranks over gloo that share sequences, against one process."""

import functools
import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.cli import main
from hookline.testing import assert_one_model, digest, on_ranks, tiny_trainer, train_tiny

pytestmark = pytest.mark.xdist_group("ranks")

SAMPLES, LENGTH, WORDS, WIDTH, HEADS = 24, 32, 16, 16, 4  # as many words as positions of a half


class Rotary(nn.Module):
    def __init__(self, features):
        super().__init__()
        angles = torch.outer(torch.arange(2.0 * LENGTH), 100.0 ** -torch.linspace(0, 1, features // 2))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns[: x.shape[-2]]).flatten(-2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query, self.key, self.value, self.merge = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.rotary = Rotary(WIDTH // HEADS)
        self.up, self.down, self.causal = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), causal

    def forward(self, x):
        seen = self.norms[0](x)
        layers = self.query, self.key, self.value
        query, key, value = (layer(seen).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in layers)
        seen = F.scaled_dot_product_attention(self.rotary(query), self.rotary(key), value, is_causal=self.causal)
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Texts(Dataset):
    """Random words with their places and the next word; of sample `i`, the last `i` labels do not count."""

    def __init__(self, length, ragged):
        self.words = torch.randint(WORDS, (SAMPLES, length + 1), generator=torch.Generator().manual_seed(1))
        self.labels = self.words[:, 1:].clone()
        for place in range(1, SAMPLES if ragged else 0):
            self.labels[place, -place:] = -100

    def __len__(self):
        return SAMPLES

    def __getitem__(self, place):
        words = self.words[place, :-1]
        return {"words": words, "places": torch.arange(len(words)), "labels": self.labels[place]}


class Transformer(ModuleInterface):
    """Learns the next word of a sequence, and says how well."""

    def __init__(self, causal=True, ragged=False, length=LENGTH, wrong="", tokens=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(2 * LENGTH, WIDTH)
            self.blocks = nn.Sequential(Block(causal), Block(causal))
            self.read = nn.Linear(WIDTH, WORDS, bias=False)
        self.data, self.wrong = Texts(length, ragged), wrong
        if not tokens:
            self.get_weight = None

    def forward_words(self, batch):
        words, places = batch["words"], batch["places"]
        if self.wrong == "counted":
            places = torch.arange(words.shape[1]).expand_as(words)
        return self.read(self.blocks(self.embed(words) + self.place(places)))

    def train_step(self, global_step, batch, device):
        logits, labels = self.forward_words(batch), batch["labels"]
        if self.wrong == "shifted":
            logits, labels = logits[:, :-1], batch["words"][:, 1:]
        if self.wrong == "cut":
            return self.train_step_of({name: some[:, :-1] for name, some in batch.items()})
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        counts = (labels != -100).sum()
        self.log(counts=counts, reduce="sum", sync=True)
        self.log(right=(logits.argmax(-1) == labels).sum() / counts, sync=True)
        self.log(peak=logits.detach().max(), reduce="max", sync=True)
        self.log(square=logits.detach().square().mean(), sync=True, weighted_by=labels.numel())
        return loss, logits.flatten(0, 1), labels

    def train_step_of(self, batch):
        return F.cross_entropy(self.forward_words(batch).flatten(0, 1), batch["labels"].flatten())

    val_step = train_step

    def predict_step(self, global_step, batch, device):
        return {"logits": self.forward_words(batch), "words": batch["words"]}

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_predict_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)], []

    @hookimpl
    def get_weight(self, batch):
        return (batch["labels"] != -100).sum()


BATCH = {"words": 1, "places": 1, "labels": 1}
BUFFERS = {f"blocks.{place}.rotary.turns": 0 for place in range(2)}


class Told(CallbackInterface):
    """Keeps what is logged, and the outputs of the last step and the last validation."""

    def __init__(self):
        self.rows = []

    def on_end_train_step(self, global_step, *outputs):
        self.trained = outputs

    def on_end_val_epoch(self, global_step, *outputs):
        self.validated = outputs

    @hookimpl
    def on_log(self, metrics, global_step):
        self.rows.append({"step": global_step, **metrics})


def look(trainer):
    told = trainer.plugins.get_plugin("told")
    in_order = [trainer.predict(collect=True), told.validated[2]]  # of flat ones several shares would be mixed
    return in_order, [told.trained, told.validated[1]] if trainer.shares == 1 else None, told.rows


def train(module, others, parts={}, **options):  # noqa: B006
    """Train with a context, `parts` its options, or without where `parts` is false."""
    options, more = {}, options
    own = {"context_parallel": {"batch": BATCH, "buffers": BUFFERS, **parts}} if parts is not False else {}
    module = functools.partial(Transformer, **module)
    return train_tiny({"told": Told(), **own, **others}, module, look=look, log_every="1 steps", **more)


def train_all(cases):
    return [train(*case[:3], **dict(case[3:])) for case in cases]


def assert_alike(ranks, alone):
    assert_one_model(ranks, alone, rtol=1e-4, atol=2e-6, rtol_of_metrics=2e-6)
    for one in ranks:
        for own, other in zip(one.looked[:2], alone.looked[:2], strict=True):
            if own is not None:
                torch.testing.assert_close(own, other, rtol=1e-4, atol=2e-5)
    told, wanted = ranks[0].looked[2], alone.looked[2]
    assert len(told) == len(wanted)
    for own, other in zip(told, wanted, strict=True):
        assert own == pytest.approx(other, rel=1e-5, abs=1e-6)


RAGGED = {"ragged": True}
TENSOR = {f"blocks.*.{name}": "column" for name in ("query", "key", "value", "up")}
TENSOR |= {"blocks.*.merge": "row", "blocks.*.down": "row"}
ON_TWO = {
    "ddp": (RAGGED, {"ddp": {}}, {}),
    "attention to all": ({"causal": False}, {"ddp": {}}, {"balance": False, "rotate": "alltoall"}),
    "fsdp": (RAGGED, {"fsdp": {"wrap": ["Block"]}, "accumulate": {"steps": 2}}, {"rotate": "alltoall"}),
    "recomputed": ({}, {"ddp": {}, "activation_checkpoint": {"wrap": ["Block"]}, "clip": {"max_norm": 0.1}}, {}),
}
ON_FOUR = {
    "ddp over two": (RAGGED, {"ddp": {}}, {"size": 2}),
    "fsdp over two": (RAGGED, {"fsdp": {}, "clip": {"max_norm": 0.1}}, {"size": 2, "balance": False}),
    "hsdp over two": (RAGGED, {"fsdp": {"replicas": 2}, "accumulate": {"steps": 2}}, {"size": 2}),
    "tp and fsdp": (RAGGED, {"tp": {"size": 2, "plan": TENSOR}, "fsdp": {}}, {"size": 2}),
    "all four": ({}, {"ddp": {}, "ema": {"decay": 0.5}}, {"rotate": "alltoall"}),
}
HERE = {"accumulate", "clip", "ema"}  # plugins with which one process computes the same


def alone(module, others):
    return train(module, {name: options for name, options in others.items() if name in HERE}, False)


@pytest.mark.plugins
@pytest.mark.parametrize(("world_size", "cases"), [(2, ON_TWO), (4, ON_FOUR)])
def test_ranks_are_one_process(world_size, cases):
    ranks = on_ranks(train_all, world_size, list(cases.values()))
    for place, (name, (module, others, _)) in enumerate(cases.items()):
        try:
            assert_alike([rank[place] for rank in ranks], alone(module, others))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.plugins
@pytest.mark.parametrize(
    "others", [{"fsdp": {"param_dtype": "bfloat16"}}, {"ddp": {}, "amp": {"precision": "bf16"}}], ids=["fsdp", "amp"]
)
@pytest.mark.slow
def test_half_precision_is_near(others):
    one, other = on_ranks(train, 2, RAGGED, others)
    assert digest(one.weights) == digest(other.weights)
    assert one.metrics["val_loss"] == pytest.approx(train(RAGGED, {}, False).metrics["val_loss"], rel=1e-2)


def cut_and_resumed(module, others):
    """Return a whole run, and one that goes on with the state of its middle."""
    whole = train(module, others, keep=True)
    begin = [whole.states[2]] * int(os.environ["WORLD_SIZE"])  # of this rank, who looks at its own alone
    return whole, train(module, others, begin=begin)


@pytest.mark.plugins
def test_a_run_that_is_resumed_ends_with_the_same_bits_here_and_in_one_process():
    ranks = on_ranks(cut_and_resumed, 2, RAGGED, {"fsdp": {"wrap": ["Block"]}})
    for whole, resumed in ranks:
        assert digest(whole.weights) == digest(resumed.weights)
        assert whole.metrics == resumed.metrics
    assert_alike([ranks[0][0]], train(RAGGED, {}, False))
    gone_on = train(RAGGED, {}, False, begin=[ranks[0][0].states[2]])
    torch.testing.assert_close(dict(gone_on.weights), dict(ranks[0][0].weights), rtol=1e-4, atol=2e-6)


DDP = {"ddp": {}}
REFUSED = {  # module, other plugins, options, words of the error
    "shift": ({"wrong": "shifted"}, DDP, {}, "over 2 ranks, a loss is .* that is .* on one rank. Each"),
    "count": ({"wrong": "counted"}, DDP, {}, "attention number 1 gets other queries than on one rank"),
    "table": (
        {},
        DDP,
        {"buffers": {}},
        "attention number 1 gets other queries than on one rank. .* context_parallel.buffers",
    ),
    "cut": ({"wrong": "cut"}, DDP, {"verify": False}, "called with 15 queries and 15 keys, and this rank has 16"),
    "nobody": ({}, {}, {}, "add ddp, or fsdp"),
    "empty": ({}, DDP, {"batch": {}}, r"batch is empty, and the batch has words \[12, 32\], places"),
    "name": ({}, DDP, {"batch": {"word": 1}}, r"names dimension 1 of word, and the batch has words \[12, 32\]"),
    "length": ({"length": 30}, DDP, {}, "into 4 pieces, and one of 30 positions has no such: pad it in the data to 32"),
    "causal": ({"causal": False}, DDP, {}, "is_causal=False: set context_parallel.balance=false"),
    "ignored": ({"ragged": True, "tokens": False}, DDP, {}, "labels has labels of -100, .* a method get_weight"),
    "buffer": ({}, DDP, {"buffers": {"turn": 0}}, "names 'turn', and the module has blocks.0.rotary.turns"),
    "size": ({}, DDP, {"size": 3}, "context_parallel.size=3 does not divide the 2 ranks"),
}


def refusals(cases):
    said = []
    for module, others, parts, _ in cases:
        try:
            train(module, others, parts)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_what_would_be_wrong_is_refused():
    for said in on_ranks(refusals, 2, list(REFUSED.values())):
        for (name, case), words in zip(REFUSED.items(), said, strict=True):
            assert re.search(case[-1], words), (name, words)


class Count(TorchDispatchMode):
    """Counts what goes around in the ring: (calls, bytes)."""

    calls = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.__name__.startswith("all_to_all_single"):
            self.calls, self.bytes = self.calls + 1, self.bytes + args[0].nbytes
        return func(*args, **(kwargs or {}))


class Counted(CallbackInterface):
    """Counts in the last step."""

    @hookimpl(wrapper=True, tryfirst=True)
    def update(self):
        with Count() as self.count:
            return (yield)


PARTS = {"batch": BATCH, "buffers": BUFFERS, "rotate": "alltoall"}


def sent():
    torch.set_num_threads(1)
    counted = Counted()
    plugins = {"counted": counted, "ddp": {}, "context_parallel": PARTS}
    tiny_trainer(plugins, Transformer(), train_batch_size=12, epochs=1, max_steps=3, evaluate_every=None).train()
    return counted.count.calls, counted.count.bytes


@pytest.mark.plugins
def test_a_plan_has_what_two_ranks_send(tmp_path, capsys, monkeypatch):
    plugins = {"ddp": {}, "context_parallel": PARTS}
    run = {"module": {"_target_": f"{__name__}.Transformer"}, "trainer": {"train_batch_size": 12}, "plugins": plugins}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", "--world", "2", "--json", "run.yaml"]) == 0
    found = json.loads(capsys.readouterr().out)["collectives"]
    (around,) = [one for one in found if one["kind"] == "permute"]
    assert [(around["calls"], around["bytes"])] * 2 == on_ranks(sent, 2)
    two = 2 * 12 * LENGTH // 2 * WIDTH * 4  # keys and values of a part, in float32
    layers, passed_on = 2, 4  # one forward, one and two gradients in backward
    assert around["sent"] == layers * passed_on * two
