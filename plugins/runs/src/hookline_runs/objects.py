"""The files of logged pictures and tables, in the folder `objects` of a run. Imports nothing heavy."""

from __future__ import annotations

import csv
import io
import re
import struct
import urllib.parse
import zlib
from pathlib import Path
from typing import Any

from hookline.files import clear, delete, make_folder, replacing

FOLDER = "objects"
NAMED = re.compile(r"(.+)-(\d+)\.(png|csv)")
LONGEST = 150  # characters of a name in that of its files


def stem(name: str) -> str:
    """Return how the files of an object begin: each name has another one, whatever is in it."""
    quoted = urllib.parse.quote(name, safe="").replace(".", "%2E")
    return quoted if len(quoted) <= LONGEST else f"{quoted[:LONGEST]}%{zlib.crc32(name.encode()):08x}"


def kept(folder: Path) -> list[tuple[str, int, Path]]:
    """Return the stem, the step and the path of each file, those of the first steps first."""
    if (folder / FOLDER).is_symlink():
        return []
    matches = ((NAMED.fullmatch(path.name), path) for path in (folder / FOLDER).glob("*"))
    return sorted(((match[1], int(match[2]), path) for match, path in matches if match), key=lambda one: one[1])


def drop_behind(folder: Path, step: int) -> None:
    """Remove the files of steps that are done again, and what a kill has left."""
    if not (folder / FOLDER).is_symlink():
        clear(folder / FOLDER)
    for _, at, path in kept(folder):
        if at > step:
            delete(path)


def keep(folder: Path, name: str, kind: str, value: Any, step: int, most: int) -> str:
    """Write a picture or a table at once as a whole; of the files of its name keep the last; return its path inside.

    Raises:
        OSError: the folder of objects is a link, or there is no room.
    """
    objects = folder / FOLDER
    if objects.is_symlink():
        raise OSError(f"{objects} is a link, and no object is written through it")
    make_folder(objects)
    path = objects / f"{stem(name)}-{step}.{'png' if kind == 'image' else 'csv'}"
    with replacing(path) as new:
        new.write_bytes(png(value) if kind == "image" else comma_separated(value))
    mine = [old for begin, _, old in kept(folder) if begin == stem(name)]
    for old in mine[: max(len(mine) - most, 0)]:
        delete(old)
    return f"{FOLDER}/{path.name}"


def png(pixels: Any) -> bytes:
    """Return an array (height, width, 3) of bytes as a PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # eight bits of red, green and blue
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def comma_separated(table: Any) -> bytes:
    """Return a table as CSV, its columns in the first line."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.plain_rows])
    return text.getvalue().encode()
