"""Scores of a tokenizer's reconstructions: rFID, PSNR, SSIM, LPIPS."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.evaluation.scores import Score, fid_score
from mage_fast.evaluation.statistics import Accumulator, Extract
from mage_fast.optional import optional
from mage_fast.tokenizer import Tokenizer
from mage_fast.training.metrics import psnr_db, to_uint8

#: Side of SSIM's Gaussian window.
SSIM_WINDOW = 11
#: Pairs of images that are returned to be looked at.
PAIRS = 16


@torch.no_grad()
def score_reconstructions(
    tokenizer: Tokenizer,
    batches: Iterable[Float[Tensor, "B 3 H W"]],
    *,
    extract: Extract | None = None,
    lpips: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[list[Score], int, Float[Tensor, "2 pairs 3 H W"]]:
    """Images against their round trip through the tokenizer.

    PSNR, SSIM and LPIPS are means over images of float reconstructions clamped to [0, 1]; rFID is the FID of
    reconstructions as PNG files would hold them (truncated) against the images.

    Args:
        tokenizer: on ``device``.
        batches: images in [0, 1], each a multiple of 1/255.
        extract: rFID's features, see :data:`~mage_fast.evaluation.Extract`; None: no rFID.
        lpips: compute LPIPS (VGG); the first time its weights are fetched.
        device: of the computations.

    Returns:
        The scores, the number of images, and the first pairs: originals and reconstructions in [0, 1].

    Raises:
        InputError: no images; a package is missing, or LPIPS' weights cannot be fetched.
    """
    ssim = optional("torchmetrics.functional.image", extra="evaluate").structural_similarity_index_measure
    distance = load_lpips(device) if lpips else None
    before, after = (Accumulator(extract, device, keep=0) if extract else None for _ in range(2))
    decibels, count = 0.0, 0
    similarities: list[Tensor] = []
    shown: list[Tensor] = []
    for images_B3HW in batches:
        originals = images_B3HW.to(device)
        decoded = tokenizer.decode(tokenizer.encode(originals)).float().clamp(0, 1)
        decibels += psnr_db(decoded, originals) * len(originals)
        if min(originals.shape[2:]) >= SSIM_WINDOW:
            similarities.append(
                ssim(decoded, originals, data_range=1.0, reduction="none").reshape(len(originals)).cpu()
            )
        if distance is not None:
            distance.update(decoded, originals)
        if before is not None and after is not None:
            before.update((originals * 255).round().to(torch.uint8))
            after.update(to_uint8(decoded))
        if count < PAIRS:
            shown.append(torch.stack([originals, decoded])[:, : PAIRS - count].cpu())
        count += len(originals)
    if not count:
        raise InputError("score_reconstructions: there are no images")
    mean = f"mean of {count:,} images"
    if math.isfinite(decibels):
        scores = [Score("psnr_db", decibels / count, f"{mean}, clamped to [0, 1], not quantised")]
    else:  # as of a white image whose reconstruction is clamped; JSON has no infinity
        scores = [Score("psnr_db", None, "infinite: an image and its reconstruction are equal")]
    if similarities:
        value = torch.cat(similarities).double().mean().item()
        scores.append(Score("ssim", value, f"{mean}, Gaussian window of {SSIM_WINDOW} (sigma 1.5), RGB"))
    else:
        scores.append(Score("ssim", None, f"not computed: images are smaller than its window, {SSIM_WINDOW}"))
    if distance is not None:
        scores.append(Score("lpips", float(distance.compute()), f"{mean}, VGG"))
    else:
        scores.append(Score("lpips", None, "not computed: not asked for (--lpips)"))
    if before is not None and after is not None:
        scores.append(fid_score("rfid", after.result(), before.result()))
    else:
        scores.append(Score("rfid", None, "not computed: no features were asked for"))
    return scores, count, torch.cat(shown, 1)


def load_lpips(device: torch.device | str = "cpu") -> Any:
    """torchmetrics' LPIPS of images in [0, 1], with VGG.

    Raises:
        InputError: torchmetrics or torchvision is missing, or VGG's weights cannot be fetched.
    """
    module = optional("torchmetrics.image.lpip", extra="evaluate")
    try:
        return module.LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True).to(device)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"lpips: torchvision's VGG16 weights cannot be fetched ({error}): put vgg16-397923af.pth into "
            f"{torch.hub.get_dir()}/checkpoints, or leave --lpips out"
        ) from error
