"""``pad_decoder`` against ``torch.where`` on gathered rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mage_fast.kernels.ops.pad_decoder.specs import Spec
from tests.kernels.suite import OpSuite, Target, differentiate, few


def oracle(
    encoded_TD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    position_weight_SD: Tensor,
    *,
    mask_token_D: Tensor | None = None,
) -> Tensor:
    images = []
    for b, source_S in enumerate(source_BS.long()):
        padding_D = encoded_TD[int(cu_seqlens[b])] if mask_token_D is None else mask_token_D
        own_SD = encoded_TD[source_S.clamp(min=0)]
        images.append(torch.where(source_S[:, None] < 0, padding_D, own_SD) + position_weight_SD)
    shape = (*source_BS.shape, encoded_TD.shape[1])
    return torch.stack(images) if images else 0 * (encoded_TD.sum() + position_weight_SD.sum()).expand(shape)


def _source(value: int) -> Tensor:
    source = torch.full((3, 7), -1)
    source[2, 3] = value
    return source


class TestPadDecoder(OpSuite):
    op = "pad_decoder"
    oracle = staticmethod(oracle)
    bad = {  # noqa: RUF012
        "encoded's rank": ({"encoded_TD": torch.ones(8)}, r"encoded has shape \(8,\), wanted \(\*, \*\)"),
        "no features": ({"encoded_TD": torch.ones(15, 0)}, r"encoded has shape \(15, 0\), wanted"),
        "source's rank": ({"source_BS": torch.ones(7).int()}, r"source has shape \(7,\), wanted \(\*, \*\)"),
        "cu_seqlens' shape": (
            {"cu_seqlens": torch.tensor([0, 5, 10])},
            r"cu_seqlens has shape \(3,\), wanted \(4,\)",
        ),
        "positions": (
            {"position_weight_SD": torch.ones(6, 8)},
            r"position_weight has shape \(6, 8\), wanted \(7, 8\)",
        ),
        "position's features": (
            {"position_weight_SD": torch.ones(7, 9)},
            r"position_weight has shape \(7, 9\), wanted \(7, 8\)",
        ),
        "mask token": ({"mask_token_D": torch.ones(9)}, r"mask_token has shape \(9,\), wanted \(8,\)"),
        "integer encoded": ({"encoded_TD": torch.ones(15, 8).int()}, "encoded is int32, wanted float64"),
        "integer position": (
            {"position_weight_SD": torch.ones(7, 8).long()},
            "position_weight is int64, wanted float64",
        ),
        "integer mask token": ({"mask_token_D": torch.ones(8).int()}, "mask_token is int32, wanted float64"),
        "float source": ({"source_BS": torch.ones(3, 7)}, "source is float32, wanted int64 or int32"),
        "float cu_seqlens": ({"cu_seqlens": torch.ones(4)}, "cu_seqlens is float32, wanted int64 or int32"),
        "source too large": ({"source_BS": _source(15)}, "source holds 15, wanted -1 <= source < 15"),
        "source too small": ({"source_BS": _source(-2)}, "source holds -2, wanted -1 <= source < 15"),
        "class row outside": (
            {"cu_seqlens": torch.tensor([0, 5, 15, 15])},
            r"cu_seqlens\[:-1\] holds 15, wanted 0 <= cu_seqlens\[:-1\] < 15",
        ),
        "device": ({"position_weight_SD": torch.ones(7, 8, device="meta")}, "position_weight is on meta"),
    }

    @few
    @given(
        batch=st.integers(0, 3),
        length=st.integers(1, 9),
        shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
        features=st.integers(1, 17),
        mask_token=st.booleans(),
    )
    @example(batch=0, length=1, shares=(1.0, 1.0), features=1, mask_token=False)
    @example(batch=1, length=1, shares=(0.0, 0.0), features=1, mask_token=True)
    @example(batch=2, length=5, shares=(1.0, 1.0), features=3, mask_token=False)
    @example(batch=2, length=5, shares=(0.0, 0.0), features=3, mask_token=False)
    def test_shapes(
        self,
        target: Target,
        batch: int,
        length: int,
        shares: tuple[float, float],
        features: int,
        mask_token: bool,
    ) -> None:
        kept = round(shares[0] * length)
        spec = Spec("drawn", batch, length, kept, round(shares[1] * kept), features, mask_token and batch > 0)
        self.check(self.function(target), spec.inputs(target.widest, target.device))

    @pytest.mark.parametrize("index", [torch.int32, torch.int64])
    def test_packed_images_of_different_lengths(self, target: Target, index: torch.dtype) -> None:
        """The class row is each image's own, also where a row feeds several positions or none."""
        inputs = {
            "encoded_TD": torch.randn(6, 4, dtype=target.widest),
            "source_BS": torch.tensor([[0, -1, 1, 1], [2, -1, -1, -1], [3, 5, -1, 4]], dtype=index),
            "cu_seqlens": torch.tensor([0, 2, 3, 6], dtype=index),
            "position_weight_SD": torch.randn(4, 4, dtype=target.widest),
        }
        inputs = {name: x.detach().to(target.device) for name, x in inputs.items()}
        for name in ("encoded_TD", "position_weight_SD"):
            inputs[name].requires_grad_()
        self.check(self.function(target), inputs)

    def test_shared_rows(self, target: Target) -> None:
        """Images without rows of their own pad with the next image's class row; rows feed far positions."""
        source = torch.full((3, 300), -1)
        source[2, [0, 7, 280, 299]] = torch.tensor([0, 1, 1, 2])
        source[0, 290] = 2
        inputs = {
            "encoded_TD": torch.randn(4, 5, dtype=target.widest),
            "source_BS": source,
            "cu_seqlens": torch.tensor([0, 0, 0, 4]),
            "position_weight_SD": torch.randn(300, 5, dtype=target.widest),
        }
        inputs = {name: x.to(target.device) for name, x in inputs.items()}
        for name in ("encoded_TD", "position_weight_SD"):
            inputs[name].requires_grad_()
        self.check(self.function(target), inputs)

    def test_more_than_2_to_the_31_elements(self, target: Target) -> None:
        """Rows of a tensor that 32 bits cannot index. Only the rows read are ever touched."""
        rows, features = 2**31 // 768 + 2, 768
        encoded = torch.empty(rows, features, dtype=torch.float16, device=target.device)
        encoded[-1] = torch.arange(features, dtype=torch.float16)
        out = self.function(target)(
            encoded_TD=encoded,
            source_BS=torch.tensor([[rows - 1, -1]], device=target.device),
            cu_seqlens=torch.tensor([rows - 1, rows], device=target.device),
            position_weight_SD=torch.zeros(2, features, dtype=torch.float16, device=target.device),
        )
        assert torch.equal(out[0], encoded[-1:].expand(2, features))

    def test_class_row_gradient_sums_its_padded_positions(self, target: Target) -> None:
        """Closed form: with a gradient of ones each row's is the number of positions that show it."""
        inputs = Spec("count", 2, 6, 4, 2, 3).inputs(torch.float32, target.device)
        out = self.function(target)(**inputs)
        grads = torch.autograd.grad(out.sum(), [inputs["encoded_TD"], inputs["position_weight_SD"]])
        assert grads[0][[0, 5], 0].tolist() == [5.0, 5.0]  # itself and four padded positions
        assert grads[0][:, 0].sum() == 14
        assert grads[0].max() == 5
        assert (grads[1] == 2).all()

    @pytest.mark.parametrize("mask_token", [False, True])
    def test_narrow_encoder_with_float32_positions(self, target: Target, mask_token: bool) -> None:
        """As under autocast: the result is float32, each gradient has its input's dtype."""
        inputs = Spec("mixed", 2, 5, 3, 2, 8, mask_token).inputs(torch.float32, target.device)
        inputs["encoded_TD"] = inputs["encoded_TD"].detach().bfloat16().requires_grad_()
        got = differentiate(self.function(target), inputs)
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.requires_grad:
                assert got[f"gradient of {name}"].dtype == x.dtype
        wide = inputs | {"encoded_TD": inputs["encoded_TD"].detach().float().requires_grad_()}
        wanted = differentiate(self.function(target), wide)
        assert got["output 0"].dtype == torch.float32
        assert torch.equal(got["output 0"], wanted["output 0"])
        grad = wanted["gradient of encoded_TD"].bfloat16()
        assert torch.equal(got["gradient of encoded_TD"], grad)  # accumulated in float32, rounded once

    def test_long_sums_of_narrow_gradients(self, target: Target) -> None:
        """Counting past 256 in bfloat16 would stop there; 600 itself fits."""
        inputs = Spec("long", 1, 599, 3, 0, 4).inputs(torch.bfloat16, target.device)
        out = self.function(target)(**inputs)
        (grad,) = torch.autograd.grad(out.sum(), inputs["encoded_TD"])
        assert (grad[0] == 600).all()

    def test_no_encoded_row(self, target: Target) -> None:
        """With a mask token an image may have no row at all."""
        inputs = {
            "encoded_TD": torch.empty(0, 3, requires_grad=True),
            "source_BS": torch.full((2, 4), -1),
            "cu_seqlens": torch.zeros(3, dtype=torch.int64),
            "position_weight_SD": torch.randn(4, 3),
            "mask_token_D": torch.randn(3),
        }
        inputs = {name: x.detach().to(target.device) for name, x in inputs.items()}
        inputs["mask_token_D"].requires_grad_()
        out = self.function(target)(**inputs)
        wanted = (inputs["mask_token_D"] + inputs["position_weight_SD"]).expand(2, 4, 3)
        assert torch.equal(out, wanted)
        (grad,) = torch.autograd.grad(out.sum(), inputs["mask_token_D"])
        assert grad.tolist() == [8.0, 8.0, 8.0]
