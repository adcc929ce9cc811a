"""scripts/push.py against the loopback Hub, with the real client: what is uploaded, what is refused, what a fault leaves."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_server import Fault, HubServer, Request, first
from launch import ROOT
from push_helpers import (
    REPO,
    TOKEN,
    content,
    everything_sent,
    files_below,
    operations,
    paths,
    push,
    push_environment,
    the_repo,
    writes,
)

EXPORT = {
    "README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors", "run.json", "tokenizer.json",
    "tokenizer_config.json", "training_config.yaml",
}  # fmt: skip
STATE = {
    "training_state/" + name
    for name in (
        "MANIFEST.json", "metrics.jsonl", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json",
        "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
    )
}  # fmt: skip
COMMIT = "/commit/"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "runs" / "gpt2-tiny")


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def asked(part: str, method: str = "POST"):
    return lambda request: request.method == method and part in request.path


# --- what is uploaded ---------------------------------------------------------------------------------------------


def test_the_export_goes_up_whole_and_alone_and_once(server, run, tmp_path):
    done = push(server, tmp_path, run)
    assert done.returncode == 0, done.stderr
    assert f"pushed the export to {REPO}@main" in done.stdout
    assert the_repo(server).private
    assert paths(server) == EXPORT
    for name in EXPORT:
        assert content(server, name) == (run / "export" / name).read_bytes()
    head, commits = the_repo(server).branches["main"], len(operations(server))
    again = push(server, tmp_path, run)
    assert again.returncode == 0 and "the export is already on" in again.stdout
    assert the_repo(server).branches == {"main": head} and len(operations(server)) == commits
    assert not [o for o in operations(server) if o["key"].startswith("deleted")]


def test_a_changed_card_is_the_only_thing_in_the_next_commit(server, run, tmp_path):
    assert push(server, tmp_path, run).returncode == 0
    before = len(operations(server))
    card = run / "export" / "README.md"
    card.write_text(card.read_text() + "\nMore.\n")
    assert push(server, tmp_path, run).returncode == 0
    header, *rest = operations(server)[before:]
    assert [o["value"]["path"] for o in rest] == ["README.md"]
    assert len(header["value"]["parentCommit"]) == 40
    assert content(server, "README.md").endswith(b"More.\n")


def test_public_if_told_so(server, run, tmp_path):
    assert push(server, tmp_path, run, "--public").returncode == 0
    assert not the_repo(server).private


def test_checkpoints_go_to_branches_and_their_state_if_asked_for(server, run, tmp_path):
    done = push(server, tmp_path, run, "--every", "10", "--with_state")
    assert done.returncode == 0, done.stderr
    branches = {"main", "step-10", "step-20"}
    assert set(the_repo(server).branches) == branches
    for branch in branches:
        assert paths(server, branch) == EXPORT | STATE
    assert content(server, "model.safetensors", "step-20") == content(server, "model.safetensors")
    assert content(server, "model.safetensors", "step-10") != content(server, "model.safetensors")
    assert json.loads(content(server, "run.json", "step-10"))["step"] == 10
    steps = [json.loads(line)["step"] for line in content(server, "training_state/metrics.jsonl", "step-10").splitlines()]
    assert max(steps) == 10
    assert not list((run / "cache").glob("push-*")), "scratch is left"


def test_one_checkpoint_to_a_branch_of_ones_own(server, run, tmp_path):
    assert push(server, tmp_path, run, "--checkpoint", "10", "--branch", "early").returncode == 0
    assert set(the_repo(server).branches) == {"main", "early"}
    assert paths(server) == {"run.json"} and paths(server, "early") == EXPORT
    done = push(server, tmp_path, run, "--checkpoint", "11")
    assert done.returncode == 2 and "10, 20" in done.stderr


# --- whose it is --------------------------------------------------------------------------------------------------


def test_a_foreign_repository_is_refused_unless_asked_for(server, run, tmp_path):
    server.add_repo("model", REPO, {"README.md": b"# Mine", "notes.txt": b"precious"})
    the_repo(server).private = True
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "did not make" in done.stderr and "--into_existing" in done.stderr
    assert not writes(server)
    done = push(server, tmp_path, run, "--into_existing")
    assert done.returncode == 0, done.stderr
    assert paths(server) == EXPORT | {"notes.txt"} and content(server, "notes.txt") == b"precious"


def test_another_runs_repository_is_refused(server, run, tmp_path):
    assert push(server, tmp_path, run).returncode == 0
    before = len(writes(server))
    (run / "hub.json").unlink()  # the same run, for all that its folder can say
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "another run" in done.stderr
    assert len(writes(server)) == before


def test_an_empty_repository_of_somebody_else_is_refused(server, run, tmp_path):
    server.add_repo("model", REPO, {".gitattributes": b""})
    the_repo(server).private = True
    assert push(server, tmp_path, run).returncode == 1
    assert not writes(server)


def test_what_somebody_changed_on_the_hub_is_not_overwritten(server, run, tmp_path):
    assert push(server, tmp_path, run).returncode == 0
    repo = the_repo(server)
    files = {path: blob.content for path, blob in repo.commits[repo.branches["main"]].items()}
    server.add_repo("model", REPO, files | {"README.md": b"# Better words"})
    card = run / "export" / "README.md"
    card.write_text(card.read_text() + "\nMore.\n")
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "README.md on main changed since the last push" in done.stderr
    assert content(server, "README.md") == b"# Better words"
    assert push(server, tmp_path, run, "--into_existing").returncode == 0
    assert content(server, "README.md").endswith(b"More.\n")


# --- private ------------------------------------------------------------------------------------------------------


def test_nothing_goes_to_a_public_repository_if_private_was_asked_for(server, run, tmp_path):
    assert push(server, tmp_path, run, "--public").returncode == 0
    before = len(writes(server))
    for options in ((), ("--private",), ("--into_existing",)):
        done = push(server, tmp_path, run, *options)
        assert done.returncode == 1 and "is public" in done.stderr
    assert len(writes(server)) == before


def test_a_server_that_makes_a_public_repository_gets_nothing(server, run, tmp_path):
    def publish(request: Request) -> None:
        for repo in server.repos.values():
            repo.private = False

    server.fault = publish
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "is public, and private was asked for" in done.stderr
    assert [r.path for r in writes(server)] == ["/api/repos/create"]


# --- the token ----------------------------------------------------------------------------------------------------


def test_no_token(server, run, tmp_path):
    done = push(server, tmp_path, run, HF_TOKEN="")
    assert done.returncode == 1 and "there is no access token" in done.stderr
    assert not server.requests


def test_a_namespace_of_somebody_else(server, run, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "push.py"), str(run), "--repo", "Somebody/name"]
    done = subprocess.run(command, env=push_environment(server, tmp_path), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "who is not in Somebody" in done.stderr
    assert not writes(server)


def test_a_token_that_may_only_read(server, run, tmp_path):
    user = {"name": "tester", "orgs": [], "auth": {"accessToken": {"role": "read"}}}
    server.fault = first(1, Fault(status=200, body=json.dumps(user).encode()), asked("whoami", "GET"))
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "may only read" in done.stderr
    assert not writes(server)


@pytest.mark.parametrize("name", ["", "name", "https://huggingface.co/user/name"])
def test_the_namespace_has_to_be_said(run, name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "push.py"), str(run), "--repo", name],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "USER/NAME" in done.stderr


# --- faults -------------------------------------------------------------------------------------------------------

FAULTS = {
    "401": (Fault(status=401), asked("whoami", "GET"), "does not take the access token"),
    "403 for the repository": (Fault(status=403), asked("/repos/create"), "may not write"),
    "403 for the commit": (Fault(status=403), asked(COMMIT), "may not write"),
    "409": (Fault(status=409), asked(COMMIT), "409"),
    "412": (Fault(status=412), asked(COMMIT), "somebody else committed in between"),
    "429": (Fault(status=429, headers={"Retry-After": "600"}), asked(COMMIT), "answers 429"),
    "500": (Fault(status=500), asked("/repos/create"), "answers 500"),
    "reset": (Fault(reset_at=0), asked("/repos/create"), "cannot be reached"),
}


@pytest.mark.parametrize("fault, matching, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_stays_is_told_and_commits_nothing(server, run, tmp_path, fault, matching, message):
    server.fault = lambda request: fault if matching(request) else None
    done = push(server, tmp_path, run, "--patience", "2")
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr
    assert [r for r in server.requests if r.fault]
    if ("model", REPO) in server.repos:
        assert paths(server) <= {"run.json"}
    server.fault = None
    assert push(server, tmp_path, run).returncode == 0
    assert paths(server) == EXPORT


PASSING = {
    "429": (1, Fault(status=429, headers={"Retry-After": "2"}), asked(COMMIT)),
    "500": (2, Fault(status=500), asked("/preupload/")),
    "503 from the storage": (1, Fault(status=503), asked("/storage/", "PUT")),
    "reset": (1, Fault(reset_at=0), asked(COMMIT)),
    "the answer to the commit is lost": (1, Fault(truncate_at=0), asked(COMMIT)),
    "the answer to the creation is lost": (1, Fault(truncate_at=0), asked("/repos/create")),
}


@pytest.mark.parametrize("count, fault, matching", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_is_waited_for(server, run, tmp_path, count, fault, matching):
    server.fault = first(count, fault, matching)
    began = time.monotonic()
    done = push(server, tmp_path, run)
    assert done.returncode == 0, done.stderr
    assert len([r for r in server.requests if r.fault]) == count
    assert paths(server) == EXPORT
    assert time.monotonic() - began >= float(fault.headers.get("Retry-After", 0))


def test_a_commit_in_between_is_kept(server, run, tmp_path):
    """The compare-and-swap: the branch moves between our look and our commit."""
    assert push(server, tmp_path, run).returncode == 0
    card = run / "export" / "README.md"
    card.write_text(card.read_text() + "\nMore.\n")

    def interfere(request: Request) -> None:
        if COMMIT in request.path:
            repo = the_repo(server)
            files = {path: blob.content for path, blob in repo.commits[repo.branches["main"]].items()}
            server.add_repo("model", REPO, files | {"README.md": b"# Theirs"})

    server.fault = interfere
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "somebody else committed" in done.stderr
    assert content(server, "README.md") == b"# Theirs"


def test_no_connection(run, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with HubServer() as server:
            done = push(server, tmp_path, run, "--patience", "2", HF_ENDPOINT=f"http://127.0.0.1:{port}")
    assert done.returncode == 1 and "the Hub cannot be reached" in done.stderr and "again in" in done.stdout
    assert "Traceback" not in done.stderr


def test_dying_in_mid_upload_leaves_nothing_half(server, run, tmp_path):
    server.fault = first(1, Fault(delay_s=60), asked("/storage/", "PUT"))
    command = [sys.executable, str(ROOT / "scripts" / "push.py"), str(run), "--repo", REPO]
    process = subprocess.Popen(command, env=push_environment(server, tmp_path), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not [r for r in server.requests if r.fault]:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert the_repo(server).private and paths(server) == {"run.json"}
    assert push(server, tmp_path, run).returncode == 0
    assert paths(server) == EXPORT


def test_dying_between_creation_and_marker_is_made_up_for(server, run, tmp_path):
    server.fault = lambda request: Fault(status=403) if COMMIT in request.path else None
    assert push(server, tmp_path, run).returncode == 1
    assert paths(server) == set()
    server.fault = None
    assert push(server, tmp_path, run).returncode == 0
    assert paths(server) == EXPORT


# --- secrets ------------------------------------------------------------------------------------------------------


def plant(path: Path, number: int) -> bytes:
    """A file with a token of its own; the token."""
    token = f"hf_PlantedCanary{number:016d}"
    path.write_text(f"HF_TOKEN={token}\n")
    return token.encode()


def test_no_canary_is_sent_or_written(server, run, tmp_path):
    planted = [
        run / ".env", run / "train.log", run / "eval" / "notes.json", run / "export" / ".env", run / "export" / "notes.txt",
        run / "export" / "optimizer.pt", run / "export" / ".eval_results.txt", run / "checkpoints" / "step-00000020" / "x.pt",
        run / "cache" / "tokenizer" / "token",
    ]  # fmt: skip
    canaries = [plant(path, number) for number, path in enumerate(planted)]
    (run / "export" / "cache").mkdir()
    planted.append(run / "export" / "cache" / "model.safetensors")
    canaries.append(plant(planted[-1], 99))
    done = push(server, tmp_path, run, "--with_state", "--every", "10")
    assert done.returncode == 0, done.stderr
    assert paths(server) == EXPORT | STATE
    sent = everything_sent(server)
    assert TOKEN in server.requests[0].headers["authorization"] and len(sent) > 1_000_000
    for canary in [*canaries, TOKEN.encode()]:
        assert canary not in sent
        written = [path for path in files_below(tmp_path) if path not in planted and canary in path.read_bytes()]
        assert not written
    assert "hf_" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["README.md", "training_config.yaml", "model.safetensors"])
def test_a_file_of_the_list_with_a_token_stops_the_push(server, run, tmp_path, name):
    with open(run / "export" / name, "ab") as handle:
        handle.write(b"\n# hf_abcdefghijklmnopqrstuvwxyz\n")
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and f"{name} holds an access token" in done.stderr
    assert not server.requests


def test_the_token_in_use_is_found_whatever_it_looks_like(server, run, tmp_path):
    card = run / "export" / "README.md"
    card.write_text(card.read_text() + "\nan-unusual-token-of-a-proxy\n")
    done = push(server, tmp_path, run, HF_TOKEN="an-unusual-token-of-a-proxy")
    assert done.returncode == 1 and "holds an access token" in done.stderr
    assert not server.requests


def test_a_link_is_not_followed(server, run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("precious")
    (run / "export" / "vocab.json").symlink_to(secret)
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "not a plain file" in done.stderr
    assert not server.requests


def test_a_token_on_the_command_line_is_not_repeated(run):
    command = [sys.executable, str(ROOT / "scripts" / "push.py"), str(run), "--token", TOKEN, "--repo", REPO]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unrecognized arguments: --token hf_***" in done.stderr and TOKEN not in done.stderr


def test_an_export_that_is_not_whole_is_refused(server, run, tmp_path):
    (run / "export" / "tokenizer.json").unlink()
    done = push(server, tmp_path, run)
    assert done.returncode == 1 and "tokenizer.json missing" in done.stderr
    assert not server.requests
