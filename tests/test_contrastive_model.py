"""MAGE-C against the reference model's features, a loop over pairs, and MAGE itself."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mage_fast import MAGE, MAGEC, CheckpointError, MAGEConfig
from mage_fast.contrastive import without_projector
from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import plan_of_mask
from mage_fast.masking import count_masks, draw_plan
from mage_fast.training.optim import build_adamw
from mage_fast.training.step import TrainStep
from tests.contrastive_oracle import WEIGHT, losses, model, plain_twin, reference_twin
from tests.models import assert_near, assert_same_gradients, build, draw_ids, tiny
from tests.test_compile import mark_dynamic

# Against the reference


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-5)])
@pytest.mark.parametrize("labels", [None, [1, 2, 0]], ids=["unconditional", "labels"])
@pytest.mark.parametrize(
    ("changes", "ratios"),
    [
        ({}, [0.5, 0.7, 0.9, 0.6, 1.0, 0.8]),
        ({"drop_ratio": 0.3, "label_smoothing": 0.0}, [0.7] * 6),
        ({"padding": "mask_token", "decoder_width": 16}, [0.55] * 6),
        ({"drop_ratio": 1.0, "mask_ratio_min": 1.0}, [0.5, 1.0, 0.9, 1.0, 1.0, 0.8]),
        ({"drop_ratio": 0.3}, [0.0, 0.2, 0.9, 0.0, 1.0, 0.8]),
        ({"encoder_tokens": "unmasked"}, [0.5, 1.0, 0.9, 0.6, 1.0, 0.8]),
        ({"encoder_tokens": "unmasked"}, [1.0] * 6),
    ],
    ids=str,
)
def test_losses_and_gradients_equal_reference(
    changes: dict, ratios: list[float], labels: list[int] | None, dtype: torch.dtype, tolerance: float
) -> None:
    """Ratios of 1 leave the encoder nothing but the class token in the "unmasked" mode."""
    ours = model(label_dropout=0.0, **changes).to(dtype).train()
    ids = draw_ids(ours.config, 6)
    labels_B = None if labels is None else torch.tensor(labels)
    got = ours(ids, labels_B, mask_ratios_B=torch.tensor(ratios), rng_state=rng.new_state(5))
    theirs, projector = reference_twin(ours)
    both = None if labels_B is None else torch.cat([labels_B, labels_B])
    reconstruction, contrastive = losses(theirs, projector, ids, got.plan, MAGE.class_ids(ours, both, 6))
    assert_near(got.reconstruction_loss, reconstruction, tolerance)
    assert_near(got.contrastive_loss, contrastive, tolerance)
    loss = reconstruction + WEIGHT * contrastive
    assert_near(got.loss, loss, tolerance)

    got.loss.backward()
    loss.backward()
    # all views alike (class tokens only, without labels): gradients are 0 but for rounding
    floor = 1e-2 * max(x.grad.abs().max().item() for x in theirs.parameters() if x.grad is not None)
    for name, x in ours.projector.named_parameters():
        wanted = projector[name].grad
        assert (x.grad - wanted).abs().max() <= tolerance * max(wanted.abs().max().item(), floor), name
    plain = plain_twin(ours)
    for name, x in plain.named_parameters():
        x.grad = ours.get_parameter(name).grad
    assert_same_gradients(plain, theirs, ours.config, tolerance)


def test_gradients_reach_the_encoder_from_both_views() -> None:
    """Without reconstruction: the contrastive loss alone, whatever weighs it."""
    ours = model().double().train()
    ids = draw_ids(ours.config, 4)
    ours(ids, rng_state=rng.new_state(5)).contrastive_loss.backward()
    without = {name for name, x in ours.named_parameters() if x.grad is None}
    assert {name.split(".")[0] for name in without} == {"decoder", "head"}


# Against MAGE


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_weight_0_trains_as_mage_does(encoder_tokens: Any) -> None:
    """With dropout too where both encode the same rows."""
    dropout = 0.0 if encoder_tokens == "paper" else 0.2
    ours = model(encoder_tokens=encoder_tokens, dropout=dropout).double().train()
    ours.contrastive_weight = 0.0
    plain, ids, state = plain_twin(ours), draw_ids(ours.config, 6), rng.new_state(3)
    got, wanted = ours(ids, rng_state=state), plain(ids, rng_state=state)
    assert_near(got.loss, wanted.loss, 1e-13)
    assert_near(got.logits_NC, wanted.logits_NC, 1e-12)
    got.loss.backward()
    wanted.loss.backward()
    for name, x in ours.named_parameters():
        if name.startswith("projector."):
            assert not x.grad.any(), name
        else:
            torch.testing.assert_close(x.grad, plain.get_parameter(name).grad, rtol=1e-10, atol=1e-14)


def test_mage_still_encodes_visible_rows_only() -> None:
    ours = model().eval()
    plan = draw_plan(ours.config, torch.full((2,), 0.75), rng.new_state(1))
    x_TD = ours.embedding(draw_ids(ours.config, 2), ours.class_ids(None, 2), plan, None)
    assert plan.visible_V is not None
    visible, every = ours.encoder(x_TD, plan, None), ours.encoder(x_TD, plan, None, all_rows=True)
    assert (len(visible), len(every)) == (2 * 5, 2 * 9)
    assert_near(visible, every[plan.visible_V])


def test_swapped_views_give_the_same_loss() -> None:
    ours, ids = model().double().eval(), draw_ids(tiny(), 6)
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.5, 1, 6)[:, None]
    found = []
    for order in (list(range(6)), [3, 4, 5, 0, 1, 2]):
        plan = plan_of_mask(mask[order], mask[order].sum(1).tolist())
        found.append(ours(ids[order], plan=plan).metrics)
    torch.testing.assert_close(found[0], found[1], rtol=1e-13, atol=0)


# As it trains


def test_views_come_stacked_or_flattened() -> None:
    """Images and ids; labels of images or of views."""
    config = MAGEConfig.tiny(dropout=0.0)
    ours, images = build(config, make=MAGEC), torch.rand(2, 3, 3, 16, 16)
    ids = ours.tokenize(images)
    assert ids.shape == (6, config.num_tokens)
    assert torch.equal(ids[4], ours.tokenize(images[1, 1][None])[0])
    labels = torch.tensor([1, 0, 2])
    found = [
        ours(views, labels_B, rng_state=rng.new_state(7))
        for views in (images, images.flatten(0, 1), ids, ids.view(2, 3, -1), ids.to(torch.uint16))
        for labels_B in (labels, labels.repeat(2))
    ]
    for output in found:
        assert torch.equal(output.ids_BL, ids)
        torch.testing.assert_close(output.metrics, found[0].metrics, rtol=1e-6, atol=1e-6)
    assert ours(ids, rng_state=rng.new_state(7)).loss != found[0].loss  # labels are read


def test_metrics_are_what_is_logged() -> None:
    ours, ids = model().train(), draw_ids(tiny(), 4)
    output, plain = ours(ids), plain_twin(ours)(ids)
    assert list(output.metrics) == ["loss", "reconstruction_loss", "contrastive_loss"]
    assert list(plain.metrics) == ["loss"]
    assert not any(x.requires_grad for x in (output.metrics | plain.metrics).values())
    assert plain.metrics["loss"] == plain.loss
    total = output.metrics["reconstruction_loss"] + WEIGHT * output.metrics["contrastive_loss"]
    torch.testing.assert_close(total, output.metrics["loss"])


def test_autocast_is_near_float32() -> None:
    ours, ids, state = model().train(), draw_ids(tiny(), 8), rng.new_state(4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = ours(ids, rng_state=state)
    wanted = ours(ids, rng_state=state)
    assert {x.dtype for x in narrow.metrics.values()} == {torch.float32}
    torch.testing.assert_close(narrow.metrics, wanted.metrics, rtol=3e-2, atol=3e-2)
    grads = [torch.autograd.grad(x.contrastive_loss, ours.projector[2].weight)[0] for x in (narrow, wanted)]
    assert (grads[0] - grads[1]).norm() <= 5e-2 * grads[1].norm()


def test_trains_with_the_step_of_mage() -> None:
    """Two fixed views of eight images: pairs are told apart, and tokens are learned, at once."""
    config = tiny(encoder_depth=1, decoder_depth=1)
    torch.manual_seed(0)
    ours = MAGEC(config, contrastive_weight=1.0).train()
    ids = draw_ids(config, 8)
    others = draw_ids(config, 16, seed=2).view(2, 8, 16)
    views = torch.where(torch.rand(2, 8, 16) < 0.2, others, ids)
    step = TrainStep(ours, build_adamw(ours, 3e-3), precision="bf16")
    for number in range(60):
        step(views, torch.arange(8) % 4, rng_state=rng.new_state(1, number))
    after = ours(views, torch.arange(8) % 4, rng_state=rng.new_state(1, 99)).metrics
    assert after["contrastive_loss"] < 0.7 * math.log(8)
    assert after["reconstruction_loss"] < 0.95 * math.log(config.codebook_size)


@pytest.mark.parametrize("multiple", [1, 7, 32])
def test_padded_sizes_give_the_same_losses_and_gradients(multiple: int) -> None:
    """What CUDA graphs want: rows that fill up the plan count nowhere."""
    ours, ids, state = model().double().train(), draw_ids(tiny(), 4), rng.new_state(5)
    exact = count_masks(ours.config, torch.tensor([0.5, 0.6, 0.8, 0.9]).double())
    found = []
    for counts in (exact, exact.padded(multiple)):
        output = ours(ids, plan=counts.plan(state), rng_state=state)
        found.append([*output.metrics.values(), *torch.autograd.grad(output.loss, list(ours.parameters()))])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_compiles_to_one_graph(encoder_tokens: Any) -> None:
    ours = model(encoder_tokens=encoder_tokens, encoder_depth=1, decoder_depth=1).train()
    ids = draw_ids(ours.config, 4)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for number, ratio in enumerate([0.5, 0.95, 0.7]):
        state = rng.new_state(4, number)
        plan = draw_plan(ours.config, torch.full((4,), ratio), state)
        mark_dynamic(plan)
        found = []
        for forward in (ours, compiled):
            output = forward(ids, plan=plan, rng_state=state)
            grads = torch.autograd.grad(output.loss, list(ours.parameters()))
            found.append([*output.metrics.values(), *grads])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_nothing_waits_for_the_device(encoder_tokens: Any) -> None:
    """On tensors without values: whatever the host would have to read raises."""
    ours = model(encoder_tokens=encoder_tokens).train()
    counts = count_masks(ours.config, torch.tensor([0.6, 0.9, 1.0, 0.5]))
    with FakeTensorMode():
        for module in ours.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty(p.shape)))
        ids, state, masked, dropped = (
            torch.empty(shape, dtype=torch.int64) for shape in ((4, 16), (2,), (4,), (4,))
        )
        plan = replace(counts, num_masked_B=masked, num_dropped_B=dropped).plan(state)
        output = ours(ids, plan=plan, rng_state=state)
        output.loss.backward()
        with pytest.raises(DataDependentOutputException):
            output.contrastive_loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graph", [False, True])
def test_steps_on_a_gpu_equal_those_on_the_cpu(graph: bool) -> None:
    theirs = model().train()
    ours = copy.deepcopy(theirs).to("cuda")
    plain = TrainStep(theirs, build_adamw(theirs, 1e-3))
    step = TrainStep(ours, build_adamw(ours, 1e-3), graph=graph)
    for number in range(24):
        ids, state = draw_ids(tiny(), 6, seed=number), rng.new_state(3, number)
        on_gpu = ids.to("cuda")
        torch.cuda.set_sync_debug_mode("default" if graph and number < 12 else "error")
        try:
            got = step(on_gpu, rng_state=state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(
            got["loss"].cpu(), plain(ids, rng_state=state)["loss"], rtol=1e-3, atol=1e-3
        )


# Files and refusals


def test_saves_a_plain_mage(tmp_path: Path) -> None:
    ours, ids = build(MAGEConfig.tiny(), make=MAGEC), draw_ids(tiny(), 4)
    ours.save_pretrained(tmp_path)
    for found in (MAGE.from_pretrained(tmp_path), MAGEC.from_pretrained(tmp_path)):
        assert type(found) is MAGE
        assert found.config == ours.config
        torch.testing.assert_close(found.state_dict(), without_projector(ours.state_dict()), rtol=0, atol=0)
        assert_near(found.features(ids), ours.features(ids))


def test_training_state_holds_the_projector(tmp_path: Path) -> None:
    ours = model()
    theirs = build(tiny(), seed=1, make=MAGEC)
    assert len(ours.state_dict()) == len(without_projector(ours.state_dict())) + 4
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.projector[2].weight, ours.projector[2].weight)
    with pytest.raises(RuntimeError, match="projector"):
        theirs.load_state_dict(plain_twin(ours).state_dict())
    with pytest.raises(CheckpointError):
        MAGEC.from_pretrained(tmp_path / "nothing")


def test_default_mage_has_the_numbers_it_had() -> None:
    """The projector is drawn last, so both models start from the same weights."""
    torch.manual_seed(3)
    plain = MAGE(tiny())
    torch.manual_seed(3)
    ours = MAGEC(tiny())
    torch.testing.assert_close(without_projector(ours.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m, ids: m(ids[:5]), "MAGEC: got 5 samples, wanted two views of each image"),
        (lambda m, ids: m(torch.rand(3, 3, 8, 8)), "MAGEC: got 3 samples, wanted two views"),
        (lambda m, ids: m(ids[0]), r"MAGE: ids has shape \(16,\), wanted \(\*, 16\)"),
        (lambda m, ids: m(ids[0, 0]), "MAGEC: got 1 samples"),
        (lambda m, ids: m(ids.view(3, 2, -1)), r"MAGEC: ids has shape \(3, 2, 16\), wanted \(2, \*, \*\)"),
        (lambda m, ids: m(torch.rand(1, 3, 3, 8, 8)), r"images has shape \(1, 3, 3, 8, 8\), wanted \(2"),
        (lambda m, ids: m(ids, torch.zeros(4).long()), r"MAGE: labels has shape \(4,\), wanted \(6,\)"),
        (lambda m, ids: m(ids, torch.tensor([0, 1, 11])), "labels holds 11, wanted 0 <= labels < 11"),
        (lambda m, ids: m(ids, mask_ratios_B=torch.rand(3)), r"mask_ratios has shape \(3,\)"),
        (lambda m, ids: m(ids[:0]), r"info_nce: z has shape \(0, 256\), wanted at least 1 row"),
        (
            lambda m, ids: MAGEC(tiny(), contrastive_weight=-0.1),
            "contrastive_weight is -0.1, wanted at least 0",
        ),
        (lambda m, ids: MAGEC(tiny(), contrastive_weight=math.nan), "contrastive_weight is nan"),
        (lambda m, ids: MAGEC(tiny(), temperature=-1.0), "MAGEC: temperature is -1.0, wanted more than 0"),
    ],
)
def test_refusals(change: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        change(model(), draw_ids(tiny(), 6))
