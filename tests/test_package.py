"""The package as a whole: names that others rely on, cheap import, no shadows, recipes that fit."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import dinocell
from dinocell.configs.load import load_config, shipped_recipes

ROOT = Path(__file__).parent.parent


def run(script: str, *options: str) -> str:
    result = subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_public_names_can_be_imported() -> None:
    from dinocell import DINOCell, DINOCellPipeline, create_dinocell_model

    assert {DINOCell.__name__, DINOCellPipeline.__name__, create_dinocell_model.__name__} <= set(dir(dinocell))


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("dinocell.models.vit", ["VisionTransformer", "ViTOutput", "VARIANTS"]),
        ("dinocell.models.weights", ["load_backbone", "read_weights", "save_weights"]),
        ("dinocell.configs.load", ["load_config"]),
        ("dinocell.runtime.run", ["Run"]),
    ],
)
def test_names_of_the_plan_exist(module: str, names: list[str]) -> None:
    for name in names:
        assert hasattr(importlib.import_module(module), name)


def test_public_names_are_the_classes_of_their_stages() -> None:
    from dinocell.eval.segmentation.pipeline import DINOCellPipeline
    from dinocell.finetune.model import DINOCell, create_dinocell_model

    assert dinocell.DINOCell is DINOCell
    assert dinocell.create_dinocell_model is create_dinocell_model
    assert dinocell.DINOCellPipeline is DINOCellPipeline


def test_unknown_name_says_what_is_public() -> None:
    with pytest.raises(AttributeError, match="DINOCellPipeline"):
        _ = dinocell.nonsense


def test_import_is_silent_and_brings_no_torch() -> None:
    script = "import dinocell, sys; print([m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'rich')])"
    assert run(script, "-W", "error") == "[]\n"


def test_nothing_shadows_the_standard_library() -> None:
    assert run("import dinocell.cli, ssl, urllib.request; print(ssl.__file__)").strip().endswith("/ssl.py")
    shadows = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not shadows & set(sys.stdlib_module_names)
    assert not {path.name for path in (ROOT / "tests").iterdir()} & set(sys.stdlib_module_names)


def recipe_schemas() -> dict[str, tuple[type, list[str]]]:
    """By folder: the schema, and what a user always adds."""
    from dinocell.demo.data import DemoConfig
    from dinocell.finetune.config import FinetuneConfig
    from dinocell.ssl.config import PretrainConfig

    return {
        "demo": (DemoConfig, []),
        "pretrain": (PretrainConfig, ["data.shards=[shards]", "output=run"]),
        "finetune": (FinetuneConfig, ["output=run"]),
    }


def test_every_folder_of_recipes_has_a_schema() -> None:
    folders = {path.parent.name for path in (ROOT / "dinocell/configs").glob("*/*.yaml")}
    assert folders == set(recipe_schemas())


def test_every_shipped_recipe_fits_its_schema_and_says_where_it_comes_from() -> None:
    for command, (schema, overrides) in recipe_schemas().items():
        names = shipped_recipes(command)
        assert names
        for name in names:
            path = ROOT / f"dinocell/configs/{command}/{name}.yaml"
            missing = {f"data.{key}" for key in ("sets", "images", "masks") if f"  {key}: ???" in path.read_text()}
            weights = re.search(r"  weights: \[(.*)\]", path.read_text())
            values = {"data.sets": f"[{','.join(['set'] * (weights[1].count(',') + 1 if weights else 1))}]"}
            load_config(schema, path, [*overrides, *(f"{key}={values.get(key, 'x/{name}.tif')}" for key in missing)])
            header = [line for line in path.read_text().splitlines() if line.startswith("#")]
            for what in ("source:", "command:", "hardware:", "time:"):
                assert any(what in line for line in header), f"{path.name}: no '{what}' in its header"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the names of the files in the wheel, built without a network from a copy that has tests and data in it."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    for name in ("dinocell", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("demo/images/a.tif", "runs/mine/best.pt", "dinocell/weights.pth"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"data")
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*line, "--wheel-dir", str(output), str(source)], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (path,) = output.glob("dinocell_toolkit-*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_the_package_and_every_recipe(wheel: list[str]) -> None:
    package = ROOT / "dinocell"
    wanted = {path for kind in ("*.py", "configs/*/*.yaml", "py.typed") for path in package.rglob(kind)}
    assert {str(path.relative_to(ROOT)) for path in wanted} <= set(wheel)
    assert sum(name.endswith(".yaml") for name in wheel) == sum(path.suffix == ".yaml" for path in wanted) > 5


def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    others = [name for name in wheel if not name.startswith("dinocell/")]
    assert all(name.split("/")[0].endswith(".dist-info") for name in others), others
    default_model = {f"dinocell/default_model/{name}" for name in ("README.md", "segmenter.safetensors")}
    assert default_model <= set(wheel)
    ours = {Path(name).suffix for name in wheel if name.startswith("dinocell/") and name not in default_model}
    assert ours == {".py", ".yaml", ".typed"}
    assert any(name.endswith("LICENSE") for name in others)


def test_pins_satisfy_the_ranges() -> None:
    """Every dependency has an exact pin, and nothing is pinned that is not a dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    from packaging.requirements import Requirement

    ranges = {Requirement(line).name.lower(): Requirement(line) for line in project["dependencies"]}
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    pins = {Requirement(line).name.lower(): Requirement(line) for line in lines if line}
    assert set(pins) == set(ranges)
    for name, pin in pins.items():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert ranges[name].specifier.contains(specifier.version), name
