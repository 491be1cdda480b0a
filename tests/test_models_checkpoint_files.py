"""Damaged and hostile weights files: one `WeightsError` of one line that names the file, or the whole model."""

import builtins
import io
import json
import os
import pickle
import random
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dinocell.errors import WeightsError
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.models.weights import Weights, load_backbone, read_weights, save_weights

SMALL = ViTConfig(width=8, depth=2, heads=1, mlp_hidden=16, patch_size=4, registers=1)
SUFFIXES = ("pth", "safetensors")


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(SMALL)


@pytest.fixture(scope="module")
def saved(vit: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    for suffix in SUFFIXES:
        save_weights(folder / f"model.{suffix}", Weights.of(vit))
    return {suffix: (folder / f"model.{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.fixture
def hub_folder(vit: VisionTransformer, tmp_path: Path) -> Path:
    save_weights(tmp_path / "hub", Weights.of(vit), layout="huggingface")
    return tmp_path / "hub"


@pytest.fixture(autouse=True)
def seconds_not_minutes() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


def problem(path: Path) -> str:
    """Return the error for `path`: one line that names it."""
    with pytest.raises(WeightsError) as caught:
        load_backbone(path, patch_size=None, in_channels=None)
    return one_line(caught.value, path)


def one_line(error: WeightsError, path: Path) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert str(path) in message
    assert len(message) < 1000 + len(str(path))
    return message


def assert_whole_or_refused(path: Path, vit: VisionTransformer) -> bool:
    """Load or refuse as in `problem`; a loaded model has every tensor, finite, in the right shape."""
    try:
        loaded = load_backbone(path, patch_size=None, in_channels=None)
    except WeightsError as error:
        one_line(error, path)
        return False
    expected = vit.state_dict()
    found = loaded.state_dict()
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" and t.isfinite().all() for t in found.values())
    return True


def put(path: Path, body: bytes) -> Path:
    path.write_bytes(body)
    return path


def flat(saved: dict[str, bytes]) -> dict[str, Tensor]:
    """Return the tensors of the saved file under the names in it."""
    return safetensors.torch.load(saved["safetensors"])


def content(saved: dict[str, bytes]) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(io.BytesIO(saved["pth"]), weights_only=True)
    return loaded


def put_torch(path: Path, what: object, *, legacy: bool = False) -> Path:
    torch.save(what, path, _use_new_zipfile_serialization=not legacy)
    return path


def put_safetensors(path: Path, header: object, body: bytes) -> Path:
    text = json.dumps(header).encode()
    return put(path, struct.pack("<Q", len(text)) + text + body)


def header_and_body(saved: dict[str, bytes]) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", saved["safetensors"][:8])
    return json.loads(saved["safetensors"][8 : 8 + size]), saved["safetensors"][8 + size :]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_undamaged_file_loads_unchanged(
    saved: dict[str, bytes], vit: VisionTransformer, tmp_path: Path, suffix: str
) -> None:
    loaded = load_backbone(put(tmp_path / f"x.{suffix}", saved[suffix]), patch_size=None, in_channels=None)
    for name, tensor in vit.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


# Bytes


def test_a_safetensors_header_length_is_not_mistaken_for_a_pickle(saved: dict[str, bytes], tmp_path: Path) -> None:
    """A header of 128, 384, ... bytes begins with the byte of a pickle."""
    whole, path = saved["safetensors"], tmp_path / "model.safetensors"
    (length,) = struct.unpack("<Q", whole[:8])
    padded = length + (0x80 - length) % 256
    path.write_bytes(struct.pack("<Q", padded) + whole[8 : 8 + length].ljust(padded) + whole[8 + length :])
    assert path.read_bytes()[:1] == b"\x80"
    found, expected = read_weights(path), read_weights(_written(tmp_path / "as_it_was.safetensors", whole))
    assert found.card == expected.card
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_refused(saved: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    body = saved[suffix]
    for length in (*range(12), *range(12, len(body), len(body) // 20), len(body) - 1):
        problem(put(tmp_path / f"x.{suffix}", body[:length]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_with_flipped_bits_loads_whole_or_is_refused(
    saved: dict[str, bytes], vit: VisionTransformer, tmp_path: Path, suffix: str
) -> None:
    generator, refused = random.Random(0), 0
    for number in range(60):
        body = bytearray(saved[suffix])
        where = generator.randrange(min(len(body), 6000) if number % 2 else len(body))
        body[where] ^= 1 << generator.randrange(8)
        refused += not assert_whole_or_refused(put(tmp_path / f"x.{suffix}", bytes(body)), vit)
    assert refused > 10


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x10\0\0\0\0\0\0\0{"]), body=st.binary(max_size=400))
def test_random_bytes_are_refused(tmp_path: Path, start: bytes, body: bytes) -> None:
    problem(put(tmp_path / "x.pth", start + body))


def test_a_header_that_contradicts_its_data_is_refused(saved: dict[str, bytes], tmp_path: Path) -> None:
    header, body = header_and_body(saved)
    first, second, *_ = (name for name in header if name != "__metadata__")
    offsets = header[first]["data_offsets"]
    lies: list[dict[str, Any]] = [
        {"data_offsets": [len(body), 2 * len(body)]},
        {"data_offsets": [offsets[1], offsets[0]]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": [0, 2**63]},
        {"data_offsets": [offsets[0], offsets[1] - 1]},
        {"data_offsets": header[second]["data_offsets"]},
        {"shape": [2**40, 2**40]},
        {"shape": [2**62]},
        {"shape": [-1]},
        {"dtype": "F128"},
        {"dtype": None},
    ]
    for lie in lies:
        problem(put_safetensors(tmp_path / "x.safetensors", header | {first: header[first] | lie}, body))
    problem(put(tmp_path / "x.safetensors", struct.pack("<Q", 2**62) + saved["safetensors"][8:]))
    problem(put_safetensors(tmp_path / "x.safetensors", header, body + b"more"))


def test_an_archive_that_grows_on_reading_is_refused(saved: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"N0" * 20_000_000 + b".")
        archive.writestr("x/version", b"3\n")
    assert "claim" in problem(path)


# Code


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("form", ["bare", "legacy", "zip"])
@pytest.mark.parametrize("call", ["system", "exec", "eval", "nested"])
def test_pickled_code_is_refused_and_not_run(saved: dict[str, bytes], tmp_path: Path, form: str, call: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pth"
    code = f"open({str(marker)!r}, 'w').close()"
    payload: object = {
        "system": Runs(os.system, f"touch {marker}"),
        "exec": Runs(builtins.exec, code),
        "eval": Runs(builtins.eval, code),
        "nested": [{"optimizer": Runs(builtins.exec, code)}],
    }[call]
    what = content(saved) | {"extra": payload}
    if form == "bare":
        put(path, pickle.dumps(payload, protocol=2))
    else:
        put_torch(path, what, legacy=form == "legacy")
    message = problem(path)
    assert not marker.exists()
    assert "refused" in message or form == "bare"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_module_is_refused(vit: VisionTransformer, tmp_path: Path, legacy: bool) -> None:
    assert "refused" in problem(put_torch(tmp_path / "x.pth", vit, legacy=legacy))
    assert "refused" in problem(put_torch(tmp_path / "x.pth", {"model": nn.Linear(2, 2)}, legacy=legacy))


# Contents


def cyclic() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    tree["teacher"] = tree
    return tree


def shared(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"x": torch.zeros(1)}
    for _ in range(levels):
        tree = {f"k{number}": tree for number in range(20)}
    return tree


def deep(levels: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(levels):
        tree = {"a": tree}
    return tree


@pytest.mark.parametrize(
    "what",
    [
        None,
        3,
        "text",
        [],
        {},
        torch.zeros(3),
        [torch.zeros(3)],
        {"a": 1},
        {"teacher": None},
        {"teacher": {"a": [torch.zeros(2)]}},
        {3: torch.zeros(2), "3": torch.zeros(2)},
        {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1)},
        {"new\nline": torch.zeros(2), "\x1b[2J": torch.zeros(2)},
        {"new\nline": 3},
        {"x" * 100_000: torch.zeros(2)},
        {"blocks." + "9" * 5000 + ".x": torch.zeros(2)},
        {"dinocell": [1]},
        {"dinocell": {"schema": torch.zeros(2)}},
        cyclic(),
        shared(14),
        deep(100),
        {"dinocell": deep(100)},
    ],
    ids=lambda what: type(what).__name__,
)
def test_anything_but_a_dictionary_of_tensors_is_refused(tmp_path: Path, what: object) -> None:
    problem(put_torch(tmp_path / "x.pth", what))


def replacements(tensor: Tensor) -> dict[str, Tensor]:
    return {
        "int": tensor.long(),
        "bool": tensor.bool(),
        "complex": tensor.to(torch.complex64),
        "float8": tensor.to(torch.float8_e4m3fn),
        "zero-dim": torch.tensor(1.0),
        "empty": torch.zeros(0),
        "no rows": torch.zeros(0, *tensor.shape[1:]),
        "huge and empty": torch.zeros(1, 2**40, 0),
        "larger": torch.zeros(*(size + 1 for size in tensor.shape)),
        "one dim more": tensor[None, None],
        "flattened": tensor.flatten()[:-1],
        "NaN": torch.full_like(tensor, float("nan")),
        "infinite": torch.full_like(tensor, float("inf")),
        "posing as terabytes": torch.zeros(1).expand(1, 2**40),
        "sparse": tensor.to_sparse(),
        "meta": tensor.to("meta"),
    }


PARTS = (
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "cls_token",
    "mask_token",
    "storage_tokens",
    "rope_embed.periods",
    "blocks.0.attn.qkv.bias",
    "blocks.0.attn.qkv.bias_mask",
    "blocks.0.mlp.fc1.weight",
    "blocks.1.ls1.gamma",
    "norm.weight",
)


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_kind_or_shape_loads_whole_or_is_refused(
    saved: dict[str, bytes], vit: VisionTransformer, tmp_path: Path, part: str, with_metadata: bool
) -> None:
    original = content(saved) if with_metadata else {"teacher": content(saved)["teacher"]}
    name = f"backbone.{part}"
    harmless = {"rope_embed.periods", "blocks.0.attn.qkv.bias_mask"}  # made anew, so their numbers may not matter
    for kind, tensor in replacements(original["teacher"][name]).items():
        changed = original | {"teacher": original["teacher"] | {name: tensor}}
        is_loaded = assert_whole_or_refused(put_torch(tmp_path / "x.pth", changed), vit)
        assert not is_loaded or part in harmless or (part, kind) == ("mask_token", "one dim more"), kind


def test_a_fused_gated_mlp_of_any_shape_is_refused(saved: dict[str, bytes], tmp_path: Path) -> None:
    for kind, tensor in replacements(torch.zeros(6, 8)).items():
        changed = content(saved)["teacher"] | {"backbone.blocks.0.mlp.w12.weight": tensor}
        assert problem(put_torch(tmp_path / "x.pth", {"teacher": changed})), kind


def test_shuffled_shapes_and_renamed_keys_are_refused(saved: dict[str, bytes], tmp_path: Path) -> None:
    tensors, generator, path = flat(saved), random.Random(1), tmp_path / "x.safetensors"
    names = list(tensors)
    for _ in range(25):
        one, other = generator.sample(names, 2)
        if tensors[one].shape != tensors[other].shape:
            safetensors.torch.save_file(tensors | {one: tensors[other].clone(), other: tensors[one].clone()}, path)
            if not {"bias_mask", "periods"} & {one.rsplit(".", 1)[1], other.rsplit(".", 1)[1]}:
                problem(path)
    original = content(saved)
    for one in list(original["teacher"])[::4]:
        for renamed in (one + "x", one.replace(".", "_"), "\n" + one, one + "é\u2028"):
            changed = {renamed if name == one else name: tensor for name, tensor in original["teacher"].items()}
            problem(put_torch(tmp_path / "x.pth", original | {"teacher": changed}))


def test_more_blocks_than_any_model_has_are_refused_at_once(saved: dict[str, bytes], tmp_path: Path) -> None:
    tensors = flat(saved) | {f"teacher.backbone.blocks.{n}.x": torch.zeros(1) for n in range(2, 3000)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert "at most 512 blocks" in problem(tmp_path / "x.safetensors")


def test_a_patch_too_large_to_resample_is_refused(saved: dict[str, bytes], tmp_path: Path) -> None:
    tensors = flat(saved) | {"teacher.backbone.patch_embed.proj.weight": torch.zeros(8, 1, 200, 200)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert "at most 64" in problem(tmp_path / "x.safetensors")


# Our metadata


VALUES: list[object] = [None, True, "a\nb", [], {}, -1, 0, 10**8, 10**30, float("nan"), float("inf")]
KEYS = [
    ("schema",),
    ("kind",),
    ("vit",),
    ("card",),
    ("card", "input"),
    ("card", "derived_from"),
    ("card", "input", "convention"),
    ("vit", "a\nb"),
    *((("vit", name)) for name in ("width", "depth", "heads", "mlp", "mlp_hidden", "patch_size", "in_channels")),
    *((("vit", name)) for name in ("registers", "positions", "rope", "learned", "norm_eps", "qkv_bias", "cls_norm")),
    ("vit", "rope", "base"),
    ("vit", "learned", "grid_rows"),
]


@pytest.mark.parametrize("keys", KEYS, ids=".".join)
def test_metadata_of_another_type_or_size_loads_whole_or_is_refused(
    saved: dict[str, bytes], vit: VisionTransformer, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    header, body = header_and_body(saved)
    for value in VALUES:
        ours = json.loads(header["__metadata__"]["dinocell"])
        section = ours
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        changed = header | {"__metadata__": {"dinocell": json.dumps(ours)}}
        assert_whole_or_refused(put_safetensors(tmp_path / "x.safetensors", changed, body), vit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "NaN",
        '{"schema": ' + "9" * 10_000 + "}",
        "[" * 100_000,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"schema": 1, "kind": "backbone", "vit": ' + '{"a":' * 500 + "1" + "}" * 501,
        "[" + "[]," * 300_000 + "[]]",
    ],
    ids=lambda text: text[:12] or "empty",
)
def test_metadata_that_is_no_usual_json_is_refused(
    saved: dict[str, bytes], vit: VisionTransformer, tmp_path: Path, text: str
) -> None:
    header, body = header_and_body(saved)
    problem(put_safetensors(tmp_path / "x.safetensors", header | {"__metadata__": {"dinocell": text}}, body))


# Hugging Face folders


def test_an_undamaged_folder_loads_unchanged(hub_folder: Path, vit: VisionTransformer) -> None:
    assert assert_whole_or_refused(hub_folder, vit)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000]
)
def test_a_folder_with_a_broken_configuration_is_refused(hub_folder: Path, text: bytes) -> None:
    put(hub_folder / "config.json", text)
    problem(hub_folder)


@pytest.mark.parametrize("key", ["model_type", "num_attention_heads", "rope_theta", "layer_norm_eps", "key_bias"])
def test_a_folder_with_wrong_values_loads_whole_or_is_refused(
    hub_folder: Path, vit: VisionTransformer, key: str
) -> None:
    config = json.loads((hub_folder / "config.json").read_text())
    # A folder of ours may carry our own block, which outranks config.json: without it the values count.
    tensors = safetensors.torch.load_file(hub_folder / "model.safetensors")
    safetensors.torch.save_file(tensors, hub_folder / "model.safetensors")
    for value in [*VALUES, 2**2000]:
        put(hub_folder / "config.json", json.dumps(config | {key: value}).encode())
        assert_whole_or_refused(hub_folder, vit)


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/outside", "..", "", ".", "absent.safetensors", "a\nb", "a\0b", "x" * 5000]
)
def test_an_index_that_names_no_file_of_the_folder_is_refused(hub_folder: Path, shard: str) -> None:
    shutil.copy(hub_folder / "model.safetensors", hub_folder.parent / "outside.safetensors")
    only = (hub_folder / "model.safetensors").rename(hub_folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": only.name, "b": shard}}
    put(hub_folder / "model.safetensors.index.json", json.dumps(index).encode())
    problem(hub_folder)


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b"[" * 99999])
def test_a_broken_index_is_refused(hub_folder: Path, index: bytes) -> None:
    (hub_folder / "model.safetensors").rename(hub_folder / "model-00001-of-00001.safetensors")
    put(hub_folder / "model.safetensors.index.json", index)
    problem(hub_folder)


def test_a_missing_shard_and_a_tensor_in_two_shards_are_refused(hub_folder: Path) -> None:
    tensors = safetensors.torch.load_file(hub_folder / "model.safetensors")
    half = dict(list(tensors.items())[:10])
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    safetensors.torch.save_file(half, hub_folder / names[0])
    safetensors.torch.save_file(tensors, hub_folder / names[1])
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))}).encode()
    put(hub_folder / "model.safetensors.index.json", index)
    (hub_folder / "model.safetensors").unlink()
    assert "another shard" in problem(hub_folder)
    (hub_folder / names[1]).unlink()
    assert "expected config.json and 2 shards, got 1 shards" in problem(hub_folder)


def test_a_single_file_next_to_older_shards_is_the_model(hub_folder: Path, vit: VisionTransformer) -> None:
    """So transformers reads it, so the hub's files are chosen, and so an export over a folder of shards leaves it."""
    older = VisionTransformer(vit.config)
    save_weights(hub_folder.parent / "older", Weights.of(older), layout="huggingface")
    (hub_folder.parent / "older" / "model.safetensors").rename(hub_folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"norm.weight": "model-00001-of-00001.safetensors"}}
    put(hub_folder / "model.safetensors.index.json", json.dumps(index).encode())
    assert assert_whole_or_refused(hub_folder, vit)
    assert not torch.equal(older.cls_token, vit.cls_token)


def test_projections_that_do_not_match_are_refused(hub_folder: Path) -> None:
    tensors = safetensors.torch.load_file(hub_folder / "model.safetensors")
    for part in ("q_proj.weight", "k_proj.weight", "v_proj.bias"):
        for tensor in (torch.tensor(1.0), torch.zeros(0, 8), torch.zeros(8, 9), torch.zeros(3)):
            changed = tensors | {f"layer.0.attention.{part}": tensor}
            safetensors.torch.save_file(changed, hub_folder / "model.safetensors")
            problem(hub_folder)


def test_read_weights_refuses_what_load_backbone_refuses(saved: dict[str, bytes], tmp_path: Path) -> None:
    path = put(tmp_path / "x.pth", saved["pth"][:1000])
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_weights(path)
