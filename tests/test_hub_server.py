"""The loopback Hub against the real clients, each in a process of its own, and against plain HTTP."""

import hashlib
import http.client
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import Fault, HubServer, Request, client_environment, first

README = b"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# A dataset laid out like HuggingFaceFW/fineweb
"""


def run_client(server: HubServer, home: Path, code: str, *arguments: str, **extra: str) -> object:
    """Run `code` in a process that sees `server` as its Hub; return the JSON that it printed last."""
    environment = client_environment(server, home) | extra
    command = [sys.executable, "-c", "import json, sys\n" + code, *arguments]
    client = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=home)
    assert client.returncode == 0, client.stderr
    assert not [request for request in server.requests if request.status == 501], "a route is missing"
    return json.loads(client.stdout.splitlines()[-1])


def write_fineweb(path: Path, name: str, num_rows: int, row_group_size: int, text_bytes: int) -> list[str]:
    """Write a parquet file with FineWeb's nine columns and text that does not compress; return the texts."""
    source = random.Random(name)
    texts = [f"{name} {row} {source.randbytes(text_bytes // 2).hex()}" for row in range(num_rows)]
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{name}-{row}>" for row in range(num_rows)],
        "dump": ["CC-MAIN-2024-18"] * num_rows,
        "url": [f"https://example.org/{source.randbytes(200).hex()}" for _ in range(num_rows)],
        "date": ["2024-04-12T01:02:03Z"] * num_rows,
        "file_path": ["s3://commoncrawl/x.warc.gz"] * num_rows,
        "language": ["en"] * num_rows,
        "language_score": [0.97] * num_rows,
        "token_count": [len(text) // 4 for text in texts],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without statistics, which hold whole texts, the footer fits in pyarrow's first read of 64 KiB.
    pq.write_table(
        pa.table(columns),
        path,
        row_group_size=row_group_size,
        compression="none",
        write_statistics=False,
    )
    return texts


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def get(server: HubServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Make one request without any Hub client; return status, headers (names in lower case) and body."""
    connection = http.client.HTTPConnection(server.endpoint.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_streaming_yields_every_row_of_a_named_config(server, tmp_path):
    expected = []
    files: dict[str, bytes | Path] = {"README.md": README}
    for shard in range(3):
        path = tmp_path / f"{shard:03d}_00000.parquet"
        expected += write_fineweb(path, f"shard{shard}", num_rows=20, row_group_size=8, text_bytes=100)
        files[f"sample/10BT/{path.name}"] = path
    write_fineweb(tmp_path / "other.parquet", "other", num_rows=5, row_group_size=5, text_bytes=100)
    files["data/CC-MAIN-2024-18/000_00000.parquet"] = tmp_path / "other.parquet"
    sha = server.add_repo("dataset", "Org/data", files)
    code = """
import datasets
rows = list(datasets.load_dataset("Org/data", "sample-10BT", split="train", streaming=True, revision=sys.argv[1]))
print(json.dumps([[row["text"] for row in rows], sorted(rows[0])]))
"""
    texts, columns = run_client(server, tmp_path, code, sha)
    assert texts == expected
    assert len(columns) == 9
    assert all(f"/{sha}" in request.path for request in server.requests), "the revision is pinned in every request"


OPEN_BUFFERED = """
import pyarrow.parquet as pq
table = pq.ParquetFile(fs.open(url)).read_row_group(2, columns=["text"])
"""
OPEN_EXACT = """
import pyarrow.parquet as pq
table = pq.ParquetFile(fs.open(url, cache_type="none"), pre_buffer=True).read_row_group(2, columns=["text"])
"""
# Three row groups at once. The gaps between their text columns are small, so fetching them too saves two requests.
# (pyarrow 26.0.1 hangs in to_table with batch_readahead=0, not in to_batches.)
OPEN_COALESCED = """
import pyarrow as pa, pyarrow.dataset
cache = pa.CacheOptions(hole_size_limit=1 << 20, range_size_limit=64 << 20)
scan = pa.dataset.ParquetFragmentScanOptions(pre_buffer=True, cache_options=cache)
file = fs.open(url, cache_type="none")
fragment = pa.dataset.ParquetFileFormat(default_fragment_scan_options=scan).make_fragment(file)
fragment = fragment.subset(row_group_ids=[2, 3, 4])
table = pa.Table.from_batches(fragment.to_batches(columns=["text"], batch_readahead=0, fragment_readahead=0))
"""


@pytest.mark.parametrize(
    ("recipe", "row_groups", "num_requests", "exact"),
    [
        pytest.param(OPEN_BUFFERED, [2], 2, False, id="fsspec's default cache, which reads 5 MB ahead"),
        pytest.param(OPEN_EXACT, [2], 2, True, id="no cache"),
        pytest.param(OPEN_COALESCED, [2, 3, 4], 2, True, id="no cache, three row groups in one request"),
    ],
)
def test_row_groups_are_read_by_ranges_of_a_pinned_url(server, tmp_path, recipe, row_groups, num_requests, exact):
    path = tmp_path / "000_00000.parquet"
    texts = write_fineweb(path, "big", num_rows=2400, row_group_size=200, text_bytes=4000)
    assert path.stat().st_size >= 8 << 20
    sha = server.add_repo(
        "dataset", "Org/data", {"README.md": README, f"sample/10BT/{path.name}": path, "data/0/0.parquet": path}
    )
    code = """
import datasets
from huggingface_hub import HfFileSystem
builder = datasets.load_dataset_builder("Org/data", "sample-10BT", revision=sys.argv[1])
fs, [url] = HfFileSystem(), builder.config.data_files["train"]
RECIPE
print(json.dumps([url, table.column("text").to_pylist()]))
""".replace("RECIPE", recipe)
    url, read = run_client(server, tmp_path, code, sha)
    assert url == f"hf://datasets/Org/data@{sha}/sample/10BT/000_00000.parquet"
    assert read == [text for group in row_groups for text in texts[200 * group : 200 * (group + 1)]]

    reads = [request for request in server.requests if request.path.endswith(".parquet")]
    assert [request.status for request in reads] == [206] * num_requests
    metadata = pq.ParquetFile(path).metadata
    wanted = sum(metadata.row_group(group).column(0).total_compressed_size for group in row_groups)
    sent = sum(request.bytes_sent for request in reads)
    footer = 1 << 16  # what pyarrow reads first; a longer footer takes a second request
    if exact:
        assert wanted < sent < 1.15 * wanted + footer
    else:
        assert sent > wanted + (5 << 20)


def test_auto_tokenizer_loads(server, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special)
    tokenizer.train_from_iterator(["to be or not to be, that is the question"] * 3, trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 64}
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    server.add_repo("model", "Org/tok", files)
    code = """
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("Org/tok")
print(json.dumps([tokenizer("to be, or not")["input_ids"], tokenizer.model_max_length]))
"""
    assert run_client(server, tmp_path, code) == [tokenizer.encode("to be, or not").ids, 64]


def test_errors_snapshots_and_listings_by_the_hub_client(server, tmp_path):
    old = server.add_repo("model", "Org/model", {"config.json": b"{}"}, revision="0123456789" * 4)
    files = {"a/b/x y.txt": b"x", "a/z.txt": b"zz", "config.json": b'{"new": 1}', "model.safetensors": bytes(1000)}
    new = server.add_repo("model", "Org/model", files)
    server.page_size = 2
    code = """
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
def error(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as exception:
        return type(exception).__name__
api = HfApi(token="hf_test")
folder = snapshot_download("Org/model")
info = api.model_info("Org/model", files_metadata=True)
paths = api.get_paths_info("Org/model", ["config.json", "a", "nothing"], expand=True)
print(json.dumps({
    "errors": [
        error(hf_hub_download, "Org/none", "config.json"),
        error(api.dataset_info, "Org/model"),
        error(hf_hub_download, "Org/model", "config.json", revision="none"),
        error(api.model_info, "Org/model", revision="none"),
        error(hf_hub_download, "Org/model", "none.json"),
        error(list, api.list_repo_tree("Org/model", "config.json")),
    ],
    "tree": [entry.path for entry in api.list_repo_tree("Org/model", recursive=True)],
    "folder": [entry.path for entry in api.list_repo_tree("Org/model", "a/b")],
    "paths": [[path.path, path.last_commit.oid] for path in paths],
    "lfs": [[sibling.rfilename, sibling.size] for sibling in info.siblings if sibling.lfs],
    "shas": [api.model_info("Org/model", revision=revision).sha for revision in (None, "main", sys.argv[1])],
    "snapshot": [open(f"{folder}/{name}").read() for name in ("a/b/x y.txt", "a/z.txt", "config.json")],
    "old": open(hf_hub_download("Org/model", "config.json", revision=sys.argv[1])).read(),
    "user": api.whoami()["name"],
}))
"""
    result = run_client(server, tmp_path, code, old)
    assert result["errors"] == [
        *["RepositoryNotFoundError"] * 2,
        *["RevisionNotFoundError"] * 2,
        *["RemoteEntryNotFoundError"] * 2,
    ]
    assert result["tree"] == ["a", "a/b", "a/b/x y.txt", "a/z.txt", "config.json", "model.safetensors"]
    assert any("cursor" in request.query for request in server.requests), "the listing took several pages"
    assert result["folder"] == ["a/b/x y.txt"]
    assert result["paths"] == [["a", new], ["config.json", new]]
    assert result["lfs"] == [["model.safetensors", 1000]]
    assert result["shas"] == [new, new, old]
    assert result["snapshot"] == ["x", "zz", '{"new": 1}']
    assert result["old"] == "{}"
    assert result["user"] == "tester"


def test_the_client_repeats_what_a_fault_broke(server, tmp_path):
    content = random.Random(0).randbytes(300_000)
    sha = server.add_repo("dataset", "Org/data", {"data/0.parquet": content})
    hooks = [
        first(1, Fault(status=429, headers={"Retry-After": "1"}), matching=lambda request: "/tree/" in request.path),
        first(2, Fault(status=503), matching=lambda request: "range" in request.headers),
    ]
    server.fault = lambda request: next(filter(None, (hook(request) for hook in hooks)), None)
    code = """
from huggingface_hub import HfFileSystem
file = HfFileSystem().open(f"datasets/Org/data@{sys.argv[1]}/data/0.parquet", cache_type="none")
file.seek(1000)
print(json.dumps(file.read(100_000).hex()))
"""
    assert run_client(server, tmp_path, code, sha) == content[1000:101_000].hex()

    def statuses(requests: list[Request]) -> list[int | None]:
        return [request.status for request in requests]

    trees = [request for request in server.requests if "/tree/" in request.path]
    assert statuses(trees) == [429, 200]
    assert trees[1].started_s - trees[0].started_s >= 1  # Retry-After
    reads = [request for request in server.requests if "range" in request.headers]
    assert statuses(reads) == [503, 503, 206]
    assert [request.fault is not None for request in reads] == [True, True, False]


def test_ranges(server):
    content = bytes(range(256)) * 1000
    sha = server.add_repo("model", "Org/model", {"w.bin": content, "empty": b""})
    path = f"/Org/model/resolve/{sha}/w.bin"
    ranges = {
        "bytes=0-0": (0, 1),
        "bytes=1000-99999": (1000, 100_000),
        "bytes=255000-": (255_000, 256_000),
        "bytes=-10": (255_990, 256_000),
        "bytes=255999-999999": (255_999, 256_000),
    }
    for header, (start, stop) in ranges.items():
        status, headers, body = get(server, path, Range=header)
        assert (status, body) == (206, content[start:stop])
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/256000"
    for header in ("bytes=256000-", "bytes=-0"):
        status, headers, body = get(server, path, Range=header)
        assert (status, headers["content-range"], body) == (416, "bytes */256000", b"")
    assert get(server, path, Range="bytes=0-1,5-6")[::2] == (200, content)
    status, headers, body = get(server, path, method="HEAD")
    assert (status, headers["content-length"], body) == (200, "256000", b"")
    assert headers["x-repo-commit"] == sha and headers["etag"] == headers["x-linked-etag"]
    assert get(server, f"/Org/model/resolve/{sha}/empty")[::2] == (200, b"")
    assert server.requests[0].bytes_sent == 1 and server.requests[-2].bytes_sent == 0


def test_faults_on_the_wire(server):
    content = bytes(200_000)
    sha = server.add_repo("dataset", "Org/data", {"x": content})
    path = f"/datasets/Org/data/resolve/{sha}/x"

    def broken(fault: Fault, **headers: str) -> tuple[int, dict[str, str], bytes]:
        server.fault = first(1, fault)
        return get(server, path, **headers)

    assert broken(Fault(status=500, body=b"no", headers={"X-Why": "test"}))[::2] == (500, b"no")
    with pytest.raises(http.client.IncompleteRead) as truncated:
        broken(Fault(truncate_at=70_000))
    assert len(truncated.value.partial) == server.requests[-1].bytes_sent == 70_000
    for reset_at in (0, 70_000):
        with pytest.raises(ConnectionResetError):
            broken(Fault(reset_at=reset_at))
    assert broken(Fault(ignore_range=True), Range="bytes=5-9")[::2] == (200, content)
    started = time.monotonic()
    assert len(broken(Fault(delay_s=0.2, bytes_per_second=500_000))[2]) == len(content)
    assert 0.55 < time.monotonic() - started < 5
    assert get(server, path)[::2] == (200, content)


def test_a_mistake_in_a_hook_fails_the_test():
    with pytest.raises(ZeroDivisionError), HubServer() as server:
        server.fault = lambda request: 1 / 0
        with pytest.raises(http.client.RemoteDisconnected):
            get(server, "/")


@pytest.mark.parametrize("cdn", [False, True])
@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_what_is_uploaded_can_be_downloaded(tmp_path, repo_type, cdn):
    source = random.Random(0)
    files = {"README.md": b"---\nlicense: mit\n---\n# Name\n", "weights.safetensors": source.randbytes(300_000)}
    files |= {"a/b/x y.txt": b"x", "a/empty.bin": b"", "big.txt": source.randbytes(11_000_000)}
    for path, content in files.items():
        (tmp_path / "folder" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / path).write_bytes(content)
    code = """
import hashlib, os
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
kind = {"repo_type": sys.argv[1]}
api = HfApi()
created = api.create_repo("tester/name", private=True, **kind)
api.create_repo("tester/name", exist_ok=True, **kind)
first = api.upload_folder(folder_path=sys.argv[2], repo_id="tester/name", **kind)
def status(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except HfHubHTTPError as error:
        return error.response.status_code
refused = [
    status(api.create_repo, "tester/name", **kind),
    status(api.create_repo, "Other/name", **kind),
    status(HfApi(token=False).create_repo, "tester/other", **kind),
    status(HfApi(token=False).repo_info, "tester/name", **kind),
    status(api.create_commit, "tester/name", [CommitOperationDelete("README.md")], commit_message="late",
           parent_commit="0" * 40, **kind),
]
operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("a/"), CommitOperationDelete("big.txt")]
second = api.create_commit("tester/name", operations, commit_message="second", parent_commit=first.oid, **kind)
def hashes(commit):
    folder = Path(snapshot_download("tester/name", revision=commit, **kind))
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
print(json.dumps({
    "url": str(created), "private": api.repo_info("tester/name", **kind).private, "refused": refused,
    "first": hashes(first.oid), "second": hashes(second.oid), "head": api.repo_info("tester/name", **kind).sha == second.oid,
}))
"""
    with HubServer(cdn=cdn) as server:
        result = run_client(server, tmp_path, code, repo_type, str(tmp_path / "folder"), HF_TOKEN="hf_test")
        puts = [request for request in server.requests if request.method == "PUT"]
        assert {request.status for request in puts} == {200}
        assert sorted(len(request.body) for request in puts) == [300_000, 11_000_000]
        assert not any("authorization" in request.headers for request in puts)
        assert result["url"].endswith("/datasets/tester/name" if repo_type == "dataset" else "/tester/name")
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}
    assert result["first"].pop(".gitattributes") and result["first"] == expected
    kept = {path: expected[path] for path in ("README.md", "weights.safetensors")}
    assert result["second"].pop(".gitattributes")
    assert result["second"] == kept | {"new.txt": hashlib.sha256(b"new").hexdigest()}
    assert result["private"] and result["head"]
    assert result["refused"] == [409, 403, 401, 404, 412]
