"""Training steps with a loss or gradient that is not finite: they change no weight, and too many end the run."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dinocell.errors import DinocellError
from dinocell.runtime.distributed import max_over_ranks


class BadSteps:
    """Skips such steps and counts them, on the device: nothing is read back from it until `check`.

    Parameters
    ----------
    most
        So many bad steps in a row are too many.
    advice
        What the user is told to do then, in sentences.
    """

    def __init__(self, device: torch.device, *, most: int, advice: str) -> None:
        self._most, self._advice = most, advice
        self._counts = torch.zeros(2, device=device)  # of the run, and in a row until now

    def step(self, optimizer: torch.optim.Optimizer, values: Iterable[Tensor]) -> None:
        """Take the optimizer's step, unless one of the values (losses, gradient norms) is not finite on any rank.

        The optimizer must be fused: its kernel leaves weights and moments alone where ``found_inf`` is 1.
        """
        finite = torch.stack(list(values)).isfinite().all()
        bad = max_over_ranks((~finite).float())
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        total, in_a_row = self._counts
        self._counts = torch.stack((total + bad, (in_a_row + bad) * bad))

    @property
    def total(self) -> Tensor:
        """Bad steps of the run, a number on the device."""
        return self._counts[0]

    def check(self) -> None:
        """Read the count from the device.

        Raises
        ------
        DinocellError
            If there were too many in a row.
        """
        in_a_row = int(self._counts[1])
        if in_a_row >= self._most:
            raise DinocellError(
                f"{in_a_row} steps in a row had a loss or gradient that is not finite; no weight was changed by them. "
                f"{self._advice}"
            )

    def state(self) -> Tensor:
        """Return what a training state keeps, for `restore`."""
        return self._counts

    def restore(self, state: Tensor) -> None:
        """Go on counting from a state."""
        self._counts = state.to(self._counts.device)
