"""Pieces of Python's own documentation, and of its own code."""

import argparse
import inspect
import textwrap
from pydoc_data.topics import topics

LENGTH = 64


class Pieces:
    """Pieces of 64 bytes, each a token, with the label 1 for code; every tenth is for validation."""

    def __init__(self, validation: bool = False, pieces: int = 800):
        texts = "".join(topics[name] for name in sorted(topics)), inspect.getsource(argparse)
        both = [
            {"input_ids": list(cut(text, place)), "labels": label}
            for place in range(pieces)
            for label, text in enumerate(texts)
        ]
        self.pieces = [piece for place, piece in enumerate(both) if (place // 2 % 10 == 9) == validation]

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, index):
        return self.pieces[index]


def cut(text, place):
    """Return the piece of a text at a place, as bytes, its white space made even."""
    piece = " ".join(text[place * 100 : (place + 2) * 100].split())
    return textwrap.shorten(piece, 1000).encode("ascii", "replace")[:LENGTH].ljust(LENGTH)
