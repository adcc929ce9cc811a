"""The launchers: each passes the checker of its kind, and the Slurm script stops, requeues and finishes a real run."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from launch import ROOT, TINY, environment, kill_all, losses, options
from recipe.config import ConfigError
from recipe.nodes import Node, first_host, this_node
from recipe.parsing import load_config
from recipe.run_folder import RunFolder

LAUNCH = ROOT / "scripts" / "launch"
SBATCH = LAUNCH / "slurm.sbatch"
MULTINODE = str(ROOT / "configs" / "accelerate" / "multinode-zero1.yaml")
BIN = Path(sys.executable).parent


def run(*command: str, **more: str) -> subprocess.CompletedProcess:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, cwd=ROOT, env=environment(PATH=path, **more), capture_output=True, text=True, timeout=60)


# --- syntax and help ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["hf_jobs.sh", "slurm.sbatch"])
def test_shell_scripts_parse_and_explain_themselves(script: str) -> None:
    assert run("bash", "-n", str(LAUNCH / script)).stderr == ""
    shown = run("bash", str(LAUNCH / script), "--help")
    assert shown.returncode == 0 and f"scripts/launch/{script}" in shown.stdout and "configs/gpt2-124m.yaml" in shown.stdout
    assert "set -" not in shown.stdout and "#SBATCH" not in shown.stdout


def test_every_path_in_a_launcher_exists() -> None:
    for path in [*LAUNCH.iterdir(), ROOT / "Dockerfile"]:
        if path.is_file():
            for name in re.findall(r"\b(?:configs|scripts)/[\w./-]+\.(?:yaml|py|sh|sbatch)\b", path.read_text()):
                assert (ROOT / name).exists(), f"{path.name} names {name}"


# --- Slurm --------------------------------------------------------------------------------------------------------

# Options of sbatch that a file may give, with the form of their value (man sbatch); what it would refuse is refused here.
DIRECTIVES = {
    "job-name": r"[\w.-]+", "nodes": r"\d+(-\d+)?", "ntasks-per-node": r"\d+", "gpus-per-node": r"([\w-]+:)?\d+",
    "cpus-per-task": r"\d+", "exclusive": r"(user|mcs)?", "time": r"(\d+-)?\d+(:\d\d){0,2}", "requeue": "",
    "signal": r"(B:|R:)?(USR1|USR2|TERM|\d+)(@\d{1,5})?", "open-mode": "append|truncate", "output": r"[\w%./-]+",
    "partition": r"[\w,-]+", "account": r"[\w-]+", "mem": r"\d+[KMGT]?",
}  # fmt: skip


def directives(text: str) -> dict[str, str]:
    """The #SBATCH lines as sbatch reads them: up to the first command.

    Raises:
        ValueError: for what sbatch would refuse, or pass over silently.
    """
    lines = text.splitlines()
    if not lines[0].startswith("#!"):
        raise ValueError("sbatch wants a shebang")
    found: dict[str, str] = {}
    ended = False
    for line in lines:
        if not line.startswith("#"):
            ended |= bool(line.strip())
            continue
        if not line.startswith("#SBATCH"):
            continue
        if ended:
            raise ValueError(f"behind the first command, and so ignored: {line}")
        for word in shlex.split(line.removeprefix("#SBATCH"), comments=True):
            match = re.fullmatch(r"--([a-z-]+)(?:=(.*))?", word)
            if not match or match[1] not in DIRECTIVES or not re.fullmatch(DIRECTIVES[match[1]], match[2] or ""):
                raise ValueError(f"not an option of sbatch: {word}")
            found[match[1]] = match[2] or ""
    return found


def test_sbatch_would_take_the_directives() -> None:
    found = directives(SBATCH.read_text())
    machine = yaml.safe_load(Path(MULTINODE).read_text())
    assert int(found["nodes"]) == machine["num_machines"] and found["ntasks-per-node"] == "1"
    assert int(found["nodes"]) * int(found["gpus-per-node"]) == machine["num_processes"]
    # To the batch shell, minutes before the end, and in the same log after a requeue.
    assert found["signal"] == "B:USR1@300" and found["open-mode"] == "append" and "requeue" in found


@pytest.mark.parametrize(
    "line",
    ["#SBATCH --nodez=2", "#SBATCH --nodes=two", "#SBATCH --signal=B:USR9@300", "#SBATCH nodes=2", "true\n#SBATCH --nodes=2"],
)
def test_what_sbatch_refuses_is_refused(line: str) -> None:
    with pytest.raises(ValueError):
        directives(f"#!/bin/bash\n{line}\n")


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("gpu7", "gpu7"), ("gpu[003-007,9],big1", "gpu003"), ("a-1,b-[2-3]", "a-1"), ("r[1,5]n2", "r1n2"), ("n[08]", "n08"),
    ],
)  # fmt: skip
def test_the_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_where_this_node_stands() -> None:
    slurm = {"SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4"}
    assert this_node(slurm | {"SLURM_JOB_ID": "123456"}, MULTINODE) == Node(1, 2, 4, "gpu3", 23_456)
    sky = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3", "SKYPILOT_NODE_RANK": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    assert this_node(sky, MULTINODE) == Node(2, 3, 8, "10.0.0.1", 29_500)
    assert this_node({}, MULTINODE) == Node(0, 1, 8, "127.0.0.1", 29_500)
    with pytest.raises(ConfigError, match="not an accelerate file"):
        this_node({}, str(ROOT / "configs" / "gpt2-124m.yaml"))


def test_the_launch_of_a_node_is_the_one_of_the_accelerate_file() -> None:
    words = Node(1, 2, 8, "gpu3", 23_456).launch(MULTINODE, Path("pretrain.py"), ["run.yaml", "--seed", "1"])
    text = " ".join(words)
    assert f"launch --config_file {MULTINODE} --num_machines 2 --num_processes 16 --machine_rank 1" in text
    assert text.endswith("--main_process_ip gpu3 --main_process_port 23456 pretrain.py run.yaml --seed 1")


def test_node_tells_a_bad_configuration_once() -> None:
    done = run(sys.executable, str(LAUNCH / "node.py"), MULTINODE, "configs/gpt2-124m.yaml", "--n_layr", "2")
    assert done.returncode == 2 and done.stderr.count("did you mean n_layer?") == 1 and not done.stdout
    shown = run(sys.executable, str(LAUNCH / "node.py"), "--help")
    assert shown.returncode == 0 and "scripts/launch/node.py configs/accelerate/multinode-zero1.yaml" in shown.stdout


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with an srun that starts the tasks of two nodes here, and an scontrol that notes what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(
        """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
pids=()
for node in 0 1; do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
highest=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"; code=$?
  ((code > highest)) && highest=$code
done
exit "$highest"
"""
    )
    (folder / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$@" >>{tmp_path}/scontrol.log\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    return folder


@contextmanager
def submit(cluster: Path, log: Path, *words: str) -> Iterator[subprocess.Popen]:
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1", "VENV": str(BIN.parent), "PATH": f"{cluster}{os.pathsep}{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    with open(log, "a", encoding="utf-8") as handle:
        job = subprocess.Popen(
            ["bash", str(SBATCH), *words], env=environment(**slurm), stdout=handle, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            kill_all(job)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_slurm_stops_requeues_and_finishes(cluster: Path, tmp_path: Path, fineweb_folder: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    steps = 40
    fields = TINY | {
        "data": fineweb_folder, "output_dir": folder, "max_steps": steps, "save_every": 4,
        "log_every": 1, "precision": "fp32",
    }  # fmt: skip
    words = [str(ROOT / "configs" / "gpt2-124m.yaml"), *options(**fields)]
    with submit(cluster, log, *words) as job:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "step-00000004" / "MANIFEST.json").is_file():
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)  # as Slurm does before the time limit
        assert job.wait(60) == 0, log.read_text()
    status = yaml.safe_load((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 75) and 4 <= status["step"] < steps, log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    # Slurm starts the same script again.
    with submit(cluster, log, *words) as job:
        assert job.wait(150) == 0, log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    assert f"continuing from {folder}/checkpoints/step-{status['step']:08d}" in log.read_text()
    assert len(losses(folder)) == steps
    assert "2 ranks" in log.read_text() and "node 1 of 2, 1 processes each" in log.read_text()


@pytest.mark.slow
def test_slurm_does_not_requeue_what_would_fail_again(cluster: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with submit(cluster, log, "configs/gpt2-124m.yaml", "--n_layr", "2") as job:
        assert job.wait(60) == 2
    assert not (tmp_path / "scontrol.log").exists() and "did you mean n_layer" in log.read_text()


# --- SkyPilot -----------------------------------------------------------------------------------------------------

# Keys of SkyPilot 0.14's task YAML (its documentation, "SkyPilot YAML"); unknown ones are errors there.
SKY_TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run", "config"}
SKY_RESOURCES = {
    "infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "disk_tier", "network_tier", "image_id", "ports",
    "labels", "any_of", "ordered", "job_recovery", "autostop", "instance_type", "max_hourly_cost",
}  # fmt: skip
SKY_RECOVERY = {"strategy": str, "max_restarts_on_errors": int, "recover_on_exit_codes": list}
SKY_STORAGE = {"name", "source", "store", "persistent", "mode", "config"}


def test_the_sky_file_has_the_keys_that_skypilot_knows() -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) <= SKY_TASK and set(task["resources"]) <= SKY_RESOURCES
    recovery = task["resources"]["job_recovery"]
    assert all(isinstance(value, SKY_RECOVERY[name]) for name, value in recovery.items())
    assert recovery["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION") and recovery["recover_on_exit_codes"] == [75]
    assert task["resources"]["use_spot"] is True and set(task["resources"]["accelerators"].values()) == {8}
    # Null would ask for --env on the command line; anything but text is refused.
    assert all(isinstance(value, str) for value in task["envs"].values())
    (mount,) = task["file_mounts"].values()
    assert set(mount) <= SKY_STORAGE and mount["mode"] == "MOUNT_CACHED"
    names = set(re.findall(r"\$\{?([A-Z]+)\b", task["run"] + str(task["file_mounts"])))
    assert names == set(task["envs"])
    assert load_config([str(ROOT / task["envs"]["CONFIG"])]).name == "gpt2-124m"


def test_what_the_sky_file_runs_is_a_run(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    for command in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True).stderr == ""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    shown = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env=os.environ | task["envs"] | {"FIELDS": "--seed 3"},
        capture_output=True,
        text=True,
    ).stdout.split()
    assert shown[:2] == ["scripts/launch/node.py", "configs/accelerate/multinode-zero1.yaml"]
    config = load_config([str(ROOT / shown[2]), *shown[3:]])
    assert (config.output_dir, config.seed) == ("/runs/gpt2-124m", 3)


# --- Hugging Face Jobs --------------------------------------------------------------------------------------------


def hf_job(*words: str, **more: str) -> subprocess.CompletedProcess:
    fixed = {"DRY_RUN": "1", "HF_TOKEN": "none", "REPOSITORY": "https://example.org/recipe", "REVISION": "abc"}
    return run("bash", str(LAUNCH / "hf_jobs.sh"), *words, **(fixed | more))


def test_hf_jobs_takes_the_job() -> None:
    # The installed client checks its own options and shows what it would submit.
    shown = hf_job("me/runs", "configs/gpt2-350m.yaml", "--seed", "3")
    assert shown.returncode == 0, shown.stderr
    job = shown.stdout
    assert re.search(r"flavor +a100x8", job) and re.search(r"timeout +12h", job) and "hf://buckets/me/runs:/runs" in job
    assert "MACHINE=8xa100-zero1" in job and "REVISION=abc" in job
    assert "hf_jobs configs/gpt2-350m.yaml --output_dir /runs/gpt2-350m --seed 3" in job
    script = re.search(r"bash -c '(.*?)' hf_jobs", job, flags=re.S)[1]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


@pytest.mark.parametrize(
    ("flavor", "machine"), [("a100x8", "8xa100-zero1"), ("h200x8", "8xh100-zero1"), ("l40sx1", "1gpu"), ("h200", "1gpu")]
)
def test_hf_jobs_picks_the_accelerate_file(flavor: str, machine: str) -> None:
    from huggingface_hub import JobHardware

    assert flavor in {hardware.value for hardware in JobHardware}
    assert f"MACHINE={machine}" in hf_job("me/runs", "configs/gpt2-124m.yaml", FLAVOR=flavor).stdout
    assert (ROOT / "configs" / "accelerate" / f"{machine}.yaml").is_file()


def test_hf_jobs_refuses_before_it_costs() -> None:
    assert "no such config file" in hf_job("me/runs", "configs/gone.yaml").stderr
    assert "neither one GPU nor eight" in hf_job("me/runs", "configs/gpt2-124m.yaml", FLAVOR="a100x4").stderr
    assert "USER/BUCKET" in hf_job("me/runs").stderr


# --- Docker -------------------------------------------------------------------------------------------------------

INSTRUCTIONS = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "STOPSIGNAL", "VOLUME", "CMD"}


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_the_dockerfile_is_sound() -> None:
    found = dockerfile()
    assert found[0][0] == "FROM" and {name for name, _ in found} <= INSTRUCTIONS
    copied = []
    for name, value in found:
        if name == "COPY":
            *sources, target = value.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                tracked = subprocess.run(["git", "ls-files", source], cwd=ROOT, capture_output=True, text=True).stdout
                assert tracked or not (ROOT / ".git").exists(), f"{source} is not in the repository"
            assert target == "./" or target == sources[0]
            copied += sources
        if name == "RUN":
            # hadolint's rules of apt and pip: no recommendations, no lists or caches left behind, no questions asked.
            assert subprocess.run(["bash", "-n"], input=value, text=True, capture_output=True).stderr == ""
            if "apt-get install" in value:
                assert "--no-install-recommends" in value and "--yes" in value and "rm -rf /var/lib/apt/lists" in value
            assert "pip install" not in value or "--no-cache-dir" in value
            # What a command reads has been copied before it.
            for path in re.findall(r"\b(?:scripts|recipe|configs)/[\w./]+|constraints\.txt", value):
                assert path in copied, path
    assert found[0][1].split(":")[1], "a pinned base"
    # What setup.py needs for an editable install.
    assert {"setup.py", "setup.cfg", "README.md", "LICENSE", "recipe/__init__.py"} <= set(copied)
    assert "license_files = LICENSE" in (ROOT / "setup.cfg").read_text()


def test_the_dockerfiles_commands_work_here(tmp_path: Path) -> None:
    """What can be tried without Docker: the line that finds torch's version, the files that an install needs, the CMD."""
    done = dict(dockerfile())
    torch = subprocess.run(
        ["bash", "-c", "echo \"$(grep '^torch==' constraints.txt)\""], cwd=ROOT, capture_output=True, text=True
    )
    assert re.fullmatch(r"torch==[\d.]+\n", torch.stdout)
    shown = run(*yaml.safe_load(done["CMD"]))
    assert shown.returncode == 0 and "--micro_batch_size" in shown.stdout
    # The first layer's files alone describe the package.
    for name, value in dockerfile():
        if name == "COPY" and "setup.py" in value:
            for source in value.split()[:-1]:
                (tmp_path / source).write_bytes((ROOT / source).read_bytes())
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "__init__.py").write_bytes((ROOT / "recipe" / "__init__.py").read_bytes())
    described = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert described.stdout.split()[0] == "gpt2-recipe", described.stderr
    assert RunFolder(Path("runs/x")).path.parts[0] == "runs"  # the volume
