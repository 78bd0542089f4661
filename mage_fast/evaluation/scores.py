"""FID, Inception score, KID, precision and recall of two sets of features, as torch-fidelity computes them.

Shape suffixes: N images, M of the reference, D features, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.evaluation.statistics import FeatureStatistics
from mage_fast.optional import optional
from mage_fast.training.metrics import frechet_distance_of_gaussians

#: Images that published figures are computed of.
PUBLISHED_IMAGES = 50_000
ISC_SPLITS = 10
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
#: Decides the order of images for the Inception score and KID's subsets; torch-fidelity's own.
SEED = 2020
#: Features whose distances to all others are held at a time.
PRC_BATCH = 2048


class Score(NamedTuple):
    """A figure, None where there is none, and how it was computed or why it was not."""

    name: str
    value: float | None
    note: str


def fid(generated: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Frechet distance between the Gaussians of two sets of features.

    Equal to torch-fidelity's and torchmetrics' of the same features in float64.

    Raises:
        InputError: other numbers of features.

    Source: Heusel et al. 2017, equation 6.
    """
    _check_width("fid", generated.mean_D, reference.mean_D)
    return frechet_distance_of_gaussians(
        generated.mean_D, generated.covariance_DD, reference.mean_D, reference.covariance_DD
    )


def inception_score(logits_NK: Float[Tensor, "N K"]) -> tuple[float, float]:
    """Mean and deviation over 10 parts of exp(E KL(p(y|x) || p(y))); torch-fidelity's, in its order.

    Raises:
        InputError: fewer images than parts; torch-fidelity is missing.

    Source: Salimans et al. 2016, section 4.
    """
    if logits_NK.ndim != 2 or len(logits_NK) < ISC_SPLITS:
        raise InputError(
            f"inception_score: logits have shape {tuple(logits_NK.shape)}, wanted {ISC_SPLITS} rows or more"
        )
    module = optional("torch_fidelity.metric_isc", extra="evaluate")
    # exp(-600) weighs nothing, but a class of probability 0 in all images would make a NaN there
    logits_NK = logits_NK.double()
    logits_NK = logits_NK.maximum(logits_NK.amax(1, keepdim=True) - 600)
    found = module.isc_features_to_metric(logits_NK, ISC_SPLITS, True, SEED)
    return found["inception_score_mean"], found["inception_score_std"]


def kernel_distance(
    generated_ND: Float[Tensor, "N D"],
    reference_MD: Float[Tensor, "M D"],
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
) -> tuple[float, float]:
    """KID: mean and deviation over random subsets of the unbiased squared MMD, kernel (x.y / D + 1)^3.

    torch-fidelity's, with its subsets; subsets are as large as the smaller set where that has fewer images.

    Raises:
        InputError: other numbers of features, fewer than two rows; torch-fidelity is missing.

    Source: Bińkowski et al. 2018, section 4.
    """
    _check_rows("kernel_distance", generated_ND, reference_MD, 2)
    module = optional("torch_fidelity.metric_kid", extra="evaluate")
    found = module.kid_features_to_metric(
        generated_ND,
        reference_MD,
        kid_subsets=subsets,
        kid_subset_size=min(subset_size, len(generated_ND), len(reference_MD)),
        rng_seed=SEED,
        verbose=False,
    )
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def precision_recall(
    generated_ND: Float[Tensor, "N D"],
    reference_MD: Float[Tensor, "M D"],
    *,
    neighbours: int = NEIGHBOURS,
    batch_size: int = PRC_BATCH,
) -> tuple[float, float]:
    """Share of generated images inside the reference's manifold, and of the reference's inside theirs.

    A manifold is the union of balls around features that reach to the k-th nearest of their own set.
    torch-fidelity's, on the features' device; ``batch_size`` rows of distances are held at a time.

    Raises:
        InputError: other numbers of features, not more rows than neighbours; torch-fidelity is missing.

    Source: Kynkäänniemi et al. 2019, equations 1 and 2; k = 3.
    """
    _check_rows("precision_recall", generated_ND, reference_MD, neighbours + 1)
    module = optional("torch_fidelity.metric_prc", extra="evaluate")
    found = module.prc_features_to_metric(
        generated_ND,
        reference_MD,
        prc_neighborhood=neighbours,
        prc_batch_size=batch_size,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["precision"], found["recall"]


def compare(
    generated: FeatureStatistics, reference: FeatureStatistics, *, device: torch.device | str = "cpu"
) -> list[Score]:
    """All scores of generated images against a reference; one that cannot be computed says why.

    Args:
        generated: see :meth:`FeatureStatistics.of`.
        reference: of the same features.
        device: computes distances between features.

    Raises:
        InputError: other numbers of features; torch-fidelity is missing.
    """
    scores = [fid_score("fid", generated, reference)]
    logits_NK, x_ND, y_MD = generated.logits_NK, generated.features_ND, reference.features_ND
    if logits_NK is None or len(logits_NK) < ISC_SPLITS:
        reason = "the features have no class logits" if logits_NK is None else f"wants {ISC_SPLITS} images"
        scores.append(Score("inception_score", None, f"not computed: {reason}"))
    else:
        mean, deviation = inception_score(logits_NK)
        scores += [
            Score("inception_score", mean, f"{ISC_SPLITS} parts, {logits_NK.shape[1]} classes"),
            Score("inception_score_std", deviation, "over the parts"),
        ]
    if x_ND is None or y_MD is None:
        reason = "not computed: a mean and a covariance are known of the reference, no features"
        return scores + [Score(name, None, reason) for name in ("kid", "precision", "recall")]
    size = min(KID_SUBSET_SIZE, len(x_ND), len(y_MD))
    mean, deviation = kernel_distance(x_ND, y_MD)
    short = "" if size == KID_SUBSET_SIZE else f" (published figures: {KID_SUBSET_SIZE})"
    scores += [
        Score("kid", mean, f"{KID_SUBSETS} subsets of {size} images{short}, degree 3"),
        Score("kid_std", deviation, "over the subsets"),
    ]
    if min(len(x_ND), len(y_MD)) <= NEIGHBOURS:
        reason = f"not computed: wants more than {NEIGHBOURS} images"
        return scores + [Score(name, None, reason) for name in ("precision", "recall")]
    precision, recall = precision_recall(x_ND.to(device), y_MD.to(device))
    note = f"k = {NEIGHBOURS}, {len(x_ND):,} against {len(y_MD):,} images"
    return [*scores, Score("precision", precision, note), Score("recall", recall, note)]


def fid_score(name: str, generated: FeatureStatistics, reference: FeatureStatistics) -> Score:
    """:func:`fid` under a name, with what its number of images means."""
    width = len(generated.mean_D)
    notes = [f"{width} features, {generated.count:,} images"]
    if generated.count < PUBLISHED_IMAGES:
        notes.append(f"published figures are of {PUBLISHED_IMAGES:,}, fewer give higher ones")
    for which, statistics in (("images", generated), ("the reference", reference)):
        if 0 < statistics.count <= width:
            notes.append(f"the covariance of {which} is singular, of {statistics.count} for {width} features")
    return Score(name, fid(generated, reference), "; ".join(notes))


def _check_width(name: str, generated: Tensor, reference: Tensor) -> None:
    if generated.shape[-1] != reference.shape[-1]:
        raise InputError(
            f"{name}: the images have {generated.shape[-1]} features, the reference {reference.shape[-1]}, "
            "wanted the same ones"
        )


def _check_rows(name: str, generated_ND: Tensor, reference_MD: Tensor, rows: int) -> None:
    for which, x in (("generated", generated_ND), ("reference", reference_MD)):
        if x.ndim != 2 or len(x) < rows:
            raise InputError(
                f"{name}: {which} features have shape {tuple(x.shape)}, wanted {rows} rows or more"
            )
    _check_width(name, generated_ND, reference_MD)
