"""The report of a run of 100,000 steps with 8 workers, opened by a headless Chromium."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ds_gradmix.cli import main
from ds_gradmix.report.command import INSTALL, write
from tests.support import chromium
from tests.support.chromium import Browser
from tests.support.documents import commands
from tests.support.telemetry import write_run

pytest.importorskip("bokeh", reason="needs the report extra: pip install ds_gradmix[report]")
OPENS_WITHIN_S = 2.0
NASTY = "<img src=x onerror=\"document.title='gone'\">"
# Milliseconds from the request for the page until what is seen of it was drawn, and until all charts were.
DRAWN = """new Promise(done => {
  const {dataset} = document.documentElement;
  const look = () => dataset.drawnAfterMs
    ? done([Number(dataset.openedAfterMs), Number(dataset.drawnAfterMs)]) : setTimeout(look, 20);
  look();
})"""
# What Bokeh has written into its own shadow trees.
SHADOWS = """(() => {
  const texts = node => [...node.querySelectorAll("*")]
    .map(each => each.shadowRoot ? each.shadowRoot.textContent + texts(each.shadowRoot) : "").join("");
  return texts(document);
})()"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if chromium.executable() is None:
        pytest.skip("needs Chromium: apt-get install -y --no-install-recommends chromium")
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "long", steps=100_000, workers=8, every=50)
    write([folder / "long"], folder / "report.html")
    return folder


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Browser]:
    with Browser() as browser:
        browser.resize(1280, 900)
        browser.open(folder / "report.html")
        browser.evaluate(DRAWN)
        yield browser


def test_commands_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of docs/report.md."""
    install, one, two = commands("docs/report.md")
    assert install == INSTALL
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("quickstart", "mean")):
        write_run(tmp_path / "runs" / name, steps=200, workers=2 + number)
    for command, page in ((one, "report.html"), (two, "both.html")):
        program, *arguments = command.split()
        assert program == "ds_gradmix" and main(arguments) == 0
        assert capsys.readouterr().out.startswith(f"{page}: report, ")
    assert (tmp_path / "both.html").read_text().count('data-run="') == 2


def test_a_long_run_opens_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each time in a browser that has seen nothing yet."""
    times = []
    for _ in range(3):
        with Browser() as fresh:
            fresh.resize(1280, 1600)  # down to the first charts
            fresh.open(folder / "report.html")
            times.append([milliseconds / 1000 for milliseconds in fresh.evaluate(DRAWN)])
            assert not fresh.problems()
    opened, drawn = (statistics.median(found) for found in zip(*times, strict=True))
    size = (folder / "report.html").stat().st_size / 1e6
    with capsys.disabled():
        load = os.getloadavg()[0]
        print(
            f"\n100,000 steps, {size:.1f} MB: opened in {opened:.2f} s, all {drawn:.2f} s (load {load:.1f})"
        )
    assert size < 4
    assert opened <= OPENS_WITHIN_S


def test_the_page_says_what_was_recorded(browser: Browser) -> None:
    text = browser.evaluate("document.body.innerText")
    assert "1 to 100,000" in text and "worker 3 (rank 3, node-01) since step 3,001" in text
    row = (
        "[...document.querySelectorAll('#alarms-and-exclusions ~ .table tbody tr')].map(row => row.innerText)"
    )
    assert "3,100\talarm\tpointing away\t3,001\t3\t3\tnode-01" in browser.evaluate(row)
    spike = "document.getElementById('loss').getAttribute('aria-label')"
    assert "training: " in browser.evaluate(spike)
    points = "Math.max(...figures.loss.lines[0].y.filter((_, i) => figures.loss.lines[0].x[i] === 62000))"
    assert browser.evaluate(points) > 5, "the one step that stands out is drawn"


def test_all_charts_are_drawn(browser: Browser) -> None:
    """A canvas of Bokeh's lies in its shadow tree; one that is drawn has more than one colour."""
    colors = """names.map(name => {
      const find = node => [...node.querySelectorAll("*")].flatMap(each =>
        [...(each.tagName === "CANVAS" ? [each] : []), ...(each.shadowRoot ? find(each.shadowRoot) : [])]);
      const seen = new Set();
      for (const canvas of find(document.getElementById(name))) {
        if (!canvas.width || !canvas.height) continue;
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 0; i < data.length; i += 4 * 97) seen.add(data.slice(i, i + 3).join());
      }
      return seen.size;
    })"""
    found = browser.evaluate(colors)
    assert len(found) == 17 and min(found) > 5


def focusable(browser: Browser) -> list[dict[str, Any]]:
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    known = [{name: node.get(name, {}).get("value") for name in ("role", "name")} | node for node in nodes]
    return [
        node
        for node in known
        if any(
            about["name"] == "focusable" and about["value"]["value"] for about in node.get("properties", [])
        )
    ]


def test_what_the_keyboard_reaches_has_a_name(browser: Browser) -> None:
    nodes = [node for node in focusable(browser) if node["role"]["value"] != "RootWebArea"]
    assert len(nodes) > 25
    assert not [node for node in nodes if not node["name"].get("value")]
    levels = browser.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map(each => Number(each.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), "none is skipped"
    images = browser.evaluate(
        "[...document.querySelectorAll('[role=img]')].map(each => each.getAttribute('aria-label'))"
    )
    assert all(len(image) > 80 for image in images)


def press(browser: Browser, key: str, code: int, text: str = "") -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent",
            type=kind,
            key=key,
            windowsVirtualKeyCode=code,
            **({"text": text} if text and kind == "keyDown" else {}),
        )


def test_steps_are_chosen_by_keyboard_in_all_charts(browser: Browser) -> None:
    browser.evaluate("form.elements.from.focus()")
    browser.call("Input.insertText", text="2000")
    press(browser, "Tab", 9)
    browser.call("Input.insertText", text="4000")
    outline = "getComputedStyle(document.activeElement).outlineStyle + document.activeElement.name"
    assert browser.evaluate(outline) == "solidto", "focus is seen"
    press(browser, "Enter", 13, "\r")
    ranges = "[...drawn.values()].map(figure => [figure.x_range.start, figure.x_range.end])"
    assert browser.evaluate(ranges) == [[2000, 4000]] * 17
    browser.evaluate("form.querySelector('[type=reset]').click()")
    assert browser.evaluate(ranges) == [[1, 100_000]] * 17


def rgb(color: str) -> list[float]:
    found = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in found]


def contrast(one: str, other: str) -> float:
    """Of WCAG 2, from 1 to 21."""
    light = sorted(
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), rgb(x), strict=True)) for x in (one, other)
    )
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("dark", 390)])
def test_schemes_and_widths(browser: Browser, folder: Path, scheme: str, width: int) -> None:
    browser.media(scheme)
    browser.resize(width, 900)
    browser.open(folder / "report.html")
    browser.evaluate(DRAWN)
    browser.screenshot(folder / f"{scheme}-{width}.png")
    assert (folder / f"{scheme}-{width}.png").stat().st_size > 50_000
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    color = {
        name: browser.evaluate(f"color('var(--{name})')")
        for name in ("page", "panel", "ink", "soft", "link", "focus")
    }
    assert (contrast(color["page"], "#ffffff") < 1.1) == (scheme == "light")
    for back in ("page", "panel"):
        assert contrast(color["ink"], color[back]) > 7
        assert all(contrast(color[name], color[back]) > 4.5 for name in ("soft", "link"))
        assert contrast(color["focus"], color[back]) > 3
    for place in range(8):
        assert contrast(browser.evaluate(f"color('var(--line-{place})')"), color["page"]) > 3
    assert not browser.problems()


def test_names_stay_text_under_the_pointer(browser: Browser, tmp_path: Path) -> None:
    """Bokeh writes what is under the pointer into an element of its own."""
    lines = [f'{{"kind": "step", "step": {i}, "worker_norm": [1, 2], "loss": {i}}}\n' for i in range(1, 5)]
    (tmp_path / "taken").mkdir()
    run = tmp_path / "taken" / "run.jsonl"
    host = NASTY.replace('"', '\\"')
    header = f'{{"kind": "run", "rules": "{host}", "workers": [{{"ranks": [0], "hosts": ["{host}"]}}]}}\n'
    run.write_text(header + "".join(lines))
    write([run], tmp_path / "nasty.html")
    browser.media("light")
    browser.resize(1280, 900)
    browser.open(tmp_path / "nasty.html")
    browser.evaluate(DRAWN)
    chart = "document.getElementById('workers-0-worker-norm')"
    browser.evaluate(f"{chart}.scrollIntoView({{block: 'center'}})")
    box = f"(box => [box.left + box.width / 2, box.top + 30])({chart}.getBoundingClientRect())"
    x, y = browser.evaluate(box)
    for shift in range(20):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + shift, y=y)
        browser.evaluate("new Promise(done => setTimeout(done, 50))")
        if "rank 0, <img" in browser.evaluate(SHADOWS):
            break
    else:
        raise AssertionError("no tooltip is shown")
    assert browser.evaluate("document.title") == "ds_gradmix: taken/run.jsonl"
    assert not browser.problems()
