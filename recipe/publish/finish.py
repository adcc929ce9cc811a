"""What follows the last step, on rank 0: export, evaluation, model card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from recipe import checkpoint
from recipe.config import Config, first_line
from recipe.distributed import Distributed
from recipe.evaluation.results import print_results, record_results
from recipe.evaluation.suite import evaluate
from recipe.files import write_json
from recipe.publish.card import exported_step, write_card
from recipe.publish.export import export_checkpoint
from recipe.run_folder import RunFolder, model_of


def finish_run(folder: RunFolder, config: Config, say: Callable[[str], None]) -> None:
    """Export the last checkpoint, evaluate it and write its card.

    What fails once the export is whole (no network for an evaluation's data, say) is told, and fails nothing else: the card of
    the export then says what was known before.

    Raises:
        ExportError: if the export does not compute what was trained.
        CheckpointError: if there is no checkpoint.
    """
    newest, skipped = checkpoint.find_newest(folder.checkpoints)
    if newest is None:
        raise checkpoint.CheckpointError("; ".join(skipped) or f"{folder.checkpoints} holds no checkpoint")
    export_checkpoint(folder, newest, folder.export, say)
    if config.evaluate_tasks == "none":
        return
    try:
        results = evaluate(
            str(folder.export),
            config.evaluate_tasks.split(","),
            Distributed.alone(),  # the other ranks have left
            data=config.evaluate_data,
            task_folder=folder.evaluation / "tasks",
            limit=config.evaluate_limit,
        )
    except Exception as error:  # the model is trained and exported; an evaluation can be made up for
        say(f"evaluation of {config.evaluate_tasks} failed: {first_line(error)}")
        say(f"later: python scripts/evaluate.py {folder.path} --tasks {config.evaluate_tasks}")
        return
    try:
        record_results(folder, results, newest.step, say)
        write_card(folder)
    except Exception as error:  # as above
        say(f"the results could not be written down: {type(error).__name__}: {first_line(error)}")


def evaluate_model(
    model: str,
    tasks: list[str],
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    output: Path | None = None,
) -> None:
    """`scripts/evaluate.py`: evaluate a run (its export; the results join the run and its card) or any model, on all ranks.

    Raises:
        ConfigError: if `model` is a run without an export, or for a bad task or data.
    """
    distributed = Distributed()
    folder = RunFolder(Path(model))
    is_run = folder.config.is_file()
    task_folder = folder.evaluation / "tasks" if is_run else (output or Path("hellaswag.json")).with_suffix(".tasks")
    results = evaluate(model_of(model), tasks, distributed, data, task_folder, limit, batch_size)
    if results is not None:
        if is_run:
            record_results(folder, results, exported_step(folder, folder.export), print)
            write_card(folder)
        else:
            print_results(results, print)
        if output is not None:
            write_json(output, results)
    distributed.barrier()
    distributed.close()
