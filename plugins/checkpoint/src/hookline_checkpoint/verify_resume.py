"""The command `hookline verify-resume`: whether a run of yours that is killed and resumed ends with the same bits.

It trains the configuration once undisturbed and once more with kills at random places, each
followed by a resume, and compares what both have trained on and what they have become.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookline import CallbackInterface, hookimpl
from hookline.commands import add_configuration, new_parser
from hookline_checkpoint import storage
from hookline_checkpoint.compare import differences

if TYPE_CHECKING:
    from hookline import Trainer

EXAMPLES = """\
examples:
  hookline verify-resume run.yaml --kills 5
  hookline verify-resume run.yaml trainer.max_steps=60 "plugins.checkpoint.every=10 steps"
"""
TRACE = "trace.jsonl"
PLACES = ("on_end_backward", "on_begin_optimizer_step", "on_end_optimizer_step", "on_end_train_step", "on_boundary")
CLOCK = "trainer.counters.seconds"  # the one value that two runs cannot share
SHOWN = 10


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return 0 if the bits are the same, 1 if not.

    Raises:
        ValueError: the run cannot be verified: it fails by itself, or saves nothing.
    """
    options = _parser().parse_intermixed_args(words)
    chance = random.Random(options.seed)
    flags = [word for plugin in ["checkpoint", "no:progress", *options.plugins] for word in ("-p", plugin)]
    command = [sys.executable, "-m", "hookline", "fit", options.config, *options.overrides, *flags]
    name = re.sub(r"[^\w.-]+", "-", Path(options.config).stem)
    base = [*command, f"trainer.runs_folder={options.folder}", f"plugins.trace={{_plugin_: {__name__}.Trace}}"]

    whole = [*base, f"trainer.run_name={name}-whole"]
    _expect(subprocess.run(whole, capture_output=True, text=True, check=False), 0)
    expected = _newest(options.folder, f"{name}-whole")
    steps = _last(expected)
    print(f"undisturbed: {steps} steps, {expected}")

    cut = [*base, f"trainer.run_name={name}-killed"]
    for number, at in enumerate(sorted(chance.sample(range(steps), min(options.kills, steps)))):
        where = chance.choice(PLACES)
        killer = f"plugins.killer={{_plugin_: {__name__}.Killer, at: {at}, where: {where}}}"
        resume = ["--resume-or-start"] if number else []
        _expect(subprocess.run([*cut, *resume, killer], capture_output=True, text=True, check=False), -signal.SIGKILL)
        print(f"killed in {where} after step {at}")
    _expect(subprocess.run([*cut, "--resume-or-start"], capture_output=True, text=True, check=False), 0)
    resumed = _newest(options.folder, f"{name}-killed")
    print(f"resumed: {_last(resumed)} steps, {resumed}")

    found = [*_other_batches(expected, resumed), *_other_state(expected, resumed)]
    if not found:
        print(f"the same bits: every batch, every parameter, every state (seed {options.seed})")
        return 0
    print(f"not the same; first differs {found[0]}")
    for line in found[1:SHOWN]:
        print(f"  {line}")
    if len(found) > SHOWN:
        print(f"  and {len(found) - SHOWN} more: hookline checkpoints diff {expected} {resumed}")
    return 1


def _parser() -> argparse.ArgumentParser:
    about = "Train a configuration undisturbed and with kills and resumes, and compare the bits."
    parser = new_parser("hookline verify-resume", about, EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--kills", type=int, default=3, help="how often to kill it (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the places of the kills (default: 0)")
    parser.add_argument("--folder", default="runs", help="where both runs are made (default: runs)")
    return parser


def _expect(done: subprocess.CompletedProcess[str], code: int) -> None:
    if done.returncode != code:
        told = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise ValueError(f"the run ended with exit code {done.returncode} instead of {code}:\n  {told}")


def _newest(folder: str, name: str) -> Path:
    runs = {
        int(match[1]): path for path in Path(folder).iterdir() if (match := re.fullmatch(rf"{name}-(\d+)", path.name))
    }
    return runs[max(runs)]


def _last(run: Path) -> int:
    found = storage.listed(run / storage.FOLDER)
    if not found:
        raise ValueError(f"{run} holds no checkpoint to compare; plugins.checkpoint.every must not be null")
    return storage.step_of(found[0])


# What is compared ---------------------------------------------------------------------


def _other_batches(expected: Path, resumed: Path) -> Iterator[str]:
    """Give a line for each batch whose data were others; what was trained again counts as it was at last."""
    kept = [
        {line["batch"]: line["sha256"] for line in map(json.loads, (run / TRACE).read_text().splitlines())}
        for run in (expected, resumed)
    ]
    for batch in sorted({*kept[0], *kept[1]}):
        if kept[0].get(batch) != kept[1].get(batch):
            yield f"the data of batch {batch}"


def _other_state(expected: Path, resumed: Path) -> Iterator[str]:
    """Give a line for each tensor or value in which the last checkpoints differ."""
    ends = [storage.listed(run / storage.FOLDER)[0] for run in (expected, resumed)]
    order = ("module", "optimizers", "schedulers", "plugins", "rng", "logs", "trainer")
    lines = [line for line in differences(*ends) if not line.startswith(f"{CLOCK}:")]
    yield from sorted(lines, key=lambda line: order.index(line.split(".")[0]) if line.split(".")[0] in order else 0)


# The plugins that it puts into the runs -------------------------------------------------


@dataclass(eq=False)
class Killer(CallbackInterface):
    """Kill this process, as a power cut would, at one place of one step."""

    at: int = 0
    where: str = "on_boundary"

    def __post_init__(self) -> None:
        for place in PLACES:
            if place != self.where:
                setattr(self, place, None)

    def _kill(self, trainer: Trainer) -> None:
        if trainer.global_step >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    @hookimpl
    def on_end_backward(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._kill(trainer)

    @hookimpl
    def on_begin_optimizer_step(self, trainer: Trainer) -> None:
        self._kill(trainer)

    @hookimpl
    def on_end_optimizer_step(self, trainer: Trainer) -> None:
        self._kill(trainer)

    @hookimpl
    def on_end_train_step(self, trainer: Trainer) -> None:  # type: ignore[override]
        self._kill(trainer)

    @hookimpl
    def on_boundary(self, trainer: Trainer) -> None:
        self._kill(trainer)


@dataclass(eq=False)
class Trace(CallbackInterface):
    """Write down a hash of the data of each batch that is trained on."""

    @hookimpl(wrapper=True)
    def update(self, trainer: Trainer, window: Sequence[Any]) -> Iterator[Any]:
        lines = ""
        for index, batch in enumerate(window):
            hasher = hashlib.sha256()
            _feed(hasher, batch)
            lines += json.dumps({"batch": trainer.counters.batches + index, "sha256": hasher.hexdigest()}) + "\n"
        with (trainer.run_dir / TRACE).open("a") as file:
            file.write(lines)
        return (yield)


def _feed(hasher: Any, batch: Any) -> None:
    """Hash the tensors, numbers and texts of a batch; an object of another kind by its attributes, if it has any."""
    if isinstance(batch, torch.Tensor):
        hasher.update(batch.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(batch, Mapping):
        for key in batch:
            hasher.update(repr(key).encode())
            _feed(hasher, batch[key])
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            _feed(hasher, item)
    elif isinstance(batch, (int, float, str, bytes, bool)) or batch is None:
        hasher.update(repr(batch).encode())
    elif dataclasses.is_dataclass(batch):
        _feed(hasher, [getattr(batch, field.name) for field in dataclasses.fields(batch)])
    elif hasattr(batch, "__dict__"):
        _feed(hasher, vars(batch))
