"""Evaluate a model or a run with lm-evaluation-harness.

python scripts/evaluate.py runs/gpt2-124m --tasks hellaswag             a run: its export; results go to RUN/eval
python scripts/evaluate.py openai-community/gpt2 --tasks hellaswag,hellaswag_completion --output gpt2.json
accelerate launch --config_file configs/accelerate/2cpu-ddp.yaml scripts/evaluate.py ...      on several devices

tasks: any of lm-evaluation-harness, and hellaswag_completion, the same items in llm.c's style
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.files import output_file
from recipe.signals import leave


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL_OR_RUN")
    parser.add_argument("--tasks", default="hellaswag")
    parser.add_argument(
        "--data_dir", help="a local copy of HellaSwag's items, .jsonl or .parquet, a file or a folder; mini for 64 of our own"
    )
    parser.add_argument("--limit", type=int, help="first items of each task")
    parser.add_argument("--batch_size", type=int, default=32, help="inputs a device takes at a time")
    parser.add_argument(
        "--output", type=output_file, help="where to write the results, with every item's log-likelihoods, as JSON"
    )
    arguments = parser.parse_args()

    from recipe.config import ConfigError
    from recipe.publish.finish import evaluate_model

    try:
        evaluate_model(
            arguments.model,
            arguments.tasks.split(","),
            data=arguments.data_dir,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            output=arguments.output,
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
