"""Other programs read the label image from exported files, pixel by pixel."""

import json
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import shapely
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from roifile import roiread
from shapely.geometry import shape as geometry_of

from dinocell.demo.synthetic.field import SyntheticConfig, make_field
from dinocell.errors import DinocellError
from dinocell.eval.export.outlines import trace_cells
from dinocell.eval.export.writers import coco_image, read_coco_file, write_coco_file, write_geojson, write_rois
from dinocell.labelled.masks import decode_run_lengths, uncompressed


def ragged() -> np.ndarray:
    """Cells in fragments, with holes, with cells in their holes, up to the image's edges; ids with gaps."""
    labels = np.random.default_rng(1).choice([0, 3, 9], (31, 23), p=[0.3, 0.6, 0.1])
    labels[10:20, 3:9] = 70000
    return labels.astype(np.int32)


def cells() -> np.ndarray:
    return make_field(3, SyntheticConfig(size=(96, 130), num_cells=(6, 10), cell_radius_px=12.0)).labels


# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

IMAGES = pytest.mark.parametrize("labels", [ragged(), cells(), np.zeros((6, 5), np.int32)], ids=["ragged", "", "none"])


def inside(geometry: shapely.Geometry, shape: tuple[int, ...]) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    return shapely.contains_xy(geometry, columns.ravel(), rows.ravel()).reshape(shape)


@IMAGES
def test_shapely_reads_the_same_masks_from_geojson(labels: np.ndarray, tmp_path: Path) -> None:
    write_geojson(tmp_path / "a.geojson", trace_cells(labels), name="a")
    content = json.loads((tmp_path / "a.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    found = np.zeros_like(labels)
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        assert UUID(feature["id"])
        assert feature["properties"]["objectType"] == "detection"
        geometry = geometry_of(feature["geometry"])
        assert geometry.is_valid
        found[inside(geometry, labels.shape)] = int(feature["properties"]["name"].removeprefix("cell "))
    np.testing.assert_array_equal(found, labels)
    assert len(content["features"]) == len(np.unique(labels[labels > 0]))


@IMAGES
def test_roifile_reads_the_same_masks_from_the_zip(labels: np.ndarray, tmp_path: Path) -> None:
    write_rois(tmp_path / "a_rois.zip", trace_cells(labels))
    found = np.zeros_like(labels)
    rois = roiread(tmp_path / "a_rois.zip") if labels.any() else []
    for roi in rois:
        # Even-odd, as ImageJ fills paths.
        mask = np.zeros(labels.shape, np.bool_)
        for ring in roi.coordinates(multi=True):
            mask ^= inside(shapely.Polygon(ring), labels.shape)
        assert not found[mask].any()
        found[mask] = int(roi.name)
        rows, columns = np.nonzero(mask)
        assert (roi.left, roi.top) == (columns.min(), rows.min())
    np.testing.assert_array_equal(found, labels)


def test_rois_in_a_large_image_keep_their_positions(tmp_path: Path) -> None:
    (cell,) = trace_cells(np.ones((3, 4), np.int32))
    moved = [ring + np.array([70000, 40000], np.int32) for ring in cell.fragments[0]]
    write_rois(tmp_path / "a.zip", [type(cell)(label=1, fragments=(tuple(moved),))])
    (roi,) = roiread(tmp_path / "a.zip")
    np.testing.assert_array_equal(roi.coordinates(), moved[0])


@IMAGES
def test_pycocotools_reads_the_same_masks(labels: np.ndarray, tmp_path: Path) -> None:
    write_coco_file(tmp_path / "coco.json", {"a": coco_image(labels, file_name="a.tif", frame=None)})
    coco = COCO(str(tmp_path / "coco.json"))
    found = np.zeros_like(labels)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=[1])):
        mask = coco.annToMask(annotation).astype(bool)
        found[mask] = annotation["cell"]
        assert annotation["area"] == mask.sum()
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert encoded["counts"] == annotation["segmentation"]["counts"].encode()
        assert list(coco_mask.toBbox(encoded)) == annotation["bbox"]
        ours = decode_run_lengths(uncompressed(annotation["segmentation"]["counts"]), labels.shape)
        np.testing.assert_array_equal(ours, mask)
    np.testing.assert_array_equal(found, labels)
    assert (coco.imgs[1]["height"], coco.imgs[1]["width"]) == labels.shape


def test_an_image_without_background_has_run_lengths(tmp_path: Path) -> None:
    (cell,) = coco_image(np.full((3, 4), 2, np.int32), file_name="a.tif", frame=0).annotations
    np.testing.assert_array_equal(coco_mask.decode(cell["segmentation"]), np.ones((3, 4)))


def test_entries_added_to_a_coco_file_get_new_ids(tmp_path: Path) -> None:
    path = tmp_path / "coco.json"
    write_coco_file(path, {"b": coco_image(cells(), file_name="b.tif", frame=None)})
    images = read_coco_file(path) | {"a": coco_image(ragged(), file_name="a.tif", frame=2)}
    write_coco_file(path, images)
    assert read_coco_file(path) == images
    coco = COCO(str(path))
    assert [(image["name"], image["id"]) for image in coco.imgs.values()] == [("a", 1), ("b", 2)]
    assert len(coco.getAnnIds(imgIds=[2])) == cells().max()
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    path.write_text('{"images": [{"id": 1}], "annotations": []}')
    with pytest.raises(DinocellError, match=r"coco\.json"):
        read_coco_file(path)
