"""How files are cut into units and read, and what is refused."""

import gzip
import io
import json
import os
import pickle
import random
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_helpers import mixed_folder, open_training, read_all, refused, write_jsonl, write_jsonl_gz, write_parquet
from recipe.data import corpus as corpus_module
from recipe.data.corpus import DataError

TEXTS = ["one", "two\nlines", "drei Straßen", "四 🙂", "  spaced  ", "six", "seven"]


# --- parquet ------------------------------------------------------------------------------------------------------


def test_parquet_units_are_row_groups(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", TEXTS, group=3))
    assert [(unit.file, unit.start, unit.end) for unit in corpus.units] == [(0, 0, 1), (0, 1, 2), (0, 2, 3)]
    assert [list(corpus.read(unit)) for unit in corpus.units] == [TEXTS[:3], TEXTS[3:6], TEXTS[6:]]


def test_units_can_be_read_again_and_in_any_order(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", TEXTS, group=3))
    assert [list(corpus.read(corpus.units[i])) for i in (2, 0, 2)] == [TEXTS[6:], TEXTS[:3], TEXTS[6:]]


def test_parquet_reads_the_text_column_alone(tmp_path, monkeypatch):
    noise = [os.urandom(100_000) for _ in TEXTS]
    path = write_parquet(tmp_path / "a.parquet", TEXTS, group=3, before=noise, after=noise)
    corpus = open_training(path)
    count = 0

    class Counting:
        closed = False

        def __init__(self, handle):
            self._handle = handle

        def read(self, size: int = -1) -> bytes:
            nonlocal count
            data = self._handle.read(size)
            count += len(data)
            return data

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._handle.close()

    opened = corpus.open
    monkeypatch.setattr(corpus, "open", lambda file: Counting(opened(file)))
    assert read_all(corpus) == TEXTS
    assert 0 < count < 10_000 < os.path.getsize(path)


@pytest.mark.parametrize("documents", [2999, 3000, 3001])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_row_group_is_read_in_batches(tmp_path, monkeypatch, documents, kind):
    """With documents in all sorts of pages, a batch's length apart from them, and from the middle on as well."""
    monkeypatch.setattr(corpus_module, "BATCH_DOCUMENTS", 100)
    monkeypatch.setattr(corpus_module, "PARQUET_BUFFER_BYTES", 1000)
    texts = [None if n % 7 == 3 else f"{n} " * (n % 90) for n in range(documents)]
    table = pa.table({"text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", data_page_size=5000, dictionary_pagesize_limit=2000)
    corpus = open_training(tmp_path)
    expected = list(filter(None, texts))
    assert len(corpus.units) == 1
    assert read_all(corpus) == expected
    assert read_all(corpus.with_units([replace(corpus.units[0], skip=1234)])) == expected[1234:]


def test_large_row_group_is_not_held(tmp_path, monkeypatch):
    """At its first document, neither as read nor as decoded; and the file is open until its end alone."""
    rng = random.Random(3)
    texts = [rng.randbytes(800).hex() for _ in range(40_000)]
    path = write_parquet(tmp_path / "a.parquet", texts, group=len(texts))
    corpus, handles, bytes_read = open_training(path), [], 0

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal bytes_read
            data = super().read(size)
            bytes_read += len(data)
            return data

    def open_file(file: int) -> io.FileIO:
        handles.append(Counting(corpus.files[file]))
        return handles[-1]

    monkeypatch.setattr(corpus, "open", open_file)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    documents = corpus.read(corpus.units[0])
    assert next(documents) == texts[0]
    held = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20e6 < sum(map(len, texts)) / 3
    assert bytes_read <= corpus_module.PARQUET_BUFFER_BYTES
    assert [handle.closed for handle in handles] == [False]
    assert list(documents) == texts[1:]
    assert [handle.closed for handle in handles] == [True]

    handles.clear()
    next(corpus.read(corpus.units[0]))  # and left at once
    assert [handle.closed for handle in handles] == [True]


def test_ordinary_row_group_is_let_go_at_its_first_document(tmp_path, monkeypatch):
    texts = [f"{n} " * 2000 for n in range(1000)]
    corpus = open_training(write_parquet(tmp_path / "a.parquet", texts))
    opened, handles = corpus.open, []
    monkeypatch.setattr(corpus, "open", lambda file: handles.append(opened(file)) or handles[-1])
    before = pa.total_allocated_bytes()
    documents = corpus.read(corpus.units[0])
    assert next(documents) == texts[0]
    assert [handle.closed for handle in handles] == [True]
    assert pa.total_allocated_bytes() == before


def test_parquet_leaves_out_null_and_empty_documents(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", ["one", None, "", "two", None]))
    assert read_all(corpus) == ["one", "two"]


def test_parquet_without_rows_is_no_text(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "holds no text" in refused(tmp_path)[0]


def test_parquet_with_large_strings_and_dictionaries(tmp_path):
    for n, kind in enumerate([pa.large_string(), pa.dictionary(pa.int32(), pa.string())]):
        pq.write_table(pa.table({"text": pa.array(TEXTS).cast(kind)}), tmp_path / f"{n}.parquet")
    assert read_all(open_training(tmp_path)) == TEXTS * 2


def test_text_column_names_another_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, key="body", id=list(range(7)))
    write_jsonl(tmp_path / "b.jsonl", ["more"], key="body")
    assert read_all(open_training(tmp_path, "body")) == [*TEXTS, "more"]


def test_wrong_text_column_names_those_there_are(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, key="body", id=list(range(7)))
    (problem,) = refused(tmp_path)
    assert problem == f"data: {tmp_path}/a.parquet has no column text; set text_column to one of body"


@pytest.mark.parametrize("write", [write_jsonl, write_jsonl_gz])
def test_wrong_json_key_names_those_there_are(tmp_path, write):
    path = write(tmp_path / ("a.jsonl.gz" if write is write_jsonl_gz else "a.jsonl"), ["one"], key="body")
    assert refused(tmp_path) == [f"data: {path} has no key text; set text_column to one of body"]


def test_text_column_without_strings_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, id=list(range(1, 8)))
    assert refused(tmp_path, "id") == [f"data: {path}: id holds int64, not text; set text_column to one of text"]


NESTED = {
    "parts": (pa.array([["one", "two"]]), "lists"),
    "large": (pa.array([["one"]], pa.large_list(pa.string())), "lists"),
    "fixed": (pa.array([["one"]], pa.list_(pa.string(), 1)), "lists"),
    "pairs": (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "lists"),
    "meta": (pa.array([{"text": "one", "n": 1}]), "structs"),
}


@pytest.mark.parametrize("name", [*NESTED, "meta.text", "parts.list.element", "nothing"])
def test_nested_columns_are_neither_read_nor_offered(tmp_path, name):
    columns = {name: values for name, (values, _) in NESTED.items()}
    columns |= {"title": pa.array(["a"], pa.large_string()), "kind": pa.array(["b"]).dictionary_encode()}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    what = f": {name} holds {NESTED[name][1]}, not text" if name in NESTED else f" has no column {name}"
    assert refused(tmp_path, name) == [f"data: {path}{what}; set text_column to one of title, kind"]
    assert read_all(open_training(tmp_path, "title")) == ["a"]


def test_parquet_without_any_text_says_so(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": NESTED["parts"][0]}), path)
    expected = "text holds lists, not text; no other can be text_column; replace or remove the file"
    assert refused(tmp_path) == [f"data: {path}: {expected}"]


# --- JSON lines ---------------------------------------------------------------------------------------------------


def jsonl_bytes(variant: str) -> tuple[bytes, list[str]]:
    """A file's bytes and its documents."""
    rng = random.Random(variant)
    texts = ["".join(rng.choices("ab é中🙂", k=rng.randrange(1, 12))) for _ in range(12)]
    lines = [json.dumps({"n": n, "text": text}, ensure_ascii=False) for n, text in enumerate(texts)]
    newline = "\r\n" if "crlf" in variant else "\n"
    if "blank" in variant:
        for position in (9, 5, 5, 0):
            lines.insert(position, rng.choice(["", "  "]))
    return (newline.join(lines) + ("" if "unended" in variant else newline)).encode(), texts


@pytest.mark.parametrize("variant", ["plain", "unended", "crlf", "crlf unended", "blank", "blank crlf unended"])
def test_every_json_line_belongs_to_one_unit_for_every_unit_size(tmp_path, monkeypatch, variant):
    data, texts = jsonl_bytes(variant)
    (tmp_path / "a.jsonl").write_bytes(data)
    for size in [*range(4, 60), *range(60, len(data) + 2, 13), len(data) - 1, len(data), len(data) + 1]:
        monkeypatch.setattr(corpus_module, "JSONL_UNIT_BYTES", size)
        corpus = open_training(tmp_path)
        assert len(corpus.units) == -(-len(data) // size)
        assert read_all(corpus) == texts, size


def test_json_line_belongs_to_the_unit_in_which_it_starts(tmp_path, monkeypatch):
    line = len(b'{"text": "aa"}\n')
    write_jsonl(tmp_path / "a.jsonl", ["aa", "bb", "cc", "dd"])
    for size, expected in [
        (line, [["aa"], ["bb"], ["cc"], ["dd"]]),
        (line + 1, [["aa", "bb"], ["cc"], ["dd"], []]),
        (2 * line - 1, [["aa", "bb"], ["cc", "dd"], []]),
    ]:
        monkeypatch.setattr(corpus_module, "JSONL_UNIT_BYTES", size)
        corpus = open_training(tmp_path)
        assert [list(corpus.read(unit)) for unit in corpus.units] == expected


def test_jsonl_leaves_out_null_and_empty_documents(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", None, "", "two"])
    assert read_all(open_training(tmp_path)) == ["one", "two"]


def test_json_escapes_and_unicode_line_ends_inside_a_document(tmp_path):
    texts = ['a\nb\r\n\t"\\ \u2028\u2029\x85 \x00', "\ufeffbom"]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read_all(open_training(tmp_path)) == texts * 2


SURROGATES = {
    b"a\xed\xa0\x81b": "a\ufffdb",
    b"a\xed\xb8\x80": "a\ufffd",
    b"\xed\xa0\xbd\xed\xb8\x80": "\N{GRINNING FACE}",
    rb"\ud83d" + b"\xed\xb8\x80": "\N{GRINNING FACE}",
    rb"\ud801 \ud83d\ude00": "\ufffd \N{GRINNING FACE}",
    "한국어 텍스트 \ud7ff".encode(): "한국어 텍스트 \ud7ff",
}
"""What is written between the quotes, and what it means."""


@pytest.mark.parametrize("write", [Path.write_bytes, lambda path, data: path.write_bytes(gzip.compress(data))])
def test_halves_of_surrogate_pairs_are_mended(tmp_path, write):
    path = tmp_path / ("a.jsonl" if write is Path.write_bytes else "a.jsonl.gz")
    write(path, b"".join(b'{"text": "%s"}\n' % raw for raw in SURROGATES))
    assert read_all(open_training(path)) == list(SURROGATES.values())


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz"])
def test_gzipped_json_lines_are_one_unit(tmp_path, ending):
    write_jsonl_gz(tmp_path / f"a{ending}", TEXTS)
    corpus = open_training(tmp_path)
    assert len(corpus.units) == 1
    assert read_all(corpus) == TEXTS


def test_text_bytes_are_near_the_truth(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "JSONL_UNIT_BYTES", 1000)
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefgh ß", k=rng.randrange(50, 150))) for _ in range(300)]
    size = sum(len(text.encode()) for text in texts)
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl_gz(tmp_path / "b.jsonl.gz", texts)
    write_parquet(tmp_path / "c.parquet", texts)
    (tmp_path / "d.txt").write_text("\n\n".join(texts), encoding="utf-8")
    for path in sorted(tmp_path.iterdir()):
        assert open_training(path).text_bytes == pytest.approx(size, rel=0.1), path.name


@pytest.mark.parametrize("line", ["{nope", '"a text"', "[1]", "17"])
def test_broken_json_at_the_head_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (problem,) = refused(tmp_path)
    assert problem.startswith("data: ") and "a.jsonl" in problem


LONG = "x" * 1000


def deep_line(path: Path, line: str) -> Path:
    """A file of JSON lines whose last is `line`, behind what opening the file samples."""
    good = json.dumps({"text": LONG}) + "\n"
    path.write_text(good * 300 + line + "\n")
    return path


@pytest.mark.parametrize("line", ["{nope", "[1]", '{"body": "x"}'])
def test_broken_json_deep_in_a_file_raises_a_data_error_when_read(tmp_path, line):
    corpus = open_training(deep_line(tmp_path / "a.jsonl", line))
    with pytest.raises(DataError, match="a.jsonl"):
        read_all(corpus)


def test_document_that_is_no_string_deep_in_a_file_raises_a_data_error_when_read(tmp_path):
    corpus = open_training(deep_line(tmp_path / "a.jsonl", '{"text": 17}'))
    with pytest.raises(DataError, match="a.jsonl"):
        read_all(corpus)


def test_truncated_gzip_is_refused(tmp_path):
    path = write_jsonl_gz(tmp_path / "a.jsonl.gz", [f"text {n}" for n in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    (problem,) = refused(tmp_path)
    assert problem.startswith("data: ") and "a.jsonl.gz" in problem


def test_gzip_of_many_members_is_read_whole(tmp_path):
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert read_all(open_training(tmp_path)) == TEXTS


def test_gzip_truncated_behind_the_sample_raises_a_data_error_when_read(tmp_path):
    rng = random.Random(2)
    path = write_jsonl_gz(tmp_path / "a.jsonl.gz", [rng.randbytes(2000).hex() for _ in range(150)])
    path.write_bytes(path.read_bytes()[:-20])
    corpus = open_training(tmp_path)
    with pytest.raises(DataError, match="a.jsonl.gz"):
        read_all(corpus)


def test_file_that_is_no_gzip_is_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text('{"text": "one"}\n')
    assert "a.jsonl.gz" in refused(tmp_path)[0]


# --- plain text ---------------------------------------------------------------------------------------------------


LONGEST_PARAGRAPH = 130


def txt_bytes(variant: str) -> bytes:
    rng = random.Random(variant)
    newline = "\r\n" if variant == "crlf" else "\n"
    paragraphs = [
        newline.join("".join(rng.choices("ab é中🙂", k=rng.randrange(1, 9))) + "." for _ in range(rng.randrange(1, 4)))
        for _ in range(12)
    ]
    gaps = [newline * 2, newline * 3, f"{newline} \t{newline}"] if variant == "gaps" else [newline * 2]
    assert max(map(len, map(str.encode, paragraphs))) < LONGEST_PARAGRAPH
    text = "".join(paragraph + rng.choice(gaps) for paragraph in paragraphs)
    text = {"unended": text.rstrip(), "one paragraph": text.replace(newline * 2, newline)}.get(variant, text)
    return ("\n\n" + text if variant == "gaps" else text).encode()


@pytest.mark.parametrize("variant", ["plain", "unended", "crlf", "gaps", "one paragraph"])
def test_txt_units_are_the_file_cut_at_empty_lines_for_every_unit_size(tmp_path, monkeypatch, variant):
    data = txt_bytes(variant)
    (tmp_path / "a.txt").write_bytes(data)
    for size in [*range(1, 60), *range(60, len(data) + 2, 13), len(data) - 1, len(data), len(data) + 1]:
        monkeypatch.setattr(corpus_module, "TXT_UNIT_BYTES", size)
        corpus = open_training(tmp_path)
        documents = read_all(corpus)
        assert "".join(documents).encode() == data, size
        assert all(document.endswith("\n") for document in documents[:-1]), size
        if size > LONGEST_PARAGRAPH and variant != "one paragraph":
            assert all(re.search(r"(^|\n)\s*\n$", document) for document in documents[:-1]), size
        assert sum(len(list(corpus.read(unit))) for unit in corpus.units) == len(documents) <= len(corpus.units)


@pytest.mark.parametrize("gap", ["\n\n", "\r\n\r\n", "\n \t\n"])
def test_txt_units_are_as_long_as_asked_where_the_paragraphs_are_short(tmp_path, monkeypatch, gap):
    monkeypatch.setattr(corpus_module, "TXT_UNIT_BYTES", 100)
    paragraph = "0123456" + gap
    (tmp_path / "a.txt").write_bytes(paragraph.encode() * 200)
    documents = read_all(open_training(tmp_path))
    assert all(abs(len(document) - 100) <= 2 * len(paragraph) for document in documents[:-1])
    assert len(documents) >= 2 * len(paragraph) - 2


def test_txt_without_empty_lines_is_neither_read_again_and_again_nor_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "TXT_UNIT_BYTES", 1000)
    text = "one sentence on a line of its own\n" * 3000
    (tmp_path / "a.txt").write_text(text)
    corpus, count = open_training(tmp_path), 0

    class Counting(io.BufferedReader):
        def read(self, size: int = -1) -> bytes:
            return self._count(super().read(size))

        def readline(self, size: int = -1) -> bytes:
            return self._count(super().readline(size))

        def _count(self, data: bytes) -> bytes:
            nonlocal count
            count += len(data)
            return data

    monkeypatch.setattr(corpus, "open", lambda file: Counting(io.FileIO(corpus.files[file])))
    documents = read_all(corpus)
    assert "".join(documents) == text
    assert max(map(len, documents)) < 10_000
    assert count < 10 * len(text)


def test_small_txt_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_all(open_training(tmp_path)) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("data", ["ein weißes Haus".encode("latin-1"), "ein Spaß".encode()[:-1]])
def test_txt_that_is_not_utf8_is_refused(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    (problem,) = refused(tmp_path)
    assert problem.startswith("data: ") and "a.txt" in problem and "utf-8" in problem


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_long_txt_that_is_not_utf8_at_its_head_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(("ein weißes Haus\n" * 1000).encode(encoding))
    assert "a.txt" in refused(tmp_path)[0]


@pytest.mark.parametrize("shift", range(4))
def test_txt_with_a_character_across_the_checked_head_opens(tmp_path, shift):
    text = "a" * shift + "🙂" * 2000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_all(open_training(tmp_path)) == [text]


def test_txt_that_is_not_utf8_deep_inside_raises_a_data_error_when_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n" * 2000 + b"\xff\xfe")
    with pytest.raises(DataError, match="a.txt"):
        read_all(open_training(tmp_path))


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_empty_file_holds_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    assert refused(tmp_path) == [f"data: {tmp_path} holds no text"]


def test_blank_lines_hold_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n \n")
    write_jsonl(tmp_path / "b.jsonl", ["", None])
    assert refused(tmp_path) == [f"data: {tmp_path} holds no text"]


def test_empty_files_among_others_do_no_harm(tmp_path):
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    write_jsonl(tmp_path / "b.jsonl", ["one"])
    assert read_all(open_training(tmp_path)) == ["one"]


@pytest.mark.parametrize("spoil", [lambda data: data[:-30], lambda data: b"", lambda data: data[: len(data) // 2], bytes.upper])
def test_corrupt_parquet_among_good_ones_is_named(tmp_path, spoil):
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", TEXTS)
    (tmp_path / "b.parquet").write_bytes(spoil((tmp_path / "b.parquet").read_bytes()))
    (problem,) = refused(tmp_path)
    assert problem.startswith(f"data: cannot read {tmp_path}/b.parquet: ") and "replace or remove the file" in problem


def test_parquet_with_a_spoilt_page_raises_a_data_error_when_read(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [LONG, "two"]}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:80] = b"\xff" * 76
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.parquet"):
        read_all(open_training(path))


def test_file_that_vanishes_raises_a_data_error_when_read(tmp_path):
    for write, name in [(write_jsonl, "a.jsonl"), (write_parquet, "b.parquet")]:
        corpus = open_training(write(tmp_path / name, TEXTS))
        os.remove(tmp_path / name)
        with pytest.raises(DataError, match=name):
            read_all(corpus)


def test_every_problem_is_reported_at_once(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, key="body")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    (tmp_path / "c.jsonl").write_text("{nope\n")
    write_jsonl(tmp_path / "d.jsonl", ["good"])
    (tmp_path / "e.txt").write_bytes(b"\xff\xff")
    problems = refused(tmp_path)
    assert [re.search(r"[a-e]\.\w+", problem.removeprefix("data: cannot read "))[0] for problem in problems] == [
        "a.parquet",
        "b.parquet",
        "c.jsonl",
        "e.txt",
    ]
    assert all(problem.startswith("data: ") for problem in problems)


def test_problems_of_the_validation_text_name_its_field(tmp_path):
    training = write_jsonl(tmp_path / "a.jsonl", ["one"])
    assert refused(training, validation_data="/no/such")[0].startswith("validation_data: /no/such does not exist")
    (tmp_path / "b.jsonl").write_text("{nope\n")
    assert refused(training, validation_data=f"{tmp_path}/b.jsonl")[0].startswith("validation_data: cannot read")


# --- fingerprint ----------------------------------------------------------------------------------------


def test_fingerprint_does_not_depend_on_the_place(tmp_path):
    mixed_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "x" / "there")
    assert open_training(tmp_path / "here").fingerprint == open_training(tmp_path / "x" / "there").fingerprint


def test_fingerprint_is_json_and_tells_texts_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fingerprint(change=lambda: None, **options) -> dict:
        shutil.rmtree("text", ignore_errors=True)
        mixed_folder(Path("text"))
        change()
        found = open_training("text", **options).fingerprint
        assert json.loads(json.dumps(found)) == found
        return found

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(lambda: write_jsonl(Path("text/b.jsonl"), ["bb"])) != first
    assert fingerprint(lambda: os.remove("text/d.TXT")) != first
    assert fingerprint(lambda: os.rename("text/b.jsonl", "text/bb.jsonl")) != first
    monkeypatch.setattr(corpus_module, "JSONL_UNIT_BYTES", 5)
    assert fingerprint() != first


def test_slice_keeps_the_files_and_some_units(tmp_path):
    corpus = open_training(write_parquet(tmp_path / "a.parquet", TEXTS, group=1))
    part = corpus.with_units(corpus.units[2:])
    assert read_all(part) == TEXTS[2:]
    assert part.units == corpus.units[2:]
    assert part.files == corpus.files
    assert part.text_bytes < corpus.text_bytes
    assert part.fingerprint != corpus.fingerprint
    assert read_all(corpus.with_units(corpus.units[1:3])) == TEXTS[1:3]


def test_corpus_can_be_sent_to_other_ranks(tmp_path):
    corpus = open_training(mixed_folder(tmp_path))
    sent = pickle.loads(pickle.dumps(corpus))
    assert read_all(sent) == read_all(corpus)
    assert sent.fingerprint == corpus.fingerprint
