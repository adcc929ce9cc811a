"""The training rows in one global order, whatever the number of ranks.

The units of the corpus are shuffled and dealt to virtual shards; rows are taken from the shards round robin; a shard that
has no row left in an epoch is skipped. Row g of the run is therefore a function of the corpus, seed, sequence length,
packing and number of shards alone. A rank tokenises the shards that it owns. Row p of a batch goes to rank p mod ranks,
which owns its shard as long as the ranks divide the shards and no shard has ended; otherwise the ranks exchange the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from recipe.data.corpus import Corpus, DataError, Unit
from recipe.data.order import ORDER_VERSION, permutation
from recipe.data.packing import Cursor, DocumentPacker, ShardPacker
from recipe.data.read_ahead import ReadAhead
from recipe.tokenizer import Encoder

MAX_SHARDS = 64
"""Virtual shards: 1, 2, 4, 8, 16, 32 and 64 ranks divide it. A small corpus gets the largest power of two within its
units."""

READ_AHEAD = 8
"""Batches that the threads keep ready: a second at full speed (8 GPUs take a batch of 524,288 tokens in 0.13 s), in which a
row group comes from the Hub; 8 MB."""
HUB_THREADS = 8
"""At least, for text on the Hub: most of them wait for it. 64 shards at 0.2 s an answer: the first batch in 2 s, not 7."""


@dataclass(frozen=True)
class Span:
    """A document's part in a row."""

    row: int
    """The row's place in the batch."""
    shard: int
    unit: Unit
    cursor: Cursor
    """The document, in the shuffled order of its unit, and its first token in the row."""
    tokens: int
    """Number of its tokens in the row."""


@dataclass(frozen=True)
class _Ready:
    """A batch that is assembled, of rows that have not been taken yet."""

    rows: np.ndarray
    """This rank's."""
    shards: np.ndarray
    """Of the rows of all ranks, in their order."""
    counts: list[tuple[int, int]]
    """This rank's shards among them, and how many of the rows are theirs."""


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
        workers: threads that tokenise ahead; 0 for none. Text on the Hub gets HUB_THREADS if that is more. With any, one more
            assembles the next batch.
        state: a `state()` of this or another topology to continue from.
        skip_rows: ranges (first, last) of rows, numbered through the run from 0, that are left out.
        accept_other_data: go on from a state of other data, as long as shards and rows have the same shape.
        packing: how rows are cut: `stream` (ShardPacker) or `documents` (DocumentPacker).
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
        skip_rows: Sequence[tuple[int, int]] = (),
        accept_other_data: bool = False,
        packing: str = "stream",
    ):
        self._corpus, self._seed, self._max_epochs = corpus, seed, max_epochs
        self._skip_rows = [(first, last) for first, last in skip_rows]
        self._accept_other_data = accept_other_data
        self.accepted: list[str] = list(state["accepted"]) if state else []
        """Differences between the data of the run and of its continuations that were accepted."""
        self._length, self._dtype = sequence_length, np.dtype(encoder.dtype)
        self._exchange = exchange or OneRank()
        self.num_shards = number_of_shards(corpus)
        self.fingerprint = {
            **corpus.fingerprint,
            "tokenizer": encoder.hash,
            "sequence_length": sequence_length,
            "seed": seed,
            "num_shards": self.num_shards,
            "order_version": ORDER_VERSION,
            "skip_rows": [list(span) for span in skip_rows],
        }
        if packing != "stream":
            self.fingerprint["packing"] = packing
        self._permutations: dict[int, np.ndarray] = {}
        self._epoch, self._pointer, self.rows = 0, 0, 0
        self._finished = np.zeros(self.num_shards, dtype=bool)
        cursors = [Cursor()] * self.num_shards
        if state is not None:
            cursors = self._restore(state)
        rank, ranks = self._exchange.rank, self._exchange.num_ranks
        self._cursors = cursors
        packer = {"stream": ShardPacker, "documents": DocumentPacker}[packing]
        self._packers = {
            shard: packer(corpus, encoder, sequence_length, self._units_of(shard), self.document_order, cursors[shard])
            for shard in range(rank, self.num_shards, ranks)
        }
        threads = max(workers, HUB_THREADS) if corpus.over_network else workers
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tokenise") if workers else None
        self._read_ahead = ReadAhead(self._packers, self._pool)
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble") if workers else None
        self._ahead: Future[_Ready | None] | None = None
        """The next batch, if it can be foreseen. Once it is there, the shards have moved behind the batches taken."""
        self._promised = np.zeros(self.num_shards, dtype=np.int64)
        """Rows of each shard of which all ranks know that they are there."""

    @property
    def epoch(self) -> int:
        """Passes over the text that are complete."""
        return self._epoch

    def next_batch(self, rows: int, trace: list[Span] | None = None) -> np.ndarray:
        """This rank's part of the next `rows` rows, [rows / ranks, sequence_length + 1]; every rank must call.

        Args:
            trace: a list to which the spans of the rows that this rank's shards give are added.
        Raises:
            DataError: on every rank, if the text has run out or a rank could not read its part.
        """
        ready, self._ahead = self._settle(), None
        if ready and len(ready.shards) == rows and trace is None:
            self.rows += rows
            batch = ready.rows
        else:
            ready, batch = None, self._assemble(rows, trace)
        if self._assembler:
            self._ahead = self._assembler.submit(self._assemble_ahead, rows, ready)
        return batch

    def _settle(self) -> _Ready | None:
        """What was assembled ahead; until then the cursors of the shards may not be read, nor any be moved."""
        return self._ahead.result() if self._ahead else None

    def _assemble(self, rows: int, trace: list[Span] | None) -> np.ndarray:
        """This rank's part of the next batch, when it is asked for."""
        shards: list[np.ndarray] = []
        own_places: list[np.ndarray] = []
        own_rows: list[np.ndarray] = []
        count, drawn = 0, self.rows
        while count < rows:
            part = self._allocate(rows - count)
            kept = self._without_skipped(drawn, len(part))
            position = np.full(len(part), -1)
            position[kept] = count + np.arange(len(kept))
            for shard, found in self._own(part):
                places = position[found]
                if trace is not None:
                    trace += self._spans(shard, places)
                own_places.append(places)
                own_rows.append(self._packers[shard].take(len(places)))
            shards.append(part[kept])
            count += len(kept)
            drawn += len(part)
        self.rows = drawn
        return self._deliver(np.concatenate(shards), own_places, own_rows)

    def _assemble_ahead(self, rows: int, taken: _Ready | None) -> _Ready | None:
        """In a thread, while the model trains: move behind `taken`, look at the next batch, and have those behind it read.

        The rows of the next batch stay the next: a state is that of the batches taken. None if an exchange has to tell which
        rows the batch has, or to bring them, or if some of them are left out.
        """
        if taken:
            for shard, count in taken.counts:
                self._packers[shard].skip(count)
            self._move_behind(taken.shards)
        if self._exchange.num_ranks == 1:
            for shard, packer in self._packers.items():
                self._promised[shard] = packer.buffered_rows
        shards, ready = self._foresee(rows), None
        if shards is not None and self._is_local(shards) and len(self._without_skipped(self.rows, rows)) == rows:
            own = list(self._own(shards))
            own_rows = [self._packers[shard].peek(len(places)) for shard, places in own]
            batch = self._deliver(shards, [places for _, places in own], own_rows)
            ready = _Ready(batch, shards, [(shard, len(places)) for shard, places in own])
        with suppress(RuntimeError):  # the stream was closed
            self.prefetch(rows)
        return ready

    def _own(self, shards: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """This rank's among some rows' shards, each with its places."""
        by_shard = np.argsort(shards, kind="stable")
        ends = np.cumsum(np.bincount(shards, minlength=self.num_shards)).tolist()
        for shard in self._packers:
            places = by_shard[ends[shard - 1] if shard else 0 : ends[shard]]
            if len(places):
                yield shard, places

    def _spans(self, shard: int, places: np.ndarray) -> Iterator[Span]:
        units = self._units_of(shard)
        for place, parts in zip(places.tolist(), self._packers[shard].spans(len(places)), strict=True):
            for cursor, tokens in parts if place >= 0 else ():
                yield Span(place, shard, units(cursor.epoch)[cursor.unit], cursor, tokens)

    def _without_skipped(self, first_row: int, count: int) -> np.ndarray:
        """Of `count` rows from number `first_row` on, those that the run does not leave out."""
        numbers = first_row + np.arange(count)
        skipped = np.zeros(count, dtype=bool)
        for first, last in self._skip_rows:
            skipped |= (numbers >= first) & (numbers <= last)
        return np.flatnonzero(~skipped)

    def state(self) -> dict:
        """Where the stream stands after the batches taken so far, as JSON, with what it reads; every rank must call."""
        return {"fingerprint": self.fingerprint, "accepted": self.accepted, **self.position()}

    def position(self) -> dict:
        """Where the stream stands after the batches taken so far, as JSON; every rank must call."""
        self._settle()
        cursors = np.zeros((self.num_shards, 4), dtype=np.int64)
        for shard, packer in self._packers.items():
            cursors[shard] = astuple(packer.cursor)
        cursors = self._exchange.sum(cursors)
        return {
            "rows": self.rows,
            "epoch": self._epoch,
            "pointer": self._pointer,
            "finished": [int(shard) for shard in np.flatnonzero(self._finished)],
            "cursors": cursors.tolist(),
        }

    def close(self) -> None:
        """Let the threads end, without waiting: a read that is retried may take minutes."""
        if self._pool:
            self._assembler.shutdown(wait=False)
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _restore(self, state: dict) -> list[Cursor]:
        theirs, ours = (_before(state["rows"], fingerprint) for fingerprint in (state["fingerprint"], self.fingerprint))
        for key in sorted(theirs.keys() | ours.keys()):
            if theirs.get(key) != ours.get(key):
                difference = f"the checkpoint's data differs in {key}: {theirs.get(key)} there, {ours.get(key)} now"
                if not self._accept_other_data or key in ("num_shards", "sequence_length"):
                    raise ValueError(difference)
                self.accepted.append(f"row {state['rows']}: {difference}")
        self.rows, self._epoch, self._pointer = state["rows"], state["epoch"], state["pointer"]
        self._finished[state["finished"]] = True
        return [Cursor(*cursor) for cursor in state["cursors"]]

    def _units_of(self, shard: int) -> Callable[[int], list[Unit]]:
        def units(epoch: int) -> list[Unit]:
            if epoch not in self._permutations:
                self._permutations[epoch] = permutation(len(self._corpus.units), self._seed, epoch)
            return [self._corpus.units[i] for i in self._permutations[epoch][shard :: self.num_shards]]

        return units

    def document_order(self, epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
        """The order in which the documents of a window of a unit are read in an epoch."""
        return permutation(size, self._seed, epoch, unit.file, unit.start, window)

    def _allocate(self, rows: int) -> np.ndarray:
        """The shards that give the next rows, at most `rows`, as far as one exchange tells; without one, if it is known."""
        shards = self._foresee(rows)
        if shards is None:
            live = self._live()
            if not len(live):
                self._epoch += 1
                self._finished[:] = False
                self._pointer = 0
                live = np.arange(self.num_shards)
                if self._epoch >= self._max_epochs:
                    tokens = self.rows * self._length
                    raise DataError(
                        f"the text has run out after {tokens:,} tokens and {self._max_epochs} epochs; raise max_epochs"
                    )
            wanted = -(-rows // len(live))
            self._promised = self._read(live, wanted)
            shards = self._foresee(rows)
            if shards is None:
                shards = self._allocate_unequal(rows, live, wanted)
        self._move_behind(shards)
        return shards

    def _move_behind(self, shards: np.ndarray) -> None:
        """Go on in the order behind rows of these shards."""
        self._promised -= np.bincount(shards, minlength=self.num_shards)
        if len(shards):
            self._pointer = (int(shards[-1]) + 1) % self.num_shards

    def _live(self) -> np.ndarray:
        """The shards that have rows left in the epoch, as far as is known."""
        return np.flatnonzero(~self._finished)

    def _foresee(self, rows: int) -> np.ndarray | None:
        """The shards that give the next `rows` rows, if all ranks know that each has its share of them."""
        live = self._live()
        if not len(live):
            return None
        wanted = -(-rows // len(live))
        if (self._promised[live] < wanted).any():
            return None
        return np.tile(np.roll(live, -np.searchsorted(live, self._pointer)), wanted)[:rows]

    def _read(self, live: np.ndarray, wanted: int) -> np.ndarray:
        """How many rows each shard has ready, after an exchange; fewer than `wanted` only if it has no more in the epoch."""
        available, failed = np.zeros(self.num_shards + 1, dtype=np.int64), None
        try:
            own = [shard for shard in live.tolist() if shard in self._packers]
            self._read_ahead.fill(own, wanted, self._epoch)
            available[own] = [self._packers[shard].buffered_rows for shard in own]
        except Exception as error:
            # The others learn of it in this exchange; without it they would wait for us until the time-out.
            failed, available[-1] = error, 1
        available = self._exchange.sum(available)
        if available[-1]:
            raise failed or DataError("another rank could not read its part of the text; its message says which")
        return available[:-1]

    def _allocate_unequal(self, rows: int, live: np.ndarray, wanted: int) -> np.ndarray:
        """As `_allocate`, where a shard has less than its share."""
        available = np.minimum(self._promised, wanted)
        order: list[int] = []
        for shard in self._cycle(live):
            if len(order) == rows:
                break
            if available[shard]:
                available[shard] -= 1
                order.append(int(shard))
            elif order.count(int(shard)) < wanted:
                self._finished[shard] = True
            else:
                break
        return np.array(order, dtype=np.int64)

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

    def _deliver(self, shards: np.ndarray, own_places: list[np.ndarray], own_rows: list[np.ndarray]) -> np.ndarray:
        """This rank's rows of a batch, from the rows of its own shards and their places in the batch (-1: left out)."""
        rank, ranks = self._exchange.rank, self._exchange.num_ranks
        places = np.concatenate([np.empty(0, np.int64), *own_places])
        taken = np.concatenate([np.empty((0, self._length + 1), self._dtype), *own_rows])
        if (places < 0).any():
            places, taken = places[places >= 0], taken[places >= 0]
        if self._is_local(shards):
            batch = np.empty((len(shards) // ranks, self._length + 1), dtype=self._dtype)
            batch[places // ranks] = taken
            return batch
        # One rank has a row and the others have zeros there, so that whatever their bits stand for can be summed: as int64 they
        # take a quarter of the bytes that a number for each of these tokens would.
        shape, each = (len(shards), self._length + 1), 8 // self._dtype.itemsize
        size = math.prod(shape)
        flat = np.zeros(-(-size // each) * each, dtype=self._dtype)
        flat[:size].reshape(shape)[places] = taken
        summed = self._exchange.sum(flat.view(np.int64)).view(self._dtype)
        return np.ascontiguousarray(summed[:size].reshape(shape)[rank::ranks])

    def _is_local(self, shards: np.ndarray) -> bool:
        """Whether every rank owns the shards of its rows."""
        ranks = self._exchange.num_ranks
        return bool((shards % ranks == np.arange(len(shards)) % ranks).all())

    def prefetch(self, rows: int) -> None:
        """Set the threads to read ahead of the batches of `rows` rows, which `next_batch` does by itself from then on."""
        live = self._live()
        wanted = READ_AHEAD * -(-rows // max(1, len(live)))
        self._read_ahead.begin((shard for shard in live.tolist() if shard in self._packers), wanted, self._epoch)


def _before(row: int, fingerprint: dict) -> dict:
    """A fingerprint with only those left-out rows that lie before `row`: later ones may still be added to a run."""
    spans = [[first, min(last, row - 1)] for first, last in fingerprint["skip_rows"] if first < row]
    return {**fingerprint, "skip_rows": sorted(spans)}
