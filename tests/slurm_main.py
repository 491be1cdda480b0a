"""The command line with steps that last, for tests in which something has to happen in between."""

import time
from collections.abc import Sequence
from typing import Any

STEP_S = 0.4


def slow_main(arguments: Sequence[str]) -> int:
    """Run a command; a training step takes ``STEP_S`` longer."""
    from dinocell import cli
    from dinocell.ssl.trainer import Trainer

    step = Trainer.step

    def lasting(self: Trainer, *rest: Any, **more: Any) -> dict[str, Any]:
        time.sleep(STEP_S)
        return step(self, *rest, **more)

    Trainer.step = lasting  # type: ignore[method-assign]
    return cli.main(arguments)
