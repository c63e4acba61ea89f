"""Records, a client and processes for the tests of what reads runs."""

import contextlib
import http.client
import json
import os
import random
import subprocess
import sys
import time
from urllib.parse import urlencode, urlsplit

import pytest

from hookline_runs.records import FILE

XSS = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


# Records ------------------------------------------------------------------------------


def begin(session="a", moment=1000.0, **more):
    record = {
        "event": "begin", "session": session, "time": moment, "format": 1, "stage": "train", "command": ["fit", "me"],
        "revision": "0123456789abcdef", "host": "elsewhere", "pid": 1, "versions": {"hookline": "0.1.0"},
        "config": {"trainer": {"epochs": 2}, "optimizer": {"lr": 0.1}},
    }  # fmt: skip
    return {**record, **more}


def train(session="a", moment=1001.0, step=0, **more):
    totals = {"steps": 80, "epochs": 2, "steps_per_epoch": 40, "batches_per_epoch": 40}
    return {"event": "train", "session": session, "time": moment, "step": step, "epoch": 0, "totals": totals, **more}


def log(step, moment=1002.0, session="a", **metrics):
    counters = {"step": step, "epoch": step // 40, "batches": step, "samples": 8 * step, "seconds": step / 2}
    return {"event": "log", "session": session, "time": moment, **counters, "metrics": metrics}


def end(step, session="a", moment=1100.0, **more):
    told = {"status": "finished", "reason": "", **more}
    return {"event": "end", "session": session, "time": moment, "step": step, **told}


def text(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def write(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(text(*records))


def append(folder, *records):
    with (folder / FILE).open("a") as file:
        file.write(text(*records))


def any_records(seed):
    """Return the records of a run as training leaves them: killed, resumed, evaluated beside, with odd values."""
    chance = random.Random(seed)
    moment, records, reached = 1000.0, [], 0
    for number in range(chance.randint(1, 4)):
        session = f"{number:08x}"
        start = 0 if number == 0 else chance.randint(0, reached)
        records += [begin(session, moment), train(session, moment + 1, start)]
        for step in range(start + 1, start + chance.randint(2, 60)):
            moment += chance.random()
            value = chance.choice([chance.random(), chance.random(), "NaN", "Infinity"])
            records.append(log(step, moment, session, train_loss=chance.random(), grad_norm=value))
            if chance.random() < 0.2:
                records.append(log(step, moment, session, val_loss=chance.choice([chance.random(), "NaN"])))
            if chance.random() < 0.05:
                records.append({"event": "object", "session": session, "time": moment, "step": step, "name": "train"})
            if chance.random() < 0.03:
                other = f"{number:04x}{step:04x}"
                records += [begin(other, moment, stage="val"), log(step, moment, other, val_loss=0.0)]
            reached = step
        moment += 10
        if chance.random() < 0.5:
            records.append(end(reached, session, moment, status="stopped", reason="enough"))
    return records


def shown(step, file=None, name="drawn", **more):
    told = {"type": "a", "file": file} if file else {}
    return {"event": "object", "session": "a", "time": 1003.0, "step": step, "name": name, **told, **more}


def asked(run, file):
    return "/api/object?" + urlencode({"name": run, "file": file})


# The server ---------------------------------------------------------------------------


class Client:
    """Asks as the page does, and keeps what the page keeps."""

    def __init__(self, url, key=None):
        self.url, self.key = urlsplit(url), key

    def ask(self, path, method="GET", body=b"", **headers):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                if value is not None:
                    connection.putheader(name, value.encode())
            connection.endheaders(body or None)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def json(self, path, **words):
        status, headers, body = self.ask(f"{path}?{urlencode(words, doseq=True)}")
        assert (status, headers["Content-Type"]) == (200, "application/json")
        return json.loads(body, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))

    def runs(self, since=""):
        return self.json("/api/runs", since=since)

    def run(self, name, since="", **words):
        return self.json("/api/run", name=name, since=since, **words)


@contextlib.contextmanager
def command(*arguments, **more):
    """Serve in a process of its own; yield it and where."""
    words = [sys.executable, "-m", "hookline", "runs", "serve", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, **pipes, **more) as process:
        try:
            yield process, process.stdout.readline().split()[0]
        finally:
            process.kill()


TRAINING = """
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule, tiny_trainer
from hookline_runs import Jsonl


class Odd(TinyModule):
    def train_step(self, global_step, batch, device):
        self.log(**{XSS: 1.0})
        return super().train_step(global_step, batch, device)


@dataclass(eq=False)
class Waits(CallbackInterface):
    '''Train no further than somebody lets it.'''

    name: str = XSS
    folder: str = "."

    @hookimpl
    def on_boundary(self, global_step):
        while int((Path(self.folder) / "steps").read_text() or 0) <= global_step:
            time.sleep(0.01)


options = {"runs_folder": sys.argv[1] + "/runs", "run_name": "live", "log_every": "1 step", "epochs": 100}
plugins = {"jsonl": Jsonl(), "waits": Waits(folder=sys.argv[1])}
tiny_trainer(plugins, Odd(), max_steps=40, **options).train()
""".replace("XSS", repr(XSS))


@contextlib.contextmanager
def training(folder):
    """Train in a process of its own, and yield a function that lets it go on to a step."""

    def go_on(step):
        (folder / "next").write_text(str(step))
        os.replace(folder / "next", folder / "steps")

    go_on(0)
    (folder / "train.py").write_text(TRAINING)
    with subprocess.Popen([sys.executable, folder / "train.py", folder], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, go_on
        finally:
            process.kill()


def until(condition, seconds=30):
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)
    return found
