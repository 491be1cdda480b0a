"""Ranks: who am I, who else is there, and the few things that all do together.

`start` reads what torchrun, SLURM (``srun``) or our launcher put into the environment; without any it is one process
alone, and every function here does nothing. Gloo on the CPU, NCCL on CUDA.
"""

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dinocell.errors import DinocellError
from dinocell.runtime.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class World:
    """One process among all of them.

    Attributes
    ----------
    rank, size
        Number of this process, and how many there are.
    local_rank, local_size
        The same within this machine.
    device
        Where this process computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return which of ``count`` rows are this rank's: one span each, in the order of the ranks."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def find_device(name: str = "auto") -> torch.device:
    """Return a device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:1``...

    ``mps`` (Apple) is let through; nothing here was tried on it.

    Raises
    ------
    DinocellError
        If there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) is None:
        raise DinocellError(f"compute.device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    missing = (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise DinocellError(f"compute.device: {device.type} was asked for, and there is none")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DinocellError(f"compute.device: {name} was asked for, and there are {torch.cuda.device_count()} GPUs")
    return device


def start(device: str = "auto", *, timeout_s: float = 1800.0) -> World:
    """Join the other processes, if there are any.

    Parameters
    ----------
    device
        ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, or one GPU: ``cuda:1``.
    timeout_s
        How long a collective waits for a rank that does not come, before all stop with an error.

    Raises
    ------
    DinocellError
        If the environment speaks of several processes but does not say where they meet, or there is no such device.
    """
    chosen = find_device(device)
    rank, size, local_rank, local_size = _from_environment(os.environ)
    if chosen.type == "cuda":
        # A launcher may show each process its own GPU alone; then it is number 0.
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count()) if chosen.index is None else chosen
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        if RENDEZVOUS not in os.environ and "MASTER_ADDR" not in os.environ:
            raise DinocellError(
                f"{size} processes, but MASTER_ADDR is not set: start them with torchrun or 'dinocell launch'"
            )
        dist.init_process_group(
            # Gloo as well: flags and names between hosts need not wait for the device.
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=_meet(Path(os.environ[RENDEZVOUS]), rank, size, timeout_s) if RENDEZVOUS in os.environ else None,
            init_method=None if RENDEZVOUS in os.environ else "env://",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=chosen)


# Set by the launcher: a file, new for each start, on a disk that all see.
RENDEZVOUS = "DINOCELL_RENDEZVOUS"
_POLL_S = 0.1


def _meet(place: Path, rank: int, size: int, timeout_s: float) -> TCPStore:
    """Return the store of all ranks: the main one takes a port that is free and writes address and port to a file.

    So no port has to be agreed on beforehand, and none can be in use.
    """
    timeout = timedelta(seconds=timeout_s)
    host = os.environ.get("MASTER_ADDR") or socket.gethostname()
    if rank == 0:
        store = TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=timeout)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, f"{host} {store.port}\n")
        return store
    end = time.monotonic() + timeout_s
    while not place.exists():
        if time.monotonic() > end:
            raise DinocellError(f"rank {rank}: the main rank did not come within {timeout_s:g} s ({place} is missing)")
        time.sleep(_POLL_S)
    host, port = place.read_text(encoding="utf-8").split()
    return TCPStore(host, int(port), size, is_master=False, wait_for_workers=False, timeout=timeout)


def stop() -> None:
    """Leave the other processes; does nothing alone."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together(device: str = "auto", *, timeout_s: float = 1800.0) -> Iterator[World]:
    """`start`, then `stop` whatever happens: without it an error on one rank leaves the others waiting."""
    joined = dist.is_initialized()
    world = start(device, timeout_s=timeout_s)
    try:
        yield world
    finally:
        if not joined:
            stop()


def _from_environment(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Return rank, size, rank and size within the machine."""
    if "RANK" in variables and "WORLD_SIZE" in variables:
        named = {name: variables.get(name, default) for name, default in _TORCHRUN.items()}
        rank, size, local_rank, local_size = _numbers(named)
        return rank, size, local_rank, local_size
    # Inside `salloc` or a batch script these exist too: only a task that srun started has a step of its own.
    if variables.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        named = {name: variables.get(name, "") for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")}
        rank, size, local_rank = _numbers(named)
        per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8(x4): eight on each of four
        return rank, size, local_rank, int(per_node.split("(")[0].split(",")[0])
    return 0, 1, 0, 1


# What torchrun sets, and what stands in where another launcher leaves the second half out.
_TORCHRUN = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _numbers(named: Mapping[str, str]) -> list[int]:
    try:
        return [int(value) for value in named.values()]
    except ValueError:
        shown = ", ".join(f"{name}={value!r}" for name, value in named.items())
        raise DinocellError(f"the environment's ranks are not numbers: {shown}") from None


def rank() -> int:
    """Return the number of this process; alone, 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_alone() -> bool:
    """Say whether there is no other rank."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all ranks; alone, the values themselves."""
    if is_alone():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(values: Tensor) -> Tensor:
    """Return the largest over all ranks; alone, the values themselves."""
    if is_alone():
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def gather(rows: Float[Tensor, "b d"]) -> Float[Tensor, "a d"]:
    """Return the rows of all ranks, in their order, with gradient to each rank's own; equal numbers on every rank."""
    if is_alone():
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """All ranks' rows; backward, a rank's rows get what all ranks' losses say of them."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        first = dist.get_rank() * context.num_rows
        return total[first : first + context.num_rows]


def barrier() -> None:
    """Wait for all ranks."""
    if not is_alone():
        dist.barrier()


def from_main(value: object) -> object:
    """Return the main rank's value on every rank; it must be picklable."""
    if is_alone():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
