"""The law of what iterative decoding gives, on a stand-in model with known laws."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from mage_fast import reference
from mage_fast.sampler_config import SamplerConfig
from tests.sampler_stub import Stub

LAWS = torch.tensor(
    [[2.0, 0.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 3.0, 0.0, 1.0], [0.5, -0.5, 1.5, -2.0]]
)


def chi_square(ids_BL: Tensor, p_LC: Tensor) -> float:
    """The smallest p-value over the positions."""
    return min(
        scipy.stats.chisquare(
            ids.bincount(minlength=len(p)).double().numpy(), (p / p.sum() * len(ids)).numpy()
        ).pvalue
        for ids, p in zip(ids_BL.t(), p_LC.double(), strict=True)
    )


def test_one_step_follows_the_laws() -> None:
    stub = Stub(LAWS)
    (ids,) = stub.decode(stub.unknown(8000), SamplerConfig(steps=1))
    assert chi_square(ids, LAWS.softmax(1)) > 1e-3
    (ids,) = stub.decode(stub.unknown(8000), SamplerConfig(steps=1, temperature=0.5), seed=1)
    assert chi_square(ids, (2 * LAWS).softmax(1)) > 1e-3


def test_positions_and_samples_are_independent() -> None:
    stub = Stub(torch.zeros(4, 4))
    (ids,) = stub.decode(stub.unknown(8000), SamplerConfig(steps=1))
    pairs = torch.stack([4 * ids[:, 0] + ids[:, 1], 4 * ids[:, 2] + ids[:, 3], 4 * ids[:, 1] + ids[:, 2]])
    assert chi_square(pairs.t(), torch.ones(3, 16)) > 1e-3
    assert chi_square((4 * ids[1:, :1] + ids[:-1, :1]), torch.ones(1, 16)) > 1e-3


def test_a_chance_order_of_decisions_keeps_the_laws() -> None:
    """At a huge choice temperature, which tokens stay does not depend on their ids: the law is exact."""
    stub = Stub(LAWS)
    ids = stub.decode(stub.unknown(8000), SamplerConfig(steps=4, choice_temperature=1e6))[-2]
    assert chi_square(ids, LAWS.softmax(1)) > 1e-3


class ReferenceStub(nn.Module):
    """The same laws behind the reference sampler's interface."""

    def __init__(self, stub: Stub) -> None:
        super().__init__()
        self.stub, self.num_tokens = stub, stub.config.num_tokens
        self.codebook_size, self.mask_token_id = stub.config.codebook_size, stub.config.mask_token_id
        self.token_emb = nn.Module()
        self.token_emb.word_embeddings = nn.Embedding(1, 1)

    def forward_encoder(self, ids: Tensor, *_: Tensor) -> Tensor:
        return ids

    def forward_decoder(self, ids: Tensor, *_: Tensor) -> Tensor:
        vocabulary = nn.functional.pad(self.stub.logits_LC, (0, 2, 1, 0))
        return vocabulary.expand(len(ids), -1, -1)


@pytest.mark.parametrize("temperature", [0.0, 4.5])
def test_same_law_as_the_reference_sampler(temperature: float) -> None:
    """Confident decisions bend the marginal laws; ours bend as the reference's do."""
    stub, count, steps = Stub(LAWS), 8000, 3
    ours = stub.decode(stub.unknown(count), SamplerConfig(steps=steps, choice_temperature=temperature))[-1]
    torch.manual_seed(0)
    theirs = reference.generate(
        ReferenceStub(stub),
        count,
        steps=steps,
        temperature=temperature,  # type: ignore[arg-type]
    ).ids
    for position in range(4):
        table = [ids[:, position].bincount(minlength=4).numpy() for ids in (ours, theirs)]
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3
    joint = [(4 * ids[:, 0] + ids[:, 2]).bincount(minlength=16).numpy() + 1 for ids in (ours, theirs)]
    assert scipy.stats.chi2_contingency(joint).pvalue > 1e-3
    if temperature == 0.0:
        assert chi_square(ours, LAWS.softmax(1)) < 1e-6
