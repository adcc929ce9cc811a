"""Shuffling that depends on nothing but its seed: not on NumPy's generators, whose streams may change between releases."""

from __future__ import annotations

import numpy as np

ORDER_VERSION = 1
"""Raised with any change that would put rows into another order; part of every run's fingerprint."""


def permutation(size: int, *seed: int) -> np.ndarray:
    """A permutation of range(size), int64, by sorting hashes of (seed, index): a function of its arguments alone."""
    key = np.zeros(1, dtype=np.uint64)
    for part in seed:
        key = _mix(key ^ np.array([part], dtype=np.uint64))
    return np.argsort(_mix(key + np.arange(size, dtype=np.uint64)), kind="stable")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit integers without visible structure."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
