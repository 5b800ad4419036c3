"""The report's page in Debian's `chromium`, driven by playwright; skipped where there is none.

It opens from `file://` with no console error and asks nothing else for anything; filters, keyboard
and a phone's width work.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from jobs.__main__ import main
from tests.jobs.report_tables import make_scenes

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

# How many pixels of a canvas are drawn upon, and whether any has a colour.
INK = """(canvas) => {
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return pixels.reduce((sum, value, n) => sum + (n % 4 === 3 && value > 0), 0);
}"""
COLOURS = '(canvas) => canvas.toDataURL("image/png")'


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    make_scenes(folder)
    places = ["--predictions", str(folder / "table"), "--images", str(folder / "images")]
    places += ["--truth", str(folder / "truth.json"), "--output", str(folder / "page")]
    assert main(["report", *places]) == 0
    return (folder / "page" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        # Chromium's sandbox refuses to run as root, which continuous integration often is.
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()


class Opened:
    """The page, opened, with what it said and asked for."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.tab = browser.new_page(viewport={"width": width, "height": 800})
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(address)

    def choose(self, group: str) -> None:
        self.tab.click(f'[data-group="{group}"]')

    @property
    def names(self) -> list[str]:
        names: list[str] = self.tab.locator(".tile b").all_text_contents()
        return names

    def first_canvas(self) -> Any:
        self.tab.locator(".tile canvas").first.scroll_into_view_if_needed()
        canvas = self.tab.locator(".tile canvas").first
        # It is drawn when it comes into view. The page's own policy forbids waiting by `eval`.
        for _ in range(200):
            if canvas.evaluate("(canvas) => canvas.width !== 300"):
                break
            self.tab.wait_for_timeout(25)
        return canvas


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Opened]:
    opened = Opened(browser, address, 1280)
    yield opened
    assert opened.said == []
    opened.tab.close()


def test_it_opens_in_silence_and_asks_nobody(page: Opened) -> None:
    page.first_canvas()
    for group in ("worst", "errors", "wrong", "missed", "random"):
        page.choose(group)
        page.tab.mouse.wheel(0, 2000)
    page.tab.wait_for_timeout(200)
    folder = page.asked[0].rpartition("/")[0]
    assert len(page.asked) > 3
    assert all(url.startswith((f"{folder}/", "data:")) for url in page.asked)
    assert page.tab.title() == "Instance segmentation report"
    loaded = "[...document.images].every((image) => !image.complete || image.naturalWidth > 0)"
    assert page.tab.evaluate(loaded)


def test_switches_change_what_is_drawn(page: Opened) -> None:
    before = page.first_canvas().evaluate(INK)
    assert before > 0
    page.tab.select_option("#colour", "class")
    by_class = page.first_canvas().evaluate(COLOURS)
    page.tab.select_option("#colour", "instance")
    assert page.first_canvas().evaluate(COLOURS) != by_class
    page.tab.uncheck("#labels")
    page.tab.uncheck("#boxes")
    only_masks = page.first_canvas().evaluate(INK)
    assert 0 < only_masks < before
    page.tab.uncheck("#masks")
    assert page.first_canvas().evaluate(INK) == 0


def test_filters_hide_tiles_and_say_how_many(page: Opened) -> None:
    all_names = page.names
    assert "found" in page.tab.locator(".tile .words span").first.text_content()
    page.tab.select_option("#category", label="ghost")
    page.tab.locator("#score").fill("0.7")
    # The score of the ghost in scene n is 0.6 + 0.04 n.
    assert sorted(page.names) == ["scene 3.jpg", "scene 4.jpg", "scene 5.jpg"]
    assert page.tab.text_content("#status") == f"3 of {len(all_names)} images pass the filters"
    assert {*page.tab.locator(".tile .words span").all_text_contents()} == {"found 1 ghost"}
    page.tab.locator("#score").fill("1")
    assert page.names == []
    page.choose("errors")
    assert sorted(page.names) == ["scene 6.jpg", "scene 7.jpg"]


def test_the_keyboard_reaches_everything(page: Opened) -> None:
    focused = "document.activeElement.id || document.activeElement.className"
    page.tab.keyboard.press("Tab")
    assert page.tab.evaluate(focused) == "skip"
    page.tab.keyboard.press("Enter")
    for _ in range(2):
        page.tab.keyboard.press("Tab")
    page.tab.keyboard.press("Enter")
    assert page.tab.get_attribute('[data-group="worst"]', "aria-pressed") == "true"
    reached = []
    while "tile" not in reached and len(reached) < 20:
        page.tab.keyboard.press("Tab")
        reached.append(page.tab.evaluate(focused))
    fields = ["category", "score", "colour", "masks", "boxes", "labels", "tile"]
    assert [name for name in reached if name in fields] == fields
    style = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.tab.evaluate(style) == "solid"
    page.tab.keyboard.press("Enter")
    assert page.tab.evaluate('document.getElementById("viewer").open')
    first, second = page.names[:2]
    assert page.tab.text_content("#viewer-title") == first
    page.tab.keyboard.press("ArrowRight")
    assert page.tab.text_content("#viewer-title") == second
    page.tab.keyboard.press("Escape")
    assert not page.tab.evaluate('document.getElementById("viewer").open')
    assert page.tab.evaluate("document.activeElement.querySelector('b').textContent") == second


def test_pictures_have_words(page: Opened) -> None:
    page.choose("missed")
    words = page.tab.locator(".tile img").evaluate_all("(all) => all.map((image) => image.alt)")
    assert all("found " in one or "the truth is " in one for one in words)
    assert len(words) % 2 == 0


@pytest.mark.parametrize("width", [390, 320])
def test_nothing_overflows_on_a_phone(browser: Any, address: str, width: int) -> None:
    opened = Opened(browser, address, width)
    for group in ("best", "errors", "wrong"):
        opened.choose(group)
        assert opened.tab.evaluate("document.documentElement.scrollWidth") <= width
    opened.tab.locator(".tile").first.click()
    inside = 'document.getElementById("viewer").scrollWidth'
    assert opened.tab.evaluate(inside) <= width
    assert opened.said == []
    opened.tab.close()
