"""The stream over real processes and gloo, killed and continued on other numbers of ranks: no row lost, repeated or moved."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from conftest import make_documents
from corpus_helpers import write_jsonl, write_parquet
from forked import context
from launch import free_port, read_ledger
from recipe.tokenizer import train_tokenizer
from stream_rank import LENGTH, ROWS, STEPS, read

WORLDS, WORKERS = (1, 2, 4), (0, 1, 3)
PAIRS = list(itertools.product(WORLDS, WORKERS))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Text of about 4 epochs to the run, uneven files, and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    texts = make_documents(200)
    write_parquet(folder / "a.parquet", texts[:120], group=9)
    write_parquet(folder / "b.parquet", texts[120:123], group=9)
    write_jsonl(folder / "c.jsonl", texts[123:])
    tokenizer = folder.parent / "tokenizer"
    train_tokenizer(texts, 400).save_pretrained(tokenizer)
    return str(folder), str(tokenizer)


def start(pair: tuple[int, int], inputs: tuple[str, str], folder: Path, pause: float = 0) -> list:
    ranks, workers = pair
    port = free_port()
    processes = [
        context.Process(target=read, args=(rank, ranks, workers, *inputs, str(folder), port, pause)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def saved_step(folder: Path) -> int:
    path = folder / "state.json"
    return json.loads(path.read_text())["step"] if path.is_file() else 0


def ledger(folder: Path) -> list[list[str]]:
    """The hashes of the rows of each step, in the order of the batch.

    A step that was read again after a kill must have given the same rows; each place of a batch must be there once.
    """
    seen = read_ledger(folder)
    assert len(seen) == STEPS * ROWS, "rows are missing"
    return [[seen[step, place] for place in range(ROWS)] for step in range(STEPS)]


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory) -> list[list[str]]:
    folder = tmp_path_factory.mktemp("reference")
    finish(start((1, 0), inputs, folder))
    assert json.loads((folder / "state.json").read_text())["epoch"] >= 2, "the run must cross epochs"
    return ledger(folder)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}ranks-{pair[1]}workers")
def test_batches_are_the_same_for_all_ranks_and_workers(pair, inputs, reference, tmp_path) -> None:
    finish(start(pair, inputs, tmp_path))
    assert ledger(tmp_path) == reference
    assert len({digest for step in reference for digest in step}) > STEPS * ROWS / 8


def kill_and_continue(seed: int, inputs, reference, folder: Path, kills: int = 3) -> None:
    rng = random.Random(seed)
    pairs = rng.sample(PAIRS, kills + 1)
    for attempt, pair in enumerate(pairs):
        if attempt == kills:
            finish(start(pair, inputs, folder))
            break
        before = saved_step(folder)
        # A state further on, not the last: somewhere behind it the ranks are killed.
        goal = before + rng.randint(1, (STEPS - before) // 2)
        processes = start(pair, inputs, folder, pause=0.004)
        deadline = time.monotonic() + 60
        while saved_step(folder) < goal:
            assert all(p.is_alive() or p.exitcode == 0 for p in processes) and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        assert saved_step(folder) < STEPS, "the kill came too late"
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
            assert process.exitcode == -signal.SIGKILL
    assert ledger(folder) == reference


@pytest.mark.parametrize("seed", range(2))
def test_killed_three_times_and_continued_elsewhere(seed, inputs, reference, tmp_path) -> None:
    kill_and_continue(seed, inputs, reference, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2, 22))
def test_killed_at_20_points_three_times_and_continued_elsewhere(seed, inputs, reference, tmp_path) -> None:
    kill_and_continue(seed, inputs, reference, tmp_path)


def test_the_run_is_long_enough_to_say_something() -> None:
    assert STEPS == 200 and ROWS % 16 == 0 and LENGTH > 1
