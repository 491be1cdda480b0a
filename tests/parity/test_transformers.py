"""Hugging Face's DINO classes as the oracle: the same random weights, the same numbers, both ways."""

import importlib
import logging
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dinocell.models.export import Weights, save_weights
from dinocell.models.positions import LearnedPositionConfig
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.models.weights import load_backbone

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("transformers")
        for name in ("DINOv3ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"):
            getattr(module, name)
    module.utils.logging.set_verbosity(logging.CRITICAL)
    module.utils.logging.disable_progress_bar()
    return module


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that shows when it is dropped, swapped or transposed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("lambda1", "gamma")) or ("norm" in name and name.endswith("weight")):
                parameter.copy_(0.7 + 0.2 * noise)
            elif parameter.ndim >= 2 and not name.endswith(("token", "tokens", "embeddings", "pos_embed")):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.5 * noise)


def quietly(call: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **options)


def assert_same_features(ours: VisionTransformer, theirs: nn.Module, sizes: list[tuple[int, int]]) -> None:
    depth, num_prefix = ours.config.depth, ours.config.num_prefix
    blocks = sorted({depth // 4, depth // 2, depth - 2, depth - 1})
    for seed, size in enumerate(sizes):
        images = torch.randn(2, ours.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = theirs(pixel_values=images, output_hidden_states=True)
            got = ours(images)
            between = ours.forward_blocks(images, blocks, norm=False)
        last = expected.last_hidden_state
        assert last.std() > 0.1
        torch.testing.assert_close(got.cls, last[:, 0], **CLOSE)
        torch.testing.assert_close(got.registers, last[:, 1:num_prefix], **CLOSE)
        torch.testing.assert_close(got.patches, last[:, num_prefix:], **CLOSE)
        assert len(expected.hidden_states) == depth + 1
        for block, out in zip(blocks, between, strict=True):
            tokens = torch.cat((out.cls[:, None], out.registers, out.patches), dim=1)
            torch.testing.assert_close(tokens, expected.hidden_states[block + 1], **CLOSE)


S_SHAPE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_register_tokens": 4}
THIN = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256, "num_register_tokens": 4}

V3 = {
    "small": {**S_SHAPE, "num_hidden_layers": 12},
    "small_plus": {**S_SHAPE, "num_hidden_layers": 12, "use_gated_mlp": True, "hidden_act": "silu"},
    "small_plus_5_channels": {
        **S_SHAPE,
        "num_hidden_layers": 3,
        "use_gated_mlp": True,
        "hidden_act": "silu",
        "num_channels": 5,
    },
    "5_channels": {**THIN, "num_hidden_layers": 5, "num_channels": 5},
    "no_registers": {**THIN, "num_hidden_layers": 4, "num_register_tokens": 0},
    "patch_8_and_another_base": {**THIN, "num_hidden_layers": 4, "patch_size": 8, "rope_theta": 10000.0},
    "all_three_biases": {**THIN, "num_hidden_layers": 4, "key_bias": True},
    "no_qkv_bias": {**THIN, "num_hidden_layers": 4, "query_bias": False, "value_bias": False},
    "only_query_bias": {**THIN, "num_hidden_layers": 4, "value_bias": False},
    "only_value_bias": {**THIN, "num_hidden_layers": 4, "query_bias": False},
    "only_key_bias": {**THIN, "num_hidden_layers": 4, "query_bias": False, "value_bias": False, "key_bias": True},
    "head_width_128": {**THIN, "num_hidden_layers": 4, "num_attention_heads": 1, "layer_norm_eps": 1e-3},
}


@pytest.mark.parametrize("name", V3)
def test_dinov3_features_equal_those_of_transformers(transformers: ModuleType, tmp_path: Path, name: str) -> None:
    theirs = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**V3[name])).eval()
    randomise(theirs)
    quietly(theirs.save_pretrained, tmp_path)
    ours = load_backbone(tmp_path, patch_size=None, in_channels=None)
    patch = ours.config.patch_size
    assert_same_features(ours, theirs, [(4 * patch, 4 * patch), (3 * patch, 5 * patch)])


V2_SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 5, "image_size": 70, "patch_size": 14}
V2 = {
    "fc": ("Dinov2", {}),
    "fc_small": ("Dinov2", {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12}),
    "swiglu": ("Dinov2", {"use_swiglu_ffn": True}),
    "no_bias_4_channels": ("Dinov2", {"qkv_bias": False, "num_channels": 4}),
    "no_mask_token": ("Dinov2", {"use_mask_token": False}),
    "registers_fc": ("Dinov2WithRegisters", {"num_register_tokens": 4}),
    "registers_swiglu": ("Dinov2WithRegisters", {"num_register_tokens": 3, "use_swiglu_ffn": True}),
}


@pytest.mark.parametrize("name", V2)
def test_dinov2_features_equal_those_of_transformers(transformers: ModuleType, tmp_path: Path, name: str) -> None:
    kind, changes = V2[name]
    config = getattr(transformers, f"{kind}Config")(**{**V2_SHAPE, **changes})
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    randomise(theirs)
    quietly(theirs.save_pretrained, tmp_path)
    ours = load_backbone(tmp_path, patch_size=None, in_channels=None)
    assert_same_features(ours, theirs, [(70, 70), (84, 84), (42, 98)])


# Exact size, as transformers has it; antialiasing where it has registers.
EXACT = LearnedPositionConfig(grid_rows=5, grid_columns=5, offset=0.0)
SMOOTH = LearnedPositionConfig(grid_rows=5, grid_columns=5, offset=0.0, antialias=True)
OURS = {"width": 128, "depth": 4, "heads": 2, "mlp_hidden": 512}
EXPORTED = {
    "rope": ViTConfig(**OURS),
    "rope_gated": ViTConfig(**OURS, mlp="swiglu", in_channels=3, patch_size=16),
    "rope_key_bias": ViTConfig(**OURS, key_bias=True),
    "rope_no_bias": ViTConfig(**OURS, qkv_bias=False),
    "rope_no_registers": ViTConfig(**OURS, registers=0),
    "rope_no_layer_scale": ViTConfig(**OURS, layer_scale=False),
    "rope_local_norm": ViTConfig(**OURS, local_cls_norm=True),
    "learned": ViTConfig(**OURS, positions="learned", learned=EXACT, registers=0, key_bias=True, norm_eps=1e-6),
    "learned_no_bias": ViTConfig(**OURS, positions="learned", learned=EXACT, registers=0, qkv_bias=False),
    "learned_zero_key_bias": ViTConfig(**OURS, positions="learned", learned=EXACT, registers=0),
    "learned_gated": ViTConfig(
        **{**OURS, "mlp_hidden": 344}, mlp="swiglu", positions="learned", learned=EXACT, registers=0, key_bias=True
    ),
    "learned_registers": ViTConfig(**OURS, positions="learned", learned=SMOOTH, key_bias=True),
    "learned_registers_gated": ViTConfig(
        **{**OURS, "mlp_hidden": 344}, mlp="swiglu", positions="learned", learned=SMOOTH, key_bias=True
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_our_export_loads_in_transformers_with_equal_features(
    transformers: ModuleType, tmp_path: Path, name: str
) -> None:
    ours = VisionTransformer(EXPORTED[name]).eval()
    randomise(ours)
    save_weights(tmp_path, Weights.of(ours), layout="huggingface")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    theirs, report = quietly(transformers.AutoModel.from_pretrained, tmp_path, output_loading_info=True)
    assert {what: list(names) for what, names in report.items() if names} == {}
    patch = ours.config.patch_size
    assert_same_features(ours, theirs.eval(), [(5 * patch, 5 * patch), (3 * patch, 4 * patch)])
