"""The search for real: tiny trials on the CPU, a branched one among them, stopped and continued, and their report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import ROOT, environment
from recipe.files import read_json_lines
from recipe.launches import descendants
from recipe.watchdog import has_ended

SEARCH = str(ROOT / "scripts" / "search.py")
STAGE = """
stage: tiny
base: base.yaml
compare: groups
budgets: [10k, 20k]
seeds: [0]
points: 5
trials:
  - {name: cosine, group: llmc, set: {learning_rate: 1.0e-3, warmup_steps: 0.1}}
  - {name: hot, group: adamw, budgets: [10k], set: {learning_rate: 1.0e+3, warmup_steps: 0, max_grad_norm: 0}}
  - name: muon
    group: fast
    branch: true
    set: {optimizer: muon, learning_rate: 3.0e-3, schedule: trapezoidal, warmup_steps: 2, decay_steps: 0.4}
  - name: whole
    group: fast
    keep: true
    budgets: [20k]
    set: {optimizer: muon, learning_rate: 3.0e-3, schedule: trapezoidal, warmup_steps: 2, decay_steps: 0.4}
"""
BASE = """
n_layer: 2
n_head: 2
n_embd: 32
sequence_length: 64
batch_tokens: 1024
micro_batch_size: 4
tokenizer: train:400
validation_tokens: 2048
precision: fp32
schedule: cosine
"""


class Bench:
    """A folder with a stage, its results and the search's command."""

    def __init__(self, folder: Path, text: Path):
        folder.mkdir(exist_ok=True)
        self.folder, self.results, self.scratch = folder, folder / "results.jsonl", folder / "scratch"
        (folder / "base.yaml").write_text(BASE)
        self.stage = folder / "tiny.yaml"
        self.stage.write_text(STAGE)
        self._words = [
            sys.executable, SEARCH, str(self.stage), "--results", str(self.results), "--scratch", str(self.scratch), "--data",
            str(text),
        ]  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen:
        env = environment(OMP_NUM_THREADS="1")
        return subprocess.Popen([*self._words, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == code, output
        return output

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []


@pytest.mark.slow
def test_trials_to_results_to_report(tmp_path: Path, fineweb_folder: Path) -> None:
    bench = Bench(tmp_path, fineweb_folder)
    assert len(bench.run("--list").splitlines()) == 7 and not bench.scratch.exists()

    # The imports alone take longer.
    assert "7 runs are left" in bench.run("--time_limit", "0.1", code=75) and not bench.records()

    # A signal, here that of a closed terminal, stops it after what is finished, before the rest; a stopped run leaves no
    # record.
    process = bench.start()
    while not any(r["name"] == "cosine" for r in bench.records()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "stopped by SIGHUP; the same command goes on" in output
    before = bench.records()
    assert 1 <= len(before) < 7 and all(r["state"] == "finished" for r in before)

    output = bench.run()
    assert "all trials are done" in output and "cosine-seed0-10k" not in output, "what is done is not run again"
    assert bench.records()[: len(before)] == before
    records = {(r["name"], r["kind"], r["budget"]): r for r in bench.records()}
    assert len(records) == len(bench.records()) == 7
    failed = records.pop(("hot", "run", 10_000))
    assert failed["state"] == "failed" and failed["val_loss"] is None and "not finite" in failed["reason"], failed

    # Ten steps of 20 with half the tokens; six of them stable.
    cosine, short = records["cosine", "run", 20_000], records["muon", "branch", 10_000]
    assert cosine["tokens"] == 20 * 1024 and [point[0] for point in cosine["curve"]] == [0, 4, 8, 12, 16, 20]
    assert cosine["curve"][-1][2] == cosine["val_loss"] < cosine["curve"][0][2] - 0.3
    assert (short["start_step"], short["steps"], short["own_tokens"]) == (6, 10, 4 * 1024)
    assert [point[0] for point in short["curve"]] == [0, 4, 8, 10], "with those of the stable part"
    # A branch is the run that would have been made for its budget alone.
    branch, whole = records["muon", "branch", 20_000], records["whole", "run", 20_000]
    assert branch["val_loss"] == whole["val_loss"] and branch["curve"] == whole["curve"]
    assert branch["train_seconds"] > branch["own_train_seconds"] > 0

    for record in records.values():
        assert record["validation_sha256"] == cosine["validation_sha256"] and record["versions"]["torch"]
        assert record["wall_seconds"] > 0 and record["tokens_per_second"] > 0 and record["overrides"]["learning_rate"]
    assert cosine["epochs"] == pytest.approx(20 * 1024 / 127_000, rel=0.2)

    # Tokenised once; of the runs only the one to keep is left, and it can be used.
    assert len(list(bench.scratch.glob("tokens-*"))) == 1
    assert [path.name for path in (bench.scratch / "runs").iterdir()] == ["tiny-whole-seed0-20k"]
    assert (bench.scratch / "runs" / "tiny-whole-seed0-20k" / "export" / "model.safetensors").is_file()

    document = tmp_path / "recipe.md"
    document.write_text((ROOT / "docs" / "recipe.md").read_text())
    written = bench.run("--report", str(document)).splitlines()
    assert written == [str(document), str(tmp_path / "recipe" / "losses.png")]
    text = document.read_text()
    assert "| llmc | cosine | 20k | 1 |" in text and f"| fast | muon | 10k | 1 | {short['val_loss']:.4f} |" in text
    assert "| tiny | hot | 0 | run | 10k |" in text

    assert "1 problem" in bench.run("--learning_rate", "1", code=2)
    folder = [sys.executable, SEARCH, str(bench.stage), "--results", str(tmp_path)]
    done = subprocess.run(folder, capture_output=True, text=True, env=dict(os.environ), timeout=60)
    assert done.returncode == 2 and f"results: {tmp_path} is a folder; name the file in it" in done.stderr
    assert (
        "results: not given"
        in subprocess.run(
            [sys.executable, SEARCH, str(bench.stage)], capture_output=True, text=True, env=dict(os.environ), timeout=60
        ).stderr
    )


def test_a_fault_of_the_machine_does_not_fail_all_trials(tmp_path: Path, fineweb_folder: Path) -> None:
    bench = Bench(tmp_path, fineweb_folder)
    trials = [f"  - {{name: rate-{n}, group: llmc, budgets: [10k], set: {{learning_rate: {n}.0e-3}}}}" for n in range(1, 6)]
    head = STAGE[: STAGE.index("trials:")] + "set: {kernels: fused, warmup_steps: 0.1}\n"  # for which there is no GPU
    bench.stage.write_text("\n".join([f"{head}trials:", *trials]))
    output = bench.run(code=2)
    assert "2 runs in a row have failed before their first step" in output and "kernels: fused needs a GPU" in output, output
    assert [(r["name"], r["state"]) for r in bench.records()] == [("rate-1", "failed"), ("rate-2", "failed")]
    assert "rate-1-seed0-10k" in bench.run("--list", "--retry_failed") and "rate-1-seed0-10k" not in bench.run("--list")


def stage_of(*trials: str, head: str = STAGE[: STAGE.index("trials:")]) -> str:
    return "\n".join([f"{head}trials:", *(f"  - {trial}" for trial in trials)])


@pytest.mark.slow
def test_runs_side_by_side_end_as_one_after_another(tmp_path: Path, fineweb_folder: Path) -> None:
    trials = STAGE[STAGE.index("trials:") :].split("\n  - ")[1:]
    said, found = [], []
    for count in (1, 2):
        bench = Bench(tmp_path / str(count), fineweb_folder)
        bench.stage.write_text(stage_of(*(trial for trial in trials if "name: cosine" in trial or "name: muon" in trial)))
        lines = bench.run("--side_by_side", str(count)).splitlines()
        said.append([line for line in lines if line.startswith("tiny-")])
        found.append({(r["name"], r["kind"], r["budget"]): r for r in bench.records()})
        assert len(bench.records()) == len(found[-1]) == 5, "each of them, once"
        assert not list((bench.scratch / "runs").iterdir())
    alone, beside = ([" tokens, to step " in line for line in lines] for lines in said)
    assert alone == [True, False] * 5 and beside[:3] == [True, True, False], "the second does not wait for the first"
    order = [line.split(":")[0] for line in said[1]]
    assert sorted(order) == sorted(line.split(":")[0] for line in said[0])
    muon = [label for label in order if label.startswith("tiny-muon")]
    assert muon[:2] == ["tiny-muon-seed0-stable"] * 2, "no branch before its end"
    one, two = found
    assert {r["side_by_side"] for r in one.values()} == {1} and next(iter(two.values()))["side_by_side"] == 2
    for key, record in one.items():
        assert record["state"] == two[key]["state"] == "finished"
        # With half the threads each, sums within a product are taken in another order.
        assert two[key]["val_loss"] == pytest.approx(record["val_loss"], rel=1e-6)
        for (step, tokens, loss), point in zip(two[key]["curve"], record["curve"], strict=True):
            assert [step, tokens, pytest.approx(loss, rel=1e-6)] == point


@pytest.mark.slow
def test_a_signal_stops_all_runs(tmp_path: Path, fineweb_folder: Path) -> None:
    bench = Bench(tmp_path, fineweb_folder)
    budgets = {"a": "10k", "b": "1B", "c": "1B"}
    trials = [f"{{name: {name}, group: llmc, budgets: [{budget}]}}" for name, budget in budgets.items()]
    head = STAGE[: STAGE.index("trials:")] + "set: {max_epochs: 100000, warmup_steps: 0.1, log_every: 1}\n"
    bench.stage.write_text(stage_of(*trials, head=head))
    process = bench.start("--side_by_side", "2")
    folders = [bench.scratch / "runs" / f"tiny-{name}-seed0-1B" for name in "bc"]
    while any(len(read_json_lines(folder / "metrics.jsonl")) < 4 for folder in folders):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    runs = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75 and "stopped by SIGTERM; the same command goes on" in output, output
    assert len(runs) >= 2 and all(map(has_ended, runs)), "no process is left"
    for folder in folders:
        log = (bench.scratch / "logs" / f"{folder.name}.log").read_text()
        assert "by signal SIGTERM; the same command goes on from here" in log, log
        assert json.loads((folder / "status.json").read_text())["state"] == "stopped"
    assert [(r["name"], r["state"]) for r in bench.records()] == [("a", "finished")], "what was stopped leaves no record"
    assert len(bench.run("--list").splitlines()) == 2
