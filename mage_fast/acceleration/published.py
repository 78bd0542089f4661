"""The whole model, where a module has the published MAGE layout: its training step, features and decoding.

Shape suffixes: B images, L tokens an image, N masked tokens, C codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from mage_fast import checkpoint
from mage_fast.acceleration.replacement import Replacement, active_dropout
from mage_fast.acceleration.transformer import FastBlock, dropout_of, follow_block, output_dropout
from mage_fast.config import MAGEConfig
from mage_fast.errors import CheckpointError
from mage_fast.kernels import check, rng
from mage_fast.kernels.ops.mask_plan.api import MaskPlan, plan_of_mask
from mage_fast.loss import reconstruction_loss
from mage_fast.masking import draw_mask_ratios, draw_plan
from mage_fast.model import MAGE
from mage_fast.tokenizer import Tokenizer

#: A module with these is meant to be MAGE.
_MARKS = ("token_emb.word_embeddings.weight", "decoder_pos_embed_learned", "mlm_layer.bias")
#: What no shape tells; read from attributes of these names, else as published.
_UNSEEN = (
    *("label_smoothing", "mask_ratio_mode", "mask_ratio_std", "mask_ratio_min", "mask_ratio_max"),
    *("drop_ratio", "unconditional_class", "padding"),
)


class AcceleratedOutput(NamedTuple):
    """What the accelerated forward of a MAGE returns."""

    #: Mean over the masked tokens, to be minimised.
    loss: Float[Tensor, ""]
    #: Scores of the codebook's ids at the masked tokens, in the order of ``ids[mask]``.
    logits: Float[Tensor, "N C"]
    mask: Bool[Tensor, "B L"]


def has_published_layout(module: nn.Module) -> bool:
    """Whether the module is meant to be MAGE, by its parameters' names."""
    names = {name for name, _ in module.named_parameters()}
    return names.issuperset(_MARKS)


def read_config(
    model: Any, heads: tuple[int, int], tokenizer: Tokenizer | None, changes: dict[str, Any]
) -> tuple[MAGEConfig, dict[str, str]]:
    """The model's configuration, and where each value that no shape tells was found.

    Raises:
        CheckpointError: tensors that are missing or not known, or shapes that make no model.
        ValueError: a changed field that does not exist or is out of range.
    """
    fields = {field.name for field in dataclasses.fields(MAGEConfig)}
    if unknown := sorted(changes.keys() - fields):
        raise ValueError(f"accelerate: got {unknown}, wanted fields of MAGEConfig: {sorted(fields)}")
    found: dict[str, Any] = {"encoder_heads": heads[0], "decoder_heads": heads[1]}
    sources: dict[str, str] = {}
    for name in _UNSEEN:
        if isinstance(value := getattr(model, name, None), int | float | str):
            found[name], sources[name] = value, "attribute"
    law = getattr(model, "mask_ratio_law", None)
    if isinstance(law, tuple) and len(law) == 4:
        ratios = ("mask_ratio_mode", "mask_ratio_std", "mask_ratio_min", "mask_ratio_max")
        found |= dict(zip(ratios, law, strict=True))
        sources |= dict.fromkeys(ratios, "attribute mask_ratio_law")
    dropouts = [part.p for part in model.modules() if isinstance(part, nn.Dropout)]
    found["dropout"], sources["dropout"] = max(dropouts, default=0.0), "largest of nn.Dropout"
    state = dict(model.named_parameters(remove_duplicate=False))
    if tokenizer is not None:
        found |= {"tokenizer": None, "codebook_size": tokenizer.codebook_size}
        sources["codebook_size"] = "the tokenizer's"
        state = {name: x for name, x in state.items() if not name.startswith("vqgan.")}
    elif isinstance(size := getattr(model, "codebook_size", None), int):
        found["codebook_size"], sources["codebook_size"] = size, "attribute"
    first = getattr(model, "unconditional_class_id", None)
    if isinstance(first, int):
        codebook = (found | changes).get("codebook_size", MAGEConfig.codebook_size)
        found["unconditional_class"] = first - codebook
        sources["unconditional_class"] = "attribute unconditional_class_id"
    norm = next((part for part in model.modules() if isinstance(part, nn.GroupNorm)), None)
    groups = {} if norm is None else {"norm_groups": norm.num_groups}
    config = checkpoint.infer_config(state, source=type(model).__name__, **groups, **(found | changes))
    checkpoint.from_published(state, config, source=type(model).__name__)
    sources |= dict.fromkeys(changes, "given")
    told = sorted({"codebook_size", *_UNSEEN, *sources} - {"tokenizer"})
    return config, {name: f"{getattr(config, name)} ({sources.get(name, 'as published')})" for name in told}


class FastMAGE(Replacement):
    """The training step of :class:`mage_fast.MAGE` with the parameters of a module of the same layout."""

    what = "training step"

    def __init__(self, module: Any, config: MAGEConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(module)
        with torch.device("meta"):
            self.ours = MAGE(config, tokenizer)
        if tokenizer is not None:
            self.ours.tokenizer = None
        for name, _ in self.ours.named_parameters():
            (ours, _, our_name), (theirs, _, their_name) = (
                full.rpartition(".") for full in (name, checkpoint.published_name(name))
            )
            part, owner = self.ours.get_submodule(ours), module.get_submodule(theirs)
            self.tensors.append((part, our_name, owner, their_name))
            if isinstance(part, nn.LayerNorm):
                part.eps = owner.eps
        self.ours.tokenizer = self.ours.tokenizer if tokenizer is None else tokenizer
        self.blocks: list[tuple[Any, Any]] = [
            *zip(self.ours.encoder.blocks, module.blocks, strict=True),
            *zip(self.ours.decoder.blocks, module.decoder_blocks, strict=True),
        ]

    def changed(self) -> str | None:
        """As for any replacement; a block's two output dropouts are one number in ours."""
        for number, (_, block) in enumerate(self.blocks):
            after_attention = active_dropout(dropout_of(block.attn, "proj_drop"))
            after_mlp = active_dropout(output_dropout(block.mlp))
            if after_attention != after_mlp:
                return (
                    f"block {number} drops {after_attention} after attention and {after_mlp} after the MLP, "
                    "wanted equal ones"
                )
        return super().changed()

    def bind(self) -> bool:
        """Take over the user's tensors and dropouts as they are now; whether anything drops."""
        self.take_tensors()
        if not self.ours.training:
            self.ours.train()  # the user's dropouts have their own modes
        embedding = self.ours.embedding
        embedding.dropout = active_dropout(dropout_of(self.module.token_emb, "dropout", "drop"))
        probabilities = [embedding.dropout]
        for block, theirs in self.blocks:
            probabilities += follow_block(block, theirs)
        return any(probabilities)

    def mage(self) -> MAGE:
        """Our model with the user's parameters and dropouts as they are now.

        Raises:
            ValueError: a module of the user's model was replaced or carries hooks.
        """
        if reason := self.changed():
            name = type(self.module).__name__
            raise ValueError(f"accelerate: {name} is no longer as it was accelerated: {reason}")
        self.bind()
        return self.ours

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.must_fall_back():
            return self.plain(*args, **kwargs)
        return self.step(*args, **kwargs)

    def step(
        self,
        images: Tensor,
        *,
        drop_mask: Bool[Tensor, "B L"] | None = None,
        mask: Bool[Tensor, "B L"] | None = None,
        class_ids: Int64[Tensor, " B"] | None = None,
    ) -> AcceleratedOutput:
        """One training step's forward pass, as :meth:`mage_fast.MAGE.forward`.

        Args:
            images: images ``[B, 3, H, W]`` in [0, 1], or ids ``[B, L]``.
            drop_mask: tokens the encoder does not see; masked ones only.
            mask: tokens to predict, in place of drawn masks (then no ``drop_mask`` drops nothing). Counting
                them waits for the device.
            class_ids: vocabulary id of the class token; the unconditional one by default. None are dropped.

        Raises:
            ValueError: images, ids or masks of a wrong shape; ``drop_mask`` without ``mask`` or beyond it.
        """
        self.bind()
        plan = None
        if mask is not None:
            plan = _plan_of(mask, drop_mask)
        elif drop_mask is not None:
            raise ValueError("MAGE: drop_mask is given without mask, wanted both")
        ours, config = self.ours, self.ours.config
        ids_BL = ours.tokenize(images)
        rng_state = rng.new_state()
        if plan is None:
            plan = draw_plan(
                config, draw_mask_ratios(config, len(ids_BL), rng_state), rng_state.to(ids_BL.device)
            )
        class_ids_B = ours.class_ids(None, len(ids_BL))
        if class_ids is not None:  # as they are: the caller drops labels, and any id may be among them
            check.integer("MAGE", "class_ids", class_ids)
            check.shape("MAGE", "class_ids", class_ids, (len(ids_BL),))
            class_ids_B = class_ids.to(ids_BL.device)
        logits_NC = ours.masked_logits(ids_BL, class_ids_B, plan, rng_state.to(ids_BL.device))
        loss = reconstruction_loss(logits_NC, ids_BL, plan.masked_index_N, config.label_smoothing)
        return AcceleratedOutput(loss, logits_NC, plan.is_masked_BL)

    def features(self, images_or_ids: Tensor, *, block: int | None, pool: bool) -> Tensor:
        """See :meth:`mage_fast.MAGE.features`."""
        rng_state = rng.new_state() if self.bind() else None
        return self.mage().features(images_or_ids, block=block, pool=pool, rng_state=rng_state)


def _plan_of(mask_BL: Tensor, drop_mask_BL: Tensor | None) -> MaskPlan:
    if drop_mask_BL is None:
        drop_mask_BL = torch.zeros_like(mask_BL)
    for name, x in (("mask", mask_BL), ("drop_mask", drop_mask_BL)):
        check.dtype("MAGE", name, x, (torch.bool,))
        check.shape("MAGE", name, x, (None, None))
    check.shape("MAGE", "drop_mask", drop_mask_BL, tuple(mask_BL.shape))
    counts = [mask_BL.sum(1), drop_mask_BL.sum(1), (drop_mask_BL & ~mask_BL).sum(1)]
    masked, dropped, outside = torch.stack(counts).tolist()
    if sum(outside):
        raise ValueError(f"MAGE: drop_mask has {sum(outside)} tokens outside mask, wanted none")
    return plan_of_mask(mask_BL, masked, drop_mask_BL, dropped)


def whole_model(
    model: Any,
    blocks: dict[str, Replacement],
    tokenizer: Tokenizer | None,
    changes: dict[str, Any],
) -> tuple[FastMAGE, dict[str, str]] | str:
    """What can stand in for the forward of a module of the published layout, and what was assumed; or why
    nothing can.

    Args:
        model: the module.
        blocks: those of its blocks that can be replaced, by name.
        tokenizer: the user's, in place of ``vqgan.``.
        changes: fields of the configuration that the user gave.
    """
    heads = []
    for stack in ("blocks", "decoder_blocks"):
        names = [f"{stack}.{number}" for number, _ in model.get_submodule(stack).named_children()]
        if missing := [name for name in names if not isinstance(blocks.get(name), FastBlock)]:
            return f"{missing[0]} cannot be replaced"
        counts = {blocks[name].ours.attention.heads for name in names}
        if len(counts) != 1:
            return f"{stack} have {sorted(counts)} heads, wanted blocks with one number of heads"
        heads.append(counts.pop())
    if "forward" in model.__dict__:
        return "has a forward of its own in the instance"
    try:
        config, assumed = read_config(model, (heads[0], heads[1]), tokenizer, changes)
    except CheckpointError as error:
        return f"not the published layout: {error}"
    fast = FastMAGE(model, config, tokenizer)
    return fast.changed() or (fast, assumed)
