"""Communication in the profile of a step: how long each kind of collective takes, and how much of that nothing else covers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]
"""Start and end, on the profile's clock."""

KINDS = (
    ("all-reduce", r"all_?reduce"), ("reduce-scatter", r"reduce_?scatter"), ("all-gather", r"all_?gather"),
    ("send and receive", r"send|recv|all_?to_?all"), ("broadcast", r"broadcast"), ("reduce", r"reduce"),
)  # fmt: skip
"""Of collectives, by a part of the name of NCCL's kernel (ncclDevKernel_AllReduce_Sum_f32_RING_LL) or of gloo's work
(gloo:all_reduce); the first match counts."""


@dataclass(frozen=True)
class Communication:
    """Of one kind in a step; on a rank that is early its collectives take as long as the others keep it waiting."""

    calls: int
    ms: float
    """While at least one of them runs."""
    exposed_ms: float
    """Of that, while nothing is computed."""

    @property
    def overlapped_ms(self) -> float:
        return max(0.0, self.ms - self.exposed_ms)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that neither touch nor overlap, in their order."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        elif end > start:
            merged.append([start, end])
    return [(start, end) for start, end in merged]


def length(intervals: Iterable[Interval]) -> float:
    """Of the union."""
    return sum(end - start for start, end in union(intervals))


def uncovered(intervals: Iterable[Interval], cover: Iterable[Interval]) -> float:
    """Length of what lies in `intervals` and not in `cover`."""
    inside = union(intervals)
    # |A without B| = |A or B| - |B|
    cover = union(cover)
    return max(0.0, length([*inside, *cover]) - length(cover))


def kind_of(name: str) -> str | None:
    """The kind of collective that a kernel or a work of gloo's is; None for everything else."""
    if not re.search(r"nccl|gloo:", name, flags=re.IGNORECASE):
        return None
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, flags=re.IGNORECASE)), "other")


def communication(events: Iterable[tuple[float, float, str]]) -> dict[str, Any]:
    """Communication against computation.

    Args:
        events: start and end in microseconds and name of what ran on the device; on a CPU, gloo's works and torch's operators.
    Returns:
        `all` and each kind of collective that occurs: calls, ms, exposed_ms, overlapped_ms; `computing_ms` and `span_ms`, from
        the first event to the end of the last.
    """
    computing: list[Interval] = []
    found: dict[str, list[Interval]] = {}
    for start, end, name in events:
        kind = kind_of(name)
        (computing if kind is None else found.setdefault(kind, [])).append((start, end))

    def describe(intervals: list[Interval]) -> dict[str, float]:
        one = Communication(len(intervals), length(intervals) / 1000, uncovered(intervals, computing) / 1000)
        return asdict(one) | {"overlapped_ms": one.overlapped_ms}

    everything = [interval for intervals in found.values() for interval in intervals]
    times = [time for interval in [*computing, *everything] for time in interval]
    return {
        "all": describe(everything),
        **{kind: describe(found[kind]) for kind, _ in (*KINDS, ("other", "")) if kind in found},
        "computing_ms": length(computing) / 1000,
        "span_ms": (max(times) - min(times)) / 1000 if times else 0.0,
    }
