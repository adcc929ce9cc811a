"""Files on the Hub, read by ranges of bytes that are checked, for runs that last longer than the network holds.

A read gives exactly the bytes that the file has there, or raises an error that names the file, the rank and the reason,
within a budget below the time-out of the collectives: the rank that cannot read is the one that says so.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urljoin, urlsplit

from huggingface_hub import get_session, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from recipe.data.corpus import DataError

BUDGET_S = 420.0
"""Seconds for one read with all attempts and waits: above the five minutes of the Hub's rate-limit window, below
the ten after which a collective gives up."""
BUFFER_BYTES = 1 << 20
"""Buffer for files that are read line by line: io.BufferedReader(RemoteFile(url, size), BUFFER_BYTES)."""
MAX_REDIRECTS = 5

_URL = re.compile(r"hf://datasets/(?P<repo>[^/@]+(/[^/@]+)?)@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+)/(?P<path>.+)")
_RETRIED = {408, 425, 429, 500, 502, 503, 504, *range(520, 528)}  # 520 on: Cloudflare cannot reach the server behind it
_EXPIRED = {400, 401, 403, 410}  # how storage hosts answer a signature that has expired
_REMEDIES = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "ask for access on the dataset's page, or use a token that has it",
    429: "log in with `hf auth login`, which raises the limit, wait five minutes, or read the text once with prepare_data.py",
    404: "the file is not in this revision, or the dataset is private: `hf auth login`",
}
# huggingface_hub moved from httpx to httpx2; its own error derives from the base of the errors of either.
_HttpError = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
_SECRET = re.compile(r"(?<=Bearer )[^\s'\"]+|(?<=\?)[^\s'\"]+|hf_\w+")

_lock, _statistics = threading.Lock(), {"requests": 0, "bytes": 0, "retries": 0, "redirects": 0}
_storage_urls: dict[str, str] = {}
"""Where the Hub keeps a file, by its address on the Hub: signed, valid for about an hour, and the same for all handles."""


class RemoteReadError(DataError):
    """A range of a file on the Hub that could not be read. One line; without tokens and signatures."""


def statistics() -> dict[str, int]:
    """This process's requests (redirects included), bytes of content received (also in vain), retries and redirects."""
    with _lock:
        return dict(_statistics)


@dataclass(frozen=True)
class RetryPolicy:
    """When an attempt is given up, and how long to wait before the next one.

    An attempt that has received n bytes may last connect_s + grace_s + n / min_bytes_per_s: one that trickles ends after
    20 s, and 2 MB (the text of a FineWeb row group) must arrive within a minute.
    """

    connect_s: float = 10.0
    """To connect to one address."""
    grace_s: float = 10.0
    """Without a byte, and before the pace counts."""
    min_bytes_per_s: float = 50_000.0
    backoff_s: float = 1.0
    """Before the second attempt; doubled before each further one, times a random 0.5 to 1, on top of Retry-After."""
    max_backoff_s: float = 30.0


_POLICY = RetryPolicy()


class RemoteFile(io.RawIOBase):
    """A file of a Hub dataset, as a seekable binary file that reads exactly what it is asked for.

    One request a read, on connections that all files of the process share. Different files may be used from different
    threads; one file only from one at a time. For many small reads, wrap it in io.BufferedReader.

    Args:
        url: hf://datasets/REPO@REVISION/PATH.
        size: of the file, bytes.
        budget_s: for one read, all attempts and waits included.
        endpoint: the Hub's address instead of HF_ENDPOINT.
    Raises:
        ValueError: if `url` has another form.
    """

    def __init__(
        self, url: str, size: int, budget_s: float = BUDGET_S, policy: RetryPolicy = _POLICY, endpoint: str | None = None
    ):
        parts = _URL.fullmatch(url)
        if not parts:
            raise ValueError(f"{url} is not of the form hf://datasets/REPO@REVISION/PATH")
        repo, revision, path = parts["repo"], unquote(parts["revision"]), parts["path"]
        self._hub_url = hf_hub_url(repo, path, repo_type="dataset", revision=revision, endpoint=endpoint)
        self.url, self.size, self._budget_s, self._policy = url, size, budget_s, policy
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the start of {self.url}")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, or all that are left: fewer only at the end of the file.

        Raises:
            RemoteReadError: if they could not be had within the budget, or ever.
        """
        if self.closed:
            raise ValueError(f"{self.url} is closed")
        start = min(self._position, self.size)
        stop = self.size if size is None or size < 0 else min(start + size, self.size)
        content = self._fetch(start, stop) if start < stop else b""
        self._position += len(content)
        return content

    readall = read

    def readline(self, size: int | None = -1) -> bytes:
        """Refused: the inherited one makes a request a byte."""
        raise io.UnsupportedOperation("wrap a RemoteFile in io.BufferedReader to read lines")

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _fetch(self, start: int, stop: int) -> bytes:
        policy, rank, began = self._policy, os.environ.get("RANK", "0"), time.monotonic()
        end = began + self._budget_s
        rng = random.Random(f"{rank} {self.url} {start}")  # the ranks must not come back all at once
        attempts, renewed, reason = 0, False, ""
        while True:
            attempts += 1
            try:
                return self._attempt(start, stop, end)
            except _Fault as fault:
                before, reason = reason, fault.reason
                wait_s = min(policy.max_backoff_s, policy.backoff_s * 2 ** min(attempts - 1, 20)) * rng.uniform(0.5, 1)
                if fault.expired or attempts > 2:  # a host that keeps failing may not be the one that the Hub names by now
                    _storage_urls.pop(self._hub_url, None)
                if fault.expired and not renewed:
                    renewed, wait_s = True, 0.0
                elif not fault.retried:
                    break
                elif fault.retry_after_s:
                    wait_s += fault.retry_after_s
                    reason += f", retry after {fault.retry_after_s:g} s"
                if time.monotonic() + wait_s >= end:
                    break
            _count(retries=1)
            time.sleep(wait_s)
        # The budget cuts the last attempt short, so the one before may tell more. Not chained, and cleaned: causes hold
        # signed addresses, and may quote a header.
        reason += f"; before: {before}" if before not in ("", reason) else ""
        reason = _SECRET.sub("...", " ".join(reason.split()))[:500]
        spent = f"attempts: {attempts}, time: {time.monotonic() - began:.1f} s of {self._budget_s:g} s"
        raise RemoteReadError(f"cannot read {self.url}, bytes {start} to {stop}, on rank {rank}: {reason} ({spent})")

    def _attempt(self, start: int, stop: int, end: float) -> bytes:
        """One attempt, until `end` (time.monotonic) at most; raises _Fault."""
        policy, began = self._policy, time.monotonic()
        transfer = _Transfer(self._hub_url, start, stop, self.size, policy)
        transfer.thread.start()
        while transfer.thread.is_alive():
            limit = began + policy.connect_s + policy.grace_s + transfer.received / policy.min_bytes_per_s
            left = min(limit, end) - time.monotonic()
            if left <= 0:
                transfer.abandoned = True
                raise _Fault(f"only {transfer.received} of {stop - start} bytes in {time.monotonic() - began:.1f} s")
            transfer.thread.join(left)
        if transfer.fault:
            raise transfer.fault
        return transfer.content


class _Fault(Exception):
    """Why an attempt failed, and what to do about it."""

    def __init__(self, reason: str, retried: bool = True, retry_after_s: float | None = None, expired: bool = False):
        super().__init__(reason)
        self.reason, self.retried, self.retry_after_s, self.expired = reason, retried, retry_after_s, expired


class _Transfer:
    """The requests of one attempt, on a thread of their own so that the reader can stop waiting for them at any time: no
    time-out of the HTTP library covers the look-up of a name, a row of dead addresses or a head that trickles in. An
    abandoned transfer closes its connection at the next byte, or at the read time-out."""

    def __init__(self, hub_url: str, start: int, stop: int, size: int, policy: RetryPolicy):
        self._hub_url, self._start, self._stop, self._size = hub_url, start, stop, size
        self._timeout = (policy.connect_s, policy.grace_s, policy.grace_s, policy.connect_s)  # connect, read, write, pool
        self.received, self.abandoned = 0, False
        self.content = b""
        self.fault: _Fault | None = None
        self.thread = threading.Thread(target=self._run, name="hub-read", daemon=True)

    def _run(self) -> None:
        try:
            if is_offline_mode():
                raise _Fault("HF_HUB_OFFLINE is set", retried=False)
            self.content = self._get()
        except _Fault as fault:
            self.fault = fault
        except Exception as error:
            # RuntimeError: huggingface_hub closed the shared session in another thread, for a failure of its own.
            passing = isinstance(error, (_HttpError, OSError, RuntimeError))
            self.fault = _Fault(f"{type(error).__name__}: {error}", retried=passing)

    def _get(self) -> bytes:
        url = _storage_urls.get(self._hub_url, self._hub_url)
        for _ in range(MAX_REDIRECTS + 1):
            # The token is for the Hub alone: a storage host has no right to it, and S3 refuses a request that has both.
            headers = build_hf_headers(token=None if urlsplit(url)[:2] == urlsplit(self._hub_url)[:2] else False)
            # A compressed answer would not be the bytes that were asked for.
            headers |= {"Range": f"bytes={self._start}-{self._stop - 1}", "Accept-Encoding": "identity"}
            _count(requests=1)
            # Redirects are followed here: each host gets its own headers, and the last address is kept.
            with get_session().stream("GET", url, headers=headers, timeout=self._timeout, follow_redirects=False) as response:
                if response.has_redirect_location:
                    url = urljoin(url, response.headers["Location"])
                    _count(redirects=1)
                    continue
                self._check(response, redirected=url != self._hub_url)
                if url != self._hub_url:
                    _storage_urls[self._hub_url] = url
                return self._body(response)
        raise _Fault(f"more than {MAX_REDIRECTS} redirects")

    def _check(self, response, redirected: bool) -> None:
        """Raise _Fault unless the head of the answer promises the range that was asked for."""
        status, headers = response.status_code, response.headers
        if status == 200:
            raise _Fault("status 200 instead of 206: a server or proxy on the way ignores Range")
        if status != 206:
            said = (f"status {status} {response.reason_phrase}", _REMEDIES.get(status), headers.get("X-Error-Message"))
            expired = redirected and status in _EXPIRED
            raise _Fault("; ".join(filter(None, said)), status in _RETRIED, _retry_after_s(headers), expired)
        wanted = f"bytes {self._start}-{self._stop - 1}/{self._size}"
        if (promised := headers.get("Content-Range", "").strip()) != wanted:
            raise _Fault(f"Content-Range is {promised!r} instead of {wanted!r}")
        if (length := headers.get("Content-Length")) is not None and length.strip() != str(self._stop - self._start):
            raise _Fault(f"Content-Length is {length} instead of {self._stop - self._start}")
        if (encoding := headers.get("Content-Encoding", "identity")) != "identity":
            raise _Fault(f"Content-Encoding is {encoding}")

    def _body(self, response) -> bytes:
        chunks = []
        for chunk in response.iter_raw():
            self.received += len(chunk)
            _count(bytes=len(chunk))
            if self.abandoned or self.received > self._stop - self._start:
                break
            chunks.append(chunk)
        if self.received != self._stop - self._start:
            raise _Fault(f"{self.received} bytes instead of {self._stop - self._start}")
        return b"".join(chunks)


def _count(**increments: int) -> None:
    with _lock:
        for name, increment in increments.items():
            _statistics[name] += increment


def _retry_after_s(headers) -> float | None:
    """Seconds that the server asks to wait: Retry-After, else the end of the Hub's window of requests (RateLimit)."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", value):
        return float(value)
    try:
        now = _date(headers["Date"]) if "Date" in headers else datetime.now(UTC)  # the server's clock: ours may be wrong
        return max(0.0, (_date(value) - now).total_seconds())
    except ValueError:  # neither
        window = re.search(r"\br=0\s*;\s*t=([0-9]+)", headers.get("RateLimit", ""))
        return float(window[1]) if window else None


def _date(value: str) -> datetime:
    return parsedate_to_datetime(value).replace(tzinfo=UTC)  # RFC 9110: always GMT, however it is written
