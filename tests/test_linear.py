"""The linear layers of the blocks, and the rounded copies that a generation reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mage_fast.config import MAGEConfig
from mage_fast.decoding import Decoding
from mage_fast.linear import Linear, RoundedWeights
from mage_fast.model import MAGE
from mage_fast.sampler_config import SamplerConfig


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Linear(24, 40), nn.GELU(), Linear(40, 6, bias=False))


def test_parameters_and_values_are_those_of_torchs_layer(model: nn.Sequential) -> None:
    plain = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 6, bias=False))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model[0].product(x) + model[0].bias, plain[0](x))


def test_rounded_copies_give_the_same_numbers(model: nn.Sequential) -> None:
    x, weights = torch.randn(3, 24), RoundedWeights(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        with weights.lent():
            assert model[0].rounded_FD is not None
            assert model[0].rounded_FD.dtype == torch.bfloat16
            assert torch.equal(model(x), wanted)
    assert model[0].rounded_FD is None


def test_copies_follow_the_weights_and_keep_their_memory(model: nn.Sequential) -> None:
    x, weights = torch.randn(3, 24), RoundedWeights(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with weights.lent():
            before, place = model(x), model[0].rounded_FD.data_ptr()
        model[0].weight.mul_(2)
        wanted = model(x)
        with weights.lent():
            assert torch.equal(model(x), wanted)
            assert not torch.equal(wanted, before)
            assert model[0].rounded_FD.data_ptr() == place


def test_nothing_is_lent_without_autocast_or_after_an_error(model: nn.Sequential) -> None:
    weights = RoundedWeights(model)
    with weights.lent():
        assert model[0].rounded_FD is None
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError), weights.lent():
        raise KeyError
    assert model[0].rounded_FD is None
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight"]


def test_generation_reads_rounded_weights() -> None:
    torch.manual_seed(0)
    model = MAGE(MAGEConfig.tiny()).eval()
    decode = Decoding(model, SamplerConfig(steps=3))
    seen = []
    product = model.head.fc.product
    model.head.fc.product = lambda x: seen.append(model.head.fc.rounded_FD) or product(x)
    with torch.autocast("cpu", torch.bfloat16):
        decode(2, seed=0)
    assert len(seen) == 3
    assert all(x is not None and x.dtype == torch.bfloat16 for x in seen)
