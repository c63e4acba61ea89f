"""Go on with a checkpoint: which one, whether all ranks can use it, and what speaks against it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookline import Stage
from hookline_checkpoint import fingerprint, storage
from hookline_checkpoint.layout import unpack, unpack_shared
from hookline_checkpoint.ranking import best_of
from hookline_checkpoint.storage import FOLDER, CheckpointError

if TYPE_CHECKING:
    from hookline import Trainer

State = dict[str, Any]
Rule = tuple[str, Callable[[], str]]

log = logging.getLogger("hookline.checkpoint")


def find_state(trainer: Trainer, rule: Rule) -> Mapping[str, Any]:
    """Return the trainer's part of the state that `restore` will choose, on all ranks; nothing where there is none."""
    found: list[Mapping[str, Any]] = []
    if trainer.rank == 0 and trainer.options.resume:
        named, said = _find_named(trainer, rule)
        there = [named] if named else [] if said else storage.listed(trainer.run_dir / FOLDER)
        good = next((path for path in there if storage.is_good(path)), None)
        found = [] if good is None else [unpack_shared(good, ["others"])["others"]["trainer"]]
    return next(iter(trainer.hook.all_gather(trainer=trainer, value=found)[0]), {})


def restore(trainer: Trainer, stage: Stage, strict: bool, rule: Rule) -> bool:
    """Set the state of the checkpoint that `trainer.resume` names, or of the newest good one of the run folder.

    Args:
        trainer: on all ranks.
        stage: what is to begin; a training may begin from scratch where there is no checkpoint yet.
        strict: refuse what speaks against a resume, instead of warning of it.
        rule: the metric by which one is the best, and a function that answers whether it is where this is "min" or
            "max".

    Raises:
        ValueError: there is none to evaluate, or what speaks against it.
        CheckpointError: none can be used.
    """
    chosen = _choose(trainer, stage, rule)
    if chosen is None:
        return False
    path, state = chosen
    if others := storage.changeable_by_others(path):
        said = f"others may have changed {path}: {'; '.join(others)}"
        _object(trainer, strict, said, "take the right from them")
    if stage is Stage.TRAIN:
        before = storage.read_manifest(path).get("fingerprint", {})
        states = {*state["plugins"], *state.get("own_plugins", {})}
        if different := fingerprint.differences(before, fingerprint.take(trainer), states):
            said = f"what follows is not what an unbroken run would do, since {path} was written otherwise: "
            _object(trainer, strict, said + "; ".join(different), "go on as before")
    if trainer.world_size > 1:
        state.pop("window", None)  # one rank alone has begun it; now all begin it anew
    trainer.hook.set_run_state(trainer=trainer, state=state, stage=stage)
    log.info("resumed from %s", path)
    return True


def _find_named(trainer: Trainer, rule: Rule) -> tuple[Path | None, str]:
    """Return the checkpoint that `trainer.resume` names, or why there is none; neither for the newest good one."""
    path, folder = Path(str(trainer.options.resume)), trainer.run_dir / FOLDER
    if storage.NAME.fullmatch(path.name):
        return path, ""
    if str(path) != path.name and path.parent.name != FOLDER:
        return None, ""  # a run, whatever its name is
    there = storage.listed(folder)
    if path.name.isdecimal():
        at_step = [one for one in there if storage.step_of(one) == int(path.name)]
        steps = ", ".join(dict.fromkeys(str(storage.step_of(one)) for one in there)) or "none"
        return next(((one, "") for one in at_step), (None, f"the steps of the checkpoints in {folder} are {steps}"))
    if path.name == "best":
        monitor, mode = rule
        best = best_of(there, monitor, mode())
        return (best, "") if best else (None, f"no checkpoint in {folder} has a finite {monitor} of an evaluation")
    return None, ""


def _choose(trainer: Trainer, stage: Stage, rule: Rule) -> tuple[Path, State] | None:
    """Return a checkpoint and its state; None where a training has none yet."""
    resume, folder = trainer.options.resume, trainer.run_dir / FOLDER
    named, said = trainer.hook.all_gather(trainer=trainer, value=_find_named(trainer, rule))[0]
    if said:
        raise ValueError(f"resume={resume!r}: {said}")
    read = functools.partial(_read, trainer)

    def find(folder: Path) -> list[Path]:
        """List the checkpoints, on all ranks as the first one sees them."""
        found: list[Path] = trainer.hook.all_gather(trainer=trainer, value=storage.listed(folder))[0]
        return found

    if named:
        state = _read_named(read, named)
        newer = [other.name for other in storage.listed(named.parent) if other.name > named.name]
        if newer and stage is Stage.TRAIN:
            log.warning(
                "going on with %s, while newer checkpoints stay: %s. They are not replaced when this run comes "
                "to their steps, and resume=true would take the newest; remove them if they are not wanted",
                named, ", ".join(newer),
            )  # fmt: skip
        return named, state
    if find(folder):
        return storage.newest_good(folder, read, find)
    if stage is not Stage.TRAIN:
        raise ValueError(
            f"resume={resume!r}: there is no checkpoint in {folder} to {stage.value} with; name a run or a "
            "checkpoint folder that has one, or leave resume away"
        )
    log.warning("no checkpoint yet in %s: starting from scratch", folder)
    return None


def _object(trainer: Trainer, strict: bool, said: str, cure: str) -> None:
    """Warn of what speaks against a resume, or refuse it."""
    if strict:
        raise ValueError(f"{said}. Either {cure}, or turn checkpoint.strict off to go on nevertheless")
    if trainer.rank == 0:
        log.warning("%s", said)


def _read(trainer: Trainer, path: Path) -> State:
    """Return the state of a checkpoint when each rank can use what it needs of it; all of them, or none.

    Raises:
        CheckpointError: it is damaged, as some rank sees it.
    """
    state, said = None, ""
    try:
        state = unpack(path, trainer.rank, functools.partial(trainer.hook.allocate, trainer=trainer))
    except CheckpointError as error:
        said = str(error)
    damaged = {rank: why for rank, why in enumerate(trainer.hook.all_gather(trainer=trainer, value=said)) if why}
    if len(damaged) == trainer.world_size and len({*damaged.values()}) == 1:
        raise CheckpointError(said)
    if damaged or state is None:
        raise CheckpointError("; ".join(f"rank {rank}: {why}" for rank, why in damaged.items()))
    return state


def _read_named(read: Callable[[Path], State], path: Path) -> State:
    try:
        return read(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"resume={str(path)!r} cannot be used: {error}; name another one, "
            "or the run folder to take its newest good one"
        ) from error
