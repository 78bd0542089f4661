"""sample_confident: every implementation's ids, one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mage_fast.kernels import dispatch, rng
from mage_fast.kernels.ops.sample_confident.api import sample_confident
from mage_fast.kernels.ops.sample_confident.specs import SPECS, Spec, packed
from mage_fast.kernels.rng import Stream
from tests.kernels.suite import ExactOpSuite, Target, results_by_threads, tensors, transposed

MASK = 99
#: Scores that differ by less are a tie: a few units in the last place of noise of up to 17.
NEAR = 1e-5


def filtered(logits_C: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf but for the top_k most probable codes, ties with the last included, and of these but for the
    first whose mass reaches top_p; equal codes in the order of their ids.
    """
    ranked = sorted(range(len(logits_C)), key=lambda code: (-float(logits_C[code]), code))
    if top_k:
        least = logits_C[ranked[top_k - 1]]
        ranked = [code for code in ranked if logits_C[code] >= least]
    p = logits_C[ranked].double().softmax(0)
    kept = [code for code, before in zip(ranked, (p.cumsum(0) - p).tolist(), strict=True) if before < top_p]
    return torch.full_like(logits_C, -math.inf).index_copy(0, torch.tensor(kept), logits_C[kept])


def dense(logits_NC: Tensor, rows_BL: Tensor | None, ids_BL: Tensor, mask_token_id: int) -> Tensor:
    """Logits ``[B, L, C]`` on the CPU; 0 where a token is known and has no row."""
    x_NC = logits_NC.cpu()
    if rows_BL is None:
        return x_NC
    x_BLC = x_NC.new_zeros(*ids_BL.shape, x_NC.shape[1])
    for b, token in (ids_BL == mask_token_id).nonzero().tolist():
        x_BLC[b, token] = x_NC[rows_BL[b, token]]
    return x_BLC


def perturbed(
    logits_NC: Tensor,
    ids_BL: Tensor,
    *,
    mask_token_id: int,
    choice_temperature: float,
    rng_state: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance_logits_NC: Tensor | None = None,
    guidance_scale: float = 0.0,
    rows_BL: Tensor | None = None,
    samples_B: Tensor | None = None,
    stream: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Of every token, the codes' scores (the largest is drawn), and of every code, were it drawn, the
    confidence; on the CPU.
    """
    x_BLC = dense(logits_NC, rows_BL, ids_BL, mask_token_id)
    x_BLC = x_BLC.to(torch.promote_types(x_BLC.dtype, torch.float32))
    batch, length, codes = x_BLC.shape
    if guidance_logits_NC is not None:
        x_BLC = x_BLC + guidance_scale * (
            x_BLC - dense(guidance_logits_NC, rows_BL, ids_BL, mask_token_id).to(x_BLC.dtype)
        )
    x_BLC = x_BLC / temperature
    if top_k or top_p < 1:
        unknown_BL = (ids_BL == mask_token_id).cpu()
        for b, token in unknown_BL.nonzero().tolist():
            x_BLC[b, token] = filtered(x_BLC[b, token], top_k, top_p)
    state = rng_state.cpu()
    samples_B = torch.arange(batch) if samples_B is None else samples_B.cpu()
    noise_BLC = rng.gumbel(state, rng.stream(Stream.SAMPLE_ID, stream), samples_B, length * codes).view_as(
        x_BLC
    )
    noise_BL = rng.gumbel(state, rng.stream(Stream.SAMPLE_CONFIDENCE, stream), samples_B, length)
    return x_BLC + noise_BLC, x_BLC.log_softmax(2) + choice_temperature * noise_BL[..., None]


def oracle(logits_NC: Tensor, ids_BL: Tensor, num_masked_B: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """A loop over samples, and over their unknown tokens in the order of confidence."""
    mask_token_id = options["mask_token_id"]
    sampled, following = ids_BL.clone(), ids_BL.clone()
    scores_BLC, confidence_BLC = perturbed(logits_NC, ids_BL, **options)
    for b, (scores_LC, confidence_LC) in enumerate(zip(scores_BLC, confidence_BLC, strict=True)):
        drawn = scores_LC.argmax(1).tolist()
        confidence = [float(confidence_LC[token, code]) for token, code in enumerate(drawn)]
        unknown = [token for token in range(len(drawn)) if ids_BL[b, token] == mask_token_id]
        for token in unknown:
            sampled[b, token] = following[b, token] = drawn[token]
        unknown.sort(key=lambda token: (confidence[token], token))
        for token in unknown[: max(1, min(len(unknown) - 1, int(num_masked_B[b])))]:
            following[b, token] = mask_token_id
    return sampled, following


class TestSampleConfident(ExactOpSuite):
    op = "sample_confident"
    oracle = staticmethod(oracle)
    bad = {  # noqa: RUF012
        "no codes": ({"logits_NC": torch.ones(2, 6, 0)}, r"logits has shape \(2, 6, 0\), wanted"),
        "top_k": ({"top_k": 12}, "top_k is 12, wanted 0 <= top_k <= 11"),
        "top_p": ({"top_p": 0.0}, r"top_p is 0\.0, wanted 0 < top_p <= 1"),
        "negative top_k": ({"top_k": -1}, "top_k is -1, wanted 0 <= top_k <= 11"),
        "top_p over 1": ({"top_p": 1.5}, r"top_p is 1\.5, wanted 0 < top_p <= 1"),
        "top_p of nan": ({"top_p": math.nan}, r"top_p is nan, wanted 0 < top_p <= 1"),
        "temperature": ({"temperature": 0.0}, r"temperature is 0\.0, wanted more than 0"),
        "choice temperature": ({"choice_temperature": math.nan}, "choice_temperature is nan, wanted 0 or"),
        "id": ({"ids_BL": torch.full((2, 6), 12)}, "ids holds 12, wanted 0 <= ids < 11"),
        "ids' shape": ({"ids_BL": torch.zeros(2, 5).long()}, r"ids has shape \(2, 5\), wanted \(2, 6\)"),
        "ids' dtype": ({"ids_BL": torch.zeros(2, 6)}, "ids is float32, wanted int64 or int32"),
        "counts": ({"num_masked_B": torch.zeros(3).long()}, r"num_masked has shape \(3,\), wanted \(2,\)"),
        "state": ({"rng_state": torch.zeros(2)}, "rng_state is float32, wanted int64"),
        "guidance": (
            {"guidance_logits_NC": torch.zeros(2, 6, 10)},
            r"guidance_logits has shape \(2, 6, 10\), wanted \(2, 6, 11\)",
        ),
        "row": (
            {"logits_NC": torch.ones(3, 11), "rows_BL": torch.full((2, 6), 3)},
            "rows holds 3, wanted 0 <= r",
        ),
        "rows' shape": (
            {"logits_NC": torch.ones(3, 11), "rows_BL": torch.zeros(2, 5).long()},
            r"rows has shape \(2, 5\), wanted \(2, 6\)",
        ),
        "packed logits without rows": (
            {"logits_NC": torch.ones(3, 11)},
            r"logits has shape \(3, 11\), wanted",
        ),
        "samples": ({"samples_B": torch.zeros(3).long()}, r"samples has shape \(3,\), wanted \(2,\)"),
        "device": ({"ids_BL": torch.zeros(2, 6, device="meta").long()}, "ids is on meta, wanted cpu"),
    }

    def check(self, function: Callable, inputs: dict, layout: Callable = lambda x: x) -> None:
        """Equal but for near ties: the noise is a logarithm twice, whose last bit libraries differ in."""
        got, wanted = tensors(function(**inputs)), tensors(self.oracle(**inputs))
        if all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True)):
            return
        scores_BLC, confidence_BLC = perturbed(**inputs)
        (sampled_BL, following_BL), (wanted_sampled_BL, wanted_following_BL) = (
            [x.cpu() for x in got],
            [x.cpu() for x in wanted],
        )
        for b, token in (sampled_BL != wanted_sampled_BL).nonzero().tolist():
            scores = scores_BLC[b, token]
            assert scores.max() - scores[sampled_BL[b, token]] < NEAR, (b, token)
        is_masked_BL, wanted_masked_BL = (
            x == inputs["mask_token_id"] for x in (following_BL, wanted_following_BL)
        )
        assert torch.equal(following_BL[~is_masked_BL], sampled_BL[~is_masked_BL])
        assert torch.equal(is_masked_BL.sum(1), wanted_masked_BL.sum(1))
        index_BL1 = wanted_sampled_BL.clamp(max=scores_BLC.shape[2] - 1).long()[..., None]
        confidence_BL = confidence_BLC.gather(2, index_BL1)[..., 0]
        for b in (is_masked_BL != wanted_masked_BL).any(1).nonzero()[:, 0].tolist():
            if torch.equal(sampled_BL[b], wanted_sampled_BL[b]):
                swapped = confidence_BL[b][is_masked_BL[b] != wanted_masked_BL[b]]
                assert swapped.max() - swapped.min() < NEAR, b

    def test_options(self, target: Target) -> None:
        inputs = Spec("options", 3, 5, 7, 4).inputs(target.widest, target.device)
        inputs |= {"temperature": 0.7, "stream": 3, "guidance_scale": 1.5}
        inputs["samples_B"] = torch.tensor([11, 3, 2**31 + 5], device=target.device)
        inputs["guidance_logits_NC"] = inputs["logits_NC"].flip(0)
        self.check(self.function(target), inputs)

    def test_sizes_of_one_and_none(self, target: Target) -> None:
        for batch, length, codes in ((0, 4, 3), (1, 1, 1), (2, 1, 5), (2, 6, 1)):
            inputs = Spec("small", batch, length, codes, 1).inputs(torch.float32, target.device)
            self.check(self.function(target), inputs)

    def test_packed_rows(self, target: Target) -> None:
        """Logits of the unknown tokens only, in any order, or shared by tokens; every option."""
        for options in ({}, {"guidance_scale": 1.5}, {"guidance_scale": 0.5, "top_k": 5, "top_p": 0.8}):
            whole = Spec("packed", 3, 7, 9, 4, **options).inputs(torch.float32, target.device)
            whole["ids_BL"] = whole["ids_BL"].roll(2, 1)
            whole["ids_BL"][1] = 3
            inputs = packed(whole)
            self.check(self.function(target), inputs)
            got, wanted = self.function(target)(**inputs), self.function(target)(**whole)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
            inputs["rows_BL"] = inputs["rows_BL"].masked_fill(whole["ids_BL"] != whole["mask_token_id"], -9)
            inputs["rows_BL"] = (7 - inputs["rows_BL"]).int()
            for name in {"logits_NC", "guidance_logits_NC"} & inputs.keys():
                inputs[name] = transposed(inputs[name].flip(0))
            got = self.function(target)(**inputs)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
            inputs["rows_BL"] = inputs["rows_BL"] % 3
            self.check(self.function(target), inputs)

    def test_no_rows(self, target: Target) -> None:
        """Everything is known."""
        inputs = Spec("known", 2, 6, 9, 0).inputs(torch.float32, target.device)
        for x in self.function(target)(**packed(inputs)):
            assert torch.equal(x, inputs["ids_BL"])

    def test_known_tokens_are_not_read(self, target: Target) -> None:
        inputs = Spec("known", 2, 6, 9, 3).inputs(torch.float32, target.device)
        wanted = self.function(target)(**inputs)
        inputs["logits_NC"][:, 3:] = math.nan
        got = self.function(target)(**inputs)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))

    @pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (7, 0.3), (12, 0.999), (1, 1.0)])
    def test_ties(self, target: Target, top_k: int, top_p: float) -> None:
        """Few distinct logits, two zeros among them, and tokens that are equally sure."""
        inputs = Spec("ties", 1, 8, 12, 7, top_k, top_p).inputs(torch.float32, target.device)
        inputs["logits_NC"] = (inputs["logits_NC"] / 4).round()  # -0.0 and 0.0, too
        assert (inputs["logits_NC"] == 0).any()
        inputs["logits_NC"][:, 4:] = inputs["logits_NC"][:, :4]
        self.check(self.function(target), inputs | {"choice_temperature": 0.0})

    def test_long_samples(self, target: Target) -> None:
        inputs = Spec("long", 1, 4096, 8, 90).inputs(torch.float32, target.device)
        self.check(self.function(target), inputs | {"ids_BL": inputs["ids_BL"].flip(1)})

    def test_counts_out_of_range(self, target: Target) -> None:
        """None and negative: one token is masked; more than there are: one is decided; nothing unknown."""
        inputs = Spec("counts", 4, 6, 8, 4).inputs(torch.float32, target.device)
        inputs["num_masked_B"] = torch.tensor([0, -3, 99, 2], device=target.device)
        inputs["ids_BL"][3] = 1
        self.check(self.function(target), inputs)
        _, following = self.function(target)(**inputs)
        assert (following == inputs["mask_token_id"]).sum(1).tolist() == [1, 1, 3, 0]

    @pytest.mark.parametrize("floats", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1.0, 100.0, 1e20])
    def test_draws_of_whole_rows(self, target: Target, floats: torch.dtype, scale: float) -> None:
        """Every option at once, on rows that start inside a block of random words; sums that round."""
        spec = Spec("rows", 2, 9, 203, 8, top_k=60, top_p=0.9, guidance_scale=1.5)
        inputs = spec.inputs(floats, target.device) | {"temperature": 0.5}
        for options in ({}, {"top_k": 0}, {"top_p": 1.0}, {"top_k": 0, "top_p": 1.0}):
            changed = inputs | options
            changed["logits_NC"] = inputs["logits_NC"] * scale
            self.check(self.function(target), changed)

    @pytest.mark.parametrize("tokens", ["int32", "int64"])
    def test_samples_of_a_larger_run(self, target: Target, tokens: str) -> None:
        """Noise belongs to a sample's number."""
        whole = Spec("run", 3, 5, 8, 4).inputs(torch.float32, target.device)
        whole["ids_BL"] = whole["ids_BL"].to(getattr(torch, tokens))
        wanted = self.function(target)(**whole)
        part = {k: x[1:] if k in ("logits_NC", "ids_BL", "num_masked_B") else x for k, x in whole.items()}
        got = self.function(target)(**part, samples_B=torch.tensor([1, 2], device=target.device))
        assert all(torch.equal(x, y[1:]) for x, y in zip(got, wanted, strict=True))


def test_threads_change_nothing_in_cpp() -> None:
    if isinstance(reason := dispatch._find("sample_confident", "cpp"), str):
        pytest.skip(reason)
    inputs = SPECS[-1].inputs() | {"top_k": 100, "top_p": 0.9}
    one, *others = results_by_threads(lambda: sample_confident(**inputs, implementation="cpp"))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(other, one, strict=True))


def triton_interpreted() -> Any:
    module = dispatch._find("sample_confident", "triton")
    if isinstance(module, str) or "cpu" not in module.DEVICES:
        pytest.skip("Triton is not interpreted here")
    return module


def test_addresses_past_2_to_the_31_elements() -> None:
    """Samples 2**30 elements apart in a buffer of which only their rows are ever touched."""
    triton_interpreted()
    near = Spec("far", 3, 4, 8, 3, guidance_scale=1.5).inputs(torch.float16)
    far = torch.empty_strided((3, 4, 8), (2**30, 8, 1), dtype=torch.float16)
    for name in ("logits_NC", "guidance_logits_NC"):
        far.copy_(near[name])
        for got, wanted in zip(
            sample_confident(**near | {name: far}, implementation="triton"),
            sample_confident(**near, implementation="triton"),
            strict=True,
        ):
            assert torch.equal(got, wanted)


def test_triton_declines_what_does_not_fit_a_tile() -> None:
    unsupported = triton_interpreted().unsupported
    rows = torch.empty(1, 4096, 16384, device="meta")
    ids = torch.empty(1, 4097, dtype=torch.int64)
    assert unsupported("sample_confident", rows, ids[:, 1:]) is None
    assert "at most 16384, got 16385" in unsupported("sample_confident", torch.empty(1, 16385), ids[:, :1])
    assert "at most 4096, got 4097" in unsupported("sample_confident", torch.empty(1, 4097, 1), ids)
