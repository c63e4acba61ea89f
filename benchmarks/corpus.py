"""What it costs to make sequences of tokens from a corpus, as ratios within one run.

    python benchmarks/corpus.py [--json] [--megabytes 50] [--length 2048] [--rounds 3]

The plain reading is what nobody can do without: each line of JSON is parsed, and its bytes become an array. An epoch
reads the same shards, counts their tokens against the index by a hash, orders their documents and packs them. The
ratio is of the CPU seconds of this process, the median over the rounds; the index is made before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hookline_corpus import Tokens

SHARDS = 16


def write(folder: Path, megabytes: int) -> None:
    """Write shards of documents of a heavy tail."""
    draw, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and"]
    for shard in range(SHARDS):
        left = megabytes * 10**6 // SHARDS
        with open(folder / f"{shard}.jsonl", "w") as file:
            while left > 0:
                text = " ".join(draw.choices(words, k=int(draw.paretovariate(1.2) * 40) % 20_000))
                file.write(json.dumps({"text": text}) + "\n")
                left -= len(text)


def plain(folder: Path) -> int:
    """Read all shards; return their tokens."""
    tokens = 0
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, "rb") as file:
            rows = [np.frombuffer(json.loads(line)["text"].encode(), np.uint8) for line in file]
        tokens += len(np.concatenate(rows))
    return tokens


def packed(folder: Path, length: int, packing: str) -> tuple[Callable[[], int], float]:
    """Return what goes through an epoch and returns its tokens, and the seconds that the index took."""
    data = Tokens(str(folder / "*.jsonl"), length, packing=packing, index=str(folder / "index"))
    begin = time.process_time()
    places = range(len(data))
    seconds = time.process_time() - begin
    return lambda: sum(int((data[place]["documents"] > 0).sum()) for place in places), seconds


def seconds_of(function: Callable[[], int]) -> tuple[float, int]:
    """Return the CPU seconds of a call, and what it returned."""
    begin = time.process_time()
    answer = function()
    return time.process_time() - begin, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.megabytes)
        ways = {packing: packed(folder, options.length, packing) for packing in ("cut", "fit")}
        rounds: dict[str, list[float]] = {"plain": [], "cut": [], "fit": []}
        for _ in range(options.rounds):
            seconds, tokens = seconds_of(lambda: plain(folder))
            rounds["plain"].append(seconds)
            for packing, (epoch, _) in ways.items():
                seconds, found = seconds_of(epoch)
                assert found == tokens
                rounds[packing].append(seconds)
    medians = {way: statistics.median(seconds) for way, seconds in rounds.items()}
    told = {"tokens": tokens, "plain tokens/s": round(tokens / medians["plain"])}
    for packing, (_, index) in ways.items():
        told[f"{packing} tokens/s"] = round(tokens / medians[packing])
        told[f"{packing} / plain"] = round(medians[packing] / medians["plain"], 2)
        told[f"index, {packing} / plain"] = round(index / medians["plain"], 2)
    print(json.dumps(told) if options.json else "\n".join(f"{name}: {value}" for name, value in told.items()))


if __name__ == "__main__":
    main()
