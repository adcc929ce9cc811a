"""`pretrain.py` up to the point where it becomes expensive: configuration, plan, run folder, exit codes.

Nothing here imports torch before the configuration is known to be good, so that a typo costs no seconds.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from recipe.config import Config, ConfigError, first_line
from recipe.files import write_text
from recipe.micro_batch import under_zero1
from recipe.output import lasting_output
from recipe.plan import GPT2_VOCAB_SIZE, Plan, load_run
from recipe.remedies import Situation, explain
from recipe.run_folder import RunFolder
from recipe.signals import StopSignals, follow_the_launcher

if TYPE_CHECKING:
    from recipe.train import Run

EXIT_OK, EXIT_FAULT, EXIT_CONFIG, EXIT_STOPPED = 0, 1, 2, 75
FAILURES = (EXIT_FAULT, EXIT_CONFIG)


def main(arguments: list[str]) -> int:
    """Run `pretrain.py`.

    Returns:
        the exit code: 0 done, 2 bad configuration or input, 75 stopped by a signal after saving, 1 a fault. Rank 0, and every
        rank with a fault or bad input, writes it to the file that PRETRAIN_EXIT_FILE names, too, for `accelerate launch` makes
        1 of all but 0.
    """
    with lasting_output():
        code = _run(arguments)
        if os.environ.get("RANK", "0") == "0" or code in FAILURES:
            note_exit(code)
    return code


def note_exit(code: int) -> None:
    """Tell scripts/supervise.sh, if it has asked, how the process ends."""
    if path := os.environ.get("PRETRAIN_EXIT_FILE"):
        with contextlib.suppress(OSError):  # who has asked may be gone
            write_text(Path(path), f"{code}\n")


def noted_failure() -> int | None:
    """The exit code of another rank of this node that has failed, if it has said so: then the launcher tells the others to
    stop."""
    with contextlib.suppress(OSError, ValueError):
        code = int(Path(os.environ.get("PRETRAIN_EXIT_FILE") or os.devnull).read_text(encoding="utf-8"))
        return code if code in FAILURES else None
    return None


def _run(arguments: list[str]) -> int:
    parent = os.getppid()
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        config, plan = load_run(arguments, num_ranks)
        folder = RunFolder(Path(config.output_dir))
        folder.check(config)
        if config.dry_run:
            if rank == 0:
                from recipe.dry_run import dry_run

                dry_run(config, plan, folder)
            return EXIT_OK
        return _train(config, plan, folder, rank, parent)
    except ConfigError as error:
        if rank == 0:
            report_problems(error)
        else:
            # The launcher ends all ranks when the first one exits: rank 0 must have spoken by then.
            time.sleep(2)
        return EXIT_CONFIG
    except Exception as error:
        report_fault(error, rank)
        return EXIT_FAULT


def report_problems(error: ConfigError) -> None:
    """Print the problems on stderr, one a line."""
    count = len(error.problems)
    print(f"{count} problem{'s' * (count > 1)} with the configuration or the input:", file=sys.stderr)
    print("\n".join(f"  {problem}" for problem in error.problems), file=sys.stderr, flush=True)


def report_fault(error: Exception, rank: int, step: int | None = None, situation: Situation | None = None) -> str:
    """Print what went wrong on stderr: where in the program, cause and remedy if they are known, and last what, on which rank.

    Returns:
        what and why in a line, for status.json.
    """
    traceback.print_exception(error)
    known = explain(error, situation)
    if known:
        print(f"cause:  {known.cause}\nremedy: {known.remedy}", file=sys.stderr)
    at_fault = rank if getattr(error, "rank", None) is None else error.rank
    reason = f"{type(error).__name__}: {first_line(error)}"
    at = "" if step is None else f" at step {step}"
    print(f"rank {at_fault} failed{at}: {reason}", file=sys.stderr, flush=True)
    return f"{reason} | {known}" if known else reason


def _train(config: Config, plan: Plan, folder: RunFolder, rank: int, parent: int) -> int:
    started, run = time.monotonic(), None
    # The imports and the tokenizer make 700,000 objects that stay; looking through them again and again for garbage takes a
    # third of the time until training, which then collects when it suits it.
    gc.disable()

    def end_without_saving(number: signal.Signals) -> None:
        # A rank that was gone before the signal came is its reason: who starts runs again must not take that for a stop.
        noted = noted_failure()
        failed = bool(signals.lost) or noted is not None
        code = noted or (EXIT_FAULT if failed else EXIT_STOPPED)
        if not failed and hasattr(run, "watchdog"):
            run.watchdog.leave()
        if folder.locked and run is not None:
            done = run.step, plan.tokens_after(run.step)
            with contextlib.suppress(OSError):  # of a full disk, for one: the process ends all the same
                if not failed:
                    folder.status("stopped", code, *done, f"signal {number.name}")
                elif signals.lost and not folder.has_ended():  # else the rank at fault has said why itself
                    at_fault = signals.lost[0]
                    folder.status("failed", code, *done, f"rank {at_fault} is gone, killed or failed", at_fault)
        if rank == 0:
            note_exit(code)
        print(f"rank {rank} stopped by {number.name}; nothing was left to save", flush=True)
        os._exit(code)

    signals = StopSignals(end_without_saving)
    follow_the_launcher(parent)
    from recipe.preflight import check_machine

    check_machine(config, rank)
    from recipe.train import Run

    run = Run(config, plan, folder, signals, started)
    try:
        stopped_by = run.execute()
    except ConfigError:
        raise
    except Exception as error:
        reason = report_fault(error, rank, run.step, _situation(run, rank))
        at_fault = rank if getattr(error, "rank", None) is None else error.rank
        # A rank that only lost its connection knows less than the one that has spoken already.
        if folder.config.is_file() and not (at_fault != rank and folder.has_ended()):
            try:
                folder.status("failed", EXIT_FAULT, run.step, plan.tokens_after(run.step), reason, at_fault)
            except OSError as unwritten:  # of a full disk, for one
                print(f"rank {rank} could not write status.json: {unwritten}", file=sys.stderr, flush=True)
        return EXIT_FAULT
    if stopped_by is not None:
        if rank == 0:
            print(f"stopped at step {run.step} by {stopped_by}; the same command goes on from here", flush=True)
        return EXIT_STOPPED
    if rank == 0:
        folder.status("finished", EXIT_OK, run.step, plan.tokens_after(run.step))
        print(f"finished: {folder.path}", flush=True)
    return EXIT_OK


def _situation(run: Run, rank: int) -> Situation:
    """As far as the run had come when it failed."""
    engine, encoder = getattr(run, "engine", None), getattr(run, "encoder", None)
    return Situation(
        config=run.config,
        ranks=run.plan.num_processes,
        rank=rank,
        vocab_size=encoder.vocab_size if encoder else GPT2_VOCAB_SIZE,
        precision=getattr(run, "precision", "fp32"),
        plain=not (engine and engine.compiled),
        zero1=under_zero1(),
    )
