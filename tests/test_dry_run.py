"""`--dry_run` opens the text in every form, shows its first rows, looks at model, machine and disk, and leaves nothing.

One process imports torch and forks a child a case, as in test_bad_input.py; the Hub is hub_server.py on the loopback interface.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hub_server import Fault, HubServer, Request, client_environment
from launch import PRETRAIN, ROOT, TINY, environment, options
from push_helpers import TOKEN, writes
from recipe.data.corpus import open_corpora
from recipe.data.stream import RowStream
from recipe.data.validation import hold_out
from recipe.dry_run import known_machine
from recipe.estimate import GIB
from recipe.parsing import load_config
from recipe.tokenizer import Encoder, train_tokenizer
from test_bad_input import DRIVER

ROWS = {"data": "Org/text", "max_steps": 2, "warmup_steps": 0, "output_dir": "none", "dry_run": "true"}
CASES = {
    "Hub": {},
    "Hub, its tokenizer": {"tokenizer": "Org/gpt2"},
    "Hub, too short": {"max_steps": 100_000},
    "Hub, gone": {"data": "Org/nothing"},
    "Hub, gated": {"data": "Org/gated"},
    "Hub, unreachable": {"data": "Org/away", "tokenizer": "Org/away"},
    "folder": {"data": "text"},
    "folder, its tokenizer": {"data": "text", "tokenizer": "tokenizer"},
    "folder, too short": {"data": "text", "max_steps": 100_000},
    "prepared": {"data": "tokens", "tokenizer": "tokenizer"},
    "prepared, no tokenizer named": {"data": "tokens", "tokenizer": "openai-community/gpt2"},
    "prepared on the Hub": {"data": "Org/tokens", "tokenizer": "tokenizer"},
    "push, new": {"data": "text", "push_to_hub": "tester/new"},
    "push, not ours": {"data": "text", "push_to_hub": "Org/gpt2"},
    "push, no token": {"data": "text", "push_to_hub": "tester/new"},
    "push, unreachable": {"data": "text", "push_to_hub": "Org/away"},
    "disk": {"data": "text", "n_layer": 9_999, "n_embd": 4_096, "n_head": 32},
}
WITH_TOKEN = ("push, new", "push, not ours", "push, unreachable")


def hub_fault(request: Request) -> Fault | None:
    if "Org/gated" in request.path:
        return Fault(status=401, headers={"X-Error-Code": "GatedRepo"})
    return Fault(reset_at=0) if "Org/away" in request.path else None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    """The folder in which the cases ran; beside it what each did."""
    folder = tmp_path_factory.mktemp("dry_run") / "work"
    folder.mkdir()
    (folder / "text").symlink_to(fineweb_folder)
    corpus, _ = open_corpora(str(fineweb_folder), None, "text", folder)
    train_tokenizer((text for unit in corpus.units for text in corpus.read(unit)), 400).save_pretrained(folder / "tokenizer")
    prepare = TINY | {"data": "text", "tokenizer": "tokenizer", "max_steps": 2, "output_dir": "tokens", "warmup_steps": 0}
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "prepare_data.py", *options(**prepare)],
        cwd=folder, env=environment(PYTHONPATH=str(ROOT)), check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with HubServer() as hub:
        hub.add_repo("dataset", "Org/text", {f"data/{path.name}": path for path in fineweb_folder.glob("*.parquet")})
        hub.add_repo("model", "Org/gpt2", {path.name: path for path in (folder / "tokenizer").iterdir()})
        tokens = [path for path in (folder / "tokens").rglob("*") if path.is_file()]
        hub.add_repo("dataset", "Org/tokens", {str(path.relative_to(folder / "tokens")): path for path in tokens})
        hub.fault = hub_fault
        cases = {
            name: {
                "arguments": options(**TINY | ROWS | fields),
                "environment": {"HF_TOKEN": TOKEN} if name in WITH_TOKEN else {},
                "follow_advice": False,
            }
            for name, fields in CASES.items()
        }
        (folder.parent / "cases.json").write_text(json.dumps(cases))
        subprocess.run(
            [sys.executable, "-c", DRIVER, folder.parent / "cases.json", folder.parent / "results.json"],
            cwd=folder,
            env=client_environment(hub, folder.parent / "hf")
            | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder), "TOKENIZERS_PARALLELISM": "false"},
            check=True,
            timeout=250,
        )
        (folder.parent / "writes.json").write_text(json.dumps([f"{r.method} {r.path}" for r in writes(hub)]))
    return folder


def result(work: Path, name: str) -> dict:
    return json.loads((work.parent / "results.json").read_text())[name]


def lines(done: dict) -> list[str]:
    return [" ".join(line.split()) for line in done["stdout"].splitlines()]


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_behind(work: Path, name: str) -> None:
    assert result(work, name)["changed"] == []


def first_rows(work: Path) -> list[str]:
    """The beginnings of the run's first rows, by the parts that the run itself is made of."""
    config = load_config(options(**TINY | ROWS | {"data": str(work / "text")}))
    corpus, _ = open_corpora(config.data, None, "text", work)
    tokenizer = train_tokenizer((text for unit in corpus.units for text in corpus.read(unit)), 400)
    encoder = Encoder(tokenizer)
    _, corpus = hold_out(corpus, encoder, config.sequence_length, config.validation_tokens)
    rows = RowStream(corpus, encoder, config.sequence_length, config.seed).next_batch(16)
    return [tokenizer.decode(row.tolist())[:300] for row in np.asarray(rows[:3])]


FULL = ("Hub", "Hub, its tokenizer", "folder", "folder, its tokenizer", "prepared", "prepared, no tokenizer named")
OWN = "tokens/tokenizer"
"""The tokenizer of prepared tokens."""


@pytest.mark.parametrize("name", FULL)
def test_the_whole_report(work: Path, name: str) -> None:
    done = result(work, name)
    assert done["code"] == 0, done["stderr"]
    told = lines(done)
    fields = TINY | ROWS | CASES[name]
    parameters = 400 * 32 + 64 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    for line in (
        f"data found: {fields['data']}",
        f"tokenizer found: {OWN if 'no tokenizer' in name else fields['tokenizer']}",
        f"parameters {parameters:,}",
        f"model GPT2LMHeadModel, {parameters:,} parameters, and {112 * 32:,} that pad the vocabulary",
        "tokens in all 2,048",
    ):
        assert line in told
    for pattern in (
        r"text [\d,]+ training tokens an epoch, 0\.\d\d epochs planned",
        r"validation 2,048 tokens held out of it",
        r"first batch 4 rows of 65 tokens, tokenised by (tiktoken|prepare_data\.py); their beginnings:",
        r"machine CPU, \d+ cores, (fp32|bf16)",
        r"memory a rank about 0\.0\d GiB of [\d.]+ GiB: fits",
        r"time about 0\.00 hours at [\d,]+ tokens/s \(estimate: .*\)",
        r"disk [\d.]+ GiB free at .*: the checkpoints and the export fit",
    ):
        assert any(re.fullmatch(pattern, line) for line in told), (pattern, told)


def test_the_rows_shown_are_the_first_of_the_run(work: Path) -> None:
    expected = [" ".join(repr(text).split()) + " ..." for text in first_rows(work)]
    for name in ("folder, its tokenizer", "prepared", "prepared, no tokenizer named"):
        told = lines(result(work, name))
        begin = next(i for i, line in enumerate(told) if line.startswith("first batch")) + 1
        assert list(told[begin : begin + 3]) == expected


def test_prepared_tokens_on_the_hub_are_not_downloaded(work: Path) -> None:
    done = result(work, "prepared on the Hub")
    assert done["code"] == 0, done["stderr"]
    assert "first batch not shown: the tokens are on the Hub, and the run downloads them all" in lines(done)
    assert not list((work.parent / "hf").rglob("tokens-*.bin"))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Hub, too short", "max_epochs: the run takes 102,400,000 tokens and Org/text holds "),
        ("folder, too short", "max_epochs: the run takes 102,400,000 tokens and text holds "),
        ("Hub, gone", "data: Org/nothing: "),
        ("Hub, gated", "data: Org/gated: Org/gated is gated; log in with `hf auth login`"),
        ("disk", "output_dir: "),
        ("push, not ours", "push_to_hub: Org/gpt2 is public, and private was asked for"),
        ("push, no token", "push_to_hub: there is no access token: set HF_TOKEN"),
    ],
)
def test_what_would_stop_the_run_is_told_after_the_rest(work: Path, name: str, problem: str) -> None:
    done = result(work, name)
    assert done["code"] == 2
    assert any(line.startswith("tokens in all ") for line in lines(done)) and "model " in done["stdout"]
    (told,) = done["stderr"].splitlines()[1:]
    assert told.strip().startswith(problem)


def test_a_hub_that_does_not_answer_is_no_error(work: Path) -> None:
    done = result(work, "Hub, unreachable")
    assert done["code"] == 0, done["stderr"]
    assert {"data not checked: offline: Org/away", "tokenizer not checked: offline: Org/away"} <= set(lines(done))


def test_where_it_would_push_to_is_looked_at(work: Path) -> None:
    new, away = result(work, "push, new"), result(work, "push, unreachable")
    assert new["code"] == 0 and "push_to_hub tester/new: will be made, private" in lines(new), new["stderr"]
    assert away["code"] == 0, away["stderr"]
    assert any(line.startswith("push_to_hub Org/away: not checked: ") for line in lines(away))
    assert (work.parent / "writes.json").read_text() == "[]"  # nothing was made


@pytest.mark.slow
def test_the_documentation_of_the_packages(tmp_path: Path) -> None:
    """Read into a temporary folder, which is gone afterwards."""
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "--output_dir", str(tmp_path / "run"), "--dry_run"]
    (tmp_path / "tmp").mkdir()
    environ = environment(TMPDIR=str(tmp_path / "tmp"))
    done = subprocess.run([sys.executable, PRETRAIN, *arguments], env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert re.search(r"first batch +8 rows of 257 tokens", done.stdout)
    left = [name for name in os.listdir(tmp_path / "tmp") if not name.startswith("torchinductor")]  # torch's own
    assert not (tmp_path / "run").exists() and left == []


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.3, "8xA100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "8xA100-40GB"),
        ("NVIDIA H100 80GB HBM3", 79.1, "8xH100-80GB"),
        ("NVIDIA GeForce RTX 4090", 23.6, "8xRTX4090-24GB"),
        ("NVIDIA L4", 22.0, "8xL4-24GB"),
        ("NVIDIA L40S", 44.4, None),
    ],
)
def test_a_device_is_known_by_its_name_and_memory(device: str, memory: float, name: str | None) -> None:
    found = known_machine(device, int(memory * GIB), 8)
    assert (found and found.name) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_that_is_not_ready_is_told(tmp_path: Path, fineweb_folder: Path) -> None:
    """And is no error: the run may be meant for another."""
    fields = TINY | ROWS | {"data": fineweb_folder, "kernels": "fused", "output_dir": tmp_path / "run"}
    done = subprocess.run(
        [sys.executable, PRETRAIN, *options(**fields)], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "machine           NOT READY: kernels: fused needs a GPU and Triton, and " in done.stdout
