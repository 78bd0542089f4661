"""Generation: from no token, or some, to images in a few steps of iterative decoding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from mage_fast.decoding import Decoding
from mage_fast.kernels import check, rng
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig


def generate_ids(
    model: MAGE,
    batch: int | None = None,
    *,
    ids_BL: Int[Tensor, "B L"] | None = None,
    labels_B: Int[Tensor, "B"] | None = None,
    config: SamplerConfig | None = None,
    seed: int | None = None,
    first_sample: int = 0,
) -> Int64[Tensor, "B L"]:
    """Decode one batch of token ids.

    Args:
        model: any :class:`MAGE`, also one without a tokenizer; it decodes in eval mode.
        batch: how many images; unused where ``ids_BL`` is given.
        ids_BL: start, with ``model.config.mask_token_id`` at the tokens to sample (inpainting); the others
            stay. All tokens are sampled by default.
        labels_B: as in :func:`generate`, and so the rest.
        config: settings.
        seed: of the noise.
        first_sample: index of sample 0 in the whole run.

    Raises:
        ValueError: ids of another shape, or (read on the CPU only) neither codes nor [M]; labels that do
            not fit; a wrong count.
    """
    decode = Decoding(model, config)
    return decode(batch, ids_BL=ids_BL, labels_B=labels_B, seed=seed, first_sample=first_sample)


def generate_batches(
    model: MAGE,
    num_images: int,
    *,
    labels_B: Int[Tensor, "num_images"] | None = None,
    config: SamplerConfig | None = None,
    seed: int | None = None,
    batch_size: int = 64,
) -> Iterator[Float[Tensor, "B 3 H W"]]:
    """As :func:`generate`, a batch at a time: images need never all be in memory."""
    if model.tokenizer is None:
        raise ValueError("generate: this model has no tokenizer to decode ids; use generate_ids")
    if batch_size < 1:
        raise ValueError(f"generate: batch_size is {batch_size}, wanted at least 1")
    if num_images < 1:
        raise ValueError(f"generate: number of images is {num_images}, wanted at least 1")
    if labels_B is not None:
        check.shape("generate", "labels", labels_B, (num_images,))
    seed = int(rng.new_state()[0]) if seed is None else seed
    decode = Decoding(model, config)
    for first in range(0, num_images, batch_size):
        count = min(batch_size, num_images - first)
        labels = None if labels_B is None else labels_B[first : first + count]
        ids_BL = decode(count, labels_B=labels, seed=seed, first_sample=first)
        with torch.no_grad():
            yield model.tokenizer.decode(ids_BL)


def generate(
    model: MAGE,
    num_images: int,
    *,
    labels_B: Int[Tensor, "num_images"] | None = None,
    config: SamplerConfig | None = None,
    seed: int | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "num_images 3 H W"]:
    """Generate images by iterative decoding.

    Args:
        model: any :class:`MAGE` with a tokenizer.
        num_images: how many.
        labels_B: class labels; unconditional by default.
        config: steps, temperatures, schedule, guidance; the published defaults otherwise.
        seed: the same seed gives the same images whatever the batch size; drawn from torch's global
            generator by default.
        batch_size: images decoded at a time.

    Returns:
        RGB images, about [0, 1], not clamped.

    Raises:
        ValueError: no tokenizer, a label outside the class slots, a wrong count.

    Source: MAGE section 3.2.
    """
    batches = generate_batches(
        model, num_images, labels_B=labels_B, config=config, seed=seed, batch_size=batch_size
    )
    return torch.cat(list(batches))
