"""Prepared tokens: the same rows as the text, whatever happened while they were made."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import DatasetCard

from conftest import make_documents, write_fineweb
from corpus_helpers import ThreadExchange, run_ranks, write_jsonl, write_jsonl_gz, write_parquet
from hub_server import HubServer, client_environment
from launch import PRETRAIN, ROOT, TINY, accelerate_command, environment, losses, metrics, options
from recipe.config import ConfigError
from recipe.data import preparation
from recipe.data.corpus import Corpus, DataError, open_corpora
from recipe.data.prepared import PreparedCorpus, TokenEncoder, encoder_for, load_prepared_tokenizer, open_prepared
from recipe.data.sources import check_data_exists
from recipe.data.stream import RowStream
from recipe.data.token_index import FORMAT, documents_file, file_facts, find_damage, tokens_file, write_index
from recipe.data.validation import count_tokens, hold_out, read_validation_rows
from recipe.files import sha256
from recipe.micro_batch import UNKNOWN_VOCAB_SIZE, Card, fit, resolve
from recipe.parsing import load_config
from recipe.publish.dataset_card import dataset_card
from recipe.run_folder import RunFolder
from recipe.tokenizer import Encoder, load_tokenizer

PREPARE = str(ROOT / "scripts" / "prepare_data.py")
LENGTH = 64
STEPS, SAVE_EVERY = 6, 3


def prepare(data: Path, folder: Path, workers: int = 2, **fields: object) -> list[str]:
    """Prepare in this process; the lines that it says."""
    lines: list[str] = []
    config = load_config(options(**{"data": data, "output_dir": folder, "tokenizer": "train:400", "max_steps": 1, **fields}))
    preparation.prepare(config, workers, lines.append)
    return lines


def prepare_command(data: Path | str, folder: Path, **fields: object) -> list[str]:
    fields = {"data": data, "output_dir": folder, "tokenizer": "train:400", "workers": 2, **fields}
    return [sys.executable, PREPARE, *options(**fields)]


def run(command: list[str], code: int = 0, **extra: str) -> str:
    """The output of a command that ends with this exit code."""
    done = subprocess.run(command, env=environment(**extra), capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format, with empty documents and letters of several bytes."""
    folder = tmp_path_factory.mktemp("text")
    write_parquet(
        folder / "a.parquet", [*make_documents(90, seed=1), "", None, "Ünïcödé 中文", *make_documents(90, seed=2)], 11
    )
    write_jsonl(folder / "b.jsonl", ["", *make_documents(40, seed=3), "naïve"])
    write_jsonl_gz(folder / "c.jsonl.gz", make_documents(30, seed=4))
    (folder / "d.txt").write_text("\n\n".join(make_documents(400, seed=5)))
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "tokens"
    prepare(text, folder)
    return folder


@pytest.fixture(scope="module")
def encoder(prepared: Path) -> Encoder:
    return Encoder(load_tokenizer(str(prepared / "tokenizer")))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A validation file beside the training text."""
    folder = tmp_path_factory.mktemp("apart")
    write_parquet(folder / "train.parquet", make_documents(100, seed=1), 11)
    write_jsonl(folder / "validation.jsonl", make_documents(30, seed=2))
    return folder


def open_both(text: Path, prepared: Path, encoder: Encoder) -> list[tuple[Corpus, Any]]:
    """The training text with its encoder, streamed and prepared."""
    streamed = open_corpora(str(text), None, "text", Path("/nonexistent"))[0]
    tokens = open_corpora(str(prepared), None, "text", Path("/nonexistent"))[0]
    return [(streamed, encoder), (tokens, encoder_for(tokens, encoder, "data"))]


# --- the same rows ------------------------------------------------------------------------------------------------------


def read_to_the_end(
    corpus: Corpus, encoder: Any, ranks: int, workers: int, batch: int, state: dict | None = None
) -> list[tuple[list[np.ndarray], dict]]:
    """Each rank's batches and the state behind each, over three epochs."""

    def read(exchange: ThreadExchange) -> list[tuple[np.ndarray, dict]]:
        stream = RowStream(corpus, encoder, LENGTH, 3, 3, exchange, workers, state)
        batches = []
        try:
            while True:
                batches.append((stream.next_batch(batch), json.loads(json.dumps(stream.state()))))
        except DataError:
            return batches
        finally:
            stream.close()

    results = run_ranks(ranks, read)
    assert not [result for result in results if isinstance(result, Exception)], results
    return results


def assert_same(theirs: list, ours: list) -> None:
    for their_rank, our_rank in zip(theirs, ours, strict=True):
        assert len(their_rank) == len(our_rank) > 2
        for (their_rows, their_state), (our_rows, our_state) in zip(their_rank, our_rank, strict=True):
            assert their_rows.dtype == our_rows.dtype == np.uint16
            assert np.array_equal(their_rows, our_rows)
            assert their_state == our_state


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 0), (3, 2), (8, 1)])
def test_rows_and_states_are_those_of_the_text(text, prepared, encoder, ranks: int, workers: int) -> None:
    (streamed, their_encoder), (tokens, our_encoder) = open_both(text, prepared, encoder)
    _, streamed = hold_out(streamed, their_encoder, LENGTH, 1000)
    _, tokens = hold_out(tokens, our_encoder, LENGTH, 1000)
    theirs = read_to_the_end(streamed, their_encoder, ranks, workers, batch=72)
    assert_same(theirs, read_to_the_end(tokens, our_encoder, ranks, workers, batch=72))
    assert {state["epoch"] for _, state in theirs[0]} == {0, 1, 2}


@pytest.mark.parametrize("to_tokens", [True, False])
def test_a_state_continues_on_the_other(text, prepared, encoder, to_tokens: bool) -> None:
    both = [(hold_out(corpus, e, LENGTH, 1000)[1], e) for corpus, e in open_both(text, prepared, encoder)]
    first, second = both if to_tokens else both[::-1]
    whole = read_to_the_end(*first, ranks=2, workers=0, batch=48)[0]
    for stop in (1, len(whole) // 2, len(whole) - 4):
        rest = read_to_the_end(*second, ranks=2, workers=2, batch=48, state=whole[stop - 1][1])[0]
        assert_same([whole[stop:]], [rest])


@pytest.mark.parametrize("max_tokens", [64, 500, 100_000])
def test_held_out_documents_are_those_of_the_text(text, prepared, encoder, max_tokens: int) -> None:
    (streamed, their_encoder), (tokens, our_encoder) = open_both(text, prepared, encoder)
    assert tokens.fingerprint == streamed.fingerprint and tokens.units == streamed.units
    their_rows, their_rest = hold_out(streamed, their_encoder, LENGTH, max_tokens)
    our_rows, our_rest = hold_out(tokens, our_encoder, LENGTH, max_tokens)
    assert np.array_equal(their_rows, our_rows) and their_rows.dtype == our_rows.dtype
    assert our_rest.units == their_rest.units and our_rest.fingerprint == their_rest.fingerprint
    assert count_tokens(our_rest, our_encoder) == count_tokens(their_rest, their_encoder)
    assert (
        our_rest.units[0].skip
        and our_rest.tokens < tokens.tokens == json.loads((prepared / "index.json").read_text())["tokens"]
    )


def test_a_validation_split_stays_apart(apart: Path, tmp_path: Path, text: Path) -> None:
    prepare(apart, tmp_path / "tokens")
    tokens, validation = open_corpora(str(tmp_path / "tokens"), None, "text", tmp_path)
    encoder = Encoder(load_prepared_tokenizer(tokens, "train:400"))
    training_text, validation_text = open_corpora(str(apart), None, "text", tmp_path)
    assert validation.fingerprint == validation_text.fingerprint and tokens.fingerprint == training_text.fingerprint
    theirs = read_validation_rows(validation_text, encoder, LENGTH, 500)
    assert np.array_equal(theirs, read_validation_rows(validation, encoder_for(validation, encoder, "data"), LENGTH, 500))
    # Either may be replaced by another.
    assert open_corpora(str(tmp_path / "tokens"), str(text), "text", tmp_path)[1].name == str(text)
    assert open_corpora(str(text), str(tmp_path / "tokens"), "text", tmp_path)[1].fingerprint == validation.fingerprint
    (tmp_path / "tokens" / "validation" / tokens_file(0)).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"validation/tokens-00000.bin has 0 bytes instead of"):
        validation.fetch()


def test_validation_data_is_prepared_too(text: Path, apart: Path, tmp_path: Path) -> None:
    prepare(text, tmp_path / "tokens", validation_data=apart / "validation.jsonl")
    index = json.loads((tmp_path / "tokens" / "index.json").read_text())
    assert index["validation"] == open_prepared(str(tmp_path / "tokens"), "data")[1].fingerprint
    assert index["validation"]["files"][0][0] == "validation.jsonl"


def test_a_pickled_corpus_carries_no_tokens(prepared: Path) -> None:
    corpus = open_prepared(str(prepared), "data")[0]
    before = [document.tokens.tolist() for unit in corpus.units for document in corpus.read(unit)]
    content = pickle.dumps(corpus)
    assert len(content) < 10_000 < sum(map(len, before))
    again = pickle.loads(content)
    assert [document.tokens.tolist() for unit in again.units for document in again.read(unit)] == before


def test_tokens_are_read_fast(tmp_path: Path) -> None:
    """The rate is 130 M tokens/s a core for FineWeb's documents; the bound only shows that nothing went wrong badly."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 1400, (64, 200))
    rng.integers(0, 50_000, lengths.sum(), dtype=np.uint16).tofile(tmp_path / tokens_file(0))
    np.stack([lengths.ravel(), lengths.ravel() * 4], 1).astype("<u4").tofile(tmp_path / documents_file(0))
    sizes = lengths.sum(axis=1)
    starts = np.cumsum(sizes) - sizes
    unit_rows = [[0, n, n + 1, int(size) * 4, 0, int(starts[n]), int(size), n * 200, 200] for n, size in enumerate(sizes)]
    source = {"name": "x", "remote": False, "text_column": "text", "files": ["x.parquet"], "sizes": [1]}
    facts = {"vocab_size": 50_257, "end_of_text": 50_256, "tokenizer_hash": "x", "files": {}, "units": unit_rows}
    write_index(tmp_path, {"format": FORMAT, "version": 1, "dtype": "uint16", "source": source, "validation": None, **facts})
    corpus = open_prepared(str(tmp_path), "data")[0]
    stream = RowStream(corpus, TokenEncoder(corpus), 1024, 0, 100)
    stream.next_batch(512)
    began = time.perf_counter()
    for _ in range(50):
        stream.next_batch(512)
    assert 50 * 512 * 1024 / (time.perf_counter() - began) > 10e6


# --- making them --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def much_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 MB, 60 row groups."""
    return write_fineweb(tmp_path_factory.mktemp("much"), files=3, documents=2000, row_group_size=100)


def test_killed_again_and_again_it_gives_the_same_files(much_text: Path, tmp_path: Path) -> None:
    prepare(much_text, tmp_path / "undisturbed")
    folder = tmp_path / "killed"
    kept: set[str] = set()
    for records, number in ((0, signal.SIGKILL), (1, signal.SIGKILL), (4, signal.SIGTERM)):
        process = subprocess.Popen(
            prepare_command(much_text, folder), env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not (folder / "unfinished").is_dir() or len(list(folder.glob("unfinished/0*.json"))) < records:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.002)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        assert not (folder / "index.json").exists()
        now = {path.name for path in folder.glob("unfinished/0*.json")}
        assert kept <= now
        kept = now
    assert process.returncode == 75 and "stopped; the same command goes on from here\n" in errors, errors
    assert not list(folder.glob(".*"))
    assert check_data_exists("data", str(folder)) == [
        f"data: {folder} is half prepared; finish it with the command that began it (scripts/prepare_data.py)"
    ]
    made_before = {name: (folder / f"tokens-{name[:5]}.bin").stat().st_mtime_ns for name in kept}
    output = run(prepare_command(much_text, folder))
    assert f"hf upload USER/NAME {folder} --repo-type dataset" in output and "1,280,141 tokens" in output
    assert {name: (folder / f"tokens-{name[:5]}.bin").stat().st_mtime_ns for name in kept} == made_before
    assert hashes(folder) == hashes(tmp_path / "undisturbed")
    assert run([sys.executable, PREPARE, "--verify", str(folder)]).endswith("every file is what index.json says\n")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False])
def test_damage_is_found_and_made_good(text: Path, prepared: Path, tmp_path: Path, finished: bool) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(prepared, folder)
    whole = hashes(folder)
    if not finished:  # as it was just before the index
        index = json.loads((folder / "index.json").read_text())
        records: dict[int, list] = {}
        for row in index["units"]:
            records.setdefault(row[4], []).append([row[6], row[8]])
        (folder / "unfinished").mkdir()
        for number, units in records.items():
            files = {name: index["files"][name] for name in (tokens_file(number), documents_file(number))}
            (folder / "unfinished" / f"{number:05d}.json").write_text(json.dumps({"files": files, "units": units}))
        begun = {"training": index["fingerprint"], "validation": None, "tokenizer_files": file_facts(folder, "tokenizer")}
        begun |= {name: index[name] for name in ("tokenizer", "tokenizer_hash", "text_bytes_a_file")}
        (folder / "unfinished" / "begun.json").write_text(json.dumps(begun))
        (folder / "index.json").unlink()
    flip_a_bit(folder / tokens_file(0))
    os.truncate(folder / tokens_file(1), 100)
    (folder / documents_file(2)).unlink()
    flip_a_bit(folder / "tokenizer" / "tokenizer_config.json")
    if finished:
        assert len(find_damage(folder)) == 4
        output = run([sys.executable, PREPARE, "--verify", str(folder)], code=2)
        assert "4 problems" in output and "tokens-00000.bin is damaged: its SHA-256 is not what was recorded; run" in output
    said = "\n".join(prepare(text, folder))
    assert f"{folder / tokens_file(0)} is damaged" in said and "tokenizer_config.json is damaged" in said
    assert f"{folder / tokens_file(1)} has 100 bytes instead of" in said
    assert f"{folder / documents_file(2)} is missing; made again" in said
    assert hashes(folder) == whole and not find_damage(folder)
    assert prepare(text, folder) == []


def test_the_number_of_workers_may_change(text: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "tokens")
    (tmp_path / "tokens" / tokens_file(3)).unlink()
    prepare(text, tmp_path / "tokens", workers=1)
    assert hashes(tmp_path / "tokens") == hashes(prepared)


def test_what_is_refused(text: Path, prepared: Path, apart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(data: Path, folder: Path, **fields: object) -> str:
        with pytest.raises(ConfigError) as caught:
            prepare(data, folder, **fields)
        return str(caught.value)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "other holds something else than prepared tokens" in refusal(text, tmp_path / "other")
    assert "is a file" in refusal(text, tmp_path / "other" / "thesis.tex")
    assert "is prepared already" in refusal(prepared, tmp_path / "again")
    before = hashes(prepared)
    message = refusal(apart, prepared)
    assert "begun with other data: files of the training text is ['a.parquet', " in message and "train.parquet" in message
    assert "it had no separate validation text" in refusal(text, prepared, validation_data=apart / "validation.jsonl")
    assert "begun with another tokenizer (train:400 there, train:300 now)" in refusal(text, prepared, tokenizer="train:300")
    with open(prepared / "unfinished" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another prepare_data.py is at work" in refusal(text, prepared)
    shutil.rmtree(prepared / "unfinished")
    assert hashes(prepared) == before
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert "make room" in refusal(text, tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.bin"))


def test_bad_fields_are_named_as_by_pretrain(tmp_path: Path) -> None:
    wrong = options(data=tmp_path / "nowhere", seed=-1, batch_tokns=5, workers="many")
    output = run([sys.executable, PREPARE, *wrong], code=2)
    assert output.startswith("5 problems with the configuration or the input:\n")
    for part in (
        "did you mean batch_tokens?",
        "seed: -1 is below 0",
        "nowhere does not exist",
        "workers: 'many'",
        "output_dir: not",
    ):
        assert part in output


def test_text_that_cannot_be_read_ends_it_and_keeps_the_rest(text: Path, prepared: Path, tmp_path: Path) -> None:
    data, folder = tmp_path / "text", tmp_path / "tokens"
    shutil.copytree(text, data)
    lines = (data / "b.jsonl").read_bytes().splitlines(keepends=True)
    broken = [*lines, *lines * 20, b"{not json\n"]
    (data / "b.jsonl").write_bytes(b"".join(broken))
    output = run(prepare_command(data, folder, tokenizer=prepared / "tokenizer"), code=1)
    assert f"cannot read {data / 'b.jsonl'}" in output and "Traceback" not in output
    assert list(folder.glob("unfinished/0*.json")) and not (folder / "index.json").exists()


def test_the_card_states_the_licence(prepared: Path) -> None:
    card = DatasetCard.load(prepared / "README.md")
    assert card.data.license == "other" and "licence of the source text applies" in card.text
    index = json.loads((prepared / "index.json").read_text())
    index["source"]["name"] = "HuggingFaceFW/fineweb:sample-10BT@9bb295d"
    card = DatasetCard(dataset_card(index))
    assert card.data.license == "odc-by" and "Hugging Face" in card.text


# --- training on them ---------------------------------------------------------------------------------------------------


def train_command(data: object, folder: Path, **fields: object) -> list[str]:
    few = {"max_steps": STEPS, "warmup_steps": 2, "precision": "fp32", "save_every": SAVE_EVERY, "log_every": 2}
    return [sys.executable, PRETRAIN, *options(**(TINY | few | {"data": data, "output_dir": folder} | fields))]


@pytest.fixture(scope="module")
def streamed_run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "streamed"
    run(train_command(text, folder))
    return folder


def validation_losses(folder: Path) -> list[float]:
    return [record["val_loss"] for record in metrics(folder) if "val_loss" in record]


def test_training_on_tokens_gives_the_losses_of_the_text(text, prepared, streamed_run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    output = run(train_command(prepared, folder, tokenizer="openai-community/gpt2"))
    assert "tokenised by prepare_data.py" in output
    assert losses(folder) == losses(streamed_run) and validation_losses(folder) == validation_losses(streamed_run)
    weights = Path("checkpoints") / f"step-{STEPS:08d}" / "model.safetensors"
    assert sha256(folder / weights) == sha256(streamed_run / weights)


def test_a_run_on_text_continues_on_tokens(prepared, streamed_run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(streamed_run, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    output = run(train_command(prepared, folder))
    assert f"at step {SAVE_EVERY}" in output and losses(folder) == losses(streamed_run)


def test_a_folder_on_the_hub_is_downloaded_and_trained_on(prepared, streamed_run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with HubServer() as server:
        files = {str(path.relative_to(prepared)): path for path in prepared.rglob("*") if path.is_file()}
        revision = server.add_repo("dataset", "User/tokens", files)
        extra = client_environment(server, tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        # On two ranks, of which one downloads for both.
        run(accelerate_command("2cpu-ddp", *train_command(f"User/tokens@{revision}", folder)[2:]), **extra)
        asked = [request.path for request in server.requests if request.method == "GET" and "/tokens-" in request.path]
        assert len(asked) == len(set(asked)) == len(list(prepared.glob("tokens-*.bin")))
    assert losses(folder) == pytest.approx(losses(streamed_run), abs=1e-4)
    assert validation_losses(folder) == pytest.approx(validation_losses(streamed_run), abs=1e-4)
    # Without a network it is taken from the cache.
    hub_home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    code = (
        "import sys; from recipe.data.prepared import *; c = open_prepared(sys.argv[1], 'data')[0]; c.fetch(); print(c.tokens)"
    )
    count = run([sys.executable, "-c", code, f"User/tokens@{revision}"], **hub_home)
    assert int(count.splitlines()[0]) == json.loads((prepared / "index.json").read_text())["tokens"]


def test_a_folder_uploaded_by_one_user_is_trained_on_by_another(text, prepared, streamed_run, tmp_path: Path) -> None:
    """By the command that prepare_data.py ends with."""
    said = run(prepare_command(text, prepared)).splitlines()
    (publish,) = (line for line in said if line.startswith("publish: "))
    upload = publish.removeprefix("publish: ").partition("   ")[0].replace("USER/NAME", "tester/tokens").split()
    assert upload == ["hf", "upload", "tester/tokens", str(prepared), "--repo-type", "dataset"]
    with HubServer(cdn=True) as server:
        first_user = client_environment(server, tmp_path / "first") | {"HF_TOKEN": "hf_test"}
        done = subprocess.run(
            [str(Path(sys.executable).parent / upload[0]), *upload[1:]],
            env=first_user,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        writes = [request for request in server.requests if request.method in ("POST", "PUT")]
        assert {request.status for request in writes} == {200}
        uploaded = server.repos["dataset", "tester/tokens"]
        files = {path: blob.sha256 for path, blob in uploaded.commits[uploaded.branches["main"]].items()}
        assert files.pop(".gitattributes") and files == hashes(prepared)

        second_user = client_environment(server, tmp_path / "second") | {"HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        server.requests.clear()
        folder = tmp_path / "run"
        output = run(train_command("tester/tokens", folder), **second_user)
        assert "tokenised by prepare_data.py" in output and losses(folder) == losses(streamed_run)
        asked = [request for request in server.requests if request.path.startswith("/storage/")]
        assert asked and not any("authorization" in request.headers for request in server.requests)
    (snapshot,) = (tmp_path / "second").glob("hub/datasets--tester--tokens/snapshots/*")
    ours, theirs = ({path.name: sha256(path) for path in place.glob("*.bin")} for place in (prepared, snapshot))
    assert ours == theirs and len(ours) == 2 * len(list(prepared.glob("tokens-*.bin"))) > 2
    assert not find_damage(snapshot)


def test_text_on_the_hub_is_prepared_with_its_fingerprint(text: Path, prepared: Path, tmp_path: Path) -> None:
    with HubServer() as server:
        files: dict[str, bytes | Path] = {"data/train.parquet": text / "a.parquet"}
        revision = server.add_repo("dataset", "User/text", files)
        extra = client_environment(server, tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        folder, data = tmp_path / "tokens", f"User/text@{revision}"
        run(prepare_command(data, folder, tokenizer=prepared / "tokenizer"), **extra)
    url, local = f"hf://datasets/{data}/data/train.parquet", open_prepared(str(prepared), "data")[0]
    units = [unit for unit in local.units if unit.file == 0]
    theirs = Corpus(data, [url], [local.sizes[0]], units, "text", remote=True).fingerprint
    corpus = open_prepared(str(folder), "data")[0]
    assert corpus.fingerprint == theirs and corpus.name == data
    index = json.loads((folder / "index.json").read_text())
    assert index["tokenizer"] is None and str(tmp_path) not in json.dumps(index)
    of_file_a = [row for row in json.loads((prepared / "index.json").read_text())["units"] if row[0] == 0]
    assert index["tokens"] == sum(row[6] for row in of_file_a)


def test_a_missing_file_ends_the_training_before_it_begins(prepared: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    shutil.copytree(prepared, tokens)
    (tokens / tokens_file(1)).unlink()
    output = run(train_command(tokens, tmp_path / "run"), code=2)
    assert f"data: {tokens / tokens_file(1)} is missing; run scripts/prepare_data.py with the same configuration" in output
    assert "Traceback" not in output


def test_the_folder_s_own_tokenizer_is_loaded_once(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("recipe.data.prepared.load_tokenizer", lambda name: loaded.append(name) or load_tokenizer(name))
    own = str(prepared / "tokenizer")
    load_prepared_tokenizer(open_prepared(str(prepared), "data")[0], own)
    assert loaded == [own]


def test_the_micro_batch_goes_by_the_tokens_own_vocabulary(prepared: Path) -> None:
    words = ["--data", str(prepared), "--tokenizer", str(prepared / "tokenizer"), "--batch_tokens", "65536", "--max_steps", "9"]
    config, card = load_config(words), 12 * 2**30
    known, guessed = (fit(config, 1, card, size, zero1=False).micro_batch_size for size in (400, UNKNOWN_VOCAB_SIZE))
    assert resolve(config, 1, Card(card)).micro_batch_size == known > guessed


@pytest.mark.parametrize(
    "contents",
    [
        {"vocab.json": {f"t{n}": n for n in range(400)}},
        {
            "tokenizer.json": {
                "model": {"vocab": {f"t{n}": n for n in range(399)}},
                "added_tokens": [{"content": "t0"}, {"content": "<|endoftext|>"}],
            }
        },
    ],
    ids=["vocab.json", "tokenizer.json"],
)
def test_the_micro_batch_goes_by_the_vocabulary_of_a_tokenizer_s_folder(contents: dict[str, dict], tmp_path: Path) -> None:
    words = ["--data", "installed-docs", "--tokenizer", str(tmp_path), "--batch_tokens", "65536", "--max_steps", "9"]
    config, card = load_config(words), 12 * 2**30
    known, guessed = (fit(config, 1, card, size, zero1=False).micro_batch_size for size in (400, UNKNOWN_VOCAB_SIZE))
    assert resolve(config, 1, Card(card)).micro_batch_size == guessed
    for name, content in contents.items():
        (tmp_path / name).write_text("{")  # damaged, which is reported where it is loaded
        assert resolve(config, 1, Card(card)).micro_batch_size == guessed
        (tmp_path / name).write_text(json.dumps(content))
    assert resolve(config, 1, Card(card)).micro_batch_size == known > guessed


def test_another_tokenizer_is_refused(prepared: Path, encoder: Encoder, tmp_path: Path) -> None:
    corpus = open_prepared(str(prepared), "data")[0]
    for name in ("openai-community/gpt2", "train:400", str(prepared / "tokenizer")):
        assert Encoder(load_prepared_tokenizer(corpus, name)).hash == encoder.hash
    with pytest.raises(ConfigError, match="train:500 gives other tokens than those in .*, which were made with train:400"):
        load_prepared_tokenizer(corpus, "train:500")
    tokenizer = load_tokenizer(str(prepared / "tokenizer"))
    tokenizer.add_special_tokens({"eos_token": "the"})
    with pytest.raises(ConfigError, match="data: .* was prepared with another tokenizer"):
        encoder_for(corpus, Encoder(tokenizer), "data")
    assert isinstance(corpus, PreparedCorpus) and encoder_for(corpus, encoder, "data").end_of_text == encoder.end_of_text


def test_a_damaged_index_is_an_error(prepared: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(prepared, folder)
    os.truncate(folder / "index.json", 500)
    with pytest.raises(ConfigError, match=r"data: cannot read .*index.json: .*; run scripts/prepare_data.py"):
        open_prepared(str(folder), "data")
    assert "index.json is damaged" in prepare(text, folder)[0]
    assert hashes(folder) == hashes(prepared)
    newer = (folder / "index.json").read_text().replace('"version": 1', '"version": 2')
    (folder / "index.json").write_text(newer)
    with pytest.raises(ConfigError, match="has version 2 and this recipe reads 1"):
        open_prepared(str(folder), "data")


def test_a_run_folder_takes_tokens_for_the_text(prepared: Path, text: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    hub = load_config(options(data="HuggingFaceFW/fineweb", max_steps=1, output_dir=tmp_path / "run"))
    folder.claim(hub, {})
    assert folder.check(load_config(options(data=prepared, max_steps=1, output_dir=tmp_path / "run")))
    with pytest.raises(ConfigError, match="data is HuggingFaceFW/fineweb there"):
        folder.check(load_config(options(data=text, max_steps=1, output_dir=tmp_path / "run")))
