"""The probes as commands: on class folders, on folders shaped as HPAone and CHAMMI are published, on shards."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dinocell.cli import main
from dinocell.eval.probes.classification import make_task
from dinocell.eval.probes.features import FeatureSettings, extract_to
from dinocell.eval.probes.image_sets import ProbeImage, to_unit
from dinocell.images.write import write_png
from dinocell.models.weights import load_backbone

PLACES = ("nucleoplasm", "cytosol")
LINES = ("A-431", "U-2 OS")


def striped(kind: int, seed: int, channels: int = 1, side: int = 32) -> np.ndarray:
    """Stripes along rows or columns, on noise: two classes that any backbone tells apart."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.arange(side) * 0.9 + rng.uniform(0, 6))
    plane = waves[:, None] if kind else waves[None, :]
    pixels = 120 + 80 * plane + rng.normal(0, 8, (channels, side, side))
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    for part, first in (("train", 0), ("test", 100)):
        for kind, name in enumerate(("columns", "rows")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(12):
                image = striped(kind, first + number)[0]
                write_png(tmp_path / part / name / f"{number}.png", image)
    return tmp_path


@pytest.fixture
def hpaone(tmp_path: Path) -> Path:
    folder = tmp_path / "hpaone"
    images = folder / "fixed_size_masked_single_cells_HPA"
    images.mkdir(parents=True)
    for table, first in (("pretrain", 0), ("evaluation", 50)):
        path = folder / f"fixed_size_masked_single_cells_{table}_20240507.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", *PLACES, *LINES])
            for number in range(first, first + 20):
                kind = number % 2
                wide = np.concatenate(list(striped(kind, number, 4)), axis=1)
                write_png(images / f"c{number}.png", wide)
                writer.writerow([f"c{number}.png", kind == 0, number % 4 < 3, kind == 0, kind == 1])
    return folder


@pytest.fixture
def chammi(tmp_path: Path) -> Path:
    folder = tmp_path / "chammi"
    (folder / "CP").mkdir(parents=True)
    with (folder / "morphem70k_v2.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_path", "label", "train_test_split", "chan_name", "plate"])
        for number in range(32):
            # A third class that training does not have.
            kind = number % 2 if number < 16 else number % 3
            pixels = striped(min(kind, 1), number, 5)
            if kind == 2:
                pixels = np.full_like(pixels, 100) + (np.indices((32, 32)).sum(0) % 8 < 4).astype(np.uint8) * 80
            write_png(folder / "CP" / f"c{number}.png", np.concatenate(list(pixels), axis=1))
            split = "Train" if number < 16 else "Task_four"
            writer.writerow([f"CP/c{number}.png", f"class{kind}", split, "CP", f"p{number // 3 % 2}"])
    return folder


class Screen:
    """Two plates of eight wells: a compound that makes rows, one that makes columns, and untreated wells between."""

    name = "screen"

    def __len__(self) -> int:
        return 16

    def images(self, start: int, stop: int) -> Iterator[ProbeImage]:
        for number in range(start, stop):
            plate, well = divmod(number, 8)
            compound = ("rows", "columns", "DMSO", "DMSO")[well % 4]
            pixels = striped(well % 2, number) if well % 4 < 2 else np.full((1, 32, 32), 90, np.uint8)
            yield ProbeImage(
                id=f"w{number}",
                pixels=to_unit(pixels),
                channel_names=("DNA",),
                labels={"plate": f"p{plate}", "well": f"A{well}", "compound": compound},
            )


def scores(folder: Path, name: str) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / f"{name}.json").read_text())
    return content


def test_knn_names_class_folders(class_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = class_folders / "out"
    line = ["knn", "--weights", "random:nano", "--train", str(class_folders / "train"), "--test"]
    line += [str(class_folders / "test"), "--crop-size", "32", "--nb-knn", "1", "5", "--output", str(output)]
    assert main(line) == 0
    rows = scores(output, "knn")["rows"]
    assert isinstance(rows, list)
    assert [row["k"] for row in rows] == [1, 5]
    assert rows[0]["mean_per_class_multiclass_f1"] > 0.8
    for name in (
        "knn.csv",
        "knn.md",
        "knn_classes.csv",
        "knn_classes.png",
        "knn_confusion.png",
        "features/train/rows.csv",
    ):
        assert (output / name).stat().st_size > 20, name
    before = (output / "features" / "train" / "features.npy").stat().st_mtime_ns
    assert main([*line, "--metric", "accuracy"]) == 0  # the features are there
    assert (output / "features" / "train" / "features.npy").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main([*line, "--metric", "mean_per_class_multilabel_f1"]) == 2
    assert "--metric: expected mean_per_class_multiclass_f1" in capsys.readouterr().err
    assert main([*line[:-5], "--nb-knn", "99", "--output", str(output)]) == 2
    assert "--nb-knn: expected 1 to 24" in capsys.readouterr().err


def test_linear_learns_says_what_it_was_chosen_on_and_is_used_again(
    class_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = class_folders / "linear"
    line = ["linear", "--weights", "random:tiny", "--train", str(class_folders / "train"), "--test"]
    line += [
        str(class_folders / "test"),
        "--crop-size",
        "32",
        "--avgpool",
        "--n-last-blocks",
        "2",
        "--output",
        str(output),
    ]
    fast = ["--epochs", "4", "--epoch-steps", "10", "--train-batch-size", "8", "--metric", "accuracy"]
    assert main([*line, *fast]) == 0
    about = scores(output, "linear")["about"]
    assert isinstance(about, dict)
    assert about["chosen on"] == "2 held-out training images"
    assert float(about["accuracy"]) > 0.8
    assert len(scores(output, "linear")["rows"]) == 48  # type: ignore[arg-type]
    saved = output / "classifier.safetensors"
    capsys.readouterr()
    alone = ["linear", "--weights", "random:tiny", "--test", str(class_folders / "test"), "--crop-size", "32"]
    alone += ["--classifier", str(saved), "--metric", "accuracy", "--output", str(class_folders / "later")]
    assert main([*alone, "--avgpool", "--n-last-blocks", "2"]) == 0
    assert f"accuracy {float(about['accuracy']):.4f}" in capsys.readouterr().out
    later = scores(class_folders / "later", "linear")["about"]
    assert isinstance(later, dict)
    assert "trained on" not in later
    assert later["classifier"] == str(saved)
    assert main([*alone[:-1], str(class_folders / "other"), "--avgpool"]) == 2
    assert "was trained on features with n_last_blocks 2, these have 1" in capsys.readouterr().err
    other = [each.replace("random:tiny", "random:nano") for each in alone[:-1]]
    assert main([*other, str(class_folders / "nano"), "--avgpool", "--n-last-blocks", "2"]) == 2
    assert "was trained on features with weights random:tiny, these have random:nano" in capsys.readouterr().err
    assert main([*line, *fast, "--choose-on-test"]) == 0
    assert "the test images (as Cell-DINO)" in (output / "linear.md").read_text()


def test_hpaone_as_published(hpaone: Path, tmp_path: Path) -> None:
    common = ["--weights", "random:nano", "--hpaone", str(hpaone), "--crop-size", "32", "--channels", "bag"]
    line = ["knn", *common, "--task", "CELL_TYPE", "--nb-knn", "3"]
    assert main([*line, "--output", str(tmp_path / "a")]) == 0
    rows = scores(tmp_path / "a", "knn")["rows"]
    assert rows[0]["mean_per_class_multiclass_f1"] > 0.8  # type: ignore[index]
    with (tmp_path / "a" / "knn_classes.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(LINES)
    assert (
        main(["knn", *common, "--task", "PROTEIN_LOCALIZATION", "--nb-knn", "3", "--output", str(tmp_path / "b")]) == 0
    )
    with (tmp_path / "b" / "knn_classes.csv").open() as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(PLACES)
    line = ["linear", *common, "--task", "PROTEIN_LOCALIZATION", "--loss", "binary_cross_entropy", "--epochs", "2"]
    line += ["--epoch-steps", "5", "--train-batch-size", "8", "--metric", "mean_per_class_multilabel_f1"]
    assert main([*line, "--output", str(tmp_path / "c")]) == 0


@pytest.fixture
def hpafov(tmp_path: Path) -> Path:
    folder = tmp_path / "hpafov"
    images = folder / "512_whole_images"
    images.mkdir(parents=True)
    for table, first in (("train", 0), ("test", 50)):
        with (folder / f"whole_images_512_{table}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "ID", "cell_type", *PLACES])
            for number in range(first, first + 20):
                kind = number % 2
                write_png(images / f"1_800_A6_{number}.png", np.concatenate(list(striped(kind, number, 4)), axis=1))
                # One has no place at all, another one no cell line.
                places = (False, False) if number == first else (kind == 0, kind == 1)
                line = "" if number == first + 1 else LINES[kind]
                writer.writerow([f"/old/1_800_A6_{number}.png", f"1_800_A6_{number}", line, *places])
    return folder


def test_hpafov_as_published_without_its_unlabelled_rows(hpafov: Path, tmp_path: Path) -> None:
    line = ["knn", "--weights", "random:nano", "--hpafov", str(hpafov), "--crop-size", "32", "--nb-knn", "3"]
    for task, classes in (("PROTEIN_LOCALIZATION", PLACES), ("CELL_TYPE", LINES)):
        assert main([*line, "--task", task, "--output", str(tmp_path / "o")]) == 0
        about = scores(tmp_path / "o", "knn")["about"]
        assert about["trained on"] == f"{hpafov} (train) (19 images)"  # type: ignore[index]
        assert about["tested on"] == f"{hpafov} (val) (19 images)"  # type: ignore[index]
        with (tmp_path / "o" / "knn_classes.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["class"] for row in rows} == set(classes)
        assert sum(int(row["images"]) for row in rows) == 19


def test_chammi_leaves_a_group_out(chammi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["knn", "--weights", "random:nano", "--chammi", str(chammi), "--subset", "CP", "--chammi-task", "Task_four"]
    line += ["--task", "label", "--crop-size", "32", "--nb-knn", "1", "--output", str(tmp_path / "o")]
    assert main([*line, "--leave-one-out", "plate"]) == 0
    with (tmp_path / "o" / "knn_classes.csv").open() as file:
        rows = {row["class"]: row for row in csv.DictReader(file)}
    # Only the class that training lacks is scored; it is found among the other plate's images.
    assert int(rows["class2"]["images"]) > 0
    assert int(rows["class0"]["images"]) == 0
    assert float(rows["class2"]["f1"]) == 1.0
    capsys.readouterr()
    assert main([*line, "--leave-one-out", "chan_name"]) == 2
    assert "expected several groups" in capsys.readouterr().err


def test_features_consistency_and_profiles_of_a_shard_set(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "features"
    line = [
        "features",
        "--weights",
        "random:nano",
        "--data",
        str(shard_set),
        "--crop-size",
        "0",
        "--output",
        str(output),
    ]
    assert main([*line, "--parquet", "--half"]) == 0
    values = np.load(output / "features.npy")
    assert values.shape == (60, 3 * 192)
    assert values.dtype == np.float16
    from pyarrow import parquet

    table = parquet.read_table(output / "rows.parquet").to_pydict()
    assert len(table["id"]) == 60
    assert set(table["plate"]) == {"P0", "P1"}

    assert main(["profiles", str(output), "--treatment", "number", "--well", "site", "--same-plate", "--output",
                 str(tmp_path / "p")]) == 2  # fmt: skip
    assert "no well has a replicate" in capsys.readouterr().err
    found = tmp_path / "consistency"
    line = ["consistency", "--weights", "random:nano", "random:tiny", "--data", str(shard_set), "--crop-size", "32"]
    assert main([*line, "--limit", "10", "--output", str(found)]) == 0
    rows = scores(found, "consistency")["rows"]
    assert isinstance(rows, list)
    assert [row["weights"] for row in rows] == ["random:nano", "random:tiny"]
    low, high = (float(each) for each in rows[0]["margin 95 %"].split(" to "))
    assert low <= rows[0]["margin"] <= high
    for name in ("same_field_1.png", "retrieval_2.png", "consistency.md"):
        assert (found / name).stat().st_size > 100


def test_scores_land_in_the_run_that_made_the_teacher(shard_set: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [
        "pretrain",
        "debug",
        f"data.shards=[{shard_set}]",
        f"output={run}",
        "steps=2",
        "batch_size=2",
        "online_eval.every=0",
        "model.variant=nano",
    ]
    line += ["views.global_size=32", "views.local_size=16", "compute.workers=0", "heads.num_prototypes=64"]
    assert main(line) == 0
    teacher = run / "eval" / "training_2" / "teacher_checkpoint.pth"
    common = ["--weights", str(teacher), "--crop-size", "32"]
    labelled = [*common, "--train", str(shard_set), "--test", str(shard_set), "--task", "number"]
    labelled += ["--metric", "accuracy", "--output", str(tmp_path / "o")]
    assert main(["knn", *labelled, "--nb-knn", "1"]) == 0
    assert main(["linear", *labelled, "--epochs", "1", "--epoch-steps", "2"]) == 0
    assert main(["consistency", *common, "--data", str(shard_set), "--output", str(tmp_path / "c")]) == 0
    settings = FeatureSettings(channels="bag")
    extract_to(tmp_path / "f", load_backbone(str(teacher)), Screen(), settings, weights=str(teacher))
    asked = ["--treatment", "compound", "--control", "DMSO", "--output", str(tmp_path / "p")]
    assert main(["profiles", str(tmp_path / "f"), *asked]) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    [entry] = events.Scalars("knn/number_accuracy_k1")
    assert (entry.step, entry.value) == (2, 1.0)
    consistency = scores(tmp_path / "c", "consistency")["rows"][0]  # type: ignore[index]
    profiles = [row["mean_average_precision"] for row in scores(tmp_path / "p", "profiles")["rows"]]  # type: ignore[attr-defined]
    linear = float(scores(tmp_path / "o", "linear")["about"]["accuracy"])  # type: ignore[index]
    for name, value in (
        ("linear/number_accuracy", linear),
        ("consistency/margin", consistency["margin"]),
        ("consistency/retrieval", consistency["retrieval"]),
        ("profiles/compound_mean_average_precision", np.mean(profiles)),
    ):
        [entry] = events.Scalars(name)
        assert entry.step == 2
        assert entry.value == pytest.approx(value, abs=1e-4)
    for name, path in (
        ("knn/number_classes", "o/knn_classes.png"),
        ("knn/number_confusion", "o/knn_confusion.png"),
        ("linear/number_classes", "o/linear_classes.png"),
        ("linear/number_confusion", "o/linear_confusion.png"),
        ("consistency/same_field", "c/same_field_1.png"),
        ("consistency/retrieval", "c/retrieval_1.png"),
    ):
        [picture] = events.Images(name)
        assert picture.step == 2
        shown = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)).convert("RGB"))
        np.testing.assert_array_equal(shown, np.asarray(Image.open(tmp_path / path).convert("RGB")), err_msg=name)
    # The losses of the training are still there, beside them.
    assert {"loss/total", "knn/number_accuracy_k1"} <= set(events.Tags()["scalars"])


def write_profiles(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write a folder of features with these plates, wells and treatments; equal rows have equal features."""
    folder.mkdir()
    values = [np.random.default_rng([*"/".join(row).encode()]).normal(size=6) for row in rows]
    np.save(folder / "features.npy", np.array(values, np.float32))
    lines = ["id,plate,well,drug", *(f"i{number},{','.join(row)}" for number, row in enumerate(rows))]
    (folder / "rows.csv").write_text("\n".join(lines))
    (folder / "channels.json").write_text('["DNA"]')
    (folder / "problems.txt").touch()
    (folder / "extraction.json").write_text("{}")


def test_profiles_leave_out_what_has_no_place_and_refuse_wells_of_two_treatments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(plate, f"A{number}", drug) for plate in ("p1", "p2") for number, drug in enumerate("abc")]
    write_profiles(tmp_path / "whole", rows)
    write_profiles(tmp_path / "lacking", [*rows, ("p1", "", "a"), ("p2", "", "b"), ("p1", "A7", ""), ("p2", "A7", "")])
    for name in ("whole", "lacking"):
        asked = ["profiles", str(tmp_path / name), "--treatment", "drug", "--output", str(tmp_path / f"{name}_scores")]
        assert main(asked) == 0
    lacking, whole = (scores(tmp_path / f"{name}_scores", "profiles") for name in ("lacking", "whole"))
    assert lacking["rows"] == whole["rows"]
    assert lacking["about"]["images"] == "6; 4 skipped without drug, plate or well"  # type: ignore[index]
    write_profiles(tmp_path / "mixed", [*rows, ("p2", "A1", "c")])
    capsys.readouterr()
    assert main(["profiles", str(tmp_path / "mixed"), "--treatment", "drug", "--output", str(tmp_path / "m")]) == 2
    assert "plate p2, well A1: has the treatments b and c, expected one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            ["knn", "--weights", "random:nano", "--train", "a", "--output", "o"],
            "expected --train and --test, or one of",
        ),
        (["knn", "--weights", "random:nano", "--chammi", "a", "--output", "o"], "--subset: expected Allen, HPA or CP"),
        (["features", "--weights", "random:none", "--data", "{}", "--output", "o"], "random:none: expected one of"),
        (["consistency", "--weights", "random:nano", "--data", "nowhere", "--output", "o"], "nowhere"),
        (["profiles", "nowhere", "--treatment", "x", "--output", "o"], "nowhere: contains no features"),
    ],
)
def test_mistakes_are_one_line(
    line: list[str], said: str, shard_set: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([each.format(shard_set) for each in line]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [
        ("consistency", ("--limit", "-1"), "--limit: expected at least 1 sample, got -1"),
        ("knn", ("--temperature", "0"), "--temperature: expected more than 0, got 0"),
        ("knn", ("--temperature", "nan"), "--temperature: expected more than 0, got nan"),
        ("knn", ("--device", "gpu"), "expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("linear", ("--learning-rates", "nan"), "--learning-rates: expected numbers above 0, got nan"),
        ("linear", ("--weight-decays", "0", "-1"), "--weight-decays: expected numbers of at least 0, got 0, -1"),
        ("linear", ("--train-batch-size", "0"), "--train-batch-size, --epoch-steps: expected at least 1"),
    ],
)
def test_options_out_of_range_are_one_line_before_features_are_made(
    command: str, option: tuple[str, ...], said: str, shard_set: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sets = ["--data", shard_set] if command == "consistency" else ["--train", shard_set, "--test", shard_set]
    line = [command, "--weights", "random:nano", *sets, "--output", tmp_path / "o", *option]
    assert main([str(word) for word in line]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error
    assert not (tmp_path / "o").exists()


def test_cell_types_of_a_column_and_of_several(draw: Callable[[int], np.ndarray]) -> None:
    rows = [{"cell_type": "a"}, {"cell_type": ""}, {"cell_type": "b"}]
    task = make_task("CELL_TYPE", rows, rows, train_name="t", test_name="u")
    assert task.classes == ("a", "b")
    assert task.train.tolist() == [0, 1]
    assert task.train_kept.tolist() == [True, False, True]
    both = make_task(
        "x", [{"p": True, "q": 0}], [{"p": "False", "q": "1"}], train_name="t", test_name="u", columns=["p", "q"]
    )
    assert both.train.tolist() == [[1.0, 0.0]]
    assert both.test.tolist() == [[0.0, 1.0]]
