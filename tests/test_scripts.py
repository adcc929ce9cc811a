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


@pytest.mark.parametrize(
    "words",
    [
        ["report.py", "run", "--output"],
        ["compare.py", "a", "b", "--output"],
        ["evaluate.py", "model", "--output"],
        ["scaling.py", "configs/gpt2-124m.yaml", "--output"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, remedy in ((tmp_path, "is a folder; name the file in it"), (tmp_path / "file" / "in", "cannot be made: ")):
        command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:], str(output)]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and not done.stdout and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].split(": error: ")[1].startswith("argument --output: ") and remedy in done.stderr


@pytest.mark.parametrize(
    "words, refused",
    [
        ("plan.py configs/gpt2-124m.yaml --table --machine A100-80GB --deadline 2h", "table: does not go with --machine and "),
        ("plan.py configs/gpt2-124m.yaml --machine A100-80GB --growth 1,8 --budget 5", "growth: does not go with --budget"),
        (
            "push.py RUN --pending --repo me/other --public",
            "pending: goes where pretrain.py was told to push; leave out --repo, ",
        ),
    ],
    ids=lambda words: words.split()[0],
)
def test_options_that_do_not_go_together_are_refused(words: str, refused: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    script, *rest = words.replace("RUN", str(tmp_path)).split()
    command = [sys.executable, str(ROOT / "scripts" / script), *rest]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and refused in done.stderr and not done.stdout


def test_a_rank_whose_work_is_done_ends_well_whatever_the_clean_up_does() -> None:
    code = "import atexit, os\nfrom recipe.signals import leave\natexit.register(os.abort)\nprint('done')\nleave(75)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (75, "done\n", "")
