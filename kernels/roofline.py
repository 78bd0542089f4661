"""The roofline: what an op must move and compute, and how long a device needs for that at the least.

Every op's ``Spec`` has a method ``work(dtype, direction)``: the :class:`Work` of the op as it is specified,
each input and saved tensor read once, each result written once. The 16 bytes of a random state are left out.
``floor_seconds`` of a :class:`Device` is then a bound that no implementation beats from cold caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Direction = Literal["fwd", "bwd"]

#: Operations of one Philox-4x32-10 block of four words: 10 rounds of 4 half products and 4 xors, 9 key
#: steps of 2 additions.
PHILOX_BLOCK = 98
#: Operations of an element: sum, squared deviation (3), normalise (2), scale and shift (2).
NORM = 8
#: The same backward: normalise (2), weigh (1), two row sums (3), combine (4), sums for scale and shift (3).
NORM_BACKWARD = 13


@dataclass(frozen=True)
class Work:
    """Bytes that must move and operations that must be done."""

    read_bytes: int
    written_bytes: int
    #: Of the matrix products where there are any, else of the elementwise equation, exp and the like as one.
    flops: int
    #: Whether the flops are a matrix product's, so that tensor cores may do them.
    matrix: bool = False

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    def __add__(self, other: Work) -> Work:
        assert self.matrix == other.matrix
        return Work(
            self.read_bytes + other.read_bytes,
            self.written_bytes + other.written_bytes,
            self.flops + other.flops,
            self.matrix,
        )


@dataclass(frozen=True)
class Device:
    """Limits of a device, from its data sheet or measured."""

    name: str
    bandwidth_bytes_s: float
    #: FLOP/s by dtype; "tf32" where there is such a unit, "float32" is that of the elementwise units.
    peak_flops: Mapping[str, float]

    def peak(self, dtype: torch.dtype, *, matrix: bool) -> float:
        """FLOP/s of matrix products of the dtype, or of elementwise arithmetic, which is done in float32."""
        float32 = self.peak_flops["float32"]
        if not matrix:
            return float32
        if dtype is torch.float32:  # its accuracy takes three tf32 products (tf32x3)
            return max(float32, self.peak_flops.get("tf32", 0.0) / 3)
        return self.peak_flops.get(str(dtype).removeprefix("torch."), float32)

    def memory_seconds(self, work: Work) -> float:
        return work.bytes / self.bandwidth_bytes_s

    def compute_seconds(self, work: Work, dtype: torch.dtype) -> float:
        return work.flops / self.peak(dtype, matrix=work.matrix)

    def floor_seconds(self, work: Work, dtype: torch.dtype) -> float:
        """max(bytes / bandwidth, flops / peak)."""
        return max(self.memory_seconds(work), self.compute_seconds(work, dtype))

    def bound(self, work: Work, dtype: torch.dtype) -> str:
        """Which of the two it is."""
        return "memory" if self.memory_seconds(work) >= self.compute_seconds(work, dtype) else "compute"


def _hopper(
    name: str, bandwidth: float, half: float = 989e12, tf32: float = 495e12, float32: float = 67e12
) -> Device:
    return Device(name, bandwidth, {"bfloat16": half, "float16": half, "tf32": tf32, "float32": float32})


#: Data sheets, dense figures. A key is a part of the name that CUDA gives; boards stand before families,
#: which are the SXM boards.
DEVICES = {
    "a100": Device(
        "A100 80GB SXM", 2.039e12, {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12}
    ),
    "h100 pcie": _hopper("H100 PCIe", 2.0e12, 756e12, 378e12, 51e12),
    "h100 nvl": _hopper("H100 NVL", 3.9e12, 835e12, 418e12, 60e12),
    "h200 nvl": _hopper("H200 NVL", 4.8e12, 835e12, 418e12, 60e12),
    "h100": _hopper("H100 SXM", 3.35e12),
    "h200": _hopper("H200 SXM", 4.8e12),
}


def data_sheet(name: str) -> Device | None:
    """The data sheet of a device's name as CUDA gives it, "NVIDIA H100 80GB HBM3"; None for others."""
    return next((sheet for key, sheet in DEVICES.items() if key in name.lower()), None)


def statistic_bytes(dtype: torch.dtype) -> int:
    """Size of a mean, a logsumexp and the like: float32, float64 for float64."""
    return max(4, dtype.itemsize)


def dropout_flops(elements: int, p: float) -> int:
    """A Philox block for 8 activations, a comparison and a scaling each; nothing without dropout."""
    return round(elements * (PHILOX_BLOCK / 8 + 2)) if p > 0 else 0
