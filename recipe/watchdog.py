"""Each rank tells the others what it is doing; a rank that freezes, stalls or hangs ends the job with its name.

The ranks send each other a datagram a second, from a thread, over UDP: nothing here can wait for a rank that does not answer,
and no host asks the device for anything. Where a firewall lets no datagram through, a rank was never heard and is never
missed; then the time-out of the collectives remains.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipe.distributed import Distributed

UNLIMITED = frozenset({"set-up", "first step", "evaluate", "sample"})
"""Phases that may take as long as they need: a download, the compiler, an evaluation harness. A rank that is frozen or dead is
noticed in them nonetheless."""
KILLED_S = 10
"""Seconds of silence after which a rank of this host whose process is gone has been killed. By then its end has reached the
others through their collectives, but for those that wait for their GPU, whose kernels wait for it in vain: NCCL does not tell
them, and launchers kill them half a minute later."""


@dataclass
class Beat:
    """What a rank said about itself."""

    phase: str
    step: int
    seconds: float
    """Time since it began this."""
    waiting: bool
    """Whether it waits for the other ranks."""
    writing: float
    """Time since a checkpoint began to be written behind the training; 0 if none is."""
    host: str
    pid: int
    heard: float = 0.0
    """When, on the clock of the rank that heard it."""


class Watchdog:
    """Ends the process when this or another rank has made no progress for `limit` seconds.

    Args:
        limit: seconds; 0 never ends anything.
        fail: called with the reason and the rank at fault, from the thread, before the process ends with code 1.
    """

    def __init__(self, distributed: Distributed, limit: float, fail: Callable[[str, int], None]):
        self.distributed, self.limit, self._fail = distributed, limit, fail
        self.interval = min(1.0, limit / 8) if limit else 1.0
        self.phase, self.step = "set-up", 0
        self.writing_since: float | None = None
        self._since = time.monotonic()
        self.beats: dict[int, Beat] = {}
        self._closed = threading.Event()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._host, self._peers, self._secret = _exchange_addresses(distributed, self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int) -> None:
        """The rank begins something else, or the next part of it."""
        self.phase, self.step, self._since = phase, step, time.monotonic()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A phase within another one."""
        before = self.phase
        self.enter(phase, self.step)
        try:
            yield
        finally:
            self.enter(before, self.step)

    def lost_ranks(self, within: float = 4.0) -> dict[int, str]:
        """Ranks that have fallen silent: asked when a collective has failed, to name who is gone, with what they did last.
        Waits up to `within` seconds for a sign of life of each."""
        began = time.monotonic()
        while time.monotonic() - began < within:
            if all(beat.heard > began for beat in self.beats.values()):
                return {}
            time.sleep(self.interval / 4)
        return {rank: self._describe(rank) for rank, beat in sorted(self.beats.items()) if beat.heard <= began}

    def gone(self) -> list[int]:
        """Ranks of this host whose process has ended, though not with its work done."""
        beats = sorted(self.beats.items())
        return [rank for rank, beat in beats if beat.phase != "done" and beat.host == self._host and has_ended(beat.pid)]

    def close(self) -> None:
        """Stop watching: what follows is this rank's own."""
        self._closed.set()
        with contextlib.suppress(OSError):  # wake the thread, which else waits for the next beat
            self._socket.sendto(b"", ("127.0.0.1", self._socket.getsockname()[1]))
        self._thread.join()
        self.leave()
        self._socket.close()

    def leave(self) -> None:
        """Tell the others that this process is about to end, so that they do not take it amiss."""
        self.enter("done", self.step)
        self._send()

    def _watch(self) -> None:
        self._socket.settimeout(self.interval)
        next_beat = 0.0
        while not self._closed.is_set():
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self.interval
                self._send()
            self._receive(next_beat)
            if self.limit:
                self._judge()

    def _own(self) -> Beat:
        now, writing = time.monotonic(), self.writing_since
        return Beat(
            self.phase, self.step, now - self._since, self.distributed.waiting, now - writing if writing else 0.0,
            self._host, os.getpid(), now,
        )  # fmt: skip

    def _send(self) -> None:
        message = json.dumps([self._secret, self.distributed.rank, vars(self._own())]).encode()
        for rank, address in enumerate(self._peers):
            if rank != self.distributed.rank:
                with contextlib.suppress(OSError):  # its machine is gone: that is for its silence to tell
                    self._socket.sendto(message, address)

    def _receive(self, until: float) -> None:
        while not self._closed.is_set() and (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                secret, rank, beat = json.loads(self._socket.recv(2048))
            except (OSError, ValueError):
                continue
            if secret == self._secret:
                self.beats[rank] = Beat(**beat | {"heard": time.monotonic()})

    def _judge(self) -> None:
        now = time.monotonic()
        everyone = {**self.beats, self.distributed.rank: self._own()}
        # A rank that is silent is noticed before those that wait for it seem stuck.
        silent = [rank for rank, beat in everyone.items() if now - beat.heard > 0.75 * self.limit or self._was_killed(beat)]
        stuck = [rank for rank, beat in everyone.items() if self._is_stuck(beat, self.limit) and rank not in silent]
        if not silent and not stuck:
            return
        # Those that wait for another rank are not at fault, unless all do; of the others the one that is longest at it. What
        # another rank said is up to a beat old, and its limit is reached a moment after ours.
        almost = self.limit - 2 * self.interval
        at_work = [r for r, beat in everyone.items() if not beat.waiting and self._is_stuck(beat, almost)]
        # In a step it may be a collective that waits, and nobody says so; a rank at its data has not come to one.
        at_data = [r for r in at_work if everyone[r].phase == "data"]
        candidates = silent or [r for r in stuck if everyone[r].writing > self.limit] or at_data or at_work or stuck
        culprit = max(candidates, key=lambda rank: everyone[rank].seconds)
        if silent and everyone[culprit].host == self._host and has_ended(everyone[culprit].pid):
            reason = f"watchdog: lost {self._describe(culprit)}: its process is gone, killed or failed"
        elif silent:
            reason = f"watchdog: no sign of life from {self._describe(culprit)}"
        else:
            reason = f"watchdog: no progress by {self._describe(culprit)}"
        others = "; ".join(self._describe(rank) for rank in sorted(everyone) if rank != culprit)
        print(f"{reason}{' | ' + others if others else ''}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2)  # where this rank stands: every rank tells its own
        alive = [rank for rank in everyone if rank not in silent]
        if self.distributed.rank == min(alive):
            self._fail(reason, culprit)
        else:
            # The launcher ends all ranks when the first one exits: the one that records it must have done so.
            time.sleep(2 * self.interval + 1)
        beat = everyone[culprit]
        if culprit in silent and beat.host == self._host:
            # A rank that is stopped does not hear the launcher's SIGTERM.
            with contextlib.suppress(OSError):
                os.kill(beat.pid, signal.SIGKILL)
        os._exit(1)

    def _is_stuck(self, beat: Beat, limit: float) -> bool:
        return beat.writing > limit or (beat.seconds > limit and beat.phase not in UNLIMITED)

    def _was_killed(self, beat: Beat) -> bool:
        # A save that is under way may still come to its end. Before the training a rank may have been told to stop.
        if self.writing_since or self.phase == "set-up" or beat.phase == "done" or time.monotonic() - beat.heard < KILLED_S:
            return False
        return beat.host == self._host and has_ended(beat.pid)

    def _describe(self, rank: int) -> str:
        beat = self._own() if rank == self.distributed.rank else self.beats[rank]
        quiet = time.monotonic() - beat.heard
        parts = [f"rank {rank} in {beat.phase} at step {beat.step} for {beat.seconds + quiet:.0f} s"]
        if quiet > 2 * self.interval + 1:
            parts.append(f"last heard {quiet:.0f} s ago")
        elif beat.writing:
            parts.append(f"writing a checkpoint for {beat.writing:.0f} s")
        elif beat.waiting:
            parts.append("waiting for others")
        return ", ".join(parts)


def _exchange_addresses(distributed: Distributed, port: int) -> tuple[str, list[tuple[str, int]], str]:
    """This host, every rank's address, and a secret that keeps other programs' datagrams out. Collective."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    own = "127.0.0.1"
    if distributed.num_ranks > int(os.environ.get("LOCAL_WORLD_SIZE", distributed.num_ranks)):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 1))  # sends nothing; the kernel chooses the interface
            own = probe.getsockname()[0]
    everyone = distributed.gather((own, port))
    return socket.gethostname(), everyone, distributed.broadcast(secrets.token_hex(8))


def has_ended(pid: int) -> bool:
    """Whether a process of this host is gone, or waits for its parent to take note of that."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except ProcessLookupError:
        return True
    except OSError:
        return False  # no /proc
