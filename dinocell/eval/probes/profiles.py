"""Profiles of wells: retrieval of replicates of a treatment across plates.

Mean average precision as used in Cell Painting (Kalinin et al. 2025, Nature Communications, "copairs"): the profile of
a well is the query; wells of the same treatment on other plates are ranked by cosine among the wells of other
treatments on the same plate, so that plate effects do not help. Significance is computed from random rankings with the
same numbers of wells; treatments are counted after Benjamini-Hochberg correction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import false_discovery_control

from dinocell.errors import DinocellError, require

Whitening = Literal["none", "pca", "tvn"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval:
    """Replicate retrieval.

    Attributes
    ----------
    precision
        Average precision of each query well, by row; NaN for the others.
    treatments, mean_precision, p_value, corrected
        Per treatment: the mean over its wells, the share of random rankings as good, and that after correction.
    mean_average_precision
        Mean over treatments.
    retrieved
        Share of treatments whose corrected p is below 0.05.
    """

    precision: Float[np.ndarray, " n"]
    treatments: tuple[str, ...]
    mean_precision: Float[np.ndarray, " t"]
    p_value: Float[np.ndarray, " t"]
    corrected: Float[np.ndarray, " t"]
    mean_average_precision: float
    retrieved: float


def check_wells(treatments: Sequence[str], plates: Sequence[str], wells: Sequence[str]) -> None:
    """Raise a DinocellError that names the first well whose images have different treatments."""
    treatment_of: dict[tuple[str, str], str] = {}
    for treatment, plate, well in zip(treatments, plates, wells, strict=True):
        other = treatment_of.setdefault((plate, well), treatment)
        got = f"has the treatments {other} and {treatment}, expected one"
        hint = "is the well's name in another column (--well, --plate)?"
        require(other == treatment, f"plate {plate}, well {well}: {got}; {hint}")


def to_wells(
    features: Float[np.ndarray, "n d"], plates: Sequence[str], wells: Sequence[str]
) -> tuple[Float[np.ndarray, "w d"], Int[np.ndarray, " w"]]:
    """Return the mean feature of each well, and the first row of each."""
    keys = [f"{plate}\0{well}" for plate, well in zip(plates, wells, strict=True)]
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), features.shape[1]))
    np.add.at(sums, index, np.asarray(features, np.float64))
    return sums / np.bincount(index)[:, None], first


def whiten(
    profiles: Float[np.ndarray, "n d"],
    *,
    method: Whitening,
    plates: Sequence[str] = (),
    controls: Bool[np.ndarray, " n"] | None = None,
    regularisation: float = 1e-2,
) -> Float[np.ndarray, "n d"]:
    """Whiten profiles, so that directions are comparable.

    A DinocellError if there are fewer than two wells, or ``tvn`` has fewer than two controls on a plate.

    Parameters
    ----------
    method
        ``pca``: centre, rotate to principal components and scale each to unit variance (PCA-CenterScale). ``tvn``: the
        same with statistics of the controls only, then align the covariance of the controls of each plate to that of
        all controls (CORAL): typical variation normalisation (Ando et al. 2017).
    controls
        Wells of untreated cells; ``tvn`` requires them on every plate.
    regularisation
        Added to variances, as a share of their mean.
    """
    if method == "none":
        return profiles
    chosen = np.ones(len(profiles), bool) if method == "pca" or controls is None else controls
    plate_of = np.asarray(plates)
    few = [f"{p} has {n}" for p in np.unique(plate_of) if (n := (chosen & (plate_of == p)).sum()) < 2]
    if method == "tvn":
        require(controls is not None, "--whiten tvn: needs wells of untreated cells: give --control")
        expected = "expected at least 2 control wells on each plate"
        require(not few, f"--whiten tvn: {expected}, but plate {', '.join(few)}")
    require(chosen.sum() > 1, f"--whiten {method}: needs at least 2 wells")
    centred = profiles - profiles[chosen].mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred[chosen], rowvar=False).reshape(profiles.shape[1], -1))
    values = np.maximum(values, 0)
    scaled: np.ndarray = centred @ vectors / np.sqrt(values + regularisation * max(values.mean(), 1e-12))
    if method == "pca":
        return scaled
    whole = np.cov(scaled[chosen], rowvar=False) + regularisation * np.eye(scaled.shape[1])
    target = _root(whole, 0.5)
    for plate in np.unique(plate_of):
        here = plate_of == plate
        own = here & chosen
        shifted = scaled[here] - scaled[own].mean(0)
        covariance = np.cov(scaled[own], rowvar=False) + regularisation * np.eye(scaled.shape[1])
        scaled[here] = shifted @ _root(covariance, -0.5) @ target
    return scaled


def _root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors * np.maximum(values, 1e-12) ** power @ vectors.T)


def replicate_retrieval(
    profiles: Float[np.ndarray, "n d"],
    treatments: Sequence[str],
    plates: Sequence[str],
    *,
    control: str | None = None,
    across_plates: bool = True,
    num_random: int = 10_000,
    seed: int = 0,
) -> Retrieval:
    """Measure the retrieval of replicates.

    A DinocellError if no query has both a replicate and a well of another treatment on its plate.

    Parameters
    ----------
    control
        The treatment of untreated wells: they are ranked with the others, but are not queries.
    across_plates
        Only replicates on other plates count; otherwise all others of the treatment.
    num_random
        Number of random rankings per pair of counts.
    """
    names, plate = np.asarray(treatments), np.asarray(plates)
    unit = profiles / np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-12)
    precision = np.full(len(unit), np.nan)
    counts = np.zeros((len(unit), 2), np.int64)
    for query in range(len(unit)):
        same = names == names[query]
        relevant = same & (plate != plate[query]) if across_plates else same.copy()
        relevant[query] = False
        others = ~same & (plate == plate[query])
        if names[query] == control or not relevant.any() or not others.any():
            continue
        among = np.concatenate((np.flatnonzero(others), np.flatnonzero(relevant)))
        # Ties are broken in favour of other treatments.
        order = np.argsort(-(unit[among] @ unit[query]), kind="stable")
        precision[query] = average_precision(order >= others.sum())
        counts[query] = relevant.sum(), others.sum()
    is_query = ~np.isnan(precision)
    if not is_query.any():
        where = " on another plate" if across_plates else ""
        which = "well" if control is None else "treated well"
        raise DinocellError(f"no {which} has a replicate{where} and a well of another treatment on its own plate")
    pairs = {(int(relevant), int(others)) for relevant, others in counts[is_query]}
    random = {pair: _random_precisions(*pair, num_random, seed) for pair in pairs}
    treatment_names = sorted({str(name) for name in names[is_query]})
    means, values = np.empty(len(treatment_names)), np.empty(len(treatment_names))
    for index, name in enumerate(treatment_names):
        rows = np.flatnonzero(is_query & (names == name))
        means[index] = precision[rows].mean()
        null = np.mean([random[int(counts[row, 0]), int(counts[row, 1])] for row in rows], axis=0)
        values[index] = (1 + (null >= means[index]).sum()) / (1 + num_random)
    corrected = false_discovery_control(values)
    return Retrieval(
        precision=precision,
        treatments=tuple(treatment_names),
        mean_precision=means,
        p_value=values,
        corrected=corrected,
        mean_average_precision=float(means.mean()),
        retrieved=float((corrected < 0.05).mean()),
    )


def average_precision(relevant: Bool[np.ndarray, " n"]) -> float:
    """Return the average precision of a ranking: the mean precision at the ranks of the relevant items."""
    hits = np.flatnonzero(relevant)
    return float(np.mean(np.arange(1, len(hits) + 1) / (hits + 1))) if hits.size else 0.0


def _random_precisions(relevant: int, others: int, count: int, seed: int) -> Float[np.ndarray, " k"]:
    generator = np.random.default_rng((seed, relevant, others))
    places = generator.random((count, relevant + others)).argsort(axis=1)[:, :relevant]
    places.sort(axis=1)
    return np.asarray((np.arange(1, relevant + 1) / (places + 1)).mean(axis=1))
