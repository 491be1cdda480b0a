"""The kernels of the seeded watershed: which peak claims which pixel, in the order of scikit-image's heap.

scikit-image's watershed keeps pixels in one binary heap, ordered by height and then by age, which is the number of
pixels queued before. These kernels give the same labels for less, from three facts:

- Markers are all that is higher than a threshold, so every marker pixel leaves the heap before any other, at age 0.
  Which of two equally high ones goes first is decided by the heap's own swaps alone. ``claim_ring`` repeats these, with
  each pixel that is not a marker reduced to a place holder: it lies below all markers and never moves one.
- The water only sinks: a pixel higher than the present level is taken at that level (scikit-image 0.26). So the levels
  are visited once, from high to low, and one first-in first-out queue a level replaces the heap.
- Only the order of heights matters. ``rank_heights`` sorts the pixels once, by radix, and equal heights share a level:
  exact on any float32 map, not only on one that was rounded to 256 or 65,536 levels.

Images are flat here, with one pixel of frame around them. ``owner`` holds -1 where nothing is to be flooded and in the
frame, 0 where nobody was yet, and else the label. ``bits`` are float32 heights seen as int32: in the same order, since
no height that counts is negative.
"""

import numpy as np

from dinocell.runtime.compiled import compiled, inlined

__all__ = ["claim_ring", "flood_ring", "rank_heights"]

_Array = np.ndarray

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
