"""Checkpoints: commit, verify, find, rotate, set aside.

A checkpoint is the folder `checkpoints/step-00000500` of

    model.safetensors      fp32 masters by name, as in GPT2LMHeadModel, vocabulary padded
    optimizer.safetensors  fp32 moments or momentum by name, NorMuon's by neuron, and AdamW's step
    rng.safetensors        the random generators of every rank
    state.json             step, tokens, the data stream's state, losses for finding spikes, the best loss
    MANIFEST.json          size and sha256 of each of these, topology, versions, hash of the configuration; written last

It does not depend on the number of ranks or the engine. A folder without a manifest that its files match does not count, and
no file is of a format that could run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from recipe.checkpoint_folders import MANIFEST, checkpoint_folders, step_of
from recipe.files import sha256, sync, sync_folder, write_json

_TEMPORARY = re.compile(r"\.step-\d{8,}\.tmp")
_MOMENTS = ("exp_avg.", "exp_avg_sq.", "momentum_buffer.", "second_momentum_buffer.")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. Says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    step: int

    def state(self) -> dict:
        """What state.json holds."""
        return json.loads((self.path / "state.json").read_text(encoding="utf-8"))

    def masters(self) -> dict[str, torch.Tensor]:
        """The fp32 weights by name."""
        return load_file(self.path / "model.safetensors")

    def full_state(self) -> dict[str, torch.Tensor]:
        """Masters, moments and step in the form of `Engine.full_state`."""
        masters = {f"model.{name}": tensor for name, tensor in self.masters().items()}
        return masters | load_file(self.path / "optimizer.safetensors")

    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors in `full_state`, which are not read for it."""
        shapes = {}
        for file, prefix in (("model", "model."), ("optimizer", "")):
            with safe_open(self.path / f"{file}.safetensors", framework="pt") as tensors:
                shapes |= {f"{prefix}{name}": torch.Size(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        return shapes

    def rng(self) -> dict[str, torch.Tensor]:
        """The generators of every rank; empty in a checkpoint from before they were saved."""
        path = self.path / "rng.safetensors"
        return load_file(path) if path.is_file() else {}


def save(
    folder: Path,
    full_state: dict[str, torch.Tensor],
    state: dict,
    step: int,
    about: dict | None = None,
    rng: dict[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Write a checkpoint below `folder` (`checkpoints`) and commit it. Rank 0 alone calls this.

    Args:
        about: what the manifest says beside step, tokens and files: topology, versions and the like, as JSON.
    Raises:
        CheckpointError: if the weights are not finite, or the disk has not the space.
        OSError: for a disk that becomes full and the like; older checkpoints are untouched.
    """
    not_finite = [n for n, t in full_state.items() if n.startswith("model.") and not bool(t.isfinite().all())]
    if not_finite:
        raise CheckpointError(f"step {step}: {not_finite[0]} is not finite; nothing was saved")
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    check_space(folder, sum(t.nbytes for t in full_state.values()), f"the checkpoint of step {step}")
    temporary.mkdir()
    try:
        _write(temporary, full_state, state, step, about or {}, rng or {})
        if target.exists():
            remove(target)
        os.replace(temporary, target)
    except (OSError, SafetensorError):
        # What was written of it would keep a full disk full.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder)
    return Checkpoint(target, step)


def _write(
    temporary: Path, full_state: dict[str, torch.Tensor], state: dict, step: int, about: dict, rng: dict[str, torch.Tensor]
) -> None:
    masters = {n.removeprefix("model."): t for n, t in full_state.items() if n.startswith("model.")}
    # The head is tied to the embedding: one tensor, stored once.
    save_file(masters, temporary / "model.safetensors", metadata={"format": "pt"})
    rest = {n: t for n, t in full_state.items() if n.startswith(_MOMENTS) or n == "step"}
    save_file(rest, temporary / "optimizer.safetensors", metadata={"format": "pt"})
    if rng:
        save_file(rng, temporary / "rng.safetensors", metadata={"format": "pt"})
    write_json(temporary / "state.json", {"step": step, **state})
    files = {}
    for path in sorted(temporary.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"step": step, "tokens": state["tokens"], "weights_finite": True, **about, "files": files}
    write_json(temporary / MANIFEST, manifest)


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise CheckpointError unless the file system of `folder` has room for `size` bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CheckpointError(
            f"{folder}: {what} takes {size / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB left; "
            "free some, and give the same command again"
        )


def _remove_leftovers(folder: Path) -> None:
    """Delete what saves that were killed have left."""
    for path in folder.glob(".step-*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def verify(path: Path) -> Checkpoint:
    """The checkpoint in `path`, after its files were compared with its manifest.

    Raises:
        CheckpointError: with the reason, if it is not whole.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: the folder does not exist; name a folder with a {MANIFEST}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if not {"model.safetensors", "optimizer.safetensors", "state.json"} <= manifest["files"].keys():
            raise CheckpointError(f"{path}: {MANIFEST} does not name all files")
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise CheckpointError(f"{path}: {name} is missing")
            if file.stat().st_size != expected["size"]:
                raise CheckpointError(f"{path}: {name} has {file.stat().st_size} bytes instead of {expected['size']}")
            if sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{path}: {name} is damaged (sha256 differs from the manifest)")
        # The manifest's own step has no checksum; state.json's has.
        found = Checkpoint(path, int(manifest["step"]))
        if found.state()["step"] != found.step:
            raise CheckpointError(f"{path}: {MANIFEST} is damaged (its step is not that of state.json)")
        return found
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no {MANIFEST}, so it was never finished") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} or a file cannot be read: {error}") from error


def find_newest(folder: Path, at_most: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below `folder` that is whole, and why newer ones were passed over.

    Args:
        at_most: a step; those behind it are not looked at.
    """
    skipped = []
    for path in reversed(checkpoint_folders(folder)):
        if at_most is not None and step_of(path) > at_most:
            continue
        try:
            return verify(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def rotate(
    folder: Path,
    keep: int,
    just_saved: Path | None = None,
    keep_every: int = 0,
    keep_best: bool = False,
    keep_steps: Collection[int] = (),
) -> list[str]:
    """Delete committed checkpoints but the newest `keep`, those at a multiple of `keep_every` steps and at `keep_steps`, with
    `keep_best` the one with the lowest validation loss, and the one just saved. What is not a checkpoint stays. If none
    of those to be kept is whole, nothing is deleted.

    Returns:
        what could not be deleted, and why.
    """
    committed = [p for p in checkpoint_folders(folder) if (p / MANIFEST).is_file()]
    kept = set(committed[-keep:])
    if keep_every:
        kept |= {p for p in committed if step_of(p) % keep_every == 0}
    kept |= {p for p in committed if step_of(p) in keep_steps}
    if keep_best:
        losses = {p: loss for p in committed if (loss := _validation_loss(p)) is not None}
        kept |= {min(losses, key=losses.get)} if losses else set()
    doomed = [p for p in committed if p not in kept and p != just_saved]
    # What was just saved has been read back already.
    if doomed and just_saved is None and not any(_is_whole(p) for p in sorted(kept, reverse=True)):
        return [f"{folder}: nothing is deleted, for none of the checkpoints to keep is whole"]
    failures = []
    for path in doomed:
        try:
            remove(path)
        except OSError as error:
            failures.append(f"{path} could not be deleted: {error}")
    return failures


def set_aside(folder: Path, start: Checkpoint) -> list[Path]:
    """Rename the checkpoints below `folder` that a run from `start` on leaves behind, so that they are not taken for its
    newest: those of later steps, and another of the same. They stay whole, as `superseded-step-...`.

    Returns:
        their new paths.
    """
    moved = []
    for path in checkpoint_folders(folder):
        if step_of(path) < start.step or path.resolve() == start.path.resolve():
            continue
        target, number = path.with_name(f"superseded-{path.name}"), 1
        while target.exists():
            number += 1
            target = path.with_name(f"superseded-{path.name}.{number}")
        os.replace(path, target)
        moved.append(target)
    if moved:
        sync_folder(folder)
    return moved


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that half of one never counts."""
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _validation_loss(path: Path) -> float | None:
    """The validation loss at the step of a checkpoint, if its manifest can be read and names one."""
    try:
        loss = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("val_loss")
    except (OSError, ValueError, AttributeError):
        return None
    return loss if isinstance(loss, float) else None
