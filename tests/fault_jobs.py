"""Jobs of several ranks for the fault tests, forked from one preloaded parent: 2 to 4 s a start instead of 17 to 27."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from fault_rank import run_rank
from forked import context
from launch import TINY, free_port, options, read_ledger
from recipe.files import sha256

STEPS = 12
SMALL = TINY | {
    "sequence_length": 32, "batch_tokens": 512, "micro_batch_size": 4, "max_steps": STEPS, "save_every": 1, "log_every": 1,
    "warmup_steps": 3, "validation_tokens": 512, "keep_checkpoints": 99, "keep_best": "false", "precision": "fp32",
    "data_workers": 0, "max_epochs": 50,
}  # fmt: skip


class Job:
    """A run of `ranks` processes in `folder`; `faults` are (rank, name, options) as in fault_rank.py."""

    def __init__(self, folder: Path, text: Path, engine: str, ranks: int = 2, faults: list = (), **fields: object):
        self.folder, self.engine, self.ranks = folder, engine, ranks
        self.logs = folder.with_name(folder.name + "-logs")
        self.logs.mkdir(exist_ok=True)
        for fired in self.logs.glob("fired-*"):
            fired.unlink()
        for log in self.logs.glob("rank-*.log"):
            log.unlink()
        arguments = options(**(SMALL | {"data": text, "output_dir": folder} | fields))
        port = free_port()
        self.processes = [
            context.Process(target=run_rank, args=(rank, ranks, engine, port, str(self.logs), arguments, list(faults)))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 90) -> list[int]:
        """The exit codes by rank, negative for signals."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if hung:
            self.kill()
            raise AssertionError(f"ranks {hung} run for longer than {seconds} s\n{self.output()}")
        return [process.exitcode for process in self.processes]

    def succeed(self) -> Job:
        codes = self.wait()
        assert codes == [0] * self.ranks, f"{codes}\n{self.output()}"
        return self

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(self.ranks):
            os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        """SIGKILL to all ranks; each must still have been there."""
        for process in self.processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def fired(self, rank: int) -> bool:
        return (self.logs / f"fired-{rank}").exists()

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.logs.glob("rank-*.log")))

    def wait_for(self, condition, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"it did not come to that\n{self.output()}"
            assert any(p.is_alive() for p in self.processes), f"the job has ended before\n{self.output()}"
            time.sleep(0.005)

    def wait_for_checkpoint(self, step: int) -> None:
        self.wait_for((checkpoint_path(self.folder, step) / "MANIFEST.json").is_file)

    def ledger(self) -> dict[tuple[int, int], str]:
        """The hash of the row at each (step, place) that any start of the run trained on."""
        return read_ledger(self.logs)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def hashes(folder: Path, step: int) -> list[str]:
    """Of weights and optimizer state."""
    return [sha256(checkpoint_path(folder, step) / name) for name in ("model.safetensors", "optimizer.safetensors")]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())
