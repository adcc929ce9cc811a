"""`accelerate launch` on this node, as scripts/supervise.sh and scripts/launch/node.py start it: a signal goes to its workers,
and how it ended is what they say."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from recipe.cli import EXIT_FAULT
from recipe.launches import children
from recipe.run_folder import RunFolder
from recipe.signals import handle_stop_signals


def shutdown_seconds() -> float:
    """That a launcher leaves its workers to save, from torch 2.13 on; before, 30."""
    return float(os.environ.get("PET_SHUTDOWN_TIMEOUT") or 120)


class Launcher:
    """Starts launches, one at a time. STOP_SIGNALS are noted from its making on and handed to the workers.

    Args:
        repeat: hand on every signal, not only the first: workers that get a second one end without saving, which is what
            somebody wants who presses Ctrl-C again, and not what a scheduler means that says it twice.
    """

    def __init__(self, repeat: bool):
        self.stopping = False
        """Whether a signal has come."""
        self._repeat, self._process = repeat, None
        handle_stop_signals(self._note)

    def launch(self, command: list[str], settle: Callable[[], None] = lambda: None) -> tuple[int | None, int]:
        """Start it and wait for its end.

        Args:
            settle: waits for workers that outlive their launcher; what they note until then counts.
        Returns:
            the exit code that pretrain.py's first rank, or one with a fault, has noted, None if none has; the launcher's own.
        """
        with tempfile.TemporaryDirectory() as temporary:
            noted = Path(temporary) / "code"
            environment = os.environ | {
                "PRETRAIN_EXIT_FILE": str(noted),
                # For a signal that reaches the launcher past us: it would die of a SIGUSR1, and leave its workers 30 s to save.
                "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
                "PET_SHUTDOWN_TIMEOUT": f"{shutdown_seconds():g}",
            }
            # In a session of its own, so that a signal to our group, such as a Ctrl-C, reaches it once, through us.
            self._process = subprocess.Popen(command, env=environment, start_new_session=True)
            if self.stopping:
                self._stop_workers()
            code = self._process.wait()
            self._process = None
            settle()
            with contextlib.suppress(OSError, ValueError):
                return int(noted.read_text(encoding="utf-8")), code
            return None, code

    def _note(self, _number: int, _frame: object) -> None:
        first, self.stopping = not self.stopping, True
        if self._process and (first or self._repeat):
            self._stop_workers()

    def _stop_workers(self) -> None:
        """Ask the workers to save and stop. All of them do so before the first one ends, whatever time the launcher, which is
        told itself only while it has none, would leave them."""
        launcher = self._process.pid
        for pid in children(launcher) or [launcher]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if pid == launcher else signal.SIGUSR1)


def told_by_the_folder(folder: RunFolder, began: float, seconds: float) -> int:
    """The exit code in status.json, once the run has ended; a fault if this start has not written one."""
    deadline = time.monotonic() + seconds
    path = folder.path / "status.json"
    while time.monotonic() < deadline and path.is_file() and path.stat().st_mtime >= began:
        status = folder.read_status()
        if status["state"] != "running":
            return status["exit_code"]
        time.sleep(0.5)
    return EXIT_FAULT
