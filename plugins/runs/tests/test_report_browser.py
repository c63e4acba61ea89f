"""The page of runs in a real browser."""

import contextlib
import csv
import json
import os
import random
import re
import time
from pathlib import Path

import numpy
import pytest
from plugins.runs.tests.recording import XSS, append, begin, command, end, log, shown, train, training, until, write

import hookline_runs
from hookline_runs import objects, read_run
from hookline_runs.records import FILE


@contextlib.contextmanager
def looking(browser, url):
    """Look at the page; in the end see what it asked for, and that nothing was complained of."""
    browser.get(url)
    url, _, _ = url.partition("#")
    yield
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert len([address for address in urls if address.startswith(url)]) > 5
    assert [address for address in urls if not address.startswith((url, "chrome:", "chrome-untrusted:", "data:"))] == []
    assert browser.get_log("browser") == []
    assert js(browser, "window.hacked") is None
    browser.get("about:blank")  # before the server goes


def js(browser, script, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


def points(browser, panel="loss"):
    """Return how many points a chart has."""
    return js(browser, "Number(document.querySelector(`[data-panel='${arguments[0]}']`)?.dataset.points ?? 0)", panel)


def tick_box(browser, name):
    box = "[...document.querySelectorAll('#list input')].find(box => box.name === arguments[0])"
    until(lambda: js(browser, f"{box} !== undefined && !{box}.disabled", name))
    browser.execute_script(f"{box}.click()", name)


def pick_axis(browser, axis):
    set_control(browser, "axis", axis)


def set_control(browser, name, value):
    """Set a control as somebody does by hand."""
    script = "const box = document.getElementById(arguments[0]); box.value = arguments[1]; "
    browser.execute_script(script + "box.dispatchEvent(new Event('input'))", name, value)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_grows_with_a_training(tmp_path, browser, dark):
    root = tmp_path / "runs"
    root.mkdir()
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    with command(root) as (_, url), looking(browser, url):
        until(lambda: "No run has a record yet" in js(browser, "document.body.innerText"))
        with training(tmp_path) as (process, go_on):
            until(lambda: "live-1" in js(browser, "document.querySelector('#list').innerText"))  # the run appears
            tick_box(browser, "live-1")
            go_on(5)
            until(lambda: points(browser) >= 5)
            go_on(12)
            until(lambda: points(browser) >= 12)  # the curve grows
            assert "running" in js(browser, "document.querySelector('#list').innerText")
            assert XSS in js(browser, "[...document.querySelectorAll('.card h3 span')].map(h => h.textContent)")
            go_on(1000)
            assert process.wait(60) == 0, process.stderr.read()
        until(lambda: "finished" in js(browser, "document.querySelector('#list').innerText"))
        until(lambda: points(browser) >= 40)
        told = js(browser, "document.querySelector('main').innerText")
        assert "on_boundary" in js(browser, "document.querySelector('#plan').innerText")
        assert "jsonl" in js(browser, "document.querySelector('#cost').innerText")
        assert "trainer.max_steps" in told
        assert js(browser, "getComputedStyle(document.body).backgroundColor") == (
            "rgb(21, 25, 28)" if dark else "rgb(246, 247, 248)"
        )


@pytest.mark.slow
def test_runs_are_compared(tmp_path, browser):
    for number, rate in enumerate((0.1, 0.2, 0.3)):
        config = {"trainer": {"epochs": 2, "run_name": XSS}, "optimizer": {"lr": rate}}
        rows = [log(s, train_loss=rate / s, val_loss=1 / s, **{"time/jsonl": 1e-4}) for s in range(1, 51)]
        write(tmp_path / f"run-{number}", begin(config=config, command=[XSS]), train(), *rows, end(50, reason=XSS))
    with command(tmp_path) as (_, url), looking(browser, url):
        until(lambda: points(browser) == 100)  # the newest is chosen, train and val
        tick_box(browser, "run-2")
        until(lambda: points(browser) == 200)
        table = js(browser, "document.querySelector('#table').innerText")
        assert re.findall(r"optimizer\.lr\s+(\S+)\s+(\S+)", table) == [("0.1", "0.3")]
        assert "trainer.epochs" not in table  # is the same
        js(browser, "document.querySelector('#every').click()")
        assert "trainer.epochs" in js(browser, "document.querySelector('#table').innerText")
        assert XSS in js(browser, "document.querySelector('#table').textContent")
        until(lambda: "#runs=run-0,run-2" in browser.current_url)
        for axis in ("samples", "epoch", "seconds"):
            pick_axis(browser, axis)
            there = (
                "data.get('run-2').axis === arguments[0] && data.get('run-2').curves.get('val_loss')?.x.length === 50"
            )
            until(lambda axis=axis, there=there: js(browser, there, axis) and points(browser) == 200)
        places = js(browser, "data.get('run-2').curves.get('train_loss').x")
        assert (places[0], places[-1]) == (0.5, 25)
        browser.refresh()
        until(lambda: points(browser) == 200)  # what was chosen stands in the address
        js(browser, "document.querySelector('#clear').click()")
        until(lambda: js(browser, "document.querySelectorAll('#charts .card').length") == 0)


def legend(browser, panel="loss"):
    """Return how each metric of a chart is drawn: the dashes and the width of its line, and its marks."""
    script = """[...document.querySelectorAll(`[data-panel='${arguments[0]}'] .legend button`)].map(button => [
        button.textContent, button.querySelector('line').getAttribute('stroke-dasharray'),
        button.querySelector('line').getAttribute('stroke-width'), button.querySelectorAll('circle').length])"""
    return {name: tuple(drawn) for name, *drawn in js(browser, script, panel)}


@pytest.mark.slow
def test_metrics_of_one_chart_are_told_apart(tmp_path, browser):
    names = ["train_loss", "train_loss_epoch", "val_loss", "val_loss/other"]
    rows = [log(step, **{name: 1 / step + place for place, name in enumerate(names)}) for step in range(1, 9)]
    for number in range(2):
        write(tmp_path / f"run-{number}", begin(), train(), *rows, end(8))
    with command(tmp_path) as (_, url), looking(browser, url):
        until(lambda: points(browser) == 32)
        drawn = legend(browser)
        assert list(drawn) == names
        assert len(set(drawn.values())) == 4  # without colours
        colours = js(browser, "panels.get('loss').lines.map(line => line.colour)")
        assert len(set(colours)) == 4  # one run: by colours too
        tick_box(browser, "run-1")
        until(lambda: points(browser) == 64)
        assert len(set(js(browser, "panels.get('loss').lines.map(line => line.colour)"))) == 2  # a colour for each run
        js(browser, "document.querySelector(`[data-panel='loss'] .legend button`).click()")
        until(lambda: points(browser) == 48)
        until(lambda: "hide=train_loss" in browser.current_url)
        told = js(browser, "document.querySelector(`[data-panel='loss'] .legend button`).getAttribute('aria-pressed')")
        assert told == "false"


VIEW = {
    "axis": "epoch", "smooth": "0.6", "metrics": "lo", "sort": "p:optimizer.lr", "runs": "lr>0.15", "colour": "status",
    "group": "p:optimizer.lr",
}  # fmt: skip


def seen(browser):
    """Return what a view is made of, as the page shows it."""
    return js(
        browser,
        """[...['axis', 'smooth', 'metrics', 'sort', 'runs', 'group', 'colour', 'at'].map(id => $(id).value),
        ...['log', 'every', 'archived'].map(id => $(id).checked),
        view.runs, [...entries].filter(([n, one]) => one.box.checked && n !== 'run, 0').map(([name]) => name),
        [...document.querySelectorAll('#list .name')].map(one => one.textContent),
        [...groups].map(([name, group]) => [name, group.open]),
        panels.get('loss')?.lines?.map(({run, metric, colour, told}) => [run, metric, colour, told]),
        panels.get('loss')?.chart?.scales.x.min, view.zoom]""",
    )


@pytest.mark.slow
def test_the_address_keeps_the_whole_view(tmp_path, browser):
    for number, rate in enumerate((0.1, 0.2, 0.3, 0.2)):
        config = {"optimizer": {"lr": rate}, "seed": number}
        rows = [log(s, train_loss=rate / s, val_loss=1 / s, **{"gpu/lost": 1.0}) for s in range(1, 51)]
        words = [shown(step, name="said", text=f"{step}") for step in (10, 20, 30)]
        write(tmp_path / f"run, {number}", begin(config=config), train(), *rows, *words, end(50))
    with command(tmp_path) as (_, url), looking(browser, url):
        until(lambda: points(browser) == 100)
        assert "key=" not in browser.current_url  # it stays with this tab
        for number in (1, 2):
            tick_box(browser, f"run, {number}")
        for name, value in VIEW.items():
            set_control(browser, name, value)
        set_control(browser, "at", "1")
        for name in ("log", "every"):
            js(browser, f"$('{name}').click()")
        until(lambda: js(browser, "document.querySelectorAll('#charts details').length") == 2)
        js(browser, "groups.get('system').querySelector('summary').click()")
        js(browser, "document.querySelector(`[data-panel='loss'] .legend button`).click()")
        js(browser, "look({zoom: [0.2, 0.8]})")
        until(lambda: "zoom=0.2,0.8" in browser.current_url and "shut=system" in browser.current_url)
        until(lambda: points(browser) == 3 * 50)  # val_loss of three groups
        before, address = seen(browser), browser.current_url
        assert before[13] == ["run, 1", "run, 3", "run, 2"]  # filtered, sorted
        assert before[7] == "1"
        assert js(browser, "document.querySelector('[data-object=said] pre').textContent") == "20"
        for again in (browser.refresh, lambda: (browser.get("about:blank"), browser.get(address))):
            again()
            until(lambda: points(browser) == 3 * 50)
            with contextlib.suppress(AssertionError):
                until(lambda: seen(browser) == before, 5)
            assert (seen(browser), browser.current_url) == (before, address)


@pytest.mark.slow
def test_old_addresses_and_runs_that_are_gone(tmp_path, browser):
    for number in range(3):
        write(tmp_path / f"run-{number}", begin(), train(), log(1, train_loss=1.0), end(1))
    with command(tmp_path) as (_, url), looking(browser, f"{url.partition('#')[0]}#run-1,run-7"):
        until(lambda: points(browser) == 1)
        until(lambda: browser.current_url.endswith("#runs=run-1"))
        told = js(browser, "document.querySelector('#absent').innerText")
        assert told == "The address names runs that are not in this folder: run-7."
        browser.get(f"{url.partition('#')[0]}#runs=run-0,run-2")  # a link that is pasted into the same tab
        until(lambda: points(browser) == 2)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_hundred_runs_of_a_hundred_thousand_points(tmp_path, browser):
    root = tmp_path / "runs"
    for number in range(4):
        chance = random.Random(number)
        lines = [begin(f"{number:08x}"), train(f"{number:08x}")]
        for step in range(1, 100_001):
            loss = {"val_loss": 1 / step} if step % 1000 == 0 else {}
            lines.append(log(step, 1000.0 + step / 100, f"{number:08x}", train_loss=chance.random(), **loss))
        lines.append(end(100_000, f"{number:08x}", 2001.0))
        write(root / f"run-{number}", *lines)
    for number in range(4, 200):
        (root / f"run-{number}").mkdir()
        os.link(root / f"run-{number % 4}" / FILE, root / f"run-{number}" / FILE)
    begun = time.monotonic()
    with command(root) as (process, url), looking(browser, url):
        until(lambda: js(browser, "document.querySelectorAll('#list li').length") == 200)
        assert time.monotonic() - begun < 15
        until(lambda: points(browser) > 1000)
        for number in range(8):
            tick_box(browser, f"run-{number + 10}")
        until(lambda: points(browser) > 9 * 1000, 60)
        assert points(browser) < 9 * 2200
        until(lambda: "reading" not in js(browser, "document.querySelector('#list').innerText"), 360)
        assert "best 1e-5" in js(browser, "document.querySelector('#list').innerText")
        memory = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1])
        assert memory < 600_000  # kB


def compared(root, count=4):
    """Write runs of two learning rates and several seeds, with objects in the last."""
    for number in range(count):
        config = {"optimizer": {"lr": (0.1, 0.01)[number % 2]}, "seed": number}
        rows = [log(s, train_loss=number + 1 / s, val_f1=s / 10 + number) for s in range(1, 9)]
        write(root / f"run-{number}", begin(config=config), train(), *rows, end(8))
    folder, records = root / f"run-{count - 1}", []
    for step in (2, 4):
        file = objects.keep(folder, "drawn", "image", numpy.full((3, 4, 3), step, "uint8"), step, 10)
        records.append(shown(step, file))
    (folder / "objects" / "table-4.csv").write_text('word,"share, %"\n"a ""b""",1\n' + f'"{XSS}",2\n')
    records += [shown(4, "objects/table-4.csv", "table"), shown(3, name="said", text=XSS)]
    append(folder, *records, shown(4, name="counts", type="hookline.tracking.Histogram"))


def inside(browser, name):
    """Return what the card of an object shows: its words, and how wide its picture is."""
    script = """(card => card && [card.innerText, card.querySelector('img')?.naturalWidth ?? null])(
        document.querySelector(`[data-object='${arguments[0]}']`))"""
    return js(browser, script, name)


def looks_at_objects(browser):
    until(lambda: inside(browser, "drawn") == ["drawn\nstep 4", 4])
    until(lambda: inside(browser, "table")[0].split() == f'table step 4 word share, % a "b" 1 {XSS} 2 CSV'.split())
    until(lambda: inside(browser, "said")[0] == f"said\nstep 3\n{XSS}")
    assert "hookline.tracking.Histogram: its type has no picture" in inside(browser, "counts")[0]
    set_control(browser, "at", "0")  # of the steps 2, 3 and 4
    until(lambda: inside(browser, "drawn")[0] == "drawn\nstep 2")
    assert "nothing until step 4" in inside(browser, "table")[0]


@pytest.mark.slow
def test_what_was_logged_is_shown_step_by_step(tmp_path, browser):
    compared(tmp_path)
    with command(tmp_path) as (_, url), looking(browser, url + "&runs=run-3"):
        looks_at_objects(browser)


def rows_of(browser):
    rows = "[...document.querySelectorAll('#runs-table tbody tr')]"
    return js(browser, f"{rows}.map(row => [...row.cells].map(cell => cell.innerText.trim()))")


@pytest.mark.slow
def test_all_runs_are_a_table_and_pictures(tmp_path, browser):
    compared(tmp_path)
    with command(tmp_path) as (_, url), looking(browser, url + "&tab=all"):
        until(lambda: len(rows_of(browser)) == 4 and "4 runs" in js(browser, "$('count').innerText"))
        heads = js(browser, "[...document.querySelectorAll('#runs-table thead th')].map(cell => cell.dataset.column)")
        assert heads[:6] == ["name", "status", "tags", "p:optimizer.lr", "p:seed", "m:val_f1:best"]
        until(lambda: [row[5] for row in rows_of(browser)] == ["0.8", "1.8", "2.8", "3.8"])
        for _ in range(2):  # up, then down
            js(browser, "document.querySelector(`[data-column='m:val_f1:best'] button`).click()")
        until(lambda: [row[0] for row in rows_of(browser)] == ["run-3", "run-2", "run-1", "run-0"])
        listed = js(browser, "[...document.querySelectorAll('#list .name')].map(one => one.textContent)")
        assert listed == ["run-3", "run-2", "run-1", "run-0"]
        assert js(browser, "document.querySelectorAll('#scatter circle').length") == 4
        assert js(browser, "document.querySelectorAll('#parallel polyline').length") == 4
        set_control(browser, "runs", "lr=0.1 val_f1>1")
        until(lambda: [row[0] for row in rows_of(browser)] == ["run-2"])
        set_control(browser, "runs", "lrr=0.1")
        until(lambda: "no parameter or metric is called lrr" in js(browser, "$('count').innerText"))
        set_control(browser, "runs", "")
        set_control(browser, "group", "p:optimizer.lr")
        until(lambda: len(rows_of(browser)) == 6)
        groups = {row[0]: row[3] for row in rows_of(browser) if row[0].startswith("optimizer.lr")}
        assert groups == {"optimizer.lr = 0.01 (2)": "2.8 ± 1.4", "optimizer.lr = 0.1 (2)": "1.8 ± 1.4"}
        js(browser, "document.querySelector('#scatter circle[data-run=run-1]').dispatchEvent(new Event('click'))")
        until(lambda: "run-1" in js(browser, "view.runs"))
        assert len(set(js(browser, "['run-0', 'run-2', 'run-1'].map(colourOf)"))) == 2


@pytest.mark.slow
def test_a_group_is_the_mean_of_its_runs(tmp_path, browser):
    compared(tmp_path)
    write(tmp_path / "run-4", begin(config={"optimizer": {"lr": 0.1}}), train(), log(2, train_loss=4.0), end(2))
    view = "&runs=run-0,run-1,run-2,run-4&group=p%3Aoptimizer.lr"
    with command(tmp_path) as (_, url), looking(browser, url + view):
        until(lambda: points(browser) == 16)  # of two lines, once all runs are there
        lines = js(browser, "panels.get('loss').lines.map(({told, x, y, low, high}) => [told, x, y, low, high])")
        whole, alone = lines
        assert [line[0] for line in lines] == ["0.1 (3)", "0.01 (1)"]
        assert whole[1] == list(range(1, 9))
        assert whole[2] == [None, (0.5 + 2.5 + 4) / 3, *[None] * 6]  # where all three have a value
        assert (whole[3][1], whole[4][1]) == (0.5, 4)
        assert alone[2] == pytest.approx([1 + 1 / step for step in range(1, 9)], rel=1e-6)


@pytest.mark.slow
def test_runs_are_changed_by_who_has_the_key(tmp_path, browser):
    compared(tmp_path, 2)
    write(tmp_path / "run-9", begin(host="elsewhere"), train())
    with command(tmp_path) as (_, url):
        with looking(browser, url.partition("#")[0]):
            until(lambda: "3 runs" in js(browser, "$('count').innerText"))
            assert js(browser, "[...document.querySelectorAll('.edit')].every(button => button.hidden)")
        with looking(browser, url):
            until(lambda: js(browser, "document.querySelectorAll('.edit:not([hidden])').length") == 3)
            js(browser, "openEdits('run-0')")
            for name, value in (("title", XSS), ("tags", "good, <b>"), ("note", "so")):
                js(browser, "void ($(`edit-${arguments[0]}`).value = arguments[1])", name, value)
            js(browser, "$('save').click()")
            until(lambda: f"{XSS} (run-0)" in js(browser, "$('list').textContent"))
            assert js(browser, "[...document.querySelectorAll('.tag')].map(tag => tag.textContent)") == ["good", "<b>"]
            notes = read_run(tmp_path / "run-0").notes
            assert (notes.title, notes.tags, notes.note) == (XSS, ("good", "<b>"), "so")
            js(browser, "openEdits('run-1')")
            js(browser, "$('delete').click()")
            assert str(tmp_path / "run-1") in js(browser, "$('question').innerText")
            assert (tmp_path / "run-1").exists()  # it is a question
            js(browser, "$('really').click()")
            until(lambda: not (tmp_path / "run-1").exists())
            until(lambda: "2 runs" in js(browser, "$('count').innerText"))
            browser.refresh()  # the tab still knows the key
            until(lambda: js(browser, "document.querySelectorAll('.edit:not([hidden])').length") == 2)


@pytest.mark.slow
def test_what_is_saved_is_what_is_shown(tmp_path, browser):
    root, kept = tmp_path / "runs", tmp_path / "kept"
    compared(root)
    kept.mkdir()
    told = {"behavior": "allow", "downloadPath": str(kept)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", told)

    def saved(name):
        return until(lambda: (kept / name).exists() and (kept / name).read_bytes())

    with command(root) as (_, url):
        browser.get(url + "&runs=run-0,run-1")
        until(lambda: points(browser) == 16)
        for number in range(2):
            js(browser, f"document.querySelectorAll(`[data-panel='loss'] .save`)[{number}].click()")
        rows = list(csv.reader(saved("loss.csv").decode().splitlines()))
        assert len(rows) == 17
        assert rows[9] == ["run-1", "train_loss", "1", "0", "1", "8", "0.5", "2.0"]
        assert saved("loss.png").startswith(b"\x89PNG")
        js(browser, "$('save-page').click()")
        assert b'"run-1"' in saved("runs.html")
        assert b'"run-2"' not in saved("runs.html")
        js(browser, "$('tab-all').click()")
        until(lambda: len(rows_of(browser)) == 4)
        until(lambda: js(browser, "table.size") == 4)
        js(browser, "$('save-table').click()")
        rows = list(csv.reader(saved("runs.csv").decode().splitlines()))
        assert rows[0][:6] == ["run", "status", "tags", "optimizer.lr", "seed", "val_f1 (best)"]
        assert rows[2][:6] == ["run-1", "finished", "", "0.01", "1", "1.8"]
        for name in ("scatter", "parallel"):
            js(browser, f"$('save-{name}').click()")
            assert saved(f"{name}.svg").startswith(b"<svg")


def at_rest(browser, address):
    """Look at a page without a server."""
    browser.get(address)
    yield
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert {one for one in urls if not one.startswith(("data:", "blob:", "chrome", "about:"))} == {address}
    assert browser.get_log("browser") == []
    assert js(browser, "window.hacked") is None


@pytest.mark.slow
def test_a_saved_page_needs_no_server(tmp_path, browser):
    compared(tmp_path / "runs")
    page = hookline_runs.show("run-2", "run-3", folder=tmp_path / "runs", view="runs=run-3").html
    (tmp_path / "page.html").write_text(page)
    with contextlib.contextmanager(at_rest)(browser, f"file://{tmp_path}/page.html"):
        until(lambda: points(browser) == 8)
        looks_at_objects(browser)
        pick_axis(browser, "seconds")
        until(lambda: js(browser, "data.get('run-3').curves.get('train_loss').x[0]") == 0.5)
        tick_box(browser, "run-2")
        until(lambda: points(browser) == 16)
        js(browser, "$('tab-all').click()")
        until(lambda: [row[0] for row in rows_of(browser)] == ["run-2", "run-3"])
        assert js(browser, "[...document.querySelectorAll('.edit, #save-page')].every(one => !one.offsetParent)")


@pytest.mark.slow
def test_a_notebook_shows_the_page_in_a_frame(tmp_path, browser):
    compared(tmp_path / "runs")
    told = hookline_runs.show("run-3", folder=tmp_path / "runs")._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>notebook</title>{told}")
    with contextlib.contextmanager(at_rest)(browser, f"file://{tmp_path}/notebook.html"):
        browser.switch_to.frame(0)
        until(lambda: points(browser) == 8)
        looks_at_objects(browser)
        browser.switch_to.default_content()
