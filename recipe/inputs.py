"""What a run reads: its text, its tokenizer, its validation rows and HellaSwag's items."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np

from recipe.config import Config
from recipe.data.corpus import Corpus, open_corpora
from recipe.data.prepared import PreparedCorpus, encoder_for, load_prepared_tokenizer
from recipe.data.validation import check_length, count_target_bytes, hold_out, read_validation_rows
from recipe.distributed import Distributed
from recipe.evaluation.items import read_items
from recipe.plan import Plan
from recipe.run_folder import RunFolder
from recipe.tokenizer import Encoder, load_tokenizer, obtain_tokenizer


class Inputs:
    """Opened on every rank, with the tokenizer, which says how large the model is; `read` does the rest. Collective.

    Attributes:
        hellaswag_items: empty if the run does not evaluate them.
        training: the text, without what is held out.
        encoder: for `training`.
        vocab_encoder: of the tokenizer itself, which knows the size of the vocabulary.
        validation_rows: token ids [rows, sequence + 1].
        summary: one line about their sizes.
    Raises:
        ConfigError: for text, a tokenizer or items that cannot be had.
    """

    def __init__(self, config: Config, plan: Plan, folder: RunFolder, distributed: Distributed):
        self._config, self._folder, self._distributed = config, folder, distributed
        self.hellaswag_items: list[dict[str, Any]] = []
        if config.hellaswag_every:
            self.hellaswag_items = distributed.on_main(read_items, config.evaluate_data, config.hellaswag_items)
        training, validation = distributed.on_main(
            open_corpora, config.data, config.validation_data, config.text_column, folder.cache
        )
        for corpus in (training, validation):
            if isinstance(corpus, PreparedCorpus):
                distributed.on_each_node(corpus.fetch)
        self.tokenizer = distributed.on_main(self._obtain_tokenizer, training, validation is None)
        self._opened = training, validation, plan.total_tokens

    def read(self) -> None:
        """Read the validation rows, and find out whether the text lasts for the run. Collective.

        Raises:
            ConfigError: for text that cannot be read or does not last for the run.
        """
        config, distributed = self._config, self._distributed
        training, validation, tokens = self._opened
        self.vocab_encoder = Encoder(self.tokenizer)
        self.encoder = encoder_for(training, self.vocab_encoder, "data")
        self.validation_rows, self.training = self._split_validation(training, validation)
        length, epochs = config.sequence_length, config.max_epochs
        checked = distributed.on_main(check_length, self.training, self.encoder, length, tokens, epochs, config.packing)
        self.summary = f"{checked}; {self.validation_rows.shape[0] * config.sequence_length:,} validation tokens"

    @cached_property
    def validation_hash(self) -> str:
        return hashlib.sha256(self.validation_rows.tobytes()).hexdigest()

    @cached_property
    def validation_bytes(self) -> int:
        """UTF-8 size of the text that the validation rows' targets stand for."""
        return count_target_bytes(self.validation_rows, self.tokenizer)

    def _obtain_tokenizer(self, training: Corpus, hold_out_part: bool) -> Any:
        if isinstance(training, PreparedCorpus):
            return load_prepared_tokenizer(training, self._config.tokenizer)
        saved = self._folder.cache / "tokenizer"
        if saved.is_dir():
            return load_tokenizer(str(saved))
        return obtain_tokenizer(self._config.tokenizer, training, hold_out_part)

    def _split_validation(self, training: Corpus, validation: Corpus | None) -> tuple[np.ndarray, Corpus]:
        length, tokens = self._config.sequence_length, self._config.validation_tokens
        if validation is None:
            return self._distributed.on_main(hold_out, training, self.encoder, length, tokens)
        encoder = encoder_for(validation, self.vocab_encoder, "validation_data")
        return self._distributed.on_main(read_validation_rows, validation, encoder, length, tokens), training
