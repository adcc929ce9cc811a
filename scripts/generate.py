"""Let a model write: one prompt, or a session in the terminal.

python scripts/generate.py runs/gpt2-124m --prompt "The city of"
python scripts/generate.py openai-community/gpt2                 asks for prompts; an empty line or Ctrl-D ends
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

from recipe.signals import leave


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL_OR_RUN")
    parser.add_argument("--prompt", help="default: prompts are read from the terminal")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the likeliest k tokens; 0 from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that hold this probability")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1 avoids what has been said")
    parser.add_argument("--seed", type=int, help="for the same text again")
    arguments = parser.parse_args()

    from recipe.config import ConfigError
    from recipe.generation import Writer

    try:
        options = {
            name: getattr(arguments, name)
            for name in ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
        }
        writer = Writer(arguments.model, **options)
        if arguments.prompt is not None:
            writer.write(arguments.prompt)
            return 0
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    while True:
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not prompt:
            return 0
        try:
            writer.write(prompt)
        except KeyboardInterrupt:  # enough of this one
            print()
        except ConfigError as error:  # a prompt that fills all positions
            print(error, file=sys.stderr)


if __name__ == "__main__":
    leave(main())
