"""Bytes that a forward pass keeps for its backward: figures that depend on no machine and no load.

``python -m mage_fast.benchmark.activations`` prints those of a ViT-B training step, ours and the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mage_fast.benchmark.training import Step, steps
from mage_fast.kernels import rng
from mage_fast.masking import draw_plan
from mage_fast.training.precision import Precision, autocast


@dataclass
class Saved:
    """Storages that a forward pass saved, by shape and dtype of what was saved of them."""

    tensors: list[tuple[tuple[int, ...], torch.dtype, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The sum over the storages."""
        return sum(size for *_, size in self.tensors)


def saved(run_forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> Saved:
    """What a forward pass keeps for its backward, every storage once.

    Args:
        run_forward: gives the loss.
        parameters: tensors that are there anyway and do not count, nor do views of them.
    """
    known = {p.untyped_storage().data_ptr() for p in parameters}
    found = Saved()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes():
            known.add(storage.data_ptr())
            found.tensors.append((tuple(x.shape), x.dtype, storage.nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run_forward()
    del loss  # held what was saved till here, so no address was two storages'
    return found


def saved_bytes(run_forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes of :func:`saved`."""
    return saved(run_forward, parameters).bytes


def of_step(step: Step, precision: Precision) -> dict[str, Saved]:
    """What a training step keeps, ours and the reference's, for masks of the mean ratio 0.694."""
    ours, theirs = step.models(step.config)
    ids_BL, state = step.ids(), rng.new_state(0, device=step.device)
    plan = draw_plan(step.config, torch.full((step.batch,), 0.694), state)
    dropped_P = torch.ones(plan.source_BS.numel(), dtype=torch.bool, device=step.device)
    dropped_P[plan.positions_T.long()] = False
    masks = {"drop_mask": dropped_P.view_as(plan.source_BS)[:, 1:], "mask": plan.is_masked_BL}
    runs: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "mage_fast": (ours, lambda: ours(ids_BL, plan=plan, rng_state=state).loss),
        "reference": (theirs, lambda: theirs(ids_BL, **masks).loss),
    }
    with autocast(precision, torch.device(step.device)):
        return {name: saved(run, model.parameters()) for name, (model, run) in runs.items()}


def main() -> None:
    """Print MiB of a ViT-B step on the CPU's batch, and what of ours is largest."""
    for precision in ("fp32", "bf16"):
        for name, found in of_step(steps("cpu")[0], precision).items():
            print(f"{precision} {name}: {found.bytes / 2**20:.1f} MiB in {len(found.tensors)} tensors")
            groups: dict[tuple, list[int]] = {}
            for shape, dtype, size in found.tensors:
                groups.setdefault((shape, dtype), []).append(size)
            for (shape, dtype), sizes in sorted(groups.items(), key=lambda x: -sum(x[1]))[:12]:
                print(f"    {sum(sizes) / 2**20:8.1f} MiB  {len(sizes):3d} x {shape} {dtype}")


if __name__ == "__main__":
    main()
