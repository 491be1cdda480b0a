"""The random states of this process: torch's on the CPU and the device, NumPy's global one, Python's."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Return all of them as tensors whose shapes are always the same."""
    _, words, position, has_gauss, cached = np.random.get_state()
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*(int(word) for word in words), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "python": torch.tensor([version, *numbers, gauss is not None], dtype=torch.int64),
        "python_gauss": torch.tensor(gauss or 0.0, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    *words, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(words, np.uint32), position, has_gauss, float(states["numpy_gauss"])))
    version, *numbers, has_gauss = states["python"].tolist()
    state: Any = (version, tuple(numbers), float(states["python_gauss"]) if has_gauss else None)
    random.setstate(state)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
