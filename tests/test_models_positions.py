"""Rotary tables and learned positions, against formulas written out in NumPy."""

import math

import numpy as np
import pytest
import torch

from dinocell.models.positions import (
    LearnedPositionConfig,
    RopeConfig,
    TrainingNoise,
    learned_positions,
    rotary_periods,
    rotary_table,
    rotate,
)


def numpy_angles(rows: int, columns: int, head_dim: int, base: float) -> np.ndarray:
    periods = [base ** (2 * i / (head_dim / 2)) for i in range(head_dim // 4)]
    angles = []
    for row in range(rows):
        for column in range(columns):
            y, x = (row + 0.5) / rows * 2 - 1, (column + 0.5) / columns * 2 - 1
            half = [2 * math.pi * y / p for p in periods] + [2 * math.pi * x / p for p in periods]
            angles.append(half + half)
    return np.array(angles)


def test_periods_of_a_64_wide_head_are_from_1_to_74_99() -> None:
    periods = rotary_periods(RopeConfig(base=100.0), 64)
    assert len(periods) == 16
    assert periods[0] == 1
    assert periods[-1].item() == pytest.approx(100 ** (30 / 32), rel=1e-6)
    assert periods[-1].item() == pytest.approx(74.99, abs=0.005)


def test_minimum_and_maximum_period_are_both_reached() -> None:
    periods = rotary_periods(RopeConfig(min_period=0.5, max_period=32.0), 32)
    expected = np.geomspace(0.5, 32.0, 8)
    np.testing.assert_allclose(periods.numpy(), expected, rtol=1e-6)


def test_one_period_bound_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="min_period"):
        RopeConfig(min_period=1.0)


@pytest.mark.parametrize("grid", [(4, 4), (3, 7)])
def test_table_equals_the_written_out_formula(grid: tuple[int, int]) -> None:
    table = rotary_table(grid, 5, 32, RopeConfig())
    expected = numpy_angles(*grid, 32, 100.0)
    np.testing.assert_allclose(table.cos[5:, 0, 0].numpy(), np.cos(expected), atol=1e-5)
    np.testing.assert_allclose(table.sin[5:, 0, 0].numpy(), np.sin(expected), atol=1e-5)


def test_prefix_tokens_are_not_rotated() -> None:
    table = rotary_table((3, 3), 5, 16, RopeConfig())
    x = torch.randn(2, 14, 2, 3, 16)
    assert torch.equal(rotate(x, table)[:, :5], x[:, :5])


@pytest.mark.parametrize(("coordinates", "lengths"), [("separate", (2, 6)), ("min", (2, 2)), ("max", (6, 6))])
def test_coordinates_are_divided_by_the_chosen_length(coordinates: str, lengths: tuple[int, int]) -> None:
    table = rotary_table((2, 6), 0, 4, RopeConfig(coordinates=coordinates))
    # With head width 4 there is one period, 1: the angles are 2 pi times the coordinates.
    y, x = ((np.arange(n) + 0.5) / length * 2 - 1 for n, length in zip((2, 6), lengths, strict=True))
    np.testing.assert_allclose(table.sin[:, 0, 0, 0].numpy(), np.sin(2 * np.pi * np.repeat(y, 6)), atol=1e-5)
    np.testing.assert_allclose(table.sin[:, 0, 0, 1].numpy(), np.sin(2 * np.pi * np.tile(x, 2)), atol=1e-5)


def test_rotation_keeps_norms() -> None:
    x = torch.randn(2, 9, 2, 3, 16, dtype=torch.float64)
    table = rotary_table((3, 3), 0, 16, RopeConfig())
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_products_depend_only_on_the_difference_of_coordinates() -> None:
    query, key = torch.randn(2, 16)
    rotated = rotate(
        torch.stack([query, key])[None, None, :, None].repeat(1, 16, 1, 1, 1), rotary_table((4, 4), 0, 16, RopeConfig())
    )
    queries, keys = rotated[0, :, 0, 0].view(4, 4, 16), rotated[0, :, 1, 0].view(4, 4, 16)
    for down, right in [(0, 1), (1, 0), (1, 2), (-1, 1)]:
        products = [
            float(queries[y, x] @ keys[y + down, x + right])
            for y in range(4)
            for x in range(4)
            if 0 <= y + down < 4 and 0 <= x + right < 4
        ]
        np.testing.assert_allclose(products, products[0], atol=1e-4)


def test_gradient_of_the_rotation_equals_autograd_of_the_plain_formula() -> None:
    table = rotary_table((2, 3), 1, 8, RopeConfig())
    x = torch.randn(2, 7, 2, 2, 8, requires_grad=True)
    weight = torch.randn_like(x)
    (ours,) = torch.autograd.grad((rotate(x, table) * weight).sum(), x)
    first, second = x.chunk(2, -1)
    plain = x * table.cos + torch.cat((-second, first), -1) * table.sin
    (expected,) = torch.autograd.grad((plain * weight).sum(), x)
    torch.testing.assert_close(rotate(x, table), plain)
    torch.testing.assert_close(ours, expected)


def test_half_precision_is_rotated_in_the_precision_of_the_table() -> None:
    table = rotary_table((4, 4), 0, 16, RopeConfig())
    x = torch.randn(1, 16, 2, 1, 16)
    rotated = rotate(x.bfloat16(), table)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated, rotate(x.bfloat16().float(), table).bfloat16())


def test_noise_perturbs_within_its_bounds_and_repeats_with_its_generator() -> None:
    def angle(noise: TrainingNoise, seed: int) -> torch.Tensor:
        # The last patch of a 2 x 2 grid lies at (0.5, 0.5); with one period, 1, its angles are 2 pi times that.
        table = rotary_table((2, 2), 0, 4, RopeConfig(), noise=noise, generator=torch.Generator().manual_seed(seed))
        return torch.atan2(table.sin, table.cos)[3, 0, 0, :2] / (2 * math.pi)

    plain = angle(TrainingNoise(), 0)
    for seed in range(20):
        shifted = angle(TrainingNoise(rope_shift=0.1), seed) - plain
        shifted = (shifted + 0.5) % 1 - 0.5
        assert shifted.abs().max() <= 0.1 + 1e-5
        rescaled = angle(TrainingNoise(rope_rescale=1.5), seed) % 1
        assert rescaled.min() >= 0.5 / 1.5 - 1e-4
        assert rescaled.max() <= 0.75 + 1e-4
        assert rescaled[0].item() == pytest.approx(rescaled[1].item(), abs=1e-5)
    jittered = angle(TrainingNoise(rope_jitter=1.5), 3) % 1
    assert jittered[0].item() != pytest.approx(jittered[1].item(), abs=1e-4)
    assert torch.equal(angle(TrainingNoise(rope_jitter=1.5), 3), angle(TrainingNoise(rope_jitter=1.5), 3))
    assert not torch.equal(angle(TrainingNoise(rope_jitter=1.5), 3), angle(TrainingNoise(rope_jitter=1.5), 4))


@pytest.mark.parametrize(
    "wrong",
    [{"drop_path": 1.0}, {"drop_path": -0.1}, {"rope_jitter": 0.5}, {"rope_rescale": 0.0}, {"rope_shift": -1.0}],
)
def test_impossible_noise_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingNoise(**wrong)


def test_learned_positions_of_the_trained_grid_are_unchanged() -> None:
    table = torch.randn(1, 1 + 12, 8)
    assert learned_positions(table, (3, 4), LearnedPositionConfig(grid_rows=3, grid_columns=4)) is table


@pytest.mark.parametrize("antialias", [False, True])
def test_exact_size_convention_is_a_bicubic_resize(antialias: bool) -> None:
    config = LearnedPositionConfig(grid_rows=6, grid_columns=6, offset=0.0, antialias=antialias)
    table = torch.randn(1, 37, 8)
    ours = learned_positions(table, (4, 9), config)
    image = table[:, 1:].view(1, 6, 6, 8).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, size=(4, 9), mode="bicubic", antialias=antialias)
    torch.testing.assert_close(ours[:, 1:], resized.permute(0, 2, 3, 1).reshape(1, 36, 8))
    assert torch.equal(ours[:, 0], table[:, 0])


def cubic_resize(values: np.ndarray, size: int, scale: float) -> np.ndarray:
    """Resize along the first axis with the cubic kernel of a = -0.75, centres at half integers, edges repeated."""

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    out = np.zeros((size, *values.shape[1:]))
    for target in range(size):
        source = (target + 0.5) / scale - 0.5
        for tap in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            out[target] += kernel(source - tap) * values[np.clip(tap, 0, len(values) - 1)]
    return out


def test_offset_convention_scales_by_a_tenth_of_a_patch_more() -> None:
    config = LearnedPositionConfig(grid_rows=5, grid_columns=5, offset=0.1)
    table = torch.randn(1, 26, 3)
    ours = learned_positions(table, (8, 7), config)
    expected = cubic_resize(table[0, 1:].view(5, 5, 3).numpy(), 8, 8.1 / 5)
    expected = cubic_resize(expected.swapaxes(0, 1), 7, 7.1 / 5).swapaxes(0, 1)
    np.testing.assert_allclose(ours[0, 1:].numpy(), expected.reshape(56, 3), atol=1e-5)
