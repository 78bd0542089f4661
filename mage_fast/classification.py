"""A classifier on a MAGE encoder, whose weights are trained along with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Self, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mage_fast import storage
from mage_fast.blocks import Block
from mage_fast.config import ClassifierConfig
from mage_fast.embedding import NORM_EPS
from mage_fast.errors import CheckpointError
from mage_fast.hub import HubMixin, local_path
from mage_fast.kernels import rng
from mage_fast.linear import Linear
from mage_fast.model import MAGE
from mage_fast.tokenizer import Tokenizer

#: Standard deviation of the head's weights: the first predictions are next to uniform, and so the first
#: gradients of a trained encoder next to nothing, until the head has learnt.
HEAD_STD = 2e-5


class MAGEClassifier(HubMixin, nn.Module):
    """Logits of classes from a MAGE encoder that sees all tokens.

    >>> classifier = MAGEClassifier(MAGE.from_pretrained("out/pretrain"), num_classes=1000, drop_path=0.1)
    >>> logits = classifier(images)                     # [B, 1000] of images [B, 3, 256, 256] in [0, 1]

    The mean of the last block's outputs at the tokens (the class position left out, the encoder's final norm
    unused), a LayerNorm, and a linear layer. The tokenizer is frozen; embedding and blocks are trained.

    Equivalent PyTorch: ``head(fc_norm(mage.features(images)))``.

    Args:
        mage: its embedding and encoder are copied, its tokenizer is shared, its decoder is left out.
        num_classes: two or more.
        drop_path: probability that training leaves out a branch of the last block, in [0, 1); those of the
            blocks before rise to it linearly from 0.

    Raises:
        ValueError: numbers out of range.

    Source: MAGE section 4.3, "Fine-tuning".
    """

    def __init__(self, mage: MAGE, num_classes: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = ClassifierConfig(mage.config, num_classes, drop_path)
        self.mage = _without_decoder(mage)
        blocks = self.mage.encoder.blocks
        for number, block in enumerate(cast(Iterable[Block], blocks)):
            block.drop_path = drop_path * number / max(len(blocks) - 1, 1)
        self.fc_norm = nn.LayerNorm(mage.config.encoder_width, eps=NORM_EPS)
        self.head = Linear(mage.config.encoder_width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        for module in (self.fc_norm, self.head):
            module.to(mage.embedding.position_embeddings.weight)

    @property
    def layers(self) -> list[nn.Module]:
        """What is trained, from the input to the output: embedding, each block, norm and head."""
        return [self.mage.embedding, *self.mage.encoder.blocks, nn.ModuleList([self.fc_norm, self.head])]

    def forward(
        self, images_or_ids: Tensor, *, rng_state: Int64[Tensor, "2"] | None = None
    ) -> Float[Tensor, "B K"]:
        """Logits of each class.

        Args:
            images_or_ids: images ``[B, 3, H, W]`` in [0, 1], or ids ``[B, L]``; images alone where
                ``encoder_input="features"``.
            rng_state: int64 ``(seed, step)`` of dropout and drop path in training mode; drawn by default.

        Raises:
            ValueError: images or ids of a wrong shape, ids outside the codebook.
        """
        if rng_state is None and self.training:
            rng_state = rng.new_state()
        return self.head(self.fc_norm(self.mage.features(images_or_ids, rng_state=rng_state)))

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, tokenizer: Tokenizer | None = None, *, revision: str | None = None
    ) -> Self:
        """A classifier, in eval mode, from a folder of :meth:`save_pretrained`.

        Args:
            folder: where it is, or ``"owner/name"`` of a model hub (the extra ``hub``).
            tokenizer: yours, for a model with one of its own kind.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: missing, truncated, or no classifier; not to be had from the hub.
            ValueError: ``config.json`` has an unknown key or a value out of range.
        """
        folder = local_path(folder, revision)
        values, state = storage.load_pretrained(folder)
        if "mage" not in values:
            raise CheckpointError(f"{folder} holds no classifier, wanted a folder of mage-fast finetune")
        config = ClassifierConfig.from_dict(values)
        with torch.device("meta"):  # the checkpoint's tensors become the parameters
            mage = MAGE(config.mage, tokenizer)
            classifier = cls(mage, config.num_classes, drop_path=config.drop_path)
        storage.load_state(classifier, state, folder, assign=True)
        return classifier.eval()


def _without_decoder(mage: MAGE) -> MAGE:
    """A model of copied embedding and encoder: it gives features, and has nothing that predicts tokens."""
    shared = (mage.tokenizer, mage.decoder, mage.head)
    encoder = copy.deepcopy(mage, {id(module): module for module in shared})
    del encoder.decoder, encoder.head
    for module in (encoder.embedding, encoder.encoder.blocks):  # those of the given model may be frozen
        module.requires_grad_(True)
    encoder.encoder.norm.requires_grad_(False)  # features are read before it
    return encoder
