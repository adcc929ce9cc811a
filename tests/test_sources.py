"""Which files are taken for training and validation, and what is refused before any is opened."""

import os
from pathlib import Path

import pytest

from corpus_helpers import mixed_folder, open_training, read_all, refused, write_jsonl
from recipe.data.corpus import open_corpora
from recipe.data.sources import check_data_exists, hub_id, is_local


def names(corpus) -> list[str]:
    return [Path(file).name for file in corpus.files]


# --- files --------------------------------------------------------------------------------------------------------


def test_folder_with_mixed_formats_is_read_in_the_order_of_names(tmp_path):
    corpus = open_training(mixed_folder(tmp_path))
    assert names(corpus) == ["a.parquet", "b.jsonl", "c.jsonl.gz", "d.TXT", "f.jsonl"]
    assert read_all(corpus) == ["a1", "a2", "b", "c", "d", "f"]
    assert corpus.sizes == [os.path.getsize(file) for file in corpus.files]


def test_globs(tmp_path):
    folder = mixed_folder(tmp_path)
    assert read_all(open_training(f"{folder}/*.jsonl*")) == ["b", "c"]
    assert read_all(open_training(f"{folder}/[ab].*")) == ["a1", "a2", "b"]
    assert read_all(open_training(f"{folder}/**/*.jsonl")) == ["b", "f"]


def test_single_file(tmp_path):
    assert read_all(open_training(mixed_folder(tmp_path) / "b.jsonl")) == ["b"]


def test_relative_path_and_home(tmp_path, monkeypatch):
    mixed_folder(tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for data in ("user/name", "./user/name", "user/name/", "~/user/name", "user/../user/name"):
        assert read_all(open_training(data))[:2] == ["a1", "a2"], data


def test_folder_whose_name_looks_like_a_glob(tmp_path):
    folder = mixed_folder(tmp_path / "set[1]*")
    assert read_all(open_training(folder)) == ["a1", "a2", "b", "c", "d", "f"]


def test_linked_files_are_read(tmp_path):
    """As the Hub's cache keeps them."""
    (tmp_path / "folder").mkdir()
    blob = write_jsonl(tmp_path / "0f3c", ["one"])
    (tmp_path / "folder" / "a.jsonl").symlink_to(blob)
    assert read_all(open_training(tmp_path / "folder")) == ["one"]


def test_hidden_files_are_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    write_jsonl(tmp_path / ".b.jsonl", ["hidden"])
    (tmp_path / ".jsonl").write_text("broken")
    assert read_all(open_training(tmp_path)) == ["one"]


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", ".cache/huggingface"])
def test_files_in_hidden_folders_are_left_out(tmp_path, folder):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / folder).mkdir(parents=True)
    write_jsonl(tmp_path / folder / "a-checkpoint.jsonl", ["hidden"])
    assert read_all(open_training(tmp_path)) == ["one"]


def test_folder_inside_a_hidden_one_is_read(tmp_path):
    (tmp_path / ".store").mkdir()
    folder = tmp_path / ".store" / "text"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["one"])
    assert read_all(open_training(folder)) == ["one"]


# --- splits -------------------------------------------------------------------------------------------------------

VALIDATION_NAMES = ["validation", "val", "dev", "valid", "validation-00000-of-00001", "my_val", "wiki.VALID", "val2", "x-dev-1"]
TRAINING_NAMES = [
    "train",
    "developers",
    "evaluation",
    "values",
    "latest",
    "contest",
    "testament",
    "device",
    "interval",
    "00000",
]


@pytest.mark.parametrize("name", VALIDATION_NAMES)
def test_validation_files_are_told_by_their_names(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", ["train"])
    write_jsonl(tmp_path / f"{name}.jsonl", ["validation"])
    training, validation = open_corpora(str(tmp_path), None, "text", tmp_path)
    assert (read_all(training), read_all(validation)) == (["train"], ["validation"])


@pytest.mark.parametrize("name", TRAINING_NAMES)
def test_other_files_are_for_training(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    write_jsonl(tmp_path / f"{name}.jsonl", ["b"])
    training, validation = open_corpora(str(tmp_path), None, "text", tmp_path)
    assert validation is None
    assert sorted(read_all(training)) == ["a", "b"]


@pytest.mark.parametrize("name", ["test", "test-00000-of-00001", "wiki.test", "my_test_2", "Testing"])
def test_test_files_are_used_for_nothing(tmp_path, name):
    write_jsonl(tmp_path / "train.jsonl", ["train"])
    write_jsonl(tmp_path / f"{name}.jsonl", ["test"])
    training, validation = open_corpora(str(tmp_path), None, "text", tmp_path)
    assert validation is None
    assert read_all(training) == ["train"]


def write_tree(folder: Path, *paths: str) -> None:
    """Files of one document, which is their path."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / path, [path])


TREES = {
    "splits": (["train/0.jsonl"], ["validation/0.jsonl"], ["test/0.jsonl"]),
    "short names": (["training/a.jsonl"], ["val/a.jsonl", "dev/a.jsonl", "Valid/a.jsonl"], ["testing/a.jsonl"]),
    "words of a name": (["train-1/a.jsonl", "contest/a.jsonl"], ["wiki_val.2/a.jsonl"], ["wiki-test/a.jsonl"]),
    "deep": (
        ["essays/a.jsonl", "poems/old/a.jsonl", "z.jsonl"],
        ["essays/validation/a.jsonl", "poems/old/dev/b/c.jsonl"],
        ["essays/test/b/a.jsonl"],
    ),
    "names of files": (["train/a.jsonl"], ["train/val.jsonl", "test/dev.jsonl"], ["train/test.jsonl", "dev/test.jsonl"]),
    "the last folder": (["wiki-dev/train/a.jsonl"], ["test/dev/a.jsonl", "train/val/a.jsonl"], ["dev/test/a.jsonl"]),
    "trains": (["a.jsonl"], ["validation/train-trips.jsonl"], ["test/train.jsonl"]),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_folders_inside_tell_the_split(tmp_path, tree):
    expected, held_out, _ = map(sorted, tree)
    folder = tmp_path / "test-[validation]"  # what the user named says nothing
    write_tree(folder, *sum(tree, []))
    training, validation = open_corpora(str(folder), None, "text", tmp_path)
    assert sorted(read_all(training)) == expected
    assert sorted(read_all(validation)) == held_out


def test_folders_that_a_glob_matches_tell_the_split(tmp_path, monkeypatch):
    write_tree(tmp_path / "test" / "here", "train/a.jsonl", "validation/a.jsonl", "test/a.jsonl")
    monkeypatch.chdir(tmp_path / "test" / "here")
    for data in (f"{tmp_path}/test/here/*/*.jsonl", "*/a.jsonl", "./**/*.jsonl", f"{tmp_path}/test/here/[tv]*/*"):
        training, validation = open_corpora(data, None, "text", tmp_path)
        assert (read_all(training), read_all(validation)) == (["train/a.jsonl"], ["validation/a.jsonl"]), data
    for data in ("validation/*.jsonl", "validation/a.jsonl", "val*/*"):
        assert read_all(open_training(data)) == ["validation/a.jsonl"], data


def test_folder_with_one_split_is_trained_on_whatever_its_name(tmp_path):
    write_tree(tmp_path, "validation/a.jsonl", "validation/b.jsonl")
    training, validation = open_corpora(str(tmp_path), None, "text", tmp_path)
    assert (read_all(training), validation) == (["validation/a.jsonl", "validation/b.jsonl"], None)


def test_name_of_the_named_folder_says_nothing_about_the_split(tmp_path):
    folder = tmp_path / "test-validation"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ["a"])
    training, validation = open_corpora(str(folder), None, "text", tmp_path)
    assert (read_all(training), validation) == (["a"], None)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_lone_file_is_trained_on_whatever_its_name(tmp_path, name):
    path = write_jsonl(tmp_path / f"{name}.jsonl", ["text"])
    training, validation = open_corpora(str(path), None, "text", tmp_path)
    assert (read_all(training), validation) == (["text"], None)


def test_validation_data_is_taken_before_the_validation_files_of_data(tmp_path):
    (tmp_path / "train").mkdir()
    write_jsonl(tmp_path / "train" / "train.jsonl", ["train"])
    write_jsonl(tmp_path / "train" / "val.jsonl", ["its own"])
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "other" / "a.jsonl", ["a"])
    corpora = open_corpora(str(tmp_path / "train"), str(tmp_path / "other"), "text", tmp_path)
    assert [read_all(corpus) for corpus in corpora] == [["train"], ["a"]]


def test_validation_data_with_splits_gives_its_validation_files(tmp_path):
    (tmp_path / "other").mkdir()
    write_jsonl(tmp_path / "train.jsonl", ["train"])
    write_jsonl(tmp_path / "other" / "train.jsonl", ["no"])
    write_jsonl(tmp_path / "other" / "val.jsonl", ["yes"])
    _, validation = open_corpora(str(tmp_path / "train.jsonl"), str(tmp_path / "other"), "text", tmp_path)
    assert read_all(validation) == ["yes"]


# --- what is refused ----------------------------------------------------------------------------------------------


def test_missing_path_says_what_to_give(tmp_path):
    (problem,) = refused(tmp_path / "nothing")
    assert problem.startswith(f"data: {tmp_path}/nothing does not exist; give a folder, file or glob")
    assert check_data_exists("data", str(tmp_path / "nothing")) == [problem]


def test_glob_without_matches_says_what_to_give(tmp_path):
    assert "does not exist" in refused(f"{tmp_path}/*.jsonl")[0]


def test_folder_without_text_files_lists_the_formats(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    (problem,) = refused(tmp_path)
    assert problem == f"data: {tmp_path} holds no .parquet, .jsonl, .jsonl.gz, .json.gz, .txt files"


def test_file_of_another_format_lists_the_formats(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    assert ".parquet, .jsonl" in refused(tmp_path / "a.csv")[0]


def test_existing_data_has_no_problems(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one"])
    for data in (str(tmp_path), f"{tmp_path}/a.jsonl", f"{tmp_path}/*", "installed-docs", "user/name", "user/name:c@v1"):
        assert check_data_exists("data", data) == []


# --- spellings ----------------------------------------------------------------------------------------------------

LOCAL = "/data/text . .. ./text ../a/b ~/text ~ text a/b/c text/*.txt user/name? user/[ab] user/data.jsonl b.parquet x.JSONL.GZ"
ON_THE_HUB = (
    "user/name HuggingFaceFW/fineweb:sample-10BT@9bb295ddab0e05d785b879661af7260fed5140fc user/name:config user/name@v1.0 "
    "user/name@refs/pr/1 Salesforce/wikitext:wikitext-103-raw-v1 a.b/c-d_e"
)


@pytest.mark.parametrize(
    "data", [*LOCAL.split(), "user name/x", "https://huggingface.co/datasets/a/b", "user/name@", "user/name:"]
)
def test_spellings_of_local_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_local(data)


@pytest.mark.parametrize("data", ON_THE_HUB.split())
def test_spellings_of_hub_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_local(data)


def test_existing_folder_is_taken_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert is_local("user/name")


def test_hub_id_parts():
    assert hub_id("user/name") == ("user/name", None)
    assert hub_id("user/name:config@v1") == ("user/name", "v1")
    assert hub_id("user/name@refs/pr/1") == ("user/name", "refs/pr/1")
