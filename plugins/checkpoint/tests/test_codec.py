"""What is taken apart comes back exactly, or is refused by its full key."""

from __future__ import annotations

import datetime
import enum
import functools
import io
import json
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookline.testing import digest
from hookline_checkpoint.codec import join, split, tree_to_bytes
from hookline_checkpoint.storage import Reader
from hookline_checkpoint.tensors import read_tensors, tensors_to_parts


def through(tree: Any) -> Any:
    """Return what comes back from the bytes of the two files."""
    tensors, encoded = split(tree, "plugins")
    content = b"".join(tensors_to_parts(tensors))
    kept = read_tensors(Reader(io.BytesIO(content), len(content)))
    theirs = safetensors.torch.load(content)
    assert {name: digest(tensor) for name, tensor in kept.items()} == {n: digest(t) for n, t in theirs.items()}
    return join(kept, json.loads(tree_to_bytes(encoded)))


def same(one: Any, other: Any) -> bool:
    """Tell whether two trees are equal in types, in order and in every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]
    if isinstance(one, (np.ndarray, np.generic)):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other) if isinstance(one, (float, complex)) else one == other


DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.uint32, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e8m0fnu,
]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    size = int(np.prod(shape)) * dtype.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        content = bytes(byte & 1 for byte in content)
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if tensor.ndim > 1 and draw(st.booleans()) else tensor


arrays = st.builds(
    lambda kind, shape: np.arange(int(np.prod(shape))).astype(kind).reshape(shape),
    st.sampled_from(["<f8", ">i4", "?", "<c16", "<U3", "S2", "<M8[s]", "<f2"]),
    st.lists(st.integers(0, 3), max_size=3),
)
texts = st.text(st.characters(codec=None), max_size=5) | st.sampled_from(
    ["$tuple", "$", "$dict", "__metadata__", "a.b"]
)
hashables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts | st.binary(max_size=4),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
leaves = (
    hashables
    | st.floats()
    | st.complex_numbers()
    | st.builds(bytearray, st.binary(max_size=4))
    | st.datetimes(timezones=st.none() | st.just(datetime.timezone(datetime.timedelta(hours=5, minutes=30))))
    | st.dates()
    | st.timedeltas()
    | st.builds(Path, st.sampled_from(["a/b", "/c", "."]))
    | st.sampled_from([torch.float32, torch.device("cuda:1"), torch.device("cpu"), torch.Size([2, 3])])
    | st.sampled_from([np.float64(0.1), np.int8(-3), np.bool_(True), np.datetime64("2020-02-02"), np.str_("ü")])
    | st.sets(hashables, max_size=3)
    | tensors()
    | arrays
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(hashables, inner, max_size=4),
        st.dictionaries(texts, inner, max_size=4),
        st.dictionaries(texts, inner, max_size=4).map(OrderedDict),
        st.dictionaries(texts, inner, max_size=4).map(lambda d: defaultdict(list, d)),
        st.dictionaries(texts, inner, max_size=4).map(lambda d: defaultdict(None, d)),
        st.dictionaries(hashables, st.integers(), max_size=4).map(Counter),
        st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(4, 6)),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_round_trip(tree):
    back = through(tree)
    assert same(tree, back)


@settings(max_examples=30, deadline=None)
@given(st.datetimes(allow_imaginary=True))
def test_the_repeated_hour_stays_the_second(moment):
    assert through(moment.replace(fold=1)).fold == 1


def test_containers_keep_what_they_have_besides_their_items():
    back = through({"deque": deque([1, 2], 5), "lists": defaultdict(list, a=[1]), "none": defaultdict(None)})
    assert back["deque"].maxlen == 5
    assert back["lists"]["new"] == []
    assert back["none"].default_factory is None


def test_tied_tensors_come_back_as_one_and_are_stored_once():
    tied = torch.nn.Parameter(torch.randn(3, 4))
    state = {"a": tied, "b": [tied.detach(), tied.data], "copy": tied.detach().clone(), "empty": [torch.empty(0)] * 2}
    stored, _ = split(state)
    assert list(stored) == ["a", "copy", "empty.0", "empty.1"]
    back = through(state)
    assert back["a"] is back["b"][0] is back["b"][1]
    assert back["copy"] is not back["a"]
    assert not back["a"].requires_grad
    assert torch.equal(back["a"], tied)


def test_views_of_one_memory_become_tensors_of_their_own():
    memory = torch.arange(12.0).reshape(3, 4)
    views = {
        "all": memory,
        "row": memory[1],
        "column": memory[:, 1],
        "turned": memory.T,
        "wide": memory[:, :1].expand(3, 4),
    }
    back = through(views)
    for name, view in views.items():
        assert torch.equal(back[name], view)
        assert back[name].untyped_storage().nbytes() == view.numel() * 4
    back["row"].zero_()
    assert torch.equal(back["all"], memory)


def test_a_dense_tensor_keeps_its_layout():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    back = through([image, image.to(torch.complex128)])
    assert back[0].stride() == image.stride()
    assert back[1].stride() == image.stride()
    assert torch.equal(back[0], image)


def test_conjugates_are_resolved():
    number = torch.randn(3, 2, dtype=torch.complex64)
    back = through([number.conj(), number.conj().imag, number.to(torch.complex128).conj().T])
    assert torch.equal(back[0], number.conj())
    assert torch.equal(back[1], -number.imag)
    assert torch.equal(back[2], number.to(torch.complex128).mH)


def test_names_of_a_state_dict_are_those_of_the_file():
    tensors, _ = split(torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict(), "module")
    assert list(tensors) == ["0.weight", "0.bias"]


def test_a_state_dict_keeps_the_versions_of_its_modules():
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert through(state)._metadata == state._metadata == {"": {"version": 2}}


def test_two_keys_of_one_flat_name():
    tree = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.ones(2), "\ud800": torch.ones(3)}
    assert same(through(tree), tree)


Point = namedtuple("Point", "x y")
Color = enum.Enum("Color", "RED")
Level = enum.IntEnum("Level", "LOW")


@dataclass
class Record:
    x: int = 0


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: 0, r"a function \(.*<lambda>\).*leave it out of get_state"),
        (print, r"a function \(print\)"),
        (functools.partial(print), r"an object of functools\.partial"),
        (torch.nn.Linear(1, 1), r"a module \(Linear\).*state_dict\(\)"),
        (torch.Generator(), r"an object of torch\._C\.Generator.*get_state\(\)"),
        (dict, r"the class dict"),
        (Color.RED, r"the enum member Color\.RED.*its name or its value"),
        (Level.LOW, r"the enum member Level\.LOW"),
        (Point(1, 2), r"a namedtuple \(Point\).*_asdict"),
        (Record(), r"an object of .*Record.*dataclasses\.asdict"),
        (Text("a"), r"an object of .*Text"),
        (torch.eye(2).to_sparse(), r"a sparse_coo tensor.*dense"),
        (torch.eye(2, device="meta"), r"a meta tensor"),
        (
            torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
            r"a tensor of the subclass .*NestedTensor",
        ),
        (datetime.datetime(2020, 1, 1, tzinfo=ZoneInfo("UTC")), r"an object of datetime\.datetime.*fixed offset"),
        (np.array([None]), r"a numpy array of dtype object"),
        (np.ma.array([1]), r"an object of numpy\.ma"),
        (range(3), r"an object of range"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_with_the_full_key(value, said):
    with pytest.raises(TypeError, match=rf"^plugins\.ema\.deep\.1\.fn is {said}") as raised:
        split({"ema": {"deep": [0, {"fn": value}]}}, "plugins")
    assert "a checkpoint holds tensors and plain data" in str(raised.value)


def test_refused_keys_factories_and_circles():
    with pytest.raises(TypeError, match=r"^plugins\.ema has a tensor as a key or a member"):
        split({"ema": {torch.ones(1): 1}}, "plugins")
    with pytest.raises(TypeError, match=r"^ema is a defaultdict of a function .*bool, int, float.*give dict"):
        split({"ema": defaultdict(lambda: 0)})
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(ValueError, match=r"^plugins\.c\.0 contains itself"):
        split({"c": circle}, "plugins")


@pytest.mark.parametrize(
    "encoded",
    [
        {"$unknown": 1},
        {"$tensor": "missing"},
        {"$dtype": "nn"},
        {"$npscalar": ["O", "00" * 8]},
        {"$npscalar": ["V8", "00" * 8]},
        {"$defaultdict": ["eval", []]},
        {"$set": [[]]},
        {"$dict": [1]},
        {"$complex": None},
        {"$tensor": {"name": "t", "dtype": "complex128", "shape": [7]}},
    ],
)
def test_what_was_not_made_by_split_is_an_error_of_one_kind(encoded):
    with pytest.raises(ValueError):  # noqa: PT011 - of any text
        join({"t": torch.zeros(4, dtype=torch.uint8)}, encoded)
