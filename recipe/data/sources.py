"""Where the text comes from: what the fields `data` and `validation_data` name, as a list of files.

On the Hub (`datasets` resolves name, config, split and revision to files), in a local folder, file or glob, or made of the
documentation of the installed packages. recipe/data/corpus.py reads them.
"""

from __future__ import annotations

import os
import re
from glob import glob
from itertools import takewhile
from pathlib import Path

from recipe.config import INSTALLED_DOCS, ConfigError, first_line

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl.gz", ".json.gz": "jsonl.gz", ".txt": "txt"}
"""Formats by file ending."""

_VALIDATION = re.compile(r"(?<![a-z])(validation|valid|val|dev)(?![a-z])")
_TEST = re.compile(r"(?<![a-z])(test|testing)(?![a-z])")
_TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")


def is_local(data: str) -> bool:
    """Whether `data` names something on this machine rather than a dataset on the Hub."""
    looks_like_path = data.startswith(("/", ".", "~")) or bool(set(data) & set("*?[")) or file_format(data) is not None
    return looks_like_path or os.path.exists(data) or not _HUB_ID.fullmatch(data)


def hub_id(data: str) -> tuple[str, str | None]:
    """Repository and revision of a Hub dataset."""
    parts = _HUB_ID.fullmatch(data)
    return parts["repo"], parts["revision"]


def check_data_exists(name: str, data: str) -> list[str]:
    """Problems with a local `data` that show without opening it; `name` is the field."""
    from recipe.data.token_index import is_half_prepared, is_prepared

    if data == INSTALLED_DOCS or not is_local(data) or is_prepared(data):
        return []
    if is_half_prepared(data):
        return [f"{name}: {data} is half prepared; finish it with the command that began it (scripts/prepare_data.py)"]
    if local_text_files(data):
        return []
    if os.path.exists(os.path.expanduser(data)):
        return [f"{name}: {data} holds no {', '.join(FORMATS)} files"]
    return [f"{name}: {data} does not exist; give a folder, file or glob, or a Hub dataset USER/NAME[:config][@revision]"]


def find_files(data: str, cache: Path, name: str) -> dict[str, list[str]]:
    """The files of `data` by split: `train` and `validation`, either of which may be empty.

    Args:
        cache: the run's folder for what it derives (installed-docs).
        name: the field that `data` is the value of, for messages.
    Raises:
        ConfigError: for what is not there.
    """
    if data == INSTALLED_DOCS:
        folder = _installed_docs(cache)
        return {"train": local_text_files(f"{folder}/train-*"), "validation": local_text_files(f"{folder}/validation-*")}
    if is_local(data):
        problems = check_data_exists(name, data)
        if problems:
            raise ConfigError(*problems)
        files, root = local_text_files(data), _named_folder(data)
        splits = {f: _split(Path(f).relative_to(root)) for f in files}
        training, validation = ([f for f in files if splits[f] == split] for split in ("train", "validation"))
        # A lone file, or a folder of files that all look like one split, is what the user asked to train on.
        return {"train": training or files, "validation": validation if training else []}
    return _resolve_hub(data, name)


def _named_folder(data: str) -> Path:
    """The folder that local `data` names itself, or in which its file or all that its glob matches lies."""
    path = Path(os.path.expanduser(data))
    if path.is_dir():
        return path
    return path.parent if path.is_file() else Path(*takewhile(lambda part: not set(part) & set("*?["), path.parts))


def _split(path: Path) -> str:
    """`train`, `validation` or `test`: what the file's name says, else the last folder of the relative path that names one."""
    name, *folders = (part.lower() for part in reversed(path.parts))
    for part in (name, *folders):
        if _VALIDATION.search(part):
            return "validation"
        if _TEST.search(part):
            return "test"
        # Of a file, `train` says nothing: validation/train-trips.txt is for validation.
        if part is not name and _TRAIN.search(part):
            break
    return "train"


def _installed_docs(cache: Path) -> Path:
    """The corpus of installed documentation in `cache`, built at first: a later `pip install` would change its text, so a
    run keeps the one that it began with."""
    from recipe.data.installed_docs import build_installed_docs

    built = sorted(cache.glob("installed-docs-*"))
    return built[0] if built else build_installed_docs(cache)


def _resolve_hub(data: str, name: str) -> dict[str, list[str]]:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled, RevisionNotFoundError

    from recipe.remedies import explain

    parts = _HUB_ID.fullmatch(data)
    try:
        builder = load_dataset_builder(parts["repo"], parts["config"], revision=parts["revision"])
    except DatasetNotFoundError as error:
        if known := explain(error):
            raise ConfigError(f"{name}: {known}") from error
        raise ConfigError(
            f"{name}: {data} is neither a local path nor a dataset that the Hub shows to you; check the spelling, or log "
            "in with `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{name}: {parts['repo']} has no revision {parts['revision']}") from error
    except (ConnectionError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{name}: the Hub cannot be reached for {data} ({first_line(error)}); check the network, or use local text "
            "(--data FOLDER) or --data installed-docs"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{name}: {data}: {first_line(error)}") from error
    except Exception as error:  # what the Hub answers comes as one of a dozen types
        if known := explain(error):
            raise ConfigError(f"{name}: {known}") from error
        raise
    files = builder.config.data_files or {}
    if not files:
        raise ConfigError(f"{name}: {data} has no data files that `datasets` can list")
    return {"train": list(files.get("train", [])), "validation": list(files.get("validation", []))}


def local_text_files(data: str) -> list[str]:
    """The text files that a folder, file or glob on this machine names, sorted."""
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        found = [str(p) for p in Path(path).rglob("*") if not any(n.startswith(".") for n in p.relative_to(path).parts)]
    elif os.path.isfile(path):
        found = [path]
    else:
        found = glob(path, recursive=True)
    return sorted(f for f in found if file_format(f) and os.path.isfile(f) and not Path(f).name.startswith("."))


def file_format(path: str) -> str | None:
    """One of FORMATS, by the file's ending; None for another."""
    return next((FORMATS[ending] for ending in FORMATS if path.lower().endswith(ending)), None)
