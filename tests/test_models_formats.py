"""Every format that is read, built here by hand from the names that its authors use."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dinocell.models.config import LICENCES, UNKNOWN_LICENCE, ViTConfig
from dinocell.models.positions import LearnedPositionConfig
from dinocell.models.weights import load_backbone, read_weights

Named = dict[str, Tensor]


def draw(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def meta_blocks(rand: Callable[..., Tensor], d: int, depth: int, hidden: int, *, bias: bool = True) -> Named:
    """The part of a block that all of Meta's models share."""
    named: Named = {}
    for i in range(depth):
        b = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            named |= {f"{b}{norm}.weight": rand(d), f"{b}{norm}.bias": rand(d)}
        named[f"{b}attn.qkv.weight"] = rand(3 * d, d)
        if bias:
            named[f"{b}attn.qkv.bias"] = rand(3 * d)
        named |= {f"{b}attn.proj.weight": rand(d, d), f"{b}attn.proj.bias": rand(d)}
        named |= {f"{b}ls1.gamma": rand(d), f"{b}ls2.gamma": rand(d)}
        named |= {f"{b}mlp.fc1.weight": rand(hidden, d), f"{b}mlp.fc1.bias": rand(hidden)}
        named |= {f"{b}mlp.fc2.weight": rand(d, hidden), f"{b}mlp.fc2.bias": rand(d)}
    return named


def gate(named: Named, rand: Callable[..., Tensor], d: int, depth: int, hidden: int) -> None:
    """Put SwiGLU's w1, w2, w3 in the place of fc1, fc2."""
    for i in range(depth):
        for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
            del named[f"blocks.{i}.mlp.{name}"]
        for w, shape in (("w1", (hidden, d)), ("w2", (hidden, d)), ("w3", (d, hidden))):
            named[f"blocks.{i}.mlp.{w}.weight"] = rand(*shape)
            named[f"blocks.{i}.mlp.{w}.bias"] = rand(shape[0])


def meta_v3(
    *, d: int = 128, depth: int = 3, hidden: int = 192, channels: int = 3, periods: int = 16, bias: bool = True
) -> Named:
    rand = draw(1)
    named = {"cls_token": rand(1, 1, d), "storage_tokens": rand(1, 4, d), "mask_token": rand(1, d)}
    named |= {"patch_embed.proj.weight": rand(d, channels, 16, 16), "patch_embed.proj.bias": rand(d)}
    named["rope_embed.periods"] = 100.0 ** (torch.arange(periods) / periods)
    named |= meta_blocks(rand, d, depth, hidden, bias=bias) | {"norm.weight": rand(d), "norm.bias": rand(d)}
    return named


def meta_v2(
    *, d: int = 128, depth: int = 3, hidden: int = 512, channels: int = 3, patch: int = 14, side: int = 5
) -> Named:
    rand = draw(2)
    named = {"cls_token": rand(1, 1, d), "pos_embed": rand(1, 1 + side * side, d), "mask_token": rand(1, d)}
    named |= {"patch_embed.proj.weight": rand(d, channels, patch, patch), "patch_embed.proj.bias": rand(d)}
    named |= meta_blocks(rand, d, depth, hidden) | {"norm.weight": rand(d), "norm.bias": rand(d)}
    return named


def chunked(named: Named, size: int = 1) -> Named:
    """Rename ``blocks.i.`` to ``blocks.<chunk>.i.`` as models trained with FSDP in block chunks have it."""
    renamed = {}
    for name, tensor in named.items():
        if name.startswith("blocks."):
            index = int(name.split(".")[1])
            name = name.replace("blocks.", f"blocks.{index // size}.", 1)
        renamed[name] = tensor
    return renamed


def write(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def assert_tensors(got: Any, expected: Named) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype


V3_CONFIG = ViTConfig(width=128, depth=3, heads=2, mlp_hidden=192, patch_size=16, in_channels=3, key_bias=True)


def v3_expected(named: Named) -> Named:
    """Our names for a DINOv3 file without masks."""
    expected = {n: t for n, t in named.items() if n not in ("rope_embed.periods", "storage_tokens")}
    return expected | {"register_tokens": named["storage_tokens"]}


@pytest.mark.parametrize("rounded", [False, True])
def test_dinov3_flat_file_is_read(tmp_path: Path, rounded: bool) -> None:
    named = meta_v3()
    if rounded:  # the releases keep the periods as bfloat16 had them
        named["rope_embed.periods"] = named["rope_embed.periods"].bfloat16()
    weights = read_weights(write(tmp_path / "v3.pth", named))
    assert weights.config == V3_CONFIG
    assert weights.config.rope.base == 100.0
    assert weights.config.norm_eps == 1e-5
    assert_tensors(weights.tensors, v3_expected(named))
    assert weights.heads == {}
    assert weights.card.input.convention == "imagenet"
    assert weights.card.licence == LICENCES["dinov3"]
    assert weights.card.derived_from == ("Meta DINOv3: v3.pth",)
    assert weights.source_format == "Meta DINOv3"


@pytest.mark.parametrize("mask", ["zero", "nan", "normal"])
def test_dinov3_bias_masks_are_applied_and_rebuilt(tmp_path: Path, mask: str) -> None:
    d, named = 128, meta_v3()
    values = {"zero": torch.zeros(3 * d), "nan": torch.full((3 * d,), torch.nan), "normal": torch.ones(3 * d)}[mask]
    if mask == "normal":
        values[d : 2 * d] = 0
    for i in range(3):
        named[f"blocks.{i}.attn.qkv.bias_mask"] = values.clone()
        if mask == "zero":
            named[f"blocks.{i}.attn.qkv.bias"].zero_()
    weights = read_weights(write(tmp_path / "v3.pth", named))
    assert not weights.config.key_bias  # the mask is rebuilt: query and value yes, key no
    assert weights.config.qkv_bias
    for i in range(3):
        bias, read = named[f"blocks.{i}.attn.qkv.bias"], weights.tensors[f"blocks.{i}.attn.qkv.bias"]
        for part in (slice(0, d), slice(2 * d, 3 * d)):
            assert torch.equal(read[part], bias[part])
        if mask == "normal":
            assert not read[d : 2 * d].any()
    assert not any(name.endswith("bias_mask") for name in weights.tensors)


def test_the_rebuilt_mask_lets_training_move_query_and_value_bias_but_not_the_key_bias(tmp_path: Path) -> None:
    d, named = 128, meta_v3(depth=1)
    named |= {"blocks.0.attn.qkv.bias": torch.zeros(3 * d), "blocks.0.attn.qkv.bias_mask": torch.zeros(3 * d)}
    vit = load_backbone(write(tmp_path / "v3.pth", named), patch_size=None, in_channels=None)
    vit(torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))).cls.square().sum().backward()
    gradient = vit.get_parameter("blocks.0.attn.qkv.bias").grad
    assert gradient is not None
    assert gradient[:d].any()
    assert gradient[2 * d :].any()
    assert not gradient[d : 2 * d].any()


def test_dinov3_7b_style_file_is_read(tmp_path: Path) -> None:
    rand, d, depth, hidden = draw(3), 256, 2, 192
    named = meta_v3(d=d, depth=depth, hidden=hidden, periods=32, bias=False)
    gate(named, rand, d, depth, hidden)
    named |= {"local_cls_norm.weight": rand(d), "local_cls_norm.bias": rand(d)}
    weights = read_weights(write(tmp_path / "7b.pth", named))
    config = weights.config
    assert (config.width, config.depth, config.heads) == (256, 2, 2)  # 32 periods: heads of 128
    assert (config.mlp, config.mlp_hidden) == ("swiglu", 192)
    assert not config.qkv_bias
    assert config.local_cls_norm
    assert not config.cls_norm
    assert config.rope.base == 100.0
    assert_tensors(weights.tensors, v3_expected(named))


def test_rotary_periods_between_a_minimum_and_a_maximum_are_inferred(tmp_path: Path) -> None:
    named = meta_v3()
    named["rope_embed.periods"] = 0.25 * (40 / 0.25) ** (torch.arange(16) / 15)
    config = read_weights(write(tmp_path / "v3.pth", named)).config
    assert config.rope.min_period == pytest.approx(0.25, rel=1e-5)
    assert config.rope.max_period == pytest.approx(40, rel=1e-5)


@pytest.mark.parametrize("base", [50.0, 100.0, 1000.0, 10000.0])
def test_rope_base_is_inferred_despite_bfloat16_rounding(tmp_path: Path, base: float) -> None:
    named = meta_v3()
    named["rope_embed.periods"] = (base ** (torch.arange(16) / 16)).bfloat16()
    rope = read_weights(write(tmp_path / "v3.pth", named)).config.rope
    assert rope.min_period is None
    assert rope.base == pytest.approx(base, rel=0.01)


V2_CONFIG = ViTConfig(
    width=128,
    depth=3,
    heads=2,
    mlp_hidden=512,
    patch_size=14,
    in_channels=3,
    registers=0,
    positions="learned",
    learned=LearnedPositionConfig(grid_rows=5, grid_columns=5),
    key_bias=True,
    norm_eps=1e-6,
)


@pytest.mark.parametrize("names", ["plain", "chunked"])
def test_dinov2_file_is_read(tmp_path: Path, names: str) -> None:
    named = meta_v2()
    weights = read_weights(write(tmp_path / "v2.pth", named if names == "plain" else chunked(named, 2)))
    assert weights.config == V2_CONFIG
    assert (weights.config.learned.offset, weights.config.learned.antialias) == (0.1, False)
    assert_tensors(weights.tensors, named)
    assert weights.card.input.convention == "imagenet"
    assert weights.card.licence == LICENCES["dinov2"]
    assert weights.card.derived_from == ("Meta DINOv2: v2.pth",)


def test_dinov2_with_registers_resizes_positions_exactly_and_antialiased(tmp_path: Path) -> None:
    named = meta_v2() | {"register_tokens": draw(5)(1, 4, 128)}
    weights = read_weights(write(tmp_path / "reg4.pth", named))
    assert weights.config.registers == 4
    assert (weights.config.learned.offset, weights.config.learned.antialias) == (0.0, True)
    assert_tensors(weights.tensors, named)


def test_dinov2_giant_is_read_with_gate_first(tmp_path: Path) -> None:
    rand, d, hidden, named = draw(6), 128, 344, meta_v2()
    gate(named, rand, d, 3, hidden)
    expected = dict(named)
    for i in range(3):
        for part in ("weight", "bias"):
            halves = [named.pop(f"blocks.{i}.mlp.{w}.{part}") for w in ("w1", "w2")]
            named[f"blocks.{i}.mlp.w12.{part}"] = torch.cat(halves)
    weights = read_weights(write(tmp_path / "giant.pth", named))
    assert (weights.config.mlp, weights.config.mlp_hidden) == ("swiglu", hidden)
    assert_tensors(weights.tensors, expected)


@pytest.mark.parametrize(("channels", "patch", "side"), [(5, 8, 16), (4, 16, 14), (4, 14, 37), (1, 16, 14)])
def test_cell_dino_file_is_read(tmp_path: Path, channels: int, patch: int, side: int) -> None:
    named = meta_v2(d=64, depth=4, hidden=256, channels=channels, patch=patch, side=side)
    weights = read_weights(write(tmp_path / "cell.pth", chunked(named)))
    config = weights.config
    assert (config.in_channels, config.patch_size, config.depth, config.registers) == (channels, patch, 4, 0)
    assert (config.learned.grid_rows, config.learned.grid_columns) == (side, side)
    assert (config.learned.offset, config.learned.antialias) == (0.1, False)
    assert_tensors(weights.tensors, named)
    assert weights.card.input.convention == "standardised"
    assert weights.card.licence == LICENCES["cell_dino"]
    assert weights.card.derived_from == ("Meta Cell-DINO: cell.pth",)


def head(seed: int, *, weight_norm: bool) -> Named:
    rand = draw(seed)
    named = {f"mlp.{i}.{part}": rand(*shape) for i in (0, 2, 4) for part, shape in (("weight", (8, 8)), ("bias", (8,)))}
    if weight_norm:
        return named | {"last_layer.weight_g": rand(32, 1), "last_layer.weight_v": rand(32, 8)}
    return named | {"last_layer.weight": rand(32, 8)}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_the_teacher_of_a_training_run_is_read_with_its_heads(tmp_path: Path, wrapper: str, weight_norm: bool) -> None:
    named, dino, ibot = meta_v3(channels=1), head(7, weight_norm=weight_norm), head(8, weight_norm=False)
    teacher = {f"backbone.{wrapper}{name}": tensor for name, tensor in named.items()}
    for key in [k for k in teacher if "blocks.1." in k]:  # torch.compile of a block puts its mark in the middle
        teacher[key.replace("blocks.1.", "blocks.1._orig_mod.")] = teacher.pop(key)
    teacher |= {f"dino_head.{name}": tensor for name, tensor in dino.items()}
    teacher |= {f"{wrapper}ibot_head.{name}": tensor for name, tensor in ibot.items()}
    student = {name: torch.zeros_like(tensor) for name, tensor in teacher.items()}
    path = write(tmp_path / "teacher_checkpoint.pth", {"student": student, "teacher": teacher})
    weights = read_weights(path)
    assert_tensors(weights.tensors, v3_expected(named))
    assert set(weights.heads) == {"dino_head", "ibot_head"}
    assert_tensors(weights.heads["dino_head"], dino)
    assert_tensors(weights.heads["ibot_head"], ibot)
    assert weights.card.licence == UNKNOWN_LICENCE
    assert weights.card.derived_from == ("Meta DINOv3 (teacher of a training run): teacher_checkpoint.pth",)
    assert weights.card.input.convention == "standardised"


def test_a_flat_dictionary_of_student_and_teacher_gives_the_teacher(tmp_path: Path) -> None:
    named = meta_v2()
    both = {f"teacher.backbone.{name}": tensor for name, tensor in named.items()}
    both |= {f"student.backbone.{name}": torch.zeros_like(tensor) for name, tensor in named.items()}
    assert_tensors(read_weights(write(tmp_path / "both.pth", both)).tensors, named)


def test_a_flat_safetensors_file_is_read_like_the_pth(tmp_path: Path) -> None:
    named = meta_v2()
    safetensors.torch.save_file(named, tmp_path / "v2.safetensors")
    assert_tensors(read_weights(tmp_path / "v2.safetensors").tensors, named)


def hub_v3(named: Named, d: int = 128) -> Named:
    """DINOv3 under Hugging Face's names."""
    hub: Named = {"embeddings.cls_token": named["cls_token"], "embeddings.mask_token": named["mask_token"][None]}
    hub["embeddings.register_tokens"] = named["storage_tokens"]
    hub["embeddings.patch_embeddings.weight"] = named["patch_embed.proj.weight"]
    hub["embeddings.patch_embeddings.bias"] = named["patch_embed.proj.bias"]
    hub |= {name: named[name] for name in ("norm.weight", "norm.bias")}
    for i in range(3):
        theirs, ours = f"layer.{i}.", f"blocks.{i}."
        for index, letter in enumerate("qkv"):
            rows = slice(index * d, (index + 1) * d)
            hub[f"{theirs}attention.{letter}_proj.weight"] = named[f"{ours}attn.qkv.weight"][rows].clone()
            if letter != "k":
                hub[f"{theirs}attention.{letter}_proj.bias"] = named[f"{ours}attn.qkv.bias"][rows].clone()
        for part in ("weight", "bias"):
            hub[f"{theirs}attention.o_proj.{part}"] = named[f"{ours}attn.proj.{part}"]
            hub[f"{theirs}mlp.up_proj.{part}"] = named[f"{ours}mlp.fc1.{part}"]
            hub[f"{theirs}mlp.down_proj.{part}"] = named[f"{ours}mlp.fc2.{part}"]
            hub |= {f"{theirs}norm{k}.{part}": named[f"{ours}norm{k}.{part}"] for k in (1, 2)}
        hub |= {f"{theirs}layer_scale{k}.lambda1": named[f"{ours}ls{k}.gamma"] for k in (1, 2)}
    return hub


HUB_V3 = {
    "model_type": "dinov3_vit",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-5,
    "rope_theta": 100.0,
}


def write_hub(folder: Path, hub: Named, config: dict[str, Any], storage: str) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(hub)
    if storage == "safetensors":
        safetensors.torch.save_file(hub, folder / "model.safetensors", metadata={"format": "pt"})
    elif storage == "bin":
        torch.save(hub, folder / "pytorch_model.bin")
    else:
        half = len(names) // 2
        parts = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
        for file, own in parts.items():
            safetensors.torch.save_file({name: hub[name] for name in own}, folder / file)
        index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("storage", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_hugging_face_dinov3_folder_is_read(tmp_path: Path, storage: str, prefix: str) -> None:
    named = meta_v3()
    hub = {(prefix + n if n.startswith("layer.") else n): t for n, t in hub_v3(named).items()}
    weights = read_weights(write_hub(tmp_path, hub, HUB_V3, storage))
    assert weights.config.heads == 4
    assert not weights.config.key_bias
    expected = v3_expected(named)
    for i in range(3):
        expected[f"blocks.{i}.attn.qkv.bias"][128:256] = 0
    assert_tensors(weights.tensors, expected)
    assert weights.source_format == "Hugging Face dinov3_vit"
    assert weights.card.licence == LICENCES["dinov3"]
    assert weights.card.input.convention == "imagenet"


def test_hugging_face_dinov2_with_fused_gate_is_read(tmp_path: Path) -> None:
    rand, d, hidden, named = draw(9), 128, 344, meta_v2()
    gate(named, rand, d, 3, hidden)
    hub: Named = {f"embeddings.{n}": named[n] for n in ("cls_token", "mask_token")}
    hub["embeddings.position_embeddings"] = named["pos_embed"]
    for part in ("weight", "bias"):
        hub[f"embeddings.patch_embeddings.projection.{part}"] = named[f"patch_embed.proj.{part}"]
        hub[f"layernorm.{part}"] = named[f"norm.{part}"]
        for i in range(3):
            theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
            for index, word in enumerate(("query", "key", "value")):
                rows = slice(index * d, (index + 1) * d)
                hub[f"{theirs}attention.attention.{word}.{part}"] = named[f"{ours}attn.qkv.{part}"][rows].clone()
            hub[f"{theirs}attention.output.dense.{part}"] = named[f"{ours}attn.proj.{part}"]
            hub |= {f"{theirs}norm{k}.{part}": named[f"{ours}norm{k}.{part}"] for k in (1, 2)}
            hub |= {f"{theirs}layer_scale{k}.lambda1": named[f"{ours}ls{k}.gamma"] for k in (1, 2)}
            both = [named[f"{ours}mlp.{w}.{part}"] for w in ("w1", "w2")]
            hub[f"{theirs}mlp.weights_in.{part}"] = torch.cat(both)
            hub[f"{theirs}mlp.weights_out.{part}"] = named[f"{ours}mlp.w3.{part}"]
    config = {"model_type": "dinov2", "hidden_size": 128, "num_attention_heads": 2, "layer_norm_eps": 1e-6}
    weights = read_weights(write_hub(tmp_path, hub, config, "safetensors"))
    assert weights.config.learned.offset == 0.0  # transformers takes the exact size
    assert weights.config.mlp == "swiglu"
    assert weights.card.licence == LICENCES["dinov2"]
    assert_tensors(weights.tensors, named)


def test_a_file_that_is_not_a_backbone_is_refused_with_the_reason(tmp_path: Path) -> None:
    for content, words in (
        ({"fc.weight": torch.ones(2, 2)}, "no patch embedding"),
        ({n: t for n, t in meta_v3().items() if n not in ("rope_embed.periods", "storage_tokens")}, "not a DINO"),
        (meta_v3() | {"pos_embed": torch.ones(1, 26, 128)}, "both rotary and learned"),
        ({n: t for n, t in meta_v2().items() if not n.startswith("blocks.1.")}, "without a gap"),
        (meta_v2() | {"backbone.cls_token": torch.ones(1, 1, 128)}, "two tensors are called 'cls_token'"),
        (hub_v3(meta_v3()), "no config.json"),
        (meta_v2() | {"pos_embed": torch.ones(1, 25, 128)}, "pos_embed: expected shape"),
        (meta_v3() | {"rope_embed.periods": torch.arange(1.0, 17)}, "geometric"),
        (meta_v3() | {"rope_embed.periods": torch.full((16,), torch.nan)}, "periods"),
        (meta_v3() | {"norm.weight": torch.ones(64)}, "norm.weight: expected shape"),
        (meta_v3() | {"norm.weight": torch.ones(128, dtype=torch.int64)}, "expected floating-point"),
        (meta_v3() | {"mask_token": torch.ones(1, 64)}, "mask_token: expected shape"),
        (meta_v3() | {"storage_tokens": torch.ones(4)}, "storage_tokens: expected 3 dim"),
        (meta_v2() | {"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}, "fc1.weight: expected 2 dim"),
        (meta_v3() | {"rope_embed.periods": torch.ones(4, 4)}, "rope_embed.periods: expected 1 dim"),
        (meta_v3() | {"blocks.0.attn.qkv.bias_mask": torch.ones(5)}, "bias_mask: expected shape"),
    ):
        with pytest.raises(ValueError, match=words):
            read_weights(write(tmp_path / "odd.pth", content))
