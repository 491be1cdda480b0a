"""The model of a fine-tuning run: network, moving average and optimizer, one step at a time, on one rank or several."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Examples
from dinocell.finetune.feature_cache import KeptFeatures
from dinocell.finetune.model import DINOCell, create_dinocell_model, replace_settings
from dinocell.finetune.preprocess import Target
from dinocell.runtime.device import uses_bfloat16
from dinocell.runtime.distributed import World, sum_over_ranks
from dinocell.runtime.optim import NonfiniteSteps, adamw, clip_gradients, parameter_groups, set_rates, update_ema


class Learner:
    """A segmenter that learns.

    Parameters
    ----------
    trained_on, pixel_size_um
        Of the training images, for the file.

    Attributes
    ----------
    model
        What the gradient moves.
    average
        Its moving average, which is validated and written; the model itself if the recipe wants none.
    dtype
        Of matrix products.
    kept
        What the frozen backbone said of numbered crops, once there is a place to keep it.
    """

    def __init__(
        self, config: FinetuneConfig, world: World, *, trained_on: tuple[str, ...], pixel_size_um: float | None
    ) -> None:
        self._optim, self._loss = config.optim, config.loss
        self._device, self._ranks = world.device, world.size
        self.dtype = torch.bfloat16 if uses_bfloat16(config.compute.dtype, world.device) else torch.float32
        torch.manual_seed(config.seed)
        self.model = _model(config).to(world.device)
        replace_settings(self.model, trained_on=trained_on, pixel_size_um=pixel_size_um, window_px=config.augment.crop)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.optim.ema else self.model
        self._parallel: nn.Module = self.model
        if world.size > 1:
            self._parallel = DistributedDataParallel(self.model)
        parts = {"backbone": self.model.backbone, "decoder": self.model.decoder}
        groups = parameter_groups(
            parts,
            depth=self.model.backbone.config.depth,
            layer_decay=config.optim.layer_decay,
            patch_embedding_factor=1.0,
        )
        self._parts = {name: part for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
        self._optimizer = adamw(groups, betas=config.optim.betas)
        self.nonfinite_steps = NonfiniteSteps(
            world.device,
            most=config.optim.max_nonfinite_steps,
            advice=f"Lower optim.learning_rate; {config.output / 'last.pt'} is the last good model",
        )
        self.kept: KeptFeatures | None = None

    def keep_features(self, folder: Path) -> None:
        """Compute the backbone's features of numbered crops once, and keep them below ``folder``."""
        self.kept = KeptFeatures(folder, self.dtype)

    def step(self, batch: Examples, rate: float, numbers: Sequence[int] | None = None) -> dict[str, Any]:
        """Learn from a batch, at a share of the learning rates, and return what is to be logged.

        ``numbers`` of the crops, one each, are what their features are kept by; None: nothing is kept of them.
        """
        optim = self._optim
        images, targets = (part.to(self._device, non_blocking=True) for part in batch)
        set_rates(
            self._optimizer,
            learning_rate=rate * optim.learning_rate,
            weight_decay=optim.weight_decay,
            backbone_factor=optim.backbone_learning_rate / optim.learning_rate,
        )
        self.model.train()
        maps = self._maps(self._parallel, images, numbers)
        loss = map_loss(maps, targets, self.model.target, **vars(self._loss))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = clip_gradients(self._parts, optim.clip)
        error = sum_over_ranks(loss.detach()) / self._ranks  # a rank sees its own crops: what is logged is of all
        self.nonfinite_steps.step(self._optimizer, [error, *norms.values()])
        if optim.ema:
            update_ema(self.average.parameters(), self.model.parameters(), optim.ema)
        metrics: dict[str, Any] = {"loss/train": error, "health/skipped_steps": self.nonfinite_steps.total}
        metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        metrics["schedule/learning_rate"] = rate * optim.learning_rate
        if not self.model.freeze_backbone:
            metrics["schedule/backbone_learning_rate"] = rate * optim.backbone_learning_rate
        return metrics

    @torch.no_grad()
    def predict(
        self, images: Float[Tensor, "b 1 h w"], numbers: Sequence[int] | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Return the averaged model's maps, on the device; ``numbers`` as in `step`."""
        return self._maps(self.average.eval(), images.to(self._device), numbers)

    def _maps(self, model: nn.Module, images: Tensor, numbers: Sequence[int] | None) -> Tensor:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            tokens = None
            if self.kept is not None and numbers is not None:
                tokens = self.kept.tokens(numbers, images, self.model.tokens)
            maps: Tensor = model(images, tokens)
        return maps.float()

    def write(self, path: Path, *, line: str, licences: list[str]) -> None:
        """Export the averaged weights; ``line`` and ``licences`` of the data go to what the backbone's card says."""
        own = self.average.card
        terms = "; ".join(dict.fromkeys(filter(None, [own.licence, *licences])))
        self.average.card = replace(own, derived_from=(*own.derived_from, line), licence=terms)
        self.average.save_pretrained(path)
        self.average.card = own

    def state(self) -> dict[str, Any]:
        """Return the tensors that the next step depends on, for a training state."""
        model, optimizer = get_state_dict(self.model, self._optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "bad": self.nonfinite_steps.state()}
        if self._optim.ema:
            state["average"] = self.average.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        set_state_dict(
            self.model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.nonfinite_steps.restore(state["bad"])
        if self._optim.ema:
            self.average.load_state_dict(state["average"])


def _model(config: FinetuneConfig) -> DINOCell:
    chosen = config.model
    if chosen.segmenter is not None:
        model = DINOCell.from_pretrained(chosen.segmenter)
        if model.target != config.target:
            raise ConfigError(f"target: {chosen.segmenter} is a segmenter by {model.target}, not {config.target}")
        model.set_frozen(chosen.freeze_backbone)
        return model
    return create_dinocell_model(
        chosen.size,
        freeze_backbone=chosen.freeze_backbone,
        pretrained=chosen.pretrained,
        backbone_weights=chosen.weights,
        patch_size=chosen.patch_size,
        blocks=chosen.blocks,
        target=config.target,
    )


# --- losses --------------------------------------------------------------------------------------------------------
#
# The losses of fine-tuning, functions of maps.

# Cellpose (Stringer et al. 2021, Methods) learns flows times 5 and halves their mean squared error, so that they weigh
# about as much as the cross entropy of the chance of a cell. Our flows keep their length: 0.5 * 5^2.
_FLOW_WEIGHT = 12.5


def map_loss(
    maps: Float[Tensor, "b k h w"],
    targets: Float[Tensor, "b k h w"],
    target: Target,
    *,
    foreground_weight: float = 0.0,
    gradient_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean squared error of distance maps, or 12.5 times that of flows plus a cross entropy.

    The cross entropy is that of the chance of a cell, the third map, with whether there is one.

    Parameters
    ----------
    foreground_weight
        Extra weight of pixels inside cells; the weights are divided by their mean. Distance maps only.
    gradient_weight
        Of the mean squared error of the differences between neighbouring pixels; distance maps only.
    """
    if target == "flows":
        flows = _FLOW_WEIGHT * F.mse_loss(maps[:, :2], targets[:, :2])
        return flows + F.binary_cross_entropy(maps[:, 2], targets[:, 2])
    squared = (maps - targets).square()
    if foreground_weight:
        weight = 1 + foreground_weight * (targets > 0)
        squared = squared * (weight / weight.mean())
    loss = squared.mean()
    if gradient_weight:
        differences = [torch.diff(maps - targets, dim=axis).square().mean() for axis in (-1, -2)]
        loss = loss + gradient_weight * torch.stack(differences).sum()
    return loss
