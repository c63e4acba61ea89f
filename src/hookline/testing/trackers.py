"""Checks of every tracker, by what its service has of real runs."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline.interfaces import CallbackInterface, Stage
from hookline.marks import hookimpl
from hookline.testing.caught import warnings_of
from hookline.testing.digest import digest
from hookline.testing.faults import kill, run
from hookline.testing.memory import Memory
from hookline.testing.tiny import tiny_trainer
from hookline.tracking import Histogram, Image, Table, Tracker

if TYPE_CHECKING:
    from hookline.trainer import Trainer

Points = dict[str, list[tuple[float, float]]]
Reader = Callable[[Path], Iterable[tuple[str, float, float]]]

SECRET = "hunter22"
SAVED, KILLED = 4, 9  # steps
OPTIONS: dict[str, Any] = {"log_every": "1 steps", "evaluate_every": "3 steps", "report_loss_after_eval": False}
QUIET = """
import pickle, sys
called, watched = [], ("socket.connect", "socket.getaddrinfo")
sys.addaudithook(lambda event, arguments: called.append((event, arguments)) if event in watched else None)
from hookline.testing.trackers import train_quietly
train_quietly(pickle.loads(bytes.fromhex(sys.argv[1])), sys.argv[2])
assert not called, called
"""


class Told(CallbackInterface):
    """Records what trackers get, in order.

    Args:
        batches: also values within validations, at the number of the batch.
    """

    observer = True

    def __init__(self, batches: bool = True) -> None:
        self.points: Points = {}
        """Positions and values by name."""
        self._batches, self._stage = batches, Stage.TRAIN

    @hookimpl
    def on_begin_run(self, stage: Stage) -> None:
        self._stage = stage

    @hookimpl
    def on_log(self, trainer: Trainer, metrics: Mapping[str, float], global_step: int) -> None:
        if trainer.stage is self._stage or self._batches:
            for name, value in metrics.items():
                self.points.setdefault(name, []).append((global_step, value))


@dataclass(eq=False)
class _Service(CallbackInterface):
    """Has secrets among its options: one by its name, one by its mark."""

    password: str = SECRET
    door: str = field(default=SECRET, metadata={"secret": True})


class _Shows(CallbackInterface):
    """Logs one object of each kind besides numbers."""

    @hookimpl
    def on_end_train_step(self, trainer: Trainer, global_step: int) -> None:  # type: ignore[override]
        if global_step == 1:
            for value in ("a text", Image(torch.ones(3, 4, 5)), Histogram(torch.ones(5)), Table(["x"], [[1]])):
                trainer.log_object(f"{type(value).__name__} of step 1", value)


class _SecondRank(CallbackInterface):
    @hookimpl
    def get_ranks(self) -> tuple[int, int, int]:
        return 1, 1, 2

    @hookimpl
    def get_share(self) -> tuple[int, int]:
        return 0, 1


class _SavesAndKills(CallbackInterface):
    """Saves a state; some steps later kills the process, when the tracker has what a save would wait for."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    @hookimpl
    def on_boundary(self, trainer: Trainer, global_step: int) -> None:
        if global_step == SAVED:
            trainer.save("to go on from")
        if global_step == KILLED:
            self.tracker.get_state()
            if not self.tracker.local:
                self.tracker.catch_up()
            kill()

    @hookimpl
    def save(self, trainer: Trainer) -> bool:
        torch.save(trainer.hook.get_run_state(trainer=trainer), trainer.run_dir / "state.pt")
        return True


def check_tracker(
    make: Callable[[], Tracker],
    read: Reader,
    folder: Path,
    plugins: Sequence[Any] = (),
    sdk: str | None = None,
    stored: Callable[[float], float] = float,
) -> None:
    """Assert that a tracker does in a whole run what every tracker must.

    The service has each logged value once, at its position: of training, of a separate evaluation and, if `log_batch`
    is overridden, of validations under way. No secret of the configuration is below the run's folder. Training gives
    the same bits as without the tracker, and continues if the service cannot start. Only rank 0 writes.

    Args:
        make: the class, or a function that makes a tracker, with the axis steps.
        read: yields a name, a position and a value for each point that the service has of a run, by the run's folder.
        folder: for the runs.
        plugins: beside the tracker.
        sdk: the module without which the tracker cannot start and reports what to install.
        stored: what the service makes of a value.
    """
    _check_a_run(make, read, folder / "whole", plugins, stored)
    _check_rank_one(make, folder / "second")
    _check_failures(make, folder / "failed", sdk)


def check_killed_tracker(
    make: Callable[[], Tracker],
    read: Reader,
    folder: Path,
    plugins: Sequence[Any] = (),
    stored: Callable[[float], float] = float,
) -> None:
    """Assert that no value is lost or doubled if a run is killed, in a separate process, and then resumed.

    Args:
        make: the class, or a function that makes a tracker, with the axis steps; it can be pickled.
        read: yields a name, a position and a value for each point that the service has of a run, by the run's folder.
        folder: for the runs.
        plugins: beside the tracker; they can be pickled.
        stored: what the service makes of a value.
    """
    outcome = run(_until_killed, make, folder / "cut", plugins)
    assert outcome.code == -signal.SIGKILL, f"the run to be killed ended by itself:\n{outcome.output}"
    cut = folder / "cut" / "run-1"
    seen = [place for place, _ in _points(read, cut).get("train_loss", [])]
    assert seen == list(range(1, len(seen) + 1)), f"of the run that was killed the service has places {seen}"
    assert len(seen) >= KILLED - 1 or not make().local, (
        f"only places up to {len(seen)} are on disk of a run that was killed behind {KILLED - 1}, after get_state()"
    )

    told = Told(_keeps_batches(make()))
    tiny_trainer([told], runs_folder=str(folder / "alone"), **OPTIONS).train()
    memory = Memory(torch.load(cut / "state.pt", weights_only=False))
    with warnings_of("tracking") as warned:
        trainer = tiny_trainer([*plugins, memory, make()], runs_folder=str(cut.parent), resume=str(cut), **OPTIONS)
        trainer.train()
    assert trainer.run_dir == cut
    _compare(_points(read, cut), told.points, stored, "killed and gone on with", warned)


def check_quiet_tracker(make: Callable[[], Tracker], folder: Path) -> None:
    """Assert that a run in a separate process writes only below its folder, connects to nothing and prints nothing.

    Its home, its working directory and its folder for temporary files do not change.

    Args:
        make: the class, or a function that makes a tracker; it can be pickled.
        folder: for the runs (`runs`), the home (`home`), the working directory (`place`) and temporary files
            (`temporary`).
    """
    homes = [folder / name for name in ("home", "place", "temporary")]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    before = _below(homes)
    environment = {**os.environ, "HOME": str(homes[0]), "TMPDIR": str(homes[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"), "PYTHONPATH": os.pathsep.join(sys.path)}
    if importlib.util.find_spec("matplotlib") is not None:  # an SDK may import it, and it caches fonts in the home
        environment["MPLCONFIGDIR"] = importlib.import_module("matplotlib").get_cachedir()
    command = [sys.executable, "-c", QUIET, pickle.dumps(make).hex(), str(folder / "runs")]
    done = subprocess.run(command, cwd=homes[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"the run has ended with {done.returncode}:\n{done.stderr}"
    assert not done.stdout + done.stderr, f"printed: {done.stdout + done.stderr}"
    assert _below(homes) == before, f"written elsewhere: {sorted(_below(homes) - before)}"


def train_quietly(make: Callable[[], Tracker], runs_folder: str) -> None:
    """Train with a tracker that gets one object of each kind: what `check_quiet_tracker` starts."""
    tiny_trainer([_Shows(), make()], runs_folder=runs_folder, epochs=1, log_every="1 steps").train()


def _below(folders: Iterable[Path]) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def _keeps_batches(tracker: Tracker) -> bool:
    return type(tracker).log_batch is not Tracker.log_batch


def _until_killed(make: Callable[[], Tracker], folder: Path, plugins: Sequence[Any]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tracker = make()
    tiny_trainer([*plugins, tracker, _SavesAndKills(tracker)], runs_folder=str(folder), **OPTIONS).train()


def _check_a_run(
    make: Callable[[], Tracker], read: Reader, folder: Path, plugins: Sequence[Any], stored: Callable[[float], float]
) -> None:
    tracker = make()
    told = Told(_keeps_batches(tracker))
    with warnings_of("tracking") as warned:
        trainer = tiny_trainer([*plugins, told, _Service(), tracker], runs_folder=str(folder), **OPTIONS)
        trainer.train()
    assert trainer.status == "finished"
    _compare(_points(read, trainer.run_dir), told.points, stored, "in a whole run", warned)
    without = tiny_trainer(runs_folder=str(folder), **OPTIONS)
    without.train()
    same = digest(trainer.module.state_dict()) == digest(without.module.state_dict())
    assert same, f"{type(tracker).__name__} changes what is trained"

    notes = _notes(trainer.run_dir)
    with warnings_of("tracking") as warned:
        trainer.test()
    _compare(_points(read, trainer.run_dir), told.points, stored, "after an evaluation on its own", warned)
    assert _notes(trainer.run_dir) == notes, "a training would go on with the run of an evaluation"
    for name, content in _contents(trainer.run_dir):
        assert SECRET.encode() not in content, f"{name} has a secret of the configuration"


def _check_rank_one(make: Callable[[], Tracker], folder: Path) -> None:
    tiny_trainer([_SecondRank(), make()], runs_folder=str(folder), epochs=1).train()
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert not written, f"rank 1 has written {written}"


def _check_failures(make: Callable[[], Tracker], folder: Path, sdk: str | None) -> None:
    def fail(run: Any) -> None:
        raise ConnectionError("no network")

    tracker = make()
    tracker.start = fail  # type: ignore[method-assign]
    assert "ConnectionError: no network" in _trained_all_the_same(tracker, folder)
    if sdk is not None:
        before = sys.modules.get(sdk)
        sys.modules[sdk] = None  # type: ignore[assignment]
        try:
            said = _trained_all_the_same(make(), folder)
        finally:
            del sys.modules[sdk]
            if before is not None:
                sys.modules[sdk] = before
        assert "pip install" in said, f"without {sdk} it must say what to install; it said {said}"


def _trained_all_the_same(tracker: Tracker, folder: Path) -> str:
    """Train to the end with a tracker that cannot start; return its warnings."""
    with warnings_of("tracking") as warned:
        trainer = tiny_trainer([tracker], runs_folder=str(folder), epochs=1)
        trainer.train()
    assert trainer.status == "finished"
    said = "\n".join(warned)
    assert "is switched off, and training goes on without it" in said, f"it cannot begin, and said {said or 'nothing'}"
    return said


def _points(read: Reader, folder: Path) -> Points:
    found: Points = {}
    for name, place, value in read(folder):
        found.setdefault(name, []).append((place, value))
    return {name: sorted(points) for name, points in found.items()}


def _compare(kept: Points, told: Points, stored: Callable[[float], float], when: str, warned: Sequence[str]) -> None:
    for name, points in told.items():
        wanted = [(place, stored(value)) for place, value in sorted(points)]
        assert kept.get(name, []) == wanted, (
            f"{when}, the service must have of {name} {wanted}; it has {kept.get(name, [])}; warnings: {warned}"
        )


def _notes(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "trackers").glob("*.json")}


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the names and the bytes of all files, also of those in archives."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from ((f"{path}/{name}", archive.read(name)) for name in archive.namelist())
