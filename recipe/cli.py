"""`pretrain.py` up to the point where it becomes expensive: configuration, plan, run folder, exit codes.

Nothing here imports torch before the configuration is known to be good, so that a typo costs no seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from recipe.config import Config, ConfigError
from recipe.plan import Plan, load_run
from recipe.run_folder import RunFolder

EXIT_OK, EXIT_FAULT, EXIT_CONFIG, EXIT_STOPPED = 0, 1, 2, 75


def main(arguments: list[str]) -> int:
    """Run `pretrain.py`.

    Returns:
        the exit code: 0 done, 2 bad configuration or input, 75 stopped by a signal after saving, 1 a fault.
    """
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config, plan = load_run(arguments, num_ranks)
        folder = RunFolder(Path(config.output_dir))
        folder.check(config)
        if config.dry_run:
            if rank == 0:
                from recipe.dry_run import dry_run

                dry_run(config, plan)
            return EXIT_OK
        return _train(config, plan, folder, rank)
    except ConfigError as error:
        if rank == 0:
            report_problems(error)
        else:
            # The launcher ends all ranks when the first one exits: rank 0 must have spoken by then.
            time.sleep(2)
        return EXIT_CONFIG


def report_problems(error: ConfigError) -> None:
    """Print the problems on stderr, one a line."""
    count = len(error.problems)
    print(f"{count} problem{'s' * (count > 1)} with the configuration or the input:", file=sys.stderr)
    print("\n".join(f"  {problem}" for problem in error.problems), file=sys.stderr, flush=True)


def _follow_the_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies: launchers start their workers in sessions of their own, so that a
    launcher that is killed, or that does not forward a signal, would leave them training on for hours."""
    if sys.platform == "linux" and "LOCAL_RANK" in os.environ:
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _train(config: Config, plan: Plan, folder: RunFolder, rank: int) -> int:
    from recipe.train import Run

    _follow_the_launcher()
    run = Run(config, plan, folder)
    try:
        stopped_by = run.execute()
    except ConfigError:
        raise
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(f"rank {rank} failed at step {run.step}: {reason}", file=sys.stderr, flush=True)
        if folder.config.is_file():
            folder.status("failed", EXIT_FAULT, run.step, plan.tokens_after(run.step), reason, rank)
        return EXIT_FAULT
    tokens = plan.tokens_after(run.step)
    if stopped_by is not None:
        if rank == 0:
            folder.status("stopped", EXIT_STOPPED, run.step, tokens, f"signal {stopped_by.name}")
            print(f"stopped at step {run.step}; the same command goes on from here", flush=True)
        return EXIT_STOPPED
    if rank == 0:
        folder.status("finished", EXIT_OK, run.step, tokens)
        print(f"finished: {folder.path}", flush=True)
    return EXIT_OK
