"""Processes for the runs, forked from one that has loaded the libraries, and what signals do to all of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.signals import STOP_SIGNALS, handle_stop_signals, leave

STOP_PATIENCE_S = 60
"""Seconds that a run may take to stop."""


class Interrupted(Exception):
    """A signal has stopped the search; what is finished is in the results."""


def preload() -> None:
    """Import what runs need, without touching the GPU.

    Raises:
        RuntimeError: if a library has touched it all the same.
    """
    # Ask the driver's library whether there is a GPU, not CUDA, which would be initialised by that.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import accelerate  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import tiktoken  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import recipe.train  # noqa: F401

    if shutil.which("nvidia-smi") or os.path.exists("/dev/nvidiactl"):
        import torch._inductor.compile_fx  # noqa: F401
    if torch.cuda.is_initialized():
        raise RuntimeError("a library has initialised CUDA in the parent of the trials, which could not use it then")


@dataclass(eq=False)
class Forked:
    """A process that was forked from this one."""

    what: Any
    """That it does, in the caller's words."""
    pid: int
    """Also of its session."""
    place: int
    began: float
    """On the monotonic clock."""
    at_once: int = 0
    """The most processes of its pool that there have been at one time, from its start on and itself among them."""
    code: int | None = None
    """Exit code, negative for a signal that has killed it; None until it has ended."""
    seconds: float = 0.0
    """From its start to its end."""


class Pool:
    """Processes forked from this one, one in each place at most. As a context: at its end those that still run are told to
    stop, and nothing that any of them has started is left.

    Args:
        received: signals that this process has noted. Once there is one, all processes are told to stop, and none is started.
        places: environment variables of the process in each place.
    """

    def __init__(self, received: list[int], places: Sequence[Mapping[str, str]]):
        self._received, self._places = received, places
        self.running: list[Forked] = []
        self._told: float | None = None

    @property
    def stopping(self) -> bool:
        """Whether processes are told to stop."""
        return bool(self._received) or self._told is not None

    @property
    def has_room(self) -> bool:
        """Whether another may be started."""
        return not self.stopping and len(self.running) < len(self._places)

    def start(self, what: Any, arguments: list[str], log: Path, main: Callable[[list[str]], int] | None = None) -> None:
        """Run `pretrain.py` with arguments, or another `main`, in the first free place, its output in `log`."""
        from recipe import cli

        taken = {one.place for one in self.running}
        place = next(n for n in range(len(self._places)) if n not in taken)
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that comes before the child has handlers of its own waits until it has.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        parent, child = os.getpid(), os.fork()
        if not child:
            _be_the_run(parent, self._places[place], arguments, log, main or cli.main)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self.running.append(Forked(what, child, place, time.monotonic()))
        for one in self.running:
            one.at_once = max(one.at_once, len(self.running))

    def wait(self) -> Forked:
        """Wait for the end of one of those that run. What does not stop within STOP_PATIENCE_S of being told is killed."""
        while True:
            for one in self.running:
                pid, status = os.waitpid(one.pid, os.WNOHANG)
                if pid:
                    return self._end(one, status)
            if self.stopping:
                self.stop()
                if time.monotonic() - self._told > STOP_PATIENCE_S:
                    self._signal(signal.SIGKILL)
            time.sleep(0.05)

    def stop(self) -> None:
        """Tell all to stop, once, without waiting for them."""
        if self._told is None:
            self._told = time.monotonic()
            self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for one in self.running:
            os.kill(one.pid, number)  # it is there: nobody else takes note of its end

    def _end(self, one: Forked, status: int) -> Forked:
        self.running.remove(one)
        one.code, one.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - one.began
        # Of the child's own session: processes that compile or tokenise, and that may hold memory of the GPU.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        return one

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self.stop()
        while self.running:
            self.wait()


def run_forked(arguments: list[str], log: Path, main: Callable[[list[str]], int] | None = None) -> int:
    """Run `pretrain.py` with arguments, or another `main`, in a process forked from this one, its output in `log`.

    Returns:
        its exit code, negative for a signal that has killed it. Nothing that it started is left.
    Raises:
        Interrupted: if this process was told to stop, and the child has ended before it was done.
    """
    with signals_noted() as received, Pool(received, [{}]) as pool:
        pool.start("", arguments, log, main)
        code = pool.wait().code
    if code:
        stop_if(received)
    elif received:
        signal.raise_signal(received[0])  # it was done: the caller notes its result, and then the signal
    return code


def stop_if(received: list[int]) -> None:
    """Raise Interrupted if a signal has been noted."""
    if received:
        raise Interrupted(signal.Signals(received[0]).name)


class signals_noted:
    """Within it, signals to stop are noted in a list instead of ending the process; also that of a closed terminal, unless
    `nohup` has it ignored."""

    def __enter__(self) -> list[int]:
        received: list[int] = []
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        handle_stop_signals(lambda number, _: received.append(number))
        return received

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _be_the_run(
    parent: int, place: Mapping[str, str], arguments: list[str], log: Path, main: Callable[[list[str]], int]
) -> None:
    """The child: never returns."""
    code = 1
    try:
        # Ctrl-C in a terminal is the parent's affair.
        os.setsid()
        handle_stop_signals(signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        if sys.platform == "linux":
            PR_SET_PDEATHSIG = 1
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(code)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, encoding="utf-8", closefd=False) for fd in (1, 2))  # noqa: SIM115
        os.environ.update(place)
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)
