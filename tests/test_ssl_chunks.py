"""Chunks of rows: every row once, none too large."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinocell.ssl.chunks import row_chunks


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 300))
def test_chunks_cover_every_row_once(num_rows: int, prototypes: int, elements: int) -> None:
    chunks = list(row_chunks(num_rows, prototypes, torch.device("cpu"), elements))
    assert [row for chunk in chunks for row in range(num_rows)[chunk]] == list(range(num_rows))
    assert all(chunk.stop - chunk.start <= max(1, elements // prototypes) for chunk in chunks)
