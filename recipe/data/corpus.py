"""The text: files cut into units that any rank can read on its own, and the documents of a unit.

A unit is a parquet row group, a byte range of a .jsonl or .txt file, or a whole .jsonl.gz file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import ConfigError, first_line
from recipe.data.sources import FORMATS, file_format, find_files

if TYPE_CHECKING:
    import pyarrow as pa

JSONL_UNIT_BYTES = 4 << 20
"""Bytes of a .jsonl unit: about the text of one FineWeb row group, small enough to deal out to 64 shards."""
TXT_UNIT_BYTES = 1 << 18
"""Bytes of a .txt unit, which is one document: longer files are cut at the next empty line."""

OPEN_AT_ONCE = 8
"""Files on the Hub that are opened side by side."""

BATCH_DOCUMENTS = 1000
"""Documents of a parquet row group that are decoded at a time: all those of a FineWeb row group, or of a shuffled window."""
PARQUET_BUFFER_BYTES = 4 << 20
"""Compressed bytes of a parquet row group that are read at a time: twice those of a FineWeb row group, which is therefore one
request of the Hub. Of larger ones a request brings more text than FineWeb's do."""

LABELS = ("id", "url")
"""Columns or keys that say where a document is from."""


class DataError(RuntimeError):
    """Text that cannot be read, or has run out, in the middle of a run. Names the file."""


@dataclass(frozen=True)
class Unit:
    """A piece of a file that is read as a whole."""

    file: int
    """Index into Corpus.files."""
    start: int
    """Row group, or first byte."""
    end: int
    """Row group after it, or byte after the last."""
    text_bytes: int
    """UTF-8 bytes of its text, about."""
    skip: int = 0
    """Documents at its beginning that are held out for validation."""


@dataclass
class Corpus:
    """Files and their units, in a fixed order."""

    name: str
    files: list[str]
    sizes: list[int]
    units: list[Unit]
    text_column: str
    remote: bool = False
    footers: dict[int, object] = field(default_factory=dict, repr=False)
    """Parquet metadata by file, read once: a footer of FineWeb is as large as a row group's text."""

    @property
    def over_network(self) -> bool:
        """Whether reading waits for the Hub."""
        return self.remote

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text (estimated for .jsonl)."""
        return sum(unit.text_bytes for unit in self.units)

    @cached_property
    def fingerprint(self) -> dict:
        """What the corpus is, as JSON: its files with sizes in bytes, wherever they lie, and its units."""
        return {
            "name": self.name if self.remote else None,
            "files": [
                [file if self.remote else Path(file).name, size] for file, size in zip(self.files, self.sizes, strict=True)
            ],
            "text_column": self.text_column,
            "units": len(self.units),
            "held_out": self.units[0].skip if self.units else 0,
        }

    def with_units(self, units: list[Unit]) -> Corpus:
        """The same files with these units."""
        return Corpus(self.name, self.files, self.sizes, units, self.text_column, self.remote, self.footers)

    def read(self, unit: Unit) -> Iterator[str]:
        """The documents of a unit, in the order of the file, without the held-out and the empty ones.

        Raises:
            DataError: naming the file, if it cannot be read.
        """
        path = self.files[unit.file]
        try:
            yield from islice(self._documents(unit), unit.skip, None)
        except DataError:
            raise
        except Exception as error:  # pyarrow, gzip, json and the network raise a dozen types; the remedy is one
            raise DataError(f"cannot read {path}: {first_line(error)}") from error

    def _documents(self, unit: Unit) -> Iterator[str]:
        path = self.files[unit.file]
        for document in _READERS[file_format(path)](self, unit):
            if document is not None and not isinstance(document, str):
                raise DataError(f"cannot read {path}: {self.text_column} holds {type(document).__name__}, not text")
            if document:
                yield document

    def describe(self, unit: Unit) -> list[dict[str, str | None]]:
        """The `id` and `url` of the documents that `read` gives, as far as the file has them."""
        kind = file_format(self.files[unit.file])
        if kind == "parquet":
            labels = _label_parquet(self, unit)
        elif kind == "txt":
            labels = [{}]
        else:
            records = (json.loads(line) if line.strip() else {} for line in _LINES[kind](self, unit))
            labels = [{name: record.get(name) for name in LABELS} for record in records]
        documents = zip(labels, _READERS[kind](self, unit), strict=True)
        return [label for label, document in documents if document][unit.skip :]

    def open(self, file: int):
        """The file as a binary, seekable object."""
        if not self.remote:
            return open(self.files[file], "rb")
        from recipe.data.remote import BUFFER_BYTES, RemoteFile

        handle = RemoteFile(self.files[file], self.sizes[file])
        # pyarrow asks for exactly the bytes of a column; lines are small reads.
        return handle if file_format(self.files[file]) == "parquet" else io.BufferedReader(handle, BUFFER_BYTES)


def open_corpora(data: str, validation_data: str | None, text_column: str, cache: Path) -> tuple[Corpus, Corpus | None]:
    """The training text, and the validation text if it is apart (None: hold it out from the training text).

    Args:
        cache: the run's folder for what it derives (installed-docs).
    Raises:
        ConfigError: for missing, empty or unreadable data, naming the file.
    """
    from recipe.data.prepared import open_prepared

    prepared = open_prepared(data, "data")
    splits = {} if prepared else find_files(data, cache, "data")
    if not prepared and not splits["train"]:
        raise ConfigError(f"data: {data} has no training files, only {sorted(splits)}")
    training = prepared[0] if prepared else _open(data, splits["train"], text_column, "data")
    if validation_data is not None:
        other = open_prepared(validation_data, "validation_data")
        if other:
            return training, other[1] or other[0]
        others = find_files(validation_data, cache, "validation_data")
        return training, _open(validation_data, others["validation"] or others["train"], text_column, "validation_data")
    if prepared:
        return prepared
    if splits["validation"]:
        return training, _open(data, splits["validation"], text_column, "data")
    return training, None


def _open(name: str, files: list[str], text_column: str, config_field: str) -> Corpus:
    remote = files[0].startswith("hf://")
    unknown = [f for f in files if file_format(f) is None]
    if unknown:
        raise ConfigError(
            f"{config_field}: {unknown[0]} is in no format that can be read ({', '.join(FORMATS)}); name others with a glob"
        )
    corpus = Corpus(name, files, [], [], text_column, remote)
    if remote:
        from huggingface_hub import HfFileSystem

        filesystem = HfFileSystem()
        corpus.sizes = [filesystem.info(f)["size"] for f in files]
    else:
        corpus.sizes = [os.path.getsize(f) for f in files]
    problems = []

    def units_of(file: int) -> list[Unit]:
        path = files[file]
        try:
            return _UNITS[file_format(path)](corpus, file)
        except ConfigError as error:
            problems.extend(f"{config_field}: {problem}" for problem in error.problems)
        except DataError as error:
            problems.append(f"{config_field}: {first_line(error)}")
        except Exception as error:
            problems.append(f"{config_field}: cannot read {path}: {first_line(error)}; replace or remove the file")
        return []

    # A file on the Hub takes two or three answers, which come sooner side by side.
    with ThreadPoolExecutor(OPEN_AT_ONCE if remote else 1) as pool:
        corpus.units = [unit for units in pool.map(units_of, range(len(files))) for unit in units]
    if problems:
        raise ConfigError(*problems)
    if not corpus.text_bytes:
        raise ConfigError(f"{config_field}: {name} holds no text")
    return corpus


def _parquet_units(corpus: Corpus, file: int) -> list[Unit]:
    import pyarrow.parquet as pq

    with corpus.open(file) as handle:
        footer = pq.ParquetFile(handle).metadata
    _check_text_column(corpus.files[file], corpus.text_column, footer.schema.to_arrow_schema())
    corpus.footers[file] = footer
    column = [footer.schema.column(i).path for i in range(footer.num_columns)].index(corpus.text_column)
    groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
    # Each value has its length, 4 bytes, in front, unless repeated values are stored once: then this is too small.
    sizes = [max(group.num_rows, group.column(column).total_uncompressed_size - 4 * group.num_rows) for group in groups]
    return [Unit(file, g, g + 1, size) for g, size in enumerate(sizes) if groups[g].num_rows]


def _check_text_column(path: str, name: str, schema: pa.Schema) -> None:
    """Raise ConfigError unless the column `name` of a parquet file holds text; say which ones do."""
    import pyarrow as pa

    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

    # Columns inside of others are no choice: one row may hold many texts.
    others = ", ".join(column.name for column in schema if is_text(column.type))
    remedy = f"set text_column to one of {others}" if others else "no other can be text_column; replace or remove the file"
    if name not in schema.names:
        raise ConfigError(f"{path} has no column {name}; {remedy}")
    kind = schema.field(name).type
    if not is_text(kind):
        held = "structs" if pa.types.is_struct(kind) else "lists" if pa.types.is_nested(kind) else kind
        raise ConfigError(f"{path}: {name} holds {held}, not text; {remedy}")


def _read_parquet(corpus: Corpus, unit: Unit) -> Iterator[str | None]:
    # The reader of a shard pauses between documents while its window is trained on: what it has been given is not kept.
    for documents in _parquet_batches(corpus, unit):
        documents.reverse()
        while documents:
            yield documents.pop()


def _parquet_batches(corpus: Corpus, unit: Unit) -> Iterator[list[str | None]]:
    """The documents of a row group, BATCH_DOCUMENTS at a time: a row group of pandas has a million rows, and up to 64 shards
    read one each."""
    import pyarrow.parquet as pq

    footer = corpus.footers[unit.file]
    left = footer.row_group(unit.start).num_rows
    with corpus.open(unit.file) as handle:
        # pre_buffer would read all of the row group's column at once, and keep it.
        file = pq.ParquetFile(handle, metadata=footer, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        batches = file.iter_batches(BATCH_DOCUMENTS, [unit.start], [corpus.text_column], use_threads=False)
        while left:
            documents = next(batches).column(0).to_pylist()
            left -= len(documents)
            if left:
                yield documents
    # The last batch, of an ordinary row group the only one, waits without the file and its buffers.
    del file, batches
    yield documents


def _label_parquet(corpus: Corpus, unit: Unit) -> list[dict]:
    import pyarrow.parquet as pq

    with corpus.open(unit.file) as handle:
        file = pq.ParquetFile(handle, metadata=corpus.footers.get(unit.file))
        corpus.footers[unit.file] = file.metadata
        present = [name for name in LABELS if name in file.schema_arrow.names]
        if not present:
            return [{}] * file.metadata.row_group(unit.start).num_rows
        return file.read_row_group(unit.start, columns=present).to_pylist()


def _jsonl_units(corpus: Corpus, file: int) -> list[Unit]:
    size = corpus.sizes[file]
    with corpus.open(file) as handle:
        share = _text_share(corpus, corpus.files[file], handle)
    return [
        Unit(file, start, min(start + JSONL_UNIT_BYTES, size), int(share * min(JSONL_UNIT_BYTES, size - start)))
        for start in range(0, size, JSONL_UNIT_BYTES)
    ]


def _jsonl_gz_units(corpus: Corpus, file: int) -> list[Unit]:
    with corpus.open(file) as raw, gzip.open(raw) as handle:
        share = _text_share(corpus, corpus.files[file], handle)
        raw.seek(0)
        head, inflate = raw.read(1 << 20), zlib.decompressobj(wbits=31)
        expansion = len(inflate.decompress(head)) / max(1, len(head) - len(inflate.unused_data))
    size = corpus.sizes[file]
    return [Unit(file, 0, size, int(share * expansion * size))] if size else []


def _text_share(corpus: Corpus, path: str, handle: io.BufferedIOBase, sample: int = 1 << 18) -> float:
    """Bytes of text a byte of JSON lines, over the first `sample` bytes."""
    lines = text = 0
    while lines < sample and (line := handle.readline()):
        lines += len(line)
        text += len((_parse_line(corpus, path, line) or "").encode("utf-8", "surrogatepass"))
    return text / max(1, lines)


def _jsonl_lines(corpus: Corpus, unit: Unit) -> Iterator[bytes]:
    with corpus.open(unit.file) as handle:
        # A line belongs to the unit in which it starts.
        if unit.start:
            handle.seek(unit.start - 1)
            handle.readline()
        while handle.tell() < unit.end and (line := handle.readline()):
            yield line


def _jsonl_gz_lines(corpus: Corpus, unit: Unit) -> Iterator[bytes]:
    with corpus.open(unit.file) as raw, gzip.open(raw) as handle:
        yield from handle


def _read_jsonl(corpus: Corpus, unit: Unit) -> Iterator[str]:
    path = corpus.files[unit.file]
    return (_parse_line(corpus, path, line) for line in _LINES[file_format(path)](corpus, unit))


def _parse_line(corpus: Corpus, path: str, line: bytes) -> str | None:
    if not line.strip():
        return None
    record = json.loads(line)
    if not isinstance(record, dict) or corpus.text_column not in record:
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ConfigError(f"{path} has no key {corpus.text_column}; set text_column to one of {keys}")
    text = record[corpus.text_column]
    if not isinstance(text, str | None):
        raise ConfigError(f"{path}: {corpus.text_column} does not hold text; set text_column to another key")
    if isinstance(text, str) and (b"\xed" in line or b"\\u" in line):
        # Half a surrogate pair, which is no text, becomes U+FFFD. json.loads lets escaped ones pass, and raw ones: three bytes
        # from 0xED on, as Java and MySQL write them (CESU-8). Korean begins with this byte as well and stays as it is.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _txt_units(corpus: Corpus, file: int) -> list[Unit]:
    size = corpus.sizes[file]
    with corpus.open(file) as handle:
        codecs.getincrementaldecoder("utf-8")().decode(handle.read(4096), final=size <= 4096)
    return [
        Unit(file, start, min(start + TXT_UNIT_BYTES, size), min(TXT_UNIT_BYTES, size - start))
        for start in range(0, size, TXT_UNIT_BYTES)
    ]


def _read_txt(corpus: Corpus, unit: Unit) -> Iterator[str]:
    with corpus.open(unit.file) as handle:
        start = _next_paragraph(handle, unit.start)
        end = _next_paragraph(handle, unit.end) if unit.end < corpus.sizes[unit.file] else unit.end
        handle.seek(start)
        yield handle.read(max(0, end - start)).decode("utf-8")


def _next_paragraph(handle: io.BufferedIOBase, position: int) -> int:
    """The first byte after an empty line at or after `position`, or, if none comes within a unit, after the line; 0 stays 0."""
    if not position:
        return 0
    handle.seek(position - 1)
    handle.readline()
    line_end = handle.tell()
    while handle.tell() <= position + TXT_UNIT_BYTES:
        if not handle.readline().strip():
            return handle.tell()
    return line_end


_UNITS = {"parquet": _parquet_units, "jsonl": _jsonl_units, "jsonl.gz": _jsonl_gz_units, "txt": _txt_units}
_READERS = {"parquet": _read_parquet, "jsonl": _read_jsonl, "jsonl.gz": _read_jsonl, "txt": _read_txt}
_LINES = {"jsonl": _jsonl_lines, "jsonl.gz": _jsonl_gz_lines}
