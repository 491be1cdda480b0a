"""A pretraining recipe with an impossible number is refused when it is read; former keys are accepted."""

from pathlib import Path

import pytest

from dinocell.configs.load import load_config
from dinocell.errors import ConfigError
from dinocell.ssl.config import PretrainConfig

NEEDED = ("output=run", "data.shards=[set]")


@pytest.mark.parametrize(
    "wrong",
    [
        *("seed=-1", "seed=4294967296", "steps=0", "batch_size=0", "log_every=0", "keep_checkpoint_every=-1"),
        *("data.block_shards=0", "data.weights=[1,0]", "data.weights=[.nan]", "data.cache_gb=0", "data.cache_gb=.nan"),
        *("model.patch_size=0", "model.drop_path=1.0", "model.drop_path=-0.1", "model.layer_scale=.nan"),
        *("heads.num_prototypes=0", "heads.hidden=0", "heads.bottleneck=0", "heads.layers=0"),
        *("losses.student_temperature=0", "losses.student_temperature=.nan", "losses.sinkhorn_iterations=0"),
        *("losses.dino_weight=-1", "losses.reconstruction.weight=-1", "losses.reconstruction.hidden_dim=0"),
        *("losses.ibot_weight=.nan", "losses.koleo_weight=-1", "losses.centre_momentum=2"),
        *("optim.betas=[1.5,0.9]", "optim.betas=[0.9,1.0]", "optim.layer_decay=-1", "optim.clip=0", "optim.clip=.nan"),
        *("optim.patch_embedding_factor=-1", "optim.head_weight_decay_factor=.inf", "optim.max_nonfinite_steps=0"),
        *("compute.workers=-1", "compute.timeout_s=0", "gram.refresh_every=0", "gram.max_refreshes=-1"),
        *(
            "online_eval.every=-1",
            "online_eval.tiles=1",
            "online_eval.neighbours=0",
            "online_eval.patch_labelled=0",
            "optim.accumulate=0",
        ),
    ],
)
def test_an_impossible_number_is_refused_by_its_key(wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"{wrong.split('=')[0].split('.')[-1]}: expected .*, got") as caught:
        load_config(PretrainConfig, overrides=[*NEEDED, wrong])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bound", ["seed=4294967295", "optim.clip=.inf", "optim.layer_decay=0", "model.drop_path=0"])
def test_bounds_are_accepted(bound: str) -> None:
    load_config(PretrainConfig, overrides=[*NEEDED, bound])


def test_former_keys_are_accepted_and_removed_ones_only_with_their_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "watch: {every: 7}\npicture_every: 8\nviews: {black: '0.1', white: '99.9'}\ngram: {negatives: keep}\n"
    )
    config = load_config(PretrainConfig, recipe, NEEDED)
    assert (config.online_eval.every, config.image_every) == (7, 8)
    assert load_config(PretrainConfig, None, [*NEEDED, "picture_every=9"]).image_every == 9
    for removed in ("views: {black: '1'}", "gram: {negatives: drop}"):
        recipe.write_text(removed)
        with pytest.raises(ConfigError, match=r"recipe.yaml.*(views\.black|gram\.negatives)"):
            load_config(PretrainConfig, recipe, NEEDED)


def test_crops_of_all_channels_have_no_other_channels_to_reconstruct() -> None:
    stack = [*NEEDED, "views.policy=stack", "views.channels=[DNA]", "losses.reconstruction.target=other"]
    load_config(PretrainConfig, overrides=stack)  # its weight is 0
    with pytest.raises(ConfigError, match=r"losses.reconstruction.target: expected same with views.policy=stack"):
        load_config(PretrainConfig, overrides=[*stack, "losses.reconstruction.weight=1"])


def test_the_patch_probe_needs_a_model_of_one_channel() -> None:
    probe = [*NEEDED, "online_eval.patch_set=datasets/mine", "views.policy=stack"]
    load_config(PretrainConfig, overrides=[*probe, "views.channels=[DNA]"])
    with pytest.raises(ConfigError, match=r"online_eval.patch_set: expected null for a model of 2 channels"):
        load_config(PretrainConfig, overrides=[*probe, "views.channels=[DNA,ER]"])
