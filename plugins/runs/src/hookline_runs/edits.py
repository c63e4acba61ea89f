"""Change what is written on runs, and delete them: what the commands and the page have in common.

A run is its folder itself: what is a link, or lies behind one, is neither changed nor removed. Imports nothing heavy.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline_runs.notes import Notes, checked, put_notes, read_notes
from hookline_runs.records import FILE, Run, is_alive, read_run

GONE = ".deleted-"  # what the name of a run begins with while it is removed


def change_notes(folder: Path, told: Mapping[str, Any]) -> None:
    """Change what is written on a run.

    Raises:
        ValueError: the folder is a link or no run, or notes hold no such thing, or those there cannot be read.
        OSError: there is no room, or no right to write.
    """
    put_notes(folder, checked(told, notes_of(folder)))


def notes_of(folder: Path) -> Notes:
    """Return what is written on a run, to be changed.

    Raises:
        ValueError: the folder is a link or no run, or what is there cannot be read.
    """
    _check_run(folder)
    notes = read_notes(folder)
    if notes.problem:
        raise ValueError(f"{folder.name}: {notes.problem}; mend or remove the file first")
    return notes


def tags_with(notes: Notes, add: Sequence[str], remove: Sequence[str]) -> list[str]:
    """Return the tags of notes with some added and some removed.

    Raises:
        ValueError: there is no such tag to remove.
    """
    for tag in remove:
        if tag not in notes.tags:
            raise ValueError(f"there is no tag {tag!r} to remove; there are {', '.join(notes.tags) or 'none'}")
    return [*(tag for tag in notes.tags if tag not in remove), *add]


def check_deletion(folder: Path) -> None:
    """Refuse what must not be deleted.

    Raises:
        ValueError: it is no run, or a link, or the run goes on, or may go on.
    """
    _check_run(folder)
    if reason := _why_kept(read_run(folder)):
        raise ValueError(f"the run {folder.name} is not deleted: {reason}")


def delete_run(folder: Path) -> None:
    """Remove a run's folder with all that is in it: record, checkpoints, objects.

    Links in it are removed, and what they lead to stays.

    Raises:
        ValueError: see `check_deletion`.
        OSError: something in it could not be removed; what is left is named by the error.
    """
    check_deletion(folder)
    gone = folder.with_name(f"{GONE}{folder.name}-{os.urandom(4).hex()}")
    folder.rename(gone)  # at once: no half of it is taken for a run
    shutil.rmtree(gone)


def _why_kept(run: Run) -> str:
    if is_alive(run):
        return "it is running; end it first"
    if run.status == "unknown":
        return (
            f"its record has no end, and its process was one of {run.sessions[-1].host}, so that it may be running; "
            "delete it there, or remove the folder yourself"
        )
    return ""


def _check_run(folder: Path) -> None:
    if folder.is_symlink() or (folder / FILE).is_symlink():
        raise ValueError(f"{str(folder)!r} is a link, and what it leads to stays as it is; name the folder itself")
    if not (folder / FILE).is_file():
        raise ValueError(f"{str(folder)!r} is no run: it holds no {FILE}")
