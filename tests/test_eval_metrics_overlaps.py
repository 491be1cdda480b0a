"""The table of overlapping cells against a loop over pairs of masks."""

import inspect
import tracemalloc
from types import EllipsisType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinocell.eval.metrics import overlaps
from dinocell.eval.metrics.overlaps import ContingencyTable, contingency_table, contingency_tables

# The suite checks annotations at run time, which would stop these before our own message does.
unchecked = inspect.unwrap(contingency_table)

Pairs = dict[tuple[int, int], int]


def plain_loop(reference: np.ndarray, prediction: np.ndarray) -> tuple[dict[int, int], dict[int, int], Pairs]:
    areas, predicted_areas = (
        {int(label): int((image == label).sum()) for label in np.unique(image) if label != 0}
        for image in (reference, prediction)
    )
    shared = {(a, b): int(((reference == a) & (prediction == b)).sum()) for a in areas for b in predicted_areas}
    return areas, predicted_areas, {pair: pixels for pair, pixels in shared.items() if pixels}


def unpacked(table: ContingencyTable) -> tuple[dict[int, int], dict[int, int], Pairs]:
    cells, predicted = table.reference_ids.tolist(), table.predicted_ids.tolist()
    pairs = zip(table.reference_index.tolist(), table.predicted_index.tolist(), strict=True)
    return (
        dict(zip(cells, table.reference_areas.tolist(), strict=True)),
        dict(zip(predicted, table.predicted_areas.tolist(), strict=True)),
        {(cells[a], predicted[b]): pixels for (a, b), pixels in zip(pairs, table.intersections.tolist(), strict=True)},
    )


def patches(seed: int, shape: tuple[int, int], num_ids: int = 12) -> np.ndarray:
    """Rectangles over each other: ids in several pieces, touching, some hidden."""
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int64)
    for label in generator.integers(0, num_ids, 3 * num_ids):
        top, left = generator.integers(0, shape[0]), generator.integers(0, shape[1])
        labels[top : top + generator.integers(1, 9), left : left + generator.integers(1, 12)] = label
    return labels


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_two_small_images_equal_the_plain_loop(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    ids = st.lists(st.integers(0, 4), min_size=height * width, max_size=height * width)
    reference, prediction = (np.array(data.draw(ids), np.uint8).reshape(height, width) for _ in range(2))
    assert unpacked(contingency_table(reference, prediction)) == plain_loop(reference, prediction)


@pytest.mark.parametrize("block_pixels", [1, 50, 64, 1000, 1 << 18])
def test_blocks_do_not_change_the_table(block_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, prediction = patches(1, (41, 37)), patches(2, (41, 37))
    monkeypatch.setattr(overlaps, "_BLOCK_PIXELS", block_pixels)
    assert unpacked(contingency_table(reference, prediction)) == plain_loop(reference, prediction)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, ">u2", ">i4", np.uint32, np.int64, np.uint64])
def test_every_integer_type_gives_the_same_table(dtype: str | type) -> None:
    reference, prediction = patches(3, (30, 40)), patches(4, (30, 40))
    expected = plain_loop(reference, prediction)
    assert unpacked(contingency_table(reference.astype(dtype), prediction)) == expected
    assert unpacked(contingency_table(reference, prediction.astype(dtype))) == expected


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64, np.uint64])
def test_ids_up_to_the_end_of_their_type_stay_apart(dtype: type) -> None:
    reference, prediction = patches(5, (30, 40)), patches(6, (30, 40))
    largest = int(np.iinfo(dtype).max)
    ids = np.array([0, *(largest - 11 + np.arange(11, dtype=np.uint64))], dtype)
    large = ids[reference], ids[::-1][prediction]  # the background of the prediction becomes a cell
    assert unpacked(contingency_table(*large)) == plain_loop(*large)


@pytest.mark.parametrize("factor", [1, 2**40])
def test_cells_are_sorted_and_pairs_grouped(factor: int) -> None:
    table = contingency_table(factor * patches(7, (50, 60), 40), factor * patches(8, (50, 60), 40))
    assert (np.diff(table.reference_ids.astype(int)) > 0).all()
    assert (np.diff(table.predicted_ids.astype(int)) > 0).all()
    keys = table.reference_index * 1000 + table.predicted_index
    assert (np.diff(keys) > 0).all()


@pytest.mark.parametrize("view", [np.s_[::-1, ::-1], np.s_[::2, 1::3], np.s_[...]])
def test_views_give_the_table_of_their_copy(view: tuple[slice, slice] | EllipsisType) -> None:
    reference, prediction = np.asfortranarray(patches(9, (40, 50)))[view], patches(10, (40, 50))[view]
    for image in (reference, prediction):
        image.flags.writeable = False
    assert unpacked(contingency_table(reference, prediction)) == plain_loop(reference, prediction)


def test_ious_and_unions_are_those_of_the_masks() -> None:
    reference, prediction = patches(11, (40, 50)), patches(12, (40, 50))
    table = contingency_table(reference, prediction)
    for k, (a, b) in enumerate(zip(table.reference_index, table.predicted_index, strict=True)):
        cell, other = reference == table.reference_ids[a], prediction == table.predicted_ids[b]
        assert table.unions[k] == (cell | other).sum()
        assert table.ious[k] == (cell & other).sum() / (cell | other).sum()


def test_sixty_thousand_cells_need_little_more_memory_than_a_block() -> None:
    labels = (np.arange(250)[:, None] * 250 + np.arange(250) + 1).repeat(8, 0).repeat(8, 1).astype(np.int32)
    tracemalloc.start()
    table = contingency_table(labels, np.roll(labels, (3, 2), (0, 1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table.num_reference == table.num_predicted == 62_500
    assert len(table.intersections) == 250_000
    assert table.intersections.sum() == labels.size
    assert peak < 100e6


@pytest.mark.parametrize(
    ("reference", "prediction", "message"),
    [
        (np.zeros((4, 4)), np.zeros((4, 4), int), "reference: .* float64"),
        (np.zeros((4, 4), int), np.zeros((4, 4), bool), "prediction: .* bool"),
        (np.zeros((1, 2), int), np.array([[0, -3]]), "prediction: .* got id -3"),
        (np.zeros((2, 4, 4), int), np.zeros((4, 4), int), r"reference: .* \(2, 4, 4\)"),
        (np.zeros((4, 5), int), np.zeros((5, 4), int), r"of the same size, got \(4, 5\) and \(5, 4\)"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    reference: np.ndarray, prediction: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        unchecked(reference, prediction)
    assert "\n" not in str(caught.value)


def test_lists_are_paired_frame_by_frame() -> None:
    frames = [patches(seed, (20, 20)) for seed in range(4)]
    tables = contingency_tables(frames[:2], frames[2:])
    assert [unpacked(table) for table in tables] == [plain_loop(*frames[::2]), plain_loop(*frames[1::2])]
    assert len(contingency_tables(frames[0], frames[1])) == 1
    assert contingency_tables([], []) == []
    with pytest.raises(ValueError, match="got 2 frames and 1 frames"):
        contingency_tables(frames[:2], frames[:1])
    with pytest.raises(ValueError, match="got one image and 1 frames"):
        contingency_tables(frames[0], frames[:1])
