"""When and how a run saves: a snapshot that the training waits for, and the writing behind it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from recipe import checkpoint
from recipe.checkpoint_folders import committed_steps
from recipe.config import Config, ConfigError, config_hash, parse_steps
from recipe.distributed import Distributed
from recipe.engine import Engine
from recipe.host_memory import HostMemory
from recipe.plan import Plan, count_parameters
from recipe.rng import gather_rng
from recipe.watchdog import Watchdog

LEAST_FREE = 16 * 2**20
"""Bytes that state, logs and samples may take beside the checkpoints."""


class Saver:
    """Writes checkpoints on rank 0, one at a time, in a thread, and keeps the folder tidy.

    The snapshot lies in memory of its own until it is written; the next save waits for that, so that there is one.

    Attributes:
        longest: seconds that the longest save took, snapshot and writing.
    """

    def __init__(self, folder: Path, config: Config, distributed: Distributed, watchdog: Watchdog):
        self.folder, self.config = folder, config
        self._distributed, self._watchdog = distributed, watchdog
        self._thread: threading.Thread | None = None
        self._memory = HostMemory(distributed.cuda)
        self._error: Exception | None = None
        self._done: list[dict[str, Any]] = []
        self.longest = 0.0

    def save(self, step: int, engine: Engine, state: dict, about: dict) -> None:
        """Take a snapshot and let it be written while the training goes on. Collective.

        Args:
            state: for state.json.
            about: for the manifest, beside topology and configuration.
        Raises:
            Exception: on every rank, what made the save before this one fail.
        """
        rng = gather_rng(self._distributed)
        began = time.monotonic()
        self.wait()
        alone = time.monotonic()  # the save before this one is no part of it
        full_state = engine.full_state(self._memory)
        result = {"step": step, "save_stall_seconds": time.monotonic() - began}
        if not self._distributed.is_main:
            return
        self._watchdog.writing_since = alone
        arguments = (full_state, state, about | self._circumstances(engine), rng, alone, result)
        # Not a daemon: an interpreter that ends in the ordinary way lets it finish.
        self._thread = threading.Thread(target=self._write, args=arguments, name="save")
        self._thread.start()

    def _circumstances(self, engine: Engine) -> dict[str, Any]:
        ranks = self._distributed.num_ranks
        return {
            "topology": {
                "ranks": ranks,
                "ranks_a_node": int(os.environ.get("LOCAL_WORLD_SIZE", ranks)),
                "engine": type(engine).__name__,
                "precision": engine.precision,
            },
            "config_sha256": config_hash(self.config),
        }

    def failed(self) -> bool:
        """Whether the last save failed, on rank 0: the next `wait` raises it on every rank."""
        return self._error is not None

    def results(self) -> list[dict[str, Any]]:
        """On rank 0, once for each save that is done: step, stall and whole duration in seconds, bytes, path and what could not
        be deleted."""
        results, self._done = self._done, []
        return results

    def wait(self) -> None:
        """Until nothing is being written. Collective.

        Raises:
            Exception: on every rank, what made the save fail.
        """
        self._distributed.on_main(self.finish)

    def finish(self, timeout: float | None = None) -> None:
        """Wait for what is being written, on rank 0 alone; for at most `timeout` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(
        self, full_state: dict[str, torch.Tensor], state: dict, about: dict, rng: dict, began: float, result: dict
    ) -> None:
        step = result["step"]
        try:
            saved = checkpoint.save(self.folder, full_state, state, step, about, rng)
            config = self.config
            result["failures"] = checkpoint.rotate(
                self.folder,
                config.keep_checkpoints,
                saved.path,
                config.keep_every,
                config.keep_best,
                parse_steps(config.save_at),
            )
            result["path"] = saved.path
            result["save_bytes"] = sum(path.stat().st_size for path in saved.path.iterdir())
            result["save_seconds"] = time.monotonic() - began
            self.longest = max(self.longest, result["save_seconds"])
            self._done.append(result)
        except (OSError, SafetensorError) as error:
            self._error = checkpoint.CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}; the "
                "older ones are as they were. Make room or repair the disk, and give the same command again"
            )
        except Exception as error:
            self._error = error
        finally:
            self._watchdog.writing_since = None


def check_disk(folder: Path, config: Config, plan: Plan, vocab_size: int) -> None:
    """Whether the disk holds the checkpoints that the run will keep, beside those that are there, and the export.

    Raises:
        ConfigError: with the numbers.
    """
    parameters = count_parameters(config, vocab_size)
    size = 4 * parameters * 3  # masters and two moments, fp32; Muon has less
    there = committed_steps(folder)
    kept_for_good = len(parse_steps(config.save_at))
    saves = kept_for_good + (plan.max_steps // config.save_every + 1 if config.save_every else 1)
    kept = kept_for_good + config.keep_checkpoints + 1 + config.keep_best  # a new one is whole before an old one goes
    kept += plan.max_steps // config.keep_every if config.keep_every else 0
    missing = max(1, min(saves, kept) - len(there))
    needed = missing * size + 4 * parameters + LEAST_FREE
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"output_dir: {missing} more checkpoints of {size / 2**20:,.0f} MiB and the export need {needed / 2**20:,.0f} MiB "
            f"in {folder.parent}, and the disk has {free / 2**20:,.0f} MiB left; free some, lower keep_checkpoints, or choose "
            "another output_dir"
        )
