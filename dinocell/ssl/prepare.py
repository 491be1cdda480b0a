"""What a pretraining run starts from: shards, a student and a teacher on this rank, and what can be said about them."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dinocell.data_shards.read import SampleStream, stream
from dinocell.errors import ConfigError
from dinocell.models.config import forward_flop, head_flop
from dinocell.models.layers import Block
from dinocell.models.positions import TrainingNoise
from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import load_backbone
from dinocell.runtime.device import uses_bfloat16
from dinocell.runtime.distributed import World
from dinocell.runtime.optim import scaled_learning_rate
from dinocell.runtime.sharding import choose_parallel, make_mesh, shard
from dinocell.ssl.config import PretrainConfig, Recompute
from dinocell.ssl.masking import DrawMasks
from dinocell.ssl.memory import describe_memory, step_memory
from dinocell.ssl.student_teacher import StudentTeacher
from dinocell.ssl.view_plan import PlanViews, ViewsConfig

# What torch's compiler says of itself: a switch that is off on purpose, and a function that it should not call itself.
_OF_THE_COMPILER = ("TensorFloat32 tensor cores", "`torch._prims_common.check` is deprecated")


def open_shards(config: PretrainConfig, world: World, *, position: int = 0) -> SampleStream:
    """Open the training shards as this rank's stream; a batch is what a rank takes at a time.

    Raises
    ------
    DinocellError
        If a set is missing or damaged, lacks the channels that the views need, or the ranks do not divide the batch.
    """
    data = config.data
    parts = world.size * config.optim.accumulate
    if config.batch_size % parts:
        raise ConfigError(
            f"batch_size: {config.batch_size} is not divided by {world.size} processes times "
            f"{config.optim.accumulate} accumulated parts"
        )
    samples = stream(
        data.shards,
        batch_size=config.batch_size // parts,
        position=position,
        weights=data.weights,
        seed=config.seed,
        stop=config.steps * config.batch_size,
        rank=world.rank,
        world_size=world.size,
        block_shards=data.block_shards,
        choose=PlanViews(config.views, config.seed),
        draw=masks_of(config),
        cache=data.cache,
        cache_gb=data.cache_gb,
    )
    for each in samples.sets:
        _check_channels(config.views, each.location, tuple(each.manifest.channels))
        _check_tiles(config.views, each.location, each.manifest.shapes)
    return samples


def masks_of(config: PretrainConfig) -> DrawMasks:
    """Return what draws the masks of the recipe's global crops."""
    side = config.views.global_size // config.model.patch_size
    return DrawMasks(config.masking, (side, side), config.views.num_global, config.seed)


def _check_channels(views: ViewsConfig, location: str, names: tuple[str, ...]) -> None:
    if views.policy == "stack" and not set(views.channels) & set(names):
        raise ConfigError(
            f"views.channels: {location} has none of {', '.join(views.channels)}; it has {', '.join(names)}"
        )
    if views.policy in ("consistency", "bag") and len(names) < 2:
        raise ConfigError(
            f"views.policy: {views.policy} needs at least two channels, {location} has {', '.join(names)}; "
            "use views.policy=average"
        )


def _check_tiles(views: ViewsConfig, location: str, shapes: Mapping[str, int]) -> None:
    """Refuse a set none of whose tiles is as large as a crop: every view would be made up by enlarging."""
    sides = [min(map(int, shape.rsplit(maxsplit=1)[0].split(" x ")[1:])) for shape in shapes]
    for name, size in (("global_size", views.global_size), ("local_size", views.local_size)):
        if sides and max(sides) < size and (name == "global_size" or views.num_local):
            raise ConfigError(
                f"views.{name}: a crop has {size} px, and the tiles of {location} have at most {max(sides)}; "
                f"lower views.{name}, or build the set with larger tiles"
            )


def recompute(student: VisionTransformer, what: Recompute) -> None:
    """Let the backward pass of the student compute some of the forward pass again, see `ComputeConfig`."""
    for index, block in enumerate(student.blocks):
        assert isinstance(block, Block)
        block.recompute_activations = what == "activations"
        if what == "blocks":
            student.blocks[index] = checkpoint_wrapper(block)


def build_model(config: PretrainConfig, world: World) -> StudentTeacher:
    """Return student and teacher on this rank's device, spread over the ranks if there are several.

    Every rank builds the same model in main memory first, so random weights do not depend on the number of ranks.

    Raises
    ------
    DinocellError
        If weights cannot be read or do not fit, or the attention kernel is not installed or does not run on the
        device.
    """
    compute = config.compute
    if compute.attention == "varlen" and not (
        world.device.type == "cuda" and uses_bfloat16(compute.dtype, world.device)
    ):
        raise ConfigError(
            f"compute.attention: varlen needs CUDA and bfloat16, got {world.device.type} and compute.dtype="
            f"{compute.dtype}; use sdpa"
        )
    if compute.attention == "xformers" and find_spec("xformers") is None:
        raise ConfigError("compute.attention: xformers is not installed here; install it, or use varlen or sdpa")
    torch.manual_seed(config.seed)
    gram = config.gram if config.uses_gram else None
    keep_logits = compute.recompute != "blocks"
    model = StudentTeacher(
        _backbone(config), config.heads, config.losses, gram, keep_logits=keep_logits, compiled=compute.compile == "all"
    ).train()
    backbones = [backbone_of(side) for side in (model.student, model.teacher, model.gram) if "backbone" in side]
    for backbone in backbones:
        backbone.set_kernel(compute.attention)
    recompute(backbone_of(model.student), compute.recompute)
    if compute.compile != "nothing":
        for said in _OF_THE_COMPILER:
            warnings.filterwarnings("ignore", message=said, module=r"torch\._inductor\.")
        for backbone in backbones:
            # Ranks gather parameters block by block, and their masks may differ in number from step to step.
            if compute.compile == "all" and world.size == 1 and compute.recompute != "blocks":
                backbone.compile_pass()
                continue
            for block in backbone.blocks:
                # Shapes are the same in every step; dynamic ones would make slower code when the teacher's differ.
                block.compile(dynamic=False)
    if world.size > 1:
        _spread(config, model, world)
    return model.to(world.device)


def _spread(config: PretrainConfig, model: StudentTeacher, world: World) -> None:
    parallel = choose_parallel(config.compute.parallel, sum(each.numel() for each in model.student.parameters()), world)
    mesh = make_mesh(parallel, world)
    dtype = torch.bfloat16 if uses_bfloat16(config.compute.dtype, world.device) else None
    for side in (model.student, model.teacher, model.gram):
        for name, module in side.items():
            if name == "backbone":
                backbone = cast("VisionTransformer", module)
                backbone.one_pass = True
                shard(backbone, mesh, blocks=list(backbone.blocks), dtype=dtype)
            else:
                # Its prototypes are used after it has run.
                shard(module, mesh, dtype=dtype, keep_gathered=True)


def backbone_of(side: nn.ModuleDict) -> VisionTransformer:
    """Return the backbone of the student, the teacher or the Gram teacher."""
    backbone = side["backbone"]
    assert isinstance(backbone, VisionTransformer)
    return backbone


def _backbone(config: PretrainConfig) -> VisionTransformer:
    model, channels = config.model, config.views.in_channels
    noise = TrainingNoise(drop_path=model.drop_path)
    if model.weights is not None:
        vit = load_backbone(
            model.weights,
            patch_size=model.patch_size,
            in_channels=channels,
            input="standardised",
            variant=model.variant,
            noise=noise,
        )
    else:
        vit = VisionTransformer(
            variant_config(model.variant, patch_size=model.patch_size, in_channels=channels), noise=noise
        )
        vit.init_weights(layer_scale=model.layer_scale)
    settings = replace(
        vit.card.input,
        convention="standardised",
        channel_policy=config.views.policy,
        channel_names=config.views.channels,
        percentiles=(float(config.views.black), float(config.views.white)),
    )
    vit.card = replace(vit.card, input=settings)
    return vit


def flop_per_image(config: PretrainConfig, model: StudentTeacher) -> float:
    """Return the operations of one image's share of a step: teacher forward, student forward and backward (twice that).

    The plain step's: what drop path and the pruned last block save, and what recomputation adds, does not count.
    """
    vit, heads, views = backbone_of(model.student).config, config.heads, config.views
    of_global, of_local = (forward_flop(vit, size) for size in (views.global_size, views.local_size))
    head = head_flop(vit.width, heads.hidden, heads.bottleneck, heads.layers, heads.num_prototypes)
    masking = config.masking
    share = masking.image_share * (masking.min_patch_share + masking.max_patch_share) / 2
    masked = share * views.num_global * (views.global_size // vit.patch_size) ** 2
    teacher = views.num_global * (of_global + head) + masked * head
    student = views.num_global * of_global + views.num_local * of_local + (views.num_views + masked) * head
    gram = views.num_global * of_global if config.uses_gram else 0.0
    return teacher + 3 * student + gram


def describe_run(config: PretrainConfig, samples: SampleStream, model: StudentTeacher, world: World) -> list[str]:
    """Return lines that say what will be trained on what."""
    rate = scaled_learning_rate(config.schedules.learning_rate.peak, config.batch_size, rule=config.optim.rule)
    parameters = {name: sum(p.numel() for p in module.parameters()) / 1e6 for name, module in model.student.items()}
    sizes = ", ".join(f"{name} {size:.1f} M" for name, size in parameters.items())
    epochs = config.steps * config.batch_size / samples.num_samples
    lines = [
        f"student: {sizes}; from {config.model.weights or 'random weights'}",
        f"{samples.num_samples:,} tiles, {config.steps:,} steps of {config.batch_size}: {epochs:.1f} epochs; "
        f"policy {config.views.policy}; learning rate {rate:.3g} at the peak",
        f"{flop_per_image(config, model) / 1e9:.0f} GFLOP an image",
        f"a step takes about {describe_memory(step_memory(config, world))} in each process",
    ]
    known = {name for each in samples.sets for name in each.manifest.channels}
    blank = [name for name in config.views.channels if name not in known]
    if config.views.policy == "stack" and blank:
        lines.append(f"views.channels: no set has {', '.join(blank)}, which the model sees blank in every view")
    if config.optim.accumulate > 1:
        lines.append(f"{config.optim.accumulate} parts a step: targets and KoLeo see one part at a time")
    if world.size > 1:
        total = round(1e6 * sum(parameters.values()))
        lines.append(f"{world.size} processes, {choose_parallel(config.compute.parallel, total, world)}")
    return lines
