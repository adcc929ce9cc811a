"""Tokens instead of text: what scripts/prepare_data.py wrote, read by memory map in place of the text it was made from.

A prepared folder holds the documents of a Corpus, unit by unit, as token ids; the same units, documents and sizes give the
same rows, checkpoints and validation set as the text does, without a tokenizer at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from recipe.config import ConfigError, DataConfig, first_line
from recipe.data.corpus import Corpus, DataError, Unit, open_corpora
from recipe.data.sources import hub_id, is_local
from recipe.data.token_index import (
    INDEX,
    REDO,
    TABLE_DTYPE,
    TOKENIZER,
    UNIT_COLUMNS,
    VALIDATION,
    documents_file,
    is_prepared,
    read_index,
    size_problem,
    tokens_file,
)
from recipe.tokenizer import Encoder, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Place(NamedTuple):
    """Where the documents of a unit lie."""

    part: int
    """Number of the files."""
    first_token: int
    tokens: int
    first_document: int
    documents: int


class TokenDocument(NamedTuple):
    """A document of a PreparedCorpus."""

    tokens: np.ndarray
    """Ids, end-of-text in front; they lie in the memory map."""
    text_bytes: int
    """Size of its text in UTF-8."""


@dataclass
class PreparedCorpus(Corpus):
    """A Corpus whose documents are TokenDocuments. Pickled, it carries no tokens: every process maps the files itself, and
    the processes of a node share the memory."""

    index: dict[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None
    """Its folder; None for one on the Hub that this process has not located yet."""
    repo: tuple[str, str] | None = None
    """Id and commit of the Hub dataset that it is from."""
    subfolder: str = ""
    """Of the Hub dataset."""
    places: dict[tuple[int, int], Place] = field(default_factory=dict, repr=False)
    """By file and start of the unit."""
    _maps: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # A map would be pickled with all it shows; and the Hub's cache may lie elsewhere on another node.
        return {**self.__dict__, "_maps": {}, "path": None if self.repo else self.path}

    @property
    def folder(self) -> Path:
        """Where the files are on this node; `fetch` must have run here for one on the Hub."""
        if self.path is None:
            from huggingface_hub import snapshot_download

            repo, commit = self.repo
            found = snapshot_download(repo, repo_type="dataset", revision=commit, local_files_only=True)
            self.path = Path(found) / self.subfolder
        return self.path

    @property
    def over_network(self) -> bool:
        """No, wherever the text was: the tokens are on the disk."""
        return False

    @property
    def tokens(self) -> int:
        """Tokens of an epoch, without those held out for validation."""
        held_out = sum(int(self._table(unit)[: unit.skip, 0].sum(dtype=np.int64)) for unit in self.units if unit.skip)
        return sum(self._place(unit).tokens for unit in self.units) - held_out

    def fetch(self) -> None:
        """Download what is on the Hub, and check that every file is there in its size. Once a node.

        Raises:
            ConfigError: naming the first file that is missing or has another size, and the remedy.
        """
        if self.repo:
            from huggingface_hub import snapshot_download

            repo, commit = self.repo
            try:
                snapshot_download(repo, repo_type="dataset", revision=commit)
            except Exception as error:  # the Hub client raises a dozen types; the remedy is one
                raise ConfigError(
                    f"data: cannot download {repo}@{commit}: {first_line(error)}; start again to go on"
                ) from error
        for name, facts in self.index["files"].items():
            path = self.folder / name
            problem = size_problem(path, facts)
            if problem:
                remedy = f"delete {self.folder} and start again" if self.repo else f"run {REDO}, which makes it again"
                raise ConfigError(f"data: {path} {problem}; {remedy}")

    def with_units(self, units: list[Unit]) -> PreparedCorpus:
        return replace(self, units=units)

    def read(self, unit: Unit) -> Iterator[TokenDocument]:
        """The documents of a unit, in the order of the text, without those held out.

        Raises:
            DataError: naming the file, if its content contradicts the index.
        """
        place = self._place(unit)
        table, tokens = self._table(unit), self._map(place.part)[0]
        ends = place.first_token + np.cumsum(table[:, 0], dtype=np.int64)
        if len(table) != place.documents or (len(ends) and ends[-1] != place.first_token + place.tokens):
            path = self.folder / documents_file(place.part)
            raise DataError(f"cannot read {path}: its content is not what {INDEX} says; run {REDO}")
        starts = ends - table[:, 0]
        facts = (starts, ends, table[:, 1])
        for start, end, size in zip(*(column[unit.skip :].tolist() for column in facts), strict=True):
            yield TokenDocument(tokens[start:end], size)

    def describe(self, unit: Unit) -> list[dict[str, str | None]]:
        """Nothing of each document that `read` gives: only the text's files have `id` and `url`, see `source`."""
        return [{} for _ in range(self._place(unit).documents - unit.skip)]

    def source(self, data: str | None, cache: Path) -> Corpus | None:
        """The text that the tokens were made from, with the same units and documents.

        Args:
            data: where it is now; None for a text on the Hub, of which the index knows the files and their commit.
            cache: as for `open_corpora`.
        Returns:
            None if it was on some machine and `data` does not say where.
        Raises:
            ConfigError: if `data` is another text, or cannot be read.
        """
        if data is None:
            if not self.remote:
                return None
            return Corpus(self.name, self.files, self.sizes, self.units, self.text_column, remote=True)
        text, _ = open_corpora(data, None, self.text_column, cache)
        if isinstance(text, PreparedCorpus):
            raise ConfigError(f"source: {data} holds tokens; name the text that they were made from")
        if text.fingerprint != self.index["fingerprint"]:
            raise ConfigError(f"source: {data} is not the text that the tokens in {self.folder} were made from ({self.name})")
        return text

    def _place(self, unit: Unit) -> Place:
        return self.places[unit.file, unit.start]

    def _table(self, unit: Unit) -> np.ndarray:
        """Tokens and bytes of each of the unit's documents, held-out ones included."""
        place = self._place(unit)
        return self._map(place.part)[1][place.first_document : place.first_document + place.documents]

    def _map(self, part: int) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._maps:
            tokens = _map_file(self.folder / tokens_file(part), np.dtype(self.index["dtype"]).newbyteorder("<"))
            table = _map_file(self.folder / documents_file(part), TABLE_DTYPE)
            self._maps[part] = tokens, table.reshape(-1, 2)
        return self._maps[part]


class TokenEncoder:
    """Plays the Encoder for a PreparedCorpus, whose documents are encoded already."""

    engine = "prepare_data.py"
    chunk = 1000
    """Documents to take at a time: a shuffled window."""

    def __init__(self, corpus: PreparedCorpus):
        self.dtype = np.dtype(corpus.index["dtype"]).type
        self.hash: str = corpus.index["tokenizer_hash"]
        """As Encoder.hash."""
        self.vocab_size: int = corpus.index["vocab_size"]
        self.end_of_text: int = corpus.index["end_of_text"]

    def encode(self, documents: list[TokenDocument]) -> list[np.ndarray]:
        """Each document's ids, the end-of-text token in front."""
        return [document.tokens for document in documents]

    def text_bytes(self, document: TokenDocument) -> int:
        """Size of a document in UTF-8."""
        return document.text_bytes


def open_prepared(data: str, config_field: str) -> tuple[PreparedCorpus, PreparedCorpus | None] | None:
    """Prepared training and validation text, or None if `data` is something else.

    Args:
        data: a folder, or a Hub dataset `USER/NAME[@revision]`, which is asked for its index.
        config_field: the field that names `data`, for messages.
    Raises:
        ConfigError: for an index that is damaged or of a later version.
    """
    if is_prepared(data):
        folder, repo = Path(data).expanduser(), None
    elif is_local(data) or ":" in data:
        return None
    else:
        found = _hub_file(*hub_id(data), INDEX)
        if found is None or not is_prepared(str(found.parent)):
            return None
        # In the Hub's cache a file's folder is called by the commit.
        folder, repo = found.parent, (hub_id(data)[0], found.parent.name)
    training = _open(folder, repo, "", config_field)
    if not training.index["validation"]:
        return training, None
    if repo:
        _hub_file(*repo, f"{VALIDATION}/{INDEX}")
    return training, _open(folder / VALIDATION, repo, VALIDATION, config_field)


def encoder_for(corpus: Corpus, encoder: Encoder, config_field: str) -> Encoder | TokenEncoder:
    """What makes the tokens of `corpus`: `encoder`, or for a prepared one its own.

    Raises:
        ConfigError: if a prepared corpus was made by another tokenizer than `encoder`.
    """
    if not isinstance(corpus, PreparedCorpus):
        return encoder
    own = TokenEncoder(corpus)
    if own.hash != encoder.hash:
        raise ConfigError(
            f"{config_field}: {corpus.name} was prepared with another tokenizer than that of the training text; prepare it "
            "with the same, or name its text"
        )
    return own


def load_prepared_tokenizer(corpus: PreparedCorpus, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer that made the corpus.

    Args:
        name: the configuration's `tokenizer`: the default, the folder's own, or one that gives the same ids.
    Raises:
        ConfigError: if `name` gives other ids, or the folder's tokenizer does.
    """
    path, made_by = corpus.folder / TOKENIZER, corpus.index["tokenizer_hash"]
    tokenizer = load_tokenizer(str(path))
    if Encoder(tokenizer).hash != made_by:
        raise ConfigError(f"tokenizer: {path} is not what made the tokens beside it; run {REDO}, which makes it again")
    if name not in (DataConfig.tokenizer, corpus.index["tokenizer"], str(path)) and (
        name.startswith("train:") or Encoder(load_tokenizer(name)).hash != made_by
    ):
        with_what = corpus.index["tokenizer"] or "another tokenizer"
        raise ConfigError(
            f"tokenizer: {name} gives other tokens than those in {corpus.folder}, which were made with {with_what}; leave "
            "`tokenizer` out, or prepare the text again"
        )
    return tokenizer


def _open(folder: Path, repo: tuple[str, str] | None, subfolder: str, config_field: str) -> PreparedCorpus:
    index = read_index(folder, config_field)
    source = index["source"]
    rows = [dict(zip(UNIT_COLUMNS, row, strict=True)) for row in index["units"]]
    return PreparedCorpus(
        name=source["name"],
        files=source["files"],
        sizes=source["sizes"],
        units=[Unit(row["file"], row["start"], row["end"], row["text_bytes"]) for row in rows],
        text_column=source["text_column"],
        remote=source["remote"],
        index={name: value for name, value in index.items() if name != "units"},
        path=None if repo else folder,
        repo=repo,
        subfolder=subfolder,
        places={(row["file"], row["start"]): Place(*(row[name] for name in Place._fields)) for row in rows},
    )


def _hub_file(repo: str, revision: str | None, name: str) -> Path | None:
    """A small file of a Hub dataset, downloaded; None if it is not there, or the Hub is not."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
    except Exception:  # no such file is the usual case; what else is wrong shows when the data is looked for in other forms
        return None


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype)  # which cannot be mapped
    # As a plain array: slices of a memmap cost ten times as much.
    return np.asarray(np.memmap(path, dtype, mode="r"))
