"""The (rows, prototypes) matrix, the largest one of a training step, in chunks of rows; and compiled functions."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

# Elements of a chunk by default, and maximum rows on the CPU: smaller chunks give slow matrix products, larger ones
# exceed the processor's cache (benchmarks/ssl_heads.py).
_CPU_ELEMENTS, _CPU_ROWS = 2**23, 256
_GPU_ELEMENTS = 2**27


def row_chunks(
    num_rows: int, num_prototypes: int, device: torch.device, elements: int | None = None
) -> Iterator[slice]:
    """Yield slices of rows whose logits have at most ``elements`` elements, but at least one row."""
    on_cpu = device.type == "cpu"
    size = max(1, (elements or (_CPU_ELEMENTS if on_cpu else _GPU_ELEMENTS)) // max(num_prototypes, 1))
    if on_cpu and elements is None:
        size = min(size, _CPU_ROWS)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


def chunks_with_scratch(
    count: int, num_rows: int, like: Float[Tensor, " k"], elements: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "count m k"]]]:
    """Yield `row_chunks` with memory for ``count`` matrices each.

    The memory is reused: on the CPU new pages cost more than the arithmetic.
    """
    scratch: Tensor | None = None
    for rows in row_chunks(num_rows, len(like), like.device, elements):
        if scratch is None:  # the first chunk is the largest
            scratch = like.new_empty(count, rows.stop, len(like))
        yield rows, scratch[:, : rows.stop - rows.start]


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast: products run in the type of their factors."""
    return torch.autocast(like.device.type, enabled=False)


@cache
def compiled_once(function: Function) -> Function:
    """Return the compiled function; the same object at every call."""
    return cast("Function", torch.compile(function))
