"""What went wrong and what to do about it, in a line each: errors of torch, the Hub, the network and the disk, for people.

`explain` maps an exception, or what it was raised from, to a Remedy. Errors of our own that say what to do, and those that
nobody has met yet, map to None: then the error's own words must do. Imports no torch: it goes by what the errors are and say.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from recipe.config import Config
from recipe.estimate import GIB, USABLE_MEMORY, memory_by_part, micro_batches
from recipe.plan import GPT2_VOCAB_SIZE

AGAIN = "the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class Remedy:
    """For an error."""

    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


@dataclass(frozen=True)
class Situation:
    """What the run was, as far as remedies depend on it."""

    config: Config | None = None
    ranks: int = 1
    rank: int = 0
    vocab_size: int = GPT2_VOCAB_SIZE
    precision: str = "fp32"
    """bf16 or fp32."""
    plain: bool = True
    """torch's kernels, not compiled."""
    zero1: bool = False
    """Masters and moments are shared out among the ranks."""


def explain(error: BaseException, situation: Situation | None = None) -> Remedy | None:
    """Cause and remedy of an error, or of what it was raised from; None for one that is not known or speaks for itself."""
    situation = situation or Situation()
    for link in _chain(error):
        for rule in _RULES:
            if found := rule(link, str(link), situation):
                return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    link: BaseException | None = error
    for _ in range(20):
        if link is None:
            return
        yield link
        link = link.__cause__ or link.__context__  # also behind `from None`: `datasets` hides what the Hub said


def _is(error: BaseException, *names: str) -> bool:
    """Whether the error is of a type of one of these names, whose module may not be there."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


# --- memory -------------------------------------------------------------------------------------------------------

_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator: can't allocate memory|"
    r"Cuda failure.*out of memory"
)
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _out_of_memory(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (_is(error, "OutOfMemoryError", "MemoryError") or no_memory or _OUT_OF_MEMORY.search(text)):
        return None
    gpu = _is(error, "OutOfMemoryError") or bool(re.search("cuda|cublas", text, re.IGNORECASE))
    capacity, others = _gpu_memory(text) if gpu else (_host_memory(), 0)
    where = "the GPU" if gpu else "this machine"
    size = f" ({capacity / GIB:.1f} GiB)" if capacity else ""
    used = f"; other processes hold {others / GIB:.1f} GiB of it" if others > GIB else ""
    config = situation.config
    if config is None:
        return Remedy(f"{where} ran out of memory{size}{used}", "give it less to do at a time, or free some memory")
    cause = f"out of memory on rank {situation.rank}: {where}{size} cannot hold {config.micro_batch_size} rows{used}"
    rows = _rows_that_fit(situation, (capacity or 0) - others if gpu else (capacity or 0) // _ranks_here(situation))
    if rows:
        return Remedy(cause, f"--micro_batch_size {rows} should fit; the batch stays {config.batch_tokens:,} tokens")
    fewer = "stop what else runs there, or " if used else ""
    sharing = "more GPUs under ZeRO-1, which share the optimizer's state, " if gpu else "a machine with more memory, "
    return Remedy(cause, f"not even one row should fit: {fewer}take {sharing}a shorter sequence_length or a smaller model")


def _rows_that_fit(situation: Situation, capacity: float) -> int | None:
    """Rows of the largest micro-batch that should fit, fewer than those that did not; None if none should."""
    config = situation.config
    fewer = [n for n in micro_batches(config, situation.ranks) if n < config.micro_batch_size]
    if not capacity:  # the message does not say
        return next((n for n in fewer if 2 * n <= config.micro_batch_size), None)

    def fits(rows: int) -> bool:
        memory = memory_by_part(
            replace(config, micro_batch_size=rows),
            situation.ranks if situation.zero1 else 1,
            situation.vocab_size,
            situation.precision,
            situation.plain,
        )
        return sum(memory.values()) <= USABLE_MEMORY * capacity

    # Where the estimate would have let the failed one pass it is too low: then at most half.
    limit = config.micro_batch_size // 2 if fits(config.micro_batch_size) else config.micro_batch_size
    return next((n for n in fewer if n <= limit and fits(n)), None)


def _gpu_memory(text: str) -> tuple[float | None, float]:
    """The card's memory and what other processes have of it, bytes, from torch's message."""

    def size(pattern: str) -> float | None:
        match = re.search(pattern.replace("SIZE", r"([\d.]+) (B|KiB|MiB|GiB)"), text)
        return float(match[1]) * _UNITS[match[2]] if match else None

    capacity, free = size("total capacity of SIZE"), size("of which SIZE is free")
    own = size("this process has SIZE memory in use")
    others = capacity - free - own if None not in (capacity, free, own) else 0.0
    return capacity, max(0.0, others)


def _host_memory() -> int | None:
    """Bytes of this machine, or of the container's part of it."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(memory, int(limit)) if limit.isdigit() else memory
    except (OSError, ValueError):
        return memory if "memory" in locals() else None


def _ranks_here(situation: Situation) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", situation.ranks))


# --- GPU, driver, compiler ------------------------------------------------------------------------------------------


def _driver(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if "Torch not compiled with CUDA enabled" in text:
        return Remedy(
            "this torch was built without CUDA", "install one with it: bash scripts/install.sh .venv gpu; or train on the CPU"
        )
    if match := re.search(r"driver on your system is too old \(found version (\d+)\)", text):
        speaks = f"{int(match[1]) // 1000}.{int(match[1]) % 1000 // 10}"
        return Remedy(
            f"the NVIDIA driver is too old for this torch (it speaks CUDA {speaks})",
            "update the driver, or install a torch that was built for that CUDA",
        )
    if "CUDA driver version is insufficient" in text:
        return Remedy(
            "the NVIDIA driver is too old for this torch",
            "update the driver, or install a torch built for the CUDA that `nvidia-smi` shows",
        )
    if re.search(
        "no NVIDIA driver|CUDA unknown error|CUDA-capable device|system not yet initialized|CUDA initialization", text
    ):
        return Remedy(
            "the GPU cannot be used: its driver does not answer",
            "see whether `nvidia-smi` works, here and inside the container (docker run --gpus all); restart the machine if not",
        )
    if "no kernel image is available" in text or "not compatible with the current PyTorch installation" in text:
        return Remedy(
            "this torch has no code for this model of GPU", "install a torch that has (pytorch.org/get-started), or another GPU"
        )
    return None


def _too_few_gpus(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if "invalid device ordinal" not in text:
        return None
    return Remedy(
        "there are more processes on this machine than GPUs",
        "accelerate launch --num_processes N with the N that `nvidia-smi -L` counts",
    )


def _gpu_fault(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if re.search("uncorrectable ECC|GPU has fallen off the bus|NVLink error|hardware error", text, re.IGNORECASE):
        return Remedy(f"the GPU of rank {situation.rank} is broken", f"take that machine out; {AGAIN} on another")
    if re.search("illegal memory access|unspecified launch failure|misaligned address|illegal instruction", text):
        return Remedy(
            f"a kernel on the GPU of rank {situation.rank} went wrong",
            f"{AGAIN}; if it comes back, --kernels plain tells whether our kernels are at fault, another machine whether it is "
            "the GPU",
        )
    return None


def _compiler(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    plain = "train without compiled code, slower: --compile false --kernels plain"
    if _is(error, "InvalidCxxCompiler") or re.search("No working C\\+\\+ compiler found|Failed to find C compiler", text):
        return Remedy("torch.compile and Triton need a C++ compiler, and there is none", f"install g++, or {plain}")
    said = f"{text} {getattr(error, 'output', '')} {getattr(error, 'stderr', '')}"
    if "Python.h" in said:
        return Remedy("Triton needs the headers of Python, and they are not there", f"install python3-dev, or {plain}")
    if _is(error, "CppCompileError") or (_is(error, "CalledProcessError") and re.search("gcc|g\\+\\+|clang|ninja", text)):
        return Remedy("the C++ compiler failed", f"install a newer g++ and python3-dev, or {plain}")
    return None


# --- processes ------------------------------------------------------------------------------------------------------


def _port(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    if not in_use and not re.search("EADDRINUSE|address already in use", text, re.IGNORECASE):
        return None
    match = re.search(r"port:? (\d+)", text)
    port = match[1] if match else os.environ.get("MASTER_PORT", "")
    return Remedy(
        f"port {port} of this machine is in use, by another run or one that has not ended",
        "end that one, or choose another: accelerate launch --main_process_port 0 (for several machines, a free "
        "one of the first)",
    )


def _rendezvous(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if match := re.search(r"(\d+)/(\d+) clients joined", text):
        return Remedy(
            f"only {match[1]} of {match[2]} ranks came",
            "start the command on every machine, with the same --main_process_ip and --main_process_port and its own "
            "--machine_rank, and see that none has ended with an error of its own",
        )
    if match := re.search(r"trying to connect to \(([^,]+), (\d+)\)", text):
        return Remedy(
            f"rank {situation.rank} cannot reach {match[1]} port {match[2]}, where rank 0 listens",
            "see that rank 0 runs there, that --main_process_ip is its address in the network of the others, and that no "
            "firewall is between",
        )
    return None


_COLLECTIVE = re.compile(
    r"Timed out waiting \d+ms|collective operation timeout|[Ss]ocket [Tt]imeout|wait timeout after|Connection closed by peer|"
    r"gloo/transport|Application timeout caused pair closure|remote process exited|ncclSystemError|"
    r"NCCL (?:error|operation|communicator)"
)


def _collective(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if not (isinstance(error, RuntimeError) and _COLLECTIVE.search(text)):
        return None
    waited = "waited in vain for" if re.search("time[d]? ?out", text, re.IGNORECASE) else "lost the connection to"
    return Remedy(
        f"rank {situation.rank} {waited} another rank",
        f"the first error of another rank, above or on its machine, is the cause; without one, look at the network; {AGAIN}",
    )


def _lost_rank(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if not (_is(error, "TrainingError") and text.startswith("lost ")):
        return None
    return Remedy(
        text.partition(": ")[0],
        f"see `dmesg` there: `Out of memory` calls for fewer --data_workers or a smaller micro_batch_size; {AGAIN}",
    )


# --- Hub and network --------------------------------------------------------------------------------------------------

_UNREACHABLE = (
    "ConnectError", "ConnectTimeout", "ReadTimeout", "ProxyError", "LocalEntryNotFoundError", "OfflineModeIsEnabled",
    "gaierror",
)  # fmt: skip


def hub_status(error: BaseException) -> int | None:
    """The status with which the Hub refused, if it did."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        match = re.search(r"\bstatus (\d{3})\b", str(link)) if _is(link, "RemoteReadError") else None
        if status or match:
            return int(status or match[1])
    return None


def _hub(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if any(_is(link, "GatedRepoError") for link in _chain(error)) or (_is(error, "DatasetNotFoundError") and "gated" in text):
        return _gated(_repo(error))
    status = hub_status(error)
    repo = _repo(error)
    if status == 401 and not any(_is(link, "RepositoryNotFoundError") for link in _chain(error)):  # which may be misspelt
        return Remedy(
            f"the Hub does not know who asks for {repo}", "log in with `hf auth login`, or set HF_TOKEN, on every machine"
        )
    if status == 403:
        return Remedy(
            f"the Hub does not allow this user to read {repo}",
            "ask for access on its page, and use a token that may read it (a fine-grained one must name the repository)",
        )
    if status == 429:
        limit = "" if _has_token() else "log in with `hf auth login`, which raises the limit; "
        return Remedy(
            f"the Hub limits the rate of requests, and did so for longer than we wait ({repo})",
            f"{limit}wait five minutes, or read the text once with scripts/prepare_data.py; the same command goes on",
        )
    if status and status >= 500:
        return Remedy(f"the Hub has a fault of its own (status {status}, {repo})", f"wait (status.huggingface.co); {AGAIN}")
    unread = _is(error, "RemoteReadError") and re.search("bytes in|Connect|Timeout|resolution|refused|reset|OFFLINE", text)
    unread = unread or "Couldn't reach" in text
    if status is None and (unread or any(_is(link, *_UNREACHABLE) for link in _chain(error))):
        return Remedy(
            f"the Hub cannot be reached for {repo}",
            "check the network, the proxy and HF_HUB_OFFLINE, or use what is on this machine",
        )
    return None


def _gated(repo: str) -> Remedy:
    ask = "log in with `hf auth login`, or set HF_TOKEN, " if not _has_token() else ""
    return Remedy(f"{repo} is gated", f"{ask}{'and ' if ask else ''}ask for access on its page on the Hub")


def _repo(error: BaseException) -> str:
    """What was asked for, as far as the errors tell."""
    for link in _chain(error):
        url = str(getattr(getattr(link, "response", None), "url", ""))
        if match := re.search(r"//[^/]+/(?:api/)?(?:datasets/|models/)?([\w.-]+/[\w.-]+)", url):
            return match[1]
    for link in _chain(error):
        for pattern in (r"(?:datasets|models)/([\w.-]+/[\w.-]+?)(?:@|/|\?|'|$)", r"(?:[Dd]ataset|repo) '?([\w.-]+/[\w.-]+)'?"):
            if match := re.search(pattern, str(link)):
                return match[1]
    return "what was asked for"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


# --- disk and packages --------------------------------------------------------------------------------------------------


def _disk(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    number = error.errno if isinstance(error, OSError) else None
    place = getattr(error, "filename", None) or (situation.config.output_dir if situation.config else "the output folder")
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text or "Disk quota exceeded" in text:
        return Remedy(
            f"the disk of {place} is full",
            f"free some (keep_checkpoints, old runs, the caches in ~/.cache/huggingface); {AGAIN}, or name another output_dir",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Remedy(
            f"{place} cannot be written or read: {os.strerror(number)}", "change its permissions, or name another path"
        )
    if number == errno.EMFILE:
        return Remedy("too many files are open at a time", "raise the limit: ulimit -n 65536, and give the same command again")
    if number == errno.EIO:
        return Remedy(f"the disk of {place} has a fault", f"{AGAIN}; name another output_dir if it comes back")
    return None


def _package(error: BaseException, text: str, situation: Situation) -> Remedy | None:
    if isinstance(error, ModuleNotFoundError):
        return Remedy(
            f"the package {error.name} is not installed here", "bash scripts/install.sh, and the Python of its folder"
        )
    if isinstance(error, ImportError) and re.search(r"lib[\w.-]+\.so", text):
        return Remedy(
            f"a package does not fit the others ({text.splitlines()[0]})", "install anew: bash scripts/install.sh .venv [gpu]"
        )
    return None


_RULES: tuple[Callable[[BaseException, str, Situation], Remedy | None], ...] = (
    _lost_rank, _out_of_memory, _too_few_gpus, _driver, _compiler, _port, _rendezvous, _gpu_fault, _collective, _disk, _hub,
    _package,
)  # fmt: skip
"""In the order in which they are asked."""
