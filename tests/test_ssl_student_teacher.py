"""A training step: the losses and gradients of a plain version, in every setting."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.ssl.config import HeadsConfig, LossConfig, MaskingConfig, ReconstructionConfig
from dinocell.ssl.losses import reconstruction_loss
from dinocell.ssl.masking import PatchMasks, draw_masks
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.views import Views

HEADS = HeadsConfig(num_prototypes=24, hidden=32, bottleneck=16)
TEMPERATURE = 0.05


def model_of(heads: HeadsConfig = HEADS, losses: LossConfig | None = None) -> StudentTeacher:
    torch.manual_seed(0)
    config = replace(variant_config("tiny", patch_size=8, in_channels=1), depth=2)
    vit = VisionTransformer(config)
    vit.init_weights(layer_scale=0.3)
    model = StudentTeacher(vit, heads, losses or LossConfig()).double()
    with torch.no_grad():  # a teacher of its own, or every target would be the student's
        for parameter in model.teacher.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.train()


def inputs(batch: int = 3, num_local: int = 4) -> tuple[Views, PatchMasks]:
    generator = torch.Generator().manual_seed(1)
    views = Views(
        torch.randn(2, batch, 1, 32, 32, generator=generator, dtype=torch.float64),
        torch.randn(num_local, batch, 1, 16, 16, generator=generator, dtype=torch.float64),
    )
    masks = draw_masks(range(batch), (4, 4), MaskingConfig(), seed=0)
    return views, masks


def plain_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    q = torch.exp(logits / temperature).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def plain_losses(model: StudentTeacher, views: Views, masks: PatchMasks, *, balance: object) -> dict[str, Tensor]:
    """The losses with whole logits, loops over pairs, and autograd throughout."""
    student, teacher = model.student, model.teacher
    patch_head = "ibot_head" if "ibot_head" in student else "dino_head"
    images, hidden = views.global_views.flatten(0, 1), masks.masks.flatten(1)
    with torch.no_grad():
        seen = teacher["backbone"](images)
        cls_targets = balance(teacher["dino_head"](seen.cls).logits()).unflatten(0, (2, -1))
        patch_targets = balance(teacher[patch_head](seen.patches[hidden]).logits())
    out = student["backbone"](images, hidden)
    local = student["backbone"](views.local_views.flatten(0, 1))
    global_logits = student["dino_head"](out.cls).logits().unflatten(0, (2, -1)) / 0.1
    local_logits = student["dino_head"](local.cls).logits().unflatten(0, (len(views.local_views), -1)) / 0.1

    def entropy(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * F.log_softmax(logits, -1)).sum(-1).mean()

    pairs_global = [entropy(cls_targets[j], global_logits[i]) for i in range(2) for j in range(2) if i != j]
    pairs_local = [entropy(target, logits) for logits in local_logits for target in cls_targets]
    dino = torch.stack(pairs_global + pairs_local).mean()
    patch_logits = student[patch_head](out.patches[hidden]).logits() / 0.1
    of_image = hidden.nonzero()[:, 0]
    counts = hidden.sum(1)
    each = -(patch_targets * F.log_softmax(patch_logits, -1)).sum(-1)
    ibot = (each / counts[of_image]).sum() / len(images)
    koleo = torch.zeros((), dtype=torch.float64)
    for cls in out.cls.unflatten(0, (2, -1)):
        unit = F.normalize(cls, dim=-1)
        distance = torch.cdist(unit, unit) + 1e9 * torch.eye(len(unit))
        koleo = koleo - distance.min(1).values.log().mean()
    return {
        "total": dino + ibot + 0.1 * koleo,
        "dino_global": torch.stack(pairs_global).mean(),
        "dino_local": torch.stack(pairs_local).mean(),
        "ibot": ibot,
        "koleo": koleo,
    }


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_losses_and_gradients_are_those_of_a_plain_version(shared: bool, weight_norm: bool) -> None:
    model, (views, masks) = model_of(replace(HEADS, shared=shared, weight_norm=weight_norm)), inputs()
    ours = model(views, masks, teacher_temperature=TEMPERATURE).losses
    ours.total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.student.named_parameters()}
    model.zero_grad(set_to_none=True)
    want = plain_losses(model, views, masks, balance=lambda logits: plain_sinkhorn(logits, TEMPERATURE))
    want["total"].backward()
    for name, value in want.items():
        torch.testing.assert_close(getattr(ours, name), value.detach(), rtol=1e-6, atol=1e-8)
    for name, parameter in model.student.named_parameters():
        # The shares of masked patches are float32.
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6 * size)
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def test_softmax_centring_subtracts_a_running_mean() -> None:
    model, (views, masks) = model_of(losses=LossConfig(centring="softmax")), inputs()
    first = model(views, masks, teacher_temperature=TEMPERATURE).losses
    want = plain_losses(model, views, masks, balance=lambda logits: torch.softmax(logits / TEMPERATURE, -1))
    torch.testing.assert_close(first.dino_local.detach(), want["dino_local"].detach(), rtol=1e-6, atol=1e-8)
    with torch.no_grad():
        logits = model.teacher["dino_head"](model.teacher["backbone"](views.global_views.flatten(0, 1)).cls).logits()
    centre = 0.1 * logits.mean(0)
    torch.testing.assert_close(model.centres[0].centre, centre, rtol=1e-6, atol=1e-8)
    second = model(views, masks, teacher_temperature=TEMPERATURE).losses
    centred = torch.softmax((logits - centre) / TEMPERATURE, -1)
    queue = iter([centred, torch.softmax(torch.randn(len(masks.indices), 24).double(), -1)])
    want = plain_losses(model, views, masks, balance=lambda _: next(queue))
    torch.testing.assert_close(second.dino_local.detach(), want["dino_local"].detach(), rtol=1e-6, atol=1e-8)


def test_the_teacher_predicts_without_noise_and_never_learns_by_gradient() -> None:
    model = model_of()
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_without_local_crops_the_global_pairs_remain() -> None:
    model, (views, masks) = model_of(), inputs(num_local=0)
    losses = model(views, masks, teacher_temperature=TEMPERATURE).losses
    assert float(losses.dino_local) == 0
    expected = losses.dino_global + losses.ibot + 0.1 * losses.koleo
    torch.testing.assert_close(losses.total.detach(), expected.detach(), rtol=1e-6, atol=1e-8)


def test_the_local_weight_scales_the_local_pairs_alone() -> None:
    model, (views, masks) = model_of(), inputs()
    totals = [model(views, masks, teacher_temperature=TEMPERATURE, local_weight=w).losses for w in (1.0, 0.5)]
    difference = totals[0].total - totals[1].total
    torch.testing.assert_close(difference, 0.5 * totals[0].dino_local * 8 / 10, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_targets", [False, True])
def test_reconstruction_reads_the_masked_pass_and_adds_to_the_other_losses(with_targets: bool) -> None:
    views, masks = inputs()
    if with_targets:
        views = views._replace(target_views=views.global_views.flip(1))
    without = model_of()
    plain = without(views, masks, teacher_temperature=TEMPERATURE).losses
    model = model_of(losses=LossConfig(reconstruction=ReconstructionConfig(weight=0.5, hidden_dim=16)))
    model.teacher.load_state_dict(without.teacher.state_dict())  # the noise of the teacher is drawn after the head
    images = views.global_views.flatten(0, 1)
    tokens = model.student["backbone"](images, masks.masks.flatten(1)).patches[masks.masks.flatten(1)]
    target = images if views.target_views is None else views.target_views.flatten(0, 1)
    pixels = model.student["reconstruction_head"](tokens)
    expected = reconstruction_loss(pixels, target, masks.indices, masks.weights, patch_size=8)
    losses = model(views, masks, teacher_temperature=TEMPERATURE).losses
    torch.testing.assert_close(losses.reconstruction, expected, rtol=1e-6, atol=1e-8)
    model.zero_grad(set_to_none=True)
    losses.reconstruction.backward()
    moved = [name for name, parameter in model.student.named_parameters() if parameter.grad is not None]
    assert any(name.startswith("backbone.blocks") for name in moved)
    assert not any(name.startswith(("dino_head", "ibot_head")) for name in moved)
    assert float(plain.reconstruction) == 0
    added = plain.dino_global.new_tensor(0.5) * expected.detach()
    torch.testing.assert_close(losses.total.detach(), plain.total.detach() + added, rtol=1e-6, atol=1e-8)


def test_only_the_student_has_a_reconstruction_head_and_only_if_it_is_asked_for() -> None:
    plain = model_of()
    model = model_of(losses=LossConfig(reconstruction=ReconstructionConfig(weight=1.0)))
    assert set(model.student) - set(plain.student) == {"reconstruction_head"}
    assert set(model.teacher) == set(plain.teacher) == {"backbone", "dino_head", "ibot_head"}
    for name, parameter in plain.student.named_parameters():  # what is drawn for the others stays what it was
        torch.testing.assert_close(model.student.get_parameter(name), parameter, rtol=0, atol=0)


def test_the_dino_weight_scales_its_pairs() -> None:
    views, masks = inputs()
    found = [
        model_of(losses=LossConfig(dino_weight=weight))(views, masks, teacher_temperature=TEMPERATURE).losses
        for weight in (1.0, 0.0)
    ]
    expected = found[0].ibot + 0.1 * found[0].koleo
    torch.testing.assert_close(found[1].total, expected, rtol=1e-6, atol=1e-8)


def test_reconstruction_learns_the_pixels_of_masked_patches_from_visible_ones() -> None:
    # Stripes: the phase of a crop is seen in any of its patches.
    phase = torch.rand(2, 6, 1, 1, 1, dtype=torch.float64) * 6.28
    crops = (torch.arange(32, dtype=torch.float64) * 0.7 + phase).sin().expand(2, 6, 1, 32, 32) * 1.41
    views = Views(crops, torch.zeros(0, 6, 1, 16, 16, dtype=torch.float64))
    masks = draw_masks(range(6), (4, 4), MaskingConfig(), seed=0)
    losses = LossConfig(
        dino_weight=0.0, ibot_weight=0.0, koleo_weight=0.0, reconstruction=ReconstructionConfig(weight=1.0)
    )
    model = model_of(losses=losses)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    found = []
    for _ in range(60):
        optimizer.zero_grad()
        step = model(views, masks, teacher_temperature=TEMPERATURE).losses
        step.total.backward()
        optimizer.step()
        found.append(step.reconstruction.item())
    assert found[0] == pytest.approx(0.5, abs=0.1)
    assert found[-1] < 0.2 * found[0]
