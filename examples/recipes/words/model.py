"""The words of Python's own documentation, and a recurrent network that predicts the next of them."""

import re
from collections import Counter
from pydoc_data.topics import topics

import torch
from torch import nn


def load(words, rows, reach):
    """Return how the next words of a text are batched, training and validation: (chunks, rows, reach + 1) each.

    A row goes on in the next chunk, whose first word is the last one of the chunk before it.

    Args:
        words: how many different words there are; rarer ones are word 0.
        rows: how many texts are read at once.
        reach: how many words a chunk has.
    """
    said = re.findall(r"\w+|[^\w\s]", " ".join(topics[name] for name in sorted(topics)).lower())
    known = {word: code for code, (word, _) in enumerate(Counter(said).most_common(words - 1), 1)}
    codes = torch.tensor([known.get(word, 0) for word in said])
    parts = []
    for part in codes.tensor_split([len(codes) * 9 // 10]):
        chunks = (len(part) // rows - 1) // reach
        texts = part[: len(part) // rows * rows].view(rows, -1)
        parts.append(texts.unfold(1, reach + 1, reach)[:, :chunks].transpose(0, 1).contiguous())
    return parts


class Reader(nn.Module):
    """An LSTM between a table of words and the same table."""

    def __init__(self, words, width):
        super().__init__()
        self.table, self.drop = nn.Embedding(words, width), nn.Dropout(0.2)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(words))
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, codes, state):
        seen, state = self.lstm(self.drop(self.table(codes)), state)
        return self.drop(seen) @ self.table.weight.T + self.bias, state
