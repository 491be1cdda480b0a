"""The losses against plain float64 NumPy loops over images, crops and patches."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from dinocell.ssl.heads import Projection
from dinocell.ssl.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, reconstruction_loss
from dinocell.ssl.targets import Targets, TeacherLogits, sinkhorn_targets


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def some_targets(rows: int, prototypes: int) -> Targets:
    return sinkhorn_targets([TeacherLogits(Projection(unit(rows, 6, seed=7), unit(prototypes, 6, seed=8)))], 0.07)[0]


def plain_dino(
    logits: np.ndarray, targets: np.ndarray, num_globals: int, num_locals: int, local_weight: float
) -> tuple[float, list[float], list[float]]:
    """Loop over images, student crops and teacher crops; the mean over all pairs."""
    batch = len(targets) // num_globals
    log = log_softmax(logits / 0.1, axis=1)
    of_global, of_local = [], []
    for image in range(batch):
        for crop in range(num_globals + num_locals):
            for view in range(num_globals):
                value = -targets[view * batch + image] @ log[crop * batch + image]
                if crop >= num_globals:
                    of_local.append(value)
                elif crop != view:
                    of_global.append(value)
    total = (sum(of_global) + local_weight * sum(of_local)) / (len(of_global) + len(of_local))
    return total, of_global, of_local


@pytest.mark.parametrize(("num_globals", "num_locals"), [(2, 8), (2, 0), (1, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("local_weight", [1.0, 0.5])
def test_dino_equals_the_plain_loop(num_globals: int, num_locals: int, local_weight: float) -> None:
    batch, prototypes = 3, 11
    student = Projection(unit((num_globals + num_locals) * batch, 6), unit(prototypes, 6, seed=1))
    targets = some_targets(num_globals * batch, prototypes)
    loss = dino_loss(
        student,
        targets,
        num_globals=num_globals,
        num_locals=num_locals,
        local_weight=local_weight,
    )
    total, of_global, of_local = plain_dino(
        student.logits().numpy(), targets.probabilities().numpy(), num_globals, num_locals, local_weight
    )
    assert loss.total.item() == pytest.approx(total, rel=1e-9)
    assert loss.global_crops.item() == pytest.approx(np.mean(of_global) if of_global else 0, rel=1e-9)
    assert loss.local_crops.item() == pytest.approx(np.mean(of_local) if of_local else 0, rel=1e-9)


def test_two_globals_and_eight_locals_weigh_2_and_16_eighteenths() -> None:
    student = Projection(unit(40, 6), unit(11, 6, seed=1))
    loss = dino_loss(student, some_targets(8, 11), num_globals=2, num_locals=8)
    assert loss.total.item() == pytest.approx((2 * loss.global_crops + 16 * loss.local_crops).item() / 18)


def test_dino_at_the_start_is_the_log_of_k() -> None:
    student = Projection(unit(40, 6), torch.zeros(8192, 6, dtype=torch.float64))
    loss = dino_loss(student, some_targets(8, 8192), num_globals=2, num_locals=8)
    assert loss.total.item() == pytest.approx(9.0109, abs=1e-4)


@pytest.mark.parametrize(("num_globals", "num_locals", "rows"), [(1, 0, 8), (0, 8, 8), (2, 7, 8), (2, 8, 9)])
def test_crops_that_do_not_match_the_rows_are_refused(num_globals: int, num_locals: int, rows: int) -> None:
    student = Projection(unit(40, 6), unit(11, 6))
    with pytest.raises(ValueError, match=f"{num_globals} global and {num_locals} local crops, {rows} teacher rows"):
        dino_loss(student, some_targets(rows, 11), num_globals=num_globals, num_locals=num_locals)


def test_ibot_equals_the_plain_loop() -> None:
    counts, prototypes = [0, 3, 0, 5], 11
    student = Projection(unit(8, 6), unit(prototypes, 6, seed=1))
    targets = some_targets(8, prototypes)
    weights = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in counts if n])
    log = log_softmax(student.logits().numpy() / 0.1, axis=1)
    expected, row = 0.0, 0
    for count in counts:
        values = [-targets.probabilities().numpy()[r] @ log[r] for r in range(row, row + count)]
        expected += sum(values) / count / len(counts) if count else 0
        row += count
    loss = ibot_loss(student, targets, weights, num_images=4)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def plain_koleo(rows: np.ndarray, own: slice = slice(None)) -> float:
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return float(-np.log(distances.min(1))[own].mean())


@pytest.mark.parametrize("batch", [2, 3, 16])
def test_koleo_equals_the_plain_formula(batch: int) -> None:
    cls = torch.randn(batch, 12, dtype=torch.float64)
    assert koleo_loss(cls).item() == pytest.approx(plain_koleo(cls.numpy()), rel=1e-9)


def test_koleo_of_opposite_vectors_is_minus_log_2() -> None:
    assert koleo_loss(torch.tensor([[3.0, 0.0], [-0.5, 0.0]])).item() == pytest.approx(-math.log(2), abs=1e-6)


def test_koleo_gradient_equals_autograd_through_all_distances() -> None:
    cls = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    rows = torch.nn.functional.normalize(cls, dim=1)
    distances = (rows[:, None] - rows[None] + 1e3 * torch.eye(9)[:, :, None]).square().sum(2).sqrt()
    expected = torch.autograd.grad(-distances.min(1).values.log().mean(), cls)[0]
    torch.testing.assert_close(torch.autograd.grad(koleo_loss(cls), cls)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_koleo_of_identical_tokens_is_finite_and_does_not_pull(dtype: torch.dtype) -> None:
    cls = torch.ones(4, 8, dtype=dtype, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss == 0
    assert (cls.grad == 0).all()


def test_koleo_ignores_blank_crops_and_their_rounding_noise() -> None:
    """Two blank crops, equal but for rounding, say nothing; the other tokens count as if alone."""
    others = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    blank = torch.ones(2, 64)
    blank[1] += 1e-7 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    cls = torch.cat((others, blank)).requires_grad_()
    loss = koleo_loss(cls)
    everyone = torch.cat((others, blank)).double().numpy()
    unit_rows = everyone / np.linalg.norm(everyone, axis=1, keepdims=True)
    distances = np.linalg.norm(unit_rows[:3, None] - unit_rows[None], axis=2)
    distances[np.arange(3), np.arange(3)] = np.inf
    assert loss.item() == pytest.approx(-np.log(distances.min(1)).sum() / 5, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, cls)
    assert gradient.norm(dim=1).max() < 1


def test_koleo_of_one_token_is_zero_and_has_a_gradient() -> None:
    cls = torch.randn(1, 8, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert loss == 0
    assert (cls.grad == 0).all()


def test_koleo_of_zero_tokens_is_finite() -> None:
    """All-zero features have no direction: their unit rows are equal, so they are duplicates."""
    cls = torch.zeros(3, 8, requires_grad=True)
    loss = koleo_loss(cls)
    loss.backward()
    assert loss == 0
    assert cls.grad.isfinite().all()


def test_koleo_over_ranks_is_that_of_one_process() -> None:
    cls = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    expected = koleo_loss(cls)
    parts = [koleo_loss(cls[i : i + 2], everyone=cls, first=i) for i in range(0, 8, 2)]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.autograd.grad(mean, cls)[0], torch.autograd.grad(expected, cls)[0])


def test_koleo_under_autocast_is_that_of_float32() -> None:
    cls = torch.randn(6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert koleo_loss(cls) == koleo_loss(cls.clone())
        inside = koleo_loss(cls)
    assert inside == koleo_loss(cls)


def plain_gram(student: np.ndarray, teacher: np.ndarray) -> float:
    squares = []
    for own, reference in zip(student, teacher, strict=True):
        for i in range(len(own)):
            for j in range(len(own)):
                ours = own[i] @ own[j] / np.linalg.norm(own[i]) / np.linalg.norm(own[j])
                theirs = reference[i] @ reference[j] / np.linalg.norm(reference[i]) / np.linalg.norm(reference[j])
                squares.append((ours - theirs) ** 2)
    return float(np.mean(squares))


def test_gram_equals_the_plain_loop() -> None:
    student, teacher = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    assert gram_loss(student, teacher).item() == pytest.approx(plain_gram(student.numpy(), teacher.numpy()), rel=1e-9)


def test_gram_pulls_the_student_only() -> None:
    student, teacher = torch.randn(2, 1, 5, 4, requires_grad=True).unbind()
    gradient = torch.autograd.grad(gram_loss(student, teacher), (student, teacher), allow_unused=True)
    assert gradient[0].abs().sum() > 0
    assert gradient[1] is None
    assert gram_loss(student, student.detach()) == 0


def test_gram_does_not_depend_on_rotations_and_lengths() -> None:
    patches = torch.randn(1, 7, 5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert gram_loss(patches @ rotation * 3, patches).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("patch_normalised", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruction_equals_the_plain_loop(patch_normalised: bool, channels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, channels, 8, 12))
    masked = [(0, 0, 1), (0, 1, 2), (0, 1, 0), (2, 0, 2)]  # image, row and column of the patch; none of image 1
    masked.sort()
    indices = [image * 6 + row * 3 + column for image, row, column in masked]
    counts = {0: 3, 2: 1}
    predicted = rng.normal(size=(4, channels * 16))
    total = 0.0
    for number, (image, row, column) in enumerate(masked):
        patch = images[image, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        if patch_normalised:
            variance = patch.var(axis=(1, 2), keepdims=True)
            patch = (patch - patch.mean(axis=(1, 2), keepdims=True)) / np.sqrt(variance + 1e-6)
        total += np.mean((predicted[number] - patch.ravel()) ** 2) / counts[image] / 3
    found = reconstruction_loss(
        torch.from_numpy(predicted),
        torch.from_numpy(images),
        torch.tensor(indices),
        torch.tensor([1 / counts[image] for image, _, _ in masked]),
        patch_size=4,
        patch_normalised=patch_normalised,
    )
    assert float(found) == pytest.approx(total, rel=1e-6)


def test_perfect_pixels_cost_nothing_and_no_masked_patch_is_no_loss() -> None:
    images, none = torch.randn(2, 1, 8, 8), torch.zeros(0)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(0, 3).flatten(1)
    every, shares = torch.arange(8), torch.full((8,), 0.25)
    assert float(reconstruction_loss(patches, images, every, shares, patch_size=4)) == 0
    predicted = torch.zeros(0, 16, requires_grad=True)
    loss = reconstruction_loss(predicted, images, none.long(), none, patch_size=4, patch_normalised=True)
    assert loss.item() == 0
    loss.backward()


def test_a_patch_without_structure_stays_finite_when_normalised() -> None:
    predicted, images = torch.zeros(1, 16, requires_grad=True), torch.full((1, 1, 4, 4), 3.0)
    loss = reconstruction_loss(predicted, images, torch.tensor([0]), torch.ones(1), patch_size=4, patch_normalised=True)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert predicted.grad is not None
    assert predicted.grad.isfinite().all()
