"""Run folders as the training leaves them, made without training, for what only reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from recipe.config import to_yaml
from recipe.parsing import load_config

PRICE = 14.0


def training_record(step: int, batch_tokens: int, **fields: object) -> dict:
    """A line of metrics.jsonl: a loss that falls as FineWeb's does, with some noise."""
    noise = math.sin(12.9898 * step) * 43758.5453 % 1 - 0.5
    return {
        "step": step, "tokens": step * batch_tokens, "train_loss": 2.9 + 9.5 / (1 + step / 40) ** 0.5 * 0.85 + 0.1 * noise,
        "lr": 6e-4 * min(1, step / 700), "grad_norm": 0.3 + 3 / step + 0.1 * noise, "tokens_per_second": 1.6e6 + 1e5 * noise,
        "step_seconds": 0.33, "data_wait_fraction": 0.001, "mfu": 0.45, "gpu_memory_gib": 61.25, "skipped": 0,
        "wall_seconds": round(60 + 0.35 * step, 3), **fields,
    }  # fmt: skip


def write_run(
    folder: Path, steps: int, *words: str, records: list[dict] | None = None, state: str = "finished", **status: object
) -> Path:
    """A run of gpt2-124m's configuration after `steps` steps, with the options `words`."""
    config = load_config(["configs/gpt2-124m.yaml", "--max_steps", str(steps), "--warmup_steps", "0", *words])
    (folder / "eval").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    environment = {
        "command": ["python", "scripts/pretrain.py", "configs/gpt2-124m.yaml"], "commit": "0123abc", "python": "3.12.3",
        "versions": {"torch": "2.13.0"}, "hardware": {"gpu": "NVIDIA A100-SXM4-80GB", "gpu_memory_gib": 79.3, "cores": 96},
        "ranks": 8, "engine": "Zero1Engine", "precision": "bf16", "text": config.data,
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    if records is None:
        records = [training_record(step, config.batch_tokens) for step in range(1, steps + 1)]
        for step in range(0, steps + 1, max(1, steps // 20)):
            loss = 11.0 if step == 0 else records[step - 1]["train_loss"] + 0.01
            one = {"step": step, "tokens": step * config.batch_tokens, "val_loss": loss}
            records.append(one)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sorted(records, key=lambda r: r["step"])))
    done = {"state": state, "exit_code": 0, "step": steps, "tokens": steps * config.batch_tokens, "reason": "", "rank": 0}
    (folder / "status.json").write_text(json.dumps(done | status))
    return folder
