"""What people write on runs, and deleting them: by commands, and by the page through its server."""

import json
import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from plugins.runs.tests.recording import begin, end, log, train, write

from hookline.cli import main
from hookline_runs import list_runs, read_run
from hookline_runs.notes import NOTES
from hookline_runs.records import FILE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work beside a folder of two runs that have ended; return it."""
    for number in (1, 2):
        write(tmp_path / "runs" / f"run-{number}", begin(), train(), log(1, val_loss=0.5), end(1))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def said(capsys, *words, code=0):
    assert main(["runs", *words]) == code
    told = capsys.readouterr()
    return told.err if code else told.out


def test_what_is_written_on_runs_is_listed(folder, capsys):
    said(capsys, "tag", "run-1", "run-2", "--add", "good", "--add", "two words")
    said(capsys, "tag", "run-2", "--remove", "good")
    said(capsys, "note", "run-1", "with the new data")
    said(capsys, "rename", "run-1", "the  baseline")
    listed = said(capsys)
    assert "run-1 (the baseline) [good, two words] " in listed
    assert "run-2 [two words] " in listed
    shown = said(capsys, "show", "run-1")
    assert re.search(r"^  title +the baseline$", shown, re.M)
    assert re.search(r"^  note +with the new data$", shown, re.M)
    one, two = json.loads(said(capsys, "--json"))
    assert (one["title"], one["tags"], one["note"], one["archived"]) == (
        "the baseline", ["good", "two words"], "with the new data", False,
    )  # fmt: skip
    assert (two["title"], two["tags"]) == ("", ["two words"])
    assert read_run(folder / "run-1").notes.tags == ("good", "two words")
    record = (folder / "run-1" / FILE).read_bytes()
    said(capsys, "note", "run-1", "")
    assert (folder / "run-1" / FILE).read_bytes() == record  # the record is never rewritten


def test_archived_runs_are_left_out_until_they_are_asked_for(folder, capsys):
    said(capsys, "archive", "run-1")
    listed = said(capsys)
    assert "run-1" not in listed.replace("hookline runs", "")
    assert listed.splitlines()[-1] == "1 archived run is left out: hookline runs --archived"
    assert "run-1" in said(capsys, "--archived")
    assert [run["archived"] for run in json.loads(said(capsys, "--json"))] == [True, False]
    assert len(list_runs(folder)) == 2
    said(capsys, "archive", "run-1", "--undo")
    assert "run-1" in said(capsys)


def test_a_run_is_deleted_when_it_is_confirmed(folder, capsys):
    (folder.parent / "kept").mkdir()
    (folder.parent / "kept" / "file").write_text("stays")
    (folder / "run-1" / "link").symlink_to(folder.parent / "kept")
    refused = said(capsys, "delete", "run-1", code=2)
    assert "--yes" in refused
    assert str(folder / "run-1") in refused
    assert said(capsys, "delete", "run-1", "--yes") == "deleted runs/run-1\n"
    assert sorted(os.listdir(folder)) == ["run-2"]
    assert (folder.parent / "kept" / "file").read_text() == "stays"


@pytest.mark.parametrize("stage", ["train", "val"])
def test_a_run_that_goes_on_is_not_deleted(folder, capsys, stage):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        beside = begin("b", stage=stage, host=socket.gethostname(), pid=child.pid)
        write(folder / "run-1", begin(), train(), end(1), beside)
        told = said(capsys, "delete", "run-1", "--yes", code=2)
        child.communicate(b"\n")
    assert "the run run-1 is not deleted: it is running; end it first" in told
    assert (folder / "run-1" / FILE).exists()
    if stage == "train":  # it has crashed now
        assert said(capsys, "delete", "run-1", "--yes") == "deleted runs/run-1\n"


def test_a_run_that_may_go_on_elsewhere_is_not_deleted(folder, capsys):
    write(folder / "run-1", begin(host="elsewhere"), train())
    told = said(capsys, "delete", "run-1", "--yes", code=2)
    assert "its process was one of elsewhere, so that it may be running" in told
    assert (folder / "run-1" / FILE).exists()


def test_none_is_deleted_where_one_must_not_be(folder, capsys):
    write(folder / "run-2", begin(host="elsewhere"), train())
    said(capsys, "delete", "run-1", "run-2", "--yes", code=2)
    assert sorted(os.listdir(folder)) == ["run-1", "run-2"]


def test_nothing_is_written_or_removed_through_links(folder, capsys):
    outside = folder.parent / "outside"
    write(outside, begin(), train(), end(1))
    (folder / "linked").symlink_to(outside)
    (folder / "linked-file").mkdir()
    (folder / "linked-file" / FILE).symlink_to(outside / FILE)
    for name in ("linked", "linked-file"):
        for words in (("delete", name, "--yes"), ("note", name, "mine"), ("tag", name, "--add", "a")):
            assert "is a link" in said(capsys, *words, code=2)
    assert os.listdir(outside) == [FILE]
    target = folder.parent / "target.json"
    target.write_text('{"title": "secret"}')
    (folder / "run-1" / NOTES).symlink_to(target)
    assert read_run(folder / "run-1").notes.title == ""
    assert "cannot be read" in said(capsys, "note", "run-1", "mine", code=2)
    assert target.read_text() == '{"title": "secret"}'


NONE = ["{", "[]", '{"tags": "a"}', '{"other": 1}', '{"note": 3}', "\0", '{"archived": 1}']


@pytest.mark.parametrize("content", NONE)
def test_notes_that_are_none_are_told_and_not_written_over(folder, capsys, content):
    (folder / "run-1" / NOTES).write_text(content)
    assert f"{NOTES} cannot be read" in said(capsys, "show", "run-1")
    told = said(capsys, "rename", "run-1", "new", code=2)
    assert "mend or remove the file first" in told
    assert (folder / "run-1" / NOTES).read_text() == content


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tag", "run-1", "--add", "a,b"], "'a,b' is no tag: it has 1 to 60 characters, none of which is a comma"),
        (["tag", "run-1", "--add", " "], "'' is no tag"),
        (["tag", "run-1", "--remove", "none"], "there is no tag 'none' to remove; there are none"),
        (["tag", "run-1"], "--add"),
        (["rename", "run-1", "x" * 201], "title is a text of at most 200 characters"),
        (["note", "run-9", "x"], "there is no run 'run-9'"),
        (["delete", "run-9", "--yes"], "there is no run 'run-9'"),
    ],
)
def test_what_cannot_be_written_is_said(folder, capsys, words, told):
    assert told in said(capsys, *words, code=2)
    assert not (folder / "run-1" / NOTES).exists()


# By the page ----------------------------------------------------------------------------


def post(client, path, told, **headers):
    body = told if isinstance(told, bytes) else json.dumps(told).encode()
    given = {"Content-Length": str(len(body)), "Content-Type": "application/json", **headers}
    status, _, answer = client.ask(path, "POST", body=body, **given)
    return status, json.loads(answer) if answer.startswith(b"{") else answer


@pytest.fixture
def editing(serving):
    """Serve two runs; yield their folder, a client and the key."""
    root, client = serving
    for number in (1, 2):
        write(root / f"run-{number}", begin(), train(), log(1, val_loss=0.5), end(1))
    return root, client, {"X-Hookline-Key": client.key}


def test_the_page_writes_on_runs(editing):
    root, client, key = editing
    token = client.runs()["token"]
    told = {"name": "run-1", "title": "first", "tags": ["a", "b"], "note": "so", "archived": True}
    assert post(client, "/api/notes", told, **key) == (200, {"done": "run-1"})
    (changed,) = client.runs(token)["runs"]
    assert changed["notes"] == {"title": "first", "tags": ["a", "b"], "note": "so", "archived": True, "problem": ""}
    assert post(client, "/api/notes", {"name": "run-1", "note": ""}, **key)[0] == 200
    assert read_run(root / "run-1").notes.title == "first"  # what is not told stays


def test_the_page_deletes_what_is_confirmed(editing):
    root, client, key = editing
    for told in ({"name": "run-1"}, {"name": "run-1", "confirmed": "run-2"}, {"name": "run-1", "confirmed": True}):
        assert post(client, "/api/delete", told, **key)[0] == 400
    assert sorted(os.listdir(root)) == ["run-1", "run-2"]
    assert post(client, "/api/delete", {"name": "run-1", "confirmed": "run-1"}, **key) == (200, {"done": "run-1"})
    assert os.listdir(root) == ["run-2"]
    assert client.runs()["names"] == ["run-2"]


def foreign(client, key):
    here = f"http://{client.url.hostname}:{client.url.port}"
    return {
        "no key": {},
        "another key": {"X-Hookline-Key": "x" * 32},
        "a key that is no ASCII": {"X-Hookline-Key": "ü"},
        "another site": {**key, "Origin": "http://evil.example"},
        "another port": {**key, "Origin": here + "1"},
        "no site": {**key, "Origin": "null"},
        "a site beside": {**key, "Sec-Fetch-Site": "same-site"},
        "another name": {**key, "Host": "evil.example"},
    }


@pytest.mark.parametrize("path", ["/api/notes", "/api/delete"])
def test_nobody_else_changes_anything(editing, path):
    root, client, key = editing
    told = {"name": "run-1", "confirmed": "run-1"} if path == "/api/delete" else {"name": "run-1", "note": "mine"}
    for who, headers in foreign(client, key).items():
        status, answer = post(client, path, told, **headers)
        assert status == 403, who
        assert client.key.encode() not in json.dumps(answer if isinstance(answer, dict) else "").encode()
    assert sorted(os.listdir(root)) == ["run-1", "run-2"]
    assert os.listdir(root / "run-1") == [FILE]
    assert client.key not in client.ask("/")[2].decode() + json.dumps(client.runs())
    own = {**key, "Origin": f"http://{client.url.hostname}:{client.url.port}", "Sec-Fetch-Site": "same-origin"}
    assert post(client, path, told, **own)[0] == 200


@pytest.mark.parametrize(
    ("told", "status"),
    [
        ({"name": "../run-1", "note": ""}, 404), ({"name": "", "note": ""}, 404), ({"name": ".", "note": ""}, 404),
        ({"name": "linked", "note": ""}, 404), ({"name": 3}, 400), ({}, 400), ([], 400), (b"{", 400), (b"\xff", 400),
        ({"name": "run-1", "path": "x"}, 400), ({"name": "run-1", "tags": "a"}, 400), (b"[" * 60_000, 400),
        ({"name": "run-1", "note": "x" * 10_001}, 400), ({"name": "run-1", "note": "x" * 70_000}, 400),
    ],
)  # fmt: skip
def test_what_makes_no_sense_changes_nothing(editing, told, status):
    root, client, key = editing
    write(root.parent / "outside", begin(), train(), end(1))
    (root / "linked").symlink_to(root.parent / "outside")
    assert post(client, "/api/notes", told, **key)[0] == status
    assert post(client, "/api/delete", told, **key)[0] == status
    assert sorted(os.listdir(root)) == ["linked", "run-1", "run-2"]
    assert [os.listdir(root / name) for name in ("run-1", "linked")] == [[FILE], [FILE]]


def test_changes_that_come_together_are_all_kept(editing):
    root, client, key = editing
    fields = [{"title": "t"}, {"note": "n"}, {"tags": ["a"]}, {"archived": True}]
    asked = [(client, "/api/notes", {"name": "run-1", **one}) for one in fields]
    threads = [threading.Thread(target=post, args=words, kwargs=key) for words in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    notes = read_run(root / "run-1").notes
    assert (notes.title, notes.note, notes.tags, notes.archived) == ("t", "n", ("a",), True)
