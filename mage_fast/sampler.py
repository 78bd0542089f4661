"""Iterative decoding: from no token, or some, to images in a few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from mage_fast.kernels import check, rng
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.model import MAGE

#: Part of the tokens that stays masked at progress r in (0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "square_root": lambda r: 1 - math.sqrt(r),
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
}


@dataclass(frozen=True)
class SamplerConfig:
    """How to decode; the defaults are the published release's."""

    steps: int = 20
    #: Weight of the Gumbel noise on the confidence at the start; falls linearly to 0.
    choice_temperature: float = 6.0
    #: Divides the logits.
    temperature: float = 1.0
    schedule: str = "cosine"
    #: Sample among the k most probable ids; 0 is all.
    top_k: int = 0
    #: Sample within the smallest set of ids of this mass; 1 is all.
    top_p: float = 1.0
    #: Classifier-free guidance: weight of conditional minus unconditional logits. 0 is off.
    guidance_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"SamplerConfig: steps is {self.steps}, wanted at least 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"SamplerConfig: schedule is {self.schedule!r}, wanted one of {', '.join(SCHEDULES)}"
            )
        if self.choice_temperature < 0 or not self.temperature > 0:
            raise ValueError(
                f"SamplerConfig: (choice_temperature, temperature) is "
                f"{(self.choice_temperature, self.temperature)}, wanted 0 or more and more than 0"
            )
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"SamplerConfig: (top_k, top_p) is {(self.top_k, self.top_p)}, wanted top_k >= 0 and "
                "0 < top_p <= 1"
            )


def masked_counts(schedule: str, steps: int, num_unknown_B: Int[Tensor, "B"]) -> Int64[Tensor, "steps B"]:
    """How many tokens stay masked after each step: floor(unknown * schedule((t + 1) / steps)).

    A sample with unknown tokens keeps at least one masked and decides at least one a step, as long as it
    can. Each sample has its own counts (in inpainting samples differ).
    """
    counts = []
    left_B = num_unknown_B.to(torch.int64)
    for t in range(steps):
        part = max(0.0, SCHEDULES[schedule]((t + 1) / steps))
        wanted_B = (num_unknown_B.double() * part).floor().to(torch.int64)
        left_B = torch.where(num_unknown_B > 0, wanted_B.minimum(left_B - 1).clamp(min=1), 0)
        counts.append(left_B)
    return torch.stack(counts)


@torch.no_grad()
def decode_steps(
    model: MAGE,
    ids_BL: Int[Tensor, "B L"],
    config: SamplerConfig,
    *,
    class_ids_B: Int[Tensor, "B"] | None = None,
    seed: int,
    first_sample: int = 0,
) -> Iterator[Int64[Tensor, "B L"]]:
    """Yield all tokens as decided after each step; the last are the result.

    Args:
        model: in eval mode, or dropout disturbs the samples.
        ids_BL: known ids, and ``mask_token_id`` where unknown. Known ids never change.
        config: the sampler's settings.
        class_ids_B: ids of the first position, unconditional by default.
        seed: with the sample's index, decides all noise.
        first_sample: index of sample 0 in the whole run.
    """
    model_config, device = model.config, ids_BL.device
    if class_ids_B is None:
        class_ids_B = model.class_ids(None, ids_BL.shape[0])
    guided = config.guidance_scale != 0.0
    unconditional_B = model.class_ids(None, ids_BL.shape[0])
    num_unknown_B = (ids_BL == model_config.mask_token_id).sum(1).cpu()
    counts = masked_counts(config.schedule, config.steps, num_unknown_B)
    # on the device at once: no step copies from the host
    device_counts = counts.to(device)
    rng_states = torch.tensor([(seed, t) for t in range(config.steps)], device=device)
    left_B = num_unknown_B
    for t in range(config.steps):
        is_masked_BL = ids_BL == model_config.mask_token_id
        if guided:  # one doubled batch, conditional half first
            logits, guidance = model.logits(
                ids_BL.repeat(2, 1),
                is_masked_BL.repeat(2, 1),
                torch.cat([class_ids_B, unconditional_B]),
                num_masked_B=left_B.repeat(2),
            ).chunk(2)
        else:
            logits, guidance = model.logits(ids_BL, is_masked_BL, class_ids_B, num_masked_B=left_B), None
        sampled_BL, ids_BL = sample_confident(
            logits,
            ids_BL,
            device_counts[t],
            mask_token_id=model_config.mask_token_id,
            choice_temperature=config.choice_temperature * (1 - (t + 1) / config.steps),
            rng_state=rng_states[t],
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            guidance_logits_BLC=guidance,
            guidance_scale=config.guidance_scale,
            first_sample=first_sample,
        )
        left_B = counts[t]
        yield sampled_BL


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
    mask_token_id, length = model.config.mask_token_id, model.config.num_tokens
    device = model.head.bias.device
    if ids_BL is None:
        if batch is None or batch < 1:
            raise ValueError(f"generate: number of images is {batch}, wanted at least 1")
        ids_BL = torch.full((batch, length), mask_token_id, device=device)
    check.shape("generate", "ids", ids_BL, (None, length))
    check.integer("generate", "ids", ids_BL)
    known_BL = ids_BL.masked_fill(ids_BL == mask_token_id, 0)
    check.values("generate", "ids", known_BL, 0, model.config.codebook_size)
    ids_BL = ids_BL.to(device)
    class_ids_B = model.class_ids(labels_B, ids_BL.shape[0])
    seed = int(rng.new_state()[0]) if seed is None else seed
    with _eval_mode(model):
        for sampled_BL in decode_steps(
            model,
            ids_BL,
            config or SamplerConfig(),
            class_ids_B=class_ids_B,
            seed=seed,
            first_sample=first_sample,
        ):
            ids_BL = sampled_BL
    return ids_BL


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode again afterwards (parts of a model may be frozen)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    for first in range(0, num_images, batch_size):
        count = min(batch_size, num_images - first)
        labels = None if labels_B is None else labels_B[first : first + count]
        ids_BL = generate_ids(model, count, labels_B=labels, config=config, seed=seed, first_sample=first)
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
