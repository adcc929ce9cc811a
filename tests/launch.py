"""Start the project as a user does: `accelerate launch --config_file ... scripts/pretrain.py ...`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from recipe.launches import descendants

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN = str(ROOT / "scripts" / "pretrain.py")

TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 32, "sequence_length": 64, "batch_tokens": 1024, "micro_batch_size": 4,
    "tokenizer": "train:400", "learning_rate": 1e-3, "warmup_steps": 10, "validation_tokens": 2048, "eval_every": 0,
    "sample_every": 0, "save_every": 0, "evaluate_tasks": "none", "log_every": 10,
}  # fmt: skip
"""A model that trains a step in milliseconds."""


def options(**fields: object) -> list[str]:
    """Fields as command-line words."""
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def accelerate_command(accelerate_file: str, *arguments: str, script: str = PRETRAIN) -> list[str]:
    """The launch of a script with one of configs/accelerate."""
    config = str(ROOT / "configs" / "accelerate" / f"{accelerate_file}.yaml")
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, script, *arguments]


def environment(**extra: str) -> dict[str, str]:
    """An environment without network access to the Hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": "", **extra}


def launch(accelerate_file: str, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run to the end and assert success; the output is in the error message otherwise."""
    done = subprocess.run(
        accelerate_command(accelerate_file, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to the workers and their launcher, and wait until they are gone."""
    pids = descendants(process.pid)
    assert pids, "the launcher has no workers"
    for pid in [*pids, process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.01)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Training losses in the order of the steps, each step once."""
    records = [r for r in metrics(run) if "train_loss" in r]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["train_loss"] for r in records]


def read_ledger(folder: Path) -> dict[tuple[int, int], str]:
    """The hash of the row at each (step, place) that any start of a run read, from its `ledger-*.jsonl`; one that was read
    again must have been the same."""
    seen: dict[tuple[int, int], str] = {}
    for path in folder.glob("ledger-*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                step, place, digest = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            assert seen.setdefault((step, place), digest) == digest, f"step {step} row {place} differs when read again"
    return seen
