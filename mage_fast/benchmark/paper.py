"""Whole steps on paper: what a data sheet allows, for the mathematics, our kernels and the release's.

Three bounds from below of an item, none of them measured:

* ``ideal``: the matrix products that the results need at the tensor cores' peak, or the weights and optimizer
  state at the memory's bandwidth, whichever takes longer;
* ``kernels``: the sum over our kernels as they are cut, each with its own bytes and operations, so each
  intermediate result goes through memory once;
* ``release``: the same sum over the calls of the reference path in eager PyTorch (:mod:`.eager`).

The ratio of the last two says how much faster ours can be where both run at their bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mage_fast import counts
from mage_fast.benchmark import eager, tokenization
from mage_fast.benchmark.end_to_end import models
from mage_fast.benchmark.generation import STEPS, Generation
from mage_fast.benchmark.tokenization import Tokenization
from mage_fast.benchmark.training import Training
from mage_fast.config import MAGEConfig
from mage_fast.kernels.ops.add_norm.specs import Spec as AddNorm
from mage_fast.kernels.ops.attention.specs import Spec as Attention
from mage_fast.kernels.ops.bias_gelu.specs import Spec as BiasGelu
from mage_fast.kernels.ops.embed_kept.specs import Spec as EmbedKept
from mage_fast.kernels.ops.linear_cross_entropy.specs import Spec as LinearCrossEntropy
from mage_fast.kernels.ops.mask_plan.specs import Spec as MaskPlan
from mage_fast.kernels.ops.pad_decoder.specs import Spec as PadDecoder
from mage_fast.kernels.ops.sample_confident.specs import Spec as SampleConfident
from mage_fast.kernels.roofline import Device, Work

_HALF = torch.bfloat16
#: Bytes of a parameter in float32 that a step moves beside its products: the gradient's norm (4), a fused
#: AdamW (28), the copy in bfloat16 (6).
_OPTIMIZER_BYTES = 38
#: Batches that floors are given for: of a training step, of a generation.
TRAINED, GENERATED = (128,), (64, 1)
#: Goals: times the release's speed by suite, part of the peak, milliseconds of one image.
SPEED_UP, MFU_PERCENT, LATENCY_MS = {"train": 5.0, "generate": 10.0}, 50.0, 25.0


@dataclass(frozen=True)
class Floor:
    """Bounds of an item, in seconds a step."""

    suite: str
    name: str
    batch: int
    #: Operations an image: that the results need, and that the release executes.
    needed: float
    released: float
    ideal: float
    kernels: float
    release: float

    def mfu_percent(self, device: Device) -> float:
        """Part of the peak that the kernels leave possible."""
        return 100 * self.batch * self.needed / device.peak(_HALF, matrix=True) / self.kernels

    def verdicts(self, device: Device) -> list[str]:
        """Each goal of the item: what is wanted, what the bounds allow."""
        said = []
        if self.suite in SPEED_UP:
            ratio, wanted_ratio = self.release / self.kernels, SPEED_UP[self.suite]
            said.append(("times the release", ratio, wanted_ratio, ratio >= wanted_ratio))
        if self.suite == "train":
            mfu = self.mfu_percent(device)
            said.append(("% MFU", mfu, MFU_PERCENT, mfu >= MFU_PERCENT))
        elif self.suite == "generate" and self.batch == 1:
            ms = 1e3 * self.kernels
            said.append(("ms for one image", ms, LATENCY_MS, ms <= LATENCY_MS))
        return [
            f"{self.suite}/{self.name}: {wanted:g} {what}: {'possible' if met else 'not by these bounds'} "
            f"({allowed:.3g})"
            for what, allowed, wanted, met in said
        ]


def floors(suite: str, device: Device, names: tuple[str, ...] = (), batch: int | None = None) -> list[Floor]:
    """Of training in every way, of generating images, or of the tokenizer."""
    found = []
    known = models(names or ("vit_b", "vit_l"), "cuda", smoke=False)
    if suite == "tokenize":
        return [_tokenization(x, device, known[0].config) for x in tokenization.items(known, batch=batch)]
    for twins in known:
        config = twins.config
        for size in (batch,) if batch else TRAINED if suite == "train" else GENERATED:
            if suite == "generate":
                item = Generation(twins, size)
                found.append(_generation(item, device, config))
            else:
                steps = [Training(twins, recipe, size) for recipe in ("tokens-given", "online", "cached")]
                found += _training(steps, device, config)
    return found


def _training(items: list[Training], device: Device, config: MAGEConfig) -> list[Floor]:
    batch = items[0].batch
    assert config.tokenizer is not None
    kernels = _step(config, batch)
    ours = _seconds(device, kernels)
    plain = eager.training(device, config, batch, online=False).seconds
    tokenized = eager.tokenizer(device, config, batch, "encode").seconds
    tokenized_by_us = eager.tokenizer(device, config, batch, "encode", ours=True).seconds
    encode = counts.tokenizer(config.tokenizer, "encode")
    found = []
    for item in items:
        online = item.recipe == "online"
        found.append(
            Floor(
                *(item.suite, item.name, batch, item.work(_HALF).flops / batch),
                counts.training(config, "release") + (0 if item.recipe == "tokens-given" else encode),
                device.floor_seconds(item.work(_HALF), _HALF),
                ours + (tokenized_by_us if online else 0.0),
                plain + (0.0 if item.recipe == "tokens-given" else tokenized),
            )
        )
    return found


def _tokenization(item: Tokenization, device: Device, config: MAGEConfig) -> Floor:
    flops = item.work(_HALF).flops / item.batch
    return Floor(
        *(item.suite, item.name, item.batch, flops, flops, device.floor_seconds(item.work(_HALF), _HALF)),
        eager.tokenizer(device, config, item.batch, item.direction, ours=True).seconds,
        eager.tokenizer(device, config, item.batch, item.direction).seconds,
    )


def _generation(item: Generation, device: Device, config: MAGEConfig) -> Floor:
    assert config.tokenizer is not None
    ours = item.steps * _seconds(device, _decoding_step(config, item.batch))
    ours += eager.tokenizer(device, config, item.batch, "decode", ours=True).seconds
    released = counts.decoding(config, item.steps, "release") + counts.tokenizer(config.tokenizer, "decode")
    return Floor(
        *(item.suite, item.name, item.batch, item.work(_HALF).flops / item.batch, released),
        device.floor_seconds(item.work(_HALF), _HALF),
        ours,
        eager.generation(device, config, item.batch, STEPS).seconds,
    )


def _seconds(device: Device, kernels: list[Work]) -> float:
    return sum(device.floor_seconds(work, _HALF) for work in kernels)


def product(rows: int, inputs: int, outputs: int, *, learns: bool) -> list[Work]:
    """A linear layer in bfloat16: forward and, where it learns, the gradients of its input and its weight."""
    moved = [2 * x for x in (rows * inputs, inputs * outputs, rows * outputs)]
    flops = 2 * rows * inputs * outputs
    one = [Work(sum(moved) - moved[written], moved[written], flops, matrix=True) for written in (2, 0, 1)]
    return one if learns else one[:1]


def _both(spec: Any, *, learns: bool) -> list[Work]:
    return [spec.work(_HALF, direction) for direction in (("fwd", "bwd") if learns else ("fwd",))]


def _stack(config: MAGEConfig, part: str, batch: int, length: int, *, learns: bool) -> list[Work]:
    """All blocks of the encoder or decoder over sequences of one length."""
    width, heads, depth = (getattr(config, f"{part}_{name}") for name in ("width", "heads", "depth"))
    rows, hidden, dropout = batch * length, int(width * config.mlp_ratio), config.dropout if learns else 0.0
    block = _both(Attention("", (length,) * batch, heads, width // heads, dropout), learns=learns)
    for inputs, outputs in ((width, 3 * width), (width, width), (width, hidden), (hidden, width)):
        block += product(rows, inputs, outputs, learns=learns)
    block += 2 * _both(AddNorm("", rows, width, dropout, autocast=True), learns=learns)
    block += _both(BiasGelu("", rows, hidden, dropout, autocast=True), learns=learns)
    return block * depth


def _step(config: MAGEConfig, batch: int) -> list[Work]:
    """Every kernel of our training step from ids."""
    length = config.num_tokens
    dropped, masked = round(length * config.drop_ratio), counts.masked(config)
    plan = MaskPlan("", batch, length, (masked, masked), (dropped, dropped))
    kept, width = length + 1 - dropped, config.decoder_width
    kernels = [plan.work(torch.int32, "fwd")]
    kernels += _both(EmbedKept("", plan, config.vocabulary_size, config.encoder_width), learns=True)
    kernels += _stack(config, "encoder", batch, kept, learns=True)
    kernels += product(batch * kept, config.encoder_width, width, learns=True)
    kernels += _both(PadDecoder("", batch, length, kept - 1, length - masked, width), learns=True)
    kernels += _stack(config, "decoder", batch, length + 1, learns=True)
    rows = batch * masked
    kernels += product(rows, width, config.encoder_width, learns=True)
    kernels += _both(BiasGelu("", rows, config.encoder_width, 0.0, autocast=True), learns=True)
    kernels += _both(LinearCrossEntropy("", rows, config.encoder_width, config.codebook_size), learns=True)
    return [*kernels, Work(_OPTIMIZER_BYTES * counts.parameters(config), 0, 0)]


def _decoding_step(config: MAGEConfig, batch: int) -> list[Work]:
    """Every kernel of a decoding step that computes all positions."""
    length, width = config.num_tokens, config.decoder_width
    kernels = _stack(config, "encoder", batch, length + 1, learns=False)
    kernels += product(batch * (length + 1), config.encoder_width, width, learns=False)
    kernels += _both(PadDecoder("", batch, length, length, length // 2, width), learns=False)
    kernels += _stack(config, "decoder", batch, length + 1, learns=False)
    for inputs, outputs in ((width, config.encoder_width), (config.encoder_width, config.codebook_size)):
        kernels += product(batch * length, inputs, outputs, learns=False)
    return [*kernels, *_both(SampleConfident("", batch, length, config.codebook_size, length), learns=False)]


def table(found: list[Floor], device: Device) -> Table:
    """One line an item."""
    out = Table(title=f"Whole steps on {device.name}, from its data sheet", title_justify="left")
    out.add_column("suite / name")
    columns = (
        "GFLOP an image",
        "release's",
        "ideal ms",
        "kernels ms",
        "release ms",
        "ratio",
        "img/s",
        "MFU %",
    )
    for column in (*columns, "ms an image"):
        out.add_column(column, justify="right", no_wrap=True)
    for floor in found:
        out.add_row(
            f"{floor.suite}/{floor.name}",
            *(f"{floor.needed / 1e9:,.1f}", f"{floor.released / 1e9:,.1f}"),
            *(f"{1e3 * seconds:,.2f}" for seconds in (floor.ideal, floor.kernels, floor.release)),
            *(f"{floor.release / floor.kernels:.2f}", f"{floor.batch / floor.kernels:,.0f}"),
            *(f"{floor.mfu_percent(device):.1f}", f"{1e3 * floor.kernels / floor.batch:.3f}"),
        )
    return out


#: Said below the table.
LEGEND = (
    "GFLOP: that the results need, and that the release executes. ideal: those products, or weights and "
    "optimizer state moved, at the device's peaks. kernels: our kernels one after another, each at its own "
    "bound. release: likewise the calls of the reference in eager PyTorch, training in float16 with the "
    "tokenizer in float32, generating in float32; in truth it takes longer, so ratios may be larger. img/s, "
    "MFU and goals: at 'kernels'."
)


def records(found: list[Floor], device: Device) -> list[dict[str, Any]]:
    """As records: no time, the kernels' bound as the floor, implementation "data-sheet"."""
    return [
        {
            **{"suite": floor.suite, "name": floor.name, "device": device.name, "dtype": "bfloat16"},
            **{"shape": {"batch": floor.batch}, "implementation": "data-sheet"},
            "floor_ms": 1e3 * floor.kernels,
            "note": "; ".join(line.partition(": ")[2] for line in floor.verdicts(device)),
        }
        for floor in found
    ]
