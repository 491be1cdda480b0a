"""The vision transformer of DINOv2, DINOv3 and Cell-DINO, for any number of channels and any patch size.

`VisionTransformer.forward` accepts one batch of images, or a list of batches of several resolutions (the global and
local crops of a training step).
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dinocell.models.config import VARIANTS, ViTConfig, WeightsCard, variant_config
from dinocell.models.layers import (
    Attention,
    AttentionKernel,
    Block,
    GeluMlp,
    LayerScale,
    PatchEmbedding,
    Segment,
    Subset,
    SwigluMlp,
    draw_kept_sequences,
    find_needed_rows,
    find_subsets,
    num_output_rows,
)
from dinocell.models.positions import (
    RotaryTable,
    TrainingNoise,
    kept_rotary_table,
    learned_positions,
    position_parameter,
    rotary_table,
)

__all__ = ["VARIANTS", "ViTConfig", "ViTOutput", "VisionTransformer", "variant_config"]


class ViTOutput(NamedTuple):
    """Normalised tokens of a batch.

    ``patches`` runs row by row over the image, or holds the selected patches, (m d), if a selection was given.
    """

    cls: Float[Tensor, "b d"]
    registers: Float[Tensor, "b r d"]
    patches: Float[Tensor, "*bp d"]


# Tokens of one pass on the CPU. Larger batches are split into chunks of about this size, whose temporaries stay below
# the size from which malloc returns memory to the system each time (benchmarks/vit_forward.py).
CPU_PIECE_TOKENS = 3200


class VisionTransformer(nn.Module):
    """A plain vision transformer.

    Parameters
    ----------
    config
        Sizes and conventions; one of `VARIANTS` or read from a checkpoint.
    noise
        Drop path and coordinate perturbation in training mode; none by default.
    kernel
        How attention is computed, see `dinocell.models.layers`. With ``sdpa`` each resolution is a pass of its
        own on the CPU; otherwise the rows of all resolutions share every linear layer.

    ``card`` describes the weights: input settings, provenance, licence. With ``one_pass``
    all inputs go through each block in one call on the CPU too, which sharding needs.

    Built under ``torch.device("meta")`` the parameters take no memory: follow with ``to_empty(device=...)`` and
    `init_weights`, or load a state dict with ``assign=True``.
    """

    def __init__(
        self, config: ViTConfig, *, noise: TrainingNoise | None = None, kernel: AttentionKernel = "sdpa"
    ) -> None:
        super().__init__()
        self.config = config
        self.noise = noise or TrainingNoise()
        self.kernel = kernel
        self.one_pass = False
        self.card = WeightsCard()
        width = config.width
        self.patch_embed = PatchEmbedding(config.patch_size, config.in_channels, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, width)) if config.registers else None
        self.pos_embed = position_parameter(config.learned, width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(self._block() for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.cls_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.cls_norm else None
        self.local_cls_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.local_cls_norm else None
        if not self.cls_token.is_meta:
            self.init_weights()

    def _block(self) -> Block:
        config = self.config
        attention = Attention(
            config.width, config.heads, qkv_bias=config.qkv_bias, key_bias=config.key_bias, kernel=self.kernel
        )
        mlp = (GeluMlp if config.mlp == "gelu" else SwigluMlp)(config.width, config.mlp_hidden)
        return Block(attention, mlp, config.width, layer_scale=config.layer_scale, norm_eps=config.norm_eps)

    @torch.no_grad()
    def init_weights(self, *, layer_scale: float = 1e-5, generator: torch.Generator | None = None) -> None:
        """Set every parameter to its initial value (that of DINOv2 and DINOv3).

        ==================================  =======================================================
        linear weights                      truncated normal, std 0.02, cut at +-2
        linear biases, norm biases          0
        norm weights                        1
        CLS, registers, learned positions   normal, std 0.02
        mask token                          0
        patch embedding                     uniform within 1 / sqrt(channels * patch ** 2), bias too
        LayerScale                          ``layer_scale``
        ==================================  =======================================================
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, layer_scale)
        bound = (self.config.in_channels * self.config.patch_size**2) ** -0.5
        for parameter in self.patch_embed.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        for token in (self.cls_token, self.register_tokens, self.pos_embed):
            if token is not None:
                nn.init.normal_(token, std=0.02, generator=generator)
        nn.init.zeros_(self.mask_token)

    @overload
    def forward(
        self,
        images: Tensor,
        masks: Tensor | None = None,
        *,
        select: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ViTOutput: ...

    @overload
    def forward(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None = None,
        *,
        select: Sequence[Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[ViTOutput]: ...

    def forward(
        self,
        images: Float[Tensor, "b c h w"] | Sequence[Float[Tensor, "_ c _ _"]],
        masks: Bool[Tensor, "b p"] | Sequence[Bool[Tensor, "_ _"] | None] | None = None,
        *,
        select: Int[Tensor, " m"] | Sequence[Int[Tensor, " _"] | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> ViTOutput | list[ViTOutput]:
        """Return the tokens of the last block, normalised.

        Parameters
        ----------
        images
            One batch, or a list of batches of several resolutions: global crops first, then local ones (for them a
            model with ``local_cls_norm`` uses that norm in training). Sizes are multiples of the patch size.
        masks
            Patches to replace by the mask token (iBOT), where True.
        select
            Patches to return, as ascending indices into the flattened (image, patch) grid, such as
            ``masks.flatten().nonzero()``; may be empty. The last block then computes CLS, registers and these only,
            and ``ViTOutput.patches`` is (m d). The values do not change.
        generator
            Source of the training noise; torch's global one by default.

        Raises
        ------
        ValueError
            For a wrong number of channels or an image size that the patch does not divide.
        """
        if isinstance(images, Tensor):
            return self._forward([images], [cast("Tensor | None", masks)], [cast("Tensor | None", select)], generator)[
                0
            ]
        nothing = [None] * len(images)
        return self._forward(list(images), list(masks or nothing), list(select or nothing), generator)

    def forward_blocks(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[ViTOutput]:
        """Return the tokens after the chosen blocks (counted from 0; negative ones from the end), in their order.

        ``norm`` applies the final norm to each, as DINOv2 and DINOv3 do for dense tasks and probes.
        """
        depth = self.config.depth
        wrong = [block for block in blocks if not -depth <= block < depth]
        if wrong:
            raise ValueError(f"blocks {wrong} do not exist: expected numbers from 0 to {depth - 1}, or -{depth} to -1")
        chosen = [block % depth for block in blocks]
        parts: list[list[ViTOutput]] = []
        for piece in self._pieces(images, None, None):
            rows, segments = self._rows([piece], self._tables([piece]))
            outputs: dict[int, ViTOutput] = {}
            for index, after in enumerate(self._run(rows, segments, None, stop=max(chosen) + 1)):
                if index in chosen:
                    outputs[index] = self._finish(after, segments, [None], norm=norm)[0]
            parts.append([outputs[index] for index in chosen])
        return [_join(outputs) for outputs in zip(*parts, strict=True)]

    def forward_maps(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int], *, norm: bool = True
    ) -> list[Float[Tensor, "b d rows columns"]]:
        """Return the patch tokens after the chosen blocks as maps with one value per patch and channel."""
        grid = self.grid(images)
        outputs = self.forward_blocks(images, blocks, norm=norm)
        return [out.patches.transpose(1, 2).unflatten(2, grid).contiguous() for out in outputs]

    def set_kernel(self, kernel: AttentionKernel) -> None:
        """Select the attention kernel, see `dinocell.models.layers`."""
        self.kernel = kernel
        for module in self.modules():
            if isinstance(module, Attention):
                module.kernel = kernel

    def cls_attention(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows columns"]:
        """Return the attention of the CLS token to every patch in the last block, per head; each sums to at most 1."""
        grid = self.grid(images)
        inputs = [_Input(images, None, None)]
        rows, segments = self._rows(inputs, self._tables(inputs))
        for after in self._run(rows, segments, None, stop=len(self.blocks) - 1):
            rows = after
        last = self.blocks[-1]
        assert isinstance(last, Block)
        weights: Tensor = last.attn.cls_weights(last.norm1(rows), segments[0])
        return torch.unflatten(weights[:, :, self.config.num_prefix :], 2, grid)

    def grid(self, images: Float[Tensor, "b c h w"]) -> tuple[int, int]:
        """Return the rows and columns of patches, after checking that the model can take the images."""
        _, channels, height, width = images.shape
        size = self.config.patch_size
        if channels != self.config.in_channels:
            raise ValueError(f"expected images of {self.config.in_channels} channel(s), got {channels}")
        if height < size or width < size or height % size or width % size:
            raise ValueError(f"expected an image size that patch {size} divides, got {height} x {width}")
        return height // size, width // size

    def _forward(
        self,
        images: list[Tensor],
        masks: list[Tensor | None],
        select: list[Tensor | None],
        generator: torch.Generator | None,
    ) -> list[ViTOutput]:
        inputs = [_Input(*triple) for triple in zip(images, masks, select, strict=True)]
        if self.one_pass or self.kernel != "sdpa" or images[0].device.type != "cpu":
            return self._pass(inputs, generator, local=[index > 0 for index in range(len(inputs))])
        outputs = []
        for index, part in enumerate(inputs):
            pieces = [self._pass([p], generator, local=[index > 0])[0] for p in self._pieces(*part)]
            outputs.append(_join(pieces))
        return outputs

    def _pieces(self, images: Tensor, masks: Tensor | None, select: Tensor | None) -> Iterator["_Input"]:
        """Split a large batch on the CPU into chunks, except with drop path, which draws from the whole batch."""
        rows, columns = self.grid(images)
        size = max(1, CPU_PIECE_TOKENS // (rows * columns + self.config.num_prefix))
        size = math.ceil(len(images) / math.ceil(len(images) / size))  # even chunks, because a small last one is slow
        whole = images.device.type != "cpu" or (self.training and self.noise.drop_path > 0)
        if whole or self.kernel != "sdpa" or len(images) <= size or torch.compiler.is_compiling():
            yield _Input(images, masks, select)
            return
        per_piece = size * rows * columns
        for index, some in enumerate(images.split(size)):
            first = index * per_piece
            needed = None
            if select is not None:
                ends = torch.searchsorted(select, torch.tensor([first, first + per_piece]))
                needed = select[ends[0] : ends[1]] - first
            yield _Input(some, None if masks is None else masks[index * size : (index + 1) * size], needed)

    def compile_pass(self) -> None:
        """Compile a pass, from pixels to normalised tokens, as one graph.

        With separate graphs the host would check the inputs of every block in every pass. Random draws are outside;
        shapes must be the same in every step.
        """
        self._through = torch.compile(self._through, dynamic=False)  # type: ignore[method-assign]

    def _pass(self, inputs: list["_Input"], generator: torch.Generator | None, local: list[bool]) -> list[ViTOutput]:
        """Run all blocks over the rows of all inputs."""
        tables = self._tables(inputs, generator)
        kept = None
        if self.training and self.noise.drop_path > 0:
            batches = [len(part.images) for part in inputs]
            kept = draw_kept_sequences(
                batches, self.config.depth, self.noise.drop_path, device=inputs[0].images.device, generator=generator
            )
        return self._through(inputs, tables, kept, local)

    def _through(
        self,
        inputs: list["_Input"],
        tables: list[RotaryTable | None],
        kept: list[Tensor] | None,
        local: list[bool],
    ) -> list[ViTOutput]:
        """Return the tokens of all inputs, after all random numbers have been drawn."""
        rows, segments = self._rows(inputs, tables)
        select = [part.select for part in inputs]
        dropped = None if kept is None else find_subsets(segments, kept)
        for after in self._run(rows, segments, dropped, select=select):
            rows = after
        return self._finish(rows, segments, select, norm=True, local=local)

    def _rows(
        self, inputs: list["_Input"], tables: list[RotaryTable | None]
    ) -> tuple[Float[Tensor, "n d"], list[Segment]]:
        """Embed patches, mask them, add CLS, registers and positions."""
        rows, segments = [], []
        for (images, masks, _), table in zip(inputs, tables, strict=True):
            patches = self.patch_embed(images)
            if masks is not None:
                patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
            cls: Tensor = self.cls_token
            if self.pos_embed is not None:
                positions = learned_positions(self.pos_embed, self.grid(images), self.config.learned)
                cls, patches = cls + positions[:, :1], patches + positions[:, 1:]
            prefix = [cls] if self.register_tokens is None else [cls, self.register_tokens]
            tokens = torch.cat([*(t.to(patches.dtype).expand(len(images), -1, -1) for t in prefix), patches], dim=1)
            rows.append(tokens.flatten(0, 1))
            segments.append(Segment(len(images), tokens.shape[1], table))
        return rows[0] if len(rows) == 1 else torch.cat(rows), segments

    def _tables(self, inputs: list["_Input"], generator: torch.Generator | None = None) -> list[RotaryTable | None]:
        """Return the rotary table of each input, computed or cached."""
        if self.config.positions != "rope":
            return [None] * len(inputs)
        noise = self.noise if self.training and self.noise.moves_positions else None
        # A table from inference mode cannot be used in training, and a cached one not in a compiled graph.
        keep = not torch.compiler.is_compiling() and noise is None and not torch.is_inference_mode_enabled()
        sizes = (self.config.num_prefix, self.config.width // self.config.heads, self.config.rope)
        tables: list[RotaryTable | None] = []
        for images, _, _ in inputs:
            grid, device = self.grid(images), images.device
            if keep:
                tables.append(kept_rotary_table(grid, *sizes, device))
            else:
                tables.append(rotary_table(grid, *sizes, noise=noise, generator=generator, device=device))
        return tables

    def _run(
        self,
        rows: Float[Tensor, "n d"],
        segments: list[Segment],
        kept: list[tuple[Subset, Subset]] | None,
        *,
        select: Sequence[Tensor | None] = (),
        stop: int | None = None,
    ) -> Iterator[Float[Tensor, "m d"]]:
        """Yield the residual stream after each block; the last one computes only the rows that ``select`` needs."""
        last = len(self.blocks) - 1
        prune = any(chosen is not None for chosen in select)
        for index, block in enumerate(self.blocks[:stop]):
            needed = None
            if prune and index == last:
                segments, needed = find_needed_rows(segments, select, self.config.num_prefix, rows.device)
            rows = block(rows, segments, None if kept is None else kept[index], needed)
            yield rows

    def _finish(
        self,
        rows: Float[Tensor, "m d"],
        segments: list[Segment],
        select: Sequence[Tensor | None],
        *,
        norm: bool,
        local: Sequence[bool] = (False,),
    ) -> list[ViTOutput]:
        """Split the rows by segment and normalise them."""
        outputs = []
        num_prefix = self.config.num_prefix
        sizes = [num_output_rows(s, chosen, num_prefix) for s, chosen in zip(segments, select, strict=True)]
        for part, segment, chosen, is_local in zip(rows.split(sizes), segments, select, local, strict=True):
            num_patches = segment.tokens - num_prefix if chosen is None else 0
            num_rows = segment.batch * (num_prefix + num_patches)
            tokens, chosen_patches = part.split((num_rows, len(part) - num_rows))
            tokens = tokens.unflatten(0, (segment.batch, num_prefix + num_patches))
            prefix_norm = self._prefix_norm(is_local)
            if norm and prefix_norm is self.norm:
                tokens, chosen_patches = self.norm(tokens), self.norm(chosen_patches)
            before, patches = tokens.split((num_prefix, num_patches), dim=1)
            if norm and prefix_norm is not self.norm:
                before, patches, chosen_patches = prefix_norm(before), self.norm(patches), self.norm(chosen_patches)
            cls, registers = before.split((1, self.config.registers), dim=1)
            output = ViTOutput(cls.squeeze(1), registers, patches if chosen is None else chosen_patches)
            # FSDP2 hooks into the outputs, which is not safe for views.
            outputs.append(ViTOutput(*(part.clone() for part in output)) if self.one_pass else output)
        return outputs

    def _prefix_norm(self, is_local: bool) -> nn.LayerNorm:
        """Return the norm of CLS and registers, which DINOv3 may untie, for local crops in training only."""
        if is_local and self.training and self.local_cls_norm is not None:
            return self.local_cls_norm
        return self.norm if self.cls_norm is None else self.cls_norm


class _Input(NamedTuple):
    images: Tensor
    masks: Tensor | None
    select: Tensor | None


def _join(outputs: Sequence[ViTOutput]) -> ViTOutput:
    return outputs[0] if len(outputs) == 1 else ViTOutput(*(torch.cat(parts) for parts in zip(*outputs, strict=True)))
