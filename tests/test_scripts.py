"""The quickstart, as a new user runs it, and the shell scripts' syntax."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch import ROOT, environment, metrics


@pytest.mark.slow
@pytest.mark.timeout(720)
def test_the_quickstart_trains_evaluates_and_exports(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    # The environment of the tests stands in for a fresh one, which the clean-clone check makes.
    venv = str(Path(sys.executable).parent.parent)
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--output_dir", str(folder)],
        cwd=ROOT,
        env=environment(VENV=venv),
        capture_output=True,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Zero1Engine" in done.stdout and "2 ranks" in done.stdout
    validation = [r["val_loss"] for r in metrics(folder) if "val_loss" in r]
    assert validation[0] - validation[-1] >= 2.5
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert json.loads((folder / "eval" / "hellaswag.json").read_text())["truncated"] == 0
    assert done.stdout.count("sample:") == 3
    assert "configs/accelerate/1gpu.yaml" in done.stdout.splitlines()[-2]
    for name in ("config.yaml", "environment.json", "checkpoints", "export/model.safetensors", "export/README.md"):
        assert (folder / name).exists()
    sources = list((folder / "cache").glob("installed-docs-*/SOURCES.json"))
    assert len(sources) == 1 and len(json.loads(sources[0].read_text())) > 0


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "scripts" / script)], check=True)
