"""InfoNCE and the mean over tokens against their equations, pair by pair and sample by sample."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import contrastive
from benchmarks.contrastive import peak_mib, plain_info_nce
from mage_fast import Unsupported, info_nce, use_implementation
from mage_fast.benchmark.end_to_end import kept_bytes
from mage_fast.contrastive import pool_tokens
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, plan_of_mask
from tests.contrastive_oracle import loop
from tests.models import assert_near


def features(rows: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, width, generator=generator, dtype=torch.float64) * 3
    return [x.to(dtype).requires_grad_() for x in both]


# InfoNCE


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 6),
    temperature=st.floats(0.05, 4),
    incoming=st.sampled_from([1.0, -0.3, 2.0**16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_equals_equation_2(
    dtype: torch.dtype,
    tolerance: float,
    rows: int,
    width: int,
    temperature: float,
    incoming: float,
    seed: int,
) -> None:
    exact = features(rows, width, seed)
    wanted = loop(*exact, temperature)
    wanted_grads = torch.autograd.grad(wanted, exact, torch.tensor(incoming, dtype=torch.float64))
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    got = info_nce(*ours, temperature=temperature)
    assert got.dtype == dtype
    assert abs(got.item() - wanted.item()) <= tolerance * max(wanted.item(), 1.0)
    # gradients of cosines are as large as 1 / (temperature * length); near equal logits they cancel
    size = abs(incoming) / (temperature * min(x.norm(dim=1).min().item() for x in exact))
    for grad, wanted_grad in zip(
        torch.autograd.grad(got, ours, got.new_tensor(incoming)), wanted_grads, strict=True
    ):
        assert (grad - wanted_grad).abs().max() <= tolerance * size


def test_gradcheck() -> None:
    z, positive = features(5, 4)
    assert torch.autograd.gradcheck(lambda x, y: info_nce(x, y, temperature=0.4), (z, positive))
    assert torch.autograd.gradcheck(lambda x: info_nce(x, positive.detach(), temperature=0.4), z)
    assert torch.autograd.gradcheck(lambda y: info_nce(z.detach(), y, temperature=0.4), positive)


def test_known_values() -> None:
    """Orthogonal pairs that agree, that disagree, and rows that cannot be told apart."""
    eye, ones = torch.eye(4).double(), torch.ones(6, 3).double()
    agree = math.log(1 + 3 * math.exp(-1 / 0.2))
    assert info_nce(eye, 7 * eye).item() == pytest.approx(agree, rel=1e-12)
    assert info_nce(eye, eye.roll(1, 0)).item() == pytest.approx(agree + 1 / 0.2, rel=1e-12)
    assert info_nce(ones, ones).item() == pytest.approx(math.log(6), rel=1e-12)
    assert info_nce(torch.randn(1, 3), torch.randn(1, 3)).item() == 0  # nothing to contrast with
    assert info_nce(eye, -eye, temperature=1e-3).item() == pytest.approx(1000 + math.log(3), rel=1e-12)


def test_views_are_alike() -> None:
    z, positive = features(7, 5)
    torch.testing.assert_close(info_nce(z, positive), info_nce(positive, z), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_float32_under_autocast(dtype: torch.dtype) -> None:
    z, positive = features(33, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(z, positive, temperature=0.05)
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == torch.float32
    assert_near(got, loop(z.double(), positive.double(), 0.05).float(), 1e-5)
    (grad,) = torch.autograd.grad(got, z)
    assert grad.dtype == dtype


def test_the_square_of_logits_is_not_kept() -> None:
    rows, width = 768, 16
    z, positive = features(rows, width, dtype=torch.float32)
    nothing = torch.nn.Module()
    square = rows * rows * 4
    assert kept_bytes(nothing, lambda: plain_info_nce(z, positive)) >= square
    assert kept_bytes(nothing, lambda: info_nce(z, positive)) <= 12 * rows * width * 4


def test_most_memory_at_once() -> None:
    """One chunk of logits in C++, several squares in plain PyTorch; and known sizes are measured right."""
    x = torch.randn(512, 512)
    assert 1 <= peak_mib(lambda: x + 1) < 1.01
    assert 2 <= peak_mib(lambda: (x + 1) * (x + 2)) <= 3.01
    rows = 2560  # a square of 25 MiB
    z, positive = features(rows, 16, dtype=torch.float32)

    def gradients(function: Any) -> None:
        torch.autograd.grad(function(z, positive), (z, positive))

    assert peak_mib(lambda: gradients(plain_info_nce)) >= 3 * 25
    try:
        with use_implementation(linear_cross_entropy="cpp"):
            assert peak_mib(lambda: gradients(info_nce)) <= 8 + 4  # a chunk is of 8 MiB
    except Unsupported as reason:
        pytest.skip(str(reason))


def test_the_benchmark_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["contrastive", "--smoke", "--out", str(tmp_path)])
    contrastive.main()
    found = json.loads((tmp_path / "contrastive.json").read_text())
    assert [(r["images"], r["views"]) for r in found["steps"]] == [(2, 4), (4, 4), (2, 2)]
    assert capsys.readouterr().out == (tmp_path / "contrastive.md").read_text()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["contrastive.json", "contrastive.md"]


def test_implementations_agree() -> None:
    z, positive = features(41, 12, dtype=torch.float32)
    found = []
    for name in ("auto", "reference"):
        with use_implementation(linear_cross_entropy=name):
            loss = info_nce(z, positive)
        found.append([loss, *torch.autograd.grad(loss, (z, positive))])
    for got, wanted in zip(*found, strict=True):
        assert_near(got, wanted)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda z, p: info_nce(z, p[:3]), r"info_nce: positive has shape \(3, 4\), wanted \(5, 4\)"),
        (lambda z, p: info_nce(z[:0], p[:0]), r"z has shape \(0, 4\), wanted at least 1 row"),
        (lambda z, p: info_nce(z[:, :0], p[:, :0]), r"z has shape \(5, 0\), wanted .*features >= 1"),
        (lambda z, p: info_nce(z[0], p[0]), r"z has shape \(4,\), wanted \(\*, \*\)"),
        (lambda z, p: info_nce(z, p.float()), "positive is float32, wanted float64"),
        (lambda z, p: info_nce(z.long(), p.long()), "z is int64, wanted float64 or"),
        (lambda z, p: info_nce(z, p, temperature=0.0), "temperature is 0.0, wanted more than 0"),
        (lambda z, p: info_nce(z, p, temperature=math.nan), "temperature is nan"),
        (lambda z, p: info_nce(z, p, temperature=math.inf), "temperature is inf"),
    ],
)
def test_refusals(change: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        change(*features(5, 4))


# The mean over tokens


@st.composite
def plans(draw: Any) -> MaskPlan:
    """Of each of three tokens: visible, masked or dropped."""
    kinds = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=1, max_size=5))
    )
    return plan_of_mask(kinds > 0, (kinds > 0).sum(1).tolist(), kinds > 1, (kinds > 1).sum(1).tolist())


@given(plan=plans())
@settings(max_examples=40, deadline=None)
def test_pooled_tokens_equal_a_loop_over_samples(plan: MaskPlan) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = len(plan.positions_T)
    encoded = torch.randn(rows, 2, dtype=torch.float64, generator=generator).requires_grad_()
    starts = plan.cu_seqlens.tolist()
    wanted = []
    for start, end in pairwise(starts):
        token_rows = encoded[start + 1 : end]
        wanted.append(token_rows.mean(0) if len(token_rows) else encoded[start])
    pooled = pool_tokens(encoded, plan)
    torch.testing.assert_close(pooled, torch.stack(wanted), rtol=1e-12, atol=1e-12)
    incoming = torch.randn(pooled.shape, dtype=torch.float64, generator=generator)
    grads = [torch.autograd.grad(x, encoded, incoming)[0] for x in (pooled, torch.stack(wanted))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_pooled_tokens_add_up_in_float32() -> None:
    """256 times 1 + 2**-7, whose sum bfloat16 cannot hold."""
    plan = plan_of_mask(torch.zeros(1, 256, dtype=torch.bool), [0])
    encoded = torch.full((257, 1), 1 + 2**-7, dtype=torch.bfloat16)
    pooled = pool_tokens(encoded, plan)
    assert pooled.dtype == torch.float32
    assert pooled.item() == 1 + 2**-7
