"""What may be uploaded of a run: named files, and nothing else."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from recipe.files import write_json
from recipe.publish.redaction import holds_token
from recipe.run_folder import RunFolder

MARKER = "run.json"
"""In an export and at the root of each branch that a run pushes: which run's it is."""
TRAINING_CONFIG = "training_config.yaml"
LOSS_CURVE = "loss.png"
STATE_FOLDER = "training_state"

EXPORT_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "vocab.json", "merges.txt", "README.md", TRAINING_CONFIG, LOSS_CURVE, MARKER,
)  # fmt: skip
"""Of RUN/export, beside .eval_results/*.yaml."""
REQUIRED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", MARKER)
STATE_FILES = ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json", "rng.safetensors")
"""Of a checkpoint; older ones have no rng.safetensors."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


class ContentsError(RuntimeError):
    """Something must not, or cannot, be uploaded; the message says what to do."""


def export_files(export: Path) -> dict[str, Path]:
    """The files of an export that may be uploaded, by their path in the repository.

    Raises:
        ContentsError: if it is not whole, or one of them is a link or holds an access token.
    """
    missing = [name for name in REQUIRED_FILES if not (export / name).is_file()]
    if missing:
        raise ContentsError(f"{export} is no whole export: {', '.join(missing)} missing; let the run finish")
    found = {name: export / name for name in EXPORT_FILES if (export / name).exists()}
    results = (export / ".eval_results").glob("*.yaml")
    return _checked(found | {f".eval_results/{path.name}": path for path in sorted(results)})


def state_files(checkpoint: Path, tokenizer: Path, metrics: Path) -> dict[str, Path]:
    """What continues a run: the files of its checkpoint, its tokenizer and a copy of its metrics.

    Raises:
        ContentsError: as `export_files`.
    """
    missing = [name for name in STATE_FILES[:4] if not (checkpoint / name).is_file()]
    if missing:
        raise ContentsError(f"{checkpoint} is no whole checkpoint: {', '.join(missing)} missing")
    found = {f"{STATE_FOLDER}/{name}": checkpoint / name for name in STATE_FILES if (checkpoint / name).exists()}
    found |= {f"{STATE_FOLDER}/tokenizer/{name}": tokenizer / name for name in _TOKENIZER_FILES if (tokenizer / name).exists()}
    return _checked(found | {f"{STATE_FOLDER}/metrics.jsonl": metrics})


def _checked(files: dict[str, Path]) -> dict[str, Path]:
    for path in files.values():
        if path.is_symlink() or path.parent.is_symlink() or not path.is_file():
            raise ContentsError(f"{path} is not a plain file; nothing was uploaded")
        if holds_token(path):
            raise ContentsError(f"{path} holds an access token; revoke the token, and remove it from the file")
    return files


class HubRecord:
    """RUN/hub.json: the run's name for itself, and what it has made and pushed on the Hub."""

    def __init__(self, folder: RunFolder):
        self._path = folder.path / "hub.json"
        self._value: dict[str, Any] = {"run_id": None, "created": [], "pushed": {}, "resumed_from": None}
        self._read()

    def _read(self) -> None:
        if self._path.is_file():
            self._value |= json.loads(self._path.read_text(encoding="utf-8"))

    @property
    def run_id(self) -> str:
        """32 hex digits, drawn once for a run; the same on another machine that resumes it from the Hub."""
        if self._value["run_id"] is None:
            self._set(run_id=uuid.uuid4().hex)
        return self._value["run_id"]

    def is_mine(self, run_id: str | None) -> bool:
        """Whether the run has this name; draws none."""
        return run_id is not None and run_id == self._value["run_id"]

    @property
    def resumed_from(self) -> str | None:
        """The commit that the run was continued from, if that came from the Hub."""
        return self._value["resumed_from"]

    def adopt(self, run_id: str, commit: str) -> None:
        """Be the run that pushed `commit`."""
        self._set(run_id=run_id, resumed_from=commit)

    def creates(self, repo: str) -> None:
        """Noted before a repository is made, so that one without our marker is known after a crash."""
        if repo not in self._value["created"]:
            self._set(created=[*self._value["created"], repo])

    def created(self, repo: str) -> bool:
        return repo in self._value["created"]

    def pushed(self, repo: str, branch: str) -> str | None:
        """The last commit of ours there, as far as this folder knows."""
        return self._value["pushed"].get(f"{repo}@{branch}")

    def note_push(self, repo: str, branch: str, commit: str) -> None:
        self._read()
        self._set(pushed=self._value["pushed"] | {f"{repo}@{branch}": commit})

    def _set(self, **values: Any) -> None:
        self._read()  # another process may push as well
        self._value |= values
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._value)
