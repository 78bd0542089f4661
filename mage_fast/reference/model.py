"""MAGE in plain PyTorch: what the published release computes, operation by operation.

Nothing here is fused or skipped, on purpose: this is the oracle of the tests and the baseline of the
speed figures. Parameter names are the published ones, the never-used ones included.

Shape suffixes: B images, L tokens an image, S = L + 1 positions (0 is the class token), K positions the
encoder sees, D features, H heads, V vocabulary ids, C codes.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from .layers import Block, MlmLayer, PatchEmbedding, TokenEmbedding
from .vqgan import VQGAN


class MAGEOutput(NamedTuple):
    """What :meth:`MAGE.forward` returns."""

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "B S V"]
    mask: Bool[Tensor, "B L"]


class MAGE(nn.Module):
    """Masked generative encoder (MAGE paper, section 3); the defaults are ViT-B as published."""

    def __init__(
        self,
        *,
        grid_size: int = 16,
        codebook_size: int = 1024,
        class_slots: int = 1000,
        unconditional_class: int = 76,
        encoder_width: int = 768,
        encoder_depth: int = 12,
        encoder_heads: int = 12,
        decoder_width: int = 768,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
        mask_ratio_mode: float = 0.55,
        mask_ratio_std: float = 0.25,
        mask_ratio_min: float = 0.5,
        mask_ratio_max: float = 1.0,
        drop_ratio: float = 0.5,
        padding: str = "class_token",
        vqgan: VQGAN | None = None,
    ) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.mask_token_id = codebook_size + class_slots
        self.unconditional_class_id = codebook_size + unconditional_class
        self.num_tokens = grid_size**2
        self.label_smoothing = label_smoothing
        self.mask_ratio_law = (mask_ratio_mode, mask_ratio_std, mask_ratio_min, mask_ratio_max)
        self.drop_ratio = drop_ratio
        self.padding = padding
        vocabulary, positions = codebook_size + class_slots + 1, grid_size**2 + 1

        self.token_emb = TokenEmbedding(vocabulary, positions, encoder_width, dropout)
        self.blocks = nn.ModuleList(
            Block(encoder_width, encoder_heads, mlp_ratio, dropout) for _ in range(encoder_depth)
        )
        self.norm = nn.LayerNorm(encoder_width, eps=1e-6)
        self.decoder_embed = nn.Linear(encoder_width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, decoder_width))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_width, decoder_heads, mlp_ratio, dropout) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.mlm_layer = MlmLayer(decoder_width, encoder_width, vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.decoder_pos_embed_learned, std=0.02)

        # in every published file, used by nothing
        self.cls_token = nn.Parameter(torch.zeros(1, 1, encoder_width), requires_grad=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, encoder_width), requires_grad=False)
        self.patch_embed = PatchEmbedding(encoder_width, 16).requires_grad_(False)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, positions, decoder_width), requires_grad=False)
        self.decoder_pred = nn.Linear(decoder_width, 3 * 16 * 16).requires_grad_(False)
        self.mask_token.requires_grad_(padding == "mask_token")
        if vqgan is not None:
            self.vqgan = vqgan.requires_grad_(False)

    @classmethod
    def from_config(cls, config: Any) -> MAGE:
        """Sizes from any object with the attributes of a ``MAGEConfig``."""
        names = [name for name in cls.__init__.__annotations__ if name not in ("vqgan", "return")]
        sizes = {name: getattr(config, name) for name in names}
        return cls(**sizes, vqgan=VQGAN.from_config(config.tokenizer) if config.tokenizer else None)

    @torch.no_grad()
    def tokenize(self, images: Tensor) -> Int64[Tensor, "B L"]:
        """Ids of images in [0, 1]; ids pass through."""
        return self.vqgan.encode(images)[1] if images.is_floating_point() else images

    def draw_masks(self, batch: int, device: torch.device) -> tuple[Bool[Tensor, "B L"], Bool[Tensor, "B L"]]:
        """``(drop_mask, mask)``: the dropped tokens are the first of the masked ones in one random order.

        One mask ratio a batch, from the truncated normal law (paper, section 3.1).
        """
        mode, std, low, high = self.mask_ratio_law
        ratio = mode
        if std > 0:
            law = NormalDist(mode, std)
            lowest, highest = law.cdf(low), law.cdf(high)
            uniform = lowest + (highest - lowest) * float(torch.rand((), dtype=torch.float64))
            # the bounds may lie so far out in a tail that the law has no mass between them in float64
            ratio = min(max(law.inv_cdf(min(max(uniform, 1e-300), 1 - 2**-53)), low), high)
        num_masked = math.ceil(self.num_tokens * ratio)
        num_dropped = math.ceil(self.num_tokens * self.drop_ratio)
        while True:
            noise_BL = torch.rand(batch, self.num_tokens, device=device)
            sorted_BL = noise_BL.sort(dim=1).values
            mask_BL = noise_BL <= sorted_BL[:, num_masked - 1 : num_masked]
            drop_mask_BL = torch.zeros_like(mask_BL)
            if num_dropped > 0:
                drop_mask_BL = noise_BL <= sorted_BL[:, num_dropped - 1 : num_dropped]
            # equal noise at a cut-off lets one token too many through: draw again
            if mask_BL.sum() == batch * num_masked and drop_mask_BL.sum() == batch * num_dropped:
                return drop_mask_BL, mask_BL

    def embed(self, ids_BL: Tensor, class_ids_B: Tensor | None) -> Tensor:
        """Embeddings of all S positions, the class token first."""
        class_ids_B1 = torch.full_like(ids_BL[:, :1], self.unconditional_class_id)
        if class_ids_B is not None:
            class_ids_B1[:, 0] = class_ids_B
        return self.token_emb(torch.cat([class_ids_B1, ids_BL], dim=1))

    def forward_encoder(
        self,
        ids_BL: Int64[Tensor, "B L"],
        drop_mask_BL: Bool[Tensor, "B L"],
        mask_BL: Bool[Tensor, "B L"],
        class_ids_B: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """Normalised features of the class token and of every token not dropped, masked ones as [M]."""
        ids_BL = ids_BL.clone()
        ids_BL[mask_BL.nonzero(as_tuple=True)] = self.mask_token_id
        x_BSD = self.embed(ids_BL, class_ids_B)
        keep_BS = F.pad(~drop_mask_BL, (1, 0), value=True)
        x_BKD = x_BSD[keep_BS.nonzero(as_tuple=True)].reshape(len(ids_BL), -1, x_BSD.shape[-1])
        for block in self.blocks:
            x_BKD = block(x_BKD)
        return self.norm(x_BKD)

    def forward_decoder(
        self, x_BKD: Float[Tensor, "B K D"], drop_mask_BL: Bool[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B S V"]:
        """Logits over the whole vocabulary at every position."""
        x_BKD = self.decoder_embed(x_BKD)
        keep_BS = F.pad(~drop_mask_BL, (1, 0), value=True)
        mask_BS = F.pad(mask_BL, (1, 0), value=False)
        pad_B1D = x_BKD[:, :1] if self.padding == "class_token" else self.mask_token.to(x_BKD.dtype)
        pad_BSD = pad_B1D.repeat(len(x_BKD) // len(pad_B1D), keep_BS.shape[1], 1)
        x_BSD = pad_BSD.clone()
        x_BSD[keep_BS.nonzero(as_tuple=True)] = x_BKD.reshape(-1, x_BKD.shape[-1])
        x_BSD = torch.where(mask_BS[..., None], pad_BSD, x_BSD) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x_BSD = block(x_BSD)
        return self.mlm_layer(self.decoder_norm(x_BSD), self.token_emb.word_embeddings.weight)

    def forward_loss(self, ids_BL: Tensor, logits_BSV: Tensor, mask_BL: Tensor) -> Float[Tensor, ""]:
        """Label-smoothed cross-entropy over the codes, averaged over the masked tokens."""
        log_p_BLC = logits_BSV[:, 1:, : self.codebook_size].log_softmax(dim=-1)
        nll_BL = -log_p_BLC.gather(-1, ids_BL[..., None])[..., 0]
        loss_BL = (1 - self.label_smoothing) * nll_BL - self.label_smoothing * log_p_BLC.mean(dim=-1)
        return (loss_BL * mask_BL).sum() / mask_BL.sum()

    def forward(
        self,
        images: Float[Tensor, "B 3 height width"] | Int64[Tensor, "B L"],
        *,
        drop_mask: Bool[Tensor, "B L"] | None = None,
        mask: Bool[Tensor, "B L"] | None = None,
        class_ids: Int64[Tensor, " B"] | None = None,
    ) -> MAGEOutput:
        """One training step's forward pass.

        Args:
            images: RGB in [0, 1], tokenized here without gradient, or ids.
            drop_mask: tokens the encoder does not see, equally many in every image; masked ones only.
            mask: tokens to predict. Given, it replaces the drawn masks (then no ``drop_mask`` drops nothing).
            class_ids: vocabulary id of the class token; the unconditional one by default.

        Raises:
            ValueError: ``drop_mask`` without ``mask``.
        """
        ids_BL = self.tokenize(images)
        if mask is None:
            if drop_mask is not None:
                raise ValueError("MAGE: drop_mask is given without mask, wanted both")
            drop_mask, mask = self.draw_masks(len(ids_BL), ids_BL.device)
        elif drop_mask is None:
            drop_mask = torch.zeros_like(mask)
        x_BKD = self.forward_encoder(ids_BL, drop_mask, mask, class_ids)
        logits_BSV = self.forward_decoder(x_BKD, drop_mask, mask)
        return MAGEOutput(self.forward_loss(ids_BL, logits_BSV, mask), logits_BSV, mask)

    def features(self, images: Tensor, class_ids: Tensor | None = None) -> Float[Tensor, "B D"]:
        """Mean over the tokens, nothing masked, of the last block's output, before ``norm`` (section 4.2)."""
        x_BSD = self.embed(self.tokenize(images), class_ids)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return x_BSD[:, 1:].mean(dim=1)
