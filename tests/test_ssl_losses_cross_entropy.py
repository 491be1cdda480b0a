"""The fused cross-entropy against autograd through the whole matrix of logits, and against NumPy."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor

from dinocell.ssl.heads import Projection, ProjectionHead
from dinocell.ssl.losses import prototype_cross_entropy
from dinocell.ssl.targets import Centre, Targets, TeacherLogits, sinkhorn_targets


def student(rows: int, prototypes: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(rows, 6, generator=generator, dtype=dtype), dim=1)
    weight = torch.randn(prototypes, 6, generator=generator, dtype=dtype)
    return Projection(unit.requires_grad_(), weight.requires_grad_())


def teacher(rows: int, prototypes: int, *, keep: bool = False, dtype: torch.dtype = torch.float64) -> Targets:
    logits = TeacherLogits(student(rows, prototypes, seed=100, dtype=dtype), keep=keep)
    return sinkhorn_targets([logits], 0.3)[0]


def plain(projection: Projection, probabilities: Tensor, weights: Tensor, temperature: float = 0.1) -> Tensor:
    logits = projection.rows @ projection.prototypes.T / temperature
    return -((probabilities * logits.log_softmax(1)).sum(1) * weights).sum()


def gradients(loss: Tensor, projection: Projection) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(projection))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    prototypes=st.integers(1, 12),
    chunk_elements=st.one_of(st.none(), st.integers(1, 60)),
    dense=st.booleans(),
    keep=st.booleans(),
    temperature=st.floats(0.05, 2),
    upstream=st.floats(-3, 3),
)
def test_loss_and_gradients_equal_autograd(
    rows: int,
    prototypes: int,
    chunk_elements: int | None,
    dense: bool,
    keep: bool,
    temperature: float,
    upstream: float,
) -> None:
    projection, targets = student(rows, prototypes), teacher(rows, prototypes, keep=keep)
    weights = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    probabilities = targets.probabilities()
    loss = prototype_cross_entropy(
        projection,
        probabilities if dense else targets,
        weights,
        temperature=temperature,
        chunk_elements=chunk_elements,
    )
    expected = plain(projection, probabilities, weights, temperature)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-12)
    theirs = gradients(expected * upstream, projection)
    for ours, other in zip(gradients(loss.total * upstream, projection), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-11)


def test_every_row_has_its_own_value_and_no_gradient() -> None:
    projection, targets = student(5, 7), teacher(5, 7)
    loss = prototype_cross_entropy(projection, targets, torch.ones(5, dtype=torch.float64), temperature=0.2)
    log = log_softmax((projection.rows @ projection.prototypes.T).detach().numpy() / 0.2, axis=1)
    np.testing.assert_allclose(loss.rows, -(targets.probabilities().numpy() * log).sum(1), rtol=1e-12)
    assert not loss.rows.requires_grad
    assert loss.total.requires_grad


def test_rows_may_share_targets() -> None:
    projection, targets = student(6, 7), teacher(3, 7)
    weights = torch.rand(6, dtype=torch.float64)
    order = torch.tensor([0, 1, 2, 2, 1, 0])
    for wanted in (targets, targets.probabilities()):
        expected = plain(projection, targets.probabilities()[order], weights)
        loss = prototype_cross_entropy(projection, wanted, weights, target_of_row=order, chunk_elements=14)
        torch.testing.assert_close(loss.total, expected)
        for ours, theirs in zip(gradients(loss.total, projection), gradients(expected, projection), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_centred_targets_are_taken_too() -> None:
    projection, logits = student(5, 7), TeacherLogits(student(5, 7, seed=2))
    centre = Centre(7).double()
    centre.update(TeacherLogits(student(9, 7, seed=3)))
    targets = centre(logits, 0.05)
    loss = prototype_cross_entropy(projection, targets, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(loss.total, plain(projection, targets.probabilities(), torch.ones(5)))


@pytest.mark.parametrize("weight_norm", [False, True])
def test_gradients_reach_every_parameter_of_a_head(weight_norm: bool) -> None:
    head = ProjectionHead(10, 12, hidden=16, bottleneck=6, weight_norm=weight_norm).double()
    tokens, targets = torch.randn(5, 10, dtype=torch.float64), teacher(5, 12)
    weights = torch.rand(5, dtype=torch.float64)
    loss = prototype_cross_entropy(head(tokens), targets, weights, chunk_elements=24)
    expected = plain(head(tokens), targets.probabilities(), weights)
    parameters = list(head.parameters())
    theirs = torch.autograd.grad(expected, parameters)
    for ours, other in zip(torch.autograd.grad(loss.total, parameters), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-8, atol=1e-12)


def test_frozen_factor_gets_no_gradient_and_the_other_does() -> None:
    targets, weights = teacher(5, 7), torch.ones(5, dtype=torch.float64)
    for frozen in (0, 1):
        projection = student(5, 7)
        expected = gradients(plain(projection, targets.probabilities(), weights), projection)
        projection[frozen].requires_grad_(False)
        prototype_cross_entropy(projection, targets, weights).total.backward()
        assert projection[frozen].grad is None
        torch.testing.assert_close(projection[1 - frozen].grad, expected[1 - frozen])


def test_without_grad_mode_the_loss_is_the_same() -> None:
    projection, targets, weights = student(5, 7), teacher(5, 7), torch.ones(5, dtype=torch.float64)
    with torch.no_grad():
        loss = prototype_cross_entropy(projection, targets, weights)
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, prototype_cross_entropy(projection, targets, weights).total.detach())


def test_gradient_can_be_taken_twice_from_one_graph() -> None:
    projection = student(5, 7)
    loss = prototype_cross_entropy(projection, teacher(5, 7), torch.ones(5, dtype=torch.float64)).total
    first = torch.autograd.grad(loss * 3, projection.rows, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss * 3, projection.rows)[0], first)


def test_teacher_and_student_may_differ_in_precision() -> None:
    projection, targets = student(5, 7), teacher(5, 7, dtype=torch.float32)
    weights = torch.ones(5, dtype=torch.float64)
    loss = prototype_cross_entropy(projection, targets, weights)
    torch.testing.assert_close(loss.total, plain(projection, targets.probabilities(), weights), rtol=1e-6, atol=0)


def test_no_rows_give_zero() -> None:
    projection = student(0, 7)
    loss = prototype_cross_entropy(projection, teacher(0, 7), torch.zeros(0, dtype=torch.float64))
    assert loss.total == 0
    assert (gradients(loss.total, projection)[1] == 0).all()


def test_agreement_at_uniform_targets_costs_the_log_of_k() -> None:
    for prototypes, log in ((8192, 9.0109), (65536, 11.0904)):
        projection = Projection(torch.eye(2, 6), torch.zeros(prototypes, 6))
        uniform = torch.full((2, prototypes), 1 / prototypes)
        loss = prototype_cross_entropy(projection, uniform, torch.full((2,), 0.5))
        assert loss.total.item() == pytest.approx(log, abs=6e-5)


def test_huge_logits_stay_finite_with_finite_gradients() -> None:
    projection = Projection(torch.eye(4, 6).requires_grad_(), (torch.randn(9, 6) * 100).requires_grad_())
    targets = sinkhorn_targets([TeacherLogits(Projection(torch.eye(4, 6), torch.randn(9, 6) * 100))], 0.2)[0]
    loss = prototype_cross_entropy(projection, targets, torch.ones(4))
    assert loss.total.isfinite()
    assert all(each.isfinite().all() for each in gradients(loss.total, projection))


@pytest.mark.parametrize("keep", [False, True])
def test_bfloat16_rows_agree_with_float32_to_their_precision(keep: bool) -> None:
    exact = student(64, 128, dtype=torch.float32)
    targets = teacher(64, 128, keep=keep, dtype=torch.float32)
    weights = torch.full((64,), 1 / 64)
    rounded = Projection(exact.rows.detach().bfloat16().requires_grad_(), exact.prototypes)
    expected = plain(exact, targets.probabilities(), weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss = prototype_cross_entropy(rounded, targets, weights, chunk_elements=128 * 10)
    assert loss.total.dtype == torch.float32
    torch.testing.assert_close(loss.total, expected, rtol=1e-2, atol=0)
    ours = gradients(loss.total, rounded)
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.float32]
    for mine, theirs in zip(ours, gradients(expected, exact), strict=True):
        assert torch.cosine_similarity(mine.float().flatten(), theirs.flatten(), dim=0) > 0.999


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")
def test_compiled_targets_losses_and_gradients_are_the_plain_ones_for_any_number_of_rows(tmp_path: Path) -> None:
    """In a process of its own: the annotations that the test suite checks at run time are not for the compiler.

    Kernels for a CPU: six graphs, 20 s. In bfloat16 the plain way rounds a quotient once more.
    """
    script = """
        import torch
        from torch._dynamo.utils import counters
        from torch.nn.functional import normalize
        from dinocell.ssl.losses import prototype_cross_entropy
        from dinocell.ssl.heads import Projection
        from dinocell.ssl.targets import TeacherLogits, sinkhorn_targets

        def found(rows, dtype, compiled):
            torch.manual_seed(rows)
            unit = normalize(torch.randn(rows, 8), dim=1).to(dtype).requires_grad_()
            prototypes = torch.randn(24, 8, requires_grad=True)
            teacher = Projection(normalize(torch.randn(rows, 8), dim=1).to(dtype), torch.randn(24, 8))
            ways = {"chunk_elements": 24 * 16, "compiled": compiled}
            (targets,) = sinkhorn_targets([TeacherLogits(teacher, keep=True)], 0.1, **ways)
            loss = prototype_cross_entropy(Projection(unit, prototypes), targets, torch.rand(rows), **ways)
            loss.total.backward()
            return targets.offsets, loss.total.detach(), loss.rows, unit.grad.float(), prototypes.grad

        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
            for rows in (40, 37, 5):
                for ours, plain in zip(found(rows, dtype, True), found(rows, dtype, False), strict=True):
                    assert (ours - plain).abs().max() <= tolerance * plain.abs().max(), (dtype, rows)
        print(counters["stats"]["unique_graphs"], "graphs", sum(counters["graph_break"].values()), "breaks")
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.stdout == "6 graphs 0 breaks\n", result.stderr[-2000:]


@pytest.mark.parametrize(("rows", "prototypes"), [(5, 8), (4, 7)])
def test_targets_of_other_sizes_than_the_students_are_refused(rows: int, prototypes: int) -> None:
    weights = torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"5 rows and 7 prototypes .*, got {rows} and {prototypes}"):
        prototype_cross_entropy(student(5, 7), teacher(rows, prototypes), weights)
