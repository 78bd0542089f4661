"""Parameter groups, AdamW, clipping, learning rates and the moving average, against closed forms."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mage_fast import MAGE, MAGEClassifier, MAGEConfig
from mage_fast.errors import InputError
from mage_fast.optional import optional
from mage_fast.training.optim import Ema, adamw_parameter_groups, build_adamw, layer_decay_groups
from mage_fast.training.schedule import cosine_lr, scaled_lr, set_lr


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.bias = nn.Parameter(torch.zeros(1, 1, 5))
        self.tied = self.embedding
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_no_decay_on_biases_and_1d_tensors() -> None:
    model = Model()
    decayed, plain = adamw_parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(model.linear.weight), id(model.embedding.weight)}
    wanted = {id(p) for p in (model.linear.bias, model.norm.weight, model.norm.bias, model.bias)}
    assert {id(p) for p in plain["params"]} == wanted
    assert len(decayed["params"]) + len(plain["params"]) == 6


def test_layer_decay() -> None:
    """The learning rates of a two-block classifier, written out by hand, as they reach the optimizer."""
    classifier = MAGEClassifier(MAGE(MAGEConfig.tiny()), 10)
    groups = layer_decay_groups(classifier.layers, 0.65, weight_decay=0.05)
    optimizer = build_adamw(groups, 1.0, betas=(0.9, 0.999))
    set_lr(optimizer, 2.0)
    names = {parameter: name for name, parameter in classifier.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    lrs = {
        **{"mage.embedding.": 2 * 0.65**3, "mage.encoder.blocks.0.": 2 * 0.65**2},
        **{"mage.encoder.blocks.1.": 2 * 0.65, "fc_norm.": 2.0, "head.": 2.0},
    }
    for name, parameter in classifier.named_parameters():
        if name.startswith("mage.tokenizer.") or name.startswith("mage.encoder.norm."):
            assert name not in found
            continue
        (lr,) = (lr for start, lr in lrs.items() if name.startswith(start))
        decay = 0.0 if name.endswith("bias") or parameter.ndim == 1 else 0.05
        assert found.pop(name) == (pytest.approx(lr), decay), name
    assert not found
    assert sum(len(group["params"]) for group in groups) == len(
        [x for x in classifier.parameters() if x.requires_grad]
    )
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    for factor in (0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"layer_decay is .*, wanted 0 < layer_decay <= 1"):
            layer_decay_groups(classifier.layers, factor)


def test_layer_decay_is_timms() -> None:
    """The same scales as timm gives the blocks and the head of its own vision transformer."""
    timm = optional("timm.models.vision_transformer", extra="finetune")
    factory = optional("timm.optim", extra="finetune")
    vit = timm.VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=3, num_heads=2, num_classes=3)
    wanted: dict[int, tuple[float, float]] = {}
    for group in factory.param_groups_layer_decay(vit, weight_decay=0.1, layer_decay=0.7):
        wanted |= {id(x): (group["lr_scale"], group["weight_decay"]) for x in group["params"]}
    layers = [*vit.blocks, vit.head]
    for group in layer_decay_groups(layers, 0.7, weight_decay=0.1):
        for x in group["params"]:
            assert wanted[id(x)] == pytest.approx((group["lr_scale"], group["weight_decay"]))


def test_adamw_follows_the_published_update() -> None:
    """Loshchilov & Hutter's update, written out in float64."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = build_adamw(model, lr=0.1, weight_decay=0.5)
    wanted = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in wanted.items()}
    second = {name: torch.zeros_like(p) for name, p in wanted.items()}
    for t in range(1, 6):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            first[name] = 0.9 * first[name] + 0.1 * p.grad
            second[name] = 0.95 * second[name] + 0.05 * p.grad**2
            step = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            decay = 0.5 if name == "weight" else 0.0
            wanted[name] = wanted[name] * (1 - 0.1 * decay) - 0.1 * step
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-12, atol=1e-12)


def test_build_adamw_refuses_nothing_to_train() -> None:
    with pytest.raises(InputError, match="0 trainable tensors"):
        build_adamw(nn.ReLU(), 0.1)
    with pytest.raises(InputError, match=r"lr -0.1"):
        build_adamw(nn.Linear(1, 1), -0.1)


@given(total=st.integers(1, 500), share=st.floats(0, 1), min_lr=st.floats(0, 0.5))
def test_cosine_schedule(total: int, share: float, min_lr: float) -> None:
    warmup = int(total * share)
    rates = [
        cosine_lr(step, total_steps=total, warmup_steps=warmup, base_lr=1.0, min_lr=min_lr)
        for step in range(total + 1)
    ]
    if warmup:
        assert rates[0] == 0
        assert rates[: warmup + 1] == pytest.approx([step / warmup for step in range(warmup + 1)])
    if warmup < total:
        assert rates[warmup] == pytest.approx(1.0)
        assert rates[-1] == pytest.approx(min_lr)
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)
    if (total - warmup) % 2 == 0 and total > warmup:
        assert rates[(warmup + total) // 2] == pytest.approx((1 + min_lr) / 2)


def test_schedule_refusals_and_scaling() -> None:
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)
    for step, total, warmup in ((-1, 10, 0), (0, 10, 11), (0, 10, -1)):
        with pytest.raises(InputError, match="cosine_lr"):
            cosine_lr(step, total_steps=total, warmup_steps=warmup, base_lr=1.0)
    optimizer = torch.optim.SGD(
        [
            {"params": [nn.Parameter(torch.zeros(1))]},
            {"params": [nn.Parameter(torch.zeros(1))], "lr_scale": 0.65},
        ]
    )
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.065])


def test_moving_average() -> None:
    model = nn.BatchNorm1d(3)
    ema = Ema(model, 0.9)
    assert torch.equal(ema.state_dict()["weight"], model.weight)
    wanted = model.weight.detach().double()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(3))
        assert model.num_batches_tracked is not None
        model.num_batches_tracked += 1
        ema.update(model)
        wanted = 0.9 * wanted + 0.1 * model.weight.detach().double()
        torch.testing.assert_close(ema.state_dict()["weight"].double(), wanted, rtol=1e-5, atol=1e-6)
        assert ema.state_dict()["num_batches_tracked"] == step + 1
    own = model.weight.detach().clone()
    with contextlib.suppress(ZeroDivisionError), ema.applied_to(model):
        assert torch.equal(model.weight, ema.state_dict()["weight"])
        raise ZeroDivisionError
    assert torch.equal(model.weight, own)
    for bad in (-0.1, 1.0):
        with pytest.raises(InputError, match="decay"):
            Ema(model, bad)
    with pytest.raises(InputError, match="keys differ"):
        ema.load_state_dict({})
    with pytest.raises(InputError, match=r"weight has shape \(4,\), wanted \(3,\)"):
        ema.load_state_dict(ema.state_dict() | {"weight": torch.zeros(4)})
