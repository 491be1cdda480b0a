"""The heat map of a threshold search."""

from pathlib import Path

import numpy as np
from PIL import Image

from dinocell.eval.threshold_search import draw_heat_map


def test_points_near_the_best_differ_although_one_found_nothing(tmp_path: Path) -> None:
    scores = np.array([[0.0, 0.80], [0.86, np.nan]])
    axes = {"rows": ("cells_max", [0.4, 0.5]), "columns": ("cell_fill", [0.1, 0.2])}
    draw_heat_map(tmp_path / "map.png", scores, **axes, best=(1, 0), title="op_csb")
    picture = np.asarray(Image.open(tmp_path / "map.png")).astype(int)
    nothing, fair, best, undefined = (
        picture[62 + row * 32 + 16, 84 + column * 32 + 16] for row in range(2) for column in range(2)
    )
    assert np.abs(fair - best).max() > 80
    assert np.abs(fair - nothing).max() > 40
    assert (undefined == 200).all()
