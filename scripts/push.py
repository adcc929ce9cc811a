"""Push a run to the Hub: its export to main; or checkpoints to branches step-N. Nothing but named files is uploaded.

python scripts/push.py runs/gpt2-124m --repo USER/gpt2-124m                     private; --public for a public repository
python scripts/push.py runs/gpt2-124m --repo USER/gpt2-124m --every 5000        the kept checkpoints of these steps as well
python scripts/push.py runs/gpt2-124m --repo USER/gpt2-124m --checkpoint 15000  this one alone
python scripts/push.py runs/gpt2-124m --pending                                 what pretrain.py --push_to_hub has left
options: --branch B  --with_state (what continues the run)  --into_existing (a repository that this run did not make)
         --patience SECONDS (for a Hub that does not answer, 60)

The token comes from HF_TOKEN or `hf auth login`. Large files go by plain HTTP; HF_HUB_DISABLE_XET=0 takes the xet protocol.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

from recipe.config import HUB_REPO, ConfigError
from recipe.signals import leave


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        from recipe.publish.redaction import redact

        super().error(redact(message))


def parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--repo", metavar="USER/NAME")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="the default")
    visibility.add_argument("--public", action="store_true")
    parser.add_argument("--branch", help="default: main; step-N for checkpoints")
    parser.add_argument("--every", type=int, metavar="N")
    parser.add_argument("--checkpoint", type=int, metavar="STEP")
    parser.add_argument("--with_state", action="store_true")
    parser.add_argument("--into_existing", action="store_true")
    parser.add_argument("--pending", action="store_true")
    parser.add_argument("--patience", type=float, default=60, metavar="SECONDS")
    arguments = parser.parse_args(words)
    problems = []
    if not (arguments.run / "config.yaml").is_file():
        problems.append(f"{arguments.run}: not a run folder (no config.yaml)")
    if not arguments.pending and (arguments.repo is None or not HUB_REPO.fullmatch(arguments.repo)):
        problems.append("repo: give --repo USER/NAME, the namespace included")
    if arguments.every is not None and (arguments.every < 1 or arguments.checkpoint is not None or arguments.branch):
        problems.append("every: a number of steps from 1 on, without --checkpoint and --branch")
    others = ("repo", "public", "private", "branch", "every", "checkpoint", "with_state", "into_existing")
    if arguments.pending and (given := [name for name in others if getattr(arguments, name) not in (None, False)]):
        problems.append(f"pending: goes where pretrain.py was told to push; leave out --{', --'.join(given)}")
    if problems:
        raise ConfigError(*problems)
    return arguments


def push(arguments: argparse.Namespace) -> int:
    from recipe.publish.hub import MAIN
    from recipe.publish.push import Destination, push_checkpoint, push_export
    from recipe.run_folder import RunFolder

    folder = RunFolder(arguments.run)
    if arguments.pending:
        from recipe.publish.outbox import deliver_all

        delivered = deliver_all(folder, arguments.patience, print)
        print("nothing is left to push" if delivered else "the rest stays in the outbox")
        return 0 if delivered else 1
    destination = Destination(arguments.repo, not arguments.public, arguments.into_existing, arguments.with_state)
    if arguments.checkpoint is None:
        push_export(folder, destination, print, arguments.branch or MAIN, arguments.patience)
    for found in chosen_checkpoints(folder.checkpoints, arguments):
        push_checkpoint(folder, found, destination, print, arguments.branch, arguments.patience)
    return 0


def chosen_checkpoints(folder: Path, arguments: argparse.Namespace) -> list:
    if arguments.checkpoint is None and arguments.every is None:
        return []
    from recipe import checkpoint
    from recipe.checkpoint_folders import committed_steps

    steps = committed_steps(folder)
    chosen = [step for step in steps if step == arguments.checkpoint or (arguments.every and step % arguments.every == 0)]
    if not chosen:
        raise ConfigError(f"checkpoint: none to push; the run has those of steps {', '.join(map(str, steps)) or 'none'}")
    try:
        return [checkpoint.verify(folder / f"step-{step:08d}") for step in chosen]
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"checkpoint: {error}") from error


def main(words: list[str]) -> int:
    from recipe.publish.redaction import redact

    try:
        return push(parse(words))
    except ConfigError as error:
        print(redact(str(error)), file=sys.stderr)
        return 2
    except RuntimeError as error:
        from recipe.publish.contents import ContentsError
        from recipe.publish.hub import HubError

        if not isinstance(error, ContentsError | HubError):
            raise
        print(f"not pushed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
