"""Compare two models on the same items: difference, its standard error, McNemar's test.

python scripts/compare.py runs/gpt2-124m openai-community/gpt2 --tasks hellaswag
python scripts/compare.py a.json b.json          results that scripts/evaluate.py --output has written, or RUN/eval/*.json
"""

import argparse
import json
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
    parser.add_argument("models", nargs=2, metavar="MODEL_OR_RUN_OR_RESULTS")
    parser.add_argument("--tasks", default="hellaswag")
    parser.add_argument("--data_dir", help="a local copy of HellaSwag's items, as for evaluate.py")
    parser.add_argument("--limit", type=int, help="first items of each task")
    parser.add_argument("--batch_size", type=int, default=32, help="inputs a device takes at a time")
    parser.add_argument("--output", type=output_file, help="where to write the comparison as JSON")
    arguments = parser.parse_args()

    from recipe.config import ConfigError
    from recipe.evaluation.comparison import compare_items, describe
    from recipe.evaluation.results import results_of

    tasks = arguments.tasks.split(",")
    try:
        a, b = (
            results_of(model, tasks, arguments.data_dir, arguments.limit, arguments.batch_size) for model in arguments.models
        )
        found = {task: compare_items(a["items"][task], b["items"][task]) for task in tasks}
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"A: {arguments.models[0]}\nB: {arguments.models[1]}")
    for task, comparisons in found.items():
        for comparison in comparisons:
            print("\n".join(describe(task, comparison)))
    if arguments.output:
        written = {task: [comparison._asdict() for comparison in comparisons] for task, comparisons in found.items()}
        arguments.output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    leave(main())
