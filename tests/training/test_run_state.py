"""Run states: bit-exact round trip, strict loading, damage, and a disk that fills up."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mage_fast.errors import CheckpointError
from mage_fast.training.optim import Ema, build_adamw
from mage_fast.training.run_state import (
    RunState,
    load_run_state,
    module_fingerprint,
    read_part,
    read_run_state,
    save_run_state,
)


class Model(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.tied = self.second

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.norm(self.first(x)))


def build(width: int = 8, seed: int = 0) -> tuple[Model, torch.optim.AdamW, Ema]:
    torch.manual_seed(seed)
    model = Model(width)
    return model, build_adamw(model, 1e-2), Ema(model, 0.5)


def step(model: Model, optimizer: torch.optim.Optimizer, ema: Ema, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    loss = model(torch.randn(6, 4, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model)


def bits(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema) -> list[bytes]:
    states = [values[name] for values in optimizer.state_dict()["state"].values() for name in sorted(values)]
    return [
        t.detach().numpy().tobytes()
        for t in [*model.state_dict().values(), *states, *ema.state_dict().values()]
    ]


@pytest.mark.parametrize("fused", [True, False])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    def prepared(seed: int) -> tuple[Model, torch.optim.AdamW, Ema]:
        model, optimizer, ema = build(seed=seed)
        for group in optimizer.param_groups:
            group["fused"] = fused
        return model, optimizer, ema

    model, optimizer, ema = prepared(0)
    for seed in range(3):
        step(model, optimizer, ema, seed)
    optimizer.param_groups[0]["lr"] = 1 / 3e3
    state = RunState(step=3, epoch=1, config={"width": 8, "name": "é"}, extra={"best": [1.5, None]})
    save_run_state(tmp_path / "last.safetensors", state, model=model, optimizer=optimizer, ema=ema)
    other, other_optimizer, other_ema = prepared(1)
    loaded = load_run_state(
        tmp_path / "last.safetensors", model=other, optimizer=other_optimizer, ema=other_ema
    )
    assert loaded == state == read_run_state(tmp_path / "last.safetensors")
    assert other_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert bits(model, optimizer, ema) == bits(other, other_optimizer, other_ema)
    for seed in range(3, 6):
        step(model, optimizer, ema, seed)
        step(other, other_optimizer, other_ema, seed)
    assert bits(model, optimizer, ema) == bits(other, other_optimizer, other_ema)
    steps = {float(s["step"]) for s in other_optimizer.state_dict()["state"].values()}
    assert steps == {6.0}


def test_optimizer_state_keeps_the_memory_format_of_its_parameter(tmp_path: Path) -> None:
    """A fused kernel walks parameter and state in memory order: contiguous state would be permuted."""
    path = tmp_path / "last.safetensors"

    def prepared(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
        torch.manual_seed(seed)
        model = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model, build_adamw(model, 1e-2)

    def run(model: nn.Module, optimizer: torch.optim.AdamW, seed: int) -> None:
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x.to(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()

    model, optimizer = prepared(0)
    run(model, optimizer, 0)
    save_run_state(path, RunState(1), model=model, optimizer=optimizer)
    other, other_optimizer = prepared(1)
    load_run_state(path, model=other, optimizer=other_optimizer)
    for seed in (1, 2):
        run(model, optimizer, seed)
        run(other, other_optimizer, seed)
    assert torch.equal(model.weight, other.weight)


def test_other_optimizers_and_parts_round_trip(tmp_path: Path) -> None:
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.5, math.nextafter(0.9, 1)), amsgrad=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    sgd.step()
    path = tmp_path / "new folder" / "last.safetensors"
    save_run_state(path, RunState(1), generator=model, sgd=sgd, unused=adam)
    other = nn.Linear(3, 2, dtype=torch.bfloat16)
    other_sgd = torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.9)
    other_adam = torch.optim.Adam(other.parameters(), lr=0.2)
    load_run_state(path, generator=other, sgd=other_sgd, unused=other_adam)
    assert torch.equal(other.weight, model.weight)
    for mine, its in zip(sgd.state.values(), other_sgd.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], its["momentum_buffer"])
    assert other_adam.param_groups[0]["betas"] == (0.5, math.nextafter(0.9, 1))
    assert other_adam.param_groups[0]["amsgrad"] is True
    assert read_part(path, "generator").keys() == model.state_dict().keys()
    with pytest.raises(CheckpointError, match=r"no part 'model', it has generator, sgd, unused"):
        read_part(path)


def test_another_width_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    model, optimizer, ema = build(8)
    step(model, optimizer, ema, 0)
    save_run_state(path, RunState(1), model=model, optimizer=optimizer, ema=ema)
    wide, wide_optimizer, wide_ema = build(16)
    before = bits(wide, wide_optimizer, wide_ema)
    with pytest.raises(CheckpointError, match=r"model.first.weight has shape \(8, 4\), wanted \(16, 4\)"):
        load_run_state(path, model=wide, optimizer=wide_optimizer, ema=wide_ema)
    with pytest.raises(CheckpointError, match=r"optimizer.0.exp_avg has shape \(8, 4\), wanted \(16, 4\)"):
        load_run_state(path, model=model, optimizer=wide_optimizer, ema=wide_ema)
    assert bits(wide, wide_optimizer, wide_ema) == before
    with pytest.raises(CheckpointError, match="has the parts ema, model, optimizer, wanted model, optimizer"):
        load_run_state(path, model=model, optimizer=optimizer)
    model.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"model lacks extra.bias, extra.weight"):
        load_run_state(path, model=model, optimizer=optimizer, ema=ema)
    del model.extra, model.second
    with pytest.raises(CheckpointError, match=r"model has the unknown second.bias, second.weight"):
        load_run_state(path, model=model, optimizer=optimizer, ema=ema)
    with pytest.raises(CheckpointError, match=r"model.first.weight is torch.float32, wanted torch.float64"):
        load_run_state(path, model=build(8)[0].double(), optimizer=optimizer, ema=ema)
    groups = torch.optim.AdamW(build(8)[0].parameters())
    with pytest.raises(CheckpointError, match=r"parameter groups of \[2, 4\] tensors, wanted \[6\]"):
        load_run_state(path, model=build(8)[0], optimizer=groups, ema=ema)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    model = build()[0]
    save_run_state(path, RunState(1), model=model)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated or not safetensors"):
            load_run_state(path, model=model)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(CheckpointError, match="not safetensors"):
        read_run_state(path)
    save_file({"model.x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not the state of a training run"):
        read_run_state(path)
    save_file({"model.x": torch.zeros(1)}, path, metadata={"mage_fast": '{"format": "x", "version": 9}'})
    with pytest.raises(CheckpointError, match=r"is \('x', 9\), wanted"):
        read_run_state(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_run_state(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        read_run_state(tmp_path)


def test_a_disk_that_fills_up_leaves_the_previous_state(tmp_path: Path) -> None:
    """The file size limit makes writes fail midway, as a full disk does."""
    path = tmp_path / "last.safetensors"
    model, optimizer, ema = build()
    save_run_state(path, RunState(1), model=model)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*; the previous state is still there"):
            save_run_state(path, RunState(2), model=model, optimizer=optimizer, ema=ema)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert read_run_state(path).step == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.safetensors"]


def test_no_space_left_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "last.safetensors"
    monkeypatch.setattr("mage_fast.training.run_state.save_file", full)
    with pytest.raises(CheckpointError, match=r"No space left on device$"):
        save_run_state(path, RunState(2), model=nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())


def test_fingerprints_tell_modules_apart() -> None:
    model = build()[0]
    assert module_fingerprint(model) == module_fingerprint(build()[0])
    assert module_fingerprint(model) != module_fingerprint(build(seed=1)[0])
    assert module_fingerprint(model) != module_fingerprint(build()[0].double())
    with torch.no_grad():
        changed = module_fingerprint(model)
        model.first.bias[0] += 1e-6
    assert module_fingerprint(model) != changed
