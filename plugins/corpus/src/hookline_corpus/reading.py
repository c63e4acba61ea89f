"""A shard read whole: its documents as token ids, what the index says of it, and reading ahead."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import pkgutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hookline.files import make_folder, replacing
from hookline_corpus.packing import Documents, best_fit


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the index says of a shard."""

    tokens: int
    sequences: int
    """With `packing: fit`; else 0, because sequences go on from shard to shard."""
    digest: str
    stamp: str | None


class Encoder:
    """Makes token ids of documents.

    Args:
        tokenizer: "bytes"; a function of a text, or its dotted path; a tokenizer with `encode`.
        end: the id that follows each text; None for none.
        vocabulary: how many ids there are; None if nobody says.
    """

    def __init__(self, tokenizer: Any, end: int | None, vocabulary: int | None) -> None:
        self.name, self.end, self.vocabulary = name_of(tokenizer), end, vocabulary
        if isinstance(tokenizer, str) and tokenizer != "bytes":
            try:
                tokenizer = pkgutil.resolve_name(tokenizer)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(
                    f"corpus: tokenizer={self.name!r} must be bytes, or the dotted path of a function of a text: "
                    f"{error}"
                ) from error
        if hasattr(tokenizer, "encode") and not isinstance(tokenizer, str):
            tokenizer = functools.partial(tokenizer.encode, add_special_tokens=False)
        self._call: Callable[[str], Any] | None = None if isinstance(tokenizer, str) else tokenizer

    def __call__(self, document: Any) -> np.ndarray[Any, Any]:
        """Return the ids of a document: a text, bytes, or ids, which stay as they are.

        Raises:
            ValueError: it is nothing of these.
        """
        if isinstance(document, (str, bytes)):
            if self._call is None:
                ids = np.frombuffer(document.encode() if isinstance(document, str) else document, np.uint8)
            else:
                made = self._call(document.decode() if isinstance(document, bytes) else document)
                ids = np.asarray(getattr(made, "ids", made), np.int64)
            return ids if self.end is None or not len(ids) else np.append(ids.astype(np.int64), self.end)
        ids = np.asarray(document)
        if ids.size and (ids.ndim != 1 or ids.dtype.kind not in "iu"):
            raise ValueError(
                f"a document must be a text or a row of token ids, and one is {type(document).__name__} "
                f"({ids.dtype}, shape {ids.shape})"
            )
        return ids.ravel()

    def encode(self, documents: list[Any]) -> Documents:
        """Return documents as tokens; empty ones are left out.

        Raises:
            ValueError: an id is below 0, or not in the vocabulary.
        """
        parts = [ids for ids in map(self, documents) if len(ids)]
        counts = np.array([len(ids) for ids in parts], np.int64)
        tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            bad = low if low < 0 else high
            place = int(np.searchsorted(np.cumsum(counts), int((tokens == bad).argmax()), side="right"))
            raise ValueError(
                f"document {place} has the token id {bad}, and ids go from 0 to "
                f"{'' if self.vocabulary is None else self.vocabulary - 1}: another tokenizer has made it, or "
                "vocabulary is too small"
            )
        kind = np.uint8 if high < 2**8 else np.uint16 if high < 2**16 else np.int64
        return Documents(tokens.astype(kind), counts)


def name_of(tokenizer: Any) -> str:
    """Return what tells tokenizers apart."""
    if isinstance(tokenizer, str):
        return tokenizer
    kind = tokenizer if hasattr(tokenizer, "__qualname__") else type(tokenizer)
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else ""
    return f"{kind.__module__}.{kind.__qualname__} {getattr(tokenizer, 'name_or_path', '')} {size}".strip()


class Source:
    """The shards of one source, read by number.

    Args:
        name: the name that the user gave it.
        shards: its shards.
        encoder: makes ids of documents.
        length: tokens of a sequence.
        packing: "cut" or "fit".
        folder: the folder of the index.
    """

    def __init__(self, name: str, shards: Any, encoder: Encoder, length: int, packing: str, folder: Path) -> None:
        self.name, self.shards, self.encoder = name, shards, encoder
        self.fitted = length if packing == "fit" else 0
        self.folder = folder
        if not shards.names:
            raise ValueError(f"corpus: the source {name!r} has no shards")

    def load(self, number: int, entry: Entry | None = None) -> tuple[Documents, Entry]:
        """Read a shard; return its documents, and its entry for the index.

        Raises:
            OSError: it cannot be read.
            ValueError: it holds something else than documents, or another content than the index says.
        """
        where = f"corpus: the shard {self.shards.names[number]!r} of the source {self.name!r}"
        try:
            stamp = self.shards.stamp(number)
            given = [*self.shards.read(number)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        except Exception as error:
            raise OSError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        try:
            documents = self.encoder.encode(given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        digest = hashlib.blake2b(documents.tokens, digest_size=8)  # type: ignore[arg-type]
        digest.update(documents.counts)  # type: ignore[arg-type]
        sequences = len(best_fit(documents.counts, self.fitted)) if self.fitted and entry is None else 0
        found = Entry(len(documents.tokens), sequences, digest.hexdigest(), stamp)
        if entry is not None and found.digest != entry.digest:
            raise ValueError(
                f"{where} has another content than when it was indexed ({found.tokens} tokens, then {entry.tokens}): "
                f"put the old one back, or delete {self._file(number)} and begin a new run"
            )
        return documents, found

    def entry(self, number: int) -> Entry:
        """Return the entry of a shard in the index; read the shard if it has none, or has been written anew.

        Raises:
            OSError: the shard cannot be read.
            ValueError: it holds something else than documents.
        """
        file = self._file(number)
        if file.exists():
            known = Entry(**json.loads(file.read_text()))
            with contextlib.suppress(OSError):  # which `load` tells
                if known.stamp == self.shards.stamp(number):
                    return known
        found = self.load(number)[1]
        make_folder(self.folder)
        with replacing(file) as new:
            new.write_text(json.dumps(dataclasses.asdict(found)))
        return found

    def _file(self, number: int) -> Path:
        shards = self.shards
        kind = type(shards).__qualname__, getattr(shards, "text", None), shards.names[number]
        said = kind, getattr(shards, "end", None), self.encoder.name, self.encoder.end, self.fitted
        name = hashlib.blake2b(repr((self.name, *said)).encode(), digest_size=12).hexdigest()
        return self.folder / f"{name}.json"


class Reading:
    """Something that is read once, in a thread if it is begun early; an error comes where it is wanted."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read, self._thread = read, None
        self._found: list[Any] = []
        self._error: BaseException | None = None

    def begin(self) -> None:
        """Read in a thread."""
        self._thread = threading.Thread(target=self._run, name="hookline-corpus", daemon=True)  # type: ignore[assignment]
        self._thread.start()  # type: ignore[attr-defined]

    def _run(self) -> None:
        try:
            self._found.append(self._read())
        except BaseException as error:
            self._error = error

    def get(self) -> Any:
        """Return what was read."""
        if self._thread is not None:
            self._thread.join()
        elif not self._found:
            self._run()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self._found[0]


class Ahead:
    """Keeps for each key what it read last, and reads on when a key comes to something for the second time."""

    def __init__(self) -> None:
        self._held: dict[Any, dict[Any, Reading]] = {}

    def get(self, key: Any, wanted: Any, following: Any, read: Callable[[Any], Any]) -> Any:
        """Return what `read(wanted)` returns; `following` is what the key will want next, or None."""
        held = self._held.setdefault(key, {})
        again = wanted in held
        self._held[key] = held = {one: reading for one, reading in held.items() if one in (wanted, following)}
        if not again:
            held[wanted] = Reading(functools.partial(read, wanted))
        elif following is not None and following not in held:
            held[following] = Reading(functools.partial(read, following))
            held[following].begin()
        try:
            return held[wanted].get()
        except BaseException:
            del held[wanted]  # whoever tries again reads again
            raise
