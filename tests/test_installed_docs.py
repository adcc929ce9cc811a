"""The corpus of the installed packages' documentation: what it keeps, drops, balances, caches and refuses."""

import json
import multiprocessing
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recipe.data import installed_docs
from recipe.data.installed_docs import build_installed_docs

WORDS = ["river", "stone", "letter", "window", "garden", "teacher", "morning", "village", "silver", "paper", "table"]


def paragraph(seed: object) -> str:
    """A paragraph of plain English that no other seed gives."""
    rng = random.Random(str(seed))
    sentences = [
        f"The {' and the '.join(rng.choices(WORDS, k=6))} are in the {rng.choice(WORDS)} of the {rng.choice(WORDS)}."
        for _ in range(4)
    ]
    return " ".join(sentences)


def add_package(root: Path, name: str, modules: dict[str, str], readme: str = "") -> None:
    """Installs a distribution `name` 1.0 of the given modules (path relative to its folder -> source) into `root`."""
    folder = root / f"{name}-1.0.dist-info"
    folder.mkdir(parents=True)
    header = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nLicense: MIT\n\n"
    (folder / "METADATA").write_text(header + readme, encoding="utf-8")
    for path, code in modules.items():
        (root / name / path).parent.mkdir(parents=True, exist_ok=True)
        (root / name / path).write_text(code, encoding="utf-8")
    (folder / "RECORD").write_text("".join(f"{name}/{path},,\n" for path in modules))


def prose_modules(name: str, count: int) -> dict[str, str]:
    """Modules of about 2.2 kB of prose each."""
    return {
        f"part{module}.py": '"""' + "\n\n".join(paragraph((name, module, i)) for i in range(8)) + '\n"""\n'
        for module in range(count)
    }


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    return pq.read_table(folder / f"{split}-00000.parquet").to_pylist()


def all_text(folder: Path) -> str:
    return "\n\n".join(row["text"] for split in ("train", "validation") for row in rows(folder, split))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Three packages: two large ones and a small one, some 450 kB of prose."""
    root = tmp_path / "site"
    add_package(root, "alpha", prose_modules("alpha", 100))
    add_package(root, "Beta", prose_modules("beta", 100))
    add_package(root, "tiny", prose_modules("tiny", 5))
    return root


def test_two_builds_are_identical(site: Path, tmp_path: Path):
    first = build_installed_docs(tmp_path / "one", 300_000, [site])
    second = build_installed_docs(tmp_path / "two", 300_000, [site])
    assert first.name == second.name
    for name in ("train-00000.parquet", "validation-00000.parquet", "SOURCES.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_cap_and_record(site: Path, tmp_path: Path):
    folder = build_installed_docs(tmp_path, 300_000, [site])
    record = json.loads((folder / "SOURCES.json").read_text())
    for split in ("train", "validation"):
        texts = [row["text"] for row in rows(folder, split)]
        assert record["totals"][split] == {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts)}
        assert all(200 <= len(text) <= 20_000 for text in texts)
    total = sum(part["bytes"] for part in record["totals"].values())
    assert 300_000 - 20_000 < total <= 300_000
    assert sum(package["bytes"] for package in record["packages"]) == total
    assert [(p["name"], p["version"], p["license"]) for p in record["packages"]] == [
        ("alpha", "1.0", "MIT"),
        ("Beta", "1.0", "MIT"),
        ("tiny", "1.0", "MIT"),
    ]


def test_shares_are_balanced(site: Path, tmp_path: Path):
    folder = build_installed_docs(tmp_path, 220_000, [site])
    alpha, beta, tiny = json.loads((folder / "SOURCES.json").read_text())["packages"]
    assert tiny["documents"] == 5  # all it has
    assert abs(alpha["bytes"] - beta["bytes"]) < 5_000
    assert alpha["bytes"] > 90_000


def test_parquet_layout(site: Path, tmp_path: Path):
    folder = build_installed_docs(tmp_path, 300_000, [site])
    file = pq.ParquetFile(folder / "train-00000.parquet")
    assert [(field.name, str(field.type)) for field in file.schema_arrow] == [
        ("text", "string"),
        ("id", "string"),
        ("url", "string"),
    ]
    assert file.metadata.row_group(0).num_rows == 32
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    train = rows(folder, "train")
    assert {row["url"] for row in train} >= {"pkg:alpha==1.0", "pkg:Beta==1.0"}
    assert all(row["id"].endswith(".py#0") for row in train)


def test_validation_is_disjoint(site: Path, tmp_path: Path):
    folder = build_installed_docs(tmp_path, 450_000, [site])
    train, validation = ({row["text"] for row in rows(folder, split)} for split in ("train", "validation"))
    assert not train & validation
    assert 0.01 < len(validation) / len(train | validation) < 0.12
    paragraphs = Counter(all_text(folder).split("\n\n"))
    assert max(paragraphs.values()) == 1


def test_cache_hit_reads_no_source(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = build_installed_docs(tmp_path, 300_000, [site])
    monkeypatch.setattr(installed_docs, "_select", lambda *_: pytest.fail("built again"))
    assert build_installed_docs(tmp_path, 300_000, [site]) == folder
    with pytest.raises(pytest.fail.Exception):  # another cap is another corpus
        build_installed_docs(tmp_path, 290_000, [site])
    add_package(site, "gamma", {})
    with pytest.raises(pytest.fail.Exception):  # and so is another set of packages
        build_installed_docs(tmp_path, 300_000, [site])


MESSY = '''
"""{first}

The sentence in front of the example of the module is a part of the text.
>>> function()
The output of the example is not to be kept at all in the text of the corpus.

```python
print("code")

The fenced text is not to be kept at all in the text of the corpus.

```

The literal block of the module is announced in this sentence. An example of it is::

    The literal block is not to be kept at all in the text of the corpus.

| The table is not to be kept | at all in the text of the corpus. |

Copyright 2020 of the authors, who are not to be kept in the text of the corpus.

Les paragraphes qui sont ecrits dans une autre langue ne doivent pas rester dans ce corpus de textes.

.. note::
    The note with `code` and :class:`~package.module.Name` is a part of the text that is to be kept.

- The second item of this list is another part of the text that should be kept
  in the corpus.
"""

def function(x):
    """{second}

    Args:
        x (int): The parameter is not to be kept at all in the text of the corpus.

    Returns
    -------
    y : int
        The result is not to be kept at all in the text of the corpus.

    Notes
    -----
    The notes are a part of the text that is to be kept in the corpus.
    """
    return "The string of a function is not to be kept at all in the text of the corpus."

def same(x):
    """{second}"""
'''


def test_cleaning(site: Path, tmp_path: Path):
    first, second = paragraph("first"), paragraph("second")
    code = MESSY.format(first=first.replace(". ", ".\n", 1), second=second)
    skipped = {path: f'"""{paragraph(path)}"""' for path in ("tests/deep.py", "test_a.py", "_vendor/b.py")}
    add_package(site, "messy", {"module.py": code, "broken.py": '"""Not Python."""\ndef', **skipped})
    folder = build_installed_docs(tmp_path, 450_000, [site])
    [document] = [r for s in ("train", "validation") for r in rows(folder, s) if r["url"] == "pkg:messy==1.0"]
    assert document["id"] == "messy/module.py#0"
    assert document["text"].split("\n\n") == [
        first,
        "The sentence in front of the example of the module is a part of the text.",
        "The literal block of the module is announced in this sentence.",
        "The note with code and package.module.Name is a part of the text that is to be kept.",
        "The second item of this list is another part of the text that should be kept in the corpus.",
        second,
        "The notes are a part of the text that is to be kept in the corpus.",
    ]


def test_readme_project_and_long_documents(site: Path, tmp_path: Path):
    long_text = "\n\n".join(paragraph(("long", i)) for i in range(80))  # some 30 kB
    add_package(site, "described", {}, readme=f"# Described\n\n{long_text}\n")
    add_package(site, "gpt2_recipe", {"module.py": f'"""{paragraph("project")}"""'}, readme=paragraph("project"))
    folder = build_installed_docs(tmp_path, 600_000, [site])
    parts = {r["id"]: r["text"] for s in ("train", "validation") for r in rows(folder, s) if "described" in r["url"]}
    assert set(parts) == {"README#0", "README#1"}
    assert f"{parts['README#0']}\n\n{parts['README#1']}" == long_text
    assert 19_000 < len(parts["README#0"]) <= 20_000
    assert paragraph("project") not in all_text(folder)


def test_too_little_text(tmp_path: Path):
    add_package(tmp_path / "site", "small", prose_modules("small", 10))
    with pytest.raises(ValueError, match=r"found only \d\d,\d{3} bytes .* 1 installed packages"):
        build_installed_docs(tmp_path / "cache", roots=[tmp_path / "site"])
    with pytest.raises(ValueError, match="max_bytes=1 is too small"):
        build_installed_docs(tmp_path / "cache", 1, [tmp_path / "site"])
    assert not (tmp_path / "cache").exists()


def build_at(barrier, cache: Path, site: Path, results) -> None:
    barrier.wait()
    results.put(build_installed_docs(cache, 300_000, [site]))


def test_concurrent_builds(site: Path, tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    cache = tmp_path / "cache"
    processes = [context.Process(target=build_at, args=(barrier, cache, site, results)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=20) for _ in processes}
    for process in processes:
        process.join()
    assert set(cache.iterdir()) == folders  # one result and nothing left over
    assert len(folders) == 1


def test_loser_of_a_race_uses_the_winner(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write_after_the_winner(folder, sources, documents, write=installed_docs._write):
        monkeypatch.setattr(installed_docs, "_write", write)
        winner = build_installed_docs(tmp_path / "cache", 300_000, [site])
        (winner / "winner").touch()
        write(folder, sources, documents)

    monkeypatch.setattr(installed_docs, "_write", write_after_the_winner)
    folder = build_installed_docs(tmp_path / "cache", 300_000, [site])
    assert (folder / "winner").exists()
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_failed_build_leaves_nothing(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(folder: Path, *_):
        (folder / "train-00000.parquet").touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(installed_docs, "_write", fail)
    with pytest.raises(OSError, match="no space left"):
        build_installed_docs(tmp_path / "cache", 300_000, [site])
    assert not list((tmp_path / "cache").iterdir())


def test_this_machine(tmp_path: Path):
    """A small corpus of the packages that are installed here, which are parsed and never imported."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom recipe.data.installed_docs import build_installed_docs\n"
        "assert 'pyarrow' not in sys.modules\nbuild_installed_docs(Path(sys.argv[1]), 400_000)\n"
        "assert 'pyarrow' in sys.modules and not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    [folder] = tmp_path.iterdir()
    text = all_text(folder)
    assert 370_000 < len(text.encode()) <= 405_000  # the blank lines between documents are not in the cap
    assert ">>>" not in text and "```" not in text and "Copyright" not in text
    urls = Counter(row["url"].split("==")[0] for row in rows(folder, "train"))
    assert {"pkg:python", "pkg:torch", "pkg:transformers", "pkg:datasets"} <= set(urls)
    words = text.lower().split()
    assert sum(word in {"the", "of", "a", "to", "is", "and", "in"} for word in words) / len(words) > 0.15
