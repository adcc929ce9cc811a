"""Whole runs through `accelerate launch`: what a user starts, kills, continues, stops, evaluates and loads."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hub_server import HubServer, client_environment
from launch import (
    PRETRAIN,
    ROOT,
    TINY,
    accelerate_command,
    environment,
    kill_all,
    launch,
    losses,
    metrics,
    options,
)
from recipe.files import sha256

STEPS, SAVE_EVERY = 24, 6


def fields(data: object, output_dir: Path, **more: object) -> list[str]:
    base = TINY | {"data": data, "output_dir": output_dir, "max_steps": STEPS, "save_every": SAVE_EVERY, "log_every": 2}
    return options(**(base | more))


EVALUATION = {"n_positions": 256, "evaluate_tasks": "hellaswag", "evaluate_data": "mini", "eval_every": 12, "sample_every": 12}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    """The folder of a run over two ZeRO-1 processes that nothing disturbed, evaluated on the small HellaSwag set."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    launch("2cpu-zero1", *fields(fineweb_folder, folder, **EVALUATION))
    return folder


def wait_for(condition, process: subprocess.Popen, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the run ended before {what}: {process.communicate()}"
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(0.02)


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_the_run_folder_has_its_layout(finished: Path) -> None:
    entries = {path.name for path in finished.iterdir()}
    assert entries == {
        "config.yaml", "environment.json", "status.json", "metrics.jsonl", "checkpoints", "eval", "export", "cache", "hub.json",
        ".lock", "starts.jsonl",
    }  # fmt: skip
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, STEPS)
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step-00000018", "step-00000024"]
    assert {p.name for p in (finished / "checkpoints" / "step-00000024").iterdir()} == {
        "MANIFEST.json", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"
    }  # fmt: skip


def test_metrics_hold_every_step_and_the_evaluations(finished: Path) -> None:
    records = metrics(finished)
    training = [r for r in records if "train_loss" in r]
    assert [r["step"] for r in training] == list(range(1, STEPS + 1))
    assert set(training[0]) == {
        "step", "tokens", "train_loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "data_wait_fraction", "mfu",
        "skipped", "gpu_memory_gib", "wall_seconds",
    }  # fmt: skip
    assert [r["tokens"] for r in training] == [1024 * n for n in range(1, STEPS + 1)]
    validation = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in validation] == [0, 12, 24]
    assert validation[0]["val_loss"] - validation[-1]["val_loss"] > 0.5
    hellaswag = [r for r in records if "hellaswag_acc" in r]
    assert len(hellaswag) == 1 and hellaswag[0]["hellaswag_n"] == 64


def test_the_export_is_a_plain_gpt2(finished: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

    export = finished / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert type(model) is GPT2LMHeadModel
    assert model.config.vocab_size == len(tokenizer) == 400
    assert model.dtype == torch.float32
    assert tokenizer.model_max_length == 256
    masters = load_file(finished / "checkpoints" / "step-00000024" / "model.safetensors")
    assert torch.equal(model.transformer.wte.weight, masters["transformer.wte.weight"][:400])
    assert torch.equal(model.transformer.h[1].mlp.c_fc.weight, masters["transformer.h.1.mlp.c_fc.weight"])
    assert model.lm_head.weight is model.transformer.wte.weight
    output = model.generate(**tokenizer("The river", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("The river")


def test_the_card_holds_the_runs_numbers(finished: Path) -> None:
    card = (finished / "export" / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["library_name"] == "transformers"
    last = [r for r in metrics(finished) if "val_loss" in r][-1]["val_loss"]
    assert f"Validation loss {last:.4f}" in card
    numbers = json.loads((finished / "eval" / "hellaswag.json").read_text())["tasks"]["hellaswag"]
    assert f"{numbers['acc_norm']:.4f} ± {numbers['acc_norm_stderr']:.4f}" in card
    assert "24,576 tokens in 24 steps" in card


def test_the_lm_eval_command_and_evaluate_give_the_runs_numbers(finished: Path, tmp_path: Path) -> None:
    recorded = json.loads((finished / "eval" / "hellaswag.json").read_text())
    assert recorded["truncated"] == 0
    bin_folder = Path(sys.executable).parent
    command = recorded["command"].split()
    assert command[0] == "lm_eval"
    command[0] = str(bin_folder / "lm_eval")
    subprocess.run([*command, "--output_path", str(tmp_path)], env=environment(), check=True, capture_output=True, timeout=200)
    (output,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(output.read_text())["results"]["hellaswag"]
    ours = recorded["tasks"]["hellaswag"]
    for metric in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert theirs[f"{metric},none"] == pytest.approx(ours[metric], abs=1e-12)
    again = tmp_path / "again.json"
    evaluate = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), str(finished / "export"), "--data_dir", "mini"]
    subprocess.run([*evaluate, "--output", str(again)], env=environment(), check=True, capture_output=True, timeout=200)
    assert json.loads(again.read_text())["tasks"]["hellaswag"] == ours


KILLED_STEPS = 120
"""Long enough that a kill behind step 12 comes before the end also on a busy machine."""


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_weights(tmp_path: Path, fineweb_folder: Path) -> None:
    more = {"max_steps": KILLED_STEPS, "eval_every": 40}
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "killed"
    launch("2cpu-zero1", *fields(fineweb_folder, undisturbed, **more))
    arguments = fields(fineweb_folder, folder, **more)
    process = start(*accelerate_command("2cpu-zero1", *arguments))
    wait_for((folder / "checkpoints" / "step-00000012" / "MANIFEST.json").is_file, process, "checkpoint at step 12")
    kill_all(process)
    assert not (folder / "checkpoints" / f"step-{KILLED_STEPS:08d}").exists(), "the kill came too late"
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    output = launch("2cpu-zero1", *arguments).stdout
    assert "continuing from" in output
    assert losses(folder) == losses(undisturbed)
    for name in ("model.safetensors", "optimizer.safetensors"):
        theirs, ours = (run / "checkpoints" / f"step-{KILLED_STEPS:08d}" / name for run in (undisturbed, folder))
        assert sha256(theirs) == sha256(ours)
    assert [r for r in metrics(folder) if "val_loss" in r] == [r for r in metrics(undisturbed) if "val_loss" in r]


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(tmp_path: Path, finished: Path, fineweb_folder: Path) -> None:
    folder = tmp_path / "stopped"
    arguments = fields(fineweb_folder, folder, **EVALUATION)
    # One process without a launcher, so that the exit code is ours.
    process = start(sys.executable, PRETRAIN, *arguments, "--precision", "fp32")
    wait_for((folder / "checkpoints" / "step-00000006" / "MANIFEST.json").is_file, process, "checkpoint at step 6")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped" and status["exit_code"] == 75
    assert 6 <= status["step"] < STEPS
    assert (folder / "checkpoints" / f"step-{status['step']:08d}" / "MANIFEST.json").is_file()
    # It goes on over two processes: a checkpoint does not depend on their number.
    output = launch("2cpu-ddp", *arguments, "--precision", "fp32").stdout
    assert f"at step {status['step']}" in output
    assert losses(folder)[-1] == pytest.approx(losses(finished)[-1], abs=0.02)


@pytest.mark.slow
def test_streaming_from_the_hub_gives_the_rows_of_the_local_files(tmp_path: Path, fineweb_folder: Path) -> None:
    readme = b"---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    files = {"README.md": readme}
    files |= {f"sample/10BT/{path.name}": path.read_bytes() for path in sorted(fineweb_folder.glob("*.parquet"))}
    # A full batch of the smallest model that the tokenizer of the first run fits.
    local = tmp_path / "local"
    few = {"max_steps": 6, "warmup_steps": 2, "precision": "fp32"}
    launch("cpu", *fields(fineweb_folder, local, **few))
    tokenizer = {path.name: path.read_bytes() for path in (local / "cache" / "tokenizer").iterdir()}
    with HubServer() as server:
        revision = server.add_repo("dataset", "HuggingFaceFW/fineweb", files)
        server.add_repo("model", "openai-community/gpt2", tokenizer)
        hub = tmp_path / "hub"
        streamed = few | {"tokenizer": "openai-community/gpt2"}
        arguments = fields(f"HuggingFaceFW/fineweb:sample-10BT@{revision}", hub, **streamed)
        done = subprocess.run(
            accelerate_command("2cpu-zero1", *arguments),
            env=environment(**client_environment(server, tmp_path), HF_HUB_OFFLINE="0"),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        sent = sum(r.bytes_sent for r in server.requests if r.path.endswith(".parquet"))
    assert losses(hub) == pytest.approx(losses(local), abs=1e-4)
    assert 0 < sent < 3 * sum(len(content) for name, content in files.items() if name.endswith(".parquet"))
    card = (hub / "export" / "README.md").read_text()
    assert "ODC-By" in card


def test_a_finished_run_started_again_only_exports(finished: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "export")
    before = losses(folder)
    output = launch("2cpu-zero1", *fields(fineweb_folder, folder, **(EVALUATION | {"evaluate_tasks": "none"}))).stdout
    assert "exported" in output and losses(folder) == before
    assert (folder / "export" / "model.safetensors").is_file()
