"""Ranks over gloo that run stages of one model, against one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface, copy_state
from hookline.testing import assert_one_model, digest, on_ranks, run_ranks, tiny_trainer, train_tiny
from hookline_pipeline import Pipeline

pytestmark = pytest.mark.xdist_group("ranks")

SAMPLES, LENGTH, WORDS, WIDTH = 48, 6, 12, 16


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x) * mask))))


class Count(nn.Module):
    """Has nothing but a buffer, which what comes to it changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.calls.add_(1 + 0 * x.detach().mean())
        return x


class Words(nn.Module):
    def __init__(self, blocks, dropout):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.count = Count()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.norm, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, codes):
        mask = torch.ones(codes.shape[1], 1, device=codes.device)
        x = self.count(self.embed(codes) + self.place[: codes.shape[1]])
        for block in self.blocks:
            x = block(x, mask)
        return self.read(self.norm(x))


class Transformer(ModuleInterface):
    """Learns the next number of a sequence."""

    def __init__(self, blocks=4, dropout=0.0, tied=False, samples=SAMPLES):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = Words(blocks, dropout)
            self.data = TensorDataset(torch.randint(WORDS, (samples, LENGTH + 1)))
        if tied:
            self.net.read.weight = self.net.embed.weight

    def get_blocks(self):
        return [*self.net.blocks]

    def train_step(self, global_step, batch, device):
        (codes,) = batch
        logits, wanted = self.net(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten()
        loss = F.cross_entropy(logits, wanted)
        self.log(right=(logits.argmax(-1) == wanted).float().mean())
        return loss, logits, wanted

    def val_step(self, global_step, batch, device):
        (codes,) = batch
        logits, wanted = self.net(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten()
        return F.cross_entropy(logits, wanted), logits, wanted

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_predict_dataloaders = get_train_dataloader

    def predict_step(self, global_step, batch, device):
        return self.net(batch[0][:, :-1]).argmax(-1)

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_per_epoch * epochs)]


TENSOR = {"net.blocks.*.up": "column", "net.blocks.*.down": "row"}
CLIP = {"clip": {"max_norm": 0.05, "log_norm": True}}
NOT_ALONE = ("ddp", "fsdp", "tp")


def train(pipeline, others=None, steps=4, module=None, look=None, **options):
    """Train on this rank; without `pipeline` as one process does."""
    plugins = {"accumulate": {"steps": steps}, **CLIP, **(others or {})}
    if pipeline is not None:
        plugins["pipeline"] = Pipeline(**pipeline)
    of_run = {"train_batch_size": 24, "val_batch_size": 8, **options}
    return train_tiny(plugins, functools.partial(Transformer, **(module or {})), look=look, **of_run)


def alone(others=None, **keywords):
    return train(None, {name: one for name, one in (others or {}).items() if name not in NOT_ALONE}, **keywords)


def one_after_another(cases):
    """Train each case on this rank: processes start once for all of them."""
    return [train(**case) for case in cases]


def assert_all_train_one_model(ranks, cases, rtol=1e-5, atol=1e-6):
    of_ranks = on_ranks(one_after_another, ranks, cases)
    for number, case in enumerate(cases):
        expected = alone(**{name: value for name, value in case.items() if name != "pipeline"})
        assert_one_model([of[number] for of in of_ranks], expected, rtol=rtol, atol=atol)
        yield case, of_ranks[0][number], expected


def parameters_here(trainer):
    named = trainer.module.named_parameters()
    here = [name for name, one in named if (one.to_local() if isinstance(one, DTensor) else one).numel()]
    return here, (trainer.share, trainer.shares)


def predicted(trainer):
    return trainer.predict(collect=True)


@pytest.mark.plugins
def test_two_stages_have_the_bits_of_one_process():
    cases = [
        {"pipeline": {}, "look": predicted},
        {"pipeline": {"schedule": "GPipe", "split": ["net.blocks.1"]}, "module": {"samples": 46}},
        {"pipeline": {"schedule": "Interleaved1F1B"}},
        {"pipeline": {"schedule": "ZBVZeroBubble"}},
    ]
    plain = {"clip": None}  # its norm is that of the norms of stages, which rounds otherwise
    cases = [{**case, "others": plain} for case in cases]
    for case, ours, expected in assert_all_train_one_model(2, cases):
        assert digest(ours.weights) == digest(expected.weights), case
        assert digest(ours.looked) == digest(expected.looked)


TIED = {"tied": True}
FSDP = {"fsdp": {"wrap": ["Block"]}}


@pytest.mark.plugins
def test_stages_of_two_ranks_train_what_one_process_trains():
    cases = [
        {"pipeline": {"size": 2}, "steps": 2, "module": TIED, "others": {"ddp": {}}, "look": parameters_here},
        {"pipeline": {"size": 2}, "steps": 2, "module": TIED, "others": FSDP},
        {"pipeline": {"size": 2}, "steps": 2, "others": {"tp": {"size": 2, "plan": TENSOR}}},
    ]
    looked = [ours.looked for _, ours, _ in assert_all_train_one_model(4, cases, rtol=1e-4, atol=1e-6)]
    here, share = looked[0]  # of rank 0, which has the last stage
    assert share == (0, 2)
    assert {name.partition(".blocks.")[2][:1] for name in here} == {"", "2", "3"}
    assert {"net.norm.weight", "net.embed.weight"} < set(here)  # the embedding because it is tied
    assert "net.place" not in here


@pytest.mark.plugins
@pytest.mark.slow
def test_other_schedules_over_four_ranks_train_what_one_process_trains():
    cases = [
        {"pipeline": {}, "module": TIED},
        {"pipeline": {"size": 2, "schedule": "Interleaved1F1B"}, "others": {"ddp": {}}},
        {"pipeline": {"size": 2, "schedule": "DualPipeV"}, "others": {"ddp": {}}},
        {"pipeline": {"size": 2, "schedule": "InterleavedZeroBubble"}, "others": {"ddp": {}}},
        {"pipeline": {"size": 2, "schedule": "Interleaved1F1B"}, "others": FSDP},
        {"pipeline": {"size": 2, "schedule": "LoopedBFS"}, "others": FSDP},
    ]
    for _ in assert_all_train_one_model(4, cases, rtol=1e-4, atol=1e-6):
        pass


# State --------------------------------------------------------------------------------

LAYOUTS = {
    "one": {},
    "stages": {"pipeline": {}},
    "stages ddp": {"pipeline": {"size": 2}, "ddp": {}},
    "stages fsdp": {"pipeline": {"size": 2}, "fsdp": {"wrap": ["Block"]}},
    "fsdp": {"fsdp": {"wrap": ["Block"]}},
}


def assert_close(ours, expected):
    torch.testing.assert_close(dict(ours), dict(expected), rtol=1e-4, atol=1e-6)


def save(folder, layout, steps=2, resume=None, **options):
    """Train with a checkpoint of each step; return the weights."""
    torch.set_num_threads(1)
    plugins = {
        "accumulate": {"steps": steps},
        "ema": {"decay": 0.5},
        **CLIP,
        **LAYOUTS[layout],
        "checkpoint": {"every": "1 steps", "keep_last": None},
    }
    module = Transformer(dropout=options.pop("dropout", 0.0), tied=True)
    trainer = tiny_trainer(plugins, module, train_batch_size=24, runs_folder=str(folder), resume=resume, **options)
    trainer.train()
    return {"weights": copy_state(trainer.export_model()), "metrics": trainer.metrics, "step": trainer.global_step}


def save_all(jobs):
    return [save(*job[:2], **job[2]) for job in jobs]


def at(folder, step):
    (found,) = [path for path in (folder / "run-1" / "checkpoints").iterdir() if path.name.endswith(f"{step:08}")]
    return str(found)


@pytest.mark.plugins
@pytest.mark.slow
def test_a_run_goes_on_with_the_same_bits_and_in_other_layouts(tmp_path):
    names = ["stages ddp", "stages fsdp"]
    whole = on_ranks(save_all, 4, [(tmp_path / name, name, {"dropout": 0.3}) for name in names])
    resumed = [(tmp_path / f"{name} again", name, {"dropout": 0.3, "resume": at(tmp_path / name, 1)}) for name in names]
    again = on_ranks(save_all, 4, resumed)
    for rank in range(4):
        for one, other in zip(whole[rank], again[rank], strict=True):
            assert digest(one) == digest(other)


@pytest.mark.plugins
def test_a_checkpoint_of_stages_is_read_elsewhere_and_the_other_way_round(tmp_path):
    torch.set_num_threads(1)
    whole = save(tmp_path / "one", "one")
    (first, _) = on_ranks(save_all, 2, [(tmp_path / "stages", "stages", {})])
    assert_close(first[0]["weights"], whole["weights"])
    jobs = [
        (tmp_path / "1", "stages", {"resume": at(tmp_path / "one", 3)}),
        (tmp_path / "2", "fsdp", {"resume": at(tmp_path / "stages", 3)}),
    ]
    for ours in on_ranks(save_all, 2, jobs)[0]:
        assert_close(ours["weights"], whole["weights"])
    assert_close(save(tmp_path / "3", "one", resume=at(tmp_path / "stages", 3))["weights"], whole["weights"])


# What is refused ----------------------------------------------------------------------


class Around(Words):
    """Does something that does not go from stage to stage."""

    def __init__(self, how):
        super().__init__(2, 0.0)
        self.how = how
        self.register_buffer("mean", torch.zeros(()))
        self.embed.kept = 0.0

    def forward(self, codes):
        mask = torch.ones(codes.shape[1], 1)
        x = first = self.embed(codes)
        if self.how == "attribute":
            self.embed.kept = x.mean()
        if self.how == "noise":
            x = x + torch.randn(codes.shape)[..., None]
        for block in self.blocks[::-1] if self.how == "order" else self.blocks:
            x = block(x, mask)
        if self.how == "twice":
            x = self.blocks[1](x, mask)
        if self.how == "skip":
            x = x + first
        if self.how == "buffer":
            self.mean += x.detach().mean()
        return self.read(self.norm(x)) + self.embed.kept


class Refused(Transformer):
    def __init__(self, how):
        super().__init__(2)
        self.net = Around(how)


HOWS = {
    "skip": "depends on an earlier stage in another way than through the arguments of net.blocks.1",
    "attribute": "depends on an earlier stage in another way than through the arguments of net.blocks.1",
    "buffer": "stages have changed the buffer net.mean in different ways",
    "noise": "draws random numbers (randn) behind a module of an earlier stage, where each stage has others",
    "order": "net.blocks.0 is called in stage 1, behind the end of its own, stage 0",
    "twice": "net.blocks.1, where a stage begins, is called twice in one step",
}
SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("order", "twice")]


def refused(how):
    trainer = tiny_trainer({"pipeline": {"split": ["net.blocks.1"]}}, Refused(how), train_batch_size=24)
    trainer.train()
    trainer.export_model()


@pytest.mark.plugins
@pytest.mark.parametrize("how", ["skip", "attribute", "buffer", "noise", *SLOW])
def test_what_goes_around_a_stage_is_refused(how):
    outcomes = run_ranks(refused, 2, how)
    told = "\n".join(outcome.output for outcome in outcomes)
    assert all(outcome.code for outcome in outcomes), told
    assert HOWS[how] in told, told
