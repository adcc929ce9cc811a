"""The fixed validation set, and how much text there is to train on."""

from __future__ import annotations

import math

import numpy as np

from recipe.config import ConfigError
from recipe.data.corpus import Corpus
from recipe.tokenizer import Encoder

LARGEST_SHARE = 20
"""Held out from the training text, the validation set is at most one unit in twenty."""
EXACT_COUNT_BYTES = 8 << 20
"""Text up to this size is counted exactly, in a second or two; larger text is estimated from a sample."""


def read_validation_rows(
    corpus: Corpus, encoder: Encoder, sequence_length: int, max_tokens: int, max_units: int | None = None
) -> tuple[np.ndarray, int]:
    """Rows of the first documents of `corpus`, and the number of units that they took.

    Returns:
        rows [rows, sequence_length + 1], overlapping by one token, with at most `max_tokens` targets; and the units read.
    Raises:
        ConfigError: if the text does not fill a row.
    """
    parts: list[np.ndarray] = []
    units = total = 0
    for unit in corpus.units[:max_units]:
        if total > max_tokens:
            break
        parts += encoder.encode(list(corpus.read(unit)))
        total = sum(len(part) for part in parts)
        units += 1
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype=encoder.dtype)
    count = (min(len(tokens) - 1, max_tokens)) // sequence_length
    if count < 1:
        raise ConfigError(
            f"validation_data: {corpus.name} gives {len(tokens)} tokens for validation, less than a row of "
            f"{sequence_length}; give validation_data, or lower sequence_length"
        )
    tokens = tokens[: count * sequence_length + 1]
    windows = np.lib.stride_tricks.sliding_window_view(tokens, sequence_length + 1)[::sequence_length]
    return np.ascontiguousarray(windows), units


def hold_out(training: Corpus, encoder: Encoder, sequence_length: int, max_tokens: int) -> tuple[np.ndarray, Corpus, int]:
    """Validation rows from the first units of the training text, the text without these units, and their number."""
    if len(training.units) < 2:
        raise ConfigError(f"validation_data: {training.name} is too small to hold out a part of it; give validation_data")
    limit = max(1, len(training.units) // LARGEST_SHARE)
    rows, units = read_validation_rows(training, encoder, sequence_length, max_tokens, limit)
    return rows, training.slice(units, None), units


def count_tokens(corpus: Corpus, encoder: Encoder) -> tuple[int, bool]:
    """Tokens of an epoch, and whether that is exact rather than estimated from a sample of the units."""
    exact = corpus.text_bytes <= EXACT_COUNT_BYTES
    units = corpus.units if exact else corpus.units[:: max(1, len(corpus.units) // 8)][:8]
    tokens = text_bytes = 0
    for unit in units:
        texts = list(corpus.read(unit))
        if not exact:
            texts = texts[:200]
        tokens += sum(len(ids) for ids in encoder.encode(texts))
        text_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if exact:
        return tokens, True
    return int(corpus.text_bytes * tokens / max(1, text_bytes)), False


def check_length(corpus: Corpus, encoder: Encoder, planned_tokens: int, max_epochs: int) -> str:
    """A line that says how much text there is for the run.

    Raises:
        ConfigError: if the run is longer than `max_epochs` passes over the text.
    """
    tokens, exact = count_tokens(corpus, encoder)
    if not tokens:
        raise ConfigError(f"data: {corpus.name} holds no text to train on")
    epochs = planned_tokens / tokens
    about = "" if exact else "about "
    if epochs > max_epochs:
        raise ConfigError(
            f"max_epochs: the run takes {planned_tokens:,} tokens and {corpus.name} holds {about}{tokens:,}: that is "
            f"{epochs:.2f} epochs and max_epochs is {max_epochs}; set --max_epochs {math.ceil(epochs)}, or train fewer tokens"
        )
    return f"{about}{tokens:,} training tokens an epoch, {epochs:.2f} epochs planned"
