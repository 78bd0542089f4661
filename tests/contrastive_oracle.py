"""MAGE-C's equations a second time: InfoNCE pair by pair, the model sample by sample on the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.contrastive import MAGEC, without_projector
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.model import MAGE
from mage_fast.reference import MAGE as Reference
from tests.models import build, masks, tiny, twin

WEIGHT, TEMPERATURE = 0.7, 0.3


def one_way(z: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """Equation 2 as it is printed."""
    unit = [x / x.square().sum(1, keepdim=True).sqrt() for x in (z, positive)]
    total = z.new_zeros(())
    for i in range(len(z)):
        powers = [torch.exp((unit[0][i] * unit[1][j]).sum() / temperature) for j in range(len(z))]
        total = total - torch.log(powers[i] / torch.stack(powers).sum())
    return total / len(z)


def loop(z: Tensor, positive: Tensor, temperature: float) -> Tensor:
    return (one_way(z, positive, temperature) + one_way(positive, z, temperature)) / 2


def model(**changes: Any) -> MAGEC:
    config = tiny(**{"dropout": 0.0, "label_dropout": 0.0} | changes)
    return build(config, make=MAGEC, contrastive_weight=WEIGHT, temperature=TEMPERATURE)


def plain_twin(ours: MAGEC) -> MAGE:
    """The MAGE of the same weights, dtype and mode."""
    twin = MAGE(ours.config)
    twin.load_state_dict(without_projector(ours.state_dict()))
    return twin.to(ours.head.bias.dtype).train(ours.training)


def reference_twin(ours: MAGEC) -> tuple[Reference, dict[str, Tensor]]:
    """The reference model and the projector's parameters, of the same weights."""
    projector = {name: x.detach().clone().requires_grad_() for name, x in ours.projector.named_parameters()}
    return twin(plain_twin(ours), ours.config), projector


def losses(
    theirs: Reference, p: dict[str, Tensor], ids: Tensor, plan: MaskPlan, class_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Equation 1 and equation 2 of a batch, one sample at a time."""
    total, pooled = torch.zeros_like(theirs.mlm_layer.bias[0, 0, 0]), []
    for sample in zip(ids.split(1), class_ids.split(1), *(x.split(1) for x in masks(plan)), strict=True):
        ids_1L, class_id_1, drop_1L, mask_1L = sample
        x_1KD = theirs.forward_encoder(ids_1L, drop_1L, mask_1L, class_id_1)
        logits_1SV = theirs.forward_decoder(x_1KD, drop_1L, mask_1L)
        if mask_1L.any():
            total = total + theirs.forward_loss(ids_1L, logits_1SV, mask_1L) * mask_1L.sum()
        tokens = x_1KD[0, 1:] if x_1KD.shape[1] > 1 else x_1KD[0]
        pooled.append(tokens.mean(0))
    hidden = (torch.stack(pooled) @ p["0.weight"].T + p["0.bias"]).clamp(min=0)
    views = (hidden @ p["2.weight"].T + p["2.bias"]).chunk(2)
    return total / plan.is_masked_BL.sum(), loop(*views, TEMPERATURE)
