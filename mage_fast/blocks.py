"""The pre-norm transformer block, its MLP, and a stack of blocks over packed sequences.

A block's last addition is fused with the *next* LayerNorm, so the stream between blocks is a pair: the
residual ``x`` and ``normed``, the same rows normalised for whoever reads them next.
"""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.attention import Attention
from mage_fast.embedding import NORM_EPS
from mage_fast.kernels import rng
from mage_fast.kernels.ops.add_norm.api import add_norm
from mage_fast.kernels.ops.bias_gelu.api import bias_gelu
from mage_fast.linear import Linear


class Mlp(nn.Module):
    """Linear, erf GELU, dropout, linear (the last dropout follows in add_norm)."""

    def __init__(self, width: int, hidden: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.stream = rng.stream(rng.Stream.MLP_DROPOUT, layer)
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_TD: Float[Tensor, "T D"], rng_state: Tensor | None) -> Float[Tensor, "T D"]:
        """Row-wise."""
        hidden_TF = self.fc1.product(x_TD)
        dropout = self.dropout if self.training else 0.0
        return self.fc2(
            bias_gelu(hidden_TF, self.fc1.bias, dropout=dropout, rng_state=rng_state, stream=self.stream)
        )


class Block(nn.Module):
    """x += drop(attention(norm1(x))); x += drop(mlp(norm2(x)))."""

    #: Probability that training leaves out a branch, for each sample and branch by itself.
    drop_path: float = 0.0

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, layer: int) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention_stream = rng.stream(rng.Stream.PROJECTION_DROPOUT, layer)
        self.mlp_stream = rng.stream(rng.Stream.OUTPUT_DROPOUT, layer)
        self.layer = layer
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attention = Attention(width, heads, dropout, layer)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout, layer)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        normed_TD: Float[Tensor, "T D"],
        next_norm: nn.LayerNorm,
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng_state: Tensor | None,
        rows_N: Int[Tensor, "N"] | None = None,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        """``(x, norm1(x))`` in, ``(x, next_norm(x))`` out; of the rows ``rows_N`` only, if given."""
        x_TD, branch_TD = self.before_last_addition(
            x_TD, normed_TD, cu_seqlens, max_seqlen, rng_state, rows_N
        )
        return self._add(branch_TD, x_TD, next_norm, rng_state, self.mlp_stream)

    def before_last_addition(
        self,
        x_TD: Float[Tensor, "T D"],
        normed_TD: Float[Tensor, "T D"],
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng_state: Tensor | None,
        rows_N: Int[Tensor, "N"] | None = None,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        """``(x, branch)``, what is left to do being ``x + dropout(branch)``."""
        branch_TD = self.attention(normed_TD, cu_seqlens, max_seqlen, rng_state, rows_N)
        drops_path = self.training and self.drop_path > 0.0
        if drops_path:
            paths = (x_TD.shape[0], cu_seqlens, rows_N, self.drop_path, rng_state)
            branch_TD = drop_path(branch_TD, *paths, rng.stream(rng.Stream.ATTENTION_PATH, self.layer))
        if rows_N is not None:
            x_TD = x_TD.index_select(0, rows_N)
        x_TD, normed_TD = self._add(branch_TD, x_TD, self.norm2, rng_state, self.attention_stream)
        branch_TD = self.mlp(normed_TD, rng_state)
        if drops_path:
            branch_TD = drop_path(branch_TD, *paths, rng.stream(rng.Stream.MLP_PATH, self.layer))
        return x_TD, branch_TD

    def _add(
        self, branch_TD: Tensor, x_TD: Tensor, norm: nn.LayerNorm, rng_state: Tensor | None, stream: int
    ) -> tuple[Tensor, Tensor]:
        return add_norm(
            branch_TD,
            x_TD,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout=self.dropout if self.training else 0.0,
            rng_state=rng_state,
            stream=stream,
        )


def drop_path(
    branch_ND: Float[Tensor, "N D"],
    rows: int,
    cu_seqlens: Int[Tensor, "B1"],
    rows_N: Int[Tensor, "N"] | None,
    p: float,
    rng_state: Tensor | None,
    stream: int,
) -> Float[Tensor, "N D"]:
    """Stochastic depth: all rows of a sample are left out with probability p, or divided by 1 - p.

    A sample's random number is that of its index, whatever the batch; nothing is read on the host.

    Equivalent PyTorch, for B equally long samples: ``branch.view(B, -1, D) * keep_B11 / (1 - p)``.

    Args:
        branch_ND: what an addition would add.
        rows: packed rows of all samples.
        cu_seqlens: where each sample's rows begin.
        rows_N: which of them the branch has; all by default.
        p: in [0, 1).
        rng_state: int64 ``(seed, step)`` on the branch's device.
        stream: of this branch.

    Source: Huang et al. 2016, "Deep networks with stochastic depth", equation 5; scaled while training.
    """
    assert rng_state is not None
    words_B = rng.words(rng_state, stream, cu_seqlens.shape[0] - 1, 1)[:, 0]
    scale_B = (words_B >= round(p * 2**32)).to(branch_ND.dtype) / (1 - p)
    scale_T = scale_B.repeat_interleave(cu_seqlens.diff(), output_size=rows)
    return branch_ND * (scale_T if rows_N is None else scale_T.index_select(0, rows_N))[:, None]


def run_blocks(
    blocks: nn.ModuleList,
    last_norm: nn.LayerNorm,
    x_TD: Float[Tensor, "T D"],
    cu_seqlens: Tensor,
    max_seqlen: int,
    rng_state: Tensor | None,
    rows_N: Int[Tensor, "N"] | None = None,
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """``(x, last_norm(x))`` after the blocks, which are :class:`Block`, at least one.

    With ``rows_N`` only of these rows: the last block then computes keys and values of all rows, and nothing
    else that no one asks for.
    """
    norms = [cast(Block, block).norm1 for block in blocks] + [last_norm]
    normed_TD = norms[0](x_TD)
    for block, next_norm in zip(blocks, norms[1:], strict=True):
        rows = rows_N if block is blocks[-1] else None
        x_TD, normed_TD = block(x_TD, normed_TD, next_norm, cu_seqlens, max_seqlen, rng_state, rows)
    return x_TD, normed_TD
