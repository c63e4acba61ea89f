"""Read the weights of other programs, from a file or a URL, without running the code that they may hold."""

from __future__ import annotations

import contextlib
import http.client
import io
import logging
import os
import pickle
import pickletools
import re
import tarfile
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file

SILENCE = 60.0  # seconds without a byte, after which a download is given up
PLACES = ("state_dict", "model", "model_state_dict", "module")  # where other programs put a module's state dict
HEAD = 100_000_000  # bytes: safetensors reads no longer head
PICKLES = 5  # that a file of torch's old format begins with
CURE = (
    "ask for a file of tensors and plain data alone, as a state dict is; or, only if you trust whoever made it, read "
    "it with unsafe=True (--unsafe), which runs the code that it holds"
)

log = logging.getLogger("hookline.checkpoint")


class ForeignError(ValueError):
    """What is raised for files of other programs that cannot be read, or are not read because they hold code."""


def load_foreign(source: str | os.PathLike[str], *, unsafe: bool = False) -> Any:
    """Return what another program has saved with torch.save or as safetensors; its tensors are on the CPU.

    The content of the file decides which of the two it is, and the name nothing. Tensors and plain
    data are read; a file that needs more is refused with a list of what it would import.

    Args:
        source: a path, or a URL that begins with http:// or https://; both are trusted as little.
        unsafe: read files of torch that need more, by running whatever code they hold. Only for
            files whose maker you trust.

    Raises:
        ForeignError: the file cannot be read, or holds more than tensors and plain data.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", source, re.I) if isinstance(source, str) else None
    if scheme:
        with tempfile.NamedTemporaryFile(prefix="hookline-") as file:
            shown = _download(str(source), scheme[1].lower(), file)
            return _load(file, Path(file.name), shown, unsafe)
    path = Path(source)
    if path.is_dir():
        raise ForeignError(f"{path} is a folder, and one file is wanted{_hint(path)}")
    if not path.is_file():
        raise ForeignError(f"there is no file {path}")
    try:
        with open(path, "rb") as file:
            return _load(file, path, str(path), unsafe)
    except OSError as error:
        raise ForeignError(f"{path} cannot be read: {error.strerror or error}") from error


def state_dict_of(loaded: Any, key: str | None = None) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the state dict within what `load_foreign` gave, and the keys of all that was left out.

    Args:
        loaded: a mapping of names to tensors, or one that has it under a usual key.
        key: where else it is; dots lead into mappings of mappings.

    Raises:
        ForeignError: there is none, or several and no key.
    """
    if key is None:
        if _is_state(loaded):
            return dict(loaded), []
        found = [place for place in PLACES if isinstance(loaded, Mapping) and _is_state(loaded.get(place))]
        if len(found) != 1:
            raise ForeignError(
                f"{'several' if found else 'none'} of {', '.join(PLACES)} is a mapping of names to tensors: "
                f"{_inside(loaded)}"
            )
        key = found[0]
    state, left, before = loaded, [], ""
    for part in key.split("."):
        if not isinstance(state, Mapping) or part not in state:
            raise ForeignError(f"--key={key} is not there: {_inside(loaded)}")
        left += [_printable(f"{before}{other}") for other in state if other != part]
        before += f"{part}."
        state = state[part]
    if not _is_state(state):
        raise ForeignError(f"--key={key} is {_odd(state)}, and names with tensors are wanted: {_inside(loaded)}")
    return dict(state), left


# Files --------------------------------------------------------------------------------


def _load(file: IO[bytes], path: Path, shown: str, unsafe: bool) -> Any:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(512)
    file.seek(0)
    if not size:
        raise ForeignError(f"{shown} is empty")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEAD:
        try:
            return load_file(path)
        except Exception as error:
            raise ForeignError(f"{shown} is a damaged safetensors file: {_printable(str(error))}") from error
    if unsafe:
        log.warning("%s is read with unsafe=True: whatever code it holds is run", shown)
        try:
            return torch.load(file, map_location="cpu", weights_only=False, mmap=False)
        except Exception as error:
            raise ForeignError(f"{shown} cannot be read: {type(error).__name__}: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of is read, or refused below
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        raise ForeignError(_refusal(file, head, shown, error)) from error


def _refusal(file: IO[bytes], head: bytes, shown: str, error: Exception) -> str:
    """Say why the safe reader did not read a file, and what can be done."""
    names: list[str] = []
    protocol = 0
    with contextlib.suppress(Exception):  # what cannot be taken apart ends the list
        for stream in _pickles(file, head):
            named, newest = _named(stream)
            names += named
            protocol = max(protocol, newest)
    unsafe = _unsafe(names)
    if unsafe:
        return (
            f"{shown} holds more than tensors and plain data, and to read it means to import and call what it names: "
            f"{', '.join(map(_printable, unsafe))}; {CURE}"
        )
    newer = protocol > 2 and isinstance(error, pickle.UnpicklingError)
    if newer or _is_tar(head):
        kind = f"with pickle protocol {protocol}" if newer else "in the tar format of old versions"
        return f"{shown} was saved {kind}, which torch does not read without running code: {CURE}"
    reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    told = (
        f": {_printable(reason)}" if reason and "weights_only" not in str(error) else ""
    )  # no advice to run the code of this
    return (
        f"{shown} is damaged, or no file of torch.save or safetensors: it begins with {head[:20]!r} "
        f"({type(error).__name__}{told})"
    )


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _pickles(file: IO[bytes], head: bytes) -> Iterator[IO[bytes]]:
    """Give every stream within a file of torch's formats that torch would unpickle."""
    file.seek(0)
    if head.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    with archive.open(name) as stream:
                        yield stream
        return
    if _is_tar(head):
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield tar.extractfile(member)  # type: ignore[misc]
        return
    yield file


def _named(stream: IO[bytes]) -> tuple[list[str], int]:
    """Return what the pickles of a stream would import, and the newest protocol; nothing is executed."""
    names: list[str] = []
    newest = 0
    for _ in range(PICKLES):
        found: list[str] = []
        protocol = 0
        pushed: list[Any] = []  # texts and what the memo gave, of which the last two name a STACK_GLOBAL
        memo: dict[int, Any] = {}
        try:
            value: Any
            for opcode, value, _ in pickletools.genops(stream):
                if opcode.name == "PROTO":
                    protocol = value
                elif opcode.name in ("GLOBAL", "INST"):
                    found.append(value.replace(" ", ".", 1))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(text if isinstance(text, str) else "?" for text in pushed[-2:]) or "?")
                elif opcode.name.startswith("EXT"):
                    found.append(f"copyreg extension {value}")
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1] if pushed else None
                elif "PUT" in opcode.name:
                    memo[value] = pushed[-1] if pushed else None
                elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                    pushed.append(memo.get(value))
                elif opcode.stack_after:
                    pushed.append(value)
        except Exception:  # no pickle, or half of one; text can look like one for a while
            return names + (found if protocol else []), max(newest, protocol)
        names += found
        newest = max(newest, protocol)
    return names, newest


def _unsafe(names: list[str]) -> list[str]:
    """Return those of some names that torch would not take as plain data, each once."""
    plain = {name for name in names if re.fullmatch(r"[!-~]+\.[!-~]+", name)}
    # torch tells it of files only, so ask with one that names them and does nothing else.
    lines = "".join("c{}\n{}\n".format(*name.rsplit(".", 1)) for name in plain)
    asked = io.BytesIO()
    with zipfile.ZipFile(asked, "w") as archive:
        archive.writestr("asked/data.pkl", b"\x80\x02" + lines.encode("ascii") + b".")
        archive.writestr("asked/version", "3\n")
    asked.seek(0)
    return sorted({*torch.serialization.get_unsafe_globals_in_checkpoint(asked), *(set(names) - plain)})


def _hint(path: Path) -> str:
    if (path / ".metadata").exists():
        return (
            "; one of torch.distributed.checkpoint is not read, because its .metadata is a pickle: if you trust "
            "whoever made it, turn it into a file with torch.distributed.checkpoint.format_utils"
        )
    if (path / "manifest.json").exists():
        return "; a checkpoint of hookline is for `resume` and for `hookline checkpoints export`"
    if any(path.glob("model*.safetensors")):
        return "; a folder in Hugging Face's format is for `checkpoint.initial`, of which each rank reads its share"
    return ""


# Downloads ----------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow no server to where nobody was asked to go: another protocol, or out of an encrypted one."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urlsplit(newurl).scheme
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            raise urllib.error.URLError(f"it leads on to {scheme}://, which is not followed from {req.type}://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, scheme: str, file: IO[bytes]) -> str:
    """Write what a URL holds into a file; return how to name the URL, without what may be secret in it."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ForeignError(f"{scheme}://… is no URL: {error}") from error
    shown = _printable(f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{'?…' if parts.query else ''}")
    if scheme not in ("http", "https"):
        raise ForeignError(f"{shown}: {scheme}:// is not read; give a path, or a URL of http:// or https://")
    if "@" in parts.netloc:
        raise ForeignError(f"{shown}: a URL with a name or a password in it is not read; download the file yourself")
    try:
        with urllib.request.build_opener(_Redirects).open(url, timeout=SILENCE) as response:
            promised, got = response.length, 0
            while chunk := response.read(2**20):
                got += file.write(chunk)
    except urllib.error.HTTPError as error:
        error.close()
        raise ForeignError(f"{shown}: the server answered {error.code} {_printable(error.reason)}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise ForeignError(f"{shown} cannot be downloaded: {_printable(str(reason))}") from error
    if promised is not None and got != promised:
        raise ForeignError(f"{shown}: the download broke off after {got} of {promised} bytes; try again")
    file.flush()
    return shown


# State dicts --------------------------------------------------------------------------


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and not _exceptions(value)


def _exceptions(mapping: Mapping[Any, Any]) -> list[Any]:
    return [key for key, kept in mapping.items() if type(key) is not str or not isinstance(kept, torch.Tensor)]


def _odd(value: Any) -> str:
    """Say what something is that is no state dict."""
    if not isinstance(value, Mapping):
        return f"of type {type(value).__name__}"
    if not value:
        return "empty"
    key = _exceptions(value)[0]
    return f"a mapping in which {key!r} is of type {type(value[key]).__name__}"


def _inside(loaded: Any) -> str:
    """Say what is in a file, and where tensors by name are."""
    if not isinstance(loaded, Mapping):
        return f"what was saved is of type {type(loaded).__name__}"
    states = [_printable(path) for path in _states(loaded)]
    keys = ", ".join(_printable(str(key)) for key in loaded) or "none"
    return f"the keys are {keys}; tensors by name are in {', '.join(states) or 'none'} (choose one with --key)"


def _states(mapping: Mapping[Any, Any], before: str = "", depth: int = 4) -> Iterator[str]:
    """Give the dotted keys of state dicts; not for ever, where a mapping contains itself."""
    for key, value in mapping.items():
        if type(key) is str and isinstance(value, Mapping) and depth:
            if _is_state(value):
                yield before + key
            else:
                yield from _states(value, f"{before}{key}.", depth - 1)


def _printable(text: str) -> str:
    """Return a text from elsewhere as one that a terminal shows and does not obey."""
    return text if text.isprintable() else ascii(text)
