"""A whole training step, ours beside the reference's: forward, backward, clipping, AdamW.

Both models have the same weights and see the same ids; each draws masks and dropout as it does in training.
The baseline is the reference model, eager, in float32 with torch's default AdamW, which is what the published
release computes. Before anything is timed, loss and gradients without dropout are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mage_fast import checkpoint, reference
from mage_fast.benchmark.gate import Incorrect
from mage_fast.benchmark.records import REFERENCE_NAME
from mage_fast.benchmark.timing import Run, Timing, interleaved
from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from mage_fast.kernels.roofline import Device, Work
from mage_fast.masking import draw_plan
from mage_fast.model import MAGE
from mage_fast.training.optim import adamw_parameter_groups, build_adamw
from mage_fast.training.precision import Precision
from mage_fast.training.step import TrainStep

OURS = "mage_fast"
#: Images a step, by device type.
BATCH = {"cuda": 128, "cpu": 4}
#: Allowed distance of all gradients from the reference's, relative to their length.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
_LR, _MAX_NORM = 1e-4, 3.0


@dataclass(frozen=True)
class Step:
    """One model size, training from given tokens."""

    model: str
    config: MAGEConfig
    batch: int
    device: str

    @property
    def name(self) -> str:
        return f"{self.model}/tokens-given"

    @property
    def work(self) -> Work:
        """The matrix products that a step needs, forward and backward; what moves besides is not counted."""
        c, positions = self.config, self.config.num_tokens + 1
        masked = round(c.num_tokens * 0.694)  # on average, by the law of the mask ratio
        kept = positions - round(c.num_tokens * c.drop_ratio)

        def block(width: int, rows: int) -> float:
            # qkv, proj and the two layers of the MLP; scores and their product with the values
            return 2 * rows * width**2 * (4 + 2 * c.mlp_ratio) + 4 * rows**2 * width

        flops = c.encoder_depth * block(c.encoder_width, kept)
        flops += c.decoder_depth * block(c.decoder_width, positions)
        flops += 2 * kept * c.encoder_width * c.decoder_width
        flops += 2 * masked * c.encoder_width * (c.decoder_width + c.codebook_size)
        return Work(0, 0, round(3 * self.batch * flops), matrix=True)

    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.config.num_tokens)
        return torch.randint(self.config.codebook_size, shape, generator=generator).to(self.device)

    def models(self, config: MAGEConfig) -> tuple[MAGE, reference.MAGE]:
        """Ours and the reference's, with the same weights, in training mode."""
        torch.manual_seed(0)
        ours = MAGE(config).to(self.device).train()
        theirs = reference.MAGE.from_config(config)
        theirs.load_state_dict(checkpoint.to_published(ours.state_dict(), config))
        return ours, theirs.to(self.device).train()


def steps(device: str, *, smoke: bool = False) -> list[Step]:
    """What is timed on the device."""
    if smoke:
        return [Step("tiny", MAGEConfig.tiny(tokenizer=None), 2, device)]
    return [Step("vit_b", MAGEConfig.vit_b(tokenizer=None), BATCH[device], device)]


def measure(step: Step, limits: Device, seconds: float) -> list[dict[str, Any]]:
    """The records of one step: the reference in float32, ours in float32 and bfloat16.

    Raises:
        Incorrect: loss or gradients are not the reference's.
    """
    for dtype in TOLERANCE:
        check(step, dtype)
    ours, theirs = step.models(step.config)
    runs = {REFERENCE_NAME: _reference_step(theirs, step.ids())}
    runs |= {f"{OURS} {dtype}": our_step(ours, step.ids(), dtype) for dtype in TOLERANCE}
    timings = interleaved(runs, step.device, seconds)
    baseline = timings[REFERENCE_NAME]
    return [
        _record(step, REFERENCE_NAME, torch.float32, baseline, baseline, limits),
        *(_record(step, OURS, dtype, timings[f"{OURS} {dtype}"], baseline, limits) for dtype in TOLERANCE),
    ]


def _record(
    step: Step, name: str, dtype: torch.dtype, timing: Timing, baseline: Timing, limits: Device
) -> dict[str, Any]:
    floor_ms = 1e3 * limits.floor_seconds(step.work, dtype)
    return {
        "suite": "train",
        "name": step.name,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": {"batch": step.batch, "dropout": step.config.dropout},
        "implementation": name,
        "baseline": REFERENCE_NAME,
        "median_ms": timing.median_ms,
        "baseline_median_ms": baseline.median_ms,
        "ratio": baseline.median_ms / timing.median_ms,
        "floor_ms": floor_ms,
        "percent_of_floor": 100 * floor_ms / timing.median_ms,
        "peak_mib": timing.peak_mib,
        "correct": True,
        "rounds": len(timing.samples_ms),
    }


def our_step(model: MAGE, ids_BL: Tensor, dtype: torch.dtype) -> Run:
    """Our step; in bfloat16 under autocast, parameters and optimizer in float32."""
    precision: Precision = "fp32" if dtype is torch.float32 else "bf16"
    step = TrainStep(model, build_adamw(model, _LR), clip_norm=_MAX_NORM, precision=precision)
    return lambda: step(ids_BL)


def _reference_step(model: reference.MAGE, ids_BL: Tensor) -> Run:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adamw_parameter_groups(model), lr=_LR, betas=(0.9, 0.95))

    def run() -> None:
        model(ids_BL).loss.backward()
        nn.utils.clip_grad_norm_(parameters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return run


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


def check(step: Step, dtype: torch.dtype) -> None:
    """Loss and gradients without dropout, for the same masks.

    Raises:
        Incorrect: they are farther from the reference's than ``TOLERANCE``.
    """
    config = replace(step.config, dropout=0.0)
    ours, theirs = step.models(config)
    ids_BL = step.ids()
    plan = draw_plan(config, torch.full((step.batch,), 0.7), rng.new_state(1, device=step.device))
    dropped_BS = torch.ones(plan.source_BS.shape, dtype=torch.bool, device=step.device).flatten()
    dropped_BS[plan.positions_T.long()] = False
    drop_mask_BL = dropped_BS.view_as(plan.source_BS)[:, 1:]

    def differentiated(model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, dict[str, Tensor]]:
        with _autocast(ids_BL.device, dtype if model is ours else torch.float32):
            value = loss()
        value.backward()
        zero = torch.zeros((), device=step.device)
        state = model.state_dict(keep_vars=True).items()
        return value.item(), {n: zero.expand_as(p) if p.grad is None else p.grad for n, p in state}

    got, grads = differentiated(ours, lambda: ours(ids_BL, plan=plan).loss)
    wanted, wanted_grads = differentiated(
        theirs, lambda: theirs(ids_BL, drop_mask=drop_mask_BL, mask=plan.is_masked_BL).loss
    )
    grads = checkpoint.to_published(grads, config)
    learned = [name for name, p in theirs.named_parameters() if p.requires_grad]
    off = sum(float((grads[name] - wanted_grads[name]).square().sum()) for name in learned)
    length = sum(float(wanted_grads[name].square().sum()) for name in learned)
    distance, allowed = (off / length) ** 0.5, TOLERANCE[dtype]
    if not (distance <= allowed and abs(got - wanted) <= allowed * abs(wanted)):  # NaN too
        raise Incorrect(
            f"{step.name}, {dtype}: loss {got:.6g}, the reference's {wanted:.6g}; gradients are off by "
            f"{distance:.2g} of their length, allowed {allowed:.2g}"
        )
