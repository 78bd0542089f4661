"""The suites of whole steps by name."""

from __future__ import annotations

from typing import Any

import torch

from mage_fast.benchmark import end_to_end, generation, tokenization, training
from mage_fast.benchmark.end_to_end import Item, Twins
from mage_fast.kernels.roofline import Work

SUITES = ("train", "generate", "tokenize")


def items(suite: str, twins: list[Twins], batch: int | None = None) -> list[Item]:
    """Everything that a suite times; models are made when an item asks for its candidates."""
    if suite == "train":
        return [*training.items(twins, batch=batch)]
    if suite == "generate":
        return [*generation.items(twins, batch=batch)]
    assert suite == "tokenize", suite
    return [*tokenization.items(twins, batch=batch)]


def work_of(record: dict[str, Any]) -> Work | None:
    """What a record of one of the suites must move and compute; None where there is no such item any more."""
    if record["suite"] not in SUITES:
        return None
    for device in ("cpu", "cuda"):  # what is timed without a given batch differs
        known = end_to_end.models(("vit_b", "vit_l"), device, smoke=False)
        known += end_to_end.models((), device, smoke=True)
        for twins in known:
            for item in items(record["suite"], [twins], record["shape"].get("batch")):
                if (item.name, item.shape) == (record["name"], record["shape"]):
                    return item.work(getattr(torch, record["dtype"]))
    return None
