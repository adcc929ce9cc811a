"""Measurements that a user can repeat: how fast the loader gives rows."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from recipe.config import Config, parse_ranges
from recipe.data.corpus import open_corpora
from recipe.data.prepared import PreparedCorpus, encoder_for
from recipe.data.stream import RowStream
from recipe.plan import Plan
from recipe.tokenizer import Encoder, load_tokenizer


def benchmark_loader(config: Config, plan: Plan, seconds: float) -> dict[str, Any]:
    """Read batches of the run's text as one rank and nothing else for `seconds`.

    Returns:
        tokens_per_second over the batches after the first; first_batch_seconds from the opening of the text on, imports not
        counted; the batches read; growth of the resident memory after a tenth of the time, in bytes; CPU seconds a second.
    """
    import pyarrow.parquet  # noqa: F401  (imports are not what is measured)
    import tiktoken  # noqa: F401

    tokenizer = load_tokenizer(config.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        corpus, _ = open_corpora(config.data, config.validation_data, config.text_column, Path(cache))
        if isinstance(corpus, PreparedCorpus):
            corpus.fetch()
        encoder = encoder_for(corpus, Encoder(tokenizer), "data")
        stream = RowStream(
            corpus,
            encoder,
            config.sequence_length,
            config.seed,
            config.max_epochs,
            workers=config.data_workers,
            skip_rows=parse_ranges(config.skip_rows),
        )
        stream.next_batch(plan.rows_per_step)
        first = time.perf_counter()
        cpu, batches, settled = time.process_time(), 0, None
        while (elapsed := time.perf_counter() - first) < seconds:
            stream.next_batch(plan.rows_per_step)
            batches += 1
            if settled is None and elapsed > seconds / 10:
                settled = _resident_bytes()
        result = {
            "tokens_per_second": batches * plan.tokens_per_step / elapsed,
            "first_batch_seconds": first - began,
            "batches": batches,
            "epochs": stream.epoch,
            "memory_growth_bytes": _resident_bytes() - settled if settled is not None else None,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "cpu_seconds_per_second": (time.process_time() - cpu) / elapsed,
            "virtual_shards": stream.num_shards,
            "tokenised_by": encoder.engine,
        }
        stream.close()
    return result


def _resident_bytes() -> int:
    """Memory of this process now; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
