"""The rule of ``auto``."""

import pytest
import torch

from dinocell.runtime.precision import Precision, uses_bfloat16


@pytest.mark.parametrize(
    ("precision", "on_cpu", "on_cuda"),
    [("auto", False, True), ("float32", False, False), ("bfloat16", True, True)],
)
def test_auto_is_bfloat16_on_cuda_alone(precision: Precision, on_cpu: bool, on_cuda: bool) -> None:
    assert uses_bfloat16(precision, torch.device("cpu")) == on_cpu
    assert uses_bfloat16(precision, torch.device("cuda")) == on_cuda
