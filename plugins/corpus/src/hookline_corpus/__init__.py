"""Sequences of tokens from a corpus in shards, each token once an epoch, on any number of ranks."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import RandomSampler

from hookline import CallbackInterface, Stage, hookimpl, hookspecs, nearest
from hookline_corpus.shards import Files, HuggingFace, Mosaic, WebShards
from hookline_corpus.tokens import Tokens

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"
__all__ = ["Corpus", "Files", "HuggingFace", "Mosaic", "Tokens", "WebShards", "same_document"]

MEANS = ("tokens", "batches")


@dataclass(eq=False)
class Corpus(CallbackInterface):
    """Train on sequences of tokens: index their shards on all ranks together, keep their order, weigh by tokens.

    It serves the loaders whose data set is `hookline_corpus.Tokens`, and leaves others alone.
    """

    mean: str = "tokens"
    """What a mean over micro-batches and ranks weighs them by: their targets (tokens), or all alike (batches)."""

    def __post_init__(self) -> None:
        if self.mean not in MEANS:
            raise ValueError(f"corpus.mean={self.mean!r} must be one of {', '.join(MEANS)}{nearest(self.mean, MEANS)}")
        if self.mean == "batches":
            self.get_weight = None  # type: ignore[assignment, method-assign]

    @hookimpl
    def on_setup(self) -> None:
        """Begin anew: an object may have been another trainer's before."""
        self._marks: dict[str, Any] = {}  # what the order of the epoch under way depends on
        self._before: dict[str, Any] = {}  # the same at the checkpoint
        self._ready: list[Tokens] = []  # indexed by all ranks together

    @hookimpl(wrapper=True)
    def get_sampler(self, trainer: Trainer) -> Generator[None, Any, Any]:
        """Let `sampler(tokens)` keep the order that the tokens have."""
        sampler = yield
        prepare = self._prepare

        class Kept(sampler):  # type: ignore[misc, valid-type]
            def __init__(self, data_source: Any) -> None:
                prepare(trainer, data_source)  # before anybody asks for its length
                super().__init__(data_source)
                if isinstance(data_source, Tokens):
                    self.shuffle = False

        return Kept

    @hookimpl(wrapper=True, tryfirst=True)
    def setup_loader(self, trainer: Trainer, loader: Any, stage: Stage) -> Generator[None, Any, Any]:
        data = getattr(loader, "dataset", None)
        self._prepare(trainer, data)
        if isinstance(data, Tokens) and stage is Stage.TRAIN:
            if isinstance(loader.sampler, RandomSampler):
                trainer.say_once(
                    "the loader shuffles sequences that come shuffled already, so each of them reads a shard: leave "
                    "shuffle=True out"
                )
            self._compare(trainer, data)
        return (yield)

    def _prepare(self, trainer: Trainer, data: Any) -> None:
        """Index a corpus the first time that it is seen, on all ranks together."""
        if not isinstance(data, Tokens) or data in self._ready:
            return
        data.use_seed(trainer.options.seed)
        use_together(trainer, data)
        self._ready.append(data)

    @hookimpl
    def get_weight(self, trainer: Trainer, batch: Any, stage: Stage) -> float:
        targets = batch.get("targets") if isinstance(batch, Mapping) else None
        if not isinstance(targets, torch.Tensor):
            return hookspecs.get_weight(trainer=trainer, batch=batch, stage=stage)
        return float((targets >= 0).sum())

    # State ----------------------------------------------------------------------------

    def _compare(self, trainer: Trainer, data: Tokens) -> None:
        """Refuse to go on in the middle of an epoch of something else."""
        before, self._before, self._marks = self._before, {}, data.marks()
        names = {name: source.shards.names for name, source in data.sources.items()}
        told = differences(before, self._marks, names) if before else ""
        if told and trainer.position:
            raise ValueError(
                f"corpus: {told} since the checkpoint, in the middle of an epoch, so the rest of it would be another "
                "part of the corpus: put back what it was, or begin a new run with the weights of the checkpoint"
            )
        if told:
            trainer.say_once(f"corpus: {told} since the checkpoint; this epoch begins with what is there now")

    def get_state(self) -> dict[str, Any]:
        """Return what the order of this epoch depends on."""
        return dict(self._marks)

    def update_state(self, state: dict[str, Any]) -> None:
        """Take it back, to compare it."""
        self._marks = self._before = dict(state)


def use_together(trainer: Trainer, data: Tokens) -> None:
    """Index the shards of a corpus, each on one rank.

    Raises:
        ValueError: on all ranks, where one of them cannot read a shard.
    """
    told, mine = "", {}
    try:
        mine = data.measure(trainer.rank, trainer.world_size)
    except (OSError, ValueError) as error:
        told = str(error)
    ranks = trainer.hook.all_gather(trainer=trainer, value=(told, mine))
    for rank, (refused, _) in enumerate(ranks):
        if refused:
            raise ValueError(refused if len(ranks) == 1 else f"rank {rank}: {refused}")
    data.use_index({key: entry for _, entries in ranks for key, entry in entries.items()})


def differences(before: dict[str, Any], now: dict[str, Any], names: Mapping[str, list[str]]) -> str:
    """Return what has changed, in words; "" if nothing has. `names` are those of the shards."""
    told = [
        f"{name} was {old} and is {now['options'].get(name)}"
        for name, old in before["options"].items()
        if now["options"].get(name) != old
    ]
    if [*before["shards"]] != [*now["shards"]]:
        told.append(f"the sources were {[*before['shards']]} and are {[*now['shards']]}")
    for source, old in before["shards"].items():
        new = now["shards"].get(source, old)
        changed = [name for one, other, name in zip(old, new, names.get(source, new), strict=False) if one != other]
        if changed:
            told.append(f"{len(changed)} shards of the source {source!r} have changed, the first is {changed[0]}")
        if len(old) != len(new):
            told.append(f"the source {source!r} had {len(old)} shards and has {len(new)}")
    return "; ".join(told)


def same_document(documents: torch.Tensor) -> torch.Tensor:
    """Return which token may see which: itself and those before it in the same document.

    Args:
        documents: the documents of a batch, shape (batch, length).

    Returns:
        Booleans of shape (batch, 1, length, length), as `scaled_dot_product_attention` takes them for `attn_mask`.
    """
    return (documents[:, None, :, None] == documents[:, None, None, :]).tril()
