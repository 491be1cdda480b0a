"""The projection head: against NumPy, against torch's own weight norm, and under Meta's names."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf
from torch import nn

from dinocell.ssl.heads import ProjectionHead, ReconstructionHead, row_chunks


def plain_head(state: dict[str, np.ndarray], tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float64 NumPy: linear, exact GELU, ..., unit length; and the prototypes."""
    rows = tokens
    for index in (0, 2, 4):
        rows = rows @ state[f"mlp.{index}.weight"].T + state[f"mlp.{index}.bias"]
        if index < 4:
            rows = rows * 0.5 * (1 + erf(rows / np.sqrt(2)))
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    if "last_layer.weight" in state:
        return rows, state["last_layer.weight"]
    direction = state["last_layer.weight_v"]
    return rows, state["last_layer.weight_g"] * direction / np.linalg.norm(direction, axis=1, keepdims=True)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_head_equals_the_plain_formula(weight_norm: bool) -> None:
    torch.manual_seed(0)
    head = ProjectionHead(12, 30, hidden=20, bottleneck=7, weight_norm=weight_norm).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = torch.randn(5, 12, dtype=torch.float64)
    rows, prototypes = plain_head({k: v.numpy() for k, v in head.state_dict().items()}, tokens.numpy())
    out = head(tokens)
    np.testing.assert_allclose(out.rows.detach(), rows, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(out.prototypes.detach(), prototypes, rtol=1e-12)
    np.testing.assert_allclose(out.logits().detach(), rows @ prototypes.T, rtol=1e-12, atol=1e-14)


def test_keys_are_those_of_metas_heads() -> None:
    mlp = {f"mlp.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")}
    assert set(ProjectionHead(4, 6, hidden=8, bottleneck=3).state_dict()) == mlp | {"last_layer.weight"}
    normed = ProjectionHead(4, 6, hidden=8, bottleneck=3, weight_norm=True).state_dict()
    assert set(normed) == mlp | {"last_layer.weight_g", "last_layer.weight_v"}
    assert normed["last_layer.weight_g"].shape == (6, 1)


def test_weight_norm_is_that_of_torch() -> None:
    head = ProjectionHead(4, 6, hidden=8, bottleneck=3, weight_norm=True)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 6, bias=False), dim=0)
    layer.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g)
    layer.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v)
    torch.testing.assert_close(head.last_layer(), layer.weight)


def test_one_and_two_layers_have_the_widths_asked_for() -> None:
    assert set(ProjectionHead(4, 6, bottleneck=3, layers=1).state_dict()) == {
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight",
    }
    two = ProjectionHead(4, 6, hidden=9, bottleneck=3, layers=2)
    assert two.mlp[0].weight.shape == (9, 4)
    assert two.mlp[2].weight.shape == (3, 9)
    assert two(torch.randn(2, 4)).rows.shape == (2, 3)


def test_initial_values_are_those_of_the_table() -> None:
    head = ProjectionHead(384, 4096, hidden=1024, bottleneck=256, weight_norm=True)
    head.init_weights(generator=torch.Generator().manual_seed(1))
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif name.endswith("weight_g"):
            assert (parameter == 1).all()
        else:
            assert parameter.mean().abs() < 3e-4
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
    again = ProjectionHead(384, 4096, hidden=1024, bottleneck=256, weight_norm=True)
    again.init_weights(generator=torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def test_head_on_the_meta_device_takes_no_memory_and_can_be_filled() -> None:
    with torch.device("meta"):
        head = ProjectionHead(4, 6, hidden=8, bottleneck=3)
    assert all(parameter.is_meta for parameter in head.parameters())
    head.to_empty(device="cpu").init_weights()
    assert head(torch.randn(2, 4)).rows.isfinite().all()


def test_zero_token_has_finite_rows_and_gradients() -> None:
    head = ProjectionHead(4, 6, hidden=8, bottleneck=3)
    head(torch.zeros(2, 4)).logits().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


def test_no_tokens_give_no_rows() -> None:
    assert ProjectionHead(4, 6, hidden=8, bottleneck=3)(torch.zeros(0, 4)).rows.shape == (0, 3)


def test_rows_under_autocast_have_its_type_and_unit_length() -> None:
    head = ProjectionHead(32, 6, hidden=64, bottleneck=16)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(torch.randn(5, 32))
    assert out.rows.dtype == torch.bfloat16
    torch.testing.assert_close(out.rows.float().norm(dim=1), torch.ones(5), rtol=1e-2, atol=0)
    assert out.prototypes.dtype == torch.float32


def test_the_reconstruction_head_is_two_linear_layers_with_gelu() -> None:
    torch.manual_seed(0)
    head, tokens = ReconstructionHead(6, 16, hidden_dim=10), torch.randn(5, 6)
    middle = torch.nn.functional.gelu(tokens @ head.fc1.weight.T + head.fc1.bias)
    torch.testing.assert_close(head(tokens), middle @ head.fc2.weight.T + head.fc2.bias)
    assert head(tokens[:0]).shape == (0, 16)
    with torch.device("meta"):
        assert ReconstructionHead(6, 16).fc2.weight.is_meta


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 300))
def test_chunks_cover_every_row_once(num_rows: int, prototypes: int, elements: int) -> None:
    chunks = list(row_chunks(num_rows, prototypes, torch.device("cpu"), elements))
    assert [row for chunk in chunks for row in range(num_rows)[chunk]] == list(range(num_rows))
    assert all(chunk.stop - chunk.start <= max(1, elements // prototypes) for chunk in chunks)
