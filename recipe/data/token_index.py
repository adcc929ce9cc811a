"""The format of a prepared folder: its files, its index, and whether they are whole.

index.json            what it was made from and by, where the tokens of each unit lie, size and SHA-256 of every file
tokens-00000.bin ...  ids of consecutive units, uint16 or uint32, little endian, end-of-text in front of each document
documents-00000.bin   for each document of the tokens file its number of tokens and its size in UTF-8, both uint32
tokenizer/            what made the ids
validation/           the same for the validation text, if that is apart
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recipe.config import ConfigError
from recipe.files import sha256, write_text

FORMAT, VERSION = "gpt2-recipe-tokens", 1
INDEX, UNFINISHED, VALIDATION, TOKENIZER = "index.json", "unfinished", "validation", "tokenizer"
"""Names in a prepared folder; UNFINISHED is the folder that only a half-prepared one holds."""
UNIT_COLUMNS = ("file", "start", "end", "text_bytes", "part", "first_token", "tokens", "first_document", "documents")
"""Columns of the index's units."""
TABLE_DTYPE = np.dtype("<u4")
"""Of documents-*.bin."""
REDO = "scripts/prepare_data.py with the same configuration and folder"


def tokens_file(part: int) -> str:
    """Name of a file of tokens."""
    return f"tokens-{part:05d}.bin"


def documents_file(part: int) -> str:
    """Name of the table of the documents in `tokens_file(part)`."""
    return f"documents-{part:05d}.bin"


def is_prepared(data: str) -> bool:
    """Whether `data` is a prepared folder on this machine."""
    path = Path(data).expanduser() / INDEX
    if not path.is_file():
        return False
    with open(path, "rb") as handle:  # the format comes first; the rest may be megabytes
        return f'"{FORMAT}"'.encode() in handle.read(200)


def is_half_prepared(data: str) -> bool:
    """Whether `data` is a folder that prepare_data.py has begun and not finished."""
    folder = Path(data).expanduser()
    return (folder / UNFINISHED).is_dir() and not (folder / INDEX).exists()


def size_problem(path: Path, facts: dict[str, Any]) -> str | None:
    """What is wrong with a file's size, or None; `facts` has `size` in bytes."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == facts["size"] else f"has {size:,} bytes instead of {facts['size']:,}"


def file_problem(path: Path, facts: dict[str, Any]) -> str | None:
    """What is wrong with a file's size or content, or None; `facts` has `size` in bytes and `sha256`."""
    damaged = "is damaged: its SHA-256 is not what was recorded"
    return size_problem(path, facts) or (None if sha256(path) == facts["sha256"] else damaged)


def read_index(folder: Path, config_field: str) -> dict[str, Any]:
    """The index of a prepared folder.

    Raises:
        ConfigError: if it is missing, damaged or of a later version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{config_field}: cannot read {path}: {error}; run {REDO}, or download it again") from error
    if index["version"] > VERSION:
        raise ConfigError(f"{config_field}: {path} has version {index['version']} and this recipe reads {VERSION}; update it")
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index of a folder whose files are all there, atomically, with one unit or file a line."""
    lines = []
    for name, value in index.items():
        text = json.dumps(value, ensure_ascii=False)
        if name == "units":
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n]"
        elif name == "files":
            text = "{\n" + ",\n".join(f"  {json.dumps(n)}: {json.dumps(facts)}" for n, facts in value.items()) + "\n}"
        lines.append(f'"{name}": {text}')
    write_text(folder / INDEX, "{\n" + ",\n".join(lines) + "\n}\n")


def file_facts(folder: Path, subfolder: str) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of the files in a subfolder, by path in `folder`."""
    paths = sorted(path for path in (folder / subfolder).rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in paths}


def find_damage(folder: Path) -> list[str]:
    """What is wrong with the files of a prepared folder, by size and SHA-256: a line each, with the remedy.

    Raises:
        ConfigError: if it is no prepared folder.
    """
    if not is_prepared(str(folder)):
        state = "only half prepared" if is_half_prepared(str(folder)) else "no prepared folder"
        raise ConfigError(f"output_dir: {folder} is {state}")
    apart = read_index(folder, "output_dir")["validation"] is not None
    problems = []
    for place in (folder, folder / VALIDATION) if apart else (folder,):
        for name, facts in read_index(place, "output_dir")["files"].items():
            problem = file_problem(place / name, facts)
            if problem:
                problems.append(f"{place / name} {problem}; run {REDO}, which makes it again")
    return problems
