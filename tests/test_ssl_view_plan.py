"""Plans of views: reproducible, inside the tile, with the channels of the policy, and their intensity scaling."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dinocell.data_shards.manifest import read_manifest
from dinocell.data_shards.read import Origin, stream
from dinocell.data_shards.sample import SampleInfo
from dinocell.ssl.config import TargetChannels, ViewsConfig
from dinocell.ssl.view_plan import ViewPlan, intensity_ranges, plan_views

INFO = SampleInfo(
    field="f", channels=("a", "b", "c", "d"), dtype="uint16", height=100, width=140, row=0, column=0, crc32=(0,) * 4
)


# A scaling of raw intensities by 1: the factor of a plan is the brightness alone.
UNIT_RANGES = [dict.fromkeys(INFO.channels, (0.0, 1.0))] * 2


def plans(config: ViewsConfig, count: int, info: SampleInfo = INFO) -> list[ViewPlan]:
    return [plan_views(info, Origin(0, 0, sample), config, UNIT_RANGES, seed=0) for sample in range(count)]


def test_the_same_sample_has_the_same_views_and_any_other_has_others() -> None:
    config = ViewsConfig()
    origins = [Origin(0, 0, 5), Origin(1, 0, 5), Origin(0, 1, 5), Origin(0, 0, 6)]
    first, second = ([plan_views(INFO, origin, config, UNIT_RANGES, seed=3) for origin in origins] for _ in range(2))
    for one, same in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.boxes, same.boxes)
        np.testing.assert_array_equal(one.factor, same.factor)
    assert len({plan.boxes.tobytes() for plan in first}) == 4
    assert plan_views(INFO, origins[0], config, UNIT_RANGES, seed=4).boxes.tobytes() != first[0].boxes.tobytes()


@pytest.mark.parametrize("size", [(100, 140), (512, 512), (30, 400), (1, 1), (8, 3)])
def test_crops_are_inside_the_tile_and_have_the_configured_area(size: tuple[int, int]) -> None:
    config = ViewsConfig()
    height, width = size
    for plan in plans(config, 60, replace(INFO, height=height, width=width)):
        top, left, heights, widths = plan.boxes.T
        assert (top >= 0).all()
        assert (left >= 0).all()
        assert (heights >= 1).all()
        assert (widths >= 1).all()
        assert (top + heights <= height).all()
        assert (left + widths <= width).all()
        if size in ((100, 140), (512, 512)):
            share = heights * widths / (height * width)
            assert (share[:2] > 0.38).all()
            assert (share[2:] > 0.045).all()
            assert (share[2:] < 0.42).all()


def kinds(plan: ViewPlan) -> list[str]:
    return ["mean" if (mixing == 0.25).all() else "single" for mixing in plan.mixing[:, 0]]


def test_consistency_shows_the_mean_once_and_single_channels_mostly() -> None:
    found = [kinds(plan) for plan in plans(ViewsConfig(), 400)]
    assert {views[0] for views in found} == {"mean"}
    assert {views[1] for views in found} == {"single"}
    local = [kind for views in found for kind in views[2:]]
    assert local.count("mean") / len(local) == pytest.approx(0.3, abs=0.03)
    singles = np.array([plan.mixing[1, 0].argmax() for plan in plans(ViewsConfig(), 400)])
    assert np.bincount(singles, minlength=4).min() > 70


def test_average_and_bag() -> None:
    assert {kind for plan in plans(ViewsConfig(policy="average"), 20) for kind in kinds(plan)} == {"mean"}
    for plan in plans(ViewsConfig(policy="bag"), 20):
        assert set(kinds(plan)) == {"single"}
        assert len(plan.channels()) == 1
    assert len({plan.channels() for plan in plans(ViewsConfig(policy="bag"), 50)}) == 4


def test_stack_orders_channels_by_name_and_drops_any_but_the_protein() -> None:
    config = ViewsConfig(policy="stack", channels=("c", "x", "a"), protein_channel="c", drop_channel=1.0)
    dropped = set()
    for plan in plans(config, 40):
        assert plan.mixing.shape == (10, 3, 4)
        np.testing.assert_array_equal(plan.mixing[:, 0], np.tile([0, 0, 1, 0], (10, 1)))
        assert not plan.mixing[:, 1].any()
        dropped |= {tuple(view.any(axis=-1).tolist()) for view in plan.mixing}
    assert dropped == {(True, False, True), (True, False, False)}
    whole = replace(config, drop_channel=0.0)
    assert all(plan.mixing[:, 2, 0].all() for plan in plans(whole, 10))


def test_channels_are_those_that_a_view_needs() -> None:
    config = ViewsConfig(global_mean_probability=(0.0, 0.0), local_mean_probability=0.0, num_local=0)
    for plan in plans(config, 20):
        assert set(plan.channels()) == {int(mixing.argmax()) for mixing in plan.mixing[:, 0]}


def test_brightness_has_the_configured_distribution() -> None:
    factors = np.concatenate([plan.factor.ravel() for plan in plans(ViewsConfig(), 200)])
    assert factors.min() >= 0.5
    assert factors.mean() == pytest.approx(1, abs=0.02)
    assert factors.std() == pytest.approx(0.2, abs=0.02)


def test_percentiles_of_a_data_set_become_0_and_the_brightness_of_a_view(shard_set: Path) -> None:
    manifest, batch = read_manifest(shard_set), next(iter(stream(shard_set, batch_size=1)))
    ranges = intensity_ranges([manifest])
    unscaled = [dict.fromkeys(ranges[0], (0.0, 1.0))]
    plan, same = (
        plan_views(batch.infos[0], batch.origins[0], ViewsConfig(), each, seed=0) for each in (ranges, unscaled)
    )
    for channel, name in enumerate(batch.infos[0].channels):
        percentiles = manifest.channels[name].percentiles
        assert ranges[0][name] == (percentiles["0.1"], percentiles["99.9"])
        for percentile, expected in (("0.1", np.zeros(10)), ("99.9", same.factor[:, channel])):
            scaled = percentiles[percentile] * plan.factor[:, channel] + plan.offset[:, channel]
            np.testing.assert_allclose(scaled, expected, atol=1e-4)


def test_a_constant_channel_has_a_range_above_0(shard_set: Path) -> None:
    manifest = read_manifest(shard_set)
    flat = replace(manifest.channels["DNA"], percentiles={"0.1": 7.0, "99.9": 7.0}, minimum=7.0, maximum=7.0)
    (ranges,) = intensity_ranges([replace(manifest, channels={"DNA": flat})])
    assert ranges == {"DNA": (7.0, 8.0)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_mean_probability": 1.5},
        {"global_area": (0.0, 1.0)},
        {"local_area": (0.5, 0.4)},
        {"aspect": (2.0, 1.0)},
        {"global_mean_probability": (1.0,)},
        {"num_local": -1},
        {"policy": "stack"},
        {"blur": -0.1},
        {"global_size": 0},
        {"brightness": -0.1},
        {"contrast": float("inf")},
        {"blur_sigma_px": (2.0, 0.1)},
        {"noise_sigma": (-0.2, -0.1)},
        {"channels": ("DNA", "DNA"), "policy": "stack"},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong)) if wrong != {'policy': 'stack'} else 'channels'}"):
        ViewsConfig(**wrong)


@pytest.mark.parametrize("targets", ["other", "mean"])
def test_targets_follow_the_views_and_change_none_of_them(targets: TargetChannels) -> None:
    config = ViewsConfig(blur=0.5, noise=0.5)
    for number in range(30):
        plain = plan_views(INFO, Origin(0, 0, number), config, UNIT_RANGES, seed=0)
        plan = plan_views(INFO, Origin(0, 0, number), config, UNIT_RANGES, seed=0, targets=targets)
        for name in (
            "boxes",
            "mixing",
            "factor",
            "offset",
            "contrast",
            "mirrored",
            "turned",
            "blur_sigma_px",
            "noise_sigma",
        ):
            found, target = getattr(plan, name), getattr(plain, name)
            assert found.dtype == target.dtype
            np.testing.assert_array_equal(found[:10], target, err_msg=name)
            assert len(found) == 12
        for name in ("boxes", "mirrored", "turned"):
            np.testing.assert_array_equal(getattr(plan, name)[10:], getattr(plain, name)[:2], err_msg=name)
        assert (plan.factor[10:] == 1).all()
        assert (plan.contrast[10:] == 1).all()
        assert not plan.blur_sigma_px[10:].any()
        assert not plan.noise_sigma[10:].any()


def test_targets_of_mean_are_the_mean_and_others_are_never_the_channel_that_is_shown() -> None:
    config = ViewsConfig(global_mean_probability=(0.0, 1.0))
    others = set()
    for number in range(200):
        origin = Origin(0, 0, number)
        mean = plan_views(INFO, origin, config, UNIT_RANGES, seed=0, targets="mean").mixing[10:, 0]
        np.testing.assert_array_equal(mean, np.full((2, 4), 0.25, np.float32))
        plan = plan_views(INFO, origin, config, UNIT_RANGES, seed=0, targets="other")
        shown, target = plan.mixing[0, 0].argmax(), plan.mixing[10, 0].argmax()
        assert shown != target
        others |= {(int(shown), int(target))}
        np.testing.assert_array_equal(np.sort(plan.mixing[11, 0]), [0, 0, 0, 1])  # of the mean: any channel
        assert set(plan.channels()) == {0, 1, 2, 3}
    assert len(others) == 12


def test_the_target_of_a_tile_with_one_channel_is_that_channel() -> None:
    info = replace(INFO, channels=("a",), crc32=(0,))
    plan = plan_views(info, Origin(0, 0, 1), ViewsConfig(), UNIT_RANGES, seed=0, targets="other")
    np.testing.assert_array_equal(plan.mixing, np.ones((12, 1, 1), np.float32))
