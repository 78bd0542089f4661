"""The probes on frozen features: nearest neighbours against plain NumPy in float64, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from mage_fast import probe
from mage_fast.probe import knn_accuracy, linear_head, linear_probe


def blobs(classes: int, count: int, width: int, seed: int, spread: float = 1.0) -> tuple[Any, ...]:
    """Features around a centre a class, labels; a training and a test part."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    parts: list[Any] = []
    for _ in range(2):
        labels = torch.randint(classes, (count,), generator=generator)
        noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
        parts += [centres[labels] + spread * noise, labels]
    return tuple(parts)


def by_hand(train: Any, labels: Any, test: Any, wanted: Any, k: int, temperature: float) -> float:
    """One test feature at a time, all training features sorted."""
    train, test = (x.double().numpy() for x in (train, test))
    labels, right = labels.numpy(), 0
    for x, y in zip(test, wanted.numpy(), strict=True):
        similarity = train @ x / (np.linalg.norm(train, axis=1) * np.linalg.norm(x))
        nearest = np.argsort(-similarity, kind="stable")[:k]
        votes = {
            c: sum(np.exp(similarity[n] / temperature) for n in nearest if labels[n] == c)
            for c in sorted(set(labels[nearest].tolist()))
        }
        right += max(votes, key=lambda c: votes[c]) == y
    return right / len(test)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 6),
    st.integers(1, 40),
    st.integers(2, 9),
    st.integers(0, 10**6),
    st.floats(0.02, 3.0),
    st.data(),
)
def test_neighbours_vote_as_by_hand(
    classes: int, count: int, width: int, seed: int, temperature: float, data: st.DataObject
) -> None:
    parts = blobs(classes, count, width, seed)
    k = data.draw(st.integers(1, count))
    got = knn_accuracy(*parts, k=k, temperature=temperature)
    assert got == pytest.approx(by_hand(*parts, k, temperature))


def test_neighbours_are_scikit_learn_s() -> None:
    train, labels, test, wanted = blobs(5, 300, 8, seed=3)
    unit_train, unit_test = (torch.nn.functional.normalize(x).numpy() for x in (train, test))
    # of unit vectors: squared distance = 2 - 2 cosine
    theirs = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance**2 / 2) / 0.07))
    accuracy = theirs.fit(unit_train, labels.numpy()).score(unit_test, wanted.numpy())
    assert 0.3 < accuracy < 0.9
    assert knn_accuracy(train, labels, test, wanted) == accuracy
    scaled = knn_accuracy(3.0 * train, labels, 0.1 * test, wanted)
    assert scaled == accuracy, "lengths do not matter"
    assert knn_accuracy(train.float(), labels, test.float(), wanted) == pytest.approx(accuracy, abs=0.01)


def test_a_part_at_a_time_is_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = blobs(4, 57, 6, seed=1)
    whole = knn_accuracy(*parts, k=7)
    monkeypatch.setattr(probe, "KNN_CHUNK", 57 * 5)
    assert knn_accuracy(*parts, k=7) == whole
    monkeypatch.setattr(probe, "KNN_CHUNK", 1)
    assert knn_accuracy(*parts, k=7) == whole


def test_small_temperatures_trust_the_nearest_and_do_not_overflow() -> None:
    train = torch.tensor([[1.0, 0.0], [0.9, 0.4], [0.9, -0.4]])
    labels, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.01]])
    for temperature, wanted in ((1e-6, 1.0), (10.0, 0.0)):
        assert knn_accuracy(train, labels, test, labels[:1], k=3, temperature=temperature) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"k": 0}, "k is 0 and temperature 0.07, wanted 1 <= k <= 6"),
        (lambda a: a | {"k": 7}, "k is 7"),
        (lambda a: a | {"temperature": 0.0}, "temperature 0.0"),
        (lambda a: a | {"test_MD": a["test_MD"][:, :2]}, "3 and 2 features"),
        (lambda a: a | {"train_labels_N": a["train_labels_N"] - 2}, "labels from -[12] on"),
        (lambda a: a | {"train_ND": a["train_ND"] * torch.nan}, "NaN or infinity"),
        (
            lambda a: a | {"test_labels_M": a["test_labels_M"][:3]},
            r"test features .* labels \(3,\)",
        ),
        (lambda a: a | {"train_ND": a["train_ND"][:0], "train_labels_N": a["train_labels_N"][:0]}, "N >= 1"),
    ],
)
def test_bad_input(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    names = ("train_ND", "train_labels_N", "test_MD", "test_labels_M")
    given_ = dict(zip(names, blobs(2, 6, 3, seed=0), strict=True)) | {"k": 3}
    with pytest.raises(ValueError, match=f"knn_accuracy: .*{message}"):
        knn_accuracy(**change(given_))


def test_linear_probe_tells_blobs_apart_and_refuses_what_disagrees() -> None:
    train, labels, test, wanted = blobs(3, 60, 8, seed=2, spread=0.1)
    assert linear_probe(train, labels, test, wanted) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"linear_probe: train features .* \(60, 8\), labels \(59,\)"):
        linear_probe(train, labels[1:], test, wanted)


def test_linear_probe_refuses_what_is_not_finite() -> None:
    train, labels, test, wanted = blobs(3, 60, 8, seed=2)
    with pytest.raises(ValueError, match="linear_probe: features hold NaN or infinity"):
        linear_probe(train * torch.inf, labels, test, wanted)


def test_the_head_normalises_twice_and_starts_small() -> None:
    """In float64, against NumPy; then by the running statistics of three batches."""
    head = linear_head(6, 4, seed=1).double()
    weight = next(head.parameters())
    assert [x.shape for x in head.parameters()] == [(4, 6), (4,)]
    batches = [blobs(4, 20, 6, seed=seed)[0] for seed in range(3)]
    mean, var = np.zeros(6), np.ones(6)
    for x in batches:
        rows = x.numpy()
        rows = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-6)
        logits = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-6) @ weight.detach().numpy().T
        np.testing.assert_allclose(head(x).detach().numpy(), logits, rtol=1e-9, atol=1e-12)
        mean, var = 0.9 * mean + 0.1 * rows.mean(0), 0.9 * var + 0.1 * rows.var(0, ddof=1)
    logits = (rows - mean) / np.sqrt(var + 1e-6) @ weight.detach().numpy().T
    np.testing.assert_allclose(head.eval()(batches[-1]).detach().numpy(), logits, rtol=1e-9, atol=1e-12)
    large = next(linear_head(500, 400).parameters())
    assert large.std().item() == pytest.approx(0.01, rel=0.01)
    assert large.mean().item() == pytest.approx(0, abs=1e-4)
    assert torch.equal(next(linear_head(6, 4, seed=1).parameters()).double(), weight)
