"""Follow a run from another shell: progress, loss, speed, time and money left, last evaluation, and how the run ended.

python scripts/watch.py runs/gpt2-124m             redrawn in place until the run ends; Ctrl-C leaves it alone
python scripts/watch.py runs/gpt2-124m --once      as it is now

Exit code: 0 the run runs or has finished, 75 it was stopped, 1 it failed or was killed, 2 there is no such run.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipe.config import ConfigError
from recipe.monitor.watch import watch


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--once", action="store_true", help="print the view and end")
    arguments = parser.parse_args(words)
    try:
        return watch(arguments.run, arguments.once)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
