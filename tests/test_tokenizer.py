"""The fast VQGAN against the reference VQGAN, its published names, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_fast import reference
from mage_fast.config import MAGEConfig, TokenizerConfig
from mage_fast.storage import CheckpointError
from mage_fast.tokenizer import VQGAN, Tokenizer, Upsample
from tests.published_layout import vqgan_layout

TINY = MAGEConfig.tiny().tokenizer
assert TINY is not None


def pair(config: TokenizerConfig) -> tuple[VQGAN, reference.VQGAN]:
    """A fast VQGAN with a spread codebook, and the reference with the same weights."""
    torch.manual_seed(0)
    fast = VQGAN(config)
    for name, parameter in fast.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, mean=1.0 if "weight" in name else 0.0, std=0.3)
    torch.nn.init.normal_(fast.quantize.embedding.weight)
    oracle = reference.VQGAN.from_config(config)
    oracle.load_state_dict(fast.state_dict(), strict=True)
    return fast, oracle


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


@st.composite
def configs(draw: st.DrawFn) -> TokenizerConfig:
    multipliers = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return TokenizerConfig(
        image_size=draw(st.integers(1, 3)) * 2 ** (len(multipliers) - 1),
        codebook_size=draw(st.integers(2, 40)),
        codebook_dim=draw(st.integers(1, 9)),
        base_width=draw(st.sampled_from([4, 6])),
        width_multipliers=tuple(multipliers),
        blocks_per_level=draw(st.integers(1, 3)),
        norm_groups=draw(st.sampled_from([1, 2])),
    )


@settings(max_examples=25, deadline=None)
@given(config=configs(), batch=st.integers(1, 3))
def test_equals_the_reference_at_any_size(config: TokenizerConfig, batch: int) -> None:
    fast, oracle = pair(config)
    fast.double()
    oracle.double()
    images = torch.rand(batch, 3, config.image_size, config.image_size, dtype=torch.float64)
    ids = fast.encode(images)
    z_q, wanted_ids = oracle.encode(images)
    assert ids.shape == (batch, config.grid_size**2)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, wanted_ids)
    decoded = fast.decode(ids)
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded, oracle.decode(z_q), rtol=1e-9, atol=1e-9)


def test_equals_the_reference_in_float32() -> None:
    fast, oracle = pair(TINY)
    images = torch.rand(4, 3, 16, 16)
    close(fast.encode_features(images), oracle.encoder(images))
    assert torch.equal(fast.encode(images), oracle.encode(images)[1])
    ids = torch.randint(32, (4, 16))
    close(fast.decode(ids), oracle.decode_ids(ids))
    close(fast.to(memory_format=torch.channels_last).decode(ids), oracle.decode_ids(ids))


def test_gradients_equal_the_reference() -> None:
    fast, oracle = pair(TINY)
    images = torch.rand(2, 3, 16, 16)
    weights = torch.randn(2, 8, 4, 4), torch.randn(2, 3, 16, 16)
    z_q = torch.randn(2, 8, 4, 4)
    for model in (fast, oracle):
        ((model.encoder(images) * weights[0]).sum() + (model.decoder(z_q) * weights[1]).sum()).backward()
    for (name, ours), (_, wanted) in zip(fast.named_parameters(), oracle.named_parameters(), strict=True):
        if name != "quantize.embedding.weight":
            close(ours.grad, wanted.grad)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), width=st.integers(1, 5), height=st.integers(1, 5), columns=st.integers(1, 5))
def test_upsampling_is_interpolation_and_convolution(
    batch: int, width: int, height: int, columns: int
) -> None:
    layer = Upsample(width).double()
    x = torch.randn(batch, width, height, columns, dtype=torch.float64, requires_grad=True)
    got = layer(x)
    wanted = layer.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    inputs = (x, layer.conv.weight, layer.conv.bias)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bf16", [False, True])
def test_all_of_it_runs_in_channels_last(bf16: bool) -> None:
    """What reaches a convolution, and its weights, also after loading and from contiguous inputs."""
    state = {name: x.detach().clone().contiguous() for name, x in VQGAN(TINY).state_dict().items()}
    with torch.device("meta"):
        fast = VQGAN(TINY)
    fast.load_state_dict(state, assign=True)
    again = VQGAN(TINY)
    again.load_state_dict(state)
    for model in (fast, again, copy.deepcopy(fast).bfloat16()):
        assert all(channels_last(x) for x in model.parameters() if x.dim() == 4)
    seen = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if function is F.conv2d:
                seen.append(channels_last(args[0]) and channels_last(args[1]))
            return function(*args, **(kwargs or {}))

    with Seen(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        ids = fast.encode(torch.rand(2, 3, 16, 16))
        decoded = fast.decode(ids)
        fast.decode_features(torch.randn(2, 8, 4, 4))
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in fast.modules())
    decoder = sum(isinstance(module, torch.nn.Conv2d) for module in fast.decoder.modules())
    assert len(seen) == convolutions + decoder
    assert all(seen)
    assert channels_last(decoded)


def test_gradient_passes_the_quantiser_straight_through() -> None:
    fast, _ = pair(TINY)
    fast.double()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    out = fast(images)
    assert torch.equal(out.ids, fast.encode(images))
    assert torch.equal(out.z_q, fast.quantize.lookup(out.ids, (4, 4)))
    torch.testing.assert_close(out.images, fast.decode(out.ids))
    out.z.retain_grad()
    out.images.square().sum().backward()
    assert fast.quantize.embedding.weight.grad is None
    z_q = out.z_q.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(fast.decode_features(z_q).square().sum(), z_q)
    torch.testing.assert_close(out.z.grad, wanted)
    assert fast.encoder.conv_in.weight.grad.any()


def test_codebook_learns_through_the_quantised_features() -> None:
    fast, _ = pair(TINY)
    out = fast(torch.rand(2, 3, 16, 16))
    (out.z_q - out.z.detach()).square().sum().backward()
    touched = fast.quantize.embedding.weight.grad.any(dim=1).nonzero()[:, 0]
    assert torch.equal(touched, out.ids.unique())


def test_published_names() -> None:
    with torch.device("meta"):
        fast = VQGAN()
    assert {name: tuple(x.shape) for name, x in fast.state_dict().items()} == vqgan_layout()
    assert len(vqgan_layout()) == 168


def test_is_a_tokenizer() -> None:
    fast = VQGAN(TINY)
    assert isinstance(fast, Tokenizer)
    assert (fast.codebook_size, fast.grid_size) == (32, 4)
    assert not isinstance(torch.nn.Identity(), Tokenizer)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 16, 16), r"images have shape \(3, 16, 16\), wanted \(B, 3, 16, 16\)"),
        (torch.rand(2, 1, 16, 16), r"images have shape \(2, 1, 16, 16\)"),
        (torch.rand(2, 3, 16, 32), r"images have shape \(2, 3, 16, 32\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "images are uint8, wanted a floating dtype"),
    ],
)
def test_bad_images_are_refused(images: torch.Tensor, message: str) -> None:
    fast = VQGAN(TINY)
    for method in (fast.encode, fast.encode_features, fast):
        with pytest.raises(ValueError, match=message):
            method(images)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 15, dtype=torch.int64), r"ids have shape \(2, 15\), wanted \(B, 16\)"),
        (torch.zeros(16, dtype=torch.int64), r"ids have shape \(16,\)"),
        (torch.zeros(2, 16), "ids are float32, wanted int64 or int32"),
        (torch.full((2, 16), 32), r"ids are in \[32, 32\], wanted \[0, 31\]"),
        (torch.arange(-1, 15)[None], r"ids are in \[-1, 14\], wanted \[0, 31\]"),
    ],
)
def test_bad_ids_are_refused(ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQGAN(TINY).decode(ids)


def test_half_precision_weights_take_float32_images() -> None:
    fast, _ = pair(TINY)
    images = torch.rand(2, 3, 16, 16)
    wanted = fast.encode_features(images)
    got = fast.bfloat16().encode_features(images)
    assert got.dtype == torch.bfloat16
    assert (got - wanted).norm() < 0.05 * wanted.norm()
    assert fast.decode(fast.encode(images)).dtype == torch.bfloat16


def test_compiles_without_a_graph_break() -> None:
    fast, _ = pair(TINY)
    images = torch.rand(2, 3, 16, 16)
    ids = fast.encode(images)
    assert torch.equal(torch.compile(fast.encode, backend="eager", fullgraph=True)(images), ids)
    close(torch.compile(fast.decode, backend="eager", fullgraph=True)(ids), fast.decode(ids))


def test_no_image_at_all() -> None:
    fast = VQGAN(TINY)
    assert fast.decode(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_pretrained_folder_round_trip(tmp_path: Path) -> None:
    fast, _ = pair(TINY)
    fast.save_pretrained(tmp_path / "tokenizer")
    again = VQGAN.from_pretrained(tmp_path / "tokenizer")
    assert again.config == fast.config
    ids = torch.randint(32, (2, 16))
    assert torch.equal(again.decode(ids), fast.decode(ids))


def test_pretrained_folder_of_another_size(tmp_path: Path) -> None:
    VQGAN(TINY).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"codebook_dim": 9}))
    with pytest.raises(CheckpointError, match=r"has shape .*8.*, wanted .*9"):
        VQGAN.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"colour": 9}))
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        VQGAN.from_pretrained(tmp_path)
