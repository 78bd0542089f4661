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
import torch
from PIL import Image

from mage_fast.recipes.loading import image_size, load_model
from mage_fast.recipes.web import WebConfig, serve
from mage_fast.recipes.web_actions import Actions, Settings
from mage_fast.training.data import open_source

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_MS, POLL_MS = 60_000, 100
#: CSS pixels that the editor leaves around an image.
EDITOR_MARGIN = 30
PLACES = {"image seen": ".pictures .image-container img", "results": ".pictures .grid-wrap img"}
PICTURE = Path("docs/pictures/web.png")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Web:
    """An open page, and what the browser told of it; images are uint8 [H, W, 3] of the model's size."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self._canvas = page.locator(".editor canvas")
        page.goto(url)

    def click(self, name: str, role: str = "button") -> None:
        self.page.get_by_role(role, name=name, exact=True).click()

    def choose(self, label: str, value: int) -> None:
        self.page.get_by_label(f"number input for {label}").fill(str(value))
        self.page.get_by_label(f"number input for {label}").press("Tab")

    def pick(self, example: int) -> None:
        self.page.locator(".examples button").nth(example).click()

    def upload(self, file: Path) -> None:
        with self.page.expect_file_chooser() as chooser:
            self.click("Upload an image")
        chooser.value.set_files(file)

    def tells(self, message: str) -> None:
        """Wait until the page tells this."""
        from playwright.sync_api import expect

        expect(self.page.get_by_text(message)).to_be_visible(timeout=TIMEOUT_MS)

    def shows(self, image: np.ndarray) -> None:
        """Wait until the editor shows this image, and shows it where :meth:`paint` takes it to be."""

        def agrees() -> bool:
            if not self._canvas.count():
                return False  # an editor is taken away before the next one comes
            left, top, side = self._image_box()
            columns, rows = (
                (start + (np.arange(count) + 0.5) / count * side).astype(int)
                for start, count in ((left, image.shape[1]), (top, image.shape[0]))
            )
            window = _pixels(self.page.screenshot()).astype(int)
            return bool((abs(window[rows][:, columns] - image) <= 3).all())

        self._until(agrees, "the editor does not show the image")

    def paint(self, *points: tuple[float, float]) -> None:
        """A stroke of the mouse through points (x, y) from (0, 0) to (1, 1) of the editor's image."""
        left, top, side = self._image_box()
        for number, (x, y) in enumerate(points):
            self.page.mouse.move(left + x * side, top + y * side, steps=12 if number else 1)
            if number == 0:
                self.page.mouse.down()
        self.page.mouse.up()
        self.page.mouse.move(0, 0)

    def _image_box(self) -> tuple[float, float, float]:
        """Left, top and side of the editor's image in the window: in the canvas's middle, with a margin."""
        box = self._canvas.first.bounding_box() or {"x": 0, "y": 0, "width": 100, "height": 100}
        side = min(box["width"], box["height"]) - 2 * EDITOR_MARGIN
        return box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2, side

    def holds(self, place: str, pictures: np.ndarray) -> None:
        """Wait until the pictures in sight at a place of :data:`PLACES` are these, to the level."""

        def agrees() -> bool:
            urls = self.page.locator(f"{PLACES[place]}:visible").evaluate_all(
                "images => images.map(image => image.complete && image.naturalWidth ? image.src : '')"
            )
            if len(urls) != len(pictures) or not all(urls):
                return False
            shown = [_pixels(self.page.request.get(url).body()) for url in urls]
            return all(map(np.array_equal, shown, pictures))

        self._until(agrees, f"the page does not hold the {place} wanted")

    def _until(self, condition: Callable[[], bool], complaint: str) -> None:
        for _ in range(TIMEOUT_MS // POLL_MS):
            if condition():
                return
            self.page.wait_for_timeout(POLL_MS)
        raise AssertionError(f"{complaint}; errors: {self.errors}")


def _pixels(content: bytes) -> np.ndarray:
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
    model = load_model(options.model, torch.device("cpu"))
    source = open_source(WebConfig.data, image_size=image_size(model), split="test")
    server = serve(WebConfig(model=options.model, port=free_port()))
    try:
        with browsing(server.local_url) as web:
            web.pick(6)
            web.shows(Actions(model, source).examples[6])
            web.choose("Widening (tokens)", 0)
            web.paint((0.35, 0.35), (0.6, 0.35))
            web.click("Run")
            web.page.locator(PLACES["results"]).nth(Settings.variants - 1).wait_for()
            web.page.screenshot(path=options.out, full_page=True, animations="disabled")
    finally:
        server.close(verbose=False)


if __name__ == "__main__":
    main()
