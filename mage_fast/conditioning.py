"""Class conditioning: labels that training leaves out, so that one model samples with a class and without."""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

from mage_fast.config import MAGEConfig
from mage_fast.kernels import rng


def drop_labels(
    class_ids_B: Int64[Tensor, "B"], config: MAGEConfig, rng_state: Int64[Tensor, "2"]
) -> Int64[Tensor, "B"]:
    """Replace each class id by the unconditional one with probability ``config.label_dropout``.

    Equivalent PyTorch: ``torch.where(torch.rand(B) < label_dropout, unconditional_class_id, class_ids)``, the
    random number of a sample being that of its index, whatever the batch.

    Args:
        class_ids_B: ids of the first position.
        config: the model's configuration.
        rng_state: int64 ``(seed, step)`` on the device of the ids.

    Source: Ho and Salimans, "Classifier-free diffusion guidance", 2022, algorithm 1.
    """
    if config.label_dropout == 0.0:
        return class_ids_B
    words_B = rng.words(rng_state, rng.stream(rng.Stream.LABEL_DROPOUT), len(class_ids_B), 1)[:, 0]
    # of 32 bits: probability 1 drops every word
    is_dropped_B = words_B < round(config.label_dropout * 2**32)
    return torch.where(is_dropped_B, config.unconditional_class_id, class_ids_B)
