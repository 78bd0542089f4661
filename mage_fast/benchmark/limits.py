"""What this device can do, measured beside the ops: copying a large tensor, and large matrix products.

The figures are records of the suite "device"; a :class:`Device` made of them gives the floors of the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mage_fast.benchmark.timing import Timing, interleaved
from mage_fast.kernels.roofline import Device

#: Bytes of the tensor that is copied, and the side of the matrices, by device type and for a smoke run.
COPIED = {"cuda": 2**30, "cpu": 2**28, "smoke": 2**22}
SIDE = {"cuda": 8192, "cpu": 1024, "smoke": 128}


def measure(device: str, seconds: float, *, smoke: bool = False) -> list[dict[str, Any]]:
    """One record for the copy, one for the matrix product in each dtype."""
    size = "smoke" if smoke else device
    copied = torch.empty(COPIED[size], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(copied)
    timing = interleaved({"copy": lambda: target.copy_(copied)}, device, seconds)["copy"]
    records = [_record("copy", "uint8", {"bytes": COPIED[size]}, timing)]
    del copied, target
    side = SIDE[size]
    shape = {"m": side, "n": side, "k": side}
    on_gpu = ("float16", "tf32") if device == "cuda" else ()
    for name in ("bfloat16", *on_gpu, "float32"):
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            product = partial(torch.mm, a, b, out=out)
            timing = interleaved({name: product}, device, seconds)[name]
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
        records.append(_record(f"gemm/{name}", str(dtype).removeprefix("torch."), shape, timing))
    return records


def _record(name: str, dtype: str, shape: dict[str, int], timing: Timing) -> dict[str, Any]:
    return {
        "suite": "device",
        "name": name,
        "dtype": dtype,
        "shape": shape,
        "implementation": "torch",
        "median_ms": timing.median_ms,
        "rounds": len(timing.samples_ms),
    }


def as_device(records: list[dict[str, Any]]) -> Device | None:
    """The limits that the records of suite "device" amount to; None without them."""
    found = {r["name"]: r for r in records if r["suite"] == "device"}
    if "copy" not in found or "gemm/float32" not in found:
        return None
    # a copy reads and writes; a product of m k n is 2 m k n operations
    bandwidth = 2 * found["copy"]["shape"]["bytes"] / found["copy"]["median_ms"] * 1e3
    peaks = {
        name.removeprefix("gemm/"): 2 * r["shape"]["m"] ** 3 / r["median_ms"] * 1e3
        for name, r in found.items()
        if name.startswith("gemm/")
    }
    return Device(str(found["copy"].get("device", "")), bandwidth, peaks)
