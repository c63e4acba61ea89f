"""What TensorBoard itself, served on this machine and looked at in a browser, shows of a run."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import torch

from hookline import CallbackInterface, hookimpl
from hookline.testing import TinyModule, tiny_trainer
from hookline.tracking import Histogram, Image
from hookline_tensorboard import Tensorboard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("tensorboard_browser")]


class Shows(TinyModule):
    """Logs one of each kind in the second step."""

    def on_end_train_step(self, global_step, *outputs):
        if global_step == 2:
            picture = Image(torch.full((3, 40, 50), 200))
            for name, value in {"note": "a text", "numbers": Histogram(torch.arange(10.0)), "square": picture}.items():
                self.trainer.log_object(name, value)


class Told(CallbackInterface):
    """Keeps what plugins have been told, as float32."""

    def __init__(self):
        self.points = {}

    @hookimpl
    def on_log(self, metrics, global_step):
        for name, value in metrics.items():
            self.points.setdefault(name, []).append([global_step, torch.tensor(value).item()])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Return what was logged of a run, and the folder of runs."""
    told, folder = Told(), tmp_path_factory.mktemp("runs")
    options = {"log_every": "1 steps", "evaluate_every": "3 steps", "runs_folder": str(folder)}
    tiny_trainer([Tensorboard(), told], Shows(), config={"lr": 0.125, "net": {"name": "tiny"}}, **options).train()
    return told.points, folder


@pytest.fixture(scope="module")
def address(told, tmp_path_factory):
    """Serve the runs and return where."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", told[1], "--host", "127.0.0.1", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127.0.0.1:\d+/", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def shown(browser, script, good, patience=60):
    """Return what a script answers as soon as it is good; what it answers in the end, where it never is."""
    deadline = time.monotonic() + patience
    while not good(answer := browser.execute_script(script)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return answer


# Most of the page stands in shadow trees, where neither a selector nor `innerText` looks.
ALL = """function all(node) {
    return [node, ...(node.shadowRoot ? all(node.shadowRoot) : []), ...[...node.childNodes].flatMap(all)];
}"""
TEXTS = f"""{ALL}
return all(document.body).filter(node => node.nodeType == 3).map(node => node.textContent.trim()).filter(Boolean)"""
CURVES = f"""{ALL}
const named = (name, where) => all(where).filter(node => node.matches?.(name));
return Object.fromEntries(named('tf-scalar-card', document.body).map(card =>
    [card.tag, named('vz-line-chart2', card).flatMap(chart => Object.values(chart._chart?.name2datasets ?? {{}}))
        .map(line => line.data().map(point => [point.step, point.scalar]))]))"""


def test_the_server_has_every_point(told, address):
    points, _ = told
    assert len(points["train_loss"]) == 14
    for name, wanted in points.items():
        query = urllib.parse.urlencode({"run": "run-1/tensorboard", "tag": name})
        with urllib.request.urlopen(f"{address}data/plugin/scalars/scalars?{query}", timeout=60) as answer:
            assert [[step, value] for _, step, value in json.load(answer)] == wanted


def test_a_browser_draws_the_curves(told, address, browser):
    points, _ = told
    browser.get(f"{address}#scalars")
    wanted = {name: [points[name]] for name in ("train_loss", "train_loss_epoch")}  # others are folded in
    assert shown(browser, CURVES, lambda drawn: drawn == wanted) == wanted
    assert "val_loss" in browser.execute_script(TEXTS)


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        ("hparams", {"run-1/tensorboard", "lr", "0.12500", "net.name", "tiny"}),
        ("text", {"note/text_summary", "a text", "status/text_summary", "finished"}),
        ("images", {"square", "run-1/tensorboard"}),
        ("histograms", {"numbers", "run-1/tensorboard"}),
    ],
)
def test_a_browser_shows_what_is_no_curve(page, wanted, address, browser):
    browser.get("about:blank")
    browser.get(f"{address}#{page}")
    assert set(shown(browser, TEXTS, lambda texts: wanted <= {*texts})) >= wanted
