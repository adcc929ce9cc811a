"""Documents to tokens of one virtual shard: end-of-text, document, end-of-text, document ... without padding or loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from recipe.data.corpus import Corpus, Unit
from recipe.tokenizer import Encoder

SHUFFLE_WINDOW = 1000
"""Documents of a unit that are shuffled among themselves: a FineWeb row group."""
ENCODE_CHUNK = 16
"""Documents encoded at a time: about 11,000 tokens of FineWeb, so that the first batch waits for little."""


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
class _Document:
    cursor: Cursor
    tokens: np.ndarray


class ShardPacker:
    """Rows of `sequence_length` + 1 tokens of one virtual shard, epoch after epoch.

    A row's last token is the next row's first, so every token but a shard's first is a target exactly once. What an epoch
    leaves over, less than a row, begins the next.

    Args:
        units_of_epoch: the shard's units in the order of the given epoch.
        document_order: permutation of the documents of a window: (epoch, unit, window, size) -> indices.
        cursor: where to begin.
    """

    def __init__(
        self,
        corpus: Corpus,
        encoder: Encoder,
        sequence_length: int,
        units_of_epoch: Callable[[int], list[Unit]],
        document_order: Callable[[int, Unit, int, int], np.ndarray],
        cursor: Cursor = Cursor(),  # noqa: B008  (immutable)
    ):
        self._corpus, self._encoder, self._length = corpus, encoder, sequence_length
        self._units_of_epoch, self._document_order = units_of_epoch, document_order
        self._documents: deque[_Document] = deque()
        self._buffered = 0
        self._offset = cursor.token
        self._next = Cursor(cursor.epoch, cursor.unit, cursor.document)
        """Where reading goes on: behind the last buffered document."""
        self._texts: Iterator[str] | None = None

    @property
    def cursor(self) -> Cursor:
        """The position behind the rows taken so far, whatever is buffered."""
        if not self._documents:
            return replace(self._next, token=self._offset)
        return replace(self._documents[0].cursor, token=self._offset)

    def fill(self, rows: int, epoch: int) -> int:
        """Buffer up to `rows` rows without reading past the end of `epoch`; the number that is there."""
        wanted = rows * self._length + 1
        while self._buffered - self._offset < wanted and self._read_chunk(epoch):
            pass
        return min(rows, max(0, self._buffered - self._offset - 1) // self._length)

    def take(self) -> np.ndarray:
        """The next buffered row, [sequence_length + 1]."""
        row = np.empty(self._length + 1, dtype=self._encoder.dtype)
        filled = 0
        offset = self._offset
        for document in self._documents:
            part = document.tokens[offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            offset = 0
            if filled == len(row):
                break
        self._offset += self._length
        while self._documents and self._offset >= len(self._documents[0].tokens):
            done = len(self._documents.popleft().tokens)
            self._offset -= done
            self._buffered -= done
        return row

    def _read_chunk(self, last_epoch: int) -> bool:
        """Encode a few documents more; False at the end of `last_epoch`."""
        position = self._next
        if position.epoch > last_epoch:
            return False
        units = self._units_of_epoch(position.epoch)
        if position.unit >= len(units):
            self._next = Cursor(position.epoch + 1)
            return self._read_chunk(last_epoch)
        if self._texts is None:
            self._texts = self._shuffled_texts(position.epoch, units[position.unit], position.document)
        texts = [text for _, text in zip(range(ENCODE_CHUNK), self._texts, strict=False)]
        for n, tokens in enumerate(self._encoder.encode(texts)):
            cursor = Cursor(position.epoch, position.unit, position.document + n)
            self._documents.append(_Document(cursor, tokens))
            self._buffered += len(tokens)
        if len(texts) < ENCODE_CHUNK:
            self._texts = None
            self._next = Cursor(position.epoch, position.unit + 1)
        else:
            self._next = Cursor(position.epoch, position.unit, position.document + len(texts))
        return True

    def _shuffled_texts(self, epoch: int, unit: Unit, skip: int) -> Iterator[str]:
        documents = self._corpus.read(unit)
        window_index = 0
        while window := [text for _, text in zip(range(SHUFFLE_WINDOW), documents, strict=False)]:
            if skip < len(window):
                order = self._document_order(epoch, unit, window_index, len(window))
                yield from (window[i] for i in order[skip:])
            skip = max(0, skip - len(window))
            window_index += 1
