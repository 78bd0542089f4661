"""Scores of generated and reconstructed images: FID, IS, KID, precision, recall, PSNR, SSIM, LPIPS.

>>> from mage_fast.evaluation import FeatureStatistics, compare
>>> generated = FeatureStatistics.of(batches_of_uint8_images, my_features)

Features come from any callable: uint8 images [B, 3, H, W] to [B, D], or to ([B, D], class logits [B, K]).
"""

from mage_fast.evaluation.images import PNGFolder
from mage_fast.evaluation.inception import load_inception
from mage_fast.evaluation.reconstruction import score_reconstructions
from mage_fast.evaluation.scores import (
    Score,
    compare,
    fid,
    inception_score,
    kernel_distance,
    precision_recall,
)
from mage_fast.evaluation.statistics import (
    Accumulator,
    Extract,
    FeatureStatistics,
    read_statistics,
    write_statistics,
)

__all__ = [
    "Accumulator",
    "Extract",
    "FeatureStatistics",
    "PNGFolder",
    "Score",
    "compare",
    "fid",
    "inception_score",
    "kernel_distance",
    "load_inception",
    "precision_recall",
    "read_statistics",
    "score_reconstructions",
    "write_statistics",
]
