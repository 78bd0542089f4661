"""A MAGE in plain PyTorch, accelerated, trained by stock DistributedDataParallel and AdamW on two processes.

    python examples/accelerate_ddp.py --out out/ddp.pth

Starts its own processes; on GPUs take ``nccl`` and one device a process. The checkpoint has the published
layout and loads into the plain model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mage_fast
from mage_fast import reference

SIZES = {"grid_size": 4, "codebook_size": 32, "class_slots": 11, "unconditional_class": 10}
WIDTHS = {"encoder_width": 32, "encoder_depth": 2, "encoder_heads": 2, "decoder_width": 32}


def plain_model() -> reference.MAGE:
    """Yours in its place: any class whose parameters have the published names."""
    torch.manual_seed(0)
    return reference.MAGE(**SIZES, **WIDTHS, decoder_depth=2, decoder_heads=2)


def train(rank: int, processes: int, meeting_point: str, out: str) -> None:
    """What every process does."""
    dist.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=processes)
    model = plain_model()
    mage_fast.accelerate(model)  # the only line of ours
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    torch.manual_seed(1 + rank)  # each process masks its own way
    ids = torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(rank)) // 8
    for step in range(10):
        optimizer.zero_grad()
        loss, _, _ = parallel(ids)
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"step {step}: loss {loss.item() / processes:.4f}")
    sizes = torch.stack([x.detach().double().norm() for x in model.parameters()]).sum()
    everywhere = [torch.empty_like(sizes) for _ in range(processes)]
    dist.all_gather(everywhere, sizes)
    if rank == 0:
        print("size of the weights in each process:", *(x.item() for x in everywhere))
        torch.save({"model": model.state_dict()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("ddp.pth"))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    meeting = arguments.out.resolve().with_suffix(".meeting")
    meeting.unlink(missing_ok=True)  # that of a run which was killed
    torch.multiprocessing.spawn(
        train, (arguments.processes, f"file://{meeting}", str(arguments.out)), arguments.processes
    )
    meeting.unlink(missing_ok=True)
