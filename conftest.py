"""What all tests share: one thread each, how many workers `pytest -n auto` has, what it leaves out, and a browser.

The workers keep the cores busy, so more threads would only fight; and bits are compared between processes, which sum
in the same order only with the same number of threads.
"""

import os
import shutil
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, here and in processes that tests start

import pytest
import torch


def pytest_xdist_auto_num_workers():
    """Have one worker more than cores: a third of the time tests wait for processes, servers and timeouts."""
    return (os.cpu_count() or 1) + 1


ROOT = Path(__file__).parent
THOROUGH = [
    line for line in (ROOT / "tests" / "thorough.txt").read_text().splitlines() if line and not line.startswith("#")
]


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="run what is left out where no path is given")


def pytest_configure(config):
    """Note which part of the tests runs: all where a path is given. Workers of xdist are told by the controller."""
    if hasattr(config, "workerinput"):
        config.part = config.workerinput["part"]
    elif config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        config.part = "given"
    else:
        config.part = "thorough" if config.option.thorough else "quick"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["part"] = node.config.part


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.part == "given":
        return
    kept, left = [], []
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        thorough = any(path.startswith(place) for place in THOROUGH)
        (kept if thorough == (config.part == "thorough") else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def no_dispatch_mode_is_left():
    """Fail a test that leaves a mode behind, which would see and slow every operation of the tests after it."""
    yield
    assert torch._C._len_torch_dispatch_stack() == 0


@pytest.fixture
def browser(tmp_path):
    """Open a browser without a window: the machine's Chromium, which keeps a log of requests and of complaints."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives the browser")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("looks at pages in chromium, by chromedriver, which are not there")
    options = webdriver.ChromeOptions()
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    words = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000", *quiet)
    for word in (*words, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(word)
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_script_timeout(60)
    opened.get("about:blank")
    opened.get_log("performance")  # of its own first page
    yield opened
    opened.quit()
