"""The page with all that it shows in one file, which needs no server: to send, to keep, and for notebooks."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hookline_runs.curves import AXES
from hookline_runs.follow import Follower
from hookline_runs.records import plain
from hookline_runs.report import told
from hookline_runs.report.shelf import Shelf, Unknown, check_folder, folders

SCRIPTS = (
    "uPlot.js", "base.js", "view.js", "list.js", "charts.js", "panel.js", "groups.js", "table.js", "plots.js",
    "media.js", "details.js", "edits.js", "save.js", "page.js",
)  # fmt: skip
STYLES = ("uPlot.css", "page.css")
LIBRARY = {"uPlot.js": "uPlot.iife.min.js", "uPlot.css": "uPlot.min.css"}  # what the page calls them, and the files
ROOM = 20_000_000  # bytes of pictures and tables that one file holds, those of the last steps
REFERENCE = re.compile(r'^<(?:link rel="(?:icon|stylesheet)"|script src=)[^\n]*\n', re.MULTILINE)


def inlined(shelf: Shelf, names: Sequence[str], view: str) -> bytes:
    """Return the page as one file, of some runs.

    Args:
        shelf: that has them.
        names: of the runs; those of all where there are none.
        view: what stands behind the # of the page's address; nothing for the runs as they are first shown.

    Raises:
        Unknown: there is no such run.
    """
    data = json.dumps(plain(_data(shelf, names, view)), allow_nan=False, separators=(",", ":"))
    page = REFERENCE.sub("", file_of("index.html").decode())
    style, script = ("\n".join(file_of(name).decode() for name in names) for names in (STYLES, SCRIPTS))
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data: blob:; connect-src data:"
    policy += f"; script-src {_hash(script)}; style-src {_hash(style)}"
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>\n'
    # "<" may end what a browser takes for data; inside of texts it can be written otherwise.
    data = data.replace("<", "\\u003c")
    tail = f'<script id="inlined" type="application/json">{data}</script>\n<script>{script}</script>\n'
    page = page.replace("</head>", head + "</head>", 1).replace("</body>", tail + "</body>", 1)
    return page.encode(errors="replace")


def file_of(name: str) -> bytes:
    """Return one of the files that the page is made of."""
    return (importlib.resources.files(__package__) / "page" / LIBRARY.get(name, name)).read_bytes()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(shelf: Shelf, names: Sequence[str], view: str) -> dict[str, Any]:
    chosen = sorted(set(names or folders(shelf.root)))
    listed, table = shelf.whole(chosen)
    runs = {}
    for name in chosen:
        with shelf.following(name) as follower:
            runs[name] = _run(follower)
            logged = {known["name"] for known in runs[name]["live"]["objects"]}
            texts = [known for known in follower.run.objects if "text" in known and known["name"] in logged]
            runs[name]["texts"] = {f"{known['name']}\n{known['step']}": known["text"] for known in texts}
    files, left_out = _files(shelf, runs)
    return {
        "view": view,
        "list": listed | {"editable": False},
        "table": table,
        "runs": runs,
        "files": files,
        "left_out": left_out,
    }


def _run(follower: Follower) -> dict[str, Any]:
    names = [name for name, series in follower.curves.by_name.items() if series.steps]
    curves = {name: {"extremes": _curve(follower, name), "mean": _curve(follower, name, mean=True)} for name in names}
    for curve in curves.values():
        if curve["mean"] == curve["extremes"]:
            del curve["mean"]
    return {"live": told.live(follower), "facts": told.facts(follower), "curves": curves}


def _curve(follower: Follower, name: str, mean: bool = False) -> dict[str, Any]:
    by_axis = {axis: told.points(follower, name, axis, None, mean) for axis in AXES}
    return {"y": by_axis["step"]["y"], "x": {axis: points["x"] for axis, points in by_axis.items()}}


def _files(shelf: Shelf, runs: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    """Return pictures and tables as addresses that hold them, those of the last steps, and how many find no room.

    What finds none is dropped from what is told of the runs.
    """
    wanted = [
        (step, run, one, file)
        for run, known in runs.items()
        for one in known["live"]["objects"]
        if one["kind"] == "file"
        for step, file in zip(one["steps"], one["files"], strict=True)
    ]
    room, files, left_out = ROOM, {}, 0
    for step, run, one, file in sorted(wanted, key=lambda found: found[0], reverse=True):
        kind, content = shelf.object(run, file)
        if len(content) > room:
            one["files"].remove(file)
            one["steps"].remove(step)
            left_out += 1
            continue
        room -= len(content)
        files[f"{run}\n{file}"] = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return files, left_out


class Shown:
    """What a notebook shows of runs: the page in a frame. `html` is the whole page, to be kept as a file."""

    def __init__(self, html: str, height: int) -> None:
        self.html = html
        self._height = height

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        style = f"width:100%;height:{self._height}px;border:1px solid #8888"
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" style="{style}"></iframe>'

    def __repr__(self) -> str:
        return f"a page of runs, {len(self.html):,} characters; a notebook shows it"


def show(*runs: str, folder: str | Path = "runs", view: str = "", height: int = 800) -> Shown:
    """Show runs in a notebook, as `hookline runs serve` shows them in the browser, as they are now.

    Args:
        runs: names of the runs; those of all where there are none.
        folder: where they are.
        view: what stands behind the # of the page's address.
        height: of the frame, in pixels.

    Raises:
        ValueError: there is no such folder or run.
    """
    return Shown(page_of(Path(folder), runs, view).decode(), height)


def page_of(folder: Path, runs: Sequence[str], view: str) -> bytes:
    """Return the page of some runs of a folder, or of all, as one file.

    Args:
        folder: where the runs are.
        runs: their names.
        view: the address of the page, or what stands in it behind the #.

    Raises:
        ValueError: there is no such folder or run.
    """
    check_folder(folder)
    _, _, behind = view.rpartition("#")
    try:
        return inlined(Shelf(folder.resolve()), runs, behind)
    except Unknown as error:
        names = sorted(folders(folder))
        raise ValueError(f"{error} in {folder}; there are {', '.join(names[-20:]) or 'none'}") from error
