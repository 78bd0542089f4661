"""embed_kept against embedding every position and gathering afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.embed_kept.api import embed_kept
from mage_fast.kernels.ops.embed_kept.specs import SPECS, Spec
from mage_fast.kernels.ops.mask_plan.specs import Spec as PlanSpec

SMALL = [spec for spec in SPECS if spec.features <= 16]
PARAMETERS = ("word_weight_VD", "position_weight_SD", "norm_weight_D", "norm_bias_D")


def oracle(arguments: dict) -> Tensor:
    """Embed all positions, mask by id, normalise, then gather the kept rows and drop out."""
    ids = arguments["ids_BL"].masked_fill(arguments["is_masked_BL"], arguments["mask_token_id"])
    ids = torch.cat([arguments["class_ids_B"][:, None], ids], 1)
    x = F.embedding(ids, arguments["word_weight_VD"]) + arguments["position_weight_SD"]
    x = F.layer_norm(x, x.shape[-1:], arguments["norm_weight_D"], arguments["norm_bias_D"], 1e-6)
    x = x.flatten(0, 1)[arguments["positions_T"].long()]
    if arguments["dropout"]:
        keep = rng.keep_mask(arguments["rng_state"], arguments["stream"], x.shape, arguments["dropout"])
        x = x * keep / (1 - round(arguments["dropout"] * 65536) / 65536)
    return x


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_values_and_gradients(spec: Spec) -> None:
    arguments = spec.inputs(torch.float64)
    out, wanted = embed_kept(**arguments), oracle(arguments)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    parameters = [arguments[name] for name in PARAMETERS]
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, parameters, grad), torch.autograd.grad(wanted, parameters, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_no_samples() -> None:
    arguments = Spec("none", PlanSpec("none", 1, 4, (2, 2), (1, 1)), 9, 8).inputs()
    empty = {
        "ids_BL": arguments["ids_BL"][:0],
        "class_ids_B": arguments["class_ids_B"][:0],
        "positions_T": arguments["positions_T"][:0],
        "is_masked_BL": arguments["is_masked_BL"][:0],
    }
    out = embed_kept(**(arguments | empty))
    out.sum().backward()
    assert out.shape == (0, 8)
    assert not arguments["word_weight_VD"].grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_BL": torch.full((3, 7), 20)}, "ids holds 20, wanted 0 <= ids < 20"),
        ({"class_ids_B": torch.full((3,), -1)}, "class_ids holds -1"),
        ({"ids_BL": torch.zeros(3, 7)}, "ids is float32, wanted int64 or int32"),
        ({"class_ids_B": torch.zeros(2, dtype=torch.int64)}, r"class_ids has shape \(2,\), wanted \(3,\)"),
        (
            {"position_weight_SD": torch.zeros(7, 16)},
            r"position_weight has shape \(7, 16\), wanted \(8, 16\)",
        ),
        ({"positions_T": torch.tensor([24])}, "positions holds 24, wanted 0 <= positions < 24"),
        ({"is_masked_BL": torch.zeros(3, 7)}, "is_masked is float32, wanted bool"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed_kept(**(SPECS[0].inputs() | change))
