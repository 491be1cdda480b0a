"""Distribute a model over ranks: replicated, sharded over all ranks, or sharded within each machine.

========  ==================================================================================================
``ddp``   every rank holds the model; gradients are averaged. Least communication; for ViT-S and ViT-B.
``fsdp``  every rank holds a shard of each block and gathers the block when it computes it (ViT-L and larger).
``hsdp``  sharded over the ranks of a machine, which have fast links; replicated over machines.
``auto``  ``ddp`` below 200 M parameters of a student, else ``hsdp`` on several machines and ``fsdp`` on one.
========  ==================================================================================================

All three are FSDP2 (`torch.distributed.fsdp.fully_shard`) on a mesh of replicas times shards, so they share one code
path and read each other's checkpoints. With one process nothing is wrapped.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from dinocell.errors import ConfigError
from dinocell.runtime.distributed import World

Parallel = Literal["auto", "ddp", "fsdp", "hsdp"]

# ViT-B has 86 M, ViT-L 300 M. A student, its teacher and AdamW's moments of 200 M take 4 GB in float32.
_REPLICATED_BELOW = 200_000_000


def choose_parallel(parallel: Parallel, num_parameters: int, world: World) -> Parallel:
    """Resolve ``auto``.

    Raises
    ------
    ConfigError
        For ``hsdp`` if the machines have different numbers of ranks.
    """
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

    Parameters
    ----------
    module
        A backbone or a head, which the forward pass calls itself.
    blocks
        Parts of it in the order of the forward pass; each is gathered while the previous one computes.
    dtype
        Of the gathered parameters; gradients are averaged in float32. None: unchanged.
    keep_gathered
        Keep the gathered parameters after the forward pass: for a module whose parameters are used outside.
    """
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


def sharded_parts(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Return the sharded modules inside these modules."""
    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


def release(parts: Iterable[FSDPModule]) -> None:
    """Free gathered parameters, which a pass without gradient keeps and an update of the shards would not change."""
    for part in parts:
        part.reshard()
