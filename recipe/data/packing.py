"""Documents to rows of one virtual shard: end-of-text, document, end-of-text, document ... without padding."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np

from recipe.data.corpus import Unit

SHUFFLE_WINDOW = 1000
"""Documents of a unit that are shuffled among themselves: a FineWeb row group."""


class Documents(Protocol):
    """Where documents come from: a Corpus of text, or a cache of tokens."""

    units: list[Unit]

    def read(self, unit: Unit) -> Iterator[Any]:
        """The documents of a unit."""


class DocumentEncoder(Protocol):
    """What makes tokens of documents."""

    dtype: type
    chunk: int
    """Documents to encode at a time."""

    def encode(self, documents: list[Any]) -> list[np.ndarray]:
        """Each document's tokens, end-of-text in front."""

    def text_bytes(self, document: Any) -> int:
        """Size of a document in UTF-8."""


@dataclass(frozen=True)
class Cursor:
    """A position in a shard: the next token to be a row's first."""

    epoch: int = 0
    unit: int = 0
    """Position in the shard's list of units of that epoch."""
    document: int = 0
    """Position in the shuffled unit."""
    token: int = 0
    """Offset in the document's tokens, end-of-text included."""


@dataclass
class _Block:
    """The tokens of consecutive documents of a unit."""

    cursor: Cursor
    """Of the first document."""
    tokens: np.ndarray
    starts: np.ndarray
    """Offset of each document in `tokens`."""


class ShardPacker:
    """Rows of `sequence_length` + 1 tokens of one virtual shard, epoch after epoch.

    A row's last token is the next row's first, so every token but a shard's first is a target exactly once. What an epoch
    leaves over, less than a row, begins the next. One thread may read on while another takes what is there.

    Args:
        units_of_epoch: the shard's units in the order of the given epoch.
        document_order: permutation of the documents of a window: (epoch, unit, window, size) -> indices.
        cursor: where to begin.
    """

    def __init__(
        self,
        documents: Documents,
        encoder: DocumentEncoder,
        sequence_length: int,
        units_of_epoch: Callable[[int], list[Unit]],
        document_order: Callable[[int, Unit, int, int], np.ndarray],
        cursor: Cursor = Cursor(),  # noqa: B008  (immutable)
    ):
        self._documents, self._encoder, self._length = documents, encoder, sequence_length
        self._units_of_epoch, self._document_order = units_of_epoch, document_order
        self._blocks: deque[_Block] = deque()
        self._buffered = 0
        self._offset = cursor.token
        """Of the next row in the buffered tokens."""
        self._next = replace(cursor, token=0)
        """Where reading goes on: behind the last buffered document."""
        self._items: Iterator[Any] | None = None
        self._lock = threading.Lock()
        """Of the blocks, their sizes and the two positions; not held while documents are read and encoded."""

    @property
    def cursor(self) -> Cursor:
        """The position behind the rows taken so far, whatever is buffered."""
        with self._lock:
            if not self._blocks:
                return replace(self._next, token=self._offset)
            block = self._blocks[0]
            document = int(np.searchsorted(block.starts, self._offset, side="right")) - 1
            return replace(
                block.cursor, document=block.cursor.document + document, token=self._offset - int(block.starts[document])
            )

    @property
    def buffered_rows(self) -> int:
        """Rows that can be taken without reading."""
        return max(0, self._buffered - self._offset - 1) // self._length

    def fill(self, rows: int, epoch: int) -> int:
        """Buffer at least `rows` rows, fewer only at the end of `epoch`; the number that is there, `rows` at most."""
        while self.buffered_rows < rows and self.read_chunk(epoch):
            pass
        return min(rows, self.buffered_rows)

    def take(self, rows: int) -> np.ndarray:
        """The next buffered rows, [rows, sequence_length + 1]; `fill` must have promised them."""
        found = self.peek(rows)
        self.skip(rows)
        return found

    def peek(self, rows: int) -> np.ndarray:
        """What `take` would give; the rows stay the next."""
        with self._lock:
            tokens = self._tokens(rows * self._length + 1)
        # Overlapping windows; sliding_window_view takes 12 us for each of a batch's shards.
        size = tokens.itemsize
        return np.ndarray((rows, self._length + 1), tokens.dtype, tokens, strides=(self._length * size, size))

    def skip(self, rows: int) -> None:
        """Go behind the next buffered rows."""
        with self._lock:
            self._offset += rows * self._length
            self._drop()

    def _tokens(self, count: int) -> np.ndarray:
        """The next `count` buffered tokens."""
        parts, found = [], 0
        for block in self._blocks:
            part = block.tokens[0 if parts else self._offset :][: count - found]
            parts.append(part)
            found += len(part)
            if found == count:
                break
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _drop(self) -> int:
        """Forget the blocks before the next row; the number of their tokens."""
        dropped = 0
        while self._blocks and self._offset >= len(self._blocks[0].tokens):
            done = len(self._blocks.popleft().tokens)
            self._offset -= done
            dropped += done
        self._buffered -= dropped
        return dropped

    def _begins(self, rows: int) -> list[int]:
        """Where the next buffered rows begin in the buffered tokens."""
        return [self._offset + row * self._length for row in range(rows)]

    def _index(self, block: _Block) -> None:
        """Take note of a block behind the buffered ones."""

    def spans(self, rows: int) -> list[list[tuple[Cursor, int]]]:
        """The documents of the next buffered rows: for each row the cursors and numbers of tokens that make it up."""
        spans: list[list[tuple[Cursor, int]]] = []
        with self._lock:
            blocks, begins = list(self._blocks), self._begins(rows)
        flat = [
            (replace(block.cursor, document=block.cursor.document + n), int(end - start))
            for block in blocks
            for n, (start, end) in enumerate(zip(block.starts, [*block.starts[1:], len(block.tokens)], strict=True))
        ]
        for begin in begins:
            end, position, parts = begin + self._length + 1, 0, []
            for cursor, size in flat:
                first, last = max(begin, position), min(end, position + size)
                if first < last:
                    parts.append((replace(cursor, token=first - position), last - first))
                position += size
            spans.append(parts)
        return spans

    def read_chunk(self, last_epoch: int) -> bool:
        """Buffer a few documents more, in one thread at a time; False at the end of `last_epoch`."""
        position = self._next
        if position.epoch > last_epoch:
            return False
        units = self._units_of_epoch(position.epoch)
        if position.unit >= len(units):
            self._next = Cursor(position.epoch + 1)
            return self.read_chunk(last_epoch)
        if self._items is None:
            self._items = self._shuffled(position.epoch, units[position.unit], position.document)
        items = list(islice(self._items, self._encoder.chunk))
        if len(items) < self._encoder.chunk:
            self._items = None
            behind = Cursor(position.epoch, position.unit + 1)
        else:
            behind = replace(position, document=position.document + len(items))
        parts = self._encoder.encode(items)
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        tokens = np.concatenate(parts) if parts else None
        with self._lock:
            if tokens is not None:
                block = _Block(position, tokens, np.cumsum(lengths) - lengths)
                self._index(block)
                self._blocks.append(block)
                self._buffered += len(tokens)
            self._next = behind
        return True

    def _shuffled(self, epoch: int, unit: Unit, skip: int) -> Iterator[Any]:
        # A window waits in memory for a long time: as UTF-8, for a single curly quote doubles the size of a str.
        documents = map(_shrink, self._documents.read(unit))
        index = 0
        while window := list(islice(documents, SHUFFLE_WINDOW)):
            if skip < len(window):
                order = self._document_order(epoch, unit, index, len(window))
                for i in order[skip:].tolist():
                    document, window[i] = window[i], None
                    yield _restore(document)
            skip = max(0, skip - len(window))
            index += 1


class DocumentPacker(ShardPacker):
    """Rows that begin at a document, or go on with one that fills them.

    A row begins where the one before ended if a document begins there or goes on for a whole row, else at the next document:
    less than a row of a document that was cut is left out. So no row begins with the end of something that it has not seen and
    goes on with something else, and of long documents all but the end is read: to leave that out, too, would cost more than
    half of a text whose documents are longer than a row.

    The cursor stands at the last token taken, as ShardPacker's does; where the next row begins follows from it.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Counted from the first token that was ever buffered.
        self._starts: deque[int] = deque()
        """Of the buffered rows, and of the one behind them."""
        self._position = self._offset
        """Where the last of these ends."""
        self._dropped = 0

    @property
    def buffered_rows(self) -> int:
        return max(0, len(self._starts) - 1)

    def peek(self, rows: int) -> np.ndarray:
        with self._lock:
            begins = np.array(self._begins(rows)) - self._offset
            tokens = self._tokens(int(begins[-1]) + self._length + 1)
        return tokens[begins[:, None] + np.arange(self._length + 1)]

    def skip(self, rows: int) -> None:
        with self._lock:
            for _ in range(rows):
                last = self._starts.popleft()
            self._offset = last - self._dropped + self._length
            self._dropped += self._drop()

    def _begins(self, rows: int) -> list[int]:
        return [start - self._dropped for start in islice(self._starts, rows)]

    def _index(self, block: _Block) -> None:
        first = self._dropped + self._buffered
        ends = first + np.append(block.starts[1:], len(block.tokens))
        self._position = find_starts(self._starts, self._position, first, ends, self._length)


def find_starts(starts: deque[int], position: int, first: int, ends: np.ndarray, sequence_length: int) -> int:
    """Where rows begin in further documents, as DocumentPacker cuts them.

    Args:
        starts: of the rows so far; those behind them are added, of which the last is not complete.
        position: of the last token of the last row.
        first: position of the documents' first token, `position` at most.
        ends: positions behind the last token of each.
    Returns:
        the new `position`.
    """
    while position < ends[-1]:
        document = int(np.searchsorted(ends, position, side="right"))
        begin, end = ends[document - 1] if document else first, int(ends[document])
        starts.append(position if position == begin or end - position >= sequence_length else end)
        position = starts[-1] + sequence_length
    return position


def _shrink(document: Any) -> Any:
    return document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document


def _restore(document: Any) -> Any:
    return document.decode("utf-8", "surrogatepass") if isinstance(document, bytes) else document
