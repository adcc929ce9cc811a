"""Whether this machine has what the run and its launcher ask for, before anything is opened or downloaded."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from recipe.config import Config, ConfigError, compiles
from recipe.remedies import explain

ACCELERATE_FILES = Path(__file__).resolve().parent.parent / "configs" / "accelerate"
DRIVER = Path("/proc/driver/nvidia/version")
"""Is there where the NVIDIA driver is loaded."""


def check_machine(config: Config, rank: int) -> None:
    """Refuse what cannot work here; on rank 0, warn of a GPU that lies idle.

    Raises:
        ConfigError: with all problems found.
    """
    problems = machine_problems(config)
    if problems:
        raise ConfigError(*problems)
    if rank == 0 and (idle := idle_gpu()):
        print(f"warning: this machine has an NVIDIA GPU and trains on the CPU: {idle}", file=sys.stderr, flush=True)


def machine_problems(config: Config) -> list[str]:
    """What the run or its accelerate file asks for and this machine has not."""
    import torch

    cuda, problems = torch.cuda.is_available(), []
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    accelerate_file = launched_with()
    if not cuda and accelerate_file and _is_for_gpus(accelerate_file):
        problems.append(
            f"accelerate: {accelerate_file} is for GPUs, and {why_no_gpu()}; or train on the CPU: --config_file "
            f"{accelerate_file.with_name('cpu.yaml')}"
        )
    if not cuda and config.kernels == "fused":
        problems.append(f"kernels: fused needs a GPU and Triton, and {why_no_gpu()}; or leave it at auto")
    if not cuda and config.fp8_head:
        problems.append(f"fp8_head: needs a GPU with fp8 (Ada, Hopper or newer), and {why_no_gpu()}; or leave it out")
    if cuda and here > torch.cuda.device_count():
        problems.append(
            f"accelerate: {here} processes on a machine with {torch.cuda.device_count()} GPUs; accelerate launch "
            f"--num_processes {torch.cuda.device_count()} (for several machines, the GPUs of all of them)"
        )
    if (compiles(config, cuda) or (cuda and config.kernels != "plain")) and not find_compiler(cuda):
        plain = "--compile false" + (" --kernels plain" if cuda else "")
        problems.append(
            f"compile: torch.compile{' and Triton need' if cuda else ' needs'} a C++ compiler, and none is in PATH; install "
            f"g++, or train without it, slower: {plain}"
        )
    return problems


def find_compiler(cuda: bool) -> str | None:
    """The compiler that torch's inductor (C++, on a CPU) or Triton (C) would take."""
    names = [os.environ.get("CXX"), "g++", "clang++"] if not cuda else [os.environ.get("CC"), "gcc", "cc", "clang"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def launched_with() -> Path | None:
    """The file that `accelerate launch --config_file` was given, if this process is its worker, as far as Linux tells."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if not any("accelerate" in word for word in words):
        return None
    for word, following in zip(words, words[1:], strict=False):
        name, equals, value = word.partition("=")
        if name in ("--config_file", "--config-file"):
            return Path(value if equals else following)
    return None


def _is_for_gpus(accelerate_file: Path) -> bool:
    """Of ours; others may mean a CPU, which `use_cpu: false` does not rule out."""
    ours = accelerate_file.resolve().parent == ACCELERATE_FILES
    # The one for several nodes takes what the nodes have.
    return ours and not any(name in accelerate_file.stem for name in ("cpu", "multinode"))


def why_no_gpu() -> str:
    """Why torch has no GPU here, and what to do about it; for torch.cuda.is_available() False."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) was built without CUDA; install another: bash scripts/install.sh .venv gpu"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides those of this machine; unset it"
    try:
        torch.cuda.init()
    except Exception as error:
        return str(explain(error) or f"torch says: {error}")
    return "torch finds none; see whether `nvidia-smi` works here"


def idle_gpu() -> str | None:
    """Why the GPU of this machine lies idle, where nobody has asked for that."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or "cpu" in (launched_with() or Path()).stem
    if torch.cuda.is_available() or hidden or on_cpu or not DRIVER.exists():
        return None
    return why_no_gpu()
