"""The command `hookline checkpoints`: look at checkpoints, check them, take weights out and in, compare two.

Nothing here imports torch, so list, show and verify answer at once; export, import and diff import it when they begin.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline.commands import add_command, new_parser
from hookline.files import bytes_of
from hookline_checkpoint import ranking, storage
from hookline_checkpoint.headers import tensors_of
from hookline_checkpoint.storage import FOLDER, CheckpointError

EXAMPLES = """\
RUN is a run folder, a run's name below --folder, or one checkpoint. Where one checkpoint is wanted, a run
stands for its newest good one.

examples:
  hookline checkpoints list digits-1
  hookline checkpoints show runs/digits-1/checkpoints/step-000000000437
  hookline checkpoints verify digits-1 && echo all good
  hookline checkpoints export digits-1 --to digits.safetensors
  hookline checkpoints export digits-1 --to digits.pt --format torch
  hookline checkpoints export digits-1 --to exported/ --max-shard-size 2GB
  hookline checkpoints export digits-1 --to pretrained/ --format hf --dtype bfloat16
  hookline checkpoints import model.ckpt --to model.safetensors
  hookline checkpoints diff digits-1 digits-2 --section module
"""


def main(words: Sequence[str]) -> int:
    """Run the command with the words behind its name; return its exit code.

    Raises:
        ValueError: what the user can mend.
    """
    options = _parser().parse_args(words)
    try:
        code: int = options.command(options)
    except BrokenPipeError:  # the reader of our output has gone, which is no mistake
        raise
    except OSError as error:
        raise ValueError(str(error)) from error
    return code


def _parser() -> argparse.ArgumentParser:
    about = "Look at the checkpoints of a run, check them, take weights out and in, compare two."
    parser = new_parser("hookline checkpoints", about, EXAMPLES)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, summary: str, command: Any, *runs: str) -> argparse.ArgumentParser:
        added = add_command(commands, name, summary, command)
        for run in runs:
            added.add_argument(run, metavar=run.upper(), help="a run folder, a run's name, or a checkpoint")
        if runs:
            added.add_argument("--folder", default="runs", help="where runs are looked for by name (default: runs)")
        return added

    add(
        "list",
        "list checkpoints with step, epoch, age, size and the monitored metric; tell which are good, and the best",
        _list,
        "run",
    )
    add("show", "show the manifest of a checkpoint and its tensors by name, without their data", _show, "run")
    add("verify", "check every byte of every checkpoint; exit code 1 if one is bad", _verify, "run")
    export = add("export", "write the weights of a checkpoint for other programs", _export, "run")
    export.add_argument(
        "--to",
        required=True,
        metavar="PATH",
        help="the file to write; or a folder for it, which is there or ends with /",
    )
    export.add_argument(
        "--format", choices=["safetensors", "torch", "hf"], default="safetensors",
        help="torch: a state dict for torch.load(…, weights_only=True); hf: a folder for from_pretrained "
        "(default: safetensors)",
    )  # fmt: skip
    export.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE",
        help="split what is larger, e.g. 2GB, into several safetensors files and an index, as Hugging Face does "
        "(with --format hf: 5GB)",
    )  # fmt: skip
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="round numbers with a fraction to this (their own)"
    )
    export.add_argument(
        "--average", metavar="PLUGIN", help="take the average of the weights that a plugin keeps, such as ema"
    )
    export.add_argument("--force", action="store_true", help="replace files that are there")
    foreign = add("import", "write the weights of another program's file as safetensors, running no code", _import)
    foreign.add_argument("source", metavar="SOURCE", help="a file of torch.save or safetensors, or its http(s):// URL")
    foreign.add_argument("--to", required=True, metavar="FILE", help="the safetensors file to write")
    foreign.add_argument(
        "--key", help="where in SOURCE the tensors by name are, if not in a usual place; dots lead deeper"
    )
    foreign.add_argument(
        "--unsafe", action="store_true", help="run whatever code SOURCE holds; only if you trust its maker"
    )
    foreign.add_argument("--force", action="store_true", help="replace a file that is there")
    diff = add("diff", "tell by name in what two checkpoints differ; exit code 1 if they do", _diff, "a", "b")
    diff.add_argument(
        "--section", action="append", metavar="NAME",
        help="compare only this: module, optimizers, schedulers, plugins, trainer or rng; may be given again",
    )  # fmt: skip
    return parser


def _size(text: str) -> int:
    try:
        return bytes_of(f"{text}B" if text.isdecimal() else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# Which checkpoints --------------------------------------------------------------------


def checkpoints(named: str, folder: str) -> list[Path]:
    """Return the checkpoints that a word of the command line stands for, the newest first.

    Raises:
        ValueError: none.
    """
    for path in (Path(named), Path(folder) / named):
        if storage.NAME.fullmatch(path.name) and path.is_dir():
            return [path]
        for home in (path / FOLDER, path):
            found = storage.listed(home) if home.is_dir() else []
            if found:
                return found
    raise ValueError(
        f"there is no checkpoint in {named!r}, nor in {str(Path(folder) / named)!r}; name a run folder, a run below "
        f"--folder={folder}, or one checkpoint (`hookline runs` lists runs)"
    )


def checkpoint(named: str, folder: str) -> Path:
    """Return the one checkpoint that a word stands for: of a run the newest good one.

    Raises:
        ValueError: there is none, or none is good.
    """
    found = checkpoints(named, folder)
    if len(found) == 1 and found[0].name == Path(named).name:
        return found[0]
    path, _ = storage.newest_good(found[0].parent, storage.verify)
    return path


# The commands -------------------------------------------------------------------------


def _list(options: argparse.Namespace) -> int:
    found = checkpoints(options.run, options.folder)
    abouts = ranking.manifests(found)
    newest = next(iter(abouts.values()), {})
    monitor, mode = newest.get("monitor", "val_loss"), newest.get("mode") or ("min" if "mode" not in newest else "")
    best = ranking.best_of(found, monitor, mode) if mode else None
    width = max(len(monitor), 9)
    print(f"{'step':>12}  {'epoch':>5}  {'created':25}  {'size':>9}  {monitor:>{width}}  state")
    for path in found:
        about, verdict = _judge(path)
        value = ranking.value_of(about, monitor)
        step, epoch, created = storage.step_of(path), about.get("epoch", "?"), about.get("created", "?")
        size = 0
        with contextlib.suppress(OSError):  # a run that goes on may remove it meanwhile
            size = sum(entry.stat().st_size for entry in path.iterdir())
        shown = "-" if value is None else f"{value:.5g}"
        state = verdict or ("good, the best" if path == best else "good")
        print(f"{step:>12}  {epoch:>5}  {created:25}  {_bytes(size):>9}  {shown:>{width}}  {state}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    bad = 0
    for path in checkpoints(options.run, options.folder):
        _, verdict = _judge(path)
        print(f"{path}: {verdict or 'good'}")
        bad += bool(verdict)
    return 1 if bad else 0


def _judge(path: Path) -> tuple[Mapping[str, Any], str]:
    """Return what the manifest says, as far as it can be read, and why the checkpoint is bad, if it is."""
    about: Mapping[str, Any] = {}
    try:
        about = storage.read_manifest(path)
        storage.verify(path)
    except CheckpointError as error:
        return about, f"bad: {error}"
    return about, ""


def _show(options: argparse.Namespace) -> int:
    path = checkpoint(options.run, options.folder)
    about = storage.read_manifest(path)
    print(f"checkpoint: {path}")
    for key, value in about.items():
        if key != "files":
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{key}: {', '.join(map(str, text)) if isinstance(text, list) else text}")
    for name, entry in about["files"].items():
        print(f"{name}: {entry['size']} bytes, SHA-256 {entry['sha256']}")
    for section, tensors in tensors_of(path, about).items():
        print(f"\n{section}: {len(tensors)} tensors, {_bytes(sum(tensor.size for tensor in tensors))}")
        width = max((len(tensor.name) for tensor in tensors), default=0)
        for tensor in tensors:
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            same = f"  is {tensor.tied_to}" if tensor.tied_to else ""
            print(f"  {tensor.name:{width}}  {tensor.dtype:9}  {shape:12}  {_bytes(tensor.size):>9}{same}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from hookline_checkpoint import export
    from hookline_checkpoint.tensors import as_dtype

    path = checkpoint(options.run, options.folder)
    is_folder = options.to.endswith("/")
    to = Path(options.to)
    dtype = None if options.dtype is None else as_dtype(options.dtype)
    wanted = export.Wanted(path, dtype, options.average)
    written = export.export(wanted, to, options.format, options.max_shard_size, options.force, is_folder)
    for file in written:
        print(f"{file}  {_bytes(file.stat().st_size)}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from hookline_checkpoint import export, foreign

    to = Path(options.to)
    if to.is_dir() or options.to.endswith("/"):
        raise ValueError(f"--to={options.to} is a folder; name a file in it, like model.safetensors")
    export.check_free([to] if os.path.lexists(to) else [], options.force)
    loaded = foreign.load_foreign(options.source, unsafe=options.unsafe)
    state, left = foreign.state_dict_of(loaded, options.key)
    source = export.of_state(state, "take it in Python, by load_foreign")
    (file,) = export.put_safetensors(source, to.parent, to.name)
    print(f"{file}  {len(state)} tensors, {_bytes(file.stat().st_size)}")
    if left:
        print(f"left out: {', '.join(left)}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from hookline_checkpoint import compare

    paths = [checkpoint(named, options.folder) for named in (options.a, options.b)]
    differences = compare.differences(*paths, sections=options.section)
    for line in differences:
        print(line)
    if not differences:
        print("no difference")
    return 1 if differences else 0


def _bytes(size: int) -> str:
    for power, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size} B"
