"""Editing: which tokens a mask means, that the others stay, and that no image depends on its batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import mage_fast
from mage_fast import MAGE, MAGEConfig, SamplerConfig, edit, generate_ids, reconstruct, token_mask
from mage_fast.editing import border_mask, box_mask, hide_tokens, shrink

few = settings(max_examples=40, deadline=None, derandomize=True)
SIDE = 16
FAST = SamplerConfig(steps=2)


@pytest.fixture(scope="module")
def model() -> MAGE:
    """In float64, so that a batch's size changes no id through rounding; images differ in many codes."""
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny()).eval()
    nn.init.normal_(model.embedding.word_embeddings.weight, std=0.5)
    assert isinstance(model.tokenizer, mage_fast.VQGAN)
    nn.init.normal_(model.tokenizer.quantize.embedding.weight)
    model.tokenizer.encoder.conv_out.weight.mul_(8)
    return model.double()


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(
        count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def masks(count: int) -> Tensor:
    """An empty one, a full one, and boxes of all sizes."""
    mask = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for b in range(1, count):
        mask[b, b % 5 : b % 5 + b, : 3 * b] = True
    mask[1] = True
    return mask


# Masks


@few
@given(
    grid_size=st.integers(1, 5), patch=st.integers(1, 4), grow=st.integers(0, 6), batch=st.integers(1, 3),
    pixels=st.integers(0, 6), seed=st.integers(0, 2**30),
)  # fmt: skip
def test_tokens_of_a_mask(grid_size: int, patch: int, grow: int, batch: int, pixels: int, seed: int) -> None:
    """Token by token: it is edited if a masked pixel's token is at most ``grow`` away along both axes."""
    side = grid_size * patch
    generator = np.random.default_rng(seed)
    mask = np.zeros((batch, side, side), dtype=bool)
    for _ in range(pixels):
        mask[tuple(generator.integers((batch, side, side)))] = True
    wanted = np.zeros((batch, grid_size, grid_size), dtype=bool)
    for b, y, x in np.argwhere(mask):
        for row in range(grid_size):
            for column in range(grid_size):
                wanted[b, row, column] |= max(abs(y // patch - row), abs(x // patch - column)) <= grow
    got = token_mask(torch.from_numpy(mask), grid_size, grow)
    assert got.dtype == torch.bool
    assert torch.equal(got, torch.from_numpy(wanted).flatten(1))


def test_one_token_is_grown_by_default() -> None:
    mask = torch.zeros(1, 20, 20, dtype=torch.bool)
    mask[0, 9, 9] = True
    assert token_mask(mask, 5).view(5, 5).nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]


def test_boxes_and_borders() -> None:
    box = box_mask((6, 4), (1, 0, 3, 4))
    assert box.shape == (4, 6)
    assert box.nonzero().tolist() == [[y, x] for y in range(4) for x in (1, 2)]
    border = border_mask((6, 4), (2, 1, 0, 0))
    assert (~border).nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (2, 3, 4, 5)]


@few
@given(
    grid_size=st.integers(2, 7), patch=st.integers(2, 6), scale=st.floats(0.01, 0.99),
    anchor=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
def test_a_small_image_takes_whole_tokens(
    grid_size: int, patch: int, scale: float, anchor: tuple[float, float]
) -> None:
    side = grid_size * patch
    image = torch.rand(2, 3, side, side)
    around, mask = shrink(image, grid_size, scale, anchor)
    assert around.shape == image.shape
    assert torch.equal(mask[0], mask[1])
    tokens = token_mask(mask, grid_size, 0)
    grid = tokens.view(2, grid_size, grid_size)
    assert torch.equal(grid.repeat_interleave(patch, 1).repeat_interleave(patch, 2), mask), "whole tokens"
    (top, left), (bottom, right) = (
        (~mask[0]).nonzero().amin(0).tolist(),
        (~mask[0]).nonzero().amax(0).tolist(),
    )
    small = bottom + 1 - top
    assert small == right + 1 - left == patch * min(max(round(scale * grid_size), 1), grid_size - 1)
    assert (left, top) == tuple(patch * round(x * (side - small) / patch) for x in anchor)
    # pixels: Pillow's resampling of float images
    for channel in range(3):
        whole = Image.fromarray(image[0, channel].numpy())
        wanted = np.asarray(whole.resize((small, small), Image.Resampling.BICUBIC)).clip(0, 1)
        piece = around[0, channel, top : bottom + 1, left : right + 1].numpy()
        # torch's kernel has a = -0.5 with antialiasing, as Pillow's
        np.testing.assert_allclose(piece, wanted, atol=1e-5)
    assert torch.equal(around[..., : top + 1, left], around[..., top : top + 1, left].expand(-1, -1, top + 1))


def test_hidden_tokens_are_grey() -> None:
    image = torch.zeros(1, 3, 4, 4)
    hidden = torch.tensor([[True, False, False, True]])
    grey = hide_tokens(image, hidden)[0]
    wanted = F.interpolate(hidden.view(1, 1, 2, 2).float(), scale_factor=2)[0] * 0.5
    assert torch.equal(grey, wanted.expand(3, -1, -1))


# Editing


OPTIONS: list[dict[str, Any]] = [
    {},
    {"order": "halton", "top_k": 7},
    {"guidance_scale": 2.0, "final_temperature": 0.5},
    {"order": "halton", "schedule": "constant", "guidance_scale": 1.0, "top_p": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_known_tokens_stay_and_no_batch_matters(options: dict[str, Any], model: MAGE) -> None:
    images, mask, config = pictures(16), masks(16), SamplerConfig(steps=3, **options)
    labels = torch.arange(16) % 5 if options.get("guidance_scale") else None
    whole = edit(model, images, mask, labels_B=labels, config=config, seed=5)
    assert torch.equal(whole.is_edited_BL, token_mask(mask, 4))
    assert not whole.is_edited_BL[0].any()
    assert whole.is_edited_BL[1].all()
    ids = model.tokenize(images)
    assert len(ids.unique()) > 5, "a test of ids that differ"
    assert torch.equal(whole.ids_BL[~whole.is_edited_BL], ids[~whole.is_edited_BL])
    assert (whole.ids_BL[whole.is_edited_BL] != ids[whole.is_edited_BL]).float().mean() > 0.5
    start = ids.masked_fill(token_mask(mask, 4), model.config.mask_token_id)
    assert torch.equal(
        whole.ids_BL, generate_ids(model, ids_BL=start, labels_B=labels, config=config, seed=5)
    )
    alone = edit(model, images, mask, labels_B=labels, config=config, seed=5, batch_size=1)
    assert torch.equal(alone.ids_BL, whole.ids_BL)
    torch.testing.assert_close(alone.images_B3HW, whole.images_B3HW)
    other = edit(model, images, mask, labels_B=labels, config=config, seed=6)
    assert not torch.equal(other.ids_BL, whole.ids_BL)
    assert model.tokenizer is not None
    assert torch.equal(whole.images_B3HW, model.tokenizer.decode(whole.ids_BL))


def test_in_single_precision_a_batch_changes_no_known_token(model: MAGE) -> None:
    """Ids may differ where rounding decides; here it decides nowhere."""
    single = MAGE(MAGEConfig.tiny())
    single.load_state_dict(model.state_dict())
    images, mask = pictures(16).float(), masks(16)
    for options in OPTIONS[::3]:
        config = SamplerConfig(steps=3, **options)
        labels = torch.arange(16) % 5
        whole, alone = (
            edit(single, images, mask, labels_B=labels, config=config, seed=5, batch_size=size)
            for size in (16, 1)
        )
        assert torch.equal(whole.ids_BL, alone.ids_BL)
        assert torch.equal(whole.ids_BL[0], single.tokenize(images)[0])


def test_labels_decide_what_is_painted(model: MAGE) -> None:
    images, mask = pictures(4), masks(4)
    one, other = (
        edit(model, images, mask, labels_B=torch.full((4,), label), config=FAST, seed=0) for label in (0, 3)
    )
    assert not torch.equal(one.ids_BL, other.ids_BL)
    assert torch.equal(one.ids_BL[0], other.ids_BL[0]), "nothing is masked there"


def test_the_global_seed_governs_by_default(model: MAGE) -> None:
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(edit(model, pictures(3), masks(3), config=FAST).ids_BL)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# Reconstruction


@pytest.mark.parametrize("ratio", [0.0, 0.75, 1.0])
def test_hidden_tokens_are_completed(ratio: float, model: MAGE) -> None:
    images = pictures(5)
    whole = reconstruct(model, images, ratio=ratio, tries=2, config=FAST, seed=2)
    assert whole.is_masked_BL.sum(1).tolist() == [round(16 * ratio)] * 5
    assert whole.images_TB3HW.shape == (2, 5, 3, SIDE, SIDE)
    ids = model.tokenize(images)
    for t, found in enumerate(whole.ids_TBL):
        start = ids.masked_fill(whole.is_masked_BL, model.config.mask_token_id)
        assert torch.equal(found, generate_ids(model, ids_BL=start, config=FAST, seed=2 + t))
        assert torch.equal(found[~whole.is_masked_BL], ids[~whole.is_masked_BL])
    if 0 < ratio < 1:
        assert len(whole.is_masked_BL.unique(dim=0)) == 5, "each image has tokens of its own hidden"
    parts = reconstruct(model, images, ratio=ratio, tries=2, config=FAST, seed=2, batch_size=1)
    assert torch.equal(parts.ids_TBL, whole.ids_TBL)
    torch.testing.assert_close(parts.images_TB3HW, whole.images_TB3HW)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mask_BHW": torch.zeros(2, 16, 8, dtype=torch.bool)},
            r"mask has shape \(2, 16, 8\), wanted \(2, 16, 16\)",
        ),
        ({"mask_BHW": torch.zeros(2, 16, 16)}, "token_mask: mask is float32, wanted bool"),
        ({"images_B3HW": torch.zeros(2, 16, 16)}, r"edit: images has shape \(2, 16, 16\)"),
        ({"images_B3HW": torch.zeros(2, 3, 16, 16).byte()}, "edit: images is uint8, wanted"),
        ({"images_B3HW": torch.zeros(0, 3, 16, 16)}, "edit: number of images is 0, wanted at least 1"),
        (
            {"images_B3HW": torch.zeros(2, 3, 32, 32), "mask_BHW": torch.zeros(2, 32, 32).bool()},
            "wanted .B, 3, 16, 16",
        ),
        ({"labels_B": torch.tensor([1])}, r"labels has shape \(1,\), wanted \(2,\)"),
        ({"labels_B": torch.tensor([1, 99])}, "labels holds 99, wanted 0 <= labels"),
        ({"images_B3HW": pictures(2) * 255}, r"edit: images hold values from .* to 25\d.*, wanted about"),
        ({"images_B3HW": torch.full((2, 3, 16, 16), math.nan)}, "edit: images hold values from nan to nan"),
        ({"grow": -1}, "token_mask: grow is -1, wanted 0 or more"),
        ({"batch_size": 0}, "edit: batch_size is 0, wanted at least 1"),
    ],
)
def test_bad_edits_are_named(change: dict[str, Any], message: str, model: MAGE) -> None:
    given = {"images_B3HW": pictures(2), "mask_BHW": torch.zeros(2, SIDE, SIDE, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=message):
        edit(model, given.pop("images_B3HW"), given.pop("mask_BHW"), **given)


def test_other_bad_input_is_named(model: MAGE) -> None:
    bare = MAGE(MAGEConfig.tiny(tokenizer=None))
    with pytest.raises(ValueError, match="edit: this model has no tokenizer"):
        edit(bare, pictures(1), torch.zeros(1, SIDE, SIDE, dtype=torch.bool))
    for ratio in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"reconstruct: ratio is .*, wanted 0 <= ratio <= 1"):
            reconstruct(model, pictures(1), ratio=ratio)
    with pytest.raises(ValueError, match="reconstruct: tries is 0"):
        reconstruct(model, pictures(1), tries=0)
    with pytest.raises(ValueError, match="mask has 10 x 16 pixels, wanted a multiple of the 4 tokens"):
        token_mask(torch.zeros(1, 16, 10, dtype=torch.bool), 4)
    for box in ((0, 0, 17, 4), (3, 3, 3, 9), (-1, 0, 4, 4), (9, 0, 2, 4)):
        with pytest.raises(ValueError, match="wanted 0 <= left < right <= 16"):
            box_mask((16, 16), box)
    for border in ((0, 0, 0, 0), (8, 0, 8, 0), (-1, 0, 2, 0)):
        with pytest.raises(ValueError, match="border_mask: the border"):
            border_mask((16, 16), border)
    for scale, anchor in ((0.0, (0, 0)), (1.0, (0, 0)), (0.5, (2, 0)), (math.nan, (0, 0))):
        with pytest.raises(ValueError, match="wanted 0 < scale < 1 and anchors in"):
            shrink(torch.zeros(1, 3, 16, 16), 4, scale, anchor)
