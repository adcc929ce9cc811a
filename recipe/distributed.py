"""The processes of a run: who each is, what they tell each other, and what they compute on."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipe.config import ConfigError
from recipe.micro_batch import under_zero1
from recipe.signals import print_stacks_on_signal

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""After this long a rank that waits for the others gives up."""


class Distributed:
    """The processes of the run: who I am, and what we tell each other.

    Attributes:
        waiting: whether this rank waits for the others to say something.
    """

    def __init__(self, timeout: timedelta = COLLECTIVE_TIMEOUT):
        self.waiting = False
        print_stacks_on_signal()
        # DeepSpeed calls collectives by names that newer torch deprecates.
        warnings.filterwarnings("ignore", message=".*is deprecated. Please use.*", category=FutureWarning)
        self.cuda = torch.cuda.is_available()
        self.deepspeed = under_zero1()
        if not self.cuda:
            # DeepSpeed picks its accelerator when it is imported.
            os.environ["DS_ACCELERATOR"] = "cpu"
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
        elif (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():
            # torch reads it when it is loaded, which was before it was set where this is a run of a search.
            torch.set_num_threads(int(threads))
        from accelerate import PartialState

        # On a CPU the group must exist before the Accelerator, which otherwise takes every DeepSpeed process for rank 0.
        state = PartialState(cpu=not self.cuda, timeout=timeout)
        self.rank, self.num_ranks, self.device = state.process_index, state.num_processes, state.device
        if self.deepspeed and not dist.is_initialized():
            # ZeRO-1 in one process that no launcher started.
            dist.init_process_group("nccl" if self.cuda else "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        self._cpu_group = dist.new_group(backend="gloo") if self.num_ranks > 1 and self.cuda else None

    @classmethod
    def alone(cls) -> Distributed:
        """For one process by itself, whatever launched it: no group is made or left."""
        one = cls.__new__(cls)
        one.waiting, one.deepspeed, one.cuda = False, False, torch.cuda.is_available()
        one.rank, one.num_ranks, one._cpu_group = 0, 1, None
        one.device = torch.device("cuda", torch.cuda.current_device()) if one.cuda else torch.device("cpu")
        return one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """The element-wise sum of every rank's array, int64 or float64, on the CPU."""
        if self.num_ranks == 1:
            return values
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        with self._waiting():
            dist.all_reduce(tensor, group=self._cpu_group)
        return tensor.numpy()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(np.array([int(flag)], dtype=np.int64))[0])

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Only our own ranks talk here, so unpickling is safe."""
        if self.num_ranks == 1:
            return value
        box = [value]
        with self._waiting():
            dist.broadcast_object_list(box, src=0, group=self._cpu_group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank. Only our own ranks talk here, so unpickling is safe."""
        if self.num_ranks == 1:
            return [value]
        values = [None] * self.num_ranks
        with self._waiting():
            dist.all_gather_object(values, value, group=self._cpu_group)
        return values

    def on_main(self, function, *arguments) -> Any:
        """Run a function on rank 0 and give its result, or its error, to every rank."""
        result, error = None, None
        if self.is_main:
            try:
                result = function(*arguments)
            except Exception as caught:
                error = caught
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result

    def on_each_node(self, function) -> None:
        """Run a function on the first rank of each node, however long it takes; its error is raised on every rank."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function) if first else None
            # Waiting in one collective would end with its time-out, in a long download.
            while self.any(future is not None and not future.done()):
                time.sleep(0.2)
        for error in self.gather(future.exception() if future else None):
            if error is not None:
                raise error

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of every rank's tensor, on the device."""
        if self.num_ranks > 1:
            dist.all_reduce(values)
            values /= self.num_ranks
        return values

    def to_device(self, rows: np.ndarray) -> torch.Tensor:
        """Token ids as int64 on the device, without waiting for it."""
        tensor = torch.from_numpy(rows)
        if self.cuda:
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.long()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def close(self) -> None:
        """Leave the group; what follows is each rank's own."""
        if dist.is_initialized():
            dist.destroy_process_group()


def resolve_precision(precision: str, cuda: bool) -> str:
    """`auto` made concrete: bf16 where the hardware multiplies it, else fp32.

    Raises:
        ConfigError: for bf16 on a GPU that has none.
    """
    if cuda:
        has_bf16 = torch.cuda.get_device_capability()[0] >= 8
        if precision == "bf16" and not has_bf16:
            raise ConfigError(f"precision: {torch.cuda.get_device_name()} has no bf16; use --precision fp32")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return precision if precision != "auto" else "bf16" if has_bf16 else "fp32"
