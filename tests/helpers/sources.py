"""What a source of fields gives."""

import pytest

from dinocell.data_shards.sources.field import Field, Rejected, Source
from dinocell.errors import ImageError


def listed(source: Source) -> tuple[list[Field], list[Rejected]]:
    """Return the fields and the rejected inputs."""
    items = list(source.fields())
    return [item for item in items if isinstance(item, Field)], [item for item in items if isinstance(item, Rejected)]


def fields(source: Source) -> list[Field]:
    """Return the fields of a source that rejects nothing."""
    found, rejected = listed(source)
    assert rejected == []
    return found


def error_of(source: Source) -> str:
    """Return the message of the error that listing raises; it must be one line."""
    with pytest.raises(ImageError) as caught:
        list(source.fields())
    assert "\n" not in str(caught.value)
    return str(caught.value)
