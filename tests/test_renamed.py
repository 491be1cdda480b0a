import importlib
import sys

import pytest

from dinocell._renamed import MOVED_ON, RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_a_former_module_name_is_the_new_module_and_warns(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=RENAMED[old]):
        module = importlib.import_module(old)
    new = importlib.import_module(RENAMED[old])
    assert module is new
    assert new.__spec__ is not None
    assert new.__spec__.name == RENAMED[old]


def test_names_import_from_a_former_module() -> None:
    sys.modules.pop("dinocell.eval.watershed", None)
    with pytest.warns(DeprecationWarning, match="old name"):
        from dinocell.eval.watershed import distance_to_labels  # type: ignore[import-not-found]
    assert distance_to_labels.__module__ == "dinocell.eval.segmentation.watershed"


@pytest.mark.parametrize("old", MOVED_ON)
def test_a_former_module_offers_functions_that_are_now_in_a_third_one(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=RENAMED[old]):
        module = importlib.import_module(old)
    for name, home in MOVED_ON[old].items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


def test_images_are_still_read_and_written_through_the_former_module() -> None:
    sys.modules.pop("dinocell.data_shards.images", None)
    with pytest.warns(DeprecationWarning, match="old name"):
        from dinocell.data_shards.images import (  # type: ignore[import-not-found]  # noqa: F401
            read_image,
            read_stack,
            write_labels,
            write_png,
            write_tiff,
        )
