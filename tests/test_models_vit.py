"""The vision transformer as its callers see it."""

import dataclasses
import subprocess
import sys
import textwrap

import pytest
import torch

from dinocell.models.layers import Attention
from dinocell.models.positions import TrainingNoise
from dinocell.models.vit import VisionTransformer, ViTConfig, variant_config

SMALL = ViTConfig(width=48, depth=3, heads=3, mlp_hidden=96, patch_size=4, registers=2)


def make(config: ViTConfig = SMALL, **options: object) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(config, **options)
    vit.init_weights(layer_scale=0.5, generator=torch.Generator().manual_seed(1))
    return vit.eval()


# Parameters of the released backbones (DINOv3 and DINOv2 model cards): 21 M, 29 M, 86 M, 300 M, 840 M, 1.1 B, 6.7 B.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 5.5),
        ("small", 21.6),
        ("small_plus", 28.7),
        ("base", 85.7),
        ("large", 303),
        ("huge_plus", 841),
        ("giant", 1135),
        ("7b", 6716),
    ],
)
def test_variants_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    with torch.device("meta"):
        vit = VisionTransformer(variant_config(name, patch_size=16, in_channels=3))
    assert sum(p.numel() for p in vit.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


def test_the_7b_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        vit = VisionTransformer(variant_config("7b"))
        out = vit(torch.empty(2, 1, 64, 64))
    assert out.cls.shape == (2, 4096)
    assert out.patches.shape == (2, 64, 4096)


def test_unknown_variant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"unknown variant 'smal'.*did you mean 'small'"):
        variant_config("smal")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 5}, "width: expected a multiple of"),
        ({"depth": 0}, "depth"),
        ({"registers": -1}, "registers"),
        ({"width": 18, "heads": 3}, "width: expected a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)


def test_output_names_shapes_and_order() -> None:
    out = make()(torch.randn(2, 1, 16, 24))
    assert out.cls.shape == (2, 48)
    assert out.registers.shape == (2, 2, 48)
    assert out.patches.shape == (2, 4 * 6, 48)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_any_size_that_the_patch_divides(positions: str, patch_size: int) -> None:
    vit = make(dataclasses.replace(SMALL, positions=positions, patch_size=patch_size, in_channels=3))
    maps = vit.forward_maps(torch.randn(1, 3, 3 * patch_size, 5 * patch_size), [0, -1])
    assert [m.shape for m in maps] == [(1, 48, 3, 5)] * 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16), r"1 channel\(s\), got 3"),
        ((1, 1, 16, 18), "patch 4 divides, got 16 x 18"),
        ((1, 1, 0, 16), "got 0 x 16"),
    ],
)
def test_wrong_images_are_refused_with_expected_and_got(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(shape))


def test_wrong_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks \[3\] do not exist.*0 to 2"):
        make().forward_blocks(torch.zeros(1, 1, 16, 16), [0, 3])


@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_crops_of_several_resolutions_in_one_call_equal_separate_calls(kernel: str, positions: str) -> None:
    config = dataclasses.replace(SMALL, positions=positions)
    together, apart = make(config, kernel=kernel), make(config)
    crops = [torch.randn(3, 1, 32, 32), torch.randn(7, 1, 12, 12), torch.randn(2, 1, 8, 20)]
    masks = [torch.rand(3, 64) < 0.3, None, None]
    outputs = together(crops, masks)
    for crop, mask, out in zip(crops, masks, outputs, strict=True):
        for ours, expected in zip(out, apart(crop, mask), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_several_resolutions_equal_those_of_separate_calls() -> None:
    together, apart = make(kernel="dense"), make()
    crops = [torch.randn(2, 1, 16, 16), torch.randn(3, 1, 8, 8)]
    sum(out.patches.square().mean() for out in together(crops)).backward()
    sum(apart(crop).patches.square().mean() for crop in crops).backward()
    for (name, ours), expected in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert (ours.grad is None) == (expected.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_large_cpu_batches_in_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = make()
    images, masks = torch.randn(9, 1, 16, 16), torch.rand(9, 16) < 0.4
    select = masks.flatten().nonzero().flatten()
    whole, pruned, blocks = vit(images, masks), vit(images, masks, select=select), vit.forward_blocks(images, [1])
    monkeypatch.setattr("dinocell.models.vit.CPU_PIECE_TOKENS", 40)
    assert len(list(vit._pieces(images, None, None))) == 5
    for ours, expected in zip(vit(images, masks), whole, strict=True):
        torch.testing.assert_close(ours, expected)
    for ours, expected in zip(vit(images, masks, select=select), pruned, strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(vit.forward_blocks(images, [1])[0].patches, blocks[0].patches)


@pytest.mark.parametrize("kernel", ["sdpa", "dense"])
@pytest.mark.parametrize("training", [False, True])
def test_short_cut_of_the_last_block_equals_the_full_forward_on_the_kept_tokens(kernel: str, training: bool) -> None:
    vit = make(kernel=kernel).train(training)
    images, local = torch.randn(4, 1, 16, 16), torch.randn(5, 1, 8, 8)
    masks = torch.rand(4, 16) < 0.4
    select = masks.flatten().nonzero().flatten()
    full, full_local = vit([images, local], [masks, None])
    pruned, pruned_local = vit([images, local], [masks, None], select=[select, select[:0]])
    torch.testing.assert_close(pruned.cls, full.cls, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruned.registers, full.registers, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruned.patches, full.patches[masks], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruned_local.cls, full_local.cls, rtol=1e-5, atol=1e-6)
    assert pruned_local.patches.shape == (0, 48)


def test_short_cut_of_the_last_block_equals_the_full_forward_under_drop_path() -> None:
    vit = make(noise=TrainingNoise(drop_path=0.5)).train()
    images = torch.randn(6, 1, 16, 16)
    select = torch.arange(0, 96, 5)
    full = vit(images, generator=torch.Generator().manual_seed(3))
    pruned = vit(images, select=select, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(pruned.cls, full.cls, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pruned.patches, full.patches.flatten(0, 1)[select], rtol=1e-5, atol=1e-6)


def test_short_cut_gives_the_same_gradients() -> None:
    images, select = torch.randn(3, 1, 16, 16), torch.tensor([1, 5, 20, 40])
    full, pruned = make(), make()
    out = full(images)
    (out.cls.sum() + out.patches.flatten(0, 1)[select].square().sum()).backward()
    out = pruned(images, select=select)
    (out.cls.sum() + out.patches.square().sum()).backward()
    for (name, ours), expected in zip(pruned.named_parameters(), full.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_intermediate_blocks_end_in_the_final_output() -> None:
    vit = make()
    images = torch.randn(2, 1, 16, 16)
    first, last = vit.forward_blocks(images, [0, -1])
    torch.testing.assert_close(last.patches, vit(images).patches)
    raw = vit.forward_blocks(images, [0], norm=False)[0]
    torch.testing.assert_close(vit.norm(raw.patches), first.patches)


def test_maps_put_each_patch_where_it_is() -> None:
    vit = make()
    images = torch.randn(1, 1, 8, 12)
    (tokens,), (maps,) = vit.forward_blocks(images, [1]), vit.forward_maps(images, [1])
    assert torch.equal(maps[0, :, 1, 2], tokens.patches[0, 1 * 3 + 2])


def test_masked_patches_do_not_see_their_pixels() -> None:
    vit = make()
    images = torch.randn(1, 1, 16, 16)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True
    changed = images.clone()
    changed[0, 0, 4:8, 4:8] = 9.0  # patch 5 is row 1, column 1
    torch.testing.assert_close(vit(images, masks).patches, vit(changed, masks).patches)
    assert (vit(images).patches - vit(changed).patches).abs().max() > 1e-3


def test_training_noise_acts_in_training_only_and_repeats_with_its_generator() -> None:
    vit = make(noise=TrainingNoise(drop_path=0.4, rope_rescale=2.0, rope_shift=0.2, rope_jitter=1.2))
    images = torch.randn(5, 1, 16, 16)
    plain = make()(images)
    torch.testing.assert_close(vit(images).cls, plain.cls)
    vit.train()
    first, again, other = (vit(images, generator=torch.Generator().manual_seed(seed)).cls for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, plain.cls)


def test_local_cls_norm_is_used_for_local_crops_in_training_only() -> None:
    vit = make(dataclasses.replace(SMALL, local_cls_norm=True))
    torch.nn.init.constant_(vit.local_cls_norm.weight, 2.0)
    crops = [torch.randn(2, 1, 16, 16), torch.randn(3, 1, 8, 8)]
    evaluated = vit(crops)
    trained = vit.train()(crops)
    torch.testing.assert_close(trained[0].cls, evaluated[0].cls)
    torch.testing.assert_close(trained[1].cls, 2 * evaluated[1].cls)
    torch.testing.assert_close(trained[1].patches, evaluated[1].patches)


def test_untied_cls_norm_leaves_patches_to_the_other_norm() -> None:
    tied, untied = make(), make(dataclasses.replace(SMALL, cls_norm=True))
    untied.load_state_dict(tied.state_dict(), strict=False)
    torch.nn.init.constant_(untied.cls_norm.weight, 3.0)
    images = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(untied(images).cls, 3 * tied(images).cls)
    torch.testing.assert_close(untied(images).registers, 3 * tied(images).registers)
    torch.testing.assert_close(untied(images).patches, tied(images).patches)


def test_init_weights_follows_its_table() -> None:
    config = dataclasses.replace(SMALL, width=192, heads=3, positions="learned")
    with torch.device("meta"):
        vit = VisionTransformer(config)
    vit.to_empty(device="cpu").init_weights(generator=torch.Generator().manual_seed(0))
    state = vit.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    weight = state["blocks.1.attn.qkv.weight"]
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.count_nonzero(state["blocks.1.mlp.fc1.bias"]) == 0
    assert torch.count_nonzero(state["mask_token"]) == 0
    assert torch.equal(state["blocks.2.ls1.gamma"], torch.full((192,), 1e-5))
    assert torch.equal(state["norm.weight"], torch.ones(192))
    bound = (1 * 4**2) ** -0.5
    assert 0.95 * bound < state["patch_embed.proj.weight"].abs().max() <= bound


def test_same_generator_gives_the_same_weights() -> None:
    first, second = make(), make()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_rotary_tables_with_noise_are_made_once_a_resolution_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import dinocell.models.vit as module

    calls = []
    original = module.rotary_table
    monkeypatch.setattr(module, "rotary_table", lambda grid, *a, **k: calls.append(grid) or original(grid, *a, **k))
    vit = make(noise=TrainingNoise(rope_rescale=2.0)).train()
    for _ in range(2):
        vit([torch.randn(2, 1, 16, 16), torch.randn(2, 1, 8, 8)])
    assert calls == [(4, 4), (2, 2)] * 2


def test_rotary_tables_without_noise_are_made_once() -> None:
    from dinocell.models.positions import kept_rotary_table

    vit, images = make(noise=TrainingNoise(drop_path=0.5)).train(), torch.randn(2, 1, 16, 16)
    kept_rotary_table.cache_clear()
    with torch.inference_mode():  # what is made in here cannot be kept for a pass with gradient
        vit(images)
    assert kept_rotary_table.cache_info().misses == 0
    for _ in range(3):
        vit(images).cls.sum().backward()
    assert kept_rotary_table.cache_info().misses == 1


def test_attention_runs_once_a_block_and_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Attention.mix
    monkeypatch.setattr(
        Attention, "mix", lambda self, rows, segments: calls.append(len(segments)) or original(self, rows, segments)
    )
    make()([torch.randn(2, 1, 16, 16), torch.randn(2, 1, 8, 8)])
    assert calls == [1] * 6


@pytest.mark.slow
def test_whole_forward_compiles_without_a_graph_break() -> None:
    """In a process of its own: the annotations that the test suite checks at run time are not for the compiler."""
    script = """
        import torch
        from dinocell.models.vit import VisionTransformer, ViTConfig
        from dinocell.models.positions import TrainingNoise

        config = ViTConfig(width=48, depth=2, heads=3, mlp_hidden=96, patch_size=4, registers=2)
        torch.manual_seed(0)
        vit = VisionTransformer(config, noise=TrainingNoise(drop_path=0.3, rope_rescale=2.0))
        vit.init_weights(layer_scale=0.5)
        crops = [torch.randn(4, 1, 16, 16), torch.randn(6, 1, 8, 8)]
        masks = [torch.rand(4, 16) < 0.3, None]
        select = [torch.tensor([1, 7, 30]), torch.empty(0, dtype=torch.long)]
        compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
        vit.eval()
        for ours, expected in zip(compiled(crops, masks, select=select), vit(crops, masks, select=select), strict=True):
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        vit.train()
        compiled(crops, masks)[0].patches.sum().backward()
        assert all(p.grad is not None for n, p in vit.named_parameters() if n.startswith("blocks"))
        print("compiled")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.stdout == "compiled\n", result.stderr[-2000:]
