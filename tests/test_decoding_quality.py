"""The quality script: its records, on an untrained model and a distance that is known."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from torch import Tensor

from benchmarks.decoding_quality import VARIANTS, measure
from mage_fast.config import MAGEConfig
from mage_fast.model import MAGE
from mage_fast.sampler import generate
from mage_fast.sampler_config import SamplerConfig


def test_records() -> None:
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny()).eval()
    variants = [dataclasses.replace(config, steps=2) for config in VARIANTS[:3]]

    def distance(images: Tensor) -> float:
        return float(images.mean())

    records = measure(model, distance, images=6, seeds=(3, 4, 5), variants=variants)
    assert [r["approximation"] for r in records] == ["none", "drop_masked", "cached_features"]
    config = SamplerConfig(steps=2, choice_temperature=variants[0].choice_temperature)
    exact = [float(generate(model, 6, config=config, seed=seed).mean()) for seed in (3, 4, 5)]
    for record in records:
        assert (record["steps"], record["images"], record["seeds"]) == (2, 6, 3)
        assert record["milliseconds_per_image"] > 0
    # nothing is kept before the third step
    for record in (records[0], records[2]):
        assert record["frechet_distance_mean"] == pytest.approx(statistics.mean(exact))
        assert record["frechet_distance_std"] == pytest.approx(statistics.stdev(exact))
    assert measure(model, distance, images=2, seeds=[0], variants=variants)[0]["frechet_distance_std"] is None
