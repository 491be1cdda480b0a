"""Groups, rates, clipping, moving average and non-finite steps, on a real backbone and real heads."""

import math

import pytest
import torch
from torch import nn

from dinocell.errors import DinocellError
from dinocell.models.vit import VisionTransformer, ViTConfig
from dinocell.runtime.optim import (
    NonfiniteSteps,
    adamw,
    clip_gradients,
    parameter_groups,
    scaled_learning_rate,
    set_rates,
    update_ema,
)
from dinocell.ssl.heads import ProjectionHead


def modules(*, depth: int = 2, weight_norm: bool = False) -> dict[str, nn.Module]:
    config = ViTConfig(width=16, depth=depth, heads=2, registers=2, local_cls_norm=True)
    head = {"hidden": 12, "bottleneck": 6, "weight_norm": weight_norm}
    return {
        "backbone": VisionTransformer(config),
        "dino_head": ProjectionHead(16, 10, **head),
        "ibot_head": ProjectionHead(16, 10, **head),
    }


def factors(parts: dict[str, nn.Module], **options: object) -> dict[str, tuple[float, float, bool]]:
    """Return learning-rate factor, weight-decay factor and last-layer mark of every parameter by name."""
    names = {id(p): f"{part}.{name}" for part, module in parts.items() for name, p in module.named_parameters()}
    depth = len(parts["backbone"].blocks)  # type: ignore[arg-type]
    groups = parameter_groups(parts, depth=depth, **options)  # type: ignore[arg-type]
    return {
        names[id(p)]: (group["learning_rate_factor"], group["weight_decay_factor"], group["last_layer"])
        for group in groups
        for p in group["params"]
    }


def test_layer_decay_has_the_known_factors_at_depth_12() -> None:
    found = factors(modules(depth=12), layer_decay=0.9)
    expected = {
        "backbone.patch_embed.proj.weight": 0.050837,
        "backbone.cls_token": 0.254187,
        "backbone.mask_token": 0.254187,
        "backbone.register_tokens": 0.254187,
        "backbone.blocks.0.attn.qkv.weight": 0.282430,
        "backbone.blocks.11.mlp.fc2.bias": 0.9,
        "backbone.norm.weight": 1,
        "backbone.local_cls_norm.bias": 1,
        "dino_head.mlp.0.weight": 1,
        "ibot_head.last_layer.weight": 1,
    }
    for name, factor in expected.items():
        assert found[name][0] == pytest.approx(factor, abs=5e-7), name


def test_biases_norms_and_layer_scale_do_not_decay_and_tokens_do() -> None:
    found = factors(modules())
    free = {name for name, (_, decay, _) in found.items() if decay == 0}
    assert free == {n for n in found if n.endswith(".bias") or "norm" in n or "gamma" in n}
    for name in ("cls_token", "mask_token", "register_tokens", "blocks.0.attn.qkv.weight"):
        assert found[f"backbone.{name}"][1] == 1


def test_tokens_can_be_excluded_from_weight_decay() -> None:
    found = factors(modules(), decay_tokens=False)
    kept = {name for name, (_, decay, _) in found.items() if decay == 0}
    default = {name for name, (_, decay, _) in factors(modules()).items() if decay == 0}
    assert kept - default == {"backbone.cls_token", "backbone.mask_token", "backbone.register_tokens"}


def test_learned_positions_belong_to_layer_0() -> None:
    parts = modules()
    parts["backbone"] = VisionTransformer(ViTConfig(width=16, depth=2, heads=2, registers=0, positions="learned"))
    assert factors(parts, layer_decay=0.5)["backbone.pos_embed"][:2] == (0.125, 1)


def test_every_parameter_is_in_one_group_and_equal_roles_share_one() -> None:
    parts = modules(weight_norm=True)
    groups = parameter_groups(parts, depth=2, layer_decay=0.9)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for module in parts.values() for p in module.parameters())
    roles = [tuple(value for key, value in group.items() if key != "params") for group in groups]
    assert len(set(roles)) == len(roles)
    last = [group for group in groups if group["last_layer"]]
    assert sum(len(group["params"]) for group in last) == 4  # weight_g and weight_v of two heads


def test_frozen_parameters_are_left_out() -> None:
    parts = modules()
    parts["backbone"].requires_grad_(False)
    assert all(not name.startswith("backbone.") for name in factors(parts))


def test_head_decay_factor_scales_the_heads_alone() -> None:
    found = factors(modules(), head_weight_decay_factor=0.25)
    assert found["dino_head.mlp.0.weight"][1] == 0.25
    assert found["dino_head.mlp.0.bias"][1] == 0
    assert found["backbone.blocks.0.attn.qkv.weight"][1] == 1


def test_rates_are_schedules_times_factors() -> None:
    parts = modules()
    optimizer = adamw(parameter_groups(parts, depth=2, layer_decay=0.5))
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.4, backbone_factor=0.5, last_layer_factor=0.0)
    for group in optimizer.param_groups:
        part = 0.5 if group["module"] == "backbone" else 0.0 if group["last_layer"] else 1.0
        assert group["lr"] == pytest.approx(0.1 * part * group["learning_rate_factor"])
        assert group["weight_decay"] == pytest.approx(0.4 * group["weight_decay_factor"])
    assert {group["module"] for group in optimizer.param_groups} == set(parts)


def test_factor_zero_freezes_bit_exactly_and_the_rest_moves() -> None:
    parts = modules()
    optimizer = adamw(parameter_groups(parts, depth=2))
    before = {f"{n}.{k}": v.clone() for n, m in parts.items() for k, v in m.state_dict().items()}
    for module in parts.values():
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.4, backbone_factor=0.0, last_layer_factor=0.0)
    optimizer.step()
    for part, module in parts.items():
        for name, value in module.state_dict().items():
            frozen = part == "backbone" or name.startswith("last_layer")
            assert torch.equal(value, before[f"{part}.{name}"]) == frozen, name


def test_step_equals_adamw_by_hand() -> None:
    head = ProjectionHead(4, 6, hidden=5, bottleneck=3)
    optimizer = adamw(parameter_groups({"dino_head": head}, depth=0), betas=(0.9, 0.99))
    set_rates(optimizer, learning_rate=0.01, weight_decay=0.3)
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    for parameter in head.parameters():
        parameter.grad = torch.full_like(parameter, 0.7)
    optimizer.step()
    for name, parameter in head.named_parameters():
        decay = 0.0 if name.endswith("bias") else 0.3
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.01 * decay) - 0.01)


def test_state_of_the_optimizer_is_plain_values_and_tensors() -> None:
    parts = modules()
    optimizer = adamw(parameter_groups(parts, depth=2, layer_decay=0.9))
    for group in optimizer.state_dict()["param_groups"]:
        for key, value in group.items():
            assert isinstance(value, int | float | str | bool | list | tuple | None), key
    again = adamw(parameter_groups(modules(), depth=2, layer_decay=0.9))
    again.load_state_dict(optimizer.state_dict())


def test_square_root_rule_gives_the_published_rates() -> None:
    assert scaled_learning_rate(2e-4, 3072) == pytest.approx(3.4641e-4, rel=1e-4)
    assert scaled_learning_rate(4e-3, 2048) == pytest.approx(5.65685e-3, rel=1e-5)
    assert scaled_learning_rate(5e-4, 512) == pytest.approx(3.53553e-4, rel=1e-5)
    assert scaled_learning_rate(1e-3 * 4, 2048) == pytest.approx(5.65685e-3, rel=1e-5)
    assert scaled_learning_rate(1e-3, 64, reference=256, rule="linear") == pytest.approx(2.5e-4)
    assert scaled_learning_rate(1e-3, 64, rule="constant") == 1e-3


def test_each_module_is_clipped_by_itself() -> None:
    parts = {"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)}
    parts["a"].weight.grad = torch.full((2, 3), 10.0)
    parts["b"].weight.grad = torch.full((2, 3), 0.1)
    norms = clip_gradients(parts, 3.0)
    assert norms["a"].item() == pytest.approx(10 * math.sqrt(6))
    assert norms["b"].item() == pytest.approx(0.1 * math.sqrt(6))
    assert parts["a"].weight.grad.norm().item() == pytest.approx(3, rel=1e-5)
    assert torch.equal(parts["b"].weight.grad, torch.full((2, 3), 0.1))


def test_clipping_equals_that_of_torch_bit_for_bit_for_modules_and_for_lists() -> None:
    for largest in (1e-3, 1e3):
        parts, lists, twins = modules(), modules(), modules()
        for part, module in parts.items():
            generator = torch.Generator().manual_seed(1)
            module.register_parameter("unused", nn.Parameter(torch.zeros(2)))
            for name, parameter in module.named_parameters():
                if name != "unused":
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                    for other in (lists, twins):
                        other[part].get_parameter(name).grad = parameter.grad.clone()
        norms = clip_gradients(parts, largest)
        also = clip_gradients({part: list(module.parameters()) for part, module in lists.items()}, largest)
        for part, twin in twins.items():
            expected = nn.utils.clip_grad_norm_(twin.parameters(), largest)
            assert torch.equal(norms[part], expected)
            assert torch.equal(also[part], expected)
            for name, parameter in twin.named_parameters():
                for found in (parts, lists):
                    assert torch.equal(found[part].get_parameter(name).grad, parameter.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_of_a_non_finite_gradient_is_not_finite(value: float) -> None:
    part = nn.Linear(3, 2, bias=False)
    part.weight.grad = torch.tensor([[1.0, value, 1], [1, 1, 1]])
    assert not clip_gradients({"a": part}, 3.0)["a"].isfinite()


def test_clipping_a_module_without_gradients_gives_zero() -> None:
    assert clip_gradients({"a": nn.Linear(3, 2)}, 3.0)["a"] == 0


def test_teacher_moves_by_the_plain_formula() -> None:
    student, teacher = ProjectionHead(4, 6, hidden=5, bottleneck=3), ProjectionHead(4, 6, hidden=5, bottleneck=3)
    before = [p.detach().double() for p in teacher.parameters()]
    expected = [0.9 * old + 0.1 * new.double() for old, new in zip(before, student.parameters(), strict=True)]
    update_ema(teacher.parameters(), student.parameters(), 0.9)
    for parameter, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-6, atol=1e-8)


def test_momentum_one_keeps_the_teacher_bit_equal_and_zero_copies_the_student() -> None:
    student, teacher = nn.Linear(7, 5), nn.Linear(7, 5)
    before = teacher.weight.detach().clone()
    update_ema(teacher.parameters(), student.parameters(), 1.0)
    assert torch.equal(teacher.weight, before)
    update_ema(teacher.parameters(), student.parameters(), 0.0)
    assert torch.equal(teacher.weight, student.weight)
    assert torch.equal(teacher.bias, student.bias)
    assert student.weight.data_ptr() != teacher.weight.data_ptr()


def test_a_teacher_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher and student"):
        update_ema(nn.Linear(7, 5).parameters(), nn.Linear(5, 7).parameters(), 0.5)
    with pytest.raises(ValueError, match="teacher and student"):
        update_ema(nn.Linear(7, 5).parameters(), [], 0.5)


CPU = torch.device("cpu")
GOOD, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def layer_and_optimizer() -> tuple[nn.Linear, torch.optim.Optimizer]:
    layer = nn.Linear(3, 2)
    optimizer = adamw(parameter_groups({"head": layer}, depth=1))
    set_rates(optimizer, learning_rate=0.1, weight_decay=0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    return layer, optimizer


def snapshot(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [optimizer.state[each][name] for each in layer.parameters() for name in ("exp_avg", "exp_avg_sq", "step")]
    return [each.detach().clone() for each in (*layer.parameters(), *moments)]


@pytest.mark.parametrize("bad", [NAN, INFINITE])
def test_a_nonfinite_step_changes_neither_weights_nor_moments(bad: torch.Tensor) -> None:
    layer, optimizer = layer_and_optimizer()
    steps = NonfiniteSteps(CPU, most=10, advice="")
    steps.step(optimizer, [GOOD, GOOD])
    before = snapshot(layer, optimizer)
    steps.step(optimizer, [GOOD, bad])
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(layer, optimizer), strict=True))
    steps.step(optimizer, [GOOD])
    assert not torch.equal(before[0], layer.weight)
    assert float(steps.total) == 1


def test_only_nonfinite_steps_in_a_row_are_an_error() -> None:
    _, optimizer = layer_and_optimizer()
    steps = NonfiniteSteps(CPU, most=2, advice="Do this.")
    for value in (NAN, GOOD, NAN, GOOD, NAN):
        steps.step(optimizer, [value])
        steps.check()
    steps.step(optimizer, [NAN])
    with pytest.raises(DinocellError, match=r"2 steps in a row.*Do this\."):
        steps.check()
    assert float(steps.total) == 4


def test_the_count_continues_from_its_state() -> None:
    _, optimizer = layer_and_optimizer()
    first, second = (NonfiniteSteps(CPU, most=2, advice="") for _ in range(2))
    first.step(optimizer, [NAN])
    state = first.state()
    first.step(optimizer, [GOOD])
    second.restore(state)
    second.check()
    second.step(optimizer, [NAN])
    assert float(second.total) == 2
    with pytest.raises(DinocellError, match="2 steps in a row"):
        second.check()
