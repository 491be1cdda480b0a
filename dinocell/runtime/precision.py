"""In which numbers matrix products are computed."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Say whether matrix products run in bfloat16; ``auto`` means on GPUs that have it.

    Those are NVIDIA's from Ampere on (compute capability 8.0); older ones imitate it, slower than float32.
    """
    if precision != "auto":
        return precision == "bfloat16"
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )
