"""Label-smoothed cross-entropy, averaged over the rows that have a target, as equations.

lse   = log sum_c exp(logits_c)
row   = (1 - smoothing) * (lse - logits_target) + smoothing * (lse - mean_c logits_c)
loss  = sum over rows with target >= 0 of row / max(1, their number)
d loss / d logits_c = (exp(logits_c - lse) - (1 - smoothing) [c = target] - smoothing / C) / number
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_cross_entropy(
    logits_NC: Tensor, targets_N: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    valid_N = targets_N >= 0
    lse_N = logits_NC.logsumexp(-1)
    nll_N = lse_N - logits_NC.gather(1, targets_N.clamp(min=0).long()[:, None])[:, 0]
    loss_N = nll_N
    if label_smoothing > 0.0:  # else a logit of -inf would give 0 * inf
        loss_N = (1.0 - label_smoothing) * nll_N + label_smoothing * (lse_N - logits_NC.mean(-1))
    # masked_fill, not a product: whatever stands in a padding row, inf and NaN included, counts nothing
    count = valid_N.sum().clamp(min=1).to(lse_N.dtype)
    return loss_N.masked_fill(~valid_N, 0.0).sum() / count, lse_N, count


def masked_cross_entropy_backward(
    grad: Tensor, logits_NC: Tensor, lse_N: Tensor, count: Tensor, targets_N: Tensor, label_smoothing: float
) -> Tensor:
    valid_N1 = targets_N[:, None] >= 0
    grad_NC = (logits_NC.to(lse_N.dtype) - lse_N[:, None]).contiguous().exp_()
    if label_smoothing > 0.0:
        grad_NC -= label_smoothing / logits_NC.shape[1]
    hit_N1 = torch.full_like(lse_N, label_smoothing - 1.0)[:, None]
    grad_NC.scatter_add_(1, targets_N.clamp(min=0).long()[:, None], hit_N1)
    return grad_NC.mul_(grad.to(lse_N.dtype) / count).masked_fill_(~valid_N1, 0.0).to(logits_NC.dtype)
