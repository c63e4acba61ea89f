"""The loaders of a run: the calls of the module's `get_*_dataloader`, and the private loaders made from them."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hookline.cadence import seconds
from hookline.counters import Cursor
from hookline.data import mistakes
from hookline.data.cursor import mix
from hookline.data.loaders import RunLoader, is_stateful, warn_of_order
from hookline.data.sampling import Epochs, Sharded
from hookline.data.seeding import mark_of
from hookline.interfaces import Loader, Stage
from hookline.randomness import kept_rng, set_seed

if TYPE_CHECKING:
    from hookline.run import Run


class Loaders:
    """Gets the loaders of a stage from the module, and keeps the run's private copies."""

    def __init__(self, trainer: Run) -> None:
        self.trainer = trainer
        self.given: collections.deque[Any] = collections.deque(maxlen=1)
        """The last batches, as many as a window has, each with its number of samples if its loader knows it."""
        self._asked: dict[Stage, Any] = {}  # with `keep_loaders`
        self._samplers: dict[Stage, type] = {}
        self._private: dict[tuple[Stage, str], RunLoader] = {}
        self._epochs = Epochs()
        self._warned = False  # of an order that may not be repeatable

    def get(self, stage: Stage) -> dict[str, Loader]:
        """Return the loaders of a stage by key, ready to iterate; none if the module has none.

        Raises:
            TypeError: what the module returned gives no batches.
        """
        trainer = self.trainer
        given = self._asked.get(stage)
        if given is None:
            given = self._ask(stage)
            if given is None:
                return {}
            given = _by_key(given)
            if stage is Stage.TRAIN and isinstance(given, Mapping):
                given = trainer.hook.join_loaders(trainer=trainer, loaders=given, sampler=self._samplers[stage])
            self._check(given, stage)
            if trainer.options.keep_loaders:
                self._asked[stage] = given
        named = given if isinstance(given, Mapping) else {"default": given}
        if stage is Stage.TRAIN:
            self._epochs.tell(given, trainer.epoch)
        setup = trainer.hook.setup_loader
        return {key: setup(trainer=trainer, loader=loader, stage=stage, key=key) for key, loader in named.items()}

    def _check(self, given: Any, stage: Stage) -> None:
        """Refuse what is no loader; say once if its batches have another size than was asked for."""
        trainer, options, training = self.trainer, self.trainer.options, stage is Stage.TRAIN
        method = f"{type(trainer.module).__name__}.get_{stage.value}_dataloader{'' if training else 's'}"
        asked = options.train_batch_size if training else options.val_batch_size
        size = trainer.micro_batch_size if training else asked
        for loader in given.values() if isinstance(given, Mapping) else [given]:
            mistakes.refuse(loader, method, size)
            own = None if asked == 1 else mistakes.other_size(loader, size)
            if own is not None and trainer.rank == 0:
                trainer.say_once(
                    f"{method}() was asked for batches of {size} (trainer.{'train' if training else 'val'}_batch_size="
                    f"{asked}), and its loader has batches of {own}, which counts; give it batch_size=batch_size",
                    about=f"{method} size",
                )

    def _ask(self, stage: Stage) -> Any:
        """Return the loader of the module, made under the same RNG state each time and on every rank.

        So a random split drawn in `get_*_dataloader` is one split: on all ranks, in training and in validation.
        """
        trainer, training = self.trainer, stage is Stage.TRAIN
        sampler = self._samplers[stage] = trainer.hook.get_sampler(trainer=trainer, stage=stage)
        ask = getattr(trainer.module, "get_train_dataloader" if training else f"get_{stage.value}_dataloaders")
        with kept_rng():
            set_seed(mix(trainer.options.seed, "loaders"))
            before = torch.get_rng_state()
            given = ask(
                sampler=sampler, batch_size=trainer.micro_batch_size if training else trainer.options.val_batch_size
            )
            drew = not torch.equal(before, torch.get_rng_state())
        if drew and training and trainer.epoch and not is_stateful(given):  # which draws when it is made
            trainer.say_once(
                f"{type(trainer.module).__name__}.get_train_dataloader() draws at random, and is asked under the same "
                "random state in every epoch, on every rank, as get_val_dataloaders is: a split stays one split. For "
                "another draw each epoch use a generator that is seeded by self.trainer.epoch"
            )
        return given

    def prepare(self, loader: Any, stage: Stage, key: str) -> RunLoader:
        """Return the run's private loader for a loader of the user's; the same one for the same object."""
        mine = self._private.get((stage, key))
        if mine is not None and mine.loader is loader and hasattr(loader, "__next__") and stage is not Stage.TRAIN:
            raise ValueError(
                f"get_{stage.value}_dataloaders gave the iterator ({type(loader).__name__}) of the evaluation before, "
                "which has been used: give a new one in each call, or a loader that can be iterated again"
            )
        if mine is None or mine.loader is not (loader.loader if isinstance(loader, Sharded) else loader):
            mine = self._private[stage, key] = self._make(loader, stage, key)
        mine.place()
        return mine

    def _make(self, loader: Any, stage: Stage, key: str) -> RunLoader:
        trainer, training = self.trainer, stage is Stage.TRAIN
        timeout = trainer.options.loader_timeout
        mine, refused = None, ""
        try:
            mine = RunLoader(
                loader,
                trainer.cursor if training else Cursor(seed=trainer.options.seed),
                trainer.share,
                trainer.shares,
                self._samplers.get(stage),
                0 if timeout is None else seconds(timeout),
                self._agree_on_order,
                self.given,
                trainer.say_once,
                "training loader" if training else f"{stage.value} loader {key!r}",
                lambda fetched: trainer.hook.fetch_batches(trainer=trainer, fetched=fetched, stage=stage, key=key),
            )
        except ValueError as error:
            refused = str(error)
        if trainer.shares > 1:
            refused = self._agree_on_loader(refused, getattr(loader, "dataset", None) if training else None)
        if mine is None or refused:
            raise ValueError(refused)
        if training and is_stateful(mine.loader) and trainer.plugins.performers("save"):
            mine.states = collections.deque(maxlen=trainer.window_size + 1)
        if training and mine.own_order and not self._warned:
            self._warned = True
            warn_of_order(mine.own_order)
        return mine

    def _agree_on_loader(self, refused: str, dataset: Any) -> str:
        """Return why a rank refuses its loader, on all ranks; warn once if their data sets differ.

        Compares the first and the last sample.
        """
        trainer = self.trainer
        said = refused, None if dataset is None else mark_of(dataset, trainer.options.seed)
        ranks = trainer.hook.all_gather(trainer=trainer, value=said)
        marks = [mark for _, mark in ranks if isinstance(mark, str)]
        if any(mark != marks[0] for mark in marks) and trainer.rank == 0:
            trainer.say_once(
                "the first or the last sample of the training data set is another one on other ranks. If their data "
                "sets are in another order, some samples are trained on twice and others never: seed alike on all "
                "ranks what orders or splits them, or do it in get_train_dataloader, asked under one random state"
            )
        texts = [text if isinstance(text, str) else "" for text, _ in ranks]
        if len({*texts}) == 1:
            return texts[0]
        return next(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)

    def _agree_on_order(self, drawn: Sequence[Any]) -> None:
        """Raise if ranks would take shares of different orders."""
        ranks = self.trainer.hook.all_gather(trainer=self.trainer, value=repr(drawn)[:10_000])
        for rank, other in enumerate(ranks):
            if other != ranks[0]:
                raise ValueError(
                    f"a loader's sampler draws another order on rank {rank} ({other[:60]} …) than on rank 0 "
                    f"({ranks[0][:60]} …), so their shares would overlap: pass `sampler=sampler(dataset)`, or seed the "
                    "sampler alike on all ranks"
                )

    def deals_batches(self, stage: Stage, key: str) -> bool:
        """Tell whether ranks take whole batches of a loader in turn, not samples."""
        mine = self._private.get((stage, key))
        return mine is None or mine.deals_batches

    def state(self) -> Any:
        """Return the state of a stateful training loader after the last trained batch; None for others."""
        loader, cursor = self._private.get((Stage.TRAIN, "default")), self.trainer.cursor
        states = [] if loader is None or loader.states is None else loader.states
        return next((state for place, state in states if place == cursor.position), cursor.loader_state)

    def begin_windows(self, size: int) -> None:
        """Remember as many batches as a window has."""
        self.given = collections.deque(maxlen=size)

    def forget(self) -> None:
        """Drop the private loaders of a run, with their persistent workers."""
        self._private.clear()
        self.given.clear()


def _by_key(given: Any) -> Any:
    """Return a list of loaders by their numbers, and what is none as it is; of one loader that one."""
    kinds = {*map(type, given)} if isinstance(given, (list, tuple)) else set()  # a list may hold many batches
    if not any(issubclass(kind, torch.utils.data.DataLoader) for kind in kinds):
        return given
    return given[0] if len(given) == 1 else {str(number): loader for number, loader in enumerate(given)}
