"""The training step against plain PyTorch, its padded sizes, its graphs' bookkeeping, and no waiting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mage_fast.errors import InputError
from mage_fast.kernels import rng
from mage_fast.masking import count_masks
from mage_fast.training.optim import Ema, build_adamw, clipped_step
from mage_fast.training.precision import LossScale
from mage_fast.training.schedule import set_lr
from mage_fast.training.step import TrainStep, _Graphs
from tests.models import build, draw_ids, tiny


def damped(model: nn.Module) -> torch.optim.AdamW:
    """With an eps that hides the gradient of the keys' bias, which is rounding."""
    optimizer = build_adamw(model, 1e-2)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3
    return optimizer


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_all_close(got: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


# Clipping inside the optimizer's kernel


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e6])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipped_step_equals_clip_and_step(max_norm: float | None, fused: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(37, 41), nn.LayerNorm(41)).to(dtype)
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, fused=fused) for m in (ours, theirs)]
    for _ in range(4):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = clipped_step(optimizers[0], max_norm)
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm or float("inf"))
        optimizers[1].step()
        torch.testing.assert_close(norm, wanted)
        tight = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad, q.grad, **tight)  # left clipped
            torch.testing.assert_close(p, q, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
    assert not hasattr(optimizers[0], "grad_scale")


def test_loss_scale_equals_grad_scaler() -> None:
    """Over overflows and growth, beside torch's, which waits for the device where this one does not."""
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    optimizers = [build_adamw(m, 1e-2) for m in (ours, theirs)]
    scale, scaler = LossScale(1024.0, 3), torch.amp.GradScaler("cpu", 1024.0, growth_interval=3)
    for step in range(12):
        x = torch.randn(7, 5) * (torch.inf if step in (1, 6, 7) else 1.0)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (ours(x).square().mean() * scale.scale).backward()
        norm = clipped_step(optimizers[0], 0.5, scale)
        scaler.scale(theirs(x).square().mean()).backward()
        scaler.unscale_(optimizers[1])
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(optimizers[1])
        scaler.update()
        assert norm.isfinite() == wanted.isfinite() == (step not in (1, 6, 7))
        assert scale.scale == scaler.get_scale()
        assert_all_close(values(ours), values(theirs), rtol=1e-5, atol=1e-7)
    assert optimizers[0].state[ours.weight]["step"] == 9


# The whole step


@pytest.mark.parametrize("labels", [None, torch.tensor([2, 0, 1])], ids=["unconditional", "labels"])
@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_steps_equal_plain_pytorch(encoder_tokens: str, labels: Tensor | None) -> None:
    config = tiny(encoder_tokens=encoder_tokens)
    ours, ids = build(config).train(), draw_ids(config, 3)
    theirs = copy.deepcopy(ours)
    ema = Ema(ours, 0.5)
    step = TrainStep(ours, damped(ours), clip_norm=0.1, ema=ema)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = damped(theirs)
    average = values(theirs)
    for number in range(3):
        metrics = step(ids.to(torch.uint16), labels, rng_state=rng.new_state(4, number))
        optimizer.zero_grad()
        loss = theirs(ids, labels, rng_state=rng.new_state(4, number)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        average = {name: (average[name] + p) / 2 for name, p in values(theirs).items()}
        assert norm > 0.1
        torch.testing.assert_close(metrics["loss"], loss.detach())
        torch.testing.assert_close(metrics["gradient_norm"], norm)
        assert not metrics["loss"].requires_grad
    assert_all_close(values(ours), values(theirs), rtol=1e-4, atol=1e-5)
    assert_all_close(ema.state_dict(), average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_is_near_float32(precision: str, tolerance: float) -> None:
    config = tiny(dropout=0.0)
    model, ids = build(config).train(), draw_ids(config, 4)
    found = {}
    for name in ("fp32", precision):
        copied = copy.deepcopy(model)
        step = TrainStep(copied, build_adamw(copied, 0.0), clip_norm=None, precision=name)
        metrics = step(ids, rng_state=rng.new_state(1))
        grads = torch.cat([p.grad.flatten() for p in copied.parameters() if p.grad is not None])
        assert all(p.dtype == torch.float32 for p in copied.parameters())
        found[name] = (metrics["loss"], metrics["gradient_norm"], grads)
    for got, wanted in zip(found[precision], found["fp32"], strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()
    assert (step.loss_scale is not None) == (precision == "fp16")


@given(
    ratios=st.lists(st.floats(0.5, 1.0), min_size=1, max_size=3),
    multiple=st.integers(1, 50),
    padding=st.sampled_from(["class_token", "mask_token"]),
)
@settings(max_examples=25, deadline=None)
def test_padded_sizes_give_the_same_loss_and_gradients(
    ratios: list[float], multiple: int, padding: str
) -> None:
    """With dropout: the rows that fill up come last, so no other row draws other numbers."""
    config = tiny(padding=padding, dropout=0.2, encoder_depth=2, decoder_depth=1)
    model, ids = build(config).double().train(), draw_ids(config, len(ratios))
    exact, state = count_masks(config, torch.tensor(ratios).double()), rng.new_state(5)
    padded = exact.padded(multiple)
    assert padded.total_masked % multiple == 0
    assert 0 <= padded.total_masked - exact.total_masked < multiple
    assert exact.total_visible is not None
    assert padded.total_visible is not None
    assert exact.total_visible <= padded.total_visible <= exact.total_kept
    found = []
    for counts in (exact, padded):
        model.zero_grad()
        loss = model(ids, plan=counts.plan(state), rng_state=state).loss
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (loss, grads), (wanted, wanted_grads) = found
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-9, atol=1e-12)


@given(masked=st.lists(st.integers(8, 16), min_size=3, max_size=3), multiple=st.integers(1, 60))
def test_equal_padded_sizes_suit_every_count_in_them(masked: list[int], multiple: int) -> None:
    """What a graph was captured with holds the rows of all steps that replay it."""
    config = tiny()
    sizes: dict[int, set] = {}
    for shift in range(9):
        counts = count_masks(config, ((torch.tensor(masked) + shift).clamp(max=16) / 16).double())
        padded = counts.padded(multiple)
        assert padded.total_masked >= counts.total_masked
        assert counts.total_visible is not None
        assert padded.total_visible is not None
        assert padded.total_visible >= counts.total_visible
        sizes.setdefault(padded.total_masked, set()).add(padded.sizes)
    assert all(len(found) == 1 for found in sizes.values())


# Graphs: what goes into them and comes out, on the CPU; and nothing that waits


def test_replayed_steps_equal_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture that only remembers: inputs reach it through the buffers of the first captured step."""
    config = tiny(ratio_per="sample")
    plain = build(config).train()
    replayed = copy.deepcopy(plain)
    steps = [TrainStep(m, damped(m)) for m in (plain, replayed)]
    captures: list[Callable] = []
    monkeypatch.setattr(_Graphs, "_capture", lambda self, function: captures.append(function) or function)
    step = steps[1]
    step._graphs = _Graphs(step.compute, step.optimizer, torch.device("cpu"))
    kept: list[tuple[Tensor, Tensor]] = []
    for number in range(30):
        ids = draw_ids(config, 3, seed=number)
        labels = None if number % 3 else torch.tensor([number % 4, 1, 2])
        for s in steps:
            set_lr(s.optimizer, 1e-3 * (number + 1))
        wanted, got = (s(ids, labels, rng_state=rng.new_state(8, number)) for s in steps)
        kept.append((got["loss"], wanted["loss"]))
        torch.testing.assert_close(got["gradient_norm"], wanted["gradient_norm"])
    torch.testing.assert_close(*(torch.stack(x) for x in zip(*kept, strict=True)))
    assert_all_close(values(replayed), values(plain), rtol=1e-4, atol=1e-5)
    assert 2 <= len(captures) < 10
    assert all(isinstance(group["lr"], Tensor) for group in step.optimizer.param_groups)
    step.optimizer.load_state_dict(steps[0].optimizer.state_dict())
    assert not step._graphs.captured
    assert all(isinstance(group["lr"], Tensor) for group in step.optimizer.param_groups)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("encoder_tokens", ["paper", "unmasked"])
def test_nothing_waits_for_the_device(precision: Any, encoder_tokens: str) -> None:
    """On tensors without values: whatever the host would have to read raises."""
    config = tiny(encoder_tokens=encoder_tokens, ratio_per="sample")
    counts = count_masks(config, torch.tensor([0.6, 0.9]))
    model = build(config).train()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty(p.shape)))
        step = TrainStep(model, build_adamw(model, 1e-2), precision=precision, ema=Ema(model, 0.9))
        ids, labels, state, masked, dropped = (
            torch.empty(shape, dtype=torch.int64) for shape in ((2, 16), (2,), (2,), (2,), (2,))
        )
        fake = replace(counts, num_masked_B=masked, num_dropped_B=dropped)
        metrics = step.compute(ids, labels, state, fake)
        assert [x.shape for x in metrics.values()] == [(), ()]
        with pytest.raises(DataDependentOutputException):
            metrics["loss"].item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_steps_on_a_gpu_equal_those_on_the_cpu(precision: Any, graph: bool) -> None:
    """No step waits (captures do, at their first use); graphs draw fresh masks and dropout at each replay."""
    config = tiny()
    model = build(config).train()
    theirs = copy.deepcopy(model)
    plain = TrainStep(theirs, build_adamw(theirs, 1e-3))
    model = model.to("cuda")
    step = TrainStep(model, build_adamw(model, 1e-3), precision=precision, graph=graph)
    for number in range(24):
        ids, state = draw_ids(config, 4, seed=number), rng.new_state(3, number)
        on_gpu = ids.to("cuda")
        torch.cuda.set_sync_debug_mode("default" if graph and number < 12 else "error")
        try:
            got = step(on_gpu, rng_state=state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        wanted = plain(ids, rng_state=state)
        tolerance = 1e-3 if precision == "fp32" else 5e-2
        torch.testing.assert_close(got["loss"].cpu(), wanted["loss"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"precision": "fp8"}, "precision is 'fp8', wanted one of fp32, bf16, fp16"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0, wanted more than 0, or None"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"graph": True}, "graph=True with a model on cpu, wanted it on cuda"),
    ],
)
def test_refusals(arguments: dict, error: str) -> None:
    model = build(tiny())
    with pytest.raises(InputError, match=error):
        TrainStep(model, build_adamw(model, 1e-2), **arguments)
    with pytest.raises(InputError, match=r"fp16.* with an optimizer that is not fused"):
        TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="fp16")


def test_wrong_batches_change_nothing() -> None:
    model = build(tiny()).train()
    step, before = TrainStep(model, build_adamw(model, 1e-2)), values(model)
    for inputs, labels, error in (
        (torch.zeros(2, 15, dtype=torch.int64), None, r"ids has shape \(2, 15\), wanted \(\*, 16\)"),
        (torch.full((2, 16), 99), None, "ids holds 99"),
        (draw_ids(tiny(), 2), torch.tensor([1, 77]), "labels holds 77"),
        (torch.rand(2, 3, 16, 16), None, "no tokenizer"),
    ):
        with pytest.raises(ValueError, match=error):
            step(inputs, labels)
    with pytest.raises(ValueError, match="rng_state is on meta, wanted it on the CPU"):
        step(draw_ids(tiny(), 2), rng_state=torch.empty(2, dtype=torch.int64, device="meta"))
    assert_all_close(values(model), before, rtol=0, atol=0)
