"""A segmenter in training: network, loss, optimizer and moving average, on one rank or several."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from dinocell.errors import ConfigError
from dinocell.finetune.config import FinetuneConfig
from dinocell.finetune.data import Batch, validation_batches
from dinocell.finetune.model import DINOCell, create_dinocell_model, replace_settings
from dinocell.finetune.targets import TARGETS
from dinocell.labelled.dataset import LabelledImage
from dinocell.runtime.device import uses_bfloat16
from dinocell.runtime.distributed import World, sum_over_ranks
from dinocell.runtime.optim import NonfiniteSteps, adamw, clip_gradients, parameter_groups, set_rates, update_ema


class Learner:
    """A segmenter in training.

    Parameters
    ----------
    trained_on, pixel_size_um
        Names of the training sets, and the pixel size of their images; written to the segmenter's file.

    Attributes
    ----------
    model
        The model that the optimizer updates.
    average
        Its moving average, which is validated and exported; the model itself without one.
    """

    def __init__(
        self, config: FinetuneConfig, world: World, *, trained_on: tuple[str, ...], pixel_size_um: float | None
    ) -> None:
        self._optim, self._loss_options, self._world = config.optim, vars(config.loss), world
        self._uses_bfloat16 = uses_bfloat16(config.compute.dtype, world.device)
        torch.manual_seed(config.seed)
        self.model = _make_model(config).to(world.device)
        replace_settings(self.model, trained_on=trained_on, pixel_size_um=pixel_size_um, window_px=config.augment.crop)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.optim.ema else self.model
        self._parallel: nn.Module = DistributedDataParallel(self.model) if world.size > 1 else self.model
        parts = {"backbone": self.model.backbone, "decoder": self.model.decoder}
        depth, layer_decay = self.model.backbone.config.depth, config.optim.layer_decay
        groups = parameter_groups(parts, depth=depth, layer_decay=layer_decay, patch_embedding_factor=1.0)
        self._parts = {name: part for name, part in parts.items() if any(p.requires_grad for p in part.parameters())}
        self._optimizer = adamw(groups, betas=config.optim.betas)
        self.nonfinite_steps = NonfiniteSteps(
            world.device,
            most=config.optim.max_nonfinite_steps,
            advice=f"Lower optim.learning_rate; {config.output / 'last.pt'} is the last good model",
        )

    def step(self, batch: Batch, rate: float) -> dict[str, Any]:
        """Train on a batch, with the learning rates times ``rate``, and return the metrics to log."""
        optim = self._optim
        images, targets = (part.to(self._world.device, non_blocking=True) for part in batch)
        set_rates(
            self._optimizer,
            learning_rate=rate * optim.learning_rate,
            weight_decay=optim.weight_decay,
            backbone_factor=optim.backbone_learning_rate / optim.learning_rate,
        )
        self.model.train()
        loss = self.loss(self._maps(self._parallel, images), targets)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = clip_gradients(self._parts, optim.clip)
        # Ranks have different crops: all log the mean loss, and skip a step together if it is not finite.
        mean_loss = sum_over_ranks(loss.detach()) / self._world.size
        self.nonfinite_steps.step(self._optimizer, [mean_loss, *norms.values()])
        if optim.ema:
            update_ema(self.average.parameters(), self.model.parameters(), optim.ema)
        metrics: dict[str, Any] = {"loss/train": mean_loss, "health/skipped_steps": self.nonfinite_steps.total}
        metrics |= {f"gradient_norm/{name}": norm for name, norm in norms.items()}
        metrics["schedule/learning_rate"] = rate * optim.learning_rate
        if not self.model.freeze_backbone:
            metrics["schedule/backbone_learning_rate"] = rate * optim.backbone_learning_rate
        return metrics

    @torch.no_grad()
    def predict(self, images: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b k h w"]:
        """Return the averaged model's maps, on the device."""
        return self._maps(self.average.eval(), images.to(self._world.device))

    def _maps(self, model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._uses_bfloat16):
            maps: Tensor = model(images)
        return maps.float()

    def loss(self, maps: Float[Tensor, "b k h w"], targets: Float[Tensor, "b k h w"]) -> Float[Tensor, ""]:
        """Return the loss of the run's target, with the weights of its recipe."""
        return TARGETS[self.model.target].loss(maps, targets, **self._loss_options)

    @torch.no_grad()
    def validation_loss(self, images: Sequence[LabelledImage], *, crop: int, batch_size: int) -> float:
        """Return the mean loss over all crops of the images, without augmentation, over all ranks."""
        total = torch.zeros(2, dtype=torch.float64)
        own = images[self._world.rank :: self._world.size]
        for batch in validation_batches(own, self.average.settings, crop=crop, batch_size=batch_size):
            loss = self.loss(self.predict(batch.images), batch.targets.to(self._world.device))
            total += torch.tensor([float(loss) * len(batch.images), len(batch.images)], dtype=torch.float64)
        total = sum_over_ranks(total)
        return float(total[0] / total[1])

    def state(self) -> dict[str, Any]:
        """Return the tensors that the next step depends on, for a checkpoint."""
        model, optimizer = get_state_dict(self.model, self._optimizer)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "bad": self.nonfinite_steps.state()}
        if self._optim.ema:
            state["average"] = self.average.state_dict()
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        model, optimizer = state["model"], state["optimizer"]
        set_state_dict(self.model, self._optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.nonfinite_steps.restore(state["bad"])
        if self._optim.ema:
            self.average.load_state_dict(state["average"])


def _make_model(config: FinetuneConfig) -> DINOCell:
    options = config.model
    if options.segmenter is not None:
        model = DINOCell.from_pretrained(options.segmenter)
        if model.target != config.target:
            raise ConfigError(f"target: {options.segmenter} predicts {model.target}, not {config.target}")
        model.set_frozen(options.freeze_backbone)
        return model
    return create_dinocell_model(
        options.size,
        freeze_backbone=options.freeze_backbone,
        pretrained=options.pretrained,
        backbone_weights=options.weights,
        patch_size=options.patch_size,
        blocks=options.blocks,
        target=config.target,
    )
