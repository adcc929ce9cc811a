"""The run: config -> documents -> rows -> batches -> loss -> checkpoint -> export."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipe import checkpoint
from recipe.config import Config, ConfigError, parse_ranges
from recipe.data.corpus import Corpus, open_corpora
from recipe.data.prepared import PreparedCorpus, encoder_for, load_prepared_tokenizer
from recipe.data.stream import RowStream
from recipe.data.validation import check_length, hold_out, read_validation_rows
from recipe.distributed import Distributed, resolve_precision
from recipe.engine import Engine, StepResult, make_engine
from recipe.files import write_json
from recipe.model import build_model, continue_text
from recipe.monitor.metrics import MetricsLog, format_duration, progress_line
from recipe.optim.groups import parameter_groups, state_kinds
from recipe.optim.schedule import hyperparameters
from recipe.plan import Plan, flops_per_token, peak_flops
from recipe.publish.finish import finish_run
from recipe.run_folder import RunFolder, describe_environment
from recipe.tokenizer import Encoder, load_tokenizer, obtain_tokenizer

SAMPLE_PROMPTS = ("The", "In this example", "Once upon a time")
SAMPLE_TOKENS = 64
MAX_SKIPPED_IN_A_ROW = 3


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do."""


@dataclass
class StepTimer:
    """Start and end of a step, on the device's clock where there is one, so that timing does not wait for it."""

    cuda: bool
    marks: list = field(default_factory=list)

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Between the two marks; on a GPU the later one must have passed."""
        start, end = self.marks
        return start.elapsed_time(end) / 1000 if self.cuda else end - start


class Run:
    """One start of a run, on this rank."""

    def __init__(self, config: Config, plan: Plan, folder: RunFolder):
        self.config, self.plan, self.folder = config, plan, folder
        self.step = 0
        """Optimizer steps done."""
        self._stop_signal: int | None = None
        self._parent = os.getppid()
        self._pending: list[tuple[dict[str, Any], StepResult, StepTimer]] = []
        self._skipped_in_a_row = 0

    def execute(self) -> signal.Signals | None:
        """Set up, train, and on rank 0 export and evaluate. The signal that stopped the training early, if one did."""
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._on_signal)
        self.distributed = Distributed()
        self.say(f"{self.plan.num_processes} ranks on {self._device_name()}")
        self._set_up()
        stopped_by = self._train()
        self.stream.close()
        self.metrics.close()
        main = self.distributed.is_main
        self.distributed.close()
        if main and stopped_by is None:
            finish_run(self.folder, self.config, self.tokenizer, self.validation_rows, print)
        return stopped_by

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.distributed.is_main:
            print(line, flush=True)

    def _on_signal(self, number: int, frame: object) -> None:
        # A launcher that dies sends its SIGTERM once for each of its threads. A second signal from anybody else means now.
        if self._stop_signal is None:
            self._stop_signal, self._signalled = number, time.monotonic()
        elif time.monotonic() - self._signalled > 3 and os.getppid() == self._parent:
            os._exit(128 + number)

    def _device_name(self) -> str:
        return torch.cuda.get_device_name() if self.distributed.cuda else f"CPU ({torch.get_num_threads()} threads a rank)"

    # --- set-up ---------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        config, distributed = self.config, self.distributed
        if self.folder.config.is_file():
            # Before looking for a checkpoint: a run that was told to stop may still be saving one. A new folder is made, and
            # locked, only when the input has proved good.
            distributed.on_main(self.folder.lock)
        self.precision = resolve_precision(config.precision, distributed.cuda)
        training, validation = distributed.on_main(
            open_corpora, config.data, config.validation_data, config.text_column, self.folder.cache
        )
        for corpus in (training, validation):
            if isinstance(corpus, PreparedCorpus):
                distributed.on_each_node(corpus.fetch)
        self.tokenizer = distributed.on_main(self._obtain_tokenizer, training, validation is None)
        self.encoder = Encoder(self.tokenizer)
        encoder = encoder_for(training, self.encoder, "data")
        self.validation_rows, training = self._split_validation(training, validation)
        self.say(
            distributed.on_main(
                check_length, training, encoder, config.sequence_length, self.plan.total_tokens, config.max_epochs
            )
            + f"; {self.validation_rows.shape[0] * config.sequence_length:,} validation tokens"
        )
        start = self._find_checkpoint()
        state = start.state() if start else None
        try:
            self.stream = RowStream(
                training,
                encoder,
                config.sequence_length,
                config.seed,
                config.max_epochs,
                distributed,
                config.data_workers,
                state["data"] if state else None,
                parse_ranges(config.skip_rows),
                config.accept_other_data,
            )
        except ValueError as error:
            raise ConfigError(f"data: {error}; restore it, name another output_dir, or set accept_other_data") from error
        for accepted in self.stream.accepted:
            self.say(f"accepted: {accepted}")
        if state and state["validation_rows"] != self._validation_hash:
            raise ConfigError(
                "validation_data: the text differs from what the run began with; restore it, or name another output_dir"
            )
        # A continued run finds what its first start has compiled.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((self.folder.cache / "compiled").absolute()))
        os.environ.setdefault("TRITON_CACHE_DIR", str((self.folder.cache / "compiled" / "triton").absolute()))
        model = build_model(config, self.encoder.vocab_size, self.encoder.end_of_text)
        full_state = start.full_state() if start else {}
        shapes = {n: t.shape for n, t in full_state.items() if n.startswith("model.")}
        if start and shapes != {f"model.{n.removeprefix('gpt2.')}": p.shape for n, p in model.named_parameters()}:
            raise ConfigError(f"resume: {start.path} holds another model; give its n_layer, n_embd and n_positions")
        kinds = state_kinds(parameter_groups(model, config))
        expected = {f"{kind}.{name.removeprefix('gpt2.')}" for name in kinds for kind in kinds[name]}
        if start and not expected <= full_state.keys():
            theirs = "muon" if any(n.startswith("momentum_buffer.") for n in full_state) else "adamw"
            raise ConfigError(
                f"optimizer: {start.path} holds the state of {theirs}, not of {config.optimizer}; set optimizer {theirs}"
            )
        self.engine: Engine = make_engine(model, config, self.plan, distributed, self.precision)
        self.best_val_loss = float("inf")
        if start:
            self.engine.load_full_state(full_state)
            self.step = start.step
            self.best_val_loss = state["best_val_loss"]
            self.say(f"continuing from {start.path} at step {start.step}")
        distributed.on_main(self._claim_folder, training.name)
        self.metrics = MetricsLog(
            self.folder.metrics if distributed.is_main else Path(os.devnull),
            (start.step if start else -1) if distributed.is_main else None,
        )
        self._record_position(self.step)
        for line in self.plan.lines(config, self.encoder.vocab_size):
            self.say(line)
        self.say(
            f"engine            {type(self.engine).__name__}, {self.precision}, tokenised by "
            f"{encoder.engine}, {self.stream.num_shards} virtual shards"
        )
        self.say(f"kernels           {self.engine.model.kernels}")

    def _claim_folder(self, text: str) -> None:
        environment = describe_environment(self.plan.num_processes, type(self.engine).__name__, self.precision)
        self.folder.claim(self.config, environment | {"text": text})
        self.tokenizer.save_pretrained(self.folder.cache / "tokenizer")
        self.folder.status("running", None, self.step, self.plan.tokens_after(self.step))

    def _obtain_tokenizer(self, training: Corpus, hold_out_part: bool):
        if isinstance(training, PreparedCorpus):
            return load_prepared_tokenizer(training, self.config.tokenizer)
        saved = self.folder.cache / "tokenizer"
        if saved.is_dir():
            return load_tokenizer(str(saved))
        return obtain_tokenizer(self.config.tokenizer, training, hold_out_part)

    def _split_validation(self, training: Corpus, validation: Corpus | None) -> tuple[np.ndarray, Corpus]:
        config = self.config
        if validation is None:
            encoder = encoder_for(training, self.encoder, "data")
            return self.distributed.on_main(hold_out, training, encoder, config.sequence_length, config.validation_tokens)
        encoder = encoder_for(validation, self.encoder, "validation_data")
        rows = self.distributed.on_main(
            read_validation_rows, validation, encoder, config.sequence_length, config.validation_tokens
        )
        return rows, training

    @cached_property
    def _validation_hash(self) -> str:
        return hashlib.sha256(self.validation_rows.tobytes()).hexdigest()

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        if self.config.resume == "none":
            return None
        if self.config.resume != "auto":
            try:
                return self.distributed.on_main(checkpoint.verify, Path(self.config.resume))
            except checkpoint.CheckpointError as error:
                raise ConfigError(f"resume: {error}") from error
        found, skipped = self.distributed.on_main(checkpoint.find_newest, self.folder.checkpoints)
        for reason in skipped:
            self.say(f"passed over: {reason}")
        if found is None and skipped:
            raise ConfigError(
                f"resume: none of the {len(skipped)} checkpoints in {self.folder.checkpoints} is whole; choose another "
                "output_dir to start afresh"
            )
        return found

    # --- training -------------------------------------------------------------------------------------------------

    def _train(self) -> signal.Signals | None:
        """Train to the end or to a signal; that signal's number if so. One pass more than steps, for the last periodic
        work."""
        first = self.step
        # A collection of garbage in the middle of a step would hold up every rank; it has its time in _write_pending.
        gc.collect()
        gc.freeze()
        gc.disable()
        for step in range(first, self.plan.max_steps + 1):
            last = step == self.plan.max_steps
            stop = self.distributed.any(self._stop_signal is not None)
            if last or stop or step % self.config.log_every == 0:
                self._write_pending()
            new = step > first or step == 0  # what a continued run did at this step before is not done again
            if new and (last or _due(step, self.config.eval_every) or step == 0):
                self._validate(step)
            if new and (last or (step and _due(step, self.config.sample_every))):
                self._sample(step)
            if new and step and (last or stop or _due(step, self.config.save_every)):
                self._save(step)
            if stop and not last:
                # A signal to any rank stops all of them.
                return signal.Signals(self._stop_signal or signal.SIGTERM)
            if not last:
                self._train_step(step)
        return None

    def _train_step(self, step: int) -> None:
        timer = StepTimer(self.distributed.cuda)
        timer.mark()
        began = time.perf_counter()
        rows = self.stream.next_batch(self.plan.rows_at(step))
        waited = time.perf_counter() - began
        values = hyperparameters(step, self.config, self.plan)
        micro_batches = self.distributed.to_device(rows).split(self.config.micro_batch_size)
        result = self.engine.train_step(micro_batches, values)
        timer.mark()
        self.step = step + 1
        record = {
            "step": step + 1,
            "tokens": self.plan.tokens_after(step + 1),
            "lr": values.learning_rate,
            "waited": waited,
        }
        self._pending.append((record, result, timer))

    def _write_pending(self) -> None:
        """Look at the steps since the last look: the one place where the host waits for the device."""
        if not self._pending:
            return
        columns = torch.stack([torch.stack([r.loss, r.grad_norm, r.skipped]) for _, r, _ in self._pending])
        losses = self.distributed.mean(columns[:, 0].clone()).tolist()
        lines = []
        for (record, _, timer), loss, (norm, skipped) in zip(self._pending, losses, columns[:, 1:].tolist(), strict=True):
            seconds = timer.seconds()
            waited = record.pop("waited")
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
            speed = self.plan.tokens_at(record["step"] - 1) / seconds
            line = {
                "step": record["step"],
                "tokens": record["tokens"],
                "train_loss": loss,
                "lr": record["lr"],
                "grad_norm": norm,
                "tokens_per_second": speed,
                "step_seconds": seconds,
                "data_wait_fraction": min(1.0, waited / seconds),
                "mfu": self._mfu(speed),
                "skipped": int(skipped),
            }
            lines.append(line)
        self.metrics.write(lines)
        self._pending = []
        gc.collect()
        recent = float(np.median([line["tokens_per_second"] for line in lines]))
        left = (self.plan.total_tokens - lines[-1]["tokens"]) / recent
        self.say(progress_line(lines[-1], self.plan.max_steps, left))
        self._record_position(lines[-1]["step"])
        if self.distributed.is_main:
            self.folder.status("running", None, lines[-1]["step"], lines[-1]["tokens"])
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the gradient was not finite in {self._skipped_in_a_row} steps in a row up to step {lines[-1]['step']}; "
                "the weights are as before them. Continue from the last checkpoint with a lower learning_rate"
            )

    def _record_position(self, step: int) -> None:
        """Note where the text stands, so that scripts/inspect_data.py need not read it all to show a batch."""
        position = self.stream.position()
        if self.distributed.is_main:
            with open(self.folder.positions, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, "fingerprint": self.stream.fingerprint, **position}) + "\n")

    def _mfu(self, tokens_per_second: float) -> float | None:
        peak = peak_flops(torch.cuda.get_device_name()) if self.distributed.cuda else None
        if peak is None:
            return None
        flops = flops_per_token(self.config, self.encoder.vocab_size)
        return tokens_per_second * flops / (peak * self.plan.num_processes)

    # --- periodic work --------------------------------------------------------------------------------------------

    def _validate(self, step: int) -> None:
        began = time.perf_counter()
        rank, ranks, size = self.distributed.rank, self.distributed.num_ranks, self.config.micro_batch_size
        own = self.validation_rows[rank::ranks]
        total = torch.zeros(2, dtype=torch.float64, device=self.distributed.device)
        for start in range(0, len(own), size):
            rows = own[start : start + size]
            count = len(rows)
            if count < size:
                # One shape for all batches: a compiled model must not be compiled again for the last.
                rows = np.concatenate([rows, np.repeat(rows[:1], size - count, axis=0)])
            losses = self.engine.losses(self.distributed.to_device(rows))[:count]
            total[0] += losses.double().sum()
            total[1] += losses.numel()
        total = self.distributed.mean(total)
        loss = float(total[0] / total[1])
        self.best_val_loss = min(self.best_val_loss, loss)
        self.metrics.write([{"step": step, "tokens": self.plan.tokens_after(step), "val_loss": loss}])
        self.say(f"step {step} | validation loss {loss:.4f} | {format_duration(time.perf_counter() - began)}")

    def _sample(self, step: int) -> None:
        if self.distributed.is_main:
            samples = []
            for n, prompt in enumerate(SAMPLE_PROMPTS):
                ids = self.tokenizer(prompt)["input_ids"]
                new = continue_text(
                    self.engine.model.gpt2, self.encoder.vocab_size, ids, SAMPLE_TOKENS, seed=self.config.seed + n
                )
                samples.append({"prompt": prompt, "continuation": self.tokenizer.decode(new)})
            write_json(self.folder.evaluation / f"samples-step-{step:08d}.json", {"step": step, "samples": samples})
            for sample in samples:
                self.say(f"  sample: {sample['prompt']}{sample['continuation']!r}")
        self.distributed.barrier()

    def _save(self, step: int) -> None:
        began = time.perf_counter()
        data = self.stream.state()
        full_state = self.engine.full_state()
        state = {
            "tokens": self.plan.tokens_after(step),
            "data": data,
            "best_val_loss": self.best_val_loss,
            "validation_rows": self._validation_hash,
            "ranks": self.plan.num_processes,
            "engine": type(self.engine).__name__,
            "precision": self.precision,
        }

        def write() -> Path:
            saved = checkpoint.save(self.folder.checkpoints, full_state, state, step)
            checkpoint.rotate(self.folder.checkpoints, self.config.keep_checkpoints, saved.path)
            return saved.path

        path = self.distributed.on_main(write)
        self.say(f"step {step} | saved {path} | {format_duration(time.perf_counter() - began)}")


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
