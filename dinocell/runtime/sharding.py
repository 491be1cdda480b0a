"""How a model lies on several ranks: whole on each, in shards over all, or in shards within each machine.

========  ==================================================================================================
``ddp``   every rank holds all of it; gradients are averaged. Least traffic; for what fits (ViT-S, B).
``fsdp``  every rank holds one part of each block and fetches the rest when its turn comes (ViT-L and larger).
``hsdp``  the same among the ranks of a machine, whose links are fast; machines hold copies of one another.
``auto``  ``ddp`` below 200 M parameters of a student, else ``hsdp`` on several machines and ``fsdp`` on one.
========  ==================================================================================================

All three are FSDP2 (`torch.distributed.fsdp.fully_shard`) on a mesh of replicas times shards: one path, one form of
state, so a checkpoint of one is read by the others. Alone nothing is wrapped.
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
        If ``hsdp`` is asked for and the ranks are not spread evenly over machines.
    """
    if parallel == "auto":
        if num_parameters < _REPLICATED_BELOW:
            return "ddp"
        return "hsdp" if world.local_size < world.size and world.size % world.local_size == 0 else "fsdp"
    if parallel == "hsdp" and world.size % world.local_size:
        raise ConfigError(
            f"compute.parallel: hsdp needs as many processes on every machine; there are {world.size}, "
            f"{world.local_size} of them on this one"
        )
    return parallel


def num_shards(parallel: Parallel, world: World) -> int:
    """Return over how many ranks a resolved way spreads one copy of the model."""
    return {"ddp": 1, "fsdp": world.size, "hsdp": world.local_size}[parallel]


def make_mesh(parallel: Parallel, world: World) -> DeviceMesh:
    """Return the mesh, (replicas, shards), of a resolved way."""
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
    """Spread a module over the mesh, in place; it moves to the mesh's device.

    Parameters
    ----------
    module
        Called by itself in the forward pass: a backbone or a head.
    blocks
        Parts of it, fetched one at a time, in the order in which they are called; each is fetched while the one before
        computes.
    dtype
        In which parameters are exchanged and used; gradients are averaged in float32. None: as they are.
    keep_gathered
        Do not let go of the parameters after the forward pass: for a module that hands its parameters out.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # On a single shard there is nothing to let go of.
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
    """Return what `shard` has spread, of these modules and all inside of them."""
    return [part for module in modules for part in module.modules() if isinstance(part, FSDPModule)]


def release(parts: Iterable[FSDPModule]) -> None:
    """Let go of gathered parameters, which an update of the shards (a moving average) would not reach.

    After a pass without gradient a root keeps what it gathered.
    """
    for part in parts:
        part.reshard()
