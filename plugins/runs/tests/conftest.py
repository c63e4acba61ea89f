"""What the tests of the page stand on: short files that count as long, a server, and a browser."""

import shutil
import threading

import pytest
from plugins.runs.tests.recording import Client

from hookline_runs import follow, report

QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
NO_BROWSER = shutil.which("chromium") is None or shutil.which("chromedriver") is None


@pytest.fixture
def small(monkeypatch):
    """Make what is large small, so that short files are read in many parts and thinned."""
    monkeypatch.setattr(follow, "BLOCK", 1000)
    monkeypatch.setattr(follow, "HEAD", 1500)
    monkeypatch.setattr(follow, "TAIL", 500)
    monkeypatch.setattr(follow, "BUCKETS", 8)


@pytest.fixture
def serving(tmp_path):
    """Serve a folder; yield a client."""
    root = tmp_path / "runs"
    root.mkdir()
    server = report.Server(root, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield root, Client(server.url, server.key)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def browser(tmp_path):
    """Open a browser without a window."""
    if NO_BROWSER:
        pytest.skip("looks at the page in chromium, by chromedriver, which are not there")
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives the browser")
    options = webdriver.ChromeOptions()
    words = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000", *QUIET)
    for word in words:
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    try:
        yield driver
    finally:
        driver.quit()
