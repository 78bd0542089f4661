"""Attention, MLP and pre-norm block of ViTs, by the names that timm and MAE gave their parts.

Shape suffixes: B sequences, S positions, D features, T = B * S rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mage_fast.acceleration.replacement import Replacement, active_dropout, dropout_state
from mage_fast.attention import Attention
from mage_fast.blocks import Block, Mlp


def the_input(args: tuple, kwargs: dict[str, Any], dims: tuple[int, ...]) -> Tensor | None:
    """The only input of a call, floating and of one of these numbers of dimensions; None for other calls
    (attention masks and the like, which the module's own forward understands).
    """
    x, *others = (*args, *kwargs.values(), None)
    if not isinstance(x, Tensor) or any(other is not None and other is not False for other in others):
        return None
    return x if x.dim() in dims and x.is_floating_point() and x.numel() else None


def sequences(x_BSD: Tensor) -> tuple[Tensor, Tensor, int]:
    """Packed rows, ``cu_seqlens`` and the length of sequences that are equally long."""
    batch, length, _ = x_BSD.shape
    ends = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=x_BSD.device)
    return x_BSD.flatten(0, 1), ends, length


def dropout_of(module: Any, *names: str) -> Any:
    """The dropout module of the first of these names that there is."""
    return next((module._modules[name] for name in names if name in module._modules), None)


def follow_attention(ours: Attention, theirs: Any) -> None:
    """Drop attention probabilities as the user's module does now; the output's dropout is no part of ours."""
    ours.dropout = active_dropout(dropout_of(theirs, "attn_drop"))


def follow_mlp(ours: Mlp, theirs: Any) -> None:
    """Drop activations as the user's module does now; the output's dropout is no part of ours."""
    ours.dropout = active_dropout(dropout_of(theirs, "drop1", "drop"))


def follow_block(ours: Block, theirs: Any) -> list[float]:
    """Drop as the user's block does now, but for the MLP's output; the probabilities."""
    follow_attention(ours.attention, theirs.attn)
    follow_mlp(ours.mlp, theirs.mlp)
    ours.dropout = active_dropout(dropout_of(theirs.attn, "proj_drop"))
    return [ours.attention.dropout, ours.dropout, ours.mlp.dropout]


def output_dropout(mlp: Any) -> Any:
    """The dropout after the second linear layer."""
    return dropout_of(mlp, "drop2", "drop")


class FastAttention(Replacement):
    """Attention over packed rows; the output's dropout is the user's module."""

    def __init__(self, module: Any, heads: int) -> None:
        super().__init__(module)
        width = module.proj.in_features
        with torch.device("meta"):
            self.ours = Attention(width, heads, 0.0, layer=0)
        self.pair((self.ours.qkv, module.qkv), (self.ours.proj, module.proj))
        self.what = f"attention, {heads} heads of {width // heads}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BSD = the_input(args, kwargs, (3,))
        if x_BSD is None or self.must_fall_back():
            return self.plain(*args, **kwargs)
        self.take_tensors()
        follow_attention(self.ours, self.module)
        x_TD, cu_seqlens, length = sequences(x_BSD)
        rng_state = dropout_state([self.ours.dropout], x_BSD.device)
        out_BSD = self.ours(x_TD, cu_seqlens, length, rng_state).view(x_BSD.shape)
        dropout = dropout_of(self.module, "proj_drop")
        return out_BSD if dropout is None else dropout(out_BSD)


class FastMlp(Replacement):
    """Bias, GELU and dropout in one pass; the output's dropout is the user's module."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        width, hidden = module.fc1.in_features, module.fc1.out_features
        with torch.device("meta"):
            self.ours = Mlp(width, hidden, 0.0, layer=0)
        self.pair((self.ours.fc1, module.fc1), (self.ours.fc2, module.fc2))
        self.what = f"MLP, {width} to {hidden} and back"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = the_input(args, kwargs, (2, 3, 4))
        if x is None or self.must_fall_back():
            return self.plain(*args, **kwargs)
        self.take_tensors()
        follow_mlp(self.ours, self.module)
        rng_state = dropout_state([self.ours.dropout], x.device)
        out = self.ours(x.flatten(0, -2), rng_state).view(x.shape)
        dropout = output_dropout(self.module)
        return out if dropout is None else dropout(out)


class FastBlock(Replacement):
    """A pre-norm block: the first addition with the norm after it; the last dropout is the user's module."""

    def __init__(self, module: Any, heads: int) -> None:
        super().__init__(module)
        width, hidden = module.attn.proj.in_features, module.mlp.fc1.out_features
        with torch.device("meta"):
            self.ours = Block(width, heads, 1.0, 0.0, layer=0)
            self.ours.mlp = Mlp(width, hidden, 0.0, layer=0)
        ours, attn, mlp = self.ours, module.attn, module.mlp
        self.pair((ours.norm1, module.norm1), (ours.norm2, module.norm2))
        self.pair((ours.attention.qkv, attn.qkv), (ours.attention.proj, attn.proj))
        self.pair((ours.mlp.fc1, mlp.fc1), (ours.mlp.fc2, mlp.fc2))
        ours.norm1.eps, ours.norm2.eps = module.norm1.eps, module.norm2.eps
        self.what = f"block, {heads} heads of {width // heads}, MLP {width} to {hidden} and back"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_BSD = the_input(args, kwargs, (3,))
        if x_BSD is None or self.must_fall_back():
            return self.plain(*args, **kwargs)
        ours = self.ours
        self.take_tensors()
        rng_state = dropout_state(follow_block(ours, self.module), x_BSD.device)
        x_TD, cu_seqlens, length = sequences(x_BSD)
        x_TD, branch_TD = ours.before_last_addition(x_TD, ours.norm1(x_TD), cu_seqlens, length, rng_state)
        dropout = output_dropout(self.module.mlp)
        return (x_TD + (branch_TD if dropout is None else dropout(branch_TD))).view(x_BSD.shape)
