"""The command line with steps that last, for tests in which something has to happen in between."""

import time
from collections.abc import Sequence
from typing import Any

STEP_S = 0.4


def slow_main(arguments: Sequence[str]) -> int:
    """Run a command; a step of a training that starts anew takes ``STEP_S`` longer, of one that goes on it does not."""
    from dinocell import cli
    from dinocell.ssl.trainer import Trainer

    step = Trainer.step
    taken: list[int] = []

    def lasting(self: Trainer, number: int, *rest: Any, **more: Any) -> dict[str, Any]:
        taken.append(number)
        if taken[0] == 0:
            time.sleep(STEP_S)
        return step(self, number, *rest, **more)

    Trainer.step = lasting  # type: ignore[method-assign]
    return cli.main(arguments)
