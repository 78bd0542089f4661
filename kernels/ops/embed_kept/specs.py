"""Shapes of ``embed_kept`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import mask_plan
from mage_fast.kernels.ops.mask_plan.specs import Spec as PlanSpec
from mage_fast.kernels.roofline import (
    NORM,
    NORM_BACKWARD,
    Direction,
    Work,
    dropout_flops,
    statistic_bytes,
)


@dataclass(frozen=True)
class Spec:
    """A mask plan and the sizes of the embedding tables."""

    name: str
    plan: PlanSpec
    vocabulary: int
    features: int
    dropout: float = 0.1

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        batch, length = self.plan.batch, self.plan.length
        plan = mask_plan(**self.plan.inputs(device=device))

        def parameter(*shape: int, offset: float = 0.0) -> torch.Tensor:
            return (offset + torch.randn(*shape, generator=generator)).to(device, dtype).requires_grad_()

        return {
            "ids_BL": torch.randint(self.vocabulary, (batch, length), generator=generator).to(device),
            "class_ids_B": torch.randint(self.vocabulary, (batch,), generator=generator).to(device),
            "positions_T": plan.positions_T,
            "is_masked_BL": plan.is_masked_BL,
            "word_weight_VD": parameter(self.vocabulary, self.features),
            "position_weight_SD": parameter(length + 1, self.features),
            "norm_weight_D": parameter(self.features, offset=1.0),
            "norm_bias_D": parameter(self.features),
            "mask_token_id": self.vocabulary - 1,
            "dropout": self.dropout,
            "rng_state": rng.new_state(0, device=device),
            "stream": rng.stream(rng.Stream.EMBEDDING_DROPOUT),
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        plan = self.plan.inputs()
        rows, positions, e = plan["total_kept"], self.plan.length + 1, dtype.itemsize
        visible = self.plan.batch * positions - plan["total_masked"]  # class tokens among them
        words = min(self.vocabulary, visible + 1)  # rows of the table that are used, [M] one of them
        elements, statistics = rows * self.features, 2 * rows * statistic_bytes(dtype)
        tables = (words + positions) * self.features * e
        drops = dropout_flops(elements, self.dropout)
        if direction == "fwd":
            # reads used words, positions, norm's 2 D, index 4 T, id 8 T, mask T; writes x, id 4 T, mean, rstd
            read = tables + 2 * self.features * e + 13 * rows
            return Work(read, elements * e + 4 * rows + statistics, elements * (1 + NORM) + drops)
        # reads grad, the tables again, norm's weight, id and index 4 T each, mean, rstd; writes four grads
        read = elements * e + tables + self.features * e + 8 * rows + statistics
        written = (self.vocabulary + positions + 2) * self.features * e
        return Work(read, written, elements * (3 + NORM_BACKWARD) + drops)


def baseline(
    ids_BL: Tensor,
    class_ids_B: Tensor,
    positions_T: Tensor,
    is_masked_BL: Tensor,
    word_weight_VD: Tensor,
    position_weight_SD: Tensor,
    norm_weight_D: Tensor,
    norm_bias_D: Tensor,
    *,
    mask_token_id: int,
    dropout: float,
    rng_state: Tensor,
    stream: int,
) -> Tensor:
    """The eager chain, of the kept positions only, with torch's own dropout."""
    ids_BS = torch.cat([class_ids_B[:, None], ids_BL.masked_fill(is_masked_BL, mask_token_id)], 1)
    words_TD = F.embedding(ids_BS.flatten()[positions_T], word_weight_VD)
    x_TD = words_TD + F.embedding(positions_T % position_weight_SD.shape[0], position_weight_SD)
    return F.dropout(F.layer_norm(x_TD, norm_weight_D.shape, norm_weight_D, norm_bias_D, 1e-6), dropout)


SPECS = (
    Spec("tiny", PlanSpec("tiny", 3, 7, (4, 7), (3, 4)), 20, 16),
    Spec("tiny_no_dropout", PlanSpec("tiny", 2, 5, (0, 3), (0, 0)), 9, 8, 0.0),
    # rows of the published width, few of them: what the interpreter has time for
    Spec("small_vit_b", PlanSpec("small", 2, 8, (6, 6), (4, 4)), 12, 768),
    # [M] in 80 rows: more than one program adds
    Spec("small_many_masks", PlanSpec("small", 4, 24, (22, 22), (2, 2)), 5, 16),
    Spec("vit_b_batch4", PlanSpec("paper_batch4", 4, 256, (178, 178), (128, 128)), 2025, 768),
    Spec("vit_l_batch4", PlanSpec("paper_batch4", 4, 256, (178, 178), (128, 128)), 2025, 1024),
)
#: The tokens of a training step on one GPU, batch 128.
GPU_SPECS = (
    Spec("vit_b", PlanSpec("paper_batch128", 128, 256, (178, 178), (128, 128)), 2025, 768),
    Spec("vit_b_unmasked", PlanSpec("unmasked_batch128", 128, 256, (128, 256), (128, 256)), 2025, 768),
)
