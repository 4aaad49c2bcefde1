"""Ranks: several processes, started by torchrun, that share the calibration text.

Every rank runs its own samples through every layer; statistics meet in one sum; rank 0 prunes,
writes, and sends the pruned weights to the others.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gblm.errors import MachineError, UsageError

T = TypeVar("T")
# A layer of a large model takes minutes, never an hour; a dead peer is noticed at once anyway.
TIMEOUT = timedelta(hours=1)


@dataclass(frozen=True)
class Ranks:
    """Ranks know this process among `size`, from 0, and the device of its group's messages."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Tell whether this is the process that prunes and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Give this rank its part: every `size`-th item."""
        return list(items[self.rank :: self.size])

    def mean(self, mean: Tensor, count: int) -> tuple[Tensor, int]:
        """Take the mean over all ranks' samples, from each rank's mean and number of samples.

        Each rank adds in its own order, so the sum differs from a single process's in rounding.
        """
        if self.size == 1:
            return mean, count
        total = torch.tensor(count, device=mean.device)
        weighted = mean * count
        self.sum_(weighted)
        self.sum_(total)
        return weighted / int(total), int(total)

    def agree(self, value: int) -> int:
        """Give rank 0's value on every rank."""
        if self.size == 1:
            return value
        told = torch.tensor(value, device=self.device)
        dist.broadcast(told, 0)
        return int(told)

    def sum_(self, tensor: Tensor) -> None:
        """Add up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def average_(self, tensor: Tensor) -> None:
        """Replace by the mean over the ranks, each counting alike."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)

    def broadcast_(self, tensor: Tensor) -> None:
        """Overwrite with rank 0's tensor."""
        if self.size > 1:
            dist.broadcast(tensor, 0)


ALONE = Ranks()


@contextmanager
def ranks_from_environment(device: str) -> Iterator[Ranks]:
    """Join the process group that torchrun describes; a plain process is alone.

    Raises:
        MachineError: the group cannot be joined, or another rank was lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    cuda = device.startswith("cuda")
    try:
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise MachineError(f"the process group of torchrun cannot be joined: {error}") from error
    try:
        yield Ranks(dist.get_rank(), size, device)
        # Leaving while rank 0 still writes would look like a lost rank to the launcher.
        dist.barrier()
    except RuntimeError as error:
        if not _is_from_the_group(error):
            raise
        raise MachineError(
            f"rank {dist.get_rank()} of {size} lost another rank ({_first_line(error)}). "
            "Run the same command again: finished layers are kept."
        ) from error
    finally:
        dist.destroy_process_group()
        # A group that garbage still refers to would end at exit, with an abort.
        gc.collect()


def rank_device(device: str) -> str:
    """Give each rank its own GPU, where under torchrun a plain `cuda` is asked for.

    Raises:
        UsageError: one GPU is named for all ranks.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is not None and device.startswith("cuda:"):
        raise UsageError(f"--device {device} under torchrun: say cuda, each rank takes its own.")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


def _is_from_the_group(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection", "peer", "timed out")
    )


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
