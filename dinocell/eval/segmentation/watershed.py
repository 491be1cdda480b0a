"""Distance maps to labelled cells: the inverse of `dinocell.labelled.distance`.

SAMCell's rule: each connected component above ``cells_max`` is the peak of a cell and seeds a watershed, which floods
everything above ``cell_fill``. The labels are then refined (`dinocell.eval.segmentation.refine`): fragments of one cell
are merged, and boundaries corrected.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, Integer
from scipy import ndimage

from dinocell.errors import require
from dinocell.eval.segmentation.refine import MERGE_DEPTH, MERGE_PX, Refinement, refine_labels
from dinocell.runtime.jit import compiled, inlined

# SAMCell's defaults, found on its own held-out images.
CELLS_MAX = 0.47
CELL_FILL = 0.09

_EIGHT_CONNECTED = np.ones((3, 3), bool)
# A map that is far outside [0, 1] is another quantity (pixels, 8-bit grey, logits). A network without a sigmoid may
# overshoot a little: only the order of values and the thresholds matter.
_TOLERANCE = 0.5

_Ints = Integer[np.ndarray, " _"]
_Table = Integer[np.ndarray, "_ 2"]

# A heap entry has its key, smallest first, in the upper 32 bits, and the pixel in the lower. This key is above all.
_PLACE_HOLDER = np.int64(0x7FFFFFFF) << 32
_HIGHEST = 0x7F000000  # bits of 1.7e38
_DIGIT = 11
_DIGIT_MASK = (1 << _DIGIT) - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Flooded:
    """A flood that can be cut at any fill threshold from ``lowest_fill``; see `flood` and `cut`."""

    labels: Int32[np.ndarray, "h w"]  # the peak whose flood reached the pixel, or 0; numbered from 1 in raster order
    taken_at: Float32[np.ndarray, "h w"]  # the flood's level then: the pixel's height, or less behind a lower saddle
    distance: Float32[np.ndarray, "h w"]  # the map
    cells_max: float
    lowest_fill: float
    exact_below: float  # cuts below this equal a flood from scratch; infinity on nearly all maps


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
) -> Int32[np.ndarray, "h w"]:
    """Return the cells of a distance map; ids run from 1 without gaps, in the raster order of the cells' first peaks.

    Peaks are the 8-connected components of ``distance > cells_max``, of any shape and size. The flood of ``-distance``
    from them is 4-connected, within ``distance > cell_fill``. With ``merge_px=None`` and ``restore_border=False`` that
    is all, and the labels are those of ``skimage.segmentation.watershed`` on the same float32 map, ties included.

    Parameters
    ----------
    distance
        From 0 in the background to 1 in the middle of cells; converted to float32. May overshoot [0, 1] by up to 0.5.
    cells_max, cell_fill
        In [0, 1), ``cell_fill`` not above ``cells_max``; both are exclusive. The defaults are SAMCell's.
    min_area_px
        Smaller cells become background, after all other steps.
    merge_px
        Merge neighbours if the saddle between them is wider than this half-width in pixels, see
        `dinocell.eval.segmentation.refine`. None: no merging, not by ``merge_depth`` either.
    merge_depth
        Merge neighbours if the lower peak rises less than this above the saddle, in the map's unit. 0: only by
        ``merge_px``.
    restore_border
        Boundary refinement: add the ring that ``cell_fill`` cuts off each cell, see
        `dinocell.eval.segmentation.refine`.
    blur_px
        For ``restore_border``: smoothness of the map, as the sigma of a Gaussian. None estimates it from the heights of
        the peaks; 0 is a perfect map, where each label grows by ``cell_fill / (1 - cell_fill)`` of its radius.

    Raises
    ------
    DinocellError
        If the map is not a two-dimensional array of floating point numbers, has no pixels, has NaN or values far
        outside [0, 1], or an option is out of range.
    """
    refinement = Refinement(
        min_area_px=min_area_px,
        merge_px=merge_px,
        merge_depth=merge_depth,
        restore_border=restore_border,
        blur_px=blur_px,
    )
    distance = _checked(distance, cells_max, cell_fill)
    labels = _flood(distance, cells_max, cell_fill).labels
    return refine_labels(labels, distance, cell_fill=cell_fill, refinement=refinement)


def flood(distance: Float[np.ndarray, "h w"], *, cells_max: int | float, lowest_fill: int | float) -> Flooded:
    """Flood once for all fill thresholds from ``lowest_fill``, for `cut`; errors as in `distance_to_labels`."""
    distance = _checked(distance, cells_max, lowest_fill)
    course = _flood(distance, cells_max, lowest_fill)
    is_peak = distance > np.float32(cells_max)
    levels = course.levels if course.levels.size else np.zeros(1, np.float32)
    return Flooded(
        labels=course.labels,
        taken_at=np.where(is_peak, distance, levels[course.rank]),
        distance=distance,
        cells_max=float(cells_max),
        lowest_fill=float(lowest_fill),
        exact_below=_exact_below(course),
    )


def cut(flooded: Flooded, cell_fill: int | float) -> Int32[np.ndarray, "h w"]:
    """Return the labels at a higher fill threshold without flooding again, before any refinement.

    Equal to `distance_to_labels` without refinement in every pixel. A pixel stays if the flood reached it above the
    threshold: pixels behind lower ground would not have been reached, and pixels below the threshold are flooded after
    all pixels above it. One case needs care: pixels of exactly equal height above ``cells_max`` leave scikit-image's
    heap in an order that also depends on the pixels around the peaks. If `flood` found that such a tie may decide a
    border, and the cut reaches it, the map is flooded again. This hardly ever happens on maps of continuous values, as
    networks predict, but does on maps of a few hundred values if ``cell_fill`` is close to ``cells_max``. A
    DinocellError if ``cell_fill`` is not from ``lowest_fill`` to ``cells_max``.
    """
    lowest, highest = flooded.lowest_fill, flooded.cells_max
    is_flooded = lowest <= cell_fill <= highest
    require(is_flooded, f"cell_fill: expected {lowest} to {highest}, as flooded, got {cell_fill}")
    if np.float32(cell_fill) >= flooded.exact_below:
        return _flood(flooded.distance, flooded.cells_max, cell_fill).labels
    return np.where(flooded.taken_at > np.float32(cell_fill), flooded.labels, 0)


def _checked(distance: np.ndarray, cells_max: int | float, cell_fill: int | float) -> Float32[np.ndarray, "h w"]:
    """Return the map as float32 in C order."""
    low, high = (distance.min(), distance.max()) if distance.size and distance.dtype.kind == "f" else (0, 0)
    checks = (
        ("cells_max", 0 <= cells_max < 1, f"at least 0 and less than 1, got {cells_max}"),
        ("cell_fill", 0 <= cell_fill < 1, f"at least 0 and less than 1, got {cell_fill}"),
        ("cell_fill", cell_fill <= cells_max, f"at most cells_max, which is {cells_max}, got {cell_fill}"),
        (
            "distance",
            distance.ndim == 2 and distance.dtype.kind == "f" and 0 < distance.size <= np.iinfo(np.int32).max // 2,
            f"one map (h w) of floating point numbers and at most 2^30 pixels, got {distance.dtype}, {distance.shape}",
        ),
        ("distance", not np.isnan(low), "a number in every pixel, got NaN"),
        (
            "distance",
            low >= -_TOLERANCE and high <= 1 + _TOLERANCE,
            f"values from 0 to 1, got {low:.4g} to {high:.4g}; divide each cell's distance by its maximum "
            "(labels_to_distance does)",
        ),
    )
    for name, is_valid, expected in checks:
        require(is_valid, f"{name}: expected {expected}")
    return np.ascontiguousarray(distance, np.float32)


class _Flood(NamedTuple):
    """A flood and its course; the last five are of the framed map, flat."""

    labels: Int32[np.ndarray, "h w"]
    rank: Int32[np.ndarray, "h w"]  # the level of each pixel
    levels: Float32[np.ndarray, " levels"]  # the heights that the flood fell through
    bits: Int32[np.ndarray, " framed"]
    owner: Int32[np.ndarray, " framed"]
    ring: Int32[np.ndarray, " ring"]  # the first pixels next to the peaks
    claimers: Int32[np.ndarray, " ring"]  # the peak pixels that claimed these
    width: int


def _flood(distance: Float32[np.ndarray, "h w"], cells_max: int | float, cell_fill: int | float) -> _Flood:
    peak, fill = np.float32(cells_max), np.float32(cell_fill)
    # Markers: every 8-connected component above cells_max. Ground: all pixels that may be flooded.
    peaks, is_ground = np.empty(distance.shape, np.int32), distance > fill
    ndimage.label(distance > peak, _EIGHT_CONNECTED, output=peaks)
    num_markers = int(np.count_nonzero(peaks))
    num_ground = int(np.count_nonzero(is_ground)) - num_markers
    # A frame of one pixel, so that the kernels need no check for the image's border.
    shape, inner = (distance.shape[0] + 2, distance.shape[1] + 2), (slice(1, -1), slice(1, -1))
    heights, framed_owner = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    heights[inner] = distance
    np.copyto(framed_owner[inner], peaks, where=is_ground)
    del peaks, is_ground  # five bytes per pixel, which matter in giant images
    # Non-negative float32 numbers have the order of their bits read as int32, which sort faster.
    width, bits, owner = shape[1], heights.reshape(-1).view(np.int32), framed_owner.reshape(-1)
    lowest, highest = int(fill.view(np.int32)), int(peak.view(np.int32))
    # Sorting the ground and claiming the ring around the markers are independent: one core each.
    with ThreadPoolExecutor(max_workers=1) as other_core:
        ranked = other_core.submit(rank_heights, bits, lowest, highest, num_ground)
        ring, claimers = claim_ring(bits, owner, num_markers, num_ground, width)
        rank, level_bits = ranked.result()
    flood_ring(rank, level_bits.size, owner, ring, num_ground, width)
    return _Flood(
        labels=np.maximum(framed_owner[inner], 0),
        rank=rank.reshape(shape)[inner],
        levels=level_bits.view(np.float32),
        bits=bits,
        owner=owner,
        ring=ring,
        claimers=claimers,
        width=width,
    )


def _exact_below(course: _Flood) -> float:
    """Return infinity if no tie among peak pixels can decide a border, else the height of the lowest ring pixel.

    The order of equally high peak pixels matters in two cases only: two of different peaks claim the same ring pixel,
    or they claim two ring pixels of equal height, which then queue at one level in that order. In all other cases the
    pixels in doubtful order have one label, and so have all pixels that they claim together.
    """
    bits, owner, ring = course.bits, course.owner, course.ring
    claimed_from = bits[course.claimers]
    tied = False
    # First case: another neighbour of the ring pixel is as high as its claimer, and of another peak.
    for step in (-course.width, -1, 1, course.width):
        tied |= bool(np.any((bits[ring + step] == claimed_from) & (owner[ring + step] != owner[ring])))
    # Second case: two claims with equal heights of claimer and ring pixel, by different peaks.
    claims = (claimed_from.astype(np.int64) << 32) | bits[ring]
    order = np.argsort(claims)
    claims, labels = claims[order], owner[ring][order]
    tied |= bool(np.any((claims[1:] == claims[:-1]) & (labels[1:] != labels[:-1])))
    return float(bits[ring].min().view(np.float32)) if tied else math.inf


# scikit-image's watershed keeps pixels in one binary heap, ordered by height and then by age, which is the number of
# pixels queued before. These kernels give the same labels faster, by three facts:
#
# - Markers are all pixels above a threshold, so every marker pixel leaves the heap before any other, at age 0. Which of
#   two equally high ones goes first is decided by the swaps of the heap alone. ``claim_ring`` repeats these, with each
#   pixel that is not a marker reduced to a placeholder: it is below all markers and never moves one.
# - The level only falls: a pixel above the current level is taken at that level (scikit-image 0.26). So the levels are
#   visited once, from high to low, and one first-in first-out queue per level replaces the heap.
# - Only the order of heights matters. ``rank_heights`` sorts the pixels once, by radix, and equal heights share a
#   level: exact on any float32 map, not only on one that was rounded to 256 or 65,536 levels.
#
# Images are flat here, with a frame of one pixel. ``owner`` is -1 in the frame and where nothing is to be flooded, 0
# where no label has arrived yet, and else the label. ``bits`` are float32 heights read as int32, in the same order, as
# no height that counts is negative.


@compiled
def claim_ring(bits: _Ints, owner: _Ints, num_markers: int, num_ground: int, width: int) -> tuple[_Ints, _Ints]:
    """Let each marker pixel, the highest first, claim its free neighbours; ``owner`` is written to.

    Returns the claimed pixels in order of age, and for each the marker pixel that claimed it. ``width`` is that of the
    framed image.
    """
    ring = np.empty(min(4 * num_markers, num_ground), np.int32)
    claimers = np.empty(ring.size, np.int32)
    heap = np.empty(num_markers + ring.size + 1, np.int64)
    size = 0
    # All markers enter the heap in raster order, as in scikit-image ...
    for pixel in range(owner.size):
        if owner[pixel] > 0:
            _push(heap, size, ((_HIGHEST - bits[pixel]) << 32) | pixel)
            size += 1
    num_ring = 0
    # ... and leave it by height. Each neighbour that they claim enters as a placeholder, which shapes later swaps.
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
def _push(heap: _Ints, size: int, entry: int) -> None:
    """Add an entry at the end of the heap and move it up past parents with a larger key."""
    place = size
    while place > 0:
        parent = (place - 1) >> 1
        if (entry >> 32) >= (heap[parent] >> 32):
            break
        heap[place] = heap[parent]
        place = parent
    heap[place] = entry


@inlined
def _drop_first(heap: _Ints, size: int) -> None:
    """Replace the first entry by the last one, which moves down past children with a smaller key (if equal: left)."""
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
def rank_heights(bits: _Ints, lowest: int, highest: int, count: int) -> tuple[_Ints, _Ints]:
    """Sort the ``count`` pixels with ``lowest < bits <= highest`` into levels, 0 the highest; equal heights share one.

    Returns the level of each pixel (0 where it has none), and the ``bits`` of each level.
    """
    entries, spare = np.empty(count, np.int64), np.empty(count, np.int64)
    index = 0
    for pixel in range(bits.size):
        if lowest < bits[pixel] <= highest:
            entries[index] = ((highest - bits[pixel]) << 32) | pixel
            index += 1
    # Radix sort by depth below the highest, 11 bits per pass from the lowest; stable, so pixels stay in raster order.
    start = np.empty((1 << _DIGIT) + 1, np.int64)
    shift = 32
    while (highest - lowest) >> (shift - 32) > 0:
        start[:] = 0
        for index in range(count):
            start[((entries[index] >> shift) & _DIGIT_MASK) + 1] += 1
        for digit in range(_DIGIT_MASK):
            start[digit + 1] += start[digit]
        for index in range(count):
            digit = (entries[index] >> shift) & _DIGIT_MASK
            spare[start[digit]] = entries[index]
            start[digit] += 1
        entries, spare = spare, entries
        shift += _DIGIT
    # Each new height opens a level.
    rank = np.zeros(bits.size, np.int32)
    level_bits = np.empty(count, np.int32)
    num_levels = 0
    for index in range(count):
        height = highest - (entries[index] >> 32)
        if num_levels == 0 or height != level_bits[num_levels - 1]:
            level_bits[num_levels] = height
            num_levels += 1
        rank[entries[index] & 0xFFFFFFFF] = num_levels - 1
    return rank, level_bits[:num_levels]


@compiled
def flood_ring(rank: _Ints, num_levels: int, owner: _Ints, ring: _Ints, num_ground: int, width: int) -> None:
    """Flood the ``num_ground`` pixels from the ring downwards; ``owner`` and ``rank`` are written to.

    ``rank`` becomes the level at which each pixel is reached: the lowest point of the best path from a marker.
    """
    # All pixels ever queued, in order of age: the pixel, and the age of the next one of its level. Per level, the ages
    # of its first and last pixel.
    queue = np.empty((num_ground, 2), np.int32)
    ends = np.full((num_levels, 2), -1, np.int32)
    for age in range(ring.size):
        _queue(queue, ends, age, ring[age], rank[ring[age]])
    age = ring.size
    # From the highest level down: each queued pixel hands its label to its free neighbours, which queue at their own
    # level, or at the current one if they are higher.
    for level in range(num_levels):
        current = ends[level, 0]
        while current >= 0:
            pixel = queue[current, 0]
            label = owner[pixel]
            for neighbour in (pixel - width, pixel - 1, pixel + 1, pixel + width):
                if owner[neighbour] == 0:
                    owner[neighbour] = label
                    taken_at = max(rank[neighbour], level)
                    rank[neighbour] = taken_at
                    _queue(queue, ends, age, neighbour, taken_at)
                    age += 1
            current = queue[current, 1]


@inlined
def _queue(queue: _Table, ends: _Table, age: int, pixel: int, level: int) -> None:
    """Append a pixel to the queue of a level, a linked list."""
    queue[age, 0], queue[age, 1] = pixel, -1
    if ends[level, 0] < 0:
        ends[level, 0] = age
    else:
        queue[ends[level, 1], 1] = age
    ends[level, 1] = age
