"""The live view of the run that this process trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

from recipe.config import Config
from recipe.files import read_json, read_json_lines
from recipe.monitor.metrics import WallClock, format_duration
from recipe.monitor.run_record import sample_files
from recipe.monitor.view import Glyphs, Line, View
from recipe.plan import Plan

ACTIVITIES = {
    "set-up": "setting up", "first step": "first batch, which may compile for minutes", "data": "training", "train": "training",
    "log": "training", "validate": "validation loss", "evaluate": "HellaSwag", "sample": "samples", "save": "saving",
}  # fmt: skip
"""What the phases of the watchdog are for a reader. Steps are too short to be told apart."""


class Phases(Protocol):
    """What the run is doing, and at which step: recipe.watchdog.Watchdog."""

    phase: str
    step: int


class LiveRun:
    """Gathers what goes to metrics.jsonl, and draws it."""

    def __init__(self, config: Config, plan: Plan, run: Path, clock: WallClock, phases: Phases):
        self._config, self._plan, self._run, self._clock, self._phases = config, plan, run, clock, phases
        self._view = new_view(run, config, plan)
        self._doing, self._since = "", 0.0

    def add(self, records: list[dict[str, Any]]) -> None:
        """Take in what has been written to metrics.jsonl."""
        self._view.add(records)

    def reload(self) -> None:
        """Start from what metrics.jsonl says, which has been cut back to where the run continues."""
        self._view = new_view(self._run, self._config, self._plan)
        self._view.add(read_json_lines(self._run / "metrics.jsonl"))
        self._view.sample = newest_sample(self._run, self._view.step)

    def lines(self, width: int, glyphs: Glyphs, over: bool = False) -> list[Line]:
        """The view now, or after the training is over."""
        if over:
            return self._view.lines(width, glyphs, None, self._clock.seconds())
        doing = ACTIVITIES.get(self._phases.phase, self._phases.phase)
        if doing != self._doing:
            if self._doing == ACTIVITIES["sample"]:
                self._view.sample = newest_sample(self._run, self._phases.step)
            self._doing, self._since = doing, time.monotonic()
        waited = time.monotonic() - self._since
        activity = doing if doing == "training" or waited < 2 else f"{doing}, for {format_duration(waited)}"
        return self._view.lines(width, glyphs, ("accent", activity), self._clock.seconds())


def new_view(run: Path, config: Config, plan: Plan | None) -> View:
    """The view of a run before its records and samples; without a plan it cannot say how much is left."""
    steps, tokens = (plan.max_steps, plan.total_tokens) if plan else (0, 0)
    memory = read_json(run / "environment.json").get("hardware", {}).get("gpu_memory_gib")
    return View(run.resolve().name, steps, tokens, config.price_per_hour, memory, config.evaluate_data)


def newest_sample(run: Path, step: int) -> str:
    """The first prompt's continuation in the newest samples up to a step; empty if there are none."""
    paths = sample_files(run, step)
    samples = read_json(paths[-1]).get("samples", []) if paths else []
    return f"{samples[0]['prompt']}{samples[0]['continuation']}" if samples else ""
