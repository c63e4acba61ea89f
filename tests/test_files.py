"""Files and folders that are replaced as a whole, sizes in words, and a model's tensors as files hold them."""

import contextlib
import os
import random
import subprocess
import sys

import pytest
import torch

from hookline.files import bytes_of, clear, make_folder, replacing
from hookline.files.weights import owned, shards, untie
from hookline.testing import digest
from hookline.testing.faults import Recorder, power_cuts

# Replacing ----------------------------------------------------------------------------


KILLED_AT_A_RENAME = """
import os, signal, sys
from pathlib import Path
from hookline.files import replacing

seen = []

def kill_between(event, arguments):
    if event == "os.rename":
        seen.append(arguments)
        if len(seen) == 3:  # one for the first save, and the second of two for the next
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_between)
for text in ("old", "new"):
    with replacing(Path(sys.argv[1])) as folder:
        folder.mkdir()
        (folder / "text").write_text(text)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two folders")
def test_an_old_folder_is_exchanged_and_never_away(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED_AT_A_RENAME, str(tmp_path / "best")], check=False)
    assert (tmp_path / "best" / "text").read_text() == "new"


def write(path, kind, text):
    with replacing(path) as new:
        if kind == "folder":
            new.mkdir()
            new /= "text"
        new.write_text(text)


def read(path, kind):
    return (path / "text" if kind == "folder" else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path, kind):
    path = tmp_path / "it"
    write(path, kind, "old")
    with contextlib.suppress(ZeroDivisionError), replacing(path) as new:
        new.mkdir() if kind == "folder" else new.write_text("half")
        raise ZeroDivisionError
    assert read(path, kind) == "old"
    write(path, kind, "new")
    assert read(path, kind) == "new"
    assert os.listdir(tmp_path) == ["it"]


def put(path, content):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.write(descriptor, content)
    os.close(descriptor)


def test_after_a_power_cut_there_is_the_old_one_or_the_new_one(tmp_path):
    recorder = Recorder(tmp_path)
    with recorder.recording():
        for text in (b"old", b"new"):
            with replacing(tmp_path / "file") as new:
                put(new, text)
            recorder.promise(text.decode())
        with replacing(tmp_path / "folder") as new:
            os.mkdir(new)
            put(new / "text", b"whole")
        recorder.promise("folder")
    cuts = list(power_cuts(recorder, random.Random(0)))
    assert len(cuts) > 10
    for cut in cuts:
        allowed = {(): {None, b"old"}, ("old",): {b"old", b"new"}}.get(cut.promises, {b"new"})
        assert cut.files.get("file") in allowed, cut
        if "folder" in cut.files:
            assert cut.files["folder/text"] == b"whole"
        assert "folder" in cut.files or "folder" not in cut.promises


def test_what_a_kill_has_left_is_removed_or_put_back(tmp_path):
    for name in (".new-a-0123abcd", ".old-a", ".old-b", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / ".new-c-0123abcd").write_text("half")
    (tmp_path / "b" / "mine").write_text("")
    clear(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert os.listdir(tmp_path / "b") == ["mine"]


def test_a_folder_is_made_with_those_it_is_in(tmp_path):
    make_folder(tmp_path / "a" / "b", 0o700)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


# Sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10GB", 10**10), ("1.5 kb", 1500), ("2GiB", 2**31), ("7B", 7), (" 3 mib ", 3 * 2**20)],
)
def test_sizes(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["10", "0GB", "GB", "2 parrots", "-1MB", "infMB", 3])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"^'?[^=]*'? is no size; write one like \"10GB\", \"500MB\" or \"2GiB\""):
        bytes_of(text)
    with pytest.raises(ValueError, match=r"^mine\.limit='?[^=]*'? is no size"):
        bytes_of(text, "mine.limit")


# Weights ------------------------------------------------------------------------------


def test_what_is_one_memory_is_stored_once():
    one, empty = torch.arange(6.0).reshape(2, 3), torch.empty(0)
    complex_one = torch.ones(2, dtype=torch.complex64)
    state = {
        "a": one, "again": one, "turned": one.t(), "part": one[:1], "empty": empty, "too": empty,
        "c": complex_one, "of c": complex_one.conj(),
    }  # fmt: skip
    tensors, tied = untie(state)
    assert tied == {"again": "a"}
    alone = owned(tensors, tensors)
    assert list(alone) == [name for name in state if name != "again"]
    for name, tensor in alone.items():
        assert torch.equal(tensor, state[name])
        assert tensor.is_contiguous()
        assert not tensor.is_conj()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len({tensor.data_ptr() for tensor in alone.values() if tensor.numel()}) == 5


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000, {"model.safetensors": ["a", "b", "c"]}),
        (32, {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}),
        (1, {f"model-0000{n}-of-00003.safetensors": [name] for n, name in enumerate("abc", 1)}),
    ],
)
def test_tensors_are_shared_out_in_their_order(limit, expected):
    tensors = {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(12)}
    found = list(shards(tensors, {"other": "b"}, limit))
    assert {shard.file: list(shard.tensors) for shard in found} == expected
    for shard in found:
        assert shard.metadata == {"format": "pt"} | ({"other": "b"} if "b" in shard.tensors else {})
    assert digest([dict(shard.tensors) for shard in found]) == digest(
        [{name: tensors[name] for name in names} for names in expected.values()]
    )
