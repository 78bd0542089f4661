"""Checkpoints in one process: bit-exact round trip, strict loading, what a run resumes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mage_fast import MAGE, MAGEConfig
from mage_fast.config import TokenizerConfig
from mage_fast.errors import CheckpointError, InputError
from mage_fast.kernels import rng
from mage_fast.training.checkpoints import Checkpoints, read_part, read_state
from mage_fast.training.optim import Ema, build_adamw
from mage_fast.training.precision import LossScale
from mage_fast.training.run import Run
from mage_fast.training.run_state import RunState, flatten, module_fingerprint
from mage_fast.training.schedule import set_lr
from mage_fast.training.step import TrainStep
from tests import models


class Model(nn.Module):
    """Tied weights, buffers of several dtypes, and a convolution in channels_last."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.tied = self.second
        self.conv = nn.Conv2d(width, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.norm(self.first(x)))
        return self.conv(
            x[:, :, None, None].expand(-1, -1, 2, 2).contiguous(memory_format=torch.channels_last)
        )


def build(width: int = 8, seed: int = 0, fused: bool = True) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Model(width)
    optimizer = build_adamw(model, 1e-2)
    for group in optimizer.param_groups:
        group["fused"] = fused
    return {"model": model, "optimizer": optimizer, "ema": Ema(model, 0.5), "loss_scale": LossScale()}


def step(parts: dict[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = parts["model"](torch.randn(6, 4, generator=generator)).square().mean()
    parts["optimizer"].zero_grad()
    loss.backward()
    parts["optimizer"].step()
    parts["ema"].update(parts["model"])
    parts["loss_scale"].update(torch.tensor(float(seed % 2)))


def bits(parts: dict[str, Any]) -> dict[str, bytes]:
    return {
        key: value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        for key, value in flatten(parts)[0].items()
    }


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    whole, other = build(fused=fused), build(seed=1, fused=fused)
    for seed in range(3):
        step(whole, seed)
    whole["optimizer"].param_groups[0] |= {"lr": 1 / 3e3, "betas": (0.5, math.nextafter(0.9, 1))}
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    path = checkpoints.save(3, {"width": 8, "name": "é"}, whole, {"best": [1.5, None]})
    state = RunState(3, {"width": 8, "name": "é"}, {"best": [1.5, None]})
    assert checkpoints.load(path, other) == state == read_state(path)
    assert other["optimizer"].state_dict()["param_groups"] == whole["optimizer"].state_dict()["param_groups"]
    assert bits(other) == bits(whole)
    assert other["model"].tied is other["model"].second
    assert other["model"].conv.weight.is_contiguous(memory_format=torch.channels_last)
    moment = other["optimizer"].state[other["model"].conv.weight]["exp_avg"]
    assert moment.stride() == other["model"].conv.weight.stride(), "fused kernels walk in memory order"
    for seed in range(3, 6):
        step(whole, seed)
        step(other, seed)
    assert bits(other) == bits(whole)
    assert {float(s["step"]) for s in other["optimizer"].state.values()} == {6.0}


def test_a_mage_goes_on_to_the_bit_in_live_tensors(tmp_path: Path) -> None:
    """Also into parts that have trained already: their tensors stay in place, as CUDA graphs need it."""

    def built(seed: int) -> tuple[TrainStep, dict[str, Any]]:
        torch.manual_seed(seed)
        sizes = TokenizerConfig(
            **{"image_size": 8, "codebook_size": 8, "codebook_dim": 4, "base_width": 4},
            **{"width_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 2},
        )
        model = MAGE(MAGEConfig.vit_b(**SMALL, tokenizer=sizes)).train()
        optimizer = build_adamw(model, 1e-2)
        ema = Ema(model, 0.9)
        train_step = TrainStep(model, optimizer, ema=ema)
        return train_step, {"model": model, "optimizer": optimizer, "ema": ema}

    ids = torch.arange(2 * 16).reshape(2, 16) % 8
    one, ours = built(0)
    two, theirs = built(1)
    for number in range(2):
        one(ids, rng_state=rng.new_state(0, number))
        two(ids, rng_state=rng.new_state(5, number))
    addresses = {key: value.data_ptr() for key, value in flatten(theirs)[0].items()}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.load(checkpoints.save(2, {}, ours), theirs)
    assert {key: value.data_ptr() for key, value in flatten(theirs)[0].items()} == addresses
    losses = [train(ids, rng_state=rng.new_state(0, 2))["loss"] for train in (one, two)]
    assert torch.equal(*losses)
    assert bits(ours) == bits(theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_graphs_go_on_from_a_checkpoint(tmp_path: Path, precision: Any) -> None:
    """Graphs captured before the state is loaded replay with it; fresh ones are captured with it."""
    config = models.tiny()

    def built(seed: int) -> tuple[TrainStep, dict[str, Any]]:
        model = models.build(config, seed).train().to("cuda")
        optimizer = build_adamw(model, 1e-3)
        train_step = TrainStep(model, optimizer, precision=precision, graph=True)
        parts = {"model": model, "optimizer": optimizer}
        if train_step.loss_scale is not None:
            parts["loss_scale"] = train_step.loss_scale
        return train_step, parts

    def train(train_step: TrainStep, number: int) -> Tensor:
        ids = models.draw_ids(config, 4, seed=number)
        return train_step(ids.to("cuda"), rng_state=rng.new_state(3, number))["loss"]

    (one, ours), (captured, theirs), (fresh, others) = built(0), built(1), built(2)
    for number in range(12):
        train(one, number)
        train(captured, 100 + number)
    set_lr(ours["optimizer"], 5e-4)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(12, {}, ours)
    for parts in (theirs, others):
        checkpoints.load(path, parts)
        assert bits(parts) == bits(ours)
        assert parts["optimizer"].param_groups[0]["lr"].item() == pytest.approx(5e-4)
    for number in range(12, 24):
        wanted = train(one, number)
        for train_step in (captured, fresh):
            torch.testing.assert_close(train(train_step, number), wanted, rtol=1e-4, atol=1e-4)


#: A MAGE of two layers.
SMALL = {
    **{"grid_size": 4, "codebook_size": 8, "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2},
    **{"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2},
}


def test_other_optimizers_and_reading_a_part(tmp_path: Path) -> None:
    model, other = nn.Linear(3, 2, dtype=torch.bfloat16), nn.Linear(3, 2, dtype=torch.bfloat16)

    def parts(model: nn.Module, lr: float) -> dict[str, Any]:
        sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return {
            "generator": model,
            "sgd": sgd,
            "unused": torch.optim.Adam(model.parameters(), lr=lr, amsgrad=True),
        }

    ours, theirs = parts(model, 0.1), parts(other, 0.2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    ours["sgd"].step()
    path = Checkpoints(tmp_path).save(1, {}, ours)
    theirs["unused"].param_groups[0] |= {"lr": torch.tensor(0.5), "capturable": True}
    Checkpoints(tmp_path).load(path, theirs)
    assert bits(ours) == bits(theirs)
    group = theirs["unused"].param_groups[0]
    assert torch.equal(group["lr"], torch.tensor(0.1)), "a lr in a tensor stays in it"
    assert (group["capturable"], group["amsgrad"]) == (True, True), "how to compute is the live optimizer's"
    found = read_part(path, "generator")
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no part 'model', it has generator, sgd, unused"):
        read_part(path)
    with pytest.raises(CheckpointError, match=r"sgd has 2 parameters, 0 of which .* wanted an optimizer of"):
        Checkpoints(tmp_path).save(2, {}, {"sgd": ours["sgd"], "model": other})


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    parts, wide = build(8), build(16)
    step(parts, 0)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {}, parts)
    before = bits(wide), bits(parts)

    def refused(message: str, changed: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(path, changed)

    refused(r"model.first.weight has shape \(8, 4\), wanted \(16, 4\)", wide)
    odd = build(8)
    step(odd, 0)
    odd["optimizer"].state[odd["model"].first.weight]["exp_avg"] = torch.zeros(7)
    refused(r"optimizer.first.weight.exp_avg has shape \(8, 4\), wanted \(7,\)", odd)
    other = Checkpoints(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"exp_avg has shape \(7,\), wanted \(8, 4\)"):
        other.load(other.save(1, {}, odd), build(8))
    refused("has the parts ema, loss_scale, model, optimizer, wanted model", {"model": parts["model"]})
    more = build(8)
    more["model"].extra = nn.Linear(1, 1)
    refused(r"lacks model.extra.bias, model.extra.weight", more)
    less = build(8)
    del less["ema"]._buffers["norm.running_var"]
    refused(r"has the unknown ema.norm.running_var", less)
    refused(r"model.first.weight is torch.float32, wanted torch.float64", build(8) | _double())
    one_group = build(8)
    one_group["optimizer"] = torch.optim.AdamW(one_group["model"].parameters())
    refused(r"parameter groups of \[3, 5\] tensors, wanted \[8\]", one_group)
    assert (bits(wide), bits(parts)) == before


def _double() -> dict[str, Any]:
    model = Model().double()
    return {"model": model, "optimizer": build_adamw(model, 1e-2)}


def test_a_run_resumes_the_newest_or_what_is_asked_for(tmp_path: Path) -> None:
    parts = build()
    run = Run(tmp_path / "a", {"lr": 1, "sizes": (1, 2)}, **parts)
    assert run.resume() == 0
    for number in (10, 20, 30):
        step(parts, number)
        run.save(number, {"loss": number / 3})
    other = build(seed=1)
    again = Run(tmp_path / "a", {"lr": 1, "sizes": (1, 2)}, **other)
    assert (again.resume(), again.extra) == (30, {"loss": 10.0})
    assert bits(other) == bits(parts)
    with pytest.raises(InputError, match="a holds a run with lr 1 and not 2"):
        Run(tmp_path / "a", {"lr": 2, "sizes": (1, 2)}, **other).resume()
    earlier = tmp_path / "a" / "checkpoints" / "step-000000020"
    with pytest.raises(InputError, match=r"holds step-000000030, which do not follow from .*step-000000020"):
        again.resume(earlier)
    fork = Run(tmp_path / "b", {"lr": 1, "sizes": [1, 2]}, **other)
    assert fork.resume(earlier) == 20
    fork.save(21)
    with pytest.raises(InputError, match="b/checkpoints holds step-000000021"):
        fork.resume(earlier)
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step-000000030")
    assert again.resume(earlier) == 20
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.safetensors").touch()
    with pytest.raises(InputError, match=r"old holds a state.safetensors, .* give another --out"):
        Run(tmp_path / "old", {}, **other).resume()


def test_fingerprints_tell_modules_apart() -> None:
    model = build()["model"]
    assert module_fingerprint(model) == module_fingerprint(build()["model"])
    assert module_fingerprint(model) != module_fingerprint(build(seed=1)["model"])
    assert module_fingerprint(model) != module_fingerprint(build()["model"].double())
    with torch.no_grad():
        changed = module_fingerprint(model)
        model.first.bias[0] += 1e-6
    assert module_fingerprint(model) != changed
