"""The processes of a run: their group, what they decide together, and which of them is lost.

Processes are torchrun's, one a device. They keep in step by the collectives of DDP or FSDP2; what is here
are small values on the host, over gloo, beside the gradients' own group.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mage_fast.contrastive import without_projector
from mage_fast.errors import InputError, TrainingError
from mage_fast.model import MAGE
from mage_fast.training.optim import Ema

#: How parameters and gradients are spread over processes: all of them everywhere, or a part in each.
Parallel = Literal["ddp", "fsdp"]
#: Seconds that processes have to answer a roll call after one of them failed.
ROLL_CALL = 10.0
#: What errors of a collective say whose other side has gone; NCCL's have a type of their own.
_COMMUNICATION = ("gloo", "Connection closed", "Connection reset", "Timed out", "timed out", "Broken pipe")


@dataclass
class Processes:
    """This process among those of a run; all alone by default.

    ``rank`` counts from 0 over ``count`` processes, ``device`` is this one's own.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    #: Where processes leave word of their failures; None where there is one process.
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes logs and checkpoints' names."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes; waits for them."""
        if self.count == 1 or not values:
            return list(values)
        values_N = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(values_N)
        return values_N.tolist()

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over all processes; waits for them."""
        return [value / self.count for value in self.sum(values)]

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """Turn the failure of a collective into a :class:`TrainingError` that names the processes at fault.

        A process that fails here leaves word of it; whoever finds a collective broken waits for word of
        the others and names those that left none, or what they left.
        """
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            if self.store is None:
                raise
            broken = _is_communication(error)
            word = "" if broken else f"{type(error).__name__}: {' '.join(str(error).split())}"
            try:
                self.store.set(f"failed/{self.rank}", word)
                if not broken:
                    raise
                silent, failed = self._roll_call()
            except dist.DistError:  # the store went with the process that keeps it
                silent, failed = [], {}
            raise TrainingError(self._verdict(silent, failed, error)) from error

    def _roll_call(self) -> tuple[list[int], dict[int, str]]:
        """The ranks that leave no word of themselves, and the words of those that failed by themselves."""
        assert self.store is not None
        waited_until = time.monotonic() + ROLL_CALL
        silent, words = set(range(self.count)), {}
        while silent and time.monotonic() < waited_until:
            for rank in sorted(silent):
                if self.store.check([f"failed/{rank}"]):
                    words[rank] = self.store.get(f"failed/{rank}").decode()
                    silent.remove(rank)
            time.sleep(0.05)
        return sorted(silent), {rank: word for rank, word in words.items() if word}

    def _verdict(self, silent: list[int], failed: dict[int, str], error: BaseException) -> str:
        of = f"of {self.count} (this is rank {self.rank})"
        if failed:
            return f"stopped, as rank {', '.join(f'{rank} failed: {word}' for rank, word in failed.items())}"
        if silent:
            names = ", ".join(map(str, silent))
            return f"rank {names} {of} died or hangs: it does not answer. The same command resumes the run"
        return f"ranks lost touch with each other {of}: {' '.join(str(error).split())}"


def _is_communication(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(part in str(error) for part in _COMMUNICATION)


class Agreement:
    """Values that every process takes the highest of, without waiting for the slowest one.

    ``exchange`` posts this step's values and gives the highest of all processes' values of the step
    *before*: their exchange has had a step's time. So all processes learn the same at the same step. One
    process alone gets its values back at once.
    """

    def __init__(self, processes: Processes) -> None:
        self._alone = processes.count == 1
        self._posted: tuple[torch.Tensor, dist.Work] | None = None

    def exchange(self, values: Sequence[float]) -> list[float]:
        """The highest of all processes' values, those of the last call; zeros at the first one."""
        if self._alone:
            return list(values)
        before = self.settle() or [0.0] * len(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._posted = tensor, work
        return before

    def wait(self) -> None:
        """Wait until all processes have posted what this one has: whoever is lost is met here, and named."""
        if self._posted is not None:
            self._posted[1].wait()

    def settle(self) -> list[float] | None:
        """The highest of the values last posted, waiting for them; None if there are none."""
        if self._posted is None:
            return None
        tensor, work = self._posted
        work.wait()
        self._posted = None
        return tensor.tolist()


@contextmanager
def torchrun_processes(device: torch.device, timeout_seconds: float = 1800.0) -> Iterator[Processes]:
    """The processes of torchrun with their group (gloo for the CPU, NCCL for CUDA), or this one alone.

    Args:
        device: of any process; on CUDA each takes the one of its number on its machine.
        timeout_seconds: how long a collective waits for a process before the run is given up.

    Raises:
        InputError: more processes on this machine than it has CUDA devices.
        TrainingError: a process is lost, see :meth:`Processes.naming_the_lost`.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield Processes(device=device)
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        number, there = dist.get_node_local_rank(), torch.cuda.device_count()
        if number >= there:
            raise InputError(f"process {number} of this machine has no CUDA device, which has {there}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
    store.set_timeout(timedelta(seconds=timeout_seconds))
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout_seconds),
    )
    processes = Processes(rank, count, device, dist.PrefixStore("words", store))
    with processes.naming_the_lost():
        yield processes
    # Not after an error: NCCL's group waits for ranks that will not come, and nobody would read the error.
    # What it holds ends with the process.
    dist.destroy_process_group()


def parallelized(model: MAGE, processes: Processes, how: Parallel) -> DistributedDataParallel | None:
    """Spread a model over processes; the wrapper to call in its place, if there is one.

    ``"ddp"``: every process has all parameters, and the gradients' mean. ``"fsdp"``: every process keeps a
    part of each parameter, gradient and optimizer state, and gathers a block's parameters to compute it; make
    the optimizer after this. One process alone is left as it is.
    """
    if processes.count == 1:
        return None
    if how == "ddp":
        return replicated(model, processes)
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    frozen = {p for p in model.parameters() if not p.requires_grad}
    blocks: list[nn.Module] = [*model.encoder.blocks, *model.decoder.blocks]
    # it warns of views whatever becomes of them; no module's output is written in place here
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        # A block's norms are read by its neighbours too (blocks.py): they belong to the model's own group.
        fully_shard([block.attention, block.mlp], mesh=mesh)  # type: ignore[list-item]
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    return None


def replicated(model: nn.Module, processes: Processes) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` of a model; None for one process alone."""
    if processes.count == 1:
        return None
    on = [processes.device] if processes.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=on)


@contextmanager
def whole_model(model: MAGE, processes: Processes, ema: Ema | None = None) -> Iterator[MAGE | None]:
    """Within the block, in the first process, a plain model with all its weights, or with their average.

    The other processes get None, and wait for nothing after they gave their parts. A model that is not
    sharded is lent itself; of a sharded one this is a copy, a :class:`MAGE` whatever was trained.
    """
    if not isinstance(model, FSDPModule):
        with nullcontext() if ema is None or not processes.is_main else ema.applied_to(model):
            yield model if processes.is_main else None
        return
    state = {}
    for name, x in (model if ema is None else ema).state_dict().items():
        if name.startswith("tokenizer."):  # lent as it is
            continue
        full = x.full_tensor() if isinstance(x, DTensor) else x
        if processes.is_main:
            state[name] = full.detach()
    if not processes.is_main:
        yield None
        return
    with torch.device("meta"):
        plain = MAGE(model.config, model.tokenizer)
    lacking = plain.load_state_dict(without_projector(state), strict=False, assign=True)
    assert not lacking.unexpected_keys
    assert all(name.startswith("tokenizer.") for name in lacking.missing_keys)
    yield plain.train(model.training)
