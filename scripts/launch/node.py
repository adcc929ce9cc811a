"""This node's part of a run on several nodes, under Slurm or SkyPilot, whose environment says which node it is.

python scripts/launch/node.py configs/accelerate/multinode-zero1.yaml configs/gpt2-124m.yaml [--field value ...]

Start it once on every node; the run folder must be on storage that all of them see. It ends with 0 when the run is finished,
75 when it is to be started again (stopped by a signal after saving, or a fault after a new checkpoint), 2 for a bad
configuration, 1 for a fault.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)

from recipe.cli import EXIT_CONFIG, report_problems
from recipe.config import ConfigError
from recipe.nodes import run_node, this_node
from recipe.output import lasting_output
from recipe.parsing import load_config


def main(words: list[str]) -> int:
    import os

    if len(words) < 2 or {"-h", "--help"} & set(words):
        print(__doc__.strip())
        return 0 if {"-h", "--help"} & set(words) else EXIT_CONFIG
    accelerate_file, *arguments = words
    try:
        # Before anything is started, so that a mistake is told once.
        output_dir = load_config(arguments).output_dir
        node = this_node(os.environ, accelerate_file)
    except ConfigError as error:
        report_problems(error)
        return EXIT_CONFIG
    print(
        f"node {node.rank} of {node.nodes}, {node.processes} processes each, the first at {node.address}:{node.port}",
        flush=True,
    )
    with lasting_output():
        return run_node(node, accelerate_file, ROOT / "scripts" / "pretrain.py", arguments, output_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
