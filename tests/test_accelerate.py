"""``accelerate`` on a MAGE of the published layout: step, features, decoding, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mage_fast
from mage_fast import accelerate, checkpoint, reference
from mage_fast.config import MAGEConfig
from tests import vision_transformers as vit
from tests.models import CONFIGS, assert_near, build, draw_ids, tiny, twin


def pair(config: MAGEConfig, dtype: torch.dtype = torch.float32) -> tuple[reference.MAGE, reference.MAGE]:
    """A model to be accelerated and the same to be left plain, in training mode."""
    model = twin(build(config).to(dtype).train(), config)
    return model, copy.deepcopy(model)


def draw_masks(plain: reference.MAGE, batch: int = 2) -> dict[str, Tensor]:
    torch.manual_seed(7)
    drop_mask, mask = plain.draw_masks(batch, torch.device("cpu"))
    return {"drop_mask": drop_mask, "mask": mask}


def assert_same_gradients(fast: nn.Module, plain: nn.Module, tolerance: float) -> None:
    wanted = {name: x.grad for name, x in plain.named_parameters()}
    largest = max(grad.abs().max().item() for grad in wanted.values() if grad is not None)
    for name, x in fast.named_parameters():
        if wanted[name] is None:
            assert x.grad is None, name
        else:
            # the keys' bias has no gradient but rounding: softmax does not see it
            size = max(wanted[name].abs().max().item(), 1e-3 * largest)
            assert (x.grad - wanted[name]).abs().max().item() <= tolerance * size, name


# The same numbers


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_equal_the_plain_model(
    changes: dict, dtype: torch.dtype, tolerance: float
) -> None:
    config = tiny(dropout=0.0, **changes)
    model, plain = pair(config, dtype)
    ids, given = draw_ids(config, 2), draw_masks(plain)
    given["class_ids"] = torch.tensor([config.codebook_size + 2, config.codebook_size])
    handle = accelerate(model)
    assert "" in handle.replaced, str(handle)
    got, wanted = model(ids, **given), plain(ids, **given)
    assert_near(got.loss, wanted.loss, tolerance)
    assert_near(got.logits, wanted.logits[:, 1:, : config.codebook_size][given["mask"]], tolerance)
    assert torch.equal(got.mask, given["mask"])
    got.loss.backward()
    wanted.loss.backward()
    assert_same_gradients(model, plain, tolerance)


def test_the_norms_own_eps() -> None:
    model, plain = pair(tiny(dropout=0.0))
    for x in (model, plain):
        for number, norm in enumerate(part for part in x.modules() if isinstance(part, nn.LayerNorm)):
            norm.eps = 0.05 * (number + 1)
    accelerate(model)
    ids, given = draw_ids(tiny(), 2), draw_masks(plain)
    assert_near(model(ids, **given).loss, plain(ids, **given).loss)
    assert_near(model.features(ids), plain.features(ids))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_features_and_the_models_own_methods(changes: dict) -> None:
    config = tiny(**changes)
    model, plain = pair(config)
    model.eval(), plain.eval()
    ids, given = draw_ids(config, 2), draw_masks(plain)
    handle = accelerate(model)
    assert_near(handle.features(ids), plain.features(ids))
    assert_near(model.features(ids), plain.features(ids))
    latent = plain.forward_encoder(ids, **{"drop_mask_BL": given["drop_mask"], "mask_BL": given["mask"]})
    assert_near(model.forward_encoder(ids, given["drop_mask"], given["mask"]), latent)
    own = model.forward_decoder(latent, given["drop_mask"], given["mask"])
    assert_near(own, plain.forward_decoder(latent, given["drop_mask"], given["mask"]))


def test_masks_are_drawn_by_the_models_law() -> None:
    config = tiny(mask_ratio_mode=0.75, mask_ratio_std=0.0)
    model, plain = pair(config)
    accelerate(model)
    ids = draw_ids(config, 3)
    torch.manual_seed(3)
    got = model(ids)
    assert got.mask.sum(1).tolist() == [12, 12, 12]
    assert plain(ids).mask.sum(1).tolist() == [12, 12, 12]
    torch.manual_seed(3)
    wanted = model(ids)
    assert torch.equal(got.mask, wanted.mask)
    assert torch.equal(got.loss, wanted.loss)
    loss, logits, mask = got
    assert loss is got.loss
    assert logits.shape == (36, config.codebook_size)
    assert mask.shape == (3, 16)


def test_decoding_equals_that_of_our_model() -> None:
    config = MAGEConfig.tiny()
    ours = build(config)
    model = twin(ours, config).train()
    handle = accelerate(model)
    sampler = mage_fast.SamplerConfig(steps=5)
    labels = torch.tensor([1, 4])
    got = mage_fast.generate_ids(handle.mage, 2, labels_B=labels, config=sampler, seed=9)
    assert torch.equal(got, mage_fast.generate_ids(ours, 2, labels_B=labels, config=sampler, seed=9))
    images = handle.generate(3, config=sampler, seed=2)
    assert torch.equal(images, mage_fast.generate(ours, 3, config=sampler, seed=2))
    assert model.training
    assert all(part.training for part in handle.mage.encoder.modules())
    # images are tokenized by the model's own vqgan
    plain = copy.deepcopy(model.vqgan)
    images = torch.rand(2, 3, 16, 16)
    ids = plain.encode(images)[1]
    model.eval()
    assert_near(handle.features(images), handle.features(ids))
    torch.manual_seed(0)
    loss = model(images).loss
    torch.manual_seed(0)
    assert torch.equal(loss, model(ids).loss)


def test_a_tokenizer_of_ones_own() -> None:
    class Halves:
        codebook_size, grid_size = 32, 4

        def encode(self, images: Tensor) -> Tensor:
            return (images[:, 0, ::4, ::4].flatten(1) * 31.9).long()

        def decode(self, ids: Tensor) -> Tensor:
            return ids.float().view(-1, 1, 4, 4)

    model = reference.MAGE.from_config(MAGEConfig.tiny())
    model.vqgan = nn.Linear(3, 3)  # of another kind
    with pytest.raises(ValueError, match=r"MAGE has no step of ours: .* missing tensors: vqgan"):
        _ = accelerate(copy.deepcopy(model)).mage
    handle = accelerate(model, tokenizer=Halves())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model.eval()(images).mask.sum(1) > 0, torch.tensor([True, True]))
    assert_near(handle.features(images), handle.features(Halves().encode(images)))
    assert handle.generate(2, seed=0).shape == (2, 1, 4, 4)


def test_dropout_follows_the_models_mode() -> None:
    config = tiny(dropout=0.2)
    model, plain = pair(config)
    ids, given = draw_ids(config, 2), draw_masks(plain)
    handle = accelerate(model)
    losses = [model(ids, **given).loss for _ in range(2)]
    assert losses[0] != losses[1]
    assert not torch.equal(handle.features(ids), handle.features(ids))
    model.eval(), plain.eval()
    assert_near(model(ids, **given).loss, plain(ids, **given).loss)
    assert_near(handle.features(ids), plain.features(ids))
    for x in (model, plain):  # one dropout alone, a sure one
        x.token_emb.dropout.train()
        x.token_emb.dropout.p = 0.999
    assert (model(ids, **given).loss - plain(ids, **given).loss).abs() < 0.5
    assert handle.features(ids).abs().max() != plain.eval().features(ids).abs().max()


def test_mean_loss_under_dropout_equals_the_plain_models() -> None:
    config = tiny(dropout=0.25, encoder_depth=1, decoder_depth=1)
    model, plain = pair(config)
    ids, given = draw_ids(config, 2), draw_masks(plain)
    accelerate(model)
    torch.manual_seed(0)
    losses = [
        torch.stack([x(ids, **given).loss.detach() for _ in range(150)]).double() for x in (model, plain)
    ]
    error = (losses[0].var() / 150 + losses[1].var() / 150).sqrt()
    assert (losses[0].mean() - losses[1].mean()).abs() < 4.5 * error
    assert 0.6 < losses[0].std() / losses[1].std() < 1.6


# What the model tells, and what it does not


def test_the_handle_says_what_was_replaced_and_assumed() -> None:
    config = tiny(label_smoothing=0.05)
    model, _ = pair(config)
    del model.drop_ratio, model.mask_ratio_law
    handle = accelerate(model, mask_ratio_max=0.9)
    assert handle.replaced[""] == "training step"
    assert handle.replaced["decoder_blocks.1"] == "block, 2 heads of 16, MLP 32 to 128 and back"
    assert handle.skipped == {}
    assert handle.assumed["label_smoothing"] == "0.05 (attribute)"
    assert handle.assumed["drop_ratio"] == "0.5 (as published)"
    assert handle.assumed["mask_ratio_max"] == "0.9 (given)"
    assert handle.assumed["dropout"] == "0.1 (largest of nn.Dropout)"
    lines = str(handle).splitlines()
    assert lines[0] == "MAGE, accelerated"
    assert lines[1] == "replaced  blocks.0             block, 2 heads of 16, MLP 32 to 128 and back"
    assert "assumed   mask_ratio_max       0.9 (given)" in lines
    assert handle.mage.config == config.replace(mask_ratio_max=0.9)


def test_step_false_keeps_the_models_own_forward() -> None:
    config = tiny(dropout=0.0)
    model, plain = pair(config)
    ids, given = draw_ids(config, 2), draw_masks(plain)
    handle = accelerate(model, step=False)
    assert set(handle.replaced) == {"blocks.0", "blocks.1", "decoder_blocks.0", "decoder_blocks.1"}
    got, wanted = model(ids, **given), plain(ids, **given)
    assert_near(got.logits, wanted.logits)
    assert_near(got.loss, wanted.loss)
    with pytest.raises(ValueError, match="MAGE has no step of ours: step=False was given"):
        handle.generate(2)
    with pytest.raises(ValueError, match="which a MAGE's step takes; MAGE keeps its own"):
        accelerate(plain, step=False, dropout=0.0)


class WithProjection(reference.MAGE):
    """Parameters beyond the published ones: its step is another."""

    projection: nn.Linear


def another_head(model: reference.MAGE) -> None:
    model.mlm_layer.fc = nn.Linear(32, 16)


def another_block(model: reference.MAGE) -> None:
    model.decoder_blocks[1] = vit.Block(32, 2, act=nn.ReLU())


def other_heads(model: reference.MAGE) -> None:
    model.blocks[1].attn.heads, model.blocks[1].attn.scale = 4, 8**-0.5


def other_dropouts(model: reference.MAGE) -> None:
    model.blocks[0].mlp.drop.p = 0.3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (another_head, "not the published layout: MAGE: mlm_layer.fc.weight has shape (16, 32)"),
        (another_block, "decoder_blocks.1 cannot be replaced"),
        (other_heads, "blocks have [2, 4] heads, wanted blocks with one number of heads"),
        (other_dropouts, "block 0 drops 0.1 after attention and 0.3 after the MLP, wanted equal ones"),
    ],
)
def test_other_models_keep_their_forward_with_the_reason(change: Any, reason: str) -> None:
    model = reference.MAGE.from_config(tiny())
    change(model)
    handle = accelerate(model)
    assert reason in handle.skipped[""], handle.skipped[""]
    assert "blocks.0" in handle.replaced
    assert "forward" not in model.__dict__


def test_a_model_of_more_parameters_keeps_its_forward() -> None:
    model = reference.MAGE.from_config(tiny())
    model.__class__ = WithProjection
    model.projection = nn.Linear(32, 8)
    handle = accelerate(model)
    assert "unexpected" in handle.skipped[""]
    assert "projection.weight" in handle.skipped[""]
    with pytest.raises(ValueError, match="WithProjection has no step of ours: not the published layout"):
        handle.features(draw_ids(tiny(), 2))


def test_wrong_input_is_refused_by_name() -> None:
    config = tiny()
    model, plain = pair(config)
    with pytest.raises(ValueError, match=r"got \['depth'\], wanted fields of MAGEConfig"):
        accelerate(model, depth=3)
    accelerate(model)
    with pytest.raises(ValueError, match="MAGE is accelerated already"):
        accelerate(model)
    ids, given = draw_ids(config, 2), draw_masks(plain)
    with pytest.raises(ValueError, match="drop_mask is given without mask"):
        model(ids, drop_mask=given["drop_mask"])
    with pytest.raises(ValueError, match="tokens outside mask, wanted none"):
        model(ids, mask=given["drop_mask"], drop_mask=given["mask"])
    with pytest.raises(ValueError, match="mask is int64, wanted bool"):
        model(ids, mask=given["mask"].long())
    with pytest.raises(ValueError, match=r"drop_mask has shape \(1, 16\), wanted \(2, 16\)"):
        model(ids, mask=given["mask"], drop_mask=given["drop_mask"][:1])
    with pytest.raises(ValueError, match=r"this model has no tokenizer; give ids"):
        model(torch.rand(2, 3, 16, 16))


def test_published_sizes_are_recognised() -> None:
    with torch.device("meta"):
        model = reference.vit_b()
    for name in (
        "codebook_size",
        "unconditional_class_id",
        "mask_ratio_law",
        "label_smoothing",
        "drop_ratio",
    ):
        delattr(model, name)
    for block in (*model.blocks, *model.decoder_blocks):
        block.attn.how_many = block.attn.__dict__.pop("heads")
    type_of = type(model.blocks[0].attn)
    own = type_of.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        self.heads = self.how_many
        try:
            return own(self, x)
        finally:
            del self.heads

    type_of.forward = forward
    try:
        handle = accelerate(model)
    finally:
        type_of.forward = own
    assert handle.mage.config == MAGEConfig.vit_b()
    assert handle.replaced["blocks.11"] == "block, 12 heads of 64, MLP 768 to 3072 and back"
    assert handle.replaced["decoder_blocks.7"] == "block, 16 heads of 48, MLP 768 to 3072 and back"
    assert checkpoint.our_shapes(MAGEConfig.vit_b()).keys() == handle.mage.state_dict().keys()
