"""Ranged reads over a loopback Hub that fails in every way that a network does, with the client of huggingface_hub."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from itertools import islice
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_helpers import open_training
from hub_server import Fault, HubServer, Request, first
from launch import free_port
from recipe.data import corpus as corpus_module
from recipe.data import remote
from recipe.data.corpus import Corpus, DataError
from recipe.data.remote import BUFFER_BYTES, RemoteFile, RemoteReadError, RetryPolicy
from recipe.data.stream import RowStream

CONTENT = random.Random(0).randbytes(400_000)
START, STOP = 1000, 301_000
POLICY = RetryPolicy(connect_s=0.3, grace_s=0.3, min_bytes_per_s=1e6, backoff_s=0.05, max_backoff_s=0.3)
REVISION = "0123456789" * 4
URL = f"hf://datasets/Org/data@{REVISION}/sample/10 BT/a.parquet"
TOKEN = "hf_TestTokenThatNobodyMaySee"
ALWAYS = 1_000_000


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fresh session of the Hub's client, with a token."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(remote, "_storage_urls", {})
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@contextlib.contextmanager
def serve(**options: object) -> Iterator[HubServer]:
    with HubServer(**options) as server:
        server.add_repo("dataset", "Org/data", {"sample/10 BT/a.parquet": CONTENT}, REVISION)
        yield server


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serve() as server:
        yield server


@pytest.fixture
def cdn() -> Iterator[HubServer]:
    with serve(cdn=True) as server:
        yield server


def open_remote(endpoint: str, budget_s: float = 20, size: int = len(CONTENT), policy: RetryPolicy = POLICY) -> RemoteFile:
    return RemoteFile(URL, size, budget_s, policy, endpoint)


def read(file: RemoteFile, start: int = START, stop: int = STOP) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def failure(file: RemoteFile, budget_s: float) -> str:
    """The message of the error that a read ends with, which must be the one that the user can do something with."""
    began = time.monotonic()
    with pytest.raises(RemoteReadError) as caught:
        read(file)
    assert time.monotonic() - began < budget_s + 1
    message = str(caught.value)
    assert isinstance(caught.value, DataError) and "\n" not in message
    assert URL in message and "rank 3" in message and "attempts: " in message and " s of " in message
    assert "TestToken" not in message and "s3cr3t" not in message and "Signature" not in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    return message


RECOVERABLE = {
    "429": (2, Fault(status=429)),
    "408": (1, Fault(status=408)),
    "425": (1, Fault(status=425)),
    "500": (1, Fault(status=500, body=b"no")),
    "502": (3, Fault(status=502)),
    "503": (2, Fault(status=503)),
    "504": (1, Fault(status=504)),
    "reset before the head": (2, Fault(reset_at=0)),
    "reset in mid-body": (2, Fault(reset_at=100_000)),
    "short body": (2, Fault(truncate_at=100_000)),
    "only the head": (1, Fault(truncate_at=0)),
    "Content-Length too small": (1, Fault(headers={"Content-Length": "299999"})),
    "Content-Length too large": (1, Fault(headers={"Content-Length": "300001"})),
    "wrong start": (1, Fault(headers={"Content-Range": f"bytes {START + 1}-{STOP}/{len(CONTENT)}"})),
    "wrong end": (1, Fault(headers={"Content-Range": f"bytes {START}-{STOP - 2}/{len(CONTENT)}"})),
    "wrong total": (1, Fault(headers={"Content-Range": f"bytes {START}-{STOP - 1}/{len(CONTENT) + 1}"})),
    "unknown total": (1, Fault(headers={"Content-Range": f"bytes {START}-{STOP - 1}/*"})),
    "no range": (1, Fault(headers={"Content-Range": ""})),
    "compressed": (1, Fault(headers={"Content-Encoding": "gzip"})),
    "200 for a range": (2, Fault(ignore_range=True)),
    "silence": (1, Fault(delay_s=5)),
    "a trickle": (2, Fault(bytes_per_second=20)),
    "a tenth of the pace": (1, Fault(bytes_per_second=100_000)),
}


@pytest.mark.parametrize("name", RECOVERABLE)
def test_a_fault_that_passes_gives_the_same_bytes(hub: HubServer, name: str) -> None:
    count, fault = RECOVERABLE[name]
    clean = sha256(read(open_remote(hub.endpoint)))
    assert clean == sha256(CONTENT[START:STOP])
    hub.requests.clear()
    hub.fault = first(count, fault)
    began = time.monotonic()
    assert sha256(read(open_remote(hub.endpoint))) == clean
    assert time.monotonic() - began < 4
    assert [request.fault is not None for request in hub.requests] == [True] * count + [False]
    assert {request.headers["range"] for request in hub.requests} == {f"bytes={START}-{STOP - 1}"}
    assert {request.headers["accept-encoding"] for request in hub.requests} == {"identity"}


FINAL = {
    "503 for longer than the budget": (Fault(status=503), "status 503"),
    "504": (Fault(status=504), "status 504"),
    "reset in mid-body": (Fault(reset_at=100_000), "ReadError"),
    "short body": (Fault(truncate_at=100_000), "RemoteProtocolError"),
    "wrong range": (
        Fault(headers={"Content-Range": "bytes 0-9/10"}),
        "Content-Range is 'bytes 0-9/10' instead of 'bytes 1000-300999/400000'",
    ),
    "200 for a range": (Fault(ignore_range=True), "200 instead of 206"),
    "silence": (Fault(delay_s=30), "ReadTimeout"),
    "a trickle": (Fault(bytes_per_second=20), r"only \d+ of 300000 bytes"),
    "a loop of redirects": (Fault(status=302, headers={"Location": "?Signature=s3cr3t"}), "redirects"),
}


@pytest.mark.parametrize("name", FINAL)
def test_a_fault_that_stays_ends_the_read_within_the_budget(hub: HubServer, name: str) -> None:
    fault, reason = FINAL[name]
    hub.fault = first(ALWAYS, fault)
    assert re.search(reason, failure(open_remote(hub.endpoint, budget_s=2), 2))
    assert len(hub.requests) >= 2


def test_one_byte_a_second(hub: HubServer) -> None:
    # Bytes come more often than the read time-out, so that only the pace tells.
    policy = replace(POLICY, grace_s=1.5)
    hub.fault = first(1, Fault(bytes_per_second=1))
    began = time.monotonic()
    assert read(open_remote(hub.endpoint, policy=policy)) == CONTENT[START:STOP]
    assert 1.8 < time.monotonic() - began < 3
    hub.fault = first(ALWAYS, Fault(bytes_per_second=1))
    assert re.search("only [1-3] of 300000 bytes", failure(open_remote(hub.endpoint, budget_s=3, policy=policy), 3))
    assert [request.fault is not None for request in hub.requests] == [True, False, True, True]


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "hf auth login"), (403, "ask for access"), (404, "Not Found"), (410, "Gone"), (416, "416")]
)
def test_refusals_are_not_repeated(hub: HubServer, status: int, reason: str) -> None:
    secrets = f"no,  {TOKEN}, Bearer Other.TestToken, https://storage/a?Signature=s3cr3t&x=y, {'x' * 900}"
    hub.fault = first(ALWAYS, Fault(status=status, headers={"X-Error-Message": secrets}))
    assert reason in failure(open_remote(hub.endpoint), 0)
    assert len(hub.requests) == 1


def test_a_file_that_is_not_there_or_shorter_than_said(hub: HubServer) -> None:
    with pytest.raises(
        RemoteReadError, match="404 Not Found; the file is not in this revision, .*; Entry not found .attempts: 1,"
    ):
        RemoteFile(f"hf://datasets/Org/data@{REVISION}/none", 10, 5, POLICY, hub.endpoint).read()
    file = open_remote(hub.endpoint, budget_s=1, size=len(CONTENT) + 1000)
    assert f"instead of 'bytes {START}-{STOP - 1}/401000'" in failure(file, 1)
    with pytest.raises(RemoteReadError, match="status 416.*attempts: 1,"):
        read(file, len(CONTENT), len(CONTENT) + 10)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("header", ["seconds", "date", "rate limit"])
def test_the_wait_that_the_server_asks_for(hub: HubServer, status: int, header: str) -> None:
    def fault(request: Request) -> Fault | None:
        headers = {
            "seconds": {"Retry-After": "1"},
            # Its clock is an hour ahead of ours.
            "date": {"Retry-After": formatdate(time.time() + 3601, usegmt=True), "Date": formatdate(time.time() + 3600)},
            "rate limit": {"RateLimit": '"resolvers";r=0;t=1'},
        }[header]
        return Fault(status=status, headers=headers) if len(hub.requests) == 1 else None

    hub.fault = fault
    assert read(open_remote(hub.endpoint)) == CONTENT[START:STOP]
    refused, answered = hub.requests
    assert (refused.status, answered.status) == (status, 206)
    assert 1 <= answered.started_s - refused.started_s < 2.5


@pytest.mark.parametrize("value", ["60", formatdate(time.time() + 3600, usegmt=True)], ids=["seconds", "date"])
def test_a_wait_beyond_the_budget_is_not_begun(hub: HubServer, value: str) -> None:
    hub.fault = first(1, Fault(status=429, headers={"Retry-After": value}))
    message = failure(open_remote(hub.endpoint, budget_s=30), 0)
    assert "status 429" in message and "retry after" in message and "attempts: 1" in message
    assert len(hub.requests) == 1


def test_503_for_a_second(hub: HubServer) -> None:
    began = time.monotonic()
    hub.fault = lambda request: Fault(status=503) if time.monotonic() < began + 1 else None
    assert read(open_remote(hub.endpoint)) == CONTENT[START:STOP]
    assert 1 <= time.monotonic() - began < 2
    assert {request.status for request in hub.requests[:-1]} == {503} and len(hub.requests) > 3


def test_connection_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    file = open_remote(f"http://127.0.0.1:{port}", budget_s=1)
    assert "ConnectError" in failure(file, 1)

    stack = contextlib.ExitStack()
    servers: list[HubServer] = []
    timer = threading.Timer(1, lambda: servers.append(stack.enter_context(serve(port=port))))
    timer.start()
    began = time.monotonic()
    try:
        assert read(open_remote(f"http://127.0.0.1:{port}")) == CONTENT[START:STOP]
    finally:
        timer.join()
        stack.close()
    assert time.monotonic() - began >= 1 and len(servers[0].requests) == 1


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket, int], None]) -> Iterator[str]:
    """A server without any rules: `answer` gets each connection, after its request, with its number."""
    closing = threading.Event()

    def serve_one(connection: socket.socket, number: int) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            answer(connection, number)

    def accept() -> None:
        number = 0
        while not closing.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(5)
                threading.Thread(target=serve_one, args=(connection, number), daemon=True).start()
                number += 1

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            closing.set()
            thread.join()


HEAD = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {START}-{STOP - 1}/{len(CONTENT)}\r\nConnection: close\r\n"


def trickle_head(connection: socket.socket) -> None:
    for byte in HEAD[:60].encode():  # no read of one byte takes long, so no time-out of a socket sees it
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def send_too_much(connection: socket.socket) -> None:
    connection.sendall(HEAD.encode() + b"\r\n" + CONTENT[START : STOP + 1])


def send_garbage(connection: socket.socket) -> None:
    connection.sendall(b"\x15\x03\x01\x00\x02\x02\x50")


@pytest.mark.parametrize("broken", [trickle_head, send_too_much, send_garbage])
def test_answers_that_no_proper_server_gives(broken: Callable[[socket.socket], None]) -> None:
    def once(connection: socket.socket, number: int) -> None:
        if number == 0:
            return broken(connection)
        return connection.sendall(HEAD.encode() + b"\r\n" + CONTENT[START:STOP])

    began = time.monotonic()
    with raw_server(once) as endpoint:
        assert read(open_remote(endpoint)) == CONTENT[START:STOP]
    assert time.monotonic() - began < 2
    with raw_server(lambda connection, number: broken(connection)) as endpoint:
        failure(open_remote(endpoint, budget_s=1), 1)


def hosts(server: HubServer) -> list[tuple[str, int | None]]:
    return [("storage" if "/storage/" in request.path else "hub", request.status) for request in server.requests]


def test_a_redirect_is_followed_once_and_again_when_its_signature_expires(cdn: HubServer) -> None:
    before = remote.statistics()
    for start in (0, 1000, 2000):  # as Corpus.read does: a new handle for each
        assert read(open_remote(cdn.endpoint), start, start + 100) == CONTENT[start : start + 100]
    assert hosts(cdn) == [("hub", 302)] + [("storage", 206)] * 3
    assert cdn.connections == 2
    after = remote.statistics()
    assert {name: after[name] - before[name] for name in after} == {
        "requests": 4, "bytes": 300, "retries": 0, "redirects": 1
    }  # fmt: skip

    cdn.requests.clear()
    cdn.expire_signatures()
    assert read(open_remote(cdn.endpoint)) == CONTENT[START:STOP]
    assert hosts(cdn) == [("storage", 403), ("hub", 302), ("storage", 206)]
    for request in cdn.requests:
        assert request.headers.get("authorization") == (None if "/storage/" in request.path else f"Bearer {TOKEN}")


@pytest.mark.parametrize("status", [403, 410])
def test_a_storage_host_that_refuses_a_fresh_signature(cdn: HubServer, status: int) -> None:
    read(open_remote(cdn.endpoint))
    cdn.requests.clear()
    cdn.fault = first(ALWAYS, Fault(status=status), matching=lambda request: "/storage/" in request.path)
    assert f"status {status}" in failure(open_remote(cdn.endpoint), 0)
    assert hosts(cdn) == [("storage", status), ("hub", 302), ("storage", status)]


def test_a_storage_host_that_fails_is_tried_again_and_then_asked_for_again(cdn: HubServer) -> None:
    read(open_remote(cdn.endpoint))
    cdn.requests.clear()
    cdn.fault = first(4, Fault(status=503), matching=lambda request: "/storage/" in request.path)
    assert read(open_remote(cdn.endpoint)) == CONTENT[START:STOP]
    assert hosts(cdn) == [("storage", 503)] * 3 + [("hub", 302), ("storage", 503), ("hub", 302), ("storage", 206)]


def test_a_renamed_repository(cdn: HubServer) -> None:
    moved = Fault(status=307, headers={"Location": f"/datasets/Org/data/resolve/{REVISION}/sample/10%20BT/a.parquet"})
    cdn.fault = first(1, moved, matching=lambda request: "/Org/old/" in request.path)
    file = RemoteFile(URL.replace("Org/data", "Org/old"), len(CONTENT), 5, POLICY, cdn.endpoint)
    assert read(file) == CONTENT[START:STOP]
    assert hosts(cdn) == [("hub", 307), ("hub", 302), ("storage", 206)]
    assert ["authorization" in request.headers for request in cdn.requests] == [True, True, False]
    assert read(file, 0, 5) == CONTENT[:5] and len(cdn.requests) == 4


def test_offline_mode_and_a_token_that_is_no_header(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure(open_remote(hub.endpoint), 0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_TestToken\u00e9")
    assert "UnicodeEncodeError" in failure(open_remote(hub.endpoint), 0)
    assert not hub.requests


def test_positions_and_ends(hub: HubServer) -> None:
    file = open_remote(hub.endpoint)
    assert file.readable() and file.seekable() and not file.writable()
    assert file.read(0) == b"" and not hub.requests
    assert file.seek(-10, io.SEEK_END) == len(CONTENT) - 10
    assert file.read(100) == CONTENT[-10:] and file.tell() == len(CONTENT)
    assert file.read(5) == b"" == file.read() and file.readinto(bytearray(3)) == 0
    assert file.seek(5, io.SEEK_END) == len(CONTENT) + 5 and file.read(1) == b""
    assert file.seek(10) == 10 and file.seek(5, io.SEEK_CUR) == 15
    buffer = bytearray(20)
    assert file.readinto(buffer) == 20 and buffer == CONTENT[15:35]
    assert file.read() == CONTENT[35:]
    assert len(hub.requests) == 3
    with pytest.raises(ValueError, match="before the start"):
        file.seek(-1)
    with pytest.raises(io.UnsupportedOperation, match="BufferedReader"):
        file.readline()
    file.close()
    with pytest.raises(ValueError, match="is closed"):
        file.read(1)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("hf://datasets/a/b@main/c/d e.txt", "/datasets/a/b/resolve/main/c/d%20e.txt"),
        ("hf://datasets/squad@main/x@y.txt", "/datasets/squad/resolve/main/x%40y.txt"),
        ("hf://datasets/a/b@refs/convert/parquet/x/0.parquet", "/datasets/a/b/resolve/refs%2Fconvert%2Fparquet/x/0.parquet"),
        ("hf://datasets/a/b@refs%2Fpr%2F1/x", "/datasets/a/b/resolve/refs%2Fpr%2F1/x"),
    ],
)
def test_addresses(url: str, path: str) -> None:
    assert RemoteFile(url, 1, endpoint="http://hub")._hub_url == "http://hub" + path


@pytest.mark.parametrize("url", ["hf://datasets/a/b/c", "hf://a/b@main/c", "https://huggingface.co/a", "x.parquet"])
def test_other_addresses(url: str) -> None:
    with pytest.raises(ValueError, match="REPO@REVISION/PATH"):
        RemoteFile(url, 1)


def test_lines_and_gzip(hub: HubServer) -> None:
    lines = [json.dumps({"text": random.Random(n).randbytes(2000).hex()}).encode() + b"\n" for n in range(500)]
    files = {"a.jsonl": b"".join(lines), "a.jsonl.gz": gzip.compress(b"".join(lines), 1)}
    sha = hub.add_repo("dataset", "Org/lines", files)
    hub.fault = first(2, Fault(truncate_at=100_000))

    def buffered(name: str) -> io.BufferedReader:
        file = RemoteFile(f"hf://datasets/Org/lines@{sha}/{name}", len(files[name]), 20, POLICY, hub.endpoint)
        return io.BufferedReader(file, BUFFER_BYTES)

    with buffered("a.jsonl") as handle:
        handle.seek(len(lines[0]) - 1)
        assert [handle.readline(), *handle] == [b"\n", *lines[1:]]
    assert len(hub.requests) == 2 + len(files["a.jsonl"]) // BUFFER_BYTES + 1
    hub.requests.clear()
    with buffered("a.jsonl.gz") as raw, gzip.open(raw) as handle:
        assert list(handle) == lines
    assert len(hub.requests) == len(files["a.jsonl.gz"]) // BUFFER_BYTES + 1


def write_parquet(path: Path, groups: int, rows: int, text_bytes: int) -> list[str]:
    source = random.Random(path.name)
    texts = [source.randbytes(text_bytes // 2).hex() for _ in range(groups * rows)]
    others = [source.randbytes(200).hex() for _ in texts]
    pq.write_table(pa.table({"url": others, "text": texts, "id": others}), path, row_group_size=rows, compression="none")
    return texts


@pytest.mark.parametrize("redirects", [False, True])
def test_pyarrow_asks_for_the_text_column_alone(tmp_path: Path, redirects: bool) -> None:
    path = tmp_path / "0.parquet"
    texts = write_parquet(path, groups=8, rows=50, text_bytes=4000)
    with HubServer(cdn=redirects) as hub:
        sha = hub.add_repo("dataset", "Org/data", {"0.parquet": path})

        def open_file() -> RemoteFile:
            return RemoteFile(f"hf://datasets/Org/data@{sha}/0.parquet", path.stat().st_size, 10, POLICY, hub.endpoint)

        footer = pq.ParquetFile(open_file()).metadata
        assert len(hub.requests) <= 2 + redirects
        hub.requests.clear()
        for group in range(8):
            with open_file() as handle:
                table = pq.ParquetFile(handle, metadata=footer).read_row_group(group, columns=["text"], use_threads=False)
            assert table.column(0).to_pylist() == texts[50 * group : 50 * (group + 1)]
        assert len(hub.requests) == 8
        assert hub.connections == 1 + redirects
        wanted = sum(footer.row_group(group).column(1).total_compressed_size for group in range(8))
        assert wanted <= sum(request.bytes_sent for request in hub.requests) < 1.05 * wanted

        # The error comes through pyarrow as it is.
        hub.fault = first(ALWAYS, Fault(status=401))
        with pytest.raises(RemoteReadError, match="status 401"):
            pq.ParquetFile(open_file(), metadata=footer).read_row_group(0, columns=["text"])


def test_a_large_row_group_comes_in_parts_as_its_documents_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request where it fits in the buffer. A part that fails is asked for again, or named."""
    path = tmp_path / "0.parquet"
    texts = write_parquet(path, groups=1, rows=5000, text_bytes=1000)
    local = open_training(path)
    size = local.footers[0].row_group(0).column(1).total_compressed_size
    with HubServer() as hub:
        sha = hub.add_repo("dataset", "Org/data", {"0.parquet": path})
        url = f"hf://datasets/Org/data@{sha}/0.parquet"
        corpus = replace(local, files=[url], remote=True)
        monkeypatch.setattr(corpus, "open", lambda file: RemoteFile(url, local.sizes[0], 1, POLICY, hub.endpoint))
        unit = corpus.units[0]

        monkeypatch.setattr(corpus_module, "PARQUET_BUFFER_BYTES", size)
        assert list(corpus.read(unit)) == texts
        assert len(hub.requests) == 1

        monkeypatch.setattr(corpus_module, "PARQUET_BUFFER_BYTES", size // 4)
        hub.requests.clear()
        documents = corpus.read(unit)
        first_part = list(islice(documents, 1000))
        assert len(hub.requests) < 3
        hub.fault = first(1, Fault(status=503))
        assert first_part + list(documents) == texts
        good = [request for request in hub.requests if request.status == 206]
        assert len(good) == 4 and len(hub.requests) == 5
        assert sum(request.bytes_sent for request in good) == size

        documents = corpus.read(unit)
        assert next(documents) == texts[0]
        hub.fault = first(ALWAYS, Fault(status=404))
        with pytest.raises(DataError, match=re.escape(url) + ".*status 404"):
            list(documents)


def random_faults(share: float, seed: int) -> Callable[[Request], Fault | None]:
    source = random.Random(seed)
    faults = [
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(status=500),
        Fault(status=503),
        Fault(reset_at=0),
        Fault(reset_at=100),
        Fault(truncate_at=100),
        Fault(ignore_range=True),
        Fault(headers={"Content-Range": "bytes 1-2/3"}),
        Fault(bytes_per_second=1),
    ]
    return lambda request: source.choice(faults) if source.random() < share else None


def test_threads_with_files_of_their_own(cdn: HubServer) -> None:
    cdn.fault = random_faults(0.2, seed=0)

    def work(seed: int) -> int:
        source = random.Random(seed)
        for _ in range(20):
            start = source.randrange(len(CONTENT))
            stop = min(len(CONTENT), start + source.randrange(1, 50_000))
            assert read(open_remote(cdn.endpoint), start, stop) == CONTENT[start:stop]
        return seed

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == list(range(8))
    assert sum(request.fault is not None for request in cdn.requests) > 20


class ByteEncoder:
    """A token a byte."""

    dtype = np.uint16
    hash = "bytes"
    chunk = 16

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]


def hash_of_batches(corpus: Corpus, workers: int) -> str:
    stream = RowStream(corpus, ByteEncoder(), sequence_length=256, seed=1, max_epochs=3, workers=workers)
    try:
        digest = hashlib.sha256()
        for _ in range(50):
            digest.update(stream.next_batch(64).tobytes())
        return digest.hexdigest()
    finally:
        stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_over_a_bad_network_gets_the_batches_of_the_local_files(
    fineweb_folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    local = open_training(fineweb_folder)
    clean = hash_of_batches(local, workers=0)
    with HubServer(cdn=True) as hub:
        sha = hub.add_repo("dataset", "Org/data", {Path(file).name: Path(file) for file in local.files})
        urls = [f"hf://datasets/Org/data@{sha}/{Path(file).name}" for file in local.files]

        def open_over_the_network(corpus: Corpus, file: int) -> RemoteFile:
            return RemoteFile(corpus.files[file], corpus.sizes[file], 20, POLICY, hub.endpoint)

        monkeypatch.setattr(Corpus, "open", open_over_the_network)
        hub.fault = random_faults(0.2, seed=workers)
        assert hash_of_batches(replace(local, files=urls, remote=True), workers) == clean
        broken = sum(request.fault is not None for request in hub.requests)
        assert broken > 3 and 0.05 < broken / len(hub.requests) < 0.5

        hub.fault = first(ALWAYS, Fault(status=404))
        with pytest.raises(DataError, match="status 404 Not Found.*attempts: 1"):
            hash_of_batches(replace(local, files=urls, remote=True), workers)
