"""A headless browser before the web page; run as a program, it takes the picture of the page in docs/.

python -m tests.web_browser --model out/demo/pretrain
"""

from __future__ import annotations

import argparse
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mage_fast.recipes.web import PAINT, WebConfig, serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS = 120_000
PICTURE = Path("docs/pictures/web.png")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def is_painted(pixels: np.ndarray) -> np.ndarray:
    paint = np.array([int(PAINT[i : i + 2], 16) for i in (1, 3, 5)])
    return (abs(pixels - paint) < 8).all(2)


class Web:
    """An open page, and what the browser told of it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)
        self.canvas = page.locator(".editor canvas").first
        self.canvas.wait_for()
        self.drawn(lambda now: now.std() > 20)

    def drawn(self, wanted: Callable[[np.ndarray], Any]) -> np.ndarray:
        """The editor's pixels once they are as wanted, and do not change any more."""
        before = np.empty(0)
        for _ in range(TIMEOUT_MS // 100):
            now = np.asarray(Image.open(BytesIO(self.canvas.screenshot())).convert("RGB")).astype(float)
            if np.array_equal(now, before) and wanted(now):
                return now
            before = now
            self.page.wait_for_timeout(100)
        raise AssertionError("the editor does not show what was wanted")

    def pick(self, example: int) -> None:
        before = self.drawn(lambda now: True)
        self.page.locator(".examples button").nth(example).click()
        self.drawn(lambda now: not np.array_equal(now, before))

    def paint(self, *points: tuple[float, float]) -> np.ndarray:
        """A stroke through points from (0, 0) to (1, 1) of the editor's image; where paint is seen on it."""
        box = self.canvas.bounding_box()
        assert box is not None
        top, left, side = self.image_box(self.drawn(lambda now: True))
        for number, (x, y) in enumerate(points):
            at = box["x"] + left + x * side, box["y"] + top + y * side
            self.page.mouse.move(*at, steps=1 if number == 0 else 12)
            if number == 0:
                self.page.mouse.down()
        self.page.mouse.up()
        now = self.drawn(lambda now: is_painted(now).sum() > 50)
        top, left, side = self.image_box(now)
        return is_painted(now)[top : top + side, left : left + side]

    @staticmethod
    def image_box(pixels: np.ndarray) -> tuple[int, int, int]:
        """Top, left and side of the image in the editor's pixels."""
        # label and tools are over the canvas too: a row or column of the image has more of what is not white
        image = (pixels < 200).any(2)
        rows, columns = (np.flatnonzero(image.sum(axis) > 150) for axis in (1, 0))
        return int(rows[0]), int(columns[0]), int(columns[-1] - columns[0] + 1)

    def choose(self, label: str, value: int) -> None:
        self.page.get_by_label(f"number input for {label}").fill(str(value))
        self.page.get_by_label(f"number input for {label}").press("Tab")

    def run(self, pictures: int, button: str = "Run") -> list[np.ndarray]:
        """Click and wait for the gallery in sight to hold so many whole pictures; their pixels."""
        self.page.locator("button:visible", has_text=button).first.click()
        self.page.wait_for_function(
            """count => { const images = [...document.querySelectorAll('.pictures .grid-wrap img')].filter(
                image => image.offsetParent && image.complete && image.naturalWidth);
                return images.length == count }""",
            arg=pictures,
        )
        return [self.pixels(image) for image in self.page.locator(".pictures .grid-wrap img:visible").all()]

    def pixels(self, image: Any) -> np.ndarray:
        """What an image on the page holds."""
        content = self.page.request.get(image.get_attribute("src")).body()
        return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


@contextmanager
def browsing(url: str) -> Iterator[Web]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            yield Web(page, url)
        finally:
            browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("out/demo/pretrain"))
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    server = serve(WebConfig(model=options.model, port=free_port()))
    try:
        with browsing(server.local_url) as web:
            web.pick(6)
            web.choose("Widening (tokens)", 0)
            web.paint((0.35, 0.35), (0.6, 0.35))
            web.run(4)
            web.page.mouse.move(0, 0)
            web.page.screenshot(path=options.out, full_page=True, animations="disabled")
    finally:
        server.close(verbose=False)


if __name__ == "__main__":
    main()
