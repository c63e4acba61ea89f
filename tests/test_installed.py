"""Distributions as pip leaves them: clashes, problems, changed files, and what a run requires."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

PLUGIN = '''
from __future__ import annotations

from dataclasses import dataclass, field

from hookline import CallbackInterface, hookimpl


@dataclass(eq=False)
class {name}(CallbackInterface):
    """Says where it is from.

    In two paragraphs.
    """

    requires = ("seeds",) if "{name}" == "Needs" else ()

    word: str
    """What it says; `none` for nothing."""
    times: list[int] = field(default_factory=lambda: [1, 2])
    quiet: bool = False

    @hookimpl(wrapper=True)
    def should_step(self):
        return (yield)

    @hookimpl(specname="on_boundary", tryfirst=True)
    def anything(self):
        pass

    def on_end_train(self, global_step):
        print("{name} says", self.word)
'''
RUN = """
module: {{_target_: hookline.testing.TinyModule}}
trainer: {{epochs: 1, max_steps: 1, train_batch_size: 8, device: cpu, run_name: run}}
plugins: {plugins}
"""


@pytest.fixture
def site(tmp_path):
    """Return a function that installs a distribution into a folder, as pip would."""

    def install(dist, plugin, source=None, version="1.0", requires="", group="plugins", name=None):
        module = dist.replace("-", "_")
        name = name or plugin.title()
        folder = tmp_path / f"{module}-{version}.dist-info"
        folder.mkdir()
        source = PLUGIN.format(name=name) if source is None else source
        (tmp_path / f"{module}.py").write_text(source)
        need = f"Requires-Dist: {requires}\n" if requires else ""
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n{need}")
        (folder / "entry_points.txt").write_text(f"[hookline.{group}]\n{plugin} = {module}:{name}\n")
        digest = base64.urlsafe_b64encode(hashlib.sha256(source.encode()).digest()).rstrip(b"=").decode()
        record = f"{module}.py,sha256={digest},{len(source)}\n{folder.name}/RECORD,,\n"
        (folder / "RECORD").write_text(record)

    return install


DRIVER = """
import contextlib, io, json, sys
from hookline.cli import main

done = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main(words)
        except SystemExit as exit:
            code = exit.code
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


class Done(NamedTuple):
    """What a command returned and wrote."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def commands(tmp_path):
    """Return a function that runs commands of hookline, one after the other, in one process that finds the folder."""

    def run(*words):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(words)],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [Done(*one) for one in json.loads(done.stdout)]

    return run


def configuration(tmp_path, plugins, more=""):
    path = tmp_path / f"{len([*tmp_path.glob('*.yaml')])}.yaml"
    path.write_text(RUN.format(plugins=plugins) + more)
    return path.name


def test_two_distributions_of_one_name_break_only_the_runs_that_name_it(site, commands, tmp_path):
    site("my-echo", "echo")
    site("other-echo", "echo", version="2.0")
    listed, without, named, chosen, one = commands(
        ["plugins"],
        ["fit", configuration(tmp_path, "{}")],
        ["fit", configuration(tmp_path, "{echo: {word: hi}}")],
        ["fit", configuration(tmp_path, "{echo: {_plugin_: other_echo.Echo, word: hi}}")],
        ["plugins", "echo"],
    )
    rows = [line for line in listed.stdout.splitlines() if line.startswith("echo ")]
    assert [row.split()[1] for row in rows] == ["my-echo", "other-echo"]
    assert "other-echo 2.0 brings this name too; uninstall one, or name it by its class" in rows[0]
    assert (listed.returncode, without.returncode, named.returncode) == (0, 0, 2)
    assert "two distributions bring plugins named 'echo': my-echo 1.0 (my_echo:Echo) and other-echo" in named.stderr
    assert "uninstall one of them, or name the class of the other: `plugins: {echo: {_plugin_: my_echo." in named.stderr
    assert (chosen.returncode, "Echo says hi" in chosen.stdout) == (0, True), chosen.stderr
    assert one.stderr.startswith("hookline: two distributions bring plugins named 'echo'")


def test_two_distributions_of_one_command_break_only_that_command(site, commands):
    site("my-echo", "echo", "Echo = print", group="commands")
    site("other-echo", "echo", "Echo = print", group="commands")
    hooks, named = commands(["hooks"], ["echo"])
    assert hooks.returncode == 0
    assert (named.returncode, named.stderr) == (
        2,
        "hookline: two distributions bring commands named 'echo': my-echo 1.0 (my_echo:Echo) and other-echo 1.0 "
        "(other_echo:Echo); uninstall one of them\n",
    )


BROKEN = {
    "exits": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "raises": ("raise RuntimeError('not today')", "RuntimeError: not today"),
    "lacks": ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
    "empty": ("", "has no attribute 'Empty'"),
}


def test_plugins_that_cannot_be_imported_are_listed_and_told(site, commands, tmp_path):
    site("sound", "sound")
    for name, (source, _) in BROKEN.items():
        site(name, name, source)
    site("old", "old", requires="torch>=99")
    site("gone", "gone")
    (tmp_path / "gone.py").unlink()
    words = [
        words
        for name in BROKEN
        for words in (
            ["plugins", name],
            ["fit", configuration(tmp_path, f"{{{name}: {{}}}}")],
            ["plugins", name, "--verify"],
        )
    ]
    listed, *said = commands(["plugins", "--json"], *words)
    assert listed.returncode == 0
    problems = {row["plugin"]: row["problem"] for row in json.loads(listed.stdout)}
    assert {*BROKEN, "sound", "old", "gone"} <= {*problems}
    assert "plugin 'old' of old 1.0 needs torch>=99, but torch is" in problems["old"]
    assert problems["gone"] == "there is no module gone; install gone 1.0 again"
    assert problems["sound"] == ""
    for (name, (_, message)), (shown, fit, verified) in zip(
        BROKEN.items(), zip(said[::3], said[1::3], said[2::3], strict=True), strict=True
    ):
        for one in (shown, fit):
            assert one.returncode == 2, (name, one)
            assert f"plugin {name!r} of {name} 1.0 cannot be imported" in one.stderr
            assert message in one.stderr
            assert len(one.stderr.splitlines()) == 1
        assert (verified.returncode, message in verified.stdout) == (1, True)


def test_one_plugin_in_full(site, commands):
    site("my-echo", "echo")
    text, data, file = commands(["plugins", "echo"], ["plugins", "echo", "--json"], ["plugins", "run.yaml", "--verify"])
    assert (file.returncode, "go with the name of a plugin" in file.stderr) == (2, True)
    assert text.stdout.startswith("echo: Says where it is from.\n\nIn two paragraphs.\n\nmy-echo 1.0, my_echo:Echo\n")
    assert "\n  word: str = required\n      What it says; `none` for nothing.\n" in text.stdout
    assert "\n  times: list[int] = [1, 2]\n  quiet: bool = False\n" in text.stdout
    told = json.loads(data.stdout)
    assert told["options"][0] == {
        "option": "word", "type": "str", "default": "required", "does": "What it says; `none` for nothing."
    }  # fmt: skip
    assert told["hooks"] == [
        {"hook": "should_step", "does": "wraps"},
        {"hook": "on_boundary", "does": "hears"},
        {"hook": "on_end_train", "does": "hears"},
    ]


def test_verify_names_changed_and_missing_files_and_imports_no_changed_one(site, commands, tmp_path):
    for name in ("sound", "changed", "gone", "linked"):
        site(name, name)
    with (tmp_path / "changed.py").open("a") as file:
        file.write("open('imported', 'w').close()\n")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "linked-1.0.dist-info" / "direct_url.json").write_text(
        json.dumps({"url": "file:///src/linked", "dir_info": {"editable": True}})
    )
    sound, changed, gone, linked, wrong = commands(
        *(["plugins", name, "--verify", "--json"] for name in ("sound", "changed", "gone", "linked", "sond"))
    )
    assert [one.returncode for one in (sound, changed, gone, linked, wrong)] == [0, 1, 1, 0, 2]
    files = [json.loads(one.stdout)[0]["files"] for one in (sound, changed, gone, linked)]
    assert files == [
        "1 as installed",
        "changed: changed.py",
        "missing: gone.py",
        "editable, file:///src/linked: not compared",
    ]
    assert not (tmp_path / "imported").exists()
    assert wrong.stderr.startswith("hookline: no plugin named 'sond' is installed, did you mean 'sound'?")


REQUIRED = [
    ("[echo]", "{echo: {word: x}}", None),
    ("[my-echo>=1]", "{other: {_plugin_: echo, word: x}}", None),
    ("[seeds]", "{needs: {word: x}}", None),
    ("[echo, far, hookline-away>=2]", "{echo: {word: x}}", "pip install hookline-far 'hookline-away>=2'`\n"),
    ("['echo>=2']", "{echo: {word: x}}", "pip install 'hookline-echo>=2'`\n"),
    ("[my-echo]", "{}", "my-echo is not active; name it in plugins (`echo: {}`, or `-p echo`)\n"),
    ("[echo]", "{echo: null}", "echo is not active; name it in plugins (`echo: {}`, or `-p echo`)\n"),
    ("echo", "{}", "this is a list, such as [checkpoint, hookline-clip>=0.1], not 'echo'\n"),
    ("['=1']", "{}", "'=1' must be like clip or hookline-clip>=0.1\n"),
]


def test_a_run_does_not_start_without_what_it_requires(site, commands, tmp_path):
    site("my-echo", "echo")
    site("needs", "needs")
    site("seeds", "seeds", PLUGIN.format(name="Seeds").replace("    word: str\n", "    word: str = 'x'\n"))
    files = [configuration(tmp_path, plugins, f"required_plugins: {required}\n") for required, plugins, _ in REQUIRED]
    done = commands(*(["fit", file] for file in files))
    for (required, _, message), said in zip(REQUIRED, done, strict=True):
        if message is None:
            assert said.returncode == 0, said.stderr
        else:
            assert said.returncode == 2, required
            assert said.stderr.startswith("hookline: required_plugins: ")
            assert said.stderr.endswith(message), (said.stderr, message)
            assert len(said.stderr.splitlines()) == 1
    kept = [path.read_text() for path in (tmp_path / "runs").glob("*/config.yaml")]
    assert len(kept) == 3
    assert all("required_plugins:\n-" in text for text in kept)
