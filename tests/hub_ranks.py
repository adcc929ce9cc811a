"""Ranks that read a dataset from the Hub that HF_ENDPOINT names, as training does, and nothing else.

    python hub_ranks.py '{"data": "Org/text", "ranks": 2, ...}'

A process of its own, since the clients read HF_ENDPOINT when they are imported; the ranks are forked from it when everything
is imported. It prints a JSON list: what each rank says.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imports are not what is measured)
import datasets  # noqa: F401
import pyarrow.parquet  # noqa: F401
import tiktoken  # noqa: F401

from recipe.data.corpus import DataError, open_corpora
from recipe.data.remote import statistics
from recipe.data.stream import RowStream
from recipe.data.validation import check_length, hold_out
from recipe.engine import Distributed
from recipe.tokenizer import Encoder, load_tokenizer

WORKERS, SEED = 2, 3


def read(rank: int, options: dict[str, Any], results: multiprocessing.Queue) -> None:
    """Set up and read `batches` batches, or the whole epoch if that is null; put what was measured into `results`."""
    ranks, length, rows = options["ranks"], options["length"], options["rows"]
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(options["port"]), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    began = time.perf_counter()
    distributed = Distributed()
    training, _ = distributed.on_main(open_corpora, options["data"], None, "text", Path(options["cache"]))
    encoder = Encoder(load_tokenizer(options["tokenizer"]))
    _, training = distributed.on_main(hold_out, training, encoder, length, options["validation_tokens"])
    distributed.on_main(check_length, training, encoder, length, rows * length, 1)
    stream = RowStream(training, encoder, length, SEED, 1, distributed, WORKERS)
    stream.next_batch(rows)
    first_batch_s, batches = time.perf_counter() - began, 1
    try:
        while options["batches"] is None or batches < options["batches"]:
            stream.next_batch(rows)
            batches += 1
    except DataError as end:
        assert "the text has run out" in str(end)
    stream.close()
    distributed.close()
    results.put({"rank": rank, "first_batch_s": first_batch_s, "batches": batches, **statistics()})


def main(options: dict[str, Any]) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=read, args=(rank, options, results)) for rank in range(options["ranks"])]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    print(json.dumps(sorted((results.get() for _ in processes), key=lambda result: result["rank"])))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
