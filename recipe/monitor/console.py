"""What rank 0 says while it trains: on a terminal a live view below everything else, elsewhere one line a log interval."""

from __future__ import annotations

import io
import os
import shutil
import sys
import threading
from collections.abc import Callable
from typing import TextIO

from recipe.monitor.view import ASCII, UNICODE, Glyphs, Line, paint

REDRAW_S = 1.0
"""Seconds between redraws, so that the clock goes on and a new size of the window is seen."""


class Terminal:
    """A region of lines at the bottom of a terminal, redrawn in place; everything else is printed above it."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.colour = not os.environ.get("NO_COLOR")
        try:
            (UNICODE.full + UNICODE.levels + UNICODE.dot + UNICODE.ellipsis).encode(stream.encoding or "ascii")
            self.glyphs = UNICODE
        except UnicodeEncodeError:
            self.glyphs = ASCII
        self._drawn: list[int] = []
        """Columns of each line that is on the screen."""

    @staticmethod
    def is_live(stream: TextIO) -> bool:
        """Whether a stream can be redrawn: a terminal, and one that moves its cursor."""
        return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")

    def size(self) -> tuple[int, int]:
        """Columns that may be written (not the last, whose filling wraps on some terminals) and rows."""
        try:
            columns, rows = os.get_terminal_size(self.stream.fileno())
        except (OSError, ValueError):
            columns, rows = 0, 0
        if columns <= 0:
            columns, rows = shutil.get_terminal_size()
        return max(1, columns - 1), max(2, rows)

    def draw(self, lines: list[Line], above: str = "") -> None:
        """Replace the region; `above`, whole lines, goes where it began and stays."""
        width, rows = self.size()
        lines = lines[: rows - 1]
        text = self._erase(width) + above + "".join(paint(line, self.colour) + "\n" for line in lines)
        self._drawn = [sum(len(piece) for _, piece in line) for line in lines]
        self.stream.write(text)
        self.stream.flush()

    def _erase(self, width: int) -> str:
        if not self._drawn:
            return ""
        # In a window that has become narrower the lines have been wrapped.
        rows = sum(max(1, -(-length // (width + 1))) for length in self._drawn)
        return f"\r\x1b[{rows}A\x1b[J"


class _Above(io.TextIOBase):
    """Stands in for sys.stdout or sys.stderr while the view is live: what is written to it appears above the view."""

    def __init__(self, console: Console, stream: TextIO):
        self._console, self._stream, self._pid, self._line = console, stream, os.getpid(), ""

    def write(self, text: str) -> int:
        if os.getpid() != self._pid:  # a forked child has no view, and its copy of the lock may be held for ever
            return self._stream.write(text)
        with self._console.lock:
            whole, newline, self._line = (self._line + text).rpartition("\n")
            # Of a line that is overwritten, a progress bar's, the last state counts.
            lines = "".join(line.rstrip("\r").rpartition("\r")[2] + "\n" for line in whole.split("\n")) if newline else ""
            if lines:
                self._console.print_above(lines)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def finish(self) -> str:
        rest, self._line = self._line, ""
        return rest

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    def writable(self) -> bool:
        return True


class Console:
    """Speaks for a run on rank 0; silent on the other ranks."""

    def __init__(self, is_main: bool):
        self.lock = threading.RLock()
        self._is_main = is_main
        self._terminal: Terminal | None = None
        self._lines: Callable[[int, Glyphs, bool], list[Line]] | None = None
        self._replaced: list[tuple[str, TextIO, _Above]] = []
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_live(self) -> bool:
        return self._terminal is not None

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._is_main:
            print(line, flush=True)

    def progress(self, line: str) -> None:
        """A line about the progress, which the live view shows anyway."""
        if self.is_live:
            self.redraw()
        else:
            self.say(line)

    def go_live(self, lines: Callable[[int, Glyphs, bool], list[Line]]) -> None:
        """On rank 0, if this is a terminal, show what `lines(width, glyphs, over)` gives from now on, `over` at the end."""
        if not self._is_main or self.is_live or not Terminal.is_live(sys.stdout):
            return
        self._terminal, self._lines = Terminal(sys.stdout), lines
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                above = _Above(self, stream)
                self._replaced.append((name, stream, above))
                setattr(sys, name, above)
        self.redraw()
        self._thread = threading.Thread(target=self._tick, name="live view", daemon=True)
        self._thread.start()

    def redraw(self) -> None:
        self.print_above("")

    def print_above(self, text: str) -> None:
        """Print whole lines above the view."""
        with self.lock:
            if self._terminal is None:
                sys.stdout.write(text)
                return
            try:
                lines = self._lines(self._terminal.size()[0], self._terminal.glyphs, self._closed.is_set())
            except Exception as error:  # a run of hours does not end for a view that cannot be drawn
                lines = [[("bad", f"the view cannot be drawn: {type(error).__name__}: {error}")]]
            self._terminal.draw(lines, text)

    def close(self) -> None:
        """Leave the view as it is, and print plainly from now on."""
        if self._thread is None:
            return
        self._closed.set()
        self._thread.join()
        with self.lock:
            self.redraw()
            for name, stream, above in self._replaced:
                setattr(sys, name, stream)
                if rest := above.finish():
                    stream.write(rest + "\n")
            self._terminal, self._thread, self._replaced = None, None, []

    def _tick(self) -> None:
        while not self._closed.wait(REDRAW_S):
            self.redraw()
