"""Checkpoints: commit, verify, find, rotate.

A checkpoint is the folder `checkpoints/step-00000500` of

    model.safetensors      fp32 masters by name, as in GPT2LMHeadModel, vocabulary padded
    optimizer.safetensors  fp32 moments or momentum by name, and AdamW's step
    state.json             step, tokens, the data stream's state, best losses
    MANIFEST.json          size and sha256 of each of these, written last

It does not depend on the number of ranks or the engine. A folder without a manifest that its files match does not count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recipe.files import sha256, sync, sync_folder, write_json

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step-(\d{8,})")
_MOMENTS = ("exp_avg.", "exp_avg_sq.", "momentum_buffer.")


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


def save(folder: Path, full_state: dict[str, torch.Tensor], state: dict, step: int) -> Checkpoint:
    """Write a checkpoint below `folder` (`checkpoints`) and commit it. Rank 0 alone calls this.

    Raises:
        CheckpointError: if the weights are not finite.
        OSError: for a full disk and the like; older checkpoints are untouched.
    """
    not_finite = [n for n, t in full_state.items() if n.startswith("model.") and not bool(t.isfinite().all())]
    if not_finite:
        raise CheckpointError(f"step {step}: {not_finite[0]} is not finite; nothing was saved")
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    masters = {n.removeprefix("model."): t for n, t in full_state.items() if n.startswith("model.")}
    # The head is tied to the embedding: one tensor, stored once.
    save_file(masters, temporary / "model.safetensors", metadata={"format": "pt"})
    rest = {n: t for n, t in full_state.items() if n.startswith(_MOMENTS) or n == "step"}
    save_file(rest, temporary / "optimizer.safetensors", metadata={"format": "pt"})
    write_json(temporary / "state.json", {"step": step, **state})
    files = {}
    for path in sorted(temporary.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(temporary / MANIFEST, {"step": step, "tokens": state["tokens"], "files": files})
    if target.exists():
        remove(target)
    os.replace(temporary, target)
    sync_folder(folder)
    return Checkpoint(target, step)


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read: {error}") from error


def find_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint below `folder` that is whole, and why newer ones were passed over."""
    skipped = []
    for path in reversed(_folders(folder)):
        try:
            return verify(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def rotate(folder: Path, keep: int, just_saved: Path | None = None) -> None:
    """Delete all but the newest `keep` committed checkpoints; what is not a checkpoint stays, and so does the one just saved,
    which is not the newest in a run that went back to an earlier step."""
    committed = [p for p in _folders(folder) if (p / MANIFEST).is_file()]
    for path in committed[:-keep]:
        if path != just_saved:
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint, its manifest first, so that half of one never counts."""
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    """The folders named like checkpoints, by step."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]))
