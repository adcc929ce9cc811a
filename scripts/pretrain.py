"""Pretrain a GPT-2 from scratch.

accelerate launch --config_file configs/accelerate/8xa100-zero1.yaml scripts/pretrain.py configs/gpt2-124m.yaml
python scripts/pretrain.py configs/quickstart.yaml            one process, no launcher
... [--field value ...] [--dry_run] [--resume auto|PATH|hub:USER/NAME@REVISION|none]  see --help for the fields
"""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not scripts/, where evaluate.py would hide the package evaluate
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        from recipe.parsing import help_text

        print(__doc__.strip() + "\n\n" + help_text("pretrain.py"))
        sys.exit(0)
    from recipe.cli import main
    from recipe.signals import leave

    leave(main(sys.argv[1:]))
