"""Measurements that a user can repeat, on real text: the loader alone, the model alone, and whole optimizer steps."""

from __future__ import annotations

import contextlib
import re
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from recipe.config import Config, parse_ranges
from recipe.data.corpus import open_corpora
from recipe.data.prepared import PreparedCorpus, encoder_for
from recipe.data.stream import Exchange, RowStream
from recipe.distributed import Distributed, resolve_precision
from recipe.engine import OPTIMIZER, make_engine
from recipe.gpus import peak_flops
from recipe.model import build_model
from recipe.optim.schedule import hyperparameters
from recipe.overlap import communication, length
from recipe.plan import Plan, flops_per_token
from recipe.tokenizer import Encoder, load_tokenizer

WARMUP_STEPS = 5

PARTS = {
    "communication": r"nccl",
    "attention": r"sdpa|flash|fmha|attention|compute_dot_do_o|convert_dq",
    "loss": r"cross_entropy|fp8_gradient|fp8_quantize|nll_loss|softmax",
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitK",
    "copies": r"^Memcpy",
    "other passes": r"",
}
"""Parts of the device's time by the names of their kernels; the first match counts. The optimizer is told by when it runs."""


@contextlib.contextmanager
def open_stream(config: Config, exchange: Exchange | None = None) -> Iterator[tuple[RowStream, Encoder]]:
    """The run's training rows, nothing held out."""
    tokenizer = load_tokenizer(config.tokenizer)
    with tempfile.TemporaryDirectory() as cache:
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
            exchange,
            config.data_workers,
            skip_rows=parse_ranges(config.skip_rows),
            packing=config.packing,
        )
        try:
            yield stream, encoder
        finally:
            stream.close()


def benchmark_loader(config: Config, plan: Plan, seconds: float) -> dict[str, Any]:
    """Read batches of the run's text as one rank and nothing else for `seconds`.

    Returns:
        tokens_per_second over the batches after the first; first_batch_seconds from the opening of the text on, imports not
        counted; the batches read; growth of the resident memory after a tenth of the time, in bytes; CPU seconds a second.
    """
    import pyarrow.parquet  # noqa: F401  (imports are not what is measured)
    import tiktoken  # noqa: F401

    began = time.perf_counter()
    with open_stream(config) as (stream, encoder):
        stream.next_batch(plan.rows_per_step)
        first = time.perf_counter()
        cpu, batches, settled = time.process_time(), 0, None
        while (elapsed := time.perf_counter() - first) < seconds:
            stream.next_batch(plan.rows_per_step)
            batches += 1
            if settled is None and elapsed > seconds / 10:
                settled = _resident_bytes()
        return {
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


def benchmark_training(config: Config, plan: Plan, distributed: Distributed, steps: int, whole: bool) -> dict[str, Any]:
    """Train `steps` optimizer steps, or only forward and backward of as many micro-batches, and profile one more.

    Args:
        whole: optimizer steps of all ranks with their data; otherwise micro-batches of the model alone, each rank for itself.
    Returns:
        medians after WARMUP_STEPS, of this rank: tokens_per_second (of all ranks), step_ms, data_ms (waiting for rows);
        first_step_seconds, compilation included; mfu and mfu_full_attention (12LCT), None on a device without a known peak;
        peak_memory_bytes; `parts`, the ms of the profiled step by part, and `kernels`, its longest kernels as [ms, calls,
        name], None without a GPU; `communication` of that step (recipe/overlap.py) by rank.
    """
    precision = resolve_precision(config.precision, distributed.cuda)
    with open_stream(config, distributed) as (stream, encoder):
        model = build_model(config, encoder.vocab_size, encoder.end_of_text)
        engine = make_engine(model, config, plan, distributed, precision)
        waits: list[float] = []

        def rows_of(count: int) -> torch.Tensor:
            began = time.perf_counter()
            rows = stream.next_batch(count)
            waits.append((time.perf_counter() - began) * 1000)
            return distributed.to_device(rows)

        def step(index: int) -> None:
            if whole:
                micro_batches = rows_of(plan.rows_per_step).split(config.micro_batch_size)
                engine.train_step(micro_batches, hyperparameters(index, config, plan))
            else:
                engine.model(rows_of(config.micro_batch_size * distributed.num_ranks)).mean().backward()
                for parameter in model.parameters():
                    parameter.grad = None

        clock = _Clock(distributed)
        began = clock.now()
        step(0)
        first = clock.seconds(began, clock.now())
        for index in range(1, WARMUP_STEPS):
            step(index)
        waits.clear()
        marks = [clock.now()]
        for index in range(WARMUP_STEPS, WARMUP_STEPS + steps):
            step(index)
            marks.append(clock.now())
        times = [clock.seconds(a, b) * 1000 for a, b in zip(marks, marks[1:], strict=False)]
        data_ms = statistics.median(waits)
        parts, kernels, exchange = _profile(lambda: step(WARMUP_STEPS + steps), distributed.cuda)
        exchanges = distributed.gather(exchange)
    step_ms = statistics.median(times)
    tokens = plan.tokens_per_step if whole else config.micro_batch_size * config.sequence_length * distributed.num_ranks
    speed = tokens / step_ms * 1000
    peak = peak_flops(torch.cuda.get_device_name()) if distributed.cuda else None
    flops = flops_per_token(config, encoder.vocab_size)
    more = 6 * config.n_layer * config.n_embd * config.sequence_length
    per_peak = speed / (peak * distributed.num_ranks) if peak else None
    return {
        "tokens_per_second": speed,
        "step_ms": step_ms,
        "step_ms_first_half": statistics.median(times[: len(times) // 2]),
        "step_ms_second_half": statistics.median(times[len(times) // 2 :]),
        "data_ms": data_ms,
        "first_step_seconds": first,
        "mfu": flops * per_peak if peak else None,
        "mfu_full_attention": (flops + more) * per_peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if distributed.cuda else None,
        "device": torch.cuda.get_device_name() if distributed.cuda else "CPU",
        "engine": type(engine).__name__,
        "precision": precision,
        "kernels_used": str(model.kernels),
        "parts": parts,
        "kernels": kernels,
        "communication": exchanges,
    }


class _Clock:
    """The device's, where there is a device: looking at it waits only for what is measured."""

    def __init__(self, distributed: Distributed):
        self._cuda = distributed.cuda

    def now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000


def _profile(
    step: Callable[[], None], cuda: bool
) -> tuple[dict[str, float] | None, list[tuple[float, int, str]] | None, dict[str, Any]]:
    """The device's ms of a step by part, idle included, and by kernel, both None without a GPU; and its communication."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    if not cuda:
        # gloo works in threads of its own; what torch runs there is part of the collective.
        gloo = {e.thread for e in profiler.events() if e.name.startswith("gloo:")}
        at_work = [e for e in profiler.events() if e.name.startswith("gloo:" if e.thread in gloo else "aten::")]
        return None, None, communication((e.time_range.start, e.time_range.end, e.name) for e in at_work)
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    # The optimizer's range spans its kernels on the device's clock.
    ranges = [(e.time_range.start, e.time_range.end) for e in on_device if e.name == OPTIMIZER]
    # Other ranges, such as the one that NCCL's work has, would count their kernels twice.
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in on_device
        if e.name != OPTIMIZER and not e.is_user_annotation and not e.name.startswith("nccl:")
    )
    return *divide(events, ranges), communication(events)


def divide(
    events: list[tuple[float, float, str]], optimizer: list[tuple[float, float]]
) -> tuple[dict[str, float], list[tuple[float, int, str]]]:
    """The ms of a step by part, idle included, and by kernel, the longest first.

    Args:
        events: start and end in microseconds and name of each kernel and copy, by their starts.
        optimizer: when the optimizer runs; its communication counts as communication.
    """
    parts: dict[str, float] = {"optimizer": 0.0, **dict.fromkeys(PARTS, 0.0)}
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for start, end, name in events:
        ms = (end - start) / 1000
        part = next(part for part, names in PARTS.items() if re.search(names, name))
        inside = part != "communication" and any(first <= start < last for first, last in optimizer)
        parts["optimizer" if inside else part] += ms
        kernels[name][0] += ms
        kernels[name][1] += 1
    parts["idle"] = (max(end for _, end, _ in events) - events[0][0] - length(e[:2] for e in events)) / 1000
    longest = sorted(((ms, int(calls), name) for name, (ms, calls) in kernels.items()), reverse=True)
    return parts, longest[:40]


def _resident_bytes() -> int:
    """Memory of this process now; Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
