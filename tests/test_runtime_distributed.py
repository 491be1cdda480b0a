"""The choice of how a model is distributed; tests/test_ssl_ranks.py shows that all compute the same."""

import pytest

from dinocell.errors import ConfigError
from dinocell.runtime.distributed import World, choose_parallel


@pytest.mark.parametrize(
    ("parameters", "size", "local", "chosen"),
    [(86e6, 8, 8, "ddp"), (300e6, 8, 8, "fsdp"), (300e6, 32, 8, "hsdp"), (86e6, 32, 8, "ddp"), (7e9, 12, 8, "fsdp")],
)
def test_small_models_are_replicated_and_large_ones_sharded(
    parameters: float, size: int, local: int, chosen: str
) -> None:
    assert choose_parallel("auto", int(parameters), World(size=size, local_size=local)) == chosen


def test_an_explicit_choice_is_kept() -> None:
    assert choose_parallel("fsdp", 1, World(size=2, local_size=2)) == "fsdp"


def test_hsdp_needs_the_same_number_of_ranks_on_every_machine() -> None:
    with pytest.raises(ConfigError, match=r"compute\.parallel: hsdp"):
        choose_parallel("hsdp", 1, World(size=12, local_size=8))
