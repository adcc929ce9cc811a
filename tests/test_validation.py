"""The fixed validation rows, what is held out, and how much text there is."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from corpus_helpers import (
    NumberEncoder,
    numbered_corpus,
    numbered_documents,
    open_training,
    read_all,
    write_jsonl,
    write_jsonl_gz,
    write_parquet,
)
from recipe.config import ConfigError
from recipe.data import corpus as corpus_module
from recipe.data import validation
from recipe.data.corpus import Corpus, DataError
from recipe.data.stream import RowStream
from recipe.data.validation import check_length, count_tokens, hold_out, read_validation_rows
from recipe.tokenizer import Encoder, train_tokenizer

LENGTH = 8


def random_texts(count: int, words: tuple[int, int], seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["river", "stone", "the", "Straße", "中文", "12,345", "a", "garden's", "\n\n", "return x[0]"]
    return [f"{n}: " + " ".join(rng.choices(vocabulary, k=rng.randrange(*words))) for n in range(count)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer(random_texts(50, (20, 60)), 400))


# --- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [8, 9, 15, 16, 40, 92, 95, 96, 1000])
def test_rows_are_the_first_tokens_and_overlap_by_one(tmp_path, max_tokens):
    corpus = numbered_corpus(tmp_path, [[30, 1, 2, 40], [20]])
    rows = read_validation_rows(corpus, NumberEncoder(), LENGTH, max_tokens)
    count = min(max_tokens, 30 + 1 + 2 + 40 + 20 - 1) // LENGTH
    assert rows.tolist() == [list(range(n * LENGTH, n * LENGTH + LENGTH + 1)) for n in range(count)]
    assert rows.shape[0] * LENGTH <= max_tokens
    assert rows.dtype == NumberEncoder.dtype
    assert rows.flags["C_CONTIGUOUS"]


def test_rows_of_a_real_tokenizer_are_the_text_with_end_of_text_in_front(tmp_path, encoder):
    texts = random_texts(40, (5, 30))
    corpus = open_training(write_parquet(tmp_path / "a.parquet", texts, group=7))
    rows = read_validation_rows(corpus, encoder, LENGTH, 10**6)
    tokens = np.concatenate(encoder.encode(texts))
    count = (len(tokens) - 1) // LENGTH
    assert np.concatenate([rows[0, :1], rows[:, 1:].ravel()]).tolist() == tokens[: count * LENGTH + 1].tolist()


@pytest.mark.parametrize("max_tokens, units", [(8, 2), (11, 2), (12, 2), (23, 3), (24, 3), (10_000, 5)])
def test_no_more_units_are_read_than_the_rows_need(tmp_path, monkeypatch, max_tokens, units):
    """A unit has 12 tokens; a row's last target needs one token more than the targets, and the next document ends it."""
    corpus = numbered_corpus(tmp_path, [[5, 7] * 5], group=2)
    seen = []
    read = corpus.read
    monkeypatch.setattr(corpus, "read", lambda unit: seen.append(unit) or read(unit))
    read_validation_rows(corpus, NumberEncoder(), 4, max_tokens)
    assert len(seen) == units


def test_text_of_a_row_exactly(tmp_path):
    corpus = numbered_corpus(tmp_path, [[LENGTH + 1]])
    assert read_validation_rows(corpus, NumberEncoder(), LENGTH, 100).tolist() == [list(range(LENGTH + 1))]


def test_text_below_a_row_is_refused(tmp_path):
    corpus = numbered_corpus(tmp_path, [[LENGTH]])
    with pytest.raises(ConfigError, match=f"^validation_data: {tmp_path} gives 8 tokens .* row of 8; give validation_data"):
        read_validation_rows(corpus, NumberEncoder(), LENGTH, 100)


def test_text_without_documents_is_refused(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", [None, None]))
    with pytest.raises(ConfigError, match="gives 0 tokens"):
        read_validation_rows(corpus, NumberEncoder(), LENGTH, 100)


def test_validation_tokens_below_a_row_are_the_ones_to_blame(tmp_path):
    corpus = numbered_corpus(tmp_path, [[1000]])
    with pytest.raises(ConfigError) as caught:
        read_validation_rows(corpus, NumberEncoder(), LENGTH, LENGTH - 1)
    assert "validation_tokens" in str(caught.value).replace(str(tmp_path), "")


# --- held out -----------------------------------------------------------------------------------------------------


def tokens_of(texts: list[str]) -> set[int]:
    return {token for ids in NumberEncoder().encode(texts) for token in ids.tolist()}


@pytest.mark.parametrize("group", [1, 2, 7, 400])
@pytest.mark.parametrize("max_tokens", [10**6, 60, 23, 10])
def test_held_out_documents_are_the_first_and_not_trained_on(tmp_path, group, max_tokens):
    corpus = numbered_corpus(tmp_path, [[5, 7] * 200], group=group)
    rows, training = hold_out(corpus, NumberEncoder(), LENGTH, max_tokens)
    documents, kept = read_all(corpus), read_all(training)
    held_out = documents[: len(documents) - len(kept)]
    assert documents[len(held_out) :] == kept
    assert sum(len(text.encode()) for text in held_out) <= corpus.text_bytes / 20
    assert not set(rows.ravel().tolist()) & tokens_of(kept)
    # As many documents as the rows need, and no document more.
    lengths = [len(tokens) for tokens in NumberEncoder().encode(held_out)]
    assert sum(lengths[:-1]) <= max_tokens
    assert rows[0, 0] == 0 and rows.shape[0] * LENGTH <= max_tokens
    assert training.text_bytes < corpus.text_bytes


@pytest.mark.parametrize("units", (1, 2, 10))
def test_at_most_a_twentieth_of_the_text_is_held_out(tmp_path, units):
    corpus = numbered_corpus(tmp_path, [[5] * 400], group=400 // units)
    assert len(corpus.units) == units
    _, training = hold_out(corpus, NumberEncoder(), LENGTH, 10**6)
    size, kept = (sum(len(text) for text in read_all(c)) for c in (corpus, training))
    assert 0.92 < kept / size < 0.97  # of documents of 5 bytes, whose sizes in parquet are estimated


def test_held_out_part_is_in_the_fingerprint(tmp_path):
    corpus = numbered_corpus(tmp_path, [[5] * 400], group=400)
    fingerprints = [hold_out(corpus, NumberEncoder(), LENGTH, n)[1].fingerprint for n in (10, 60)]
    assert fingerprints[0] != fingerprints[1] != corpus.fingerprint


def test_held_out_validation_text_is_too_small(tmp_path):
    with pytest.raises(ConfigError, match="a twentieth of the training text.*less than a row of 8; give validation_data"):
        hold_out(numbered_corpus(tmp_path / "one", [[100]]), NumberEncoder(), LENGTH, 100)


# --- how much text there is ---------------------------------------------------------------------------------------


def test_small_text_is_counted_exactly(tmp_path, encoder):
    texts = random_texts(300, (0, 40))
    write_parquet(tmp_path / "a.parquet", texts[:100], group=13)
    write_jsonl(tmp_path / "b.jsonl", texts[100:200])
    write_jsonl_gz(tmp_path / "c.jsonl.gz", texts[200:])
    assert count_tokens(open_training(tmp_path), encoder) == (sum(map(len, encoder.encode(texts))), True)


def test_count_is_exact_up_to_its_limit_and_estimated_above(tmp_path, encoder, monkeypatch):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", random_texts(50, (5, 30))))
    monkeypatch.setattr(validation, "EXACT_COUNT_BYTES", corpus.text_bytes)
    assert count_tokens(corpus, encoder)[1] is True
    monkeypatch.setattr(validation, "EXACT_COUNT_BYTES", corpus.text_bytes - 1)
    assert count_tokens(corpus, encoder)[1] is False


def write_txt(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(text + "\n\n" for text in texts), encoding="utf-8")
    return path


WRITERS = {"a.parquet": write_parquet, "a.jsonl": write_jsonl, "a.jsonl.gz": write_jsonl_gz, "a.txt": write_txt}


TEXTS = {
    "documents": random_texts(3000, (10, 80), seed=1),
    "lines": random_texts(9000, (1, 5), seed=1),
    "repeated": random_texts(500, (10, 80), seed=1) * 6,
}


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("name", WRITERS)
def test_estimate_is_within_a_tenth(tmp_path, encoder, monkeypatch, name, texts):
    monkeypatch.setattr(corpus_module, "JSONL_UNIT_BYTES", 20_000)
    monkeypatch.setattr(corpus_module, "TXT_UNIT_BYTES", 20_000)
    corpus = open_training(WRITERS[name](tmp_path / name, TEXTS[texts]))
    exact = sum(map(len, encoder.encode(read_all(corpus))))
    monkeypatch.setattr(validation, "EXACT_COUNT_BYTES", 100_000)
    assert count_tokens(corpus, encoder) == (pytest.approx(exact, rel=0.1), False)


def test_estimate_reads_few_units(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(validation, "EXACT_COUNT_BYTES", 0)
    corpus = open_training(write_parquet(tmp_path / "a.parquet", random_texts(2000, (5, 10)), group=20))
    seen = []
    read = corpus.read
    monkeypatch.setattr(corpus, "read", lambda unit: seen.append(unit) or read(unit))
    count_tokens(corpus, encoder)
    assert 1 < len(seen) <= 8
    assert seen[-1].start > 70


def reading_few(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let estimates keep 40,000 bytes of a unit; the documents that are read."""
    read, seen = corpus.read, []
    monkeypatch.setattr(corpus, "read", lambda unit: (seen.append(text) or text for text in read(unit)))
    monkeypatch.setattr(validation, "EXACT_COUNT_BYTES", 0)
    monkeypatch.setattr(validation, "SAMPLE_BYTES", 40_000)
    return seen


def test_estimate_reads_the_beginning_of_a_large_row_group(tmp_path, encoder, monkeypatch):
    texts = TEXTS["documents"]
    exact = sum(map(len, encoder.encode(texts)))
    corpus = open_training(write_parquet(tmp_path / "a.parquet", texts, group=len(texts)))
    seen = reading_few(corpus, monkeypatch)
    assert count_tokens(corpus, encoder) == (pytest.approx(exact, rel=0.1), False)
    assert 10 < len(seen) < len(texts) / 3


def test_estimate_of_lines_whose_size_nobody_knows(tmp_path, encoder, monkeypatch):
    texts = TEXTS["documents"]
    exact = sum(map(len, encoder.encode(texts)))
    # The guess at the text's share in the file rests on its beginning, which is not like the rest.
    lines = [json.dumps({"text": text, "about": "x" * (2000 if n < 600 else 0)}) for n, text in enumerate(texts)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    corpus = open_training(tmp_path / "a.jsonl.gz")
    assert abs(corpus.text_bytes / sum(len(text.encode()) for text in texts) - 1) > 0.3
    reading_few(corpus, monkeypatch)
    assert count_tokens(corpus, encoder) == (pytest.approx(exact, rel=0.1), False)


def check_numbers(corpus: Corpus, planned_tokens: int, max_epochs: int) -> str:
    return check_length(corpus, NumberEncoder(), LENGTH, planned_tokens, max_epochs)


def test_length_within_the_text_says_how_much_there_is(tmp_path):
    corpus = numbered_corpus(tmp_path, [[600, 400]])
    line = check_numbers(corpus, 250, 1)
    assert line == "1,000 training tokens an epoch, 0.25 epochs planned"
    assert check_numbers(corpus, 2400, 3).endswith("2.40 epochs planned")


@pytest.mark.parametrize("planned, said, needed", [(1001, "1.00", 2), (2500, "2.50", 3), (2980, "2.98", 3), (3001, "3.00", 4)])
def test_length_beyond_the_text_names_the_epochs_that_it_takes(tmp_path, planned, said, needed):
    corpus = numbered_corpus(tmp_path, [[600, 400]])
    with pytest.raises(ConfigError) as caught:
        check_numbers(corpus, planned, 1)
    (problem,) = caught.value.problems
    assert problem.startswith(f"max_epochs: the run takes {planned:,} tokens and {tmp_path} holds 1,000: that is {said} epochs")
    assert f"set --max_epochs {needed}, or train fewer tokens" in problem
    check_numbers(corpus, planned, needed)


def test_estimated_length_is_said_to_be_about(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(validation, "EXACT_COUNT_BYTES", 0)
    corpus = open_training(write_parquet(tmp_path / "a.parquet", random_texts(100, (20, 50))))
    assert check_length(corpus, encoder, LENGTH, 10, 1).startswith("about ")
    with pytest.raises(ConfigError, match="holds about "):
        check_length(corpus, encoder, LENGTH, 10**9, 1)


def test_no_text_to_train_on_is_refused(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", [None, None]))
    with pytest.raises(ConfigError, match="^data: .* holds no text to train on"):
        check_numbers(corpus, 10, 1)


@pytest.mark.parametrize("epochs", (1, 2))
def test_a_run_that_is_admitted_does_not_run_out_of_text(tmp_path, epochs):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", numbered_documents([50] * 80), group=5))
    stream = RowStream(corpus, NumberEncoder(), LENGTH, seed=0, max_epochs=epochs)
    with pytest.raises(DataError):
        while True:
            stream.next_batch(1)
    assert check_numbers(corpus, (stream.rows - stream.num_shards) * LENGTH, epochs)
    with pytest.raises(ConfigError):
        check_numbers(corpus, (stream.rows + 1) * LENGTH, epochs)
