"""Counter-based randomness: a random number is a hash of what it is for, so it needs no state and no order of calls.

splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014) is the whole of it: a
64-bit bijection that passes BigCrush as a counter generator. The compiled twin of :func:`splitmix64` is in
``sampling/kernels.py``; a test holds the two together.
"""

from __future__ import annotations

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# What a stream of random numbers is for. Two purposes never share a stream, whatever their other coordinates are.
SHUFFLE, DRAW, LOADER, DROPOUT = 1, 2, 3, 4


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The hash of each element; uint64 in, uint64 of the same shape out."""
    with np.errstate(over="ignore"):
        z = x.astype(np.uint64, copy=False) + np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def seeded(values: np.ndarray, seed: int) -> np.ndarray:
    """One of 2^64 hashes of integers, chosen by ``seed``; uint64 of the same shape."""
    return splitmix64(np.asarray(values).astype(np.uint64) + np.uint64(seed * GOLDEN % 2**64))


def stream(*coordinates: int) -> np.uint64:
    """One number for a tuple of integers, e.g. ``stream(DRAW, seed, epoch, index, hop)``; negative ones count mod 2^64."""
    state = np.zeros(1, dtype=np.uint64)
    for value in coordinates:
        state = splitmix64(state ^ np.array([int(value) & _MASK], dtype=np.uint64))
    return state[0]


def keys(base: np.uint64, ids: np.ndarray) -> np.ndarray:
    """A uint64 key per id: ``splitmix64(base ^ id)``. Distinct ids get distinct keys (splitmix64 is a bijection)."""
    return splitmix64(np.asarray(ids).astype(np.uint64) ^ base)
