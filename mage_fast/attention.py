"""Multi-head self-attention over packed sequences."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from mage_fast.kernels import rng
from mage_fast.kernels.ops.attention.api import attention
from mage_fast.linear import Linear


class Attention(nn.Module):
    """qkv projection, attention within each sequence, output projection (dropout follows in add_norm)."""

    def __init__(self, width: int, heads: int, dropout: float, layer: int) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.stream = rng.stream(rng.Stream.ATTENTION_DROPOUT, layer)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        cu_seqlens: Tensor,
        max_seqlen: int,
        rng_state: Tensor | None,
        rows_N: Int[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "N D"]:
        """Rows attend to the rows of their own sequence; the results of ``rows_N`` only, if given."""
        out_THD = attention(
            self.qkv(x_TD).unflatten(1, (3, self.heads, -1)),
            cu_seqlens,
            max_seqlen=max_seqlen,
            dropout=self.dropout if self.training else 0.0,
            rng_state=rng_state,
            stream=self.stream,
        )
        out_TD = out_THD.flatten(1)
        return self.proj(out_TD if rows_N is None else out_TD.index_select(0, rows_N))
