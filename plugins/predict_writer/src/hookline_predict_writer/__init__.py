"""Write predictions into files, in the order of the data, from any number of ranks."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from hookline import CallbackInterface, Stage, hookimpl, named_rows, nearest
from hookline.files import bytes_of, clear, delete, make_folder, replacing
from hookline_predict_writer.formats import SUFFIXES, WRITERS, check
from hookline_predict_writer.parts import Parts, blocks, columns_of, listed

if TYPE_CHECKING:
    from hookline import Trainer

__version__ = "0.1.0"

log = logging.getLogger("hookline.predict_writer")


@dataclass(eq=False)
class PredictWriter(CallbackInterface):
    """Write what `trainer.predict()` predicts into a file for each loader, in the order of the data.

    Ranks write parts of a limited size while they predict; rank 0 makes the file of them at the end. A prediction that
    was killed goes on after its complete parts if it is still the same one.
    """

    format: str = "npy"
    """npy (a folder with one file for each output), safetensors, parquet (needs pyarrow) or jsonl."""
    folder: str | None = None
    """For the files; null: `predictions` in the run folder."""
    part: str = "64MB"
    """Size of a part: what a rank holds in memory, and loses by a kill."""

    def __post_init__(self) -> None:
        if self.format not in WRITERS:
            raise ValueError(
                f"predict_writer.format={self.format!r} must be one of {', '.join(WRITERS)}"
                f"{nearest(self.format, WRITERS)}"
            )
        self._limit = bytes_of(self.part, "predict_writer.part")
        self._loaders: dict[str, GoingOn] = {}
        self._parts: dict[str, Parts] = {}

    @hookimpl(wrapper=True, tryfirst=True)  # outermost: who gives fewer batches of a loader counts all of them
    def setup_loader(self, loader: Any, stage: Stage, key: str) -> Generator[None, Any, Any]:
        given, loader = loader, (yield)
        if stage is not Stage.PREDICT:
            return loader
        self._loaders[key] = GoingOn(loader, length(getattr(given, "dataset", None)))
        return self._loaders[key]

    @hookimpl
    def on_begin_evaluation(self, trainer: Trainer, stage: Stage) -> None:
        if stage is not Stage.PREDICT:
            return
        if self.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ImportError(
                "predict_writer.format=parquet needs pyarrow: `pip install 'hookline-predict-writer[parquet]'`, or "
                f"choose one of {', '.join(name for name in WRITERS if name != 'parquet')}"
            )
        self._folder = Path(self.folder) if self.folder is not None else trainer.run_dir / "predictions"
        self._home = self._folder / ".parts"
        known = trainer.hook.all_gather(trainer=trainer, value=self._fingerprint(trainer))
        with trainer.rank_zero_first():
            if trainer.rank == 0:
                self._begin(known)
        self._parts = {
            key: Parts(self._home / str(trainer.rank) / quote(key, safe=""), self._limit, self.format)
            for key in self._loaders
        }
        own = {key: {int(path.stem) for path in listed(parts.folder, ".pt")} for key, parts in self._parts.items()}
        ranks = trainer.hook.all_gather(trainer=trainer, value=own)
        for key, parts in self._parts.items():
            batches = max(set.intersection(*(rank[key] for rank in ranks)), default=0)
            self._loaders[key].begin = batches
            self._loaders[key].states = parts.go_on(batches, trainer.shares)

    def _begin(self, known: Sequence[Mapping[str, Any]]) -> None:
        """Keep the parts of an earlier call if all that decides what is predicted is the same; else remove them."""
        make_folder(self._folder)
        clear(self._folder)
        file = self._home / "fingerprint.json"
        before = json.loads(file.read_text()) if file.exists() else None
        if before == known:
            log.info("predict_writer: goes on with the complete parts in %s", self._home)
            return
        if before is not None:
            other = [name for name in known[0] if [one.get(name) for one in before] != [one[name] for one in known]]
            log.warning("predict_writer: begins anew, as the prediction that was cut had another %s", ", ".join(other))
        delete(self._home)
        make_folder(self._home)
        with replacing(file) as new:
            new.write_text(json.dumps(known))

    def _fingerprint(self, trainer: Trainer) -> dict[str, Any]:
        """Return what decides about the predictions of this rank, as far as it can be known."""
        weights = Hashing()
        torch.save(trainer.module.state_dict(), weights)  # type: ignore[arg-type]
        who = {name for name, one in trainer.plugins.listed() if one is self or getattr(one, "observer", False)}
        plugins = {name: options for name, options in trainer.config.get("plugins", {}).items() if name not in who}
        return {
            "weights": weights.hash.hexdigest(),
            "module": repr((type(trainer.module).__qualname__, trainer.config.get("module"))),
            "plugins": repr(plugins),
            "seed": trainer.options.seed,
            "number of ranks": trainer.world_size,
            "batch size": trainer.options.val_batch_size,
            "data": {key: [length(loader), loader.samples] for key, loader in self._loaders.items()},
            "torch": torch.__version__,
        }

    @hookimpl
    def on_end_predict_step(self, outputs: Any, key: str, places: Sequence[int]) -> None:
        states = [torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []]
        self._parts[key].add(named_rows(outputs, len(places)), places, states)

    @hookimpl
    def on_end_predict_epoch(self, key: str) -> None:
        self._parts[key].write()

    @hookimpl(wrapper=True)
    def evaluate(self, trainer: Trainer, stage: Stage) -> Generator[None, Any, Any]:
        metrics = yield
        if stage is Stage.PREDICT:
            own = trainer.share, {key: len(listed(parts.folder)) for key, parts in self._parts.items()}
            ranks = trainer.hook.all_gather(trainer=trainer, value=own)
            with trainer.rank_zero_first():
                if trainer.rank == 0:
                    for key in self._parts:
                        self._finish(key, [(share, numbers[key]) for share, numbers in ranks])
                    delete(self._home)
        return metrics

    def _finish(self, key: str, ranks: Sequence[tuple[int, int]]) -> None:
        """Make the file of one loader, from the parts of the first rank of each share."""
        found = {}
        for rank, (share, number) in reversed([*enumerate(ranks)]):
            found[share] = listed(self._home / str(rank) / quote(key, safe=""))
            if len(found[share]) != number:
                raise ValueError(
                    f"predict_writer.folder: rank {rank} wrote {number} parts into {self._home}, of which rank 0 finds "
                    f"{len(found[share])}: name a folder on a file system that all ranks share"
                )
        paths = [found[share] for share in sorted(found)]
        columns, total = columns_of(paths)
        samples = self._loaders[key].samples
        if len(paths) > 1 and samples is not None and total > samples:
            raise ValueError(
                f"the ranks predicted {total} samples of the {samples} of the loader {key!r}: its sampler gives some "
                "twice, so that all ranks have as many. Pass `sampler=sampler(dataset)` in get_predict_dataloaders"
            )
        if not total:
            return
        check(self.format, columns)
        final = self._folder / (quote(key, safe=" ") + SUFFIXES[self.format])
        with replacing(final) as new:
            WRITERS[self.format](new, columns, total, lambda: blocks(paths))
        log.info("predict_writer: %d predictions in %s", total, final)


class GoingOn:
    """A loader whose first batches are passed over; then torch draws on from the random states that were there."""

    begin = 0
    states: Any = None

    def __init__(self, loader: Iterable[Any], samples: int | None) -> None:
        self.loader, self.samples = loader, samples

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        batches = itertools.islice(self.loader, self.begin, None)
        for number, batch in enumerate(batches):
            if not number and self.states is not None:
                torch.set_rng_state(self.states[0])
                if self.states[1]:
                    torch.cuda.set_rng_state_all(self.states[1])
            yield batch


class Hashing:
    """A file that keeps nothing but a hash."""

    def __init__(self) -> None:
        self.hash = hashlib.blake2b()

    def write(self, data: Any) -> int:
        """Take bytes."""
        self.hash.update(data)
        return len(data)

    def flush(self) -> None:
        """Have nothing to do."""


def length(items: Any) -> int | None:
    """Return how many items there are; None where it is unknown."""
    try:
        return len(items)
    except TypeError:
        return None
