"""Starting a run again after a fault, until it is finished or gets no further: what scripts/supervise.sh runs."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

from recipe.cli import EXIT_CONFIG, EXIT_FAULT, EXIT_OK, EXIT_STOPPED, report_problems
from recipe.config import ConfigError
from recipe.launcher import Launcher, told_by_the_folder
from recipe.launches import ROOT, launch_command
from recipe.nodes import read_accelerate_file
from recipe.output import lasting_output
from recipe.parsing import load_config
from recipe.run_folder import RunFolder

RESTARTS = 3
"""In a row, without a newer checkpoint."""
SAVE_S = 60
"""Seconds that workers may go on behind their launcher, to save."""
TOLD_S = 1.0
"""Seconds that status.json may take to say how a run ended, once nobody trains any more."""


def supervise(accelerate_file: str, arguments: list[str], folder: RunFolder, pause: float = 5.0) -> int:
    """Run pretrain.py, and after a fault run it again, from its newest checkpoint.

    Args:
        pause: seconds before a restart.
    Returns:
        0 the run is finished; 75 it was stopped by a signal, or by max_hours; 2 its configuration is bad; 1 it has got no
        further for RESTARTS restarts.
    """
    launcher = Launcher(repeat=True)
    before, restarts = folder.newest_step(), 0
    while not launcher.stopping:
        command, began = [*launch_command(accelerate_file), str(ROOT / "scripts" / "pretrain.py"), *arguments], time.time()
        noted, own = launcher.launch(command, settle=lambda: folder.wait_until_free(SAVE_S))
        code = noted
        if noted is None:  # after a kill, or where the file for it could not be written
            code = own and told_by_the_folder(folder, began, TOLD_S)
        if code in (EXIT_OK, EXIT_CONFIG, EXIT_STOPPED):
            return code
        if launcher.stopping:
            break
        reached, reason = folder.newest_step(), folder.read_status().get("reason", "")
        # A run that was resumed from an older checkpoint has set the newer ones aside, and goes on from there.
        if reached > before:
            restarts = 0
        before = reached
        if restarts == RESTARTS:
            _say(f"{RESTARTS} restarts without a checkpoint behind step {reached}; giving up. {reason}")
            return EXIT_FAULT
        restarts += 1
        ended = "unknown" if noted is None else noted
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
        read_accelerate_file(accelerate_file)
        if not re.fullmatch(r"\d+(\.\d+)?", pause):
            raise ConfigError(f"SUPERVISE_PAUSE: {pause!r} (environment) is not a number of seconds such as 5")
    except ConfigError as error:
        report_problems(error)
        return EXIT_CONFIG
    with lasting_output():
        return supervise(accelerate_file, arguments, folder, float(pause))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
