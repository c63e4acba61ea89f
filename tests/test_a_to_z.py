"""The page "From A to Z": every entry runs, and every plugin has one."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from hookline.cli import main
from hookline.config import build_trainer, load_config
from hookline.installed import COMMANDS, installed

pytestmark = pytest.mark.plugins

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "a-to-z.md").read_text(encoding="utf-8")
ENTRY = re.compile(r"^## ([^\n]+)\n+((?:[^`\n][^\n]*\n)*)\n*```(yaml|bash)\n(.*?)^```$", re.M | re.S)
FILES = dict(re.findall(r'^```\w+ title="(\S+)"\n(.*?)^```$', PAGE, re.M | re.S))
RUN = FILES["run.yaml"]
ENTRIES = {match[1]: match for match in ENTRY.finditer(PAGE)}
ELSEWHERE = {  # plugins whose task is to run programs of others, or whose service or device is not here
    *("accmt", "hf", "lernomatic", "lightning", "pymarlin"),
    *("aim", "clearml", "comet", "dvclive", "mlflow"),
    *("deepspeed", "distributed", "ft", "pipeline", "ray", "simulate", "tp"),
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Be in a folder that has the module and the configuration of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    sys.modules.pop("digits", None)


@pytest.mark.parametrize("task", ENTRIES)
def test_every_entry_runs(task, place):
    _, _, language, text = ENTRIES[task].groups()
    if language == "bash":
        for line in text.splitlines():
            command, *words = shlex.split(line, comments=True)
            assert command == "hookline"
            assert main(words) == 0, line
        return
    tree = yaml.safe_load(RUN)
    for node, added in yaml.safe_load(text).items():
        tree[node] = {**tree.get(node, {}), **added}
    (place / "entry.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    trainer = build_trainer(load_config(place / "entry.yaml"))
    trainer.train()
    assert trainer.status in ("finished", "stopped")
    assert trainer.global_step


def test_entries_are_in_alphabetical_order_and_link_to_their_plugins():
    assert list(ENTRIES) == re.findall(r"^## (.+)$", PAGE, re.M)
    assert list(ENTRIES) == sorted(ENTRIES, key=str.lower)
    for task, match in ENTRIES.items():
        _, prose, language, text = match.groups()
        for name in yaml.safe_load(text)["plugins"] if language == "yaml" else ():
            assert f"[{name}](plugins/" in prose, task


def test_every_plugin_has_an_entry():
    shown = {word.replace("-", "_") for match in ENTRIES.values() for word in re.findall(r"[\w-]+", match[4])}
    there = {name.replace("-", "_") for name in (*installed(), *installed(COMMANDS))}
    assert there - shown <= ELSEWHERE | {"checkpoints", "from_lightning", "models", "runs", "verify_resume"}
