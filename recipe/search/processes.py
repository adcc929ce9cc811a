"""A process for each run, forked from one that has loaded the libraries, and what signals do to both."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from recipe.signals import leave

STOP_PATIENCE_S = 60
"""Seconds that a run may take to stop."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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


def run_forked(arguments: list[str], log: Path, main: Callable[[list[str]], int] | None = None) -> int:
    """Run `pretrain.py` with arguments, or another `main`, in a process forked from this one, its output in `log`.

    Returns:
        its exit code, negative for a signal that has killed it. Nothing that it started is left.
    Raises:
        Interrupted: if this process was told to stop, and the child has ended before it was done.
    """
    from recipe import cli

    with signals_noted() as received:
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that comes before the child has handlers of its own waits until it has.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        parent, child = os.getpid(), os.fork()
        if not child:
            _be_the_run(parent, arguments, log, main or cli.main)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        told = 0.0
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if received and not told:
                os.kill(child, signal.SIGTERM)
                told = time.monotonic()
            elif told and time.monotonic() - told > STOP_PATIENCE_S:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
        # Of the child's own session: processes that compile or tokenise, and that may hold memory of the GPU.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
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
    """Within it, SIGTERM and SIGINT are noted in a list instead of ending the process."""

    def __enter__(self) -> list[int]:
        received: list[int] = []
        self._before = {n: signal.signal(n, lambda number, _: received.append(number)) for n in STOP_SIGNALS}
        return received

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _be_the_run(parent: int, arguments: list[str], log: Path, main: Callable[[list[str]], int]) -> None:
    """The child: never returns."""
    code = 1
    try:
        # Ctrl-C in a terminal is the parent's affair.
        os.setsid()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
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
        code = main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)
