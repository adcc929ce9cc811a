"""What this machine lacks is told before anything is opened; a GPU that lies idle is a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import PRETRAIN, ROOT, TINY, environment, options
from recipe import preflight
from recipe.config import Config
from recipe.preflight import find_compiler, idle_gpu, launched_with, machine_problems

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_nothing_is_wrong_with_a_plain_run() -> None:
    assert machine_problems(Config()) == []


def test_problems_come_at_once() -> None:
    problems = machine_problems(Config(kernels="fused", fp8_head=True))
    assert [problem.partition(":")[0] for problem in problems] == ["kernels", "fp8_head"]


def test_an_idle_gpu_is_told_unless_a_cpu_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight, "DRIVER", tmp_path / "version")
    assert idle_gpu() is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04")
    assert "install" in idle_gpu() if torch.version.cuda is None else idle_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert idle_gpu() is None
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert idle_gpu() is None


def test_the_compiler_is_the_one_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_compiler(cuda=False) is None and find_compiler(cuda=True) is None
    for name in ("mine++", "gcc"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert find_compiler(cuda=False) is None and find_compiler(cuda=True) == str(tmp_path / "gcc")
    monkeypatch.setenv("CXX", "mine++")
    assert find_compiler(cuda=False) == str(tmp_path / "mine++")


def test_the_launcher_tells_its_file(tmp_path: Path) -> None:
    """Of a parent that is no launcher, nothing."""
    assert launched_with() is None
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from recipe.preflight import launched_with; print(launched_with())"
    (tmp_path / "child.py").write_text(code)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/cpu.yaml"),
        str(tmp_path / "child.py"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == str(ROOT / "configs/accelerate/cpu.yaml"), done.stderr


def test_a_missing_compiler_is_refused_before_the_text_is_opened(tmp_path: Path) -> None:
    fields = TINY | {"data": "Org/never-asked-for", "max_steps": 2, "warmup_steps": 0, "output_dir": tmp_path / "run"}
    done = subprocess.run(
        [sys.executable, PRETRAIN, *options(**fields, compile="true")],
        env=environment(PATH=str(tmp_path)), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and "install g++, or train without it, slower: --compile false" in done.stderr
    assert not (tmp_path / "run").exists()
