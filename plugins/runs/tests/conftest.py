"""What the tests of the page stand on: short files that count as long, and a server."""

import threading

import pytest
from plugins.runs.tests.recording import Client

from hookline_runs import follow, report


@pytest.fixture
def small(monkeypatch):
    """Make what is large small, so that short files are read in many parts and thinned."""
    monkeypatch.setattr(follow, "BLOCK", 1000)
    monkeypatch.setattr(follow, "HEAD", 1500)
    monkeypatch.setattr(follow, "TAIL", 500)
    monkeypatch.setattr(follow, "BUCKETS", 8)


@pytest.fixture
def serving(tmp_path):
    """Serve a folder; yield a client."""
    root = tmp_path / "runs"
    root.mkdir()
    server = report.Server(root, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield root, Client(server.url, server.key)
    server.shutdown()
    thread.join()
    server.server_close()
