"""One file of tokens with the table of its documents: made or verified by one process of prepare_data.py."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recipe.data.corpus import Corpus, Unit
from recipe.data.token_index import (
    TABLE_DTYPE,
    UNFINISHED,
    UNIT_COLUMNS,
    documents_file,
    file_problem,
    is_prepared,
    read_index,
    tokens_file,
)
from recipe.files import sync_folder, write_json
from recipe.tokenizer import Encoder


@dataclass(frozen=True)
class Part:
    """What one task makes: tokens-N.bin and documents-N.bin of some consecutive units."""

    folder: Path
    corpus: str
    """Key of its corpus."""
    number: int
    units: range
    """Positions in Corpus.units."""
    record: dict[str, Any] | None = None
    """What was recorded when it was made before, to be verified: size and SHA-256 of each file, and for each unit its
    tokens and documents."""

    @property
    def record_file(self) -> Path:
        """Where `record` is kept until all parts are there."""
        return self.folder / UNFINISHED / f"{self.number:05d}.json"


def cut_into_parts(folder: Path, name: str, corpus: Corpus, text_bytes: int) -> list[Part]:
    """The corpus cut into parts of about `text_bytes`, with what is recorded of each."""
    starts, size = [0], 0
    for position, unit in enumerate(corpus.units):
        if size and size + unit.text_bytes > text_bytes:
            starts.append(position)
            size = 0
        size += unit.text_bytes
    recorded = _recorded_in_index(folder)
    parts = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(corpus.units)], strict=True)):
        part = Part(folder, name, number, range(start, end), recorded.get(number))
        if part.record_file.is_file():
            part = Part(folder, name, number, range(start, end), json.loads(part.record_file.read_text(encoding="utf-8")))
        parts.append(part)
    return parts


def _recorded_in_index(folder: Path) -> dict[int, dict[str, Any]]:
    """Records of the parts of a finished folder, from its index."""
    if not is_prepared(str(folder)):
        return {}
    index = read_index(folder, "output_dir")
    rows = [dict(zip(UNIT_COLUMNS, row, strict=True)) for row in index["units"]]
    return {
        number: {
            "files": {name: index["files"][name] for name in (tokens_file(number), documents_file(number))},
            "units": [[row["tokens"], row["documents"]] for row in units],
        }
        for number, units in groupby(rows, lambda row: row["part"])
    }


class Stopped(Exception):
    """The parent wants no more of this."""


@dataclass
class Worker:
    """What the tasks of a process share.

    Args:
        done_bytes: shared counter of text that is done, in the units' `text_bytes`.
        stop: shared event that ends the work at the next documents.
    """

    encoder: Encoder
    corpora: dict[str, Corpus]
    done_bytes: Any
    stop: Any

    def make(self, part: Part) -> tuple[dict[str, Any], str | None]:
        """Verify or write a part.

        Returns:
            its record, and what was wrong with the files that were recorded.
        Raises:
            DataError: if the text cannot be read.
        """
        problem = None
        if part.record:
            found = ((name, file_problem(part.folder / name, facts)) for name, facts in part.record["files"].items())
            problem = next((f"{part.folder / name} {wrong}" for name, wrong in found if wrong), None)
            if problem is None:
                self._advance(sum(unit.text_bytes for unit in self._units(part)))
                return part.record, None
        return self._write(part), problem

    def _write(self, part: Part) -> dict[str, Any]:
        corpus, encoder = self.corpora[part.corpus], self.encoder
        dtype = np.dtype(encoder.dtype).newbyteorder("<")
        sizes = []
        with (
            _hashed_file(part.folder / tokens_file(part.number)) as tokens,
            _hashed_file(part.folder / documents_file(part.number)) as table,
        ):
            for unit in self._units(part):
                unit_tokens = unit_documents = 0
                texts = corpus.read(unit)
                while chunk := list(islice(texts, 4 * encoder.chunk)):
                    if self.stop.is_set():
                        raise Stopped
                    ids = encoder.encode(chunk)
                    rows = [(len(document), encoder.text_bytes(text)) for document, text in zip(ids, chunk, strict=True)]
                    tokens.write(np.concatenate(ids).astype(dtype, copy=False).tobytes())
                    table.write(np.array(rows, TABLE_DTYPE).tobytes())
                    unit_tokens += sum(size for size, _ in rows)
                    unit_documents += len(rows)
                sizes.append([unit_tokens, unit_documents])
                self._advance(unit.text_bytes)
        files = {path.name: {"size": size, "sha256": digest} for path, size, digest in (tokens.facts(), table.facts())}
        record = {"files": files, "units": sizes}
        # The record follows what it describes: a file without one is made again.
        sync_folder(part.folder)
        write_json(part.record_file, record)
        return record

    def _units(self, part: Part) -> list[Unit]:
        return self.corpora[part.corpus].units[part.units.start : part.units.stop]

    def _advance(self, text_bytes: int) -> None:
        with self.done_bytes.get_lock():
            self.done_bytes.value += text_bytes


_worker: Worker | None = None


def begin_worker(worker: Worker) -> None:
    """Set up a process of the pool."""
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends it in good order
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def make_part(part: Part) -> tuple[dict[str, Any], str | None]:
    """`Worker.make` in a process of the pool."""
    return _worker.make(part)


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


class _HashedFile:
    """Writes to a file and hashes what it writes."""

    def __init__(self, path: Path, handle: BinaryIO):
        self._path, self._handle = path, handle
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self._handle.write(content)
        self._hash.update(content)
        self._size += len(content)

    def facts(self) -> tuple[Path, int, str]:
        """Path, size in bytes and SHA-256."""
        return self._path, self._size, self._hash.hexdigest()


@contextmanager
def _hashed_file(path: Path) -> Iterator[_HashedFile]:
    """A file that is there, whole, only when the block has ended well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            yield _HashedFile(path, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
