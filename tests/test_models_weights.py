"""Exported weights: round trips, options of `load_backbone`, refusals, and files that are never half-written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from dinocell.errors import WeightsError
from dinocell.models.config import InputSettings, WeightsCard
from dinocell.models.positions import LearnedPositionConfig, RopeConfig
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.models.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Layout,
    Weights,
    convert_channels,
    fit_weights,
    load_backbone,
    read_weights,
    resize_patch_weight,
    save_weights,
)

SIZES: dict[str, Any] = {"width": 128, "depth": 2, "heads": 2, "mlp_hidden": 512}
TABLE = LearnedPositionConfig(grid_rows=5, grid_columns=5, offset=0.0, antialias=True)
CONFIGS = {
    "rope": ViTConfig(**SIZES),
    "rope_gated_key_bias": ViTConfig(**SIZES, mlp="swiglu", key_bias=True),
    "rope_without_bias": ViTConfig(**SIZES, qkv_bias=False, in_channels=3, patch_size=16),
    "learned": ViTConfig(**SIZES, positions="learned", learned=TABLE, key_bias=True, norm_eps=1e-6),
    "learned_gated": ViTConfig(
        **{**SIZES, "mlp_hidden": 344}, mlp="swiglu", positions="learned", learned=TABLE, key_bias=True, norm_eps=1e-6
    ),
}
CARD = WeightsCard(
    input=InputSettings(convention="unit", channel_names=("DNA",), percentiles=(0.1, 99.9), pixel_size_um=0.5),
    derived_from=("DINOv3 small", "pretrained on cells"),
    licence="the terms of DINOv3",
)
LAYOUTS: tuple[tuple[Layout, str], ...] = (
    ("dinocell", "model.pth"),
    ("dinocell", "model.safetensors"),
    ("meta", "model.pth"),
    ("meta", "model.safetensors"),
    ("meta-flat", "model.pt"),
    ("meta-flat", "model.safetensors"),
    ("huggingface", "folder"),
)


def make(config: ViTConfig = CONFIGS["rope"], dtype: torch.dtype = torch.float32, **changes: Any) -> Weights:
    vit = VisionTransformer(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=generator).to(dtype) for n, t in vit.state_dict().items()}
    if config.qkv_bias and not config.key_bias:  # no layout has a place for what the mask hides
        for name in (n for n in tensors if n.endswith("qkv.bias")):
            tensors[name][config.width : 2 * config.width] = 0
    heads = {"dino_head": {"mlp.0.weight": torch.randn(4, 4, generator=generator).to(dtype)}}
    return Weights(config=config, tensors=tensors, card=CARD, heads=heads, **changes)


def assert_same(got: Weights, expected: Weights) -> None:
    assert set(got.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(got.tensors[name], tensor), name


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("layout", "file"), LAYOUTS)
def test_every_layout_is_a_bit_exact_round_trip(
    tmp_path: Path, layout: Layout, file: str, name: str, dtype: torch.dtype
) -> None:
    weights = make(CONFIGS[name], dtype)
    path = tmp_path / file
    save_weights(path, weights, layout=layout)
    once = read_weights(path)
    assert_same(once, weights)
    assert once.config == weights.config
    assert once.card == CARD
    save_weights(path, once, layout=layout)  # over the file that it came from
    assert_same(read_weights(path), weights)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]
    if layout in ("dinocell", "meta"):
        assert torch.equal(once.heads["dino_head"]["mlp.0.weight"], weights.heads["dino_head"]["mlp.0.weight"])


@pytest.mark.parametrize(("layout", "file"), LAYOUTS)
def test_load_backbone_gives_float32_for_every_file(tmp_path: Path, layout: Layout, file: str) -> None:
    save_weights(tmp_path / file, make(dtype=torch.bfloat16), layout=layout)
    vit = load_backbone(tmp_path / file)
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}
    assert {parameter.requires_grad for parameter in vit.parameters()} == {True}
    assert not vit.training
    assert vit.card == CARD
    halved = load_backbone(tmp_path / file, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}


def test_loaded_features_are_bit_equal_to_the_saved_models(tmp_path: Path) -> None:
    vit = VisionTransformer(CONFIGS["rope"]).eval()
    vit.init_weights(layer_scale=0.5)
    save_weights(tmp_path / "model.pth", Weights.of(vit))
    images = torch.randn(2, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = vit(images), load_backbone(tmp_path / "model.pth")(images)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(**SIZES, layer_scale=False),
        ViTConfig(**SIZES, local_cls_norm=True),
        ViTConfig(**SIZES, cls_norm=True, local_cls_norm=True),
        ViTConfig(**SIZES, registers=0),
        ViTConfig(**SIZES, rope=RopeConfig(min_period=0.5, max_period=90.0)),
        ViTConfig(**SIZES, rope=RopeConfig(coordinates="min")),
        ViTConfig(**{**SIZES, "heads": 4}, positions="learned", learned=LearnedPositionConfig(grid_rows=2)),
    ],
)
def test_our_own_files_keep_every_choice_of_the_configuration(tmp_path: Path, config: ViTConfig) -> None:
    weights = make(config)
    save_weights(tmp_path / "model.pth", weights)
    assert read_weights(tmp_path / "model.pth").config == config
    assert_same(read_weights(tmp_path / "model.pth"), weights)


@pytest.mark.parametrize("config", [ViTConfig(**SIZES, layer_scale=False), ViTConfig(**SIZES, local_cls_norm=True)])
def test_a_hugging_face_folder_of_ours_reads_back_with_the_same_features(tmp_path: Path, config: ViTConfig) -> None:
    vit = VisionTransformer(config).eval()
    save_weights(tmp_path, Weights.of(vit), layout="huggingface")
    images = torch.randn(1, 1, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_backbone(tmp_path)(images).patches, vit(images).patches)


SHARED = {"cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
BLOCK = {f"{n}.{p}" for n in ("norm1", "norm2", "attn.qkv", "attn.proj") for p in ("weight", "bias")}
BLOCK |= {"ls1.gamma", "ls2.gamma"}


@pytest.mark.parametrize(
    ("name", "top", "block"),
    [
        ("rope", {"storage_tokens", "rope_embed.periods"}, {"attn.qkv.bias_mask", "fc1", "fc2"}),
        ("rope_gated_key_bias", {"storage_tokens", "rope_embed.periods"}, {"w1", "w2", "w3"}),
        ("learned", {"register_tokens", "pos_embed"}, {"fc1", "fc2"}),
        ("learned_gated", {"register_tokens", "pos_embed"}, {"w12", "w3"}),
    ],
)
def test_a_flat_export_has_exactly_the_keys_of_metas_classes(
    tmp_path: Path, name: str, top: set[str], block: set[str]
) -> None:
    save_weights(tmp_path / "flat.pth", make(CONFIGS[name]), layout="meta-flat")
    named = torch.load(tmp_path / "flat.pth", weights_only=True)
    own = {n for n in block if n.startswith("attn")}
    own |= {f"mlp.{n}.{part}" for n in block - own for part in ("weight", "bias")}
    assert set(named) == SHARED | top | {f"blocks.{i}.{n}" for i in range(2) for n in BLOCK | own}
    assert all(isinstance(tensor, Tensor) for tensor in named.values())
    if name == "rope":
        torch.testing.assert_close(named["rope_embed.periods"], 100.0 ** (torch.arange(16) / 16))
        mask = named["blocks.1.attn.qkv.bias_mask"].unflatten(0, (3, 128))
        assert torch.equal(mask, torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 128))


def test_the_teacher_layout_equals_metas(tmp_path: Path) -> None:
    for layout in ("dinocell", "meta"):
        save_weights(tmp_path / "teacher.pth", make(), layout=layout)
        content = torch.load(tmp_path / "teacher.pth", weights_only=True)
        assert set(content) == {"teacher", "dinocell"}
        assert {name.split(".")[0] for name in content["teacher"]} == {"backbone", "dino_head"}
        assert content["dinocell"]["card"]["licence"] == CARD.licence


def test_a_flat_export_has_its_card_in_a_file_next_to_it(tmp_path: Path) -> None:
    path = tmp_path / "flat.pth"
    save_weights(path, make(), layout="meta-flat")
    sidecar = tmp_path / "flat.pth.card.json"
    assert json.loads(sidecar.read_text())["card"]["derived_from"] == list(CARD.derived_from)
    assert read_weights(path).card == CARD
    sidecar.unlink()
    assert read_weights(path).card.derived_from == ("Meta DINOv3: flat.pth",)
    save_weights(path, make(dataclasses.replace(CONFIGS["rope"], in_channels=2)), layout="meta-flat")
    left_behind = sidecar.read_text()
    save_weights(path, make(), layout="meta-flat")
    sidecar.write_text(left_behind)
    with pytest.raises(WeightsError, match=r"card.json.*in_channels 2, its tensors 1"):
        read_weights(path)
    sidecar.write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        read_weights(path)


def test_a_hugging_face_export_includes_licence_and_provenance(tmp_path: Path) -> None:
    save_weights(tmp_path, make(), layout="huggingface")
    assert leftovers(tmp_path) == ["README.md", "config.json", "model.safetensors"]
    readme = (tmp_path / "README.md").read_text()
    assert all(text in readme for text in (CARD.licence, *CARD.derived_from))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dinocell"])["card"]["licence"] == CARD.licence
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    save_weights(tmp_path / "half", make(dtype=torch.bfloat16), layout="huggingface")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        (ViTConfig(**SIZES, cls_norm=True), "huggingface", "untied CLS norm"),
        (ViTConfig(**SIZES, rope=RopeConfig(coordinates="max")), "huggingface", "rotary periods"),
        (dataclasses.replace(CONFIGS["learned"], mlp_hidden=500), "huggingface", "500 matches none"),
        (dataclasses.replace(CONFIGS["learned"], local_cls_norm=True), "meta-flat", "one final norm"),
    ],
)
def test_a_model_that_a_layout_cannot_express_is_refused(
    tmp_path: Path, config: ViTConfig, layout: Layout, words: str
) -> None:
    path = tmp_path / ("folder" if layout == "huggingface" else "flat.pth")
    with pytest.raises(WeightsError, match=words):
        save_weights(path, make(config), layout=layout)
    assert leftovers(tmp_path) == []


def flat(path: Path, **changes: Tensor | None) -> Path:
    """Write a flat DINOv3 file with some tensors replaced (None: left out; ``__`` stands for a dot)."""
    save_weights(path, make(), layout="meta-flat")
    path.with_name(path.name + ".card.json").unlink()
    named = torch.load(path, weights_only=True) | {name.replace("__", "."): t for name, t in changes.items()}
    torch.save({name: tensor for name, tensor in named.items() if tensor is not None}, path)
    return path


def test_missing_tensors_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = flat(tmp_path / "flat.pth", norm__weight=None, blocks__1__ls1__gamma=None)
    with pytest.raises(WeightsError, match=r"2 missing \(blocks\.1\.ls1\.gamma, norm\.weight\)"):
        read_weights(path)
    with pytest.raises(WeightsError, match=r"1 missing \(norm\.weight\)"):
        read_weights(path, allow_missing=["blocks.1.*"])
    weights = read_weights(path, allow_missing=["blocks.1.*", "norm.weight"])
    assert torch.equal(weights.tensors["norm.weight"], torch.ones(128))
    assert weights.card.derived_from[-1] == "initialised at random: blocks.1.ls1.gamma, norm.weight"


def test_unexpected_tensors_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = flat(tmp_path / "flat.pth", decoder__weight=torch.ones(3))
    with pytest.raises(WeightsError, match=r"1 unexpected \(decoder\.weight\)"):
        load_backbone(path)
    assert "decoder.weight" not in load_backbone(path, allow_unexpected=["decoder.*"]).state_dict()


def test_a_missing_mask_token_is_zero(tmp_path: Path) -> None:
    weights = read_weights(flat(tmp_path / "flat.pth", mask_token=None))
    assert torch.equal(weights.tensors["mask_token"], torch.zeros(1, 128))


def test_another_variant_is_refused_and_the_right_one_accepted(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.pth", make())
    with pytest.raises(WeightsError, match=r"expected a small model \(width 384, depth 12.*\), got width 128, depth 2"):
        load_backbone(tmp_path / "model.pth", variant="small")
    with pytest.raises(WeightsError, match="unknown variant 'smal'"):
        load_backbone(tmp_path / "model.pth", variant="smal")
    tiny = ViTConfig(width=192, heads=3, mlp_hidden=768)
    save_weights(tmp_path / "tiny.pth", Weights.of(VisionTransformer(tiny)))
    assert load_backbone(tmp_path / "tiny.pth", variant="tiny").config == tiny


def test_conversions_are_applied_and_recorded(tmp_path: Path) -> None:
    rgb = make(dataclasses.replace(CONFIGS["rope"], in_channels=3, patch_size=16))
    rgb = dataclasses.replace(rgb, card=dataclasses.replace(CARD, input=InputSettings(convention="imagenet")))
    path = tmp_path / "rgb.pth"
    save_weights(path, rgb)
    vit = load_backbone(path)
    assert (vit.config.patch_size, vit.config.in_channels) == (8, 1)
    assert vit.card.input.convention == "standardised"
    notes = ("patch 16 -> 8", "input 3 x imagenet -> 1 x standardised")
    assert vit.card.derived_from == (*CARD.derived_from, *notes)
    unit = load_backbone(path, patch_size=None, input="unit")
    assert unit.card.input.convention == "unit"
    assert unit.card.derived_from == (*CARD.derived_from, "input 3 x imagenet -> 1 x unit")
    kept = load_backbone(path, patch_size=None, in_channels=None)
    assert kept.card == rgb.card
    assert kept.config == rgb.config
    save_weights(tmp_path / "grey.pth", Weights.of(vit))
    assert load_backbone(tmp_path / "grey.pth").card == vit.card
    for wrong in ({"patch_size": 0}, {"in_channels": 0}):
        with pytest.raises(WeightsError, match="at least 1"):
            load_backbone(path, **wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("patch_size", [8, 16])
def test_filters_of_half_precision_are_fitted_in_full_precision(
    tmp_path: Path, dtype: torch.dtype, patch_size: int
) -> None:
    save_weights(tmp_path / "a.pth", make(dataclasses.replace(CONFIGS["rope"], in_channels=3, patch_size=16), dtype))
    rgb = load_backbone(tmp_path / "a.pth", patch_size=16, in_channels=3).double()
    grey = load_backbone(tmp_path / "a.pth", patch_size=patch_size, in_channels=1).double()
    image = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    large = torch.nn.functional.interpolate(image, scale_factor=16 / patch_size).expand(-1, 3, -1, -1)
    torch.testing.assert_close(grey.patch_embed(image), rgb.patch_embed(large), rtol=1e-6, atol=1e-6)


def test_the_other_input_convention_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "unit.pth", make())
    with pytest.raises(WeightsError, match=r"'unit'.*'standardised'"):
        load_backbone(tmp_path / "unit.pth", input="standardised")
    assert load_backbone(tmp_path / "unit.pth", input="unit").card.input.convention == "unit"
    with pytest.raises(WeightsError, match="3 channels, got 1"):
        fit_weights(make(), input="imagenet")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float) -> None:
    weights = make()
    weights.tensors["blocks.1.mlp.fc2.weight"][3, 4] = value
    save_weights(tmp_path / "model.pth", weights)
    with pytest.raises(WeightsError, match=r"NaN or infinite values in blocks\.1\.mlp\.fc2\.weight"):
        load_backbone(tmp_path / "model.pth")


@pytest.mark.parametrize("file", ["model.pth", "model.safetensors"])
def test_a_loaded_model_is_independent_of_its_file(tmp_path: Path, file: str) -> None:
    path = tmp_path / file
    save_weights(path, make())
    vit = load_backbone(path)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    with path.open("r+b") as raw:  # in place: what is mapped into memory would change
        raw.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    path.unlink()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_loading_twice_gives_models_that_share_nothing(tmp_path: Path) -> None:
    save_weights(tmp_path / "model.pth", make())
    one, other = load_backbone(tmp_path / "model.pth"), load_backbone(tmp_path / "model.pth")
    with torch.no_grad():
        one.cls_token.fill_(7)
    assert not torch.equal(one.cls_token, other.cls_token)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("layout", "file"), LAYOUTS)
def test_an_interrupted_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], layout: Layout, file: str
) -> None:
    path = tmp_path / file
    save_weights(path, make(), layout=layout)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def torn(_content: object, target: Any, **_options: object) -> None:
        if isinstance(target, Path):
            with target.open("wb") as file:
                file.write(b"half")
        else:
            target.write(b"half")
        raise stop("in the middle")

    monkeypatch.setattr("torch.save", torn)
    monkeypatch.setattr(Path, "write_bytes", lambda path, content: torn(content, path))
    with pytest.raises(stop, match="in the middle"):
        save_weights(path, make(dtype=torch.float16), layout=layout)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(("layout", "file"), LAYOUTS)
def test_saved_files_have_the_permissions_of_the_umask(tmp_path: Path, layout: Layout, file: str) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    save_weights(tmp_path / "saved" / file, make(), layout=layout)
    written = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert written
    assert all(path.stat().st_mode == plain.stat().st_mode for path in written)


def test_a_bad_suffix_is_refused(tmp_path: Path) -> None:
    for name in ("model", "model.bin", "model.pth.gz"):
        with pytest.raises(WeightsError, match=r"expected a name .*\.pth"):
            save_weights(tmp_path / name, make())
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("layout", "file"), LAYOUTS)
def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path, layout: Layout, file: str) -> None:
    (tmp_path / "plain").write_text("a file, no folder")
    with pytest.raises(WeightsError, match="cannot be written"):
        save_weights(tmp_path / "plain" / file, make(), layout=layout)


def test_a_target_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("a file, no folder")
    with pytest.raises(WeightsError, match="expected a folder"):
        save_weights(tmp_path / "plain", make(), layout="huggingface")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError, match="cannot be written"):
        save_weights(tmp_path / "folder.pth", make())
    assert leftovers(tmp_path) == ["folder.pth", "plain"]


def test_saving_creates_missing_folders(tmp_path: Path) -> None:
    save_weights(tmp_path / "eval" / "training_9" / "teacher_checkpoint.pth", make())
    assert leftovers(tmp_path / "eval" / "training_9") == ["teacher_checkpoint.pth"]


def test_a_view_of_larger_memory_is_saved_without_the_rest(tmp_path: Path) -> None:
    weights = make()
    large = torch.zeros(4_000_000)
    large[:128] = 5
    weights = dataclasses.replace(weights, tensors={**weights.tensors, "norm.bias": large[:128]})
    save_weights(tmp_path / "model.pth", weights)
    assert (tmp_path / "model.pth").stat().st_size < 4_000_000
    assert torch.equal(read_weights(tmp_path / "model.pth").tensors["norm.bias"], torch.full((128,), 5.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2, this version reads 1"),
        ({"kind": "segmenter"}, "holds a 'segmenter', expected a backbone"),
        ({"vit": {"widht": 3}}, "configuration is damaged.*widht"),
        ({"vit": {"width": 0}}, "configuration is damaged.*width"),
        ({"card": {"input": {"convention": "raw"}}}, "configuration is damaged.*convention"),
    ],
)
def test_damaged_metadata_is_one_clear_error(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "model.pth"
    save_weights(path, make())
    content = torch.load(path, weights_only=True)
    content["dinocell"] |= change
    torch.save(content, path)
    with pytest.raises(WeightsError, match=words):
        read_weights(path)


# Fitting a patch embedding to another patch size, number of channels or input convention


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def embed(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(images, weight, bias, stride=weight.shape[-1])


def bilinear_matrix(old: int, new: int) -> np.ndarray:
    """Return the (new * new, old * old) matrix of a bilinear resize with half-pixel centres and clamped edges."""
    line = np.zeros((new, old))
    for row in range(new):
        centre = min(max((row + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(np.floor(centre)), old - 2)
        line[row, low] += 1 - (centre - low)
        line[row, low + 1] += centre - low
    return np.kron(line, line)


def test_patch_16_to_8_is_the_sum_over_2x2_pixels() -> None:
    weight = random(6, 3, 16, 16, dtype=torch.float64)
    expected = 4 * F.avg_pool2d(weight, 2)
    torch.testing.assert_close(resize_patch_weight(weight, 8), expected, rtol=0, atol=2e-14)


def test_patch_8_token_of_the_halved_image_is_the_patch_16_token_of_2x2_blocks() -> None:
    weight, bias = random(24, 3, 16, 16), random(24, seed=1)
    small = random(2, 3, 24, 40, seed=2)
    blocks = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    got = embed(small, resize_patch_weight(weight, 8), bias)
    torch.testing.assert_close(got, embed(blocks, weight, bias), rtol=1e-4, atol=1e-4)


def test_a_patch_8_model_gives_the_features_of_the_patch_16_model_on_2x2_blocks() -> None:
    vit = VisionTransformer(ViTConfig(width=64, depth=2, heads=2, mlp_hidden=96, patch_size=16, in_channels=3)).eval()
    vit.init_weights(layer_scale=0.5, generator=torch.Generator().manual_seed(0))
    fitted = fit_weights(Weights.of(vit), patch_size=8)
    fine = VisionTransformer(fitted.config).eval()
    fine.load_state_dict(fitted.tensors)
    small = random(2, 3, 24, 40)
    with torch.no_grad():
        expected = vit(small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        got = fine(small)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (14, 8), (8, 16), (14, 16), (16, 14), (8, 7)])
def test_new_filters_are_the_pseudo_inverse_of_the_transposed_resize(old: int, new: int) -> None:
    weight = random(5, 2, old, old, dtype=torch.float64)
    expected = weight.flatten(2).numpy() @ np.linalg.pinv(bilinear_matrix(old, new).T).T
    got = resize_patch_weight(weight, new)
    assert got.shape == (5, 2, new, new)
    np.testing.assert_allclose(got.flatten(2).numpy(), expected, rtol=0, atol=1e-10)


def test_an_enlarged_patch_gives_the_token_of_the_original() -> None:
    # Enlarging loses nothing, so the pseudo-inverse is exact: <B x, w'> = <x, w> for every patch x.
    weight, patches = random(5, 2, 8, 8, dtype=torch.float64), random(3, 2, 8, 8, seed=1, dtype=torch.float64)
    large = F.interpolate(patches, size=(16, 16), mode="bilinear", antialias=False)
    torch.testing.assert_close(embed(large, resize_patch_weight(weight, 16)), embed(patches, weight))


def test_resizing_keeps_the_dtype_and_does_not_change_the_same_size() -> None:
    weight = random(4, 1, 16, 16, dtype=torch.bfloat16)
    assert resize_patch_weight(weight, 8).dtype == torch.bfloat16
    assert resize_patch_weight(weight, 16) is weight


def as_imagenet(grey: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (grey.expand(-1, 3, -1, -1) - mean) / std


WEIGHT, BIAS = random(12, 3, 8, 8), random(12, seed=1)
GREY = torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_unit_model_equals_the_rgb_model_on_the_normalised_replicated_grey_image(channels: int) -> None:
    weight, bias = convert_channels(WEIGHT, BIAS, in_channels=channels, source="imagenet", target="unit")
    assert weight.shape == (12, channels, 8, 8)
    expected = embed(as_imagenet(GREY), WEIGHT, BIAS)
    got = embed(GREY.expand(-1, channels, -1, -1), weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_standardised_model_equals_the_rgb_model_on_the_replicated_grey_image(channels: int) -> None:
    weight, bias = convert_channels(WEIGHT, BIAS, in_channels=channels, source="imagenet", target="standardised")
    grey = random(2, 1, 16, 24, seed=3)
    expected = embed(grey.expand(-1, 3, -1, -1), WEIGHT, BIAS)
    got = embed(grey.expand(-1, channels, -1, -1), weight, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(bias, BIAS)


def test_the_weights_of_the_other_convention_give_other_features() -> None:
    expected = embed(as_imagenet(GREY), WEIGHT, BIAS)
    wrong = embed(GREY, *convert_channels(WEIGHT, BIAS, in_channels=1, source="imagenet", target="standardised"))
    assert (wrong - expected).norm() > 0.5 * expected.norm()
    grey = random(2, 1, 16, 24, seed=3)
    expected = embed(grey.expand(-1, 3, -1, -1), WEIGHT, BIAS)
    wrong = embed(grey, *convert_channels(WEIGHT, BIAS, in_channels=1, source="imagenet", target="unit"))
    assert (wrong - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("convention", ["unit", "standardised"])
@pytest.mark.parametrize(("before", "after"), [(5, 1), (4, 1), (1, 5), (5, 3)])
def test_channels_change_within_a_convention_keeps_the_replicated_token(
    convention: str, before: int, after: int
) -> None:
    weight = random(12, before, 8, 8)
    folded, bias = convert_channels(weight, BIAS, in_channels=after, source=convention, target=convention)
    expected = embed(GREY.expand(-1, before, -1, -1), weight, BIAS)
    got = embed(GREY.expand(-1, after, -1, -1), folded, bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_unit_grey_to_imagenet_rgb_is_the_inverse() -> None:
    weight, bias = random(12, 1, 8, 8), random(12, seed=1)
    rgb, shifted = convert_channels(weight, bias, in_channels=3, source="unit", target="imagenet")
    expected = embed(GREY, weight, bias)
    got = embed(as_imagenet(GREY), rgb, shifted)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    back, unshifted = convert_channels(rgb, shifted, in_channels=1, source="imagenet", target="unit")
    torch.testing.assert_close(back, weight, **CLOSE)
    torch.testing.assert_close(unshifted, bias, **CLOSE)


def test_three_channels_to_unit_is_exact_for_colour_images_too() -> None:
    colour = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(4))
    weight, bias = convert_channels(WEIGHT, BIAS, in_channels=3, source="imagenet", target="unit")
    expected = embed(as_imagenet(colour), WEIGHT, BIAS)
    torch.testing.assert_close(embed(colour, weight, bias), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("source", "target"), [("unit", "standardised"), ("standardised", "unit")])
def test_unit_and_standardised_are_never_converted(source: str, target: str) -> None:
    with pytest.raises(ValueError, match=f"'{source}'.*'{target}'"):
        convert_channels(random(12, 1, 8, 8), BIAS, in_channels=1, source=source, target=target)


@pytest.mark.parametrize(("source", "target", "channels"), [("imagenet", "unit", 1), ("unit", "imagenet", 4)])
def test_imagenet_statistics_need_three_channels(source: str, target: str, channels: int) -> None:
    with pytest.raises(ValueError, match="3 channels, got"):
        convert_channels(random(12, 4, 8, 8), BIAS, in_channels=channels, source=source, target=target)


def test_conversion_keeps_the_dtype() -> None:
    weight, bias = WEIGHT.bfloat16(), BIAS.bfloat16()
    for target in ("unit", "standardised"):
        folded, shifted = convert_channels(weight, bias, in_channels=1, source="imagenet", target=target)
        assert folded.dtype == shifted.dtype == torch.bfloat16
