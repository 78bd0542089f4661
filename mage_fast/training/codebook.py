"""Codebooks that learn from the features assigned to them: moving averages, and revival of dead codes.

Shape suffixes: N features, K codes, D channels.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.errors import InputError


class CodeUsage(nn.Module):
    """Counts how often each code is used, and restarts unused ones; their loss moves the codes in use.

        count_k <- decay * count_k + (1 - decay) * |{i : id_i = k}|

    A code whose moving count (in features a batch, 1 at the start) falls under ``dead_below`` restarts at a
    random feature of the batch. The counts are a buffer: they belong into a run's state.

    Raises:
        InputError: ``decay`` or ``dead_below`` outside [0, 1).
    """

    count_K: Tensor

    def __init__(self, codebook_size: int, *, decay: float, dead_below: float) -> None:
        super().__init__()
        if not 0 <= decay < 1 or not 0 <= dead_below < 1:
            raise InputError(f"codebook: decay {decay}, dead_below {dead_below}: wanted 0 <= each < 1")
        self.decay, self.dead_below = decay, dead_below
        self.register_buffer("count_K", torch.ones(codebook_size))

    @torch.no_grad()
    def initialise(
        self, codebook_KD: Float[Tensor, "K D"], z_ND: Float[Tensor, "N D"], *, seed: int, step: int = 0
    ) -> None:
        """Start every code at a random feature; while there are enough, no feature twice."""
        codebook_KD.copy_(z_ND[self._pick(z_ND, seed, step)])
        self.count_K.fill_(1)

    @torch.no_grad()
    def update(
        self,
        codebook_KD: Float[Tensor, "K D"],
        z_ND: Float[Tensor, "N D"],
        ids_N: Int[Tensor, " N"],
        *,
        seed: int,
        step: int,
    ) -> tuple[Float[Tensor, " K"], Int[Tensor, ""]]:
        """One step, in place on ``codebook_KD``; nothing waits for the device.

        Args:
            codebook_KD: a codebook, in the counts' dtype.
            z_ND: the batch's features, in the counts' dtype.
            ids_N: the code of each feature.
            seed: with ``step`` alone it decides which features revive codes.
            step: of the training.

        Returns:
            How many features of the batch each code got, and the number of revived codes.
        """
        assigned_NK = torch.zeros(len(z_ND), len(codebook_KD), dtype=z_ND.dtype, device=z_ND.device)
        assigned_NK.scatter_(1, ids_N[:, None].long(), 1.0)
        batch_K = assigned_NK.sum(0)
        self.count_K.lerp_(batch_K, 1 - self.decay)
        self._move(codebook_KD, z_ND, assigned_NK, batch_K)
        dead_K = self.count_K < self.dead_below
        if self.dead_below > 0:
            new_KD = z_ND[self._pick(z_ND, seed, step)]
            codebook_KD.copy_(torch.where(dead_K[:, None], new_KD, codebook_KD))
            self.count_K.masked_fill_(dead_K, 1.0)
        return batch_K, dead_K.sum()

    def _move(self, codebook_KD: Tensor, z_ND: Tensor, assigned_NK: Tensor, batch_K: Tensor) -> None:
        """The codes stay: a loss moves them."""

    def _pick(self, z_ND: Tensor, seed: int, step: int) -> Tensor:
        # a spawn key: the order of the data is drawn from (seed, epoch)
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step,)))
        codes = len(self.count_K)
        return torch.from_numpy(generator.choice(len(z_ND), codes, replace=len(z_ND) < codes)).to(z_ND.device)


class CodebookEma(CodeUsage):
    """Moves every code to the moving average of the features assigned to it; no loss does.

        count_k <- decay * count_k + (1 - decay) * |{i : id_i = k}|
        sum_k   <- decay * sum_k   + (1 - decay) * sum of z_i with id_i = k
        e_k     <- sum_k / count_k

    computed as ``e_k += (1 - decay) * sum over its features of (z_i - e_k) / count_k``, which is equal, needs
    no sums and leaves a code without features where it is, however small its count.

    Source: van den Oord et al., "Neural discrete representation learning", appendix A.1.
    """

    def _move(self, codebook_KD: Tensor, z_ND: Tensor, assigned_NK: Tensor, batch_K: Tensor) -> None:
        count_K1 = self.count_K.clamp(min=torch.finfo(self.count_K.dtype).tiny)[:, None]
        difference_KD = assigned_NK.T @ z_ND - batch_K[:, None] * codebook_KD
        codebook_KD.add_(difference_KD / count_K1, alpha=1 - self.decay)


def perplexity(batch_K: Float[Tensor, " K"]) -> Float[Tensor, ""]:
    """``exp(entropy)`` of how a batch's features spread over the codes: K when all are used alike, 1 for one.

    Equivalent PyTorch: ``torch.distributions.Categorical(batch_K).entropy().exp()``.
    """
    share_K = batch_K / batch_K.sum()
    return torch.special.entr(share_K).sum().exp()
