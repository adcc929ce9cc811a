"""Ranks are forked from a server that has imported everything: a start costs a second instead of six.

multiprocessing has one such server a process, and whoever names the modules last decides for all tests: only this does.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

# The server looks for the modules in PYTHONPATH alone and passes over in silence what it does not find.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
os.environ["DS_ACCELERATOR"] = "cpu"
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["fault_rank", "stream_rank", "accelerate"])
