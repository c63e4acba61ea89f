"""The documentation says what is true: its code runs, its configurations load, its names and messages exist."""

import argparse
import ast
import dataclasses
import importlib.util
import logging
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from hookline import CallbackInterface, ModuleInterface, hookimpl
from hookline.cli import _parse, main
from hookline.cli.hooks import read_hooks, render_reference
from hookline.config import build_trainer, load_config
from hookline.installed import COMMANDS, installed
from hookline.options import Options
from hookline.testing import tiny_trainer

pytestmark = pytest.mark.plugins  # the pages show them

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
PROSE = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
RUN_BY_LINE = [DOCS / "tutorial.md"]  # pages whose commands are not only parsed but run, in order with their code
HOOKS = {hook.name: hook for hook in read_hooks()}
PARTS = ("built", "cursor", "ends", "evaluation", "loaders", "logs", "randomness", "session", "training", "window")

BLOCK = re.compile(r"^```(\w+)(?: +title=\"([^\"]+)\")?\n(.*?)^```$|^<!-- test:\s(.*?)\s-->$", re.M | re.S)
CODE_SPAN = re.compile(r"(`+)(.+?)\1")


class Block(NamedTuple):
    """A fenced block, or a hidden preparation (`<!-- test: … -->`, language "hidden")."""

    language: str
    title: str
    text: str
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1] or "hidden", match[2] or "", match[3] or match[4], text.count("\n", 0, match.start()) + 1)
        for match in BLOCK.finditer(text)
    ]


def pages_with(*languages):
    pages = [page for page in PAGES if page.parent != DOCS / "how-to"]  # tests/test_howto.py follows these
    chosen = [page for page in pages if any(block.language in languages for block in blocks(page))]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


class Sorts(ModuleInterface):
    """What `module` is in the README of a plugin: it tells ten classes apart."""

    def __init__(self):
        super().__init__()
        self.data = TensorDataset(torch.randn(64, 8), torch.arange(64) % 10)
        self.net = torch.nn.Linear(8, 10)

    def train_step(self, global_step, batch, device):
        inputs, labels = batch
        logits = self.net(inputs)
        return torch.nn.functional.cross_entropy(logits, labels), logits, labels

    val_step = train_step

    def get_train_dataloader(self, sampler, batch_size):
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    get_val_dataloaders = get_train_dataloader

    def get_optimizers_schedulers(self, steps_per_epoch, epochs):
        return [torch.optim.SGD(self.parameters(), 0.01)], []


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Be in an empty folder, as a reader is, and leave nothing behind in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, loggers = set(sys.modules), [logging.getLogger(), logging.getLogger("hookline")]
    kept = [(logger, logger.level, [*logger.handlers]) for logger in loggers]
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    for logger, level, handlers in kept:
        logger.setLevel(level)
        logger.handlers[:] = handlers


# Code ---------------------------------------------------------------------------------


@pages_with("python")
def test_code_runs(page, place):
    names = {"__name__": "__main__"}
    if page.parent.parent.name == "plugins":
        names["module"] = Sorts()
    for block in blocks(page):
        if block.title:
            (place / block.title).parent.mkdir(parents=True, exist_ok=True)
            (place / block.title).write_text(block.text)
            importlib.invalidate_caches()
        elif block.language in ("python", "hidden"):
            source = "\n" * block.line + block.text  # so that a traceback has the page's own lines
            exec(compile(source, str(page), "exec"), names)
        elif block.language == "bash" and page in RUN_BY_LINE:
            for arguments in commands(block):
                assert main(arguments) == 0, arguments
    for name, test in list(names.items()):
        if name.startswith("test_"):
            test()


def test_the_readme_shows_an_example_that_exists():
    example = (ROOT / "examples" / "plugin.py").read_text()
    docstring = ast.get_docstring(ast.parse(example))
    shown = [block.text for block in blocks(ROOT / "README.md") if block.language == "python"]
    assert example.removeprefix(f'"""{docstring}"""\n\n') in shown


def test_code_shown_from_an_example_is_that_examples():
    found = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name, shown in re.findall(r"^<!-- from (\S+) -->\n+```python\n(.*?)^```$", text, re.M | re.S):
            source = [line.strip() for line in (ROOT / name).read_text().splitlines()]
            lines = [line.strip() for line in shown.splitlines()]
            assert any(source[at : at + len(lines)] == lines for at in range(len(source))), f"{page.name}: {name}"
            found += 1
    assert found


# Configurations -----------------------------------------------------------------------


@pages_with("yaml")
def test_configurations_load(page, place, monkeypatch):
    for block in blocks(page):
        if block.title:
            (place / block.title).write_text(block.text)
    for name, value in re.findall(r"^<!-- environment: (\w+)=(.*) -->$", page.read_text(encoding="utf-8"), re.M):
        monkeypatch.setenv(name, value)
    for block in blocks(page):
        if block.language != "yaml":
            continue
        tree = yaml.safe_load(block.text)
        given = "module" in tree
        (place / "shown.yaml").write_text(("" if given else TINY) + block.text)
        config = load_config(place / "shown.yaml")
        if importlib.util.find_spec(config.module._target_.partition(".")[0]):
            build_trainer(config)


TINY = "module: {_target_: hookline.testing.TinyModule}\n"


def commands(block):
    """Give the arguments of each `hookline` command in a block."""
    for line in block.text.splitlines():
        for part in re.split(r" && |#", line):
            words = shlex.split(part)
            if words[:1] == ["hookline"]:
                yield words[1:]


@pages_with("bash")
def test_commands_are_understood(page, place):
    written = {block.title for block in blocks(page)}
    for block in blocks(page):
        for arguments in commands(block) if block.language == "bash" else ():
            if arguments[0] in installed(COMMANDS):  # its plugin tests what stands behind it
                continue
            options = _parse(arguments)
            assert isinstance(options, argparse.Namespace)
            config = getattr(options, "config", None) or ""
            kept = Path(config).parts[:1] == ("runs",)
            assert not config or kept or config in written or (ROOT / config).exists(), arguments


def test_every_option_of_the_trainer_is_in_the_table():
    rows = table_after(DOCS / "configuration.md", "option")
    shown = {name.strip("`"): yaml.safe_load(default.strip("`")) for name, default, _ in rows}
    assert shown == {field.name: field.default for field in dataclasses.fields(Options)}
    assert list(shown) == [field.name for field in dataclasses.fields(Options)]
    assert all(meaning for *_, meaning in rows)


def table_after(page, head):
    """Return the cells of the first table whose first head is `head`."""
    lines = page.read_text(encoding="utf-8").splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


# Hooks --------------------------------------------------------------------------------


def test_the_reference_is_what_the_source_says():
    """Regenerate with `python -m hookline.cli.hooks > docs/hooks.md`."""
    assert (DOCS / "hooks.md").read_text() == render_reference() + "\n"


def test_the_reference_has_every_hook_with_its_arguments():
    headings = re.findall(r"^### `(\w+)\((.*)\)`", (DOCS / "hooks.md").read_text(), re.M)
    assert [(name, tuple(arguments.split(", "))) for name, arguments in headings] == [
        (hook.name, hook.arguments) for hook in HOOKS.values()
    ]


def test_the_loop_has_every_hook_in_the_order_in_which_a_run_reaches_it(place):
    _, *sections = re.findall(r"^```text\n(.*?)^```$", (DOCS / "loop.md").read_text(), re.M | re.S)
    shown = [name for name in re.findall(r"\w+", "\n".join(sections)) if name in HOOKS]
    assert set(shown) == set(HOOKS)
    reached = hooks_reached()
    assert len(reached) > 45
    assert [name for name in dict.fromkeys(shown) if name in reached] == reached


def hooks_reached():
    """Return the hooks of a resumed run in the order in which each was reached first."""
    reached = {}

    def listener(hook):
        namespace = {"reached": reached}
        does = "return (yield)" if hook.kind == "verb" else "return"
        exec(f"def {hook.name}(self):\n    reached[{hook.name!r}] = None\n    {does}", namespace)
        return hookimpl(namespace[hook.name], wrapper=hook.kind == "verb")

    listen = type("Listen", (CallbackInterface,), {hook.name: listener(hook) for hook in HOOKS.values()})
    options = {"max_train_steps_per_epoch": 1, "log_every": "1 steps"}
    checkpoint = {
        "checkpoint": {"keep_best": 1, "mode": "min"}
    }  # else it asks `get_mode`, which the page has with what else may ask
    tiny_trainer(checkpoint, epochs=1, **options).train()
    resumed = tiny_trainer({**checkpoint, "listen": listen()}, epochs=2, resume=True, **options)
    resumed.train()
    return list(reached)


def test_the_pictures_name_hooks_that_exist():
    picture = next(block for block in blocks(ROOT / "README.md") if block.language == "text")
    names = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", picture.text))
    assert len(names) > 15
    assert names <= set(HOOKS)


# The trainer --------------------------------------------------------------------------


def offered(column):
    """Give the cells of a column of the tables of what the trainer offers to plugins."""
    section = (DOCS / "writing-a-plugin.md").read_text(encoding="utf-8").partition("## What the trainer offers\n")[2]
    for line in section.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            yield line.strip("|").split(" | ")[column]


def trainer_attributes():
    """Return the public methods, properties and attributes of the trainer, as its source defines them."""
    tree = ast.parse((ROOT / "src" / "hookline" / "trainer.py").read_text(encoding="utf-8"))
    (trainer,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer"]
    methods = [node for node in trainer.body if isinstance(node, ast.FunctionDef)]
    found = {method.name for method in methods}
    for method in methods:
        if method.name in ("__init__", "_begin"):
            stored = [node for node in ast.walk(method) if isinstance(node, ast.Attribute)]
            found |= {
                node.attr for node in stored if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
            }
    return {name for name in found if not name.startswith("_")}


def test_the_page_has_every_public_attribute_of_the_trainer_once():
    names = re.findall(r"`trainer\.(\w+)", "\n".join(offered(0)))
    assert sorted(names) == sorted(trainer_attributes())


def test_the_page_has_what_plugins_use_of_the_parts_of_the_trainer():
    trainer = tiny_trainer()
    shown = {
        (part, name)
        for cell, words in zip(offered(0), offered(1), strict=True)
        for part in re.findall(r"^ `trainer\.(\w+)`$", cell)
        for name in re.findall(r"`\.(\w+)", words)
    }
    for part, name in shown:
        assert hasattr(getattr(trainer, part), name), f"trainer.{part}.{name}"
    parts = "|".join(PARTS)
    for path in ROOT.glob("plugins/*/src/**/*.py"):
        for use in re.findall(rf"\b(?:trainer|core)\.({parts})\.(\w+)", path.read_text(encoding="utf-8")):
            assert use in shown, f"{path.name} uses trainer.{'.'.join(use)}"


# Messages -----------------------------------------------------------------------------


def said():
    """Return every text in the sources, with … where a value is filled in."""
    texts = []
    for path in [*(ROOT / "src").rglob("*.py"), *ROOT.glob("plugins/*/src/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if node in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def messages(page):
    """Give the messages that a page quotes: the first cell of tables that are headed so."""
    quoting = False
    for line in page.read_text(encoding="utf-8").splitlines():
        quoting = line.startswith("| message |") or (quoting and line.startswith("|"))
        if quoting and not line.startswith(("| message |", "|-")):
            yield CODE_SPAN.search(line)[2].strip()


@pytest.mark.parametrize("name", ["errors.md", "writing-a-plugin.md"])
def test_messages_are_those_of_the_source(name):
    texts, quoted = said(), list(messages(DOCS / name))
    assert len(quoted) > 10
    for message in quoted:
        parts = [part.strip() for part in message.split("…") if part.strip()]
        assert sum(map(len, parts)) >= 12, message
        pattern = re.compile(".*".join(map(re.escape, parts)), re.S)
        assert any(pattern.search(text) for text in texts), message


# The house ----------------------------------------------------------------------------


def test_every_plugin_has_a_page_which_is_its_readme():
    plugins = sorted(path.parent.name for path in ROOT.glob("plugins/*/README.md"))
    assert sorted(path.stem for path in (DOCS / "plugins").glob("*.md")) == sorted([*plugins, "index"])
    table = (ROOT / "README.md").read_text()
    for plugin in plugins:
        assert (DOCS / "plugins" / f"{plugin}.md").read_text() == f'--8<-- "plugins/{plugin}/README.md"\n'
        assert f"[{plugin}](plugins/{plugin}/README.md)" in table


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


def slug(heading):
    given = re.search(r"\{ #(\w+) \}$", heading)
    return given[1] if given else re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
