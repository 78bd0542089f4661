"""Probing: how well one linear layer, or the nearest neighbours, tell classes apart on frozen features."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

FEATURE_EPS = 1e-6
#: Similarities that :func:`knn_accuracy` holds at a time.
KNN_CHUNK = 2**22


class ProbeResult(NamedTuple):
    """Accuracies in [0, 1] on the training and the held-out part."""

    train_top1: float
    test_top1: float


def linear_head(width: int, classes: int, *, seed: int = 0) -> nn.Sequential:
    """The published probe's head: LayerNorm and BatchNorm without parameters, then a linear layer.

    Weights are drawn from a normal law of deviation 0.01, biases are 0. In eval mode the BatchNorm uses the
    running statistics of the training features.

    Equivalent PyTorch: ``nn.Sequential(nn.LayerNorm(D, elementwise_affine=False), nn.BatchNorm1d(D,
    affine=False), nn.Linear(D, K))``, both eps 1e-6.

    Args:
        width: D, features of an image.
        classes: K.
        seed: of the weights.

    Source: MAGE, appendix (linear probing), where ``fc_norm``, frozen with the encoder, is the LayerNorm.
    """
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(
        nn.LayerNorm(width, eps=FEATURE_EPS, elementwise_affine=False),
        nn.BatchNorm1d(width, eps=FEATURE_EPS, affine=False),
        linear,
    )


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
        ValueError: fewer than two classes, sizes that disagree, values that are not finite.

    Source: MAGE section 4.3, "Linear Probing".
    """
    from sklearn.linear_model import LogisticRegression

    _check("linear_probe", train_ND, train_labels_N, test_MD, test_labels_M)
    _check_finite("linear_probe", train_ND, test_MD)
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


def knn_accuracy(
    train_ND: Float[Tensor, "N D"],
    train_labels_N: Int[Tensor, " N"],
    test_MD: Float[Tensor, "M D"],
    test_labels_M: Int[Tensor, " M"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Top-1 accuracy in [0, 1] of a weighted k-nearest-neighbour classifier on frozen features.

    Features are scaled to length 1. Each of the k training features of the largest cosine similarity votes
    for its class with weight exp(similarity / temperature). Computed on the features' device in float32, or
    float64 where they are, a part of the held-out features at a time; classes tie in favour of the lower.

    Equivalent PyTorch::

        similarity_MN = F.normalize(test_MD) @ F.normalize(train_ND).T
        best_MK, index_MK = similarity_MN.topk(k)
        votes_MKC = F.one_hot(train_labels_N)[index_MK] * (best_MK / temperature).exp()[..., None]
        accuracy = (votes_MKC.sum(1).argmax(1) == test_labels_M).double().mean().item()

    Args:
        train_ND: features of the training images, see :meth:`mage_fast.MAGE.features`.
        train_labels_N: their classes, 0 or more.
        test_MD: features of held-out images.
        test_labels_M: their classes.
        k: neighbours that vote.
        temperature: of the weights; small ones trust the nearest.

    Raises:
        ValueError: sizes that disagree, k outside [1, N], a temperature that is not positive, a label below
            0, values that are not finite.

    Source: Wu et al. 2018 (instance discrimination), section 3.4; k = 20 as Caron et al. 2021 (DINO).
    """
    _check("knn_accuracy", train_ND, train_labels_N, test_MD, test_labels_M)
    if not 1 <= k <= len(train_ND) or not temperature > 0:
        raise ValueError(
            f"knn_accuracy: k is {k} and temperature {temperature}, wanted 1 <= k <= {len(train_ND)} "
            "(the training features) and more than 0"
        )
    if train_ND.shape[1] != test_MD.shape[1] or int(train_labels_N.min()) < 0:
        raise ValueError(
            f"knn_accuracy: {train_ND.shape[1]} and {test_MD.shape[1]} features, labels from "
            f"{int(train_labels_N.min())} on, wanted as many features and labels from 0 on"
        )
    _check_finite("knn_accuracy", train_ND, test_MD)
    dtype = torch.promote_types(train_ND.dtype, torch.float32)
    train_ND, test_MD = (F.normalize(x.to(dtype), dim=1) for x in (train_ND, test_MD))
    labels_N, wanted_M = (x.to(train_ND.device, torch.int64) for x in (train_labels_N, test_labels_M))
    classes = int(labels_N.max()) + 1
    correct = labels_N.new_zeros(())
    rows = max(KNN_CHUNK // max(len(train_ND), classes), 1)
    for part_PD, wanted_P in zip(test_MD.split(rows), wanted_M.split(rows), strict=True):
        best_PK, index_PK = (part_PD @ train_ND.T).topk(k)
        weights_PK = ((best_PK - best_PK[:, :1]) / temperature).exp()  # over the nearest's: none overflows
        votes_PC = weights_PK.new_zeros(len(part_PD), classes).scatter_add_(1, labels_N[index_PK], weights_PK)
        correct += (votes_PC.argmax(1) == wanted_P).sum()
    return correct.item() / len(test_MD)


def chance_level(labels_M: Int[Tensor, " M"]) -> float:
    """Accuracy of always guessing the most frequent class."""
    return float(torch.bincount(labels_M).max()) / len(labels_M)


def _check(
    name: str, train_ND: Tensor, train_labels_N: Tensor, test_MD: Tensor, test_labels_M: Tensor
) -> None:
    for part, x, labels in (("train", train_ND, train_labels_N), ("test", test_MD, test_labels_M)):
        if x.dim() != 2 or len(x) != len(labels) or not len(x):
            raise ValueError(
                f"{name}: {part} features have shape {tuple(x.shape)}, labels {tuple(labels.shape)}, "
                "wanted (N, D) and (N,), N >= 1"
            )


def _check_finite(name: str, *features: Tensor) -> None:
    if not all(x.isfinite().all() for x in features):
        raise ValueError(f"{name}: features hold NaN or infinity")
