"""How to decode: the settings, and what they say of each step before the first one runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

#: Part of the tokens that stays masked at progress r in (0, 1].
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r**2,
    "square_root": lambda r: 1 - math.sqrt(r),
    "arccos": lambda r: math.acos(r) / (math.pi / 2),
}
#: The schedule that is no function of the progress alone: the same number of tokens is decided each step.
CONSTANT = "constant"

GuidanceSchedule = Literal["constant", "linear", "cosine"]
#: Part of the guidance scale at progress r from the first step, 0, to the last, 1.
GUIDANCE_SCHEDULES: dict[GuidanceSchedule, Callable[[float], float]] = {
    "constant": lambda r: 1.0,
    "linear": lambda r: r,
    "cosine": lambda r: (1 - math.cos(math.pi * r)) / 2,
}

Order = Literal["confidence", "halton"]
Approximation = Literal["none", "drop_masked", "cached_features"]


@dataclass(frozen=True)
class SamplerConfig:
    """How to decode; the defaults are the published release's."""

    steps: int = 20
    #: Weight of the Gumbel noise on the confidence at the start; falls linearly to 0 at the last step.
    choice_temperature: float = 6.0
    #: Divides the logits.
    temperature: float = 1.0
    #: The temperature of the last step, to which it goes linearly from the first; None: it is constant.
    final_temperature: float | None = None
    #: Part of the tokens that stays masked: cosine, linear, square, square_root or arccos of the progress.
    #: constant: ceil(tokens / steps) are decided at each step as long as there are some, so the last steps
    #: have few, where linear decides now one more and now one fewer.
    schedule: str = "cosine"
    #: Which tokens are decided first. confidence: the most confident ones, as published. halton: the next
    #: ones of a Halton sequence over the grid, spread evenly; no confidence counts, nor its noise.
    order: Order = "confidence"
    #: Sample among the k most probable ids; 0 is all.
    top_k: int = 0
    #: Sample within the smallest set of ids of this mass; 1 is all.
    top_p: float = 1.0
    #: Classifier-free guidance: weight of conditional minus unconditional logits. 0 is off.
    guidance_scale: float = 0.0
    #: linear and cosine: the weight rises from 0 at the first step, so that samples stay diverse, to
    #: guidance_scale at the last (MUSE, section 2.7).
    guidance_schedule: GuidanceSchedule = "constant"
    #: Faster and not the same numbers, off by default. drop_masked: the encoder of a "paper" model drops
    #: masked tokens as in training, ``drop_ratio`` of all tokens or as many as there are, drawn at each step.
    #: cached_features: at every second step from the third on, it computes only the tokens decided last.
    approximation: Approximation = "none"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"SamplerConfig: steps is {self.steps}, wanted at least 1")
        choices = {
            "schedule": (*SCHEDULES, CONSTANT),
            "order": get_args(Order),
            "approximation": get_args(Approximation),
            "guidance_schedule": get_args(GuidanceSchedule),
        }
        for name, kinds in choices.items():
            if getattr(self, name) not in kinds:
                raise ValueError(
                    f"SamplerConfig: {name} is {getattr(self, name)!r}, wanted one of {', '.join(kinds)}"
                )
        if not math.isfinite(self.guidance_scale):
            raise ValueError(
                f"SamplerConfig: guidance_scale is {self.guidance_scale}, wanted a finite number"
            )
        if not (0 <= self.choice_temperature < math.inf and 0 < self.temperature < math.inf):
            raise ValueError(
                f"SamplerConfig: (choice_temperature, temperature) is "
                f"{(self.choice_temperature, self.temperature)}, wanted finite numbers, 0 or more and more "
                "than 0"
            )
        if self.final_temperature is not None and not 0 < self.final_temperature < math.inf:
            raise ValueError(
                f"SamplerConfig: final_temperature is {self.final_temperature}, wanted a finite number more "
                "than 0, or None"
            )
        if self.top_k < 0 or not 0.0 < self.top_p <= 1.0:
            raise ValueError(
                f"SamplerConfig: (top_k, top_p) is {(self.top_k, self.top_p)}, wanted top_k >= 0 and "
                "0 < top_p <= 1"
            )

    def guidance_at(self, step: int) -> float:
        """Weight of conditional minus unconditional logits at a step, from 0; an only step has all of it."""
        return self.guidance_scale * GUIDANCE_SCHEDULES[self.guidance_schedule](self._progress(step))

    def temperature_at(self, step: int) -> float:
        """What divides the logits at a step, from 0; an only step has the final one."""
        if self.final_temperature is None:
            return self.temperature
        progress = self._progress(step)
        return (1 - progress) * self.temperature + progress * self.final_temperature

    def choice_temperature_at(self, step: int) -> float:
        """Weight of the noise on the confidence at a step, from 0; the last step has none."""
        return self.choice_temperature * (1 - (step + 1) / self.steps)

    def _progress(self, step: int) -> float:
        """From the first step, 0, to the last, 1."""
        return step / (self.steps - 1) if self.steps > 1 else 1.0


def masked_counts(schedule: str, steps: int, num_unknown_B: Int[Tensor, "B"]) -> Int64[Tensor, "steps B"]:
    """How many tokens stay masked after each step: floor(unknown * schedule((t + 1) / steps)).

    "constant" has unknown - (t + 1) * ceil(unknown / steps) in its place. A sample with unknown tokens keeps
    at least one masked and decides at least one a step, as long as it can. Each sample has its own counts
    (in inpainting samples differ).
    """
    counts = []
    left_B = num_unknown_B = num_unknown_B.to(torch.int64)
    for t in range(steps):
        if schedule == CONSTANT:
            wanted_B = num_unknown_B + (t + 1) * (-num_unknown_B).div(steps, rounding_mode="floor")
        else:
            part = max(0.0, SCHEDULES[schedule]((t + 1) / steps))
            wanted_B = (num_unknown_B.double() * part).floor().to(torch.int64)
        left_B = torch.where(num_unknown_B > 0, wanted_B.minimum(left_B - 1).clamp(min=1), 0)
        counts.append(left_B)
    return torch.stack(counts)


@lru_cache(maxsize=8)
def halton_order(grid_size: int) -> Int64[Tensor, "L"]:
    """Places of a square grid's tokens in the order in which the points of a Halton sequence first meet them.

    Points of bases 2 (rows) and 3 (columns), from (0, 0); a point in a token met before is passed over.

    Source: Besnier et al. 2025, "Halton scheduler for masked generative image transformers".
    """
    # 2^a 3^b successive points lie one in each cell of a 2^a x 3^b grid: in every token, where that is finer
    count = math.prod(base ** math.ceil(math.log(2 * grid_size, base)) for base in (2, 3))
    rows_N, columns_N = (_radical_inverse(count, base, grid_size) for base in (2, 3))
    first: dict[int, None] = dict.fromkeys((rows_N * grid_size + columns_N).tolist())
    return torch.tensor(list(first))


def _radical_inverse(count: int, base: int, cells: int) -> Int64[Tensor, "count"]:
    """Which of ``cells`` parts of [0, 1) holds the mirrored digits of each number below ``count``; exact."""
    number_N, mirrored_N, whole = torch.arange(count), torch.zeros(count, dtype=torch.int64), 1
    while whole < count:
        mirrored_N = mirrored_N * base + number_N % base
        number_N, whole = number_N // base, whole * base
    return mirrored_N * cells // whole


def last_in_order(is_unknown_BL: Bool[Tensor, "B L"], order_L: Int64[Tensor, "L"]) -> Int64[Tensor, "B L"]:
    """1 for the unknown token of each sample that an order has last, 2 for the one before; known ones L + 1.

    With n tokens still to be masked, those of values up to n are.
    """
    unknown_BL = is_unknown_BL[:, order_L]
    place_BL = unknown_BL.flip(1).cumsum(1).flip(1).masked_fill(~unknown_BL, len(order_L) + 1)
    return torch.empty_like(place_BL).index_copy_(1, order_L, place_BL)
