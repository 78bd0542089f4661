"""Shapes of ``pad_decoder`` in the published models, shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mage_fast.kernels.roofline import Direction, Work


@dataclass(frozen=True)
class Spec:
    """``batch`` images of ``length`` tokens: ``kept`` of them encoded, ``visible`` of those not masked."""

    name: str
    batch: int
    length: int
    kept: int
    visible: int
    features: int
    mask_token: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(0)
        encoded = torch.randn(self.batch * (1 + self.kept), self.features, generator=generator)
        position = 0.02 * torch.randn(1 + self.length, self.features, generator=generator)
        mask_token = 0.02 * torch.randn(self.features, generator=generator)
        source = torch.full((self.batch, 1 + self.length), -1, dtype=torch.int32)
        for image, first in enumerate(range(0, encoded.shape[0], 1 + self.kept)):
            source[image, 0] = first
            kept = torch.randperm(self.length, generator=generator)[: self.kept].sort().values
            visible = torch.randperm(self.kept, generator=generator)[: self.visible]
            source[image, 1 + kept[visible]] = (first + 1 + visible).int()
        cu_seqlens = torch.arange(self.batch + 1, dtype=torch.int32) * (1 + self.kept)
        return {
            "encoded_TD": encoded.to(device, dtype).requires_grad_(),
            "source_BS": source.to(device),
            "cu_seqlens": cu_seqlens.to(device),
            "position_weight_SD": position.to(device, dtype).requires_grad_(),
            "mask_token_D": mask_token.to(device, dtype).requires_grad_() if self.mask_token else None,
        }

    def work(self, dtype: torch.dtype, direction: Direction) -> Work:
        e, positions = dtype.itemsize, self.length + 1
        indices = 4 * (self.batch * positions + self.batch + 1)
        elements = self.batch * positions * self.features
        shared = (positions + self.mask_token) * self.features
        if direction == "fwd":
            # the class rows and the visible ones, source, ends, positions, the mask token -> full sequences
            rows = self.batch * (1 + self.visible) * self.features
            return Work((rows + shared) * e + indices, elements * e, elements)
        # grad, source, ends -> the grads of every encoded row, of positions and of the mask token
        rows = self.batch * (1 + self.kept) * self.features
        return Work(elements * e + indices, (rows + shared) * e, 2 * elements)


def baseline(
    encoded_TD: Tensor,
    source_BS: Tensor,
    cu_seqlens: Tensor,
    position_weight_SD: Tensor,
    *,
    mask_token_D: Tensor | None,
) -> Tensor:
    """The eager chain."""
    padding_BD = encoded_TD[cu_seqlens[:-1]]
    if mask_token_D is not None:
        padding_BD = mask_token_D.expand_as(padding_BD)
    is_padded_BS1 = source_BS[..., None] < 0
    rows_BSD = torch.where(is_padded_BS1, padding_BD[:, None], encoded_TD[source_BS.clamp(min=0)])
    return rows_BSD + position_weight_SD


SPECS = (
    Spec("tiny", 3, 6, 4, 2, 8),
    Spec("tiny_mask_token", 2, 5, 3, 2, 7, mask_token=True),
    # rows of the published width, few of them: what the interpreter has time for
    Spec("small_vit_b", 3, 16, 8, 5, 768),
    Spec("small_vit_b_mask_token", 2, 16, 8, 5, 768, mask_token=True),
    # mask ratio 0.694 on average: 78 of 256 tokens visible, 128 encoded
    Spec("vit_b_batch4", 4, 256, 128, 78, 768),
    Spec("vit_b_unmasked_batch4", 4, 256, 78, 78, 768),
    Spec("vit_l_batch4", 4, 256, 128, 78, 1024),
)
#: The decoder's input of a training step on one GPU, batch 128.
GPU_SPECS = (
    Spec("vit_b", 128, 256, 128, 78, 768),
    Spec("vit_b_unmasked", 128, 256, 78, 78, 768),
    Spec("vit_b_mask_token", 128, 256, 128, 78, 768, mask_token=True),
)
