"""Tokenizers: GPT-2's BPE from the Hub or a folder, or a byte-level BPE trained on the training text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recipe.config import ConfigError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from recipe.data.corpus import Corpus

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 32 << 20
"""Text that a `train:VOCAB_SIZE` tokenizer sees; more changes few merges."""

_PROBE = (
    "It's 12,345 o'clock;  the naïve Straße\n\n\tdef f(x):\r\n    return x[0] ** 2   # 中文 русский 🙂\x00\u200d "
    "<|endoftext|> http://example.org/a?b=c&d"
)
"""Text with contractions, digits, runs of white space, code, non-Latin letters, emoji, control characters and a
look-alike of the special token: the fast path must encode it as the reference does."""


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a Hub id or a folder (tokenizer.json, or vocab.json with merges.txt).

    Raises:
        ConfigError: if it cannot be loaded, is not a fast tokenizer, or has no end-of-text token.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    from recipe.remedies import explain

    folder = Path(name)
    try:
        if (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
            tokenizer = GPT2Tokenizer.from_pretrained(name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the Hub client, JSON and transformers raise a dozen types here; all mean the same
        where = "folder" if folder.exists() else "Hub id or folder"
        why = explain(error) if where != "folder" else None
        raise ConfigError(
            f"tokenizer: cannot load {where} {name}: {why or first_line(error)}; name a Hub id, a folder with vocab.json and "
            "merges.txt or tokenizer.json, or train:VOCAB_SIZE"
        ) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"tokenizer: {name} has no fast (tokenizers) implementation")
    if tokenizer.eos_token_id is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT  # a tokenizer.json alone does not say so
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"tokenizer: {name} has no end-of-text token, which separates the documents")
    return tokenizer


def obtain_tokenizer(
    name: str, training: Corpus, hold_out_part: bool, train_on: int = TRAINING_BYTES
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a configuration, or train it on the beginning of the training text.

    Args:
        name: Hub id, folder or `train:VOCAB_SIZE`.
        hold_out_part: what may be held out of `training` for validation stays unseen.
        train_on: bytes of text that one is trained on.
    Raises:
        ConfigError: if it cannot be loaded, or there is no text to train it on.
    """
    if not name.startswith("train:"):
        return load_tokenizer(name)
    from recipe.data.validation import LARGEST_SHARE

    held_out = training.text_bytes // LARGEST_SHARE if hold_out_part else 0
    texts, size = [], 0
    for text in (text for unit in training.units for text in training.read(unit)):
        size += len(text.encode("utf-8", "surrogatepass"))
        if size > held_out:
            texts.append(text)
        if size > held_out + train_on:
            break
    if not texts:
        raise ConfigError(f"tokenizer: {training.name} is too small to train a tokenizer on; name one instead")
    return train_tokenizer(texts, int(name.removeprefix("train:")))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with GPT-2's pre-tokenization.

    Args:
        texts: documents.
        vocab_size: tokens in all, the 256 bytes and the end-of-text token included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Documents to token ids, fast: for a byte-level BPE by tiktoken, built from the same vocabulary and merges (no
    download), 5 times as fast a core as `tokenizers`; for anything else by `tokenizers` itself.

    Special tokens in the text are text: a document that contains `<|endoftext|>` does not end there.
    """

    chunk = 16
    """Documents to encode at a time: about 11,000 tokens of FineWeb, so that the first batch waits for little."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        from tokenizers import Tokenizer

        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Without the added tokens, which tokenizers matches before anything else, a look-alike in the text stays text.
        state["added_tokens"] = []
        state["post_processor"] = None
        serialized = json.dumps(state, sort_keys=True, ensure_ascii=False)
        self.hash = hashlib.sha256(f"{tokenizer.eos_token_id} {serialized}".encode()).hexdigest()
        """SHA-256 of what defines the ids."""
        self.vocab_size = len(tokenizer)
        """Ids, special tokens included."""
        self.end_of_text = int(tokenizer.eos_token_id)
        self._reference = Tokenizer.from_str(serialized)
        self._reference.no_padding()
        self._reference.no_truncation()
        self._tiktoken = _build_tiktoken(state, self._reference)
        if self._tiktoken and self._tiktoken.encode_ordinary(_PROBE) != self._reference.encode(_PROBE).ids:
            self._tiktoken = None
        self.dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def is_fast(self) -> bool:
        """Whether tiktoken encodes."""
        return self._tiktoken is not None

    @property
    def engine(self) -> str:
        """What encodes, for people."""
        return "tiktoken" if self.is_fast else "tokenizers"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Each document as an array of ids, the end-of-text token in front."""
        if self._tiktoken:
            ids = [self._encode_fast(text) for text in texts]
        else:
            ids = [e.ids for e in self._reference.encode_batch_fast(texts, add_special_tokens=False)]
        return [np.array([self.end_of_text, *document], dtype=self.dtype) for document in ids]

    def text_bytes(self, text: str) -> int:
        """Size of a document in UTF-8."""
        return len(text.encode("utf-8", "surrogatepass"))

    def _encode_fast(self, text: str) -> list[int]:
        try:
            return self._tiktoken.encode_ordinary(text)
        except BaseException as error:
            # A million characters of white space overflow the stack of tiktoken's regex. pyo3's panic is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            return self._reference.encode(text, add_special_tokens=False).ids


def _build_tiktoken(state: dict, reference: Tokenizer):
    """A tiktoken Encoding with the ids of a serialized `tokenizers` byte-level BPE, or None if it is not one."""
    import tiktoken

    model, pre_tokenizer = state["model"], state["pre_tokenizer"] or {}
    plain_gpt2 = (
        model["type"] == "BPE"
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
        and state["normalizer"] is None
        and not model.get("byte_fallback")
        and not model.get("ignore_merges")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("dropout")
    )
    if not plain_gpt2:
        return None
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    vocab: dict[str, int] = model["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    tokens = [character for character in byte_of if character in vocab] + ["".join(pair) for pair in merges]
    if len(set(tokens)) != len(tokens) or any(token not in vocab for token in tokens):
        return None
    # tiktoken merges the pair of lowest id first: that is the order of the merges only if ids rise along them.
    merge_ids = [vocab["".join(pair)] for pair in merges]
    if len(tokens) != 256 + len(merges) or merge_ids != sorted(merge_ids):
        return None
    # It also looks up a whole piece at first, and merges any pair that makes a token: the same only if every token is what
    # the merges make of it.
    if any(len(reference.model.tokenize(token)) != 1 for token in tokens):
        return None
    return tiktoken.Encoding(
        "byte-level-bpe",
        pat_str=r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        mergeable_ranks={bytes(byte_of[character] for character in token): vocab[token] for token in tokens},
        special_tokens={},
    )


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself if printable in Latin-1, else the next code point from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
