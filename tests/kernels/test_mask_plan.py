"""mask_plan: exact counts, consistent indices, a uniform law."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels import dispatch, rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, mask_plan, plan_of_mask
from mage_fast.kernels.ops.mask_plan.specs import Spec
from tests.kernels.suite import ExactOpSuite, Target, assert_equal


def oracle(
    rng_state: Tensor,
    num_masked_B: Tensor,
    num_dropped_B: Tensor,
    length: int,
    *,
    total_masked: int,
    total_kept: int,
    total_visible: int,
    max_seqlen: int,
    stream: int = 0,
) -> tuple[Tensor, ...]:
    """A loop over tokens, in the order of their random words."""
    words = rng.words(rng_state, stream, len(num_masked_B), length).tolist()
    positions, cu_seqlens, index, source, is_masked = [], [0], [], [], []
    visible, visible_cu_seqlens = [], [0]
    counts = zip(words, num_masked_B.tolist(), num_dropped_B.tolist(), strict=True)
    for b, (words_L, num_masked, num_dropped) in enumerate(counts):
        order = sorted(range(length), key=lambda token: (words_L[token], token))
        masked, dropped = set(order[:num_masked]), set(order[:num_dropped])
        for p in range(length + 1):
            source.append(-1 if p - 1 in masked else len(visible))
            if p - 1 not in masked:
                visible.append(len(positions))
            if p - 1 not in dropped:
                positions.append(b * (length + 1) + p)
        index += [b * length + token for token in sorted(masked)]
        is_masked += [token in masked for token in range(length)]
        cu_seqlens.append(len(positions))
        visible_cu_seqlens.append(len(visible))
    index += [-1] * (total_masked - len(index))
    visible += [0] * (total_visible - len(visible))
    assert len(positions) == total_kept

    def integers(x: list[int]) -> Tensor:
        return torch.tensor(x, dtype=torch.int32)

    return (
        integers(positions),
        integers(cu_seqlens),
        integers(index),
        integers(source).view(-1, length + 1),
        torch.tensor(is_masked, dtype=torch.bool).view(-1, length),
        integers(visible),
        integers(visible_cu_seqlens),
    )


class TestMaskPlan(ExactOpSuite):
    op = "mask_plan"
    oracle = staticmethod(oracle)
    dtypes = (torch.int64, torch.int32)
    dtype = torch.int32
    bad = {  # noqa: RUF012
        "count over length": (
            {"num_masked_B": torch.tensor([8, 5, 7])},
            "num_masked holds 8, wanted 0 <= num_masked < 8",
        ),
        "negative count": ({"num_dropped_B": torch.tensor([-1, 0, 0])}, "num_dropped holds -1, wanted 0 <="),
        "more dropped than masked": (
            {"num_dropped_B": torch.tensor([5, 3, 4])},
            "num_dropped is over num_masked",
        ),
        "total": ({"total_masked": 15}, r"is \(14, 15, 8, 5\), the counts give \(14, 16, 8, 5\)"),
        "visible": ({"total_visible": 7}, r"is \(14, 16, 7, 5\), the counts give \(14, 16, 8, 5\)"),
        "not all visible": ({"total_visible": None}, r"is \(14, 16, None, 5\), the counts give"),
        "longest": ({"max_seqlen": 4}, r"is \(14, 16, 8, 4\), the counts give \(14, 16, 8, 5\)"),
        "counts' shape": (
            {"num_dropped_B": torch.tensor([1])},
            r"num_dropped has shape \(1,\), wanted \(3,\)",
        ),
        "counts' dtype": ({"num_masked_B": torch.ones(3)}, "num_masked is float32, wanted int64 or int32"),
        "length": ({"length": 0}, "length is 0, wanted at least 1"),
        "state": ({"rng_state": torch.zeros(3).long()}, r"rng_state has shape \(3,\), wanted \(2,\)"),
    }

    def test_rows_to_spare(self, target: Target) -> None:
        """Greater totals, as a captured graph wants them, fill up with -1, and with row 0."""
        inputs = self.specs()[0].inputs(device=target.device)
        inputs["total_masked"] += 3
        inputs["total_visible"] += 2
        self.check(self.function(target), inputs)
        plan = self.function(target)(**inputs)
        assert plan.masked_index_N[-3:].tolist() == [-1] * 3
        assert plan.visible_V is not None
        assert plan.visible_V[-2:].tolist() == [0] * 2

    def test_all_rows_visible(self, target: Target) -> None:
        """Where all masked tokens are dropped, packed and visible rows are the same."""
        inputs = Spec("same", 3, 7, (2, 7), (2, 7)).inputs(device=target.device)
        plan = self.function(target)(**inputs | {"total_visible": None})
        assert plan.visible_V is None
        assert torch.equal(plan.visible_cu_seqlens, plan.cu_seqlens)
        visible_V = self.function(target)(**inputs).visible_V
        assert visible_V is not None
        assert visible_V.tolist() == list(range(inputs["total_kept"]))

    def test_offsets_add_up_over_blocks_of_samples(
        self, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if target.implementation == "triton":
            monkeypatch.setattr(dispatch._find("mask_plan", "triton"), "_SAMPLES", 4)
        inputs = Spec("drawn", 13, 5, (0, 5), (0, 5)).inputs(device=target.device)
        inputs["total_masked"] += 100
        inputs["total_visible"] += 100
        self.check(self.function(target), inputs)

    @pytest.mark.parametrize("counts", [(9, 3), (3, 0), (0, -2)])
    def test_wrong_counts_write_nothing_outside(self, target: Target, counts: tuple[int, int]) -> None:
        """On a GPU nobody looks at the counts: they are cut to the length and the totals hold."""
        masked, dropped = (torch.tensor([count] * 3, device=target.device) for count in counts)
        args = (rng.new_state(0, device=target.device), masked, dropped, 7, 10, 20, 6, 0)
        wanted = torch.ops.mage_fast.mask_plan(*args, "reference")
        got = torch.ops.mage_fast.mask_plan(*args, target.implementation)
        assert_equal(dict(enumerate(got)), dict(enumerate(wanted)))

    def test_equal_words_are_ordered_by_position(
        self, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Words of two bits: most tokens are tied."""
        words = rng.words
        monkeypatch.setattr(rng, "words", lambda *args: words(*args) & 3)
        if target.interpreted:
            module = dispatch._find("mask_plan", "triton")
            blocks = module.philox_blocks
            monkeypatch.setattr(module, "philox_blocks", lambda *args: tuple(w & 3 for w in blocks(*args)))
        elif target.implementation != "reference":
            pytest.skip("the kernel's words cannot be replaced")
        inputs = Spec("drawn", 4, 29, (5, 25), (2, 20)).inputs(device=target.device)
        wanted = oracle(**inputs)
        got = self.function(target)(**inputs)
        assert_equal(dict(enumerate(got[:7])), dict(enumerate(wanted)))

    def test_equal_words_in_a_long_sample(self, target: Target) -> None:
        """Of 2**18 words of 32 bits some are equal; a count that ends between two takes the first of them."""
        length, state = 2**18, rng.new_state(0, device=target.device)
        ordered, order = rng.words(state, 0, 1, length)[0].sort(stable=True)
        ties = (ordered[1:] == ordered[:-1]).nonzero().flatten()
        assert len(ties)
        for tie in ties.tolist():
            count = torch.tensor([tie + 1], device=target.device)
            plan = self.function(target)(
                rng_state=state, num_masked_B=count, num_dropped_B=count, length=length,
                total_masked=tie + 1, total_kept=length - tie, total_visible=None, max_seqlen=length,
            )  # fmt: skip
            assert torch.equal(plan.masked_index_N, order[: tie + 1].sort().values.int())


@pytest.mark.parametrize(
    ("length", "reason"), [(4096, None), (4097, "a program holds up to 4096 tokens of a sample, got 4097")]
)
def test_longer_samples_go_to_the_reference(length: int, reason: str | None) -> None:
    module = dispatch._find("mask_plan", "triton")
    if isinstance(module, str):
        pytest.skip(module)
    counts = torch.tensor([1])
    state = rng.new_state(0)
    assert module.unsupported("mask_plan", state, counts, counts, length, 1, length, 0, 0) == reason


def draw(masked: list[int], dropped: list[int], length: int, seed: int = 0, step: int = 0) -> MaskPlan:
    return mask_plan(
        rng.new_state(seed, step),
        torch.tensor(masked),
        torch.tensor(dropped),
        length,
        total_masked=sum(masked),
        total_kept=(length + 1) * len(masked) - sum(dropped),
        total_visible=(length + 1) * len(masked) - sum(masked),
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
    assert plan.visible_V is not None
    visible_V = plan.visible_V.tolist()
    assert visible_V == sorted(set(visible_V))
    assert plan.visible_cu_seqlens.tolist() == [row[0] for row in source] + [len(visible_V)]
    for b in range(len(masked)):
        rows = range(int(plan.cu_seqlens[b]), int(plan.cu_seqlens[b + 1]))
        kept = [positions[row] - b * (length + 1) for row in rows]
        assert kept[0] == 0
        for p in range(length + 1):
            visible = p == 0 or not plan.is_masked_BL[b, p - 1]
            assert (source[b][p] >= 0) == visible
            if visible:  # a visible token is kept, and its source is its own packed row
                assert kept[visible_V[source[b][p]] - rows.start] == p


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
    dropped = (mask, mask.sum(1).tolist()) if drop_masked else (None, None)
    plan = plan_of_mask(mask, mask.sum(1).tolist(), *dropped)
    assert plan.cu_seqlens.tolist() == ([0, 2, 6] if drop_masked else [0, 4, 8])
    assert plan.positions_T.tolist() == ([0, 2, 4, 5, 6, 7] if drop_masked else list(range(8)))
    assert plan.source_BS.tolist() == [[0, -1, 1, -1], [2, 3, 4, 5]]
    assert plan.visible_cu_seqlens.tolist() == [0, 2, 6]
    if drop_masked:
        assert plan.visible_V is None
    else:
        assert plan.visible_V is not None
        assert plan.visible_V.tolist() == [0, 2, 4, 5, 6, 7]
    assert plan.max_seqlen == 4
