"""What people write on a run: a title, tags, a note, and whether it is archived. Imports nothing heavy.

It is kept in `notes.json` in the run's folder, beside the record, which is never rewritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hookline.files import replacing

NOTES = "notes.json"
LONGEST = {"title": 200, "note": 10_000}  # characters
MOST_TAGS, LONGEST_TAG = 50, 60
NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Notes:
    """What people wrote on a run."""

    title: str = ""
    """Shown with the name of the folder, which stays what it is: checkpoints and commands go on naming it."""
    tags: tuple[str, ...] = ()
    note: str = ""
    archived: bool = False
    """Lists leave it out unless they are asked for it."""
    problem: str = ""
    """Why the file could not be read; it is not written over then."""


def read_notes(folder: Path) -> Notes:
    """Return what is written on a run; nothing without a file, the problem where it is none of ours."""
    try:
        with open(os.open(folder / NOTES, os.O_RDONLY | NO_LINKS), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return Notes(problem=f"{NOTES} is no file")
            return checked(json.loads(file.read()))
    except FileNotFoundError:
        return Notes()
    except (OSError, ValueError, RecursionError) as error:
        return Notes(problem=f"{NOTES} cannot be read: {error}")


def checked(told: Any, before: Notes | None = None) -> Notes:
    """Return notes with what was told changed in them.

    Raises:
        ValueError: it is not what notes hold.
    """
    if not isinstance(told, Mapping):
        raise ValueError("notes are an object of title, tags, note and archived")
    changed: dict[str, Any] = {}
    for name, value in told.items():
        if name in LONGEST:
            if not isinstance(value, str) or len(value) > LONGEST[name]:
                raise ValueError(f"{name} is a text of at most {LONGEST[name]} characters")
            changed[name] = " ".join(value.split()) if name == "title" else value.strip()
        elif name == "tags":
            changed[name] = _tags(value)
        elif name == "archived":
            if not isinstance(value, bool):
                raise ValueError("archived is true or false")
            changed[name] = value
        else:
            raise ValueError(f"notes have no {name!r}; they have title, tags, note and archived")
    return dataclasses.replace(before or Notes(), **changed)


def _tags(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
        raise ValueError("tags are a list of texts")
    tags = tuple(dict.fromkeys(tag.strip() for tag in value))
    for tag in tags:
        if not tag or len(tag) > LONGEST_TAG or "," in tag or not tag.isprintable():
            raise ValueError(f"{tag!r} is no tag: it has 1 to {LONGEST_TAG} characters, none of which is a comma")
    if len(tags) > MOST_TAGS:
        raise ValueError(f"a run has at most {MOST_TAGS} tags")
    return tags


def put_notes(folder: Path, notes: Notes) -> None:
    """Write notes into a run's folder, at once as a whole; a link in their place is replaced, not followed."""
    kept = {name: value for name, value in dataclasses.asdict(notes).items() if name != "problem"}
    with replacing(folder / NOTES) as new:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(kept, indent=2) + "\n")
