"""Text for the tests: made here, deterministic, in the shapes that users have."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import PRETRAIN, TINY, environment, options

WORDS = (
    "the a river stone light wind carries over under hill valley bright slow morning evening bird water tree house "
    "walks sings finds keeps turns opens small large old new red green and but then while because near far always"
).split()


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Sentences of common words with some structure to learn: the verb depends on the noun before it."""
    rng = random.Random(seed)
    return [
        " ".join(
            f"The {rng.choice(WORDS)} {rng.choice(WORDS)} {rng.choice(WORDS)} {number}." for number in range(rng.randint(5, 60))
        )
        for _ in range(count)
    ]


def write_fineweb(folder: Path, files: int, documents: int, row_group_size: int = 20) -> Path:
    """Parquet files with FineWeb's nine columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        texts = make_documents(documents, seed=index)
        table = pa.table(
            {
                "text": texts,
                "id": [f"<urn:uuid:{index}-{n}>" for n in range(documents)],
                "dump": ["CC-MAIN-2013-20"] * documents,
                "url": [f"http://example.org/{index}/{n}" for n in range(documents)],
                "date": ["2013-05-18T07:24:47Z"] * documents,
                "file_path": ["s3://commoncrawl/example.warc.gz"] * documents,
                "language": ["en"] * documents,
                "language_score": [0.95] * documents,
                "token_count": [len(text.split()) for text in texts],
            }
        )
        pq.write_table(table, folder / f"{index:03d}_00000.parquet", row_group_size=row_group_size, compression="zstd")
    return folder


@pytest.fixture(scope="session")
def fineweb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parquet files in FineWeb's schema, about 120,000 tokens of a small BPE."""
    return write_fineweb(tmp_path_factory.mktemp("fineweb"), files=3, documents=200)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    """The folder of a finished run of 20 steps with checkpoints at 10 and 20. To be copied, not changed."""
    folder = tmp_path_factory.mktemp("trained") / "gpt2-tiny"
    fields = TINY | {"data": fineweb_folder, "output_dir": folder, "max_steps": 20, "save_every": 10, "eval_every": 10}
    command = [sys.executable, PRETRAIN, *options(**fields, n_positions=128, precision="fp32")]
    done = subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder


# --- docs/reliability.md ------------------------------------------------------------------------------------------

HEADER = """# Reliability

What the recipe promises about faults, and what came of causing them. Made by the fault suite itself:

    bash scripts/test.sh -m faults --reliability=docs/reliability.md

Each test asserts that its fault has happened, and before a checkpoint is loaded that the state differs from it. The ranks
are forked from one parent, over gloo, on two cores; rows that name `accelerate launch` or `supervise.sh` start whole programs.

| promise | fault | result | cases | seconds |
|---|---|---|---|---|
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write the table of the fault tests to this file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--reliability"):
        config.pluginmanager.register(ReliabilityTable(Path(config.getoption("--reliability"))))


class ReliabilityTable:
    """Collects the results of the tests that have a promise, and writes a row for each promise and fault."""

    def __init__(self, path: Path):
        self._path, self._rows = path, {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if marker := item.get_closest_marker("promise"):
                item.user_properties.append(("promise", marker.args))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        key = dict(report.user_properties).get("promise")
        if key is None:
            return
        row = self._rows.setdefault(key, {"cases": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        row["seconds"] += report.duration
        row["cases"] += report.when == "call"
        row["failed"] += report.failed
        row["skipped"] += report.skipped

    def pytest_sessionfinish(self) -> None:
        lines = []
        for (promise, fault), row in self._rows.items():
            result = f"{row['failed']} FAILED" if row["failed"] else "skipped" if row["skipped"] else "kept"
            lines.append(f"| {promise} | {fault} | {result} | {row['cases']} | {row['seconds']:.0f} |\n")
        self._path.write_text(HEADER + "".join(lines), encoding="utf-8")
