"""Cropping on the device against Pillow, and the path around it with Pillow as its decoder."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import BAD, CHINA, FLOWER, HOPPER, gradient
from PIL import Image
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.training.augment import AUGMENTATIONS, Augmentation, Crop, applied, drawn, item_generator
from mage_fast.training.data import batches, open_source, training_batches
from mage_fast.training.device_augment import NvImageCodec, crop_on_device
from mage_fast.training.images import UnreadableImage, read_rgb, whole_jpeg_size


class PillowDecoder:
    """Pillow as a decoder on the CPU; ``fails`` says for which files it gives None."""

    device = torch.device("cpu")

    def __init__(self, fails: Sequence[bytes] = ()) -> None:
        self.fails, self.files = fails, 0

    def __call__(self, files: Sequence[bytes]) -> list[Tensor | None]:
        self.files += len(files)
        return [
            None if file in self.fails else torch.from_numpy(np.array(read_rgb(io.BytesIO(file))))
            for file in files
        ]


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1).astype(int)


def columns_first(image: Image.Image, crop: Crop, size: int) -> Image.Image:
    """``applied`` in two steps of Pillow: its newer versions begin with the rows of tall images."""
    left, top, right, bottom = crop.box
    wide = image.resize((crop.resized[0], image.height), 3, box=(left, 0, right, image.height))
    resized = wide.resize(crop.resized, 3, box=(0, top, crop.resized[0], bottom))
    x, y = crop.corner
    resized = resized.crop((x, y, x + size, y + size))
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else resized


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.integers(1, 40),
    crop=st.sampled_from(["random", "center"]),
    resize=st.booleans(),
    ratio=st.sampled_from([None, 1.0, 1.5]),
    seed=st.integers(0, 2**32),
)
def test_cropping_is_pillows_within_one_level(
    width: int, height: int, size: int, crop: str, resize: bool, ratio: float | None, seed: int
) -> None:
    """Noise is the worst case, as it overshoots 0 and 255 in between. Pillow's weights have 22 bits."""
    augmentation = Augmentation(crop=crop, resize=resize, resize_ratio=ratio)  # type: ignore[arg-type]
    size = size if resize else min(size, width, height)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    what = drawn((width, height), size, augmentation, item_generator(seed, 0, 0))
    found = crop_on_device(torch.from_numpy(pixels), what, size)
    assert found.shape == (3, size, size)
    assert found.dtype == torch.float32
    difference = np.abs(found.numpy() - levels(columns_first(Image.fromarray(pixels), what, size)))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01 or difference.sum() <= 1


@pytest.mark.parametrize("augment", ["strong", "weak", "eval", "window"])
def test_photographs_are_cropped_as_by_the_cpu_path(augment: str) -> None:
    for file in (CHINA, FLOWER, HOPPER):
        image = read_rgb(file)
        pixels = torch.from_numpy(np.array(image))
        for index in range(6):
            what = drawn(image.size, 224, AUGMENTATIONS[augment], item_generator(0, 0, index))
            difference = np.abs(crop_on_device(pixels, what, 224).numpy() - levels(applied(image, what, 224)))
            if image.width > image.height:
                assert difference.max() <= 1
            assert difference.mean() < 0.5


@pytest.fixture
def pictures(zoo: Path) -> Path:
    """The zoo, and photographs that EXIF turns, progressive, in grey, and with bytes behind their end."""
    with Image.open(CHINA) as image:
        small = image.reduce(4).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 8
    small.save(zoo / "photographs" / "turned.jpg", exif=exif)
    small.save(zoo / "photographs" / "progressive.jpg", progressive=True)
    small.convert("L").save(zoo / "photographs" / "grey.jpg")
    small.save(zoo / "photographs" / "longer.jpg")
    with open(zoo / "photographs" / "longer.jpg", "ab") as file:
        file.write(b"appended")
    return zoo


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("views", [1, 2])
def test_batches_decoded_elsewhere_are_those_of_the_cpu_path(
    pictures: Path, workers: int, views: int
) -> None:
    options = {"image_size": 24, "seed": 2, "augment": "strong", "epochs": 2, "views": views}
    sources = [open_source(f"folder:{pictures}", split="all") for _ in range(2)]
    decoder = PillowDecoder()
    found = list(batches(sources[0], 5, workers=workers, decoder=decoder, **options))  # type: ignore[arg-type]
    wanted = list(batches(sources[1], 5, **options))  # type: ignore[arg-type]
    for a, b in zip(found, wanted, strict=True):
        assert a.inputs.shape == b.inputs.shape
        assert a.inputs.dtype == torch.float32
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)
        # Tall images in the order of passes that Pillow chose: half a level in the mean, more at edges.
        difference = (a.inputs - b.inputs).abs().flatten(-3).mul(255)
        assert difference.mean(-1).max() < 0.5
        assert difference.mean() < 0.2
    assert sources[0].bad_files == sources[1].bad_files
    assert {Path(name).name for name in sources[0].bad_files} == BAD
    jpegs = {"china.jpg", "flower.jpg", "grace_hopper.jpg", "turned.jpg", "progressive.jpg", "grey.jpg"}
    shown = [sources[0].name(int(i)) for batch in found for i in batch.indices]
    assert decoder.files == sum(Path(name).name in jpegs for name in shown)


@pytest.mark.parametrize("shuffle", [True, False])
def test_files_that_the_decoder_refuses_are_loaded_by_the_cpu_path(
    pictures: Path, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, and with the substitute that the CPU path takes where Pillow refuses them as well."""
    options = {"image_size": 16, "augment": "strong", "shuffle": shuffle, "drop_last": False}
    source = open_source(f"folder:{pictures}", split="all")
    decoder = PillowDecoder(fails=[source.encoded(i) for i in range(len(source))])
    for refused in ([], ["china.jpg", "grey.jpg"]):
        for name in refused:
            read = type(source).image

            def image(self: object, index: int, read: object = read, name: str = name) -> Image.Image:
                if self.name(index).endswith(f"/{name}"):  # type: ignore[attr-defined]
                    raise UnreadableImage("damaged in the middle")
                return read(self, index)  # type: ignore[operator]

            monkeypatch.setattr(type(source), "image", image)
        sources = [open_source(f"folder:{pictures}", split="all") for _ in range(2)]
        found = list(batches(sources[0], 4, decoder=decoder, **options))  # type: ignore[arg-type]
        wanted = list(batches(sources[1], 4, **options))  # type: ignore[arg-type]
        for a, b in zip(found, wanted, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert sources[0].bad_files == sources[1].bad_files
        assert len(sources[0].bad_files) == len(BAD) + len(refused)


def test_resuming_and_shares_hold_with_a_decoder(pictures: Path) -> None:
    source = open_source(f"folder:{pictures}", split="all")
    options = {"image_size": 16, "augment": "strong", "decoder": PillowDecoder()}
    unbroken = training_batches(source, 6, **options)
    whole = [next(unbroken) for _ in range(5)]
    for share in range(3):
        resumed = training_batches(source, 6, step=3, split=3, shares=[share], **options)
        for wanted in whole[3:]:
            part = next(resumed)
            assert torch.equal(part.inputs, wanted.inputs[2 * share : 2 * share + 2])
            assert torch.equal(part.indices, wanted.indices[2 * share : 2 * share + 2])


def test_whole_jpeg_files_are_told_from_others() -> None:
    content = CHINA.read_bytes()
    assert whole_jpeg_size(content) == (640, 427)
    exif = Image.Exif()
    exif[0x0112] = 5
    turned, cmyk, png = io.BytesIO(), io.BytesIO(), io.BytesIO()
    gradient(64, 32).save(turned, "JPEG", exif=exif)
    gradient(64, 32).convert("CMYK").save(cmyk, "JPEG")
    gradient(64, 32).save(png, "PNG")
    assert whole_jpeg_size(turned.getvalue()) == (32, 64) == read_rgb(turned).size
    for other in (content[:-1], cmyk.getvalue(), png.getvalue(), png.getvalue() + b"\xff\xd9", b""):
        assert whole_jpeg_size(other) is None


def test_decoding_on_a_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the device is cpu, wanted a CUDA device"):
        NvImageCodec("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="the device is cuda:0, wanted a CUDA device"):
        NvImageCodec("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    with pytest.raises(InputError, match=r"needs the package nvidia-nvimgcodec.*mage-fast\[gpu-decode\]"):
        NvImageCodec("cuda:0")
    with pytest.raises(InputError, match="digits has no image files that a decoder could decode"):
        batches(open_source("digits"), 8, decoder=PillowDecoder())


def test_the_package_decodes_as_the_decoder_says() -> None:
    """What NvImageCodec relies on, on the package's own CPU backend: RGB, rows first, upright, None."""
    codec = pytest.importorskip("nvidia.nvimgcodec")
    decoder = codec.Decoder(
        device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
        backends=[codec.Backend(codec.BackendKind.CPU_ONLY)],
        options=":fancy_upsampling=1",
    )
    parameters = codec.DecodeParams(apply_exif_orientation=True, color_spec=codec.ColorSpec.SRGB)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, grey = io.BytesIO(), io.BytesIO()
    gradient(64, 32).save(turned, "JPEG", exif=exif)
    gradient(64, 32).convert("L").save(grey, "JPEG")
    files = [CHINA.read_bytes(), turned.getvalue(), grey.getvalue()]
    images = decoder.decode([*files, files[0][:9000], b"text"], params=parameters)
    assert images[3:] == [None, None]
    for file, image in zip(files, images[:3], strict=True):
        wanted = np.asarray(read_rgb(io.BytesIO(file)))
        assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_decoding_on_a_gpu_is_pillows_within_a_few_levels() -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    decoder = NvImageCodec("cuda")
    files = [file.read_bytes() for file in (CHINA, FLOWER, HOPPER)]
    *found, damaged = decoder([*files, files[0][:9000]])
    for file, pixels in zip(files, found, strict=True):
        assert pixels is not None
        assert pixels.is_cuda
        image = read_rgb(io.BytesIO(file))
        difference = np.abs(pixels.cpu().numpy().astype(int) - np.asarray(image))
        assert difference.mean() < 1
        assert difference.max() <= 8  # the library's own tests allow 6 between its decoders
        what = drawn(image.size, 224, AUGMENTATIONS["strong"], item_generator(0, 0, 1))
        cropped = crop_on_device(pixels, what, 224)
        assert np.abs(cropped.cpu().numpy() - levels(applied(image, what, 224))).mean() < 1.5
    assert damaged is None or damaged.shape == found[0].shape
