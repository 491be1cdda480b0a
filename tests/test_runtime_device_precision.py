"""The rule of ``auto``."""

import pytest
import torch

from dinocell.runtime.device import Precision, uses_bfloat16


@pytest.mark.parametrize(
    ("precision", "on_cpu", "on_turing", "on_ampere"),
    [("auto", False, False, True), ("float32", False, False, False), ("bfloat16", True, True, True)],
)
def test_auto_is_bfloat16_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, on_cpu: bool, on_turing: bool, on_ampere: bool
) -> None:
    assert uses_bfloat16(precision, torch.device("cpu")) == on_cpu
    for capability, wanted in (((7, 5), on_turing), ((8, 0), on_ampere), ((9, 0), on_ampere)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, found=capability: found)
        assert uses_bfloat16(precision, torch.device("cuda", 0)) == wanted
