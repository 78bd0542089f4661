"""Initialization from a trained model, whose class slots may be others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mage_fast import checkpoint, storage
from mage_fast.config import MAGEConfig
from mage_fast.contrastive import without_projector
from mage_fast.errors import CheckpointError
from mage_fast.model import MAGE

_TOKENIZER = "tokenizer."
#: What a checkpoint's numbers mean and its tensors' shapes do not tell.
_SAME = ("codebook_size", "encoder_heads", "decoder_heads", "padding", "encoder_input")
#: Tensors with a row for each id of the vocabulary, and the dimension of the rows.
_VOCABULARY = {"embedding.word_embeddings.weight": 0, "head.bias": 2}


def initialize_from(model: MAGE, path: str | Path) -> None:
    """Load a trained model's weights in place, to train on with classes it did not know.

    Ids of codes, [M] and the unconditional class keep their embeddings, wherever they stand in the two
    vocabularies. A class starts as a copy of the unconditional class: the first position has held that
    vector in all of the training before, so whatever the label, the model starts as the trained one and
    has only to learn in what a class differs; a random vector it has never seen there. Classes keep what
    they learnt where both models have equally many.

    Args:
        model: not sharded yet. Its masking law, its dropouts and its mode of the encoder may be others than
            the trained model's; a :class:`~mage_fast.contrastive.MAGEC` keeps its projector.
        path: a folder of :meth:`mage_fast.MAGE.save_pretrained`, or a published ``.pth``.

    Raises:
        CheckpointError: missing or truncated, other sizes, another tokenizer; the model is as it was.
    """
    state, config = _read(model, path)
    for name in _SAME:
        got, wanted = getattr(config, name), getattr(model.config, name)
        if got != wanted:
            raise CheckpointError(f"{path}: {name} is {got!r}, wanted the model's {wanted!r}")
    _check_tokenizer(model, state, path)
    rows_V = _rows(config, model.config)
    for name, dimension in _VOCABULARY.items():
        if name in state and state[name].dim() > dimension:
            _check_vocabulary(name, state[name].shape[dimension], config, path)
            state[name] = state[name].index_select(dimension, rows_V)
    mine = model.state_dict()
    projector = {name: mine[name] for name in mine.keys() - without_projector(mine).keys()}
    storage.load_state(model, state | projector, path)


def _read(model: MAGE, path: str | Path) -> tuple[dict[str, Tensor], MAGEConfig]:
    """The checkpoint under our names; what the shapes of a published one do not tell is the model's."""
    if not Path(path).is_dir():
        published, mine = checkpoint.load_published(path), model.config
        unseen: dict[str, Any] = {name: getattr(mine, name) for name in _SAME}
        unseen["encoder_input"] = "tokens"  # there is no other in that layout
        if mine.tokenizer is not None:
            unseen["norm_groups"] = mine.tokenizer.norm_groups
        config = checkpoint.infer_config(published, source=path, **unseen)
        return checkpoint.from_published(published, config, source=path)
    values, state = storage.load_pretrained(path)
    if "encoder_width" not in values:
        raise CheckpointError(f"{path}: holds no model of tokens, wanted a folder of MAGE.save_pretrained")
    try:
        return state, MAGEConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {storage.CONFIG_NAME}: {error}") from error


def _check_tokenizer(model: MAGE, state: Mapping[str, Tensor], path: str | Path) -> None:
    mine = {name: x for name, x in model.state_dict().items() if name.startswith(_TOKENIZER)}
    theirs = {name: x for name, x in state.items() if name.startswith(_TOKENIZER)}
    if bool(mine) != bool(theirs):
        has = "holds a tokenizer and the model none" if theirs else "holds no tokenizer and the model one"
        raise CheckpointError(f"{path}: {has}, wanted the same one in both")
    storage.check_state(theirs, {name: tuple(x.shape) for name, x in mine.items()}, path)
    for name, x in theirs.items():
        if not torch.equal(x.to(mine[name]), mine[name]):
            raise CheckpointError(
                f"{path}: its tokenizer is another than the model's ({name} differs), so its ids mean other "
                "things; build the model with the checkpoint's tokenizer"
            )


def _check_vocabulary(name: str, got: int, config: MAGEConfig, path: str | Path) -> None:
    if got != config.vocabulary_size:
        raise CheckpointError(f"{path}: {name} has {got} ids, its configuration {config.vocabulary_size}")


def _rows(old: MAGEConfig, new: MAGEConfig) -> Tensor:
    """For each id of the new vocabulary the id of the old one whose row it takes."""
    rows_V = torch.full((new.vocabulary_size,), old.unconditional_class_id)
    rows_V[: new.codebook_size] = torch.arange(old.codebook_size)
    if new.num_classes is not None and new.num_classes == old.num_classes:
        classes = torch.arange(new.num_classes)
        rows_V[new.codebook_size + classes] = old.codebook_size + classes
    rows_V[new.unconditional_class_id] = old.unconditional_class_id
    rows_V[new.mask_token_id] = old.mask_token_id
    return rows_V
