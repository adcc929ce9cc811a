"""Text for the tests: made here, deterministic, in the shapes that users have."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
