"""Processes of a distributed run, their collective operations, and the distribution of a model over them.

`start` reads the environment set by torchrun, SLURM (``srun``) or the launcher; without it there is one process, and
the collectives return their input. Gloo on the CPU, NCCL on CUDA. A model is distributed in one of these ways:

========  ==================================================================================================
``ddp``   every rank holds the model; gradients are averaged. Least communication; for ViT-S and ViT-B.
``fsdp``  every rank holds a shard of each block and gathers the block when it computes it (ViT-L and larger).
``hsdp``  sharded over the ranks of a machine, which have fast links; replicated over machines.
``auto``  ``ddp`` below 200 M parameters of a student, else ``hsdp`` on several machines and ``fsdp`` on one.
========  ==================================================================================================

All three are FSDP2 (`torch.distributed.fsdp.fully_shard`) on a mesh of replicas times shards, so they share one code
path and read each other's checkpoints. With one process nothing is wrapped.
"""

import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dinocell.errors import ConfigError, DinocellError
from dinocell.runtime.files import write_atomically

if TYPE_CHECKING:  # FSDP takes half a second to import, which most commands need not pay
    from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True, kw_only=True)
class World:
    """One process of a run: its index and the number of processes, the same within this machine, its device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return the slice of ``count`` rows that belongs to this rank."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def find_device(name: str = "auto") -> torch.device:
    """Return a device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:1``...; ``mps`` (Apple) is untested.

    It is a :class:`DinocellError` if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|mps|cuda(:\d+)?", name) is None:
        raise DinocellError(f"compute.device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}[device.type]
    if (device.index or 0) >= count:
        raise DinocellError(f"compute.device: {name} requested, but this machine has {count} {device.type} device(s)")
    return device


def start(device: str = "auto", *, timeout_s: float = 1800.0) -> World:
    """Join the other processes, if there are any, and choose the device.

    ``timeout_s`` is how long a collective waits for a missing rank before all ranks stop with an error. It is a
    :class:`DinocellError` if the environment names several processes but no address, or there is no such device.
    """
    chosen = find_device(device)
    rank, size, local_rank, local_size = _from_environment(os.environ)
    if chosen.type == "cuda":
        # A launcher may make only one GPU visible to each process; then its index is 0.
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count()) if chosen.index is None else chosen
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        meeting = os.environ.get(RENDEZVOUS)
        if meeting is None and "MASTER_ADDR" not in os.environ:
            raise DinocellError(
                f"{size} processes, but MASTER_ADDR is not set: start them with torchrun or 'dinocell launch'"
            )
        dist.init_process_group(
            # Gloo as well: flags and names are exchanged without waiting for the device.
            "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
            store=_meet(Path(meeting), rank, size, timeout_s) if meeting else None,
            init_method=None if meeting else "env://",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return World(rank=rank, size=size, local_rank=local_rank, local_size=local_size, device=chosen)


# Set by the launcher: a file, new for each start, on a shared file system.
RENDEZVOUS = "DINOCELL_RENDEZVOUS"
_POLL_S = 0.1


def _meet(place: Path, rank: int, size: int, timeout_s: float) -> TCPStore:
    """Return the store of all ranks: the main rank takes a free port and writes its address and port to a file."""
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
            raise DinocellError(f"rank {rank}: no main rank within {timeout_s:g} s ({place} is missing)")
        time.sleep(_POLL_S)
    host, port = place.read_text(encoding="utf-8").split()
    return TCPStore(host, int(port), size, is_master=False, wait_for_workers=False, timeout=timeout)


@contextmanager
def together(device: str = "auto", *, timeout_s: float = 1800.0) -> Iterator[World]:
    """`start`, and leave the other processes at the end, also after an error, so that they do not wait for this one."""
    joined = dist.is_initialized()
    world = start(device, timeout_s=timeout_s)
    try:
        yield world
    finally:
        if not joined and dist.is_initialized():
            dist.destroy_process_group()


def _from_environment(variables: Mapping[str, str]) -> tuple[int, int, int, int]:
    """Return rank, size, local rank and local size, as set by torchrun or SLURM."""
    if "RANK" in variables and "WORLD_SIZE" in variables:
        # Some launchers set only these two.
        named = {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        named = {name: variables.get(name, default) for name, default in named.items()}
    # SLURM_NTASKS exists inside `salloc` and batch scripts too; SLURM_STEP_* only in tasks that srun started.
    elif variables.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        named = {name: variables.get(name, "") for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")}
        per_node = variables.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8(x4): eight on each of four machines
        named["SLURM_STEP_TASKS_PER_NODE"] = re.split(r"[(,]", per_node)[0]
    else:
        return 0, 1, 0, 1
    try:
        rank, size, local_rank, local_size = map(int, named.values())
    except ValueError:
        shown = ", ".join(f"{name}={value!r}" for name, value in named.items())
        raise DinocellError(f"environment: expected integers, got {shown}") from None
    return rank, size, local_rank, local_size


def rank() -> int:
    """Return the index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_alone() -> bool:
    """Return whether there is only one process."""
    return world_size() == 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the sum over all ranks."""
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Tensor) -> Tensor:
    """Return the maximum over all ranks."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    if is_alone():
        return values
    result = values.clone()
    dist.all_reduce(result, op=operation)
    return result


def gather(rows: Float[Tensor, "b d"]) -> Float[Tensor, "a d"]:
    """Return the rows of all ranks, in order, with gradient to each rank's own; every rank has the same number."""
    if is_alone():
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Forward: the rows of all ranks. Backward: the gradient of a rank's rows, summed over the losses of all ranks."""

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
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

# ViT-B has 86 M, ViT-L 300 M. A student, its teacher and AdamW's moments of 200 M take 4 GB in float32.
_REPLICATED_BELOW = 200_000_000


def choose_parallel(parallel: Parallel, num_parameters: int, world: World) -> Parallel:
    """Resolve ``auto``; raise :class:`ConfigError` for ``hsdp`` on machines with different numbers of ranks."""
    if parallel == "auto":
        if num_parameters < _REPLICATED_BELOW:
            return "ddp"
        return "hsdp" if world.local_size < world.size and world.size % world.local_size == 0 else "fsdp"
    if parallel == "hsdp" and world.size % world.local_size:
        raise ConfigError(
            "compute.parallel: hsdp needs the same number of processes on every machine, "
            f"got {world.local_size} of {world.size} on this one"
        )
    return parallel


def num_shards(parallel: Parallel, world: World) -> int:
    """Return the number of ranks that share one copy of the model."""
    return {"ddp": 1, "fsdp": world.size, "hsdp": world.local_size}[parallel]


def make_mesh(parallel: Parallel, world: World) -> DeviceMesh:
    """Return the mesh (replicas, shards)."""
    shards = num_shards(parallel, world)
    return init_device_mesh(world.device.type, (world.size // shards, shards), mesh_dim_names=("replica", "shard"))


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    blocks: Iterable[nn.Module] = (),
    dtype: torch.dtype | None = None,
    keep_gathered: bool = False,
) -> None:
    """Shard a module over the mesh, in place, on the mesh's device.

    The module is a backbone or a head, which the forward pass calls itself. ``blocks`` are its parts in the order of
    the forward pass; each is gathered while the previous one computes. Gathered parameters have ``dtype`` (None:
    unchanged); gradients are averaged in float32. With ``keep_gathered`` they are kept after the forward pass: for a
    module whose parameters are used outside.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    release = mesh["shard"].size() > 1 and not keep_gathered
    parts = list(blocks)
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=release)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=release)
    wrapped = [part for part in parts if isinstance(part, FSDPModule)]
    for before, after in pairwise(wrapped):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])


def sharded_parts(modules: Iterable[nn.Module]) -> "list[FSDPModule]":
    """Return the sharded modules inside these modules."""
    from torch.distributed.fsdp import FSDPModule

    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


def release(parts: "Iterable[FSDPModule]") -> None:
    """Free gathered parameters, which a pass without gradient keeps and an update of the shards would not change."""
    for part in parts:
        part.reshard()
