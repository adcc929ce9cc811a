"""Starting a run again after a fault, until it is finished or gets no further: what scripts/supervise.sh runs."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from recipe.cli import EXIT_CONFIG, EXIT_FAULT, EXIT_OK, EXIT_STOPPED, report_problems
from recipe.config import ConfigError
from recipe.launcher import Launcher
from recipe.launches import ROOT, launch_command
from recipe.parsing import load_config
from recipe.run_folder import RunFolder

RESTARTS = 3
"""In a row, without a newer checkpoint."""
SAVE_S = 60
"""Seconds that workers may go on behind their launcher, to save."""


def supervise(accelerate_file: str, arguments: list[str], folder: RunFolder, pause: float = 5.0) -> int:
    """Run pretrain.py, and after a fault run it again, from its newest checkpoint.

    Args:
        pause: seconds before a restart.
    Returns:
        0 the run is finished; 75 it was stopped by a signal, or by max_hours; 2 its configuration is bad; 1 it has got no
        further for RESTARTS restarts.
    """
    launcher = Launcher(repeat=True)
    best, restarts = folder.newest_step(), 0
    while not launcher.stopping:
        command = [*launch_command(accelerate_file), str(ROOT / "scripts" / "pretrain.py"), *arguments]
        code, _ = launcher.launch(command, settle=lambda: folder.wait_until_free(SAVE_S))
        if code in (EXIT_OK, EXIT_CONFIG, EXIT_STOPPED):
            return code
        if launcher.stopping:
            break
        reached, reason = folder.newest_step(), folder.read_status().get("reason", "")
        if reached > best:
            best, restarts = reached, 0
        if restarts == RESTARTS:
            _say(f"{RESTARTS} restarts without a checkpoint behind step {best}; giving up. {reason}")
            return EXIT_FAULT
        restarts += 1
        ended = "unknown" if code is None else code
        _say(f"the run ended (code {ended}); restart {restarts} of {RESTARTS} from step {reached}. {reason}")
        resume_at = time.monotonic() + pause
        while time.monotonic() < resume_at and not launcher.stopping:
            time.sleep(0.1)
    return EXIT_STOPPED


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """The exit code for ACCELERATE_FILE CONFIG [--field value ...]."""
    accelerate_file, *arguments = words
    pause = os.environ.get("SUPERVISE_PAUSE") or "5"
    try:
        # Before anything is started, so that a mistake is told once.
        folder = RunFolder(Path(load_config(arguments).output_dir))
        if not re.fullmatch(r"\d+(\.\d+)?", pause):
            raise ConfigError(f"SUPERVISE_PAUSE: {pause!r} (environment) is not a number of seconds such as 5")
    except ConfigError as error:
        report_problems(error)
        return EXIT_CONFIG
    return supervise(accelerate_file, arguments, folder, float(pause))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
