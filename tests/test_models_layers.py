"""Blocks, attention kernels and drop path."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinocell.errors import DinocellError
from dinocell.models.layers import (
    Attention,
    AttentionKernel,
    Block,
    GeluMlp,
    LayerScale,
    PatchEmbedding,
    Segment,
    Subset,
    SwigluMlp,
    draw_kept_sequences,
    find_subsets,
)
from dinocell.models.positions import RopeConfig, rotary_table


def make_block(*, kernel: str = "sdpa", layer_scale: bool = True, mlp: str = "gelu") -> Block:
    torch.manual_seed(0)
    attention = Attention(16, 2, qkv_bias=True, key_bias=False, kernel=kernel)
    block = Block(
        attention, (GeluMlp if mlp == "gelu" else SwigluMlp)(16, 32), 16, layer_scale=layer_scale, norm_eps=1e-5
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def segment(batch: int, grid: tuple[int, int]) -> Segment:
    return Segment(batch, 1 + grid[0] * grid[1], rotary_table(grid, 1, 8, RopeConfig()))


def test_patch_embedding_equals_a_strided_convolution() -> None:
    embedding = PatchEmbedding(4, 3, 10)
    images = torch.randn(2, 3, 8, 12)
    expected = embedding.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(images), expected)


def test_attention_equals_softmax_written_out_in_numpy() -> None:
    attention = Attention(8, 2, qkv_bias=True, key_bias=True, kernel="sdpa").double()
    rows = torch.randn(5, 8, dtype=torch.float64)
    qkv = (rows @ attention.qkv.weight.T + attention.qkv.bias).detach().numpy().reshape(5, 3, 2, 4)
    mixed = np.empty((5, 2, 4))
    for head in range(2):
        scores = qkv[:, 0, head] @ qkv[:, 1, head].T / np.sqrt(4)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        mixed[:, head] = weights / weights.sum(1, keepdims=True) @ qkv[:, 2, head]
    expected = torch.from_numpy(mixed.reshape(5, 8)) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(rows, [Segment(1, 5, None)]), expected)


def test_key_bias_is_off_by_default() -> None:
    attention = Attention(16, 2, qkv_bias=True, key_bias=False, kernel="sdpa")
    rows, segments = torch.randn(10, 16), [segment(2, (2, 2))]
    before = attention(rows, segments)
    with torch.no_grad():
        attention.qkv.bias[16:32] = 5.0
        torch.testing.assert_close(attention(rows, segments), before)
        attention.key_bias = True
        assert (attention(rows, segments) - before).abs().max() > 1e-3


def test_key_bias_gets_no_gradient_while_it_is_off() -> None:
    attention = Attention(16, 2, qkv_bias=True, key_bias=False, kernel="sdpa")
    attention(torch.randn(10, 16), [segment(2, (2, 2))]).square().sum().backward()
    assert torch.count_nonzero(attention.qkv.bias.grad[16:32]) == 0
    assert torch.count_nonzero(attention.qkv.bias.grad[:16]) > 0


def test_packed_resolutions_equal_separate_calls() -> None:
    per_resolution, packed = make_block(), make_block(kernel="dense")
    segments = [segment(2, (3, 3)), segment(3, (2, 2))]
    rows = torch.randn(2 * 10 + 3 * 5, 16, requires_grad=True)
    together, dense = per_resolution(rows, segments), packed(rows, segments)
    apart = torch.cat([per_resolution(rows[:20], segments[:1]), per_resolution(rows[20:], segments[1:])])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense, apart, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(together)
    gradients = [torch.autograd.grad((out * weight).sum(), rows)[0] for out in (together, dense, apart)]
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=1e-4, atol=1e-5)


def skip_without_xformers() -> None:
    """Skip where xformers was not built for the torch that is installed."""
    attention = Attention(8, 1, qkv_bias=True, key_bias=False, kernel="xformers").cuda().bfloat16()
    try:
        attention(torch.zeros(2, 8, device="cuda", dtype=torch.bfloat16), [Segment(1, 2, None)])
    except (DinocellError, ImportError) as error:
        pytest.skip(str(error))


def test_a_kernel_that_xformers_does_not_have_is_one_line() -> None:
    pytest.importorskip("xformers")
    attention = Attention(8, 1, qkv_bias=True, key_bias=False, kernel="xformers")
    with pytest.raises(DinocellError, match=r"xformers: .* torch.float64 on cpu"):
        attention.double()(torch.zeros(2, 8, dtype=torch.float64), [Segment(1, 2, None)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="packed attention kernels need a CUDA device")
@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_packed_cuda_kernels_equal_the_dense_mask(kernel: AttentionKernel) -> None:
    if kernel == "xformers":
        skip_without_xformers()
    attentions = [
        Attention(128, 2, qkv_bias=True, key_bias=False, kernel=k).cuda().bfloat16() for k in (kernel, "dense")
    ]
    attentions[1].load_state_dict(attentions[0].state_dict())
    table = rotary_table((4, 4), 1, 64, RopeConfig(), device=torch.device("cuda"))
    segments = [
        Segment(2, 17, table),
        Segment(3, 10, rotary_table((3, 3), 1, 64, RopeConfig(), device=torch.device("cuda"))),
    ]
    rows = torch.randn(2 * 17 + 3 * 10, 128, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(attentions[0](rows, segments), attentions[1](rows, segments), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mlp", [GeluMlp(8, 12), SwigluMlp(8, 12)])
def test_mlp_equals_its_formula(mlp: GeluMlp | SwigluMlp) -> None:
    x = torch.randn(3, 8)
    if isinstance(mlp, GeluMlp):
        hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
        activated = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        expected = activated @ mlp.fc2.weight.T + mlp.fc2.bias
    else:
        gate, value = (x @ w.weight.T + w.bias for w in (mlp.w1, mlp.w2))
        expected = (gate * torch.sigmoid(gate) * value) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp(x), expected)


def test_layer_scale_multiplies_every_channel() -> None:
    scale = LayerScale(3)
    nn.init.constant_(scale.gamma, 0.5)
    assert torch.equal(scale(torch.ones(2, 3)), torch.full((2, 3), 0.5))


def test_block_without_layer_scale_adds_its_branches_plainly() -> None:
    block = make_block(layer_scale=False)
    rows, segments = torch.randn(10, 16), [segment(2, (2, 2))]
    middle = rows + block.attn(block.norm1(rows), segments)
    torch.testing.assert_close(block(rows, segments), middle + block.mlp(block.norm2(middle)))


def subsets(segments: list[Segment], attended: list[Tensor], fed: list[Tensor]) -> tuple[Subset, Subset]:
    """Return what a block is told of the sequences that take its branches."""
    everything = [
        find_subsets(segments, [torch.stack([each])[:, None].expand(1, 2, -1) for each in side])[0]
        for side in (attended, fed)
    ]
    return everything[0][0], everything[1][1]


@pytest.mark.parametrize("branch", [0, 1])
def test_drop_path_keeps_the_expectation_of_a_branch(branch: int) -> None:
    """Averaging over every subset gives the full branch (G.9)."""
    block = make_block()
    if branch == 0:
        nn.init.zeros_(block.ls2.gamma)  # the second branch out of the way, so that the output is linear in the first
    rows, segments = torch.randn(4 * 5, 16), [segment(4, (2, 2))]
    pairs = [torch.tensor([a, b]) for a in range(4) for b in range(4) if a < b]
    everyone = [torch.arange(4)]
    kept = [([pair], everyone) if branch == 0 else (everyone, [pair]) for pair in pairs]
    mean = torch.stack([block(rows, segments, subsets(segments, *each)) for each in kept]).mean(0)
    torch.testing.assert_close(mean, block(rows, segments), rtol=1e-4, atol=1e-5)


def test_drop_path_leaves_skipped_samples_untouched_and_scales_the_others() -> None:
    block = make_block()
    nn.init.zeros_(block.ls2.gamma)
    rows, segments = torch.randn(4 * 5, 16), [segment(4, (2, 2))]
    out = block(rows, segments, subsets(segments, [torch.tensor([2])], [torch.arange(4)])).view(4, 5, 16)
    before, full = rows.view(4, 5, 16), block(rows, segments).view(4, 5, 16)
    for sample in (0, 1, 3):
        assert torch.equal(out[sample], before[sample])
    torch.testing.assert_close(out[2] - before[2], 4 * (full[2] - before[2]), rtol=1e-4, atol=1e-5)


def test_keeping_every_sequence_equals_the_plain_block() -> None:
    block = make_block()
    rows, segments = torch.randn(2 * 10 + 3 * 5, 16), [segment(2, (3, 3)), segment(3, (2, 2))]
    everyone = [torch.arange(2), torch.arange(3)]
    torch.testing.assert_close(block(rows, segments, subsets(segments, everyone, everyone)), block(rows, segments))


def test_subsets_name_the_rows_and_sequences_of_every_block_and_segment() -> None:
    segments = [Segment(3, 2, None), Segment(2, 4, None)]
    kept = [torch.tensor([[[2, 0], [1, 2]], [[0, 1], [2, 1]]]), torch.tensor([[[1], [0]], [[0], [1]]])]
    for block, pair in enumerate(find_subsets(segments, kept)):
        for branch, subset in enumerate(pair):
            large, small = (each[block, branch].tolist() for each in kept)
            rows = [2 * s + t for s in large for t in range(2)] + [6 + 4 * s + t for s in small for t in range(4)]
            assert subset.rows.tolist() == rows
            assert subset.sequences.tolist() == [*large, *(3 + s for s in small)]
            assert [(s.batch, s.tokens) for s in subset.segments] == [(2, 2), (1, 4)]
            assert subset.factors == [1.5, 2]
            factors = subset.factor_of_sequences(5, torch.zeros(())).tolist()
            assert factors == [1.5 * (s in large) for s in range(3)] + [2.0 * (s in small) for s in range(2)]


@pytest.mark.parametrize(("batch", "drop_path", "count"), [(10, 0.3, 7), (10, 0.0, 10), (1, 0.9, 1), (3, 0.99, 1)])
def test_number_of_kept_sequences_is_fixed(batch: int, drop_path: float, count: int) -> None:
    (drawn,) = draw_kept_sequences([batch], 6, drop_path, device=torch.device("cpu"))
    assert drawn.shape == (6, 2, count)
    assert all(len(set(kept.tolist())) == count for kept in drawn.flatten(0, 1))


def test_every_sequence_is_kept_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    (drawn,) = draw_kept_sequences([8], 4000, 0.5, device=torch.device("cpu"), generator=generator)
    counts = F.one_hot(drawn[:, 0], 8).sum(1).float().mean(0)
    assert (counts - 0.5).abs().max() < 0.04  # five standard deviations of a share of 4,000 draws


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_recomputed_activations_need_no_matrix_product_and_change_nothing(mlp: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    block = make_block(mlp=mlp)
    rows, segments = torch.randn(2 * 10, 16, requires_grad=True), [segment(2, (3, 3))]
    results = []
    for again in (False, True):
        block.recompute_activations = again
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = block(rows, segments)
            block.zero_grad()
            rows.grad = None
            out.square().sum().backward()
        gradients = [each.grad for each in (rows, *block.parameters())]
        results.append((out, gradients, counter.get_total_flops(), sum(kept.values())))
    (out, gradients, flops, kept_bytes), (out_again, gradients_again, flops_again, fewer_bytes) = results
    assert flops_again == flops
    assert fewer_bytes < 0.85 * kept_bytes
    assert torch.equal(out, out_again)
    for one, other in zip(gradients, gradients_again, strict=True):
        assert torch.equal(one, other)
