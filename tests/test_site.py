"""The site: it builds without a warning, its links lead somewhere, and a browser shows, searches and copies it."""

import collections
import contextlib
import functools
import http.server
import json
import os
import posixpath
import re
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

import pytest

import hookline
from hookline import testing, tracking
from hookline.cli import OWN, main
from hookline.installed import COMMANDS, installed

pytestmark = [pytest.mark.plugins, pytest.mark.xdist_group("site"), pytest.mark.timeout(300)]

ROOT = Path(__file__).parent.parent
HOOKS = [ROOT / "docs" / "_site" / name for name in ("commands.py", "pages.py")]
NO_PAGES = ("404.html",)  # it is shown at any address


class Page(HTMLParser):
    """The links of a page, those of its navigation among them, and what they may lead to."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.navigation, self.assets, self.next, self._depth = set(), [], [], [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        classes = (given.get("class") or "").split()
        self.ids.add(given.get("id"))
        if tag == "nav":
            self._depth += "md-nav--primary" in classes or self._depth > 0
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            if self._depth and "md-nav__link" in classes and not given["href"].startswith("#"):
                self.navigation.append(given["href"])
            if "md-footer__link--next" in classes:
                self.next = given["href"]
        self.assets += [given[key] for key in ("src", "href") if tag != "a" and key in given]

    def handle_endtag(self, tag):
        if tag == "nav" and self._depth:
            self._depth -= 1


class Site:
    """The built site: its pages by address."""

    def __init__(self, folder, done):
        self.folder, self.done = folder, done
        self.texts = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")}
        self.pages = {address: Page(text) for address, text in self.texts.items()}

    def file_of(self, page, link):
        """Return the file that a link of a page leads to, below the site."""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), urlsplit(link).path))
        return posixpath.normpath(f"{path}/index.html") if (self.folder / path).is_dir() else path


def build(folder, root=ROOT, *more):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *more]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    return Site(folder, build(folder))


# What is built ------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(site):
    assert (site.done.returncode, "WARNING" in site.done.stderr) == (0, False), site.done.stderr


def test_links_and_anchors_lead_somewhere(site):
    dead, checked = [], 0
    for address, page in site.pages.items():
        for link in page.links:
            if urlsplit(link).scheme or address in NO_PAGES:
                continue
            target, anchor = site.file_of(address, link), urldefrag(link).fragment
            known = site.pages.get(target)
            if known is None and (site.folder / target).is_file() and not anchor:
                continue
            if known is None or (anchor and anchor not in known.ids):
                dead.append(f"{address}: {link}")
            checked += 1
    assert dead == []
    assert checked > 10_000


def test_a_link_of_a_readme_leads_to_the_page_of_the_site(site):
    """The README of best has links to `../../docs/loop.md#end` and `../model_saving/README.md`."""
    links = site.pages["plugins/best/index.html"].links
    assert {"../../loop/#end", "../model_saving/"} <= set(links)


def test_the_navigation_has_every_page_once(site):
    reached = [site.file_of("index.html", link) for link in site.pages["index.html"].navigation]
    pages = {page for page in site.pages if page not in NO_PAGES and not page.startswith("source/")}
    assert set(reached) == pages
    made = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(made) == len(pages)  # no two of them have one address


def test_next_leads_through_all_pages(site):
    address, seen = "index.html", ["index.html"]
    while link := site.pages[address].next:
        address = site.file_of(address, link)
        seen.append(address)
    assert max(collections.Counter(seen).values()) == 1
    assert set(seen) == {site.file_of("index.html", link) for link in site.pages["index.html"].navigation}


def test_nothing_is_asked_of_elsewhere(site):
    for address, page in site.pages.items():
        elsewhere = [asset for asset in page.assets if urlsplit(asset).scheme not in ("", "data")]
        assert elsewhere == [], address
        known = [asset for asset in page.assets if address not in NO_PAGES and not asset.startswith("data:")]
        assert [asset for asset in known if not (site.folder / site.file_of(address, asset)).exists()] == [], address
    for sheet in site.folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import )['\"]?(https?:)?//", sheet.read_text()), sheet


def test_the_reference_has_every_public_name(site):
    ids = {name for address, page in site.pages.items() if address.startswith("reference/") for name in page.ids}
    for package, names in (("hookline", hookline.__all__), *((m.__name__, m.__all__) for m in (testing, tracking))):
        for name in {*names} - {"hookspecs"}:  # which has the page of hooks
            full = f"{package}.{name}"
            assert full in ids or any(str(one).startswith(f"{full}.") for one in ids), full
    assert {"hookline_runs.read_run", "hookline_runs.history", "hookline.options.Options.epochs"} <= ids


def test_the_reference_has_every_command_and_option(site, capsys):
    page = site.texts["commands/index.html"]
    for name in [*OWN, *installed(COMMANDS)]:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        begin = page.index(f'id="hookline-{name}"')
        end = re.compile(r"<h2 id=|</article>").search(page, begin).start()
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
        assert [option for option in options if option not in page[begin:end]] == [], name


def test_every_plugin_says_how_stable_it_is():
    rows = re.findall(
        r"^\| \[(\w+)\]\(plugins/\w+/README.md\) \|.*\| (.*?) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert sorted(name for name, _ in rows) == sorted(path.parent.name for path in ROOT.glob("plugins/*/README.md"))
    explained = re.findall(r"^\| ([a-z ]+) \|", (ROOT / "docs" / "plugins" / "index.md").read_text(), re.M)
    assert {status for _, status in rows} == {*explained} - {"status"}


# How it is built ----------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """Write a repository with a README that a page includes."""
    files = {
        "mkdocs.yml": f"site_name: small\ntheme: {{name: mkdocs}}\nplugins: []\nhooks: {list(map(str, HOOKS[1:]))}\n"
        "validation: {nav: {omitted_files: warn}, links: {anchors: warn}}\n"
        "nav: [Home: index.md, Things: things/*, Last: last.md]\n",
        "part/README.md": "# Part\n\n[up](../docs/index.md#here) [own](#part) [code](code.py) `[no](link.md)`\n\n"
        "![picture](dot.svg) [by name][last]\n\n[last]: ../docs/last.md\n\n"
        "| a |\n|---|\n| `x\\|y` |\n",
        "part/code.py": "print(1)\n",
        "part/dot.svg": "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "docs/index.md": "# Home\n\n## Here\n\n[part](../part/README.md#part), [its folder](../part)\n",
        "docs/last.md": "# Last\n",
        "docs/things/index.md": "# Things\n\n## Second\n\n- [b](b.md)\n\n## First\n\n| [a](a.md) | [b](b.md) |\n",
        "docs/things/a.md": '--8<-- "part/README.md"\n',
        "docs/things/b.md": "# B\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_pages_are_made_of_readmes_and_sources(small):
    done = build(small / "site", small)
    assert done.returncode == 0, done.stderr
    site = Site(small / "site", done)
    assert {"../../#here", "#part", "../../source/part/code.py/", "../../last/"} <= set(
        site.pages["things/a/index.html"].links
    )
    assert "../../source/part/dot.svg" in site.pages["things/a/index.html"].assets
    assert (small / "site" / "source" / "part" / "dot.svg").exists()
    assert "<code>x|y</code>" in site.texts["things/a/index.html"]
    assert "<code>[no](link.md)</code>" in site.texts["things/a/index.html"]
    assert {"things/a/#part", "things/a/"} <= set(site.pages["index.html"].links)
    assert "print" in site.texts["source/part/code.py/index.html"]
    order = [
        site.texts["index.html"].index(word) for word in ("Second", "things/b/", "First", 'things/a/" class', "last/")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("file", "broken", "told"),
    [
        ("part/README.md", "[gone](../docs/gone.md)", "'../docs/gone.md'"),
        ("part/README.md", "[gone](../docs/index.md#gone)", "'../index.md#gone'"),
        ("docs/last.md", "[gone](../part/README.md#gone)", "'things/a.md#gone'"),
        ("docs/last.md", '\n--8<-- "part/gone.md"\n', "includes 'part/gone.md', which cannot be read"),
        ("docs/last.md", '\n--8<-- "part/README.md:gone"\n', "no <!-- --8<-- [start:gone] -->"),
        ("docs/things/c.md", "# C", "things/c.md"),
    ],
)
def test_what_is_broken_fails_the_build(small, file, broken, told):
    with (small / file).open("a") as page:
        page.write(broken)
    done = build(small / "site", small)
    assert done.returncode == 1
    assert told in done.stderr


# In a real browser --------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and says nothing of it."""

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address(site):
    handler = functools.partial(Quiet, directory=str(site.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        serving.join()


def until(condition, patience=30, told=""):
    """Wait for a browser; fail where it does not come to it."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, told or condition
        time.sleep(0.02)
    return found


def be_wide(browser, width):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )


@contextlib.contextmanager
def undisturbed(browser, address):
    """See in the end that only the site was asked, and that the browser has complained of nothing."""
    yield
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"}
    assert any(url.startswith(address) for url in urls)
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
    browser.get("about:blank")


SETTLED = """
const [width, done] = arguments, began = performance.now();
function look() {  // the sidebars move to their places
    const reached = document.documentElement.scrollWidth;
    reached > width && performance.now() - began < 2000 ? requestAnimationFrame(look) : done(reached);
}
look();
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_page_is_wider_than_the_screen(site, browser, address):
    wide = []
    with undisturbed(browser, address):
        for page in site.pages:
            browser.get(address + page)
            for width in (1280, 768, 360):
                be_wide(browser, width)
                if browser.execute_async_script(SETTLED, width) > width:
                    wide.append(f"{page} at {width}")
    assert wide == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_navigation_opens(browser, address, width):
    be_wide(browser, width)
    with undisturbed(browser, address):
        browser.get(address)
        if width < 1220:
            browser.find_element("css selector", "label.md-header__button[for=__drawer]").click()
            link = browser.find_element("css selector", ".md-nav--primary > .md-nav__list > .md-nav__item > label")
        else:
            link = browser.find_element("css selector", ".md-tabs__item:nth-child(2) a")
        until(link.is_displayed)
        browser.execute_script("arguments[0].click()", link)
        if width < 1220:
            page = next(
                one
                for one in browser.find_elements("css selector", "a.md-nav__link")
                if "install" in one.get_attribute("href")
            )
            until(page.is_displayed)
            browser.execute_script("arguments[0].click()", page)
        until(lambda: browser.current_url == f"{address}install/")


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_code_is_copied(browser, address, width):
    be_wide(browser, width)
    browser.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"origin": address, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})
    with undisturbed(browser, address):
        browser.get(f"{address}install/")
        until(lambda: browser.find_elements("css selector", ".md-code__button"))[0].click()
        read = "navigator.clipboard.readText().then(arguments[0], error => arguments[0](String(error)))"
        copied = until(lambda: browser.execute_async_script(read))
    assert copied.strip().startswith("python -m venv .venv && source .venv/bin/activate\npip install")


FOUND = {  # what is searched: a page that says it, which must be among the first five
    "learning rate": "modules/#the-learning-rate",
    "train_batch_size": "configuration/#trainer",
    "resume": "tutorial/#kill-and-resume",
    "on_boundary": "hooks/#on_boundary",
    "gradient clipping": "plugins/clip/",
    "max-restarts": "commands/#hookline-fit",
    "jupyter": "notebook/#what-is-different-in-a-notebook",
    "several gpus": "faq/#how-do-i-train-on-several-gpus",
}
LINKS = """return [...document.querySelectorAll('.md-search-result__item')].slice(0, 5)
    .flatMap(item => [...item.querySelectorAll('a')].map(link => link.href))"""


@pytest.mark.slow
def test_the_search_finds_where_it_is_said(browser, address):
    be_wide(browser, 1280)

    def found():
        links = map(urlsplit, browser.execute_script(LINKS))
        return {f"{link.path.lstrip('/')}{'#' * bool(link.fragment)}{link.fragment}" for link in links}

    with undisturbed(browser, address):
        for words, place in FOUND.items():
            browser.get(address)
            until(lambda: browser.find_elements("css selector", "input.md-search__input"))[0].send_keys(words)
            until(lambda place=place: place in found(), told=words)
