"""A small Llama that learns the sources of Python's standard library, byte by byte, on one process or a mesh of them.

hookline fit examples/llm/run.yaml
hookline fit examples/llm/run.yaml --nproc 4 -p tp plugins.tp.size=2 -p fsdp
"""

import sys
import sysconfig
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hookline import ModuleInterface


def read_corpus():
    """Return the modules of the standard library, each behind a zero byte, uint8 of shape (about 5 million,)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [path.read_bytes() for path in files if path.stem in sys.stdlib_module_names]
    return torch.frombuffer(bytearray(b"".join(b"\0" + text for text in texts)), dtype=torch.uint8)


class Pieces(Dataset):
    """A text in pieces of one length, each with its next token: int64 of shape (length + 1,)."""

    def __init__(self, text, length):
        self.text, self.length = text, length

    def __len__(self):
        return (len(self.text) - 1) // self.length

    def __getitem__(self, number):
        return self.text[number * self.length :][: self.length + 1].long()


def rotate(x, base):
    """Turn pairs of features of each token by angles that grow with its place (RoPE); x: (batch, heads, length, d)."""
    half = x.shape[-1] // 2
    speeds = base ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=torch.float32), speeds)
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Attention(nn.Module):
    """Let every token look at those before it; several query heads share one head of keys and values (GQA)."""

    def __init__(self, width, heads, kv_heads, rope_base):
        super().__init__()
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self.head_width, self.rope_base = width // heads, rope_base
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)

    def forward(self, x):  # (batch, length, width)
        layers = self.query, self.key, self.value  # heads are counted from what they give: ranks may have some of them
        query, key, value = (layer(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for layer in layers)
        query, key = rotate(query, self.rope_base), rotate(key, self.rope_base)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.merge(seen.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Think about each token by itself (SwiGLU)."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, hidden, rope_base):
        super().__init__()
        self.before_attention, self.before_feed = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.attention, self.feed = Attention(width, heads, kv_heads, rope_base), FeedForward(width, hidden)

    def forward(self, x):
        x = x + self.attention(self.before_attention(x))
        return x + self.feed(self.before_feed(x))


class Llama(ModuleInterface):
    """Predict the next token of a text; a token is a byte."""

    def __init__(
        self,
        context: int = 128,
        width: int = 64,
        blocks: int = 4,
        heads: int = 4,
        kv_heads: int = 2,
        hidden: int = 160,
        vocabulary: int = 256,
        rope_base: float = 10_000.0,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
    ):
        super().__init__()
        self.context, self.learning_rate, self.weight_decay = context, learning_rate, weight_decay
        layers = [Block(width, heads, kv_heads, hidden, rope_base) for _ in range(blocks)]
        self.model = nn.Sequential(
            OrderedDict(
                embed=nn.Embedding(vocabulary, width),
                blocks=nn.Sequential(*layers),
                norm=nn.RMSNorm(width, eps=1e-5),
                read=nn.Linear(width, vocabulary, bias=False),
            )
        )
        nn.init.normal_(self.model.embed.weight, std=0.02)

    def train_step(self, global_step, batch, device):
        logits = self.model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    val_step = train_step

    def get_blocks(self):
        """Return what fsdp puts together, and activation_checkpoint and compile take, one at a time."""
        return list(self.model.blocks)

    def get_tp_plan(self):
        """Return how tp splits the model: heads and features over ranks, and between them the sequence."""
        return {
            "model.embed": "row to sequence",
            "model.blocks.*.before_*": "sequence",
            "model.blocks.*.attention": "input from sequence to whole",
            **{f"model.blocks.*.attention.{name}": "column" for name in ("query", "key", "value")},
            "model.blocks.*.attention.merge": "row to sequence",
            "model.blocks.*.feed": "input from sequence to whole",
            **{f"model.blocks.*.feed.{name}": "column" for name in ("gate", "up")},
            "model.blocks.*.feed.down": "row to sequence",
            "model.norm": "sequence",
            "model.read": "column from sequence to logits",
        }

    def split_corpus(self):
        """Return 19 parts of 20 for training, and the last one for validation."""
        text = read_corpus()
        return text.tensor_split([len(text) * 19 // 20])

    def get_train_dataloader(self, sampler, batch_size):
        pieces = Pieces(self.split_corpus()[0], self.context)
        return DataLoader(pieces, batch_size, sampler=sampler(pieces))

    def get_val_dataloaders(self, sampler, batch_size):
        pieces = Pieces(self.split_corpus()[1], self.context)
        return DataLoader(pieces, batch_size, sampler=sampler(pieces))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        options = {"betas": (0.9, 0.95), "weight_decay": self.weight_decay}
        return [torch.optim.AdamW(self.parameters(), self.learning_rate, **options)], []
