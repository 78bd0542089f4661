"""Our ops, one by one, in a transformer block of your own.

    python examples/ops_in_own_model.py

What one learns: an op is a function with a docstring that says what plain PyTorch does the same; it has a
gradient, works under autocast and torch.compile, and picks its kernel by the tensors' device. Prints how far
block and gradient are from plain PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mage_fast import ops

WIDTH, HEADS, LENGTHS = 64, 4, (5, 17, 9)  # sequences of different lengths, packed, without padding


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3, HEADS, -1))
        attended = ops.attention(qkv, cu_seqlens, max_seqlen=max(LENGTHS)).flatten(1)
        # the sum and its LayerNorm in one pass; give dropout= and rng_state= for dropout before the sum
        norm = self.norm
        return ops.add_norm(self.proj(attended), x, norm.weight, norm.bias, eps=norm.eps)[1]

    def plain(self, x: Tensor) -> Tensor:
        sequences = []
        for part in x.split(LENGTHS):
            q, k, v = self.qkv(part).unflatten(1, (3, HEADS, -1)).permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            sequences.append(self.norm(part + self.proj(attended)))
        return torch.cat(sequences)


torch.manual_seed(0)
block, x = Block(), torch.randn(sum(LENGTHS), WIDTH)
cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
results = []
for forward in (lambda: block(x, cu_seqlens), lambda: block.plain(x)):
    block.zero_grad()
    y = forward()
    y.square().mul(torch.arange(WIDTH)).mean().backward()
    results.append((y.detach(), block.qkv.weight.grad.clone()))
for name, ours, theirs in zip(("output", "gradient"), *results, strict=True):
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, error
    print(f"{name}: {error:.1e} away from plain PyTorch, relative to the largest value")
