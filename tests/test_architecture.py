"""The house: who may import whom, what the core may name, and that the hook API keeps its promises."""

import ast
import contextlib
import inspect
import io
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from hookline import CallbackInterface, hookimpl, hookspecs
from hookline.cli import OWN, main
from hookline.cli.hooks import read_hooks
from hookline.plugins import SEED, PluginManager
from hookline.testing import Memory, TinyModule, tiny_trainer

ROOT = Path(__file__).parent.parent
CORE = ROOT / "src" / "hookline"
MAP = (ROOT / "docs" / "architecture.md").read_text()
PICTURES = re.findall(r"^```text\n(.*?)^```", MAP, re.M | re.S)
FLOORS = [set(row.partition("#")[0].split()) for row in reversed(PICTURES[0].splitlines())]
"""Each may import from those before it."""
ROOMS = {
    room: [row.split() for row in reversed(rows.split(">"))]
    for room, _, rows in (line.partition(":") for line in PICTURES[1].splitlines())
}
"""The files of a room, each may import from those before it."""
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
WORDS = {  # of the distributions that are not called by the word of their one plugin, which is
    "runs": "jsonl",  # one home for the format of records: the plugin writes them, the command `runs` reads them
    "simulate": None,  # brings a command alone
}
HOOKS = {hook.name: hook for hook in read_hooks()}


def imports(path):
    """Give the modules that a file imports when it runs (not what stands under TYPE_CHECKING)."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


SIZES = {"class": 300, "function": 40}  # lines that are neither empty nor of a docstring
LONGER = {"hookspecs.py": "the one page on which the loop is read from top to bottom"}  # than 400 lines, all counted
PARTS = {"built", "ends", "evaluation", "loaders", "logs", "randomness", "session", "training", "window"}


def code_lines(node, text):
    """Return how many lines of a piece of source are neither empty nor of a docstring."""
    first, last = (1, len(text)) if isinstance(node, ast.Module) else (node.lineno, node.end_lineno)
    lines = {number for number in range(first, last + 1) if text[number - 1].strip()}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str):
            lines -= set(range(inner.lineno, inner.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_nothing_in_the_core_grows_out_of_sight(path):
    text = path.read_text().splitlines()
    name = str(path.relative_to(CORE))
    assert len(text) <= 400 or name in LONGER
    for node in ast.walk(ast.parse(path.read_text())):
        kind = {ast.ClassDef: "class", ast.FunctionDef: "function"}.get(type(node))
        if kind:
            assert code_lines(node, text) <= SIZES[kind], f"{name}: {node.name}"


def written(path):
    """Give what a file assigns to attributes of others: the line, the owner, the attribute."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            for inner in getattr(target, "elts", [target]):
                if isinstance(inner, ast.Attribute):
                    owner = inner.value
                    yield node.lineno, ast.unparse(owner), inner.attr


def test_no_attribute_of_the_trainer_or_of_its_parts_is_written_by_others():
    """What others do to them, they do by calling; `position` is a property that may be set."""
    for path in (*CORE.rglob("*.py"), *(ROOT / "plugins").glob("*/src/**/*.py")):
        for line, owner, attribute in written(path):
            *_, holder, last = ("", *owner.split("."))
            ours = last in {"trainer", "core"} or (holder and last in PARTS)
            ours = ours or (path.is_relative_to(CORE) and last == "run")
            assert not ours or attribute == "position", f"{path.name}:{line} writes {attribute} of {owner}"


def floor_of(module):
    return next(number for number, names in enumerate(FLOORS) if module in names)


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda path: str(path.relative_to(CORE)))
def test_floors(path):
    own = path.relative_to(CORE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imports(path):
        if name.startswith("hookline."):
            module = name.split(".")[1]
            if module in {"__version__", own}:
                continue
            assert floor_of(module) <= floor_of(own), f"{own} imports {module}, which stands above it"


@pytest.mark.parametrize("room", ROOMS)
def test_files_of_a_room_import_each_other_downwards(room):
    level = {name: number for number, names in enumerate(ROOMS[room]) for name in names}
    files = {path.stem for path in (CORE / room).glob("*.py")}
    assert files - {"__init__"} == level.keys() - {"__init__"}
    for name in level:
        for imported in imports(CORE / room / f"{name}.py"):
            if imported.startswith(f"hookline.{room}."):
                other = imported.split(".")[2]
                assert level[other] < level[name], f"{room}/{name} imports {other}, which stands beside or above it"


def test_the_map_names_what_there_is():
    for path in re.findall(r"`((?:src|plugins|tests|docs)/[\w/.-]+)`", MAP):
        assert (ROOT / path).exists(), path
    stops = re.findall(r"^\| \d+ \| `([\w/.]+)` `([\w.]+)` \|", MAP, re.M)
    assert len(stops) > 12
    for path, name in stops:
        tree = ast.parse((ROOT / path).read_text())
        for part in name.split("."):
            inside = [node for node in tree.body if getattr(node, "name", None) == part]
            assert inside, f"{path} has no {name}"
            tree = inside[0]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_plugins_import_public_names_and_no_other_plugin(plugin):
    import hookline

    for path in (ROOT / "plugins" / plugin / "src").rglob("*.py"):
        for name in imports(path):
            first, *rest = name.split(".")
            if first == "hookline":
                assert not rest or rest[0] in hookline.__all__, f"{path.name} imports {name}, which is not public"
            assert not first.startswith("hookline_") or first == f"hookline_{plugin}", f"{path.name} imports {name}"


TYPED = {"hookline.hookspecs", "hookline.interfaces"}  # the contract, which names the type of the trainer


def modules_of(home):
    """Return the files of a distribution by the names of the modules."""
    paths = {".".join(path.relative_to(home).with_suffix("").parts): path for path in home.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def named(node):
    """Give the names of what a statement or a call may import."""
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{name.name}" for name in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        yield from (word.value for word in node.args if isinstance(word, ast.Constant))


def arrows(home):
    """Return which modules of a distribution a module imports, anywhere in it: in functions and for types too."""
    modules, found = modules_of(home), {}
    for module, path in modules.items():
        names = {name for node in ast.walk(ast.parse(path.read_text())) for name in named(node)}
        homes = {name if name in modules else name.rpartition(".")[0] for name in names}
        found[module] = homes & modules.keys() - {module}
    return found


def circles(graph):
    """Return the groups of modules in which each leads to each."""

    def reached(begin):
        found, new = set(), {begin}
        while new:
            found |= new
            new = {after for module in new for after in graph[module]} - found
        return found

    ways = {module: reached(module) for module in graph}
    groups = {frozenset(other for other in ways[module] if module in ways[other]) for module in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"g"}, "g": {"f", "a"}}
    assert circles(graph) == [["a", "b", "c"], ["f", "g"]]


def test_an_arrow_is_seen_wherever_an_import_stands(tmp_path):
    for name, text in {
        "pack/__init__.py": "",
        "pack/one.py": "import importlib\ndef load():\n    return importlib.import_module('pack.two')\n",
        "pack/two.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pack.three import Three\n",
        "pack/three.py": "def load():\n    from pack import one\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert circles(arrows(tmp_path)) == [["pack.one", "pack.three", "pack.two"]]


@pytest.mark.parametrize("home", ["src", *(f"plugins/{plugin}/src" for plugin in PLUGINS)])
def test_no_imports_in_circles(home):
    graph = arrows(ROOT / home)
    if home == "src":
        for contract in TYPED:
            graph[contract].discard("hookline.trainer")
    assert circles(graph) == []


def test_the_core_names_no_feature():
    features = {WORDS.get(plugin) or plugin for plugin in PLUGINS}
    # words of their own: what an evaluation answers, what torch's schedulers and optimizers have, a unit of cadences
    features -= {"metrics", "best", "optimizer", "param_groups", "sample"}
    for path in CORE.glob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & features, f"{path.name} names {words & features}"


def test_the_core_is_this_and_nothing_else():
    """The contract, hooks, the plugin manager, the loop, data, configuration, the command line, the kit for tests."""
    found = {path.stem for path in CORE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == set().union(*FLOORS) | {"__init__", "__main__"}
    commands = {"__init__", "doctor", "going_on", "hooks", "launch", "loading", "logs", "machine", "mistakes", "new"}
    assert {path.stem for path in CORE.glob("cli/*.py")} == commands | {"plugins", "schedule"}
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        main(["--help"])
    listed = printed.getvalue().partition("  COMMAND\n")[2].partition("\n\n")[0]
    commands = ("fit", "validate", "test", "predict", "plan", "plugins", "hooks", "doctor", "new", "init")
    assert tuple(re.findall(r"^    (\S+)", listed, re.M)) == commands == OWN


def lines_in(paths):
    return sum(code_lines(ast.parse(text := path.read_text()), text.splitlines()) for path in paths)


def test_the_core_can_be_read_in_one_sitting():
    configuration = {CORE / f"{name}.py" for name in ("arguments", "config", "masking", "reading")}
    others = {CORE / "commands.py", CORE / "pytest_plugin.py"}
    generates = {CORE / "plugins" / "straight.py"}  # what it makes is read in hookspecs.py
    flat = {*CORE.glob("*.py"), *CORE.glob("data/*.py")} - configuration - others
    rooms = {path for room in ("loop", "plugins", "files") for path in CORE.glob(f"{room}/*.py")} - generates
    assert lines_in(generates) <= 115
    assert lines_in(configuration) <= 570
    assert lines_in(flat) <= 3800
    assert lines_in(flat | rooms) <= 4900


# The hook API -------------------------------------------------------------------------


def test_on_means_event():
    for hook in HOOKS.values():
        assert (hook.kind == "event") == hook.name.startswith("on_"), hook.name


def test_every_hook_is_documented_offers_the_trainer_and_says_what_a_verb_answers():
    manager = PluginManager()
    assert set(HOOKS) == set(vars(manager.hook))
    for hook in HOOKS.values():
        assert hook.doc.endswith(".") or hook.doc.endswith("`."), hook.name
        assert hook.arguments[0] == "trainer", hook.name
        assert bool(hook.answers) == (hook.kind == "verb"), hook.name


def test_the_seeds_events_have_the_seeds_arguments():
    from hookline import CallbackInterface

    for name, (sure, outputs) in SEED.items():
        seed = list(inspect.signature(getattr(CallbackInterface, name)).parameters)[1:]
        ours = [argument for argument in HOOKS[name].arguments if argument not in ("trainer", "stepped")]
        assert ours[: len(seed)] == seed
        assert (outputs in ours) == (outputs is not None)
        assert len([a for a in ours if a not in (outputs, "key")]) == sure


def test_a_change_of_the_hook_api_is_seen():
    """If it is meant: say it in the changelog, and `hookline hooks > tests/hook_api.txt`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(["hooks"])
    assert printed.getvalue() == (ROOT / "tests" / "hook_api.txt").read_text()


def wrapping(hook, answers):
    def wrapper(self):
        answers.setdefault(hook, []).append((yield))
        return answers[hook][-1]

    return hookimpl(wrapper=True, specname=hook)(wrapper)


def hearing(hook, told):
    def hear(self):
        told.add(hook)

    return hookimpl(specname=hook)(hear)


def test_every_hook_is_reached_and_every_verb_answers():
    """In a training, an evaluation, a test, a prediction, a save, a resume and a failure, with nothing performed."""
    answers, told = {}, set()
    verbs = {f"wrap_{name}": wrapping(name, answers) for name, hook in HOOKS.items() if hook.kind == "verb"}
    events = {f"hear_{name}": hearing(name, told) for name, hook in HOOKS.items() if hook.kind == "event"}
    everything = type("Everything", (CallbackInterface,), verbs | events)

    class Fails(TinyModule):
        def train_step(self, global_step, batch, device):
            if global_step > 3:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    trainer = tiny_trainer([everything()], epochs=1)
    trainer.train()
    trainer.validate()
    trainer.test()
    trainer.predict()
    assert trainer.resuming is None
    trainer.log_object("text", "x")
    trainer.export_model()
    with trainer.rank_zero_first():
        pass
    trainer.hook.all_gather(trainer=trainer, value=1)
    trainer.hook.vote(trainer=trainer, asked=False, seconds=0.0)
    trainer.hook.allocate(trainer=trainer, path=("module", "net.0.weight"), shape=(16, 8), dtype=torch.float32)
    trainer.hook.get_mode(trainer=trainer, metric="val_loss")
    trainer.hook.get_watched_metrics(trainer=trainer)
    trainer.hook.get_total_norm(trainer=trainer, norm=torch.ones(()), norm_type=2.0)
    trainer.hook.compile_function(trainer=trainer, function=torch.abs)
    trainer.hook.join_loaders(trainer=trainer, loaders={"one": []}, sampler=torch.utils.data.Sampler)
    trainer.hook.on_checkpoint(trainer=trainer, path=Path(), kind="model")
    memory = Memory(every="2 steps")
    with pytest.raises(ZeroDivisionError):
        tiny_trainer([everything(), memory], Fails()).train()
    tiny_trainer([everything(), Memory(memory.state)], epochs=1).train()
    assert set(HOOKS) - set(answers) - told == set()
    assert [name for name, answered in answers.items() if None in answered] == []


# The repository -----------------------------------------------------------------------


def lines_of(name):
    return [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_plugin_is_whole_and_bears_one_word_everywhere(plugin):
    folder = ROOT / "plugins" / plugin
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == f"hookline-{plugin.replace('_', '-')}"
    brought, commands = (project["entry-points"].get(f"hookline.{kind}", {}) for kind in ("plugins", "commands"))
    if plugin in WORDS:
        assert list(brought) == [word for word in (WORDS[plugin],) if word]
        assert list(commands) == [plugin]
    else:
        (entry,) = brought.items()
        assert entry[0] == plugin
        assert entry[1].lower().replace("_", "") == f"hookline{plugin}:{plugin}".replace("_", "")
    assert all(target.startswith(f"hookline_{plugin}") for target in (brought | commands).values())
    assert any(need.startswith("hookline>=") for need in project["dependencies"])
    assert (folder / "README.md").read_text().startswith(f"# hookline-{plugin.replace('_', '-')}")
    assert list((folder / "tests").glob("test_*.py"))
    assert (ROOT / "docs" / "plugins" / f"{plugin}.md").exists()


def test_plugins_are_known_by_one_build_but_for_those_that_the_developers_requirements_name(tmp_path):
    assert {"torch==2.13.0", "-e .", "-e ./plugins"} < set(lines_of("requirements.txt"))
    apart = {line.removeprefix("-e ./plugins/") for line in lines_of("requirements-dev.txt") if "-e ./plugins/" in line}
    together = [plugin for plugin in PLUGINS if plugin not in apart]
    assert apart < set(PLUGINS)
    code = f"import workspace; print(workspace.build_editable({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "plugins", capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / done.stdout.strip()) as wheel:
        wheel.extractall(tmp_path)
    lines = (tmp_path / "hookline_plugins.pth").read_text().splitlines()
    assert lines == ["hookline_plugins", *(str(ROOT / "plugins" / plugin / "src") for plugin in together)]
    found = {dist.name: dist for dist in metadata.distributions(path=[str(tmp_path / "hookline_plugins")])}
    assert sorted(found) == sorted(f"hookline-{plugin.replace('_', '-')}" for plugin in together)
    for plugin in together:
        project = tomllib.loads((ROOT / "plugins" / plugin / "pyproject.toml").read_text())["project"]
        dist = found[project["name"]]
        assert {point.name: point.value for point in dist.entry_points.select(group="hookline.plugins")} == (
            project["entry-points"].get("hookline.plugins", {})
        )
        assert f"/plugins/{plugin}" in dist.read_text("direct_url.json")
    (own,) = metadata.distributions(path=[str(tmp_path)], name="hookline_plugins")
    assert {"safetensors>=0.8", "torchmetrics<2,>=1.9"} <= {str(Requirement(need)) for need in own.requires}
    assert not [need for need in own.requires if need.startswith("hookline") or "extra" in need]


def test_the_core_needs_no_plugin_to_be_imported():
    code = "import sys, hookline; hookline.Trainer; print(*{module.partition('.')[0] for module in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"rich", "torchmetrics", "safetensors", *(f"hookline_{plugin}" for plugin in PLUGINS)}


def test_the_spec_module_is_public():
    assert inspect.getmodule(hookspecs.update) is hookspecs
