"""Masks: exact counts, no dependence on ranks, and blocks against a plain loop over patches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from dinocell.ssl.config import MaskingConfig
from dinocell.ssl.masking import draw_blocks, draw_masks, mask_counts


def seeds(count: int, start: int = 0) -> list[np.random.SeedSequence]:
    return [np.random.SeedSequence(start + i) for i in range(count)]


def plain_blocks(count: int, grid: tuple[int, int], config: MaskingConfig, seed: np.random.SeedSequence) -> np.ndarray:
    """One mask by itself, block after block, patch after patch, from the same random numbers."""
    height, width = grid
    uniform = np.random.default_rng(seed).random(400 + height * width + 2, dtype=np.float32)
    mask, left, failures = np.zeros(grid, bool), count, 0
    largest = max(1, int(config.max_block_share * height * width))
    for attempt in range(100):
        if left == 0 or failures == 10:
            break
        u_area, u_aspect, u_top, u_left = uniform[4 * attempt : 4 * attempt + 4]
        limit = min(left, largest)
        area = min(config.min_block, limit) + u_area * max(limit - config.min_block, 0)
        aspect = np.exp((2 * u_aspect - 1) * -np.log(config.min_aspect))
        rows, columns = max(round(float(np.sqrt(area * aspect))), 1), max(round(float(np.sqrt(area / aspect))), 1)
        failures += 1
        if rows > height or columns > width:
            continue
        top, first = int(u_top * (height - rows + 1)), int(u_left * (width - columns + 1))
        new = [
            (i, j) for i in range(top, top + rows) for j in range(first, first + columns) if i < height and j < width
        ]
        new = [each for each in new if not mask[each]]
        if 0 < len(new) <= limit:
            failures = 0
            left -= len(new)
            for each in new:
                mask[each] = True
    free = sorted((uniform[400 + i], i) for i in range(height * width) if not mask.flat[i])
    for _, index in free[:left]:
        mask.flat[index] = True
    return mask


@pytest.mark.parametrize("grid", [(28, 28), (14, 14), (6, 11), (1, 5), (2, 2), (1, 1)])
def test_masks_equal_the_plain_loop(grid: tuple[int, int]) -> None:
    config, size = MaskingConfig(), grid[0] * grid[1]
    counts = np.array([(i * size) // 20 for i in range(21)])
    masks = draw_blocks(counts, grid, config, seeds(21))
    for mask, count, seed in zip(masks, counts, seeds(21), strict=True):
        np.testing.assert_array_equal(mask, plain_blocks(int(count), grid, config, seed))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_count_is_exact(
    height: int, width: int, largest: float, aspect: float, block: int, shift: bool, seed: int
) -> None:
    config = MaskingConfig(max_block_share=largest, min_aspect=aspect, min_block=block, shift=shift)
    counts = np.arange(height * width + 1)
    masks = draw_blocks(counts, (height, width), config, seeds(len(counts), seed))
    np.testing.assert_array_equal(masks.sum((1, 2)), counts)


def test_masks_are_blocks_and_not_single_patches() -> None:
    """A patch of a mask of 30 % has most of its neighbours in it; of a random choice it would have 30 %."""
    masks = draw_blocks(np.full(50, 235), (28, 28), MaskingConfig(), seeds(50))
    beside = masks[:, 1:] & masks[:, :-1]
    assert beside.sum() / masks[:, 1:].sum() > 0.75


def test_every_patch_is_masked_about_as_often() -> None:
    shifted = draw_blocks(np.full(3000, 58), (14, 14), MaskingConfig(shift=True), seeds(3000)).mean(0)
    # 3,000 draws at 30 %: a standard deviation of 0.0084.
    np.testing.assert_allclose(shifted, 58 / 196, atol=0.04)
    plain = draw_blocks(np.full(3000, 58), (14, 14), MaskingConfig(), seeds(3000)).mean(0)
    assert plain[0, 0] < 0.2  # without the shift a corner lies in few blocks
    assert plain[7, 7] > 0.3


def test_shift_rolls_the_same_mask_around() -> None:
    counts = np.full(20, 100)
    plain = draw_blocks(counts, (14, 14), MaskingConfig(), seeds(20))
    shifted = draw_blocks(counts, (14, 14), MaskingConfig(shift=True), seeds(20))
    for one, other in zip(plain, shifted, strict=True):
        rolls = (np.roll(one, roll, (0, 1)) for roll in itertools.product(range(14), range(14)))
        assert any(np.array_equal(other, roll) for roll in rolls)
    assert not np.array_equal(plain, shifted)


def test_counts_are_the_upper_edges_of_the_bins() -> None:
    assert mask_counts(8, 784, MaskingConfig()).tolist() == [156, 235, 313, 392]
    assert mask_counts(2, 784, MaskingConfig()).tolist() == [392]
    assert mask_counts(1, 784, MaskingConfig()).tolist() == []
    assert mask_counts(100, 100, MaskingConfig(min_patch_share=0.29, max_patch_share=0.29)).tolist() == [29] * 50


def test_step_masks_1096_patches_of_4_of_8_crops() -> None:
    for seed in range(20):
        masks = draw_masks(range(4), (28, 28), MaskingConfig(), seed=seed)
        assert masks.masks.shape == (8, 28, 28)
        assert sorted(masks.masks.sum((1, 2)).tolist()) == [0, 0, 0, 0, 156, 235, 313, 392]
        assert len(masks.indices) == len(masks.weights) == 1096


def test_indices_and_weights_belong_to_the_masks() -> None:
    masks = draw_masks([5, 2, 9], (6, 7), MaskingConfig(image_share=0.7), seed=3)
    assert torch.equal(masks.indices, masks.masks.flatten().nonzero().flatten())
    crop = masks.indices // 42
    torch.testing.assert_close(masks.weights, 1 / masks.masks.sum((1, 2))[crop].float())
    masked = masks.masks.any(2).any(1).sum()
    assert masks.weights.sum().item() == pytest.approx(masked.item(), rel=1e-5)


def test_masks_do_not_depend_on_the_number_of_ranks() -> None:
    config, samples = MaskingConfig(samples_per_group=2), [7, 3, 11, 0, 4, 5, 6, 1]
    whole = draw_masks(samples, (14, 14), config, seed=1).masks.unflatten(0, (2, 8))
    for size in (1, 2, 4, 8):
        slices = [slice(start, start + size) for start in range(0, 8, size)]
        parts = [draw_masks(samples, (14, 14), config, seed=1, own=own) for own in slices]
        joined = torch.cat([part.masks.unflatten(0, (2, size)) for part in parts], dim=1)
        assert torch.equal(joined, whole)
        if size >= 2:  # no rank divides a group: static shapes
            assert len({len(part.indices) for part in parts}) == 1


def test_counts_of_a_group_depend_on_its_samples_not_on_its_place() -> None:
    config = MaskingConfig(samples_per_group=2)
    one = draw_masks([7, 3, 11, 0], (14, 14), config, seed=1).masks.unflatten(0, (2, 4))
    other = draw_masks([11, 0, 7, 3], (14, 14), config, seed=1).masks.unflatten(0, (2, 4))
    assert torch.equal(one[:, [2, 3, 0, 1]], other)


def test_seed_sample_and_view_change_the_masks() -> None:
    config = MaskingConfig(image_share=1.0, min_patch_share=0.3, max_patch_share=0.3)

    def draw(sample: int = 4, seed: int = 0) -> torch.Tensor:
        return draw_masks([sample], (14, 14), config, seed=seed).masks

    first = draw()
    assert torch.equal(first, draw())
    assert not torch.equal(first[0], first[1])
    for other in (draw(sample=5), draw(seed=1)):
        assert not torch.equal(first, other)


def test_every_crop_gets_every_share_equally_often() -> None:
    """4 samples x 2 views have each of the 4 counts 1/8 of the time."""
    config = MaskingConfig()
    counts = np.stack([draw_masks(range(4), (10, 10), config, seed=e).masks.sum((1, 2)).numpy() for e in range(400)])
    for count in (20, 30, 40, 50):
        np.testing.assert_allclose((counts == count).mean(0), 1 / 8, atol=0.08)


@pytest.mark.parametrize(
    ("config", "samples"),
    [
        (MaskingConfig(image_share=0.0), [1, 2]),
        (MaskingConfig(min_patch_share=0.0, max_patch_share=0.0), [1]),
        (MaskingConfig(), []),
    ],
)
def test_nothing_to_mask_gives_empty_indices(config: MaskingConfig, samples: list[int]) -> None:
    masks = draw_masks(samples, (4, 5), config, seed=0)
    assert masks.masks.shape == (2 * len(samples), 4, 5)
    assert not masks.masks.any()
    assert masks.indices.shape == masks.weights.shape == (0,)
    assert masks.indices.dtype == torch.int64
    assert masks.weights.dtype == torch.float32


def test_one_view_and_a_short_last_group_are_taken() -> None:
    config = MaskingConfig(samples_per_group=4)
    masks = draw_masks(np.arange(6), (10, 10), config, seed=0, views=1).masks.sum((1, 2))
    assert sorted(masks[:4].tolist()) == [0, 0, 30, 50]
    assert sorted(masks[4:].tolist()) == [0, 50]


@pytest.mark.parametrize(
    "values",
    [
        {"image_share": 1.5},
        {"min_patch_share": 0.6},
        {"max_patch_share": 1.1},
        {"samples_per_group": 0},
        {"min_block": 0},
        {"max_block_share": 0.0},
        {"min_aspect": 0.0},
        {"min_aspect": float("nan")},
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name}: expected .* got {value}"):
        MaskingConfig(**values)  # type: ignore[arg-type]


def test_masks_of_a_step_have_few_components() -> None:
    masks = draw_masks(range(64), (28, 28), MaskingConfig(), seed=0).masks.numpy()
    components = [ndimage.label(mask)[1] for mask in masks if mask.any()]
    assert np.median(components) <= 6
