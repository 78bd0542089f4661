"""The web page: what it does, against the library's functions; and the page itself in a headless browser."""

from __future__ import annotations

import importlib.util
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor
from torch import Tensor

import mage_fast
from mage_fast import MAGE, InputError, MAGEConfig
from mage_fast.cli import main
from mage_fast.recipes.web import PAINT, WebConfig, serve
from mage_fast.recipes.web_actions import EXAMPLES, Actions, Settings, painted
from mage_fast.sampler_config import SamplerConfig
from mage_fast.training.data import batches, open_source
from mage_fast.training.metrics import enlarged
from tests.web_browser import CHROMIUM, browsing, free_port

SIDE, GRID = 16, 4
QUICK = Settings(variants=2, steps=3, grow=0, seed=7)
SAMPLER = SamplerConfig(steps=3)


@pytest.fixture(scope="module")
def model() -> MAGE:
    torch.manual_seed(0)
    return MAGE(MAGEConfig.tiny(num_classes=10)).eval()


@pytest.fixture(scope="module")
def saved(model: MAGE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    model.save_pretrained(folder / "model")
    MAGE(MAGEConfig.tiny(tokenizer=None)).save_pretrained(folder / "without_tokenizer")
    return folder


@pytest.fixture(scope="module")
def actions(model: MAGE) -> Actions:
    return Actions(model, open_source("digits", image_size=SIDE, split="test"))


def layer(mask_HW: np.ndarray) -> np.ndarray:
    """RGBA with faint paint where the mask is."""
    rgba = np.zeros((*mask_HW.shape, 4), dtype=np.uint8)
    rgba[mask_HW] = (249, 115, 22, 1)
    return rgba


def as_batch(image: np.ndarray) -> Tensor:
    return torch.tensor(image).permute(2, 0, 1)[None] / 255


def pictures(images_B3HW: Tensor) -> np.ndarray:
    """The images enlarged by whole pixels, to the nearest level."""
    return (enlarged(images_B3HW, 480 // SIDE) * 255).round().permute(0, 2, 3, 1).numpy()


def hidden(image: np.ndarray, mask_HW: np.ndarray) -> Tensor:
    """The image, grey where the mask is."""
    grey = image.copy()
    grey[mask_HW] = 128
    return as_batch(grey)


def assert_pictures(got: list[np.ndarray], images_B3HW: Tensor) -> None:
    assert np.array_equal(np.stack(got), pictures(images_B3HW))


def test_examples_are_spread_over_the_held_out_images(actions: Actions) -> None:
    source = open_source("digits", image_size=SIDE, split="test")
    (every,) = batches(source, len(source), shuffle=False, augment="eval")
    step = len(source) // EXAMPLES
    wanted = every.inputs[: step * EXAMPLES : step]
    assert len(actions.examples) == EXAMPLES
    assert torch.equal(torch.cat([as_batch(image) for image in actions.examples]), wanted)


def test_a_file_is_cropped_as_data_unless_it_has_the_model_s_size(model: MAGE, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, size in (("a", (40, 29)), ("b", (13, 50))):
        pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    actions = Actions(model, open_source(f"folder:{tmp_path}", image_size=SIDE, split="all"))
    assert len(actions.examples) == 2, "fewer images than the page has room for"
    for name, example in zip("ab", actions.examples, strict=True):
        assert np.array_equal(actions.read(tmp_path / f"{name}.png"), example)
    fitting = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(fitting).save(tmp_path / "c.png")
    assert np.array_equal(actions.read(tmp_path / "c.png"), fitting)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), side=st.integers(1, 12), zoom=st.integers(1, 5))
def test_a_pixel_is_painted_if_any_part_of_it_is(data: st.DataObject, side: int, zoom: int) -> None:
    places = st.tuples(*[st.integers(0, side * zoom - 1)] * 2)
    strokes = [data.draw(st.sets(places, max_size=4)) for _ in range(2)]
    layers, wanted = [], np.zeros((side, side), dtype=bool)
    for stroke in strokes:
        mask = np.zeros((side * zoom, side * zoom), dtype=bool)
        for y, x in stroke:
            mask[y, x] = wanted[y // zoom, x // zoom] = True
        layers.append(layer(mask))
    assert np.array_equal(painted(layers, side).numpy(), wanted)


def test_paint_of_another_size_is_scaled_to_the_image() -> None:
    mask = np.zeros((50, 70), dtype=bool)
    mask[49, 0] = True
    assert painted([layer(mask)], 16).nonzero().tolist() == [[15, 0]]


@pytest.mark.parametrize("label", ["", " 3 "])
def test_edit_is_the_library_s(actions: Actions, label: str) -> None:
    image = actions.examples[2]
    mask_HW = np.zeros((SIDE, SIDE), dtype=bool)
    mask_HW[5, 9:11] = True  # the tokens of row 1, column 2
    guidance = 2.0 if label else 0.0
    chosen = Settings(**(vars(QUICK) | {"label": label, "guidance_scale": guidance}))
    seen, variants = actions.edit(image, [layer(mask_HW.repeat(30, 0).repeat(30, 1))], chosen)
    is_edited_HW = np.zeros((SIDE, SIDE), dtype=bool)
    is_edited_HW[4:8, 8:12] = True
    assert_pictures([seen], hidden(image, is_edited_HW))
    wanted = mage_fast.edit(
        actions.model,
        as_batch(image).expand(2, -1, -1, -1),
        torch.tensor(mask_HW).expand(2, -1, -1),
        labels_B=torch.tensor([3, 3]) if label else None,
        config=SamplerConfig(steps=3, guidance_scale=guidance),
        seed=7,
        grow=0,
    )
    assert_pictures(variants, wanted.images_B3HW)


def test_reconstruct_and_generate_are_the_library_s(actions: Actions) -> None:
    image = actions.examples[0]
    seen, variants = actions.reconstruct(image, QUICK)
    wanted = mage_fast.reconstruct(actions.model, as_batch(image), tries=2, config=SAMPLER, seed=7)
    assert_pictures(variants, wanted.images_TB3HW[:, 0])
    patches = (seen == 128).all(2).reshape(GRID, 120, GRID, 120).all((1, 3))
    assert np.array_equal(patches.ravel(), wanted.is_masked_BL[0].numpy())
    assert patches.sum() == 12, "75% of 16 tokens"
    labels_B = torch.tensor([4, 4])
    generated = actions.generate(Settings(**(vars(QUICK) | {"label": "4"})))
    theirs = mage_fast.generate(actions.model, 2, labels_B=labels_B, config=SAMPLER, seed=7)
    assert_pictures(generated, theirs)


def test_what_users_do_wrong_is_told(actions: Actions, tmp_path: Path) -> None:
    image, unpainted = actions.examples[0], [layer(np.zeros((480, 480), dtype=bool))]
    for layers in ([], unpainted):
        with pytest.raises(InputError, match="nothing is painted over"):
            actions.edit(image, layers, QUICK)
    for change, message in (
        ({"seed": None}, "seed is empty, wanted a whole number"),
        ({"label": "10"}, "class label is '10', wanted 0 to 9"),
        ({"label": "-1"}, "class label is '-1', wanted 0 to 9"),
        ({"label": "9" * 5000}, "wanted 0 to 9"),
        ({"label": "²"}, "wanted 0 to 9"),
        ({"label": "seven"}, "class label is 'seven', wanted 0 to 9"),
        ({"guidance_scale": 2.0}, "give a class label too"),
    ):
        with pytest.raises(InputError, match=message):
            actions.generate(Settings(**(vars(QUICK) | change)))
    unlabelled = Actions(MAGE(MAGEConfig.tiny()), actions.source)
    with pytest.raises(InputError, match="class label is '3', wanted none"):
        unlabelled.generate(Settings(label="3"))
    text, cut = tmp_path / "notes.png", tmp_path / "cut.png"
    text.write_text("no image")
    with pytest.raises(InputError, match=r"notes\.png: not a PNG, JPEG, WebP or BMP image"):
        actions.read(text)
    Image.fromarray(actions.picture(image)).save(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cut\.png: "):
        actions.read(cut)


def test_what_cannot_be_served_is_refused(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, message in (
            (["--port", port], f"cannot serve on 127.0.0.1:{port} (Address already in use)"),
            (["--port", "0"], "port is 0, wanted 1 to 65535"),
            (["--port", "70000"], "port is 70000, wanted 1 to 65535"),
            (["--host", "192.0.2.1"], "cannot serve on 192.0.2.1:7860"),
        ):
            assert main(["web", "--model", str(saved / "model"), *options]) == 2
            assert message in capsys.readouterr().err
    free = ["--port", str(free_port())]
    for model, options, message in (
        ("missing", [], "there is no model at"),
        ("without_tokenizer", [], "has no tokenizer"),
        ("model", ["--data", "imagenet"], "unknown data source 'imagenet'"),
    ):
        assert main(["web", "--model", str(saved / model), *free, *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(saved: Path, number: signal.Signals) -> None:
    pytest.importorskip("gradio")
    port = free_port()
    command = [sys.executable, "-m", "mage_fast.cli", "web", "--model", str(saved / "model")]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        told = process.stderr.readline()
        assert told == f"mage-fast: http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=120)
    assert (process.returncode, out, error) == (130, "", "")


BROWSER = CHROMIUM and all(importlib.util.find_spec(name) for name in ("gradio", "playwright"))


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The hosts that this process has connected to since."""
    connected: set[str] = set()
    connect = socket.socket.connect

    def noted(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX:
            connected.add(address[0])  # type: ignore[index]
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", noted)
    return connected


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs gradio, playwright and Chromium")
def test_the_page_in_a_browser(actions: Actions, saved: Path, tmp_path: Path, hosts: set[str]) -> None:
    model = actions.model
    settings = {"config": SAMPLER, "seed": 0}
    server = serve(WebConfig(model=saved / "model", port=free_port()))
    try:
        with browsing(server.local_url) as web:
            web.shows(actions.examples[0])
            web.choose("Widening (tokens)", 0)
            web.choose("Steps", 3)
            web.choose("Variants", 2)

            # an example, painted from the middle of row 1, column 1 of the tokens to that of row 2
            web.pick(3)
            image = actions.examples[3]
            web.shows(image)
            web.paint((0.375, 0.375), (0.375, 0.625))
            painted_over, is_edited_HW = image.copy(), np.zeros((SIDE, SIDE), dtype=bool)
            painted_over[5:11, 5:7] = ImageColor.getrgb(PAINT)
            is_edited_HW[4:12, 4:8] = True
            web.shows(painted_over)
            web.click("Run")
            web.holds("image seen", pictures(hidden(image, is_edited_HW)))
            edited = mage_fast.edit(
                model,
                as_batch(image).expand(2, -1, -1, -1),
                torch.tensor(is_edited_HW).expand(2, -1, -1),
                **settings,
                grow=0,
            )
            web.holds("results", pictures(edited.images_B3HW))
            is_changed_BL = edited.ids_BL != model.tokenize(as_batch(image))
            assert is_changed_BL.any()
            assert not (is_changed_BL & ~edited.is_edited_BL).any()

            web.click("Hide 75% at random")
            whole = mage_fast.reconstruct(model, as_batch(image), tries=2, **settings)
            web.holds("results", pictures(whole.images_TB3HW[:, 0]))
            is_masked_HW = whole.is_masked_BL[0].view(GRID, GRID).numpy().repeat(4, 0).repeat(4, 1)
            web.holds("image seen", pictures(hidden(image, is_masked_HW)))

            web.click("Generate", role="tab")
            web.choose("Variants", 3)
            web.click("Run")
            web.holds("results", pictures(mage_fast.generate(model, 3, **settings)))

            web.click("Edit", role="tab")
            web.pick(4)
            web.shows(actions.examples[4])
            web.click("Run")
            web.tells("nothing is painted over")

            # a file of the model's size, painted in the last token's middle
            uploaded = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(uploaded).save(tmp_path / "uploaded.png")
            web.upload(tmp_path / "uploaded.png")
            web.shows(uploaded)
            web.paint((0.875, 0.875))
            web.click("Run")
            is_edited_HW[:] = False
            is_edited_HW[12:, 12:] = True
            web.holds("image seen", pictures(hidden(uploaded, is_edited_HW)))

            (tmp_path / "notes.png").write_text("no image")
            web.upload(tmp_path / "notes.png")
            web.tells("notes.png: not a PNG, JPEG, WebP or BMP image")
    finally:
        server.close(verbose=False)
    assert web.errors == []
    local = ("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:")
    assert web.requests
    assert [url for url in web.requests if not url.startswith(local)] == []
    assert hosts == {"127.0.0.1"}
