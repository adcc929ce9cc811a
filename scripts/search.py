"""Search for the recipe that needs the fewest tokens: run the trials of some stages, one on each GPU, and report.

python scripts/search.py configs/search/1-baselines.yaml --results results.jsonl --data corpus --max_epochs 100
python scripts/search.py configs/search/*.yaml --results results.jsonl --report docs/recipe.md

--results FILE       a line a finished run; what is in it is not run again
--scratch DIR        run folders, tokens and compiled code (default: runs/search); emptied of what no run needs any more
--time_limit S       start no run that earlier ones say would end later than S seconds from now
--side_by_side N     runs at once, each on a GPU of its own (default: auto, all that CUDA_VISIBLE_DEVICES shows); on a CPU they
                     share the cores, and auto is 1
--retry_failed       run again what has failed
--list               print what is left to run, and stop
--report FILE        write the tables into FILE, between its markers, and the figures into a folder named like it beside it
--field value        data, validation_data, tokenizer and the like, for all trials; see scripts/pretrain.py --help
--price_8xa100 14    dollars an hour, for the prediction in the report; --price_8xh100 24

Exit codes: 0 all is done; 2 bad configuration; 75 some runs are left, for want of time or after a signal.
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.output import lasting_output
from recipe.signals import leave

OPTIONS = {
    "results": "", "scratch": "runs/search", "time_limit": "", "side_by_side": "auto", "report": "", "price_8xa100": "14",
    "price_8xh100": "24",
}  # fmt: skip
SWITCHES = ("retry_failed", "list")


def read_words(words: list[str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Stage files, options of this script, and fields of all trials."""
    from recipe.config import ConfigError

    files, options, fields, problems, rest = [], dict(OPTIONS), {}, [], list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            files.append(name + equals + value)
        elif name[2:] in SWITCHES and not equals:
            options[name[2:]] = "true"
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"{name[2:]}: no value given on the command line; write {name} VALUE")
        else:
            (options if name[2:] in OPTIONS else fields)[name[2:]] = value if equals else rest.pop(0)
    for name in ("time_limit", "price_8xa100", "price_8xh100"):
        try:
            if options[name] and not float(options[name]) > 0:
                raise ValueError
        except ValueError:
            problems.append(f"{name}: {options[name]!r} (command line) is not a number above 0")
    if options["side_by_side"] != "auto" and not (options["side_by_side"].isdecimal() and int(options["side_by_side"])):
        problems.append(f"side_by_side: {options['side_by_side']!r} (command line) is neither auto nor a whole number above 0")
    if not files:
        problems.append("stages: no file is given; they are in configs/search/")
    if not options["results"]:
        problems.append("results: not given; name the file of results with --results")
    elif Path(options["results"]).is_dir():
        problems.append(f"results: {options['results']} is a folder; name the file in it")
    if problems:
        raise ConfigError(*problems)
    return files, options, fields


def main(words: list[str]) -> int:
    """The exit code."""
    from recipe.cli import EXIT_CONFIG, EXIT_OK, EXIT_STOPPED, report_problems
    from recipe.config import ConfigError
    from recipe.search.running import Interrupted, Search
    from recipe.search.trials import load_stages, show_tokens

    try:
        files, options, fields = read_words(words)
        stages = load_stages(files)
        results = Path(options["results"])
        if options["report"]:
            from recipe.search.report import write_report

            prices = {"8xA100-80GB": float(options["price_8xa100"]), "8xH100-80GB": float(options["price_8xh100"])}
            for path in write_report(stages, results, Path(options["report"]), prices):
                print(path)
            return EXIT_OK
        limit = float(options["time_limit"]) if options["time_limit"] else None
        at_once = None if options["side_by_side"] == "auto" else int(options["side_by_side"])
        search = Search(stages, results, Path(options["scratch"]), fields, limit, "retry_failed" in options, at_once)
        if "list" in options:
            for job in search.jobs_left():
                print(f"{job.label}: {show_tokens(job.tokens)} tokens")
            return EXIT_OK
        left = search.run()
    except ConfigError as error:
        report_problems(error)
        return EXIT_CONFIG
    except Interrupted as signal:
        print(f"stopped by {signal}; the same command goes on from here", flush=True)
        return EXIT_STOPPED
    print(f"{left} runs are left" if left else "all trials are done", flush=True)
    return EXIT_STOPPED if left else EXIT_OK


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0)
    with lasting_output():
        code = main(sys.argv[1:])
    leave(code)
