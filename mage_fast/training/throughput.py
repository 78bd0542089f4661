"""How fast training goes, what it waits for, and how much of the devices it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from mage_fast import counts
from mage_fast.config import MAGEConfig
from mage_fast.errors import InputError
from mage_fast.kernels.roofline import data_sheet
from mage_fast.training.precision import Precision

BatchT = TypeVar("BatchT")


class Throughput:
    """Measures windows of training, from one log to the next.

    >>> flops, peak = flops_per_image(config), peak_flops(device, "bf16")
    >>> meter = Throughput(4096, flops_per_image=flops, peak_flops=peak)
    >>> for batch in meter.batches(batches):       # times the waiting, counts the steps
    ...     metrics = step(batch)
    ...     if time_to_log:
    ...         logger.log(number, metrics | meter.window())

    A window wants the device's work done when it begins and ends, as it is once metrics were read. All that
    happens in it counts as time, but for what is done ``with meter.paused():``.

    Args:
        images_per_step: of all ranks together.
        flops_per_image: of the model, see :func:`flops_per_image`; without it no ``mfu`` is given.
        peak_flops: FLOP/s of all ranks' devices together, see :func:`peak_flops`; likewise.
        device: whose memory is told; nothing is told of a CPU's.
        clock: seconds, never going back.

    Raises:
        InputError: numbers that are not positive.
    """

    def __init__(
        self,
        images_per_step: int,
        *,
        flops_per_image: float | None = None,
        peak_flops: float | None = None,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (
            ("images_per_step", images_per_step),
            ("flops_per_image", flops_per_image),
            ("peak_flops", peak_flops),
        ):
            if value is not None and not value > 0:
                raise InputError(f"Throughput: {name} is {value}, wanted more than 0")
        self.images_per_step = images_per_step
        self.flops_per_image, self.peak_flops = flops_per_image, peak_flops
        self.device, self.clock = device, clock
        self._steps, self._waited, self._start = 0, 0.0, clock()

    def batches(self, batches: Iterator[BatchT]) -> Iterator[BatchT]:
        """The same batches, each of which is what this rank trains on in a step; waiting for them is timed.

        The first batch starts the first window: what was done before, and opening the data, is no step's.
        """
        self._steps, self._waited, self._start = 0, 0.0, self.clock()
        try:
            while True:
                asked = self.clock()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                self._waited += self.clock() - asked
                self._steps += 1
                yield batch
        finally:
            if (close := getattr(batches, "close", None)) is not None:
                close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, looking at the model or saving it, is left out of the window's time."""
        start = self.clock()
        try:
            yield
        finally:
            self._start += self.clock() - start

    def window(self) -> dict[str, float]:
        """Metrics since the last window, which ends here and now; empty if no step was done in it.

        * ``images_per_second``, of all ranks;
        * ``data_wait``: share of the time spent waiting for batches, in [0, 1]. A GPU may be at work
          meanwhile, so this is the most that faster data could save;
        * ``mfu``: model FLOPs utilisation, in [0, 1] if counts and peak are right;
        * ``peak_memory_mib``: most memory of tensors on this rank's CUDA device since the process began.

        Source: Chowdhery et al. 2022 (PaLM), appendix B: the FLOPs that the mathematics needs, forward and
        backward, at the observed speed, over the peak; recomputation is not counted.
        """
        now = self.clock()
        steps, waited, elapsed = self._steps, self._waited, now - self._start
        self._steps, self._waited, self._start = 0, 0.0, now
        if not steps or elapsed <= 0:
            return {}
        found = {
            "images_per_second": steps * self.images_per_step / elapsed,
            "data_wait": min(waited / elapsed, 1.0),
        }
        if self.flops_per_image is not None and self.peak_flops is not None:
            found["mfu"] = self.flops_per_image * found["images_per_second"] / self.peak_flops
        if self.device is not None and self.device.type == "cuda":
            found["peak_memory_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        return found


def flops_per_image(config: MAGEConfig, *, tokenizes: bool = False) -> float:
    """FLOPs of a training step for one view of an image: matrix products of the transformer, both ways.

    The trained transformer counts three times its forward pass, the frozen tokenizer, where it runs in
    training, once: 161 and 129 GFLOP for ViT-B. The head counts at masked tokens over the codebook only,
    whatever an implementation computes besides (:mod:`mage_fast.counts`).

    Args:
        config: the model's.
        tokenizes: batches are images, not ids.

    Raises:
        InputError: images for a model whose configuration has no tokenizer.
    """
    flops = counts.training(config)
    if tokenizes:
        if config.tokenizer is None:
            raise InputError("flops_per_image: the model's configuration has no tokenizer to count")
        flops += counts.tokenizer(config.tokenizer, "encode")
    return flops


def peak_flops(device: torch.device, precision: Precision, ranks: int = 1) -> float | None:
    """FLOP/s of dense matrix products that the data sheet promises for as many devices; None if unknown.

    ``"fp32"`` is TF32's figure where ``torch.backends.cuda.matmul.allow_tf32`` is set. Known are A100, H100
    and H200, found by their names.
    """
    if device.type != "cuda":
        return None
    sheet = data_sheet(torch.cuda.get_device_name(device))
    if sheet is None:
        return None
    float32 = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
    names: dict[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": float32}
    return ranks * sheet.peak_flops[names[precision]]
