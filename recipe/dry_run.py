"""`--dry_run`: the resolved configuration and what the run amounts to, without starting it."""

from __future__ import annotations

from pathlib import Path

from recipe.config import INSTALLED_DOCS, Config, to_yaml
from recipe.data.corpus import hub_id, is_local
from recipe.data.token_index import is_prepared, read_index
from recipe.plan import Plan


def dry_run(config: Config, plan: Plan) -> None:
    """Print the configuration, the derived numbers and the checks. What lives on the Hub is asked for; without a network
    it is `not checked: offline`."""
    print(to_yaml(config))
    local = config.tokenizer.startswith("train:") or is_local(config.tokenizer)
    vocab_size = None
    if is_prepared(config.data):
        vocab_size = read_index(Path(config.data).expanduser(), "data")["vocab_size"]
    elif config.tokenizer.startswith("train:"):
        vocab_size = int(config.tokenizer.removeprefix("train:"))
    elif local:
        from recipe.tokenizer import load_tokenizer

        vocab_size = len(load_tokenizer(config.tokenizer))
    print("\n".join(plan.lines(config, vocab_size)))
    for name, value in (("data", config.data), ("validation_data", config.validation_data)):
        if value is not None:
            here = value == INSTALLED_DOCS or is_local(value)
            print(f"{name:17} {'found' if here else _ask_hub('dataset', *hub_id(value))}: {value}")
    print(f"{'tokenizer':17} {'found' if local else _ask_hub('model', config.tokenizer, None)}: {config.tokenizer}")


def _ask_hub(repo_type: str, repo: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=10)
    except HfHubHTTPError as error:
        return f"NOT FOUND ({str(error).splitlines()[0]})"
    except Exception:  # the transport raises a dozen types; all mean that nothing answered
        return "not checked: offline"
    return "found"
