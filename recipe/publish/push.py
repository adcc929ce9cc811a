"""Pushing a run: its export to main, its checkpoints to branches, on request what continues it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import Config
from recipe.files import read_json_lines, write_text
from recipe.publish.card import exported_step
from recipe.publish.contents import HubRecord, export_files, state_files
from recipe.publish.hub import MAIN, HubRepo, retrying
from recipe.run_folder import RunFolder

if TYPE_CHECKING:
    from recipe.checkpoint import Checkpoint


@dataclass(frozen=True)
class Destination:
    """Where a run is pushed to, and how."""

    repo: str
    """USER/NAME."""
    private: bool = True
    into_existing: bool = False
    with_state: bool = False
    """Push what continues the run as well."""

    @staticmethod
    def of(config: Config) -> Destination:
        """What the configuration says; push_to_hub must be set."""
        return Destination(config.push_to_hub, config.hub_private, config.hub_into_existing, config.push_state)

    def open(self, folder: RunFolder) -> HubRepo:
        """The repository, made or checked.

        Raises:
            HubError: if the run may not push there.
        """
        repo = self._repo(folder)
        repo.prepare()
        return repo

    def look(self, folder: RunFolder) -> str:
        """What `open` would do, in a few words, without doing it.

        Raises:
            HubError: if the run may not push there.
        """
        return self._repo(folder).look()

    def _repo(self, folder: RunFolder) -> HubRepo:
        return HubRepo(self.repo, HubRecord(folder), self.private, self.into_existing)


def branch_of(step: int) -> str:
    return f"step-{step}"


def push_export(
    folder: RunFolder, destination: Destination, say: Callable[[str], None], branch: str = MAIN, patience: float = 0
) -> None:
    """Push RUN/export and, with state, the checkpoint that it was made of.

    Args:
        patience: seconds to try for, while the Hub does not answer.
    Raises:
        ContentsError: if something is missing or must not be uploaded; nothing was.
        HubError: if the Hub does not take it.
    """
    step = exported_step(folder, folder.export)
    state = folder.checkpoints / f"step-{step:08d}" if destination.with_state else None
    _push(folder, destination, folder.export, state, step, branch, patience, say)


def push_checkpoint(
    folder: RunFolder,
    found: Checkpoint,
    destination: Destination,
    say: Callable[[str], None],
    branch: str | None = None,
    patience: float = 0,
) -> None:
    """Export a checkpoint and push it to a branch of its own, `step-N`.

    Raises:
        ExportError: if the export does not compute what was trained.
        ContentsError, HubError: as `push_export`.
    """
    from recipe.publish.export import export_checkpoint

    with _scratch(folder) as temporary:
        export = temporary / "export"
        export_checkpoint(folder, found, export, say)
        state = found.path if destination.with_state else None
        _push(folder, destination, export, state, found.step, branch or branch_of(found.step), patience, say)


def _push(
    folder: RunFolder,
    destination: Destination,
    export: Path,
    state: Path | None,
    step: int,
    branch: str,
    patience: float,
    say: Callable[[str], None],
) -> None:
    with _scratch(folder) as temporary:
        parts = [(export_files(export), f"Step {step:,}", "the export")]
        if state is not None:
            metrics = temporary / "metrics.jsonl"
            lines = [json.dumps(record) for record in read_json_lines(folder.metrics) if record["step"] <= step]
            write_text(metrics, "".join(f"{line}\n" for line in lines))
            files = state_files(state, folder.cache / "tokenizer", metrics)
            parts.append((files, f"Training state of step {step:,}", "the training state"))
        repo = retrying(lambda: destination.open(folder), patience, say)
        for files, message, what in parts:
            pushed = retrying(partial(repo.push, files, branch, message), patience, say)
            verb = f"pushed {what} to" if pushed.changed else f"{what} is already on"
            say(f"{verb} {destination.repo}@{branch}, commit {pushed.commit[:12]}")


@contextmanager
def _scratch(folder: RunFolder) -> Iterator[Path]:
    """A folder in RUN/cache that is gone afterwards; those of processes that were killed go, too."""
    for path in folder.cache.glob("push-*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.cache, prefix=f"push-{os.getpid()}-") as temporary:
        yield Path(temporary)
