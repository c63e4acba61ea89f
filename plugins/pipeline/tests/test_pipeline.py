"""Ranks over gloo that run stages of one model, against one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from hookline import ModuleInterface, copy_state
from hookline.testing import assert_one_model, digest, on_ranks, tiny_trainer, train_tiny
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


class Words(nn.Module):
    def __init__(self, blocks, dropout):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(blocks))
        self.norm, self.read = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, codes):
        mask = torch.ones(codes.shape[1], 1, device=codes.device)
        x = self.embed(codes) + self.place[: codes.shape[1]]
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

    get_val_dataloaders = get_train_dataloader

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


@pytest.mark.plugins
def test_two_stages_have_the_bits_of_one_process():
    cases = [
        {"pipeline": {}},
        {"pipeline": {"schedule": "GPipe", "split": ["net.blocks.1"]}, "module": {"samples": 46}},
        {"pipeline": {"schedule": "Interleaved1F1B"}},
        {"pipeline": {"schedule": "ZBVZeroBubble"}},
    ]
    plain = {"clip": None}  # its norm is that of the norms of stages, which rounds otherwise
    cases = [{**case, "others": plain} for case in cases]
    for case, ours, expected in assert_all_train_one_model(2, cases):
        assert digest(ours.weights) == digest(expected.weights), case


@pytest.mark.plugins
def test_four_ranks_train_what_one_process_trains():
    tied = {"tied": True}
    cases = [
        {"pipeline": {}, "module": tied},
        {"pipeline": {"size": 2}, "steps": 2, "module": tied, "others": {"ddp": {}}, "look": parameters_here},
        {"pipeline": {"size": 2}, "steps": 2, "module": tied, "others": {"fsdp": {"wrap": ["Block"]}}},
        {"pipeline": {"size": 2}, "steps": 2, "others": {"tp": {"size": 2, "plan": TENSOR}}},
        {"pipeline": {"size": 2, "schedule": "Interleaved1F1B"}, "others": {"ddp": {}}},
        {"pipeline": {"size": 2, "schedule": "InterleavedZeroBubble"}, "others": {"ddp": {}}},
        {"pipeline": {"size": 2, "schedule": "Interleaved1F1B"}, "others": {"fsdp": {"wrap": ["Block"]}}},
    ]
    looked = [ours.looked for _, ours, _ in assert_all_train_one_model(4, cases, rtol=1e-4, atol=1e-6)]
    here, share = looked[1]  # of rank 0, which has the last stage
    assert share == (0, 2)
    assert {name.partition(".blocks.")[2][:1] for name in here} == {"", "2", "3"}
    assert {"net.norm.weight", "net.embed.weight"} < set(here)  # the embedding because it is tied
    assert "net.place" not in here


# State --------------------------------------------------------------------------------

LAYOUTS = {
    "one": {},
    "stages": {"pipeline": {}},
    "stages ddp": {"pipeline": {"size": 2}, "ddp": {}},
    "stages fsdp": {"pipeline": {"size": 2}, "fsdp": {"wrap": ["Block"]}},
    "fsdp": {"fsdp": {"wrap": ["Block"]}},
}


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
def test_a_run_goes_on_with_the_same_bits_and_in_other_layouts(tmp_path):
    names = ["stages ddp", "stages fsdp"]
    whole = on_ranks(save_all, 4, [(tmp_path / name, name, {"dropout": 0.3}) for name in names])
    resumed = [(tmp_path / f"{name} again", name, {"dropout": 0.3, "resume": at(tmp_path / name, 1)}) for name in names]
    again = on_ranks(save_all, 4, resumed)
    for rank in range(4):
        for one, other in zip(whole[rank], again[rank], strict=True):
            assert digest(one) == digest(other)
