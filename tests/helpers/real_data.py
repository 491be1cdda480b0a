"""Real microscopy images beside the checkout: where they are, and the mark of tests that need them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[3] / "shared" / "data"


def needs_data(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test of real images: slow, and skipped where there are none."""
    reason = "the real microscopy data is not beside this checkout"
    return pytest.mark.slow(pytest.mark.skipif(not DATA.is_dir(), reason=reason)(test))
