"""The run: config -> documents -> rows -> batches -> loss -> checkpoint -> export."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from recipe import checkpoint
from recipe.config import Config, ConfigError, config_hash, parse_ranges
from recipe.data.stream import RowStream
from recipe.distributed import COLLECTIVE_TIMEOUT, Distributed, resolve_precision
from recipe.engine import Engine, StepResult, make_engine
from recipe.files import write_json
from recipe.inputs import Inputs
from recipe.model import build_model, continue_text
from recipe.monitor.metrics import MetricsLog, format_duration, progress_line
from recipe.optim.groups import parameter_groups, state_kinds
from recipe.optim.schedule import hyperparameters
from recipe.plan import Plan, flops_per_token, peak_flops
from recipe.publish.finish import finish_run
from recipe.rng import gather_rng, restore_rng
from recipe.run_folder import RunFolder, describe_environment
from recipe.saving import Saver, check_disk
from recipe.signals import StopSignals
from recipe.spikes import SkippedRows, SpikeFinder
from recipe.watchdog import Watchdog

SAMPLE_PROMPTS = ("The", "In this example", "Once upon a time")
SAMPLE_TOKENS = 64
MAX_SKIPPED_IN_A_ROW = 3
MAX_ROLLBACKS = 3
"""Times that a run goes back without having saved behind the place."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says why and what to do. `rank` is the one at fault, if it is not all."""

    rank: int | None = None


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

    def __init__(self, config: Config, plan: Plan, folder: RunFolder, signals: StopSignals, started: float):
        """`started`: when the process began, on the monotonic clock."""
        self.config, self.plan, self.folder, self.signals, self._started = config, plan, folder, signals, started
        self.step = 0
        """Optimizer steps done."""
        self._pending: list[tuple[dict[str, Any], StepResult, StepTimer]] = []
        self._not_finite: list[dict[str, Any]] = []
        self._rollbacks, self._rolled_back_from = 0, 0
        self._lineage: list[int] = []
        self._compiled = False
        self._validated: tuple[int, float] | None = None

    def execute(self) -> str | None:
        """Set up, train, and on rank 0 export and evaluate. What stopped the training early, if anything did."""
        limit = self.config.watchdog_seconds
        self.distributed = Distributed(max(COLLECTIVE_TIMEOUT, timedelta(seconds=min(2 * limit, 1e6))))
        self.watchdog = Watchdog(self.distributed, limit, self._fail)
        self.saver = Saver(self.folder.checkpoints, self.config, self.distributed, self.watchdog)
        self.say(f"{self.plan.num_processes} ranks on {self._device_name()}")
        try:
            self._set_up()
            self.signals.training_began()
            stopped_by = self._train()
        except Exception as error:
            self._explain(error)
            raise
        self.stream.close()
        self.metrics.close()
        main = self.distributed.is_main
        if stopped_by is not None:
            # The launcher ends all ranks when the first one exits: by then it is written.
            if main:
                self.folder.status("stopped", 75, self.step, self.plan.tokens_after(self.step), stopped_by)
            self.distributed.barrier()
            self.signals.ignore()
        self.watchdog.close()
        self.distributed.close()
        if stopped_by is None:
            self.signals.nothing_to_save()
            if main:
                finish_run(self.folder, self.config, self.inputs.tokenizer, self.inputs.validation_rows, print)
        return stopped_by

    def say(self, line: str) -> None:
        """Print on rank 0."""
        if self.distributed.is_main:
            print(line, flush=True)

    def _fail(self, reason: str, rank: int) -> None:
        if self.folder.config.is_file():
            self.folder.status("failed", 1, self.step, self.plan.tokens_after(self.step), reason, rank)

    def _explain(self, error: Exception) -> None:
        """Let a save that is under way come to its end; if a collective has failed because a rank is gone, name that."""
        with contextlib.suppress(Exception):
            self.saver.finish(timeout=60)
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            lost = self.watchdog.lost_ranks()
            if lost:
                rank, description = next(iter(lost.items()))
                gone = TrainingError(f"lost {description}: it was killed, or its machine or its connection is gone")
                gone.rank = rank
                raise gone from error

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
        self.inputs = Inputs(config, self.plan, self.folder, distributed)
        self.tokenizer, self.validation_rows = self.inputs.tokenizer, self.inputs.validation_rows
        self.encoder = self.inputs.vocab_encoder
        self.say(self.inputs.summary)
        distributed.on_main(check_disk, self.folder.checkpoints, config, self.plan, self.encoder.vocab_size)
        start = self._find_checkpoint()
        state = start.state() if start else None
        self._open_stream(state)
        if state and state["validation_rows"] != self.inputs.validation_hash:
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
        self._restore_history(state)
        if start:
            self._load(start, full_state, state)
            self.say(f"continuing from {start.path} at step {start.step}")
        distributed.on_main(self._claim_folder, self.inputs.training.name, start)
        self._open_metrics(start.step if start else -1)
        for line in self.plan.lines(config, self.encoder.vocab_size):
            self.say(line)
        self.say(
            f"engine            {type(self.engine).__name__}, {self.precision}, tokenised by "
            f"{self.inputs.encoder.engine}, {self.stream.num_shards} virtual shards"
        )
        self.say(f"kernels           {self.engine.model.kernels}")

    def _open_stream(self, state: dict | None) -> None:
        """The rows from a checkpoint's state on, without what the user or a rollback has ruled out."""
        config = self.config
        recorded = self.distributed.on_main(SkippedRows(self.folder.skipped_rows).left_out)
        self._left_out = sorted({*recorded, *((a, b) for a, b in (state or {}).get("left_out", ()))})
        try:
            self.stream = RowStream(
                self.inputs.training,
                self.inputs.encoder,
                config.sequence_length,
                config.seed,
                config.max_epochs,
                self.distributed,
                config.data_workers,
                state["data"] if state else None,
                list(dict.fromkeys([*parse_ranges(config.skip_rows), *self._left_out])),
                config.accept_other_data,
            )
        except ValueError as error:
            raise ConfigError(f"data: {error}; restore it, name another output_dir, or set accept_other_data") from error
        for accepted in self.stream.accepted:
            self.say(f"accepted: {accepted}")

    def _restore_history(self, state: dict | None) -> None:
        config, history = self.config, (state or {}).get("spike_losses", ())
        self.spikes = None
        if config.spike_action != "none":
            self.spikes = SpikeFinder(config.spike_window, config.spike_threshold, self.distributed.device, history)

    def _load(self, start: checkpoint.Checkpoint, full_state: dict[str, torch.Tensor], state: dict) -> None:
        self.engine.load_full_state(full_state)
        restore_rng(start.rng(), self.distributed)
        self.step = start.step
        self.best_val_loss = state["best_val_loss"]
        self._lineage = [*state.get("lineage", ()), start.step]

    def _open_metrics(self, step: int) -> None:
        """Go on with metrics.jsonl behind `step`."""
        path = self.folder.metrics if self.distributed.is_main else Path(os.devnull)
        self.metrics = MetricsLog(path, step if self.distributed.is_main else None)
        self._record_position(self.step)

    def _claim_folder(self, text: str, start: checkpoint.Checkpoint | None) -> None:
        environment = describe_environment(self.plan.num_processes, type(self.engine).__name__, self.precision)
        self.folder.claim(self.config, environment | {"text": text})
        if start and self.config.resume != "auto":
            self._set_aside(start)
        self.tokenizer.save_pretrained(self.folder.cache / "tokenizer")
        self.folder.status("running", None, self.step, self.plan.tokens_after(self.step))
        self._versions = environment["versions"]

    def _set_aside(self, start: checkpoint.Checkpoint) -> None:
        for path in checkpoint.set_aside(self.folder.checkpoints, start):
            self.say(f"set aside: {path}, which the run from step {start.step} on replaces")

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

    def _train(self) -> str | None:
        """Train to the end or until something stops it; what that is, if so. One pass more than steps, for the last periodic
        work."""
        step = first = self.step
        # A collection of garbage in the middle of a step would hold up every rank; it has its time in _write_pending.
        gc.collect()
        gc.freeze()
        gc.disable()
        while True:
            last = step == self.plan.max_steps
            stop = self._reason_to_stop()
            save = last or stop or _due(step, self.config.save_every)
            if (save or step % self.config.log_every == 0) and self._write_pending():
                step = first = self.step  # it went back
                continue
            new = step > first or step == 0  # what a continued run did at this step before is not done again
            if new and (last or _due(step, self.config.eval_every) or step == 0):
                self._validate(step)
            if new and (last or (step and _due(step, self.config.sample_every))):
                self._sample(step)
            if new and step and save:
                self._save(step)
            if last or stop:
                self._finish_saving()
                return None if last else stop
            self._train_step(step)
            step += 1

    def _reason_to_stop(self) -> str | None:
        """On all ranks alike: what asks for a stop on any of them. One exchange a step, in which also the news travels that a
        save has failed."""
        signalled = int(self.signals.received or 0)
        flags = [signalled, self._out_of_time(), self.saver.failed()]
        signalled, out_of_time, save_failed = self.distributed.sum(np.array(flags, dtype=np.int64)).tolist()
        if save_failed:
            self.saver.wait()
        if signalled:
            # A signal to any rank stops all of them.
            return f"signal {self.signals.received.name if self.signals.received else 'to another rank'}"
        return f"max_hours {self.config.max_hours:g}" if out_of_time else None

    def _out_of_time(self) -> bool:
        """On rank 0: whether it is time to save and stop."""
        if self.config.max_hours is None or not self.distributed.is_main:
            return False
        limit = 3600 * self.config.max_hours
        reserve = min(60.0, limit / 20) + 2 * self.saver.longest
        return time.monotonic() - self._started > limit - reserve

    def _train_step(self, step: int) -> None:
        timer = StepTimer(self.distributed.cuda)
        timer.mark()
        began = time.perf_counter()
        first_row = self.stream.rows
        self.watchdog.enter("data", step)
        rows = self.stream.next_batch(self.plan.rows_at(step))
        waited = time.perf_counter() - began
        values = hyperparameters(step, self.config, self.plan)
        micro_batches = self.distributed.to_device(rows).split(self.config.micro_batch_size)
        # The first step may compile for minutes.
        self.watchdog.enter("train" if self._compiled else "first step", step)
        limit = self.spikes.limit() if self.spikes else None
        result = self.engine.train_step(micro_batches, values, limit if self.config.spike_action == "skip" else None)
        if self.spikes:
            loss = self.distributed.mean(result.loss.clone())
            self.spikes.accept(loss, result.skipped + (loss > limit))
            result.limit = limit
        self._compiled = True
        timer.mark()
        self.step = step + 1
        record = {
            "step": step + 1,
            "tokens": self.plan.tokens_after(step + 1),
            "lr": values.learning_rate,
            "waited": waited,
            "rows": [first_row, self.stream.rows - 1],
        }
        self._pending.append((record, result, timer))

    def _write_pending(self) -> bool:
        """Look at the steps since the last look: the one place where the host waits for the device. Whether the run went back
        to an earlier step because of what it saw."""
        self._report_save()
        if not self._pending:
            return False
        self.watchdog.enter("log", self.step)
        columns = torch.stack([torch.stack([r.loss, r.grad_norm, r.skipped, r.limit_or_inf()]) for _, r, _ in self._pending])
        losses = self.distributed.mean(columns[:, 0].clone()).tolist()
        lines, spikes = [], []
        for (record, _, timer), loss, (norm, skipped, limit) in zip(
            self._pending, losses, columns[:, 1:].tolist(), strict=True
        ):
            seconds = timer.seconds()
            waited, rows = record.pop("waited"), record.pop("rows")
            spike = loss > limit
            offending = {"step": record["step"], "rows": rows, "loss": loss if np.isfinite(loss) else None}
            if spike:
                spikes.append(offending | {"reason": "spike", "limit": limit})
            self._not_finite = [*self._not_finite, offending | {"reason": "not finite"}] if skipped and not spike else []
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
            if len(self._not_finite) == MAX_SKIPPED_IN_A_ROW:
                break
        self.metrics.write(lines)
        self._pending = []
        gc.collect()
        recent = float(np.median([line["tokens_per_second"] for line in lines]))
        left = (self.plan.total_tokens - lines[-1]["tokens"]) / recent
        self.say(progress_line(lines[-1], self.plan.max_steps, left))
        self._record_position(lines[-1]["step"])
        if self.distributed.is_main:
            self.folder.status("running", None, lines[-1]["step"], lines[-1]["tokens"])
        return self._act_on(spikes)

    def _act_on(self, spikes: list[dict[str, Any]]) -> bool:
        """What the configuration says about steps that went wrong; whether the run went back."""
        if len(self._not_finite) >= MAX_SKIPPED_IN_A_ROW:
            bad, self._not_finite = self._not_finite, []
            reason = f"the gradient was not finite in {len(bad)} steps in a row up to step {bad[-1]['step']}"
            if self.config.on_nonfinite == "stop":
                raise TrainingError(
                    f"{reason}; the weights are as before them. Continue from the last checkpoint with a lower learning_rate"
                )
            self._roll_back(bad, reason)
            return True
        for spike in spikes:
            self.say(f"step {spike['step']} | spike: loss {spike['loss']:.4f} above {spike['limit']:.4f}, rows {spike['rows']}")
        if spikes and self.config.spike_action == "rollback":
            self._roll_back(spikes, f"the loss of step {spikes[0]['step']} is a spike")
            return True
        if spikes and self.distributed.is_main:
            SkippedRows(self.folder.skipped_rows).add([spike | {"action": "skip"} for spike in spikes])
        return False

    def _roll_back(self, bad: list[dict[str, Any]], reason: str) -> None:
        """Go back to the newest checkpoint before the steps in `bad`, and leave out their rows from now on."""
        self.saver.wait()
        self._rollbacks, self._rolled_back_from = self._rollbacks + 1, bad[-1]["step"]
        if self._rollbacks > MAX_ROLLBACKS:
            raise TrainingError(f"{reason}, {MAX_ROLLBACKS} rollbacks did not get beyond it; lower the learning_rate")
        found, _ = self.distributed.on_main(checkpoint.find_newest, self.folder.checkpoints, bad[0]["step"] - 1)
        if found is None:
            raise TrainingError(f"{reason}, and there is no checkpoint before step {bad[0]['step']} to go back to")

        def record() -> None:
            SkippedRows(self.folder.skipped_rows).add([one | {"action": "rollback", "to_step": found.step} for one in bad])
            self._set_aside(found)

        self.distributed.on_main(record)
        self.say(f"{reason}: back to step {found.step}, without rows {', '.join(str(one['rows']) for one in bad)}")
        self.stream.close()
        self.metrics.close()
        state = found.state()
        self._open_stream(state)
        self._restore_history(state)
        self._load(found, found.full_state(), state)
        self._open_metrics(found.step)

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
            self.watchdog.enter("validate" if start else "first step", step)  # the first may compile
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
        self._validated = step, loss
        self.metrics.write([{"step": step, "tokens": self.plan.tokens_after(step), "val_loss": loss}])
        self.say(f"step {step} | validation loss {loss:.4f} | {format_duration(time.perf_counter() - began)}")

    def _sample(self, step: int) -> None:
        self.watchdog.enter("sample", step)
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
        self.watchdog.enter("save", step)
        data = self.stream.state()
        rng = gather_rng(self.distributed)
        state = {
            "tokens": self.plan.tokens_after(step),
            "data": data,
            "best_val_loss": self.best_val_loss,
            "validation_rows": self.inputs.validation_hash,
            "spike_losses": self.spikes.state() if self.spikes else [],
            "left_out": self._left_out,
            "lineage": self._lineage,
        }
        about = {
            "val_loss": self._validated[1] if self._validated and self._validated[0] == step else None,
            "topology": {
                "ranks": self.plan.num_processes,
                "ranks_a_node": int(os.environ.get("LOCAL_WORLD_SIZE", self.plan.num_processes)),
                "engine": type(self.engine).__name__,
                "precision": self.precision,
            },
            "config_sha256": config_hash(self.config),
            "versions": self._versions if self.distributed.is_main else {},
            "lineage": self._lineage,
        }
        self.saver.save(step, self.engine, state, about, rng)
        if step > self._rolled_back_from:
            self._rollbacks = 0

    def _finish_saving(self) -> None:
        self.watchdog.enter("save", self.step)
        self.saver.wait()
        self._report_save()

    def _report_save(self) -> None:
        """Say what each save has cost, once it is done."""
        for done in self.saver.results():
            for failure in done.pop("failures"):
                self.say(f"warning: {failure}")
            stall, whole = done["save_stall_seconds"], done["save_seconds"]
            self.say(f"step {done['step']} | saved {done.pop('path')} in {whole:.1f} s, training stood {stall:.2f} s for it")
            self.metrics.write([done])


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
