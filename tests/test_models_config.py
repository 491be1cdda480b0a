"""The formula for the cost of a pass equals the counts of torch and fvcore, and the estimate in the plans."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dinocell.models.config import forward_flop, head_flop, variant_config
from dinocell.models.vit import VisionTransformer
from dinocell.ssl.heads import ProjectionHead


@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_the_formula_equals_the_count_of_torch(variant: str) -> None:
    config = variant_config(variant, patch_size=16, in_channels=2)
    vit = VisionTransformer(config).eval()
    # torch does not count the fused kernel of the CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vit(torch.zeros(1, 2, 96, 96))
    assert forward_flop(config, 96) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_the_formula_equals_the_count_of_fvcore_without_norms_and_rotations() -> None:
    # Its tracer turns sizes into tensors, which the checker of annotations in this process refuses.
    program = (
        "from dinocell.models.config import forward_flop, variant_config;"
        "from dinocell.models.weights import forward_gflop;"
        "config = variant_config('tiny', patch_size=16, in_channels=2);"
        "print(forward_gflop(config, image_size=96) / forward_flop(config, 96) * 1e9)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1, abs=0.02)


def test_a_crop_of_vit_s_8_costs_the_estimate_of_the_plans() -> None:
    """45.1 and 6.76 GFLOP per global and local crop, with five prefix tokens."""
    config = variant_config("small", patch_size=8, in_channels=1)
    assert forward_flop(config, 224) / 1e9 == pytest.approx(45.1, rel=0.01)
    assert forward_flop(config, 96) / 1e9 == pytest.approx(6.76, rel=0.01)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_head_costs_two_operations_per_weight(layers: int) -> None:
    head = ProjectionHead(24, 50, hidden=40, bottleneck=16, layers=layers)
    weights = sum(parameter.numel() for name, parameter in head.named_parameters() if not name.endswith("bias"))
    assert head_flop(24, 40, 16, layers, 50) == 2 * weights
    with torch.no_grad():
        assert head(torch.randn(2, 24)).logits().shape == (2, 50)
