"""Is our vision transformer ever slower than the one of transformers, with the same weights and inputs?

    python benchmarks/vit_forward.py            # 5 alternated rounds, writes results/vit_forward_<device>.md
    python benchmarks/vit_forward.py --quick    # 2 rounds of a smaller batch, writes nothing

DINOv3 ViT-S shapes at patch 8, one grey channel, random weights; single images and the crops of a training step
(2 x 224 + 8 x 96 an image), forward and forward + backward. Outputs are compared before anything is timed.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from _harness import alternate, ratio, write_result
from torch import Tensor, nn

from dinocell.models.vit import VisionTransformer, variant_config
from dinocell.models.weights import Weights, fit_weights, load_backbone, save_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=0, help="images a step (default: 4 on the CPU, 64 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile our side (and theirs)")
    parser.add_argument("--kernel", default="sdpa", choices=("sdpa", "varlen", "xformers"), help="our attention kernel")
    parser.add_argument("--against", choices=("varlen", "xformers"), help="time our model with this kernel as well")
    parser.add_argument("--wait-for", type=Path, help="time nothing before this file exists: other work may go on")
    parser.add_argument("--quick", action="store_true", help="2 rounds, batch 1, no result file")
    options = parser.parse_args()
    device = torch.device(options.device)
    batch = options.batch or (1 if options.quick else 64 if device.type == "cuda" else 4)
    rounds = 2 if options.quick else options.rounds
    ours, theirs = same_weights(device, options.kernel)
    other = same_weights(device, options.against)[0] if options.against else None
    if options.compile:
        layers = next(each for each in theirs.modules() if isinstance(each, nn.ModuleList))
        for block in (*ours.blocks, *layers):
            block.compile(dynamic=False)

    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(batch * n, 1, size, size, generator=generator).to(device) for n, size in ((2, 224), (8, 96))]
    single = [torch.randn(1, 1, 256, 256, generator=generator).to(device)]
    measured = []
    for name, images in (("one image of 256 px", single), ("multi-crop", crops)):
        check_equal(ours, theirs, images, device)
        for kind, step in (("forward", forward), ("forward + backward", forward_backward)):
            sides = {
                "theirs": partial(step, partial(hugging_face, theirs, images), theirs, device),
                "ours": partial(step, partial(dinocell, ours, images), ours, device),
            }
            if other is not None and images is crops:
                sides[options.against] = partial(step, partial(dinocell, other, images), other, device)
            for _ in range(2):  # to warm up: compilers, caches
                for side in sides.values():
                    side()
            measured.append((f"{name}, {kind}", sides, rounds * (4 if images is single else 1)))
    while options.wait_for and not options.wait_for.exists():
        time.sleep(0.2)
    lines = [
        "# ViT-S/8 against transformers' DINOv3ViTModel",
        "",
        f"Same weights and inputs, alternated {rounds} rounds after a warm-up; {precision(device)}"
        f"{', both compiled block by block' if options.compile else ''}, our attention kernel `{options.kernel}`.",
        f"Multi-crop: {batch} images, 2 x 224 px and 8 x 96 px each. Ratio = their time / ours, above 1 is faster.",
        "",
        "| what | ratio: median (range) |" + (" ours, ms | theirs, ms |" if device.type == "cuda" else ""),
        "|---|---|" + ("---|---|" if device.type == "cuda" else ""),
    ]
    for what, sides, number in measured:
        seconds = alternate(sides, rounds=number)
        for side in [each for each in sides if each != "ours"]:
            named = what if side == "theirs" else f"{what}: ours with `{side}` for theirs"
            row = f"| {named} | {ratio(seconds[side], seconds['ours'])} |"
            if device.type == "cuda":
                row += "".join(f" {1e3 * statistics.median(seconds[each]):.1f} |" for each in ("ours", side))
            lines.append(row)
    print("\n".join(lines))
    if not options.quick:
        kernel = "" if options.kernel == "sdpa" else f"_{options.kernel}"
        suffix = f"_{device.type}" + ("_compiled" if options.compile else "") + kernel
        print(write_result(f"vit_forward{suffix}", "\n".join(lines), ["torch", "transformers"]))


def same_weights(device: torch.device, kernel: str) -> tuple[nn.Module, nn.Module]:
    """Build our model with random weights and hand the same weights to transformers through our export."""
    import tempfile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import DINOv3ViTModel

    torch.manual_seed(0)
    vit = VisionTransformer(variant_config("small"))
    vit.init_weights(layer_scale=0.3)
    with tempfile.TemporaryDirectory() as folder:
        save_weights(folder, fit_weights(Weights.of(vit)), layout="huggingface")
        theirs = DINOv3ViTModel.from_pretrained(folder, attn_implementation="sdpa")
        ours = load_backbone(folder, kernel=kernel)
    return ours.to(device), theirs.eval().to(device)


def precision(device: torch.device) -> str:
    return "bfloat16 autocast" if device.type == "cuda" else "float32"


def dinocell(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
    return [tokens for out in model(images) for tokens in (out.cls, out.patches)]


def hugging_face(model: nn.Module, images: list[Tensor]) -> list[Tensor]:
    outputs = [model(pixel_values=each).last_hidden_state for each in images]
    return [tokens for out in outputs for tokens in (out[:, 0], out[:, 5:])]


def forward(call: Callable[[], list[Tensor]], _: nn.Module, device: torch.device) -> None:
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        call()


def forward_backward(call: Callable[[], list[Tensor]], model: nn.Module, device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = sum(tokens.float().square().mean() for tokens in call())
    loss.backward()
    model.zero_grad(set_to_none=True)


def check_equal(ours: nn.Module, theirs: nn.Module, images: list[Tensor], device: torch.device) -> None:
    """Compare the outputs: in float32 on the CPU; on a GPU as they are timed, which packed kernels ask for."""
    on_gpu = device.type == "cuda"
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        for a, b in zip(dinocell(ours, images), hugging_face(theirs, images), strict=True):
            if on_gpu:
                assert (a - b).float().norm() < 2e-2 * b.float().norm()
            else:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main()
