"""scripts/scaling.py: the arithmetic of overlap, stages that fail alone, the table, and the whole on two CPU processes."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import make_documents
from launch import ROOT, TINY, environment, options
from recipe.benchmark import divide
from recipe.estimate import MEASURED_MACHINES, parse_machine, tokens_per_second
from recipe.launches import Launch, LaunchError, descendants
from recipe.overlap import communication, kind_of, length, uncovered, union
from recipe.parsing import load_config
from recipe.scaling_run import STAGES, ScalingRun, compare, efficiency, largest_proper_divisor, last_json, run_stages
from recipe.scaling_table import markdown
from recipe.tokenizer import train_tokenizer

CONFIG = str(ROOT / "configs" / "gpt2-124m.yaml")


# --- overlap --------------------------------------------------------------------------------------------------------


def test_intervals_against_counting() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([(s, s + rng.randint(0, 9)) for s in (rng.randint(0, 40) for _ in range(rng.randint(0, 8)))] for _ in range(2))
        in_a, in_b = ({n for start, end in one for n in range(start, end)} for one in (a, b))
        assert length(a) == len(in_a) and uncovered(a, b) == len(in_a - in_b)
        merged = union(a)
        assert all(first[1] < second[0] for first, second in zip(merged, merged[1:], strict=False))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-reduce"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce-scatter"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather"),
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)", "all-reduce"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "send and receive"),
        ("ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "broadcast"),
        ("ncclDevKernel_Reduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce"),
        ("gloo:all_reduce", "all-reduce"), ("gloo:all_gather", "all-gather"), ("gloo:all_to_all", "send and receive"),
        ("ncclDevKernel_Generic_1", "other"), ("triton_per_fused_native_layer_norm_0", None),
        ("void at::native::reduce_kernel<512, 1>", None), ("aten::all", None),
    ],
)  # fmt: skip
def test_kinds_of_collectives(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_what_of_the_communication_is_exposed() -> None:
    # Microseconds: 1,000 of all-reduce, half under a product; two all-gathers on two streams at a time, 300 under nothing.
    found = communication(
        [
            (0, 1500, "gemm"), (1000, 2000, "ncclDevKernel_AllReduce_Sum_f32_RING_LL"), (2500, 3000, "adam"),
            (2800, 3200, "ncclDevKernel_AllGather_RING_LL"), (2900, 3300, "ncclDevKernel_AllGather_RING_LL"),
        ]
    )  # fmt: skip
    assert found["all-reduce"] == {"calls": 1, "ms": 1.0, "exposed_ms": 0.5, "overlapped_ms": 0.5}
    assert found["all-gather"] == {"calls": 2, "ms": 0.5, "exposed_ms": 0.3, "overlapped_ms": 0.2}
    assert (found["all"]["calls"], found["all"]["ms"], found["all"]["exposed_ms"]) == (3, 1.5, 0.8)
    assert (found["computing_ms"], found["span_ms"]) == (2.0, 3.3)
    assert "reduce-scatter" not in found
    alone = communication([(0, 10, "gemm")])
    assert alone["all"] == {"calls": 0, "ms": 0, "exposed_ms": 0, "overlapped_ms": 0}


def test_a_step_is_divided_into_its_parts() -> None:
    events = [
        (0, 1000, "nvjet_tst_128x256"), (800, 1400, "ncclDevKernel_AllReduce_Sum_f32_RING_LL"), (1500, 1900, "adamw"),
        (1900, 2200, "ncclDevKernel_AllGather_RING_LL"), (2300, 2400, "nvjet_tst_128x256"),
    ]  # fmt: skip
    parts, kernels = divide(events, [(1400, 2250)])
    expected = {"matrix products": 1.1, "communication": 0.9, "optimizer": 0.4, "idle": 0.2}
    assert {part: ms for part, ms in parts.items() if ms} == pytest.approx(expected)
    assert kernels[0] == (pytest.approx(1.1), 2, "nvjet_tst_128x256") and len(kernels) == 4


# --- results --------------------------------------------------------------------------------------------------------


def test_efficiency_and_differences() -> None:
    assert [largest_proper_divisor(n) for n in (2, 5, 9, 15, 64)] == [1, 1, 3, 5, 32]
    assert efficiency(7.6e6, 1e6, 8) == pytest.approx(0.95)
    apart = compare([3.0, 2.0, 1.0], [3.0, 2.5, 0.75], first=21)
    assert apart == {"steps": 3, "largest": 0.5, "at_step": 22, "mean": 0.25}
    with pytest.raises(ValueError):
        compare([1.0], [1.0, 2.0])
    assert last_json('noise\n{"a": 1}\n{"a": 2}\nmore noise\n') == {"a": 2}
    with pytest.raises(LaunchError):
        last_json("nothing")


def test_measured_machines_take_the_place_of_the_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    config, machine = load_config([CONFIG]), parse_machine("8xH100-80GB")
    computed, measured = tokens_per_second(config, machine)
    assert not measured
    monkeypatch.setitem(MEASURED_MACHINES, ("H100-80GB", 12, 768, 8), 4_000_000)
    assert tokens_per_second(config, machine) == (4_000_000, True)
    # Only for steps of the size that was measured.
    config.batch_tokens //= 8
    speed, measured = tokens_per_second(config, machine)
    assert not measured and speed < computed


class Stages:
    """Stages without launches."""

    def speed(self, deadline: float) -> dict[str, Any]:
        raise LaunchError("rank 1 failed")

    def profile(self, deadline: float) -> dict[str, Any]:
        time.sleep(0.02)
        return {"rows": [], "problem": None}

    def losses(self, deadline: float) -> dict[str, Any]:
        assert deadline - time.monotonic() < 3
        return {"rows": [], "problem": "a loss differs | much"}


def test_a_stage_that_fails_does_not_stop_the_others() -> None:
    told = []
    results = run_stages(Stages(), {"speed": 5, "profile": 5, "losses": 3}, 60, lambda found: told.append(len(found)))
    assert [results[name]["state"] for name in results] == ["failed", "ok", "failed"] and told == [1, 2, 3]
    assert "rank 1 failed" in results["speed"]["problem"] and results["profile"]["seconds"] >= 0.02
    late = run_stages(Stages(), {"losses": 3}, 0.5, lambda _: None)
    assert late["losses"]["state"] == "not run"
    one = ScalingRun([CONFIG], {}, (1,), Path("nowhere"), 0)
    alone = run_stages(one, {"losses": 5, "topology": 5, "kill": 5}, 60, lambda _: None)
    assert {result["state"] for result in alone.values()} == {"not run"}
    about = {
        "command": "python scripts/scaling.py", "device": "CPU", "host_gpus": 0, "versions": {"torch": "2"},
        "environment": {"NCCL_NVLS_ENABLE": "0"}, "seconds": 1.0,
    }  # fmt: skip
    text = markdown({"about": about, "stages": results})
    assert "| Speed | failed: LaunchError: rank 1 failed | 0 |" in text and "failed: a loss differs / much" in text


def test_the_speeds_make_a_table() -> None:
    run = ScalingRun([CONFIG], {}, (2, 8), Path("nowhere"), 8)
    exchange = communication([(0, 1000, "gemm"), (500, 1500, "ncclDevKernel_AllReduce_Sum_f32_RING_LL")])
    for engine in ("ZeRO-1", "DDP"):
        for ranks, speed in ((1, 500_000.0), (2, 990_000.0), (8, 3_800_000.0)):
            run.measured[CONFIG, engine, ranks] = {
                "tokens_per_second": speed, "step_ms": 524_288 / speed * 1000, "data_ms": 0.5, "peak_memory_bytes": 2**34,
                "mfu": 0.4, "device": "GPU", "precision": "bf16", "communication": [exchange] * ranks, "parts": None,
            }  # fmt: skip
    # Everything has been measured: the stages make no launch.
    run._measure = lambda wanted, steps, deadline: []
    results = run_stages(run, {"speed": 5, "profile": 5}, 60, lambda _: None)
    about = {"command": "c", "device": "GPU", "host_gpus": 8, "versions": {}, "environment": {}, "seconds": 1.0}
    text = markdown({"about": about, "stages": results})
    assert "| gpt2-124m | ZeRO-1 | 8 | 3,800,000 | 138.0 | 95.0% | 40.0% | 0.36% | 16.0 |" in text
    assert "| gpt2-124m | ZeRO-1 | 2 | 990,000 |" in text and "| gpt2-124m | DDP | 1 | 500,000 |" in text
    assert "| gpt2-124m | DDP | all-reduce | 1 | 1.00 | 0.50 | 0.50 | 33.33% |" in text


def test_only_the_engines_asked_for_are_launched() -> None:
    asked = []
    run = ScalingRun([CONFIG], {}, (2,), Path("nowhere"), 2, engines=("ZeRO-1",))
    run._measure = lambda wanted, steps, deadline: asked.extend(wanted) or []
    run_stages(run, {"speed": 5, "profile": 5}, 60, lambda _: None)
    assert {engine for _, engine, _ in asked} == {"ZeRO-1"} and {ranks for *_, ranks in asked} == {1, 2}


def test_losses_are_compared_at_the_same_micro_batches() -> None:
    launched: dict[tuple, list[str]] = {}

    def launch_all(name: str, jobs: list, ranks: int, deadline: float) -> tuple[dict, list[str]]:
        launched.update(jobs)
        return {key: {"losses": [3.0, 2.0], "precision": "bf16"} for key, _ in jobs}, []

    run = ScalingRun([CONFIG], {}, (2, 16), Path("nowhere"), 0)
    run._launch_all = launch_all
    found = run_stages(run, {"losses": 5}, 60, lambda _: None)["losses"]
    # 64 rows of 1,024 tokens on 16 ranks.
    sizes = {key[1]: command[command.index("--micro_batch_size") + 1] for key, command in launched.items()}
    assert sizes == {1: "4", 16: "4", "smaller-micro-batches": "2"}
    assert found["state"] == "ok" and found["rows"][0]["rounding"]["largest"] == 0


# --- launches -------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_late_says_where_it_stands(tmp_path: Path) -> None:
    rank = "from recipe.signals import print_stacks_on_signal as f; f(); print('up', flush=True); input()"
    command = ["bash", "-c", 'sleep 60 | "$0" -c "$1"', sys.executable, rank]
    with Launch(command, tmp_path / "log", {"PYTHONPATH": str(ROOT)}) as launch:
        launch.wait_until(lambda: "up" in (tmp_path / "log").read_text(), "rank", time.monotonic() + 20)
        with pytest.raises(LaunchError, match=r"^no step 3 within the \d s that were left to it; log \| up$"):
            launch.wait_until(lambda: False, "step 3", time.monotonic() + 0.1)
    assert 'File "<string>", line 1 in <module>' in (tmp_path / "log").read_text()


def test_a_launch_that_takes_too_long_leaves_nobody_behind(tmp_path: Path) -> None:
    # Workers in sessions of their own, as the launcher's are.
    script = "RANK=1 setsid sleep 60 & RANK=0 setsid sleep 60 & echo started; wait"
    with Launch(["bash", "-c", script], tmp_path / "logs" / "log", {}) as launch:
        launch.wait_until(lambda: len(descendants(launch.process.pid)) == 2, "workers", time.monotonic() + 10)
        pids = descendants(launch.process.pid)
        launch.wait_until(lambda: b"sleep" in Path(f"/proc/{pids[1]}/cmdline").read_bytes(), "sleep", time.monotonic() + 10)
        assert launch.worker(1) in pids and launch.worker(1) != launch.worker(0)
        with pytest.raises(LaunchError, match="no process of rank 2"):
            launch.worker(2)
        with pytest.raises(LaunchError, match=r"not done within the \d s that were left to it.*started"):
            launch.wait(time.monotonic() + 0.1)
    assert launch.process.poll() is not None
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline


def test_a_launch_that_fails_says_why(tmp_path: Path) -> None:
    with Launch(["bash", "-c", "echo rank 1 failed: no memory; echo trace; exit 3"], tmp_path / "log", {}) as launch:
        with pytest.raises(LaunchError, match="code 3; .*rank 1 failed: no memory"):
            launch.succeed(time.monotonic() + 10)
        with pytest.raises(LaunchError, match="before step 4"):
            launch.wait_until(lambda: False, "step 4", time.monotonic() + 10)


# --- the whole ------------------------------------------------------------------------------------------------------


def scaling(*words: str, timeout: float = 60) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "scaling.py"), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout)


def test_bad_words_are_told_before_anything_starts(tmp_path: Path) -> None:
    for words, told in (
        ((CONFIG, "--stages", "speed,sped"), "stages: 'sped' is not one of speed"),
        ((CONFIG, "--engines", "ZeRO-1,FSDP"), "engines: 'FSDP' is not one of ZeRO-1, DDP"),
        ((CONFIG, "--processes", "3"), "batch_tokens: 524288 is not a multiple"),
        ((CONFIG, "--n_layr", "2"), "did you mean n_layer?"),
    ):
        done = scaling(*words, "--folder", str(tmp_path / "folder"), "--output", str(tmp_path / "out.json"))
        assert done.returncode == 2 and told in done.stderr, done.stderr
    assert not (tmp_path / "out.json").exists() and not (tmp_path / "folder").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages_on_two_cpu_processes(tmp_path: Path, fineweb_folder: Path) -> None:
    train_tokenizer(make_documents(50), 400).save_pretrained(tmp_path / "tokenizer")
    names = ("n_layer", "n_head", "n_embd", "sequence_length", "batch_tokens", "micro_batch_size")
    fields = {name: TINY[name] for name in names} | {
        "data": fineweb_folder, "tokenizer": tmp_path / "tokenizer", "warmup_steps": 40, "max_steps": 2000, "precision": "fp32",
    }  # fmt: skip
    steps = ("--speed_steps", "4", "--losses_steps", "40", "--topology_steps", "90", "--time_limit", "850")
    stages = ",".join(f"{name}:400" for name in STAGES)
    output = tmp_path / "scaling.json"
    done = scaling(
        CONFIG, *options(**fields), *steps, "--stages", stages, "--output", str(output), "--folder", str(tmp_path), timeout=880
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NCCL_NVLS_ENABLE=0" in done.stdout and output.with_suffix(".md").read_text() in done.stdout
    found = json.loads(output.read_text())["stages"]
    assert {name: result["state"] for name, result in found.items()} == dict.fromkeys(STAGES, "ok")
    speeds = {(row["engine"], row["ranks"]): row for row in found["speed"]["rows"]}
    assert set(speeds) == {(engine, ranks) for engine in ("ZeRO-1", "DDP") for ranks in (1, 2)}
    for (engine, _), row in speeds.items():
        one = speeds[engine, 1]["tokens_per_second"]
        assert row["efficiency"] == pytest.approx(row["tokens_per_second"] / row["ranks"] / one)
        assert row["tokens_per_second"] == pytest.approx(1024 / row["step_ms"] * 1000)
    for row in found["profile"]["rows"]:
        every = row["all"]
        assert row["ranks"] == 2 and every["calls"] > 0
        # Sums of the same times in another order may round the other way.
        assert 0 < every["exposed_ms"] <= every["ms"] + 1e-9 <= row["span_ms"] + 1e-6
        assert row["all-reduce"]["calls"] > 0
    (losses,) = found["losses"]["rows"]
    assert losses["steps"] == 40 and losses["first_loss"] - losses["last_loss"] > 0.3, "it must learn"
    assert losses["largest"] < 1e-3
    assert 0 < losses["rounding"]["largest"] < 1e-3, "sums in another order round otherwise, and no more than that"
    half, back = found["topology"]["rows"]
    assert (half["ranks"], back["ranks"]) == (1, 2) and half["from_step"] == 31 and back["to_step"] == 90
    assert half["to_step"] + 1 == back["from_step"] and max(half["largest"], back["largest"]) < 1e-3
    (kill,) = found["kill"]["rows"]
    assert kill["status"]["rank"] == 1 and kill["status"]["state"] == "failed" and 0 < kill["seconds"] < 60
    for path in Path("/proc").glob("[0-9]*/cmdline"):  # nobody is left behind
        with contextlib.suppress(OSError):
            assert str(tmp_path).encode() not in path.read_bytes()
