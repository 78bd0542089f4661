"""embed_kept against embedding every position and gathering afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.embed_kept.specs import Spec
from mage_fast.kernels.ops.mask_plan.specs import Spec as PlanSpec
from tests.kernels.suite import OpSuite, Target


def oracle(
    ids_BL: Tensor,
    class_ids_B: Tensor,
    positions_T: Tensor,
    is_masked_BL: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    *,
    mask_token_id: int,
    eps: float = 1e-6,
    dropout: float = 0.0,
    rng_state: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Embed all positions, mask by id, normalise, then gather the kept rows and drop out."""
    ids = torch.cat([class_ids_B[:, None], ids_BL.masked_fill(is_masked_BL, mask_token_id)], 1)
    x = F.embedding(ids, word_weight_VD) + position_weight_SD
    x = F.layer_norm(x, x.shape[-1:], norm_weight_D, norm_bias_D, eps)
    x = x.flatten(0, 1)[positions_T.long()]
    if dropout:
        assert rng_state is not None
        x = x * rng.keep_mask(rng_state, stream, x.shape, dropout) / (1 - round(dropout * 65536) / 65536)
    return x


class TestEmbedKept(OpSuite):
    op = "embed_kept"
    oracle = staticmethod(oracle)
    #: sums over a hundred rows add in another order than torch's, whose own depends on its threads
    units = 4
    bad = {  # noqa: RUF012
        "id": ({"ids_BL": torch.full((3, 7), 20)}, "ids holds 20, wanted 0 <= ids < 20"),
        "class id": ({"class_ids_B": torch.full((3,), -1)}, "class_ids holds -1, wanted 0 <= class_ids < 20"),
        "mask token": ({"mask_token_id": 20}, "mask_token_id is 20, wanted 0 <= mask_token_id < 20"),
        "ids' dtype": ({"ids_BL": torch.zeros(3, 7)}, "ids is float32, wanted int64 or int32"),
        "ids' rank": ({"ids_BL": torch.zeros(7).long()}, r"ids has shape \(7,\), wanted \(\*, \*\)"),
        "class ids' shape": (
            {"class_ids_B": torch.zeros(2).long()},
            r"class_ids has shape \(2,\), wanted \(3,\)",
        ),
        "positions' shape": (
            {"position_weight_SD": torch.zeros(7, 16)},
            r"position_weight has shape \(7, 16\), wanted \(8, 16\)",
        ),
        "position": ({"positions_T": torch.tensor([24])}, "positions holds 24, wanted 0 <= positions < 24"),
        "mask's dtype": ({"is_masked_BL": torch.zeros(3, 7)}, "is_masked is float32, wanted bool"),
        "norm": ({"norm_weight_D": torch.ones(15)}, r"norm_weight has shape \(15,\), wanted \(16,\)"),
        "no state": ({"rng_state": None}, "dropout is 0.1 but rng_state is None"),
        "device": ({"norm_bias_D": torch.ones(16, device="meta")}, "norm_bias is on meta, wanted cpu"),
    }

    def test_one_sample_of_one_token(self, target: Target) -> None:
        """Also with int32 ids."""
        for counts in ((0, 0), (1, 0), (1, 1)):
            plan = PlanSpec("one", 1, 1, counts[:1] * 2, counts[1:] * 2)
            inputs = Spec("one", plan, 9, 8).inputs(target.widest, target.device)
            inputs |= {name: inputs[name].int() for name in ("ids_BL", "class_ids_B")}
            self.check(self.function(target), inputs)

    def test_no_samples(self, target: Target) -> None:
        arguments = Spec("none", PlanSpec("none", 1, 4, (2, 2), (1, 1)), 9, 8).inputs(device=target.device)
        empty = {
            "ids_BL": arguments["ids_BL"][:0],
            "class_ids_B": arguments["class_ids_B"][:0],
            "positions_T": arguments["positions_T"][:0],
            "is_masked_BL": arguments["is_masked_BL"][:0],
        }
        out = self.function(target)(**(arguments | empty))
        out.sum().backward()
        assert out.shape == (0, 8)
        assert not arguments["word_weight_VD"].grad.any()

    @pytest.mark.parametrize("precision", [torch.float32, torch.float16])
    @pytest.mark.parametrize("features", [768, 20, 7])
    def test_dropout_bits(self, target: Target, features: int, precision: torch.dtype) -> None:
        """A LayerNorm of scale 0 and shift 1 shows the mask, and so does the shift's gradient."""
        plan = PlanSpec("bits", 2, 5, (3, 3), (2, 2))
        inputs = Spec("bits", plan, 9, features, 0.3).inputs(precision, target.device)
        inputs["norm_weight_D"] = torch.zeros(features, dtype=precision, device=target.device)
        inputs["norm_bias_D"] = torch.ones_like(inputs["norm_weight_D"], requires_grad=True)
        x = self.function(target)(**inputs)
        (grad,) = torch.autograd.grad(x.sum(), inputs["norm_bias_D"])
        keep = rng.keep_mask(inputs["rng_state"], inputs["stream"], x.shape, 0.3)
        scale = rng.keep_scale(0.3, rng.ACTIVATION_BITS)
        assert torch.equal(x, (keep * torch.tensor(scale, device=target.device)).to(precision))
        torch.testing.assert_close(grad, (keep.sum(0) * scale).to(precision))

    def test_any_positions_in_any_order(self, target: Target) -> None:
        """The op's own contract is wider than a mask plan's: rows may repeat and need not ascend."""
        inputs = Spec("any", PlanSpec("any", 3, 7, (4, 7), (3, 4)), 20, 16).inputs(
            target.widest, target.device
        )
        inputs["positions_T"] = torch.tensor([23, 8, 8, 0, 5, 8, 16, 23], device=target.device)
        self.check(self.function(target), inputs)
