"""Replicate retrieval against scikit-learn's average precision, and what it must and must not see."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control
from sklearn.metrics import average_precision_score

from dinocell.errors import DinocellError
from dinocell.eval.probes.profiles import average_precision, replicate_retrieval, to_wells, whiten


def screen(effect: float, plate_effect: float, seed: int = 0) -> tuple[np.ndarray, list[str], list[str]]:
    """Twelve treatments and untreated wells on three plates."""
    rng = np.random.default_rng(seed)
    treatments = [f"t{number}" for number in range(12)] + ["DMSO"] * 6
    directions = effect * rng.normal(size=(12, 16))
    rows, names, plates = [], [], []
    for plate in range(3):
        shift = plate_effect * rng.normal(size=16)
        for number, name in enumerate(treatments):
            rows.append(rng.normal(size=16) + shift + (directions[number] if number < 12 else 0))
            names.append(name)
            plates.append(f"p{plate}")
    return np.array(rows), names, plates


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevant, scores = rng.random(30) < 0.3, rng.random(30)
    order = np.argsort(-scores)
    assert average_precision(relevant[order]) == pytest.approx(average_precision_score(relevant, scores))


def test_a_well_is_asked_among_its_own_plate_for_those_on_others() -> None:
    profiles, names, plates = screen(1.0, 0.0)
    found = replicate_retrieval(profiles, names, plates, num_random=200)
    unit = profiles / np.linalg.norm(profiles, axis=1, keepdims=True)
    query = 4
    among = [k for k in range(len(names)) if (names[k] == names[query]) != (plates[k] == plates[query])]
    among = [k for k in among if k != query]
    wanted = average_precision_score([names[k] == names[query] for k in among], unit[among] @ unit[query])
    assert found.precision[query] == pytest.approx(wanted)
    assert found.mean_average_precision == pytest.approx(found.mean_precision.mean())


def test_controls_are_ranked_among_but_neither_asked_nor_counted_in_the_correction() -> None:
    profiles, names, plates = screen(0.6, 0.0)
    everyone = replicate_retrieval(profiles, names, plates, num_random=500)
    found = replicate_retrieval(profiles, names, plates, control="DMSO", num_random=500)
    kept = [number for number, name in enumerate(everyone.treatments) if name != "DMSO"]
    assert found.treatments == tuple(everyone.treatments[number] for number in kept)
    np.testing.assert_array_equal(found.p_value, everyone.p_value[kept])  # ranked among the same wells
    np.testing.assert_allclose(found.corrected, false_discovery_control(found.p_value))
    assert not np.allclose(found.corrected, everyone.corrected[kept])  # one hypothesis more
    assert found.mean_average_precision == pytest.approx(everyone.mean_precision[kept].mean())
    with pytest.raises(DinocellError, match="no treated well has a replicate on another plate"):
        replicate_retrieval(profiles[-6:], ["DMSO"] * 6, ["a", "b"] * 3, control="DMSO")


def test_effects_are_found_and_noise_is_not() -> None:
    strong = replicate_retrieval(*screen(3.0, 0.0), num_random=2000)
    assert strong.mean_average_precision > 0.9
    assert strong.retrieved > 0.9
    nothing = replicate_retrieval(*screen(0.0, 0.0), num_random=2000)
    assert nothing.retrieved < 0.2


def test_knowing_the_plate_again_helps_nobody() -> None:
    """A plate's own shift makes wells of a plate alike; whitening by the controls of each plate mends it."""
    profiles, names, plates = screen(2.0, 8.0)
    raw = replicate_retrieval(profiles, names, plates, num_random=500)
    controls = np.array([name == "DMSO" for name in names])
    mended = whiten(profiles, method="tvn", plates=plates, controls=controls, regularisation=0.1)
    aligned = replicate_retrieval(mended, names, plates, num_random=500)
    assert raw.mean_average_precision < 0.5
    assert aligned.mean_average_precision > raw.mean_average_precision + 0.2
    scaled = whiten(profiles, method="pca")
    assert np.allclose(np.cov(scaled, rowvar=False), np.diag(np.diag(np.cov(scaled, rowvar=False))), atol=1e-8)
    assert whiten(profiles, method="none") is profiles


def test_images_of_a_well_are_averaged() -> None:
    wells, first = to_wells(np.array([[1.0], [3.0], [10.0]]), ["p", "p", "q"], ["A1", "A1", "A1"])
    assert wells.tolist() == [[2.0], [10.0]]
    assert first.tolist() == [0, 2]


def test_what_has_no_replicates_is_said() -> None:
    with pytest.raises(DinocellError, match="no well has a replicate on another plate"):
        replicate_retrieval(np.eye(3), ["a", "a", "b"], ["p", "p", "p"])
    with pytest.raises(DinocellError, match="--whiten tvn: needs wells of untreated cells"):
        whiten(np.eye(3), method="tvn", plates=["p"] * 3)
