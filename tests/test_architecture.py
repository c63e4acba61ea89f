"""The house: who may import whom, what the core may name, and that the hook API keeps its promises."""

import ast
import contextlib
import inspect
import io
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from hookline import CallbackInterface, hookimpl, hookspecs
from hookline.cli import main
from hookline.cli.hooks import read_hooks
from hookline.plugins import SEED, PluginManager
from hookline.testing import Memory, TinyModule, tiny_trainer

ROOT = Path(__file__).parent.parent
CORE = ROOT / "src" / "hookline"
FLOORS = [  # each may import from those before it
    {"marks", "installed", "masking", "idle", "records", "files"},
    {"interfaces"},
    {"outputs", "logs", "data", "schedule", "schedules", "state", "options", "monitored"},
    {"hookspecs"},
    {"plugins"},
    {"trainer"},
    {"config"},
    {"cli", "testing", "tracking"},
]
PLUGINS = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/pyproject.toml"))
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


@pytest.mark.parametrize("plugin", PLUGINS)
def test_plugins_import_public_names_and_no_other_plugin(plugin):
    import hookline

    for path in (ROOT / "plugins" / plugin / "src").rglob("*.py"):
        for name in imports(path):
            first, *rest = name.split(".")
            if first == "hookline":
                assert not rest or rest[0] in hookline.__all__, f"{path.name} imports {name}, which is not public"
            assert not first.startswith("hookline_") or first == f"hookline_{plugin}", f"{path.name} imports {name}"


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_files_of_a_plugin_import_each_other_one_way(plugin):
    package = ROOT / "plugins" / plugin / "src" / f"hookline_{plugin}"
    names = {path.stem for path in package.glob("*.py")} - {"__init__"}
    above = {
        name: {other.split(".")[1] for other in imports(package / f"{name}.py") if other.startswith(f"{package.name}.")}
        for name in names
    }
    list(TopologicalSorter({name: others & names for name, others in above.items()}).static_order())


def test_the_core_names_no_feature():
    features = set(PLUGINS) - {"metrics"}  # a word of its own: what an evaluation answers
    for path in CORE.glob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not words & features, f"{path.name} names {words & features}"


def test_the_core_can_be_read_in_one_sitting():
    lines = 0
    for path in (*CORE.glob("*.py"), *CORE.glob("data/*.py")):
        tree = ast.parse(path.read_text())
        documented = set()
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                documented |= set(range(node.lineno, node.end_lineno + 1))
        text = path.read_text().splitlines()
        lines += sum(bool(line.strip()) and number not in documented for number, line in enumerate(text, 1))
    assert lines <= 3800


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
    (entry,) = project["entry-points"]["hookline.plugins"].items()
    assert entry[0] == plugin
    assert entry[1].lower().replace("_", "") == f"hookline{plugin}:{plugin}".replace("_", "")
    assert any(need.startswith("hookline>=") for need in project["dependencies"])
    assert (folder / "README.md").read_text().startswith(f"# hookline-{plugin.replace('_', '-')}")
    assert list((folder / "tests").glob("test_*.py"))
    assert (ROOT / "docs" / "plugins" / f"{plugin}.md").exists()


def test_the_list_of_requirements_is_the_list_of_folders():
    listed = [line for name in ("requirements.txt", "requirements-dev.txt") for line in lines_of(name)]
    assert sorted(line for line in listed if line.startswith("-e ./plugins/")) == [f"-e ./plugins/{p}" for p in PLUGINS]
    assert "-e ." in listed
    assert "torch==2.13.0" in lines_of("requirements.txt")


def test_the_core_needs_no_plugin_to_be_imported():
    code = "import sys, hookline; hookline.Trainer; print(*{module.partition('.')[0] for module in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {"rich", "torchmetrics", "safetensors", *(f"hookline_{plugin}" for plugin in PLUGINS)}


def test_the_spec_module_is_public():
    assert inspect.getmodule(hookspecs.update) is hookspecs
