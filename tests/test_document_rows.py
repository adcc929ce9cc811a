"""Rows that begin at documents: what they hold and leave out, and that they are one order for every topology and restart."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from corpus_helpers import (
    NumberEncoder,
    ThreadExchange,
    numbered_corpus,
    open_training,
    read_all,
    rows_until_the_end,
    run_ranks,
    take_restarting,
    write_parquet,
)
from launch import PRETRAIN, TINY, environment, launch, losses, metrics, options
from recipe.config import Config, ConfigError
from recipe.data import packing
from recipe.data.corpus import Corpus, Unit, open_corpora
from recipe.data.packing import Cursor, DocumentPacker
from recipe.data.prepared import encoder_for
from recipe.data.provenance import BatchTracer
from recipe.data.stream import RowStream, Span
from recipe.data.validation import check_length, share_in_rows
from recipe.estimate import estimate, parse_machine
from recipe.tokenizer import Encoder

LENGTHS = [[3, 1, 20, 7, 7, 2, 1, 1, 5], [40, 2, 16], [6, 6, 6, 6, 6, 8, 9, 1, 17]]
LENGTH, EPOCHS = 7, 3
FIELDS = TINY | {
    "packing": "documents", "max_steps": 8, "warmup_steps": 2, "save_every": 2, "keep_checkpoints": 9, "precision": "fp32",
    "log_every": 1,
}  # fmt: skip


def expected_rows(lengths: list[int], length: int) -> list[list[int]]:
    """The rows of documents of these lengths, numbered through, document by document."""
    first = [sum(lengths[:n]) for n in range(len(lengths))]
    owner = [n for n, size in enumerate(lengths) for _ in range(size)]
    rows, begin = [], 0
    while begin + length < len(owner):
        rows.append(list(range(begin, begin + length + 1)))
        last = begin + length
        document = owner[last]
        left = first[document] + lengths[document] - last
        begin = last if last == first[document] or left >= length else last + left
    return rows


def in_order(epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
    return np.arange(size)


def backwards(epoch: int, unit: Unit, window: int, size: int) -> np.ndarray:
    return np.arange(size)[::-1]


def make_packer(corpus: Corpus, length: int, order=in_order, cursor: Cursor = Cursor()) -> DocumentPacker:  # noqa: B008
    return DocumentPacker(corpus, NumberEncoder(), length, lambda epoch: corpus.units, order, cursor)


def take_all(packer: DocumentPacker, epochs: int = 1, at_once: int = 1) -> list[list[int]]:
    rows = []
    for epoch in range(epochs):
        while count := packer.fill(at_once, epoch):
            rows += packer.take(count).tolist()
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """17 units of uneven length, hence 16 shards."""
    rng = random.Random(0)
    files = [[rng.choice([1, 2, 9, 14, 30, 60]) for _ in range(count)] for count in (3, 40, 1, 9, 10)]
    return numbered_corpus(tmp_path_factory.mktemp("text"), files)


def make_stream(corpus: Corpus, exchange: ThreadExchange | None = None, **fields) -> RowStream:
    fields = {"encoder": NumberEncoder(), "sequence_length": LENGTH, "seed": 5, "max_epochs": EPOCHS} | fields
    return RowStream(corpus, exchange=exchange, **{"packing": "documents"} | fields)


# --- a shard ------------------------------------------------------------------------------------------------------


def test_rows_by_hand(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[3, 6, 2, 13, 4, 1]])
    assert take_all(make_packer(corpus, 4)) == [
        [0, 1, 2, 3, 4],  # 5 to 8, four tokens that are left of the second document, fill no row with 4 ...
        [4, 5, 6, 7, 8],  # ... but with 4, the last token of the row before, five tokens are left: a row goes on with them
        [9, 10, 11, 12, 13],
        [13, 14, 15, 16, 17],
        [17, 18, 19, 20, 21],
        [24, 25, 26, 27, 28],  # 22 and 23 are left out; 28, the last document, is its last target
    ]


@pytest.mark.parametrize("length", [1, 2, 5, 7, 16, 64, 150])
@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_rows_are_those_of_the_rule(tmp_path: Path, length: int, at_once: int) -> None:
    corpus = numbered_corpus(tmp_path, LENGTHS)
    rows = take_all(make_packer(corpus, length), at_once=at_once)
    assert rows == expected_rows(sum(LENGTHS, []), length)
    assert rows and all(len(row) == length + 1 for row in rows)


@pytest.mark.parametrize("length", [3, 8])
def test_an_epoch_goes_on_where_the_one_before_ended(tmp_path: Path, length: int) -> None:
    corpus = numbered_corpus(tmp_path, LENGTHS)
    total = sum(map(sum, LENGTHS))
    rows = take_all(make_packer(corpus, length), epochs=3)
    assert rows == [[token % total for token in row] for row in expected_rows(sum(LENGTHS, []) * 3, length)]


@pytest.mark.parametrize("order", [in_order, backwards])
@pytest.mark.parametrize("length", [1, 3, 8, 50])
@pytest.mark.parametrize("group", [4, 20])
def test_a_new_packer_goes_on_from_any_cursor(tmp_path, monkeypatch, order, length, group) -> None:
    corpus = numbered_corpus(tmp_path, [*LENGTHS, [2] * 19], group)
    monkeypatch.setattr(packing, "SHUFFLE_WINDOW", 2)
    monkeypatch.setattr(NumberEncoder, "chunk", 3)
    whole = take_all(make_packer(corpus, length, order), epochs=2)
    again = take_restarting(lambda *cursor: make_packer(corpus, length, order, *cursor), epochs=2, seed=length)
    assert again == whole


def test_filling_ahead_moves_neither_cursor_nor_rows(corpus: Corpus) -> None:
    eager, lazy = make_packer(corpus, 4), make_packer(corpus, 4)
    for _ in range(eager.fill(10_000, 0)):
        lazy.fill(1, 0)
        assert eager.take(1).tolist() == lazy.take(1).tolist()
        assert eager.cursor == lazy.cursor


# --- all shards ---------------------------------------------------------------------------------------------------


def test_an_epoch_repeats_nothing_and_leaves_out_ends_of_documents_alone(corpus: Corpus) -> None:
    rows = rows_until_the_end(make_stream(corpus, max_epochs=1))
    targets = [token for row in rows for token in row[1:]]
    assert len(targets) == len(set(targets)) > 500
    documents = [range(first, first + size) for first, size in (map(int, text.split()) for text in read_all(corpus))]
    begins, seen, left_out, cut = {d.start: d for d in documents}, {t for row in rows for t in row}, [], 0
    for row in rows:
        document = next(d for d in documents if row[0] in d)
        assert row[0] in begins or row[LENGTH - 1] in document, "a row goes on with a document only if that fills it"
    for document in documents:
        missing = [token for token in document if token not in seen]
        assert missing == list(document[len(document) - len(missing) :])
        if len(missing) >= LENGTH or len(missing) == len(document):
            left_out.append(len(missing))  # behind a shard's last row
        cut += 0 < len(missing) < len(document)
    assert cut > 10 and sum(left_out) <= 17 * (LENGTH + max(map(len, documents)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_same_on_every_topology_and_when_resumed(corpus: Corpus, ranks: int, workers: int) -> None:
    """Batches of 12 rows; every rank stops after the third batch and goes on from the state."""
    whole = rows_until_the_end(make_stream(corpus))
    assert len({tuple(row) for row in whole}) > len(whole) / EPOCHS - 1

    def read(exchange: ThreadExchange) -> list[list[list[int]]]:
        parts, state = [], None
        for batches in (3, 1, 10_000):
            stream = make_stream(corpus, exchange, workers=workers, state=state)
            try:
                for _ in range(min(batches, len(whole) // 12 - len(parts))):
                    parts.append(stream.next_batch(12).tolist())
                state = stream.state()
            finally:
                stream.close()
        return parts

    results = run_ranks(ranks, read)
    assert not [result for result in results if isinstance(result, Exception)], results
    batches = [[row for turn in zip(*parts, strict=True) for row in turn] for parts in zip(*results, strict=True)]
    assert [row for batch in batches for row in batch] == whole[: len(whole) // 12 * 12]


def test_spans_give_the_rows(corpus: Corpus) -> None:
    stream = make_stream(corpus)
    encoder = NumberEncoder()
    for _ in range(6):
        trace: list[Span] = []
        rows = stream.next_batch(9, trace)
        for place, row in enumerate(rows.tolist()):
            found = []
            for span in (span for span in trace if span.row == place):
                documents = list(corpus.read(span.unit))
                order = stream.document_order(span.cursor.epoch, span.unit, 0, len(documents))
                (tokens,) = encoder.encode([documents[order[span.cursor.document]]])
                found += tokens[span.cursor.token :][: span.tokens].tolist()
            assert found == row


def test_a_checkpoint_of_the_other_packing_is_refused(corpus: Corpus) -> None:
    stream, documents = make_stream(corpus, packing="stream"), make_stream(corpus)
    assert "packing" not in stream.fingerprint, "checkpoints of before there was a choice stay good"
    for one, other in ((stream, "documents"), (documents, "stream")):
        one.next_batch(5)
        with pytest.raises(ValueError, match="the checkpoint's data differs in packing"):
            make_stream(corpus, packing=other, state=one.state())
        accepted = make_stream(corpus, packing=other, state=one.state(), accept_other_data=True)
        assert len(rows_until_the_end(accepted)) > 20 and "packing" in accepted.accepted[0]


def test_the_state_is_the_same_whatever_is_read_ahead(corpus: Corpus) -> None:
    states = []
    for ranks, workers in ((1, 0), (1, 3), (4, 2)):

        def read(exchange: ThreadExchange, workers: int = workers) -> list[dict]:
            stream, found = make_stream(corpus, exchange, workers=workers), []
            for _ in range(20):
                stream.next_batch(12)
                found.append(stream.state())
            stream.close()
            return found

        states += run_ranks(ranks, read)
    assert all(state == states[0] for state in states)


# --- how long the text lasts --------------------------------------------------------------------------------------


def test_the_share_in_rows_is_what_the_rows_train_on(tmp_path: Path) -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(10, 31) for _ in range(400)]
    corpus = numbered_corpus(tmp_path, [lengths], group=400)
    rows = rows_until_the_end(make_stream(corpus, max_epochs=1, sequence_length=16))
    share = share_in_rows(corpus, NumberEncoder(), 16)
    assert share == pytest.approx(len(rows) * 16 / sum(lengths), rel=0.03) and 0.5 < share < 0.9
    assert share_in_rows(corpus, NumberEncoder(), 1) == 1


def test_a_run_longer_than_its_rows_is_refused(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[12] * 100], group=100)  # of each document a row of 7, and 5 left out
    line = check_length(corpus, NumberEncoder(), 7, 500, 1, "documents")
    assert line == "about 700 training tokens an epoch in rows (58% of the text, the rest is left out), 0.71 epochs planned"
    assert check_length(corpus, NumberEncoder(), 7, 900, 1).startswith("1,200 training tokens an epoch, 0.75")
    with pytest.raises(ConfigError, match=r"holds about 700 in rows .* set --max_epochs 2"):
        check_length(corpus, NumberEncoder(), 7, 900, 1, "documents")
    with pytest.raises(ConfigError, match="does not fill a row of 5000; lower sequence_length"):
        check_length(corpus, NumberEncoder(), 5000, 10, 1, "documents")


def test_the_plan_does_not_guess_how_much_is_left_out() -> None:
    config = Config(max_steps=1000, n_positions=1024)
    machine = parse_machine("8xH100-80GB")
    assert estimate(config, machine, None).epochs > 0
    config.packing = "documents"
    assert estimate(config, machine, None).epochs is None


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "run"
    command = [sys.executable, PRETRAIN, *options(**FIELDS, data=fineweb_folder, output_dir=folder)]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True, timeout=120)
    return folder


def test_the_batches_of_a_run_can_be_traced(run: Path) -> None:
    tracer = BatchTracer(run)
    encoder, seen = Encoder(tracer.tokenizer), set()
    for step in (1, 4, 8):
        rows, sources = tracer.trace(step)
        begins = [next(s for s in sources if s.row == index) for index in range(len(rows))]
        assert all((row[0] == encoder.end_of_text) == (s.first_token == 0) for row, s in zip(rows, begins, strict=True))
        assert all(s.first_token == 0 or s.tokens >= 64 for s in begins)
        seen |= {s.first_token == 0 for s in begins}
        assert sum(source.tokens for source in sources) == rows.size
    assert seen == {True, False}, "rows that begin at a document, and rows that go on with one"


def test_two_ranks_go_on_with_the_run_of_one(run: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    folder, start = tmp_path / "run", run / "checkpoints" / "step-00000004"
    launch("2cpu-ddp", *options(**FIELDS, data=fineweb_folder, output_dir=folder, resume=start))
    ours = [r["train_loss"] for r in metrics(folder) if "train_loss" in r]
    assert ours == pytest.approx(losses(run)[4:], abs=1e-5)


def test_prepared_tokens_give_the_same_rows(run: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    script = Path(PRETRAIN).parent / "prepare_data.py"
    fields = {"data": fineweb_folder, "tokenizer": run / "cache" / "tokenizer", "output_dir": tmp_path / "tokens"}
    command = [sys.executable, str(script), *options(**TINY | fields, max_steps=8)]
    subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), check=True, capture_output=True, timeout=120)
    encoder, found = Encoder(BatchTracer(run).tokenizer), []
    for data in (fineweb_folder, tmp_path / "tokens"):
        corpus, _ = open_corpora(str(data), None, "text", tmp_path)
        stream = RowStream(corpus, encoder_for(corpus, encoder, "data"), 64, 0, 2, packing="documents")
        found.append(
            (rows_until_the_end(stream, 8), stream.state(), share_in_rows(corpus, encoder_for(corpus, encoder, ""), 64))
        )
    assert found[0] == found[1] and len(found[0][0]) > 500


def test_a_text_with_empty_units_loses_none_of_the_others(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["", None, "0 3", "", "3 2", None, None, "5 5"], group=2)
    assert take_all(make_packer(open_training(tmp_path), 2)) == [[0, 1, 2], [3, 4, 5], [5, 6, 7], [7, 8, 9]]
