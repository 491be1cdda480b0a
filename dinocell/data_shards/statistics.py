"""Intensity statistics of a channel over a whole data set, from histograms that add up, shard by shard.

A value's bin is the upper half of its float32 bits: sign, exponent and 7 bits of the mantissa, so that a bin is at most
1/128 of its value wide, in whatever type and range the data come. Whole numbers up to 256 have bins of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
_NUM_BINS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ChannelStatistics:
    """What is known of a channel's values over all kept tiles.

    Attributes
    ----------
    percentiles
        Value by percentile (``PERCENTILES``), to 1/128 of itself; minimum, maximum, mean and deviation are exact.
    """

    num_tiles: int
    num_pixels: int
    minimum: float
    maximum: float
    mean: float
    deviation: float
    percentiles: dict[str, float]


class Histogram:
    """Counts, sums and extremes of one channel's values."""

    def __init__(self) -> None:
        self.num_tiles = self.num_pixels = 0
        self.minimum, self.maximum = float("inf"), float("-inf")
        self.sum = self.sum_of_squares = 0.0
        self.counts = np.zeros(_NUM_BINS, np.int64)

    def add(self, plane: Shaped[np.ndarray, "h w"]) -> None:
        """Count a tile's values."""
        if plane.dtype in (np.uint8, np.uint16):
            levels = np.bincount(plane.ravel())
            values = np.arange(len(levels), dtype=np.float64)
            present = np.flatnonzero(levels)
            self.minimum = min(self.minimum, float(present[0]))
            self.maximum = max(self.maximum, float(present[-1]))
            self.sum += float(values @ levels)
            self.sum_of_squares += float(values**2 @ levels)
            self.counts += np.bincount(_bins(values), weights=levels, minlength=_NUM_BINS).astype(np.int64)
        else:
            values = plane.astype(np.float64).ravel()
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))
            self.sum += float(values.sum())
            self.sum_of_squares += float(values @ values)
            self.counts += np.bincount(_bins(values), minlength=_NUM_BINS)
        self.num_tiles += 1
        self.num_pixels += plane.size

    def merge(self, other: "Histogram") -> None:
        """Add another's counts."""
        self.num_tiles += other.num_tiles
        self.num_pixels += other.num_pixels
        self.minimum, self.maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        self.sum += other.sum
        self.sum_of_squares += other.sum_of_squares
        self.counts += other.counts

    def to_json(self) -> dict[str, Any]:
        """Return numbers that ``from_json`` takes; empty bins are left out."""
        bins = np.flatnonzero(self.counts)
        return {
            "num_tiles": self.num_tiles,
            "num_pixels": self.num_pixels,
            "minimum": self.minimum,
            "maximum": self.maximum,
            "sum": self.sum,
            "sum_of_squares": self.sum_of_squares,
            "bins": bins.tolist(),
            "counts": self.counts[bins].tolist(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Histogram":
        """Return what ``to_json`` wrote."""
        histogram = cls()
        for name in ("num_tiles", "num_pixels", "minimum", "maximum", "sum", "sum_of_squares"):
            setattr(histogram, name, content[name])
        histogram.counts[content["bins"]] = content["counts"]
        return histogram

    def statistics(self) -> ChannelStatistics:
        """Return what is to be known; there must be a value."""
        mean = self.sum / self.num_pixels
        variance = max(0.0, self.sum_of_squares / self.num_pixels - mean**2)
        return ChannelStatistics(
            num_tiles=self.num_tiles,
            num_pixels=self.num_pixels,
            minimum=self.minimum,
            maximum=self.maximum,
            mean=mean,
            deviation=variance**0.5,
            percentiles={f"{percent:g}": self._percentile(percent) for percent in PERCENTILES},
        )

    def _percentile(self, percent: float) -> float:
        order = np.argsort(_BIN_VALUES, kind="stable")
        reached = np.cumsum(self.counts[order])
        rank = percent / 100 * (self.num_pixels - 1)
        value = float(_BIN_VALUES[order[int(np.searchsorted(reached, rank, side="right"))]])
        return min(max(value, self.minimum), self.maximum)


def _bins(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)


# The value in the middle of each bin; of whole numbers up to 256, which fill only the lower end, the lower end.
_LOWER = (np.arange(_NUM_BINS, dtype=np.uint32) << 16).view(np.float32)
_UPPER = ((np.arange(_NUM_BINS, dtype=np.uint32) << 16) | 0xFFFF).view(np.float32)
with np.errstate(all="ignore"):
    _BIN_VALUES = np.nan_to_num(
        np.where(np.abs(_LOWER) <= 256, _LOWER, _LOWER / 2 + _UPPER / 2).astype(np.float64), nan=np.inf
    )
