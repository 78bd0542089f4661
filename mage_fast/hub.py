"""Folders of models as a model hub takes them: a model card beside the weights, download and upload."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mage_fast import storage
from mage_fast.config import ClassifierConfig, MAGEConfig, TokenizerConfig
from mage_fast.errors import CheckpointError, InputError
from mage_fast.files import atomic_path
from mage_fast.optional import optional

CARD_NAME = "README.md"
#: ``owner/name``, as huggingface_hub wants it; neither part begins or ends with a dot or a dash.
_REPO_ID = re.compile(r"\w+(?:[.-]+\w+)*/\w+(?:[.-]+\w+)*")
_PAPER = "[MAGE (Li et al., CVPR 2023)](https://arxiv.org/abs/2211.09117)"

Config = MAGEConfig | TokenizerConfig | ClassifierConfig


class HubMixin:
    """``save_pretrained`` and ``push_to_hub`` of a module that has a ``config``."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and a model card ``README.md``.

        An earlier pair of configuration and weights is replaced whole or kept. A card that is just as an
        earlier save wrote it is replaced as well; one that somebody else wrote or changed stays.

        Raises:
            CheckpointError: the folder cannot be made or written.
        """
        save(cast(nn.Module, self), folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        token: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a model hub, in one commit.

        The repository is made if it is not there. A card that it has stays as it is.

        Args:
            repo_id: ``"owner/name"``.
            license: the hub's identifier of one, as ``"cc-by-nc-4.0"``, for the card.
            private: of a new repository; the hub's default for its owner otherwise.
            revision: branch; the main one by default.
            commit_message: first line of the commit.
            token: of the hub's access; what ``hf auth login`` left by default.

        Returns:
            The address of the commit.

        Raises:
            InputError: the extra ``hub`` is not installed, or no ``owner/name``.
            CheckpointError: no access, no network, or another answer of the hub.
        """
        if not _REPO_ID.fullmatch(repo_id):
            raise InputError(f"push_to_hub: repo_id is {repo_id!r}, wanted owner/name")
        hub = optional("huggingface_hub", extra="hub")
        with tempfile.TemporaryDirectory() as folder, _reaching(f"push_to_hub: {repo_id}", revision):
            write_card(cast(Any, self).config, folder, license=license)
            self.save_pretrained(folder)
            api = hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            has_card = api.file_exists(repo_id, CARD_NAME, revision=revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                ignore_patterns=[CARD_NAME] if has_card else None,
            )
        return str(commit.commit_url)


def local_path(path: str | Path, revision: str | None = None) -> Path:
    """A file or folder of this name, or the downloaded one of a hub's repository ``"owner/name"``.

    A :class:`~pathlib.Path` is never looked for on a hub.

    Args:
        path: what ``from_pretrained`` got.
        revision: branch, tag or commit of the repository; the main branch by default.

    Raises:
        InputError: the extra ``hub`` is not installed, or a revision of a path.
        CheckpointError: no such repository or revision, no access, no network.
    """
    is_repository = isinstance(path, str) and not Path(path).exists() and _REPO_ID.fullmatch(path)
    if not is_repository:
        if revision is not None:
            raise InputError(
                f"{path}: revision is {revision!r}, wanted none: this is a path, no repository owner/name"
            )
        return Path(path)
    try:
        hub = optional("huggingface_hub", extra="hub")
    except InputError as error:
        raise InputError(f"{path}: no such file or folder here; on the hub: {error}") from error
    with _reaching(f"{path}: no such file or folder here", revision):
        files = [storage.CONFIG_NAME, storage.WEIGHTS_NAME]
        return Path(hub.snapshot_download(path, revision=revision, allow_patterns=files))


@contextmanager
def _reaching(where: str, revision: str | None) -> Iterator[None]:
    """What the hub's client raises, as one line that begins with ``where``."""
    errors = optional("huggingface_hub.errors", extra="hub")  # hub.errors is there after an import only
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{where}; the repository's owner gives access on request, at its page"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where}; the hub has no such repository, or it is private (hf auth login logs in)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{where}; the repository has no revision {revision!r}") from error
    except errors.LocalTokenNotFoundError as error:
        raise CheckpointError(f"{where}; nobody is logged in to the hub (hf auth login)") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise CheckpointError(f"{where}; the hub refuses: {_one_line(error)}") from error
    except (errors.HTTPError, OSError) as error:
        raise CheckpointError(f"{where}; the hub cannot be reached ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def save(model: nn.Module, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
    """:func:`mage_fast.storage.save_pretrained` with a card, see :meth:`HubMixin.save_pretrained`."""
    path, config = Path(folder) / CARD_NAME, cast(Any, model.config)
    keep = path.exists() and not _is_of_an_earlier_save(path, type(config))
    storage.save_pretrained(model, folder, state)
    if not keep:
        write_card(config, folder)


def _is_of_an_earlier_save(path: Path, kind: type[Config]) -> bool:
    """Whether a card says what one of the configuration beside it says, and nothing else."""
    try:
        earlier = kind.from_dict(storage.read_config(path.parent))
        return path.read_text(encoding="utf-8") == card(earlier)
    except (CheckpointError, ValueError, OSError):
        return False


def write_card(config: Config, folder: str | Path, *, license: str | None = None) -> None:
    """Write the card of a model into a folder that exists.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = Path(folder) / CARD_NAME
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(card(config, license=license), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def card(config: Config, *, license: str | None = None) -> str:
    """A model card: the hub's metadata, what the model is, and how it is loaded."""
    metadata: dict[str, Any] = {"library_name": "mage-fast"}
    if license is not None:
        metadata["license"] = license
    if isinstance(config, TokenizerConfig):
        metadata |= {"pipeline_tag": "image-to-image", "tags": ["vqgan", "image-tokenizer", "mage"]}
        title, text = _tokenizer_text(config)
    elif isinstance(config, ClassifierConfig):
        metadata |= {"pipeline_tag": "image-classification", "tags": ["mage", "vision"]}
        title, text = _classifier_text(config)
    else:
        metadata |= {
            "pipeline_tag": (
                "image-feature-extraction"
                if config.encoder_input == "features"
                else "unconditional-image-generation"
            ),
            "tags": ["mage", "masked-image-modeling", "image-feature-extraction", "vision"],
        }
        title, text = _model_text(config)
    # a JSON value is a YAML value
    header = "".join(f"{name}: {json.dumps(value)}\n" for name, value in metadata.items())
    return f"---\n{header}---\n\n# {title}\n\n{text}\n"


def _model_text(config: MAGEConfig) -> tuple[str, str]:
    classes = "It generates without class labels."
    if config.num_classes is not None:
        classes = f"It generates images of {config.num_classes} classes, or without a class."
    if config.encoder_input == "features":
        classes = "It sees features of images before they are tokens, and does not generate."
    side = config.tokenizer.image_size if config.tokenizer else "any"
    codes, decoder = config.codebook_size, f"{config.decoder_depth} of width {config.decoder_width}"
    own = "" if config.tokenizer else ", tokenizer=yours"
    return (
        "MAGE",
        f"""{_PAPER}: one model that generates images and learns their representations.
Images of {side} pixels a side are {config.grid_size} x {config.grid_size} tokens of a codebook of {codes}.
The encoder has {config.encoder_depth} blocks of width {config.encoder_width}, the decoder {decoder}.
{classes}

```python
import mage_fast

model = mage_fast.MAGE.from_pretrained("owner/name"{own})  # or the path of this folder
images = mage_fast.generate(model, 16, seed=0)
features = model.features(images.clamp(0, 1))
```

## Training data and limits

To be written by who trained it.""",
    )


def _tokenizer_text(config: TokenizerConfig) -> tuple[str, str]:
    side = config.image_size
    return (
        "VQGAN tokenizer",
        f"""The convolutional tokenizer of {_PAPER}. Images of {side} x {side} pixels become
{config.grid_size} x {config.grid_size} tokens of a codebook of {config.codebook_size}, and tokens images.

```python
import mage_fast

tokenizer = mage_fast.VQGAN.from_pretrained("owner/name")  # or the path of this folder
ids = tokenizer.encode(images)  # [B, 3, {side}, {side}] in [0, 1]
images = tokenizer.decode(ids)
```

## Training data and limits

To be written by who trained it.""",
    )


def _classifier_text(config: ClassifierConfig) -> tuple[str, str]:
    own = "" if config.mage.tokenizer else ", tokenizer=yours"
    return (
        "MAGE classifier",
        f"""A classifier of {config.num_classes} classes: the encoder of {_PAPER}, fine-tuned.

```python
import mage_fast

classifier = mage_fast.MAGEClassifier.from_pretrained("owner/name"{own})  # or the path of this folder
logits = classifier(images)  # [B, {config.num_classes}] of images [B, 3, H, W] in [0, 1]
```

## Training data and limits

To be written by who trained it.""",
    )
