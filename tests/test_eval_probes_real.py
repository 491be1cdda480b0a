"""The probes as commands on real fields with class labels: Schwann cells of two NF1 genotypes, three stains, one plate.

There is one field a well and one well of the genotype WT, so nothing here says how well a genotype is told; what is
checked is that pixels, stains and labels go through to the scores, against scikit-learn and NumPy.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.neighbors import KNeighborsClassifier

from dinocell.cli import main
from dinocell.eval.probes.features import read_features

FOLDER = Path(__file__).parents[2] / "shared" / "data" / "nf1_schwann_cell_painting"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/data/nf1_schwann_cell_painting"),
]
FEATURES = ["--weights", "random:tiny", "--resize-size", "64", "--crop-size", "0", "--device", "cpu"]


def build(folder: Path, wells: str) -> Path:
    """Build tiles of some wells, labelled by the plate map."""
    for well in wells.split():
        for path in FOLDER.glob(f"Plate_2_images/{well}_*.tif"):
            (folder / wells).mkdir(parents=True, exist_ok=True)
            (folder / wells / path.name).symlink_to(path.absolute())
    line = ["shards", "build", "--source", "pattern", "--input", str(folder / wells), "--tile-size", "256"]
    line += ["--pattern", "{well}_01_*_{site}_{channel}_001.tif", "--min-structure", "0", "--workers", "1"]
    line += ["--labels", str(FOLDER / "platemap_NF1_plate2.csv"), "--labels-key", "well_position=well"]
    output = folder / f"shards {wells}"
    assert main([*line, "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return tiles of a well of either genotype, and of another well of Null."""
    folder = tmp_path_factory.mktemp("nf1")
    return build(folder, "B7 D6"), build(folder, "D7")


def rows_of(path: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads(path.read_text())["rows"]
    return rows


def features(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    found = read_features(folder)
    return np.asarray(found.values, np.float64), np.array([row["genotype"] for row in found.labels])


def test_neighbours_and_classifiers_see_the_genotypes_of_the_plate_map(sets: tuple[Path, Path], tmp_path: Path) -> None:
    known, asked = (str(each) for each in sets)
    task = ["--task", "genotype", "--metric", "accuracy"]
    assert main(["knn", *FEATURES, *task, "--train", known, "--test", asked, "--nb-knn", "5", "9",
                 "--output", str(tmp_path / "knn")]) == 0  # fmt: skip
    (train, names), (test, wanted) = (features(tmp_path / "knn" / "features" / each) for each in ("train", "test"))
    assert train.shape[1:] == test.shape[1:] == (3 * 192,)
    assert (sorted(set(names)), set(wanted)) == (["Null", "WT"], {"Null"})
    for row in rows_of(tmp_path / "knn" / "knn.json"):
        oracle = KNeighborsClassifier(
            int(row["k"]), algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train, names)
        assert row["accuracy"] == pytest.approx((oracle.predict(test) == wanted).mean())

    # Of the very tiles that it knows, the nearest neighbour of each is itself.
    line = [*FEATURES, *task, "--train", known, "--test", known]
    assert main(["knn", *line, "--nb-knn", "1", "--output", str(tmp_path / "itself")]) == 0
    assert rows_of(tmp_path / "itself" / "knn.json")[0]["accuracy"] == 1.0

    fast = ["--epochs", "5", "--epoch-steps", "20", "--train-batch-size", "16"]
    assert main(["linear", *line, *fast, "--output", str(tmp_path / "itself")]) == 0
    about = json.loads((tmp_path / "itself" / "linear.json").read_text())["about"]
    assert float(about["accuracy"]) > max(np.mean(names == name) for name in set(names)) + 0.1
    saved = tmp_path / "itself" / "classifier.safetensors"
    assert main(["linear", *FEATURES, *task, "--train", known, "--test", asked, "--classifier", str(saved),
                 "--output", str(tmp_path / "knn")]) == 0  # fmt: skip
    classifier = load_file(saved)
    said = np.array(["Null", "WT"])[(test @ classifier["weight"].T + classifier["bias"]).argmax(1)]
    assert rows_of(tmp_path / "knn" / "linear.json")[0]["accuracy"] == pytest.approx((said == wanted).mean())


def test_consistency_over_real_stains_is_that_of_plain_numpy(sets: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "features"
    assert main(["features", *FEATURES, "--channels", "bag", "--data", str(sets[0]), "--output", str(folder)]) == 0
    assert main(["consistency", *FEATURES, "--data", str(sets[0]), "--output", str(tmp_path)]) == 0
    [row] = rows_of(tmp_path / "consistency.json")
    values = features(folder)[0].reshape(-1, 3, 192)
    assert (row["fields"], row["channels"]) == values.shape[:2]
    values -= values.mean((0, 1))
    values /= np.linalg.norm(values, axis=2, keepdims=True)
    cosine = np.einsum("icd,jkd->cikj", values, values)  # asking stain, field; searched stain, field
    itself = np.eye(len(values), dtype=bool)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    same = np.mean([cosine[a, :, b][itself] for a, b in pairs])
    different = np.mean([cosine[a, :, b][~itself] for a in range(3) for b in range(3)])
    found = np.mean([cosine[a, :, b].argmax(1) == np.arange(len(values)) for a, b in pairs])
    assert row["margin"] == pytest.approx(same - different, abs=1e-4)
    assert row["retrieval"] == pytest.approx(found, abs=1e-6)
    for name in ("same_field_1.png", "retrieval_1.png"):
        assert (tmp_path / name).stat().st_size > 1000
