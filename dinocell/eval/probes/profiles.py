"""Profiles of wells: whether replicates of a treatment find one another across plates.

Mean average precision as Cell Painting uses it (Kalinin et al. 2025, Nature Communications, "copairs"): a well asks
with its profile; wells of the same treatment on other plates are to be found, ranked by cosine among the wells of other
treatments on its own plate, so that knowing a plate again helps nobody. Significance comes from random rankings with
as many wells of either kind; treatments are counted after Benjamini and Hochberg.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from dinocell.errors import DinocellError

Whitening = Literal["none", "pca", "tvn"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Retrieval:
    """Replicate retrieval.

    Attributes
    ----------
    precision
        Average precision of each well that can be asked, by its row; NaN for the others.
    treatments, mean_precision, p_value, corrected
        Of each treatment: the mean over its wells, how often random rankings are as good, and that after correction.
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
    """Raise if the images of a well do not agree on what it was treated with.

    Raises
    ------
    DinocellError
        If there is such a well; it names the first.
    """
    known: dict[tuple[str, str], str] = {}
    for treatment, plate, well in zip(treatments, plates, wells, strict=True):
        other = known.setdefault((plate, well), treatment)
        if other != treatment:
            raise DinocellError(
                f"plate {plate}, well {well}: has the treatments {other} and {treatment}, expected one; is the well's "
                "name in another column (--well, --plate)?"
            )


def to_wells(
    features: Float[np.ndarray, "n d"], plates: Sequence[str], wells: Sequence[str]
) -> tuple[Float[np.ndarray, "w d"], Int[np.ndarray, " w"]]:
    """Return the mean feature of each well, and the first row of each."""
    keys = [f"{plate}\0{well}" for plate, well in zip(plates, wells, strict=True)]
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), features.shape[1]))
    np.add.at(sums, number, np.asarray(features, np.float64))
    return sums / np.bincount(number)[:, None], first


def whiten(
    profiles: Float[np.ndarray, "n d"],
    *,
    method: Whitening,
    plates: Sequence[str] = (),
    controls: Bool[np.ndarray, " n"] | None = None,
    regularisation: float = 1e-2,
) -> Float[np.ndarray, "n d"]:
    """Make directions comparable.

    Parameters
    ----------
    method
        ``pca``: centre, turn to principal components and scale each to deviation 1 (PCA-CenterScale). ``tvn``: the
        same by the controls alone, then each plate's controls are given the covariance of all controls (CORAL): typical
        variation normalisation (Ando et al. 2017).
    controls
        Wells of untreated cells; ``tvn`` needs them on every plate.
    regularisation
        Added to variances, as a share of their mean.

    Raises
    ------
    DinocellError
        If ``tvn`` has fewer than two controls on a plate.
    """
    if method == "none":
        return profiles
    chosen = np.ones(len(profiles), bool) if method == "pca" or controls is None else controls
    if method == "tvn" and controls is None:
        raise DinocellError("--whiten tvn: needs wells of untreated cells: give --control")
    if chosen.sum() < 2:
        raise DinocellError("whitening needs at least two wells")
    centred = profiles - profiles[chosen].mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred[chosen], rowvar=False).reshape(profiles.shape[1], -1))
    values = np.maximum(values, 0)
    scaled: np.ndarray = centred @ vectors / np.sqrt(values + regularisation * max(values.mean(), 1e-12))
    if method == "pca":
        return scaled
    whole = np.cov(scaled[chosen], rowvar=False) + regularisation * np.eye(scaled.shape[1])
    target = _root(whole, 0.5)
    known = np.asarray(plates)
    for plate in np.unique(known):
        here = known == plate
        own = here & chosen
        if own.sum() < 2:
            raise DinocellError(f"--whiten tvn: plate {plate} has {int(own.sum())} control wells, expected at least 2")
        shifted = scaled[here] - scaled[own].mean(0)
        covariance = np.cov(scaled[own], rowvar=False) + regularisation * np.eye(scaled.shape[1])
        scaled[here] = shifted @ _root(covariance, -0.5) @ target
    return scaled


def _root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    result: np.ndarray = vectors * np.maximum(values, 1e-12) ** power @ vectors.T
    return result


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
    """Measure how well replicates find one another.

    Parameters
    ----------
    control
        The treatment of untreated wells: others are ranked among them, they are not asked themselves.
    across_plates
        Only wells on other plates are to be found; otherwise all others of the treatment.
    num_random
        Random rankings for each pair of counts.

    Raises
    ------
    DinocellError
        If no well that is asked has both a replicate to find and a well of another treatment on its plate.
    """
    names, plate = np.asarray(treatments), np.asarray(plates)
    unit = profiles / np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-12)
    precision = np.full(len(unit), np.nan)
    counts = np.zeros((len(unit), 2), np.int64)
    for query in range(len(unit)):
        same = names == names[query]
        wanted = same & (plate != plate[query]) if across_plates else same.copy()
        wanted[query] = False
        others = ~same & (plate == plate[query])
        if names[query] == control or not wanted.any() or not others.any():
            continue
        among = np.concatenate((np.flatnonzero(others), np.flatnonzero(wanted)))
        # Of equal cosines the wrong ones count first.
        order = np.argsort(-(unit[among] @ unit[query]), kind="stable")
        precision[query] = average_precision(order >= others.sum())
        counts[query] = wanted.sum(), others.sum()
    asked = ~np.isnan(precision)
    if not asked.any():
        where = " on another plate" if across_plates else ""
        which = "well" if control is None else "treated well"
        raise DinocellError(
            f"no {which} has a replicate{where} to find and a well of another treatment on its own plate"
        )
    pairs = {(int(relevant), int(others)) for relevant, others in counts[asked]}
    random = {pair: _random_precisions(*pair, num_random, seed) for pair in pairs}
    found = sorted({str(name) for name in names[asked]})
    means, values = np.empty(len(found)), np.empty(len(found))
    for number, name in enumerate(found):
        rows = np.flatnonzero(asked & (names == name))
        means[number] = precision[rows].mean()
        null = np.mean([random[int(counts[row, 0]), int(counts[row, 1])] for row in rows], axis=0)
        values[number] = (1 + (null >= means[number]).sum()) / (1 + num_random)
    corrected = _benjamini_hochberg(values)
    return Retrieval(
        precision=precision,
        treatments=tuple(found),
        mean_precision=means,
        p_value=values,
        corrected=corrected,
        mean_average_precision=float(means.mean()),
        retrieved=float((corrected < 0.05).mean()),
    )


def average_precision(relevant: Bool[np.ndarray, " n"]) -> float:
    """Return the mean, over the relevant ones of a ranking, of the share of relevant ones up to it."""
    hits = np.flatnonzero(relevant)
    return float(np.mean(np.arange(1, len(hits) + 1) / (hits + 1))) if hits.size else 0.0


def _random_precisions(relevant: int, others: int, count: int, seed: int) -> Float[np.ndarray, " k"]:
    generator = np.random.default_rng((seed, relevant, others))
    places = generator.random((count, relevant + others)).argsort(axis=1)[:, :relevant]
    places.sort(axis=1)
    shares: np.ndarray = (np.arange(1, relevant + 1) / (places + 1)).mean(axis=1)
    return shares


def _benjamini_hochberg(values: Float[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    order = np.argsort(values)
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return corrected
