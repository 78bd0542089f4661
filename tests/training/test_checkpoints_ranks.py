"""Checkpoints of several ranks: any number of them reads what any number wrote; all fail alike."""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mage_fast.config import MAGEConfig, TokenizerConfig
from mage_fast.errors import CheckpointError
from mage_fast.kernels import rng
from mage_fast.model import MAGE
from mage_fast.training.checkpoints import Checkpoints, read_part
from mage_fast.training.distributed import Processes, parallelized
from mage_fast.training.optim import Ema, build_adamw
from mage_fast.training.precision import LossScale
from mage_fast.training.run_state import flatten
from mage_fast.training.step import MicroBatch, TrainStep
from tests.models import draw_ids
from tests.ranks import in_ranks

#: Of all ranks together; 2 and 3 divide it.
BATCH = 12


class Model(nn.Module):
    """Sizes that 2 and 3 do not divide, tied weights, buffers, and a frozen part in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen.requires_grad_(False)
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 7)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.second.weight
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("used", torch.tensor([True, False]))

    def forward(self, images: Tensor) -> Tensor:
        x = self.frozen(images).flatten(2).mean(2)
        return self.tied(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.gain


class Training:
    """The parts of a run in a mode, and steps of it on this rank's share of the batch."""

    def __init__(self, mode: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.mode, self.model = mode, Model()
        if mode == "fsdp":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            options = {"mesh": mesh, "ignored_params": set(self.model.frozen.parameters())}
            for module in (self.model.first, self.model):
                fully_shard(module, **options)
        self.wrapped = DistributedDataParallel(self.model) if mode == "ddp" else self.model
        self.optimizer, self.ema = build_adamw(self.model, 1e-2), Ema(self.model, 0.5)
        self.parts: Any = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema}
        self.parts["loss_scale"] = LossScale()

    def step(self, number: int) -> float:
        """The loss before the step."""
        images = torch.randn(BATCH, 3, 3, 3, generator=torch.Generator().manual_seed(number))
        rank, ranks = (0, 1) if self.mode == "one" else (dist.get_rank(), dist.get_world_size())
        loss = self.wrapped(images.chunk(ranks)[rank]).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(self.model)
        self.model.seen += 1
        self.parts["loss_scale"].update(torch.tensor(0.0))
        if ranks > 1:
            dist.all_reduce(loss.detach())
        return loss.item() / ranks

    def whole(self) -> dict[str, Tensor]:
        """Every tensor of the state, whole, as it would be saved."""
        return _whole(flatten(self.parts)[0])


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], about: object) -> None:
    if got.keys() != wanted.keys():
        raise ValueError(f"{about}: {sorted(got.keys() ^ wanted.keys())}")
    for key, value in wanted.items():
        if got[key].dtype != value.dtype or not torch.equal(got[key], value):
            raise ValueError(f"{about}: {key} is {got[key]}, wanted {value}")


def load_all(folder: Path, modes: tuple[str, ...]) -> dict[str, list[float]]:
    """Load every checkpoint there in every mode; the losses of three steps from the last one, by mode."""
    wanted = load_file(folder / "one" / "step-000000002" / "state.safetensors")
    losses = {}
    for mode in modes:
        for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
            for trained in (False, True):
                training = Training(mode, seed=5)
                if trained:
                    training.step(9)
                checkpoints = Checkpoints(folder / name)
                path = checkpoints.latest()
                assert path is not None
                state = checkpoints.load(path, training.parts)
                if (state.step, state.extra) != (2, {"written by": name}):
                    raise ValueError(f"{name} is {state}")
                assert_equal(training.whole(), wanted, (mode, name, trained))
        losses[mode] = [training.step(number) for number in (2, 3, 4)]
    return losses


def two_ranks(processes: Processes, folder: Path) -> dict[str, list[float]]:
    """From the state of one process, all kinds that two ranks write; then read all."""
    for mode, sharded in itertools.product(("ddp", "fsdp"), (True, False)):
        training = Training(mode, seed=3)
        Checkpoints(folder / "one").load(folder / "one" / "step-000000002", training.parts)
        name = f"{mode}-{sharded}"
        checkpoints = Checkpoints(folder / name, sharded=sharded)
        path = checkpoints.save(2, {}, training.parts, {"written by": name})
        files = sorted(file.name for file in path.iterdir())
        if len(files) != (3 if sharded else 2) or any(file.endswith(".metadata") for file in files):
            raise ValueError(f"{name} has the files {files}")
    return load_all(folder, ("ddp", "fsdp"))


def three_ranks(processes: Processes, folder: Path) -> dict[str, list[float]]:
    return load_all(folder, ("fsdp",))


@pytest.mark.slow
def test_every_mode_reads_what_every_mode_wrote(tmp_path: Path) -> None:
    training = Training("one", seed=0)
    for number in range(2):
        training.step(number)
    for sharded in (True, False):
        checkpoints = Checkpoints(tmp_path / "one", sharded=sharded)
        path = checkpoints.save(2, {}, training.parts, {"written by": "one"})
        assert_equal(load_file(path / "state.safetensors"), training.whole(), "one")
    assert not torch.equal(*(training.whole()[f"{part}.first.weight"] for part in ("model", "ema")))
    unbroken = [training.step(number) for number in (2, 3, 4)]

    of_two = in_ranks(2, tmp_path / "meeting-2", two_ranks, tmp_path)
    of_three = in_ranks(3, tmp_path / "meeting-3", three_ranks, tmp_path)
    of_one = load_all(tmp_path, ("one",))
    assert of_one["one"] == unbroken
    for losses in (*of_two, *of_three):
        for mode, found in losses.items():
            assert found == pytest.approx(unbroken, rel=1e-6), mode
    kinds = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert kinds == ["ddp-False", "ddp-True", "fsdp-False", "fsdp-True", "one"]
    wanted = load_file(path / "state.safetensors")
    for kind in kinds:
        found = read_part(tmp_path / kind / "step-000000002", "ema")
        assert_equal({f"ema.{key}": value for key, value in found.items()}, _part(wanted, "ema"), kind)


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if key.startswith(f"{part}.")}


def failures(processes: Processes, folder: Path) -> list[str]:
    """One rank of two that cannot write or read: what both are told."""
    rank = processes.rank
    told: list[str] = []

    def attempt(work: Any) -> None:
        try:
            work()
        except CheckpointError as error:
            told.append(str(error))
        else:
            told.append("no error")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for mode, sharded, bad in (("fsdp", True, 1), ("fsdp", True, 0), ("fsdp", False, 0), ("ddp", True, 1)):
        training = Training(mode, seed=0)
        training.step(0)
        checkpoints = Checkpoints(folder / f"{mode}-{sharded}-{bad}", sharded=sharded)
        path = checkpoints.save(1, {}, training.parts)
        before = training.whole()
        training.step(1)
        if rank == bad:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        attempt(lambda: checkpoints.save(2, {}, training.parts))  # noqa: B023 (called at once)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if list(checkpoints.folder.iterdir()) != [path] or checkpoints.latest() != path:
            raise ValueError(f"{list(checkpoints.folder.iterdir())}")
        checkpoints.load(path, training.parts)
        assert_equal(training.whole(), before, (mode, sharded))
        training.step(1)
        checkpoints.save(2, {}, training.parts)
    missing = folder / f"own-{rank}"  # a folder that the ranks do not share
    attempt(lambda: Checkpoints(missing, sharded=True).save(1, {}, training.parts))
    other = training.parts | ({"loss_scale": nn.Linear(1, 1)} if rank else {})
    attempt(lambda: checkpoints.load(checkpoints.folder / "step-000000002", other))
    (shard, *_) = sorted((checkpoints.folder / "step-000000002").glob("*.safetensors"))
    dist.barrier()
    if rank == 0:
        shard.write_bytes(shard.read_bytes()[:-1])
    dist.barrier()
    if checkpoints.latest() != checkpoints.folder / "step-000000001":
        raise ValueError(f"{checkpoints.latest()}")
    if rank == 0:
        (checkpoints.folder / "step-000000001" / "state.json").unlink()
    attempt(checkpoints.latest)
    return told


@pytest.mark.slow
def test_what_one_rank_meets_all_are_told(tmp_path: Path) -> None:
    first, second = in_ranks(2, tmp_path / "meeting", failures, tmp_path)
    assert first == second
    for message in first[:4]:
        assert "cannot write" in message
        assert "step-000000002: " in message
        assert "ile too large" in message
    assert "the first rank, lacks" in first[4] or "is damaged: parts of" in first[4]
    assert first[5].endswith("lacks loss_scale.bias, loss_scale.weight")
    assert "no checkpoint that is whole" in first[6]


def averages(processes: Processes, folder: Path) -> None:
    """An Ema of FSDP2 parameters is that of plain ones, and applying it leaves no trace."""
    rank = processes.rank
    one, sharded = Training("one", seed=0), Training("fsdp", seed=0)
    for training in (one, sharded):
        training.step(0)
    alone = dist.new_group([rank], use_local_synchronization=True)  # a group of this rank saves by itself
    checkpoints = Checkpoints(folder / f"one-{rank}", group=alone)
    checkpoints.load(checkpoints.save(1, {}, one.parts), one.parts)
    images = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    outputs = []
    for training in (one, sharded):
        with torch.no_grad():
            before = training.model(images)
            with training.ema.applied_to(training.model):
                outputs.append(training.model(images))
            if not torch.equal(training.model(images), before):
                raise ValueError(f"{training.mode}: the average is still applied")
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    if torch.equal(outputs[0], before):
        raise ValueError("the average changes nothing")
    wanted = one.whole()
    for key, value in sharded.whole().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_averages_of_sharded_parameters(tmp_path: Path) -> None:
    in_ranks(2, tmp_path / "meeting", averages, tmp_path)


def mage_steps(
    processes: Processes, folder: Path, how: str | None, start: int, total: int = 2
) -> tuple[list[float], dict[str, Tensor]]:
    """Two steps of two micro-batches in all, from the checkpoint of ``start`` if there is one, and save."""
    torch.manual_seed(start)
    tokenizer = TokenizerConfig(
        **{"image_size": 8, "codebook_size": 16, "codebook_dim": 4, "base_width": 4},
        **{"width_multipliers": (1, 2), "blocks_per_level": 1, "norm_groups": 2},
    )
    model = MAGE(MAGEConfig.tiny(tokenizer=tokenizer, codebook_size=16, dropout=0.2)).train()
    parallel = None if how is None else parallelized(model, processes, how)  # type: ignore[arg-type]
    optimizer = build_adamw(model, 1e-3)
    ema = Ema(model, 0.5)
    parts: Any = {"model": model, "optimizer": optimizer, "ema": ema}
    checkpoints = Checkpoints(folder, sharded=True, keep_last=9)
    if start:
        checkpoints.load(folder / f"step-{start:09d}", parts)
    step_of = TrainStep(model, optimizer, ema=ema, parallel=parallel)
    losses = []
    for number in range(start, start + 2):
        mine = range(processes.rank, total, processes.count)
        batches = [
            MicroBatch(draw_ids(model.config, 3, 10 * number + n), None, rng.new_state(n, number))
            for n in mine
        ]
        losses.append(processes.mean([step_of.accumulate(batches)["loss"].item()])[0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = draw_ids(model.config, 3)
    with ema.applied_to(model), torch.no_grad():
        model(ids, rng_state=rng.new_state(0, 0))
    assert_equal(_whole(model.state_dict()), _whole(before), "after the average")
    checkpoints.save(start + 2, {}, parts)
    return losses, _whole(flatten(parts)[0])


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in tensors.items()}


def mage_ranks(processes: Processes, folder: Path) -> list[tuple[list[float], dict[str, Tensor]]]:
    found = [mage_steps(processes, folder / "fsdp first", "fsdp", 0)]
    found += [mage_steps(processes, folder / "one first", how, 2) for how in ("fsdp", "ddp")]
    return found


@pytest.mark.slow
def test_a_mage_goes_on_in_another_number_of_ranks(tmp_path: Path) -> None:
    """Its frozen tokenizer, which is not sharded, is part of the state."""
    alone = Processes()
    first = mage_steps(alone, tmp_path / "one first", None, 0)
    for sharded, *others in in_ranks(2, tmp_path / "meeting", mage_ranks, tmp_path):
        assert any(key.startswith("model.tokenizer.") for key in sharded[1])
        assert sharded[0] == pytest.approx(first[0], rel=1e-5)
        wanted = mage_steps(alone, tmp_path / "one first", None, 2)
        for losses, _ in [*others, mage_steps(alone, tmp_path / "fsdp first", None, 2)]:
            assert losses == pytest.approx(wanted[0], rel=1e-5)
