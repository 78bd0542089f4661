"""``accelerate`` on the blocks of vision transformers: equal results, and what is left alone and why."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mage_fast import accelerate
from tests import vision_transformers as vit
from tests.models import assert_near


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases too, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for x in module.parameters():
        if x.dim() == 1:
            x.data = torch.randn(x.shape, generator=generator) * 0.3 + x.data
    return module


def rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(
    fast: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-5, **options: Any
) -> None:
    """Results and gradients, of the input and of every parameter."""
    grad = rows(*plain(x, **options).shape, seed=2).to(x)
    results = []
    for module in (fast, plain):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        parameters = {name: p for name, p in module.named_parameters() if "table" not in name}
        grads = torch.autograd.grad(out, [leaf, *parameters.values()], grad)
        results.append({"output": out, "input": grads[0], **dict(zip(parameters, grads[1:], strict=True))})
    largest = max(value.abs().max() for name, value in results[1].items() if name != "output")
    for name, wanted in results[1].items():
        # the keys' bias has no gradient but rounding
        size = max(wanted.abs().max(), 1e-2 * largest)
        assert (results[0][name] - wanted).abs().max() <= tolerance * size, name


# What is replaced

WHOLE: dict[str, dict[str, Any]] = {
    "timm": {},
    "timm, no qkv bias": {"qkv_bias": False},
    "MAE": {"mlp": vit.OneDropMlp},
    "heads under no known name": {"attention": vit.UnnamedHeadsAttention, "num_heads": 1},
    "other eps": {"norm": partial(nn.LayerNorm, eps=0.1)},
    "head dimension 24": {"dim": 72, "num_heads": 3},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("options", WHOLE.values(), ids=WHOLE)
def test_blocks_equal_their_own_forward(options: dict, dtype: torch.dtype, tolerance: float) -> None:
    plain = randomised(vit.Block(**options)).to(dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    handle = accelerate(model)
    assert list(handle.replaced) == ["0"]
    assert not handle.skipped
    x = rows(3, 7, options.get("dim", 16)).to(dtype)
    assert_same(model[0], plain, x, tolerance)
    assert_same(model.eval()[0], plain.eval(), x.transpose(0, 1), tolerance)


@given(
    heads=st.integers(1, 4), head_features=st.sampled_from([8, 16, 48]), hidden=st.integers(1, 40),
    batch=st.integers(1, 3), length=st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_blocks_of_any_size(heads: int, head_features: int, hidden: int, batch: int, length: int) -> None:
    width = heads * head_features
    plain = vit.Block(width, heads)
    plain.mlp = vit.Mlp(width, hidden, nn.GELU(), 0.0)
    randomised(plain)
    fast = copy.deepcopy(plain)
    accelerate(fast)
    assert_near(fast(rows(batch, length, width)), plain(rows(batch, length, width)))


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "layer scale": ({"layer_scale": True}, "ls1 is LayerScale, wanted nn.Identity"),
    "drop path": ({"drop_path": 0.3}, "drop_path1 is DropPath, wanted nn.Identity"),
    "other norm": ({"norm": vit.LayerScale}, "norm1 is LayerScale, wanted nn.LayerNorm"),
    "norm without bias": (
        {"norm": partial(nn.LayerNorm, bias=False)},
        "norm1 is LayerNorm((16,), eps=1e-05, elementwise_affine=True, bias=False), wanted "
        "nn.LayerNorm(16) with weight and bias",
    ),
}


@pytest.mark.parametrize(("options", "reason"), PARTS.values(), ids=PARTS)
def test_attention_and_mlp_where_the_block_is_another(options: dict, reason: str) -> None:
    plain = randomised(vit.Block(**options))
    fast = copy.deepcopy(plain)
    handle = accelerate(fast)
    assert list(handle.replaced) == ["attn", "mlp"]
    assert handle.skipped == {"": reason}
    torch.manual_seed(0)
    x = rows(4, 5, 16)
    assert_same(fast.eval(), plain.eval(), x)
    results = []
    for module in (fast.train(), plain.train()):  # drop path draws the same numbers for both
        torch.manual_seed(3)
        results.append(module(x))
    assert_near(results[0], results[1])


# What is left alone

ALONE: dict[str, tuple[dict[str, Any], str, str]] = {
    "query norm": ({"qk_norm": True}, "attn", "q_norm is LayerNorm, wanted nn.Identity"),
    "causal": ({"attention": vit.CausalAttention}, "attn", "its result differs by"),
    "heads first": ({"attention": vit.HeadsFirstAttention}, "attn", "its result differs by"),
    "own dropout": (
        {"attention": vit.FunctionalDropoutAttention},
        "attn",
        "in training mode, being no",
    ),
    "a table": (
        {"attention": vit.BiasedAttention},
        "attn",
        "has a tensor 'relative_position_bias_table' that is not known",
    ),
    "windows": (
        {"attention": vit.WindowAttention},
        "attn",
        "its own forward raises AssertionError on rows [B, S, D]: wanted whole windows",
    ),
    "7 features a head": (
        {"dim": 14},
        "attn",
        "wanted heads of a multiple of 8 features up to 256",
    ),
    "ReLU": ({"act": nn.ReLU()}, "mlp", "eval mode: act is ReLU(), wanted erf GELU"),
    "tanh GELU": ({"act": nn.GELU("tanh")}, "mlp", "act is GELU(approximate='tanh'), wanted erf GELU"),
    "no bias": ({"mlp_options": {"bias": False}}, "mlp", "fc1 has no bias"),
}


@pytest.mark.parametrize(("options", "part", "reason"), ALONE.values(), ids=ALONE)
def test_what_we_do_not_compute_is_left_alone_with_the_reason(options: dict, part: str, reason: str) -> None:
    plain = randomised(vit.Block(**options))
    fast = copy.deepcopy(plain)
    handle = accelerate(fast)
    other = {"attn": "mlp", "mlp": "attn"}[part]
    assert list(handle.replaced) == [other]
    assert reason in handle.skipped[part]
    assert part in handle.skipped[""] or "largest" in handle.skipped[""] or reason in handle.skipped[""]
    assert_same(fast.eval(), plain.eval(), rows(2, 4, options.get("dim", 16)))


def test_calls_that_we_do_not_compute_go_to_the_own_forward() -> None:
    plain = randomised(vit.Block())
    fast = copy.deepcopy(plain)
    accelerate(fast)
    x, mask = rows(2, 6, 16), torch.rand(6, 6) > 0.4
    mask.fill_diagonal_(True)
    assert not torch.allclose(plain(x), plain(x, attn_mask=mask))
    for options in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": None, "is_causal": False}):
        assert_near(fast(x, **options), plain(x, **options))
    assert fast(x[:0]).shape == (0, 6, 16)
    assert_near(fast(x=x), plain(x))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        fast()


def test_nothing_to_replace_says_what_was_looked_for() -> None:
    looked = (
        r"nothing to replace in Linear; looked for block \(attn, mlp, norm1, norm2\); attention \(proj, qkv\)"
    )
    with pytest.raises(ValueError, match=looked):
        accelerate(nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match=r"published MAGE layout; attn: q_norm is LayerNorm, wanted nn.Identity"
    ):
        accelerate(nn.ModuleDict({"attn": vit.Attention(16, 2, qk_norm=True)}))
    with pytest.raises(ValueError, match=r"got \['dropout'\], which a MAGE's step takes; Block has not the"):
        accelerate(vit.Block(), dropout=0.0)
    with pytest.raises(ValueError, match=r"got nn.DataParallel, wanted a module or DistributedDataParallel"):
        accelerate(nn.DataParallel(vit.Block()))


# The proof itself changes nothing


def test_the_proof_leaves_no_trace() -> None:
    model = vit.VisionTransformer(drop=0.2, layer_scale=True)
    model.blocks[0].attn.attn_drop.eval()
    before = {name: (x, x.clone()) for name, x in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert modes == [module.training for module in model.modules()]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.2] * 8
    for name, x in model.named_parameters():
        assert x is before[name][0]
        assert torch.equal(x, before[name][1])


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_models_in_bfloat16_or_without_memory_are_proven_too(device: str) -> None:
    model = vit.VisionTransformer().to(torch.bfloat16).to(device)
    assert list(accelerate(model).replaced) == ["blocks.0", "blocks.1"]


# Dropout


def moments(block: nn.Module, x_SD: Tensor, copies: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and fourth central moment of the output over independent dropouts."""
    torch.manual_seed(seed)
    with torch.no_grad():
        out = block(x_SD.expand(copies, -1, -1)).double()
    mean = out.mean(0)
    return mean, (out - mean).square().mean(0), (out - mean).pow(4).mean(0)


@pytest.mark.parametrize("alone", ["attn_drop", "proj_drop", "drop1", "drop2", "drop", ""])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_dropout_keeps_its_law(layer_scale: bool, alone: str) -> None:
    """Each dropout alone, and all together; a quarter is the same in 8 bits, 16 bits and floats."""
    copies = 20000
    mlp = vit.OneDropMlp if alone == "drop" else vit.Mlp
    plain = randomised(vit.Block(drop=0.25, mlp=mlp, layer_scale=layer_scale)).train()
    for name, part in plain.named_modules():
        if isinstance(part, nn.Dropout) and alone not in ("", name.rpartition(".")[2]):
            part.p = 0.0
    fast = copy.deepcopy(plain)
    assert list(accelerate(fast).replaced) == (["attn", "mlp"] if layer_scale else [""])
    x_SD = rows(4, 16)
    (mean, var, fourth), (mean_0, var_0, fourth_0) = (
        moments(block, x_SD, copies, seed) for block, seed in ((fast, 0), (plain, 1))
    )
    assert var_0.min() > 1e-10
    assert ((mean - mean_0) / ((var + var_0) / copies).sqrt()).abs().max() < 5
    spread = ((fourth - var.square() + fourth_0 - var_0.square()) / copies).sqrt()
    assert ((var - var_0) / spread).abs().max() < 5
    assert abs((var / var_0).mean() - 1) < 0.03


def test_each_dropout_follows_its_own_mode() -> None:
    plain = randomised(vit.Block(drop=0.25)).eval()
    fast = copy.deepcopy(plain)
    accelerate(fast)
    x = rows(1, 4, 16)
    assert_near(fast(x), plain(x))
    for name in ("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"):
        fast.get_submodule(name).train()
        assert not torch.allclose(fast(x), plain(x), rtol=1e-3)
        fast.get_submodule(name).eval()


def test_dropout_follows_the_seed_and_activation_checkpointing() -> None:
    block = randomised(vit.Block(drop=0.3)).train()
    accelerate(block)
    x = rows(3, 5, 16)
    outs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        outs.append(block(x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    grads = []
    for run in (block, lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(6)
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(run(leaf).square().sum(), leaf)
    assert torch.equal(grads[0], grads[1])
