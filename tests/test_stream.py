"""The order of the rows: nothing lost or repeated, and the same for every number of ranks, threads and restarts."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from corpus_helpers import (
    NumberEncoder,
    ThreadExchange,
    numbered_corpus,
    numbered_documents,
    open_training,
    read_all,
    rows_until_the_end,
    run_ranks,
    write_jsonl,
    write_parquet,
)
from recipe.data.corpus import Corpus, DataError, Unit
from recipe.data.order import permutation
from recipe.data.stream import HUB_THREADS, MAX_SHARDS, READ_AHEAD, RowStream
from recipe.tokenizer import Encoder, train_tokenizer

LENGTH = 7
EPOCHS = 3
RANKS = (1, 2, 3, 4, 5, 8)
WORKERS = (0, 1, 3)
EVERY_RANK_COUNT = 120
"""Rows that 1, 2, 3, 4, 5 and 8 divide."""


def uneven_lengths() -> list[list[int]]:
    """The lengths of the documents of 5 files, from 1 document to 40: 17 units of 4 documents, hence 16 shards."""
    rng = random.Random(0)
    return [[rng.choice([1, 2, 9, 14, 30, 60]) for _ in range(count)] for count in (3, 40, 1, 9, 10)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    corpus = numbered_corpus(tmp_path_factory.mktemp("text"), uneven_lengths())
    assert len(corpus.units) == 1 + 10 + 1 + 3 + 3
    return corpus


@pytest.fixture(scope="module")
def full_units(tmp_path_factory) -> Corpus:
    """18 units of uneven length, hence 16 shards, of which each has a row at least."""
    rng = random.Random(1)
    files = [[length for _ in range(units) for length in (rng.randrange(1, 60), 1, 2, 8)] for units in (1, 9, 2, 6)]
    return numbered_corpus(tmp_path_factory.mktemp("full"), files)


@pytest.fixture(scope="module")
def few_units(tmp_path_factory) -> Corpus:
    """3 units, hence 2 shards: fewer than ranks."""
    return numbered_corpus(tmp_path_factory.mktemp("few"), [[9, 14, 3, 3, 21, 1, 1, 30, 2], [40, 4]])


@pytest.fixture(scope="module")
def reference(corpus) -> list[list[int]]:
    """All rows of the run, read by one rank one by one."""
    return rows_until_the_end(make_stream(corpus))


def make_stream(corpus: Corpus, exchange: ThreadExchange | None = None, **options) -> RowStream:
    options = {"encoder": NumberEncoder(), "sequence_length": LENGTH, "seed": 5, "max_epochs": EPOCHS, **options}
    return RowStream(corpus, exchange=exchange, **options)


def token_count(corpus: Corpus) -> int:
    return sum(int(text.split()[1]) for text in read_all(corpus))


def interleave(parts: list[list[list[int]]]) -> list[list[int]]:
    """The rows in global order from each rank's part of a batch."""
    return [row for turn in itertools.zip_longest(*parts) for row in turn if row is not None]


def read_batches(
    corpus: Corpus, ranks: int, batches: list[int], state: dict | None = None, **options
) -> tuple[list[list[int]], dict]:
    """The rows of `batches` in global order, read by `ranks` ranks, and the state behind them."""

    def run(exchange: ThreadExchange) -> tuple[list[list[list[int]]], dict]:
        stream = make_stream(corpus, exchange, state=state, **options)
        try:
            parts = [stream.next_batch(rows) for rows in batches]
            assert [part.shape for part in parts] == [(rows // ranks, LENGTH + 1) for rows in batches]
            assert all(part.dtype == NumberEncoder.dtype for part in parts)
            return [part.tolist() for part in parts], stream.state()
        finally:
            stream.close()

    results = run_ranks(ranks, run)
    for result in results:
        if isinstance(result, Exception):
            raise result
    assert all(state == results[0][1] for _, state in results)
    rows = [row for batch in zip(*(parts for parts, _ in results), strict=True) for row in interleave(list(batch))]
    return rows, json.loads(json.dumps(results[0][1]))


def epoch_rows(corpus: Corpus, **options) -> list[list[int]]:
    return rows_until_the_end(make_stream(corpus, max_epochs=1, **options))


# --- what a run consists of ---------------------------------------------------------------------------------------


def chains(rows: list[list[int]]) -> list[list[int]]:
    """Rows of different tokens, put together where one begins with the token with which another ends."""
    following = {row[0]: row for row in rows}
    ends = {row[-1] for row in rows}
    assert len(following) == len(ends) == len(rows)
    found = []
    for row in rows:
        if row[0] not in ends:
            tokens = list(row)
            while tokens[-1] in following:
                tokens += following[tokens[-1]][1:]
            found.append(tokens)
    return found


def cut_into_documents(tokens: list[int], texts: list[str]) -> list[str]:
    """The documents of which `tokens` consist; of the last, at least the first token."""
    lengths = {int(start): int(length) for start, length in map(str.split, texts)}
    found, position = [], 0
    while position < len(tokens):
        start = tokens[position]
        there = tokens[position : position + lengths[start]]
        assert there == list(range(start, start + len(there)))
        found.append(f"{start} {lengths[start]}")
        position += len(there)
    assert position == len(tokens)
    return found


def test_every_shards_rows_are_its_documents_one_behind_the_other(full_units):
    texts = read_all(full_units)
    unit_of = {document: unit for unit in full_units.units for document in full_units.read(unit)}
    shards = chains(epoch_rows(full_units))
    assert len(shards) == 16
    for tokens in shards:
        runs = [(unit, list(run)) for unit, run in itertools.groupby(cut_into_documents(tokens, texts), unit_of.get)]
        for unit, documents in runs[:-1]:
            assert sorted(documents) == sorted(full_units.read(unit))
        assert len({unit for unit, _ in runs}) == len(runs)
        assert len(set(runs[-1][1])) == len(runs[-1][1])


def test_an_epoch_loses_and_repeats_nothing(full_units):
    rows = epoch_rows(full_units)
    targets = Counter(token for row in rows for token in row[1:])
    assert set(targets.values()) == {1}
    missing = set(range(token_count(full_units))) - targets.keys()
    # Of each of the 16 shards, the first token and what does not fill a row.
    assert {tokens[0] for tokens in chains(rows)} <= missing
    assert 16 <= len(missing) <= 16 * LENGTH


def test_an_epoch_of_a_real_tokenizer_is_the_text(tmp_path):
    rng = random.Random(3)
    texts = [f"text {n} " + " ".join(rng.choices(["river", "stone", "<|endoftext|>"], k=rng.randrange(9))) for n in range(90)]
    for n, start in enumerate(range(0, 90, 30)):
        write_parquet(tmp_path / f"{n}.parquet", texts[start : start + 30], group=7)
    encoder = Encoder(train_tokenizer(texts, 300))
    corpus = open_training(tmp_path)
    stream = make_stream(corpus, encoder=encoder, max_epochs=1)
    rows = rows_until_the_end(stream)
    targets = Counter(token for row in rows for token in row[1:])
    whole = Counter(np.concatenate(encoder.encode(texts)).tolist())
    assert targets <= whole
    assert stream.num_shards <= (whole - targets).total() <= stream.num_shards * LENGTH
    assert len(texts) - stream.num_shards * (LENGTH + 1) <= targets[encoder.end_of_text] <= len(texts)


def test_leftovers_of_an_epoch_begin_the_next(tmp_path):
    corpus = numbered_corpus(tmp_path, [[9, 4, 30]])
    rows = rows_until_the_end(make_stream(corpus))
    assert len(rows) == (3 * 43 - 1) // LENGTH
    tokens = [*rows[0], *(token for row in rows[1:] for token in row[1:])]
    assert all(row[-1] == after[0] for row, after in itertools.pairwise(rows))
    documents = cut_into_documents(tokens, read_all(corpus))
    assert [sorted(documents[at : at + 3]) for at in (0, 3, 6)] == [sorted(read_all(corpus))] * 3


def test_rows_of_three_epochs_are_three_times_the_text_less_one_remainder(corpus, reference):
    targets = Counter(token for row in reference for token in row[1:])
    # A shard's first token of the run is no target; in its last epoch it may be among what is left over.
    everything = set(range(token_count(corpus)))
    assert set(targets) <= everything and len(everything - set(targets)) <= 16
    assert max(targets.values()) <= EPOCHS + 1
    assert 16 <= EPOCHS * token_count(corpus) - len(reference) * LENGTH <= 16 * LENGTH


def test_rows_are_taken_from_the_shards_round_robin(full_units):
    rows = epoch_rows(full_units)
    shard_of = {tuple(row[1:]): n for n, tokens in enumerate(chains(rows)) for row in rows if row[1] in tokens}
    turns = [shard_of[tuple(row[1:])] for row in rows]
    first = turns[:16]
    assert sorted(first) == list(range(16))
    remaining, position = Counter(turns), 0
    expected = []
    while remaining:
        shard = first[position % 16]
        if remaining[shard]:
            expected.append(shard)
            remaining[shard] -= 1
            remaining += Counter()
        position += 1
    assert turns == expected


@pytest.mark.parametrize("units, shards", [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (63, 32), (64, 64), (200, 64)])
def test_number_of_shards_is_a_power_of_two_within_the_units(tmp_path, units, shards):
    assert MAX_SHARDS == 64
    assert make_stream(numbered_corpus(tmp_path, [[1] * units], group=1)).num_shards == shards


def test_each_epoch_has_another_order(tmp_path):
    corpus = numbered_corpus(tmp_path, [[LENGTH] * 12])
    rows = rows_until_the_end(make_stream(corpus))
    epochs = [rows[:12], rows[12:24], rows[24:]]
    orders = [[row[0] for row in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [sum(token == row[0] for row in epochs[0]) for token in sorted(orders[1])] == [1] * 12


def test_units_and_documents_are_both_shuffled(tmp_path):
    corpus = numbered_corpus(tmp_path, [[LENGTH] * 64], group=8)
    order = {
        seed: [row[0] // LENGTH for row in epoch_rows(corpus.with_units(corpus.units[0:1]), seed=seed)] for seed in range(4)
    }
    assert len({tuple(documents) for documents in order.values()}) == 4
    assert any(documents != sorted(documents) for documents in order.values())
    first_units = {seed: [row[0] // LENGTH // 8 for row in epoch_rows(corpus, seed=seed)[:8]] for seed in range(4)}
    assert all(sorted(units) == list(range(8)) for units in first_units.values())
    assert len({tuple(units) for units in first_units.values()}) == 4


def test_the_same_seed_gives_the_same_order_and_another_another(corpus, reference):
    assert rows_until_the_end(make_stream(corpus)) == reference
    other = rows_until_the_end(make_stream(corpus, seed=6))
    assert other != reference
    assert sorted(map(tuple, other)) != sorted(map(tuple, reference))


def test_order_is_pinned(tmp_path):
    """A checkpoint of an earlier version must go on with the same text: a change of the order must be deliberate."""
    rows = rows_until_the_end(make_stream(numbered_corpus(tmp_path, [[LENGTH] * 9], group=2), seed=1, max_epochs=2))
    assert [row[0] // LENGTH for row in rows] == PINNED_ORDER


PINNED_ORDER = [7, 5, 3, 6, 1, 0, 4, 8, 2, 7, 1, 2, 6, 5]
"""9 documents of one row in 5 units, hence 4 shards, each of which leaves a row's part over."""


def test_epoch_counts_complete_passes(tmp_path):
    stream = make_stream(numbered_corpus(tmp_path, [[LENGTH] * 4 + [1]], group=9))
    seen = []
    for _ in range(9):
        stream.next_batch(1)
        seen.append((stream.rows, stream.epoch))
    assert seen == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1), (7, 1), (8, 1), (9, 2)]


def test_permutations_are_functions_of_their_seed_alone():
    assert permutation(8, 0, 0).tolist() == PINNED_PERMUTATION
    orders = [permutation(1000, seed, epoch).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16
    assert all(sorted(order) == list(range(1000)) for order in orders)
    # No place prefers a value: over 2,000 seeds the first of 8 is each of them about 250 times.
    firsts = Counter(int(permutation(8, seed)[0]) for seed in range(2000))
    assert all(190 < firsts[value] < 310 for value in range(8))


PINNED_PERMUTATION = [4, 0, 1, 7, 6, 2, 5, 3]


# --- rows left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 1), (3, 0), (4, 3)])
def test_skipped_rows_are_left_out_and_the_others_stay_in_order(corpus, reference, ranks, workers):
    skip = [(0, 2), (17, 17), (30, 61)]
    expected = [row for n, row in enumerate(reference) if not any(first <= n <= last for first, last in skip)]
    rows, state = read_batches(corpus, ranks, [12] * 6, skip_rows=skip, workers=workers)
    assert rows == expected[:72]
    assert state["rows"] > 72
    more, _ = read_batches(corpus, 2, [12] * 3, state=state, skip_rows=skip)
    assert more == expected[72:108]


def test_rows_to_come_may_be_left_out_and_earlier_ones_may_not_change(corpus, reference):
    _, state = read_batches(corpus, 1, [12], skip_rows=[(3, 5)])
    assert state["rows"] == 15
    with pytest.raises(ValueError, match="differs in skip_rows"):
        make_stream(corpus, state=state)
    with pytest.raises(ValueError, match="differs in skip_rows"):
        make_stream(corpus, state=state, skip_rows=[(3, 5), (14, 14)])
    rows, _ = read_batches(corpus, 1, [12], state=state, skip_rows=[(3, 5), (16, 20)])
    assert rows == reference[15:16] + reference[21:32]


def test_an_accepted_difference_is_recorded(corpus):
    state = make_stream(corpus, seed=1).state()
    stream = make_stream(corpus, seed=2, state=state, accept_other_data=True)
    (accepted,) = stream.state()["accepted"]
    assert "differs in seed: 1 there, 2 now" in accepted
    again = make_stream(corpus, seed=2, state=stream.state())
    assert again.state()["accepted"] == [accepted]
    with pytest.raises(ValueError, match="sequence_length"):
        make_stream(corpus, sequence_length=LENGTH + 1, state=state, accept_other_data=True)


# --- ranks, threads, batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", RANKS)
def test_rows_do_not_depend_on_ranks_and_threads(corpus, reference, ranks, workers):
    rows_per_batch = ranks * 3
    batches = [rows_per_batch] * (len(reference) // rows_per_batch)
    rows, _ = read_batches(corpus, ranks, batches, workers=workers)
    assert rows == reference[: len(rows)]
    assert len(rows) > len(reference) * 0.9


@pytest.mark.parametrize("workers", (0, 1))
@pytest.mark.parametrize("ranks", (1, 3, 4, 8))
def test_more_ranks_than_shards(few_units, ranks, workers):
    expected = rows_until_the_end(make_stream(few_units))
    rows, _ = read_batches(few_units, ranks, [ranks] * (len(expected) // ranks), workers=workers)
    assert rows == expected[: len(rows)]
    assert len(rows) > len(expected) - ranks


@pytest.mark.parametrize("batch", [2, 5, 16, 17, 31, 64, 250])
@pytest.mark.parametrize("workers", (0, 2))
def test_rows_do_not_depend_on_the_size_of_the_batch(corpus, reference, batch, workers):
    stream = make_stream(corpus, workers=workers)
    rows = rows_until_the_end(stream, batch)
    stream.close()
    assert rows == reference[: len(reference) // batch * batch]


def test_rows_do_not_depend_on_mixed_sizes_of_batches(corpus, reference):
    rng = random.Random(1)
    batches = [rng.randrange(1, 40) * 2 for _ in range(9)]
    for ranks in (1, 2):
        rows, _ = read_batches(corpus, ranks, batches, workers=1)
        assert rows == reference[: sum(batches)]


@pytest.mark.parametrize("ranks, exchanged", [(1, 17), (2, 17), (4, 17), (8, 17), (3, 17 + 24 * (LENGTH + 1) // 2)])
def test_rows_are_exchanged_only_where_the_ranks_do_not_divide_the_shards(full_units, ranks, exchanged):
    """Beside the 17 numbers that tell what each shard has. Ids have four bytes here: two of them are a number."""

    def run(exchange: ThreadExchange) -> list[int]:
        sizes, add = [], exchange.sum
        exchange.sum = lambda values: sizes.append(values.size) or add(values)
        stream = make_stream(full_units, exchange)
        stream.next_batch(24)
        return sizes

    assert [sum(sizes) for sizes in run_ranks(ranks, run)] == [exchanged] * ranks


def test_a_batch_of_rows_that_are_there_gives_the_threads_nothing_to_do(tmp_path, monkeypatch):
    """A task handed to a thread costs 20 us of the training thread: with 64 shards more than all the rest of a batch."""
    lengths = [[300] * 64] * 4  # a unit of 16 documents, read at once, fills 685 rows
    corpus = numbered_corpus(tmp_path / "text", lengths, group=16)
    stream = make_stream(corpus, workers=3)
    tasks = []
    submit = stream._pool.submit
    monkeypatch.setattr(stream._pool, "submit", lambda *task: tasks.append(task) or submit(*task))
    stream.next_batch(16)
    assert len(tasks) == stream.num_shards == 16
    for _ in range(600):
        stream.next_batch(16)
    assert len(tasks) == 16
    for _ in range(100):
        stream.next_batch(16)
    assert len(tasks) > 16
    stream.close()


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_a_batch_is_assembled_before_it_is_asked_for(tmp_path, ranks, packing):
    """By a thread, while the model trains; and ranks that know what is there do not ask each other for every batch. A state is
    that of the batches taken, and whoever asks for something else gets it."""
    corpus = numbered_corpus(tmp_path / "text", [[300] * 64] * 4, group=16)  # a shard's first 16 documents fill 670 rows
    plain = make_stream(corpus, packing=packing)
    expected = [(plain.next_batch(size).tolist(), plain.state()) for size in [16] * 20 + [48, 16]]

    def run(exchange: ThreadExchange) -> None:
        stream = make_stream(corpus, exchange, workers=1, packing=packing)
        exchanges, add = [], exchange.sum
        exchange.sum = lambda values: exchanges.append(values.shape) or add(values)
        assert stream.next_batch(16).tolist() == expected[0][0][exchange.rank :: ranks]
        assemblers = []
        for packer in stream._packers.values():
            find = packer._tokens
            packer._tokens = lambda count, find=find: assemblers.append(threading.current_thread().name) or find(count)
        for rows, _ in expected[1:20]:
            assert stream.next_batch(16).tolist() == rows[exchange.rank :: ranks]
        assert exchanges == [(17,)]
        assert len(assemblers) >= 18 * 16 // ranks and all(name.startswith("assemble") for name in assemblers)
        assert stream.state() == expected[19][1]
        spans = []
        for rows, state in expected[20:]:
            assert stream.next_batch(len(rows), spans).tolist() == rows[exchange.rank :: ranks]
            assert stream.state() == state
        assert sum(span.tokens for span in spans) == (48 + 16) // ranks * (LENGTH + 1)
        stream.close()
        assert stream.state() == expected[-1][1]

    for result in run_ranks(ranks, run):
        if isinstance(result, Exception):
            raise result


def test_shard_that_ends_early_is_skipped(tmp_path):
    """One file of 60 rows beside seven of one row: all ranks still get their equal part of every batch."""
    corpus = numbered_corpus(tmp_path, [[LENGTH + 1]] * 5 + [[LENGTH * 60 + 1]] + [[LENGTH + 1]] * 2)
    expected = epoch_rows(corpus)
    assert len(expected) == 67
    rows, _ = read_batches(corpus, 4, [8] * 8, max_epochs=1, workers=1)
    assert rows == expected[:64]


def test_units_without_text_do_no_harm(tmp_path):
    texts = ["", None, "", "", *numbered_documents([LENGTH] * 6), None, ""]
    corpus = open_training(write_parquet(tmp_path / "a.parquet", texts, group=2))
    expected = rows_until_the_end(make_stream(corpus))
    assert len(expected) * LENGTH >= 3 * 6 * LENGTH - 4 * LENGTH
    rows, _ = read_batches(corpus, 3, [3] * (len(expected) // 3), workers=1)
    assert rows == expected[: len(rows)]


def test_text_too_short_for_a_row_runs_out_at_once(tmp_path):
    stream = make_stream(numbered_corpus(tmp_path, [[2]]))
    with pytest.raises(DataError, match="run out after 0 tokens and 3 epochs"):
        stream.next_batch(1)


@pytest.mark.parametrize("ranks, workers", [(1, 0), (2, 1), (3, 0), (8, 1)])
def test_running_out_of_text_raises_on_every_rank(corpus, reference, ranks, workers):
    rows_per_batch = ranks * 4
    whole = len(reference) // rows_per_batch

    def run(exchange: ThreadExchange) -> tuple[int, str]:
        stream = make_stream(corpus, exchange, workers=workers)
        for _ in range(whole):
            stream.next_batch(rows_per_batch)
        with pytest.raises(DataError) as caught:
            stream.next_batch(rows_per_batch)
        stream.close()
        return stream.rows, str(caught.value)

    tokens = whole * rows_per_batch * LENGTH
    message = f"the text has run out after {tokens:,} tokens and 3 epochs; raise max_epochs"
    assert run_ranks(ranks, run) == [(whole * rows_per_batch, message)] * ranks


# --- state and resumption -----------------------------------------------------------------------------------------

TOPOLOGIES = list(itertools.product(RANKS, WORKERS))


def test_state_is_the_same_for_every_topology(corpus):
    for count in (1, 2, 3):
        states = [
            read_batches(corpus, ranks, [batch] * (EVERY_RANK_COUNT * count // batch), workers=workers)[1]
            for (ranks, workers), batch in zip(TOPOLOGIES, itertools.cycle([EVERY_RANK_COUNT, 120, 40 * 3]), strict=False)
        ]
        states += [read_batches(corpus, ranks, [ranks * 5] * (24 * count // ranks))[1] for ranks in (1, 2, 3, 4, 8)]
        assert all(state == states[0] for state in states)
        assert states[0]["rows"] == EVERY_RANK_COUNT * count
    assert states[0]["epoch"] == 2


def test_state_of_a_fresh_stream_is_its_beginning(corpus, reference):
    stream = make_stream(corpus)
    state = json.loads(json.dumps(stream.state()))
    assert (state["rows"], state["epoch"], state["finished"]) == (0, 0, [])
    assert rows_until_the_end(make_stream(corpus, state=state)) == reference


def test_state_is_json_of_plain_numbers_and_words(corpus):
    stream = make_stream(corpus)
    stream.next_batch(50)
    state = stream.state()
    assert json.loads(json.dumps(state)) == state


def test_taking_the_state_changes_nothing(corpus, reference):
    stream = make_stream(corpus, workers=2)
    rows = []
    for _ in range(len(reference) // 10):
        assert stream.state() == stream.state()
        rows += stream.next_batch(10).tolist()
    stream.close()
    assert rows == reference[: len(rows)]


def test_a_restored_stream_has_the_state_that_it_was_given(corpus):
    stream = make_stream(corpus)
    for _ in range(17):
        state = stream.state()
        assert make_stream(corpus, state=state).state() == state
        stream.next_batch(27)
    assert stream.epoch == 2


@pytest.mark.parametrize("point", range(20))
def test_resuming_anywhere_on_other_topologies_three_times_in_a_row(corpus, reference, point):
    rng = random.Random(point)
    at, state = 0, None
    for leg in range(4):
        ranks, workers = rng.choice(TOPOLOGIES)
        most = (len(reference) - at) // ranks
        batches = []
        while most and len(batches) < (rng.randrange(1, 8) if leg else 3):
            batches.append(ranks * rng.randrange(1, min(most, max(1, 60 // ranks)) + 1))
            most -= batches[-1] // ranks
        rows, state = read_batches(corpus, ranks, batches, state, workers=workers)
        assert rows == reference[at : at + len(rows)], (leg, ranks, workers)
        at += sum(batches)
        assert state["rows"] == at


def test_resuming_before_each_row_of_the_run(corpus, reference):
    stream = make_stream(corpus)
    for at in range(len(reference) - 2):
        resumed = make_stream(corpus, state=json.loads(json.dumps(stream.state())))
        assert resumed.next_batch(2).tolist() == reference[at : at + 2]
        stream.next_batch(1)


def test_more_epochs_may_be_allowed_on_resumption(corpus, reference):
    stream = make_stream(corpus, max_epochs=1)
    rows = rows_until_the_end(stream)
    resumed = make_stream(corpus, max_epochs=1)
    resumed.next_batch(len(rows) - 5)
    assert rows_until_the_end(make_stream(corpus, state=resumed.state())) == reference[len(rows) - 5 :]


class OtherEncoder(NumberEncoder):
    hash = "others"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 6}, "seed: 5 there, 6 now"),
        ({"sequence_length": 8}, "sequence_length: 7 there, 8 now"),
        ({"encoder": OtherEncoder()}, "tokenizer: numbers there, others now"),
    ],
)
def test_state_of_another_run_is_refused(corpus, change, named):
    stream = make_stream(corpus)
    stream.next_batch(3)
    with pytest.raises(ValueError, match=f"differs in {named}"):
        make_stream(corpus, state=json.loads(json.dumps(stream.state())), **change)


def longer(corpus: Corpus) -> Corpus:
    return replace(corpus, sizes=[corpus.sizes[0] + 1, *corpus.sizes[1:]])


def renamed(corpus: Corpus) -> Corpus:
    return replace(corpus, files=[*corpus.files[:-1], corpus.files[-1].replace("04.", "05.")])


def shorter(corpus: Corpus) -> Corpus:
    return corpus.with_units(corpus.units[1:])


def other_column(corpus: Corpus) -> Corpus:
    return replace(corpus, text_column="body")


@pytest.mark.parametrize(
    "change, named", [(longer, "files"), (renamed, "files"), (shorter, "units"), (other_column, "text_column")]
)
def test_state_of_another_text_is_refused(corpus, change, named):
    state = json.loads(json.dumps(make_stream(corpus).state()))
    with pytest.raises(ValueError, match=f"differs in {named}: "):
        make_stream(change(corpus), state=state)


# --- faults -------------------------------------------------------------------------------------------------------


class FaultyCorpus(Corpus):
    """A corpus whose disk fails at the given units, or from a number of reads on."""

    def fail(self, when: Callable[[Unit, int], bool], error: Exception | None = None) -> FaultyCorpus:
        self._when, self._reads, self._error = when, 0, error or DataError("cannot read the disk")
        self._lock = threading.Lock()
        return self

    def read(self, unit: Unit):
        with self._lock:
            self._reads += 1
            reads = self._reads
        if self._when(unit, reads):
            raise self._error
        return super().read(unit)


def faulty(corpus: Corpus, when: Callable[[Unit, int], bool], error: Exception | None = None) -> Corpus:
    parts = (corpus.name, corpus.files, corpus.sizes, corpus.units, corpus.text_column, corpus.remote, corpus.footers)
    return FaultyCorpus(*parts).fail(when, error)


def assert_all_stop(results: list[object], message: str) -> None:
    """Every rank has a DataError; at least one has the cause."""
    assert [type(result) for result in results] == [DataError] * len(results), results
    assert sum(message in str(result) for result in results) >= 1
    assert all(message in str(result) or "another rank could not read" in str(result) for result in results)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("ranks", (1, 2, 3, 8))
def test_unreadable_file_raises_on_every_rank(corpus, ranks, workers):
    broken = faulty(corpus, lambda unit, _: (unit.file, unit.start) == (1, 6))

    def run(exchange: ThreadExchange) -> None:
        stream = make_stream(broken, exchange, workers=workers)
        try:
            while stream.rows < 10_000:
                stream.next_batch(ranks * 2)
        finally:
            stream.close()

    assert_all_stop(run_ranks(ranks, run, timeout=10), "cannot read the disk")


def test_file_spoilt_during_the_run_is_named_on_its_rank(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", numbered_documents([40] * 4, n * 160)) for n in range(4)]
    corpus = open_training(tmp_path)
    paths[2].write_bytes(b"x" * paths[2].stat().st_size)

    def run(exchange: ThreadExchange) -> None:
        make_stream(corpus, exchange).next_batch(8)

    results = run_ranks(4, run, timeout=10)
    assert_all_stop(results, f"cannot read {paths[2]}: ")
    assert sum("2.jsonl" in str(result) for result in results) == 1


def test_any_exception_of_one_rank_raises_on_every_rank(corpus):
    broken = faulty(corpus, lambda unit, _: (unit.file, unit.start) == (3, 1), MemoryError("too much"))

    def run(exchange: ThreadExchange) -> None:
        stream = make_stream(broken, exchange, workers=1)
        while stream.rows < 10_000:
            stream.next_batch(8)

    results = run_ranks(4, run, timeout=10)
    assert sum(isinstance(result, MemoryError) for result in results) == 1
    assert sum(isinstance(result, DataError) for result in results) == 3


@pytest.mark.parametrize("ranks", (2, 4))
def test_fault_while_reading_ahead_hangs_no_rank_that_takes_the_state(tmp_path, ranks):
    corpus = numbered_corpus(tmp_path, [[2 * LENGTH + 1] * 31], group=1)

    def run(exchange: ThreadExchange) -> dict:
        shards = 16 // ranks
        own = faulty(corpus, lambda _, reads: exchange.rank == 1 and reads > shards)
        stream = make_stream(own, exchange, workers=1)
        try:
            stream.next_batch(16)
            return stream.state()
        finally:
            stream.close()

    results = run_ranks(ranks, run, timeout=3)
    assert not any(isinstance(result, threading.BrokenBarrierError) for result in results), results
    assert len({type(result) for result in results}) == 1


def test_text_on_the_hub_gets_threads_to_wait_in(corpus):
    for remote, workers, threads in [(False, 2, 2), (True, 2, HUB_THREADS), (True, HUB_THREADS + 1, HUB_THREADS + 1)]:
        stream = make_stream(replace(corpus, remote=remote), workers=workers)
        assert stream._pool._max_workers == threads
        stream.close()
    assert make_stream(replace(corpus, remote=True), workers=0)._pool is None


def test_close_ends_the_threads(corpus):
    before = set(threading.enumerate())
    stream = make_stream(corpus, workers=3)
    stream.next_batch(64)
    started = set(threading.enumerate()) - before
    retried = threading.Event()
    stream._pool.submit(retried.wait, 20)  # a read of the Hub, say, minutes of which nobody waits for
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5 and len(started) == 4  # one of them assembles
    retried.set()
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)


def test_the_first_batch_can_be_read_ahead(corpus, reference):
    """While the model is made: the rows are there before anybody asks, and the stream still stands at the first of them."""
    stream, untouched = make_stream(corpus, workers=2), make_stream(corpus)
    # Some shards are shorter than that.
    there = {shard: packer.fill(2, epoch=0) for shard, packer in make_stream(corpus)._packers.items()}
    stream.prefetch(32)
    deadline = time.monotonic() + 30
    while any(packer.buffered_rows < there[shard] for shard, packer in stream._packers.items()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert stream.state() == untouched.state()
    assert stream.next_batch(32).tolist() == reference[:32]
    stream.close()


def test_reading_ahead_happens_in_the_threads(corpus):
    readers = set()

    def watch(unit: Unit, reads: int) -> bool:
        readers.add(threading.current_thread().name)
        return False

    for workers, prefix in [(0, threading.current_thread().name), (2, "tokenise")]:
        readers.clear()
        stream = make_stream(faulty(corpus, watch), workers=workers)
        stream.next_batch(30)
        stream.next_batch(30)
        stream.close()
        assert all(name.startswith(prefix) for name in readers), readers


def test_a_shard_is_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Also where a task has come to its end, and the one that it started is at work, before anybody has noted the first."""
    corpus = numbered_corpus(tmp_path / "text", [[9] * 200], group=200)
    expected = make_stream(corpus).next_batch(32).tolist()
    stream = make_stream(corpus, workers=2)
    (packer,) = stream._packers.values()
    read, second, threads, at_once = packer.read_chunk, threading.Event(), [], []

    def read_chunk(epoch: int) -> bool:
        threads.append(threading.get_ident())
        at_once.append(len(set(threads)))
        if len(at_once) == 2:
            second.set()
            time.sleep(0.5)
        try:
            return read(epoch)
        finally:
            threads.remove(threading.get_ident())

    submit = stream._pool.submit

    def submit_and_dawdle(*task):
        future = submit(*task)
        second.wait(0.3)
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.1)
        return future

    packer.read_chunk = read_chunk
    monkeypatch.setattr(stream._pool, "submit", submit_and_dawdle)
    stream.prefetch(32)
    assert stream.next_batch(32).tolist() == expected
    stream.close()
    assert len(at_once) > 2 and set(at_once) == {1}


def test_rows_that_are_there_do_not_wait_for_what_is_read_ahead(tmp_path: Path):
    """Nor does the state: a row group comes from the Hub in a while, and the threads begin with it in time."""
    corpus = numbered_corpus(tmp_path, [[LENGTH * 20] * 31], group=1)  # 16 shards, of which 15 have a second unit of 19 rows
    plain = make_stream(corpus)
    expected = [(plain.next_batch(16).tolist(), plain.state()) for _ in range(30)]
    gate, begun = threading.Event(), threading.Event()

    def watch(unit: Unit, reads: int) -> bool:
        if reads > 16:
            begun.set()
            assert gate.wait(20)
        return False

    stream = make_stream(faulty(corpus, watch), workers=2)
    batches = []
    started = time.monotonic()
    for number in range(19):
        batches.append((stream.next_batch(16).tolist(), stream.state()))
        if number == 19 - READ_AHEAD:
            assert begun.wait(5)
    assert time.monotonic() - started < 10 and not gate.is_set()
    gate.set()
    batches += [(stream.next_batch(16).tolist(), stream.state()) for _ in range(11)]
    assert batches == expected
    stream.close()


@pytest.mark.parametrize("workers", (1, 3))
def test_a_fault_ahead_ends_the_run_where_the_rows_do(tmp_path: Path, workers: int):
    """However early the threads came upon it."""
    corpus = numbered_corpus(tmp_path, [[LENGTH * 20] * 31], group=1)
    stream = make_stream(faulty(corpus, lambda unit, reads: reads > 16), workers=workers)
    for _ in range(19):
        stream.next_batch(16)
        time.sleep(0.01)
    state = stream.state()
    with pytest.raises(DataError, match="cannot read the disk"):
        stream.next_batch(16)
    assert stream.state() == state
    stream.close()


def test_reading_ahead_stays_within_the_epoch_and_the_next_batches(tmp_path: Path):
    """Only the units that the next rows need are read, however long the text."""
    corpus = numbered_corpus(tmp_path, [[LENGTH * (READ_AHEAD + 2)] * 64], group=1)
    count = 0

    def watch(unit: Unit, reads: int) -> bool:
        nonlocal count
        count = reads
        return False

    stream = make_stream(faulty(corpus.with_units(corpus.units[0:15]), watch), workers=1)
    stream.next_batch(8)
    stream.state()
    stream.close()
    assert count == 8
