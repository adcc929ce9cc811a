"""Why a training stops before its end: a signal, max_hours, or a save that failed."""

from __future__ import annotations

import time

import numpy as np

from recipe.config import Config
from recipe.distributed import Distributed
from recipe.saving import Saver
from recipe.signals import StopSignals


class StopReasons:
    """What asks for a stop on any rank, said on all of them alike.

    Args:
        started: when the process began, on the monotonic clock.
    """

    def __init__(self, config: Config, started: float, signals: StopSignals, saver: Saver, distributed: Distributed):
        self._max_hours, self._started, self._signals, self._saver = config.max_hours, started, signals, saver
        self._distributed = distributed

    def first(self) -> str | None:
        """The reason to save and stop now, if there is one. Collective, and one exchange.

        Raises:
            Exception: what made a save fail.
        """
        flags = [int(self._signals.received or 0), self._out_of_time(), self._saver.failed()]
        signalled, out_of_time, save_failed = self._distributed.sum(np.array(flags, dtype=np.int64)).tolist()
        if save_failed:
            self._saver.wait()
        if signalled:
            # A signal to any rank stops all of them.
            return f"signal {self._signals.received.name if self._signals.received else 'to another rank'}"
        return f"max_hours {self._max_hours:g}" if out_of_time else None

    def _out_of_time(self) -> bool:
        """On rank 0: whether what is left is needed for saving."""
        if self._max_hours is None or not self._distributed.is_main:
            return False
        limit = 3600 * self._max_hours
        reserve = min(60.0, limit / 20) + 2 * self._saver.longest
        return time.monotonic() - self._started > limit - reserve
