"""`hookline runs serve`: a page on the runs of a folder that goes on with them, on this machine alone unless asked.

It reads the records that the plugin `jsonl` keeps, with the pictures and tables that they name, and nothing else. What
stands in them is text of strangers: it leaves as JSON, and the page sets it as text. Names that a browser sends are
looked up among the runs and objects that were found; none is joined to a path before. Imports nothing heavy.
"""

from __future__ import annotations

import importlib.resources
import ipaddress
import json
import os
import socket
import socketserver
import stat
import statistics
import sys
import threading
import time
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hookline_runs.compare import flatten
from hookline_runs.curves import AXES, is_validated, panel_of
from hookline_runs.follow import Curves, Follower, Glance, thinned
from hookline_runs.layout import typed
from hookline_runs.objects import FOLDER, NAMED
from hookline_runs.records import FILE, Run, last_training, plain

PATIENCE = 0.3  # seconds that one look at the list may read records for
NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
OBJECTS, EXCERPT = 24, 2000  # objects whose last value is shown, and characters of a text
KINDS = {"png": "image/png", "csv": "text/plain; charset=utf-8"}
OPEN = 24  # runs whose curves are kept in memory
SHARES, LATELY = "time/", 100  # metrics of how time goes to plugins, and over how many of them the page takes the mean
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uPlot.js": ("uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uPlot.css": ("uPlot.min.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class Unknown(Exception):
    """What was asked for is not there."""


# What is told -------------------------------------------------------------------------


class Shelf:
    """The runs of a folder, as far as they were read; any number of threads may ask."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._id = os.urandom(4).hex()
        self._number = 0
        self._glances: dict[str, Glance] = {}
        self._told: dict[str, tuple[int, dict[str, Any]]] = {}
        self._followed: OrderedDict[str, tuple[threading.Lock, Follower]] = OrderedDict()
        self._listing, self._following = threading.Lock(), threading.Lock()

    def runs(self, since: str) -> dict[str, Any]:
        """Return the names of all runs, and what is new of each since an earlier answer."""
        with self._listing:
            self._look(time.monotonic() + PATIENCE)
            identity, _, number = since.partition(".")
            known = int(number) if identity == self._id and number.isdecimal() else -1
            self._number += 1
            for name, glance in self._glances.items():
                shown = _summary(glance)
                if name not in self._told or self._told[name][1] != shown:
                    self._told[name] = self._number, shown
            for name in [name for name in self._told if name not in self._glances]:
                del self._told[name]
            return {
                "token": f"{self._id}.{self._number}",
                "folder": str(self.root),
                "complete": all(glance.complete for glance in self._glances.values()),
                "names": list(self._told),
                "runs": [shown for changed, shown in self._told.values() if changed > known],
            }

    def _look(self, deadline: float) -> None:
        found = set(_folders(self.root))
        for name in [name for name in self._glances if name not in found]:
            del self._glances[name]
        for name in sorted(found - set(self._glances)):
            self._glances[name] = Glance(self.root / name)
        # Those that were read to their end before take little, and must not wait for the others.
        for name, glance in sorted(self._glances.items(), key=lambda pair: not pair[1].complete):
            try:
                glance.update(deadline)
            except OSError:
                del self._glances[name]

    def run(self, name: str, axis: str, since: str, metrics: Sequence[str], fresh: Sequence[str]) -> dict[str, Any]:
        """Return what is new of a run since an earlier answer.

        Args:
            name: of the run.
            axis: what goes to the right, one of `AXES`.
            since: the token of the earlier answer, or nothing.
            metrics: whose curves go on from where they were in it.
            fresh: whose curves were not in it.

        Raises:
            Unknown: there is no such run.
        """
        lock, follower = self._follow(name)
        with lock:
            try:
                follower.update()
            except OSError as error:
                raise Unknown(f"there is no run {name!r} any more") from error
            curves = follower.curves
            steps = curves.counters.steps
            facts = _facts(follower)
            summed = f"{zlib.crc32(json.dumps(facts).encode()):08x}"
            last = steps[-1] if steps else 0
            token = f"{follower.id}.{curves.edition}.{summed}.{follower.offset}.{last}"
            if since == token and not fresh:
                return {"token": token}
            earlier = since.split(".") if since.count(".") == 4 else [""] * 5
            known = earlier[:2] == [follower.id, str(curves.edition)]
            answer: dict[str, Any] = {"token": token, "anew": not known, "live": _live(follower), "curves": {}}
            if earlier[:3] != [follower.id, str(curves.edition), summed]:
                answer["facts"] = facts
            for metric in (*metrics, *fresh):
                if metric in curves.by_name:
                    seen = int(earlier[4]) if known and metric not in fresh else None
                    answer["curves"][metric] = _points(follower, metric, axis, seen)
            return answer

    def object(self, name: str, file: str) -> tuple[str, bytes]:
        """Return the kind and the content of a file that the record of a run names.

        Raises:
            Unknown: the record names none such, or it is gone, or a link.
        """
        lock, follower = self._follow(name)
        folder, _, inside = file.partition("/")
        match = NAMED.fullmatch(inside)
        try:
            with lock:
                follower.update()
                known = any(one.get("file") == file for one in follower.run.objects)
            if not known or folder != FOLDER or match is None or not {"/", "\\", "\0"}.isdisjoint(inside):
                raise Unknown(f"run {name!r} has no object {file!r}")
            if (self.root / name / FOLDER).is_symlink():
                raise Unknown(f"{FOLDER} of run {name!r} is a link")
            with open(os.open(self.root / name / file, os.O_RDONLY | NO_LINKS), "rb") as opened:
                if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                    raise Unknown(f"{file!r} of run {name!r} is no file")
                return KINDS[match[3]], opened.read()
        except OSError as error:
            raise Unknown(f"{file!r} of run {name!r} is gone") from error

    def _follow(self, name: str) -> tuple[threading.Lock, Follower]:
        with self._following:
            if name not in self._followed:
                if name not in set(_folders(self.root)):
                    raise Unknown(f"there is no run {name!r}")
                self._followed[name] = threading.Lock(), Follower(self.root / name)
            self._followed.move_to_end(name)
            while len(self._followed) > OPEN:
                self._followed.popitem(last=False)
            return self._followed[name]


def _folders(root: Path) -> Iterator[str]:
    """Give the names of run folders; links lead elsewhere and are none."""
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False) and (root / entry.name / FILE).is_file():
                yield entry.name


def _summary(glance: Glance) -> dict[str, Any]:
    run, best = glance.shown, glance.best
    steps = run.totals.get("steps")
    return {
        "name": run.folder.name,
        "status": run.status,
        "reason": run.reason,
        "step": run.step,
        "steps": steps if isinstance(steps, int) else None,
        "best": None if best is None else {"name": run.val_loss, "value": best[0], "step": best[1]},
        "seconds": run.seconds,
        "began": run.began,
        "revision": run.revision,
        "command": typed(run.command),
        "complete": glance.complete,
    }


def _facts(follower: Follower) -> dict[str, Any]:
    """Return what stays while a session lasts."""
    run = follower.run
    return {
        "folder": str(run.folder),
        "versions": run.versions,
        "sessions": len(run.sessions),
        "config": list(flatten(run.config)),
        "plan": run.plan,
    }


def _live(follower: Follower) -> dict[str, Any]:
    run = follower.run
    last = last_training(run.sessions) if run.sessions else None
    return {
        "metrics": [
            {
                "name": name,
                "panel": panel_of(name, run),
                "val": is_validated(name, run),
                "step": series.steps[-1],
                "value": _short(series.columns[0][-1]),
            }
            for name, series in follower.curves.by_name.items()
            if series.steps
        ],
        "shares": {
            name.removeprefix(SHARES): _short(statistics.fmean(series.columns[0][-LATELY:]))
            for name, series in follower.curves.by_name.items()
            if name.startswith(SHARES) and series.steps
        },
        "cost": run.cost,
        "session": 0.0 if last is None else last.ended - last.began,
        "checkpoints": [kept["path"] for kept in run.checkpoints[-3:]],
        "objects": _objects(run),
        "unreadable": run.unreadable,
    }


def _objects(run: Run) -> list[dict[str, Any]]:
    """Return the last value of each object that is a text or has a file."""
    last = {one["name"]: one for one in run.objects if "text" in one or "file" in one}
    shown = list(last.values())[:OBJECTS]
    return [one | ({"text": str(one["text"])[:EXCERPT]} if "text" in one else {}) for one in shown]


def _points(follower: Follower, metric: str, axis: str, since: int | None) -> dict[str, Any]:
    """Return where a curve goes on and with which points; `since` is the last step of which some were told."""
    series = follower.curves.by_name[metric]
    seen = 0 if since is None else bisect_left(series.steps, since)
    begin, steps, values = thinned(series, seen)
    return {
        "from": begin,
        "x": _places(follower.curves, follower.run.totals.get("batches_per_epoch"), axis, steps),
        "y": [None if value is None else _short(value) for value in values],
    }


def _places(curves: Curves, batches: Any, axis: str, steps: Sequence[int]) -> Sequence[float]:
    if axis == "step":
        return steps
    if axis == "epoch" and isinstance(batches, int) and batches > 0:  # in an epoch
        return [round(done / batches, 6) for done in curves.at("batches", steps)]
    return curves.at(axis, steps)


def _short(value: float) -> float:
    return float(f"{value:.7g}")


# How it is told -----------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers the page and its questions."""

    daemon_threads = True

    def __init__(self, root: Path, host: str, port: int) -> None:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        where = str(address[0])
        self.shelf = Shelf(root)
        self.files = {}
        folder = importlib.resources.files(__name__) / "page"
        for path, (name, kind) in PAGE.items():
            self.files[path] = kind, (folder / name).read_bytes()
        super().__init__((where, port), _Handler)
        self.local = ipaddress.ip_address(where.partition("%")[0]).is_loopback
        """Whether nobody but this machine reaches it."""
        shown = f"[{where}]" if family is socket.AF_INET6 else where
        self.hosts = {shown, "localhost", "127.0.0.1", "[::1]", host.lower()}
        self.url = f"http://{shown}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        """Bind, without asking a name server for our name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "hookline", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing where a browser has gone; else what was wrong."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds that a connection may be idle

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").lower()
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self.server.local and name not in self.server.hosts:
            # Another site may have its own name lead to this machine; a browser then takes us for it.
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", f"this page is not {host or 'without a name'}".encode())
            return
        parts = urlsplit(self.path)
        if parts.path in self.server.files:
            self._answer(HTTPStatus.OK, *self.server.files[parts.path])
            return
        try:
            if parts.path == "/api/object":
                words = parse_qs(parts.query, keep_blank_values=True)
                asked = (words.get(word, [""])[-1] for word in ("name", "file"))
                self._answer(HTTPStatus.OK, *self.server.shelf.object(*asked))
                return
            self._tell(HTTPStatus.OK, self._asked(parts.path, parts.query))
        except Unknown as error:
            self._tell(HTTPStatus.NOT_FOUND, {"error": str(error)})
        except ValueError as error:
            self._tell(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _asked(self, path: str, query: str) -> dict[str, Any]:
        words = parse_qs(query, keep_blank_values=True)
        since = words.get("since", [""])[-1]
        if path == "/api/runs":
            return self.server.shelf.runs(since)
        if path == "/api/run":
            axis, name = words.get("x", ["step"])[-1], words.get("name", [""])[-1]
            if axis not in AXES:
                raise ValueError(f"x={axis!r} is none of {', '.join(AXES)}")
            return self.server.shelf.run(name, axis, since, words.get("metric", []), words.get("fresh", []))
        raise Unknown(f"there is nothing at {path}")

    def _refuse(self) -> None:
        # It is closed, for what it wanted to say is not read.
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET", {"Allow": "GET", "Connection": "close"})

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _tell(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        try:
            body = json.dumps(answer, allow_nan=False, separators=(",", ":"))
        except ValueError:
            body = json.dumps(plain(answer), separators=(",", ":"))
        self._answer(status, "application/json", body.encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), **(more or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what could not be understood, without repeating it."""
        self.request_version = self.protocol_version  # else no header would be sent
        self._answer(HTTPStatus(code), "text/plain", HTTPStatus(code).phrase.encode(), {"Connection": "close"})

    def version_string(self) -> str:
        return "hookline"

    def log_message(self, format: str, *args: Any) -> None:
        """Leave the terminal to what it is asked for."""


def serve(folder: Path, host: str, port: int) -> None:
    """Serve a folder of runs until the process is ended; print where.

    Raises:
        ValueError: there is no such folder, or the address cannot be had.
        KeyboardInterrupt: by Ctrl-C.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder of runs {str(folder)!r}; training makes it (trainer.runs_folder)")
    if (folder / FILE).exists():
        raise ValueError(
            f"{str(folder)!r} is a run; name the folder that it lies in: {str(folder.absolute().parent)!r}"
        )
    try:
        server = Server(folder.resolve(), host, port)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be served: {error}") from error
    with server:
        if not server.local:
            print(
                f"hookline: whoever reaches {host} can read all runs of {folder}, without a password", file=sys.stderr
            )
        print(f"{server.url} shows the runs of {folder}; Ctrl-C ends it", flush=True)
        server.serve_forever()
