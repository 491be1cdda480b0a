"""Patterns of file names: what they match, and which are rejected."""

import unicodedata
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinocell.errors import ImageError
from dinocell.images.name_pattern import NamePattern


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "image*.tif",
        "{well.tif",
        "well}.tif",
        "{{well}}.tif",
        "{}.tif",
        "{1st}.tif",
        "{a-b}.tif",
        "{a b}.tif",
        "{well}/**/{site}.tif",
        "/data/{well}.tif",
        "s3://bucket/{well}.tif",
    ],
)
def test_invalid_patterns_are_rejected(pattern: str) -> None:
    with pytest.raises(ImageError) as caught:
        NamePattern.parse(pattern)
    assert repr(pattern) in str(caught.value)


NAME_PARTS = st.text(
    st.characters(blacklist_characters="/{}*", blacklist_categories=("Cs", "Cc")), min_size=1, max_size=6
)


@given(values=st.lists(NAME_PARTS, min_size=1, max_size=4), literals=st.lists(NAME_PARTS, min_size=5, max_size=5))
def test_patterns_match_names_made_from_them_and_return_their_fields(
    values: Sequence[str], literals: Sequence[str]
) -> None:
    values = [unicodedata.normalize("NFC", value) for value in values]
    pattern = "/".join(f"{literal}{{f{index}}}" for index, literal in zip(range(len(values)), literals, strict=False))
    name = "/".join(literal + value for literal, value in zip(literals, values, strict=False))
    fields = NamePattern.parse(pattern).match(unicodedata.normalize("NFC", name))
    if (
        unicodedata.is_normalized("NFC", name)
        and unicodedata.is_normalized("NFC", pattern)
        and not pattern.startswith("./")
    ):
        assert fields == {f"f{index}": value for index, value in enumerate(values)}
    assert NamePattern.parse(pattern).match(name + "/x") is None


def test_a_repeated_field_must_match_the_same_text() -> None:
    pattern = NamePattern.parse("{plate}/{plate}_{well}.tif")
    assert pattern.match("P1/P1_A01.tif") == {"plate": "P1", "well": "A01"}
    assert pattern.match("P1/P2_A01.tif") is None


def test_a_star_matches_the_empty_string_but_no_folder() -> None:
    pattern = NamePattern.parse("{well}_*.tif")
    assert pattern.match("A01_.tif") == {"well": "A01"}
    assert pattern.match("A01_x_y.tif") == {"well": "A01"}
    assert pattern.match("A01_x/y.tif") is None


def test_the_more_specific_of_two_patterns_has_more_literal_characters() -> None:
    assert NamePattern.parse("{name}_mask.tif").num_literal == 9 > NamePattern.parse("{name}.tif").num_literal == 4
