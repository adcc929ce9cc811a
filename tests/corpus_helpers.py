"""Small texts in every format, and ranks that are threads."""

from __future__ import annotations

import gzip
import json
import random
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipe.config import ConfigError
from recipe.data.corpus import Corpus, DataError, open_corpora
from recipe.data.packing import ShardPacker
from recipe.data.stream import RowStream


def write_jsonl(path: Path, texts: Iterable[Any], key: str = "text") -> Path:
    path.write_bytes("".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode())
    return path


def write_jsonl_gz(path: Path, texts: Iterable[Any], key: str = "text") -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps({key: text}) + "\n" for text in texts).encode()))
    return path


def write_parquet(path: Path, texts: list[str | None], group: int = 1000, key: str = "text", **columns: list[Any]) -> Path:
    pq.write_table(pa.table({**columns, key: pa.array(texts, pa.string())}), path, row_group_size=group)
    return path


def open_training(data: Path | str, text_column: str = "text") -> Corpus:
    return open_corpora(str(data), None, text_column, Path("/nonexistent"))[0]


def read_all(corpus: Corpus) -> list[str]:
    return [text for unit in corpus.units for text in corpus.read(unit)]


class NumberEncoder:
    """Stands in for the Encoder: the document "start length" becomes the ids start, start + 1, ..., so that every token
    of a corpus differs from every other, and says which document it is from and where it stands there."""

    dtype = np.uint32
    hash = "numbers"
    chunk = 16

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.arange(start, start + length, dtype=self.dtype) for start, length in (map(int, t.split()) for t in texts)]

    def text_bytes(self, text: str) -> int:
        return len(text.encode())


def numbered_documents(lengths: Iterable[int], first: int = 0) -> list[str]:
    """Documents for the NumberEncoder, of these lengths in tokens, one behind the other from the id `first`."""
    documents = []
    for length in lengths:
        documents.append(f"{first} {length}")
        first += length
    return documents


def numbered_corpus(folder: Path, files: list[list[int]], group: int = 4) -> Corpus:
    """Parquet files of numbered documents with the given lengths, `group` documents to a row group."""
    folder.mkdir(exist_ok=True)
    first = 0
    for n, lengths in enumerate(files):
        write_parquet(folder / f"{n:02}.parquet", numbered_documents(lengths, first), group)
        first += sum(lengths)
    return open_training(folder)


class ThreadExchange:
    """The exchange of a rank that is a thread. A rank that is left waiting breaks the barrier after `timeout` seconds."""

    def __init__(self, rank: int, num_ranks: int, barrier: threading.Barrier, slots: list[np.ndarray | None]):
        self.rank, self.num_ranks, self._barrier, self._slots = rank, num_ranks, barrier, slots

    def sum(self, values: np.ndarray) -> np.ndarray:
        assert values.dtype == np.int64
        self._slots[self.rank] = values.copy()
        self._barrier.wait()
        total = np.sum(self._slots, axis=0)
        self._barrier.wait()
        return total


def run_ranks(num_ranks: int, function: Callable[[ThreadExchange], Any], timeout: float = 20) -> list[Any]:
    """What `function` gives, or the exception that it raises, on each of `num_ranks` threads."""
    barrier = threading.Barrier(num_ranks, timeout=timeout)
    slots: list[np.ndarray | None] = [None] * num_ranks
    results: list[Any] = [None] * num_ranks

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadExchange(rank, num_ranks, barrier, slots))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout * 2)
        assert not thread.is_alive(), "a rank hangs"
    return results


def rows_until_the_end(stream: RowStream, batch: int = 1) -> list[list[int]]:
    """All rows of the run from here on."""
    rows = []
    while True:
        try:
            rows += stream.next_batch(batch).tolist()
        except DataError:
            return rows


def take_restarting(make_packer: Callable[..., ShardPacker], epochs: int, seed: int) -> list[list[int]]:
    """All rows of some epochs, a few at a time, often by a new packer that is made from the last one's cursor."""
    rng = random.Random(seed)
    packer, rows, epoch = make_packer(), [], 0
    while epoch < epochs:
        if rng.random() < 0.5:
            position = packer.cursor
            packer = make_packer(position)
            assert packer.cursor == position
        wanted = rng.randrange(1, 4)
        count = packer.fill(wanted, epoch)
        rows += packer.take(count).tolist() if count else []
        epoch += count < wanted
    return rows


def refused(data: Path | str, text_column: str = "text", validation_data: str | None = None) -> list[str]:
    """The problems that opening `data` raises."""
    with pytest.raises(ConfigError) as caught:
        open_corpora(str(data), validation_data, text_column, Path("/nonexistent"))
    return caught.value.problems


def mixed_folder(folder: Path) -> Path:
    (folder / "deep" / "er").mkdir(parents=True)
    write_parquet(folder / "a.parquet", ["a1", "a2"])
    write_jsonl(folder / "b.jsonl", ["b"])
    write_jsonl_gz(folder / "c.jsonl.gz", ["c"])
    (folder / "d.TXT").write_text("d")
    write_jsonl(folder / "deep" / "er" / "f.jsonl", ["f"])
    (folder / "README.md").write_text("not text for training")
    (folder / "data.csv").write_text("text\nno\n")
    return folder
