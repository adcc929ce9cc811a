"""The README: short, and each of its commands runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import make_documents
from launch import PRETRAIN, ROOT, TINY, environment, options

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S) for line in block.splitlines() if line.strip()
]

# What is appended so that a command of hours ends in seconds, or does without the network; by how the command begins.
APPENDED = {
    "accelerate launch": "",  # see below
    "python scripts/pretrain.py configs/gpt2-124m.yaml --data my_text": "",
    "python scripts/pretrain.py configs/gpt2-124m.yaml --data my_tokens": "",
    "python scripts/evaluate.py": "--data_dir mini --limit 8",
    "python scripts/push.py": "--help",
    "python scripts/watch.py": "--once",
    "python scripts/report.py": "",
    "python scripts/compare.py": "--data_dir mini --limit 8",
    "python scripts/generate.py": "--max_new_tokens 8",
    "python scripts/prepare_data.py": "",
    "python scripts/benchmark.py": "--sequence_length 64 --batch_tokens 4096 --micro_batch_size 1 --seconds 1",
    "python scripts/inspect_data.py": "",
    "python scripts/plan.py": "",
    "lm_eval": "--include_path runs/gpt2-124m/eval/tasks --device cpu --limit 8",
    "hf auth login": "--help",
    "hf upload": "--help",
    "source .venv/bin/activate": "",
}
ELSEWHERE = {
    "bash scripts/quickstart.sh": "test_scripts.py runs it whole",
    "bash scripts/test.sh": "runs this test",
    "bash scripts/supervise.sh configs/accelerate/8xa100-zero1.yaml configs/gpt2-124m.yaml": "test_fault_launches.py runs it",
    "bash scripts/install.sh .venv gpu": "test.sh runs it with the extra test",
}


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) < 250


def test_every_path_in_the_readme_exists() -> None:
    for path in re.findall(r"\b(?:configs|scripts|docs|tests)/[\w./-]+\w", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`([\w-]+\.yaml)`", README):
        assert (ROOT / "configs" / "accelerate" / name).exists(), name


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the checkout, with text in my_text and a small finished run in runs/gpt2-124m."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipe", "scripts", "configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (folder / "my_text").mkdir()
    texts = make_documents(1200)
    for index in range(60):
        (folder / "my_text" / f"{index}.txt").write_text("\n\n".join(texts[index::60]))
    run = TINY | {"data": folder / "my_text", "output_dir": folder / "runs" / "gpt2-124m", "max_steps": 4, "n_positions": 256}
    run |= {"warmup_steps": 1, "evaluate_tasks": "hellaswag", "evaluate_data": "mini", "evaluate_limit": 8}
    subprocess.run([sys.executable, PRETRAIN, *options(**run)], env=environment(), check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ELSEWHERE])
def test_the_command_runs(command: str, workplace: Path) -> None:
    (appended,) = (words for start, words in APPENDED.items() if command.startswith(start))
    if command.startswith("accelerate launch"):
        appended = "--output_dir runs/dry" + ("" if "--dry_run" in command else " --dry_run")
    command = command.replace("--max_tokens 100000000", "--max_tokens 131072")  # my_text is small
    if command.startswith("python scripts/compare.py"):
        command = command.replace("openai-community/gpt2", "runs/gpt2-124m/export")  # which is on the Hub
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{command} {appended}"],
        cwd=workplace,
        env=environment(PATH=path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "--dry_run" in command + appended:
        assert "tokens in all" in done.stdout
        assert {path.name for path in (workplace / "runs").iterdir()} == {"gpt2-124m"}


def test_the_commands_that_run_elsewhere_are_in_the_readme() -> None:
    assert set(ELSEWHERE) <= set(COMMANDS)
    assert all(shlex.split(command) for command in COMMANDS)
