"""Several processes that train one model: equal to one process, alike in what they skip and stop at."""

from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mage_fast.contrastive import MAGEC
from mage_fast.errors import InputError, TrainingError
from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import plan_of_mask
from mage_fast.model import MAGE
from mage_fast.training import distributed
from mage_fast.training.distributed import Agreement, Processes, parallelized, torchrun_processes
from mage_fast.training.loop import Skips, train
from mage_fast.training.optim import Ema, build_adamw
from mage_fast.training.step import MicroBatch, TrainStep
from tests.models import build, draw_ids, tiny
from tests.ranks import in_ranks

STEPS, RANKS, ROWS = 3, 2, 3


def micro_batch(step: int, number: int) -> MicroBatch:
    ids = draw_ids(tiny(), ROWS, seed=100 * step + number)
    return MicroBatch(ids, None, rng.new_state(rng.split_seed(5, number), step))


def whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in values.items()
    }


def steps_of(model: MAGE, processes: Processes, how: str, accumulated: int) -> dict[str, Any]:
    """Losses, gradient norms, the first step's gradients, and the weights and their average at the end."""
    parallel = parallelized(model, processes, how)  # type: ignore[arg-type]
    optimizer = build_adamw(model, 1e-2)
    for group in optimizer.param_groups:
        group["eps"] = 1e-3  # hides the gradient of the keys' bias, which is rounding
    ema = Ema(model, 0.5)
    step = TrainStep(model, optimizer, clip_norm=0.3, ema=ema, parallel=parallel)
    metrics, gradients = [], {}
    for number in range(STEPS):
        mine = [processes.rank + processes.count * k for k in range(accumulated)]
        found = step.accumulate([micro_batch(number, n) for n in mine])
        loss = processes.mean([found["loss"].item()])[0]
        metrics.append((loss, found["gradient_norm"].item()))
        if number == 0:
            gradients = whole({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    parameters = dict(model.named_parameters())
    return {
        "metrics": torch.tensor(metrics),
        "gradients": gradients,
        "parameters": whole(parameters),
        "average": whole({k: v for k, v in ema.state_dict().items() if k in parameters}),
    }


def all_steps(processes: Processes, times: int) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (how, accumulated): steps_of(build(tiny(dropout=0.2)).train(), processes, how, accumulated * times)
        for how in ("ddp", "fsdp")
        for accumulated in (1, 2)
    }


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    """With dropout and a mask ratio for each micro-batch: twice as many of them in one process."""
    ranks = in_ranks(RANKS, tmp_path / "meeting", all_steps, 1)
    wanted = all_steps(Processes(), RANKS)
    for got in ranks:
        torch.testing.assert_close(got, ranks[0], rtol=0, atol=0)
        for case in wanted:
            torch.testing.assert_close(got[case]["metrics"], wanted[case]["metrics"], rtol=1e-5, atol=1e-6)
            for part in ("gradients", "parameters", "average"):
                torch.testing.assert_close(got[case][part], wanted[case][part], rtol=1e-4, atol=2e-6)


def whole_batch() -> tuple[Tensor, Tensor]:
    """Two views of images, and masks of 10 tokens in each, so that ranks' means count alike."""
    ids = draw_ids(tiny(), 2 * RANKS * ROWS)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
    return (x.unflatten(0, (2, -1)) for x in (ids, order < 10))  # type: ignore[return-value]


def loss_and_gradients(processes: Processes, how: str, kind: type[MAGE]) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = kind(tiny(dropout=0.0)).train()
    forward: nn.Module = parallelized(model, processes, how) or model  # type: ignore[arg-type]
    # a share of the images, with both views of each
    ids, masked = (x.chunk(processes.count, 1)[processes.rank].flatten(0, 1) for x in whole_batch())
    loss = forward(ids, plan=plan_of_mask(masked, [10] * len(masked))).loss
    loss.backward()
    gradients = whole({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    return processes.mean([loss.item()])[0], gradients


CASES = list(itertools.product(("ddp", "fsdp"), (MAGE, MAGEC)))


def all_losses(processes: Processes) -> list[tuple[float, dict[str, Tensor]]]:
    return [loss_and_gradients(processes, *case) for case in CASES]


def test_two_ranks_equal_one_forward_of_the_doubled_batch(tmp_path: Path) -> None:
    """MAGE-C's images are contrasted with those of both ranks."""
    wanted = all_losses(Processes())
    for found in in_ranks(RANKS, tmp_path / "meeting", all_losses):
        for (loss, gradients), (wanted_loss, wanted_gradients) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-6)
            torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-5, atol=1e-6)


# Steps that all skip, and what stops all


def spoiled_steps(processes: Processes, how: str) -> dict[str, Any]:
    """One rank's loss is NaN in steps 1 and 3, when no weights change, and in 6 to 8, which stop all."""
    model = build(tiny()).train()
    parallel = parallelized(model, processes, how)  # type: ignore[arg-type]
    optimizer = build_adamw(model, 1e-2)
    step_of = TrainStep(model, optimizer, parallel=parallel)
    now, weights = [0], []

    def spoil(_: nn.Module, arguments: Any, output: Any) -> Any:
        return output * math.nan if now[0] in (1, 3, 6, 7, 8) and processes.rank == 1 else None

    model.head.register_forward_hook(spoil)

    def step_fn(batch: int, step: int) -> dict[str, Tensor]:
        now[0] = step
        metrics = step_of.accumulate([micro_batch(step, processes.rank)])
        weights.append(whole({"bias": model.head.bias})["bias"])
        return metrics

    options: dict[str, Any] = {"batches_from": lambda step: iter(range(step, 99)), "save": lambda _: None}
    options |= {"processes": processes, "skips": Skips(most_in_a_row=3)}
    result = train(step_fn, total_steps=5, **options)
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(weights)]
    found = {"changed": changed, "skipped": result.skipped, "loss": result.last["loss"]}
    found |= {"weights": weights[-1], "adam": float(optimizer.state[model.head.bias]["step"])}
    with pytest.raises(TrainingError) as error:
        train(step_fn, total_steps=20, start_step=5, log_every=2, **options)
    return found | {"error": str(error.value)}


def both_spoiled(processes: Processes) -> dict[str, dict[str, Any]]:
    return {how: spoiled_steps(processes, how) for how in ("ddp", "fsdp")}


def test_a_nan_in_one_rank_is_skipped_by_all(tmp_path: Path) -> None:
    ranks = in_ranks(RANKS, tmp_path / "meeting", both_spoiled)
    for how, found in ranks[0].items():
        for name, value in ranks[1][how].items():
            assert torch.equal(value, found[name]) if name == "weights" else value == found[name]
        assert found["changed"] == [False, True, False, True]
        assert (found["skipped"], found["adam"]) == (2, 3)
        assert math.isfinite(found["loss"])
        assert "gradient_norm was not finite in 3 steps in a row, the last one step 8" in found["error"]
        assert "the last good state is that of step 5" in found["error"]


def stopped_steps(processes: Processes) -> dict[str, Any]:
    """Rank 1 alone gets a signal in step 3; rank 0's clock alone asks for saves."""
    saves: list[int] = []

    def step_fn(batch: int, step: int) -> dict[str, float]:
        if step == 3 and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": float(processes.rank + step)}

    options: dict[str, Any] = {"batches_from": lambda step: iter(range(step, 99)), "save": saves.append}
    result = train(step_fn, total_steps=20, processes=processes, log_every=100, **options)
    timed: list[int] = []
    options["save"] = timed.append
    seconds = 0.0 if processes.is_main else math.inf
    train(lambda *_: {}, total_steps=5, processes=processes, save_every_seconds=seconds, **options)
    return {"saves": saves, "timed": timed, "step": result.step, "by": result.stopped_by} | result.last


def test_ranks_stop_and_save_after_the_same_step(tmp_path: Path) -> None:
    """One step later than the one that asks: nobody waits for the others' answer."""
    for found in in_ranks(RANKS, tmp_path / "meeting", stopped_steps):
        assert found == {"saves": [5], "timed": [2, 4, 5], "step": 5, "by": "SIGTERM", "loss": 3.0}


def agreed(processes: Processes) -> list[list[float] | None]:
    agreement = Agreement(processes)
    rounds = [agreement.exchange((n * (processes.rank + 1), -processes.rank)) for n in range(3)]
    return [*rounds, agreement.settle(), agreement.settle()]


def test_processes_agree_on_the_highest_a_step_later(tmp_path: Path) -> None:
    for found in in_ranks(RANKS, tmp_path / "meeting", agreed):
        assert found == [[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [4.0, 0.0], None]
    assert Agreement(Processes()).exchange((3.0, 1.0)) == [3.0, 1.0]


# A rank that is lost


def failing(processes: Processes, how: str, others: Sequence[Path] = ()) -> None:
    for step in range(5):
        if step == 3 and processes.rank == 1:
            if how == "dies":
                os._exit(9)
            if how == "hangs":  # until the others have given it up
                while not all(path.exists() for path in others):
                    time.sleep(0.1)
                return
            raise ValueError("no room left")
        processes.mean([1.0])


def survivor(processes: Processes, how: str) -> str:
    with pytest.raises((TrainingError, ValueError)) as error, processes.naming_the_lost():
        failing(processes, how)
    return f"{type(error.value).__name__}: {error.value}"


def told(processes: Processes, how: str, folder: str) -> None:
    """Survivors wait shortly; what they say goes to files, which rank 1 waits for."""
    distributed.ROLL_CALL = 2.0
    others = [Path(folder) / f"{how}-{rank}" for rank in (0, 2)]
    if processes.rank == 1:
        failing(processes, how, others)
    else:
        (Path(folder) / f"{how}-{processes.rank}").write_text(survivor(processes, how))


def test_survivors_name_a_rank_that_hangs(tmp_path: Path) -> None:
    in_ranks(3, tmp_path / "meeting", told, "hangs", str(tmp_path), seconds=3.0)
    for rank in (0, 2):
        said = (tmp_path / f"hangs-{rank}").read_text()
        assert said.startswith(f"TrainingError: rank 1 of 3 (this is rank {rank}) died or hangs")


def test_survivors_tell_why_a_rank_failed(tmp_path: Path) -> None:
    found = in_ranks(3, tmp_path / "meeting", survivor, "raises")
    assert found[1] == "ValueError: no room left"
    assert found[0] == found[2] == "TrainingError: stopped, as rank 1 failed: ValueError: no room left"


def test_an_error_is_told_before_the_group_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's would wait in its end for ranks that never come there."""
    environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (environment | {"TORCHELASTIC_RUN_ID": "test"}).items():
        monkeypatch.setenv(name, value)
    with torchrun_processes(torch.device("cpu")):
        assert dist.is_initialized()
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="no room left"), torchrun_processes(torch.device("cpu")):
        raise ValueError("no room left")
    assert dist.is_initialized()
    dist.destroy_process_group()


# Refusals


def test_a_graph_is_of_one_process_and_one_micro_batch() -> None:
    model = build(tiny()).train()
    step = TrainStep(model, build_adamw(model, 1e-2))
    with pytest.raises(ValueError, match="no micro-batch, wanted one or more"):
        step.accumulate([])
    step._graphs = object()  # type: ignore[assignment]
    with pytest.raises(InputError, match="2 micro-batches with graph=True, wanted 1"):
        step.accumulate([micro_batch(0, 0), micro_batch(0, 1)])


def test_views_are_one_batch() -> None:
    """``[V, B, L]``, with a label for each image."""
    config = tiny(dropout=0.0)
    model, ids = build(config).train(), draw_ids(config, 4)
    labels = torch.tensor([1, 2])
    steps = [TrainStep(m, build_adamw(m, 1e-2)) for m in (model, copy.deepcopy(model))]
    together = steps[0](ids.view(2, 2, -1), labels, rng_state=rng.new_state(1))
    apart = steps[1](ids, labels.repeat(2), rng_state=rng.new_state(1))
    torch.testing.assert_close(together, apart, rtol=0, atol=0)
