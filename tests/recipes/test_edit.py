"""The verbs edit and reconstruct, and generate's animation: their files, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mage_fast import MAGE, MAGEConfig, SamplerConfig, edit, reconstruct
from mage_fast.cli import main
from mage_fast.editing import box_mask, hide_tokens, shrink
from mage_fast.recipes.inputs import read_pictures
from mage_fast.recipes.loading import load_model
from mage_fast.training.data import batches, open_source
from mage_fast.training.metrics import to_uint8

FAST = ("--sampler.steps", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five classes, 16 x 16 pixels and 4 x 4 tokens."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny().for_classes(5))
    torch.nn.init.normal_(model.embedding.word_embeddings.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 x 40 pixels of noise."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main([str(x) for x in (*arguments, *FAST)]) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mage-fast: error: ")
    assert captured.out == ""
    return lines[0]


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# What is read


def test_pictures_are_those_of_the_evaluation(photo: Path) -> None:
    source = open_source("digits", image_size=16, split="test")
    stream = batches(source, 5, shuffle=False, augment="eval")
    assert torch.equal(read_pictures("digits", 5, image_size=16).images_B3HW, next(stream).inputs)
    folder = open_source(f"folder:{photo.parent}", image_size=16, split="all")
    wanted = next(batches(folder, 1, shuffle=False, augment="eval")).inputs
    for spec in (str(photo), str(photo.parent)):
        found = read_pictures(spec, 8, image_size=16)
        assert torch.equal(found.images_B3HW, wanted)
        assert found.sizes == [(60, 40)]


def test_a_mask_is_cropped_as_its_image(photo: Path) -> None:
    """White pixels in the image and in the mask come to lie in the same place, each of them: 60 x 40 pixels
    are resized to 27 x 18, of which 16 x 16 are kept.
    """
    mask = np.zeros((40, 60), dtype=bool)
    mask[12:24, 20:44] = True
    marked = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    marked.save(photo.parent.parent / "marked.png")
    found = read_pictures(str(photo.parent.parent / "marked.png"), 1, image_size=16)
    mask[30, 10:50] = True  # a line thinner than a pixel of the crop
    wanted = torch.zeros(16, 16, dtype=torch.bool)
    for y, x in np.argwhere(mask):
        row, column = int((y + 0.5) * 0.45) - 1, int((x + 0.5) * 0.45) - 5
        if 0 <= row < 16 and 0 <= column < 16:
            wanted[row, column] = True
    (cropped,) = found.masks(lambda size: mask)
    assert torch.equal(cropped, wanted)
    assert cropped[found.images_B3HW[0, 0] * 255 >= 128].all()
    assert cropped[12].all()


# What is written


def test_an_edit_is_that_of_the_library(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, options = tmp_path / "out", ("edit", "--model", saved, "--count", 3, "--seed", 4)
    more = ("--box", 4, 4, 9, 12, "--variants", 2, "--label", 2, "--sampler.guidance-scale", 1.5)
    told = run(capsys, *options, *more, "--out", out)
    model = load_model(saved, torch.device("cpu"))
    images = read_pictures("digits", 3, image_size=16).images_B3HW
    mask = box_mask((16, 16), (4, 4, 9, 12)).expand(3, -1, -1)
    config, labels = SamplerConfig(steps=2, guidance_scale=1.5), torch.full((3,), 2)
    for variant in range(2):
        wanted = edit(model, images, mask, labels_B=labels, config=config, seed=4 + variant)
        for index in range(3):
            assert torch.equal(
                pixels(out / f"{index:06d}_{variant}.png"), to_uint8(wanted.images_B3HW[index])
            )
    assert told["images"] == 3
    assert told["edited_tokens"] == pytest.approx(wanted.is_edited_BL.float().mean().item())
    grid = pixels(out / "grid.png")  # 4 rows of 3, enlarged four times
    assert grid.shape == (3, 4 * 66 - 2, 3 * 66 - 2)
    seen = hide_tokens(images, wanted.is_edited_BL)
    assert torch.equal(grid[:, 66 : 66 + 64 : 4, 0:64:4], to_uint8(seen[0]))
    before = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    run(capsys, *options, *more, "--out", out)
    assert {path: path.stat().st_mtime_ns for path in out.glob("0*.png")} == before
    assert "box [4, 4, 9, 12] and not [4, 4, 9, 13]" in fails(
        capsys, *options, "--box", 4, 4, 9, 13, *more[5:], "--out", out, *FAST
    )


def test_uncropping_keeps_the_small_image(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("edit", "--model", saved, "--out", tmp_path, "--count", 2, "--variants", 1)
    told = run(capsys, *options, "--uncrop", 0.5, "--anchor", 1, 0)
    assert told["edited_tokens"] == 0.75
    images = read_pictures("digits", 2, image_size=16).images_B3HW
    around, mask = shrink(images, 4, 0.5, (1, 0))
    assert not mask[0, :8, 8:].any()
    model = load_model(saved, torch.device("cpu"))
    wanted = edit(model, around, mask, config=SamplerConfig(steps=2), seed=0, grow=0)
    assert torch.equal(pixels(tmp_path / "000001_0.png"), to_uint8(wanted.images_B3HW[1]))


def test_sides_and_masks_of_a_photograph(
    saved: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Both in pixels of the file: the same part of it gives the same images."""
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[:, :25] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = ("edit", "--model", saved, "--images", photo, "--variants", 1, "--grow", 0)
    told = run(capsys, *options, "--mask", tmp_path / "mask.png", "--out", tmp_path / "mask")
    assert told["images"] == 1
    assert 0 < told["edited_tokens"] < 1
    run(capsys, *options, "--outpaint", 25, 0, 0, 0, "--out", tmp_path / "sides")
    one, other = ((tmp_path / name / "000000_0.png").read_bytes() for name in ("mask", "sides"))
    assert one == other


def test_a_reconstruction_is_that_of_the_library(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("reconstruct", "--model", saved, "--count", 3, "--out", tmp_path, "--seed", 1)
    told = run(capsys, *options, "--ratio", 0.5, "--tries", 2)
    model = load_model(saved, torch.device("cpu"))
    images = read_pictures("digits", 3, image_size=16).images_B3HW
    wanted = reconstruct(model, images, ratio=0.5, tries=2, config=SamplerConfig(steps=2), seed=1)
    assert told["hidden_tokens"] == 0.5
    for t in range(2):
        for index in range(3):
            assert torch.equal(
                pixels(tmp_path / f"{index:06d}_{t}.png"), to_uint8(wanted.images_TB3HW[t, index])
            )
    assert "holds a run with ratio 0.5 and not 0.6" in fails(capsys, *options, "--ratio", 0.6, *FAST)


def test_an_animation_begins_grey_and_ends_as_the_images(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(capsys, "generate", "--model", saved, "--out", tmp_path, "--count", 4, "--batch-size", 3, "--animate")
    with Image.open(tmp_path / "animation.webp") as animation:
        assert animation.n_frames == 3  # type: ignore[attr-defined]
        frames = []
        for number in range(3):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")).astype(float))
    with Image.open(tmp_path / "grid.png") as grid:
        last = np.asarray(grid).astype(float)
    assert frames[0].shape == last.shape
    assert np.abs(frames[0][4:60, 4:60] - 127).max() <= 4, "grey, to the loss of WebP"
    assert np.abs(frames[2] - last).mean() < 6
    between = np.abs(frames[1] - 127).max(2) <= 6
    assert 0.1 < between.mean() < 0.95, "some tokens are grey"


# What is refused


def test_what_an_edit_refuses(
    saved: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:200])
    Image.new("L", (60, 40)).save(tmp_path / "black.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "square.png")
    (tmp_path / "empty").mkdir()
    box, file = ("--box", 4, 4, 9, 12), ("--images", photo)
    bare = tmp_path / "bare"
    MAGE(MAGEConfig.tiny(tokenizer=None)).save_pretrained(bare)
    cases = {
        "got none of --mask, --box, --outpaint, --uncrop, wanted one": (),
        "got --box and --uncrop of": (*box, "--uncrop", 0.5),
        "box (left, top, right, bottom) is (4, 4, 17, 12), wanted 0 <=": ("--box", 4, 4, 17, 12),
        "is (4, 4, 4, 12), wanted 0 <= left < right <= 16": ("--box", 4, 4, 4, 12),
        "the mask is empty within the crop, which keeps": (*file, "--box", 0, 0, 6, 40),
        f"{photo}: {tmp_path / 'square.png'} is 40 x 40 pixels, wanted the image's 60 x 40": (
            *file,
            "--mask",
            tmp_path / "square.png",
        ),
        "black.png is black everywhere": (*file, "--mask", tmp_path / "black.png"),
        "no.png cannot be read": ("--mask", tmp_path / "no.png"),
        "broken.png cannot be read": (*box, "--images", broken),
        f"{broken} cannot be read": (*box, "--images", tmp_path),
        "holds no PNG, JPEG, WebP or BMP image": (*box, "--images", tmp_path / "empty"),
        "there is no such file or folder": (*box, "--images", "nothing.png"),
        "count is 0": (*box, "--count", 0),
        "variants 0": (*box, "--variants", 0),
        "grow is -2": (*box, "--grow", -2),
        "border (left, top, right, bottom) is (9, 0, 9, 0)": ("--outpaint", 9, 0, 9, 0),
        "scale is 1.5": ("--uncrop", 1.5),
        "labels holds 5, wanted 0 <= labels < 5": (*box, "--label", 5),
        f"seed is {2**63}, wanted -2**63 <= seed < 2**63": (*box, "--seed", 2**63 - 3, "--variants", 4),
        "guidance_scale is 2.0 without a label": (*box, "--sampler.guidance-scale", 2),
        "top_k is 99, wanted at most the 32 codes": (*box, "--sampler.top-k", 99),
        "has no tokenizer": (*box, "--model", bare),
    }
    for message, options in cases.items():
        model = () if "--model" in options else ("--model", saved)
        line = fails(capsys, "edit", *model, "--out", tmp_path / "out", *options)
        assert message in line, line
    assert not (tmp_path / "out").exists()


def test_what_a_reconstruction_refuses(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = ("reconstruct", "--model", saved, "--out", tmp_path / "out")
    for message, wrong in (
        ("ratio 1.2", ("--ratio", 1.2)),
        ("tries 0", ("--tries", 0)),
        (f"seed is {2**63}, wanted", ("--seed", 2**63 - 2)),
    ):
        assert message in fails(capsys, *options, *wrong)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    for name in ("mine.png", "mine.JPG"):
        (tmp_path / "out" / name).write_bytes(b"mine")
        assert "holds images of something else: give another --out" in fails(capsys, *options)
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
        (tmp_path / "out" / name).unlink()
    noted = tmp_path / "out" / "reconstruct.json"
    for content, message in (("{", f"{noted} is no JSON file"), ("[]", f"{noted} holds no settings")):
        noted.write_text(content)
        assert message in fails(capsys, *options)
