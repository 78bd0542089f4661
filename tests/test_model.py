"""The model against ``mage_fast.reference``, in both encoder modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mage_fast import reference
from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from tests.models import (
    CONFIGS,
    assert_near,
    assert_same_gradients,
    build,
    draw_ids,
    masks,
    tiny,
    twin,
)

# Against the reference


@pytest.mark.parametrize("labels", [None, [2, 1]], ids=["unconditional", "labels"])
@pytest.mark.parametrize("ratio", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_eval_equals_reference(changes: dict, ratio: float, labels: list[int] | None) -> None:
    config = tiny(**changes)
    model, ids = build(config), draw_ids(config, 2)
    theirs, labels_B = twin(model, config), None if labels is None else torch.tensor(labels)
    class_ids = model.class_ids(labels_B, 2)
    ours = model(ids, labels_B, mask_ratios_B=torch.full((2,), ratio), rng_state=rng.new_state(3))
    drop_mask, mask = masks(ours.plan)
    wanted = theirs(ids, drop_mask=drop_mask, mask=mask, class_ids=class_ids)

    packed = model.encoder(model.embedding(ids, class_ids, ours.plan, None), ours.plan, None)
    encoded = theirs.forward_encoder(ids, drop_mask, mask, class_ids).flatten(0, 1)
    assert ours.plan.visible_V is not None
    assert_near(packed, encoded[ours.plan.visible_V])
    assert_near(ours.logits_NC, wanted.logits[:, 1:, : config.codebook_size][mask])
    assert_near(ours.loss, wanted.loss)
    assert torch.equal(ours.ids_BL, ids)


def test_nothing_masked_is_no_loss() -> None:
    config = tiny(dropout=0.0)
    model, ids = build(config).train(), draw_ids(config, 2)
    ours = model(ids, mask_ratios_B=torch.zeros(2), rng_state=rng.new_state(3))
    ours.loss.backward()
    assert ours.loss == 0
    assert all(not x.grad.any() for x in model.parameters() if x.grad is not None)
    encoded = model.encoder(model.embedding(ids, model.class_ids(None, 2), ours.plan, None), ours.plan, None)
    assert_near(encoded, twin(model, config).forward_encoder(ids, *masks(ours.plan)).flatten(0, 1))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_decoding_logits_equal_reference(changes: dict) -> None:
    """All positions, nothing dropped, a different number of masked tokens in each image."""
    config = tiny(**changes)
    model, ids = build(config), draw_ids(config, 3)
    mask = torch.rand(ids.shape) < torch.tensor([[0.2], [0.9], [2.0]])
    logits = model.logits(ids.masked_fill(mask, -7), mask)
    wanted = twin(model, config)(ids, mask=mask).logits[:, 1:, : config.codebook_size]
    assert_near(logits, wanted)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_features_equal_reference(changes: dict) -> None:
    config = tiny(**changes)
    model, ids = build(config), draw_ids(config, 2)
    theirs = twin(model, config)
    assert_near(model.features(ids), theirs.features(ids))
    x = theirs.embed(ids, None)
    of_all_NBD = model.block_features(ids)
    assert len(of_all_NBD) == config.encoder_depth
    for number, block in enumerate(theirs.blocks):
        x = block(x)
        assert_near(of_all_NBD[number], x[:, 1:].mean(1))
        assert_near(model.features(ids, block=number, pool=False), x[:, 1:])
        assert_near(model.features(ids, block=number), x[:, 1:].mean(1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("ratios", [(0.5, 0.5), (0.7, 0.7), (1.0, 1.0), (0.55, 0.9)], ids=str)
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_equal_reference(
    changes: dict, ratios: tuple[float, float], dtype: torch.dtype, tolerance: float
) -> None:
    config = tiny(dropout=0.0, label_dropout=0.0, **changes)
    model, ids = build(config).to(dtype).train(), draw_ids(config, 2)
    theirs, labels = twin(model, config), torch.tensor([1, 2])
    ours = model(ids, labels, mask_ratios_B=torch.tensor(ratios), rng_state=rng.new_state(5))
    drop_mask, mask = masks(ours.plan)
    wanted = theirs(ids, drop_mask=drop_mask, mask=mask, class_ids=model.class_ids(labels, 2))
    assert_near(ours.loss, wanted.loss, tolerance)
    ours.loss.backward()
    wanted.loss.backward()
    assert_same_gradients(model, theirs, config, tolerance)


def test_an_image_without_masks_equals_reference() -> None:
    changes = CONFIGS["nothing dropped"]
    test_loss_and_gradients_equal_reference(changes, (0.0, 0.9), torch.float64, 1e-11)


@pytest.mark.slow
def test_vit_b_equals_reference() -> None:
    config = MAGEConfig.vit_b(tokenizer=None)
    model, ids = build(config), draw_ids(config, 1)
    with torch.no_grad():
        ours = model(ids, mask_ratios_B=torch.tensor([0.7]), rng_state=rng.new_state(3))
        drop_mask, mask = masks(ours.plan)
        assert (drop_mask.sum(), mask.sum()) == (128, 180)
        wanted = twin(model, config)(ids, drop_mask=drop_mask, mask=mask)
    assert_near(ours.logits_NC, wanted.logits[:, 1:, :1024][mask])
    assert_near(ours.loss, wanted.loss)


# The mode without [M] in the encoder


def unmasked_oracle(theirs: reference.MAGE, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One image at a time: the reference's blocks over the class token and the unmasked tokens only."""
    losses, encoded = [], []
    for ids_1L, mask_1L in zip(ids.split(1), mask.split(1), strict=True):
        x_1KD = theirs.forward_encoder(ids_1L, mask_1L, mask_1L)
        logits_1SV = theirs.forward_decoder(x_1KD, mask_1L, mask_1L)
        losses.append(theirs.forward_loss(ids_1L, logits_1SV, mask_1L) * mask_1L.sum())
        encoded.append(x_1KD[0])
    return torch.stack(losses).sum() / mask.sum(), encoded


@pytest.mark.parametrize("padding", ["class_token", "mask_token"])
def test_unmasked_mode_equals_a_loop_over_images(padding: str) -> None:
    config = tiny(encoder_tokens="unmasked", dropout=0.0, padding=padding, decoder_width=48)
    model, ids = build(config).double().train(), draw_ids(config, 3)
    theirs = twin(model, config)
    ours = model(ids, mask_ratios_B=torch.tensor([0.5, 0.8, 1.0]), rng_state=rng.new_state(2))
    assert ours.plan.cu_seqlens.diff().tolist() == [9, 4, 1]
    assert ours.plan.max_seqlen == 9
    packed = model.encoder(model.embedding(ids, model.class_ids(None, 3), ours.plan, None), ours.plan, None)
    loss, encoded = unmasked_oracle(theirs, ids, ours.plan.is_masked_BL)
    assert_near(packed, torch.cat(encoded), 1e-11)
    assert_near(ours.loss, loss, 1e-11)
    ours.loss.backward()
    loss.backward()
    assert_same_gradients(model, theirs, config, 1e-11)


def test_unmasked_mode_decodes_as_it_trains() -> None:
    config = tiny(encoder_tokens="unmasked")
    model, ids = build(config), draw_ids(config, 3)
    ours = model(ids, mask_ratios_B=torch.tensor([0.5, 0.8, 1.0]), rng_state=rng.new_state(2))
    logits = model.logits(ids, ours.plan.is_masked_BL)
    assert_near(logits[ours.plan.is_masked_BL], ours.logits_NC)
