"""Write report.html, one page about one or more runs that needs nothing else, and its figures as PNG files in plots/.

python scripts/report.py runs/gpt2-124m                          at any time of the run -> runs/gpt2-124m/report.html
python scripts/report.py runs/a runs/b --output comparison.html  the differences between runs, curves over each other
python scripts/report.py runs/gpt2-124m --price_per_hour 14      with the money, if the run does not know its price
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipe.config import ConfigError
from recipe.files import output_file
from recipe.monitor.report import write_report


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders; the others are compared with the first")
    parser.add_argument("--output", type=output_file, help="the file (default: report.html in the first run's folder)")
    parser.add_argument("--price_per_hour", type=float, help="dollars for the whole machine (default: the run's field)")
    parser.add_argument("--llmc", action="store_true", help="llm.c's losses also for a text not known to be FineWeb")
    arguments = parser.parse_args(words)
    try:
        print(write_report(arguments.runs, arguments.output, arguments.price_per_hour, arguments.llmc))
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
