"""The reference path against the equations, computed a second time here in float64."""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

import mage_fast.reference
from mage_fast.config import MAGEConfig
from mage_fast.reference import MAGE, VQGAN, vit_b, vit_l
from tests.published_layout import mage_layout
from tests.reference_oracle import SIZES, ids_and_masks, oracle_block, oracle_logits, tiny, tiny_vqgan


def test_imports_nothing_else_of_the_package() -> None:
    for path in Path(mage_fast.reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                roots = set() if node.level == 1 else {(node.module or "").split(".")[0]}
            else:
                continue
            assert roots <= {"torch", "jaxtyping"} | set(sys.stdlib_module_names), (path, roots)


def test_published_names_and_shapes() -> None:
    with torch.device("meta"):
        base, large = vit_b(), vit_l()
    assert len(base.state_dict()) == 433
    assert {name: tuple(x.shape) for name, x in base.state_dict().items()} == mage_layout()
    assert {name: tuple(x.shape) for name, x in large.state_dict().items()} == mage_layout(1024, 24, 1024)
    assert base.blocks[0].attn.heads == 12
    assert base.decoder_blocks[0].attn.heads == large.blocks[0].attn.heads == 16
    assert (base.mask_token_id, base.unconditional_class_id) == (2024, 1100)


def test_position_ids() -> None:
    position_ids = tiny().state_dict()["token_emb.position_ids"]
    assert position_ids.dtype == torch.int64
    assert position_ids.tolist() == [list(range(17))]


def test_cost_is_the_published_one() -> None:
    with torch.device("meta"):
        vqgan = VQGAN()
        image, code = torch.empty(1, 3, 256, 256), torch.empty(1, 256, 16, 16)
    with FlopCounterMode(display=False) as encode:
        vqgan.encode(image)
    with FlopCounterMode(display=False) as decode:
        vqgan.decode(code)
    assert encode.get_total_flops() / 1e9 == pytest.approx(129, abs=0.6)
    assert decode.get_total_flops() / 1e9 == pytest.approx(187, abs=0.6)
    sizes = {"encoder_width": 96, "encoder_heads": 2, "decoder_width": 96, "decoder_heads": 2}
    with FlopCounterMode(display=False) as narrow:
        MAGE(**sizes)(torch.zeros(1, 256, dtype=torch.int64))

    def transformer(width: int) -> float:
        blocks = 12 * (24 * width**2 * 129 + 4 * width * 129**2) + 8 * (
            24 * width**2 * 257 + 4 * width * 257**2
        )
        return blocks + 2 * width**2 * (129 + 257) + 2 * width * 2025 * 257

    assert narrow.get_total_flops() == transformer(96)
    assert transformer(768) / 1e9 == pytest.approx(54, abs=0.6)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = MAGE(**(SIZES | {"encoder_width": 96}))
    qkv = model.blocks[1].attn.qkv
    assert qkv.weight.abs().max() <= math.sqrt(6 / (96 + 288))
    assert qkv.weight.abs().max() > 0.98 * math.sqrt(6 / (96 + 288))
    assert not qkv.bias.any()
    for embedding in (model.token_emb.word_embeddings, model.token_emb.position_embeddings):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (model.norm.weight == 1).all()
    assert (model.norm.eps, model.mlm_layer.ln.eps) == (1e-6, 1e-5)


@pytest.mark.parametrize("drop_ratio", [0.0, 0.25, 0.5])
def test_drawn_masks(drop_ratio: float) -> None:
    model = MAGE(**(SIZES | {"grid_size": 5}), drop_ratio=drop_ratio)
    for _ in range(20):
        drop_mask, mask = model.draw_masks(4, torch.device("cpu"))
        assert (drop_mask.sum(1) == math.ceil(25 * drop_ratio)).all()
        assert mask.sum(1).unique().numel() == 1
        assert 13 <= mask.sum(1)[0] <= 25
        assert not (drop_mask & ~mask).any()


def test_mask_ratio_law() -> None:
    torch.manual_seed(0)
    model = MAGE(**(SIZES | {"grid_size": 16}))
    counts = np.array([int(model.draw_masks(1, torch.device("cpu"))[1].sum()) for _ in range(3000)])
    law = stats.truncnorm((0.5 - 0.55) / 0.25, (1.0 - 0.55) / 0.25, loc=0.55, scale=0.25)
    assert law.mean() == pytest.approx(0.694, abs=1e-3)
    # a count n stands for the ratios in ((n - 1) / L, n / L]
    assert stats.kstest((counts - np.random.default_rng(0).random(3000)) / 256, law.cdf).pvalue > 1e-3


def test_fixed_mask_ratio() -> None:
    model = MAGE(**SIZES, mask_ratio_mode=0.7, mask_ratio_std=0.0)
    assert model.draw_masks(2, torch.device("cpu"))[1].sum(1).tolist() == [math.ceil(0.7 * 16)] * 2


def test_equal_noise_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MAGE(**SIZES, mask_ratio_mode=0.7, mask_ratio_std=0.0)
    distinct = torch.rand(2, 16)
    draws = iter([torch.zeros(2, 16), distinct])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(draws))
    drop_mask, mask = model.draw_masks(2, torch.device("cpu"))
    assert torch.equal(mask, distinct.argsort(1).argsort(1) < 12)
    assert torch.equal(drop_mask, distinct.argsort(1).argsort(1) < 8)


def test_logits_and_loss_equal_the_equations() -> None:
    model = tiny()
    ids, drop_mask, mask = ids_and_masks()
    out = model(ids, drop_mask=drop_mask, mask=mask)
    state = model.state_dict()
    total = 0.0
    for b in range(3):
        logits = oracle_logits(state, ids[b].tolist(), drop_mask[b].tolist(), mask[b].tolist())
        torch.testing.assert_close(out.logits[b], logits, rtol=1e-9, atol=1e-9)
        for l in range(16):
            row = logits[l + 1, :24].numpy()
            log_p = row - np.log(np.exp(row - row.max()).sum()) - row.max()
            total += mask[b, l].item() * (-0.9 * log_p[ids[b, l]] - 0.1 * log_p.mean())
    assert out.logits.shape == (3, 17, 31)
    assert out.loss.item() == pytest.approx(total / 33, rel=1e-10)
    assert torch.equal(out.mask, mask)


def test_masked_ids_are_hidden_and_visible_ones_are_not() -> None:
    model = tiny()
    ids, drop_mask, mask = ids_and_masks()
    before = model(ids, drop_mask=drop_mask, mask=mask).logits
    hidden = torch.where(mask, (ids + 7) % 24, ids)
    assert torch.equal(model(hidden, drop_mask=drop_mask, mask=mask).logits, before)
    shown = torch.where(mask, ids, (ids + 7) % 24)
    assert not torch.allclose(model(shown, drop_mask=drop_mask, mask=mask).logits, before)
    assert not torch.allclose(model(ids, mask=mask).logits, before)
    classes = torch.tensor([24, 25, 29])
    assert not torch.allclose(model(ids, drop_mask=drop_mask, mask=mask, class_ids=classes).logits, before)


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
def test_padding(padding: str) -> None:
    model = tiny(padding=padding)
    model.decoder_pos_embed_learned.data.zero_()
    ids, drop_mask, mask = ids_and_masks()
    # without positions the decoder cannot tell one padded position from another
    for logits, masked in zip(model(ids, drop_mask=drop_mask, mask=mask).logits, mask, strict=True):
        rows = logits[1:][masked]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))
        assert torch.allclose(rows[0], logits[0]) == (padding == "class_token")
    loss = model(ids, drop_mask=drop_mask, mask=mask).loss
    loss.backward()
    assert (model.mask_token.grad is not None) == (padding == "mask_token")


def test_no_gradient_reaches_the_words_through_the_output() -> None:
    model = tiny()
    ids = torch.arange(16)[None] % 4
    model(ids, mask=torch.arange(16)[None] < 9).loss.backward()
    used = {0, 1, 2, 3, 27, 30}
    grad = model.token_emb.word_embeddings.weight.grad
    assert {v for v in range(31) if grad[v].any()} == used


def test_unused_parameters_do_not_matter() -> None:
    model = tiny()
    ids, drop_mask, mask = ids_and_masks()
    before = model(ids, drop_mask=drop_mask, mask=mask).logits
    unused = ("cls_token", "pos_embed", "patch_embed", "mask_token", "decoder_pos_embed", "decoder_pred")
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in unused:
            assert not parameter.requires_grad
            parameter.data.fill_(torch.nan)
    assert torch.equal(model(ids, drop_mask=drop_mask, mask=mask).logits, before)


def test_scores_leave_autocast() -> None:
    model = MAGE(**SIZES)
    seen = []
    model.blocks[0].attn.attn_drop.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids_and_masks()[0])
    assert seen == [torch.float32]
    assert out.loss.isfinite()


def test_dropout_only_in_training() -> None:
    model = tiny()
    ids, drop_mask, mask = ids_and_masks()
    first, second = (model(ids, drop_mask=drop_mask, mask=mask).logits for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    first, second = (model(ids, drop_mask=drop_mask, mask=mask).logits for _ in range(2))
    assert not torch.allclose(first, second)


def test_images_are_tokenized_without_gradient() -> None:
    vqgan = tiny_vqgan()
    model = tiny(grid_size=4, vqgan=vqgan)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    mask = torch.arange(16).expand(2, -1) < 9
    ids = vqgan.encode(images)[1]
    assert torch.equal(model.tokenize(images), ids)
    out = model(images, mask=mask)
    assert out.loss == model(ids, mask=mask).loss
    out.loss.backward()
    assert all(parameter.grad is None for parameter in vqgan.parameters())


def test_features_are_the_mean_before_the_norm() -> None:
    model = tiny()
    ids = ids_and_masks()[0]
    features = model.features(ids)
    state = model.state_dict()
    for b in range(3):
        x = state["token_emb.word_embeddings.weight"][[27, *ids[b].tolist()]]
        x = x + state["token_emb.position_embeddings.weight"]
        x = F.layer_norm(
            x, (24,), state["token_emb.LayerNorm.weight"], state["token_emb.LayerNorm.bias"], 1e-6
        )
        for n in range(2):
            x = oracle_block(x, state, f"blocks.{n}")
        torch.testing.assert_close(features[b], x[1:].mean(0))


def test_from_config() -> None:
    model = MAGE.from_config(MAGEConfig.tiny(padding="mask_token"))
    assert model.padding == "mask_token"
    assert model(torch.rand(2, 3, 16, 16)).logits.shape == (2, 17, 44)
    assert not hasattr(MAGE.from_config(MAGEConfig.tiny(tokenizer=None)), "vqgan")


def test_drop_mask_without_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="drop_mask is given without mask"):
        tiny()(ids_and_masks()[0], drop_mask=ids_and_masks()[1])


def test_vqgan_rounds_trip_through_its_ids() -> None:
    vqgan = tiny_vqgan()
    z_q, ids = vqgan.encode(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    assert ids.shape == (2, 16)
    assert torch.equal(vqgan.decode_ids(ids), vqgan.decode(z_q))
    z = vqgan.encoder(torch.rand(2, 3, 8, 8, dtype=torch.float64))
    distance = torch.cdist(z.permute(0, 2, 3, 1).reshape(32, 5), vqgan.quantize.embedding.weight)
    assert torch.equal(vqgan.quantize(z)[1].flatten(), distance.argmin(1))
