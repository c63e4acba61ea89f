"""A small transformer that writes the documentation of Python, one character after the other.

hookline fit examples/chars.yaml
hookline predict examples/chars.yaml --resume
"""

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from hookline import ModuleInterface, hookimpl

TEXT = "\n".join(topics.values())  # in every CPython: what `help("for")` shows, 465,000 characters
ALPHABET = sorted(set(TEXT))
CODE_OF = {character: code for code, character in enumerate(ALPHABET)}


def encode(text):
    """Return the codes of a text's characters, int64 of shape (length,)."""
    return torch.tensor([CODE_OF[character] for character in text])


class Block(nn.Module):
    """Let every character look at those before it, then think about what it saw."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.before_look, self.before_think = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.think = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):  # (batch, length, width)
        heads = self.query_key_value(self.before_look(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.merge(seen.transpose(1, 2).flatten(2))
        return x + self.think(self.before_think(x))


class Chars(ModuleInterface):
    """Predict the next character of a text."""

    def __init__(
        self,
        context: int = 64,
        width: int = 128,
        heads: int = 4,
        blocks: int = 3,
        learning_rate: float = 2e-3,
        prompts: list[str] = ("The ", "class "),
        length: int = 300,
        temperature: float = 0.7,
    ):
        super().__init__()
        self.context, self.learning_rate = context, learning_rate
        self.prompts, self.length, self.temperature = list(prompts), length, temperature
        if unknown := set("".join(self.prompts)) - set(ALPHABET):
            raise ValueError(f"prompts={self.prompts} hold {sorted(unknown)}, which the text it learns from does not")

        train, val = encode(TEXT).tensor_split([len(TEXT) * 9 // 10])
        self.train_set = train.unfold(0, context + 1, 1)  # a window at every character; a view, no copy
        self.val_set = val.unfold(0, context + 1, context)  # every character once

        self.embed, self.place = nn.Embedding(len(ALPHABET), width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)), nn.LayerNorm(width))
        self.read = nn.Linear(width, len(ALPHABET))

    def logits(self, codes):
        return self.read(self.blocks(self.embed(codes) + self.place.weight[: codes.shape[1]]))

    def train_step(self, global_step, batch, device):
        return F.cross_entropy(self.logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    val_step = train_step

    def write(self, prompt, device):
        """Return the prompt and `length` characters more, drawn one by one."""
        codes = encode(prompt).to(device)
        for _ in range(self.length):
            logits = self.logits(codes[None, -self.context :])[0, -1]
            codes = torch.cat([codes, torch.softmax(logits / self.temperature, dim=0).multinomial(1)])
        return "".join(ALPHABET[code] for code in codes.tolist())

    def predict_step(self, global_step, batch, device):
        return [self.write(prompt, device) for prompt in batch]

    @hookimpl
    def on_end_predict_step(self, trainer, outputs):
        for text in outputs:
            print(text, end="\n\n")
            trainer.log_object("sample", text)

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.train_set, batch_size, sampler=sampler(self.train_set))

    def get_val_dataloaders(self, sampler, batch_size):
        return DataLoader(self.val_set, batch_size, sampler=sampler(self.val_set))

    def get_predict_dataloaders(self, sampler, batch_size):
        return DataLoader(self.prompts, sampler=sampler(self.prompts))

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        steps = self.trainer.totals.steps  # None where nobody can know, as with max_time alone
        schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)] if steps else []
        return [optimizer], schedulers
