"""Tokenise the text once: write the prepared folder that recipe/data/prepared.py reads.

The work is cut into files of tokens, each made by one process from start to end: written beside its place, made durable,
renamed, and only then recorded in the folder `unfinished`. Whatever moment the work is killed at, the same command verifies
what is recorded and makes the rest; a file is a function of the text and the tokenizer, so it comes out the same.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from recipe.config import INSTALLED_DOCS, Config, ConfigError
from recipe.data.corpus import Corpus, DataError, open_corpora
from recipe.data.prepared import PreparedCorpus
from recipe.data.token_files import Part, Worker, begin_worker, cut_into_parts, make_part
from recipe.data.token_index import (
    FORMAT,
    INDEX,
    TOKENIZER,
    UNFINISHED,
    UNIT_COLUMNS,
    VALIDATION,
    VERSION,
    file_facts,
    file_problem,
    is_half_prepared,
    is_prepared,
    read_index,
    write_index,
)
from recipe.files import sync, sync_folder, write_json, write_text
from recipe.publish.dataset_card import dataset_card
from recipe.tokenizer import Encoder, load_tokenizer, obtain_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENS_A_FILE = 64 << 20
"""Tokens of a file, about."""
FILES_A_WORKER = 4
"""At least, so that no worker is idle for long at the end."""
BEGUN = "begun.json"
"""In UNFINISHED: what the folder is made from, so that nothing else is mixed in."""
TRAINING = "training"


def prepare(config: Config, workers: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write, finish or repair the prepared folder config.output_dir.

    Args:
        workers: processes that tokenise.
        say: takes lines for the user.
    Returns:
        its index.
    Raises:
        ConfigError: if the folder holds something else or was begun with other data, the disk is too small, another process
            is at work there, or the data or the tokenizer cannot be had.
        DataError: if text cannot be read or tokens not written; what is done so far is kept.
    """
    folder = Path(config.output_dir).expanduser()
    _refuse_other_content(folder)
    (folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        # Where a derived corpus (installed-docs) is kept as long as the work lasts.
        training, validation = open_corpora(config.data, config.validation_data, config.text_column, folder / UNFINISHED)
        corpora = {TRAINING: training} | ({VALIDATION: validation} if validation else {})
        for name, corpus in corpora.items():
            if isinstance(corpus, PreparedCorpus):
                raise ConfigError(f"data: {corpus.folder}, the {name} text, is prepared already; name its text")
        begun = _what_was_begun(folder, say)
        identity = {name: corpora[name].fingerprint if name in corpora else None for name in (TRAINING, VALIDATION)}
        _refuse_other_text(folder, begun, identity)
        tokenizer = _tokenizer(folder, config, begun, training, validation is None, say)
        encoder = Encoder(tokenizer)
        tokens, needed = _estimate(corpora, encoder)
        _check_disk(folder, needed)
        if begun is None:
            text_bytes = sum(corpus.text_bytes for corpus in corpora.values())
            share = min(TOKENS_A_FILE / max(1, tokens), 1 / (FILES_A_WORKER * workers))
            begun = identity | {
                "tokenizer": _public_name(config.tokenizer),
                "tokenizer_hash": encoder.hash,
                "text_bytes_a_file": max(1, int(text_bytes * share)),
            }
        begun["tokenizer_files"] = file_facts(folder, TOKENIZER)
        write_json(folder / UNFINISHED / BEGUN, begun)
        parts = []
        for name, corpus in corpora.items():
            into = folder if name == TRAINING else folder / VALIDATION
            (into / UNFINISHED).mkdir(parents=True, exist_ok=True)
            for stale in into.glob(".*.tmp"):
                stale.unlink()
            parts += cut_into_parts(into, name, corpus, begun["text_bytes_a_file"])
        records = _make(parts, Worker(encoder, corpora, None, None), workers, say)
        return _finish(folder, config, corpora, encoder, begun, parts, records, say)


def _refuse_other_content(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: {folder} is a file; name a folder")
    ours = is_prepared(str(folder)) or is_half_prepared(str(folder))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise ConfigError(f"output_dir: {folder} holds something else than prepared tokens; name a new or empty folder")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / UNFINISHED / "lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"output_dir: another prepare_data.py is at work in {folder}") from error
        yield


def _what_was_begun(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """What the folder is made from: the content of begun.json, or the same from a finished folder's index."""
    path = folder / UNFINISHED / BEGUN
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    if not is_prepared(str(folder)):
        return None
    try:
        index = read_index(folder, "output_dir")
        return {
            TRAINING: index["fingerprint"],
            VALIDATION: index["validation"],
            **{name: index[name] for name in ("tokenizer", "tokenizer_hash", "text_bytes_a_file")},
            "tokenizer_files": {n: facts for n, facts in index["files"].items() if n.startswith(f"{TOKENIZER}/")},
        }
    except (ConfigError, KeyError) as error:
        say(f"{folder / INDEX} is damaged ({error}); making everything again")
        for stale in [folder / INDEX, *folder.rglob("tokens-*.bin"), *folder.rglob("documents-*.bin")]:
            stale.unlink()
        return None


def _refuse_other_text(folder: Path, begun: dict[str, Any] | None, identity: dict[str, Any]) -> None:
    if begun is None:
        return
    for name, ours in identity.items():
        theirs = begun[name]
        if theirs == ours:
            continue
        if theirs is None or ours is None:
            difference = f"it had {'a' if theirs else 'no'} separate {name} text, and now there is {'one' if ours else 'none'}"
        else:
            key = next(key for key in ours if theirs.get(key) != ours[key])
            before, now = theirs.get(key), ours[key]
            if isinstance(now, list) and isinstance(before, list):
                changed = [(b, n) for b, n in zip(before, now, strict=False) if b != n] or [(len(before), len(now))]
                before, now = changed[0]
            difference = f"{key} of the {name} text is {before} there and {now} now"
        raise ConfigError(f"output_dir: {folder} was begun with other data: {difference}; restore it, or name another folder")


def _tokenizer(
    folder: Path,
    config: Config,
    begun: dict[str, Any] | None,
    training: Corpus,
    hold_out_part: bool,
    say: Callable[[str], None],
) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, obtained and saved as `config` says if it is not there yet or damaged.

    Raises:
        ConfigError: if it gives other ids than what the folder was begun with.
    """
    path = folder / TOKENIZER
    if begun is not None:
        found = ((path.parent / name, file_problem(folder / name, facts)) for name, facts in begun["tokenizer_files"].items())
        problem = next((f"{name} {wrong}" for name, wrong in found if wrong), None)
        if problem is None and _public_name(config.tokenizer) == begun["tokenizer"] is not None:
            return load_tokenizer(str(path))
        if problem:
            say(f"{problem}; making it again")
    tokenizer = obtain_tokenizer(config.tokenizer, training, hold_out_part)
    made = Encoder(tokenizer).hash
    if begun is not None and made != begun["tokenizer_hash"]:
        raise ConfigError(
            f"output_dir: {folder} was begun with another tokenizer ({begun['tokenizer'] or 'a local one'} there, "
            f"{config.tokenizer} now); restore it, or name another folder"
        )
    temporary = folder / UNFINISHED / TOKENIZER
    for stale in (temporary, path):
        shutil.rmtree(stale, ignore_errors=True)
    tokenizer.save_pretrained(temporary)
    for file in temporary.rglob("*"):
        sync(file)
    os.replace(temporary, path)
    sync_folder(folder)
    saved = load_tokenizer(str(path))
    if Encoder(saved).hash != made:
        raise ConfigError(f"tokenizer: {config.tokenizer} gives other tokens when it is saved and loaded; name another")
    return saved


def _public_name(tokenizer: str) -> str | None:
    """A tokenizer's name for others to read: a Hub id or `train:VOCAB_SIZE`, but no path of this machine."""
    return None if os.path.exists(os.path.expanduser(tokenizer)) else tokenizer


def _estimate(corpora: dict[str, Corpus], encoder: Encoder) -> tuple[int, int]:
    """Tokens of all text and bytes on the disk, from a sample of each corpus."""
    all_tokens = all_bytes = 0.0
    for corpus in corpora.values():
        units = corpus.units[:: max(1, len(corpus.units) // 8)][:8]
        texts = [text for unit in units for text in islice(corpus.read(unit), 200)]
        size = max(1, sum(map(encoder.text_bytes, texts)))
        tokens = corpus.text_bytes * sum(map(len, encoder.encode(texts))) / size
        all_tokens += tokens
        all_bytes += tokens * np.dtype(encoder.dtype).itemsize + corpus.text_bytes * len(texts) / size * 8
    return int(all_tokens), int(all_bytes * 1.05)


def _check_disk(folder: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in folder.rglob("*.bin"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise ConfigError(
            f"output_dir: the tokens take about {(needed - there) / 1e9:,.1f} GB and {folder} has {free / 1e9:,.1f} GB free; "
            "make room, or name a folder on another disk"
        )


def _make(parts: list[Part], worker: Worker, workers: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The records of all parts, verified or made."""
    # Forking would copy the threads' locks of tokenizers and pyarrow in whatever state they are.
    context = multiprocessing.get_context("spawn")
    worker.done_bytes, worker.stop = context.Value("q", 0), context.Event()
    total = sum(unit.text_bytes for corpus in worker.corpora.values() for unit in corpus.units)
    records: dict[Part, dict[str, Any]] = {}
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", mininterval=0.5 if sys.stderr.isatty() else 30) as bar,
        ProcessPoolExecutor(min(workers, len(parts)), context, begin_worker, (worker,)) as pool,
    ):
        try:
            futures = {pool.submit(make_part, part): n for n, part in enumerate(parts)}
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                bar.update(worker.done_bytes.value - bar.n)
                for future in done:
                    records[futures[future]], problem = future.result()
                    if problem:
                        bar.clear()
                        say(f"{problem}; made again")
        except BaseException as error:
            worker.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise DataError("a tokenising process was killed, perhaps for want of memory; try fewer --workers") from error
            if isinstance(error, OSError):  # reading raises DataError
                raise DataError(f"cannot write the tokens: {error}") from error
            raise
    return [records[n] for n in range(len(parts))]


def _finish(
    folder: Path,
    config: Config,
    corpora: dict[str, Corpus],
    encoder: Encoder,
    begun: dict[str, Any],
    parts: list[Part],
    records: list[dict[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the indexes, the training text's last."""
    for name in (VALIDATION, TRAINING):
        if name not in corpora:
            continue
        into = folder if name == TRAINING else folder / VALIDATION
        own = [(part, record) for part, record in zip(parts, records, strict=True) if part.corpus == name]
        data = config.validation_data if name == VALIDATION and config.validation_data else config.data
        if name == VALIDATION:
            shutil.copytree(folder / TOKENIZER, into / TOKENIZER, dirs_exist_ok=True)
        index = _index(into, corpora[name], data, encoder, begun, own)
        index["validation"] = begun[VALIDATION] if name == TRAINING else None
        if name == TRAINING and not (folder / "README.md").exists():
            write_text(folder / "README.md", dataset_card(index))
        write_index(into, index)
    for done in (folder / VALIDATION / UNFINISHED, folder / UNFINISHED):
        shutil.rmtree(done, ignore_errors=True)
    return index


def _index(
    folder: Path,
    corpus: Corpus,
    data: str,
    encoder: Encoder,
    begun: dict[str, Any],
    parts: list[tuple[Part, dict[str, Any]]],
) -> dict[str, Any]:
    rows = []
    for part, record in parts:
        token = document = 0
        for position, (tokens, documents) in zip(part.units, record["units"], strict=True):
            unit = corpus.units[position]
            place = (part.number, token, tokens, document, documents)
            rows.append([unit.file, unit.start, unit.end, unit.text_bytes, *place])
            token, document = token + tokens, document + documents
    files = {name: facts for _, record in parts for name, facts in record["files"].items()} | file_facts(folder, TOKENIZER)
    local = not corpus.remote
    return {
        "format": FORMAT,
        "version": VERSION,
        "dtype": np.dtype(encoder.dtype).name,
        "vocab_size": encoder.vocab_size,
        "end_of_text": encoder.end_of_text,
        "tokenizer": begun["tokenizer"],
        "tokenizer_hash": encoder.hash,
        "tokens": sum(row[UNIT_COLUMNS.index("tokens")] for row in rows),
        "documents": sum(row[UNIT_COLUMNS.index("documents")] for row in rows),
        "text_bytes_a_file": begun["text_bytes_a_file"],
        # Of a local text only the names, for others to read: its fingerprint knows no more.
        "source": {
            "name": Path(data).name if local and data != INSTALLED_DOCS else data,
            "remote": corpus.remote,
            "text_column": corpus.text_column,
            "files": [Path(file).name if local else file for file in corpus.files],
            "sizes": corpus.sizes,
        },
        "fingerprint": corpus.fingerprint,
        "validation": None,
        "files": files,
        "unit_columns": UNIT_COLUMNS,
        "units": rows,
    }
