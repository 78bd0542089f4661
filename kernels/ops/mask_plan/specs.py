"""Shapes of ``mask_plan`` in training, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_fast.kernels import rng


@dataclass(frozen=True)
class Spec:
    """Samples of ``length`` tokens; counts step from sample to sample between two bounds."""

    name: str
    batch: int
    length: int
    masked: tuple[int, int]
    dropped: tuple[int, int]

    def inputs(self, dtype: torch.dtype = torch.int32, device: str = "cpu") -> dict:
        """Integer op: ``dtype`` is that of the counts."""
        masked = torch.linspace(*self.masked, self.batch).long()
        dropped = torch.minimum(torch.linspace(*self.dropped, self.batch).long(), masked)
        return {
            "rng_state": rng.new_state(0, device=device),
            "num_masked_B": masked.to(device, dtype),
            "num_dropped_B": dropped.to(device, dtype),
            "length": self.length,
            "total_masked": int(masked.sum()),
            "total_kept": (self.length + 1) * self.batch - int(dropped.sum()),
            "max_seqlen": self.length + 1 - int(dropped.min()),
            "stream": rng.stream(rng.Stream.MASK_PLAN),
        }


SPECS = (
    Spec("tiny", 3, 7, (4, 7), (3, 4)),
    Spec("tiny_nothing_masked", 2, 5, (0, 0), (0, 0)),
    Spec("small_paper", 2, 256, (178, 178), (128, 128)),
    Spec("small_odd_length", 3, 37, (0, 37), (0, 37)),
    Spec("small_long", 1, 4096, (2867, 2867), (2048, 2048)),
    Spec("paper_batch4", 4, 256, (178, 178), (128, 128)),
    Spec("unmasked_batch4", 4, 256, (128, 256), (128, 256)),
    Spec("paper_batch128", 128, 256, (178, 178), (128, 128)),
)
GPU_SPECS = (
    Spec("paper_batch1024", 1024, 256, (128, 256), (128, 128)),
    Spec("unmasked_batch128", 128, 256, (128, 256), (128, 256)),
    Spec("length4096_batch128", 128, 4096, (2048, 4096), (2048, 2048)),
)
