"""What the tests of pushing have in common: the real client against the loopback Hub, and what it was told."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer, Repo, Request, client_environment
from launch import ROOT

TOKEN = "hf_CanaryOfTheEnvironment0123456789"
REPO = "tester/gpt2-tiny"


def push_environment(server: HubServer, home: Path, **extra: str) -> dict[str, str]:
    """Of a client that is logged in through HF_TOKEN."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return client_environment(server, home) | quiet | {"HF_TOKEN": TOKEN} | extra


def push(server: HubServer, home: Path, run: Path, *options: str, **extra: str) -> subprocess.CompletedProcess:
    """scripts/push.py RUN --repo tester/gpt2-tiny ..."""
    command = [sys.executable, str(ROOT / "scripts" / "push.py"), str(run), "--repo", REPO, *options]
    environment = push_environment(server, home, **extra)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def the_repo(server: HubServer, name: str = REPO) -> Repo:
    return server.repos["model", name]


def content(server: HubServer, path: str, branch: str = "main", name: str = REPO) -> bytes:
    """A file at the head of a branch."""
    repo = the_repo(server, name)
    blob = repo.commits[repo.branches[branch]][path].content
    return blob.read_bytes() if isinstance(blob, Path) else blob


def paths(server: HubServer, branch: str = "main", name: str = REPO) -> set[str]:
    """The files at the head of a branch, without the one that the Hub makes."""
    repo = the_repo(server, name)
    return set(repo.commits[repo.branches[branch]]) - {".gitattributes"}


def writes(server: HubServer) -> list[Request]:
    """The requests that could have changed something."""
    return [r for r in server.requests if r.method not in ("GET", "HEAD") and not r.path.endswith("/validate-yaml")]


def operations(server: HubServer) -> list[dict]:
    """Of all commits that were asked for."""
    bodies = [r.body for r in server.requests if "/commit/" in r.path]
    return [json.loads(line) for body in bodies for line in body.splitlines()]


def everything_sent(server: HubServer) -> bytes:
    """All that the clients said, the contents in commits decoded, but for the Authorization header."""
    parts = []
    for request in server.requests:
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        parts += [f"{request.method} {request.path} {request.query} {headers}".encode(), request.body]
    files = [o["value"]["content"] for o in operations(server) if o["key"] == "file"]
    return b"\n".join([*parts, *map(base64.b64decode, files)])


def files_below(folder: Path) -> list[Path]:
    return [Path(place) / name for place, _, names in os.walk(folder) for name in names]
