"""Features that are kept: what comes back is what was computed, once a crop."""

import errno
import os
from pathlib import Path

import pytest
import torch

from dinocell.errors import DinocellError
from dinocell.finetune.feature_cache import KeptFeatures, bytes_of_crop
from dinocell.finetune.model import create_dinocell_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_for_bit_and_are_computed_once(tmp_path: Path, dtype: torch.dtype) -> None:
    calls = 0

    def compute(image: torch.Tensor) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        return [image.repeat(1, 3, 1, 1) * factor for factor in range(1, 5)]

    images = torch.randn(5, 1, 4, 6)
    kept = KeptFeatures(tmp_path, dtype)
    for numbers in ([7, 3, 7], [3, 9], [9, 7, 3, 7]):
        batch = torch.stack([images[number % 5] for number in numbers])
        for factor, maps in enumerate(kept.tokens(numbers, batch, compute), start=1):
            assert torch.equal(maps, (batch.repeat(1, 3, 1, 1) * factor).to(dtype))
    assert calls == 3
    assert not any(tmp_path.iterdir()), "the file has no name"


def test_the_size_that_is_announced_is_the_size_that_is_taken(tmp_path: Path) -> None:
    model = create_dinocell_model("nano", pretrained=False)
    kept = KeptFeatures(tmp_path, torch.bfloat16)
    kept.tokens([0, 1], torch.randn(2, 1, 60, 60), model.tokens)
    width = model.backbone.config.width
    assert os.fstat(kept._file).st_size == 2 * bytes_of_crop(crop=60, patch_size=8, width=width, dtype=torch.bfloat16)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptFeatures(tmp_path, torch.float32)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DinocellError, match="cannot be kept in the run folder \\(No space left"):
        kept.tokens([0], torch.zeros(1, 1, 8, 8), lambda image: [image] * 4)
