"""Distance maps to labelled cells: the inverse of `dinocell.labelled.distance`.

SAMCell's rule: each connected piece of what is above ``cells_max`` is the peak of a cell, water runs from the peaks
down over all that is above ``cell_fill``, and where two floods meet is the border. Then what this rule cannot give back
even from a perfect map is mended (`dinocell.eval.segmentation.refine`).
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32
from scipy import ndimage

from dinocell.errors import DinocellError
from dinocell.eval.segmentation.refine import MERGE_DEPTH, MERGE_PX, Refinement, refine_labels
from dinocell.runtime.jit import compiled, inlined

# SAMCell's defaults, found on its own held-out images.
CELLS_MAX = 0.47
CELL_FILL = 0.09

_Array = np.ndarray
_EIGHT_CONNECTED = np.ones((3, 3), bool)
# A map that is far outside [0, 1] is another quantity (pixels, 8-bit grey, logits); a network without a sigmoid may
# overshoot a little, and only the order of values and the thresholds count.
_TOLERANCE = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Flooded:
    """A flood that can still be cut at any fill threshold of at least ``lowest_fill``; see `flood` and `cut`.

    Attributes
    ----------
    labels
        0 or the number of the peak whose flood took the pixel; peaks count from 1 in raster order, without gaps.
    taken_at
        How far the flood had sunk when it took the pixel: the pixel's own height, or less behind a lower saddle.
    distance
        The map.
    exact_below
        Cuts below this are known to be what a flood from scratch gives; infinity on nearly all maps.
    """

    labels: Int32[np.ndarray, "h w"]
    taken_at: Float32[np.ndarray, "h w"]
    distance: Float32[np.ndarray, "h w"]
    cells_max: float
    lowest_fill: float
    exact_below: float


def distance_to_labels(
    distance: Float[np.ndarray, "h w"],
    *,
    cells_max: int | float = CELLS_MAX,
    cell_fill: int | float = CELL_FILL,
    min_area_px: int = 0,
    merge_px: int | float | None = MERGE_PX,
    merge_depth: int | float = MERGE_DEPTH,
    restore_border: bool = True,
    blur_px: int | float | None = None,
    exact: bool = False,
) -> Int32[np.ndarray, "h w"]:
    """Find the cells of a distance map; ids run from 1 without gaps, in the raster order of the cells' first peaks.

    Peaks are the 8-connected components of ``distance > cells_max``, so that bent, nested and one-pixel peaks count.
    The flood of ``-distance`` from them is 4-connected, within ``distance > cell_fill``. With ``merge_px=None`` and
    ``restore_border=False`` that is all, and the labels are those of ``skimage.segmentation.watershed`` on the same
    float32 map, ties included.

    Parameters
    ----------
    distance
        0 on the background to 1 in the middle of cells. Taken as float32. Values may overshoot [0, 1] by up to 0.5.
    cells_max, cell_fill
        In [0, 1), ``cell_fill`` not above ``cells_max``; both are exclusive. The defaults are SAMCell's.
    min_area_px
        Cells of fewer pixels, counted at the very end, become background.
    merge_px
        Two neighbours are one cell if the saddle between them is wider: half its width in pixels, see
        `dinocell.eval.segmentation.refine`. None merges nothing, also not by ``merge_depth``.
    merge_depth
        Two neighbours are one cell if the lower peak rises less than this above the saddle, in the map's unit. 0 merges
        nothing that ``merge_px`` does not.
    restore_border
        Give each cell back the ring that ``cell_fill`` cuts off, see `dinocell.eval.segmentation.refine`.
    blur_px
        For ``restore_border``: the smoothness of the map, as the sigma of a Gaussian. None estimates it from the peaks'
        heights; 0 takes the map for perfect, and each label grows by ``cell_fill / (1 - cell_fill)`` of its radius.
    exact
        Flood with scikit-image itself: the same labels, several times slower. For checking.

    Raises
    ------
    DinocellError
        If the map is not a two-dimensional array of floating point numbers, has no pixels, has NaN or values far
        outside [0, 1], or an option is out of its range.
    """
    cells_max, cell_fill = checked_thresholds(cells_max, cell_fill)
    refinement = Refinement(
        min_area_px=min_area_px,
        merge_px=merge_px,
        merge_depth=merge_depth,
        restore_border=restore_border,
        blur_px=blur_px,
    )
    distance = _checked_map(distance)
    labels = _library_flood(distance, cells_max, cell_fill) if exact else _flood(distance, cells_max, cell_fill).labels
    return refine_labels(labels, distance, cell_fill=cell_fill, refinement=refinement)


def flood(distance: Float[np.ndarray, "h w"], *, cells_max: int | float, lowest_fill: int | float) -> Flooded:
    """Flood once for all fill thresholds from ``lowest_fill`` up.

    Raises
    ------
    DinocellError
        As `distance_to_labels`.
    """
    cells_max, lowest_fill = checked_thresholds(cells_max, lowest_fill)
    distance = _checked_map(distance)
    course = _flood(distance, cells_max, lowest_fill)
    is_peak = distance > np.float32(cells_max)
    levels = course.levels if course.levels.size else np.zeros(1, np.float32)
    return Flooded(
        labels=course.labels,
        taken_at=np.where(is_peak, distance, levels[course.rank]),
        distance=distance,
        cells_max=cells_max,
        lowest_fill=lowest_fill,
        exact_below=_exact_below(course),
    )


def cut(flooded: Flooded, cell_fill: int | float) -> Int32[np.ndarray, "h w"]:
    """Return the plain labels at a higher fill threshold, without flooding again.

    Equal, in every pixel, to `distance_to_labels` without mending. A pixel stays if the flood took it above the
    threshold: water that comes to it through lower ground would not have come at all, and what is below the threshold
    is taken after all that is above. One thing needs care. Pixels of exactly equal height above ``cells_max`` leave
    scikit-image's heap in an order that also depends on how much ground there is around the peaks. Where `flood` found
    that such a tie may decide a border, and the cut reaches that ground, the map is flooded again. On maps of
    continuous values, as networks give, this is next to never; on maps of a few hundred values, where ``cell_fill`` is
    close to ``cells_max``.

    Raises
    ------
    DinocellError
        If ``cell_fill`` is not from ``lowest_fill`` to ``cells_max``.
    """
    if not flooded.lowest_fill <= cell_fill <= flooded.cells_max:
        raise DinocellError(
            f"cell_fill: expected {flooded.lowest_fill} (the flood's lowest) to {flooded.cells_max} (its cells_max), "
            f"got {cell_fill}"
        )
    if np.float32(cell_fill) >= flooded.exact_below:
        return _flood(flooded.distance, flooded.cells_max, cell_fill).labels
    return np.where(flooded.taken_at > np.float32(cell_fill), flooded.labels, 0)


def checked_thresholds(cells_max: int | float, cell_fill: int | float) -> tuple[float, float]:
    """Return the two thresholds, or say what is wrong with them.

    Raises
    ------
    DinocellError
        If one is not in [0, 1), or ``cell_fill`` is above ``cells_max``.
    """
    for name, value in (("cells_max", cells_max), ("cell_fill", cell_fill)):
        if not 0 <= value < 1:
            raise DinocellError(f"{name}: expected at least 0 and less than 1, got {value}")
    if cell_fill > cells_max:
        raise DinocellError(f"cell_fill: expected at most cells_max, which is {cells_max}, got {cell_fill}")
    return float(cells_max), float(cell_fill)


def _checked_map(distance: _Array) -> _Array:
    """Return the map as float32 in C order, or say what is wrong with it."""
    if distance.ndim != 2:
        raise DinocellError(f"distance: expected one map (h w), got an array of shape {distance.shape}")
    if not np.issubdtype(distance.dtype, np.floating):
        raise DinocellError(
            f"distance: expected floating point numbers from 0 to 1, got values of type {distance.dtype}"
        )
    if distance.size == 0:
        raise DinocellError(f"distance: expected at least one pixel, got a map of shape {distance.shape}")
    if distance.size > np.iinfo(np.int32).max // 2:
        raise DinocellError(f"distance: expected fewer than 2^30 pixels at a time, got a map of shape {distance.shape}")
    lowest, highest = distance.min(), distance.max()
    if np.isnan(lowest):
        count, total = np.count_nonzero(np.isnan(distance)), distance.size
        raise DinocellError(f"distance: expected a number in every pixel, got NaN in {count} of {total}")
    if lowest < -_TOLERANCE or highest > 1 + _TOLERANCE:
        raise DinocellError(
            f"distance: expected values from 0 to 1, got {lowest:.4g} to {highest:.4g}; "
            "divide each cell's distance by its largest (labels_to_distance does)"
        )
    return np.ascontiguousarray(distance, np.float32)


class _Course(NamedTuple):
    """A flood and how it went: ``rank`` says on which of the ``levels`` each pixel was taken.

    Flat arrays of the framed map: ``bits``, ``owner``, ``ring``, the first pixels beside the
    peaks, and ``claimers``, the peak pixels that took these.
    """

    labels: _Array
    rank: _Array
    levels: _Array
    bits: _Array
    owner: _Array
    ring: _Array
    claimers: _Array
    width: int


def _flood(distance: _Array, cells_max: float, cell_fill: float) -> _Course:
    peak, fill = np.float32(cells_max), np.float32(cell_fill)
    peaks, is_ground = _peaks(distance, peak), distance > fill
    num_markers = int(np.count_nonzero(peaks))
    num_ground = int(np.count_nonzero(is_ground)) - num_markers
    shape, inner = (distance.shape[0] + 2, distance.shape[1] + 2), (slice(1, -1), slice(1, -1))
    heights, framed_owner = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    heights[inner] = distance
    np.copyto(framed_owner[inner], peaks, where=is_ground)
    del peaks, is_ground  # five bytes a pixel, which count in giant images
    width, bits, owner = shape[1], heights.reshape(-1).view(np.int32), framed_owner.reshape(-1)
    lowest, highest = int(fill.view(np.int32)), int(peak.view(np.int32))
    with ThreadPoolExecutor(max_workers=1) as other_core:
        ranked = other_core.submit(rank_heights, bits, lowest, highest, num_ground)
        ring, claimers = claim_ring(bits, owner, num_markers, num_ground, width)
        rank, level_bits = ranked.result()
    flood_ring(rank, level_bits.size, owner, ring, num_ground, width)
    return _Course(
        labels=np.maximum(framed_owner[inner], 0),
        rank=rank.reshape(shape)[inner],
        levels=level_bits.view(np.float32),
        bits=bits,
        owner=owner,
        ring=ring,
        claimers=claimers,
        width=width,
    )


def _exact_below(course: _Course) -> float:
    """Return infinity if no tie among peak pixels can decide a border, else the height of the lowest ring pixel.

    The order of equally high peak pixels matters in two cases only. Two of different peaks claim the same ring pixel;
    or they claim two of equal height, which then stand in one level's queue in that order. Otherwise those who stand
    there in no certain order have one label, and so has all that they claim together.
    """
    bits, owner, ring = course.bits, course.owner, course.ring
    claimed_from = bits[course.claimers]
    tied = False
    for step in (-course.width, -1, 1, course.width):
        tied |= bool(np.any((bits[ring + step] == claimed_from) & (owner[ring + step] != owner[ring])))
    claims = (claimed_from.astype(np.int64) << 32) | bits[ring]
    order = np.argsort(claims)
    claims, labels = claims[order], owner[ring][order]
    tied |= bool(np.any((claims[1:] == claims[:-1]) & (labels[1:] != labels[:-1])))
    return float(bits[ring].min().view(np.float32)) if tied else math.inf


def _library_flood(distance: _Array, cells_max: float, cell_fill: float) -> _Array:
    from skimage.segmentation import watershed

    mask = distance > np.float32(cell_fill)
    labels: _Array = watershed(-distance, _peaks(distance, np.float32(cells_max)), mask=mask)  # type: ignore[no-untyped-call]
    return labels


def _peaks(distance: _Array, cells_max: np.float32) -> _Array:
    peaks = np.empty(distance.shape, np.int32)
    ndimage.label(distance > cells_max, _EIGHT_CONNECTED, output=peaks)
    return peaks


# --- flood ---------------------------------------------------------------------------------------------------------
#
# The kernels of the seeded watershed: which peak claims which pixel, in the order of scikit-image's heap.
#
# scikit-image's watershed keeps pixels in one binary heap, ordered by height and then by age, which is the number of
# pixels queued before. These kernels give the same labels for less, from three facts:
#
# - Markers are all that is higher than a threshold, so every marker pixel leaves the heap before any other, at age 0.
#   Which of two equally high ones goes first is decided by the heap's own swaps alone. ``claim_ring`` repeats these,
# with
#   each pixel that is not a marker reduced to a place holder: it lies below all markers and never moves one.
# - The water only sinks: a pixel higher than the present level is taken at that level (scikit-image 0.26). So the
# levels
#   are visited once, from high to low, and one first-in first-out queue a level replaces the heap.
# - Only the order of heights matters. ``rank_heights`` sorts the pixels once, by radix, and equal heights share a
# level:
#   exact on any float32 map, not only on one that was rounded to 256 or 65,536 levels.
#
# Images are flat here, with one pixel of frame around them. ``owner`` holds -1 where nothing is to be flooded and in
# the
# frame, 0 where nobody was yet, and else the label. ``bits`` are float32 heights seen as int32: in the same order,
# since
# no height that counts is negative.

__all__ = ["claim_ring", "flood_ring", "rank_heights"]


# A heap's entry is a key, smallest first, in the upper 32 bits, and a pixel in the lower. This key is above them all.
_PLACE_HOLDER = np.int64(0x7FFFFFFF) << 32
_HIGHEST = 0x7F000000  # bits of 1.7e38
_DIGIT = 11
_DIGIT_MASK = (1 << _DIGIT) - 1


@compiled
def claim_ring(bits: _Array, owner: _Array, num_markers: int, num_ground: int, width: int) -> tuple[_Array, _Array]:
    """Let each marker pixel, the highest first, claim its free neighbours.

    Returns these, the oldest first, and for each the marker pixel that claimed it.

    ``width`` is the framed image's; ``owner`` is written to.
    """
    ring = np.empty(min(4 * num_markers, num_ground), np.int32)
    claimers = np.empty(ring.size, np.int32)
    heap = np.empty(num_markers + ring.size + 1, np.int64)
    size = 0
    for pixel in range(owner.size):
        if owner[pixel] > 0:
            _push(heap, size, ((_HIGHEST - bits[pixel]) << 32) | pixel)
            size += 1
    num_ring = 0
    for _ in range(num_markers):
        pixel = heap[0] & 0xFFFFFFFF
        size -= 1
        _drop_first(heap, size)
        for neighbour in (pixel - width, pixel - 1, pixel + 1, pixel + width):
            if owner[neighbour] == 0:
                owner[neighbour] = owner[pixel]
                ring[num_ring], claimers[num_ring] = neighbour, pixel
                num_ring += 1
                heap[size] = _PLACE_HOLDER
                size += 1
    return ring[:num_ring], claimers[:num_ring]


@inlined
def _push(heap: _Array, size: int, entry: int) -> None:
    """Add an entry at the end and let it rise past parents with a larger key."""
    place = size
    while place > 0:
        parent = (place - 1) >> 1
        if (entry >> 32) >= (heap[parent] >> 32):
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = entry


@inlined
def _drop_first(heap: _Array, size: int) -> None:
    """Put the entry after the ``size`` that remain in the first one's place; let it sink past children of smaller key.

    Of two children with equal keys it changes places with the left one.
    """
    entry = heap[size]
    heap[size] = _PLACE_HOLDER  # so that a missing right child is never the smaller one
    place, child = 0, 1
    while child < size:
        if (heap[child + 1] >> 32) < (heap[child] >> 32):
            child += 1
        if (heap[child] >> 32) >= (entry >> 32):
            break
        heap[place] = heap[child]
        place = child
        child = 2 * place + 1
    heap[place] = entry


@compiled
def rank_heights(bits: _Array, lowest: int, highest: int, count: int) -> tuple[_Array, _Array]:
    """Sort the ``count`` pixels with ``lowest < bits <= highest`` into levels, 0 the highest, equal heights alike.

    Returns each pixel's level (0 where it has none), and the ``bits`` of each level.
    """
    entries, spare = np.empty(count, np.int64), np.empty(count, np.int64)
    number = 0
    for pixel in range(bits.size):
        if lowest < bits[pixel] <= highest:
            entries[number] = ((highest - bits[pixel]) << 32) | pixel
            number += 1
    start = np.empty((1 << _DIGIT) + 1, np.int64)
    shift = 32
    while (highest - lowest) >> (shift - 32) > 0:
        start[:] = 0
        for number in range(count):
            start[((entries[number] >> shift) & _DIGIT_MASK) + 1] += 1
        for digit in range(_DIGIT_MASK):
            start[digit + 1] += start[digit]
        for number in range(count):
            digit = (entries[number] >> shift) & _DIGIT_MASK
            spare[start[digit]] = entries[number]
            start[digit] += 1
        entries, spare = spare, entries
        shift += _DIGIT
    rank = np.zeros(bits.size, np.int32)
    level_bits = np.empty(count, np.int32)
    num_levels = 0
    for number in range(count):
        height = highest - (entries[number] >> 32)
        if num_levels == 0 or height != level_bits[num_levels - 1]:
            level_bits[num_levels] = height
            num_levels += 1
        rank[entries[number] & 0xFFFFFFFF] = num_levels - 1
    return rank, level_bits[:num_levels]


@compiled
def flood_ring(rank: _Array, num_levels: int, owner: _Array, ring: _Array, num_ground: int, width: int) -> None:
    """Flood the ``num_ground`` pixels from the ring downwards.

    ``owner`` is written to, and ``rank`` becomes the level at which each pixel was taken: the deepest that the best way
    from a marker to it has to sink to.
    """
    # All that were ever queued, in order of age: a pixel, and the age of the next one of its level. Each level knows
    # the ages of its first and its last.
    queue = np.empty((num_ground, 2), np.int32)
    ends = np.full((num_levels, 2), -1, np.int32)
    for age in range(ring.size):
        _queue(queue, ends, age, ring[age], rank[ring[age]])
    age = ring.size
    for level in range(num_levels):
        present = ends[level, 0]
        while present >= 0:
            pixel = queue[present, 0]
            label = owner[pixel]
            for neighbour in (pixel - width, pixel - 1, pixel + 1, pixel + width):
                if owner[neighbour] == 0:
                    owner[neighbour] = label
                    taken_at = max(rank[neighbour], level)
                    rank[neighbour] = taken_at
                    _queue(queue, ends, age, neighbour, taken_at)
                    age += 1
            present = queue[present, 1]


@inlined
def _queue(queue: _Array, ends: _Array, age: int, pixel: int, level: int) -> None:
    """Put a pixel at the end of its level's queue, a linked list."""
    queue[age, 0], queue[age, 1] = pixel, -1
    if ends[level, 0] < 0:
        ends[level, 0] = age
    else:
        queue[ends[level, 1], 1] = age
    ends[level, 1] = age
