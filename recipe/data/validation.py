"""The fixed validation set, and how much text there is to train on."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from recipe.config import ConfigError
from recipe.data.corpus import Corpus, Unit
from recipe.data.packing import find_starts
from recipe.data.prepared import PreparedCorpus
from recipe.data.sources import file_format
from recipe.data.stream import number_of_shards
from recipe.tokenizer import Encoder

LARGEST_SHARE = 20
"""Held out from the training text, the validation set is at most a twentieth of it."""
EXACT_COUNT_BYTES = 8 << 20
"""Text up to this size is counted exactly, in a second or two; larger text is estimated from a sample."""
SAMPLE_BYTES = 32 << 20
"""Text that is kept of a unit: eight of a gigabyte each would not fit the memory of many machines."""
_CHUNK = 64
"""Documents encoded at a time."""


def read_validation_rows(corpus: Corpus, encoder: Encoder, sequence_length: int, max_tokens: int) -> np.ndarray:
    """Rows of the first documents of `corpus`.

    Returns:
        rows [rows, sequence_length + 1], overlapping by one token, with at most `max_tokens` targets.
    Raises:
        ConfigError: if the text does not fill a row.
    """
    return _take_rows(corpus, encoder, sequence_length, max_tokens, None)[0]


def hold_out(training: Corpus, encoder: Encoder, sequence_length: int, max_tokens: int) -> tuple[np.ndarray, Corpus]:
    """Validation rows from the first documents of the training text, and the text without these documents.

    Raises:
        ConfigError: if a twentieth of the text does not fill a row.
    """
    limit = training.text_bytes // LARGEST_SHARE
    rows, unit, documents, text_bytes = _take_rows(training, encoder, sequence_length, max_tokens, limit)
    rest = list(training.units[unit:])
    if documents:
        rest[0] = replace(rest[0], skip=documents, text_bytes=max(0, rest[0].text_bytes - text_bytes))
    return rows, training.with_units(rest)


def _take_rows(
    corpus: Corpus, encoder: Encoder, sequence_length: int, max_tokens: int, max_bytes: int | None
) -> tuple[np.ndarray, int, int, int]:
    """Rows of the first documents, and where they end: the unit, and in it the documents and bytes that were taken."""
    if max_tokens < sequence_length:
        raise ConfigError(
            f"validation_tokens: {max_tokens} are less than a row of {sequence_length}; raise validation_tokens, or lower "
            "sequence_length"
        )
    parts: list[np.ndarray] = []
    total = taken_bytes = 0
    end = (len(corpus.units), 0, 0)
    for index, unit in enumerate(corpus.units):
        documents = unit_bytes = 0
        read = corpus.read(unit)
        while chunk := list(islice(read, _CHUNK)):
            for document, tokens in zip(chunk, encoder.encode(chunk), strict=True):
                size = encoder.text_bytes(document)
                if total > max_tokens or (max_bytes is not None and taken_bytes + size > max_bytes):
                    end = (index, documents, unit_bytes)
                    break
                parts.append(tokens)
                total += len(tokens)
                taken_bytes += size
                unit_bytes += size
                documents += 1
            else:
                continue
            break
        else:
            continue
        break
    count = (min(total - 1, max_tokens)) // sequence_length
    if count < 1:
        held_out = "" if max_bytes is None else " (a twentieth of the training text)"
        raise ConfigError(
            f"validation_data: {corpus.name} gives {total} tokens for validation{held_out}, less than a row of "
            f"{sequence_length}; give validation_data, or lower sequence_length"
        )
    tokens = np.concatenate(parts)[: count * sequence_length + 1]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
    return np.ascontiguousarray(windows), *end


def count_target_bytes(rows: np.ndarray, tokenizer: Any) -> int:
    """Size in UTF-8 of the text that the targets of rows [rows, sequence_length + 1] stand for; special tokens have none."""
    counts = np.bincount(rows[:, 1:].ravel(), minlength=len(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    if tokenizer.backend_tokenizer.decoder is not None and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        # One printable character stands for each byte, so that characters cut in two between tokens count as well.
        sizes = np.array([0 if n in special else len(token) for n, token in enumerate(tokens)])
        return int(counts @ sizes)
    return sum(len(text.encode()) for text in tokenizer.batch_decode(rows[:, 1:].tolist(), skip_special_tokens=True))


def count_tokens(corpus: Corpus, encoder: Encoder) -> tuple[int, bool]:
    """Tokens of an epoch, and whether that is exact rather than estimated from a sample of the units."""
    if isinstance(corpus, PreparedCorpus):
        return corpus.tokens, True
    exact = corpus.text_bytes <= EXACT_COUNT_BYTES
    units = corpus.units if exact else corpus.units[:: max(1, len(corpus.units) // 8)][:8]
    tokens, unit_bytes, limit = 0.0, 0, math.inf if exact else SAMPLE_BYTES
    # The sample may be on the Hub, whose answers come sooner side by side.
    with ThreadPoolExecutor(1 if exact else 8) as pool:
        for unit, (texts, share) in zip(
            units, pool.map(lambda unit: _read_sample(corpus, unit, encoder, limit), units), strict=True
        ):
            sample = texts if exact else texts[:: max(1, len(texts) // 200)]
            tokens += sum(len(ids) for ids in encoder.encode(sample)) * len(texts) / max(1, len(sample)) / share
            unit_bytes += unit.text_bytes
    if exact:
        return int(tokens), True
    return int(corpus.text_bytes * tokens / max(1, unit_bytes)), False


def _read_sample(corpus: Corpus, unit: Unit, encoder: Encoder, limit: float) -> tuple[list, float]:
    """Documents of a unit, to `limit` bytes, and what share of it they are."""
    # The size of a row group is known; what compressed lines come to is a guess, until they have been read.
    known = file_format(corpus.files[unit.file]) == "parquet"
    documents, kept, size = [], 0, 0
    for document in corpus.read(unit):
        length = encoder.text_bytes(document)
        size += length
        if kept < limit:
            documents.append(document)
            kept += length
        elif known:
            return documents, min(1.0, kept / max(1, unit.text_bytes))
    return documents, kept / size if size else 1.0


def share_in_rows(corpus: Corpus, encoder: Encoder, sequence_length: int) -> float:
    """Share of the text's tokens that rows which begin at documents train on: of a small text, or of a sample, in its order.

    Raises:
        ConfigError: if that doesn't fill a row.
    """
    small = corpus.text_bytes <= EXACT_COUNT_BYTES
    starts, position, tokens = deque(), 0, 0
    for unit in corpus.units if small else corpus.units[:: max(1, len(corpus.units) // 8)][:8]:
        documents, _ = _read_sample(corpus, unit, encoder, math.inf if small else SAMPLE_BYTES)
        lengths = [len(ids) for ids in encoder.encode(documents[:: 1 if small else max(1, len(documents) // 200)])]
        if lengths:
            ends = tokens + np.cumsum(lengths)
            position = find_starts(starts, position, tokens, ends, sequence_length)
            tokens = int(ends[-1])
    if len(starts) < 2:
        raise ConfigError(f"data: {corpus.name} does not fill a row of {sequence_length}; lower sequence_length")
    return (len(starts) - 1) * sequence_length / starts[-1]


def check_length(
    corpus: Corpus, encoder: Encoder, sequence_length: int, planned_tokens: int, max_epochs: int, packing: str = "stream"
) -> str:
    """A line that says how much text there is for the run.

    Each shard may leave over less than a row at the end, and its first token is no target.

    Raises:
        ConfigError: if the run is longer than `max_epochs` passes over the text.
    """
    tokens, exact = count_tokens(corpus, encoder)
    if not tokens:
        raise ConfigError(f"data: {corpus.name} holds no text to train on")
    in_rows = ""
    if packing == "documents":
        share = share_in_rows(corpus, encoder, sequence_length)
        tokens, exact, in_rows = int(tokens * share), False, f" in rows ({share:.0%} of the text, the rest is left out)"
    epochs = planned_tokens / tokens
    about = "" if exact else "about "
    left_over = number_of_shards(corpus) * sequence_length
    if planned_tokens > tokens * max_epochs - left_over:
        needed = math.ceil((planned_tokens + left_over) / tokens)
        raise ConfigError(
            f"max_epochs: the run takes {planned_tokens:,} tokens and {corpus.name} holds {about}{tokens:,}{in_rows}: that is "
            f"{epochs:.2f} epochs, of which {left_over:,} tokens may be left over, and max_epochs is {max_epochs}; set "
            f"--max_epochs {needed}, or train fewer tokens"
        )
    return f"{about}{tokens:,} training tokens an epoch{in_rows}, {epochs:.2f} epochs planned"
