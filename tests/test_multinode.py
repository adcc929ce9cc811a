"""Two 'nodes' of two processes each, over loopback, with the multinode file: the losses of one process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import PRETRAIN, ROOT, TINY, environment, free_port, kill_all, launch, losses, options
from recipe.nodes import Node

MULTINODE = ROOT / "configs" / "accelerate" / "multinode-zero1.yaml"
STEPS = 20


def commands(*arguments: str) -> list[list[str]]:
    """The launch of each node as the file's header tells it, with two processes a node."""
    header = next(line for line in MULTINODE.read_text().splitlines() if "accelerate launch" in line)
    words = shlex.split(header.removeprefix("#").replace("...", ""))
    assert words[:2] == ["accelerate", "launch"] and words[3] == "configs/accelerate/multinode-zero1.yaml"
    words[:2] = [sys.executable, "-m", "accelerate.commands.launch"]
    words[words.index("HOST")] = "127.0.0.1"
    more = ["--num_processes", "4", "--main_process_port", str(free_port())]
    return [[str(node) if word == "N" else word for word in words] + more + [PRETRAIN, *arguments] for node in (0, 1)]


def test_the_header_and_node_py_say_the_same() -> None:
    for rank, words in enumerate(commands("run.yaml")):
        theirs = Node(rank, 2, 2, "127.0.0.1", 1).launch(str(MULTINODE), Path(PRETRAIN), ["run.yaml"])
        for option in ("--machine_rank", "--main_process_ip", "--num_processes"):
            assert words[words.index(option) + 1] == theirs[theirs.index(option) + 1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_train_as_one_process(tmp_path: Path, fineweb_folder: Path) -> None:
    fields = TINY | {"data": fineweb_folder, "max_steps": STEPS, "precision": "fp32", "log_every": 5}
    launch("cpu", *options(**fields, output_dir=tmp_path / "one"))
    log, started = tmp_path / "log", []
    try:
        for words in commands(*options(**fields, output_dir=tmp_path / "two")):
            with open(log, "a", encoding="utf-8") as handle:
                started.append(
                    subprocess.Popen(
                        words, cwd=ROOT, env=environment(GLOO_SOCKET_IFNAME="lo"), stdout=handle, stderr=subprocess.STDOUT
                    )
                )
        deadline = time.monotonic() + 240
        while any(node.poll() is None for node in started):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    finally:
        for node in started:
            if node.poll() is None:
                kill_all(node)
    assert [node.returncode for node in started] == [0, 0], log.read_text()
    assert "4 ranks" in log.read_text() and "Zero1Engine, fp32" in log.read_text()
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one[0] - one[-1] > 0.5, "the model must learn, or equal losses say nothing"
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4
    assert os.path.exists(tmp_path / "two" / "export" / "model.safetensors")
