"""Philox-4x32-10 in plain PyTorch: int64 tensors hold the 32-bit words.

c = (j, first_high + i, stream, step),  k = the seed's low and high word
ten times:  c = (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0))
            k = k + (W0, W1)
words[i, j] = c
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
ROUNDS = 10


def philox_4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of (hi, lo)-multiply and xor on four counter words and two key words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]  # int64 wraps: the bits are right
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def philox(state: Tensor, stream: int, high: int, low: int, first_high: int) -> Tensor:
    return philox_rows(state, stream, torch.arange(first_high, first_high + high, device=state.device), low)


def philox_rows(state: Tensor, stream: int, rows_R: Tensor, low: int) -> Tensor:
    """The blocks of any values of the second counter word, int64 on the state's device."""
    seed, step = state[0], state[1]
    i = rows_R[:, None].expand(-1, low)
    j = torch.arange(low, device=state.device)[None, :].expand_as(i)
    c2 = torch.full_like(i, stream)
    c3 = (step & _WORD).expand_as(i)
    words = torch.stack(philox_4x32((j, i, c2, c3), (seed & _WORD, seed >> 32 & _WORD)), -1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
