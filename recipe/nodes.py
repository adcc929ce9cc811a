"""One node's part of a run on several: which of them it is, the launcher that it starts, and how that ended."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from recipe.cli import EXIT_CONFIG, EXIT_FAULT, EXIT_OK, EXIT_STOPPED
from recipe.config import ConfigError
from recipe.launcher import Launcher, shutdown_seconds, told_by_the_folder
from recipe.launches import launch_command
from recipe.run_folder import RunFolder

DEFAULT_PORT = 29_500


@dataclass(frozen=True)
class Node:
    """This node among those of the run."""

    rank: int
    nodes: int
    processes: int
    """Of each node: one for a GPU."""
    address: str
    """The first node's, a name or an IP."""
    port: int

    def launch(self, accelerate_file: str, script: Path, arguments: list[str]) -> list[str]:
        """The `accelerate launch` of this node."""
        options = [
            "--num_machines", str(self.nodes), "--num_processes", str(self.nodes * self.processes),
            "--machine_rank", str(self.rank), "--main_process_ip", self.address, "--main_process_port", str(self.port),
        ]  # fmt: skip
        return [*launch_command(accelerate_file, *options), str(script), *arguments]


def read_accelerate_file(path: str) -> int:
    """Its processes of each node.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        machine = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return machine["num_processes"] // machine["num_machines"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not an accelerate file ({error}); take one of configs/accelerate") from error


def this_node(environment: Mapping[str, str], accelerate_file: str) -> Node:
    """What Slurm or SkyPilot say in the environment; a single node with the file's processes where neither does.

    Raises:
        ConfigError: if the accelerate file cannot be read.
    """
    processes = read_accelerate_file(accelerate_file)
    if "SLURM_JOB_NODELIST" in environment:
        gpus = environment.get("SLURM_GPUS_ON_NODE", str(processes))
        # Two jobs may share a node.
        port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000
        nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
        return Node(
            int(environment.get("SLURM_NODEID", "0")), nodes, int(gpus), first_host(environment["SLURM_JOB_NODELIST"]), port
        )
    if "SKYPILOT_NODE_IPS" in environment:
        ips = environment["SKYPILOT_NODE_IPS"].split()
        gpus = environment.get("SKYPILOT_NUM_GPUS_PER_NODE") or str(processes)
        return Node(int(environment["SKYPILOT_NODE_RANK"]), len(ips), int(gpus), ips[0], DEFAULT_PORT)
    return Node(0, 1, processes, "127.0.0.1", DEFAULT_PORT)


def first_host(nodelist: str) -> str:
    """The first of Slurm's hosts: `gpu[003-007,9],big1` is gpu003, as `scontrol show hostnames` has it."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if not match:
        raise ConfigError(f"SLURM_JOB_NODELIST: {nodelist!r} names no host")
    return match[1] + (match[2] or "") + (match[3] or "")


def run_node(node: Node, accelerate_file: str, script: Path, arguments: list[str], output_dir: str) -> int:
    """Start this node's launcher, pass STOP_SIGNALS on to its workers, and wait for it.

    Returns:
        0 the run is finished; 2 its configuration is bad; 75 start it again: it was stopped, or a fault has ended it that came
        after a new checkpoint; 1 a fault that came before any. The same on every node.
    """
    folder = RunFolder(Path(output_dir))
    before, began = folder.newest_step(), time.time()
    launcher = Launcher(repeat=False)
    noted, code = launcher.launch(node.launch(accelerate_file, script, arguments))
    if noted is not None:
        code = noted
    elif code:
        # Who ends first takes the others with him, under SkyPilot: the first node may still be saving.
        code = told_by_the_folder(folder, began, shutdown_seconds())
    if code in (EXIT_OK, EXIT_CONFIG, EXIT_STOPPED):
        return code
    # A run that was resumed from an older checkpoint sets newer ones aside: that, too, is further than it was.
    return EXIT_STOPPED if launcher.stopping or folder.newest_step() != before else EXIT_FAULT
