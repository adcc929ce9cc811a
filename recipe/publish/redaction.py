"""Access tokens stay out of what is written and uploaded."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path

from recipe.config import HUB_TOKEN

_ADDRESS = re.compile(r"(https?://)([^\s/@]+@)?([^\s?'\"]+)(\?[^\s'\"]*)?")
_BYTES = re.compile(HUB_TOKEN.pattern.encode())
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")


def redact(text: str) -> str:
    """`text` without access tokens, and its addresses without user names and queries, which carry signatures."""
    for token in tokens():
        text = text.replace(token, "hf_***")
    return _ADDRESS.sub(r"\1\3", HUB_TOKEN.sub("hf_***", text))


def holds_token(path: Path) -> bool:
    """Whether a file holds something like an access token, or one that is in use here."""
    if path.stat().st_size == 0:
        return False
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _BYTES.search(content) is not None or any(content.find(token.encode()) >= 0 for token in tokens())


def tokens() -> list[str]:
    """The tokens that the Hub's client would find here, whatever they look like."""
    from huggingface_hub import get_token

    found = [os.environ.get(name, "") for name in _VARIABLES] + [get_token() or ""]
    return [token for token in dict.fromkeys(found) if len(token) >= 8]
