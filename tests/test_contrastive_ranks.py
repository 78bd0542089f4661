"""MAGE-C on two and three processes against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mage_fast import info_nce
from mage_fast.contrastive import MAGEC
from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, plan_of_mask
from mage_fast.masking import draw_plan
from mage_fast.training.distributed import Processes
from tests.contrastive_oracle import TEMPERATURE, WEIGHT, model
from tests.models import draw_ids, masks
from tests.ranks import in_ranks

#: Images a rank, features of a bare call.
IMAGES, WIDTH = 2, 5
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5}
MODES = ("paper", "unmasked")


def features(rank: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    both = torch.randn(2, IMAGES, WIDTH, dtype=torch.float64, generator=generator)
    return [x.to(dtype).requires_grad_() for x in both]


def batch(rank: int, ours: MAGEC) -> tuple[Tensor, MaskPlan]:
    """Each rank has its own views and masks; the ranks' numbers of masked tokens differ."""
    ratios = torch.linspace(0.5, 1.0, 2 * IMAGES).roll(rank) ** (1 + rank)
    plan = draw_plan(ours.config, ratios.clamp(min=0.5), rng.new_state(5, rank))
    return draw_ids(ours.config, 2 * IMAGES, seed=rank), plan


def first_then_second(parts: list[Tensor]) -> Tensor:
    """The ranks' samples as one process has them: all first views, then all second views."""
    views = [part.chunk(2) for part in parts]
    return torch.cat([view for number in range(2) for view in [v[number] for v in views]])


def work(processes: Processes) -> dict[str, list[Tensor]]:
    """What one rank finds: losses, and gradients with respect to its features or as DDP averages them."""
    rank, ranks = processes.rank, processes.count
    found: dict[str, list[Tensor]] = {}
    for dtype in DTYPES:
        for name, function in (
            ("bare", info_nce),
            ("compiled", torch.compile(info_nce, fullgraph=True, backend="aot_eager")),
        ):
            z, positive = features(rank, dtype)
            loss = function(z, positive, temperature=TEMPERATURE)
            found[f"{name} {dtype}"] = [loss.detach(), *torch.autograd.grad(loss, (z, positive))]
        for mode in MODES:
            ours = model(encoder_tokens=mode).to(dtype).train()
            ids, plan = batch(rank, ours)
            parallel = DistributedDataParallel(ours)
            for _ in range(2):  # the second step has other buckets
                ours.zero_grad()
                output = parallel(ids, plan=plan)
                output.loss.backward()
            grads = [x.grad for x in ours.parameters() if x.grad is not None]
            found[f"{mode} {dtype}"] = [*output.metrics.values(), *grads]
    # a group of its own for all ranks but the last
    groups = [dist.new_group(list(range(ranks - 1))), dist.new_group([ranks - 1])]
    group = groups[rank == ranks - 1]
    z, positive = features(rank, torch.float64)
    loss = info_nce(z, positive, temperature=TEMPERATURE, group=group)
    found["group"] = [loss.detach(), *torch.autograd.grad(loss, (z, positive))]
    return found


def bare(ranks: list[int], dtype: torch.dtype) -> list[Tensor]:
    """One process: the loss of all rows, and the gradients times the number of ranks, as none is averaged."""
    parts = [features(rank, torch.float64) for rank in ranks]
    loss = info_nce(*(torch.cat(view) for view in zip(*parts, strict=True)), temperature=TEMPERATURE)
    grads = torch.autograd.grad(loss * len(ranks), [x for part in parts for x in part])
    return [loss.detach().to(dtype), *(x.to(dtype) for x in grads)]


def whole(ranks: int, mode: str, dtype: torch.dtype) -> list[Tensor]:
    """One process: the mean of the ranks' reconstruction losses, and InfoNCE of all samples."""
    ours = model(encoder_tokens=mode).to(dtype).train()
    batches = [batch(rank, ours) for rank in range(ranks)]
    assert len({plan.is_masked_BL.sum().item() for _, plan in batches}) == ranks
    reconstructions = torch.stack([ours(ids, plan=plan).reconstruction_loss for ids, plan in batches])
    dropped, masked = (first_then_second(list(x)) for x in zip(*(masks(p) for _, p in batches), strict=True))
    plan = plan_of_mask(masked, masked.sum(1).tolist(), dropped, dropped.sum(1).tolist())
    contrastive = ours(first_then_second([ids for ids, _ in batches]), plan=plan).contrastive_loss
    loss = reconstructions.mean() + WEIGHT * contrastive
    loss.backward()
    grads = [x.grad for x in ours.parameters() if x.grad is not None]
    return [loss.detach(), reconstructions.mean().detach(), contrastive.detach(), *grads]


def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float, name: str) -> None:
    assert len(got) == len(wanted)
    # the keys' bias has no gradient but rounding
    floor = 1e-3 * max(x.abs().max().item() for x in wanted)
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype, name
        assert (x - y).abs().max() <= tolerance * max(y.abs().max().item(), floor), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    found = in_ranks(ranks, tmp_path / "meeting", work)
    for dtype, tolerance in DTYPES.items():
        for name in ("bare", "compiled"):
            results = [x[f"{name} {dtype}"] for x in found]
            mean = torch.stack([x[0] for x in results]).mean()
            grads = [grad for x in results for grad in x[1:]]
            assert_same([mean, *grads], bare(list(range(ranks)), dtype), tolerance, name)
        for mode in MODES:
            wanted, results = whole(ranks, mode, dtype), [x[f"{mode} {dtype}"] for x in found]
            means = [torch.stack(x).mean() for x in zip(*(x[:3] for x in results), strict=True)]
            for result in results:
                assert_same([*means, *result[3:]], wanted, tolerance, f"{mode} {dtype}")
    results = [x["group"] for x in found]
    mean = torch.stack([x[0] for x in results[:-1]]).mean()
    grads = [grad for x in results[:-1] for grad in x[1:]]
    assert_same([mean, *grads], bare(list(range(ranks - 1)), torch.float64), 1e-11, "group")
    assert_same(results[-1], bare([ranks - 1], torch.float64), 1e-11, "alone")
