"""Write the weights of a checkpoint for other programs, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hookline.files import replacing
from hookline.files.weights import INDEX, files_of, untie
from hookline_checkpoint import hf
from hookline_checkpoint.codec import join
from hookline_checkpoint.headers import HF
from hookline_checkpoint.storage import Buffer, read, read_manifest, read_tree, understanding
from hookline_checkpoint.stored import Form, Stored, of_checkpoint
from hookline_checkpoint.tensors import NATIVE, head_of, part_of
from hookline_checkpoint.writing import forget, put

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX))
SHARD = 5 * 10**9
"""Bytes in one file of Hugging Face's format, unless said otherwise."""


class Wanted(NamedTuple):
    """What is asked for: of which weights, and as which numbers."""

    path: Path
    """The checkpoint."""
    dtype: torch.dtype | None = None
    """Of all numbers with a fraction; None for their own."""
    average: str | None = None
    """The plugin whose average of the weights stands for them."""


class Source(NamedTuple):
    """Tensors that are made when they are written, in the order of their names."""

    forms: Mapping[str, Form]
    make: Callable[[str], torch.Tensor]
    tied: Mapping[str, str]
    """For each name that is not among them the one that it is."""


def export(
    wanted: Wanted, to: Path, form: str, max_shard_size: int | None, force: bool, folder: bool = False
) -> list[Path]:
    """Write the module's tensors of a checkpoint; return the files.

    Args:
        wanted: of which checkpoint.
        to: a file, or a folder, which then gets `model.safetensors` or `model.pt`.
        form: "safetensors", where tied weights are stored once, under their first name, and the
            metadata says which name is which, as `safetensors.torch.load_model` reads it;
            "torch", a state dict in which they are tied; or "hf", what `from_pretrained` reads.
        max_shard_size: bytes of tensors in one file; `to` is then a folder.
        force: replace files that are there.
        folder: `to` is a folder even if it is not there yet.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: a file is there, or this form cannot hold the module's state.
    """
    if form == "torch" and max_shard_size is not None:
        raise ValueError("--max-shard-size splits safetensors files; leave it away, or leave --format torch away")
    if form == "hf":
        return _export_hf(wanted, to, max_shard_size or SHARD, force)
    stored = of_checkpoint(wanted.path, wanted.average)
    sharded = max_shard_size is not None
    folder = folder or sharded or to.is_dir()
    if sharded and to.is_file():
        raise ValueError(f"--to={to}: --max-shard-size may write several files, so name a folder")
    home, name = (to, "model" + SUFFIXES[form]) if folder else (to.parent, to.name)
    # A loader that finds one file would not look at shards next to it, so neither may stay from another export.
    there = [home / name] if os.path.lexists(home / name) else []
    if folder and form == "safetensors" and home.is_dir():
        there = sorted(file for file in home.iterdir() if OURS.fullmatch(file.name))
    check_free(there, force)
    source = _as_stored(stored, wanted.dtype)
    if form == "torch":
        home.mkdir(parents=True, exist_ok=True)
        with replacing(home / name) as new:
            tensors = {key: source.make(key) for key in source.forms}
            torch.save({key: tensors[source.tied.get(key, key)] for key in stored.forms}, new)
        written = [home / name]
    else:
        _refuse_dtypes(source, "say --format torch")
        if home / INDEX in there:  # it would lead to files of two exports, if this one breaks off
            (home / INDEX).unlink()
        written = put_safetensors(source, home, name, max_shard_size)
    for file in set(there) - set(written):
        file.unlink(missing_ok=True)
    return written


def _as_stored(stored: Stored, dtype: torch.dtype | None) -> Source:
    """Return tensors under their own names, each of tied ones once."""
    forms = {name: _cast(stored.form(name), dtype) for name in stored.forms if name not in stored.tied}
    return Source(forms, lambda name: stored.read(name).to(forms[name].dtype), stored.tied)


def of_state(state: Mapping[str, torch.Tensor], otherwise: str) -> Source:
    """Return tensors that are in memory; those that are one memory are stored once, under the first name.

    Raises:
        ValueError: safetensors cannot hold one; `otherwise` says what to do.
    """
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            raise ValueError(f"safetensors holds dense tensors, and {key!r} is not one; {otherwise}")
    tensors, tied = untie(state)
    source = Source({name: Form(one.dtype, one.shape) for name, one in tensors.items()}, tensors.__getitem__, tied)
    _refuse_dtypes(source, otherwise)
    return source


def _cast(form: Form, dtype: torch.dtype | None) -> Form:
    return form._replace(dtype=dtype) if dtype is not None and form.dtype.is_floating_point else form


def _refuse_dtypes(source: Source, otherwise: str) -> None:
    for key, form in source.forms.items():
        if form.dtype not in NATIVE:
            raise ValueError(f"safetensors has no {form.dtype}, which {key!r} is; {otherwise}")


def check_free(there: Sequence[Path], force: bool) -> None:
    """Refuse to replace files, unless it is forced.

    Raises:
        ValueError: there is one.
    """
    if there and not force:
        raise ValueError(f"{', '.join(map(str, there))} is there already; name another place, or say --force")


# Hugging Face's format ----------------------------------------------------------------


def _export_hf(wanted: Wanted, to: Path, limit: int, force: bool) -> list[Path]:
    """Write what `from_pretrained` reads into a folder, which appears when it is whole."""
    said = _description(wanted.path)
    names = {*said["files"], hf.CONFIG}
    if os.path.lexists(to) and not to.is_dir():
        raise ValueError(f"--to={to} is a file; --format hf writes a folder")
    there = sorted(to.iterdir()) if to.is_dir() else []
    check_free(there, force)
    if others := [file.name for file in there if not (OURS.fullmatch(file.name) or file.name in names)]:
        raise ValueError(f"--to={to} holds {', '.join(others)}, which no export has written; name another folder")
    source = _as_theirs(of_checkpoint(wanted.path, wanted.average), hf.rules_of(said), wanted.dtype)
    _refuse_dtypes(source, f"leave it out: None in the names of {hf.METHOD}(), or say --dtype")
    config = said["config"] | {"dtype": _widest(source)}
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as new:
        new.mkdir()
        written = put_safetensors(source, new, "model.safetensors", limit)
        for name, content in {**said["files"], hf.CONFIG: json.dumps(config, indent=2) + "\n"}.items():
            (new / name).write_bytes(content.encode() if isinstance(content, str) else content)
            written.append(new / name)
    return [to / file.name for file in written]


def _description(path: Path) -> Mapping[str, Any]:
    """Return what the module has said of itself when the checkpoint was written."""
    about = read_manifest(path)
    if HF not in about["files"]:
        raise ValueError(
            f"{path} does not say how its weights are called in Hugging Face's format: the module had no {hf.METHOD}() "
            "when it was written (hookline_hf.HfModule has one). Give it one, or export with --format safetensors "
            "--max-shard-size 5GB, which writes the module's own names"
        )
    _, contents = read(path, {HF: read_tree})
    with understanding():
        said: Mapping[str, Any] = join({}, contents[HF])
        return said


def _as_theirs(stored: Stored, rules: Sequence[hf.Rule], dtype: torch.dtype | None) -> Source:
    """Return tensors under the names that they have there; each of tied ones, since not all readers tie them."""
    origins = hf.names_there(rules, stored.forms)

    def make(name: str, get: hf.Get) -> torch.Tensor:
        origin = origins[name]
        try:
            return origin.rule.there(origin.names, origin.place, get)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{own} {list(stored.forms[own].shape)}" for own in origin.names)
            raise ValueError(f"{hf.METHOD}() does not fit {shapes}, of which {name} is to be made: {error}") from error

    def formed(name: str) -> torch.Tensor:
        return torch.empty(stored.form(name).shape, dtype=stored.form(name).dtype, device="meta")

    made = {name: make(name, formed) for name in origins}
    forms = {name: _cast(Form(one.dtype, one.shape), dtype) for name, one in made.items()}
    return Source(forms, lambda name: make(name, stored.read).to(forms[name].dtype), {})


def _widest(source: Source) -> str | None:
    """Return the dtype as which all numbers can be loaded without loss, in the words of a configuration."""
    dtypes = {form.dtype for form in source.forms.values() if form.dtype.is_floating_point}
    widest = max(dtypes, key=lambda dtype: (dtype.itemsize, str(dtype)), default=None)
    return None if widest is None else str(widest).removeprefix("torch.")


# Files --------------------------------------------------------------------------------


def put_safetensors(source: Source, home: Path, name: str, limit: int | None = None) -> list[Path]:
    """Write tensors as safetensors, one in memory at a time, and read each file back; return the files.

    Args:
        source: the tensors.
        home: the folder, which is made if it is not there.
        name: the file's name, if there is one file.
        limit: bytes of tensors in one file.

    Raises:
        OSError: it could not be written, or what was read back is something else.
    """
    home.mkdir(parents=True, exist_ok=True)
    sizes = {key: form.nbytes for key, form in source.forms.items()}
    place: dict[str, str] = {}
    written = []
    for file, names in files_of(sizes, math.inf if limit is None else limit).items():
        path = home / (file if limit is not None else name)
        metadata = {key: first for key, first in source.tied.items() if first in names} | {"format": "pt"}
        with replacing(path) as new:
            _check(new, put(new, _parts(source, names, metadata)))
        written.append(path)
        place |= dict.fromkeys(names, file)
    if len(written) > 1:  # the index last: whoever reads through it finds all that it names
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {**place, **{key: place[kept] for key, kept in source.tied.items()}},
        }
        with replacing(home / INDEX) as new:
            new.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(home / INDEX)
    return written


def _parts(source: Source, names: Sequence[str], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    ordered = sorted(names, key=lambda key: -source.forms[key].dtype.itemsize)  # so that each is aligned
    yield head_of({key: source.forms[key] for key in ordered}, metadata)
    for key in ordered:
        yield from part_of(source.make(key))


def _check(path: Path, entry: Mapping[str, Any]) -> None:
    """Read a file back that was just written."""
    forget(path)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise OSError(f"{path} reads back as something else than was written; look at the disk")
