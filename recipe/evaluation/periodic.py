"""What a run evaluates while it trains: which of it is due at a step, and what is left of it after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from recipe.config import Config
from recipe.engine import Engine
from recipe.evaluation.in_loop import InLoopHellaSwag, sample, validate
from recipe.files import write_json
from recipe.inputs import Inputs
from recipe.monitor.metrics import format_duration
from recipe.run_folder import RunFolder
from recipe.watchdog import Watchdog


class Finding(NamedTuple):
    """What an evaluation has found."""

    fields: dict[str, float | str]
    """Of metrics.jsonl; samples have none."""
    lines: list[str]
    """For the user, on rank 0."""


class PeriodicEvaluation:
    """Validation loss, HellaSwag and samples, each at its steps.

    What a stop has cut short is taken up again by the next start, at the same step, without what was done already.

    Args:
        reason_to_stop: asked now and then, on all ranks alike.
    Attributes:
        unfinished: whether something is left of what was due at the last step.
        best_val_loss: the lowest so far, nats a token.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        inputs: Inputs,
        engine: Engine,
        watchdog: Watchdog,
        reason_to_stop: Callable[[], str | None],
    ):
        self._config, self._folder, self._inputs, self._engine = config, folder, inputs, engine
        self._watchdog, self._reason_to_stop = watchdog, reason_to_stop
        items = inputs.hellaswag_items
        self._hellaswag = InLoopHellaSwag(items, inputs.tokenizer, config) if items else None
        self._validated: tuple[int, float] | None = None
        self.restore({})

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {"best_val_loss": self.best_val_loss, "evaluation_due": self.unfinished, "evaluated": list(self._done)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`; from the beginning without one."""
        self.best_val_loss = state.get("best_val_loss", float("inf"))
        self.unfinished, self._done = state.get("evaluation_due", False), list(state.get("evaluated", ()))

    def val_loss_at(self, step: int) -> float | None:
        """The validation loss of this very step, if that is the last one that was validated."""
        return self._validated[1] if self._validated and self._validated[0] == step else None

    def evaluate(self, step: int, last: bool) -> Iterator[Finding]:
        """Do what is due, one after the other. Collective.

        Args:
            last: whether the training ends here.
        Raises:
            Interrupted: if there is a reason to stop; `state` then says what is done.
        """
        config = self._config
        evaluations = (
            ("validation", self._validate, step == 0 or last or due(step, config.eval_every)),
            ("hellaswag", self._evaluate_hellaswag, self._hellaswag and step and (last or due(step, config.hellaswag_every))),
            ("samples", self._sample, (last and config.keep_model) or (step and due(step, config.sample_every))),
        )
        self.unfinished = True
        for name, evaluate, is_due in evaluations:
            if is_due and name not in self._done:
                yield evaluate(step)
                self._done.append(name)
        self.unfinished, self._done = False, []

    def _validate(self, step: int) -> Finding:
        began = time.perf_counter()
        engine, size = self._engine, self._config.micro_batch_size
        found = validate(engine, self._inputs, size, engine.distributed, self._watchdog, step, self._reason_to_stop)
        self.best_val_loss = min(self.best_val_loss, found["val_loss"])
        self._validated = step, found["val_loss"]
        line = (
            f"step {step} | validation loss {found['val_loss']:.4f} | {found['val_bits_per_byte']:.4f} bits a byte | "
            f"{format_duration(time.perf_counter() - began)}"
        )
        return Finding(found, [line])

    def _evaluate_hellaswag(self, step: int) -> Finding:
        began = time.perf_counter()
        self._watchdog.enter("evaluate", step)
        found = self._hellaswag.evaluate(self._engine.model, self._engine.distributed, self._reason_to_stop)
        cut = f" | {found['hellaswag_truncated']} inputs cut" if found["hellaswag_truncated"] else ""
        line = (
            f"step {step} | HellaSwag acc {found['hellaswag_acc']:.4f}, acc_norm {found['hellaswag_acc_norm']:.4f} (lm-eval), "
            f"acc_norm {found['hellaswag_completion_acc_norm']:.4f} (completion), {found['hellaswag_n']} items{cut} | "
            f"{format_duration(time.perf_counter() - began)}"
        )
        return Finding(found, [line])

    def _sample(self, step: int) -> Finding:
        self._watchdog.enter("sample", step)
        samples = []
        if self._engine.distributed.is_main:
            vocab_size = self._inputs.vocab_encoder.vocab_size
            samples = sample(self._engine.model, self._inputs.tokenizer, vocab_size, self._config.seed)
            write_json(self._folder.evaluation / f"samples-step-{step:08d}.json", {"step": step, "samples": samples})
        self._engine.distributed.barrier()
        return Finding({}, [f"  sample: {one['prompt']}{one['continuation']!r}" for one in samples])


def due(step: int, every: int) -> bool:
    """Whether it is time for what is done every so many steps; 0 is never."""
    return bool(every) and step % every == 0
