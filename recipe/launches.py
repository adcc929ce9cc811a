"""Programs started by `accelerate launch` as a user starts them, and their workers, which outlive it unless they are ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from recipe.signals import STACKS_SIGNAL

ROOT = Path(__file__).resolve().parent.parent
STACKS_S = 0.5
"""Time to print the stacks."""


class LaunchError(Exception):
    """A launch that failed, or took too long; with what it said last."""


def launch_command(accelerate_file: str, *options: str) -> list[str]:
    """`accelerate launch` with a file and options; the script and its words belong behind it."""
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", accelerate_file, *options]


def accelerate_command(accelerate_file: str, ranks: int, script: str, *words: str) -> list[str]:
    """The launch of a script of the project by a file of configs/accelerate, over another number of ranks."""
    file = str(ROOT / "configs" / "accelerate" / f"{accelerate_file}.yaml")
    return [*launch_command(file, "--num_processes", str(ranks)), str(ROOT / "scripts" / script), *words]


def children(pid: int) -> list[int]:
    """The processes that a launcher has started; Linux. They are in sessions of their own, so that a signal to its group spares
    them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            child, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it ended while we looked
        if parent == pid:
            found.append(child)
    return found


def descendants(pid: int) -> list[int]:
    """The processes that a launcher has started, and those that they have."""
    return [one for child in children(pid) for one in (child, *descendants(child))]


class Launch:
    """A command under way, its output in a file; as a context, it has ended at the end of it.

    Args:
        command: its words.
        log: the file for what it prints.
        extra: variables on top of this process' environment.
    """

    def __init__(self, command: list[str], log: Path, extra: Mapping[str, str]):
        self.log, self._began = log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as handle:
            self.process = subprocess.Popen(
                command, env=os.environ | extra, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, deadline: float) -> int:
        """The exit code.

        Raises:
            LaunchError: at the deadline, on the monotonic clock; then every process of it has been killed, and its log says
                where the ranks stood.
        """
        try:
            return self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise self._too_late("not done") from None

    def succeed(self, deadline: float) -> str:
        """Wait for exit code 0 and give what it printed.

        Raises:
            LaunchError: for another code, or at the deadline.
        """
        code = self.wait(deadline)
        if code:
            raise LaunchError(f"ended with code {code}; {self.last_words()}")
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, condition: Callable[[], bool], what: str, deadline: float) -> None:
        """Wait for something that the running launch brings about.

        Raises:
            LaunchError: if it ends before, or at the deadline.
        """
        while not condition():
            if self.process.poll() is not None:
                raise LaunchError(f"ended with code {self.process.returncode} before {what}; {self.last_words()}")
            if time.monotonic() > deadline:
                raise self._too_late(f"no {what}")
            time.sleep(0.02)

    def worker(self, rank: int) -> int:
        """The process of a rank.

        Raises:
            LaunchError: if there is none.
        """
        for pid in descendants(self.process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            # What a rank starts, such as the compiler's helpers, has its variables too.
            if f"RANK={rank}".encode() in variables and parent == self.process.pid:
                return pid
        raise LaunchError(f"no process of rank {rank} under {self.process.pid}")

    def _too_late(self, what: str) -> LaunchError:
        """The error, once the ranks have been asked where they stand, and killed."""
        had = time.monotonic() - self._began
        told = self.last_words()
        for pid in children(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, STACKS_SIGNAL)
        time.sleep(STACKS_S)
        self.kill()
        return LaunchError(f"{what} within the {had:.0f} s that were left to it; {told}")

    def kill(self) -> None:
        """End it with all its workers, and wait until they are gone."""
        pids = descendants(self.process.pid)
        for pid in [self.process.pid, *pids]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        give_up = time.monotonic() + 10  # on those that nobody takes note of, where process 1 is no init
        while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < give_up:
            time.sleep(0.01)

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def last_words(self, count: int = 3) -> str:
        """The last lines of the output but for the launcher's traceback, in one line."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if re.match(r"rank \d|cause:|remedy:|.*(problem|Error)", line)]
        told = [line[:200] for line in (telling or lines)[-count:] if not line.startswith("{")]
        return " | ".join([self.log.name, *told])
