"""Show which documents made a batch of a run.

python scripts/inspect_data.py runs/gpt2-124m --step 1000                 sources of the first 8 rows, and their text
python scripts/inspect_data.py runs/gpt2-124m --step 1000 --rows 512 --json
python scripts/inspect_data.py runs/gpt2-124m --step 1000 --source my_text   of a run on prepared tokens, which carry no id or
                                                                             url; text on the Hub is found without --source
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.signals import leave


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, required=True, help="optimizer step, counted from 1")
    parser.add_argument("--rows", type=int, default=8, help="rows to show")
    parser.add_argument("--characters", type=int, default=400, help="of each row's text")
    parser.add_argument("--source", help="the text that prepared tokens were made from, for id and url")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    from recipe.config import ConfigError
    from recipe.data.corpus import DataError
    from recipe.data.provenance import BatchTracer, describe_source

    try:
        tracer = BatchTracer(arguments.run, arguments.source)
        rows, sources = tracer.trace(arguments.step)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    if tracer.missing:
        print(tracer.missing, file=sys.stderr)
    shown = [source for source in sources if source.row < arguments.rows]
    if arguments.json:
        print(json.dumps([asdict(source) for source in shown], indent=2))
        return 0
    print(f"step {arguments.step}: {len(rows)} rows of {rows.shape[1] - 1} targets")
    for row in range(min(arguments.rows, len(rows))):
        print("\n".join(describe_source(source) for source in shown if source.row == row))
        print("    " + tracer.tokenizer.decode(rows[row])[: arguments.characters].replace("\n", "\n    "))
    return 0


if __name__ == "__main__":
    leave(main())
