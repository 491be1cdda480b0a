"""Targets against the plain forms in float64: Sinkhorn-Knopp by divisions, centring by subtraction."""

from collections.abc import Callable
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from torch import Tensor

from dinocell.ssl.heads import Projection
from dinocell.ssl.targets import Centre, Targets, TeacherLogits, sinkhorn_targets


def projection(rows: int, prototypes: int, bottleneck: int = 8, *, seed: int = 0, scale: float = 1.0) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(rows, bottleneck, generator=generator), dim=1)
    return Projection(unit, torch.randn(prototypes, bottleneck, generator=generator) * scale)


def plain_sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """The published form: divide exp(logits / temperature) by sums of prototypes and of samples in turn."""
    q = np.exp(logits.astype(np.float64) / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def log_sinkhorn(logits: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """The same in the log domain, for logits of any size."""
    log = logits.astype(np.float64) / temperature
    for _ in range(iterations):
        log = log - logsumexp(log, axis=0, keepdims=True)
        log = log - logsumexp(log, axis=1, keepdims=True)
    return np.exp(log)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("chunk_elements", [None, 1, 40 * 5])
def test_sinkhorn_equals_the_plain_divisions(keep: bool, iterations: int, chunk_elements: int | None) -> None:
    logits = TeacherLogits(projection(23, 40), keep=keep)
    (targets,) = sinkhorn_targets([logits], 0.1, iterations=iterations, chunk_elements=chunk_elements)
    dense = logits.rows.double() @ logits.prototypes.double().T
    np.testing.assert_allclose(
        targets.probabilities(), plain_sinkhorn(dense.numpy(), 0.1, iterations), rtol=1e-4, atol=1e-7
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.02, 3), st.integers(0, 10**6))
def test_any_small_matrix_equals_the_log_domain(rows: int, prototypes: int, temperature: float, seed: int) -> None:
    logits = TeacherLogits(projection(rows, prototypes, seed=seed))
    (targets,) = sinkhorn_targets([logits], temperature, chunk_elements=prototypes * 2)
    dense = (logits.rows.double() @ logits.prototypes.double().T).numpy()
    np.testing.assert_allclose(targets.probabilities(), log_sinkhorn(dense, temperature), rtol=1e-3, atol=1e-6)


def test_sinkhorn_rows_sum_to_one() -> None:
    (targets,) = sinkhorn_targets([TeacherLogits(projection(50, 64, scale=3))], 0.04)
    torch.testing.assert_close(targets.probabilities().sum(1), torch.ones(50), rtol=0, atol=2e-6)


def test_many_iterations_give_every_prototype_the_same_share() -> None:
    (targets,) = sinkhorn_targets([TeacherLogits(projection(64, 16))], 0.2, iterations=200)
    torch.testing.assert_close(targets.probabilities().mean(0), torch.full((16,), 1 / 16), rtol=1e-4, atol=0)


def test_constant_logits_give_the_uniform_distribution() -> None:
    same = Projection(torch.ones(5, 3), torch.full((7, 3), 0.25))
    (targets,) = sinkhorn_targets([TeacherLogits(same)], 0.04)
    torch.testing.assert_close(targets.probabilities(), torch.full((5, 7), 1 / 7))


def test_permuted_samples_give_permuted_targets() -> None:
    whole = projection(20, 30)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    (one,) = sinkhorn_targets([TeacherLogits(whole)], 0.05)
    (other,) = sinkhorn_targets([TeacherLogits(Projection(whole.rows[order], whole.prototypes))], 0.05)
    torch.testing.assert_close(other.probabilities(), one.probabilities()[order], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("spread", [500.0, 1e4])
def test_huge_logits_stay_finite_and_right(spread: float, sign: float) -> None:
    """At logits / temperature of 500 exp() overflows float32; also where each row lies elsewhere as a whole."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(9, 12, generator=generator) * spread
    dense[3] -= 2 * spread
    dense[:, 5] += spread
    dense *= sign
    (targets,) = sinkhorn_targets([TeacherLogits(Projection(torch.eye(9), dense.T.contiguous()))], 1.0)
    probabilities = targets.probabilities()
    assert probabilities.isfinite().all()
    assert targets.offsets.isfinite().all()
    # Offsets of size `spread` in float32 leave an error of spread * 6e-8 in the exponent, several times over.
    np.testing.assert_allclose(probabilities, log_sinkhorn(dense.numpy(), 1.0), rtol=0, atol=spread * 1e-6)


def test_float64_stays_float64() -> None:
    narrow = projection(6, 8)
    wide = Projection(narrow.rows.double(), narrow.prototypes.double())
    (targets,) = sinkhorn_targets([TeacherLogits(wide)], 0.05)
    expected = plain_sinkhorn((wide.rows @ wide.prototypes.T).numpy(), 0.05)
    np.testing.assert_allclose(targets.probabilities(), expected, rtol=1e-11)


def test_temperature_may_be_a_tensor() -> None:
    logits = TeacherLogits(projection(6, 8))
    (one,), (other,) = sinkhorn_targets([logits], 0.05), sinkhorn_targets([logits], torch.tensor(0.05))
    assert torch.equal(one.probabilities(), other.probabilities())


def test_several_matrices_at_once_are_the_same_as_one_by_one() -> None:
    tokens, patches = TeacherLogits(projection(8, 30)), TeacherLogits(projection(25, 12, seed=1))
    both = sinkhorn_targets([tokens, patches], 0.05)
    for logits, together in zip((tokens, patches), both, strict=True):
        torch.testing.assert_close(sinkhorn_targets([logits], 0.05)[0].probabilities(), together.probabilities())


def test_half_precision_rows_give_float32_targets_near_those_of_float32() -> None:
    exact = projection(40, 64, scale=0.3)
    rounded = Projection(exact.rows.bfloat16(), exact.prototypes)
    for keep in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            (targets,) = sinkhorn_targets([TeacherLogits(rounded, keep=keep)], 0.1)
            probabilities = targets.probabilities()
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(1), torch.ones(40))
        expected = sinkhorn_targets([TeacherLogits(exact)], 0.1)[0].probabilities()
        assert (probabilities - expected).abs().sum(1).mean() < 0.05


def on_ranks(count: int, work: Callable[[int, Callable[[Tensor], Tensor]], None]) -> list[int]:
    """Run ``work(rank, sum_over_ranks)`` on threads that meet at every sum; return the sizes of the sums."""
    barrier, shelf, sizes = Barrier(count), [torch.empty(0)] * count, []

    def total(rank: int) -> Callable[[Tensor], Tensor]:
        def call(values: Tensor) -> Tensor:
            shelf[rank] = values.clone()
            barrier.wait()
            result = torch.stack(shelf).sum(0)
            barrier.wait()
            if rank == 0:
                sizes.append(len(values))
            return result

        return call

    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            work(rank, total(rank))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [Thread(target=guarded, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return sizes


@pytest.mark.parametrize(("split", "scale"), [((5, 5, 5), 1.0), ((1, 14, 0), 1.0), ((5, 5, 5), 20.0)])
def test_ranks_give_the_targets_of_one_process(split: tuple[int, ...], scale: float) -> None:
    tokens, patches = projection(15, 20, scale=scale), projection(15, 9, seed=3, scale=scale)
    expected = [q.probabilities() for q in sinkhorn_targets([TeacherLogits(tokens), TeacherLogits(patches)], 0.05)]
    results: dict[int, list[Tensor]] = {}

    def work(rank: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        parts = [Projection(each.rows.split(split)[rank], each.prototypes) for each in (tokens, patches)]
        found = sinkhorn_targets([TeacherLogits(part) for part in parts], 0.05, sum_over_ranks=sum_over_ranks)
        results[rank] = [targets.probabilities() for targets in found]

    sizes = on_ranks(3, work)
    for index, whole in enumerate(expected):
        joined = torch.cat([results[rank][index] for rank in range(3)])
        torch.testing.assert_close(joined, whole, rtol=1e-4 * scale, atol=1e-6)
    assert sizes == [31, 29, 29, 29]  # 20 + 9 prototypes; the first sum carries the two counts of rows


def test_centre_equals_the_plain_running_mean() -> None:
    first, second = projection(11, 14), projection(6, 14, seed=1)
    centre, plain = Centre(14), np.zeros(14)
    for each in (first, second):
        dense = (each.rows.double() @ each.prototypes.double().T).numpy()
        targets = centre(TeacherLogits(each), 0.07)
        centre.update(TeacherLogits(each))
        shifted = (dense - plain) / 0.07
        expected = np.exp(shifted - logsumexp(shifted, axis=1, keepdims=True))
        # The update that came in between must not change targets that were handed out before it.
        np.testing.assert_allclose(targets.probabilities(), expected, rtol=2e-5, atol=1e-7)
        plain = 0.9 * plain + 0.1 * dense.mean(0)
        np.testing.assert_allclose(centre.centre, plain, rtol=1e-5, atol=1e-7)
    assert list(centre.state_dict()) == ["centre"]


def test_ranks_give_the_centre_of_one_process() -> None:
    whole = projection(9, 5)
    expected = Centre(5)
    expected.update(TeacherLogits(whole))
    found: dict[int, Tensor] = {}

    def work(rank: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        centre = Centre(5)
        part = Projection(whole.rows.split((2, 7))[rank], whole.prototypes)
        centre.update(TeacherLogits(part), sum_over_ranks=sum_over_ranks)
        found[rank] = centre.centre

    assert on_ranks(2, work) == [9]  # one row of 8 numbers and the count
    torch.testing.assert_close(found[0], expected.centre)
    assert torch.equal(found[0], found[1])


def test_no_rows_leave_the_centre_where_it_is() -> None:
    centre = Centre(5)
    centre.update(TeacherLogits(projection(4, 5)))
    before = centre.centre.clone()
    centre.update(TeacherLogits(projection(0, 5)))
    assert torch.equal(centre.centre, before)


def test_no_rows_have_no_targets() -> None:
    (targets,) = sinkhorn_targets([TeacherLogits(projection(0, 5))], 0.05)
    assert targets.probabilities().shape == (0, 5)


def test_rows_can_be_taken_by_index() -> None:
    (targets,) = sinkhorn_targets([TeacherLogits(projection(6, 8))], 0.05)
    order = torch.tensor([4, 0, 0])
    torch.testing.assert_close(targets.chunk(order), targets.probabilities()[order])


def test_targets_carry_no_gradient() -> None:
    one = projection(6, 8)
    rows, prototypes = one.rows.requires_grad_(), one.prototypes.requires_grad_()
    (targets,) = sinkhorn_targets([TeacherLogits(Projection(rows, prototypes), keep=True)], 0.05)
    assert isinstance(targets, Targets)
    assert not targets.probabilities().requires_grad
