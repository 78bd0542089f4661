"""``philox`` against Random123's known answers and a Philox in Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mage_fast.kernels.ops.philox.api import philox
from mage_fast.kernels.ops.philox.reference import philox_4x32
from mage_fast.kernels.ops.philox.specs import SPECS, Spec
from tests.kernels.suite import Target, few, nan_filled_buffers, stepped, targets

#: (counter, key, answer), philox4x32-10 in the kat_vectors file of Random123.
KNOWN_ANSWERS = {
    "zeros": ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}
MASK = 2**32 - 1

seeds = st.integers(-(2**63), 2**63 - 1)
streams = st.integers(0, MASK)


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Figure 2 of the paper, in unbounded integers."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) & MASK, (key[1] + i * 0xBB67AE85) & MASK
        high0, low0 = divmod(a * 0xD2511F53, 2**32)
        high1, low1 = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
    return a, b, c, d


def python_block(seed: int, step: int, stream: int, i: int, j: int) -> tuple[int, ...]:
    """The block of row ``i`` and column ``j``, by the documented layout of key and counter."""
    return python_philox((j, i, stream, step & MASK), (seed & MASK, seed >> 32 & MASK))


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_known_answers(name: str) -> None:
    counter, key, answer = (tuple(int(w, 16) for w in words.split()) for words in KNOWN_ANSWERS[name])
    assert python_philox(counter, key) == answer
    got = philox_4x32(
        tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key)
    )
    assert tuple(int(word) for word in got) == answer


@pytest.mark.parametrize("target", targets("philox"))
class TestPhilox:
    def test_first_block_is_the_known_answer(self, target: Target) -> None:
        state = torch.zeros(2, dtype=torch.int64, device=target.device)
        (block,) = philox(state, 0, 1, 1, implementation=target.implementation)[0].tolist()
        assert [word & MASK for word in block] == [int(w, 16) for w in KNOWN_ANSWERS["zeros"][2].split()]

    @few
    @given(seed=seeds, step=seeds, stream=streams, high=st.integers(0, 3), low=st.integers(0, 40))
    @example(seed=-1, step=-1, stream=MASK, high=2, low=17)
    @example(seed=2**62, step=2**32, stream=0, high=1, low=0)
    def test_blocks(self, target: Target, seed: int, step: int, stream: int, high: int, low: int) -> None:
        """Every block, with low across the 16 blocks that the C++ takes at a time."""
        state = torch.tensor([seed, step], device=target.device)
        got = philox(state, stream, high, low, implementation=target.implementation)
        assert (got.dtype, got.shape) == (torch.int32, (high, low, 4))
        wanted = [[list(python_block(seed, step, stream, i, j)) for j in range(low)] for i in range(high)]
        assert (got.long() & MASK).tolist() == wanted
        assert state.tolist() == [seed, step]

    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
    def test_equal_to_the_reference_at_real_sizes(self, target: Target, spec: Spec) -> None:
        state = torch.tensor([1234567890123456789, 42], device=target.device)
        with nan_filled_buffers():
            got = philox(state, 5, spec.high, spec.low, implementation=target.implementation)
        assert torch.equal(got, philox(state, 5, spec.high, spec.low, implementation="reference"))

    def test_first_high_starts_the_second_word(self, target: Target) -> None:
        state = torch.tensor([7, 8], device=target.device)
        for first in (3, 2**32 - 2):
            got = philox(state, 9, 2, 5, first_high=first, implementation=target.implementation)
            wanted = [[list(python_block(7, 8, 9, first + i, j)) for j in range(5)] for i in range(2)]
            assert (got.long() & MASK).tolist() == wanted

    def test_threads_change_nothing(self, target: Target) -> None:
        """High enough for several pieces of 4096 blocks, whose borders fall inside rows."""
        state = torch.tensor([7, 8], device=target.device)
        before = torch.get_num_threads()
        try:
            words = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                words.append(philox(state, 9, 11, 2500, implementation=target.implementation))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(words[0], words[1])
        assert torch.equal(words[0], words[2])

    def test_strided_state(self, target: Target) -> None:
        state = torch.tensor([7, 8], device=target.device)
        dense = philox(state, 9, 2, 3, implementation=target.implementation)
        assert torch.equal(philox(stepped(state), 9, 2, 3, implementation=target.implementation), dense)

    def test_opcheck(self, target: Target) -> None:
        state = torch.tensor([7, 8], device=target.device)
        torch.library.opcheck(torch.ops.mage_fast.philox.default, (state, 3, 2, 5, 4, target.implementation))

    def test_compile(self, target: Target) -> None:
        state = torch.tensor([7, 8], device=target.device)
        torch.compiler.reset()
        compiled = torch.compile(philox, fullgraph=True, backend="aot_eager")
        got = compiled(state, 3, 2, 5, first_high=4, implementation=target.implementation)
        assert torch.equal(got, philox(state, 3, 2, 5, first_high=4, implementation="reference"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": torch.zeros(2)}, "philox: rng_state is float32, wanted int64"),
        ({"state": torch.zeros(3).long()}, r"philox: rng_state has shape \(3,\), wanted \(2,\)"),
        ({"stream": -1}, "philox: stream is -1, wanted 0 <= stream < "),
        ({"stream": 2**32}, "philox: stream is 4294967296, wanted 0 <= stream < "),
        ({"high": -1}, "philox: high is -1, wanted 0 <= high <= "),
        (
            {"first_high": 2**32},
            r"philox: first_high \+ high is 4294967297, wanted 0 <= first_high \+ high <= ",
        ),
        ({"low": 2**32 + 1}, "philox: low is 4294967297, wanted 0 <= low <= "),
    ],
)
def test_bad_input(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        philox(**{"state": torch.zeros(2).long(), "stream": 0, "high": 1, "low": 1} | changes)
