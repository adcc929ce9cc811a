"""Wrong situations, caused for real where this machine can: the exit code, cause and remedy in a line each, and status.json.

One process imports torch and forks a child a case, as in test_bad_input.py; the Hub is hub_server.py on the loopback interface.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from hub_server import Fault, HubServer, Request, client_environment
from launch import ROOT, TINY, accelerate_command, environment, free_port, options
from recipe.config import Config
from recipe.estimate import GIB, USABLE_MEMORY, memory_by_part, micro_batches
from recipe.remedies import Remedy, Situation, explain

DRIVER = """
import json, os, signal, sys

from recipe.cli import main
from recipe.remedies import explain
from recipe.signals import leave

import recipe.train, accelerate, datasets  # what most cases need: once here instead of in each child


def attempt(case):
    exec(case["before"], globals())
    if case["arguments"] is not None:
        return main(case["arguments"])
    try:
        exec(case["code"], {})
    except BaseException as error:
        print(type(error).__name__, explain(error), sep=": ")


def run(name, case):
    child = os.fork()
    if not child:
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.alarm(60)
        os.environ.update(case["environment"])
        code = 99  # an exception that got out of main
        try:
            code = attempt(case) or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        leave(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "stdout": open(f"{name}.stdout").read(), "stderr": open(f"{name}.stderr").read()}


cases = json.load(open(sys.argv[1]))
json.dump({name: run(name, case) for name, case in cases.items()}, open(sys.argv[2], "w"))
"""
NO_COMPILER = "import os; os.environ['PATH'] = '/nonexistent'"
# What the process has, and a gigabyte and a half: 4096 rows need 3.4, 1024 need 0.9.
LITTLE_MEMORY = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 3 * 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""
TRAIN = """
import sys
from recipe.cli import main
from recipe.signals import leave
leave(main(sys.argv[1:]))
"""
IMPATIENT = """
import datetime, recipe.train
recipe.train.COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=3)
"""
LARGE = {"micro_batch_size": 4096, "batch_tokens": 4096 * 64, "max_epochs": 20, "max_steps": 1}


@dataclass
class Case:
    """A start of pretrain.py with TINY's fields and these."""

    fields: dict
    code: int
    says: tuple[str, ...]
    """Parts of stderr."""
    environment: dict[str, str] = field(default_factory=dict)
    before: str = ""
    """Code that makes the situation, in the process itself."""


def rank(number: int, port: int) -> dict[str, str]:
    """The environment of one of two ranks."""
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}


RUNS = {
    "memory": Case(
        LARGE,
        1,
        ("cause:  out of memory on rank 0: this machine", "cannot hold 4096 rows", "remedy: --micro_batch_size 2048 should"),
        before=LITTLE_MEMORY,
    ),
    "compiler": Case(
        {"compile": "true"}, 2, ("compile: torch.compile needs a C++ compiler", "--compile false"), before=NO_COMPILER
    ),
    "fused": Case({"kernels": "fused"}, 2, ("kernels: fused needs a GPU and Triton, and ", "; or leave it at auto")),
    "fp8": Case({"fp8_head": "true"}, 2, ("fp8_head: needs a GPU with fp8", "; or leave it out")),
    "disk": Case(
        {"output_dir": "full"}, 1, ("cause:  the disk of full is full", "remedy: free some", "failed at step 0: OSError: ")
    ),
    "missing rank": Case(
        {"watchdog_seconds": 1},
        1,
        ("cause:  only 1 of 2 ranks came", "remedy: start the command on every machine"),
        rank(0, free_port()),
        IMPATIENT,
    ),
    "unreachable rank 0": Case(
        {"watchdog_seconds": 1},
        1,
        ("cause:  rank 1 cannot reach 127.0.0.1 port 9, where rank 0 listens", "remedy: see that rank 0 runs there"),
        rank(1, 9),
        IMPATIENT,
    ),
    "gated": Case(
        {"data": "Org/gated"}, 2, ("data: Org/gated is gated; log in with `hf auth login`", "and ask for access on its page")
    ),
    "gated with a token": Case(
        {"data": "Org/gated"}, 2, ("data: Org/gated is gated; ask for access on its page",), {"HF_TOKEN": "hf_abc"}
    ),
    "no token": Case({"data": "Org/closed"}, 2, ("data: the Hub does not know who asks for Org/closed; log in with",)),
    "no right": Case({"data": "Org/forbidden"}, 2, ("status 403 Forbidden; ask for access", "/Org/forbidden@")),
    "no such dataset": Case({"data": "Org/nothing"}, 2, ("data: Org/nothing is neither a local path nor", "spelling")),
    "rate limit": Case({"data": "Org/limited"}, 2, ("data: the Hub limits the rate of requests", "prepare_data.py")),
    "rate limit of a file": Case(
        {"data": "Org/busy"}, 2, ("status 429 Too Many Requests; log in with", "prepare_data.py", "attempts: 1")
    ),
    "gated tokenizer": Case({"tokenizer": "Org/gated"}, 2, ("or folder Org/gated: Org/gated is gated; log in",)),
}  # fmt: skip

SNIPPETS = {
    "compile without a compiler": (
        NO_COMPILER + "\nimport torch\ntorch.compile(lambda x: x.sin() + 1)(torch.ones(1000))",
        "InductorError: torch.compile and Triton need a C++ compiler, and there is none; install g++, or train without",
    ),
    "cuda": (
        "import torch\ntorch.zeros(1).cuda()",
        "this torch was built without CUDA; install one with it" if torch.version.cuda is None else "driver",
    ),
    "many files": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))\nfiles = [open('/dev/null') for _ in range(9)]",
        "OSError: too many files are open at a time; raise the limit: ulimit -n",
    ),
    "package": ("import no_such_package", "ModuleNotFoundError: the package no_such_package is not installed here; bash "),
    "folder": ("import os\nos.mkdir('/sys/run')", "/sys/run cannot be written or read: "),
    "host memory": ("import torch\ntorch.empty(10**15)", "RuntimeError: this machine ran out of memory"),
    "numpy's memory": ("import numpy\nnumpy.zeros(10**15)", "this machine ran out of memory"),
    "a rank that does not answer": (
        """
import datetime, os, time
import torch, torch.distributed as dist
store = dist.FileStore("store", 2)
number = 0 if os.fork() else 1
dist.init_process_group("gloo", store=store, rank=number, world_size=2, timeout=datetime.timedelta(seconds=2))
if number:
    time.sleep(4)
    os._exit(0)
dist.all_reduce(torch.ones(4))
""",
        "RuntimeError: rank 0 waited in vain for another rank; the first error of another rank",
    ),
    "a rank that is gone": (
        """
import os, time
import torch, torch.distributed as dist
store = dist.FileStore("store2", 2)
number = 0 if os.fork() else 1
dist.init_process_group("gloo", store=store, rank=number, world_size=2)
if number:
    os._exit(0)
time.sleep(1)
dist.all_reduce(torch.ones(4))
""",
        "rank 0 lost the connection to another rank; the first error of another rank",
    ),
    "the user's own mistake": ("{}['key']", "KeyError: None"),
    "a pipe that is closed": (
        "import os\nr, w = os.pipe()\nos.close(r)\nos.write(w, b'x')",
        "BrokenPipeError: None",
    ),
}  # fmt: skip
"""Code that fails, and what is said of the error."""


def hub_fault(request: Request) -> Fault | None:
    """The way in which each repository is broken."""
    code = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this repository is restricted."}
    if "Org/gated" in request.path:
        return Fault(status=403 if "authorization" in request.headers else 401, headers=code)
    if "Org/closed" in request.path:
        return Fault(status=401)
    if "Org/limited" in request.path:
        return Fault(status=429, headers={"Retry-After": "0"})
    in_file = request.path.endswith(".parquet") and "/resolve/" in request.path
    if "Org/forbidden" in request.path and in_file:
        return Fault(status=403)
    if "Org/busy" in request.path and in_file:
        return Fault(status=429, headers={"Retry-After": "3600"})
    return None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, fineweb_folder: Path) -> Path:
    """Where the cases ran; `results.json` has what each did."""
    folder = tmp_path_factory.mktemp("remedies")
    cases = {}
    for name, case in RUNS.items():
        fields = TINY | {"data": fineweb_folder, "max_steps": 2, "warmup_steps": 0, "output_dir": name} | case.fields
        cases[name] = {"arguments": options(**fields), "environment": case.environment, "before": case.before}
    with socket.socket() as taken, HubServer() as hub:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        fields = TINY | {"data": fineweb_folder, "max_steps": 2, "warmup_steps": 0, "output_dir": "port"}
        cases["port"] = {"arguments": options(**fields), "environment": rank(0, taken.getsockname()[1]), "before": ""}
        for name, (code, _) in SNIPPETS.items():
            cases[name] = {"arguments": None, "environment": {}, "before": "", "code": code}
        table = pa.table({"text": ["A document of some words. " * 20] * 300})
        pq.write_table(table, folder / "a.parquet", row_group_size=100)
        for name in ("gated", "closed", "limited", "forbidden", "busy"):
            hub.add_repo("dataset", f"Org/{name}", {"data/a.parquet": folder / "a.parquet"})
        hub.fault = hub_fault
        (folder / "full").mkdir()
        (folder / "full" / "metrics.jsonl").symlink_to("/dev/full")
        (folder / "cases.json").write_text(json.dumps(cases))
        environ = client_environment(hub, folder / "hf") | {
            "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }  # fmt: skip
        command = [sys.executable, "-c", DRIVER, folder / "cases.json", folder / "results.json"]
        subprocess.run(command, cwd=folder, env=environ, check=True, timeout=280)
    return folder


def result(work: Path, name: str) -> dict:
    return json.loads((work / "results.json").read_text())[name]


@pytest.mark.parametrize("name", RUNS)
def test_cause_and_remedy_are_told(work: Path, name: str) -> None:
    case, done = RUNS[name], result(work, name)
    assert done["code"] == case.code, done["stderr"]
    for part in case.says:
        assert part in done["stderr"]
    if case.code == 2:
        assert done["stderr"].splitlines()[-2] == "1 problem with the configuration or the input:"
        assert not (work / name).exists()
    else:
        cause, remedy, last = done["stderr"].splitlines()[-3:]
        assert cause.startswith("cause:  ") and remedy.startswith("remedy: ") and re.match(r"rank \d failed at step 0: ", last)


def test_a_port_in_use_is_named(work: Path) -> None:
    done = result(work, "port")
    assert done["code"] == 1
    assert re.search(r"cause:  port \d+ of this machine is in use", done["stderr"])
    assert "remedy: end that one, or choose another: accelerate launch --main_process_port 0" in done["stderr"]


@pytest.mark.parametrize("name", SNIPPETS)
def test_an_error_is_explained(work: Path, name: str) -> None:
    done = result(work, name)
    assert done["code"] == 0 and SNIPPETS[name][1] in done["stdout"], done


def test_status_json_has_cause_and_remedy(work: Path) -> None:
    status = json.loads((work / "memory" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"], status["rank"]) == ("failed", 1, 0, 0)
    assert "can't allocate memory" in status["reason"] and "--micro_batch_size 2048 should fit" in status["reason"]


@pytest.mark.slow
def test_one_rank_of_two_runs_out_of_memory(tmp_path: Path, fineweb_folder: Path) -> None:
    """Both end, and what stays in status.json is what the one with too little memory says."""
    twice = {name: 2 * LARGE[name] for name in ("batch_tokens", "max_epochs")}
    # Without a watchdog, which may be the first to say it, in other words, where the other rank computes for longer than 10 s.
    fields = TINY | LARGE | twice | {"warmup_steps": 0, "watchdog_seconds": 0}
    port, processes = free_port(), []
    for number in (0, 1):
        # The limit counts from what the libraries take.
        code = "import recipe.train, accelerate, datasets, transformers\n" + (LITTLE_MEMORY if number else "") + TRAIN
        environ = environment(PYTHONPATH=str(ROOT), **rank(number, port))
        command = [sys.executable, "-c", code, *options(**fields, data=fineweb_folder, output_dir=tmp_path / "run")]
        processes.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=150)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert "cause:  out of memory on rank 1: this machine" in said[1] and "--micro_batch_size 2048 should fit" in said[1]
    assert "rank 1 failed at step 0" in said[0].splitlines()[-1]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 1, 1)
    assert "out of memory on rank 1" in status["reason"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_accelerate_file_for_gpus_is_refused_without_one(tmp_path: Path, fineweb_folder: Path) -> None:
    fields = TINY | {"data": fineweb_folder, "max_steps": 2, "warmup_steps": 0, "output_dir": tmp_path / "run"}
    done = subprocess.run(
        accelerate_command("1gpu-ddp", *options(**fields)), env=environment(), capture_output=True, text=True, timeout=120
    )
    assert "1 problem with the configuration or the input:" in done.stderr and not (tmp_path / "run").exists()
    (problem,) = re.findall(r"accelerate: .*", done.stderr)
    assert "1gpu-ddp.yaml is for GPUs, and " in problem and "--config_file " in problem and "/cpu.yaml" in problem


# --- what cannot be caused here: torch's own exception types and messages -----------------------------------------------

CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate {want} GiB. GPU 3 has a total capacity of 79.10 GiB of which {free} GiB is free. "
    "Including non-PyTorch memory, this process has {own} GiB memory in use. Of the allocated memory 70.00 GiB is allocated by "
    "PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)


def gpt2(layers: int, heads: int, width: int, **fields: int) -> Config:
    values = {"micro_batch_size": 64, "batch_tokens": 524_288, "n_positions": 1024, "max_steps": 1000}
    return Config(n_layer=layers, n_head=heads, n_embd=width, **values | fields)


def gpu_memory_remedy(config: Config, ranks: int, free: float = 0.5, own: float = 78.0) -> Remedy:
    error = torch.OutOfMemoryError(CUDA_MESSAGE.format(want="6.14", free=free, own=own))
    return explain(error, Situation(config, ranks, 3, precision="bf16", plain=False, zero1=True))


def test_the_rows_that_are_advised_are_the_most_that_should_fit() -> None:
    config = gpt2(36, 20, 1280)
    found = gpu_memory_remedy(config, 8)
    assert found.cause == "out of memory on rank 3: the GPU (79.1 GiB) cannot hold 64 rows"
    rows = int(re.fullmatch(r"--micro_batch_size (\d+) should fit; the batch stays 524,288 tokens", found.remedy)[1])

    def needed(rows: int) -> int:
        return sum(memory_by_part(gpt2(36, 20, 1280, micro_batch_size=rows), 8).values())

    possible = [n for n in micro_batches(config, 8) if n < 64]
    assert rows in possible and needed(rows) <= USABLE_MEMORY * 79.1 * GIB
    assert all(needed(n) > USABLE_MEMORY * 79.1 * GIB for n in possible if n > rows)


def test_memory_that_others_hold_is_named_and_not_counted_on() -> None:
    found = gpu_memory_remedy(gpt2(36, 20, 1280), 8, free=0.1, own=39.0)
    assert "other processes hold 40.0 GiB of it" in found.cause
    assert "--micro_batch_size 16 should fit" in found.remedy  # 32 need 55 GiB
    none = gpu_memory_remedy(gpt2(48, 25, 1600), 1, free=0.1, own=10.0)
    assert "not even one row should fit" in none.remedy and "stop what else runs there" in none.remedy


def test_a_micro_batch_that_should_have_fitted_is_halved() -> None:
    assert "--micro_batch_size 32 should fit" in gpu_memory_remedy(gpt2(12, 12, 768), 8).remedy
    untold = torch.OutOfMemoryError("CUDA out of memory.")
    assert "--micro_batch_size 32" in explain(untold, Situation(gpt2(12, 12, 768), 8)).remedy


def test_advised_rows_divide_the_batch_and_its_ramp() -> None:
    config = gpt2(36, 20, 1280, micro_batch_size=48, batch_tokens=48 * 1024 * 2)
    assert micro_batches(config, 2) == [48, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    config.batch_ramp = f"{18 * 1024 * 2}x10"
    assert micro_batches(config, 2) == [6, 3, 2, 1]
    assert micro_batches(config, 5) == []


@pytest.mark.parametrize(
    ("message", "cause", "remedy"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", "it speaks CUDA 11.4", "update the driver"),
        ("Found no NVIDIA driver on your system.", "its driver does not answer", "nvidia-smi"),
        ("CUDA error: no kernel image is available for execution on the device", "no code for this model", "another GPU"),
        ("CUDA error: invalid device ordinal", "more processes on this machine than GPUs", "--num_processes"),
        ("CUDA error: uncorrectable ECC error encountered", "the GPU of rank 0 is broken", "take that machine out"),
        ("CUDA error: an illegal memory access was encountered", "a kernel on the GPU of rank 0", "--kernels plain"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "the GPU ran out of memory", "less"),
        ("Failed to find C compiler. Please specify via CC environment variable.", "need a C++ compiler", "install g++"),
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE) ran for 600000 ms",
            "rank 0 waited in vain for another rank",
            "the first error of another rank",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error",
            "rank 0 lost the connection to another rank",
            "the first error",
        ),
    ],
)
def test_messages_of_a_gpu(message: str, cause: str, remedy: str) -> None:
    found = explain(RuntimeError(message))
    assert cause in found.cause and remedy in found.remedy


def test_what_an_error_was_raised_from_is_looked_at() -> None:
    try:
        try:
            raise OSError(28, "No space left on device", "/data/x")
        except OSError as inner:
            raise RuntimeError("could not save") from inner
    except RuntimeError as error:
        assert explain(error).cause == "the disk of /data/x is full"
    assert os.strerror(28) == "No space left on device"
