"""Tiled prediction: an identity model, a plain loop over a padded image, and what must not change the maps."""

import inspect
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from dinocell.eval.segmentation import tiling as tiling
from dinocell.eval.segmentation.tiling import predict

# The suite checks annotations at run time, which would stop some calls before our own message does.
unchecked = inspect.unwrap(predict)


def unchanged(windows: Tensor) -> Tensor:
    return windows


def random_image(seed: int, channels: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, height, width), dtype=np.float32)


class PlaceMap(nn.Module):
    """Maps that depend on where in the window a pixel lies, so that blending shows; two for any number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 5, padding=2)
        nn.init.normal_(self.convolution.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.convolution.bias)
        self.eval()

    def forward(self, windows: Tensor) -> Tensor:
        place = torch.linspace(-1, 1, windows.shape[-1])
        maps: Tensor = self.convolution(windows.mean(1, keepdim=True)) + place * place[:, None]
        return maps


def plain_starts(length: int, window: int, stride: int) -> list[int]:
    if length <= stride:
        return [-((window - length) // 2)]
    margin = (window - stride) // 2
    starts = list(range(-margin, length - margin, stride))
    starts[-1] = length + (window - stride - margin) - window
    return starts


def plain_predict(image: np.ndarray, model: nn.Module, window: int, overlap: int, stride: int) -> np.ndarray:
    """One window at a time from an image padded whole; weighted sums divided by sums of weights, in float64."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (window, window), (window, window)), mode="reflect")
    index = np.minimum(np.arange(window), np.arange(window)[::-1])
    ramp = np.where(index < overlap, 0.5 * (1 - np.cos(np.pi * (index + 0.5) / max(overlap, 1))), 1)
    weight = ramp[:, None] * ramp
    total, weights = np.zeros((2, height + 2 * window, width + 2 * window)), np.zeros(padded.shape[1:])
    for top in plain_starts(height, window, stride):
        for left in plain_starts(width, window, stride):
            place = np.s_[..., top + window : top + 2 * window, left + window : left + 2 * window]
            with torch.no_grad():
                maps = model(torch.from_numpy(padded[place][None]))[0].numpy()
            total[place] += maps * weight
            weights[place] += weight
    return (total / np.maximum(weights, 1e-300))[:, window:-window, window:-window]


def test_identity_reproduces_images_of_200_sizes() -> None:
    generator = np.random.default_rng(0)
    sizes = [(1, 1), (1, 2), (2, 1), (1, 700), (192, 193), (256, 256), (385, 384)]
    sizes += [tuple(generator.integers(1, (5, 60, 300, 600)[k % 4], 2).tolist()) for k in range(193)]
    for number, (height, width) in enumerate(sizes):
        image = random_image(number, 1 + number % 2, height, width)
        maps = predict(image, unchanged, stride=(None, 224, 131)[number % 3], batch_size=1 + number % 5)
        assert maps.dtype == np.float32
        np.testing.assert_allclose(maps, image, rtol=0, atol=1e-6, err_msg=f"{height} x {width}")


@pytest.mark.parametrize("stride", [16, 24, 17, 5])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (16, 32), (33, 47), (70, 100)])
def test_blending_equals_a_plain_loop(size: tuple[int, int], stride: int) -> None:
    image, model = random_image(1, 3, *size), PlaceMap()
    maps = predict(image, model, window=32, overlap=8, stride=stride, batch_size=3)
    assert maps.shape == (2, *size)
    np.testing.assert_allclose(maps, plain_predict(image, model, 32, 8, stride), rtol=0, atol=2e-5)


def test_the_number_of_tiles_is_that_of_samcell() -> None:
    for (height, width), expected, fewer in [((256, 256), 4, 4), ((520, 704), 12, 12), ((2048, 2048), 121, 100)]:
        image = np.zeros((1, height, width), np.uint8)
        for stride, count in ((None, expected), (224, fewer)):
            seen: list[int] = []
            predict(image, lambda windows, seen=seen: seen.append(len(windows)) or windows, stride=stride)
            assert sum(seen) == count


@pytest.mark.parametrize(("stride", "margin"), [(192, 32), (224, 16)])
def test_margins_have_at_most_half_the_weight_and_none_at_the_images_border(stride: int, margin: int) -> None:
    def is_margin(windows: Tensor) -> Tensor:
        maps = torch.ones_like(windows)
        maps[..., margin:-margin, :] = 0
        return maps

    share = predict(np.zeros((1, 3 * stride, 300), np.uint8), is_margin, stride=stride)[0]
    assert share[:stride].max() <= 0.5
    assert share[0].max() == share[-1].max() == 0
    assert share.max() > 0.4  # where two windows meet, as much as this


@pytest.mark.parametrize("stride", [None, 224])
def test_batch_size_does_not_change_the_maps(stride: int | None) -> None:
    image, model = random_image(3, 2, 500, 430), PlaceMap()
    one = predict(image, model, batch_size=1, stride=stride)
    for batch_size in (2, 5, 64):
        np.testing.assert_allclose(predict(image, model, batch_size=batch_size, stride=stride), one, rtol=0, atol=1e-5)


def test_batches_are_full_across_rows_of_tiles() -> None:
    sizes: list[int] = []
    done: list[tuple[int, int]] = []
    predict(
        np.zeros((1, 520, 704), np.uint8),
        lambda windows: sizes.append(len(windows)) or windows,
        batch_size=5,
        progress=lambda windows, total: done.append((windows, total)),
    )
    assert sizes == [5, 5, 2]
    assert done == [(5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2", np.int32, np.float16, np.float64, bool])
def test_values_of_every_type_reach_the_model_as_float32(dtype: str | type) -> None:
    image = (random_image(4, 1, 40, 300) * 250).astype(dtype)
    types: list[torch.dtype] = []
    maps = predict(image, lambda windows: types.append(windows.dtype) or windows)
    assert set(types) == {torch.float32}
    np.testing.assert_allclose(maps, image.astype(np.float32), rtol=1e-6)


def test_views_and_read_only_images_stay_untouched() -> None:
    whole = random_image(5, 2, 300, 420)
    for view in (whole.transpose(0, 2, 1), whole[:, ::-1, ::2], np.asfortranarray(whole)):
        view.flags.writeable = False
        np.testing.assert_allclose(predict(view, unchanged), view, rtol=0, atol=1e-6)


def test_memory_maps_need_the_memory_of_one_band(tmp_path: Path) -> None:
    image = open_memmap(tmp_path / "image.npy", mode="w+", dtype=np.uint8, shape=(1, 6000, 800))
    image[:] = np.random.default_rng(6).integers(0, 255, image.shape, np.uint8)
    out = open_memmap(tmp_path / "maps.npy", mode="w+", dtype=np.float32, shape=(1, 6000, 800))
    tracemalloc.start()
    maps = predict(image, unchanged, out=out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert maps is out
    assert peak < 8e6  # the maps alone are 19 MB; what torch holds is a band as well, but not seen here
    np.testing.assert_allclose(np.load(tmp_path / "maps.npy", mmap_mode="r"), image, rtol=0, atol=1e-4)


def test_out_may_have_less_precision() -> None:
    image = random_image(7, 1, 300, 300)
    out = np.full((1, 300, 300), np.nan, np.float16)
    assert predict(image, unchanged, out=out) is out
    np.testing.assert_allclose(out, image, rtol=0, atol=1e-3)


def test_bfloat16_is_used_by_the_model_and_not_by_the_blending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinocell.runtime.device._emulates_bfloat16", lambda: False)
    image, model = random_image(8, 1, 300, 300), PlaceMap()
    types: list[torch.dtype] = []
    model.convolution.register_forward_hook(lambda *call: types.append(call[2].dtype))
    exact, rounded = predict(image, model), predict(image, model, precision="bfloat16")
    assert set(types) == {torch.float32, torch.bfloat16}
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact).max() < 0.1
    np.testing.assert_allclose(predict(image, unchanged, precision="bfloat16"), image, rtol=0, atol=1e-6)


def test_maps_of_half_precision_models_are_blended_in_float32() -> None:
    image = random_image(9, 1, 300, 300)
    maps = predict(image, lambda windows: windows.bfloat16())
    np.testing.assert_array_equal(maps, maps.astype(np.float32))
    np.testing.assert_allclose(maps, torch.from_numpy(image).bfloat16().float().numpy(), rtol=0, atol=1e-6)


def test_torch_blends_as_numpy_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU the maps stay tensors; here they are made to.
    image, model = random_image(11, 1, 500, 430), PlaceMap()
    expected = predict(image, model)
    monkeypatch.setattr(tiling, "_array", lambda tensor: tensor)
    np.testing.assert_allclose(predict(image, model), expected, rtol=0, atol=1e-5)


@pytest.mark.cuda
def test_cuda_gives_the_maps_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    image, convolution = random_image(10, 1, 700, 500), nn.Conv2d(1, 2, 5, padding=2).eval()
    exact = predict(image, convolution)
    for device, precision, tolerance in ((None, "float32", 1e-2), ("cuda", "auto", 5e-2)):
        maps = predict(image, convolution.cuda(), device=device, precision=precision)
        np.testing.assert_allclose(maps, exact, rtol=0, atol=tolerance)


def test_modules_in_training_mode_are_refused() -> None:
    with pytest.raises(ValueError, match="model: in training mode"):
        predict(np.zeros((1, 8, 8)), nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window and batch_size: .* 0 and 8"),
        ({"batch_size": 0}, "window and batch_size: .* 256 and 0"),
        ({"overlap": 129}, "overlap: .*129"),
        ({"overlap": -1}, "overlap: .*-1"),
        ({"stride": 225}, "stride: .*225"),
        ({"stride": 0}, "stride: .*0"),
        ({"precision": "bf16"}, "precision: .*bf16"),
        ({"out": np.zeros((1, 8, 9))}, r"out: .*\(1, 8, 9\)"),
        ({"out": np.zeros((1, 8, 8), int)}, "out: .*int64"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(np.zeros((1, 8, 8)), unchanged, **options)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((1, 0, 8)), r"image: .*\(1, 0, 8\)"),
        (np.zeros((0, 8, 8)), r"image: .*\(0, 8, 8\)"),
        (np.zeros((1, 8, 8), complex), "image: .*complex128"),
        (np.full((1, 8, 8), np.nan), "image: .*finite.* rows 0 to 7"),
        (np.full((1, 8, 8), np.inf, np.float32), "image: .*finite"),
        (np.full((1, 8, 8), 1e39), "image: .*finite.* beyond float32"),
    ],
)
def test_images_that_cannot_be_predicted_are_refused(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        predict(image, unchanged)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ((2, 1, 128, 128), r"model: .*\(2, 1, 256, 256\).*\(2, 1, 128, 128\)"),
        ((2, 256, 256), r"model: .*\(2, 256, 256\)"),
        ((1, 3, 256, 256), r"model: .*\(2, 3, 256, 256\).*\(1, 3, 256, 256\)"),
    ],
)
def test_maps_of_another_size_are_refused(maps: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(np.zeros((1, 200, 10)), lambda windows: torch.zeros(maps))


def test_maps_that_are_not_finite_are_refused() -> None:
    image = np.zeros((1, 500, 10))
    with pytest.raises(ValueError, match=r"model: .*finite.*1600 .* rows 0 to 159"):
        predict(image, lambda windows: windows / windows)
