"""Files of other programs, and of attackers: what is plain data is read, and no code is run that nobody asked for."""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hookline_checkpoint
from hookline.cli import main
from hookline.testing import TinyModule, digest, tiny_trainer
from hookline_checkpoint import Checkpoint, ForeignError, foreign, load_foreign

SUFFIXES = [".pt", ".pth", ".ckpt", ".bin", ".safetensors"]


class Calls:
    """Pickled as a call: whoever unpickles it makes the call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Wakes:
    """Unpickled by its `__setstate__`, which makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __getstate__(self):
        return {"marker": self.marker}

    def __setstate__(self, state):
        Path(state["marker"]).touch()


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def legacy(value):
    return saved(value, _use_new_zipfile_serialization=False)


def tarred(value):
    """Return a file as torch wrote them before it had a format of its own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kept in (("storages", 0), ("tensors", 0), ("pickle", value)):
            content = pickle.dumps(kept, 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


FORMS = {
    "zip": saved,
    "legacy": legacy,
    "tar": tarred,
    **{f"pickle-{number}": functools.partial(pickle.dumps, protocol=number) for number in (0, 2, 4)},
}
PAYLOADS = {  # and what of them a refusal must name
    "system": (lambda marker: Calls(os.system, f"touch {marker}"), f"{os.name}.system"),
    "eval": (lambda marker: Calls(eval, f"open({marker!r}, 'w').close()"), "builtins.eval"),
    "nested": (
        lambda marker: Calls(torch.storage._load_from_bytes, saved(Calls(os.system, f"touch {marker}"))),
        "torch.storage._load_from_bytes",
    ),
    "setstate": (Wakes, f"{Wakes.__module__}.Wakes"),
}
payloads = pytest.mark.parametrize("payload", PAYLOADS)
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """Be in an empty folder; return the file that payloads make, which must not be there in the end."""
    (tmp_path / "work").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    marker = tmp_path / "executed"
    yield marker
    assert not marker.exists(), "the payload was executed"
    assert not list((tmp_path / "temporary").glob("hookline-*")), "a download was left"


def bomb(payload, form, marker):
    """Return a file that runs code in whoever unpickles it."""
    return FORMS[form]({"state_dict": {"weight": torch.zeros(1)}, "extra": PAYLOADS[payload][0](str(marker))})


@pytest.fixture
def server(monkeypatch):
    """Return a server; `answers` says by path what it sends: status, headers, body, and what it then waits for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body, wait = self.server.answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            wait()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.answers = {}
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def answer(server, path, body=b"", status=200, headers=None, wait=lambda: None):
    server.answers[path] = status, {"Content-Length": len(body)} if headers is None else headers, body, wait
    return server.url + path


@pytest.fixture(params=["local", "http"])
def place(request, server, marker):
    """Return a function that puts a content somewhere and answers where."""

    def local(content, name):
        Path(name).write_bytes(content)
        return name

    return local if request.param == "local" else lambda content, name: answer(server, f"/{name}", content)


def command(capsys, *words):
    code = main(["checkpoints", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


# I1: code in a file is not run --------------------------------------------------------


@payloads
def test_i1_the_payloads_are_live(payload, tmp_path):
    """Else the other tests would prove nothing."""
    for form in ("zip", "legacy", "pickle-2"):
        marker = tmp_path / form
        content = bomb(payload, form, marker)
        if form == "pickle-2":
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists(), form


@payloads
@forms
def test_i1_foreign_files(payload, form, place, marker):
    content = bomb(payload, form, marker)
    name = PAYLOADS[payload][1]
    for suffix in SUFFIXES:
        with pytest.raises(ForeignError, match="holds more than tensors and plain data") as refused:
            load_foreign(place(content, f"model{suffix}"))
        said = str(refused.value)
        assert f"model{suffix} holds" in said
        assert name in said
        assert said.endswith("unsafe=True (--unsafe), which runs the code that it holds")
        assert "_rebuild_tensor" not in said  # what torch takes as plain data is no reason


@payloads
def test_i1_foreign_files_by_the_command(payload, place, marker, capsys):
    code, said = command(capsys, "import", place(bomb(payload, "zip", marker), "model.pt"), "--to", "x.safetensors")
    assert (code, PAYLOADS[payload][1] in said) == (2, True), said
    assert said.count("\n") == 1
    assert not Path("x.safetensors").exists()


def sign(checkpoint):
    """Make the manifest true of the files that are there, as someone who can write to the folder can."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    about = json.loads(manifest["body"])
    for name in about["files"]:
        content = (checkpoint / name).read_bytes()
        about["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    body = json.dumps(about)
    signed = {"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}
    (checkpoint / "manifest.json").write_text(json.dumps(signed))


def trained(folder):
    """Return the folder of a run that saved three checkpoints."""
    options = {"runs_folder": str(folder), "max_train_steps_per_epoch": 3, "eval_when_finish": False}
    trainer = tiny_trainer([Checkpoint("2 steps", keep_last=None)], TinyModule(), **options)
    trainer.train()
    return trainer.run_dir


def resume(folder, path):
    options = {"runs_folder": str(folder), "resume": str(path), "eval_when_finish": False}
    tiny_trainer([Checkpoint(every=None)], TinyModule(), **options).train()


def use(folder, run, capsys, caplog):
    """Resume a run, let every command read it, and return what was said of it."""
    caplog.clear()
    resume(folder, run)
    for words in (["list"], ["verify"], ["show"], ["export", "--to", folder / "x", "--force"], ["diff", run]):
        command(capsys, words[0], run, *words[1:])
    return caplog.text


@payloads
def test_i1_files_of_checkpoints(payload, tmp_path, marker, capsys, caplog):
    good = trained(tmp_path / "runs")
    *_, newest = sorted((good / "checkpoints").iterdir())
    names = sorted(file.name for file in newest.iterdir())
    assert len(names) == 7, names
    for name in names:
        for signed in (False, True) if name != "manifest.json" else (False,):
            run = tmp_path / "attacked"
            shutil.copytree(good, run)
            attacked = run / "checkpoints" / newest.name
            (attacked / name).write_bytes(bomb(payload, "pickle-2" if signed else "zip", marker))
            if signed:
                sign(attacked)
            said = use(tmp_path / "runs", run, capsys, caplog)
            assert "going back to" in said, name
            assert ("cannot be understood: " if signed else f"{attacked}: {name} ") in said, said
            with pytest.raises(ValueError, match=f"cannot be understood|{name} "):
                resume(tmp_path / "runs", attacked)
            assert not marker.exists(), (name, signed)
            shutil.rmtree(run)


# I2: plain files are read, others only if it is asked for -----------------------------


def plain():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_i2_state_dicts(form, place):
    state = plain()
    loaded = load_foreign(place(FORMS[form](state), "model.pt"))
    assert list(loaded) == list(state)
    assert digest(dict(loaded)) == digest(dict(state))


def test_i2_safetensors_under_any_name(place):
    state = plain()
    save_file(state, "made")
    for suffix in SUFFIXES:
        assert digest(load_foreign(place(Path("made").read_bytes(), f"model{suffix}"))) == digest(dict(state))
        assert digest(dict(load_foreign(place(saved(state), f"model{suffix}")))) == digest(dict(state))


def test_i2_checkpoints_with_plain_settings(place):
    whole = {
        "state_dict": plain(),
        "epoch": 3,
        "pytorch-lightning_version": "2.6.6",
        "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"width": 4, "betas": (0.9, 0.99), "name": "x", "none": None, "kept": {1, 2}},
    }
    loaded = load_foreign(place(saved(whole), "model.ckpt"))
    assert loaded["hyper_parameters"] == whole["hyper_parameters"]
    assert digest(dict(loaded["state_dict"])) == digest(dict(whole["state_dict"]))
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module.load_state_dict(loaded["state_dict"])


OBJECTS = {
    "namespace": (lambda: argparse.Namespace(lr=0.1), ["argparse.Namespace"]),
    "path": (lambda: Path("data"), [f"{type(Path()).__module__}.{type(Path()).__name__}"]),
    "enum": (lambda: Colour.RED, [f"{Colour.__module__}.Colour"]),
    "partial": (lambda: functools.partial(int, base=2), ["builtins.int", "functools.partial"]),
    "module": (lambda: torch.nn.Linear(2, 2), ["torch.nn.modules.linear.Linear"]),
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("form", ["zip", "legacy", "protocol-4"])
def test_i2_objects_are_read_only_when_asked_for(kind, form, place, caplog):
    make, names = OBJECTS[kind]
    write = FORMS.get(form, functools.partial(saved, pickle_protocol=4))
    source = place(write({"state_dict": plain(), "object": make()}), "model.ckpt")
    with pytest.raises(ForeignError) as refused:
        load_foreign(source)
    (listed,) = re.findall("call what it names: (.*?);", str(refused.value))
    assert listed == ", ".join(names)
    assert not caplog.records
    loaded = load_foreign(source, unsafe=True)
    assert type(loaded["object"]) is type(make())
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hookline.checkpoint", logging.WARNING)
    assert record.message == f"{source} is read with unsafe=True: whatever code it holds is run"


def test_i2_unsafe_is_said_at_every_call(marker, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    Path("model.pt").write_bytes(saved(argparse.Namespace(x=1)))
    assert load_foreign("model.pt", unsafe=True).x == 1
    with pytest.raises(ForeignError, match="argparse.Namespace"):
        load_foreign(Path("model.pt"))
    with pytest.raises(TypeError, match="positional"):
        load_foreign("model.pt", True)


def test_i2_what_the_process_allows_is_read(marker):
    Path("model.pt").write_bytes(saved([argparse.Namespace(x=1), Path("a")]))
    with torch.serialization.safe_globals([argparse.Namespace]), pytest.raises(ForeignError) as refused:
        load_foreign("model.pt")
    assert "argparse" not in str(refused.value)
    assert f": {type(Path()).__module__}.{type(Path()).__name__};" in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (saved({"a": torch.ones(1)}, pickle_protocol=4), "was saved with pickle protocol 4, which torch does not read"),
        (tarred({"a": 1}), "was saved in the tar format of old versions, which torch does not read"),
    ],
)
def test_i2_plain_data_that_the_safe_reader_does_not_know(content, said, marker):
    Path("model.pt").write_bytes(content)
    with pytest.raises(ForeignError, match=said):
        load_foreign("model.pt")


def test_i2_names_are_shown_and_not_obeyed(marker):
    """A file may name things as it likes, also to write on the terminal of who reads the refusal."""
    for content in (
        b"\x80\x02cos\n\x1b[31mred\n.",
        b"\x80\x04\x8c\x02os\x8c\x08\x1b[31mred)\x93.",
        b"\x80\x02\x82\x07.",
    ):
        Path("model.bin").write_bytes(content)
        with pytest.raises(ForeignError) as refused:
            load_foreign("model.bin")
        assert str(refused.value).isprintable()
    assert "call what it names: copyreg extension 7;" in str(refused.value)


# I3: folders --------------------------------------------------------------------------


@payloads
def test_i3_distributed_checkpoints(payload, tmp_path, marker, capsys, caplog):
    run = trained(tmp_path / "runs")
    home = run / "checkpoints"
    newest = sorted(home.iterdir())[-1]
    folders = [tmp_path / "dcp", home, newest, home / "step-000000009999"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / ".metadata").write_bytes(bomb(payload, "pickle-4", marker))
        (folder / "__0_0.distcp").write_bytes(bomb(payload, "zip", marker))
    for folder in folders:
        with pytest.raises(ForeignError, match=r"is a folder, and one file is wanted; one of torch.distributed"):
            load_foreign(folder)
        for file in (".metadata", "__0_0.distcp"):
            with pytest.raises(ForeignError, match=re.escape(PAYLOADS[payload][1])):
                load_foreign(folder / file)
        code, said = command(capsys, "import", folder, "--to", "x.safetensors")
        assert (code, "its .metadata is a pickle" in said) == (2, True), said
    said = use(tmp_path / "runs", run, capsys, caplog)
    assert f"going back to {newest}" in said
    assert "step-000000009999: manifest.json cannot be read" in said


def test_i3_other_folders(tmp_path, marker):
    newest = sorted((trained(tmp_path / "runs") / "checkpoints").iterdir())[-1]
    with pytest.raises(ForeignError, match="is for `resume` and for `hookline checkpoints export`"):
        load_foreign(newest)
    with pytest.raises(ForeignError, match="is a folder, and one file is wanted$"):
        load_foreign(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ForeignError, match="in Hugging Face's format is for `checkpoint.initial`, of which each rank"):
        load_foreign(tmp_path)
    assert digest(load_foreign(newest / "model.safetensors")) == digest(load_file(newest / "model.safetensors"))


# What is no checkpoint ----------------------------------------------------------------

HTML = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"weights to follow\n", r"no file of torch.save or safetensors: it begins with b'weights to follow\\n'"),
        (HTML, "no file of torch.save or safetensors: it begins with b'<!DOCTYPE html>"),
        (bytes(3000), r"no file of torch.save or safetensors: it begins with b'\\x00"),
        (saved(plain())[:-200], "is damaged, or no file of torch.save"),
        (legacy(plain())[:-20], "is damaged, or no file of torch.save"),
        (pickle.dumps({"a": 1}, 2), "is damaged, or no file of torch.save"),
        ((40).to_bytes(8, "little") + b'{"a": ', "is a damaged safetensors file"),
    ],
    ids=["empty", "text", "html", "zeros", "torn zip", "torn legacy", "pickle", "torn safetensors"],
)
def test_files_that_are_no_checkpoints(content, said, place, caplog):
    for suffix in (".pt", ".safetensors"):
        source = place(content, f"model{suffix}")
        with pytest.raises(ForeignError, match=said) as refused:
            load_foreign(source)
        assert str(refused.value).startswith(source)
        assert "weights_only" not in str(refused.value)  # torch's advice is to run the code of this
    with pytest.raises(ForeignError, match="is empty|cannot be read|is a damaged safetensors"):
        load_foreign(source, unsafe=True)


def test_paths_that_cannot_be_read(marker):
    with pytest.raises(ForeignError, match=r"there is no file model\.pt"):
        load_foreign("model.pt")
    os.mkfifo("pipe")  # to open it would be to wait for a writer
    with pytest.raises(ForeignError, match="there is no file pipe"):
        load_foreign("pipe")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("file:///etc/hostname", r"^file:///etc/hostname: file:// is not read; give a path, or a URL of http"),
        ("FTP://host/model.pt", r"^ftp://host/model.pt: ftp:// is not read"),
        ("s3://bucket/model.pt", "s3:// is not read"),
        ("https://me:secret@host/model.pt", "^https://host/model.pt: a URL with a name or a password in it"),
        ("http://[/model.pt", "is no URL: Invalid IPv6"),
        ("http://", "cannot be downloaded: no host given"),
    ],
)
def test_urls_that_are_not_read(url, said, marker):
    with pytest.raises(ForeignError, match=said) as refused:
        load_foreign(url)
    assert "secret" not in str(refused.value)


def test_answers_that_are_no_files(server, marker):
    url = answer(server, "/missing?token=secret", HTML, 404)
    with pytest.raises(ForeignError, match=rf"^{server.url}/missing\?…: the server answered 404 Not Found$"):
        load_foreign(url)
    with pytest.raises(ForeignError, match="begins with b'<!DOCTYPE html>"):
        load_foreign(answer(server, "/sign-in", HTML))
    with pytest.raises(ForeignError, match=r"/nothing is empty$"):
        load_foreign(answer(server, "/nothing", status=204))


def test_downloads_that_break_off(server, marker):
    content = saved(plain())
    url = answer(server, "/model.pt", content[:-9], headers={"Content-Length": len(content)})
    said = f"^{url}: the download broke off after {len(content) - 9} of {len(content)} bytes; try again$"
    with pytest.raises(ForeignError, match=said):
        load_foreign(url)
    url = answer(server, "/chunks", b"400\r\n" + content[:99], headers={"Transfer-Encoding": "chunked"})
    server.RequestHandlerClass.protocol_version = "HTTP/1.1"
    with pytest.raises(ForeignError, match=f"^{url} cannot be downloaded: "):
        load_foreign(url, unsafe=True)


def test_a_server_that_falls_silent(server, marker, monkeypatch):
    assert foreign.SILENCE == 60
    monkeypatch.setattr(foreign, "SILENCE", 0.2)
    done = threading.Event()
    url = answer(server, "/model.pt", b"PK", headers={"Content-Length": 99}, wait=lambda: done.wait(60))
    with pytest.raises(ForeignError, match=f"^{url} cannot be downloaded: .*timed out"):
        load_foreign(url)
    done.set()


def test_redirects(server, marker):
    state = plain()
    url = answer(server, "/model.pt", saved(state))
    assert digest(dict(load_foreign(answer(server, "/there", status=302, headers={"Location": url})))) == digest(
        dict(state)
    )
    for to in ("ftp://host/model.pt", f"file://{Path('x').absolute()}"):
        with pytest.raises(ForeignError, match="not followed from http://|answered 302 .* is not allowed"):
            load_foreign(answer(server, "/away", status=302, headers={"Location": to}))
    request = urllib.request.Request("https://host/model.pt")
    with pytest.raises(urllib.error.URLError, match="it leads on to http://, which is not followed from https://"):
        foreign._Redirects().redirect_request(request, None, 302, "Found", {}, "http://host/model.pt")


# The command --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "words", "left"),
    [
        (lambda state: state, [], None),
        (lambda state: {"epoch": 3, "state_dict": state, "loops": {}}, [], "epoch, loops"),
        (lambda state: {"model": state, "optimizer": {"state": {}}}, [], "optimizer"),
        (lambda state: {"model_state_dict": state, "module": None}, [], "module"),
        (lambda state: {"module": state, "model": {"of": "x"}}, [], "model"),
        (lambda state: {"a": {"net": state, "ema": state}, "b": 1}, ["--key", "a.ema"], "b, a.net"),
        (lambda state: {"model": state, "module": state}, ["--key", "module"], "model"),
    ],
)
def test_import(wrap, words, left, place, capsys):
    state = dict(plain())
    source = place(saved(wrap(state)), "model.ckpt")
    code, said = command(capsys, "import", source, "--to", "out/model.safetensors", *words)
    assert code == 0, said
    size = Path("out/model.safetensors").stat().st_size
    assert said == f"out/model.safetensors  7 tensors, {size} B\n" + (f"left out: {left}\n" if left else "")
    assert digest(load_file("out/model.safetensors")) == digest(state)
    assert [path.name for path in Path("out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("value", "words", "said"),
    [
        (
            {"epoch": 3, "net": {"weights": {"w": torch.ones(1)}}},
            [],
            "none of state_dict, model, model_state_dict, module is a mapping of names to tensors: the keys are epoch, "
            "net; tensors by name are in net.weights (choose one with --key)",
        ),
        (
            {"model": {"w": torch.ones(1)}, "module": {"w": torch.ones(1)}},
            [],
            "several of state_dict, model, model_state_dict, module is a mapping of names to tensors: the keys are "
            "model, module; tensors by name are in model, module (choose one with --key)",
        ),
        ({"a": 1}, ["--key", "b"], "--key=b is not there: the keys are a; tensors by name are in none"),
        ({"a": {"b": 1}}, ["--key", "a"], "--key=a is a mapping in which 'b' is of type int, and names with tensors"),
        ({"a": {3: torch.ones(1)}}, ["--key", "a"], "--key=a is a mapping in which 3 is of type Tensor"),
        ({"a": {}}, ["--key", "a"], "--key=a is empty"),
        ({"a": [1]}, ["--key", "a"], "--key=a is of type list"),
        ([torch.ones(1)], [], "what was saved is of type list"),
        ({"\x1b[31mred": 1}, [], r"the keys are '\x1b[31mred';"),
        (
            {"w": torch.ones(1).to(torch.complex128)},
            [],
            "safetensors has no torch.complex128, which 'w' is; take it in",
        ),
        ({"w": torch.eye(2).to_sparse()}, [], "safetensors holds dense tensors, and 'w' is not one; take it in Python"),
    ],
)
def test_imports_that_cannot_be(value, words, said, marker, capsys):
    Path("model.ckpt").write_bytes(saved(value))
    code, heard = command(capsys, "import", "model.ckpt", "--to", "x.safetensors", *words)
    assert (code, said in heard) == (2, True), heard
    assert os.listdir() == ["model.ckpt"]


def test_a_mapping_that_contains_itself_is_no_endless_loop(marker):
    whole = {"a": {"w": torch.ones(1)}}
    whole["self"] = whole
    with pytest.raises(ForeignError, match=r"in a, self\.a, "):
        foreign.state_dict_of(whole)


def test_import_of_tied_and_overlapping_tensors(marker, capsys):
    base = torch.arange(6.0).reshape(2, 3)
    complex = torch.complex(base, base)
    state = {
        "a": base,
        "b": base,
        "row": base[1],
        "columns": base.T,
        "z": complex,
        "turned": complex.conj(),
        "e": base[:0],
        "f": base[:0],
    }
    Path("model.pt").write_bytes(saved(state))
    assert command(capsys, "import", "model.pt", "--to", "model.safetensors")[0] == 0
    with safe_open("model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "b": "a"}
    loaded = load_file("model.safetensors")
    assert sorted(loaded) == sorted(set(state) - {"b"})
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_import_replaces_nothing_unless_told(server, marker, capsys):
    Path("mine.safetensors").write_text("mine")
    code, said = command(capsys, "import", f"{server.url}/never-asked", "--to", "mine.safetensors")
    assert (code, "mine.safetensors is there already; name another place, or say --force" in said) == (2, True)
    code, said = command(capsys, "import", f"{server.url}/never-asked", "--to", ".")
    assert (code, "--to=. is a folder; name a file in it" in said) == (2, True)
    save_file({"w": torch.ones(2)}, "mine.safetensors")
    code, said = command(capsys, "import", "mine.safetensors", "--to", "mine.safetensors", "--force")
    assert code == 0, said
    assert torch.equal(load_file("mine.safetensors")["w"], torch.ones(2))


def test_import_of_objects_when_asked_for(marker, capsys, caplog):
    Path("model.ckpt").write_bytes(saved({"state_dict": plain(), "hyper_parameters": argparse.Namespace(lr=0.1)}))
    assert command(capsys, "import", "model.ckpt", "--to", "x.safetensors")[0] == 2
    code, said = command(capsys, "import", "model.ckpt", "--to", "x.safetensors", "--unsafe")
    assert (code, "left out: hyper_parameters" in said) == (0, True)
    assert "whatever code it holds is run" in caplog.text + said
    assert digest(load_file("x.safetensors")) == digest(dict(plain()))


def test_what_needs_torch_is_imported_when_it_is_asked_for(tmp_path):
    program = (
        "import sys, hookline_checkpoint; from hookline_checkpoint.commands import main\n"
        "assert 'torch' not in sys.modules\n"
        "from hookline_checkpoint import ForeignError, load_foreign\n"
        "assert 'torch' in sys.modules and issubclass(ForeignError, ValueError)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'load_anything'"):
        _ = hookline_checkpoint.load_anything
