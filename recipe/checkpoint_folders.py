"""The folders of checkpoints, by their names alone. Imports no torch: what starts runs looks at them too."""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "MANIFEST.json"
"""Written last: a folder without it is no checkpoint."""
_NAME = re.compile(r"step-(\d{8,})")


def step_of(path: Path) -> int:
    """The step in the name of a folder."""
    return int(_NAME.fullmatch(path.name)[1])


def checkpoint_folders(folder: Path) -> list[Path]:
    """The folders named like checkpoints, by step."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, key=step_of)


def committed_steps(folder: Path) -> list[int]:
    """The steps of the folders below `folder` that have a manifest, in ascending order."""
    return [step_of(p) for p in checkpoint_folders(folder) if (p / MANIFEST).is_file()]
