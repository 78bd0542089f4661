"""Checkpoints: the published layout to ours and back, and the file primitives of :mod:`mage_fast.storage`.

Published and our tensors have equal shapes; only the names differ, and the published files hold some
tensors that nothing uses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mage_fast.config import MAGEConfig, TokenizerConfig
from mage_fast.model import MAGE
from mage_fast.storage import (
    CheckpointError,
    check_state,
    load_pretrained,
    load_state,
    read_safetensors,
    read_torch,
    save_pretrained,
    save_safetensors,
    save_torch,
)

__all__ = [
    "CheckpointError",
    "check_state",
    "from_published",
    "infer_config",
    "load_pretrained",
    "load_published",
    "load_state",
    "our_shapes",
    "published_name",
    "read_safetensors",
    "read_torch",
    "save_pretrained",
    "save_published",
    "save_safetensors",
    "save_torch",
    "to_published",
]

#: Published name prefix -> ours. First match wins; what follows the prefix is kept.
_RENAMED = (
    ("token_emb.word_embeddings.", "embedding.word_embeddings."),
    ("token_emb.position_embeddings.", "embedding.position_embeddings."),
    ("token_emb.LayerNorm.", "embedding.norm."),
    ("decoder_blocks.", "decoder.blocks."),
    ("blocks.", "encoder.blocks."),
    ("norm.", "encoder.norm."),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_pos_embed_learned", "decoder.position_embeddings"),
    ("decoder_norm.", "decoder.norm."),
    ("mlm_layer.fc.", "head.fc."),
    ("mlm_layer.ln.", "head.norm."),
    ("mlm_layer.bias", "head.bias"),
    ("vqgan.", "tokenizer."),
)
#: (encoder width, decoder width) -> (encoder heads, decoder heads): shapes do not tell the heads.
_PUBLISHED_HEADS = {(768, 768): (12, 16), (1024, 1024): (16, 16)}
_PUBLISHED_NORM_GROUPS = 32
_PATCH = 16


def our_shapes(config: MAGEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a :class:`mage_fast.MAGE` of this configuration."""
    with torch.device("meta"):
        return {name: tuple(x.shape) for name, x in MAGE(config).state_dict().items()}


def _unused(config: MAGEConfig) -> dict[str, Tensor]:
    """What a published file holds and no model reads; the mask token is read in one variant."""
    encoder, decoder, positions = config.encoder_width, config.decoder_width, config.num_tokens + 1
    unused = {
        "cls_token": torch.zeros(1, 1, encoder),
        "pos_embed": torch.zeros(1, positions, encoder),
        "patch_embed.proj.weight": torch.zeros(encoder, 3, _PATCH, _PATCH),
        "patch_embed.proj.bias": torch.zeros(encoder),
        "mask_token": torch.zeros(1, 1, decoder),
        "decoder_pos_embed": torch.zeros(1, positions, decoder),
        "decoder_pred.weight": torch.zeros(3 * _PATCH * _PATCH, decoder),
        "decoder_pred.bias": torch.zeros(3 * _PATCH * _PATCH),
        "token_emb.position_ids": torch.arange(positions)[None],
    }
    if config.padding == "mask_token":
        del unused["mask_token"]
    return unused


def published_name(ours: str) -> str:
    """The published name of a tensor of :class:`mage_fast.MAGE`.

    Raises:
        CheckpointError: a tensor that the published layout has no place for.
    """
    if ours == "decoder.mask_token":
        return "mask_token"
    for published, prefix in _RENAMED:
        if ours.startswith(prefix):
            name = published + ours.removeprefix(prefix)
            return name if published == "vqgan." else name.replace(".attention.", ".attn.")
    raise CheckpointError(f"{ours}: the published layout has no such tensor")


def from_published(
    state: Mapping[str, Tensor],
    config: MAGEConfig | None = None,
    *,
    source: str | Path = "published state dict",
) -> tuple[dict[str, Tensor], MAGEConfig]:
    """A published state dict under our names, and the configuration it belongs to.

    The tensors are not copied. Those that nothing uses may be absent and are left out.

    Args:
        state: tensors by published name.
        config: the configuration; by default inferred from the shapes, which works for the published
            widths only (shapes do not tell the number of heads).
        source: names the checkpoint in messages.

    Raises:
        CheckpointError: missing or unexpected names, a shape that is not the configuration's, or sizes
            that cannot be inferred.
    """
    if config is None:
        config = infer_config(state, source=source)
    wanted = our_shapes(config)
    names = {published_name(name): name for name in wanted}
    unused = _unused(config).keys()
    check_state(
        {name: x for name, x in state.items() if name not in unused},
        {published: wanted[ours] for published, ours in names.items()},
        source,
    )
    return {ours: state[published] for published, ours in names.items()}, config


def to_published(state: Mapping[str, Tensor], config: MAGEConfig) -> dict[str, Tensor]:
    """Our state dict under the published names, with zeros for the tensors that nothing uses.

    Raises:
        CheckpointError: names or shapes that are not the configuration's.
    """
    check_state(state, our_shapes(config), "state dict")
    return {**_unused(config), **{published_name(name): x for name, x in state.items()}}


def load_published(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a published checkpoint: a ``.pth`` dict with the key ``model``, or safetensors.

    Raises:
        CheckpointError: no such file, a truncated or corrupt one, one that holds pickled objects other
            than ``argparse.Namespace``, or one without a state dict.
    """
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)
    contents = read_torch(path)
    state = contents.get("model") if isinstance(contents, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(f"{path}: wanted a dict whose key 'model' is a state dict")
    return state


def save_published(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write a published state dict as :func:`load_published` reads it; the suffix chooses the format.

    Raises:
        CheckpointError: the folder does not exist or cannot be written.
    """
    if Path(path).suffix == ".safetensors":
        save_safetensors(path, state, {"format": "pt"})
    else:
        save_torch(path, {"model": dict(state)})


def infer_config(
    state: Mapping[str, Tensor],
    *,
    source: str | Path = "published state dict",
    norm_groups: int = _PUBLISHED_NORM_GROUPS,
    **changes: Any,
) -> MAGEConfig:
    """The configuration of a published state dict; ``changes`` override fields.

    Shapes do not tell the number of heads, nor the groups of the tokenizer's GroupNorm: give
    ``encoder_heads`` and ``decoder_heads`` for other widths than the published ones.

    Raises:
        CheckpointError: a tensor is missing, the widths are not published ones and no heads are given, or
            the sizes make no model.
    """
    shapes = {name: tuple(x.shape) for name, x in state.items()}

    def size(name: str, dimension: int) -> int:
        if len(shapes.get(name, ())) <= dimension:
            raise CheckpointError(f"{source}: missing tensors: {name}")
        return int(shapes[name][dimension])

    widths = (size("decoder_embed.weight", 1), size("decoder_embed.weight", 0))
    if not changes.keys() >= {"encoder_heads", "decoder_heads"} and widths not in _PUBLISHED_HEADS:
        raise CheckpointError(
            f"{source}: encoder and decoder widths are {widths}, wanted one of {sorted(_PUBLISHED_HEADS)}, "
            "or a config: shapes do not tell the number of heads"
        )
    grid = math.isqrt(size("token_emb.position_embeddings.weight", 0) - 1)
    tokenizer = changes.get("tokenizer", ...)
    if tokenizer is ...:
        tokenizer = _infer_tokenizer(shapes, size, grid, norm_groups, source)
    codebook = tokenizer.codebook_size if tokenizer else MAGEConfig.codebook_size
    codebook = changes.get("codebook_size", codebook)
    fields: dict[str, Any] = {
        "grid_size": grid,
        "codebook_size": codebook,
        "class_slots": size("token_emb.word_embeddings.weight", 0) - 1 - codebook,
        **{"encoder_width": widths[0], "encoder_depth": _count(shapes, r"blocks\.(\d+)\.")},
        **{"decoder_width": widths[1], "decoder_depth": _count(shapes, r"decoder_blocks\.(\d+)\.")},
        **dict(zip(("encoder_heads", "decoder_heads"), _PUBLISHED_HEADS.get(widths, (1, 1)), strict=True)),
        "mlp_ratio": size("blocks.0.mlp.fc1.weight", 0) / widths[0],
        "tokenizer": tokenizer,
    }
    return _made(source, MAGEConfig, fields | changes)


def _infer_tokenizer(
    shapes: Mapping[str, tuple], size: Any, grid: int, norm_groups: int, source: str | Path
) -> TokenizerConfig | None:
    if not any(name.startswith("vqgan.") for name in shapes):
        return None
    base = size("vqgan.encoder.conv_in.weight", 0)
    levels = _count(shapes, r"vqgan\.encoder\.down\.(\d+)\.")
    widths = [size(f"vqgan.encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    fields = {
        "image_size": grid * 2 ** max(levels - 1, 0),
        "codebook_size": size("vqgan.quantize.embedding.weight", 0),
        "codebook_dim": size("vqgan.quantize.embedding.weight", 1),
        "base_width": base,
        "width_multipliers": tuple(width // base for width in widths),
        "blocks_per_level": _count(shapes, r"vqgan\.encoder\.down\.0\.block\.(\d+)\."),
        "norm_groups": norm_groups,
    }
    return _made(source, TokenizerConfig, fields)


def _count(shapes: Mapping[str, tuple], pattern: str) -> int:
    """One more than the highest index that the pattern finds: a gap shows as missing tensors later."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


def _made(source: str | Path, kind: type, fields: dict[str, Any]) -> Any:
    try:
        return kind(**fields)
    except ValueError as error:
        raise CheckpointError(f"{source}: its shapes make no model: {error}") from error
