"""Models, twins and comparisons that the model's tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mage_fast import checkpoint, reference
from mage_fast.config import MAGEConfig
from mage_fast.kernels.ops.mask_plan.api import MaskPlan
from mage_fast.model import MAGE

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "head dimension 48": {"encoder_width": 24, "encoder_heads": 3, "decoder_width": 48, "decoder_heads": 1},
    "narrow decoder": {"encoder_width": 40, "encoder_heads": 5, "decoder_width": 24, "mlp_ratio": 2.5}
    | {"decoder_heads": 3, "encoder_depth": 1, "decoder_depth": 3},
    "mask token": {"padding": "mask_token", "decoder_width": 16},
    "3 x 3, 7 codes": {"grid_size": 3, "codebook_size": 7, "class_slots": 3, "unconditional_class": 0},
    "no smoothing, fewer dropped": {"label_smoothing": 0.0, "drop_ratio": 0.3},
    "nothing dropped": {"drop_ratio": 0.0},
}


def tiny(**changes: Any) -> MAGEConfig:
    return MAGEConfig.tiny(tokenizer=None, **changes)


def build(config: MAGEConfig, seed: int = 0, make: Callable[..., Any] = MAGE, **arguments: Any) -> Any:
    """A model in eval mode; norms and biases too are random, so that none can be forgotten."""
    torch.manual_seed(seed)
    model = make(config, **arguments).eval()
    for x in model.parameters():
        if x.dim() == 1 or x is model.head.bias:
            nn.init.normal_(x, mean=x.mean().item(), std=0.2)
    return model


def twin(model: MAGE, config: MAGEConfig) -> reference.MAGE:
    """The reference model of the same weights, dtype and mode."""
    theirs = reference.MAGE.from_config(config)
    theirs.load_state_dict(checkpoint.to_published(model.state_dict(), config))
    return theirs.to(model.head.bias.dtype).train(model.training)


def draw_ids(config: MAGEConfig, batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.codebook_size, (batch, config.num_tokens), generator=generator)


def masks(plan: MaskPlan) -> tuple[Tensor, Tensor]:
    """``(drop_mask, mask)`` as the reference takes them."""
    batch, positions = plan.source_BS.shape
    dropped = torch.ones(batch * positions, dtype=torch.bool)
    dropped[plan.positions_T.long()] = False
    return dropped.view(batch, positions)[:, 1:], plan.is_masked_BL


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = 1e-5, name: str = "") -> None:
    """The largest error over the largest value."""
    assert got.shape == wanted.shape, name
    error, size = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert error <= tolerance * max(size, 1e-30), f"{name}: {error=:.3g}, {size=:.3g}"


def published_gradients(model: MAGE, config: MAGEConfig) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert grads.keys() == model.state_dict().keys()
    return checkpoint.to_published(grads, config)


def assert_same_gradients(
    model: MAGE, theirs: reference.MAGE, config: MAGEConfig, tolerance: float = 1e-5
) -> None:
    ours = published_gradients(model, config)
    live = {name: x.grad for name, x in theirs.named_parameters() if x.requires_grad}
    assert len(live) == len(dict(model.named_parameters()))
    largest = max(x.abs().max().item() for x in live.values() if x is not None)
    for name, grad in live.items():
        assert grad is not None, name
        # the keys' bias has no gradient but rounding: softmax does not see it
        floor = 1e-3 * largest
        error, size = (ours[name] - grad).abs().max().item(), grad.abs().max().item()
        assert error <= tolerance * max(size, floor), f"{name}: {error=:.3g}, {size=:.3g}"
