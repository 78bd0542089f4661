"""Shapes of ``embed_kept`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_fast.kernels import rng
from mage_fast.kernels.ops.mask_plan.api import mask_plan
from mage_fast.kernels.ops.mask_plan.specs import Spec as PlanSpec


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
