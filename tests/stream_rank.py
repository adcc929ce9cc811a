"""A rank of a run that only reads: it notes the hash of every row, and rank 0 saves the state now and then.

Started by test_stream_processes.py as a process of its own, killed at random, started again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

from recipe.data.corpus import open_corpora
from recipe.data.stream import RowStream
from recipe.distributed import Distributed
from recipe.files import write_json
from recipe.tokenizer import Encoder, load_tokenizer

LENGTH, ROWS, STEPS, SAVE_EVERY, EPOCHS = 32, 48, 200, 7, 20


def read(rank: int, ranks: int, workers: int, data: str, tokenizer: str, folder: str, port: int, pause: float) -> None:
    """Read the run's batches from the saved state on, as rank `rank` of `ranks`, with `pause` seconds between them."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    distributed = Distributed()
    run = Path(folder)
    saved = run / "state.json"
    state = json.loads(saved.read_text()) if saved.is_file() else None
    corpus, _ = open_corpora(data, None, "text", run)
    stream = RowStream(
        corpus, Encoder(load_tokenizer(tokenizer)), LENGTH, 3, EPOCHS, distributed, workers, state["data"] if state else None
    )
    with open(run / f"ledger-{ranks}-{rank}-{os.getpid()}.jsonl", "a", encoding="utf-8") as ledger:
        for step in range(state["step"] if state else 0, STEPS):
            for place, row in enumerate(stream.next_batch(ROWS)):
                digest = hashlib.sha256(row.tobytes()).hexdigest()[:16]
                ledger.write(json.dumps([step, place * ranks + rank, digest]) + "\n")
            ledger.flush()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == STEPS:
                data_state = stream.state()
                distributed.barrier()  # every rank has noted the rows before they count as consumed
                if rank == 0:
                    write_json(saved, {"step": step + 1, "epoch": stream.epoch, "data": data_state})
            time.sleep(pause)
    stream.close()
    distributed.close()
