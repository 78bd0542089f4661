"""Image quality: Frechet distance, PSNR; and images as PNG files and grids."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import atomic_path

#: The file that shows all images of a folder, and is none of them.
GRID_NAME = "grid.png"


def frechet_distance(features_a: Float[Tensor, "N D"], features_b: Float[Tensor, "M D"]) -> float:
    """Frechet distance between Gaussians fitted to two sets of features; the FID for Inception features.

    Computed in float64; covariances divide by N - 1.

    Raises:
        InputError: other shapes, fewer than two rows, values that are not finite.

    Source: Heusel et al. 2017, equation 6.
    """
    for name, x in (("features_a", features_a), ("features_b", features_b)):
        if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] != features_a.shape[-1] or not x.isfinite().all():
            raise InputError(
                f"frechet_distance: {name} has shape {tuple(x.shape)}, wanted two or more rows of "
                f"{features_a.shape[-1]} finite features"
            )
    return frechet_distance_of_gaussians(*_mean_and_covariance(features_a), *_mean_and_covariance(features_b))


def frechet_distance_of_gaussians(
    mean_a: Float[Tensor, " D"],
    covariance_a: Float[Tensor, "D D"],
    mean_b: Float[Tensor, " D"],
    covariance_b: Float[Tensor, "D D"],
) -> float:
    """``|ma - mb|^2 + tr(Ca + Cb - 2 (Ca Cb)^(1/2))``, in float64.

    The trace of the root is the sum of the roots of the eigenvalues of ``Ca^(1/2) Cb Ca^(1/2)``, which is
    symmetric and similar to ``Ca Cb``: no root of a non-symmetric matrix, no complex part to throw away.
    """
    mean_a, covariance_a, mean_b, covariance_b = (
        x.detach().double() for x in (mean_a, covariance_a, mean_b, covariance_b)
    )
    values, vectors = torch.linalg.eigh(covariance_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root_a @ covariance_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (
        (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * trace_of_root
    )
    return max(0.0, distance.item())


def _mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    features = features.detach().double()
    return features.mean(0), torch.cov(features.T).reshape(features.shape[1], features.shape[1])


def psnr_db(a: Float[Tensor, "B C H W"], b: Float[Tensor, "B C H W"]) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], mean over the batch; infinite for equal images.

    Equivalent PyTorch: ``(-10 * ((a - b) ** 2).mean((1, 2, 3)).log10()).mean()``. Clamp reconstructions
    to [0, 1] before, as saving them does.

    Raises:
        InputError: shapes that differ, or no batch dimension.
    """
    if a.shape != b.shape or a.ndim < 2 or not a.numel():
        raise InputError(f"psnr_db: a has shape {tuple(a.shape)}, b {tuple(b.shape)}, wanted equal batches")
    squared_error = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * squared_error.log10()).mean().item()


def to_uint8(images: Float[Tensor, "*any"]) -> UInt8[Tensor, "*any"]:
    """``clip(255 x, 0, 255)``, truncated and not rounded, as the published FIDs were computed."""
    return (images.detach().float() * 255).clamp(0, 255).to(torch.uint8).cpu()


def save_png(image: Float[Tensor, "C H W"] | UInt8[Tensor, "C H W"], path: Path | str) -> None:
    """Write one image in [0, 1], RGB or grey, as :func:`to_uint8` has it, or of bytes as it is.

    Raises:
        InputError: not 1 or 3 channels.
        OSError: the file cannot be written; it names the file.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise InputError(f"save_png: image has shape {tuple(image.shape)}, wanted (1 or 3, height, width)")
    levels = image if image.dtype == torch.uint8 else to_uint8(image)
    pixels = levels.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def enlarged(images: Float[Tensor, "N C H W"], zoom: int = 0) -> Float[Tensor, "N C height width"]:
    """Images clamped to [0, 1] and enlarged by whole pixels, ``zoom`` times or until a side is about 64."""
    zoom = zoom or max(1, round(64 / images.shape[-1]))
    return images.clamp(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)


def image_grid(
    images: Float[Tensor, "N C H W"], columns: int, *, gap: int = 2, background: float = 1.0
) -> Float[Tensor, "C height width"]:
    """One image that shows all, row by row, ``gap`` pixels apart; the last row may be incomplete.

    Raises:
        InputError: no images, fewer than one column.
    """
    if images.ndim != 4 or not len(images) or columns < 1:
        raise InputError(
            f"image_grid: images have shape {tuple(images.shape)} and columns is {columns}, wanted "
            "(N, C, H, W) and 1 or more"
        )
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    grid = images.new_full(size, background)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid
