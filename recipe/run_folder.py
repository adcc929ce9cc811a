"""The run folder: claimed once, described before step 0, with a status that other programs can trust."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import yaml

from recipe.checkpoint_folders import committed_steps
from recipe.config import INSTALLED_DOCS, NOT_PART_OF_THE_RUN, Config, ConfigError, config_fields, to_yaml
from recipe.data.sources import is_local
from recipe.data.token_index import is_prepared
from recipe.files import read_json, write_json, write_text

PACKAGES = (
    "torch transformers accelerate datasets tokenizers tiktoken evaluate lm_eval deepspeed safetensors huggingface_hub "
    "numpy pyarrow triton"
).split()


LOCK_WAIT_S = 30
"""Seconds to wait for a run that is still saving in the folder."""
PATHS = ("data", "validation_data", "tokenizer")
"""Fields that may name a folder, which may lie elsewhere when the run goes on: the text is compared by its fingerprint, and
the tokenizer is kept in the run."""


def _is_path(value: str | None) -> bool:
    return value is not None and value != INSTALLED_DOCS and not value.startswith("train:") and is_local(value)


def _lock(handle: TextIO, seconds: float) -> bool:
    """Lock an open file; whether it came free in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


class RunFolder:
    """Paths of a run, and its status.json."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.evaluation = path / "eval"
        self.cache = path / "cache"
        self.metrics = path / "metrics.jsonl"
        self.positions = self.cache / "positions.jsonl"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.resumed = path / "resumed.json"
        self.config = path / "config.yaml"
        self._lock: TextIO | None = None

    def check(self, config: Config) -> bool:
        """Whether the folder holds a run already.

        Raises:
            ConfigError: if that run has another configuration (the differences named) or `resume none` was given.
        """
        if not self.config.is_file():
            if self.path.exists() and not self.path.is_dir():
                raise ConfigError(f"output_dir: {self.path} is a file; name a folder")
            if any(self.checkpoints.glob("step-*")):
                raise ConfigError(f"output_dir: {self.path} holds checkpoints but no config.yaml; choose another folder")
            return False
        if config.resume == "none":
            raise ConfigError(
                f"resume: {self.path} holds a run already; drop `resume none` to continue it, or choose another output_dir"
            )
        # A field that is newer than the run had its default then.
        defaults = {name: f.default for name, f in config_fields().items()}
        theirs = defaults | yaml.safe_load(self.config.read_text(encoding="utf-8"))
        # Text and its tokens are the same data: which tokens they are is compared when they are opened.
        prepared = any(is_prepared(data) for data in (theirs.get("data") or "", config.data))
        differing = [
            f"{name} is {theirs.get(name)} there and {getattr(config, name)} now"
            for name in config_fields()
            if name not in NOT_PART_OF_THE_RUN
            and theirs.get(name) != getattr(config, name)
            and not (name in PATHS and (prepared or _is_path(theirs.get(name)) and _is_path(getattr(config, name))))
        ]
        if differing:
            raise ConfigError(
                f"output_dir: {self.path} holds a run with another configuration: {'; '.join(differing)}; choose another "
                "output_dir, or give the same values to continue it"
            )
        return True

    def lock(self) -> None:
        """Keep other runs out of the folder until this process ends, however it ends.

        A run that was told to stop may still be saving: it is waited for.

        Raises:
            ConfigError: if another process trains here.
        """
        if self._lock is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        handle = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  (held until the process ends)
        if not _lock(handle, LOCK_WAIT_S):
            handle.seek(0)
            raise ConfigError(
                f"output_dir: {self.path} is being trained in by {handle.read().strip() or 'another process'}; "
                "stop it, or choose another output_dir"
            )
        self._lock = handle
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n")
        self._lock.flush()

    @property
    def locked(self) -> bool:
        """Whether this process keeps others out."""
        return self._lock is not None

    def wait_until_free(self, seconds: float) -> None:
        """Wait until no process trains here, so long at most."""
        with contextlib.suppress(FileNotFoundError), open(self.path / ".lock", "r+", encoding="utf-8") as handle:
            _lock(handle, seconds)

    def newest_step(self) -> int:
        """That of the newest finished checkpoint, -1 without one."""
        return max(committed_steps(self.checkpoints), default=-1)

    def read_status(self) -> dict[str, Any]:
        """What status.json says; empty if there is none."""
        return read_json(self.path / "status.json")

    def has_ended(self) -> bool:
        """Whether status.json says that the run was stopped or has failed."""
        return self.read_status().get("state") in ("stopped", "failed")

    def claim(self, config: Config, environment: dict) -> None:
        """Create and lock the folder and write config.yaml and environment.json; on a continued run they are rewritten."""
        self.lock()
        for folder in (self.path, self.checkpoints, self.evaluation, self.cache):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self.config, to_yaml(config))
        write_json(self.path / "environment.json", environment)

    def status(self, state: str, exit_code: int | None, step: int, tokens: int, reason: str = "", rank: int = 0) -> None:
        """Write status.json: state is running, finished, stopped or failed."""
        write_json(
            self.path / "status.json",
            {"state": state, "exit_code": exit_code, "step": step, "tokens": tokens, "reason": reason, "rank": rank},
        )


def describe_environment(num_ranks: int, engine: str, precision: str) -> dict:
    """Versions, hardware, commit and command of this start, as JSON."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware: dict = {"cpu": platform.machine(), "cores": os.cpu_count(), "platform": platform.platform()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver_version(),
        }
    return {
        "command": ["python", *sys.argv],
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "hardware": hardware,
        "ranks": num_ranks,
        "engine": engine,
        "precision": precision,
    }


def describe_tokenizer(tokenizer: Any) -> dict:
    """Which tokens a run is of, as JSON: losses compare, and vocabularies count among the parameters, only by these."""
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {"vocab_size": len(tokenizer), "vocab_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest()}


def _commit() -> str | None:
    """The project's commit, with `-dirty` behind it if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _driver_version() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no package, no driver, no permission: the record stays without it
        return None


def model_of(model_or_run: str) -> str:
    """What transformers can load: the export of a run folder, else the name as it is.

    Raises:
        ConfigError: for a run without an export.
    """
    folder = RunFolder(Path(model_or_run))
    if not folder.config.is_file():
        return model_or_run
    if not (folder.export / "config.json").is_file():
        raise ConfigError(f"{model_or_run} has no export yet; let the run finish")
    return str(folder.export)
