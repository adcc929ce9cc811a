"""Where runs go on side by side: each GPU of this host is a place, or without one a share of its cores."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from recipe.config import ConfigError
from recipe.micro_batch import count_gpus


def find_places(wanted: int | None) -> list[dict[str, str]]:
    """The environment variables that keep a run to its place, for each place.

    Args:
        wanted: how many; None for as many as there are GPUs, and one without.
    Raises:
        ConfigError: if there are fewer GPUs.
    """
    cards = visible_cards()
    if cards and wanted and wanted > len(cards):
        raise ConfigError(
            f"side_by_side: {wanted} is more than this host's {len(cards)} GPUs, of which each takes one run; "
            f"give {len(cards)} at most, or leave it at auto"
        )
    if cards:
        share = max(1, (os.cpu_count() or 1) // len(cards[:wanted]))
        return [{"CUDA_VISIBLE_DEVICES": card, "OMP_NUM_THREADS": str(share)} for card in cards[:wanted]]
    # By this a run knows how many others of this host want cores, and takes no more threads than its share.
    count = wanted or 1
    return [{"LOCAL_WORLD_SIZE": str(count)} for _ in range(count)]


def visible_cards() -> list[str]:
    """The GPUs that runs may use, each as CUDA_VISIBLE_DEVICES would name it alone."""
    # In a process of its own: where the driver's library does not answer, torch asks CUDA, and a process that has done that
    # can fork no runs.
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as apart:
        count = apart.submit(count_gpus).result()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    # A list may name more than there are, or go on behind an entry that ends it: the first `count` are those that CUDA sees.
    names = given.split(",") if given is not None else map(str, range(count))
    return [name.strip() for name in names][:count]
