"""Which way a model lies on its ranks; that all ways compute the same is tests/test_ssl_ranks.py."""

import pytest

from dinocell.errors import ConfigError
from dinocell.runtime.distributed import World
from dinocell.runtime.sharding import choose_parallel


@pytest.mark.parametrize(
    ("parameters", "size", "local", "chosen"),
    [(86e6, 8, 8, "ddp"), (300e6, 8, 8, "fsdp"), (300e6, 32, 8, "hsdp"), (86e6, 32, 8, "ddp"), (7e9, 12, 8, "fsdp")],
)
def test_what_fits_is_replicated_and_the_rest_sharded(parameters: float, size: int, local: int, chosen: str) -> None:
    assert choose_parallel("auto", int(parameters), World(size=size, local_size=local)) == chosen


def test_a_way_that_is_asked_for_is_taken() -> None:
    assert choose_parallel("fsdp", 1, World(size=2, local_size=2)) == "fsdp"


def test_hsdp_needs_machines_of_one_size() -> None:
    with pytest.raises(ConfigError, match=r"compute\.parallel: hsdp needs as many processes on every machine"):
        choose_parallel("hsdp", 1, World(size=12, local_size=8))
