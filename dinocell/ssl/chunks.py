"""The matrix of (rows, prototypes), the largest of a training step, in pieces of rows: how large, where, compiled."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def pieces(num_rows: int, num_prototypes: int, device: torch.device, elements: int | None = None) -> Iterator[slice]:
    """Cut rows into pieces whose logits have at most ``elements`` elements, but at least one row.

    By default 128 M elements, and on the CPU 8 M elements or 256 rows, whichever is less: smaller pieces make poor
    matrix products, larger ones leave the cache (benchmarks/ssl_heads.py).
    """
    on_cpu = device.type == "cpu"
    size = max(1, (elements or (2**23 if on_cpu else 2**27)) // max(num_prototypes, 1))
    if on_cpu and elements is None:
        size = min(size, 256)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def with_scratch(
    count: int, num_rows: int, like: Float[Tensor, " k"], elements: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "count m k"]]]:
    """Yield `pieces`, each with the same memory for ``count`` of them: on the CPU new pages cost more than numbers."""
    scratch: Tensor | None = None
    for which in pieces(num_rows, len(like), like.device, elements):
        if scratch is None:
            scratch = like.new_empty(count, which.stop, len(like))
        yield which, scratch[:, : which.stop - which.start]


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast: products run in the type of their factors."""
    return torch.autocast(like.device.type, enabled=False)


@cache
def compiled_once(function: Function) -> Function:
    """Return the function compiled, the same one in every step."""
    return cast("Function", torch.compile(function))
