"""The model of a run, built beside the reading of its text."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

from recipe.config import Config, compiles
from recipe.distributed import Distributed
from recipe.model import PretrainingModel, build_model


class ModelBuilding:
    """`build_model` in a thread of its own. Nearly all of it is drawing normal numbers, which one core does and Python's lock
    does not hold up: 2 s for 124M, 20 s for 1558M. Until the model is there, nothing else may draw from torch's generator.

    Args:
        vocab_size: of the tokenizer.
        end_of_text: its id.
    """

    def __init__(self, config: Config, vocab_size: int, end_of_text: int):
        pool = ThreadPoolExecutor(1, thread_name_prefix="build-model")
        self._model = pool.submit(build_model, config, vocab_size, end_of_text)
        pool.shutdown(wait=False)

    def model(self) -> PretrainingModel:
        """Wait for it; its error is raised here."""
        return self._model.result()


def import_engine(config: Config, distributed: Distributed) -> None:
    """Import what making the engine and compiling the model would import: a second that the thread can use."""
    if distributed.deepspeed:
        importlib.import_module("recipe.zero1")
        importlib.import_module("deepspeed")
    if compiles(config, distributed.cuda):
        importlib.import_module("torch._inductor.compile_fx")
