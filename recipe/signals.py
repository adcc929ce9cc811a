"""How a rank ends: by a signal, which is a request to save and stop (a second one ends it at once), or with its work done."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""The last one comes when a terminal is closed."""
STACKS_SIGNAL = signal.SIGUSR2
"""A rank that gets it prints what each of its threads is doing, and goes on."""
REPEATED_S = 3
"""Signals within so many seconds are one request: a launcher that dies sends its SIGTERM once for each of its threads."""

SET_UP_GRACE_S = 5
"""Seconds that a signal leaves the set-up to come to its end."""


def leave(code: int) -> NoReturn:
    """End the process, its work done, without the interpreter's clean-up: native threads of the libraries now and then abort
    that, and the launcher would report a finished rank as failed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full
            stream.flush()
    os._exit(code)


class StopSignals:
    """Notes the signals in a thread of its own, which hears of them also while the main thread waits in native code for the
    device or for other ranks, where Python runs no handler.

    Until `training_began`, and after `nothing_to_save`, there is nothing to save, and nobody looks at `received`: then the
    process ends itself.

    Args:
        end: called, from the thread, to end the process for the signal in such a time.
    Attributes:
        received: the first of the signals, or None.
        at: when it came, on the monotonic clock.
        missing: asked then, from the thread, which ranks are gone.
        lost: what it said.
    """

    def __init__(self, end: Callable[[signal.Signals], None]):
        self._end, self._saves, self._in_set_up = end, False, True
        self.received: signal.Signals | None = None
        self.at = 0.0
        self.missing: Callable[[], list[int]] = list
        self.lost: list[int] = []
        self._parent = os.getppid()
        self._ignored = False
        self._reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer  # a socket that is collected is closed
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handle_stop_signals(_leave_to_the_thread)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def training_began(self) -> None:
        """From now on the training looks at `received` and saves."""
        self._saves, self._in_set_up = True, False

    def nothing_to_save(self) -> None:
        """From now on a signal, also one that has come, ends the process."""
        self._saves = False
        if self.received is not None:
            self._end(self.received)

    def ignore(self) -> None:
        """All is saved and the process is about to end with its own code: the launcher, which ends all ranks when the first
        one exits, shall not change that."""
        self._ignored = True

    def _listen(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number in STOP_SIGNALS and not self._ignored:
                    self._note(signal.Signals(number))

    def _end_unless_saving(self) -> None:
        if not self._saves and not self._ignored:
            self._end(self.received)

    def _note(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received, self.at, self.lost = number, time.monotonic(), self.missing()
            if not self._saves:
                # Set-up may be about to end, and then all ranks stop together.
                timer = threading.Timer(SET_UP_GRACE_S if self._in_set_up else 0, self._end_unless_saving)
                timer.daemon = True
                timer.start()
        elif time.monotonic() - self.at > REPEATED_S and os.getppid() == self._parent:
            print(f"{number.name} again: ending at once, without saving", file=sys.stderr, flush=True)
            os._exit(128 + number)


def print_stacks_on_signal() -> None:
    """From now on STACKS_SIGNAL prints the stacks of all threads on stderr, also of one that waits in native code."""
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)


def handle_stop_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Give all STOP_SIGNALS a handler, but for a SIGHUP that is ignored: `nohup` asks for that."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _leave_to_the_thread(number: int, frame: object) -> None:
    """The handler that Python must have for the thread to be woken."""


def follow_the_launcher(parent: int) -> None:
    """Ask Linux for a SIGTERM when the launcher dies: launchers start their workers in sessions of their own, so that one that
    is killed, or that does not forward a signal, would leave them training on for hours.

    Args:
        parent: the launcher, as it was when this process began; if it has died since, this process gets its SIGTERM now.
    """
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if sys.platform == "linux" and launched:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
