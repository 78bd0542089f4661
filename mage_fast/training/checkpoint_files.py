"""A flat dict of tensors as safetensors files: one, or one a rank; read by any number of ranks.

By torch's distributed checkpoint (DCP) with its safetensors storage, which pickles nothing to the disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

#: The one file of a state that is not sharded.
WHOLE_NAME = "state.safetensors"


def write_whole(folder: Path, tensors: Mapping[str, Tensor], *, leads: bool) -> None:
    """One file with whole tensors, written by the rank that leads; all ranks call.

    DTensors are gathered one at a time, so no device holds more than its share and one whole tensor.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    whole: dict[str, Tensor] = {}
    for key, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if leads:
            whole[key] = full.cpu()
    if leads:
        save_file(_unshared(whole), folder / WHOLE_NAME)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None) -> None:
    """A file a rank with its part of the DTensors; other tensors are shared out. All ranks call.

    Raises:
        OSError, SafetensorError: on all ranks alike, a rank could not write.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _failure_of_a_rank():
        dcp.save(_unshared(tensors), storage_writer=writer, process_group=group)


def read_index(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor in a folder's safetensors files, of which only the headers are read.

    Raises:
        OSError, SafetensorError, KeyError, ValueError: a file is missing, truncated or damaged.
    """
    index = {}
    for key, found in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(found, TensorStorageMetadata)
        if sum(part.sizes.numel() for part in found.chunks) != found.size.numel():
            raise ValueError(f"parts of {key} are missing")
        index[key] = found.size, found.properties.dtype
    return index


@torch.no_grad()
def read_into(
    folder: Path, tensors: Mapping[str, Tensor], group: ProcessGroup | None, *, alone: bool
) -> None:
    """Fill tensors, plain ones or DTensors of any sharding, with the saved ones; each rank reads its part.

    Args:
        folder: of safetensors files.
        tensors: with the names and shapes of saved ones.
        group: whose ranks call.
        alone: no other rank calls.

    Raises:
        OSError, SafetensorError: on all ranks alike, a rank could not read.
    """
    with warnings.catch_warnings(), _failure_of_a_rank():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        reader = HuggingFaceStorageReader(str(folder))
        dcp.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=alone)


@contextmanager
def _failure_of_a_rank() -> Iterator[None]:
    """Raise, on all ranks, what the first of them met and DCP has told the others."""
    try:
        yield
    except dcp.CheckpointException as error:
        failure, _ = error.failures[min(error.failures)]
        raise failure from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory (tied weights): safetensors refuses others."""
    seen: set[tuple[torch.device, int]] = set()
    out = {}
    for key, value in tensors.items():
        value = value.contiguous()
        local = value.to_local() if isinstance(value, DTensor) else value
        storage = (local.device, local.untyped_storage().data_ptr())
        out[key] = value.clone() if local.numel() and storage in seen else value
        seen.add(storage)
    return out
