"""The ops inside one graph that Inductor compiles, the rest fused around them."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from mage_fast.kernels import rng
from mage_fast.kernels.ops.add_norm.api import add_norm
from mage_fast.kernels.ops.bias_gelu.api import bias_gelu
from mage_fast.kernels.ops.masked_cross_entropy.api import masked_cross_entropy
from mage_fast.kernels.ops.nearest_code.api import nearest_code
from mage_fast.kernels.ops.pad_decoder.api import pad_decoder
from mage_fast.kernels.ops.pad_decoder.specs import Spec


def loss(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, pad: dict) -> Tensor:
    branch = bias_gelu(x @ weight, bias, dropout=0.1, rng_state=state, stream=6)
    out, normed = add_norm(branch, x, bias + 1, bias, dropout=0.1, rng_state=state, stream=5)
    full = pad_decoder(normed, position_weight_SD=out[:7], **pad).flatten(0, 1)
    return masked_cross_entropy(full @ weight, nearest_code(full, weight.T))


@pytest.mark.slow
def test_inductor_gives_the_eager_loss_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    pad = Spec("graph", 2, 6, 4, 3, 8).inputs()
    x = torch.randn(10, 8, generator=generator, requires_grad=True)
    weight = torch.randn(8, 8, generator=generator, requires_grad=True)
    bias = torch.randn(8, generator=generator, requires_grad=True)
    arguments = (x, weight, bias, rng.new_state(0), {name: pad[name] for name in ("source_BS", "cu_seqlens")})
    eager = loss(*arguments)
    wanted = torch.autograd.grad(eager, [x, weight, bias])
    torch.compiler.reset()
    # the cache of compiled graphs outlives a change of an op's schema
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(loss, fullgraph=True)(*arguments)
        got = torch.autograd.grad(compiled, [x, weight, bias])
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(got, wanted)
