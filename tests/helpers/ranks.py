"""Several ranks of a command on this machine, forked from one process that has imported what they need."""

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing

# Importing these takes longer than a test's training, so it is done once. There is one such process for all tests.
_PRELOAD = ["helpers.ranks", "torch._dynamo", "torch.distributed.fsdp", "dinocell.ssl.train", "dinocell.finetune.train"]


def fork_ranks(function: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Call ``function(rank, *arguments)`` in ``ranks`` processes of one thread each; raise what one of them raises."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def run_ranks(command: Sequence[str], ranks: int, *, machines: int = 1) -> None:
    """Run ``dinocell`` with these arguments in ``ranks`` processes for each of ``machines``, as torchrun would."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    fork_ranks(_rank, (list(command), ranks, machines, port), ranks * machines)


def _rank(rank: int, command: list[str], ranks: int, machines: int, port: int) -> None:
    from dinocell.cli import main

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks * machines)}
    os.environ |= {"LOCAL_RANK": str(rank % ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert main(command) == 0
