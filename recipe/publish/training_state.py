"""Continuing a run from what it has pushed: `resume hub:USER/NAME@REVISION`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from recipe import checkpoint
from recipe.checkpoint import Checkpoint
from recipe.checkpoint_folders import MANIFEST, committed_steps
from recipe.config import ConfigError, first_line
from recipe.distributed import Distributed
from recipe.publish.contents import MARKER, STATE_FOLDER, HubRecord
from recipe.publish.redaction import redact
from recipe.run_folder import RunFolder


def pull_on_main(resume: str, folder: RunFolder, distributed: Distributed) -> Checkpoint | None:
    """`pull_state` on rank 0, its result or error on every rank, however long the download takes. Collective."""
    pulled: list[Checkpoint | None] = []

    def pull() -> None:
        if distributed.is_main:
            pulled.append(pull_state(resume, folder))

    distributed.on_each_node(pull)
    return distributed.broadcast(pulled[0] if pulled else None)


def pull_state(resume: str, folder: RunFolder) -> Checkpoint | None:
    """Download and verify the training state that `resume` names, and give the run its tokenizer and metrics.

    Returns:
        the checkpoint, outside of RUN/checkpoints; None if the run has been continued from it already and has checkpoints of
        its own since: the same command, given again, goes on from the newest.
    Raises:
        ConfigError: if the Hub does not have it or cannot be reached, or it is damaged.
    """
    from huggingface_hub import HfApi, get_token, snapshot_download

    repo, _, revision = resume.removeprefix("hub:").partition("@")
    api = HfApi(token=get_token() or False)
    try:
        info = api.repo_info(repo, revision=revision)
        if f"{STATE_FOLDER}/{MANIFEST}" not in {sibling.rfilename for sibling in info.siblings or ()}:
            raise ConfigError(
                f"resume: {repo} has no training state at {revision}; it was pushed without push_state (--with_state). "
                f"--init_from {repo}@{revision} starts a new run from its weights"
            )
        record = HubRecord(folder)
        if record.resumed_from == info.sha and committed_steps(folder.checkpoints):
            return None
        place = folder.cache / f"hub-{info.sha[:12]}"
        folder.cache.mkdir(parents=True, exist_ok=True)
        patterns = [f"{STATE_FOLDER}/*", MARKER]
        snapshot_download(repo, revision=info.sha, allow_patterns=patterns, local_dir=place, token=api.token)
        state = place / STATE_FOLDER
        found = checkpoint.verify(state)
        run_id = json.loads((place / MARKER).read_text(encoding="utf-8"))["run_id"]
    except ConfigError:
        raise
    except checkpoint.CheckpointError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise ConfigError(f"resume: what {repo} holds at {revision} is not whole: {error}") from error
    except Exception as error:  # the client raises a dozen types for no connection, no token, no repository, no revision
        raise ConfigError(f"resume: {resume} cannot be had: {redact(first_line(error))}") from error
    if not (folder.cache / "tokenizer").exists():
        shutil.copytree(state / "tokenizer", folder.cache / "tokenizer")
    if not folder.metrics.exists():
        shutil.copyfile(state / "metrics.jsonl", folder.metrics)
    record.adopt(run_id, info.sha)
    return found


def keep_pulled(found: Checkpoint, folder: RunFolder) -> None:
    """Make what `pull_state` gave a checkpoint of the run, and remove the rest of the download."""
    target = folder.checkpoints / f"step-{found.step:08d}"
    names = [*json.loads((found.path / MANIFEST).read_text(encoding="utf-8"))["files"], MANIFEST]
    target.mkdir()
    for name in names:  # the manifest last: until then it does not count
        os.replace(found.path / name, target / name)
    shutil.rmtree(_download(found.path), ignore_errors=True)


def is_pulled(found: Checkpoint, folder: RunFolder) -> bool:
    """Whether a checkpoint is one that `pull_state` gave."""
    return _download(found.path).parent == folder.cache


def _download(state: Path) -> Path:
    return state.parent
