"""An accelerated model under stock DistributedDataParallel, on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mage_fast import accelerate, reference
from mage_fast.checkpoint import load_published
from tests.models import assert_near, build, draw_ids, tiny, twin

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_example_runs_and_its_checkpoint_loads_into_the_plain_model(tmp_path: Path) -> None:
    out = tmp_path / "ddp.pth"
    command = [sys.executable, "examples/accelerate_ddp.py", "--out", str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"step \d: loss (\S+)", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.3  # 4 of 32 ids occur
    (weights,) = re.findall(r"each process: (\S+) (\S+)", done.stdout)
    assert weights[0] == weights[1]
    assert [f.name for f in tmp_path.iterdir()] == ["ddp.pth"]

    model = reference.MAGE.from_config(tiny()).eval()
    state = load_published(out)
    model.load_state_dict(state, strict=True)
    sizes = torch.stack([x.detach().double().norm() for x in model.parameters()]).sum()
    assert sizes.item() == float(weights[0])
    ids = draw_ids(tiny(), 2)
    wanted = model.features(ids)
    with accelerate(model) as handle:
        assert_near(handle.features(ids), wanted)


def batch(rank: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each process has its own."""
    torch.manual_seed(rank)
    drop_mask, mask = reference.MAGE.from_config(tiny()).draw_masks(2, torch.device("cpu"))
    return draw_ids(tiny(), 2, seed=rank), {"drop_mask": drop_mask, "mask": mask}


def gradients(rank: int, folder: str) -> None:
    """The accelerated model's, wrapped after and before."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    config = tiny(dropout=0.0)
    ids, masks = batch(rank)
    for order in ("after", "before"):
        model = twin(build(config).train(), config)
        handle = accelerate(model) if order == "after" else None
        parallel = DistributedDataParallel(model)
        handle = handle or accelerate(parallel)
        assert "" in handle.replaced
        parallel(ids, **masks).loss.backward()
        grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        torch.save(grads, f"{folder}/{order}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_processes_equal_the_plain_models(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(gradients, (str(tmp_path),), 2)
    config = tiny(dropout=0.0)
    plain = twin(build(config).train(), config)
    losses = [plain(ids, **masks).loss for ids, masks in map(batch, range(2))]
    torch.stack(losses).mean().backward()
    wanted = {name: x.grad for name, x in plain.named_parameters() if x.grad is not None}
    largest = max(x.abs().max() for x in wanted.values())
    for name in ("after0", "after1", "before0", "before1"):
        grads = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert grads.keys() == wanted.keys()
        for key, grad in wanted.items():
            size = max(grad.abs().max(), 1e-3 * largest)
            assert (grads[key] - grad).abs().max() <= 2e-5 * size, key
