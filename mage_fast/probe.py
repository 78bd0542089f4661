"""Linear probing: how well one linear layer tells classes apart on frozen features."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

FEATURE_EPS = 1e-6


class ProbeResult(NamedTuple):
    """Accuracies in [0, 1] on the training and the held-out part."""

    train_top1: float
    test_top1: float


def linear_probe(
    train_ND: Float[Tensor, "N D"],
    train_labels_N: Int[Tensor, " N"],
    test_MD: Float[Tensor, "M D"],
    test_labels_M: Int[Tensor, " M"],
    *,
    regularization: float = 1.0,
) -> ProbeResult:
    """Fit a linear classifier on frozen features and score it on held-out ones.

    The features pass a LayerNorm without parameters (``fc_norm`` before it learns) and are standardised by
    the training set's statistics, as a BatchNorm without affine part does. The classifier is
    scikit-learn's multinomial logistic regression, solved to convergence: the same model as the published
    recipe's linear head without its 90 epochs of LARS, which small data sets do not need.

    Equivalent PyTorch: ``nn.Sequential(nn.LayerNorm(D), nn.BatchNorm1d(D, affine=False), nn.Linear(D, K))``
    with only the last one trained.

    Args:
        train_ND: features of the training images, see :meth:`mage_fast.MAGE.features`.
        train_labels_N: their classes.
        test_MD: features of held-out images.
        test_labels_M: their classes.
        regularization: inverse strength of the L2 penalty (scikit-learn's ``C``).

    Raises:
        ValueError: fewer than two classes, sizes that disagree.

    Source: MAGE section 4.3, "Linear Probing".
    """
    from sklearn.linear_model import LogisticRegression

    for name, x, labels in (("train", train_ND, train_labels_N), ("test", test_MD, test_labels_M)):
        if x.dim() != 2 or len(x) != len(labels) or not len(x):
            raise ValueError(
                f"linear_probe: {name} features have shape {tuple(x.shape)}, labels {tuple(labels.shape)}, "
                "wanted (N, D) and (N,), N >= 1"
            )
    if len(train_labels_N.unique()) < 2:
        raise ValueError("linear_probe: the training labels are of one class, wanted two or more")
    train_ND, test_MD = (
        F.layer_norm(x.double().cpu(), x.shape[1:], eps=FEATURE_EPS) for x in (train_ND, test_MD)
    )
    mean_D, scale_D = train_ND.mean(0), (train_ND.var(0, correction=0) + FEATURE_EPS).sqrt()
    train, test = (((x - mean_D) / scale_D).numpy() for x in (train_ND, test_MD))
    classifier = LogisticRegression(C=regularization, max_iter=1000).fit(train, train_labels_N.cpu().numpy())
    return ProbeResult(
        classifier.score(train, train_labels_N.cpu().numpy()),
        classifier.score(test, test_labels_M.cpu().numpy()),
    )


def chance_level(labels_M: Int[Tensor, " M"]) -> float:
    """Accuracy of always guessing the most frequent class."""
    return float(torch.bincount(labels_M).max()) / len(labels_M)
