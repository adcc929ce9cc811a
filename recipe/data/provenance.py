"""Which documents made a batch: every row of a run can be traced to its sources."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from recipe.config import Config, ConfigError, first_line
from recipe.data.corpus import Corpus, DataError, Unit, open_corpora
from recipe.data.packing import SHUFFLE_WINDOW
from recipe.data.prepared import PreparedCorpus, encoder_for
from recipe.data.stream import RowStream, Span
from recipe.files import read_json_lines
from recipe.parsing import load_config
from recipe.plan import make_plan
from recipe.run_folder import RunFolder
from recipe.tokenizer import Encoder, load_tokenizer


@dataclass(frozen=True)
class Source:
    """A document's part in a row of a batch."""

    row: int
    """The row's place in the batch."""
    tokens: int
    """Number of the document's tokens in the row, end-of-text included."""
    first_token: int
    """Offset of the first of them in the document's tokens."""
    file: str
    unit: int
    """Row group, or first byte, of the document's unit in the file."""
    document: int
    """Number of the document in its unit (row group, byte range or file), without empty ones."""
    epoch: int
    id: str | None
    url: str | None


class BatchTracer:
    """Replays the rows of a run, from the nearest recorded position before the step that is asked for.

    Args:
        run: the run folder.
        source: for a run on prepared tokens, the text that they were made from; None if that is on the Hub, or unknown.
    Raises:
        ConfigError: if the folder holds no run, or its text cannot be read.
    """

    def __init__(self, run: Path, source: str | None = None):
        folder = RunFolder(run)
        if not folder.config.is_file():
            raise ConfigError(f"{run} holds no run (no config.yaml)")
        self.config: Config = load_config([str(folder.config)])
        self.tokenizer = load_tokenizer(str(folder.cache / "tokenizer"))
        self._positions = _read_positions(folder.positions)
        if not self._positions:
            raise ConfigError(f"{run} has recorded no position of its text yet; let it train a few steps")
        fingerprint = self._positions[0]["fingerprint"]
        corpus, _ = open_corpora(self.config.data, self.config.validation_data, self.config.text_column, folder.cache)
        self._labelled: Corpus | None = corpus
        self.missing: str | None = None
        """Why the sources have neither id nor url, and what to do; None if they are looked for."""
        if isinstance(corpus, PreparedCorpus):
            corpus.fetch()
            self._labelled = corpus.source(source, folder.cache)
            if self._labelled is None:
                self.missing = (
                    f"tokens carry no id or url, only file, unit and document: name the text of {self.config.data} "
                    f"({corpus.name}) with --source"
                )
        elif source is not None:
            raise ConfigError(f"source: {run} was trained on text, not on prepared tokens; leave it out")
        units = corpus.units[len(corpus.units) - fingerprint["units"] :]
        units[0] = replace(units[0], skip=fingerprint["held_out"])
        self.corpus: Corpus = corpus.with_units(units)

    def trace(self, step: int) -> tuple[np.ndarray, list[Source]]:
        """The rows of optimizer step `step`, counted from 1, and where they come from.

        Returns:
            rows [rows of the batch, sequence_length + 1] in the order of the run, and their sources in the same order.
        Raises:
            ConfigError: if the run has no such step.
        """
        known = [p for p in self._positions if p["step"] < step]
        if not known:
            raise ConfigError(f"step: {step} is before the first recorded position; steps count from 1")
        start, plan = known[-1], make_plan(self.config, 1)
        stream = RowStream(
            self.corpus,
            encoder_for(self.corpus, Encoder(self.tokenizer), "data"),
            self.config.sequence_length,
            self.config.seed,
            self.config.max_epochs,
            state={**start, "accepted": []},
            # As the run has them now: those of the configuration, of later starts and of rollbacks.
            skip_rows=self._positions[-1]["fingerprint"]["skip_rows"],
            packing=self.config.packing,
        )
        for earlier in range(start["step"] + 1, step):
            stream.next_batch(plan.rows_at(earlier - 1))
        spans: list[Span] = []
        rows = stream.next_batch(plan.rows_at(step - 1), spans)
        return rows, sorted(self._sources(stream, spans), key=lambda source: source.row)

    def _sources(self, stream: RowStream, spans: list[Span]) -> Iterator[Source]:
        described: dict[Unit, list[dict]] = {}
        for span in spans:
            if span.unit not in described:
                described[span.unit] = self._describe(span.unit)
            labels = described[span.unit]
            window = span.cursor.document // SHUFFLE_WINDOW
            size = min(SHUFFLE_WINDOW, len(labels) - window * SHUFFLE_WINDOW)
            order = stream.document_order(span.cursor.epoch, span.unit, window, size)
            document = window * SHUFFLE_WINDOW + int(order[span.cursor.document % SHUFFLE_WINDOW])
            yield Source(
                row=span.row,
                tokens=span.tokens,
                first_token=span.cursor.token,
                file=self.corpus.files[span.unit.file],
                unit=span.unit.start,
                document=document + span.unit.skip,
                epoch=span.cursor.epoch,
                id=labels[document].get("id"),
                url=labels[document].get("url"),
            )

    def _describe(self, unit: Unit) -> list[dict]:
        if self._labelled is not None:
            try:
                return self._labelled.describe(unit)
            except DataError as error:
                if not isinstance(self.corpus, PreparedCorpus):
                    raise
                self._labelled = None
                self.missing = f"tokens carry no id or url, and their text cannot be read: {first_line(error)}"
        return self.corpus.describe(unit)


def _read_positions(path: Path) -> list[dict]:
    """The recorded positions in the order of their steps. One that was recorded after the run had gone back replaces those of
    the steps behind it."""
    positions: list[dict] = []
    for record in read_json_lines(path):
        while positions and positions[-1]["step"] >= record["step"]:
            positions.pop()
        positions.append(record)
    return positions


def describe_source(source: Source) -> str:
    """One line."""
    name = source.url or source.id or f"{source.file} unit {source.unit} document {source.document}"
    return f"row {source.row:4d}  {source.tokens:5d} tokens from {source.first_token:6d}  {name}"
