"""A Hugging Face Hub on the loopback interface, for tests that use the real clients.

`HubServer` answers the requests that huggingface_hub 2.4, datasets 5.2 and transformers 5.23 make to download from
model and dataset repositories, and to create them and upload to them (HF_HUB_DISABLE_XET=1), keeps a log of the requests,
and breaks answers as a test wishes:

    with HubServer() as server:
        sha = server.add_repo("dataset", "Org/data", {"README.md": b"...", "data/a.parquet": Path("a.parquet")})
        server.fault = first(2, Fault(status=503), matching=lambda request: "/resolve/" in request.path)
        subprocess.run([sys.executable, "client.py"], env=client_environment(server, tmp_path), check=True)
        assert [request.status for request in server.requests if request.fault] == [503, 503]

The clients read HF_ENDPOINT when they are imported, so client code belongs in a subprocess.

Unlike huggingface.co, the server sends large files itself (there, each request for one is redirected to a signed address
on a storage host and so costs two; `HubServer(cdn=True)` does that), answers 404 for a missing repository whoever asks
(there, 401 without a token), compresses nothing, knows only repositories with a namespace, and takes large files whole (there,
those above 5 GB in parts). Any token is that of the user `tester`, a member of `Org`, who may read and write what is theirs.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

CHUNK_BYTES = 1 << 16
# What the Hub keeps in LFS: these endings (its default .gitattributes has more) and everything from 10 MB on.
LFS_SUFFIXES, LFS_BYTES = (".parquet", ".safetensors", ".bin", ".pt", ".gz"), 10_000_000
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """How to break one answer. What is left at its default stays as the server would have it."""

    status: int | None = None  # answer this, with `body`, instead of the real answer
    headers: dict[str, str] = field(default_factory=dict)  # added to the answer's, or replacing them
    body: bytes = b""  # only with `status`
    delay_s: float = 0.0  # before the first byte of the answer
    truncate_at: int | None = None  # body bytes after which the connection is closed in good order (FIN)
    reset_at: int | None = None  # body bytes after which the connection is reset (RST); 0: before the status line
    ignore_range: bool = False  # answer a Range request with 200 and the whole file, as some proxies do
    bytes_per_second: float | None = None  # pace of the body


@dataclass
class Request:
    """One request as it came in, and what became of it."""

    method: str
    path: str  # percent-encoded, without the query
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    body: bytes
    started_s: float  # time.monotonic()
    fault: Fault | None = None
    status: int | None = None  # None as long as nothing was answered
    bytes_sent: int = 0  # of the body, counted before each write: never too few once the client has them


def _chunks(content: bytes | Path, start: int, stop: int, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield bytes `start` to `stop` (exclusive) of a file's content, at most `size` at a time."""
    with open(content, "rb") if isinstance(content, Path) else contextlib.nullcontext() as file:
        if file:
            file.seek(start)
        for position in range(start, stop, size):
            end = min(position + size, stop)
            yield file.read(end - position) if file else content[position:end]


class Blob:
    """The content of one file, its size in bytes and its hashes."""

    def __init__(self, content: bytes | Path) -> None:
        self.content = content
        self.size = content.stat().st_size if isinstance(content, Path) else len(content)
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size)
        for chunk in _chunks(content, 0, self.size):
            sha256.update(chunk)
            git.update(chunk)
        self.sha256, self.git_oid = sha256.hexdigest(), git.hexdigest()

    def entry(self, path: str) -> dict:
        """Return the file's entry in a tree listing. Of an LFS file, `oid` is that of the pointer kept in git."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.git_oid}
        if _is_large(path, self.size):
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
            entry["oid"] = Blob(pointer.encode()).git_oid
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(pointer)}
        return entry


def _is_large(path: str, size: int) -> bool:
    """Whether a file is kept in LFS; an empty one cannot be."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES)


@dataclass
class Answer:
    """An answer whose body is bytes `start` to `stop` of `content`."""

    status: int
    content: bytes | Path
    start: int
    stop: int
    headers: dict[str, str]


def _json(value: object, status: int = 200, **headers: str) -> Answer:
    body = json.dumps(value).encode()
    return Answer(status, body, 0, len(body), {"Content-Type": "application/json", **headers})


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.answer = _json({"error": message}, status)
        self.answer.headers |= {"X-Error-Message": message, **headers}


class NotFound(Refused):
    """A 404: the clients choose their exception by `code`, which goes into X-Error-Code."""

    def __init__(self, code: str, message: str, **headers: str) -> None:
        super().__init__(404, message, **{"X-Error-Code": code, **headers})


@dataclass
class Repo:
    """A repository: the files of each commit, by path, and the branches that point to commits."""

    repo_type: str
    repo_id: str
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], branch: str = "main", sha: str | None = None) -> str:
        """Make `files` the content of a branch; return the commit's sha (40 hex digits), if not given a hash of the files."""
        listing = [self.repo_type, self.repo_id, *sorted(f"{path} {blob.git_oid}" for path, blob in files.items())]
        sha = sha or hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str | None) -> str:
        """Return the sha that a (percent-encoded) branch or full sha stands for; raises NotFound."""
        name = unquote(revision or "main")
        sha = self.branches.get(name, name)
        if sha not in self.commits:
            raise NotFound("RevisionNotFound", f"Invalid rev id: {name}")
        return sha

    def entries(self, sha: str, expand: bool) -> list[dict]:
        """Return the entries of all files and folders of a commit, by path."""
        entries = [blob.entry(path) for path, blob in self.commits[sha].items()]
        for folder in {folder for path in self.commits[sha] for folder in PurePosixPath(path).parents if folder.name}:
            oid = hashlib.sha1(f"{sha}{folder}".encode()).hexdigest()
            entries.append({"type": "directory", "path": str(folder), "size": 0, "oid": oid})
        if expand:
            entries = [{**entry, "lastCommit": {"id": sha, "title": "Add files", "date": DATE}} for entry in entries]
        return sorted(entries, key=lambda entry: entry["path"])


def first(
    count: int,
    fault: Fault,
    matching: Callable[[Request], bool] = lambda request: True,
) -> Callable[[Request], Fault | None]:
    """Return a fault hook that breaks the first `count` requests that match."""
    left = iter(range(count))
    return lambda request: fault if matching(request) and next(left, None) is not None else None


class HubServer:
    """The server: a context manager that listens on a free port of 127.0.0.1 until it is left.

    Leaving it raises the first exception of a route or a fault hook, so that a mistake there fails the test.

    Args:
        cdn: redirect requests for LFS files to a signed address on a second port, valid until `expire_signatures()`.
        port: to listen on; 0 for a free one.
    """

    def __init__(self, cdn: bool = False, port: int = 0) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}  # by type ("model", "dataset") and id
        self.requests: list[Request] = []  # in the order of arrival
        self.fault: Callable[[Request], Fault | None] | None = None  # called for one request at a time
        self.page_size = 1000  # entries in a page of a tree listing, as on the real Hub (50 if expanded)
        self.errors: list[BaseException] = []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.stored: dict[str, Blob] = {}  # on the storage host, by sha256
        self.signature = 0  # the one that the storage host takes
        self._hosts = [_HttpServer(self, address) for address in [("127.0.0.1", port), ("127.0.0.1", 0)][: 1 + cdn]]
        self.endpoint, *storage = [f"http://127.0.0.1:{host.server_port}" for host in self._hosts]
        self.storage = storage[0] if storage else None

    @property
    def connections(self) -> int:
        """TCP connections that were made so far."""
        return sum(host.connections for host in self._hosts)

    def expire_signatures(self) -> None:
        """Refuse the signed addresses that were given out so far."""
        self.signature += 1

    def __enter__(self) -> "HubServer":
        for host in self._hosts:
            threading.Thread(target=host.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.closing.set()  # wakes the answers that are delayed or paced
        for host in self._hosts:
            host.shutdown()
            host.server_close()
        if self.errors and kind is None:
            raise self.errors[0]

    def add_repo(
        self,
        repo_type: str,
        repo_id: str,
        files: dict[str, bytes | Path],
        revision: str | None = None,
    ) -> str:
        """Commit `files` as the whole content of a "model" or "dataset" repository and return the commit's sha.

        `main` moves to this commit, older ones stay readable. The sha (40 hex digits) is `revision` or a hash of the
        files.
        """
        repo = self.repos.setdefault((repo_type, repo_id), Repo(repo_type, repo_id))
        return repo.commit({path: Blob(content) for path, content in files.items()}, sha=revision)

    def answer(self, request: Request) -> Answer:
        """Return the answer of the first route that fits; 501, which no client repeats, shows where one is missing."""
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, function in ROUTES:
            if method == route_method and (match := re.fullmatch(pattern, request.path)):
                groups = match.groupdict()
                try:
                    if "id" in groups:  # then the route wants the repository instead
                        key = ("dataset" if groups.pop("kind") == "datasets" else "model", groups.pop("id"))
                        repo = self.repos.get(key)
                        if repo is None or (repo.private and "authorization" not in request.headers):
                            raise NotFound("RepoNotFound", "Repository not found")
                        groups["repo"] = repo
                    return function(self, request, **groups)
                except Refused as error:
                    return error.answer
        return _json({"error": f"hub_server has no route for {request.method} {request.path}"}, 501)


USER, ORGANISATION = "tester", "Org"


def _check_writer(request: Request, repo_id: str) -> None:
    """Raise Refused unless the request has a token, and its user may write there."""
    if "authorization" not in request.headers:
        raise Refused(401, "Invalid username or password.")
    if repo_id.partition("/")[0] not in (USER, ORGANISATION):
        raise Refused(403, f"You don't have the rights to write to {repo_id}")


def whoami(hub: HubServer, request: Request) -> Answer:
    """The one user that there is."""
    if "authorization" not in request.headers:
        raise Refused(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return _json({"type": "user", "name": USER, "fullname": "", "orgs": [{"name": ORGANISATION}], "auth": auth})


def create_repo(hub: HubServer, request: Request) -> Answer:
    """A repository with the one file that the Hub puts into it; 409 if it is there already."""
    wanted = json.loads(request.body)
    repo_type = wanted.get("type") or "model"
    repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
    _check_writer(request, repo_id)
    answer = {"url": f"{hub.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}", "name": repo_id}
    with hub.lock:
        if (repo_type, repo_id) in hub.repos:
            return _json({**answer, "error": f"You already created this {repo_type} repo"}, 409)
        repo = hub.repos[repo_type, repo_id] = Repo(repo_type, repo_id, private=wanted.get("visibility") == "private")
        repo.commit({".gitattributes": Blob("".join(f"*{s} filter=lfs\n" for s in LFS_SUFFIXES).encode())})
    return _json(answer)


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    """The header of a card: every one is good enough."""
    return _json({"errors": [], "warnings": []})


def preupload(hub: HubServer, request: Request, repo: Repo, revision: str) -> Answer:
    """How each file is to be uploaded."""
    _check_writer(request, repo.repo_id)
    there = repo.commits[repo.resolve(revision)]
    files = []
    for file in json.loads(request.body)["files"]:
        mode = "lfs" if _is_large(file["path"], file["size"]) else "regular"
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        if file["path"] in there:
            entry = there[file["path"]].entry(file["path"])
            files[-1]["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]  # of the content, not of a pointer
    return _json({"files": files})


def create_branch(hub: HubServer, request: Request, repo: Repo, branch: str) -> Answer:
    """A branch from a commit (default: the head of main); 409 if it is there."""
    _check_writer(request, repo.repo_id)
    with hub.lock:
        if unquote(branch) in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[unquote(branch)] = repo.resolve(json.loads(request.body or b"{}").get("startingPoint"))
    return _json({})


def lfs_batch(hub: HubServer, request: Request, repo: Repo) -> Answer:
    """Signed addresses for the contents that the storage does not have."""
    _check_writer(request, repo.repo_id)
    objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(request.body)["objects"]]
    for wanted in objects:
        if wanted["oid"] not in hub.stored:
            address = f"{hub.storage or hub.endpoint}/storage/{wanted['oid']}?Signature=s3cr3t{hub.signature}"
            wanted["actions"] = {"upload": {"href": address, "header": {}}}
    return _json({"transfer": "basic", "objects": objects})


def store(hub: HubServer, request: Request, sha256: str) -> Answer:
    """A content for the storage, whose address is its hash."""
    if request.query.get("Signature") != [f"s3cr3t{hub.signature}"]:
        raise Refused(403, "the signature has expired")
    blob = Blob(request.body)
    if blob.sha256 != sha256:
        raise Refused(400, f"the content's SHA-256 is {blob.sha256}")
    hub.stored[sha256] = blob
    return Answer(200, b"", 0, 0, {"ETag": f'"{sha256}"'})


def commit(hub: HubServer, request: Request, repo: Repo, revision: str) -> Answer:
    """A commit of operations, one a line; all or none of them."""
    _check_writer(request, repo.repo_id)
    with hub.lock:
        head, branch = repo.resolve(revision), unquote(revision)
        files = dict(repo.commits[head])
        for line in request.body.splitlines():
            operation, value = (item := json.loads(line))["key"], item["value"]
            if operation == "header":
                if value.get("parentCommit") not in (None, head):
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif operation == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif operation == "lfsFile":
                if value["oid"] not in hub.stored:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = hub.stored[value["oid"]]
            elif operation == "deletedFile":
                del files[value["path"]]
            elif operation == "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                files = {path: blob for path, blob in files.items() if not path.startswith(folder)}
            else:
                raise Refused(400, f"hub_server does not know the operation {operation}")
        sha = repo.commit(files, branch)
    url = f"{hub.endpoint}/{'datasets/' if repo.repo_type == 'dataset' else ''}{repo.repo_id}/commit/{sha}"
    return _json({"success": True, "commitOid": sha, "commitUrl": url})


def repo_info(hub: HubServer, request: Request, repo: Repo, revision: str | None) -> Answer:
    """The commit and the names of its files; with `blobs` their sizes and hashes too."""
    sha, siblings = repo.resolve(revision), []
    for path, blob in sorted(repo.commits[sha].items()):
        siblings.append({"rfilename": path})
        if _flag(request.query, "blobs"):
            entry = blob.entry(path)
            siblings[-1] |= {"size": blob.size, "blobId": entry["oid"]}
            if lfs := entry.get("lfs"):
                siblings[-1]["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    info = {"id": repo.repo_id, "sha": sha, "createdAt": DATE, "lastModified": DATE, "siblings": siblings}
    return _json({**info, "private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0})


def tree(hub: HubServer, request: Request, repo: Repo, revision: str, path: str | None) -> Answer:
    """The entries below a folder, a page at a time; for a file the answer is EntryNotFound, as on the real Hub."""
    sha, expand = repo.resolve(revision), _flag(request.query, "expand")
    prefix = unquote(path) + "/" if path else ""
    entries = [entry for entry in repo.entries(sha, expand) if entry["path"].startswith(prefix)]
    if prefix and not entries:
        raise NotFound("EntryNotFound", f"{prefix[:-1]} does not exist on {revision}")
    if not _flag(request.query, "recursive"):
        entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
    start = int(request.query.get("cursor", ["0"])[0])
    stop = start + (min(50, hub.page_size) if expand else hub.page_size)
    if stop >= len(entries):
        return _json(entries[start:])
    query = urlencode({**request.query, "cursor": stop}, doseq=True)
    return _json(entries[start:stop], Link=f'<{hub.endpoint}{request.path}?{query}>; rel="next"')


def paths_info(hub: HubServer, request: Request, repo: Repo, revision: str) -> Answer:
    """The entries of the paths in the form; one that does not exist is left out."""
    form = parse_qs(request.body.decode())
    entries = repo.entries(repo.resolve(revision), _flag(form, "expand"))
    return _json([entry for entry in entries if entry["path"] in form.get("paths", [])])


def resolve(hub: HubServer, request: Request, repo: Repo, revision: str, path: str) -> Answer:
    """A file, or the one range of it that is asked for (several ranges: the whole file, as RFC 9110 allows)."""
    sha, path = repo.resolve(revision), unquote(path)
    if path not in repo.commits[sha]:
        raise NotFound("EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
    blob = repo.commits[sha][path]
    headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.git_oid}"', "Accept-Ranges": "bytes"}
    if "lfs" in blob.entry(path):
        headers |= {"ETag": f'"{blob.sha256}"', "X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
        if hub.storage:
            hub.stored[blob.sha256] = blob
            headers["Location"] = f"{hub.storage}/storage/{blob.sha256}?Expires=1&Signature=s3cr3t{hub.signature}"
            return Answer(302, b"", 0, 0, headers)
    return _content(request, blob, headers)


def stored(hub: HubServer, request: Request, sha256: str) -> Answer:
    """A file on the storage host: for whoever has a signature that is still good, and no second authorization."""
    if "authorization" in request.headers:
        return Answer(400, b"", 0, 0, {})
    if request.query.get("Signature") != [f"s3cr3t{hub.signature}"]:
        return Answer(403, b"", 0, 0, {})
    blob = hub.stored[sha256]
    return _content(request, blob, {"ETag": f'"{blob.sha256}"', "Accept-Ranges": "bytes"})


def _content(request: Request, blob: Blob, headers: dict[str, str]) -> Answer:
    """A file or the one range of it that is asked for."""
    wanted = re.fullmatch(r"bytes=(?=.*\d)(\d*)-(\d*)", request.headers.get("range", ""))
    if not wanted or request.method == "HEAD" or (request.fault and request.fault.ignore_range):
        return Answer(200, blob.content, 0, blob.size, headers)
    low, high = wanted.groups()
    start = int(low) if low else max(0, blob.size - int(high))  # "-N" asks for the last N bytes
    stop = min(int(high) + 1, blob.size) if low and high else blob.size
    if start >= stop:
        return Answer(416, b"", 0, 0, {**headers, "Content-Range": f"bytes */{blob.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
    return Answer(206, blob.content, start, stop, headers)


def _flag(query: dict[str, list[str]], name: str) -> bool:
    return query.get(name, [""])[0].lower() in ("true", "1")


# A route gets the server, the request and the groups of its pattern, `kind` and `id` as the repository that they name.
_REPO = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repo),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", _REPO + r"/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", _REPO + r"/branch/(?P<branch>[^/]+)", create_branch),
    ("POST", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
    ("PUT", r"/storage/(?P<sha256>[0-9a-f]{64})", store),
    ("POST", _REPO + r"/commit/(?P<revision>[^/]+)", commit),
    ("GET", _REPO + r"(?:/revision/(?P<revision>[^/]+))?", repo_info),
    ("GET", _REPO + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", tree),
    ("POST", _REPO + r"/paths-info/(?P<revision>[^/]+)", paths_info),
    ("GET", r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
    ("GET", r"/storage/(?P<sha256>[0-9a-f]{64})", stored),
]


class _HttpServer(ThreadingHTTPServer):
    request_queue_size = 128  # the default, 5, makes a burst of connections wait a second for the next SYN

    def __init__(self, hub: HubServer, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.hub, self.connections = hub, 0

    def process_request(self, request: object, client_address: object) -> None:
        self.connections += 1  # in the one thread that accepts
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # that one is a client that went away, as it may
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    """One connection: reads its requests, logs them, and sends each answer whole or as its fault says."""

    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True  # head and body are two writes: Nagle would hold the second back for 40 ms

    def _serve(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))  # even if unused: the next request follows it
        request = Request(self.command, url.path, parse_qs(url.query), headers, body, time.monotonic())
        with hub.lock:  # so that a hook may count without a lock of its own
            hub.requests.append(request)
            request.fault = hub.fault(request) if hub.fault else None
        fault = request.fault or Fault()
        hub.closing.wait(fault.delay_s)
        if fault.reset_at == 0:
            return self._reset()
        broken = None if fault.status is None else Answer(fault.status, fault.body, 0, len(fault.body), {})
        answer = broken or hub.answer(request)
        request.status = answer.status
        self.send_response_only(answer.status)
        headers = {"Date": self.date_time_string(), **answer.headers, "Content-Length": answer.stop - answer.start}
        for name, value in {**headers, **fault.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return None
        cuts = [answer.start + cut for cut in (fault.truncate_at, fault.reset_at) if cut is not None]
        end, pace = min([answer.stop, *cuts]), fault.bytes_per_second
        # A paced body goes out in 20 pieces a second, so that it trickles and does not come in bursts.
        for chunk in _chunks(answer.content, answer.start, end, max(1, int(pace / 20)) if pace else CHUNK_BYTES):
            request.bytes_sent += len(chunk)
            self.wfile.write(chunk)
            hub.closing.wait(len(chunk) / pace if pace else 0)
        if end < answer.stop:
            self.close_connection = True
            if fault.reset_at is not None:
                self._reset()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

    def _reset(self) -> None:
        """End the connection with an RST: what close does with a linger time of 0, if no shutdown sent a FIN first."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: HubServer.requests is the log."""


def client_environment(server: HubServer, home: Path) -> dict[str, str]:
    """Return the environment for a client: this process's without its Hub settings, tokens and proxies."""
    foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|.*_PROXY$", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
    disabled = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK")
    return {**environment, **dict.fromkeys(disabled, "1"), "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home)}
