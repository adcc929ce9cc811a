"""The training rows in one global order, whatever the number of ranks.

The units of the corpus are shuffled and dealt to virtual shards; rows are taken from the shards round robin; a shard that
has no row left in an epoch is skipped. Row g of the run is therefore a function of the corpus, seed, sequence length and
number of shards alone. A rank tokenises the shards that it owns. Row p of a batch goes to rank p mod ranks, which owns
its shard as long as the ranks divide the shards and no shard has ended; otherwise the ranks exchange the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Protocol

import numpy as np

from recipe.data.corpus import Corpus, DataError, Unit
from recipe.data.packing import Cursor, ShardPacker
from recipe.tokenizer import Encoder

MAX_SHARDS = 64
"""Virtual shards: 1, 2, 4, 8, 16, 32 and 64 ranks divide it. A small corpus gets the largest power of two within its
units."""


class Exchange(Protocol):
    """What the ranks tell each other, on the CPU."""

    rank: int
    num_ranks: int

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The element-wise sum of every rank's int64 array."""


class OneRank:
    """The exchange of a single process."""

    rank, num_ranks = 0, 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values


def number_of_shards(corpus: Corpus) -> int:
    """The largest power of two within MAX_SHARDS and the corpus's units."""
    return 1 << (max(1, min(MAX_SHARDS, len(corpus.units))).bit_length() - 1)


class RowStream:
    """Batches of rows for one rank.

    Args:
        corpus: training text, without what is held out for validation.
        seed: of the order of units and documents.
        max_epochs: passes over the text after which it has run out.
        workers: threads that tokenise ahead; 0 for none.
        state: a `state()` of this or another topology to continue from.
    Raises:
        ValueError: if `state` belongs to another text, tokenizer, seed or sequence length; the difference is named.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        sequence_length: int,
        seed: int,
        max_epochs: int = 1,
        exchange: Exchange | None = None,
        workers: int = 0,
        state: dict | None = None,
    ):
        self._corpus, self._seed, self._max_epochs = corpus, seed, max_epochs
        self._length, self._dtype = sequence_length, encoder.dtype
        self._exchange = exchange or OneRank()
        self.num_shards = number_of_shards(corpus)
        self.fingerprint = {
            **corpus.fingerprint,
            "tokenizer": encoder.hash,
            "sequence_length": sequence_length,
            "seed": seed,
            "num_shards": self.num_shards,
        }
        self._permutations: dict[int, np.ndarray] = {}
        self._epoch, self._pointer, self.rows = 0, 0, 0
        self._finished = np.zeros(self.num_shards, dtype=bool)
        cursors = [Cursor()] * self.num_shards
        if state is not None:
            cursors = self._restore(state)
        rank, ranks = self._exchange.rank, self._exchange.num_ranks
        self._cursors = cursors
        self._packers = {
            shard: ShardPacker(corpus, encoder, sequence_length, self._units_of(shard), self._document_order, cursors[shard])
            for shard in range(rank, self.num_shards, ranks)
        }
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenise") if workers else None
        self._filling: list[Future] = []

    @property
    def epoch(self) -> int:
        """Passes over the text that are complete."""
        return self._epoch

    def next_batch(self, rows: int) -> np.ndarray:
        """This rank's part of the next `rows` rows, [rows / ranks, sequence_length + 1]; every rank must call.

        Raises:
            DataError: on every rank, if the text has run out or a rank could not read its part.
        """
        # Shards in the order of the batch's rows; each owner takes its rows in the same order.
        taken: list[int] = []
        own: list[np.ndarray] = []
        rounds = 0
        while len(taken) < rows:
            part = self._allocate(rows - len(taken))
            own += [self._packers[shard].take() for shard in part if shard in self._packers]
            taken += part
            rounds += 1
        self.rows += rows
        self._prefetch(rows)
        return self._deliver(taken, own)

    def state(self) -> dict:
        """Where the stream stands after the batches taken so far, as JSON; every rank must call."""
        cursors = np.zeros((self.num_shards, 4), dtype=np.int64)
        # A fault in what was read ahead is raised, on every rank, by the next batch.
        wait(self._filling)
        for shard, packer in self._packers.items():
            cursors[shard] = list(asdict(packer.cursor).values())
        cursors = self._exchange.sum(cursors)
        return {
            "fingerprint": self.fingerprint,
            "rows": self.rows,
            "epoch": self._epoch,
            "pointer": self._pointer,
            "finished": [int(shard) for shard in np.flatnonzero(self._finished)],
            "cursors": cursors.tolist(),
        }

    def close(self) -> None:
        """End the threads."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _restore(self, state: dict) -> list[Cursor]:
        theirs, ours = state["fingerprint"], self.fingerprint
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                raise ValueError(f"the checkpoint's data differs in {key}: {theirs.get(key)} there, {ours.get(key)} now")
        self.rows, self._epoch, self._pointer = state["rows"], state["epoch"], state["pointer"]
        self._finished[state["finished"]] = True
        return [Cursor(*cursor) for cursor in state["cursors"]]

    def _units_of(self, shard: int) -> Callable[[int], list[Unit]]:
        def units(epoch: int) -> list[Unit]:
            if epoch not in self._permutations:
                rng = np.random.Generator(np.random.PCG64([self._seed, epoch]))
                self._permutations[epoch] = rng.permutation(len(self._corpus.units))
            return [self._corpus.units[i] for i in self._permutations[epoch][shard :: self.num_shards]]

        return units

    def _document_order(self, epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64([self._seed, epoch, unit.file, unit.start, window]))
        return rng.permutation(size)

    def _allocate(self, rows: int) -> list[int]:
        """The shards that give the next rows, at most `rows`, as far as one exchange tells."""
        live = np.flatnonzero(~self._finished)
        if not len(live):
            self._epoch += 1
            self._finished[:] = False
            self._pointer = 0
            live = np.arange(self.num_shards)
            if self._epoch >= self._max_epochs:
                tokens = self.rows * self._length
                raise DataError(f"the text has run out after {tokens:,} tokens and {self._max_epochs} epochs; raise max_epochs")
        wanted = -(-rows // len(live))
        available, failed = np.zeros(self.num_shards + 1, dtype=np.int64), None
        try:
            for future in self._filling:
                future.result()
            self._filling = []
            own = [shard for shard in live if shard in self._packers]
            fill = self._pool.map if self._pool and len(own) > 1 else map
            for shard, count in zip(own, fill(lambda s: self._packers[s].fill(wanted, self._epoch), own), strict=True):
                available[shard] = count
        except Exception as error:
            # The others learn of it in this exchange; without it they would wait for us until the time-out.
            failed, available[-1] = error, 1
        available = self._exchange.sum(available)
        if available[-1]:
            raise failed or DataError("another rank could not read its part of the text; its message says which")
        order: list[int] = []
        for shard in self._cycle(live):
            if len(order) == rows:
                break
            if available[shard]:
                available[shard] -= 1
                order.append(int(shard))
                self._pointer = (int(shard) + 1) % self.num_shards
            elif order.count(shard) < wanted:
                self._finished[shard] = True
            else:
                break
        return order

    def _cycle(self, live: np.ndarray):
        """The live shards round robin from the pointer on, until all have finished."""
        start = int(np.searchsorted(live, self._pointer))
        while True:
            rest = [shard for shard in np.roll(live, -start) if not self._finished[shard]]
            if not rest:
                return
            for shard in np.roll(live, -start):
                if not self._finished[shard]:
                    yield shard

    def _deliver(self, taken: list[int], own: list[np.ndarray]) -> np.ndarray:
        rank, ranks = self._exchange.rank, self._exchange.num_ranks
        owners = np.array(taken) % ranks
        if (owners == np.arange(len(taken)) % ranks).all():
            return np.stack(own)
        batch = np.zeros((len(taken), self._length + 1), dtype=np.int64)
        if own:
            batch[owners == rank] = own
        return self._exchange.sum(batch)[rank::ranks].astype(self._dtype)

    def _prefetch(self, rows: int) -> None:
        if not self._pool:
            return
        live = np.flatnonzero(~self._finished)
        wanted, epoch = -(-rows // max(1, len(live))) + 1, self._epoch
        self._filling = [
            self._pool.submit(self._packers[shard].fill, wanted, epoch) for shard in live if shard in self._packers
        ]
