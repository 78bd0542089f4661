"""The tokenizer alone, ours beside the reference's: images to ids, ids to images.

Before anything is timed, features and images are compared. How many ids agree is reported, not asked for: the
weights here are random, and a codebook that nothing has trained has many near ties.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from mage_fast import counts, reference
from mage_fast.benchmark.end_to_end import (
    AMP,
    DTYPES,
    EAGER,
    OURS,
    REFERENCE_COMPILED,
    Candidate,
    Item,
    Twins,
    autocast,
    near,
)
from mage_fast.benchmark.timing import Run
from mage_fast.benchmark.training import check_features
from mage_fast.kernels.roofline import Work
from mage_fast.model import MAGE

Direction = Literal["encode", "decode"]
#: Images at a time, by device type.
BATCH = {"cuda": 64, "cpu": 2}


@dataclass
class Tokenization(Item):
    """One direction of a model's tokenizer."""

    suite = "tokenize"
    twins: Twins
    direction: Direction
    batch: int

    def __post_init__(self) -> None:
        self.device = self.twins.device
        # the published tokenizer is the same in every model
        default = 2 if self.twins.smoke else BATCH[self.device]
        self.name = self.direction + (f"/batch{self.batch}" if self.batch != default else "")

    @property
    def shape(self) -> dict[str, Any]:
        assert self.twins.config.tokenizer is not None
        return {"batch": self.batch, "image_size": self.twins.config.tokenizer.image_size}

    def work(self, dtype: torch.dtype) -> Work:
        config = self.twins.config.tokenizer
        assert config is not None
        flops = counts.tokenizer(config, self.direction)
        images = self.batch * 3 * config.image_size**2 * dtype.itemsize
        read, written = (images, 0) if self.direction == "encode" else (0, images)
        return Work(read, written, round(self.batch * flops), matrix=True)

    def candidates(self, *, compiled: bool) -> list[Candidate]:
        ours, theirs = self.twins.same_weights()
        eager = self._theirs(theirs)
        precisions = [(EAGER, torch.float32, eager)]
        if self.device == "cuda":
            precisions.append((AMP, torch.float16, eager))
        if compiled:
            precisions.append((REFERENCE_COMPILED, torch.bfloat16, torch.compile(lambda: eager())))
        found = []
        for name, dtype, work in precisions:
            run = partial(self._run, work, dtype)
            found.append(Candidate(name, dtype, run, run))
        for dtype in DTYPES:
            run = partial(self._run, self._ours(ours), dtype)
            found.append(Candidate(OURS, dtype, run, run, partial(self.check, dtype)))
        return found

    def _run(self, work: Run, dtype: torch.dtype) -> Any:
        with torch.no_grad(), autocast(self.device, dtype):
            return work()

    def _ours(self, model: MAGE) -> Run:
        assert model.tokenizer is not None
        if self.direction == "encode":
            return partial(model.tokenizer.encode, self.twins.images(self.batch))
        return partial(model.tokenizer.decode, self.twins.ids(self.batch))

    def _theirs(self, model: reference.MAGE) -> Callable[[], Any]:
        if self.direction == "encode":
            return partial(model.tokenize, self.twins.images(self.batch))
        return partial(model.vqgan.decode_ids, self.twins.ids(self.batch))

    def check(self, dtype: torch.dtype) -> str:
        """Features or images within tolerance; of ids, how many agree.

        Raises:
            Incorrect: they are not.
        """
        if self.direction == "encode":
            return check_features(self.twins, self.batch, dtype)
        ours, theirs = self.twins.pair
        got = self._run(self._ours(ours), dtype)
        wanted, plain = (self._run(self._theirs(theirs), d) for d in (torch.float32, dtype))
        near("the decoded images", got, wanted, dtype, plain)
        return ""


def items(twins: list[Twins], *, batch: int | None = None) -> list[Tokenization]:
    """Both directions of the first model's tokenizer."""
    first = twins[0]
    size = batch or (2 if first.smoke else BATCH[first.device])
    return [Tokenization(first, direction, size) for direction in ("encode", "decode")]
