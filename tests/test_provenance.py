"""Every row of a run can be traced to the documents that made it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import make_documents
from corpus_helpers import write_jsonl, write_parquet
from hub_server import HubServer, client_environment
from launch import PRETRAIN, ROOT, TINY, environment, options
from recipe.config import ConfigError
from recipe.data import provenance
from recipe.data.provenance import BatchTracer
from recipe.data.stream import RowStream
from recipe.parsing import load_config
from recipe.tokenizer import Encoder

STEPS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two epochs of parquet with ids and urls, with empty documents, and of JSON lines, some rows left out."""
    folder = tmp_path_factory.mktemp("text")
    texts = make_documents(30, seed=1)
    texts[3] = texts[17] = ""
    ids = [f"id-{n}" for n in range(30)]
    write_parquet(folder / "a.parquet", texts, group=6, id=ids, url=[f"http://example.org/{n}" for n in range(30)])
    write_jsonl(folder / "b.jsonl", make_documents(8, seed=2))
    run = folder.parent / "run"
    fields = TINY | {"data": folder, "output_dir": run, "max_steps": STEPS, "batch_tokens": 1024, "max_epochs": 9}
    fields |= {"skip_rows": "5-6,40", "log_every": 5, "warmup_steps": 1}
    command = [sys.executable, PRETRAIN, *options(**fields)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    return run


def test_sources_give_the_tokens_of_the_rows(run: Path) -> None:
    tracer = BatchTracer(run)
    encoder = Encoder(tracer.tokenizer)
    labelled = [
        (tracer.corpus.files[unit.file], n + unit.skip, label, tokens)
        for unit in tracer.corpus.units
        for n, (label, tokens) in enumerate(
            zip(tracer.corpus.describe(unit), encoder.encode(list(tracer.corpus.read(unit))), strict=True)
        )
    ]
    for step in (1, 2, 7, STEPS):
        rows, sources = tracer.trace(step)
        assert rows.shape == (16, 65)
        for index, row in enumerate(rows):
            parts = []
            for source in (s for s in sources if s.row == index):
                (tokens,) = (
                    tokens
                    for file, number, label, tokens in labelled
                    if (file, number, label.get("id")) == (source.file, source.document, source.id)
                )
                parts.append(tokens[source.first_token : source.first_token + source.tokens])
            assert np.concatenate(parts).tolist() == row.tolist()


def test_replay_from_a_position_is_the_replay_from_the_start(run: Path) -> None:
    tracer = BatchTracer(run)
    near, _ = tracer.trace(STEPS)
    tracer._positions = tracer._positions[:1]
    assert tracer._positions[0]["step"] == 0
    far, _ = tracer.trace(STEPS)
    assert near.tolist() == far.tolist()


def test_rows_that_a_rollback_left_out_are_not_in_the_batches_behind_it(tmp_path: Path) -> None:
    texts = make_documents(60, seed=3)
    rng = random.Random(0)
    texts.insert(40, "".join(chr(rng.randrange(0x3040, 0x9FFF)) for _ in range(800)))  # a spike
    write_jsonl(tmp_path / "text.jsonl", texts)
    fields = TINY | {"data": tmp_path / "text.jsonl", "output_dir": tmp_path / "run", "max_steps": 20, "max_epochs": 90}
    fields |= {"log_every": 1, "warmup_steps": 1, "save_every": 2, "learning_rate": 3e-3, "schedule": "constant"}
    fields |= {"spike_action": "rollback", "spike_threshold": 1.5, "spike_window": 8}
    command = [sys.executable, PRETRAIN, *options(**fields)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()]
    assert skipped and all(record["action"] == "rollback" for record in skipped)
    left_out = sorted({row for record in skipped for row in range(record["rows"][0], record["rows"][1] + 1)})
    tracer = BatchTracer(tmp_path / "run")
    rows = RowStream(tracer.corpus, Encoder(tracer.tokenizer), 64, 0, 90).next_batch(16 * 20 + len(left_out))
    expected = np.delete(rows, left_out, axis=0)
    for step in (1, skipped[0]["step"], 20):
        assert np.array_equal(tracer.trace(step)[0], expected[16 * (step - 1) : 16 * step])


def test_the_script_shows_ids_and_text(run: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), str(run), "--step", "3", "--rows", "4"]
    shown = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True, timeout=60).stdout
    assert "step 3: 16 rows of 64 targets" in shown and "http://example.org/" in shown and "The " in shown
    records = json.loads(subprocess.run([*command, "--json"], env=environment(), check=True, capture_output=True).stdout)
    assert {record["row"] for record in records} == {0, 1, 2, 3}
    assert all(sum(r["tokens"] for r in records if r["row"] == row) == 65 for row in range(4))


@pytest.fixture(scope="module")
def run_on_tokens(run: Path) -> Path:
    """The same run on prepared tokens."""
    tokens, folder = run.parent / "tokens", run.parent / "run-on-tokens"
    text = load_config([str(run / "config.yaml")]).data
    prepare = [sys.executable, str(ROOT / "scripts" / "prepare_data.py")]
    fields = {"data": text, "tokenizer": "train:400", "output_dir": tokens, "workers": 1}
    subprocess.run([*prepare, *options(**fields)], env=environment(), check=True, capture_output=True, timeout=120)
    command = [sys.executable, PRETRAIN, str(run / "config.yaml"), *options(data=tokens, output_dir=folder)]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    return folder


def test_the_documents_of_prepared_tokens_are_looked_up_in_their_text(run: Path, run_on_tokens: Path) -> None:
    text = load_config([str(run / "config.yaml")]).data
    tracer, on_tokens, without = BatchTracer(run), BatchTracer(run_on_tokens, text), BatchTracer(run_on_tokens)
    files = set()
    for step in range(1, STEPS + 1):
        rows, sources = tracer.trace(step)
        named = [replace(source, file=Path(source.file).name) for source in sources]
        assert all((source.id is None) == (source.file == "b.jsonl") for source in named)
        files |= {source.file for source in named}
        for other, expected in ((on_tokens, named), (without, [replace(s, id=None, url=None) for s in named])):
            other_rows, other_sources = other.trace(step)
            assert np.array_equal(other_rows, rows) and other_sources == expected
    assert files == {"a.parquet", "b.jsonl"}
    assert on_tokens.missing is None and "name the text of" in without.missing and "--source" in without.missing


def test_a_text_that_is_not_that_of_the_tokens_is_refused(run: Path, run_on_tokens: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", make_documents(8, seed=2))
    with pytest.raises(ConfigError, match="is not the text that the tokens in .*tokens were made from"):
        BatchTracer(run_on_tokens, str(tmp_path))
    with pytest.raises(ConfigError, match="holds tokens; name the text"):
        BatchTracer(run_on_tokens, load_config([str(run_on_tokens / "config.yaml")]).data)
    with pytest.raises(ConfigError, match="was trained on text"):
        BatchTracer(run, str(tmp_path))


def test_a_text_on_the_hub_is_found_by_itself_and_missed_when_it_is_gone(tmp_path: Path) -> None:
    texts = make_documents(200, seed=1)
    path = write_parquet(tmp_path / "0.parquet", texts, 50, id=[f"id-{n}" for n in range(200)])
    with HubServer(cdn=True) as server:
        server.add_repo("dataset", "Org/text", {"data/train-0.parquet": path})
        here = environment(**client_environment(server, tmp_path / "home")) | {"HF_HUB_OFFLINE": "0"}

        def call(script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess:
            command = [sys.executable, str(ROOT / "scripts" / script), *words]
            done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120)
            assert done.returncode == code, done.stdout + done.stderr
            return done

        fields = {"tokenizer": "train:400", "output_dir": tmp_path / "tokens", "workers": 1}
        call("prepare_data.py", *options(data="Org/text", **fields))
        few = TINY | {"data": tmp_path / "tokens", "output_dir": tmp_path / "run", "max_steps": 2, "warmup_steps": 1}
        call("pretrain.py", *options(**few))
        # The text goes on, but the run's commit stays.
        server.add_repo("dataset", "Org/text", {"data/train-0.parquet": b"else"})
        inspect = ("inspect_data.py", str(tmp_path / "run"), "--step", "1", "--rows", "16")
        found = call(*inspect, "--json")
        ids = [source["id"] for source in json.loads(found.stdout)]
        assert ids and set(ids) <= {f"id-{n}" for n in range(200)} and not found.stderr
        server.repos["dataset", "Org/text"].commits.clear()
        gone = call(*inspect)
        assert "their text cannot be read: " in gone.stderr and "404" in gone.stderr
        assert "train-0.parquet unit " in gone.stdout and "id-" not in gone.stdout


def test_what_cannot_be_traced_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        BatchTracer(tmp_path)
    with pytest.raises(ConfigError, match="steps count from 1"):
        BatchTracer(run).trace(0)
    line = provenance.describe_source(BatchTracer(run).trace(1)[1][0])
    assert line.startswith("row    0")
