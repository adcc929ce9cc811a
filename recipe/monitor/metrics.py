"""metrics.jsonl and the progress line, on rank 0."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recipe.files import read_json_lines


class WallClock:
    """Seconds that a run has taken over all its starts, set-up, evaluations, saves and lost steps included.

    What earlier starts took is read from the last line of metrics.jsonl, so that the time from there to their end is missing.
    """

    def __init__(self, path: Path, started: float):
        """`path`: metrics.jsonl, not yet cut back. `started`: when the process began, on the monotonic clock."""
        self._before = max((r.get("wall_seconds", 0.0) for r in read_json_lines(path)), default=0.0)
        self._started = started

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._started


class MetricsLog:
    """metrics.jsonl: one flat object a line, appended.

    A run that continues from step N first drops the lines beyond N, which the lost part of the run wrote.
    """

    def __init__(
        self,
        path: Path,
        resume_step: int | None = None,
        clock: WallClock | None = None,
        listeners: Sequence[Callable[[list[dict[str, Any]]], None]] = (),
    ):
        """`clock`: gives lines of steps and saves their `wall_seconds`; those of evaluations say the same for the same weights,
        whenever they are written. `listeners`: called with what has been written."""
        self._path, self._clock, self._listeners = path, clock, listeners
        if resume_step is not None and path.is_file():
            self._truncate(resume_step)
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append records; numbers that JSON cannot hold become null."""
        if self._clock:
            records = self._timed(records, self._clock.seconds())
        records = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()} for record in records
        ]
        self._handle.writelines(json.dumps(record) + "\n" for record in records)
        self._handle.flush()
        for listener in self._listeners:
            listener(records)

    @staticmethod
    def _timed(records: list[dict[str, Any]], now: float) -> list[dict[str, Any]]:
        """Steps are written together, after the last of them: an earlier one ended when the later ones began."""
        timed = []
        for record in reversed(records):
            timed.append(record | {"wall_seconds": round(now, 3)} if {"step_seconds", "save_seconds"} & set(record) else record)
            now -= record.get("step_seconds", 0.0)
        return timed[::-1]

    def close(self) -> None:
        self._handle.close()

    def _truncate(self, step: int) -> None:
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # a line cut off by a crash
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)


def format_duration(seconds: float) -> str:
    """5 -> 5s, 65 -> 1m05s, 3660 -> 1h01m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def progress_line(record: dict[str, Any], max_steps: int, seconds_left: float) -> str:
    """One dense line a log interval."""
    mfu = "" if record["mfu"] is None else f" | mfu {record['mfu']:.1%}"
    skipped = f" | {record['skipped']} skipped" if record["skipped"] else ""
    return (
        f"step {record['step']:>{len(str(max_steps))}}/{max_steps} | loss {record['train_loss']:.4f} | lr {record['lr']:.2e} | "
        f"norm {record['grad_norm']:.2f} | {record['tokens_per_second']:,.0f} tok/s{mfu} | "
        f"data wait {record['data_wait_fraction']:.1%}{skipped} | {format_duration(seconds_left)} left"
    )
