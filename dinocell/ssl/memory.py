"""What memory a step takes, by the formula, before anything is allocated; and what would fit if it is too much.

The formula follows what the backward pass keeps, layer by layer; tests/test_ssl_memory.py holds it against what a step
really takes, and benchmarks/results/pretrain_step_cpu.md has the peaks of whole processes beside it.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from dinocell.errors import ConfigError
from dinocell.models.config import ViTConfig
from dinocell.models.vit import CPU_PIECE_TOKENS, VisionTransformer, variant_config
from dinocell.runtime.device import available_bytes, uses_bfloat16
from dinocell.runtime.distributed import World, max_over_ranks
from dinocell.runtime.sharding import choose_parallel, num_shards
from dinocell.ssl.chunks import pieces
from dinocell.ssl.config import HeadsConfig, PretrainConfig, Recompute
from dinocell.ssl.heads import ProjectionHead

# The estimate is good to a tenth or so; only what is clearly too much is refused.
_MARGIN = 1.2
_FEWEST_PROTOTYPES = 1024


class StepMemory(NamedTuple):
    """Bytes of one process at the peak of a step, besides what the process takes anyway.

    ``state`` are weights, gradients, moments and teachers; ``activations`` what the backward pass of the student needs;
    ``logits`` the teacher's, the targets, and the gradients of the prototypes; ``working`` the largest temporaries.
    """

    state: int
    activations: int
    logits: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def check_memory(config: PretrainConfig, world: World) -> None:
    """Refuse a run whose step is clearly larger than what its device has left; all ranks together.

    Raises
    ------
    ConfigError
        Says what would fit.
    """
    available = available_bytes(world.device)
    share = torch.inf if available is None else float(available)
    if world.device.type == "cpu":
        share /= world.local_size
    share = -float(max_over_ranks(torch.tensor(-share, dtype=torch.float64, device=world.device)))
    need = step_memory(config, world)
    if need.total <= _MARGIN * share:
        return
    fitting = "; ".join(_fitting(config, world, share)) or (
        "nothing but a smaller model.variant or smaller views, whatever batch_size, compute.recompute and "
        "heads.num_prototypes are"
    )
    raise ConfigError(
        f"compute.device: a step takes about {describe_memory(need)}, and {world.device} has {gigabytes(share)} left "
        f"for each process; what would fit: {fitting}"
    )


def describe_memory(memory: StepMemory) -> str:
    """Return the sum and its parts in words."""
    return (
        f"{gigabytes(memory.total)} ({gigabytes(memory.state)} weights and moments, {gigabytes(memory.activations)} "
        f"activations, {gigabytes(memory.logits)} logits, {gigabytes(memory.working)} temporaries)"
    )


def gigabytes(count: int | float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def step_memory(config: PretrainConfig, world: World) -> StepMemory:
    """Estimate what a step takes on one rank."""
    model, views, heads = config.model, config.views, config.heads
    vit = variant_config(model.variant, patch_size=model.patch_size, in_channels=views.in_channels)
    on_cpu = world.device.type == "cpu"
    half = uses_bfloat16(config.compute.dtype, world.device)
    size = 2 if half else 4
    part = config.batch_size / (world.size * config.optim.accumulate)

    backbone, head = _parameters(vit, heads)
    student = backbone + (1 if heads.shared else 2) * head
    shards = num_shards(choose_parallel(config.compute.parallel, student, world), world) if world.size > 1 else 1
    # At the peak, before the first block is differentiated, the backbone has no gradient unless of an earlier part.
    of_backbone = (0 if config.optim.accumulate == 1 else 1) + (1 if config.uses_gram else 0)
    state = 4 * (5 * student + (of_backbone - 1) * backbone) / shards
    copies = 2 * student if half else 0  # autocast keeps the weights of products in bfloat16 until the backward pass

    rows = _Rows.of(config, vit, part)
    activations = copies + rows.kept(vit, config.compute.recompute, size, keeps_float=half and not on_cpu)
    activations += rows.scaled_weights(vit, config.compute.recompute, on_cpu) * size
    pixels = views.num_global * views.global_size**2 + views.num_local * views.local_size**2
    activations += 2 * 4 * part * views.in_channels * pixels  # the crops, and cut into patches
    through_heads = part * views.num_views + rows.masked
    activations += through_heads * size * (vit.width + 2 * (heads.layers - 1) * heads.hidden + 3 * heads.bottleneck)
    if config.uses_gram:
        activations += 4 * 4 * part * views.num_global * ((views.global_size // vit.patch_size) ** 2) ** 2

    of_teacher = part * views.num_global + rows.masked
    kept_logits = 0 if config.compute.recompute == "blocks" else of_teacher * heads.num_prototypes * size
    dino_targets = (3 * views.num_global + 1) * part * heads.num_prototypes * 4
    logits = kept_logits + dino_targets + 2 * 4 * heads.num_prototypes * heads.bottleneck
    longest = next(pieces(max(1, round(rows.masked)), heads.num_prototypes, world.device), slice(0, 0)).stop
    scratch = (5 if half else 3) * 4 * longest * heads.num_prototypes
    working = max(scratch, rows.backward(vit, config, size, on_cpu))
    return StepMemory(*(round(each) for each in (state, activations, logits, working)))


class _Rows(NamedTuple):
    """Tokens of a rank's part: of all global and all local crops, of one each, and those that the last block wants."""

    of_globals: float
    of_locals: float
    per_global: int
    per_local: int
    wanted: float
    masked: float
    drop_path: float

    @classmethod
    def of(cls, config: PretrainConfig, vit: ViTConfig, part: float) -> "_Rows":
        views, masking = config.views, config.masking
        patches = (views.global_size // vit.patch_size) ** 2
        per_global = patches + vit.num_prefix
        per_local = (views.local_size // vit.patch_size) ** 2 + vit.num_prefix
        share = masking.image_share * (masking.min_patch_share + masking.max_patch_share) / 2
        # The counts are the upper edges of their bins: a little more than the mean share.
        num_masked = max(1.0, masking.image_share * views.num_global * part)
        share += masking.image_share * (masking.max_patch_share - masking.min_patch_share) / (2 * num_masked)
        masked = share * views.num_global * part * patches
        of_globals, of_locals = part * views.num_global * per_global, part * views.num_local * per_local
        wanted = part * views.num_views * vit.num_prefix + masked
        if config.uses_gram:
            wanted = of_globals + of_locals
        return cls(of_globals, of_locals, per_global, per_local, wanted, masked, config.model.drop_path)

    def kept(self, vit: ViTConfig, recompute: str, size: int, *, keeps_float: bool) -> float:
        """Return the bytes of activations that all blocks keep for the backward pass."""
        width, everything = vit.width, self.of_globals + self.of_locals
        if recompute == "blocks":
            return vit.depth * everything * width * size
        attention, mlp = _row_bytes(vit, size, recompute, keeps_float=keeps_float)
        # Queries, keys and values of all tokens, with the norm before them; the last block needs no more of most.
        attention_all = attention - width * size
        taken = 1 - self.drop_path
        whole = (vit.depth - 1) * everything * (attention + mlp) * taken
        return whole + everything * attention_all * taken + self.wanted * (width * size + mlp)

    def scaled_weights(self, vit: ViTConfig, recompute: str, on_cpu: bool) -> int:
        """Return the elements of the layers' weights times LayerScale, which each pass makes and keeps for itself."""
        of_attention, of_mlp = vit.width**2, vit.width * vit.mlp_hidden
        each = {"nothing": of_attention + of_mlp, "activations": of_attention, "blocks": 0}[recompute]
        return self._passes(on_cpu) * vit.depth * each

    def backward(self, vit: ViTConfig, config: PretrainConfig, size: int, on_cpu: bool) -> float:
        """Return the bytes of temporaries while one block of one pass is differentiated."""
        recompute = config.compute.recompute
        gradients = (2 if recompute == "activations" else 1) * vit.mlp_hidden + 2 * vit.width
        again = sum(_row_bytes(vit, size, "nothing", keeps_float=size == 2)) if recompute == "blocks" else 0
        if not on_cpu:
            rows = self.of_globals + self.of_locals
        elif self.drop_path > 0:
            rows = max(self.of_globals, self.of_locals)
        else:
            rows = min(max(self.of_globals, self.of_locals), max(CPU_PIECE_TOKENS, self.per_global))
        return float(rows * (gradients * size + again))

    def _passes(self, on_cpu: bool) -> int:
        if not on_cpu:
            return 1
        total = 0
        for rows, each in ((self.of_globals, self.per_global), (self.of_locals, self.per_local)):
            crops = round(rows / each)
            in_a_pass = crops if self.drop_path > 0 else max(1, CPU_PIECE_TOKENS // each)
            total += -(-crops // in_a_pass) if crops else 0
        return total


def _row_bytes(vit: ViTConfig, size: int, recompute: str, *, keeps_float: bool) -> tuple[int, int]:
    """Return the bytes a token that a block's attention and MLP keep.

    Attention: norm input, norm output, queries, keys and values, what they mix. MLP: norm input, norm output, what goes
    into the activation and what comes out; two and two of a gated one. Recomputed: inputs and products alone.
    """
    width, gates = vit.width * size, (2 if vit.mlp == "swiglu" else 1) * vit.mlp_hidden * size
    if recompute == "activations":
        norm_of_gated = width if vit.mlp == "swiglu" else 0
        return 5 * width, width + norm_of_gated + gates
    norm_input = 4 * vit.width if keeps_float else width  # autocast normalises in float32 on CUDA
    return norm_input + 5 * width, norm_input + width + 2 * gates


@lru_cache(maxsize=16)
def _parameters(vit: ViTConfig, heads: HeadsConfig) -> tuple[int, int]:
    """Return the numbers of parameters of a backbone and of a head."""
    with torch.device("meta"):
        backbone = VisionTransformer(vit)
        head = ProjectionHead(
            vit.width,
            heads.num_prototypes,
            hidden=heads.hidden,
            bottleneck=heads.bottleneck,
            layers=heads.layers,
            weight_norm=heads.weight_norm,
        )
    count, of_head = (sum(p.numel() for p in module.parameters()) for module in (backbone, head))
    return count, of_head


def _fitting(config: PretrainConfig, world: World, available: float) -> Iterator[str]:
    """Yield settings with which a step would fit: one changed at a time, or, if none will do, several together."""

    def fits(changed: PretrainConfig) -> bool:
        return step_memory(changed, world).total <= available

    alone = [
        next((text for text, changed in change(config, world) if fits(changed)), None)
        for change in (_accumulated, _recomputed, _smaller, _fewer)
    ]
    if any(alone):
        yield from filter(None, alone)
        return
    texts: list[str] = []
    for change in (_recomputed, _accumulated, _fewer):
        options = [] if fits(config) else list(change(config, world))
        if options:
            text, config = next((each for each in options if fits(each[1])), options[-1])
            texts.append(text)
    if fits(config):
        yield " together with ".join(texts)


# Each yields what to set and the recipe with it, the least change first.


def _accumulated(config: PretrainConfig, world: World) -> Iterator[tuple[str, PretrainConfig]]:
    parts = config.batch_size // world.size
    for count in range(config.optim.accumulate + 1, parts + 1):
        if parts % count == 0:
            yield f"optim.accumulate={count}", replace(config, optim=replace(config.optim, accumulate=count))


def _recomputed(config: PretrainConfig, _world: World) -> Iterator[tuple[str, PretrainConfig]]:
    order: tuple[Recompute, ...] = ("nothing", "activations", "blocks")
    for what in order[order.index(config.compute.recompute) + 1 :]:
        yield f"compute.recompute={what}", replace(config, compute=replace(config.compute, recompute=what))


def _smaller(config: PretrainConfig, world: World) -> Iterator[tuple[str, PretrainConfig]]:
    parts = world.size * config.optim.accumulate
    for each in range(config.batch_size // parts - 1, 0, -1):
        yield f"batch_size={each * parts}", replace(config, batch_size=each * parts)


def _fewer(config: PretrainConfig, _world: World) -> Iterator[tuple[str, PretrainConfig]]:
    count = config.heads.num_prototypes // 2
    while count >= _FEWEST_PROTOTYPES:
        yield f"heads.num_prototypes={count}", replace(config, heads=replace(config.heads, num_prototypes=count))
        count //= 2
