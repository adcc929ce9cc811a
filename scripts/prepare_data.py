"""Tokenise the text of a run once, for any number of trainings on the same rows.

python scripts/prepare_data.py configs/gpt2-124m.yaml --output_dir fineweb-tokens [--workers N] [--field value ...]
python scripts/prepare_data.py --verify fineweb-tokens          compare size and SHA-256 of every file with the index
then: accelerate launch ... scripts/pretrain.py configs/gpt2-124m.yaml --data fineweb-tokens

The fields are those of pretrain.py; data, validation_data, text_column and tokenizer count. --workers: processes, default
all cores. Killed at any moment, the same command goes on; on a finished folder it verifies it and makes again what is
damaged.
"""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.signals import leave


def take_option(words: list[str], name: str) -> str | None:
    """Remove `--name VALUE` from the words; its value, empty if it lacks one, None without the option."""
    for position, word in enumerate(words):
        if word == f"--{name}":
            value = "".join(words[position + 1 : position + 2])
            del words[position : position + 2]
            return value
        if word.startswith(f"--{name}="):
            del words[position]
            return word.partition("=")[2]
    return None


def main(words: list[str]) -> int:
    """The exit code: 0 done, 2 bad configuration or input, 75 stopped by a signal, 1 a fault."""
    from recipe.cli import EXIT_CONFIG, EXIT_FAULT, EXIT_OK, EXIT_STOPPED, report_problems
    from recipe.config import ConfigError
    from recipe.data.corpus import DataError

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    folder = take_option(words, "verify")
    try:
        if folder is not None:
            verify(folder, words)
        else:
            prepare(words)
    except ConfigError as error:
        report_problems(error)
        return EXIT_CONFIG
    except DataError as error:
        print(f"{error}\nwhat is done is kept; the same command goes on from here", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_OK


def verify(folder: str, rest: list[str]) -> None:
    from recipe.config import ConfigError
    from recipe.data.token_index import find_damage

    if not folder or rest:
        raise ConfigError("verify: write prepare_data.py --verify FOLDER")
    problems = find_damage(Path(folder))
    if problems:
        raise ConfigError(*problems)
    print(f"{folder}: every file is what index.json says")


def prepare(words: list[str]) -> None:
    from recipe.config import ConfigError
    from recipe.data.sources import check_data_exists
    from recipe.parsing import parse_config

    workers = take_option(words, "workers")
    config, problems = parse_config(words)
    # How long a run is does not matter here.
    problems = [problem for problem in problems if not problem.startswith("max_steps: neither")]
    if not any(word.partition("=")[0] == "--output_dir" for word in words):
        problems.append("output_dir: not given; name the folder for the tokens with --output_dir")
    if workers is not None and not (workers.isdecimal() and int(workers)):
        problems.append(f"workers: {workers!r} (command line) is not a whole number from 1 on")
    problems += check_data_exists("data", config.data)
    if config.validation_data is not None:
        problems += check_data_exists("validation_data", config.validation_data)
    if problems:
        raise ConfigError(*problems)

    from recipe.data import preparation

    index = preparation.prepare(config, int(workers) if workers else len(os.sched_getaffinity(0)))
    print(f"{config.output_dir}: {index['tokens']:,} tokens in {index['documents']:,} documents")
    print(f"train:   scripts/pretrain.py CONFIG.yaml --data {config.output_dir}")
    print(f"publish: hf upload USER/NAME {config.output_dir} --repo-type dataset     then --data USER/NAME")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0)
    leave(main(sys.argv[1:]))
