"""Pieces of rows: every row once, none too large."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinocell.ssl.chunks import pieces


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 300))
def test_pieces_cover_every_row_once(rows: int, prototypes: int, elements: int) -> None:
    found = list(pieces(rows, prototypes, torch.device("cpu"), elements))
    assert [row for piece in found for row in range(rows)[piece]] == list(range(rows))
    assert all(piece.stop - piece.start <= max(1, elements // prototypes) for piece in found)
