"""torch-fidelity's InceptionV3: the features of published FIDs."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from torch import nn

from mage_fast.errors import InputError
from mage_fast.optional import optional
from mage_fast.storage import read_safetensors, read_torch

#: Read by FID, KID, precision and recall; by the Inception score.
LAYERS = ["2048", "logits_unbiased"]


def load_inception(weights: Path | str | None = None, device: torch.device | str = "cpu") -> nn.Module:
    """The InceptionV3 of 2015-12-05: uint8 images [B, 3, H, W] to features [B, 2048] and logits [B, 1008].

    It scales images to 299 x 299 as TensorFlow 1 did; they come in at their own size.

    Args:
        weights: a local file of torch-fidelity's weights, ``.pth`` or ``.safetensors``; without, they are
            fetched once from torch-fidelity's releases into torch's hub folder.
        device: of the network.

    Raises:
        InputError: torch-fidelity is missing, the weights cannot be fetched or are of something else.
        CheckpointError: the file is missing, damaged, or holds pickled objects.
    """
    module = optional("torch_fidelity.feature_extractor_inceptionv3", extra="evaluate")
    path = _fetched(module.URL_INCEPTION_V3) if weights is None else Path(weights)
    state = (read_safetensors if path.suffix == ".safetensors" else read_torch)(path)
    # torch-fidelity would unpickle any object of its file: it gets a copy of what was read as tensors only
    copy = BytesIO()
    torch.save(state, copy)
    copy.seek(0)
    try:
        network: nn.Module = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", list(LAYERS), feature_extractor_weights_path=copy
        )
    except (RuntimeError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not InceptionV3's weights ({said})") from error
    return network.to(device)


def _fetched(url: str) -> Path:
    """The file of a URL in torch's hub folder, downloaded where it is not there yet."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # the name ends with the hash's first digits, as torch.hub's files do
            digits = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=digits, progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"features 'inception': {url} cannot be fetched ({error}): fetch it elsewhere and give "
            "--features inception:FILE"
        ) from error
    return path
