"""Mixtures of experts over gloo, against one process that has all experts."""

import functools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.testing import TinyModule, assert_one_model, digest, on_ranks, run_ranks, tiny_trainer, train_tiny
from hookline_expert_parallel import ExpertParallel, MixtureOfExperts
from hookline_expert_parallel.layer import grouped, product

pytestmark = pytest.mark.xdist_group("ranks")

WIDTH, WORDS, LENGTH = 16, 12, 6


class Block(nn.Module):
    def __init__(self, experts, capacity_factor, dropout):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moe = MixtureOfExperts(WIDTH, 24, experts, capacity_factor=capacity_factor)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.mix(x)
        return x + self.dropout(self.moe(self.norm(x)))


class Mixed(ModuleInterface):
    """Learns the next number of a sequence; as `parts` ranks do it, where it is to be compared with them."""

    def __init__(self, experts=4, capacity_factor=None, dropout=0.0, samples=48, parts=1, frozen=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.read = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
            self.blocks = nn.Sequential(*(Block(experts, capacity_factor, dropout) for _ in range(2)))
            self.data = TensorDataset(torch.randint(WORDS, (samples, LENGTH + 1)))
        self.parts = parts
        for name, weight in self.named_parameters():
            weight.requires_grad_(not frozen or ".experts." in name)

    def train_step(self, global_step, batch, device):
        losses = [self.loss(batch[0][part :: self.parts]) for part in range(self.parts)]
        return torch.stack(losses).mean()

    def loss(self, codes):
        logits = self.read(self.blocks(self.embed(codes[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten())

    def val_step(self, global_step, batch, device):
        return self.loss(batch[0])

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.AdamW(self.parameters(), 1e-2, eps=1e-3, foreach=True)], []  # as on CUDA


class Logged(CallbackInterface):
    """Keeps what is logged, and how much this rank holds of each parameter."""

    def __init__(self):
        self.rows = []

    @hookimpl
    def on_log(self, metrics):
        self.rows.append(dict(metrics))


def look(trainer):
    named = trainer.module.named_parameters()
    held = {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in named}
    return held, trainer.plugins.get_plugin("logged").rows


def train(plugins, module=None, /, **options):
    module = functools.partial(Mixed, **(module or {}))
    return train_tiny({**plugins, "logged": Logged()}, module, look=look, log_every="1 steps", **options)


def each(cases):
    """Train every case in this process, one after the other."""
    return {name: train(*positional, **options) for name, (*positional, options) in cases.items()}


def one_model(cases, ranks, references):
    """Train every case on ranks; assert that each is what one process trains, by the first word of its name."""
    of_ranks = on_ranks(each, ranks, cases, timeout=300)
    alone = each({name: REFERENCES[name] for name in references})
    for name in cases:
        reference = alone[name.partition(" ")[0]]
        assert_alike([found[name] for found in of_ranks], reference)
        assert_logs_alike(of_ranks[0][name], reference)
    return of_ranks[0], alone


def assert_logs_alike(found, reference):
    for row, wanted in zip(found.looked[1], reference.looked[1], strict=True):
        if not row.get("dropped_tokens"):
            row.pop("dropped_tokens", None)
        assert row == pytest.approx(wanted, rel=1e-5, abs=3e-7)


assert_alike = functools.partial(assert_one_model, rtol=1e-5, atol=3e-7, rtol_of_metrics=3e-7)
SPLIT = {"expert_parallel": {"router_z": 1e-3}}
DDP, FSDP = {**SPLIT, "ddp": {}}, {**SPLIT, "fsdp": {"wrap": ["Block"]}}
CLIPPED = {"clip": {"max_norm": 0.02, "log_norm": True}, "accumulate": {"steps": 2}}
AGAIN, COMPILED = {"activation_checkpoint": {"wrap": ["Block"]}}, {"compile": {"blocks": ["Block"], "backend": "eager"}}
AVERAGED = {"ema": {"decay": 0.9}}
PAD = {"distributed": {"uneven": "pad"}}
UNEVEN = {"samples": 49}
UP = "blocks.1.moe.experts.up"
REFERENCES = {
    "plain": (SPLIT, {}),
    "clipped": (SPLIT | CLIPPED, {}),
    "wide": (SPLIT | CLIPPED, {"train_batch_size": 24}),
    "capacity": (SPLIT, {"capacity_factor": 1.0, "parts": 2}, {}),
    "uneven": (SPLIT, UNEVEN, {}),
    "averaged": (SPLIT | AVERAGED, {}),
    "frozen": (SPLIT, {"frozen": True}, {}),
    "few": (SPLIT, {"experts": 2}, {}),
}


@pytest.mark.plugins
def test_two_ranks_are_one_process():
    cases = {
        "plain ddp": (DDP | COMPILED, {}),
        "clipped fsdp": (FSDP | CLIPPED | AGAIN, {}),
        "capacity ddp": (DDP, {"capacity_factor": 1.0}, {}),
    }
    found, alone = one_model(cases, 2, ("plain", "clipped", "capacity"))
    assert found["plain ddp"].looked[0][UP] == alone["plain"].looked[0][UP] // 2
    row = found["capacity ddp"].looked[1][0]
    assert row["dropped_tokens"] > 0
    assert row["expert_load_max/blocks.0.moe"] > 1 > row["expert_load_min/blocks.0.moe"] > 0
    assert row["train_loss"] > row["balance_loss"] * 0.01


@pytest.mark.plugins
@pytest.mark.slow
def test_two_ranks_are_one_process_with_the_rest():
    cases = {
        "plain fsdp": (FSDP | COMPILED, {}),
        "clipped ddp": (DDP | CLIPPED | AGAIN, {}),
        "capacity fsdp": (FSDP, {"capacity_factor": 1.0}, {}),
        "uneven fsdp": (FSDP | PAD, UNEVEN, {}),
        "uneven ddp with room": (DDP | PAD, UNEVEN | {"capacity_factor": 4.0}, {}),
        "averaged ddp": (DDP | AVERAGED, {}),
        "frozen ddp": (DDP, {"frozen": True}, {}),
    }
    one_model(cases, 2, ("plain", "clipped", "capacity", "uneven", "averaged", "frozen"))


@pytest.mark.plugins
@pytest.mark.slow
def test_four_ranks_are_one_process():
    half = {"expert_parallel": {"router_z": 1e-3, "size": 2}}
    cases = {
        "plain ddp": (DDP | half, {}),
        "plain fsdp": (FSDP | half, {}),
        "plain fsdp, all": (FSDP, {}),
        "wide ddp": (DDP | half | CLIPPED, {"train_batch_size": 24}),
        "wide fsdp": (FSDP | half | CLIPPED, {"train_batch_size": 24}),
        "uneven ddp": (DDP | half | PAD, UNEVEN, {}),
        "uneven fsdp": (FSDP | half | PAD, UNEVEN, {}),
    }
    found, alone = one_model(cases, 4, ("plain", "wide", "uneven"))
    whole = alone["plain"].looked[0]
    for name, part, other in (("plain ddp", 2, 1), ("plain fsdp", 4, 4), ("plain fsdp, all", 4, 4)):
        assert found[name].looked[0][UP] == whole[UP] // part
        assert found[name].looked[0]["blocks.1.mix.weight"] == whole["blocks.1.mix.weight"] // other


@pytest.mark.plugins
@pytest.mark.slow
def test_four_ranks_in_other_layouts():
    half = {"expert_parallel": {"router_z": 1e-3, "size": 2}}
    split = {"tp": {"size": 2, "plan": {"blocks.*.mix": "column to whole"}}}
    cases = {
        "plain tp": (FSDP | split, {}),
        "plain hsdp": (SPLIT | half | {"fsdp": {"wrap": ["Block"], "replicas": 2}}, {}),
        "few": (FSDP | half, {"experts": 2}, {}),
    }
    found, alone = one_model(cases, 4, ("plain", "few"))
    assert found["plain tp"].looked[0][UP] == alone["plain"].looked[0][UP] // 2
    assert found["few"].looked[0][UP] == alone["few"].looked[0][UP] // 4  # by rows of one expert


def without_memory(sizes):
    torch.set_num_threads(1)
    digests = []
    for size in sizes:
        plugins = {"expert_parallel": {"size": size}, "fsdp": {"wrap": ["Block"], "meta": True}}
        trainer = tiny_trainer(plugins, functools.partial(Light), train_batch_size=12)
        trainer.train()
        digests.append(trainer.export_model())
    return digests


class Light(Mixed):
    """Has its numbers on the CPU wherever it is made."""

    def __init__(self):
        super().__init__()
        with torch.device("cpu"):
            self.data = TensorDataset(torch.arange(48 * (LENGTH + 1)).reshape(48, -1) % WORDS)


@pytest.mark.plugins
@pytest.mark.slow
def test_experts_that_fsdp_makes_without_memory_begin_as_others():
    split, whole = on_ranks(without_memory, 2, [2, 1])[0]
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=3e-7)


class Spoils(CallbackInterface):
    """Makes a gradient NaN of experts that rank 1 alone has, in the second step."""

    @hookimpl(tryfirst=True)
    def on_begin_optimizer_step(self, trainer):
        if trainer.global_step == 1 and trainer.rank == 1:
            trainer.module.blocks[0].moe.experts.up.grad.to_local().fill_(float("nan"))


def spoilt():
    torch.set_num_threads(1)
    found = []
    for plugins in (DDP, FSDP):
        trainer = tiny_trainer({**plugins, "spoils": Spoils(), "finite": {"policy": "skip"}}, Mixed())
        trainer.train()
        found.append((trainer.counters.skipped_steps, digest(trainer.export_model())))
    return found


@pytest.mark.plugins
@pytest.mark.slow
def test_a_step_is_skipped_for_experts_of_one_rank():
    one, other = on_ranks(spoilt, 2)
    assert one == other
    assert [skipped for skipped, _ in one] == [1, 1]


# Checkpoints ----------------------------------------------------------------------------


def halves(folder, plugins, module):
    """Return a run that is cut behind its fifth step, and the rest of it."""
    kept = {"runs_folder": str(folder)}
    saving = plugins | {"checkpoint": {}}
    return (saving, module, {**kept, "max_steps": 5}), (saving, module, {**kept, "resume": True})


@pytest.mark.plugins
def test_a_resume_has_the_same_bits_and_other_layouts_go_on(tmp_path):
    dropout = {"dropout": 0.3}
    cases = {"whole": (DDP, dropout, {}), "whole of shares": (FSDP, dropout, {})}
    cases["half"], cases["rest"] = halves(tmp_path / "a", DDP, dropout)
    cases["half of shares"], cases["rest of shares"] = halves(tmp_path / "b", FSDP, dropout)
    to_one, from_two = halves(tmp_path / "c", DDP, {}), halves(tmp_path / "d", FSDP, {})
    each({"half": halves(tmp_path / "d", SPLIT, {})[0]})
    two = on_ranks(each, 2, {**cases, "to one": to_one[0], "from one": from_two[1]})
    for found in two:
        assert digest(found["rest"].weights) == digest(found["whole"].weights)
        assert digest(found["rest of shares"].weights) == digest(found["whole of shares"].weights)
    alone = each({"plain": (SPLIT, {}), "to one": halves(tmp_path / "c", SPLIT, {})[1]})
    assert_alike([found["from one"] for found in two], alone["plain"])
    assert_alike([alone["to one"]], alone["plain"])


@pytest.mark.plugins
@pytest.mark.slow
def test_other_numbers_of_expert_ranks_go_on(tmp_path):
    half = {"expert_parallel": {"router_z": 1e-3, "size": 2}}
    folders = [tmp_path / name for name in "abc"]
    firsts = [
        halves(folder, plugins, {})[0] for folder, plugins in zip(folders, (FSDP, FSDP | half, DDP | half), strict=True)
    ]
    on_ranks(each, 4, dict(enumerate(firsts)))
    rests = [halves(folder, plugins, {})[1] for folder, plugins in zip(folders, (DDP, FSDP, FSDP), strict=True)]
    alone = train(SPLIT)
    for found in zip(*(each_rank.values() for each_rank in on_ranks(each, 2, dict(enumerate(rests)))), strict=True):
        assert_alike(found, alone)


# Evaluation -----------------------------------------------------------------------------


class Few(Mixed):
    """Evaluates on data of which rank 1 has nothing, or as much as it finds out on the way."""

    def __init__(self, unknown):
        super().__init__()
        self.unknown = unknown

    def get_val_dataloaders(self, sampler, batch_size):
        few = TensorDataset(self.data.tensors[0][:1])
        return DataLoader(
            Some(few, sampler(few)) if self.unknown else few, 1, sampler=None if self.unknown else sampler(few)
        )

    def predict_step(self, global_step, batch, device):
        return self.read(self.blocks(self.embed(batch[0])))

    def get_predict_dataloaders(self, sampler, batch_size):
        odd = TensorDataset(self.data.tensors[0][:5])
        return DataLoader(odd, 1, sampler=sampler(odd))


class Some(IterableDataset):
    def __init__(self, data, sampler):
        self.data, self.sampler = data, sampler

    def __iter__(self):
        return (self.data[index] for index in self.sampler)


class Predicted(CallbackInterface):
    def __init__(self):
        self.rows = {}

    @hookimpl
    def on_end_predict_step(self, outputs, places):
        self.rows |= dict(zip(places, outputs, strict=True))


def evaluate(plugins, unknown):
    torch.set_num_threads(1)
    predicted = Predicted()
    trainer = tiny_trainer({**plugins, "predicted": predicted}, Few(unknown), epochs=1, val_batch_size=2)
    trainer.train()
    found = trainer.metrics["val_loss"]
    trainer.predict()
    return found, predicted.rows


def evaluate_all(cases):
    return [evaluate(*case) for case in cases]


@pytest.mark.plugins
def test_ranks_evaluate_different_numbers_of_batches():
    low = {**SPLIT, "fsdp": {"wrap": ["Block"], "param_dtype": "bfloat16"}}
    cases = [(DDP, False), (FSDP, True), (low, True)]
    wanted, rows = evaluate(SPLIT, False)
    for (one, first), (other, second), (plugins, _) in zip(*on_ranks(evaluate_all, 2, cases), cases, strict=True):
        close = 0.1 if plugins is low else 1e-5
        assert one == other == pytest.approx(wanted, rel=close)
        assert sorted(first) == [0, 2, 4]
        assert sorted(second) == [1, 3]
        for place, row in (first | second).items():
            torch.testing.assert_close(row.float(), rows[place], rtol=close, atol=close)


# The layer, and what does not fit ----------------------------------------------------------


def test_each_token_gets_the_mixture_of_its_experts():
    torch.manual_seed(0)
    moe, x = MixtureOfExperts(8, 12, experts=4), torch.randn(2, 5, 8)
    for token, answer in zip(x.flatten(0, 1), moe(x).flatten(0, 1), strict=True):
        weights, chosen = torch.softmax(moe.router.weight @ token, 0).topk(2)
        wanted = torch.zeros(8)
        for weight, number in zip(weights / weights.sum(), chosen, strict=True):
            gate, up, down = (stacked[number] for stacked in moe.experts.parameters())
            wanted += weight * ((nn.functional.silu(token @ gate) * (token @ up)) @ down)
        torch.testing.assert_close(answer, wanted)
    moe.capacity_factor = 4.0  # room for all
    torch.testing.assert_close(moe(x), moe.eval()(x))


def test_an_expert_takes_first_choices_before_second_ones_and_drops_the_rest():
    moe, x = MixtureOfExperts(4, 8, experts=4, capacity_factor=1.0), torch.eye(4)
    with torch.no_grad():
        moe.router.weight.copy_(torch.tensor([[3.0, 3, 2, 2], [2, 2, 3, 3], [0] * 4, [0] * 4]))
    routed = moe.router(x, 1.0)
    assert routed.counts.tolist() == [4, 4, 0, 0]
    assert routed.capacity == 2
    whole = MixtureOfExperts(4, 8, experts=4, top_k=1).eval()
    whole.load_state_dict(moe.state_dict())
    torch.testing.assert_close(moe(x), whole(x) * routed.weights[:, :1])  # of each token the first choice has a place
    assert not torch.equal(moe(x), moe.eval()(x))


def test_without_weights_the_losses_change_no_bit_and_no_hook_is_left():
    trainers = [tiny_trainer(plugins, Mixed()) for plugins in ({}, {"expert_parallel": {"balance": 0.0}})]
    for trainer in trainers:
        trainer.train()
        pickle.dumps(trainer.module.blocks)  # a hook of the plugin's could not be
    assert len({digest(trainer.export_model()) for trainer in trainers}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_kernel_computes_what_the_loop_does(dtype):
    torch.manual_seed(0)
    tokens, weights, counts = (
        torch.randn(10, 8, dtype=dtype),
        torch.randn(3, 8, 16, dtype=dtype),
        torch.tensor([3, 0, 7]),
    )
    torch.testing.assert_close(grouped(tokens, weights, counts), product(tokens, weights, counts))
    with torch.autocast("cpu"):
        assert grouped(tokens, weights, counts).dtype == product(tokens, weights, counts).dtype == torch.bfloat16


class Own(nn.Module):
    """Experts of a user's own: the form of torchtitan."""

    def __init__(self, experts):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(experts.up.detach()), nn.Parameter(experts.down.detach())

    def forward(self, tokens, counts):
        parts = torch.split(tokens, counts.tolist())
        return torch.cat([(part @ w1).relu() @ w2 for part, w1, w2 in zip(parts, self.w1, self.w2, strict=True)])


class OfOwn(Mixed):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.moe.experts = Own(block.moe.experts)


def train_own(plugins):
    return train_tiny(plugins, OfOwn, look=look_own)


def look_own(trainer):
    return [part.w1.placements[0].is_shard() for part in trainer.module.modules() if isinstance(part, Own)]


@pytest.mark.plugins
def test_stacked_experts_of_your_own_are_split_by_name():
    named = {"expert_parallel": {"experts": ["blocks.*.moe.experts"]}, "ddp": {}}
    ranks = on_ranks(train_own, 2, named)
    assert ranks[0].looked == [True, True]
    assert_alike(ranks, train_tiny({"expert_parallel": {}}, OfOwn))


def wrong(plugins, module, options):
    torch.set_num_threads(1)
    tiny_trainer(plugins, module(), **options).train()


class Three(Mixed):
    def __init__(self):
        super().__init__()
        self.blocks[0].moe = MixtureOfExperts(WIDTH, 8, experts=3)


class ByItself(Mixed):
    """Computes its losses without the trainer's verb."""

    @hookimpl
    def run_window(self, trainer, window):
        losses = [self.train_step(0, batch, "cpu") for batch in window]
        torch.stack(losses).mean().backward()
        return [(loss,) for loss in losses]


REFUSED = {
    "the 3 experts of 'blocks.0.moe.experts' cannot be split over 2 ranks": (DDP, Three, {}),
    "expert_parallel.size=3 does not divide the 2 ranks": ({"expert_parallel": {"size": 3}, "ddp": {}}, Mixed, {}),
    "no plugin makes one model of the rest: add ddp or fsdp": (SPLIT, Mixed, {}),
    "expert_parallel finds no experts: build the model with": (DDP, TinyModule, {}),
    "the parameters of 'blocks.0' must be its own, and have the experts in their first dimension": (
        {"expert_parallel": {"experts": ["blocks.0"]}, "ddp": {}},
        Mixed,
        {},
    ),
    "distributed.uneven=join: no plugin here lets a rank take part": (
        {**DDP, "distributed": {"uneven": "join"}},
        Mixed,
        {},
    ),
}


@pytest.mark.plugins
@pytest.mark.parametrize(
    ("message", "case"),
    [pytest.param(*each, marks=[pytest.mark.slow] * bool(place)) for place, each in enumerate(REFUSED.items())],
)
def test_what_does_not_fit_the_ranks(message, case):
    for outcome in run_ranks(wrong, 2, *case):
        assert outcome.code == 1
        assert message in outcome.output


def test_what_does_not_fit():
    for options, message in (({"size": -1}, "size=-1 must be a number"), ({"balance": -1.0}, "balance=-1.0 must be 0")):
        with pytest.raises(ValueError, match=f"expert_parallel.{message}"):
            ExpertParallel(**options)
    with pytest.raises(ValueError, match="top_k=3 must be from 1 to the number of experts, 2"):
        MixtureOfExperts(4, 4, experts=2, top_k=3)
    with pytest.raises(ValueError, match="capacity_factor=0.0 must be above 0, or None"):
        MixtureOfExperts(4, 4, experts=2, capacity_factor=0.0)
    with pytest.raises(ValueError, match=r"experts names 'blocks.\*.mlp', and the model has no such module"):
        wrong({"expert_parallel": {"experts": ["blocks.*.mlp"]}}, Mixed, {})
    with pytest.raises(ValueError, match=r"balance=0.01 and router_z=0.0 were added to no loss in this step"):
        wrong({"expert_parallel": {}}, ByItself, {})
    wrong({"expert_parallel": {"balance": 0.0}}, ByItself, {})
