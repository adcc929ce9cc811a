"""One shard: its rows chained are its documents, from whatever point it begins."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from corpus_helpers import NumberEncoder, numbered_corpus, open_training, read_all, take_restarting, write_jsonl, write_parquet
from recipe.data import corpus as corpus_module
from recipe.data import packing
from recipe.data.corpus import Corpus, Unit
from recipe.data.packing import Cursor, ShardPacker
from recipe.tokenizer import Encoder, train_tokenizer


def in_order(epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
    return np.arange(size)


def backwards(epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
    return np.arange(size)[::-1]


def make_packer(corpus: Corpus, length: int, order=in_order, cursor: Cursor | None = None, encoder=None) -> ShardPacker:
    return ShardPacker(corpus, encoder or NumberEncoder(), length, lambda epoch: corpus.units, order, cursor or Cursor())


def take_all(packer: ShardPacker, epochs: int = 1, at_once: int = 1) -> Iterator[list[int]]:
    for epoch in range(epochs):
        while count := packer.fill(at_once, epoch):
            yield from packer.take(count).tolist()


def chain(rows: list[list[int]]) -> list[int]:
    """The tokens of rows that overlap by one."""
    for row, following in zip(rows, rows[1:], strict=False):
        assert row[-1] == following[0]
    return [*rows[0][:1], *(token for row in rows for token in row[1:])]


LENGTHS = [[3, 1, 20, 7, 7, 2, 1, 1, 5], [40, 2], [6, 6, 6, 6, 6]]
TOTAL = sum(map(sum, LENGTHS))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return numbered_corpus(tmp_path / "text", LENGTHS)


@pytest.mark.parametrize("length", [1, 2, 5, 7, 8, 64, TOTAL - 2, TOTAL - 1])
@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_rows_chained_are_the_documents_in_order(corpus, length, at_once):
    rows = list(take_all(make_packer(corpus, length), at_once=at_once))
    assert {len(row) for row in rows} == {length + 1}
    assert len(rows) == (TOTAL - 1) // length
    assert chain(rows) == list(range(len(rows) * length + 1))


def test_text_shorter_than_a_row_gives_none(corpus):
    assert make_packer(corpus, TOTAL).fill(1, 0) == 0


def test_rows_of_a_real_tokenizer_are_the_documents_with_end_of_text_in_front(tmp_path):
    texts = [f"document {n} " + "of words " * (n % 5) + "<|endoftext|>" for n in range(50)]
    encoder = Encoder(train_tokenizer(texts, 300))
    corpus = open_training(write_jsonl(tmp_path / "a.jsonl", texts))
    rows = list(take_all(make_packer(corpus, 6, encoder=encoder), at_once=4))
    expected = np.concatenate(encoder.encode(texts)).tolist()
    assert chain(rows) == expected[: len(rows) * 6 + 1]
    assert len(expected) - (len(rows) * 6 + 1) < 6
    assert sum(row[1:].count(encoder.end_of_text) for row in rows) == 49


def test_row_has_the_encoders_type(corpus):
    packer = make_packer(corpus, 5)
    packer.fill(1, 0)
    assert packer.take(1).dtype == np.uint32


def test_what_an_epoch_leaves_over_begins_the_next(corpus):
    rows = list(take_all(make_packer(corpus, 8), epochs=3))
    assert len(rows) == (3 * TOTAL - 1) // 8
    assert chain(rows) == (list(range(TOTAL)) * 3)[: len(rows) * 8 + 1]


def test_leftovers_of_texts_shorter_than_a_row_add_up(tmp_path):
    packer = make_packer(numbered_corpus(tmp_path, [[5]]), 12)
    assert [packer.fill(1, epoch) for epoch in range(3)] == [0, 0, 1]
    assert packer.take(1)[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]


def test_fill_promises_what_take_gives_and_no_more_than_asked(corpus):
    packer = make_packer(corpus, 4)
    assert packer.fill(2, 0) == 2
    assert packer.fill(3, 0) == 3
    first = packer.take(1)[0].tolist()
    assert first == [0, 1, 2, 3, 4]
    assert packer.fill(10_000, 0) == (TOTAL - 1) // 4 - 1


def test_filling_ahead_moves_neither_cursor_nor_rows(corpus):
    eager, lazy = make_packer(corpus, 4), make_packer(corpus, 4)
    eager.fill(10_000, 0)
    for _ in range((TOTAL - 1) // 4):
        lazy.fill(1, 0)
        assert eager.take(1).tolist() == lazy.take(1).tolist()
        assert eager.cursor == lazy.cursor


def test_documents_are_shuffled_within_windows_of_a_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHUFFLE_WINDOW", 3)
    seen = []

    def order(epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
        seen.append((epoch, unit.start, window, size))
        return np.arange(size)[::-1]

    corpus = numbered_corpus(tmp_path, [[2] * 9], group=5)
    rows = list(take_all(make_packer(corpus, 17, order), epochs=1))
    assert chain(rows)[::2] == [4, 2, 0, 8, 6, 14, 12, 10, 16]
    assert seen == [(0, 0, 0, 3), (0, 0, 1, 2), (0, 1, 0, 3), (0, 1, 1, 1)]


@pytest.mark.parametrize(
    "documents", [NumberEncoder.chunk - 1, NumberEncoder.chunk, NumberEncoder.chunk + 1, 2 * NumberEncoder.chunk]
)
def test_units_of_about_a_chunk_lose_nothing(tmp_path, documents):
    corpus = numbered_corpus(tmp_path, [[2] * documents * 3], group=documents)
    assert chain(list(take_all(make_packer(corpus, 1), epochs=2))) == [*range(documents * 6)] * 2


def test_units_without_documents_are_passed_over(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["", None, "0 3", "", "3 2", None, None, "5 1"], group=2)
    rows = list(take_all(make_packer(open_training(tmp_path), 1)))
    assert chain(rows) == [0, 1, 2, 3, 4, 5]


def test_shard_without_documents_gives_no_rows_in_any_epoch(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", [None, "", "0 5"], group=2))
    corpus = corpus.with_units(corpus.units[:1])
    assert read_all(corpus) == []
    packer = make_packer(corpus, 2)
    assert [packer.fill(1, epoch) for epoch in range(5)] == [0] * 5


@pytest.mark.parametrize("order", [in_order, backwards])
@pytest.mark.parametrize("length", [1, 3, 8, 50])
@pytest.mark.parametrize("group", [4, 20])
def test_a_new_packer_goes_on_from_any_cursor(tmp_path, monkeypatch, order, length, group):
    corpus = numbered_corpus(tmp_path, [*LENGTHS, [2] * 19], group)
    monkeypatch.setattr(packing, "SHUFFLE_WINDOW", 2)
    monkeypatch.setattr(NumberEncoder, "chunk", 3)
    monkeypatch.setattr(corpus_module, "BATCH_DOCUMENTS", 5)
    whole = list(take_all(make_packer(corpus, length, order), epochs=2))
    again = take_restarting(lambda *cursor: make_packer(corpus, length, order, *cursor), epochs=2, seed=length)
    assert again == whole


def test_cursor_says_where_the_next_row_begins(corpus):
    packer = make_packer(corpus, 4)
    assert packer.cursor == Cursor(0, 0, 0, 0)
    positions = []
    for _ in range(7):
        packer.fill(1, 0)
        packer.take(1)
        positions.append(packer.cursor)
    assert positions == [Cursor(0, 0, 2, token) for token in (0, 4, 8, 12, 16)] + [Cursor(0, 0, 3, 0), Cursor(0, 0, 3, 4)]
