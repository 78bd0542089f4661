"""What scores read of a set of images: features' mean and covariance, and the features of up to 50,000.

Shape suffixes: N images, B of a batch, D features, K classes.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.files import atomic_path

#: Images to features, or to features and class logits.
Extract = Callable[[UInt8[Tensor, "B 3 H W"]], Tensor | tuple[Tensor, Tensor]]
#: Rows of features that are kept of a large reference, evenly spread over it.
KEPT_FEATURES = 50_000
_BROKEN_NPZ = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class FeatureStatistics:
    """Statistics of a set of images, on the CPU.

    ``mean_D`` and ``covariance_DD`` (over N - 1) are float64 and of all ``count`` images; ``features_ND`` and
    ``logits_NK`` are float32 and of the kept ones, None where they are not known. ``count`` is 0 where a file
    of someone else's does not say it.
    """

    mean_D: Float[Tensor, " D"]
    covariance_DD: Float[Tensor, "D D"]
    count: int
    features_ND: Float[Tensor, "N D"] | None = None
    logits_NK: Float[Tensor, "N K"] | None = None

    @classmethod
    def of(
        cls,
        batches: Iterable[UInt8[Tensor, "B 3 H W"]],
        extract: Extract,
        *,
        device: torch.device | str = "cpu",
    ) -> FeatureStatistics:
        """Of batches of images, all features kept; for parts of them see :class:`Accumulator`."""
        accumulator = Accumulator(extract, device)
        for images_B3HW in batches:
            accumulator.update(images_B3HW)
        return accumulator.result()


class Accumulator:
    """Statistics of images that come a batch at a time; no image is kept.

    Mean and covariance are merged batch by batch in float64 (Chan et al. 1979), each batch centred by itself:
    a large mean costs the covariance no digits.

    Args:
        extract: see :data:`Extract`; it gets uint8 images on ``device``.
        device: where features are computed and summed.
        keep: features that are kept, evenly spread over ``total`` images; all by default.
        total: images to come, where not all are kept.
    """

    def __init__(
        self,
        extract: Extract,
        device: torch.device | str = "cpu",
        *,
        keep: int | None = None,
        total: int = 1,
    ) -> None:
        self._extract, self._device = extract, torch.device(device)
        self._keep, self._total = keep, total
        self.count = 0
        self._mean_D: Tensor = torch.zeros((), dtype=torch.float64, device=self._device)
        self._scatter_DD = self._mean_D
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    @torch.no_grad()
    def update(self, images_B3HW: UInt8[Tensor, "B 3 H W"]) -> None:
        """Add a batch.

        Raises:
            InputError: images that are not uint8 RGB; features that are not finite, or of another shape.
        """
        if images_B3HW.dtype != torch.uint8 or images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3:
            raise InputError(
                f"features: images are {images_B3HW.dtype} of shape {tuple(images_B3HW.shape)}, wanted uint8 "
                "(B, 3, H, W)"
            )
        batch = len(images_B3HW)
        if not batch:
            return
        out = self._extract(images_B3HW.to(self._device))
        features_BD, logits_BK = out if isinstance(out, tuple) else (out, None)
        wanted = self._mean_D.shape if self.count else features_BD.shape[1:]
        if features_BD.ndim != 2 or len(features_BD) != batch or features_BD.shape[1:] != wanted:
            width = wanted[0] if self.count else "D"
            raise InputError(
                f"features: {batch} images gave shape {tuple(features_BD.shape)}, wanted ({batch}, {width})"
            )
        x_BD = features_BD.double()
        kept_BD = features_BD.float().cpu()
        logits_BK = None if logits_BK is None else logits_BK.float().cpu()
        if not kept_BD.isfinite().all() or not (logits_BK is None or logits_BK.isfinite().all()):
            raise InputError(
                f"features: those of images {self.count} to {self.count + batch - 1} hold NaN or infinity"
            )
        mean_D, share = x_BD.mean(0), batch / (self.count + batch)
        difference_D = mean_D - self._mean_D
        centred_BD = x_BD - mean_D
        self._scatter_DD = (
            self._scatter_DD
            + centred_BD.T @ centred_BD
            + torch.outer(difference_D, difference_D) * (self.count * share)
        )
        self._mean_D = self._mean_D + difference_D * share
        chosen_B = self._chosen(batch)
        self._features.append(kept_BD[chosen_B])
        if logits_BK is not None:
            self._logits.append(logits_BK[chosen_B])
        self.count += batch

    def _chosen(self, batch: int) -> Bool[Tensor, " B"]:
        """Which of the next images' features are kept."""
        if self._keep is None:
            return torch.ones(batch, dtype=torch.bool)
        steps = torch.arange(self.count, self.count + batch + 1) * self._keep // self._total
        return steps.diff() > 0

    def result(self) -> FeatureStatistics:
        """The statistics of all images so far.

        Raises:
            InputError: fewer than two images.
        """
        if self.count < 2:
            raise InputError(f"features: of {self.count} images, wanted two or more for a covariance")
        return FeatureStatistics(
            self._mean_D.cpu(),
            (self._scatter_DD / (self.count - 1)).cpu(),
            self.count,
            torch.cat(self._features),
            torch.cat(self._logits) if self._logits else None,
        )


def write_statistics(
    path: Path | str, statistics: FeatureStatistics, convention: Mapping[str, Any] | None = None
) -> None:
    """A NumPy file: ``mu`` and ``sigma`` as other programs read them, with what they are statistics of.

    Args:
        path: of the ``.npz`` file, which appears whole or not at all.
        statistics: ``features`` and ``count`` are saved too, logits are not.
        convention: plain values that :func:`read_statistics` gives back.
    """
    arrays: dict[str, Any] = {"mu": statistics.mean_D.numpy(), "sigma": statistics.covariance_DD.numpy()}
    arrays["count"] = np.array(statistics.count)
    if statistics.features_ND is not None:
        arrays["features"] = statistics.features_ND.numpy()
    if convention is not None:
        arrays["convention"] = np.array(json.dumps(dict(convention), sort_keys=True))
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: Path | str) -> tuple[FeatureStatistics, dict[str, Any] | None]:
    """The statistics of an ``.npz`` file, ours or of ADM's layout, read without pickle.

    ADM's files (``VIRTUAL_imagenet256_labeled.npz``) have ``mu`` and ``sigma`` of all training images and in
    ``arr_0`` some images, which are not read.

    Returns:
        The statistics, and the convention that was saved with them; None for a file of another program.

    Raises:
        InputError: no such file, a damaged one, arrays that are missing, not finite or of other shapes.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files) if isinstance(archive, np.lib.npyio.NpzFile) else []
            for name in ("mu", "sigma", "features", "count", "convention"):
                if name in names:
                    arrays[name] = archive[name]
    except _BROKEN_NPZ as error:
        raise InputError(f"{path}: not a whole .npz file of statistics ({_one_line(error)})") from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise InputError(f"{path} holds {', '.join(names) or 'no named arrays'}, wanted mu and sigma")
    mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise InputError(f"{path}: mu has shape {mu.shape} and sigma {sigma.shape}, wanted (D,) and (D, D)")
    for name, values in (("mu", mu), ("sigma", sigma), ("features", features)):
        if values is not None and not (
            np.issubdtype(values.dtype, np.floating) and np.isfinite(values).all()
        ):
            raise InputError(f"{path}: {name} is {values.dtype} with values that are not finite numbers")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu)):
        raise InputError(f"{path}: features have shape {features.shape}, wanted (N, {len(mu)})")
    try:
        convention = json.loads(str(arrays["convention"])) if "convention" in arrays else None
        count = int(arrays.get("count", 0))
        if convention is not None and not isinstance(convention, dict):
            raise TypeError(type(convention).__name__)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: count or convention is not what mage_fast writes ({error})") from error
    statistics = FeatureStatistics(
        torch.from_numpy(mu.astype(np.float64)),
        torch.from_numpy(sigma.astype(np.float64)),
        count,
        None if features is None else torch.from_numpy(features.astype(np.float32)),
    )
    return statistics, convention


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
