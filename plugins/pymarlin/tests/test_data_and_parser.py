"""Data before training, and the command line; `test_like_pymarlin.py` compares both with PyMarlin's."""

from pathlib import Path

import pytest
import yaml

from hookline_pymarlin import CustomArgParser, DataInterface, DataProcessor, DistributedPreprocessArguments


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


class Pairs(DataProcessor):
    looked = 0

    def process(self, *given):
        return [given]

    def analyze(self):
        self.looked += 1


def test_both_generations_of_process_data():
    processor = Pairs()
    assert processor.process_data(1, "x") == [(1, "x")]
    assert DataInterface().process_data(processor, 2) == [(2,)]
    assert processor.looked == 2
    assert DataInterface().setup_datasets() is None
    with pytest.raises(NotImplementedError, match="DataInterface has no get_train_dataset"):
        DataInterface().get_train_dataset()


@pytest.mark.parametrize(
    ("items", "machines", "machine", "expected"),  # recorded from PyMarlin 0.3.6
    [
        (7, 2, 0, [0, 1, 2, 6]),
        (7, 2, 1, [3, 4, 5]),
        (3, 4, 0, [0]),
        (3, 4, 3, []),
        (10, 3, 0, [0, 1, 2, 9]),
        (10, 3, 2, [6, 7, 8]),
    ],
)
def test_machines_share_the_items(items, machines, machine, expected):
    args = DistributedPreprocessArguments(node_count=machines, node_rank=machine)
    assert Pairs(args)._calls([list(range(items)), "x"]) == [(item, "x") for item in expected]
    by_rank = DistributedPreprocessArguments(node_count=machines, global_rank=machine * 4 + 1, local_size=4)
    assert Pairs(by_rank)._calls([list(range(items))]) == [(item,) for item in expected]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((1, "x"), "Pairs.multi_process_data needs a list among its arguments: its items"),
        (
            ([1, 2], [1, 2, 3]),
            r"Pairs.multi_process_data got lists of \[2, 3\] items; the items of the longer ones would",
        ),
    ],
)
def test_lists_that_cannot_be_shared(args, words):
    with pytest.raises(ValueError, match=words):
        Pairs().multi_process_data(*args)


# The parser ---------------------------------------------------------------------------

CONFIG = {
    "trainer": {"epochs": 1, "lr": 0.1, "amp": False, "name": "a", "dirs": [1], "none": None, "empty": []},
    "top": 3,
}


@pytest.fixture
def parse():
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    return CustomArgParser().parse


def test_the_command_line_overrides_a_yaml(parse):
    assert parse([]) == {**CONFIG, "config_path": "config.yaml"}
    words = "--trainer.epochs 4 --trainer.lr=1 --trainer.amp --trainer.dirs [1,-2] --top 5 --trainer.name yes"
    changed = parse([*words.split(), "--trainer.none", "20", "--trainer.empty=a-b", "--params", '{"top": "9"}'])
    expected = {"epochs": 4, "lr": 1.0, "amp": True, "name": "yes", "dirs": [1, -2], "none": "20", "empty": ["a", "b"]}
    assert changed["trainer"] == expected
    assert changed["top"] == 9
    Path("more").mkdir()
    Path("more/b.yaml").write_text("top: 1")
    assert parse(["--config_path", "more"]) == {"top": 1, "config_path": "more"}
    assert CustomArgParser("settings", "more/b.yaml").parse(["--top", "2"]) == {"top": 2, "settings": "more/b.yaml"}


def test_nothing_may_be_said(parse):
    words = [
        "--trainer.epochs",
        "null",
        "--trainer.none",
        "None",
        "--trainer.name",
        "None",
        "--params",
        '{"top": null}',
    ]
    with pytest.raises(ValueError, match="--top is without a value; the YAML has 3 there"):
        parse(words)
    changed = parse(words[:6])["trainer"]
    assert (changed["epochs"], changed["none"], changed["name"]) == (None, None, "None")


def test_a_key_that_is_not_there_is_passed_over_and_said(parse, caplog):
    assert parse(["--local_rank", "1", "--dummy", "--top", "4"])["top"] == 4
    for name in ("local_rank", "dummy"):
        assert f"--{name} is in no part of the YAML, and is passed over" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.epoch", "4"], r"--trainer.epoch is in no part of the YAML, did you mean 'trainer.epochs'"),
        (["--trainer", "4"], "--trainer is a section; name one of its keys: trainer.amp, trainer.dirs"),
        (["--trainer.epochs", "many"], "--trainer.epochs 'many' is a str; the YAML has 1 there"),
        (["--trainer.epochs", "4.5"], "--trainer.epochs '4.5' is a str; the YAML has 1 there"),
        (["--params", '{"trainer.epochs": 4.5}'], "--trainer.epochs 4.5 is a float; the YAML has 1 there"),
        (["--trainer.amp", "maybe"], "--trainer.amp 'maybe' is a str; the YAML has False there"),
        (["--trainer.dirs", "[a]"], r"--trainer.dirs '\[a\]' is a str; the YAML has \[1\] there"),
        (["--top"], "--top is without a value"),
        (["top", "4"], "'top' is no argument: write --section.key value"),
        (["--params", "[1]"], r"--params '\[1\]' is not a mapping"),
        (["--config_path", "gone.yaml"], "there is no 'gone.yaml'; --config_path names the YAML"),
        (["--config_path"], "--config_path is without a path"),
    ],
)
def test_words_that_cannot_be(parse, words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)


def test_a_yaml_that_cannot_be(parse):
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="the folder 'empty' holds no .yaml"):
        parse(["--config_path", "empty"])
    Path("list.yaml").write_text("[1]")
    with pytest.raises(ValueError, match="'list.yaml' must hold keys and values"):
        parse(["--config_path", "list.yaml"])
