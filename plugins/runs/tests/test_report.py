"""The live report: what it reads, what it answers, what it refuses, and what a real browser makes of it."""

import contextlib
import http.client
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from hookline.cli import main
from hookline_runs import follow, list_runs, read_run, report
from hookline_runs.follow import Follower, Glance, Series, thinned
from hookline_runs.records import FILE

PLUGIN = Path(__file__).parent.parent
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


@pytest.fixture
def small(monkeypatch):
    """Make what is large small, so that short files are read in many parts and thinned."""
    monkeypatch.setattr(follow, "BLOCK", 1000)
    monkeypatch.setattr(follow, "HEAD", 1500)
    monkeypatch.setattr(follow, "TAIL", 500)
    monkeypatch.setattr(follow, "BUCKETS", 8)


def agrees(follower, run):
    known = {
        name: dict(zip(series.steps, series.columns[0], strict=True))
        for name, series in follower.curves.by_name.items()
        if series.steps
    }
    expected = {}
    for row in run.rows:
        for name in set(row) - {"step", "epoch", "batches", "samples", "seconds"}:
            expected.setdefault(name, {})[row["step"]] = row[name]
    assert repr(sorted((n, sorted(v.items())) for n, v in known.items())) == repr(
        sorted((n, sorted(v.items())) for n, v in expected.items())
    )
    steps = [row["step"] for row in run.rows]
    assert follower.curves.at("samples", steps) == [row["samples"] for row in run.rows]
    ours = {name: getattr(follower.run, name) for name in vars(run) if name != "rows"}
    assert ours == {name: value for name, value in vars(run).items() if name != "rows"}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_followed_in_parts_is_what_is_read_at_once(tmp_path, small, seed):
    data = text(*any_records(seed)).encode()
    chance, at = random.Random(seed), 0
    (tmp_path / FILE).touch()
    follower, glance = Follower(tmp_path), Glance(tmp_path)
    while at < len(data):
        more = chance.choice([1, 30, 400, 5000])
        with (tmp_path / FILE).open("ab") as file:
            file.write(data[at : at + more])
        at += more
        follower.update()
        glance.update(time.monotonic() + chance.choice([-1, 10]))
    glance.update()
    run = read_run(tmp_path)
    agrees(follower, run)
    best = run.best and (run.best["val_loss"], run.best["step"])
    assert glance.best == best
    for name in ("status", "reason", "step", "sessions", "seconds", "began", "config", "totals"):
        assert getattr(glance.shown, name) == getattr(run, name), name


@pytest.mark.parametrize("seed", range(5))
def test_a_list_of_long_runs_stands_before_they_are_read(tmp_path, small, seed):
    write(tmp_path, *any_records(seed), begin("last", 1999.0), train("last", 1999.0))
    append(tmp_path, *(log(step, 2000.0, "last", train_loss=1.0) for step in range(1, 30)), end(29, "last", 2001.0))
    glance = Glance(tmp_path)
    glance.update(deadline=-math.inf)
    assert (glance.complete, glance.best) == (False, None)
    assert (glance.shown.step, glance.shown.config) == (29, begin()["config"])
    glance.update()
    assert glance.complete
    assert glance.shown.seconds == read_run(tmp_path).seconds


def test_lines_of_something_else_cost_nobody_anything(tmp_path):
    forged = [
        [1], {"event": "log"}, 7, begin(config=[]), begin(command=3), begin(versions="x"), begin(pid="x"),
        {**log(1), "step": "1"}, train(totals=3), train(plan=[{}]), train(plan=3), log(5, x={}),
        {**log(5), "metrics": [1]}, {**end(9), "cost": 3},
        log(2**70, x=1.0), log(5, x=10**400), {**log(7), "samples": "many"}, log(8, train_loss=1.0),
    ]  # fmt: skip
    write(tmp_path, begin(), train(), *forged)
    with (tmp_path / FILE).open("ab") as file:
        file.write(b"\xff\xfe\n\n" + b"[" * 100_000 + b"\n")
    append(tmp_path, log(9, train_loss=0.5), {**end(9), "time": math.nan})
    follower, glance = Follower(tmp_path), Glance(tmp_path)
    follower.update()
    glance.update()
    assert list(follower.curves.by_name["train_loss"].steps) == [8, 9]
    assert follower.run.unreadable == read_run(tmp_path).unreadable + 4  # what no array of numbers holds
    assert glance.shown.status == "finished"


def test_no_spike_is_lost_and_what_is_not_finite_leaves_a_gap():
    series = Series(1)
    for step in range(100_000):
        series.put(step, [math.sin(step / 5000)])
    series.put(70_001, [1e6])
    series.put(70_010, [-1e6])
    for step in range(30_000, 30_500):
        series.put(step, [math.nan])
    series.put(50_000, [math.inf])
    begin, steps, values = thinned(series)
    told = dict(zip(steps, values, strict=True))
    assert begin == 0
    assert 1000 <= len(steps) <= 2048
    assert (told[70_001], told[70_010]) == (1e6, -1e6)
    assert None in [told[step] for step in steps if 30_000 <= step < 30_500]
    assert steps == sorted(steps)
    assert all(value is None or math.isfinite(value) for value in values)


# The server ---------------------------------------------------------------------------


class Client:
    """Asks as the page does, and keeps what the page keeps."""

    def __init__(self, url):
        self.url = urlsplit(url)

    def ask(self, path, method="GET", **headers):
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders()
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


@pytest.fixture
def serving(tmp_path):
    """Serve a folder; yield a client."""
    root = tmp_path / "runs"
    root.mkdir()
    server = report.Server(root, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield root, Client(server.url)
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_list_says_what_the_records_say(serving):
    root, client = serving
    write(root / "run-1", begin(), train(), log(4, val_loss=0.5), log(6, val_loss=0.25), log(8, val_loss="NaN"), end(8))
    write(root / "run-2", begin(command=["a b"], revision=None), train(totals={"steps": None}), log(3, train_loss=1.0))
    (root / "no-run").mkdir()
    answer = client.runs()
    assert (answer["names"], answer["complete"], answer["folder"]) == (["run-1", "run-2"], True, str(root))
    one, two = answer["runs"]
    run, other = list_runs(root)
    assert one == {
        "name": "run-1", "status": "finished", "reason": "", "step": 8, "steps": 80, "seconds": run.seconds,
        "best": {"name": "val_loss", "value": 0.25, "step": 6}, "began": 1000.0, "revision": "0123456789abcdef",
        "command": "fit me", "complete": True,
    }  # fmt: skip
    assert [two[name] for name in ("status", "best", "steps", "seconds", "command", "revision")] == [
        "unknown", None, None, other.seconds, "'a b'", None,
    ]  # fmt: skip


def test_the_list_tells_what_is_new_alone(serving):
    root, client = serving
    for number in range(3):
        write(root / f"run-{number}", begin(), train(), log(1, train_loss=1.0))
    first = client.runs()
    again = client.runs(first["token"])
    assert (len(first["runs"]), again["runs"]) == (3, [])
    append(root / "run-1", log(2, train_loss=0.5))
    shutil.rmtree(root / "run-2")
    write(root / "run-9", begin(), train())
    new = client.runs(again["token"])
    assert [run["name"] for run in new["runs"]] == ["run-1", "run-9"]
    assert new["names"] == ["run-0", "run-1", "run-9"]
    assert len(client.runs("of another server.7")["runs"]) == 3


def test_a_run_that_dies_changes_its_status_without_a_word(serving):
    root, client = serving
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(root / "run-1", begin(host=socket.gethostname(), pid=child.pid), train())
    first = client.runs()
    child.communicate(b"\n")
    then = client.runs(first["token"])
    assert [answer["runs"][0]["status"] for answer in (first, then)] == ["running", "crashed"]


def test_a_curve_goes_on_where_it_was(serving):
    root, client = serving
    write(root / "run-1", begin(), train(), *(log(step, train_loss=1 / step) for step in (10, 20, 30)))
    first = client.run("run-1", fresh=["train_loss"])
    assert first["anew"]
    assert first["curves"] == {"train_loss": {"from": 0, "x": [10, 20, 30], "y": [0.1, 0.05, 0.03333333]}}
    assert client.run("run-1", since=first["token"], metric=["train_loss"]) == {"token": first["token"]}
    append(root / "run-1", log(30, val_loss=5.0), log(40, train_loss=0.025))
    more = client.run("run-1", since=first["token"], metric=["train_loss"], fresh=["val_loss"])
    assert (more["anew"], "facts" in more) == (False, False)
    assert more["curves"] == {
        "train_loss": {"from": 2, "x": [30, 40], "y": [0.03333333, 0.025]},
        "val_loss": {"from": 0, "x": [30], "y": [5.0]},
    }
    assert [(kept["name"], kept["panel"], kept["val"], kept["value"]) for kept in more["live"]["metrics"]] == [
        ("train_loss", "loss", False, 0.025),
        ("val_loss", "loss", True, 5.0),
    ]


@pytest.mark.parametrize(
    ("axis", "places"),
    [("step", [20, 60]), ("samples", [160, 480]), ("epoch", [0.5, 1.5]), ("seconds", [10, 30])],
)
def test_what_goes_to_the_right_can_be_chosen(serving, axis, places):
    root, client = serving
    write(root / "run-1", begin(), train(), log(20, loss=1.0), log(40, other=1.0), log(60, loss=1.0))
    assert client.run("run-1", x=axis, fresh=["loss"])["curves"]["loss"]["x"] == places


@pytest.mark.parametrize("seed", range(10))
def test_parts_make_the_same_curve_as_the_whole(serving, small, seed):
    root, client = serving
    records, names = any_records(seed), ["train_loss", "grad_norm", "val_loss"]
    write(root / "run-1")
    kept, token, chance = {}, "", random.Random(seed)
    while records:
        part, records = records[: (count := chance.randint(1, 40))], records[count:]
        append(root / "run-1", *part)
        answer = client.run("run-1", since=token, metric=list(kept), fresh=[name for name in names if name not in kept])
        token = answer["token"]
        if answer.get("anew"):
            kept = {}
        for name, more in answer.get("curves", {}).items():
            x, y = kept.get(name, ([], []))
            assert more["from"] <= len(x)
            kept[name] = x[: more["from"]] + more["x"], y[: more["from"]] + more["y"]
        whole = client.run("run-1", fresh=names)["curves"]
        assert {n: pair for n, pair in kept.items() if pair[0]} == {
            n: (c["x"], c["y"]) for n, c in whole.items() if c["x"]
        }


def test_facts_come_once_and_again_when_they_change(serving):
    root, client = serving
    plan = [{"hook": "on_log", "kind": "event", "wrapped_by": [], "done_by": ["jsonl"]}]
    write(root / "run-1", begin())
    first = client.run("run-1")
    assert first["facts"]["config"] == [["trainer.epochs", "2"], ["optimizer.lr", "0.1"]]
    append(root / "run-1", train(plan=plan))
    second = client.run("run-1", since=first["token"])
    assert second["facts"]["plan"] == plan
    shares = [log(step, **{"time/clip": 1 / step}) for step in (1, 2)]
    append(root / "run-1", *shares, {**log(4, loss=1.0), "cost": {"jsonl": 0.5}})
    third = client.run("run-1", since=second["token"])
    assert "facts" not in third
    assert (third["live"]["cost"], third["live"]["session"]) == ({"jsonl": 0.5}, 2.0)
    assert third["live"]["shares"] == {"clip": 0.75}


def test_a_torn_line_is_taken_when_it_is_whole(serving):
    root, client = serving
    write(root / "run-1", begin(), train(), log(1, loss=1.0))
    line = text(log(2, loss=2.0))
    with (root / "run-1" / FILE).open("a") as file:
        file.write(line[:50])
        file.flush()
        first = client.run("run-1", fresh=["loss"])
        file.write(line[50:])
    then = client.run("run-1", since=first["token"], metric=["loss"])
    assert (first["curves"]["loss"]["x"], then["curves"]["loss"]["x"], then["live"]["unreadable"]) == ([1], [1, 2], 0)


@pytest.mark.parametrize("how", ["replaced", "cut", "written over"])
def test_a_record_that_is_no_longer_the_same_is_read_anew(serving, how):
    root, client = serving
    write(root / "run-1", begin(), train(), *(log(step, loss=1.0) for step in range(1, 9)), end(8))
    client.runs()
    first = client.run("run-1", fresh=["loss"])
    other = [
        begin("b", 5000.0),
        train("b"),
        *(log(s, loss=2.0, session="b") for s in range(1, 3 if how == "cut" else 30)),
    ]
    if how == "replaced":
        write(root / "new", *other)
        os.replace(root / "new" / FILE, root / "run-1" / FILE)
    else:
        write(root / "run-1", *other)
    then = client.run("run-1", since=first["token"], metric=["loss"])
    assert then["anew"]
    assert set(then["curves"]["loss"]["y"]) == {2.0}
    assert [run["status"] for run in client.runs()["runs"] if run["name"] == "run-1"] == ["unknown"]


def test_a_run_that_is_taken_away_is_not_there(serving):
    root, client = serving
    write(root / "run-1", begin())
    client.run("run-1")
    shutil.rmtree(root / "run-1")
    status, _, body = client.ask("/api/run?name=run-1")
    assert (status, json.loads(body)) == (404, {"error": "there is no run 'run-1' any more"})


def test_two_hundred_runs(serving):
    root, client = serving
    for number in range(200):
        write(root / f"run-{number}", begin(), train(), *(log(s, train_loss=1.0, val_loss=1 / s) for s in range(1, 6)))
    while not (answer := client.runs())["complete"]:  # each answer reads on, for a quarter of a second
        pass
    assert {(run["step"], run["best"]["value"]) for run in answer["runs"]} == {(5, 0.2)}
    assert client.runs(answer["token"])["runs"] == []
    first = client.run("run-0", fresh=["train_loss"])["token"]
    assert client.run("run-0", since=first) == {"token": first}
    for name in answer["names"]:  # more than are kept in memory
        assert client.run(name, fresh=["train_loss"])["curves"]["train_loss"]["x"] == [1, 2, 3, 4, 5]
    assert client.run("run-0", since=first)["anew"]


# Safety -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/../secret/metrics.jsonl", "/%2e%2e/secret/metrics.jsonl", "/page/../__init__.py", "/run-1/metrics.jsonl",
        "/api/run?name=../secret", "/api/run?name=..%2Fsecret", "/api/run?name=%2E%2E/secret", "/api/run?name=.",
        "/api/run?name=", "/api/run?name=linked", "/api/run?name=linked-file", "/api/run?name=pipe",
        "/api/run?name=secret%00", "/api/run", "/api", "//etc/passwd", "/__init__.py", "/page.js/", "/uPlot.LICENSE",
    ],
)  # fmt: skip
def test_nothing_but_the_runs_of_the_folder_is_told(serving, path):
    root, client = serving
    secret = root.parent / "secret"
    write(secret, begin(), train(), log(1, secret=1.0))
    write(root / "run-1", begin())
    (root / "linked").symlink_to(secret)
    (root / "linked-file").mkdir()
    (root / "linked-file" / FILE).symlink_to(secret / FILE)
    (root / "pipe").mkdir()
    os.mkfifo(root / "pipe" / FILE)
    status, _, body = client.ask(path)
    assert status == 404
    assert b"trainer" not in body
    assert client.runs()["names"] == ["run-1"]


def shown(step, file=None, name="drawn", **more):
    told = {"type": "a", "file": file} if file else {}
    return {"event": "object", "session": "a", "time": 1003.0, "step": step, "name": name, **told, **more}


def asked(run, file):
    return "/api/object?" + urlencode({"name": run, "file": file})


def test_the_last_value_of_each_object_is_told_and_its_file_given(serving):
    root, client = serving
    files = {"objects/drawn-1.png": b"first", "objects/drawn-2.png": b"second", "objects/t-2.csv": b"<script>"}
    objects = [shown(1, "objects/drawn-1.png"), shown(2, "objects/drawn-2.png"), shown(2, "objects/t-2.csv", "t")]
    texts = [shown(1, name=XSS, text=XSS), shown(2, name="long", text="x" * 10_000), shown(2, name="lost", type="a.B")]
    write(root / "run-1", begin(), train(), *objects, *texts)
    (root / "run-1" / "objects").mkdir()
    for name, content in files.items():
        (root / "run-1" / name).write_bytes(content)
    assert client.run("run-1")["live"]["objects"] == [
        {"step": 2, "name": "drawn", "type": "a", "file": "objects/drawn-2.png"},
        {"step": 2, "name": "t", "type": "a", "file": "objects/t-2.csv"},
        {"step": 1, "name": XSS, "text": XSS},
        {"step": 2, "name": "long", "text": "x" * 2000},
    ]
    for name, content in files.items():
        status, headers, body = client.ask(asked("run-1", name))
        kind = "image/png" if name.endswith("png") else "text/plain; charset=utf-8"
        assert (status, headers["Content-Type"], body) == (200, kind, content)
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert client.ask(asked("run-1", "objects/drawn-3.png"))[0] == 404
    (root / "run-1" / "objects" / "t-2.csv").unlink()
    assert client.ask(asked("run-1", "objects/t-2.csv"))[0] == 404


def test_no_file_is_given_but_the_objects_of_a_run(serving):
    root, client = serving
    (root.parent / "secret-1.png").write_text("secret")
    named = ["metrics.jsonl", "../secret-1.png", str(root.parent / "secret-1.png"), ""]
    inside = ["../metrics.jsonl", "../../secret-1.png", "/../secret-1.png", "a/b-1.png", "..\\b-1.png", "\0-1.png"]
    inside += ["link-1.png", "pipe-1.png", "folder-1.png", "other-1.html", "none-1.png"]
    fine = "objects/fine-1.png"
    named += [f"objects/{name}" for name in inside]
    write(root / "run-1", begin(), train(), *(shown(1, file, file) for file in [*named, fine]))
    folder = root / "run-1" / "objects"
    folder.mkdir()
    (folder / "link-1.png").symlink_to(root.parent / "secret-1.png")
    (folder / "folder-1.png").mkdir()
    (folder / "fine-1.png").write_text("fine")
    (folder / "unnamed-1.png").write_text("secret")
    os.mkfifo(folder / "pipe-1.png")
    for file in [*named, "objects/unnamed-1.png"]:
        status, _, body = client.ask(asked("run-1", file))
        assert (status, b"secret\n" in body) == (404, False), file
    assert client.ask(asked("../run-1", "objects/unnamed-1.png"))[0] == 404
    assert client.ask(asked("run-1", fine))[::2] == (200, b"fine")
    folder.rename(root.parent / "elsewhere")
    folder.symlink_to(root.parent / "elsewhere")
    assert client.ask(asked("run-1", fine))[0] == 404
    folder.unlink()
    (root.parent / "elsewhere").rename(folder)
    (root / "run-1").rename(root.parent / "run-1")
    (root / "run-1").symlink_to(root.parent / "run-1")
    assert client.ask(asked("run-1", fine))[0] == 404


def test_a_run_that_becomes_a_link_is_not_followed(serving):
    root, client = serving
    write(root.parent / "secret", begin(), train(), log(1, secret=1.0))
    write(root / "run-1", begin())
    client.run("run-1")
    shutil.rmtree(root / "run-1")
    (root / "run-1").symlink_to(root.parent / "secret")
    assert client.ask("/api/run?name=run-1")[0] == 404
    assert client.runs()["names"] == []


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "[::2]:1", "", None])
def test_a_site_whose_name_leads_here_is_refused(serving, host):
    _, client = serving
    status, _, _ = client.ask("/", Host=None if host is None else host.format(port=client.url.port))
    assert status == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:{port}", "[::1]:{port}"])
def test_this_machine_has_several_names(serving, host):
    _, client = serving
    assert client.ask("/", Host=host.format(port=client.url.port))[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_it_is_only_read(serving, method):
    _, client = serving
    status, headers, body = client.ask("/api/runs", method)
    assert (status, headers["Allow"], b"token" in body) == (405, "GET", False)


def test_what_a_refused_request_brought_is_not_taken_for_another(serving):
    _, client = serving
    with socket.create_connection((client.url.hostname, client.url.port), timeout=20) as raw:
        inner = b"GET /api/runs HTTP/1.1\r\nHost: localhost\r\n\r\n"
        raw.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner)
        answer = raw.makefile("rb").read()
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_copy_that_is_brought_up_to_date_is_followed(serving):
    root, client = serving
    write(root / "run-1", begin(), train(), log(1, loss=1.0))
    first = client.run("run-1", fresh=["loss"])
    write(root / "run-1.part", begin(), train(), log(1, loss=1.0), log(2, loss=2.0))
    os.replace(root / "run-1.part" / FILE, root / "run-1" / FILE)  # as rsync does
    then = client.run("run-1", since=first["token"], metric=["loss"])
    assert (then["anew"], then["curves"]["loss"]["x"]) == (False, [1, 2])


@pytest.mark.parametrize("path", ["/", "/page.js", "/uPlot.js", "/api/runs", "/nothing", "/api/run?name=x&x=bad"])
def test_every_answer_keeps_a_browser_from_doing_more(serving, path):
    _, client = serving
    _, headers, _ = client.ask(path)
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers
    assert headers["Server"] == "hookline"


def test_what_is_no_request_is_refused_without_repeating_it(serving):
    _, client = serving
    with socket.create_connection((client.url.hostname, client.url.port), timeout=20) as raw:
        raw.sendall(b"GET <script> HTTP/9.9\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert answer.startswith((b"HTTP/1.1 505", b"HTTP/1.0 505"))
    assert b"script" not in answer
    assert b"Content-Security-Policy" in answer


def test_strange_names_and_numbers_leave_as_strict_json(serving):
    root, client = serving
    name = "<b>run & 'ünï' #1"
    odd = begin(config={XSS: XSS, "n": math.nan}, command=[XSS], revision=XSS, moment=math.nan)
    write(root / name, odd, train(totals={"steps": math.inf}), log(1, math.inf, **{XSS: "NaN", "x": "-Infinity"}))
    (run,) = client.runs()["runs"]
    assert (run["name"], run["revision"], run["began"], run["steps"]) == (name, XSS, "NaN", None)
    answer = client.run(name, fresh=[XSS, "x"])
    assert dict(answer["facts"]["config"]) == {XSS: XSS, "n": "NaN"}
    assert answer["curves"] == {metric: {"from": 0, "x": [1], "y": [None]} for metric in (XSS, "x")}
    assert [metric["value"] for metric in answer["live"]["metrics"]] == ["NaN", "-Infinity"]


@pytest.mark.parametrize(
    ("words", "said"), [("x=time", "x='time' is none of step, samples"), ("since=a.0.b.c.d", None)]
)  # fmt: skip
def test_a_question_that_makes_no_sense_is_answered(serving, words, said):
    root, client = serving
    write(root / "run-1", begin())
    status, _, body = client.ask(f"/api/run?name=run-1&{words}")
    assert status == (200 if said is None else 400)
    assert said is None or json.loads(body)["error"].startswith(said)


def test_the_page_is_whole_and_asks_nobody_else(serving):
    _, client = serving
    _, headers, page = client.ask("/")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.decode())
    assert set(named) == {"icon.svg", "uPlot.css", "page.css", "uPlot.js", "page.js"}
    own = [client.ask(f"/{name}") for name in named]
    assert {status for status, _, _ in own} == {200}
    for body in (page, *(body for (_, _, body), name in zip(own, named, strict=True) if name.startswith("page"))):
        assert b"//" not in re.sub(rb"^//.*$| // .*$", b"", body, flags=re.M).replace(
            b"http://www.w3.org/2000/svg", b""
        )
    assert not re.search(
        rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", own[named.index("page.js")][2]
    )


# The command --------------------------------------------------------------------------


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_the_command_serves_until_it_is_ended(tmp_path, number, code):
    write(tmp_path / "runs" / "run-1", begin())
    with command(cwd=tmp_path) as (process, url):
        client = Client(url)
        with socket.create_connection((client.url.hostname, client.url.port)):  # a browser that still listens
            assert client.runs()["names"] == ["run-1"]
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        assert process.returncode == code
        assert said == ("hookline: interrupted\n" if code == 130 else "")
    with command("--folder", "runs", "--port", client.url.port, cwd=tmp_path) as (_, again):  # the port is free at once
        assert again == url


def test_more_than_this_machine_is_warned_of(tmp_path):
    with command(tmp_path, "--host", "0.0.0.0") as (process, url):
        assert Client(url).ask("/", Host="any.example")[0] == 200
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert said.splitlines()[0] == (
            f"hookline: whoever reaches 0.0.0.0 can read all runs of {tmp_path}, without a password"
        )


def refused(capsys, *arguments):
    assert main(["runs", "serve", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_served_is_said(tmp_path, capsys):
    assert "there is no folder of runs 'none'; training makes it" in refused(capsys, "none")
    write(tmp_path / "run-1", begin())
    assert f"run-1' is a run; name the folder that it lies in: '{tmp_path}'" in refused(capsys, tmp_path / "run-1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--host 127.0.0.1 --port {port} cannot be served: " in refused(capsys, tmp_path, "--port", port)
    assert "--port 70000 cannot be served: " in refused(capsys, tmp_path, "--port", 70000)


def test_the_page_is_in_the_wheel(tmp_path):
    flit = pytest.importorskip("flit_core.wheel", reason="builds the wheel")
    for name in ("src", "pyproject.toml", "README.md"):
        source = PLUGIN / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    built = flit.make_wheel_in(tmp_path / "pyproject.toml", tmp_path)
    with zipfile.ZipFile(built.file) as wheel:
        kept = {Path(name).name for name in wheel.namelist() if name.startswith("hookline_runs/report/page/")}
    assert kept == {
        "index.html",
        "page.js",
        "page.css",
        "icon.svg",
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "uPlot.LICENSE",
    }


# In a real training -------------------------------------------------------------------

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


def test_a_training_is_followed(tmp_path):
    (tmp_path / "runs").mkdir()
    with command(tmp_path / "runs") as (_, url), training(tmp_path) as (process, go_on):
        client = Client(url)
        until(lambda: client.runs()["runs"])
        first = client.run("live-1")
        for step in (3, 9):
            go_on(step)
            until(lambda step=step: client.runs()["runs"][0]["step"] >= step)
            curve = client.run("live-1", fresh=["train_loss"])["curves"]["train_loss"]
            assert curve["x"][-1] >= step
        assert client.runs()["runs"][0]["status"] == "running"
        go_on(1000)
        assert process.wait(60) == 0, process.stderr.read()
        answer = client.run("live-1", since=first["token"])
        done = client.runs()["runs"][0]
    assert (done["status"], done["step"]) == ("finished", 40)
    assert answer["live"]["cost"]["jsonl"] > 0
    plan = {row["hook"]: row["done_by"] for row in client_plan(answer, first)}
    assert (plan["on_boundary"], "jsonl" in plan["on_log"]) == (["waits"], True)


def client_plan(*answers):
    """Return the plan of the first answer that has facts with one."""
    return next(answer["facts"]["plan"] for answer in answers if answer.get("facts", {}).get("plan"))


# In a real browser --------------------------------------------------------------------

NO_BROWSER = shutil.which("chromium") is None or shutil.which("chromedriver") is None


@pytest.fixture
def browser(tmp_path):
    """Open a browser without a window."""
    if NO_BROWSER:
        pytest.skip("looks at the page in chromium, by chromedriver, which are not there")
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives the browser")
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def looking(browser, url):
    """Look at the page; in the end see what it asked for, and that nothing was complained of."""
    browser.get(url)
    yield
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert len([address for address in urls if address.startswith(url)]) > 5
    assert [address for address in urls if not address.startswith((url, "chrome:", "data:"))] == []
    assert browser.get_log("browser") == []
    assert js(browser, "window.hacked") is None
    browser.get("about:blank")  # before the server goes


def js(browser, script, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


def points(browser, panel="loss"):
    """Return how many points a chart has."""
    return js(browser, "Number(document.querySelector(`[data-panel='${arguments[0]}']`)?.dataset.points ?? 0)", panel)


def tick_box(browser, name):
    box = "[...document.querySelectorAll('#list input')].find(box => box.name === arguments[0])"
    until(lambda: js(browser, f"{box} !== undefined && !{box}.disabled", name))
    browser.execute_script(f"{box}.click()", name)


def pick_axis(browser, axis):
    browser.execute_script(
        "const box = document.querySelector('#axis'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))",
        axis,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_grows_with_a_training(tmp_path, browser, dark):
    root = tmp_path / "runs"
    root.mkdir()
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    with command(root) as (_, url), looking(browser, url):
        until(lambda: "No run has a record yet" in js(browser, "document.body.innerText"))
        with training(tmp_path) as (process, go_on):
            until(lambda: "live-1" in js(browser, "document.querySelector('#list').innerText"))  # the run appears
            tick_box(browser, "live-1")
            go_on(5)
            until(lambda: points(browser) >= 5)
            go_on(12)
            until(lambda: points(browser) >= 12)  # the curve grows
            assert "running" in js(browser, "document.querySelector('#list').innerText")
            assert XSS in js(browser, "[...document.querySelectorAll('.card h3')].map(h => h.textContent)")
            go_on(1000)
            assert process.wait(60) == 0, process.stderr.read()
        until(lambda: "finished" in js(browser, "document.querySelector('#list').innerText"))
        until(lambda: points(browser) >= 40)
        told = js(browser, "document.querySelector('main').innerText")
        assert "on_boundary" in js(browser, "document.querySelector('#plan').innerText")
        assert "jsonl" in js(browser, "document.querySelector('#cost').innerText")
        assert "trainer.max_steps" in told
        assert js(browser, "getComputedStyle(document.body).backgroundColor") == (
            "rgb(21, 25, 28)" if dark else "rgb(246, 247, 248)"
        )


@pytest.mark.slow
def test_runs_are_compared(tmp_path, browser):
    for number, rate in enumerate((0.1, 0.2, 0.3)):
        config = {"trainer": {"epochs": 2, "run_name": XSS}, "optimizer": {"lr": rate}}
        rows = [log(s, train_loss=rate / s, val_loss=1 / s, **{"time/jsonl": 1e-4}) for s in range(1, 51)]
        write(tmp_path / f"run-{number}", begin(config=config, command=[XSS]), train(), *rows, end(50, reason=XSS))
    with command(tmp_path) as (_, url), looking(browser, url):
        until(lambda: points(browser) == 100)  # the newest is chosen, train and val
        tick_box(browser, "run-2")
        until(lambda: points(browser) == 200)
        table = js(browser, "document.querySelector('#table').innerText")
        assert re.findall(r"optimizer\.lr\s+(\S+)\s+(\S+)", table) == [("0.1", "0.3")]
        assert "trainer.epochs" not in table  # is the same
        js(browser, "document.querySelector('#diff').click()")
        assert "trainer.epochs" in js(browser, "document.querySelector('#table').innerText")
        assert XSS in js(browser, "document.querySelector('#table').textContent")
        assert browser.current_url.endswith("#run-0,run-2")
        for axis in ("samples", "epoch", "seconds"):
            pick_axis(browser, axis)
            there = (
                "data.get('run-2').axis === arguments[0] && data.get('run-2').curves.get('val_loss')?.x.length === 50"
            )
            until(lambda axis=axis, there=there: js(browser, there, axis) and points(browser) == 200)
        places = js(browser, "data.get('run-2').curves.get('train_loss').x")
        assert (places[0], places[-1]) == (0.5, 25)
        browser.refresh()
        until(lambda: points(browser) == 200)  # what was chosen stands in the address
        js(browser, "document.querySelector('#clear').click()")
        until(lambda: js(browser, "document.querySelectorAll('.card').length") == 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_hundred_runs_of_a_hundred_thousand_points(tmp_path, browser):
    root = tmp_path / "runs"
    for number in range(4):
        chance = random.Random(number)
        lines = [begin(f"{number:08x}"), train(f"{number:08x}")]
        for step in range(1, 100_001):
            loss = {"val_loss": 1 / step} if step % 1000 == 0 else {}
            lines.append(log(step, 1000.0 + step / 100, f"{number:08x}", train_loss=chance.random(), **loss))
        lines.append(end(100_000, f"{number:08x}", 2001.0))
        write(root / f"run-{number}", *lines)
    for number in range(4, 200):
        (root / f"run-{number}").mkdir()
        os.link(root / f"run-{number % 4}" / FILE, root / f"run-{number}" / FILE)
    begun = time.monotonic()
    with command(root) as (process, url), looking(browser, url):
        until(lambda: js(browser, "document.querySelectorAll('#list li').length") == 200)
        assert time.monotonic() - begun < 15
        until(lambda: points(browser) > 1000)
        for number in range(8):
            tick_box(browser, f"run-{number + 10}")
        until(lambda: points(browser) > 9 * 1000, 60)
        assert points(browser) < 9 * 2200
        until(lambda: "reading" not in js(browser, "document.querySelector('#list').innerText"), 120)
        assert "best 1e-5" in js(browser, "document.querySelector('#list').innerText")
        memory = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])
        assert memory < 600_000  # kB
