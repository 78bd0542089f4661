"""Frechet distance against closed forms and scipy, PSNR, PNG files and grids."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mage_fast.errors import InputError
from mage_fast.training.metrics import (
    frechet_distance,
    frechet_distance_of_gaussians,
    image_grid,
    psnr_db,
    save_png,
    to_uint8,
)


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 1000))
def test_closed_form_of_commuting_gaussians(size: int, seed: int) -> None:
    """With common eigenvectors the distance is |ma - mb|^2 + sum (sqrt a - sqrt b)^2."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, size, generator=generator, dtype=torch.float64) * 4
    a[0] = 0  # a singular covariance
    mean_a, mean_b = torch.randn(2, size, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    distance = frechet_distance_of_gaussians(
        mean_a, basis @ a.diag() @ basis.T, mean_b, basis @ b.diag() @ basis.T
    )
    wanted = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("rows", "size"), [(500, 16), (5, 12)])
def test_distance_of_features_matches_scipy(rows: int, size: int) -> None:
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    generator = np.random.default_rng(0)
    a = generator.normal(size=(rows, size)) @ generator.normal(size=(size, size))
    b = generator.normal(size=(rows + 3, size)) + 0.5
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm((ca + 1e-12 * np.eye(size)) @ (cb + 1e-12 * np.eye(size)))
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root.real)
    distance = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert distance == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(distance, rel=1e-6)


def test_distance_of_float32_features_is_computed_in_float64() -> None:
    features = torch.randn(200, 4) + 1000
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(features, features + 2) == pytest.approx(16, rel=1e-3)


def test_distance_refusals() -> None:
    good = torch.randn(5, 3)
    for a, b in ((good[:1], good), (good, good[:, :2]), (good[0], good), (good, good * math.nan)):
        with pytest.raises(InputError, match="frechet_distance: features_"):
            frechet_distance(a, b)


def test_psnr() -> None:
    a = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    b = a + torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64).view(3, 1, 1, 1)
    assert psnr_db(a, b) == pytest.approx((20 + 40 + 60) / 3)
    assert psnr_db(a, a) == math.inf
    with pytest.raises(InputError, match="psnr_db"):
        psnr_db(a, b[:2])


def test_png_truncates_and_does_not_round(tmp_path: Path) -> None:
    values = torch.tensor([-1.0, 0.0, 0.9 / 255, 1.999 / 255, 254.999 / 255, 1.0, 7.0])
    wanted = [0, 0, 0, 1, 254, 255, 255]
    assert to_uint8(values).tolist() == wanted
    image = torch.stack([values, values.flip(0), values * 0]).view(3, 1, 7)
    save_png(image, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels[0].tolist() == [[r, g, 0] for r, g in zip(wanted, wanted[::-1], strict=True)]
    save_png(image[:1], tmp_path / "grey.png")
    assert np.asarray(Image.open(tmp_path / "grey.png")).tolist() == [wanted]
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "grey.png"}
    for shape in ((2, 4, 4), (4, 4), (1, 3, 4, 4)):
        with pytest.raises(InputError, match="save_png"):
            save_png(torch.zeros(shape), tmp_path / "b.png")


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 12), columns=st.integers(1, 6), gap=st.integers(0, 3))
def test_grid(count: int, columns: int, gap: int) -> None:
    images = torch.arange(count).view(-1, 1, 1, 1).expand(count, 3, 4, 5).float() / 100
    grid = image_grid(images, columns, gap=gap)
    used = min(columns, count)
    rows = -(-count // used)
    assert grid.shape == (3, rows * (4 + gap) - gap, used * (5 + gap) - gap)
    for index in range(count):
        top, left = index // used * (4 + gap), index % used * (5 + gap)
        assert torch.equal(grid[:, top : top + 4, left : left + 5], images[index])
    assert (grid == 1).sum() == grid.numel() - images.numel()
    for bad in (torch.zeros(0, 3, 4, 4), torch.zeros(3, 4, 4)):
        with pytest.raises(InputError, match="image_grid"):
            image_grid(bad, columns)
