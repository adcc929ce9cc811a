"""Trackers of experiments, by Accelerate's classes: TensorBoard, Weights & Biases, Trackio. What goes to them is what
metrics.jsonl has anyway.

They talk to the network, so they have a thread of their own: none of their delays or errors reaches the training.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.config import Config, first_line

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
"""Any of which a tracker needs."""
QUEUE = 10_000
"""Records that wait for a tracker; more are dropped."""
PROJECT = "gpt2-recipe"
"""Name of the project at Weights & Biases and Trackio."""


def tracker_problems(config: Config) -> list[str]:
    """Why `report_to` cannot work here."""
    name = config.report_to
    if name == "none":
        return []
    if not any(importlib.util.find_spec(package) for package in PACKAGES[name]):
        return [
            f"report_to: the package {PACKAGES[name][0]} is not installed; pip install {PACKAGES[name][0]}, or drop report_to: "
            "metrics.jsonl has everything, too"
        ]
    if name == "wandb" and not _wandb_knows_the_user():
        return ["report_to: wandb does not know who you are; `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"]
    return []


def _wandb_knows_the_user() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") != "online":
        return True
    try:
        return bool(netrc.netrc(os.environ.get("NETRC")).authenticators("api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def make_tracker(name: str, folder: Path) -> GeneralTracker:
    """Accelerate's tracker of that name for the run in `folder`; a run that goes on, goes on there as well."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    if kind.requires_logging_directory:
        return kind("tensorboard", logging_dir=folder)
    options = {"name": folder.absolute().name, "resume": "allow"}
    if name == "wandb":
        identity = folder / "cache" / "wandb-id"
        if not identity.is_file():
            identity.write_text(secrets.token_hex(8), encoding="utf-8")
        options |= {"id": identity.read_text(encoding="utf-8"), "dir": str(folder)}
    return kind(PROJECT, **options)


class Reporter:
    """Gives records to a tracker, from a thread. Its first failure is a warning, the others are silent.

    Args:
        tracker: not started yet.
        settings: the run's, which it keeps beside the records.
        say: takes lines for the user.
    """

    def __init__(self, tracker: GeneralTracker, settings: dict[str, Any], say: Callable[[str], None]):
        self._tracker, self._settings, self._say = tracker, settings, say
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(QUEUE)
        self._warned = self._started = False
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def log(self, records: list[dict[str, Any]]) -> None:
        """Take records of metrics.jsonl, and return at once."""
        for record in records:
            try:
                self._queue.put_nowait(record)
            except queue.Full:
                self._warn("does not keep up; records are left out")
                return

    def finish(self, timeout: float) -> None:
        """Let it send what it has, for at most `timeout` seconds."""
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            pass
        else:
            self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"was not done {timeout:g} s after the training")

    def _run(self) -> None:
        self._started = self._try(self._start)
        while (record := self._queue.get()) is not None:
            values = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float) and v == v}
            if self._started and values:
                self._try(self._tracker.log, values, step=record["step"])
        if self._started:
            self._try(self._tracker.finish)

    def _start(self) -> None:
        self._tracker.start()
        # TensorBoard takes no None among them.
        self._tracker.store_init_configuration({k: v for k, v in self._settings.items() if v is not None})

    def _try(self, function: Callable, *arguments: Any, **named: Any) -> bool:
        try:
            function(*arguments, **named)
        except BaseException as error:  # SystemExit of a tracker's client among them
            self._warn(f"failed: {type(error).__name__}: {first_line(error)}")
            return False
        return True

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(
                f"warning: the tracker {self._tracker.name} {what}; the training goes on, and metrics.jsonl has everything"
            )


def start_reporting(config: Config, folder: Path, say: Callable[[str], None]) -> Reporter | None:
    """The reporter that `report_to` asks for, on rank 0, when the run folder is there."""
    if config.report_to == "none":
        return None
    from recipe.config import config_fields

    return Reporter(make_tracker(config.report_to, folder), {name: getattr(config, name) for name in config_fields()}, say)
