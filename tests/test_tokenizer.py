"""The tokenizers: what loads, what is refused, and that the fast path gives the reference's ids."""

import json
import random
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from corpus_helpers import open_training, read_all
from recipe.config import ConfigError
from recipe.tokenizer import END_OF_TEXT, Encoder, load_tokenizer, train_tokenizer

TRAINING_TEXT = [
    f"It's the {n}th river, they're told; we've 12,345 stones and the garden's wall.\n\n\tdef f(x):\r\n    return x[{n}] ** 2\n"
    f"Die Straße über den Fluß, naïve café; русский язык {n}; 中文文本和更多的字; 🙂🙂 {' ' * (n % 9)}end   \n"
    for n in range(200)
]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TRAINING_TEXT, 700)


@pytest.fixture(scope="module")
def json_folder(trained, tmp_path_factory) -> Path:
    """tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("json")
    trained.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merges_folder(trained, tmp_path_factory) -> Path:
    """vocab.json and merges.txt alone, as GPT-2 was published."""
    folder = tmp_path_factory.mktemp("merges")
    merges = json.loads(trained.backend_tokenizer.to_str())["model"]["merges"]
    (folder / "vocab.json").write_text(json.dumps(trained.get_vocab()), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["trained", "tokenizer.json", "vocab.json and merges.txt"])
def tokenizer(request, trained, json_folder, merges_folder) -> PreTrainedTokenizerFast:
    """The same vocabulary, come by in three ways."""
    if request.param == "trained":
        return trained
    return load_tokenizer(str(json_folder if request.param == "tokenizer.json" else merges_folder))


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory) -> Path:
    """A tokenizer of whole words, which tiktoken cannot do."""
    vocab = {"[UNK]": 0, "<eos>": 1, "the": 2, "river": 3, ".": 4}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>").save_pretrained(folder)
    return folder


def byte_level(merges: list[tuple[str, str]], ids: list[int] | None = None, eos: str = END_OF_TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE with these merges; `ids` reorders the merged tokens' ids."""
    vocab = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for n, pair in enumerate(merges):
        vocab["".join(pair)] = 256 + (ids[n] if ids else n)
    for special in (END_OF_TEXT, "<|pad|>"):
        vocab[special] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos)


def reference(encoder: Encoder, texts: list[str]) -> list[np.ndarray]:
    """What `tokenizers` makes of the texts."""
    fast, encoder._tiktoken = encoder._tiktoken, None
    try:
        return encoder.encode(texts)
    finally:
        encoder._tiktoken = fast


def assert_same(encoder: Encoder, texts: list[str]) -> None:
    assert encoder.is_fast
    for text, ids, expected in zip(texts, encoder.encode(texts), reference(encoder, texts), strict=True):
        assert ids.tolist() == expected.tolist(), repr(text)
        assert ids.dtype == expected.dtype


PIECES = [
    *["'s", "'S", "'ll", "'re", "''", "’s", "don't", "I'VE", "the", " the", "123", "1,234.5", "½", "²", "Ⅷ", "٣", "x1y2"],
    *[" ", "  ", "\t", "\n", "\r\n", "\n\n", "\u00a0", "\u2003", "\u2028", "\u3000", "\u0085", "\x1c", "\x0b", "\u200b"],
    *["def f(x):\n    return x", "{'a': [1, 2]}", '<div class="x">', "a_b->c", "#!/bin/sh", "\\n", "$x = @y;", "===", "//"],
    *["Straße", "cafe\u0301", "İ", "русский", "中文", "日本語", "한국어", "עברית", "العربية", "हिन्दी", "ไทย", "ﬁ", "𝔘𝔫𝔦"],
    *[
        "🙂",
        "👩\u200d👩\u200d👧",
        "🏳️\u200d🌈",
        "\ufe0f",
        "\ufeff",
        "\ufffd",
        "\uffff",
        "\U0010ffff",
        "\U000e0001",
        "\x00",
        "\x7f",
    ],
    *["<|endoftext|>", "<|endoftext|", "< |endoftext|>", "[UNK]", "<s>", "</s>", "<|im_start|>", "<pad>", "\u0120", "\u010a"],
]


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(1, 30)):
        kind = rng.randrange(6)
        if kind < 3:
            parts.append(rng.choice(PIECES) * rng.choice([1, 1, 1, 2, 5]))
        elif kind == 3:
            parts.append(rng.choice([" ", "\n", "\t", "\u00a0", "\u3000"]) * rng.randrange(1, 40))
        elif kind == 4:
            parts.append("".join(chr(rng.randrange(32, 0x3000)) for _ in range(rng.randrange(1, 8))))
        else:
            codes = (rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]) for _ in range(4))
            parts.append("".join(map(chr, codes)))
    return "".join(parts)


def test_fast_path_gives_the_ids_of_tokenizers_on_random_text(tokenizer):
    rng = random.Random(0)
    assert_same(Encoder(tokenizer), [random_text(rng) for _ in range(1500)] + TRAINING_TEXT[:5])


def test_fast_path_classifies_characters_as_tokenizers_does():
    """Merges of a letter, digit, sign or space with the first byte of any longer character show in which class of
    GPT-2's pattern a character falls. Every block of Unicode is sampled."""
    stand_ins = dict(zip(range(0xC2, 0xF5), [chr(c) for c in range(0xC2, 0xF5)], strict=True))
    merges = [(first, stand_ins[byte]) for first in ("a", "1", "!", "Ġ") for byte in stand_ins]
    encoder = Encoder(byte_level(merges))
    codes = [*range(0x80, 0x3100), *range(0x3100, 0xD800, 17), *range(0xE000, 0x20000, 7), *range(0x20000, 0x110000, 997)]
    text = "".join(f"a{c}1{c}!{c} {c} a" for c in map(chr, codes))
    assert_same(encoder, [text])
    merged = {text: len(encoder.encode([text])[0]) - 1 for text in ("aé", "1é", "!é", "1²", "a²", "!—", "a—", "!\u3000")}
    assert merged == {"aé": 2, "1é": 3, "!é": 3, "1²": 2, "a²": 3, "!—": 3, "a—": 4, "!\u3000": 4}


def test_fast_path_cuts_contractions_as_tokenizers_does():
    letters = "sdmtlvreSDMTLVRExy"
    encoder = Encoder(byte_level([("'", letter) for letter in letters]))
    texts = [f"a'{one}{other} a 'x{one}''{other}" for one in letters for other in letters]
    assert_same(encoder, texts)
    assert [len(encoder.encode([text])[0]) for text in ("a's", "a'S", "a'x")] == [3, 4, 4]


def test_long_runs_of_white_space(tokenizer):
    encoder = Encoder(tokenizer)
    runs = [character * length + tail for character in " \n\t\u3000" for length in (1000, 30_000) for tail in ("", "x", "\n")]
    assert_same(encoder, runs)


def test_a_million_spaces(trained):
    encoder = Encoder(trained)
    texts = ["a" + " " * 1_000_001 + "b", "the next document"]
    expected = reference(encoder, texts)
    try:
        ids = encoder.encode(texts)
    except BaseException as error:  # noqa: B036
        pytest.fail(f"{type(error).__name__}: {error}")
    assert [i.tolist() for i in ids] == [e.tolist() for e in expected]


def test_merges_that_never_make_a_token_are_not_given_to_tiktoken():
    encoder = Encoder(byte_level([("b", "c"), ("a", "b"), ("ab", "c")]))
    texts = ["abc", "xabc abcabc ab bc"]
    assert [i.tolist() for i in encoder.encode(texts)] == [i.tolist() for i in reference(encoder, texts)]


def test_ids_that_do_not_rise_with_the_merges_fall_back():
    encoder = Encoder(byte_level([("b", "c"), ("a", "b")], ids=[1, 0]))
    assert not encoder.is_fast
    assert len(encoder.encode(["abc"])[0]) == 1 + 2


def test_a_vocabulary_of_bytes_alone_is_fast():
    encoder = Encoder(train_tokenizer(["hello hello"], 257))
    assert encoder.vocab_size == 257
    assert_same(encoder, ["hello\x00 é"])
    assert len(encoder.encode(["hello\x00 é"])[0]) == 1 + 9


@pytest.mark.parametrize("pre_tokenizer", [{"add_prefix_space": True}, {"use_regex": False}])
def test_other_byte_level_pre_tokenizers_fall_back(trained, pre_tokenizer):
    state = json.loads(trained.backend_tokenizer.to_str())
    state["pre_tokenizer"].update(pre_tokenizer)
    changed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=END_OF_TEXT)
    encoder = Encoder(changed)
    assert not encoder.is_fast
    text = "the river's  end"
    assert encoder.encode([text])[0].tolist()[1:] == changed(text)["input_ids"]


def test_normalizing_tokenizer_falls_back(trained):
    from tokenizers import normalizers

    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT))
    assert not encoder.is_fast
    assert encoder.encode(["THE RIVER"])[0].tolist() == encoder.encode(["the river"])[0].tolist()


def test_every_document_begins_with_end_of_text(tokenizer):
    encoder = Encoder(tokenizer)
    texts = ["", "the", "two words", "\n"]
    for encode in (encoder.encode, lambda texts: reference(encoder, texts)):
        documents = encode(texts)
        assert [int(ids[0]) for ids in documents] == [encoder.end_of_text] * 4
        assert [tokenizer.decode(ids[1:]) for ids in documents] == texts
        assert not any(encoder.end_of_text in ids[1:] for ids in documents)
    assert encoder.end_of_text == tokenizer.convert_tokens_to_ids(END_OF_TEXT) == tokenizer.eos_token_id


def test_no_documents_give_no_arrays(tokenizer):
    encoder = Encoder(tokenizer)
    assert encoder.encode([]) == reference(encoder, []) == []


def test_look_alike_of_end_of_text_stays_text(tokenizer):
    encoder = Encoder(tokenizer)
    text = f"before{END_OF_TEXT}after {END_OF_TEXT}"
    for ids in (encoder.encode([text])[0], reference(encoder, [text])[0]):
        assert (ids == encoder.end_of_text).sum() == 1
        assert tokenizer.decode(ids[1:]) == text
    assert encoder.end_of_text in tokenizer(text)["input_ids"]


@pytest.fixture
def torn_text(tmp_path) -> str:
    """A document with half a surrogate pair, as it comes from JSON."""
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}')
    return read_all(open_training(tmp_path))[0]


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(tokenizer, torn_text):
    encoder = Encoder(tokenizer)
    expected = encoder.encode(["a\ufffdb"])[0].tolist()
    assert encoder.encode([torn_text])[0].tolist() == expected
    assert reference(encoder, [torn_text])[0].tolist() == expected


def test_half_a_surrogate_pair_does_not_stop_the_training_of_a_tokenizer(torn_text):
    assert len(train_tokenizer([*TRAINING_TEXT[:5], torn_text], 300)) == 300


def test_word_level_tokenizer_falls_back_and_encodes(word_folder):
    encoder = Encoder(load_tokenizer(str(word_folder)))
    assert not encoder.is_fast
    assert [i.tolist() for i in encoder.encode(["the river .", "the sea", ""])] == [[1, 2, 3, 4], [1, 2, 0], [1]]


def test_padding_and_truncation_of_the_tokenizer_do_not_matter(trained):
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT))
    expected = [ids.tolist() for ids in Encoder(trained).encode(TRAINING_TEXT[:2])]
    assert encoder.is_fast
    for encode in (encoder.encode, lambda texts: reference(encoder, texts)):
        assert [ids.tolist() for ids in encode(TRAINING_TEXT[:2])] == expected
        assert [len(ids) for ids in encode(["a", ""])] == [2, 1]


def test_special_tokens_that_the_tokenizer_adds_around_a_text_are_left_out(trained):
    backend = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    special = [(END_OF_TEXT, trained.eos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=special)
    wrapping = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    assert len(wrapping("a")["input_ids"]) == 3
    encoder = Encoder(wrapping)
    assert_same(encoder, ["a", *TRAINING_TEXT[:2]])
    assert len(encoder.encode(["a"])[0]) == 2


def test_the_three_sources_of_a_vocabulary_give_the_same_ids(trained, json_folder, merges_folder):
    sources = [trained, load_tokenizer(str(json_folder)), load_tokenizer(str(merges_folder))]
    encoded = [[ids.tolist() for ids in Encoder(source).encode(TRAINING_TEXT[:20])] for source in sources]
    assert encoded[0] == encoded[1] == encoded[2]
    assert [len(source) for source in sources] == [700] * 3


def test_merges_folder_without_end_of_text_in_the_vocabulary_gets_it_behind_the_others(merges_folder, tmp_path):
    vocab = json.loads((merges_folder / "vocab.json").read_text())
    del vocab[END_OF_TEXT]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    shutil.copy(merges_folder / "merges.txt", tmp_path)
    encoder = Encoder(load_tokenizer(str(tmp_path)))
    assert (encoder.end_of_text, encoder.vocab_size, encoder.is_fast) == (699, 700, True)


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_two_bytes_as_long_as_the_vocabulary_allows(vocab_size, dtype):
    vocab = {"[UNK]": 0, **{f"w{n}": n for n in range(1, vocab_size - 1)}, "<eos>": vocab_size - 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="<eos>"))
    (ids,) = encoder.encode([f"w1 w{vocab_size - 2}"])
    assert ids.dtype == encoder.dtype == dtype
    assert ids.tolist() == [vocab_size - 1, 1, vocab_size - 2]


def test_training_gives_the_asked_size_and_is_deterministic(trained):
    again = train_tokenizer(iter(TRAINING_TEXT), 700)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert len(trained) == len(again) == 700
    assert Encoder(trained).hash == Encoder(again).hash


def test_trained_tokenizer_compresses_and_round_trips(trained):
    encoder = Encoder(trained)
    for text, ids in zip(TRAINING_TEXT, encoder.encode(TRAINING_TEXT), strict=True):
        assert trained.decode(ids[1:]) == text
        assert len(ids) < len(text.encode()) / 2


def test_hash_survives_saving_and_loading(trained, json_folder, tmp_path):
    loaded = load_tokenizer(str(json_folder))
    loaded.save_pretrained(tmp_path)
    assert Encoder(loaded).hash == Encoder(load_tokenizer(str(tmp_path))).hash == Encoder(trained).hash


def test_hash_tells_vocabularies_apart(trained):
    hashes = {Encoder(trained).hash, Encoder(train_tokenizer(TRAINING_TEXT, 699)).hash}
    hashes |= {Encoder(byte_level([("a", "b")])).hash, Encoder(byte_level([("b", "a")])).hash}
    assert len(hashes) == 4


def test_hash_tells_end_of_text_tokens_apart():
    one, other = Encoder(byte_level([("a", "b")])), Encoder(byte_level([("a", "b")], eos="<|pad|>"))
    assert one.end_of_text != other.end_of_text
    assert one.hash != other.hash


def break_json(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{nope")


def break_vocab(folder: Path) -> None:
    (folder / "vocab.json").write_text("{nope")
    (folder / "merges.txt").write_text("a b\n")


def vocab_alone(folder: Path) -> None:
    (folder / "vocab.json").write_text('{"a": 0}')


@pytest.mark.parametrize("spoil", [lambda folder: None, break_json, break_vocab, vocab_alone])
def test_folder_that_cannot_be_loaded_names_itself_and_the_remedy(tmp_path, spoil):
    spoil(tmp_path)
    with pytest.raises(ConfigError, match="(?s)^tokenizer: .*merges.txt or tokenizer.json, or train:VOCAB_SIZE") as caught:
        load_tokenizer(str(tmp_path))
    assert f"folder {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "/no/such/folder", "a/b/c", "train;500", "no such thing"])
def test_name_that_cannot_be_loaded_names_itself_and_the_remedy(name):
    with pytest.raises(ConfigError, match="^tokenizer: .*train:VOCAB_SIZE") as caught:
        load_tokenizer(name)
    assert f"Hub id or folder {name}" in str(caught.value)
    assert len(caught.value.problems) == 1


def test_tokenizer_without_end_of_text_is_refused(word_folder, tmp_path):
    shutil.copytree(word_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="^tokenizer: .* no end-of-text token"):
        load_tokenizer(str(tmp_path))


def test_lone_tokenizer_json_with_end_of_text_in_the_vocabulary_loads(json_folder, trained, tmp_path):
    shutil.copy(json_folder / "tokenizer.json", tmp_path)
    assert Encoder(load_tokenizer(str(tmp_path))).end_of_text == trained.eos_token_id
