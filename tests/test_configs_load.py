"""Recipes and overrides become frozen, typed objects, or one line that says what is wrong."""

from __future__ import annotations

import dataclasses
import enum
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinocell.configs import load
from dinocell.configs.load import find_recipe, load_config, shipped_recipes, text_override, to_dict, to_yaml
from dinocell.configs.schema import diff_configs, fit
from dinocell.errors import ConfigError


class Precision(enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Source:
    path: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Vit:
    width: int = 64
    num_heads: int = 4
    blocks: tuple[int, ...] = (2, 5)
    crop_scale: tuple[float, float] = (0.4, 1.0)
    positions: Literal["rope", "learned"] = "rope"
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"expected width divisible by num_heads,\ngot {self.width} and {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class Compute:
    num_workers: int = 4
    precision: Precision = Precision.FLOAT32
    compile: bool = False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    shards: str
    output: Path | None = None
    seed: int = 0
    lr: float = 1e-3
    vit: Vit = field(default_factory=Vit)
    gram: Vit | None = None
    large: Vit = field(default_factory=lambda: Vit(width=128, num_heads=8))
    channel_weights: dict[str, float] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    names: list[str] = field(default_factory=list)
    compute: Compute = field(default_factory=Compute)


@dataclass(frozen=True, kw_only=True)
class Texts:
    one: str = ""
    path: Path | None = None
    many: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Strict:
    source: Source
    steps: int


@dataclass(frozen=True, kw_only=True)
class Eval:
    every: int = 100
    knn: Vit | None = None


@dataclass(frozen=True, kw_only=True)
class Present:
    online_eval: Eval = field(default_factory=Eval)
    heads: Vit = field(default_factory=Vit)
    steps: int = 1


RENAMED_KEYS = {"watch.every": "online_eval.every", "vit": "heads", "drop": "dropout"}
REMOVED_KEYS = {"watch.tasks": 0}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(schema: type, recipe: Path | None = None, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_recipe_and_overrides_merge_in_this_order(tmp_path: Path) -> None:
    recipe = write(tmp_path, "shards: a\nseed: 1\nlr: 1e-4\nvit:\n  width: 32\n")
    config = load_config(Recipe, recipe, ["seed=2", "vit.blocks=[2,5,8,11]", "seed=3"])
    assert config == Recipe(shards="a", seed=3, lr=1e-4, vit=Vit(width=32, blocks=(2, 5, 8, 11)))


def test_one_text_stands_for_a_list_of_texts(tmp_path: Path) -> None:
    recipe = write(tmp_path, "shards: a\nnames: x\n")
    assert load_config(Recipe, recipe).names == ["x"]
    assert load_config(Recipe, recipe, ["names=s3://bucket/a b"]).names == ["s3://bucket/a b"]
    assert error_of(Recipe, recipe, ("names=7",)).endswith("names: expected a list of texts, got 7")
    assert error_of(Recipe, recipe, ("vit.blocks=x",)).endswith("vit.blocks: expected a list of integers, got 'x'")


def test_the_result_is_a_frozen_instance_of_real_dataclasses() -> None:
    config = load_config(Recipe, overrides=["shards=a", "vit.width=8"])
    assert type(config) is Recipe
    assert type(config.vit) is Vit
    assert type(config.vit.blocks) is tuple
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vit.width = 16  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("lr=1e-4", "lr", 1e-4),
        ("lr=3", "lr", 3.0),
        ("seed=1_000", "seed", 1000),
        ("shards=s3://a?x=1&y=2", "shards", "s3://a?x=1&y=2"),
        ("shards=007", "shards", "007"),
        ("shards=1e-4", "shards", "1e-4"),
        ("shards=a: b #3", "shards", "a: b #3"),
        ("shards='quoted'", "shards", "quoted"),
        ("output=runs/1", "output", Path("runs/1")),
        ("output=null", "output", None),
        ("vit={width: 8}", "vit", Vit(width=8)),
        ("gram.width=8", "gram", Vit(width=8)),
        ("gram={}", "gram", Vit()),
        ("large.num_heads=4", "large", Vit(width=128, num_heads=4)),
        ("compute.precision=bfloat16", "compute", Compute(precision=Precision.BFLOAT16)),
        ("compute.precision=BFLOAT16", "compute", Compute(precision=Precision.BFLOAT16)),
        ("channel_weights.dapi=2", "channel_weights", {"dapi": 2.0}),
        ("sources=[{path: a, weight: 2}]", "sources", (Source(path=Path("a"), weight=2.0),)),
        ("lr=${vit.dropout}", "lr", None),
        ("seed=${vit.width}", "seed", 64),
        ("seed=${oc.env:DINOCELL_TEST_SEED}", "seed", 7),
        ("shards=${oc.env:DINOCELL_TEST_SEED}/x", "shards", "7/x"),
    ],
)
def test_an_override_is_parsed_by_the_type_of_its_field(
    override: str, key: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOCELL_TEST_SEED", "7")
    overrides = ["shards=a", override]
    if expected is None and key == "lr":
        assert "lr: expected a number, got null" in error_of(Recipe, overrides=tuple(overrides))
        return
    value = getattr(load_config(Recipe, overrides=overrides), key)
    assert value == expected
    assert type(value) is type(expected)


def test_a_name_in_another_encoding_is_one_line() -> None:
    said = error_of(Recipe, overrides=("shards=a", "output=caf\udce9"))  # Latin-1, as Python hands it in
    assert said == "override 'output=caf\\xe9': expected UTF-8 text; rename the file or folder"


def test_a_list_of_paths_may_hold_any_characters() -> None:
    paths = [
        Path("my data, v2"),
        Path("a [b] {c}"),
        Path('it\'s "x" #1: y'),
        Path("細胞/äß 🔬"),
        Path("back\\slash"),
        Path("7"),
    ]
    config = load_config(Recipe, overrides=["shards=a", text_override("names", paths)])
    assert config.names == [str(path) for path in paths]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("vitt.width=3", "vitt: unknown key; did you mean 'vit.width'?"),
        ("vit.widht=3", "vit.widht: unknown key; did you mean 'vit.width'?"),
        ("num_workers=3", "num_workers: unknown key; did you mean 'compute.num_workers'?"),
        ("vit.width.x=3", "vit.width.x: unknown key; vit.width takes an integer, no keys"),
        ("vit.blocks[0]=3", "vit.blocks[0]: unknown key; did you mean 'vit.blocks'?"),
        ("--lr=3", "--lr: unknown key; did you mean 'lr'?"),
        ("lr", "expected key=value; did you mean 'lr=...'?"),
        ("widht", "expected key=value; did you mean 'vit.width=...'?"),
        ("=3", "expected key=value, got the empty key ''"),
        ("vit.=3", "expected key=value, got the empty key 'vit.'"),
        ("seed=true", "seed: expected an integer, got true"),
        ("seed=3.0", "seed: expected an integer, got 3.0"),
        ("seed='3'", "seed: expected an integer, got '3'"),
        ("seed=010", "seed: 010 is 8 to YAML; write 8, or '010' in quotes for a text"),
        ("lr=1:30.5", "lr: 1:30.5 is 90.5 to YAML; write 90.5, or '1:30.5' in quotes for a text"),
        ("seed=", "expected a value behind the '='; for none write seed=null"),
        ("output= ", "expected a value behind the '='; for none write output=null"),
        ("lr=true", "lr: expected a number, got true"),
        ("lr=fast", "lr: expected a number, got 'fast'"),
        ("shards=null", "shards: expected text, got null"),
        ("compute.compile=1", "compute.compile: expected true or false, got 1"),
        ("compute.precision=half", "compute.precision: expected one of float32, bfloat16, got 'half'"),
        ("vit.positions=rop", "vit.positions: expected one of rope, learned, got 'rop'; did you mean 'rope'?"),
        ("vit.blocks=3", "vit.blocks: expected a list of integers, got 3"),
        ("vit.blocks=[1,x]", "vit.blocks[1]: expected an integer, got 'x'"),
        ("vit.crop_scale=[1,2,3]", "vit.crop_scale: expected a list of 2 numbers, got [1, 2, 3]"),
        ("vit=3", "vit: expected a section (width, num_heads, blocks, crop_scale, ...), got 3"),
        ("vit=null", "vit: expected a section (width, num_heads, blocks, crop_scale, ...), got null"),
        ("gram=3", "gram: expected a section (width, num_heads, blocks, crop_scale, ...), got 3"),
        ("vit=${seed}", "vit: expected a section (width, num_heads, blocks, crop_scale, ...), got 0"),
        ("sources=[{path: a},{pth: a}]", "sources[1].pth: unknown key; did you mean 'path'?"),
        ("sources=[{weight: 2}]", "sources[0].path: required, but not set"),
        ("names=[a, 1]", "names[1]: expected text, got 1; put it in quotes"),
        ("channel_weights.dapi=x", "channel_weights.dapi: expected a number, got 'x'"),
        ("seed=[1", "seed: not valid YAML: did not find expected ',' or ']'; put the value in quotes"),
        ("seed=${nothing.here}", "seed: Interpolation key 'nothing.here' not found"),
        ("seed=${oc.env:DINOCELL_NOT_SET}", "seed: Environment variable 'DINOCELL_NOT_SET' not found"),
        ("seed=${seed}", "seed: Recursive interpolation detected"),
        (
            "seed=${bad",
            "seed: the ${...} in it cannot be read (no viable alternative at input '${bad'); put the value in quotes",
        ),
        ("vit.width=30", "vit: expected width divisible by num_heads, got 30 and 4"),
        ("large.num_heads=3", "large: expected width divisible by num_heads, got 128 and 3"),
    ],
)
def test_a_bad_override_is_named_with_key_expected_and_got(override: str, message: str) -> None:
    assert error_of(Recipe, overrides=("shards=a", override)) == f"override '{override}': {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shards: a\nvit:\n  widht: 3\n", ":3: vit.widht: unknown key; did you mean 'vit.width'?"),
        ("shards: a\nvit:\n  width: 3.7\n", ":3: vit.width: expected an integer, got 3.7"),
        ("shards: 007\n", ":1: shards: 007 is 7 to YAML; write 7, or '007' in quotes for a text"),
        ("shards: 12\n", ":1: shards: expected text, got 12; put it in quotes"),
        ("shards: a\nseed: 010\n", ":2: seed: 010 is 8 to YAML; write 8, or '010' in quotes for a text"),
        (
            "shards: a\nvit:\n  blocks: [2, 1:30]\n",
            ":3: vit.blocks[1]: 1:30 is 90 to YAML; write 90, or '1:30' in quotes",
        ),
        ("shards: &s {a: *s}\n", ":1: column 9: not valid YAML: YAML recursive aliases are not supported."),
        ("shards: a\nvit:\n", ":2: vit: expected a section (width, num_heads, blocks, crop_scale, ...), got null"),
        ("shards: a\nvit:\n  width: 30\n", ":3: vit: expected width divisible by num_heads, got 30 and 4"),
        ("shards: a\nseed: 1\nseed: 2\n", ":3: column 1: not valid YAML: found duplicate key seed"),
        ("vit:\n  width: 1\n  width: 1\n", ":3: column 3: not valid YAML: found duplicate key width"),
        ("shards: [a\nseed: 1\n", ":2: column 5: not valid YAML: "),
        ("shards: !!python/name:os.system a\n", ":1: column 9: not valid YAML: could not determine a constructor"),
        ("- a\n", ":1: expected 'key: value' lines, got a list"),
        ("just words\n", ":1: expected 'key: value' lines, got 'just words'"),
        ("a: 1\n---\nb: 1\n", ":2: column 1: not valid YAML: "),
        ("\x07", ": not valid YAML: "),
        ("shards: '${'\n", ": shards: the ${...} in it cannot be read"),
        ("shards: ${lr.x}\n", ":1: shards: "),
        ("", ": required, but not set: shards; set it in the recipe or with shards=..."),
        ("# only a comment\n", ": required, but not set: shards; set it in the recipe or with shards=..."),
        ("shards: ???\n", ": required, but not set: shards; set it in the recipe or with shards=..."),
    ],
)
def test_a_bad_recipe_is_named_with_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    recipe = write(tmp_path, text)
    assert error_of(Recipe, recipe).startswith(f"{recipe}{message}")


def test_an_unreadable_recipe_is_named(tmp_path: Path) -> None:
    latin1 = tmp_path / "latin1.yaml"
    latin1.write_bytes("shards: caf\xe9".encode("latin-1"))
    assert error_of(Recipe, latin1) == f"{latin1}: not UTF-8 text (byte 11); save it as UTF-8"
    assert error_of(Recipe, tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such file"
    assert error_of(Recipe, tmp_path) == f"{tmp_path}: is a folder, expected a YAML file"


def test_every_missing_required_key_is_listed() -> None:
    assert error_of(Strict) == "required, but not set: source.path, steps; set it in the recipe or with source.path=..."
    assert load_config(Strict, overrides=["source.path=a", "steps=1"]) == Strict(source=Source(path=Path("a")), steps=1)


def test_a_wrong_recipe_value_is_an_error_even_if_an_override_replaces_it(tmp_path: Path) -> None:
    assert ":1: lr: expected a number" in error_of(Recipe, write(tmp_path, "lr: fast"), ("shards=a", "lr=1"))


def test_an_empty_recipe_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    recipe = tmp_path / "windows.yaml"
    recipe.write_bytes(b"\xef\xbb\xbfshards: a\r\n")
    assert load_config(Recipe, recipe).shards == "a"
    assert load_config(Recipe, write(tmp_path, ""), ["shards=b"]).shards == "b"


def test_yaml_of_a_config_loads_back_to_the_same_config(tmp_path: Path) -> None:
    config = Recipe(
        shards="no",
        output=Path("runs/x"),
        gram=Vit(dropout=1e-5),
        channel_weights={"dapi": math.inf},
        sources=(Source(path=Path("0x10")),),
        names=["1e-4", "on", "", "null", "2020-01-01", "${lr}", "a: b", " x ", "caf\xe9\n"],
        compute=Compute(precision=Precision.BFLOAT16),
    )
    assert load_config(Recipe, write(tmp_path, to_yaml(config))) == config


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])), number=st.floats(allow_nan=False))
def test_yaml_keeps_any_text_and_number(tmp_path_factory: pytest.TempPathFactory, text: str, number: float) -> None:
    config = Recipe(shards=f"x{text}", names=[f"{text}y"], lr=number)
    assert load_config(Recipe, write(tmp_path_factory.mktemp("yaml"), to_yaml(config))) == config


AWKWARD = [
    "a, b",
    "[x]",
    "#2",
    "012",
    "1e3",
    "null",
    "'q",
    '"',
    "a: b",
    "${name}",
    "C:\\new",
    "ö 😀",
    "a\u2028b",
    "x=y",
    " s ",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_override_sets_any_text(text: str) -> None:
    config = load_config(Texts, None, [text_override("one", text), text_override("path", Path(text))])
    assert (config.one, config.path) == (text, Path(text))
    assert load_config(Texts, None, [text_override("many", [text, Path("b")])]).many == (text, "b")


def test_a_former_key_in_a_recipe_sets_the_present_one_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = write(tmp_path, "watch:\n  every: 5\n  tasks: 0\nvit:\n  width: 32\n  drop: 0.5\n")
    expected = Present(online_eval=Eval(every=5), heads=Vit(width=32, dropout=0.5))
    assert load_config(Present, recipe) == expected
    notes = [record.getMessage() for record in caplog.records]
    assert notes == [
        f"{recipe}: watch.every is now online_eval.every",
        f"{recipe}: vit is now heads",
        f"{recipe}: watch.tasks no longer exists",
        f"{recipe}: heads.drop is now heads.dropout",
    ]
    assert fit(Present, {"watch": {"every": 5}, "vit": {"width": 32, "drop": 0.5}}) == expected
    recipe = write(tmp_path, "watch:\n  every: x\n")
    assert error_of(Present, recipe) == f"{recipe}:2: online_eval.every: expected an integer, got 'x'"
    assert "watch.tasks" in error_of(Present, write(tmp_path, "watch:\n  tasks: 3\n"))


def test_a_former_key_in_an_override_sets_the_present_one_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(Present, overrides=["watch.every=5", "vit.width=32"])
    assert config == Present(online_eval=Eval(every=5), heads=Vit(width=32))
    assert "watch.every is now online_eval.every" in caplog.text
    assert "online_eval.every: expected an integer" in error_of(Present, None, ("watch.every=x",))
    assert "watch.tasks" in error_of(Present, None, ("watch.tasks=0",))


def test_an_override_of_the_present_key_replaces_a_former_one_in_the_recipe(tmp_path: Path) -> None:
    recipe = write(tmp_path, "watch:\n  every: 5\n")
    assert load_config(Present, recipe, ["online_eval.every=6"]).online_eval.every == 6


def test_a_key_under_both_names_is_refused(tmp_path: Path) -> None:
    recipe = write(tmp_path, "watch:\n  every: 5\nonline_eval:\n  every: 6\n")
    assert "online_eval.every" in error_of(Present, recipe)
    assert "online_eval.every" in error_of(Present, None, ("watch.every=5", "online_eval.every=6"))
    with pytest.raises(ConfigError, match=r"recipe.yaml: online_eval\.every"):
        load.read_stored(Present, recipe)


def test_a_stored_config_gets_present_names_and_the_defaults_of_new_keys(tmp_path: Path) -> None:
    stored = write(tmp_path, "watch:\n  every: 5\n  tasks: 0\nonline_eval:\n  knn:\n    width: 8\n")
    values = load.read_stored(Present, stored)
    assert not diff_configs(values, to_dict(Present(online_eval=Eval(every=5, knn=Vit(width=8)))))


def test_to_dict_holds_only_plain_types() -> None:
    plain = to_dict(Recipe(shards="a", output=Path("b")))
    assert plain["output"] == "b"
    assert plain["vit"]["blocks"] == [2, 5]
    assert plain["compute"] == {"num_workers": 4, "precision": "FLOAT32", "compile": False}


def test_diff_names_changed_added_and_removed_keys_but_not_compute() -> None:
    old = {"lr": 1.0, "vit": {"width": 64, "blocks": [1]}, "compute": {"num_workers": 1}, "nan": math.nan, "flag": 1}
    new = {"lr": 1.0, "vit": {"width": 32, "heads": 4, "blocks": (1,)}, "compute": {}, "nan": math.nan, "flag": True}
    assert diff_configs(old, new) == ["vit.width: 64 -> 32", "flag: 1 -> true", "vit.heads: (absent) -> 4"]
    assert diff_configs(old, new, ignore=("compute", "flag", "vit.width")) == ["vit.heads: (absent) -> 4"]


def test_recipes_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pretrain").mkdir()
    shipped = [tmp_path / "pretrain" / f"{name}.yaml" for name in ("demo", "vits8")]
    for path in shipped:
        path.touch()
    monkeypatch.setattr(load, "_shipped_folder", lambda command: tmp_path / command)
    own = write(tmp_path, "")
    assert shipped_recipes("pretrain") == ["demo", "vits8"]
    assert shipped_recipes("finetune") == []
    assert find_recipe("pretrain", "vits8") == shipped[1]
    assert find_recipe("pretrain", str(own)) == own
    listed = "shipped for pretrain: demo, vits8"
    for name, message in {
        "vits16": f"does not exist; {listed}; did you mean 'vits8'?",
        "runs/vits8.yaml": f"{listed}; did you mean 'vits8'?",
        str(tmp_path): f"is a folder; {listed}",
    }.items():
        with pytest.raises(ConfigError) as caught:
            find_recipe("pretrain", name)
        assert str(caught.value).endswith(message)
    with pytest.raises(ConfigError, match="shipped for finetune: none"):
        find_recipe("finetune", "x")


def test_importing_load_does_not_import_torch() -> None:
    code = "import sys, dinocell.configs.load; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
