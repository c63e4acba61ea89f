"""The commands that write on runs, and delete them: `hookline runs tag`, `note`, `rename`, `archive`, `delete`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from hookline_runs import edits

Folders = Callable[[argparse.Namespace], Sequence[Path]]


def add_edits(add: Callable[..., argparse.ArgumentParser], where: argparse.ArgumentParser, folders: Folders) -> None:
    """Add the commands.

    Args:
        add: adds one.
        where: the options of all, among them that of the folder.
        folders: returns the folders of the runs that were named.
    """

    def command(name: str, about: str, run: Callable[[Path, argparse.Namespace], None]) -> argparse.ArgumentParser:
        def change(options: argparse.Namespace) -> None:
            for folder in folders(options):
                run(folder, options)

        return add(name, about, change, parents=[where])

    tag = command("tag", "add tags to runs, or remove some", _tag)
    tag.add_argument("runs", nargs="+", metavar="RUN", help="runs, by name or path")
    tag.add_argument("--add", action="append", default=[], metavar="TAG", help="a tag to add; may be given again")
    tag.add_argument("--remove", action="append", default=[], metavar="TAG", help="a tag to remove; may be given again")
    note = command("note", "write a note on a run", lambda f, o: edits.change_notes(f, {"note": o.text}))
    note.add_argument("runs", nargs=1, metavar="RUN", help="a run, by name or path")
    note.add_argument("text", help="the note, in place of the earlier one; empty for none")
    rename = command("rename", "give a run a title; its folder keeps its name", _rename)
    rename.add_argument("runs", nargs=1, metavar="RUN", help="a run, by name or path")
    rename.add_argument("title", help="shown with the name of the folder; empty for none")
    archive = command("archive", "leave runs out of lists", _archive)
    archive.add_argument("runs", nargs="+", metavar="RUN", help="runs, by name or path")
    archive.add_argument("--undo", action="store_true", help="list them again")

    def delete(options: argparse.Namespace) -> None:
        _delete(folders(options), options.yes)

    remove = add("delete", "delete runs that are over, with their checkpoints", delete, parents=[where])
    remove.add_argument("runs", nargs="+", metavar="RUN", help="runs, by name or path")
    remove.add_argument("--yes", action="store_true", help="do it; without it, the command says what it would delete")


def _tag(folder: Path, options: argparse.Namespace) -> None:
    if not options.add and not options.remove:
        raise ValueError("say which tags: --add TAG or --remove TAG")
    edits.change_notes(folder, {"tags": edits.tags_with(edits.notes_of(folder), options.add, options.remove)})


def _rename(folder: Path, options: argparse.Namespace) -> None:
    edits.change_notes(folder, {"title": options.title})


def _archive(folder: Path, options: argparse.Namespace) -> None:
    edits.change_notes(folder, {"archived": not options.undo})


def _delete(folders: Sequence[Path], sure: bool) -> None:
    for folder in folders:
        edits.check_deletion(folder)
    if not sure:
        listed = ", ".join(str(folder.absolute()) for folder in folders)
        raise ValueError(f"this deletes {listed}, with records and checkpoints; add --yes to do it")
    for folder in folders:
        edits.delete_run(folder)
        print(f"deleted {folder}")
