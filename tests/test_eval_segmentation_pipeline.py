"""From an image to cells: shapes and types, thresholds of one call, pixel sizes, scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError, ImageError
from dinocell.eval import threshold_search
from dinocell.eval.metrics.ctc import ctc_score
from dinocell.eval.segmentation.pipeline import DECODERS, DINOCellPipeline
from dinocell.eval.segmentation.watershed import distance_to_labels
from dinocell.eval.threshold_search import score_segmenter
from dinocell.finetune.model import DINOCell, replace_settings
from dinocell.finetune.preprocess import SegmenterSettings, prepare
from dinocell.labelled.dataset import LabelledImage
from dinocell.labelled.distance import labels_to_distance
from dinocell.models.config import VARIANTS, variant_config

FIELD = make_field(7, SyntheticConfig(size=(150, 190), channels=("AGP",), num_cells=(8, 12), cell_radius_px=14.0))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DINOCell:
    monkeypatch.setitem(VARIANTS, "tiny", variant_config("tiny", width=32, depth=4, heads=2, mlp_hidden=64))
    torch.manual_seed(0)
    built = DINOCell("vitt8", pretrained=False)
    replace_settings(built, clahe_clip=0.0, percentiles=(0.0, 100.0), convention="unit")
    return built


def unchanged(images: torch.Tensor) -> torch.Tensor:
    """Stand in for the network: the map is the picture."""
    return torch.logit(images.clamp(1e-6, 1 - 1e-6))


@pytest.fixture
def mirror(model: DINOCell, monkeypatch: pytest.MonkeyPatch) -> DINOCellPipeline:
    """Return a pipeline whose network gives back its input, so that a picture of a distance map is one."""
    monkeypatch.setattr(model, "forward_logits", unchanged)
    return DINOCellPipeline(model, device="cpu", crop_size=128)


def as_picture(labels: np.ndarray) -> np.ndarray:
    return np.rint(labels_to_distance(labels) * 255).astype(np.uint8)


def test_a_network_that_returns_the_true_map_gives_the_cells(mirror: DINOCellPipeline) -> None:
    labels, distance = mirror.run(as_picture(FIELD.labels), return_dist_map=True)
    assert labels.dtype == np.int32
    assert np.abs(distance - labels_to_distance(FIELD.labels)).max() < 0.01
    assert ctc_score(FIELD.labels, labels).op_csb > 0.95


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.float64, np.int16])
def test_intensity_range_and_type_do_not_change_the_cells(mirror: DINOCellPipeline, dtype: type) -> None:
    picture = as_picture(FIELD.labels)
    np.testing.assert_array_equal(mirror.run(picture), mirror.run((picture.astype(np.float64) * 7 + 11).astype(dtype)))


def test_all_channel_layouts_give_the_same_cells(mirror: DINOCellPipeline) -> None:
    plane = as_picture(FIELD.labels)
    expected = mirror.run(plane)
    rgb = np.repeat(plane[None], 3, axis=0)
    alpha = np.full_like(plane, 255)
    for image in (plane[None], rgb, np.moveaxis(rgb, 0, 2), np.concatenate([rgb, alpha[None]])):
        np.testing.assert_array_equal(mirror.run(image), expected)


def test_a_low_colour_image_is_not_read_as_many_channels(mirror: DINOCellPipeline) -> None:
    plane = as_picture(FIELD.labels)[60:70]
    rgb = np.repeat(plane[..., None], 3, axis=2)
    np.testing.assert_array_equal(mirror.run(rgb), mirror.run(plane))


def test_a_channel_can_be_chosen(mirror: DINOCellPipeline) -> None:
    plane = as_picture(FIELD.labels)
    stack = np.stack([plane[::-1], plane])
    np.testing.assert_array_equal(mirror.run(stack, channel=1), mirror.run(plane))
    with pytest.raises(ImageError, match="no channel 2"):
        mirror.run(stack, channel=2)


def test_thresholds_of_one_call_do_not_change_the_next(mirror: DINOCellPipeline) -> None:
    picture = as_picture(FIELD.labels)
    before = mirror.run(picture)
    other = mirror.run(picture, cells_max=0.9, cell_fill=0.8)
    assert not np.array_equal(other, before)
    np.testing.assert_array_equal(mirror.run(picture), before)
    np.testing.assert_array_equal(mirror.cells(mirror.maps(picture), cells_max=0.9, cell_fill=0.8), other)


def test_an_image_of_another_pixel_size_is_scaled_and_the_labels_back(
    model: DINOCell, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_settings(model, pixel_size_um=1.0)
    monkeypatch.setattr(model, "forward_logits", unchanged)
    pipeline = DINOCellPipeline(model, device="cpu", crop_size=128)
    large = np.kron(FIELD.labels, np.ones((2, 2), np.int32))
    labels = pipeline.run(as_picture(large), pixel_size_um=0.5)
    assert labels.shape == large.shape
    assert ctc_score(large, labels).op_csb > 0.9


def test_a_pixel_size_in_another_unit_is_refused(mirror: DINOCellPipeline) -> None:
    replace_settings(mirror.model, pixel_size_um=0.5)
    with pytest.raises(ImageError, match=r"got 325 um.*\(0\.5\)"):
        mirror.run(np.zeros((64, 64), np.uint8), pixel_size_um=325)
    replace_settings(mirror.model, pixel_size_um=None)
    for size in (0, -1, np.inf, np.nan):
        with pytest.raises(DinocellError, match="pixel_size_um: "):
            mirror.run(np.zeros((64, 64), np.uint8), pixel_size_um=float(size))


def test_a_stride_out_of_range_and_a_missing_device_are_refused(model: DINOCell) -> None:
    for stride in (0, 113):
        with pytest.raises(DinocellError, match=rf"stride: .*got {stride}"):
            DINOCellPipeline(model, crop_size=128, stride=stride)
    assert DINOCellPipeline(model, crop_size=128, stride=112).run(np.zeros((130, 200), np.uint8)).max() == 0
    with pytest.raises(DinocellError, match="'gpu'"):
        DINOCellPipeline(model, device="gpu")
    with pytest.raises(DinocellError, match=r"compute\.device: cuda"):
        DINOCellPipeline(model, device="cuda:99")


@pytest.mark.parametrize("image", [np.zeros((0, 4)), np.zeros(7), np.zeros((2, 3, 4, 5)), np.full((32, 32), np.nan)])
def test_arrays_that_are_no_images_are_refused(mirror: DINOCellPipeline, image: np.ndarray) -> None:
    with pytest.raises(ImageError):
        mirror.run(image)


def test_a_blank_image_has_no_cells(mirror: DINOCellPipeline) -> None:
    assert mirror.run(np.full((70, 40), 300, np.uint16)).max() == 0


def test_images_are_prepared_by_the_settings_of_the_model(model: DINOCell, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def look(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros_like(images)

    replace_settings(model, clahe_clip=1.0)
    picture = as_picture(FIELD.labels)[:128, :128]
    model.forward_logits = look  # type: ignore[method-assign]
    DINOCellPipeline(model, device="cpu", crop_size=128, stride=96).run(picture)
    expected = prepare(picture, SegmenterSettings(convention="unit", percentiles=(0.0, 100.0), clahe_clip=1.0))
    # The first window starts 16 px outside.
    np.testing.assert_allclose(seen[0][0, 0, 16:, 16:].numpy(), expected[:112, :112], atol=1e-6)


@pytest.mark.slow
def test_scoring_finds_thresholds_that_are_at_least_as_good(
    mirror: DINOCellPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DECODERS["distance"].training_axes, "merge_px", (None, 3.0))  # four take twice the time
    picture = as_picture(FIELD.labels)
    image = LabelledImage(
        pixels=picture[None], labels=FIELD.labels, distance=None, crowd=None, name="a", pixel_size_um=None
    )
    plain = score_segmenter(mirror.model, [image], False)
    found = score_segmenter(mirror.model, [image], True)
    assert plain.settings == {}
    seen: list[tuple[int, ...]] = []
    mirror.model.forward_logits = lambda images: (seen.append(tuple(images.shape[2:])), unchanged(images))[1]  # type: ignore[method-assign]
    assert score_segmenter(mirror.model, [image], False, crop_size=96, stride=64).metrics == plain.metrics
    assert set(seen) == {(96, 96)}
    assert found.settings == {}  # the defaults, which are not on the grid, were better than all of it
    assert found.metrics == plain.metrics
    replace_settings(mirror.model, cells_max=0.95, cell_fill=0.9)
    found = score_segmenter(mirror.model, [image], True)
    assert set(found.settings) == {"cells_max", "cell_fill", "merge_px", "restore_border"}
    assert found.metrics["score/op_csb"] > 0.95
    assert mirror.model.settings.cells_max == 0.95, "the model stays as it is"
    replace_settings(mirror.model, **found.settings)
    assert score_segmenter(mirror.model, [image], False).metrics == found.metrics


@pytest.mark.parametrize("restore_border", [False, True])
def test_boundaries_are_refined_by_the_settings_of_the_model(mirror: DINOCellPipeline, restore_border: bool) -> None:
    replace_settings(mirror.model, cell_fill=0.3, restore_border=restore_border)
    pipeline = DINOCellPipeline(mirror.model, device="cpu", crop_size=128)
    maps = pipeline.maps(as_picture(FIELD.labels))
    wanted = distance_to_labels(maps, cells_max=0.47, cell_fill=0.3, restore_border=restore_border)
    np.testing.assert_array_equal(pipeline.cells(maps), wanted)
    other = distance_to_labels(maps, cells_max=0.47, cell_fill=0.3, restore_border=not restore_border)
    assert (other != wanted).any()


def test_scoring_scales_images_and_drops_small_cells_as_the_pipeline_does(
    mirror: DINOCellPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_settings(mirror.model, pixel_size_um=1.0, min_area_px=400, cells_max=0.6)
    picture = as_picture(FIELD.labels)
    image = LabelledImage(
        pixels=picture[None], labels=FIELD.labels, distance=None, crowd=None, name="a", pixel_size_um=1.25
    )
    in_use = DINOCellPipeline(mirror.model, "cpu").run(picture, pixel_size_um=1.25)
    own = ctc_score(FIELD.labels, in_use).op_csb
    assert own != ctc_score(FIELD.labels, DINOCellPipeline(mirror.model, "cpu").run(picture)).op_csb
    assert score_segmenter(mirror.model, [image], False).metrics["score/op_csb"] == pytest.approx(own)
    tried: list[int] = []
    whole_search = threshold_search.search_parameters

    def coarse(maps: Any, references: Any, parameters: Any, _axes: Any) -> Any:
        tried.append(parameters.min_area_px)
        return whole_search(maps, references, parameters, {"cells_max": (0.5,), "cell_fill": (0.1,)})

    monkeypatch.setattr(threshold_search, "search_parameters", coarse)
    score_segmenter(mirror.model, [image], True)
    assert tried == [400]


def test_tiles_are_as_large_as_the_training_crops(model: DINOCell) -> None:
    assert DINOCellPipeline(model).crop_size == 256
    replace_settings(model, window_px=128)
    own, asked = DINOCellPipeline(model, stride=96), DINOCellPipeline(model, crop_size=128)
    assert own.crop_size == asked.crop_size == 128
    image = np.random.default_rng(0).random((150, 170)).astype(np.float32)
    np.testing.assert_array_equal(own.distance(image), asked.distance(image))
    assert DINOCellPipeline(model, crop_size=64).crop_size == 64
