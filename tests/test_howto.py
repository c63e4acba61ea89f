"""The pages of "How to": each is followed block by block, as a reader follows it, and shows what it says.

Files are written, code and commands run in order in one folder. A block of text shows lines of what the blocks before
it have printed; `…` stands for anything. `# exit code 1` behind a command says how it ends. `<!-- not run: … -->` above
a block says why it needs another machine.
"""

import importlib
import logging
import os
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from hookline.cli import main

pytestmark = pytest.mark.plugins

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "how-to"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.stem != "index")
BLOCK = re.compile(
    r'^(<!-- not run: .+ -->\n+)?```(\w+)(?: +title="([^"]+)")?\n(.*?)^```$|^<!-- test:\s(.*?)\s-->$', re.M | re.S
)
SLOW = {"use-several-gpus", "sweep-hyper-parameters"}  # they start processes: nox -s distributed


class Block(NamedTuple):
    apart: str
    language: str
    title: str
    text: str
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match[1] or "", match[2] or "python", match[3] or "", match[4] or match[5], line)


def module_of_the_pages():
    """Return the file `digits.py`, which all pages train, from the page "From A to Z"."""
    page = (ROOT / "docs" / "a-to-z.md").read_text(encoding="utf-8")
    return re.search(r'^```python title="digits.py"\n(.*?)^```$', page, re.M | re.S)[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Be in a folder with the module of the pages, where the command speaks as it does in a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "digits.py").write_text(module_of_the_pages())
    written = {Path(block.title).stem for page in PAGES for block in blocks(page) if block.title.endswith(".py")}
    for name in {"digits", *written}:  # which another test may have left
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(line):
    """Do one command of a page as a terminal does: with its exit code, told by its end or by what it raises."""
    words, expected = shlex.split(line, comments=True), re.search(r"# exit code (\d+)", line)
    if words[0] == "cd":
        os.chdir(words[1])
        return
    assert words[0] == "hookline", f"{line!r} is not run by this test: write why above its block"
    if "--nproc" in words:  # processes of their own write past this one
        done = subprocess.run(
            [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout
        return
    handlers, logging.root.handlers[:] = [*logging.root.handlers], []  # pytest's, to which the command would leave it
    try:
        code = main(words[1:])
    except SystemExit as end:
        code = end.code or 0
    except Exception:
        traceback.print_exc()
        code = 1
    finally:
        logging.root.handlers[:] = handlers
    assert code == int(expected[1] if expected else 0), line


def assert_shown(text, said):
    """Fail if a line of a page is not among what was printed, in this order."""
    place = 0
    for line in text.splitlines():
        pattern = re.compile(r"\s+".join(map(re.escape, line.split())).replace("…", ".*?"))
        found = pattern.search(said, place)
        assert found, f"{line!r} was not printed; this was:\n{said[place:]}"
        place = found.end()


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else []) for page in PAGES],
)
def test_a_page_does_what_it_says(page, place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # in the order of a terminal
    names, said = {"__name__": "__main__"}, ""
    for block in blocks(page):
        if block.title:
            (place / block.title).parent.mkdir(parents=True, exist_ok=True)
            (place / block.title).write_text(block.text)
            importlib.invalidate_caches()
        elif block.language == "text":
            assert_shown(block.text, said)
            said = ""
        elif block.language == "bash" and not block.apart:
            for line in block.text.splitlines():
                run(line)
                said += capsys.readouterr().out
        elif block.language == "python":
            source = "\n" * block.line + block.text  # so that a traceback has the page's own lines
            exec(compile(source, str(page), "exec"), names)
        said += capsys.readouterr().out


def test_every_page_is_in_the_list_under_its_own_words():
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"\[([^\]]+)\]\(([\w-]+)\.md\)", index))
    headings = {page.stem: page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in PAGES}
    assert {name: title for title, name in shown.items()} == headings


def test_every_page_is_short_and_says_what_to_expect():
    for page in PAGES:
        found = list(blocks(page))
        assert sum(len(block.text.splitlines()) for block in found if block.language != "text") <= 45, page.stem
        assert any(block.language == "text" for block in found), page.stem
