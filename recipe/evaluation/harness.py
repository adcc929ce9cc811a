"""lm-evaluation-harness in process, with the numbers of the `lm_eval` command."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from recipe.config import ConfigError
from recipe.distributed import Distributed
from recipe.evaluation.items import MINI, describe_data, local_files
from recipe.evaluation.records import data_kind


def run_harness(
    name: str,
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    distributed: Distributed,
    data: str | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any] | None:
    """Evaluate a model; the ranks share the items.

    Args:
        name: folder or Hub id of the model, for the command.
        model: on this rank's device, in evaluation mode.
        tasks: task names of lm-evaluation-harness.
        data: local copy of HellaSwag's items instead of the Hub's, .jsonl or .parquet, a file or a folder; `mini` for the
            package's own.
        task_folder: where the task description that `data` needs is written; the command needs it too.
        limit: first items of each task.
        batch_size: inputs a rank takes at a time, those of like length together.
    Returns:
        on rank 0, None on the others. Per task: n, acc, acc_norm, standard errors and whatever the task measures, version,
        hash and the data's revision; per task and item the log-likelihoods; the number of truncated inputs; and the `lm_eval`
        command that gives the same numbers.
    Raises:
        ConfigError: for an unknown task or data that cannot be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # warns of what is meant: a task replaced, a model passed in
    items = None if data is None else Path(MINI if data == "mini" else data)
    if items is not None:
        if tasks != ["hellaswag"]:
            raise ConfigError(f"evaluate_data: local data stands for hellaswag, not for {', '.join(tasks)}")
        distributed.on_main(_write_task, task_folder, items)
    manager = TaskManager(include_path=str(task_folder) if items is not None else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"evaluate_tasks: lm-evaluation-harness has no task {', '.join(unknown)}")
    with _untouched_rng():
        lm = _counting_model(model, tokenizer, batch_size, distributed)
        results = simple_evaluate(
            model=lm, tasks=tasks, limit=limit, task_manager=manager, log_samples=True, bootstrap_iters=1000
        )
    truncated = int(distributed.sum(np.array([lm.truncated]))[0])
    if results is None:
        return None
    for samples in results["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])  # they come rank by rank
    command = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={name}", "--tasks", ",".join(tasks)]
    command += ["--device", model.device.type, "--batch_size", str(batch_size)]
    command += ["--limit", str(limit)] if limit else []
    command += ["--include_path", str(task_folder)] if items is not None else []
    return {
        "tasks": {
            task: {
                "n": results["n-samples"][task]["effective"],
                **{k.removesuffix(",none"): v for k, v in numbers.items() if isinstance(v, int | float)},
                "version": results["versions"].get(task),
                "hash": _task_hash(results["samples"].get(task, ())),
                "data": {
                    **describe_data(data, results["configs"].get(task, {}).get("dataset_path")),
                    "kind": data_kind(data, results["n-samples"][task]["effective"], limit),
                },
            }
            for task, numbers in results["results"].items()
            if task in results["n-samples"]
        },
        "items": {task: _per_item(samples) for task, samples in results["samples"].items()},
        "truncated": truncated,
        "command": shlex.join(command),
    }


def _task_hash(samples: Sequence[dict[str, Any]]) -> str:
    """As lm-evaluation-harness' tracker computes it: of the documents, prompts and targets."""
    parts = (sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _per_item(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a task that compares log-likelihoods, those of each item; of any other, the metrics alone."""
    return [
        {
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "target": sample["target"],
            **{name: sample[name] for name in sample["metrics"] if isinstance(sample.get(name), int | float)},
            **_log_likelihoods(sample["filtered_resps"]),
        }
        for sample in samples
    ]


def _log_likelihoods(responses: Sequence[Any]) -> dict[str, list[float]]:
    if not all(isinstance(response, tuple | list) and len(response) == 2 for response in responses):
        return {}
    return {"log_likelihoods": [float(log_likelihood) for log_likelihood, _ in responses]}


def _counting_model(model: PreTrainedModel, tokenizer: Any, batch_size: int, distributed: Distributed):
    from lm_eval.models.huggingface import HFLM

    class SharedHFLM(HFLM):
        """HFLM over our ranks; and it cuts long inputs with a log line, where here they are counted."""

        truncated = 0

        def _loglikelihood_tokens(self, requests, *arguments, **keywords):
            self.truncated += sum(
                len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests
            )
            return super()._loglikelihood_tokens(requests, *arguments, **keywords)

        def all_gather(self, tensor):
            return torch.cat([part.reshape(-1) for part in distributed.gather(tensor.cpu())])

        def gather_object(self, obj, dst=0):
            return distributed.gather(obj)

        def barrier(self):
            distributed.barrier()

    lm = SharedHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    lm._rank, lm._world_size = distributed.rank, distributed.num_ranks
    return lm


def _write_task(folder: Path, data: Path) -> None:
    """A task `hellaswag` that differs from the harness's own in where its items come from."""
    import lm_eval.tasks

    files = local_files(data)
    kind = "json" if files[0].suffix == ".jsonl" else "parquet"
    own = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hellaswag.yaml").write_text(
        f"include: {own}\n"
        "task: hellaswag\n"
        f"dataset_path: {kind}\n"
        "dataset_kwargs:\n"
        "  data_files:\n"
        f"    validation: {json.dumps([str(file.resolve()) for file in files])}\n"
        "training_split: null\n",
        encoding="utf-8",
    )


@contextmanager
def _untouched_rng() -> Iterator[None]:
    """The harness seeds Python, NumPy and torch; give them back as they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
