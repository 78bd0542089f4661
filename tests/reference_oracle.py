"""Tiny reference models, and the model's equations computed a second time, one image and head at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mage_fast.reference import MAGE, VQGAN

SIZES = {
    **{"grid_size": 4, "codebook_size": 24, "class_slots": 6, "unconditional_class": 3},
    **{"encoder_width": 24, "encoder_depth": 2, "encoder_heads": 2},
    **{"decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2},
}


def tiny(**changes: object) -> MAGE:
    """A float64 model in eval mode whose every parameter matters."""
    torch.manual_seed(0)
    model = MAGE(**(SIZES | changes)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.3)
    return model


def tiny_vqgan() -> VQGAN:
    torch.manual_seed(1)
    sizes = {"codebook_size": 24, "codebook_dim": 5, "base_width": 8, "width_multipliers": (1, 2)}
    vqgan = VQGAN(**sizes, blocks_per_level=1, norm_groups=4)
    torch.nn.init.normal_(vqgan.quantize.embedding.weight)
    return vqgan.double()


def ids_and_masks(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(24, (batch, 16), generator=generator)
    order = torch.rand(batch, 16, generator=generator).argsort(dim=1)
    return ids, order < 5, order < 11


def oracle_block(x: Tensor, p: dict[str, Tensor], name: str, heads: int = 2) -> Tensor:
    """One position sequence (S, D), one head at a time."""
    D = x.shape[1]
    h = F.layer_norm(x, (D,), p[f"{name}.norm1.weight"], p[f"{name}.norm1.bias"], 1e-6)
    q, k, v = (h @ p[f"{name}.attn.qkv.weight"].T + p[f"{name}.attn.qkv.bias"]).split(D, dim=1)
    size = D // heads
    out = []
    for first in range(0, D, size):
        part = slice(first, first + size)
        weights = torch.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
        out.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
    x = x + torch.cat(out, 1) @ p[f"{name}.attn.proj.weight"].T + p[f"{name}.attn.proj.bias"]
    h = F.layer_norm(x, (D,), p[f"{name}.norm2.weight"], p[f"{name}.norm2.bias"], 1e-6)
    h = h @ p[f"{name}.mlp.fc1.weight"].T + p[f"{name}.mlp.fc1.bias"]
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return x + h @ p[f"{name}.mlp.fc2.weight"].T + p[f"{name}.mlp.fc2.bias"]


def oracle_logits(p: dict[str, Tensor], ids: list[int], dropped: list[bool], masked: list[bool]) -> Tensor:
    """Logits of one image, position by position."""

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    words, places = p["token_emb.word_embeddings.weight"], p["token_emb.position_embeddings.weight"]
    rows, where = [words[24 + 3] + places[0]], [0]
    for l, token in enumerate(ids):
        if not dropped[l]:
            rows.append(words[30 if masked[l] else token] + places[l + 1])
            where.append(l + 1)
    x = norm(torch.stack(rows), "token_emb.LayerNorm")
    for n in range(2):
        x = oracle_block(x, p, f"blocks.{n}")
    x = norm(x, "norm") @ p["decoder_embed.weight"].T + p["decoder_embed.bias"]
    feature = dict(zip(where, x, strict=True))
    visible = {0, *(l + 1 for l in range(16) if not masked[l])}
    y = torch.stack([feature[s] if s in visible else feature[0] for s in range(17)])
    y = y + p["decoder_pos_embed_learned"][0]
    for n in range(2):
        y = oracle_block(y, p, f"decoder_blocks.{n}")
    y = F.gelu(norm(y, "decoder_norm") @ p["mlm_layer.fc.weight"].T + p["mlm_layer.fc.bias"])
    return norm(y, "mlm_layer.ln", 1e-5) @ words.T + p["mlm_layer.bias"][0, 0]
