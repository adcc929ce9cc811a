"""The view of a run that another process trains, from its files. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from recipe.files import read_json
from recipe.monitor.console import Terminal
from recipe.monitor.live import new_view, newest_sample
from recipe.monitor.metrics import format_duration, progress_line
from recipe.monitor.run_record import RunRecord
from recipe.monitor.view import Glyphs, Line, View, paint

EXIT_CODES = {"finished": 0, "running": 0, "starting": 0, "stopped": 75}
"""Of scripts/watch.py, by how the run ended; 1 for a run that failed or is gone."""
POLL_S = 1.0
STARTING_S = 120
"""Seconds in which a run without a status, or with the one of its last start, may still come up."""


class Follower:
    """The lines of a file as they are written; from the start again when the file is cut back."""

    def __init__(self, path: Path):
        self._path, self._position, self._inode = path, 0, None

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """The new records, and whether they replace all that were read before."""
        try:
            with open(self._path, "rb") as handle:
                about = os.fstat(handle.fileno())
                afresh = about.st_ino != self._inode or about.st_size < self._position
                if afresh:
                    self._position, self._inode = 0, about.st_ino
                handle.seek(self._position)
                whole, newline, _ = handle.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], False
        self._position += len(whole) + len(newline)
        records = []
        for line in whole.splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # cut off by a crash, before the run continued
        return records, afresh


class WatchedRun:
    """A run folder, read again and again."""

    def __init__(self, path: Path):
        """
        Raises:
            ConfigError: if there is no run at `path`.
        """
        self.path = path
        self._follower = Follower(path / "metrics.jsonl")
        self._load()

    def _load(self) -> None:
        self.record = RunRecord.read(self.path, with_metrics=False)
        self.view: View = new_view(self.path, self.record.config, self.record.plan)
        if self.view.max_steps == 0:
            self.view.max_steps = self.record.config.max_steps or 0

    def update(self) -> bool:
        """Read what is new; whether there is any."""
        records, afresh = self._follower.read()
        if afresh:
            self._load()
        self.record.status = read_json(self.path / "status.json")
        self.view.add(records)
        if records:
            self.view.sample = newest_sample(self.path, self.view.step)
        return bool(records)

    def lines(self, width: int, glyphs: Glyphs) -> list[Line]:
        """The view now, with the run's state."""
        state = self.record.state()
        seconds = self.view.wall_seconds
        text = self.record.state_line()
        if state == "running":
            seconds += self.silence()
            text += f"; last line {format_duration(self.silence())} ago"
        style = {"failed": "bad", "gone": "bad", "finished": "good"}.get(state, "accent")
        return self.view.lines(width, glyphs, seconds=seconds, state=(style, text), finished=state == "finished")

    def silence(self) -> float:
        """Seconds since metrics.jsonl or status.json has changed."""
        times = [p.stat().st_mtime for p in (self.path / "metrics.jsonl", self.path / "status.json") if p.is_file()]
        return max(0.0, time.time() - max(times)) if times else 0.0

    def has_ended(self) -> bool:
        state = self.record.state()
        if state == "starting":
            return self.silence() > STARTING_S
        return state != "running"

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.record.state(), 1)


def watch(path: Path, once: bool = False) -> int:
    """Show a run until it ends, or once: redrawn in place on a terminal, a line for each news elsewhere.

    Returns:
        0 if the run runs or has finished, 75 if it was stopped, 1 if it failed or is gone.
    Raises:
        ConfigError: if there is no run at `path`.
    """
    run = WatchedRun(path)
    run.update()
    terminal = Terminal(sys.stdout)
    if once or not Terminal.is_live(sys.stdout):
        width, _ = terminal.size()
        colour = terminal.colour and Terminal.is_live(sys.stdout)
        print("\n".join(paint(line, colour) for line in run.lines(width, terminal.glyphs)), flush=True)
    live, news = not once and Terminal.is_live(sys.stdout), False
    while not once:
        if live:
            terminal.draw(run.lines(terminal.size()[0], terminal.glyphs))
        if run.has_ended():
            break
        time.sleep(POLL_S)
        step = run.view.last.get("step")
        if run.update() and not live and run.view.last.get("step") != step:
            news = True
            print(_plain(run.view), flush=True)
    if not live and not once and news:
        print(run.record.state_line(), flush=True)
    return run.exit_code


def _plain(view: View) -> str:
    """The line that the run itself prints; numbers that were not finite are null in its records."""
    last = {**view.last, **{name: math.nan for name in ("train_loss", "grad_norm") if view.last[name] is None}}
    return progress_line(last, view.max_steps, view.seconds_left or 0.0)
