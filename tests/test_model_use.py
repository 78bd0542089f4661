"""The model's sizes, checkpoints, randomness, precision, compilation, and what it refuses."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mage_fast import checkpoint, reference
from mage_fast.blocks import Block, run_blocks
from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng
from mage_fast.kernels.dispatch import use_implementation
from mage_fast.masking import draw_plan
from mage_fast.model import MAGE
from tests.models import (
    CONFIGS,
    assert_near,
    build,
    draw_ids,
    masks,
    tiny,
)

# Sizes and plans


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    config = tiny()
    model, ids = build(config), draw_ids(config, 1)
    state = rng.new_state(0)
    assert torch.equal(model(ids.to(dtype), rng_state=state).loss, model(ids, rng_state=state).loss)


def test_rows_that_fill_a_plan_up_count_nothing() -> None:
    config = tiny(dropout=0.0)
    model, ids = build(config).double(), draw_ids(config, 2)
    plan = draw_plan(config, torch.tensor([0.6, 0.9]), rng.new_state(0))
    padded = plan._replace(masked_index_N=F.pad(plan.masked_index_N, (0, 5), value=-1))
    losses = [model(ids, plan=p).loss for p in (plan, padded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-14, atol=0)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-14)


def test_nothing_masked_costs_nothing() -> None:
    config = tiny(dropout=0.0)
    model = build(config).train()
    output = model(draw_ids(config, 2), mask_ratios_B=torch.zeros(2))
    output.loss.backward()
    assert output.loss == 0
    assert output.logits_NC.shape == (0, config.codebook_size)
    assert not any(x.grad.any() for x in model.parameters() if x.grad is not None)


def test_images_are_tokenized_without_gradient() -> None:
    model = MAGE(MAGEConfig.tiny())
    images = torch.rand(2, 3, 16, 16)
    output = model(images, rng_state=rng.new_state(0))
    output.loss.backward()
    assert isinstance(model.tokenizer, nn.Module)
    assert torch.equal(output.ids_BL, model.tokenizer.encode(images))
    assert all(x.grad is None and not x.requires_grad for x in model.tokenizer.parameters())


class BatchTokenizer(nn.Module):
    """One of the user's own, with batch statistics."""

    codebook_size = 32

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def encode(self, images: Tensor) -> Tensor:
        return (self.norm(images)[:, 0].flatten(1).sigmoid() * 31).long()

    def decode(self, ids: Tensor) -> Tensor:
        side = int(ids.shape[1] ** 0.5)
        return ids.view(-1, 1, side, side).expand(-1, 3, -1, -1) / 31


def test_a_tokenizer_of_ones_own_stays_in_eval_mode() -> None:
    tokenizer = BatchTokenizer()
    model = MAGE(tiny(), tokenizer)
    images = torch.randn(3, 3, 4, 4)
    first = model.train()(images).ids_BL
    assert model.training
    assert not tokenizer.norm.training
    assert tokenizer.norm.num_batches_tracked == 0
    assert torch.equal(first[:1], model(images[:1]).ids_BL), "ids of an image do not depend on its batch"


# Checkpoints


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_names_and_shapes(changes: dict) -> None:
    config = tiny(**changes)
    assert {k: tuple(v.shape) for k, v in MAGE(config).state_dict().items()} == checkpoint.our_shapes(config)


def test_pretrained_from_a_published_file(tmp_path: Path) -> None:
    """The published widths, which tell the heads; one block each and 2 x 2 tokens, to be quick."""
    torch.manual_seed(0)
    theirs = reference.MAGE(grid_size=2, encoder_depth=1, decoder_depth=1).eval()
    path = tmp_path / "mage-vitb.pth"
    torch.save({"model": theirs.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    model = MAGE.from_pretrained(path)
    config = model.config
    assert (config.grid_size, config.encoder_heads, config.decoder_heads) == (2, 12, 16)
    assert not model.training
    ids = draw_ids(config, 2)
    ours = model(ids, mask_ratios_B=torch.full((2,), 0.75), rng_state=rng.new_state(0))
    drop_mask, mask = masks(ours.plan)
    wanted = theirs(ids, drop_mask=drop_mask, mask=mask)
    assert_near(ours.logits_NC, wanted.logits[:, 1:, :1024][mask])
    assert_near(ours.loss, wanted.loss)
    assert_near(model.features(ids), theirs.features(ids))


def test_pretrained_round_trip_is_bit_equal_and_trainable(tmp_path: Path) -> None:
    model = MAGE(MAGEConfig.tiny(padding="mask_token"))
    model.save_pretrained(tmp_path)
    again = MAGE.from_pretrained(tmp_path)
    assert again.config == model.config
    before = {name: x.clone() for name, x in again.state_dict().items()}
    torch.testing.assert_close(before, dict(model.state_dict()), rtol=0, atol=0)
    trainable = {name for name, x in model.named_parameters() if x.requires_grad}
    assert {name for name, x in again.named_parameters() if x.requires_grad} == trainable
    assert not any(name.startswith("tokenizer.") for name in trainable)
    assert not any(x.is_meta for x in [*again.parameters(), *again.buffers()])

    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.features(images), model.eval().features(images))
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    again.train()(images).loss.backward()
    optimizer.step()
    after = again.state_dict()
    assert all(torch.equal(before[name], x) == (name not in trainable) for name, x in after.items())


# Randomness


def test_training_repeats_by_seed_and_step() -> None:
    config = tiny()
    model, ids = build(config).train(), draw_ids(config, 4)

    def run(seed: int, step: int) -> list[Tensor]:
        loss = model(ids, rng_state=rng.new_state(seed, step)).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    first = run(1, 2)
    assert all(x.isfinite().all() for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, run(1, 2), strict=True))
    assert len({run(*other)[0].item() for other in ((1, 2), (1, 3), (2, 2))}) == 3


def test_the_global_seed_governs() -> None:
    config = tiny()
    model, ids = build(config).train(), draw_ids(config, 2)

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        nothing = torch.zeros(ids.shape, dtype=torch.bool)
        return model(ids).loss, model(ids).loss, model.features(ids), model.logits(ids, nothing)

    first = run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, run(1), strict=True))
    assert first[0] != first[1]
    assert not any(torch.equal(a, b) for a, b in zip(first, run(2), strict=True))


def test_evaluation_draws_nothing_it_does_not_use() -> None:
    config = tiny()
    model, ids = build(config), draw_ids(config, 2)
    before = torch.get_rng_state()
    assert torch.equal(model.features(ids), model.features(ids))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_layers_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(encoder_depth=2, decoder_depth=3)
    streams: list[int] = []
    for name in ("keep_mask", "keep_mask_attention"):
        true = getattr(rng, name)

        def spy(state: Tensor, stream: int, *rest: Any, true: Any = true) -> Tensor:
            streams.append(stream)
            return true(state, stream, *rest)

        monkeypatch.setattr(rng, name, spy)
    with use_implementation("reference"):
        build(config).train()(draw_ids(config, 2))
    assert len(set(streams)) == len(streams) == 1 + 4 * 5


def test_dropout_in_a_block_equals_plain_pytorch() -> None:
    """Forward and backward, with the documented Philox masks multiplied in by hand."""
    torch.manual_seed(0)
    p, width, heads, layer, lengths = 0.3, 16, 2, 3, [4, 1, 6]
    block, norm = Block(width, heads, 2.0, p, layer).double(), nn.LayerNorm(width).double()
    state, bounds = rng.new_state(11, 5), torch.tensor([0, *lengths]).cumsum(0)
    total = int(bounds[-1])
    x = torch.randn(total, width, dtype=torch.float64, requires_grad=True)

    def drop(y: Tensor, kind: rng.Stream) -> Tensor:
        realised = round(p * 2**16) / 2**16
        return y * rng.keep_mask(state, rng.stream(kind, layer), y.shape, p) / (1 - realised)

    def attend(y: Tensor) -> Tensor:
        qkv = block.attention.qkv(y).view(total, 3, heads, -1)
        keep = rng.keep_mask_attention(
            state, rng.stream(rng.Stream.ATTENTION_DROPOUT, layer), total * heads, max(lengths), p
        ).view(total, heads, -1)
        out = []
        for start, end in pairwise(bounds.tolist()):
            q, k, v = qkv[start:end].permute(1, 2, 0, 3)
            probabilities = (q @ k.mT * (width // heads) ** -0.5).softmax(-1)
            kept = keep[start:end, :, : end - start].transpose(0, 1).double() / (1 - round(p * 256) / 256)
            out.append((probabilities * kept @ v).transpose(0, 1).flatten(1))
        return block.attention.proj(torch.cat(out))

    y = x + drop(attend(block.norm1(x)), rng.Stream.PROJECTION_DROPOUT)
    hidden = drop(F.gelu(block.mlp.fc1(block.norm2(y))), rng.Stream.MLP_DROPOUT)
    y = y + drop(block.mlp.fc2(hidden), rng.Stream.OUTPUT_DROPOUT)
    wanted = (y, norm(y))
    ours = run_blocks(nn.ModuleList([block]), norm, x, bounds.int(), max(lengths), state)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)

    leaves, grads = [x, *block.parameters(), *norm.parameters()], torch.randn(2, *x.shape).double().unbind()
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grads), torch.autograd.grad(wanted, leaves, grads),
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip


def test_the_rows_asked_for_are_those_of_all() -> None:
    """The last block leaves out the others; repeated rows and none at all are right too."""
    torch.manual_seed(0)
    width, lengths = 16, [4, 1, 6]
    blocks = nn.ModuleList(Block(width, 2, 2.0, 0.0, layer) for layer in range(2)).double()
    norm, ends = nn.LayerNorm(width).double(), torch.tensor([0, *lengths]).cumsum(0).int()
    x = torch.randn(sum(lengths), width, dtype=torch.float64, requires_grad=True)
    everything = run_blocks(blocks, norm, x, ends, max(lengths), None)
    leaves = [x, *blocks.parameters(), *norm.parameters()]
    for rows in (torch.tensor([9, 2, 3, 2], dtype=torch.int32), torch.tensor([], dtype=torch.int64)):
        ours = run_blocks(blocks, norm, x, ends, max(lengths), None, rows)
        wanted = tuple(y[rows] for y in everything)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        grads = [torch.randn_like(y) for y in wanted]
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves, grads),
            torch.autograd.grad(wanted, leaves, grads, retain_graph=True),
            rtol=1e-10, atol=1e-10,
        )  # fmt: skip


# Precision and compilation


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_is_close_to_float32(dropout: float) -> None:
    config = tiny(dropout=dropout)
    model, ids, state = build(config).train(), draw_ids(config, 4), rng.new_state(1)
    exact = model(ids, rng_state=state)
    exact_grads = torch.autograd.grad(exact.loss, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        ours = model(ids, rng_state=state)
    grads = torch.autograd.grad(ours.loss, list(model.parameters()))
    assert ours.loss.dtype == torch.float32
    assert ours.logits_NC.dtype == torch.bfloat16
    assert {x.dtype for x in model.parameters()} == {x.dtype for x in grads} == {torch.float32}
    assert_near(ours.loss, exact.loss, 2e-3)
    assert_near(ours.logits_NC.float(), exact.logits_NC, 2e-2)
    got, wanted = (torch.cat([x.flatten() for x in xs]) for xs in (grads, exact_grads))
    assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_a_step_with_a_given_plan_is_one_graph(encoder_tokens: Any) -> None:
    """The plan is drawn outside: its sizes are the host's."""
    config = tiny(encoder_tokens=encoder_tokens)
    model, ids, labels = build(config).train(), draw_ids(config, 3), torch.tensor([1, 0, 2])
    state = rng.new_state(4)
    plan = draw_plan(config, torch.tensor([0.5, 0.7, 0.9]), state)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (model, compiled):
        output = forward(ids, labels, plan=plan, rng_state=state)
        results.append([output.loss, *torch.autograd.grad(output.loss, list(model.parameters()))])
    torch.testing.assert_close(results[1], results[0])


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_or_ids": torch.full((2, 16), 32)}, "MAGE: ids holds 32, wanted 0 <= ids < 32"),
        ({"images_or_ids": torch.full((2, 16), -1)}, "MAGE: ids holds -1, wanted 0 <= ids < 32"),
        ({"images_or_ids": torch.zeros(2, 9).long()}, r"MAGE: ids has shape \(2, 9\), wanted \(\*, 16\)"),
        ({"images_or_ids": torch.zeros(2, 16).bool()}, "MAGE: ids is bool, wanted int64"),
        ({"images_or_ids": torch.zeros(2, 3, 16, 16)}, "MAGE: got images, but this model has no tokenizer"),
        ({"labels_B": torch.tensor([0, 11])}, "MAGE: labels holds 11, wanted 0 <= labels < 11"),
        ({"labels_B": torch.tensor([0, -1])}, "MAGE: labels holds -1, wanted 0 <= labels < 11"),
        ({"labels_B": torch.tensor([0.0, 1.0])}, "MAGE: labels is float32, wanted int64 or int32"),
        ({"labels_B": torch.tensor([0])}, r"MAGE: labels has shape \(1,\), wanted \(2,\)"),
        ({"mask_ratios_B": torch.tensor([0.5, 1.1]).double()}, r"mask_ratios holds 1.1, wanted .* \[0, 1\]"),
        ({"mask_ratios_B": torch.tensor([-0.1, 1.0]).double()}, "mask_ratios holds -0.1, wanted ratios in"),
        ({"mask_ratios_B": torch.tensor([0.5, torch.nan])}, "mask_ratios holds nan, wanted ratios in"),
        ({"mask_ratios_B": torch.tensor([0.5])}, r"mask_ratios has shape \(1,\) on cpu, wanted \(2,\)"),
        ({"rng_state": torch.zeros(2)}, "rng_state is float32, wanted int64"),
    ],
)
def test_bad_input_is_named(arguments: dict, message: str) -> None:
    defaults = {"images_or_ids": torch.zeros(2, 16).long()}
    with pytest.raises(ValueError, match=message) as error:
        MAGE(tiny())(**defaults | arguments)
    assert "\n" not in str(error.value)


def test_a_plan_and_ratios_are_refused() -> None:
    config = tiny()
    plan = draw_plan(config, torch.tensor([0.5]), rng.new_state(0))
    with pytest.raises(ValueError, match="got both plan and mask_ratios, wanted one of them"):
        MAGE(config)(draw_ids(config, 1), plan=plan, mask_ratios_B=torch.tensor([0.5]))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3, 32, 16\), wanted \(B, 3, 16, 16\)"):
        MAGE(MAGEConfig.tiny())(torch.zeros(2, 3, 32, 16))
    with pytest.raises(ValueError, match=r"MAGE: ids has shape \(2, 25\), wanted \(\*, 16\)"):
        MAGE(tiny(), BatchTokenizer())(torch.zeros(2, 3, 5, 5))


@pytest.mark.parametrize("block", [-1, 2])
def test_a_block_that_does_not_exist(block: int) -> None:
    with pytest.raises(ValueError, match=f"MAGE: block is {block}, wanted 0 <= block < 2"):
        MAGE(tiny()).features(torch.zeros(1, 16).long(), block=block)


def test_a_tokenizer_of_another_codebook_is_refused() -> None:
    with pytest.raises(ValueError, match="the tokenizer has 32 codes, the model 7"):
        MAGE(tiny(codebook_size=7), BatchTokenizer())
