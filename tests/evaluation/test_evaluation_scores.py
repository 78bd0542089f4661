"""Scores of features: equal to torch-fidelity, torchmetrics and the equations in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mage_fast.errors import InputError
from mage_fast.evaluation import (
    Accumulator,
    FeatureStatistics,
    compare,
    fid,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mage_fast.evaluation.scores import ISC_SPLITS, SEED
from mage_fast.optional import optional

metric_fid = optional("torch_fidelity.metric_fid", extra="evaluate")
metric_prc = optional("torch_fidelity.metric_prc", extra="evaluate")
torchmetrics_fid = optional("torchmetrics.image.fid", extra="evaluate")
torchmetrics_kid = optional("torchmetrics.image.kid", extra="evaluate")


def draw(count: int, width: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Correlated features in float64."""
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(count, width, generator=generator, dtype=torch.float64)
    mix_DD = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x_ND @ (scale * mix_DD / width**0.5) + mean


def images_of(count: int) -> Tensor:
    """Images that carry their own number."""
    numbers = torch.arange(count)
    return torch.stack([numbers % 256, numbers // 256, 0 * numbers], 1).view(count, 3, 1, 1).to(torch.uint8)


def statistics(features_ND: Tensor, sizes: tuple[int, ...] = (7, 1, 30), **options: int) -> FeatureStatistics:
    """By batches of changing size."""

    def extract(images: Tensor) -> Tensor:
        return features_ND[images[:, 0, 0, 0].long() + 256 * images[:, 1, 0, 0].long()]

    accumulator = Accumulator(extract, **options)
    images, start, turn = images_of(len(features_ND)), 0, 0
    while start < len(images):
        accumulator.update(images[start : start + sizes[turn % len(sizes)]])
        start += sizes[turn % len(sizes)]
        turn += 1
    return accumulator.result()


class Given(nn.Module):
    """torchmetrics' extractor of features that are given in place of images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, 70),
    st.integers(1, 12),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([0.0, 3.0, 1e6]),
)
def test_streamed_mean_and_covariance_are_numpys(
    count: int, width: int, sizes: list[int], mean: float
) -> None:
    x_ND = draw(count, width, 3, mean=mean)
    found = statistics(x_ND, tuple(sizes))
    assert found.count == count
    assert found.mean_D.dtype == found.covariance_DD.dtype == torch.float64
    np.testing.assert_allclose(found.mean_D, x_ND.mean(0), rtol=1e-13, atol=1e-14)
    wanted = np.cov((x_ND - mean).numpy(), rowvar=False).reshape(width, width)
    # 1e6 + x is x to 1e-10; sums of squares that are not centred would leave it to 1e-4
    tolerance = 1e-12 if mean < 10 else 1e-8
    np.testing.assert_allclose(found.covariance_DD, wanted, atol=tolerance * np.abs(wanted).max())
    assert found.features_ND is not None
    torch.testing.assert_close(found.features_ND, x_ND.float(), rtol=0, atol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 24), st.integers(0, 40), st.integers(0, 40), st.floats(0.5, 2.0))
def test_fid_is_torch_fidelitys_and_torchmetrics(width: int, more: int, others: int, scale: float) -> None:
    # more images than features: of a singular covariance the libraries' own roots are noise
    x_ND, y_MD = draw(2 * width + 4 + more, width, 1), draw(2 * width + 4 + others, width, 2, scale, 0.5)
    ours = fid(statistics(x_ND), statistics(y_MD))
    x, y = (metric_fid.fid_features_to_statistics(part) for part in (x_ND, y_MD))
    if width > 1:  # numpy's covariance of one feature is no matrix, which torch-fidelity refuses
        theirs = metric_fid.fid_statistics_to_metric(x, y, False)["frechet_inception_distance"]
        assert ours == pytest.approx(theirs, rel=1e-6)
    metric = torchmetrics_fid.FrechetInceptionDistance(feature=Given(width)).set_dtype(torch.float64)
    metric.update(x_ND, real=False)
    metric.update(y_MD, real=True)
    assert ours == pytest.approx(metric.compute().item(), rel=1e-6)


def test_inception_score_is_the_equation_in_torch_fidelitys_order() -> None:
    logits_NK = draw(57, 8, 4, scale=2.0).float()
    order = np.random.RandomState(SEED).permutation(57)
    p_NK = torch.softmax(logits_NK.double(), 1).numpy()[order]
    scores = []
    for part in range(ISC_SPLITS):
        p = p_NK[part * 57 // ISC_SPLITS : (part + 1) * 57 // ISC_SPLITS]
        scores.append(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))
    assert inception_score(logits_NK) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert inception_score(torch.zeros(20, 5)) == pytest.approx((1, 0))
    with pytest.raises(InputError, match=r"logits have shape \(9, 8\), wanted 10 rows or more"):
        inception_score(logits_NK[:9])


def test_kid_of_whole_sets_is_the_unbiased_estimate_and_torchmetrics() -> None:
    """A subset as large as the set is a permutation of it: no seed matters."""
    x_ND, y_MD = draw(40, 12, 5), draw(40, 12, 6, 1.3, 0.4)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 12 + 1) ** 3

    def off_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (40 * 39)

    wanted = (
        off_diagonal(kernel(x_ND, x_ND)) + off_diagonal(kernel(y_MD, y_MD)) - 2 * kernel(x_ND, y_MD).mean()
    )
    mean, deviation = kernel_distance(x_ND, y_MD, subsets=3)
    assert mean == pytest.approx(wanted.item(), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)
    assert mean == pytest.approx(torchmetrics_kid.poly_mmd(x_ND, y_MD).item(), rel=1e-9)
    torch_fidelity = optional("torch_fidelity.metric_kid", extra="evaluate").kid_features_to_metric
    theirs = torch_fidelity(x_ND, y_MD, kid_subset_size=16, kid_subsets=5, verbose=False)
    ours = kernel_distance(x_ND, y_MD, subsets=5, subset_size=16)
    assert ours == (theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"])


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 50), st.integers(4, 50), st.integers(1, 6), st.integers(1, 30))
def test_precision_and_recall_are_the_definition_whatever_the_batch(
    count: int, others: int, width: int, batch_size: int
) -> None:
    x_ND, y_MD = draw(count, width, 7), draw(others, width, 8, 1.2, 0.3)

    def share_inside(points: Tensor, others: Tensor) -> float:
        """Each ball by itself, with exact distances."""
        inside = 0
        for point in points:
            for center in others:
                radius = (others - center).square().sum(1).sqrt().sort().values[3]
                if (point - center).square().sum().sqrt() <= radius:
                    inside += 1
                    break
        return inside / len(points)

    ours = precision_recall(x_ND, y_MD, batch_size=batch_size)
    assert ours == pytest.approx((share_inside(x_ND, y_MD), share_inside(y_MD, x_ND)), abs=1e-6)
    whole = metric_prc.prc_features_to_metric(x_ND, y_MD, save_cpu_ram=False, verbose=False)
    assert ours == (whole["precision"], whole["recall"])


def test_scores_that_cannot_be_computed_say_why() -> None:
    x, y = statistics(draw(3, 4, 1)), statistics(draw(20, 4, 2))
    scores = {score.name: score for score in compare(x, y)}
    assert scores["fid"].value == fid(x, y)
    assert "the covariance of images is singular, of 3 for 4 features" in scores["fid"].note
    assert "the reference is singular" not in scores["fid"].note
    assert "published figures are of 50,000" in scores["fid"].note
    assert scores["inception_score"].note == "not computed: the features have no class logits"
    assert scores["kid"].note.startswith("100 subsets of 3 images (published figures: 1000)")
    assert scores["precision"].value is None
    assert scores["precision"].note == "not computed: wants more than 3 images"
    bare = FeatureStatistics(y.mean_D, y.covariance_DD, 0)
    scores = {score.name: score for score in compare(y, bare)}
    assert scores["fid"].value == pytest.approx(0, abs=1e-9)
    for name in ("kid", "precision", "recall"):
        assert scores[name].value is None
        assert "a mean and a covariance are known of the reference" in scores[name].note


def test_kept_features_are_spread_over_all_and_statistics_are_of_all() -> None:
    x_ND = draw(1000, 3, 9)
    found = statistics(x_ND, (64,), keep=10, total=1000)
    assert found.count == 1000
    torch.testing.assert_close(found.covariance_DD, torch.cov(x_ND.T), rtol=1e-12, atol=1e-12)
    assert found.features_ND is not None
    torch.testing.assert_close(found.features_ND, x_ND[99::100].float(), rtol=0, atol=0)
    assert statistics(x_ND[:40], keep=0).features_ND.shape == (0, 3)  # type: ignore[union-attr]


def test_features_of_other_shapes_or_values_are_refused() -> None:
    x, y = statistics(draw(20, 4, 1)), statistics(draw(20, 5, 2))
    with pytest.raises(InputError, match="fid: the images have 4 features, the reference 5"):
        compare(x, y)
    assert x.features_ND is not None
    assert y.features_ND is not None
    for score in (kernel_distance, precision_recall):
        with pytest.raises(InputError, match="the images have 4 features, the reference 5"):
            score(x.features_ND, y.features_ND)
    x_ND = draw(40, 4, 1)
    x_ND[37, 2] = torch.nan
    with pytest.raises(InputError, match="features: those of images 8 to 37 hold NaN or infinity"):
        statistics(x_ND, (8, 30))
    with pytest.raises(InputError, match="features: those of images 0 to 3 hold NaN or infinity"):
        Accumulator(lambda images: (images[:, :, 0, 0].float(), torch.full((4, 2), torch.inf))).update(
            images_of(4)
        )
    with pytest.raises(InputError, match=r"4 images gave shape \(4, 2, 2\), wanted \(4, D\)"):
        Accumulator(lambda images: torch.zeros(len(images), 2, 2)).update(images_of(4))
    with pytest.raises(InputError, match=r"images are torch.float32 of shape \(4, 3, 1, 1\), wanted uint8"):
        Accumulator(lambda images: images).update(images_of(4).float())
    with pytest.raises(InputError, match="of 1 images, wanted two or more"):
        statistics(x_ND[:1])
