"""Measure the recipe on this machine, on real text.

    python scripts/benchmark.py loader configs/gpt2-124m.yaml [--field value ...] [--seconds 20] [--json]

loader: tokens/s from the text (raw or prepared) to finished rows, as one rank, and the time to the first batch.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")


def take_option(words: list[str], name: str, default: str) -> str:
    """Remove `--name VALUE` from the words and give the value."""
    if name not in words:
        return default
    index = words.index(name)
    value = words[index + 1] if index + 1 < len(words) else ""
    del words[index : index + 2]
    return value


def main(words: list[str]) -> int:
    if not words or words[0] != "loader" or {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0 if {"-h", "--help"} & set(words) else 2
    words = words[1:]
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    seconds = float(take_option(words, "--seconds", "20"))

    from recipe.benchmark import benchmark_loader
    from recipe.config import ConfigError
    from recipe.data.corpus import DataError
    from recipe.plan import load_run

    try:
        config, plan = load_run(words, 1)
        result = benchmark_loader(config, plan, seconds)
    except (ConfigError, DataError) as error:
        print(error, file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value:,.2f}" if isinstance(value, float) else f"{name:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
