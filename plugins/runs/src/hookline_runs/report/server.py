"""How the page and its questions are answered: what is let in, and what goes out."""

from __future__ import annotations

import csv
import hmac
import io
import ipaddress
import itertools
import json
import secrets
import socket
import socketserver
import sys
import threading
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hookline_runs import edits
from hookline_runs.curves import AXES
from hookline_runs.records import plain
from hookline_runs.report.inline import SCRIPTS, STYLES, file_of, inlined
from hookline_runs.report.shelf import Shelf, Unknown

MOST = 1 << 16  # bytes of a question that changes something
PAGE = {"/": ("index.html", "text/html; charset=utf-8"), "/icon.svg": ("icon.svg", "image/svg+xml")}
PAGE |= {f"/{name}": (name, "text/javascript; charset=utf-8") for name in SCRIPTS}
PAGE |= {f"/{name}": (name, "text/css; charset=utf-8") for name in STYLES}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
TO_KEEP = {"Content-Disposition": "attachment"}  # the page says under which name


class Refused(Exception):
    """Who asks for a change may not."""


class Server(ThreadingHTTPServer):
    """Answers the page and its questions."""

    daemon_threads = True

    def __init__(self, root: Path, host: str, port: int) -> None:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        where = str(address[0])
        self.shelf = Shelf(root)
        self.files = {}
        for path, (name, kind) in PAGE.items():
            self.files[path] = kind, file_of(name)
        super().__init__((where, port), _Handler)
        self.local = ipaddress.ip_address(where.partition("%")[0]).is_loopback
        """Whether nobody but this machine reaches it."""
        self.key = secrets.token_urlsafe(24) if self.local else None
        """What a page must know to change something; nobody may where others reach the address."""
        self.changing = threading.Lock()
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
        if not self._is_for_us():
            return
        parts = urlsplit(self.path)
        if parts.path in self.server.files:
            self._answer(HTTPStatus.OK, *self.server.files[parts.path])
            return
        words = parse_qs(parts.query, keep_blank_values=True)
        one = {name: values[-1] for name, values in words.items()}
        try:
            self._give(parts.path, words, one)
        except Unknown as error:
            self._tell(HTTPStatus.NOT_FOUND, {"error": str(error)})
        except ValueError as error:
            self._tell(HTTPStatus.BAD_REQUEST, {"error": str(error)})

    def _give(self, path: str, words: Mapping[str, list[str]], one: Mapping[str, str]) -> None:
        shelf = self.server.shelf
        name, since = one.get("name", ""), one.get("since", "")
        if path == "/api/runs":
            self._tell(HTTPStatus.OK, shelf.runs(since) | {"editable": self.server.key is not None})
        elif path == "/api/table":
            self._tell(HTTPStatus.OK, shelf.table(since))
        elif path == "/api/run":
            axis, thin = one.get("x", "step"), one.get("thin", "extremes")
            if axis not in AXES:
                raise ValueError(f"x={axis!r} is none of {', '.join(AXES)}")
            if thin not in ("extremes", "mean"):
                raise ValueError(f"thin={thin!r} is none of extremes, mean")
            curves = words.get("metric", []), words.get("fresh", [])
            self._tell(HTTPStatus.OK, shelf.run(name, axis, since, *curves, mean=thin == "mean"))
        elif path == "/api/object":
            self._answer(HTTPStatus.OK, *shelf.object(name, one.get("file", "")))
        elif path == "/api/text":
            text = shelf.text(name, one.get("object", ""), one.get("step", ""))
            self._answer(HTTPStatus.OK, "text/plain; charset=utf-8", text.encode(errors="replace"))
        elif path == "/api/curves.csv":
            self._stream(shelf.curves(words.get("name", []), words.get("metric", [])))
        elif path == "/api/page":
            body = inlined(shelf, words.get("name", []), one.get("view", ""))
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", body, TO_KEEP)
        else:
            raise Unknown(f"there is nothing at {path}")

    def do_POST(self) -> None:
        """Change what is written on a run, or delete one."""
        if not self._is_for_us():
            return
        path = urlsplit(self.path).path
        if path not in ("/api/notes", "/api/delete"):
            self._refuse()
            return
        try:
            self._tell(HTTPStatus.OK, self._change(path, self._body()))
        except Refused as error:
            self._tell(HTTPStatus.FORBIDDEN, {"error": str(error)}, {"Connection": "close"})
        except Unknown as error:
            self._tell(HTTPStatus.NOT_FOUND, {"error": str(error)}, {"Connection": "close"})
        except (ValueError, RecursionError) as error:
            self._tell(HTTPStatus.BAD_REQUEST, {"error": str(error)}, {"Connection": "close"})
        except OSError as error:
            self._tell(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}, {"Connection": "close"})

    def _body(self) -> dict[str, Any]:
        """Return what a page of ours sent.

        Raises:
            Refused: another site sent it, or somebody who does not know the key.
            ValueError: it is not what such a question is.
        """
        key, given = self.server.key, self.headers.get("X-Hookline-Key", "")
        if key is None:
            raise Refused("runs are only shown at this address: it can be reached from other machines")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        if (origin is not None and origin != f"http://{self.headers.get('Host')}") or site != "same-origin":
            raise Refused("another site asks for this")
        if not hmac.compare_digest(key.encode(), given.encode()):
            raise Refused("open the address that `hookline runs serve` printed, with the key behind #, to change runs")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or int(length) > MOST:
            raise ValueError(f"what is sent has a length, and at most {MOST} bytes")
        told = json.loads(self.rfile.read(int(length)))
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            raise ValueError("what is sent is an object with the name of a run")
        return told

    def _change(self, path: str, told: dict[str, Any]) -> dict[str, Any]:
        folder = self.server.shelf.folder(told.pop("name"))
        if path == "/api/delete" and told != {"confirmed": folder.name}:
            raise ValueError("a run is deleted when its name is confirmed")
        with self.server.changing:
            if path == "/api/delete":
                edits.delete_run(folder)
            else:
                edits.change_notes(folder, told)
        return {"done": folder.name}

    def _is_for_us(self) -> bool:
        host = self.headers.get("Host", "").lower()
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if not self.server.local or name in self.server.hosts:
            return True
        # Another site may have its own name lead to this machine; a browser then takes us for it.
        said = f"this page is not {host or 'without a name'}".encode()
        self._answer(HTTPStatus.FORBIDDEN, "text/plain", said, {"Connection": "close"})
        return False

    def _refuse(self) -> None:
        # It is closed, for what it wanted to say is not read.
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET", {"Allow": "GET", "Connection": "close"})

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _tell(self, status: HTTPStatus, answer: dict[str, Any], more: Mapping[str, str] | None = None) -> None:
        try:
            body = json.dumps(answer, allow_nan=False, separators=(",", ":"))
        except ValueError:
            body = json.dumps(plain(answer), separators=(",", ":"))
        self._answer(status, "application/json", body.encode(), more)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, more: Mapping[str, str] | None = None) -> None:
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body)), **(more or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, rows: Iterable[list[Any]]) -> None:
        """Send a table of any length as CSV, in parts, so that a browser knows whether it has all of it."""
        kind = {"Content-Type": "text/csv; charset=utf-8", "Transfer-Encoding": "chunked"}
        self._head(HTTPStatus.OK, {**kind, **TO_KEEP})
        left = iter(rows)
        try:
            while part := list(itertools.islice(left, 5000)):
                text = io.StringIO()
                csv.writer(text, lineterminator="\n").writerows(part)
                body = text.getvalue().encode(errors="replace")
                self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        except Unknown:  # it went meanwhile: without an end the browser does not take it for the whole
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: HTTPStatus, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what could not be understood, without repeating it."""
        self.request_version = self.protocol_version  # else no header would be sent
        self._answer(HTTPStatus(code), "text/plain", HTTPStatus(code).phrase.encode(), {"Connection": "close"})

    def version_string(self) -> str:
        return "hookline"

    def log_message(self, format: str, *args: Any) -> None:
        """Leave the terminal to what it is asked for."""
