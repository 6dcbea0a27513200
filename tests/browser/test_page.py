"""The demo page in a headless browser: an image is sent, its answer comes, tiles and box are shown; attacks fail.

Needs Gradio, Playwright and a Chromium; `make test-page` has them. INTERNVL_SCREENSHOT names a file for the picture
that docs/demo_page.md shows.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "images"
WAIT = 120_000  # milliseconds; for slow machines
EVIL = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'><b>bold</b> **stars** "
    "[link](javascript:window.hacked=3) ![pixel](http://127.0.0.1:9/pixel.png) <svg onload=window.hacked=4>"
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the page runs, as `internvl page` starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "internvl_hub.app.cli", "page", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the page did not start: {server.stdout.read()[-3000:]}")  # type: ignore[union-attr]
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError("the page did not start in time")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 960})
    tab = context.new_page()
    tab.set_default_timeout(WAIT)
    tab.goto(address)
    tab.locator("#box textarea").wait_for()
    yield tab
    context.close()


def send(tab: Any, text: str, *files: Path) -> None:
    """Types a question, attaches files and sends both."""
    if files:
        tab.locator("#box input[type=file]").set_input_files([str(path) for path in files])
        playwright.expect(tab.locator("#box .thumbnail-item")).to_have_count(len(files))
    tab.locator("#box textarea").fill(text)
    tab.locator("#box textarea").press("Enter")


def answers(tab: Any) -> Any:
    return tab.locator("#chat .bot.message")


def test_an_image_is_answered_with_tiles_and_box(tab: Any, tmp_path: Path) -> None:
    send(tab, "What is the number?", IMAGES / "number_4_wide.png")
    playwright.expect(answers(tab).last).to_contain_text("5433", timeout=WAIT)
    caption = tab.locator("#tiles .caption")
    playwright.expect(caption).to_contain_text("133 x 60 px, grid 2 x 1 + thumbnail = 3 tiles, 48 tokens")
    tab.get_by_role("button", name="Clear conversation").click()
    playwright.expect(answers(tab)).to_have_count(0)
    send(tab, "Where is the <ref>orange triangle</ref>?", IMAGES / "shapes.png")
    box = tab.locator("#chat .bot.message img")
    playwright.expect(box).to_be_visible(timeout=WAIT)
    playwright.expect(tab.locator("#chat")).to_contain_text("orange triangle [")
    picture = _saved(tab, box, tmp_path / "box.png")
    plain = _saved(tab, tab.locator("#chat .user.message img"), tmp_path / "plain.png").resize(picture.size, 0)
    changed = (np.asarray(picture) != np.asarray(plain)).any(-1).sum()
    assert 1000 < changed < picture.width * picture.height / 4, "a frame and a label"
    playwright.expect(caption).to_contain_text("shapes.png: 64 x 192 px, grid 1 x 3 + thumbnail = 4 tiles, 64 tokens")
    tab.screenshot(path=os.environ.get("INTERNVL_SCREENSHOT", tmp_path / "page.png"))


def _saved(tab: Any, image: Any, path: Path) -> Image.Image:
    """The picture of an `img` element, as the server sends it."""
    path.write_bytes(tab.request.get(image.get_attribute("src")).body())
    return Image.open(path).convert("RGB")


def test_texts_are_shown_as_they_are(tab: Any) -> None:
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    send(tab, EVIL)
    user = tab.locator("#chat .user.message")
    playwright.expect(user.last).to_contain_text("<script>window.hacked=1</script>")
    playwright.expect(user.last).to_contain_text("**stars** [link](javascript:window.hacked=3)")
    playwright.expect(answers(tab).last).to_be_visible(timeout=WAIT)
    assert tab.evaluate("window.hacked") is None
    assert (
        tab.locator("#chat .message a[href^=javascript], #chat .message script, #chat .message svg[onload]").count()
        == 0
    )
    assert not [url for url in asked if "pixel.png" in url], "no picture is fetched for a text"


def test_a_hostile_file_name_is_shown_as_it_is(tab: Any, tmp_path: Path) -> None:
    path = tmp_path / "<img src=x onerror=alert(1)>.png"
    shutil.copyfile(IMAGES / "number_4_wide.png", path)
    tab.on("dialog", lambda dialog: pytest.fail("a script ran"))
    send(tab, "What is the number?", path)
    playwright.expect(answers(tab).last).to_contain_text("5433", timeout=WAIT)
    assert tab.locator("img[src=x]").count() == 0


def test_what_is_refused_is_said_and_stays_in_the_box(tab: Any, tmp_path: Path) -> None:
    fake = tmp_path / "fake.png"
    fake.write_text("<html><script>alert(1)</script>")
    send(tab, "What is this?", fake)
    playwright.expect(tab.locator(".toast-body").first).to_contain_text("no image of a known format")
    playwright.expect(tab.locator("#box textarea")).to_have_value("What is this?")


def test_visitors_do_not_meet(browser: Any, address: str, tab: Any) -> None:
    send(tab, "What is the number?", IMAGES / "number_4_wide.png")
    other_context = browser.new_context()
    other = other_context.new_page()
    other.set_default_timeout(WAIT)
    other.goto(address)
    send(other, "How many shapes are there?", IMAGES / "shapes.png")
    playwright.expect(answers(tab).last).to_contain_text("5433", timeout=WAIT)
    playwright.expect(answers(other).last).to_contain_text("3", timeout=WAIT)
    playwright.expect(other.locator("#tiles")).to_contain_text("shapes.png")
    playwright.expect(other.locator("#tiles")).not_to_contain_text("number_4_wide")
    playwright.expect(tab.locator("#tiles")).not_to_contain_text("shapes")
    other_context.close()


def test_examples_fill_the_box(tab: Any) -> None:
    tab.get_by_text("Which number is this?").click()
    playwright.expect(tab.locator("#box textarea")).to_have_value("Which number is this?")
    tab.locator("#box textarea").press("Enter")
    playwright.expect(answers(tab).last).to_contain_text("877", timeout=WAIT)
