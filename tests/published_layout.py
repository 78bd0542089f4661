"""The published state dict, written from its description alone: name -> shape. Oracle of several tests."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]


def _affine(name: str, *weight: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _transformer(name: str, depth: int, width: int) -> Shapes:
    shapes: Shapes = {}
    for n in range(depth):
        shapes |= _affine(f"{name}.{n}.norm1", width) | _affine(f"{name}.{n}.norm2", width)
        shapes |= _affine(f"{name}.{n}.attn.qkv", 3 * width, width)
        shapes |= _affine(f"{name}.{n}.attn.proj", width, width)
        shapes |= _affine(f"{name}.{n}.mlp.fc1", 4 * width, width)
        shapes |= _affine(f"{name}.{n}.mlp.fc2", width, 4 * width)
    return shapes


def _residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = _affine(f"{name}.norm1", inputs) | _affine(f"{name}.norm2", outputs)
    shapes[f"{name}.conv1.weight"] = (outputs, inputs, 3, 3)
    shapes[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
    if inputs != outputs:
        shapes[f"{name}.nin_shortcut.weight"] = (outputs, outputs, 1, 1)
    return shapes


def vqgan_layout() -> Shapes:
    """The tokenizer's tensors, without the prefix ``vqgan.``."""
    shapes: Shapes = {"encoder.conv_in.weight": (128, 3, 3, 3), "quantize.embedding.weight": (1024, 256)}
    for level, (inputs, outputs) in enumerate([(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]):
        shapes |= _residual(f"encoder.down.{level}.block.0", inputs, outputs)
        shapes |= _residual(f"encoder.down.{level}.block.1", outputs, outputs)
    for level, (inputs, outputs) in enumerate([(128, 128), (256, 128), (256, 256), (512, 256), (512, 512)]):
        shapes |= _residual(f"decoder.up.{level}.block.0", inputs, outputs)
        shapes |= _residual(f"decoder.up.{level}.block.1", outputs, outputs)
        if level > 0:
            shapes |= _affine(f"decoder.up.{level}.upsample.conv", outputs, outputs, 3, 3)
    for part in ("encoder", "decoder"):
        shapes |= _residual(f"{part}.mid.block_1", 512, 512) | _residual(f"{part}.mid.block_2", 512, 512)
    shapes |= _affine("encoder.norm_out", 512) | _affine("encoder.conv_out", 256, 512, 1, 1)
    shapes |= _affine("decoder.conv_in", 512, 256, 3, 3)
    shapes |= _affine("decoder.norm_out", 128) | _affine("decoder.conv_out", 3, 128, 3, 3)
    return shapes


def unused_layout(width: int = 768, decoder: int = 768) -> Shapes:
    """In every published file, read by nothing."""
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 257, width),
        **_affine("patch_embed.proj", width, 3, 16, 16),
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, 257, decoder),
        "decoder_pred.weight": (768, decoder),
        "decoder_pred.bias": (768,),
        "token_emb.position_ids": (1, 257),
    }


def mage_layout(width: int = 768, depth: int = 12, decoder: int = 768, decoder_depth: int = 8) -> Shapes:
    """Every tensor of a published checkpoint; the defaults are ViT-B."""
    return {
        **unused_layout(width, decoder),
        "token_emb.word_embeddings.weight": (2025, width),
        "token_emb.position_embeddings.weight": (257, width),
        **_affine("token_emb.LayerNorm", width),
        **_transformer("blocks", depth, width),
        **_affine("norm", width),
        **_affine("decoder_embed", decoder, width),
        "decoder_pos_embed_learned": (1, 257, decoder),
        **_transformer("decoder_blocks", decoder_depth, decoder),
        **_affine("decoder_norm", decoder),
        **_affine("mlm_layer.fc", width, decoder),
        **_affine("mlm_layer.ln", width),
        "mlm_layer.bias": (1, 1, 2025),
        **{f"vqgan.{name}": shape for name, shape in vqgan_layout().items()},
    }
