"""The features that a name on the command line stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mage_fast.errors import InputError
from mage_fast.evaluation import Extract, load_inception
from mage_fast.recipes.classifier import DigitClassifier
from mage_fast.recipes.demo import images_of
from mage_fast.recipes.loading import load_model
from mage_fast.training.run_state import module_fingerprint

KNOWN_FEATURES = "inception, inception:FILE, digits, model:PATH, torchscript:FILE"


@dataclass(frozen=True)
class Extractor:
    """Features with what tells them from others."""

    #: As "inception".
    name: str
    #: SHA-256 of the weights.
    fingerprint: str
    #: uint8 images [B, 3, H, W] to features, or to features and class logits.
    extract: Extract
    #: Features an image.
    width: int


def open_extractor(spec: str, image_size: int, device: torch.device) -> Extractor:
    """The features that a string names, of square uint8 images of ``image_size``.

    * ``inception``, or ``inception:FILE`` with local weights; see :func:`.load_inception`.
    * ``digits``: the demo's classifier, trained on scikit-learn's digits, in seconds and with one seed;
      another machine's last digits may differ, which the fingerprint tells.
    * ``model:PATH``: a MAGE's mean-pooled encoder features, of images of its size.
    * ``torchscript:FILE``: uint8 images to features, or to (features, logits). No Python of the file runs;
      still, torch says to load only what one trusts. Files of ``torch.export`` are not taken: reading one
      unpickles Python objects.

    Raises:
        InputError: an unknown name, a missing file, a model of other images, features of a wrong shape.
        CheckpointError: weights that are damaged or of something else.
    """
    kind, _, path = spec.partition(":")
    if spec == "digits":
        fingerprint, extract = _digits(image_size, device)
    elif kind == "inception" and (path or spec == kind):
        network = load_inception(Path(path).expanduser() if path else None, device)
        fingerprint, extract = module_fingerprint(network), network
    elif kind == "model" and path:
        fingerprint, extract = _model(Path(path).expanduser(), image_size, device)
    elif kind == "torchscript" and path:
        fingerprint, extract = _torchscript(Path(path).expanduser(), device)
    else:
        raise InputError(f"unknown features {spec!r}, wanted one of {KNOWN_FEATURES}")
    return Extractor(kind, fingerprint, extract, _width(spec, extract, image_size, device))


@torch.no_grad()
def _width(spec: str, extract: Extract, image_size: int, device: torch.device) -> int:
    """Asked of two grey images, before an hour is spent on fifty thousand."""
    images = torch.full((2, 3, image_size, image_size), 128, dtype=torch.uint8, device=device)
    try:
        out = extract(images)
    except (RuntimeError, TypeError) as error:
        said = " ".join(str(error).split())[-200:]
        raise InputError(
            f"features {spec!r} do not take uint8 images {tuple(images.shape)} ({said})"
        ) from error
    parts = list(out) if isinstance(out, tuple) else [out]
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in parts]
    if len(parts) > 2 or not all(isinstance(x, Tensor) and x.ndim == 2 and len(x) == 2 for x in parts):
        raise InputError(
            f"features {spec!r}: 2 images gave {shapes}, wanted (2, D), or that and (2, K) logits"
        )
    return int(parts[0].shape[1])


def _digits(image_size: int, device: torch.device) -> tuple[str, Extract]:
    """Trained on the CPU, so that every device has the same features."""
    with torch.random.fork_rng(devices=[]):
        classifier = DigitClassifier.trained(
            *images_of("train", image_size, torch.device("cpu")), seed=0
        ).requires_grad_(False)
    fingerprint = module_fingerprint(classifier)
    classifier.to(device)

    def extract(images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        features_BD = classifier.body(images_B3HW.float() / 255)
        return features_BD, classifier.head(features_BD)

    return fingerprint, extract


def _model(path: Path, image_size: int, device: torch.device) -> tuple[str, Extract]:
    model = load_model(path, device)
    tokenizer = model.config.tokenizer
    if model.tokenizer is None or tokenizer is None:
        raise InputError(f"features 'model:{path}': the model has no tokenizer to read images with")
    if tokenizer.image_size != image_size:
        raise InputError(
            f"features 'model:{path}' are of images of {tokenizer.image_size} pixels a side, these have "
            f"{image_size}"
        )
    return module_fingerprint(model), lambda images_B3HW: model.features(images_B3HW.float() / 255)


def _torchscript(path: Path, device: torch.device) -> tuple[str, Extract]:
    try:
        content = path.read_bytes()
        program: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]] = torch.jit.load(
            str(path), map_location=device
        ).eval()
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"features 'torchscript:{path}': not a whole TorchScript file ({said})") from error
    return hashlib.sha256(content).hexdigest(), program
