"""In which numbers matrix products are computed."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Say whether matrix products run in bfloat16; ``auto`` means on CUDA."""
    return device.type == "cuda" if precision == "auto" else precision == "bfloat16"
