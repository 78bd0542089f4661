"""The randomness contract: which bits every random decision reads. Written once here, in plain PyTorch.

One counter scheme serves every backend, so that the same seed gives the same mask plan, the same dropout
and, given equal logits, the same sampled ids on CPU, in the Triton interpreter and on CUDA:

    key     = seed (64 bits)
    counter = (block, row, stream, step)

``state`` is an int64 tensor ``(seed, step)`` on the device that draws. It is read there, never on the
host, so a captured CUDA graph draws fresh numbers at each replay. A Philox block is four 32-bit words,
read in memory order:

* 32 bits  (mask plan, Gumbel noise, drop path): the row is the sample's index, so a sample's numbers do not
  depend on the batch it is in; element ``e`` of the sample reads word ``e % 4`` of block ``e // 4``.
* 16 bits  (dropout of activations): element ``e`` of the flattened tensor reads half ``e % 8`` of block
  ``e // 8``, the row being 0 (the high word of a 64-bit block number).
*  8 bits  (dropout of attention probabilities): the row is ``query * heads + head``, ``query`` the packed
  row; key ``k`` reads byte ``(k + 15) % 16`` of block ``(k + 15) // 16``, so the class token's key 0 has a
  block of its own and keys 1, 17, 33 ... start blocks (a kernel that starts its softmax from the class
  token sees aligned tiles).

An element is kept iff its bits, as a two's-complement integer, are >= threshold - 2**(bits - 1), where
threshold = round(p * 2**bits), at most 2**bits - 1: the realised drop probability is threshold / 2**bits,
and the scale 1 / (1 - realised) uses it. (Signed, so that every backend compares the words as they lie in
memory, without widening them.)
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from mage_fast.kernels.ops.philox.api import philox
from mage_fast.kernels.ops.philox.reference import philox_rows

ACTIVATION_BITS = 16
ATTENTION_BITS = 8
#: Key 0 sits in the last byte of its block, see the module's docstring.
ATTENTION_KEY_OFFSET = 15


class Stream(IntEnum):
    """What a random number is for; the low byte of the third counter word."""

    MASK_RATIO = 1
    MASK_PLAN = 2
    EMBEDDING_DROPOUT = 3
    ATTENTION_DROPOUT = 4
    PROJECTION_DROPOUT = 5
    MLP_DROPOUT = 6
    OUTPUT_DROPOUT = 7
    SAMPLE_ID = 8
    SAMPLE_CONFIDENCE = 9
    LABEL_DROPOUT = 10
    ATTENTION_PATH = 11
    MLP_PATH = 12


def stream(kind: Stream, layer: int = 0) -> int:
    """Third counter word: the kind in the low byte, the layer above it."""
    return int(kind) + (layer << 8)


def new_state(seed: int | None = None, step: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """An int64 ``(seed, step)`` state. Without a seed one is drawn from torch's global CPU generator, so
    ``torch.manual_seed`` governs it.

    Raises:
        ValueError: a seed that is no integer of 64 bits.
    """
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}, wanted -2**63 <= seed < 2**63")
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def split_seed(seed: int, number: int) -> int:
    """A seed for each of several draws that would otherwise be alike (micro-batches of a step).

    Number 0 keeps the seed, and no two pairs of small seeds and numbers meet.
    """
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def threshold(p: float, bits: int) -> int:
    """How many of the 2**bits values are dropped; one is always kept, so the scale is finite for p < 1."""
    return min(round(p * 2**bits), 2**bits - 1)


def keep_scale(p: float, bits: int) -> float:
    """Scale of the kept elements, 1 / (1 - realised p)."""
    return 1.0 / (1.0 - threshold(p, bits) / 2**bits)


def least_kept(p: float, bits: int) -> int:
    """The smallest signed value of an element's bits that is kept."""
    return threshold(p, bits) - 2 ** (bits - 1)


def words(state: Tensor, stream: int, rows: int | Tensor, columns: int) -> Tensor:
    """Uniform 32-bit words as int64 in [0, 2**32), ``[rows, columns]``, of the first rows, or of those whose
    numbers an int64 tensor holds (it is not read on the host).
    """
    low = -(-columns // 4)
    if isinstance(rows, int):
        blocks = philox(state, stream, rows, low)
    else:
        blocks = philox_rows(state, stream, rows, low)
    return blocks.flatten(1)[:, :columns].to(torch.int64) & 0xFFFFFFFF


def uniform(state: Tensor, stream: int, rows: int | Tensor, columns: int) -> Tensor:
    """float32 in (0, 1): the top 23 bits plus a half, exact in float32, never 0 or 1."""
    return ((words(state, stream, rows, columns) >> 9).float() + 0.5) * 2.0**-23


def gumbel(state: Tensor, stream: int, rows: int | Tensor, columns: int) -> Tensor:
    """float32 standard Gumbel noise, -log(-log(u))."""
    return uniform(state, stream, rows, columns).log_().neg_().log_().neg_()


def keep_mask(state: Tensor, stream: int, shape: torch.Size | tuple[int, ...], p: float) -> Tensor:
    """bool, True where an activation is kept (16 bits an element)."""
    count = torch.Size(shape).numel()
    blocks = philox(state, stream, 1, -(-count // 8))
    halves = blocks.view(torch.int16).flatten()[:count]
    return (halves >= least_kept(p, ACTIVATION_BITS)).view(shape)


def keep_mask_attention(state: Tensor, stream: int, rows: int, keys: int, p: float) -> Tensor:
    """bool ``[rows, keys]``, True where an attention probability is kept (8 bits a probability)."""
    blocks = philox(state, stream, rows, -(-(keys + ATTENTION_KEY_OFFSET) // 16))
    octets = blocks.view(torch.int8).flatten(1)[:, ATTENTION_KEY_OFFSET : ATTENTION_KEY_OFFSET + keys]
    return octets >= least_kept(p, ATTENTION_BITS)


def dropout(x: Tensor, state: Tensor | None, stream: int, p: float) -> Tensor:
    """``x`` with activation dropout; its own backward, as the mask is recomputed and the map is linear."""
    if p == 0.0:
        return x
    assert state is not None
    return keep_mask(state, stream, x.shape, p).to(x.dtype).mul_(keep_scale(p, ACTIVATION_BITS)).mul_(x)
