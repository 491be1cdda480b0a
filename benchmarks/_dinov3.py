"""DINOv3's own pretraining step, from a checkout of facebookresearch/dinov3, to stand beside ours.

Nothing of the checkout is copied or changed. On CUDA it runs as its trainer runs it: blocks compiled, FSDP2 with
bfloat16 weights, in a process group of one. On the CPU, which it was not written for, calls that need CUDA do nothing,
and nothing is compiled or sharded.
"""

import importlib.machinery
import logging
import random
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

# Their names of our variants.
_ARCHITECTURES = {"small": "vit_small", "base": "vit_base", "large": "vit_large"}
_CHANNELS = 3


class Peer:
    """DINOv3's model and its step.

    Parameters
    ----------
    checkout
        The folder that holds ``dinov3/``.
    variant, patch_size, num_prototypes
        As ours.
    device
        ``cuda`` or ``cpu``.
    """

    def __init__(
        self, checkout: Path, *, variant: str = "small", patch_size: int = 8, num_prototypes: int, device: str = "cpu"
    ) -> None:
        self._device, self._patch_size, self._root = device, patch_size, checkout
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(checkout))
        if device == "cpu":
            _pretend_cuda()
        logging.disable(logging.WARNING)
        _group_of_one(device)
        from omegaconf import OmegaConf

        settings: Any = OmegaConf.load(checkout / "dinov3/configs/ssl_default_config.yaml")
        settings.student.arch, settings.student.patch_size = _ARCHITECTURES[variant], patch_size
        settings.student.drop_path_rate, settings.student.n_storage_tokens = 0.0, 0
        settings.student.pos_embed_rope_dtype = "fp32" if device == "cpu" else "bf16"
        settings.student.in_chans = settings.teacher.in_chans = _CHANNELS
        settings.dino.head_n_prototypes = settings.ibot.head_n_prototypes = num_prototypes
        settings.train.compile = device == "cuda"
        self.model = self._build(settings)
        self.optimizer = self._optimizer()

    def _build(self, settings: Any) -> Any:
        from dinov3.train.ssl_meta_arch import SSLMetaArch

        torch.manual_seed(0)
        with torch.device("meta"):
            model: Any = SSLMetaArch(settings)
        if self._device == "cuda":
            model.prepare_for_distributed_training()
        model.to_empty(device=self._device)
        for name in ("backbone", "dino_head", "ibot_head"):
            model.student[name].init_weights()
        model.dino_loss.init_weights()
        model.ibot_patch_loss.init_weights()
        model.model_ema.load_state_dict(model.student.state_dict())
        model.train()
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.model.get_params_groups(), betas=(0.9, 0.999))
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * group["lr_multiplier"]
            group["weight_decay"] = 0.04 * group["wd_multiplier"]
        return optimizer

    def batch(self, size: int, *, global_size: int = 224, local_size: int = 96, num_local: int = 8) -> dict[str, Any]:
        """Return random crops and its own masks, on the device."""
        from dinov3.data import MaskingGenerator, collate_data_and_cast

        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        side = global_size // self._patch_size
        crops = [
            (
                {
                    "global_crops": [torch.randn(_CHANNELS, global_size, global_size) for _ in range(2)],
                    "local_crops": [torch.randn(_CHANNELS, local_size, local_size) for _ in range(num_local)],
                },
                (),
            )
            for _ in range(size)
        ]
        data: dict[str, Any] = collate_data_and_cast(
            crops,
            mask_ratio_tuple=(0.1, 0.5),
            mask_probability=0.5,
            dtype=torch.float32 if self._device == "cpu" else torch.bfloat16,
            n_tokens=side**2,
            mask_generator=MaskingGenerator(input_size=(side, side), max_num_patches=0.5 * side**2),
        )
        data["global_batch_size"] = size
        on_device = {name: each.to(self._device) for name, each in data.items() if isinstance(each, torch.Tensor)}
        return data | on_device

    def step(self, data: dict[str, Any]) -> torch.Tensor:
        """Take a step: forward, backward, clipping, AdamW, the moving average; return the loss."""
        data = data | {"n_masked_patches": data["n_masked_patches"].clone()}  # its Sinkhorn adds up in place
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = self.model.forward_backward(data, teacher_temp=0.05, iteration=0)
        for module in self.model.student.values():
            nn.utils.clip_grad_norm_(module.parameters(), max_norm=3.0)
        self.optimizer.step()
        self.model.update_ema(0.996)
        result: torch.Tensor = loss.detach()
        return result


def step_of(checkout: Path, *, num_prototypes: int, batch_size: int, **options: Any) -> Callable[[], torch.Tensor]:
    """Return a function that takes a step of DINOv3 on the same batch each time."""
    peer = Peer(checkout, num_prototypes=num_prototypes, **options)
    data = peer.batch(batch_size)
    return lambda: peer.step(data)


def _group_of_one(device: str) -> None:
    rendezvous = Path(tempfile.mkdtemp()) / "rendezvous"
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    import dinov3.distributed.torch_distributed_wrapper as wrapper

    wrapper._DEFAULT_PROCESS_GROUP = wrapper._PROCESS_SUBGROUP = dist.group.WORLD


class _Anything(types.ModuleType):
    """A module of which every name is an empty class: what the checkout imports and a step does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (object,), {"BICUBIC": 3, "BILINEAR": 2})
        setattr(self, name, made)
        return made


def _pretend_cuda() -> None:
    """Let calls that need CUDA, and packages that only augment images, be nothing."""
    for name in (
        "torchvision",
        "torchvision.datasets",
        "torchvision.io",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.transforms.v2",
        "torchmetrics",
        "torchmetrics.classification",
    ):
        module = _Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms"].v2 = sys.modules["torchvision.transforms.v2"]  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
    torch.cuda.empty_cache = lambda: None
    torch.cuda.synchronize = lambda *_, **__: None
    nn.Module.compile = lambda *_, **__: None  # type: ignore[method-assign, assignment]
