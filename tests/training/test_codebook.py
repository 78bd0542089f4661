"""Codebooks against the definition of a moving average, in float64 by loops; revival of dead codes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.training.codebook import CodebookEma, CodeUsage, perplexity


def features(rows: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def is_row_of(rows_MD: Tensor, z_ND: Tensor) -> bool:
    return all(any(torch.equal(row, z) for z in z_ND) for row in rows_MD)


@settings(max_examples=20, deadline=None)
@given(
    codes=st.integers(1, 7),
    rows=st.integers(1, 12),
    channels=st.integers(1, 4),
    steps=st.integers(1, 5),
    decay=st.just(0.0) | st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_ema_is_the_moving_average(
    codes: int, rows: int, channels: int, steps: int, decay: float, seed: int
) -> None:
    ema = CodebookEma(codes, decay=decay, dead_below=0).double()
    codebook = features(codes, channels, seed)
    generator = torch.Generator().manual_seed(seed)
    wanted, count, total = codebook.clone(), [1.0] * codes, codebook.clone()
    for step in range(steps):
        z = features(rows, channels, seed + step + 1)
        ids = torch.randint(codes, (rows,), generator=generator)
        batch, revived = ema.update(codebook, z, ids, seed=0, step=step)
        for k in range(codes):
            mine = [z[i] for i in range(rows) if ids[i] == k]
            count[k] = decay * count[k] + (1 - decay) * len(mine)
            total[k] = decay * total[k] + (1 - decay) * sum(mine, torch.zeros(channels).double())
            if count[k] > 0:  # decay 0 and no feature: the code stays
                wanted[k] = total[k] / count[k]
            else:
                total[k] = 0
        assert batch.tolist() == [int((ids == k).sum()) for k in range(codes)]
        assert revived == 0
    torch.testing.assert_close(codebook, wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ema.count_K, torch.tensor(count, dtype=torch.float64), rtol=1e-12, atol=0)


def test_an_unused_code_stays_however_long() -> None:
    ema = CodebookEma(2, decay=0.5, dead_below=0)
    codebook = features(2, 3).float()
    before, z = codebook[1].clone(), features(4, 3, seed=1).float()
    for step in range(300):  # its count underflows to 0
        ema.update(codebook, z, torch.zeros(4, dtype=torch.int64), seed=0, step=step)
    assert ema.count_K[1] == 0
    assert torch.equal(codebook[1], before)
    torch.testing.assert_close(codebook[0], z.mean(0))


@pytest.mark.parametrize("kind", [CodeUsage, CodebookEma])
def test_dead_codes_restart_at_features_and_live_ones_stay(kind: type[CodeUsage]) -> None:
    usage = kind(6, decay=0.5, dead_below=0.3).double()
    usage.count_K.copy_(torch.tensor([0.5, 2.0, 0.4, 0.7, 0.5, 9.0]))
    codebook, z = features(6, 3), features(8, 3, seed=1)
    before = codebook.clone()
    ids = torch.tensor([4, 4, 4, 4, 4, 4, 4, 4])
    _, revived = usage.update(codebook, z, ids, seed=3, step=5)
    # counts after: 0.25, 1, 0.2, 0.35, 4.25, 4.5
    assert revived == 2
    assert is_row_of(codebook[[0, 2]], z)
    assert not torch.equal(codebook[0], codebook[2])
    assert torch.equal(codebook[[1, 3, 5]], before[[1, 3, 5]])
    assert torch.equal(codebook[4], before[4]) == (kind is CodeUsage)
    torch.testing.assert_close(usage.count_K, torch.tensor([1, 1, 1, 0.35, 4.25, 4.5]).double())


def test_revival_is_a_function_of_seed_and_step() -> None:
    z, ids = features(40, 3, seed=1), torch.zeros(40, dtype=torch.int64)

    def revived(seed: int, step: int) -> Tensor:
        torch.rand(seed + step + 1)  # the global generator must not matter
        usage, codebook = CodeUsage(8, decay=0.5, dead_below=0.9).double(), features(8, 3)
        assert usage.update(codebook, z, ids, seed=seed, step=step)[1] == 7
        return codebook

    state = torch.random.get_rng_state()
    CodeUsage(8, decay=0.5, dead_below=0.9).double().update(features(8, 3), z, ids, seed=1, step=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(revived(1, 2), revived(1, 2))
    assert not torch.equal(revived(1, 2), revived(1, 3))
    assert not torch.equal(revived(1, 2), revived(2, 2))


@pytest.mark.parametrize("rows", [3, 8, 50])
def test_starts_from_features(rows: int) -> None:
    usage, codebook, z = CodebookEma(8, decay=0.9, dead_below=0), features(8, 2), features(rows, 2, seed=1)
    usage.count_K.fill_(7)
    usage.initialise(codebook, z, seed=0)
    assert is_row_of(codebook, z)
    assert len(codebook.unique(dim=0)) == 8 or rows < 8
    assert torch.equal(usage.count_K, torch.ones(8))


def test_state_goes_on_elsewhere() -> None:
    first, second = (CodebookEma(4, decay=0.9, dead_below=0.05) for _ in range(2))
    codebook, z = features(4, 2).float(), features(9, 2, seed=1).float()
    first.update(codebook, z, torch.arange(9) % 4, seed=0, step=0)
    second.load_state_dict(first.state_dict(), strict=True)
    other = codebook.clone()
    for ema, mine in ((first, codebook), (second, other)):
        ema.update(mine, z, torch.arange(9) % 3, seed=0, step=1)
    assert torch.equal(codebook, other)


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    assert perplexity(torch.full((5,), 3.0)).item() == pytest.approx(5, rel=1e-6)
    assert perplexity(torch.tensor([0.0, 9.0, 0.0])).item() == pytest.approx(1)
    counts = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    wanted = torch.distributions.Categorical(counts).entropy().exp()
    torch.testing.assert_close(perplexity(counts), wanted)


@pytest.mark.parametrize(("decay", "dead_below"), [(1.0, 0.0), (-0.1, 0.0), (0.9, 1.0), (0.9, -1.0)])
def test_refuses_rates_outside_their_range(decay: float, dead_below: float) -> None:
    with pytest.raises(InputError, match="wanted 0 <= each < 1"):
        CodebookEma(4, decay=decay, dead_below=dead_below)
