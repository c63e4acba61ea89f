"""Ranks over gloo that split layers, against loops written by hand and against one rank."""

import functools
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, ModuleInterface, Stage, hookimpl, set_seed
from hookline.config import build_trainer, load_config
from hookline.counters import Cursor
from hookline.data import mix, sampler_class
from hookline.testing import assert_one_model, digest, on_ranks, run_ranks, tiny_trainer, train_tiny
from hookline_tp import Tp

pytestmark = pytest.mark.xdist_group("ranks")

ROOT = Path(__file__).parents[3]
SAMPLES, LENGTH, WORDS, WIDTH, HEADS = 48, 6, 12, 16, 4


class Look(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value, self.merge = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)  # one would have no gradient but rounding, which Adam enlarges
        self.num_heads = HEADS

    def forward(self, x):
        layers = self.query, self.key, self.value
        heads = (layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in layers)
        seen = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.merge(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.before_look, self.before_think = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.look = Look()
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.look(self.before_look(x))
        return x + self.dropout(self.down(F.gelu(self.up(self.before_think(x)))))


class Transformer(ModuleInterface):
    """Learns the next number of a sequence."""

    def __init__(self, dropout=0.0, tied=False, apart=False, length=LENGTH):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.blocks = nn.Embedding(WORDS, WIDTH), nn.Sequential(Block(dropout), Block(dropout))
            self.norm, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
            codes = torch.randint(WORDS, (SAMPLES, length + 1))
        if tied:
            self.read.weight = self.embed.weight
        if apart:
            with torch.no_grad():
                self.blocks[0].up.weight.add_(float(os.environ.get("RANK", "0")))
        self.data = TensorDataset(codes)

    def train_step(self, global_step, batch, device):
        (codes,) = batch
        logits, next_codes = self.read(self.norm(self.blocks(self.embed(codes[:, :-1])))), codes[:, 1:].flatten()
        logits = logits.flatten(0, 1)
        return F.cross_entropy(logits, next_codes), logits, next_codes

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2, foreach=True)  # as torch does on CUDA
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_per_epoch * epochs)]


TENSOR = {
    **{f"blocks.*.look.{name}": "column" for name in ("query", "key", "value")},
    "blocks.*.look.merge": "row",
    "blocks.*.up": "column",
    "blocks.*.down": "row",
}
SEQUENCE = {
    "embed": "row to sequence",
    "blocks.*.before_*": "sequence",
    "blocks.*.look": "input from sequence to whole",
    **{f"blocks.*.look.{name}": "column" for name in ("query", "key", "value")},
    "blocks.*.look.merge": "row to sequence",
    "blocks.*.up": "column from sequence",
    "blocks.*.down": "row to sequence",
    "norm": "sequence",
    "read": "column from sequence to whole",
}
LOGITS = {**TENSOR, "embed": "row", "read": "column to logits"}
TIED = {**LOGITS, "read": "column to whole"}
HALF = {**SEQUENCE, "blocks.*.before_look": "sequence"}
HALF.pop("blocks.*.before_*")  # before_think then knows its own part of the sequence alone


def look(trainer):
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in trainer.module.parameters())
    return here, (trainer.share, trainer.shares)


def train(plan, module, others=None, size=0, **options):
    plugins = {"tp": Tp(size=size, plan=plan)} | (others or {})
    return train_tiny(plugins, functools.partial(Transformer, **module), look=look, **options)


def on(ranks, *arguments, **keywords):
    return on_ranks(train, ranks, *arguments, **keywords)


assert_alike = functools.partial(assert_one_model, rtol=1e-4, atol=5e-5, rtol_of_metrics=1e-4)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=5e-5)


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("plan", "module"),
    [
        (TENSOR, {"apart": True}),
        (SEQUENCE, {}),
        pytest.param(LOGITS, {}, marks=pytest.mark.slow),
        (TIED, {"tied": True}),
    ],
    ids=["tensor", "sequence", "logits", "tied"],
)
def test_two_ranks_are_one_within_rounding(plan, module):
    one, other = on(2, plan, module)
    alone = train(plan, {**module, "apart": False})
    assert_alike([one, other], alone)
    assert one.metrics == one.again
    assert one.looked[0] < 0.62 * alone.looked[0]
    assert one.looked[1] == (0, 1)


def by_hand(plan_of_torch):
    """Train as one would with `parallelize_module`."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("localhost", int(os.environ["MASTER_PORT"]), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    module = Transformer(dropout=0.3)
    set_seed(mix(0, 0))
    parallelize_module(module, init_device_mesh("cpu", (2,)), plan_of_torch())
    (optimizer,), (scheduler,) = module.get_optimizers_schedulers(4, 2)
    optimizer.param_groups[0]["foreach"] = False  # else torch refuses weights of which some are split
    cursor = Cursor(seed=0)
    sampler = sampler_class(cursor, shuffle=True, share=0, shares=1)
    for epoch in range(2):
        cursor.begin_epoch(epoch)
        loader = module.get_train_dataloader(sampler, 12)
        loader.generator = torch.Generator()
        for batch in loader:
            loss, *_ = module(stage=Stage.TRAIN, global_step=1, batch=batch, device="cpu")
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in module.state_dict().items()}


def tensor_by_hand():
    """Return what TENSOR says."""
    plan = {f"blocks.*.look.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {"blocks.*.look.merge": RowwiseParallel(), "blocks.*.up": ColwiseParallel()}
    return plan | {"blocks.*.down": RowwiseParallel()}


def sequence_by_hand():
    """Return what SEQUENCE says."""
    sequence, norm = Shard(1), SequenceParallel(use_local_output=True)
    return {
        **tensor_by_hand(),
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
        "blocks.*.before_*": norm,
        "blocks.*.look": PrepareModuleInput(
            input_layouts=sequence, desired_input_layouts=Replicate(), use_local_output=True
        ),
        "blocks.*.look.merge": RowwiseParallel(output_layouts=sequence),
        "blocks.*.up": ColwiseParallel(input_layouts=sequence),
        "blocks.*.down": RowwiseParallel(output_layouts=sequence),
        "norm": norm,
        "read": ColwiseParallel(input_layouts=sequence, output_layouts=Replicate()),
    }


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("plan", "plan_of_torch"),
    [pytest.param(TENSOR, tensor_by_hand, marks=pytest.mark.slow), (SEQUENCE, sequence_by_hand)],
)
def test_the_same_bits_as_a_loop_written_by_hand(plan, plan_of_torch):
    hand, _ = on_ranks(by_hand, 2, plan_of_torch)
    one, _ = on(2, plan, {"dropout": 0.3})
    assert digest(one.weights) == digest(hand)


def others():
    """Return plugins that look at weights, gradients or outputs."""
    from torchmetrics import SumMetric

    metrics = {"train": {"sum": SumMetric()}, "val": {"sum": SumMetric()}, "inputs": [2]}
    watching = {"ema": {"decay": 0.9}, "finite": {"policy": "skip"}, "metrics": metrics}
    return {"clip": {"max_norm": 0.05, "max_value": 0.1}, "accumulate": {"steps": 2}, **watching}


@pytest.mark.plugins
@pytest.mark.slow
@pytest.mark.parametrize("plan", [TENSOR, SEQUENCE])
def test_with_clipping_an_average_metrics_and_windows(plan):
    one, other = on(2, plan, {}, others())
    alone = train(plan, {}, others())
    assert_alike([one, other], alone)
    assert one.metrics["val_sum"] == alone.metrics["val_sum"]


@pytest.mark.plugins
@pytest.mark.slow
def test_under_autocast():
    one, other = on(2, SEQUENCE, {"dropout": 0.1}, {"amp": {}})
    assert digest(one.weights) == digest(other.weights)
    assert one.metrics["val_loss"] == pytest.approx(train({}, {}, {"amp": {}}).metrics["val_loss"], rel=0.05)


@pytest.mark.plugins
@pytest.mark.slow
@pytest.mark.parametrize("plan", [TENSOR, SEQUENCE, LOGITS])
def test_four_ranks_split_layers_and_share_the_rest(plan):
    sharded = {"fsdp": {"wrap": ["Block"]}, **others()}
    four = on(4, plan, {"apart": True}, sharded, size=2)
    alone = train(plan, {}, others())
    assert_alike(four, alone)
    assert four[0].metrics["val_sum"] == alone.metrics["val_sum"]
    assert four[0].looked[0] < 0.35 * alone.looked[0]
    assert [rank.looked[1] for rank in four] == [(0, 2), (0, 2), (1, 2), (1, 2)]


class Light(Transformer):
    """Has its numbers on the CPU wherever it is made."""

    def __init__(self):
        super().__init__()
        with torch.device("cpu"):
            self.data = TensorDataset(torch.arange(SAMPLES * (LENGTH + 1)).reshape(SAMPLES, -1) % WORDS)


def without_memory():
    torch.set_num_threads(1)
    plugins = {"tp": Tp(size=2, plan=SEQUENCE), "fsdp": {"wrap": ["Block"], "meta": True}}
    trainer = tiny_trainer(plugins, functools.partial(Light), train_batch_size=12)
    trainer.train()
    return digest(trainer.export_model()), trainer.metrics["val_loss"]


@pytest.mark.plugins
@pytest.mark.slow
def test_a_module_that_fsdp_makes_without_memory():
    found = on_ranks(without_memory, 4)
    assert len({*found}) == 1
    assert found[0][1] < 2.4  # ln 12 where nothing was learnt


def resumed(folder, plan, ranks, then=None, size=0, more=None):
    """Train to the middle on some ranks, and on from there on others; return what the first of these has come to."""
    kept = {"runs_folder": str(folder), "max_steps": 5}
    plugins = {"checkpoint": {}, "ema": {"decay": 0.9}}
    for count, options in ((ranks, kept), (then or ranks, {"runs_folder": str(folder), "resume": True})):
        split = {"size": size, "others": plugins | (more or {})} if count > 1 else {"others": plugins}
        arguments = plan if count > 1 else {}, {"dropout": 0.3 if then is None else 0.0}
        outcomes = on(count, *arguments, **split, **options) if count > 1 else [train(*arguments, **split, **options)]
    return outcomes[0]


@pytest.mark.plugins
@pytest.mark.parametrize("plan", [TENSOR, pytest.param(SEQUENCE, marks=pytest.mark.slow)])
def test_a_resume_has_the_same_bits(tmp_path, plan):
    whole, _ = on(2, plan, {"dropout": 0.3}, {"ema": {"decay": 0.9}})
    assert digest(resumed(tmp_path, plan, 2).weights) == digest(whole.weights)


@pytest.mark.plugins
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "then"), [(2, 1), (1, 2), (4, 2), (2, 4)])
def test_other_numbers_of_ranks_go_on(tmp_path, ranks, then):
    alone = train({}, {}, {"ema": {"decay": 0.9}})
    more = {"fsdp": {"wrap": ["Block"]}} if 4 in (ranks, then) else None
    assert_close(resumed(tmp_path, SEQUENCE, ranks, then, 2, more).weights, alone.weights)


@pytest.mark.plugins
@pytest.mark.slow
def test_a_resume_of_four_ranks_has_the_same_bits(tmp_path):
    more = {"fsdp": {"wrap": ["Block"]}}
    whole, *_ = on(4, TENSOR, {"dropout": 0.3}, {"ema": {"decay": 0.9}, **more}, size=2)
    assert digest(resumed(tmp_path, TENSOR, 4, None, 2, more).weights) == digest(whole.weights)


class Planned(Transformer):
    """Brings a plan of its own."""

    def get_tp_plan(self):
        return {**TENSOR, "blocks.*.up": ColwiseParallel()}


def placements(trainer):
    return {n: str(w.placements[0]) for n, w in trainer.module.named_parameters() if isinstance(w, DTensor)}


def evaluated(plugin):
    torch.set_num_threads(1)
    trainer = tiny_trainer({"tp": plugin}, Planned(tied=True))
    trainer.validate()
    return digest(trainer.export_model()), placements(trainer)


@pytest.mark.plugins
def test_what_is_exported_at_the_start_has_the_bits_of_one_rank():
    (one, places), (other, _) = on_ranks(evaluated, 2, Tp(plan=TIED))
    assert one == other == digest(Planned(tied=True).state_dict())
    assert places["embed.weight"] == "S(0)"


@pytest.mark.plugins
def test_the_plan_of_the_module():
    (_, places), _ = on_ranks(evaluated, 2, Tp())
    assert {name: place for name, place in places.items() if "blocks.1.look" not in name} == {
        **{f"blocks.{n}.look.{name}": "S(0)" for n in "0" for name in ("query.weight", "query.bias", "key.weight")},
        **{f"blocks.{n}.look.{name}": "S(0)" for n in "0" for name in ("value.weight", "value.bias")},
        **{f"blocks.{n}.up.{name}": "S(0)" for n in "01" for name in ("weight", "bias")},
        **{f"blocks.{n}.down.weight": "S(1)" for n in "01"},
        **{f"blocks.{n}.down.bias": "R" for n in "01"},
        **{"blocks.0.look.merge.weight": "S(1)", "blocks.0.look.merge.bias": "R"},
    }


CONFIG = """
module: {_target_: examples.chars.Chars, context: 16, width: 32, heads: 2, blocks: 2}
trainer: {max_steps: 4, max_val_steps_per_epoch: 2, device: cpu, train_batch_size: 8}
plugins:
  clip: {}
  tp:
    plan:
      blocks.*.think.0: column
      blocks.*.think.2: {_target_: torch.distributed.tensor.parallel.RowwiseParallel}
"""


def configured(path, folder):
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    trainer = build_trainer(load_config(path, [f"trainer.runs_folder={folder}"]))
    trainer.train()
    return trainer.export_model(), placements(trainer)


@pytest.mark.plugins
def test_a_transformer_is_split_by_configuration_alone(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(CONFIG)
    (one, places), (other, _) = on_ranks(configured, 2, tmp_path / "run.yaml", tmp_path)
    assert digest(one) == digest(other)
    assert {name: place for name, place in places.items() if "blocks.1" in name} == {
        **{"blocks.1.think.0.weight": "S(0)", "blocks.1.think.0.bias": "S(0)"},
        **{"blocks.1.think.2.weight": "S(1)", "blocks.1.think.2.bias": "R"},
    }
    monkeypatch.setattr(sys, "path", [*sys.path])
    alone = configured(tmp_path / "run.yaml", tmp_path)[0]
    keys = [name for name in one if name.endswith("query_key_value.bias")]  # those of keys have rounding for a gradient
    assert_close(*({name: weights[name] for name in weights if name not in keys} for weights in (one, alone)))


class Spoils(CallbackInterface):
    """Makes a gradient NaN that is rank 1's part alone, in the second step."""

    @hookimpl
    def on_begin_optimizer_step(self, trainer):
        if trainer.global_step == 1 and trainer.rank == 1:
            trainer.module.blocks[0].up.weight.grad.to_local().fill_(float("nan"))


def spoilt():
    torch.set_num_threads(1)
    plugins = {"spoils": Spoils(), "finite": {"policy": "skip"}, "tp": Tp(plan=TENSOR)}
    trainer = tiny_trainer(plugins, Transformer(), epochs=1)
    trainer.train()
    return trainer.counters.skipped_steps


@pytest.mark.plugins
@pytest.mark.slow
def test_a_step_is_skipped_for_a_part_of_one_rank():
    assert on_ranks(spoilt, 2) == [1, 1]


def test_one_process_trains_the_whole_model_and_a_warning_says_so(caplog):
    caplog.set_level(logging.WARNING, logger="hookline")
    weights = train(TENSOR, {}).weights
    assert "distributed: this is one process, so there is nobody to share the model with (tp)" in caplog.text
    assert digest(weights) == digest(train({}, {}).weights)


@pytest.mark.plugins
def test_frozen_weights_stay_frozen():
    assert on_ranks(frozen, 2) == [{"blocks.0.before_look.weight", "read.weight"}] * 2


def frozen():
    torch.set_num_threads(1)
    module = Transformer()
    module.blocks[0].before_look.weight.requires_grad_(False)
    module.read.weight.requires_grad_(False)
    tiny_trainer([Tp(plan=SEQUENCE)], module, epochs=1).train()
    return {name for name, weight in module.named_parameters() if not weight.requires_grad}


# What does not fit ----------------------------------------------------------------------


def test_bad_options():
    with pytest.raises(ValueError, match=r"tp\.size=-1 must be a number of ranks, or 0 for all"):
        Tp(size=-1)
    offered = "is no style; there are 'column', 'row', 'sequence', 'input from X to Y'"
    for style in ("diagonal", "column from pixels", "row to logits", "sequence to whole", "input", 3):
        with pytest.raises(ValueError, match=f"tp.plan: 'net.0': {style!r} {offered}"):
            Tp(plan={"net.0": style})


ALONE = [
    (
        {"blocks.*.upp": "column"},
        "tp.plan names 'blocks.*.upp', and the model has no such module; near it: blocks",
    ),
    ({"embed": "row", "em*": "row"}, "tp.plan: 'embed' is meant by 'embed' and by 'em*'; name it once"),
    ({"norm": "column"}, "tp.plan: 'norm' is a LayerNorm, and 'column' splits a Linear or an Embedding"),
]


@pytest.mark.parametrize(("plan", "message"), ALONE)
def test_a_plan_that_does_not_fit_the_model_is_refused_on_one_process_too(plan, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        tiny_trainer({"tp": Tp(plan=plan)}, Transformer()).train()


class Odd(Transformer):
    """Has numbers that 2 does not divide."""

    def __init__(self):
        super().__init__()
        self.blocks[0].look.num_heads = 3
        self.blocks[1].up = nn.Linear(WIDTH, 63)


class Tied(Transformer):
    """Reads with the weights that it embeds with."""

    def __init__(self):
        super().__init__(tied=True)


class Long(Transformer):
    """Learns from sequences that two ranks cannot cut in equal parts."""

    def __init__(self):
        super().__init__(length=7)


def wrong(plugins, module):
    torch.set_num_threads(1)
    tiny_trainer(plugins, module()).train()


SHARED = "ranks that split layers have other gradients of blocks.0.before_think.bias, blocks.0.before_think.weight, "
SHARED += "blocks.1.before_think.bias, blocks.1.before_think.weight: these are not in the plan"


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("plugins", "module", "message"),
    [
        ({"tp": Tp(size=3, plan=TENSOR)}, Transformer, "tp.size=3 does not divide the 2 ranks"),
        ({"tp": Tp()}, Transformer, "tp has no plan: give tp.plan, or Transformer a method get_tp_plan()"),
        (
            {"tp": Tp(plan=TENSOR)},
            Odd,
            "tp.plan: 'blocks.0.look.query' cannot be split by column over 2 ranks: num_heads=3 of 'blocks.0.look'",
        ),
        (
            {"tp": Tp(plan={"blocks.1.up": "column"})},
            Odd,
            "'blocks.1.up' cannot be split by column over 2 ranks: out_features=63 of 'blocks.1.up' is no multiple",
        ),
        (
            {"tp": Tp(plan={"embed": "row"})},
            Tied,
            "embed.weight and read.weight are one weight, and tp.plan splits them in two ways",
        ),
        (
            {"tp": Tp(plan=HALF)},
            Transformer,
            SHARED,
        ),
        (
            {"tp": Tp(plan=SEQUENCE)},
            Long,
            "tp.plan: 'embed' is to cut a sequence of 7 over 2 ranks, which do not divide it: pad it",
        ),
        ({"tp": Tp(plan=TENSOR), "ddp": {}}, Transformer, "ddp cannot average a model whose layers are split over"),
    ],
)
def test_what_does_not_fit_the_run(plugins, module, message):
    for outcome in run_ranks(wrong, 2, plugins, module):
        assert outcome.code == 1
        assert message in outcome.output


@pytest.mark.plugins
@pytest.mark.slow
def test_several_models_that_nobody_makes_one_of():
    for outcome in run_ranks(wrong, 4, {"tp": Tp(size=2, plan=TENSOR)}, Transformer):
        assert outcome.code == 1
        assert "tp.size=2 leaves 2 models over the 4 ranks, and no plugin makes one of them: add fsdp" in outcome.output
