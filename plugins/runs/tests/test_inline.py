"""The page as one file: what is in it, what is not, and that no text in it becomes a script."""

import base64
import hashlib
import html
import json
import re

import pytest
from plugins.runs.tests.recording import XSS, begin, end, log, shown, train, write

import hookline_runs
from hookline.cli import main
from hookline_runs.report import inline

ODD = f"</script>{XSS}<!--<script>\u2028"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work beside a folder of three runs, one with objects and odd texts; return it."""
    for number in range(3):
        rows = [log(step, train_loss=1 / step, **{ODD: 1.0}) for step in range(1, 4)]
        write(tmp_path / "runs" / f"run-{number}", begin(config={ODD: ODD}), train(), *rows, end(3))
    objects = [shown(1, name="said", text=ODD), shown(1, "objects/a-1.png", "a"), shown(2, "objects/a-2.png", "a")]
    write(tmp_path / "runs" / "run-2", begin(command=[ODD]), train(), *rows, *objects, end(3))
    (tmp_path / "runs" / "run-2" / "objects").mkdir()
    for step in (1, 2):
        (tmp_path / "runs" / "run-2" / "objects" / f"a-{step}.png").write_bytes(b"%d" % step * 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def data_of(page):
    (inside,) = re.findall(r'<script id="inlined" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(inside)


def exported(capsys, *words):
    assert main(["runs", "export-page", *words, "--out", "out.html"]) == 0
    assert capsys.readouterr().out == "wrote out.html\n"
    with open("out.html", encoding="utf-8") as file:
        return file.read()


def test_a_page_holds_the_runs_that_are_named(folder, capsys):
    page = exported(capsys, "run-1", "run-2", "--view", "http://127.0.0.1:1/#runs=run-1&x=epoch")
    data = data_of(page)
    assert data["view"] == "runs=run-1&x=epoch"
    assert [run["name"] for run in data["list"]["runs"]] == data["list"]["names"] == ["run-1", "run-2"]
    assert [run["name"] for run in data["table"]["runs"]] == ["run-1", "run-2"]
    curve = data["runs"]["run-1"]["curves"]["train_loss"]
    assert curve == {
        "extremes": {
            "y": [1.0, 0.5, 0.3333333],
            "x": {
                "step": [1, 2, 3],
                "samples": [8.0, 16.0, 24.0],
                "epoch": [0.025, 0.05, 0.075],
                "seconds": [0.5, 1.0, 1.5],
            },
        }
    }
    assert data["runs"]["run-2"]["texts"] == {"said\n1": ODD}
    given = base64.b64decode(data["files"]["run-2\nobjects/a-2.png"].partition(",")[2])
    assert (given, data["left_out"]) == (b"2" * 100, 0)
    assert "run-0" not in page
    assert set(data_of(exported(capsys))["runs"]) == {"run-0", "run-1", "run-2"}


def test_a_page_fetches_nothing_and_runs_nothing_but_its_own(folder, capsys):
    page = exported(capsys)
    assert not re.search(r'(?:src|href)="', page.partition("<script")[0])
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", page, re.S)
    assert len(scripts) == page.count("<script") == 2  # its data, and its own
    assert len(re.findall("<style>", page)) == 1
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    words = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    digest = base64.b64encode(hashlib.sha256(scripts[1].encode()).digest()).decode()
    assert words["script-src"] == f"'sha256-{digest}'"
    assert (words["default-src"], words["img-src"]) == ("'none'", "data: blob:")
    assert "unsafe" not in policy


def test_what_finds_no_room_is_told(folder, capsys, monkeypatch):
    monkeypatch.setattr(inline, "ROOM", 150)
    data = data_of(exported(capsys, "run-2"))
    assert (list(data["files"]), data["left_out"]) == (["run-2\nobjects/a-2.png"], 1)
    (told,) = [one for one in data["runs"]["run-2"]["live"]["objects"] if one["name"] == "a"]
    assert (told["steps"], told["files"], told["logged"]) == ([2], ["objects/a-2.png"], 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run-9"], "there is no run 'run-9' in runs; there are run-0, run-1, run-2"),
        (["../runs/run-1"], "there is no run '../runs/run-1'"),
        (["--folder", "none"], "there is no folder of runs 'none'"),
        (["--folder", "runs/run-1"], "is a run; name the folder that it lies in"),
        (["--out", "none/out.html"], "--out none/out.html cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_said(folder, capsys, words, said):
    assert main(["runs", "export-page", "--out", "out.html", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_page_is_asked_for_in_the_browser(serving):
    root, client = serving
    write(root / "run-1", begin(), train(), log(1, loss=1.0), end(1))
    status, headers, body = client.ask("/api/page?name=run-1&view=x%3Depoch")
    assert (status, headers["Content-Disposition"]) == (200, "attachment")
    assert data_of(body.decode())["view"] == "x=epoch"
    assert client.ask("/api/page?name=../run-1")[0] == 404
    assert client.key not in body.decode()


def test_a_notebook_shows_the_page_in_a_frame(folder):
    page = hookline_runs.show("run-1", folder=folder, view="x=epoch", height=300)
    told = page._repr_html_()
    (inside,) = re.findall(
        r'^<iframe srcdoc="([^"]*)" sandbox="allow-scripts allow-downloads" style="[^"]*"></iframe>$', told
    )
    assert html.unescape(inside) == page.html
    assert "height:300px" in told
    assert set(data_of(page.html)["runs"]) == {"run-1"}
    assert len(repr(page)) < 100
    with pytest.raises(ValueError, match="there is no run 'run-9'"):
        hookline_runs.show("run-9", folder=folder)
