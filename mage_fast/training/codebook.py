"""Codebook learning by exponential moving averages, with revival of dead codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


class CodebookEma:
    """Moves every code to the moving average of the features assigned to it.

        count_k <- decay * count_k + (1 - decay) * |{i : id_i = k}|
        sum_k   <- decay * sum_k   + (1 - decay) * sum of z_i with id_i = k
        e_k     <- sum_k / count_k

    A code whose moving count falls under ``dead_below`` (in features a batch) restarts at a random feature
    of the batch.

    Source: van den Oord et al., "Neural discrete representation learning", appendix A.1.
    """

    def __init__(self, codebook_KD: Tensor, *, decay: float, dead_below: float) -> None:
        self.codebook_KD = codebook_KD
        self.decay, self.dead_below = decay, dead_below
        self.count_K = torch.ones_like(codebook_KD[:, 0])
        self.sum_KD = codebook_KD.detach().clone()

    @torch.no_grad()
    def update(
        self, z_ND: Float[Tensor, "N D"], ids_N: Int[Tensor, " N"], generator: torch.Generator
    ) -> Tensor:
        """One step; returns the number of codes that were revived (a tensor: nothing waits for the device)."""
        onehot_NK = F.one_hot(ids_N, len(self.codebook_KD)).to(z_ND.dtype)
        self.count_K.lerp_(onehot_NK.sum(0), 1 - self.decay)
        self.sum_KD.lerp_(onehot_NK.T @ z_ND, 1 - self.decay)
        dead_K = self.count_K < self.dead_below
        pick_K = torch.randint(len(z_ND), dead_K.shape, generator=generator).to(z_ND.device)
        self.sum_KD.copy_(torch.where(dead_K[:, None], z_ND[pick_K], self.sum_KD))
        self.count_K.masked_fill_(dead_K, 1.0)
        self.codebook_KD.copy_(self.sum_KD / self.count_K[:, None])
        return dead_K.sum()
