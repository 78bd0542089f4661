"""One seed, one set of random decisions: every backend's mask plan, dropout and samples, bit by bit.

The decisions are read off the ops' results, on inputs made for that.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mage_fast import ops
from mage_fast.kernels import dispatch, rng
from mage_fast.kernels.rng import Stream

#: Not multiples of a block, of a vector or of a tile.
ROWS, WIDTH, LENGTH, P = 37, 203, 45, 0.3


def mask_plan(device: str, state: Tensor) -> list[Tensor]:
    masked = torch.tensor([45, 20, 30, 0], device=device)
    dropped = torch.tensor([20, 20, 5, 0], device=device)
    plan = ops.mask_plan(
        state, masked, dropped, LENGTH, total_masked=95, total_kept=4 * 46 - 45, total_visible=4 * 46 - 95,
        max_seqlen=46, stream=rng.stream(Stream.MASK_PLAN),
    )  # fmt: skip
    return [x for x in plan if isinstance(x, Tensor)]


def embedding_dropout(device: str, state: Tensor) -> list[Tensor]:
    ids = torch.arange(4 * LENGTH, device=device).view(4, LENGTH) % 11
    nothing = torch.zeros(4, LENGTH, dtype=torch.bool, device=device)
    x_TD = ops.embed_kept(
        ids, ids[:, 0], torch.arange(4 * 46, dtype=torch.int32, device=device), nothing,
        *(torch.randn(n, WIDTH, device=device) for n in (12, 46)),
        torch.zeros(WIDTH, device=device), torch.ones(WIDTH, device=device),
        mask_token_id=11, dropout=P, rng_state=state, stream=rng.stream(Stream.EMBEDDING_DROPOUT),
    )  # fmt: skip
    return [x_TD != 0]


def residual_dropout(device: str, state: Tensor) -> list[Tensor]:
    ones = torch.ones(ROWS, WIDTH, device=device)
    out_TD, _ = ops.add_norm(
        ones, torch.zeros_like(ones), ones[0], ones[0], dropout=P, rng_state=state,
        stream=rng.stream(Stream.PROJECTION_DROPOUT, 3),
    )  # fmt: skip
    return [out_TD != 0]


def mlp_dropout(device: str, state: Tensor) -> list[Tensor]:
    ones = torch.ones(ROWS, WIDTH, device=device)
    stream = rng.stream(Stream.MLP_DROPOUT, 5)
    return [ops.bias_gelu(ones, ones[0], dropout=P, rng_state=state, stream=stream) != 0]


def attention_dropout(device: str, state: Tensor) -> list[Tensor]:
    """Equal scores, and values that are the unit vectors: a result's feature is a key's probability."""
    heads, lengths = 3, (45, 1, 32)
    qkv = torch.zeros(sum(lengths), 3, heads, 48, device=device)
    row = 0
    for length in lengths:
        keys = torch.arange(length, device=device)
        qkv[row + keys, 2, :, keys] = 1.0
        row += length
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    stream = rng.stream(Stream.ATTENTION_DROPOUT, 2)
    out = ops.attention(qkv, ends, max_seqlen=45, dropout=P, rng_state=state, stream=stream)
    return [out != 0]


def samples(device: str, state: Tensor) -> list[Tensor]:
    """Logits far apart next to the rounding of the noise."""
    logits = torch.randn(3, LENGTH, 37, generator=torch.Generator().manual_seed(0)).to(device)
    ids = torch.full((3, LENGTH), 40, device=device)
    ids[1, ::3] = 7
    masked = torch.tensor([30, 11, 1], device=device)
    return list(
        ops.sample_confident(
            logits, ids, masked, mask_token_id=40, choice_temperature=4.5, rng_state=state, stream=2,
            samples_B=torch.tensor([5, 2**31, 0], device=device),
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "decide",
    [mask_plan, embedding_dropout, residual_dropout, mlp_dropout, attention_dropout, samples],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**40 + 12345, 7)])
def test_every_backend_decides_alike(
    decide: Callable[[str, Tensor], list[Tensor]], seed: int, step: int
) -> None:
    devices = {"reference": "cpu", "cpp": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
    found = {}
    for name, device in devices.items():
        with dispatch.use_implementation(name):
            try:
                found[name] = [x.cpu() for x in decide(device, rng.new_state(seed, step, device))]
            except dispatch.Unsupported as reason:
                if "not installed" in str(reason) or "not built" in str(reason):
                    continue
                raise
    if len(found) == 1:
        pytest.skip("neither Triton nor the C++ extension is here")
    for name, results in found.items():
        for got, wanted in zip(results, found["reference"], strict=True):
            assert torch.equal(got, wanted), name
    masks = [x for x in found["reference"] if x.dtype == torch.bool]
    assert all(0.0 < float(mask.float().mean()) < 1.0 for mask in masks)
