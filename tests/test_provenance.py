"""Every row of a run can be traced to the documents that made it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import make_documents
from corpus_helpers import write_jsonl, write_parquet
from launch import PRETRAIN, ROOT, TINY, environment, options
from recipe.config import ConfigError
from recipe.data import provenance
from recipe.data.provenance import BatchTracer
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


def test_the_script_shows_ids_and_text(run: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), str(run), "--step", "3", "--rows", "4"]
    shown = subprocess.run(command, env=environment(), check=True, capture_output=True, text=True, timeout=60).stdout
    assert "step 3: 16 rows of 64 targets" in shown and "http://example.org/" in shown and "The " in shown
    records = json.loads(subprocess.run([*command, "--json"], env=environment(), check=True, capture_output=True).stdout)
    assert {record["row"] for record in records} == {0, 1, 2, 3}
    assert all(sum(r["tokens"] for r in records if r["row"] == row) == 65 for row in range(4))


def test_what_cannot_be_traced_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        BatchTracer(tmp_path)
    with pytest.raises(ConfigError, match="steps count from 1"):
        BatchTracer(run).trace(0)
    line = provenance.describe_source(BatchTracer(run).trace(1)[1][0])
    assert line.startswith("row    0")
