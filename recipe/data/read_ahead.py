"""Reading ahead of the batches: threads that tokenise a rank's shards, each shard in one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from recipe.data.packing import ShardPacker


class ReadAhead:
    """Keeps rows buffered in the packers of shards.

    Args:
        packers: by shard.
        pool: the threads; None for none: then rows are read when they are wanted.
    """

    def __init__(self, packers: Mapping[int, ShardPacker], pool: ThreadPoolExecutor | None):
        self._packers, self._pool = packers, pool
        self._filling: dict[int, Future] = {}
        """What reads ahead, by shard: the last of a row of tasks."""
        self._lock = threading.Lock()
        """From the start of a task until it is noted: it must not be noted behind the one that it starts itself."""

    def begin(self, shards: Iterable[int], rows: int, epoch: int) -> None:
        """Set the threads to buffer `rows` rows of each of these shards, as far as `epoch` has them."""
        if not self._pool:
            return
        for shard in shards:
            # Only where rows are missing: to hand a thread a task takes longer than to take a row.
            if self._packers[shard].buffered_rows < rows and not self._is_filling(shard):
                self._fill_ahead(shard, rows, epoch)

    def fill(self, shards: list[int], rows: int, epoch: int) -> None:
        """Buffer `rows` rows of each of these shards, fewer only at the end of `epoch`.

        Raises:
            Exception: what ended the reading of a shard.
        """
        for shard in shards:
            self._wait_for(shard, rows)
        missing = [shard for shard in shards if self._packers[shard].buffered_rows < rows]
        each = self._pool.map if self._pool and len(missing) > 1 else map
        list(each(lambda shard: self._packers[shard].fill(rows, epoch), missing))

    def _is_filling(self, shard: int) -> bool:
        """Whether a thread reads ahead, or has failed: `_wait_for` will say so."""
        future = self._filling.get(shard)
        # A task that starts another is done only when that is noted.
        return future is not None and not (future.done() and future is self._filling[shard] and not future.exception())

    def _fill_ahead(self, shard: int, rows: int, epoch: int) -> None:
        with self._lock:
            self._filling[shard] = self._pool.submit(self._read_ahead, shard, rows, epoch)

    def _read_ahead(self, shard: int, rows: int, epoch: int) -> None:
        """In a thread: a few documents, and then again behind the other shards, which may need theirs sooner."""
        packer = self._packers[shard]
        if packer.read_chunk(epoch) and packer.buffered_rows < rows:
            with suppress(RuntimeError):  # the stream was closed
                self._fill_ahead(shard, rows, epoch)

    def _wait_for(self, shard: int, rows: int) -> None:
        """Wait for what is being read ahead until `rows` rows are there or nothing reads any more.

        Raises:
            Exception: what ended the reading, if the rows are not there. Until then it is kept.
        """
        packer = self._packers[shard]
        while (future := self._filling.get(shard)) is not None:
            if packer.buffered_rows >= rows and (not future.done() or future.exception()):
                return
            future.result()
            if self._filling.get(shard) is future:
                del self._filling[shard]
