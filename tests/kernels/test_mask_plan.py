"""mask_plan: exact counts, consistent indices, a uniform law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, mask_plan, plan_of_mask


def draw(masked: list[int], dropped: list[int], length: int, seed: int = 0, step: int = 0) -> MaskPlan:
    return mask_plan(
        rng.new_state(seed, step),
        torch.tensor(masked),
        torch.tensor(dropped),
        length,
        total_masked=sum(masked),
        total_kept=(length + 1) * len(masked) - sum(dropped),
        max_seqlen=length + 1 - min(dropped),
    )


@st.composite
def counts(draw_from: st.DrawFn) -> tuple[list[int], list[int], int]:
    length = draw_from(st.integers(1, 12))
    masked = draw_from(st.lists(st.integers(0, length), min_size=1, max_size=4))
    return masked, [draw_from(st.integers(0, m)) for m in masked], length


@given(counts(), st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_indices_say_the_same_as_a_loop_over_tokens(
    drawn: tuple[list[int], list[int], int], seed: int
) -> None:
    masked, dropped, length = drawn
    plan = draw(masked, dropped, length, seed)
    positions, source = plan.positions_T.tolist(), plan.source_BS.tolist()
    assert plan.is_masked_BL.sum(1).tolist() == masked
    assert plan.masked_index_N.tolist() == plan.is_masked_BL.flatten().nonzero().flatten().tolist()
    assert plan.cu_seqlens.diff().tolist() == [length + 1 - d for d in dropped]
    assert positions == sorted(positions)
    for b in range(len(masked)):
        rows = range(int(plan.cu_seqlens[b]), int(plan.cu_seqlens[b + 1]))
        kept = [positions[row] - b * (length + 1) for row in rows]
        assert kept[0] == 0
        for p in range(length + 1):
            visible = p == 0 or not plan.is_masked_BL[b, p - 1]
            assert (source[b][p] >= 0) == visible
            if visible:  # a visible token is kept, and its source is its own packed row
                assert kept[source[b][p] - rows.start] == p


def test_dropped_tokens_are_the_first_masked_of_the_same_order() -> None:
    few, many = draw([6], [2], 8), draw([6], [5], 8)
    assert torch.equal(few.is_masked_BL, many.is_masked_BL)
    assert set(many.positions_T.tolist()) < set(few.positions_T.tolist())
    assert not set(range(1, 9)) - set(few.positions_T.tolist()) - {int(i) + 1 for i in few.masked_index_N}, (
        "only masked tokens are dropped"
    )


def test_every_token_is_masked_equally_often() -> None:
    times = sum(draw([3] * 64, [0] * 64, 8, seed=1, step=s).is_masked_BL.float().sum(0) for s in range(32))
    draws = 64 * 32
    expected = draws * 3 / 8
    chi_square = float(((times - expected) ** 2 / (expected * (1 - 3 / 8))).sum()) * 7 / 8
    assert chi_square < 24.3  # 0.1% point of chi-square with 7 degrees of freedom


def test_step_and_seed_change_the_plan_and_nothing_else_does() -> None:
    base = draw([8] * 4, [4] * 4, 16, seed=3, step=5)
    again = draw([8] * 4, [4] * 4, 16, seed=3, step=5)
    assert all(torch.equal(a, b) for a, b in zip(base[:-1], again[:-1], strict=True))
    assert not torch.equal(base.is_masked_BL, draw([8] * 4, [4] * 4, 16, seed=3, step=6).is_masked_BL)
    assert not torch.equal(base.is_masked_BL, draw([8] * 4, [4] * 4, 16, seed=4, step=5).is_masked_BL)
    # a sample's plan does not depend on the batch it is in
    assert torch.equal(base.is_masked_BL[:2], draw([8] * 2, [4] * 2, 16, seed=3, step=5).is_masked_BL)


@pytest.mark.parametrize("drop_masked", [False, True])
def test_plan_of_a_given_mask(drop_masked: bool) -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    plan = plan_of_mask(mask, mask.sum(1), drop_masked=drop_masked)
    assert plan.cu_seqlens.tolist() == ([0, 2, 6] if drop_masked else [0, 4, 8])
    assert plan.positions_T.tolist() == ([0, 2, 4, 5, 6, 7] if drop_masked else list(range(8)))
    assert plan.source_BS.tolist() == (
        [[0, -1, 1, -1], [2, 3, 4, 5]] if drop_masked else [[0, -1, 2, -1], [4, 5, 6, 7]]
    )
    assert plan.max_seqlen == 4


@pytest.mark.parametrize(
    ("masked", "dropped", "totals", "message"),
    [
        ([9], [0], (9, 9, 9), "num_masked holds 9, wanted 0 <= num_masked < 9"),
        ([2], [3], (2, 6, 6), "num_dropped is over num_masked"),
        ([2], [1], (1, 8, 8), r"is \(8, 1, 8\), the counts give \(8, 2, 8\)"),
        ([2, 2], [1], (2, 8, 8), r"num_dropped has shape \(1,\), wanted \(2,\)"),
    ],
)
def test_bad_input_is_named(masked: list[int], dropped: list[int], totals: tuple, message: str) -> None:
    total_masked, total_kept, longest = totals
    with pytest.raises(ValueError, match=message):
        mask_plan(
            rng.new_state(0), torch.tensor(masked), torch.tensor(dropped), 8,
            total_masked=total_masked, total_kept=total_kept, max_seqlen=longest,
        )  # fmt: skip
