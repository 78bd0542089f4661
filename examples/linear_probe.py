"""How well a frozen encoder tells classes apart: a linear classifier on its features, from Python.

    python examples/linear_probe.py out/demo/pretrain      # a trained model, on handwritten digits
    python examples/linear_probe.py                        # an untrained one, for comparison

What one learns: features are one call, and are yours to use anywhere; here with a probe, the nearest
neighbours and scikit-learn. Prints accuracies on held-out images.
"""

from __future__ import annotations

import sys

import torch
from sklearn.neighbors import NearestCentroid

from mage_fast import MAGE, MAGEConfig
from mage_fast.probe import chance_level, knn_accuracy, linear_probe
from mage_fast.recipes.probe import extract_features

torch.manual_seed(0)
model = MAGE.from_pretrained(sys.argv[1]) if len(sys.argv) > 1 else MAGE(MAGEConfig.tiny()).eval()
train, labels = extract_features(model, "digits", "train")  # also folder:PATH; [N, D] and [N]
test, test_labels = extract_features(model, "digits", "test")
print(f"features {tuple(train.shape)}, chance {chance_level(test_labels):.1%}")
print(f"linear probe        {linear_probe(train, labels, test, test_labels).test_top1:.1%}")
print(f"20 nearest          {knn_accuracy(train, labels, test, test_labels):.1%}")
centroids = NearestCentroid().fit(train.numpy(), labels.numpy())
print(f"nearest class mean  {centroids.score(test.numpy(), test_labels.numpy()):.1%}")
