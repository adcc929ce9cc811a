"""The run: config -> documents -> rows -> batches -> loss -> checkpoint -> export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from recipe import checkpoint
from recipe.config import Config, parse_steps
from recipe.distributed import COLLECTIVE_TIMEOUT, Distributed, resolve_precision
from recipe.engine import Engine, make_engine
from recipe.evaluation.periodic import PeriodicEvaluation, due
from recipe.evaluation.scoring import Interrupted
from recipe.gpus import peak_flops
from recipe.initial_weights import load_initial_weights
from recipe.inputs import Inputs
from recipe.micro_batch import check_alike, predicted_memory
from recipe.model import cut_rows
from recipe.model_building import ModelBuilding, import_engine
from recipe.monitor.console import Console
from recipe.monitor.live import LiveRun
from recipe.monitor.metrics import MetricsLog, WallClock, progress_line
from recipe.monitor.run_record import record_start
from recipe.monitor.trackers import Reporter, start_reporting
from recipe.optim.schedule import hyperparameters
from recipe.plan import Plan, flops_per_token
from recipe.publish.finish import finish_run
from recipe.publish.outbox import BackgroundPush, check_destination
from recipe.recovery import Recovery, Rollback, TrainingError
from recipe.run_folder import RunFolder, describe_environment, describe_tokenizer
from recipe.saving import Saver, check_disk
from recipe.signals import StopSignals
from recipe.start import Start
from recipe.steps import Step, Steps, StepTimer
from recipe.stopping import StopReasons
from recipe.watchdog import Watchdog


class Run:
    """One start of a run, on this rank."""

    def __init__(self, config: Config, plan: Plan, folder: RunFolder, signals: StopSignals, started: float):
        """`started`: when the process began, on the monotonic clock."""
        self.config, self.plan, self.folder, self.signals, self._started = config, plan, folder, signals, started
        self.step = 0
        """Optimizer steps done."""
        self.reporter: Reporter | None = None
        self._recovery = Recovery(config)
        self._was_spike = False
        """Whether the last step that was looked at is one."""
        self._compiled: set[int] = set()
        """Lengths of sequences that the model has been compiled for, if it is compiled."""
        self._versions: dict[str, str] = {}
        """On rank 0, of the packages."""
        self._push: BackgroundPush | None = None
        """On rank 0, if the run is pushed."""

    def execute(self) -> str | None:
        """Set up, train, and on rank 0 export and evaluate. What stopped the training early, if anything did."""
        limit = self.config.watchdog_seconds
        self.distributed = Distributed(max(COLLECTIVE_TIMEOUT, timedelta(seconds=min(2 * limit, 1e6))))
        self.watchdog = Watchdog(self.distributed, limit, self._fail)
        self.signals.missing = self.watchdog.gone
        self.console = Console(self.distributed.is_main)
        self.saver = Saver(self.folder.checkpoints, self.config, self.distributed, self.watchdog)
        self.stop_reasons = StopReasons(self.config, self._started, self.signals, self.saver, self.distributed)
        self.say(f"{self.plan.num_processes} ranks on {self._device_name()}")
        try:
            self._set_up()
            self.signals.training_began()
            stopped_by = self._train()
        except Exception as error:
            self._explain(error)
            raise
        finally:
            if self.reporter is not None:
                self.reporter.finish(10)
            self.console.close()
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
            if main and self.config.keep_model:
                finish_run(self.folder, self.config, print)
                if self._push:
                    self._push.finish(self.step)
        return stopped_by

    def say(self, line: str) -> None:
        """Print on rank 0."""
        self.console.say(line)

    def _fail(self, reason: str, rank: int) -> None:
        # A rank that has failed by itself has said more.
        if self.folder.config.is_file() and not (rank != self.distributed.rank and self.folder.has_ended()):
            with contextlib.suppress(OSError):  # of a full disk, for one: the watchdog ends the process all the same
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
        check_alike(distributed.gather((config.micro_batch_size, bool(config.activation_checkpointing))))
        self.start = Start(config, self.folder, distributed, self.say)
        if config.push_to_hub:
            distributed.on_main(check_destination, config, self.folder, self.say)
        self.inputs = Inputs(config, self.plan, self.folder, distributed)
        building = ModelBuilding(config, len(self.inputs.tokenizer), int(self.inputs.tokenizer.eos_token_id))
        self.inputs.read()
        self.encoder = self.inputs.vocab_encoder
        self.say(self.inputs.summary)
        distributed.on_main(check_disk, self.folder.checkpoints, config, self.plan, self.encoder.vocab_size)
        self.start.find()
        self.stream = self.start.open_stream(self.inputs)
        self.stream.prefetch(self.plan.rows_at(self.start.step))
        # A continued run finds what its first start has compiled.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str((self.folder.cache / "compiled").absolute()))
        os.environ.setdefault("TRITON_CACHE_DIR", str((self.folder.cache / "compiled" / "triton").absolute()))
        import_engine(config, distributed)
        gc.freeze()  # DeepSpeed collects garbage six times while it is set up: 0.3 s each through all that is imported
        model = building.model()
        if config.init_from and not self.start.checkpoint:
            load_initial_weights(model, config, self.encoder.vocab_size, distributed)
        self.start.check_model(model)
        self.engine: Engine = make_engine(model, config, self.plan, distributed, self.precision)
        flops = functools.partial(flops_per_token, config, self.encoder.vocab_size)
        peak = peak_flops(torch.cuda.get_device_name()) if distributed.cuda else None
        self._steps = Steps(self.plan, flops, peak, distributed)
        self.evaluation = PeriodicEvaluation(
            config, self.folder, self.inputs, self.engine, self.watchdog, self.stop_reasons.first
        )
        self._begin()
        if self.start.checkpoint:
            self.say(f"continuing from {self.start.checkpoint.path} at step {self.step}")
        distributed.on_main(self._claim_folder)
        if distributed.is_main:
            self.reporter = start_reporting(config, self.folder.path, self.say)
        self._clock = WallClock(self._metrics_path, self._started)
        self._live = LiveRun(self.config, self.plan, self.folder.path, self._clock, self.watchdog)
        self._open_metrics(self.step if self.start.checkpoint else -1)
        for line in self.plan.lines(config, self.encoder.vocab_size):
            self.say(line)
        if distributed.cuda:
            twice = ", activations computed twice" if config.activation_checkpointing else ""
            self.say(f"memory predicted  {self._predicted_memory():.1f} GiB a GPU{twice}")
        self.say(
            f"engine            {type(self.engine).__name__}, {self.precision}, tokenised by "
            f"{self.inputs.encoder.engine}, {self.stream.num_shards} virtual shards"
        )
        self.say(f"kernels           {self.engine.model.kernels}")

    def _predicted_memory(self) -> float | None:
        if not self.distributed.cuda:
            return None
        settled = dataclasses.replace(self.config, precision=self.precision)
        return predicted_memory(settled, self.plan.num_processes, self.encoder.vocab_size)

    def _begin(self) -> None:
        """Be where the training starts, also when a rollback starts it again."""
        self.spikes = self.start.spike_finder()
        self.start.load(self.engine)
        self.step = self.start.step
        self.evaluation.restore(self.start.state)

    @property
    def _metrics_path(self) -> Path:
        return self.folder.metrics if self.distributed.is_main else Path(os.devnull)

    def _open_metrics(self, step: int) -> None:
        """Go on with metrics.jsonl behind `step`."""
        step = step if self.distributed.is_main else None
        listeners = [self._live.add, *([self.reporter.log] if self.reporter is not None else [])]
        self.metrics = MetricsLog(self._metrics_path, step, self._clock, listeners)
        if self.distributed.is_main:
            self._live.reload()
        self._record_position(self.step)

    def _claim_folder(self) -> None:
        environment = describe_environment(self.plan.num_processes, type(self.engine).__name__, self.precision)
        settled = {
            "micro_batch_size": self.config.micro_batch_size,
            "activation_checkpointing": self.config.activation_checkpointing,
            "predicted_memory_gib": self._predicted_memory(),
        }
        text = {"validation_sha256": self.inputs.validation_hash, "text": self.inputs.training.name}
        self.folder.claim(self.config, environment | settled | text | describe_tokenizer(self.inputs.tokenizer))
        record_start(self.folder.path, self.step, environment)
        self.start.settle()
        if self.config.push_to_hub:
            self._push = BackgroundPush(self.folder, self.config, self.say)
        self.inputs.tokenizer.save_pretrained(self.folder.cache / "tokenizer")
        self.folder.status("running", None, self.step, self.plan.tokens_after(self.step))
        self._versions = environment["versions"]

    # --- training -------------------------------------------------------------------------------------------------

    def _train(self) -> str | None:
        """Train to the end or until something stops it; what that is, if so. One pass more than steps, for the last periodic
        work."""
        step = first = self.step
        save_at, keep_model = parse_steps(self.config.save_at), self.config.keep_model
        self.console.go_live(self._live.lines)
        # A collection of garbage in the middle of a step would hold up every rank; it has its time in _write_pending.
        gc.collect()
        gc.freeze()
        gc.disable()
        while True:
            last = step == self.plan.max_steps
            stop = self.stop_reasons.first()
            save = (last and keep_model) or stop or due(step, self.config.save_every) or step in save_at
            if (last or save or step % self.config.log_every == 0) and self._write_pending():
                step = first = self.step  # it went back
                continue
            new = step > first or step == 0  # what a continued run did at this step before is not done again
            if new or self.evaluation.unfinished:
                try:
                    self._evaluate(step, last)
                except Interrupted as interrupted:
                    stop, last = str(interrupted), False
                    if self._write_pending():
                        step = first = self.step
                        continue
            if new and step and (save or stop):
                self._save(step)
            if last or stop:
                self._finish_saving()
                return None if last else stop
            self._train_step(step)
            step += 1

    def _train_step(self, step: int) -> None:
        timer = StepTimer(self.distributed.cuda)
        timer.mark()
        began = time.perf_counter()
        first_row = self.stream.rows
        self.watchdog.enter("data", step)
        rows = self.stream.next_batch(self.plan.rows_at(step))
        waited = time.perf_counter() - began
        values = hyperparameters(step, self.config, self.plan)
        length = self.plan.sequence_length_at(step)
        micro_batches = [cut_rows(m, length) for m in self.distributed.to_device(rows).split(self.config.micro_batch_size)]
        # The first step, and the first of a length, may compile for minutes.
        self.watchdog.enter("train" if length in self._compiled else "first step", step)
        if self.spikes and step and length != self.plan.sequence_length_at(step - 1):
            self.spikes.forget()  # positions that were never trained raise the loss, and that is no spike
        limit = self.spikes.limit() if self.spikes else None
        result = self.engine.train_step(micro_batches, values, limit if self.config.spike_action == "skip" else None)
        if self.spikes:
            loss = self.distributed.mean(result.loss.clone())
            self.spikes.accept(loss, result.skipped, limit)
            result.limit = limit
        self._compiled.add(length)
        timer.mark()
        self.step = step + 1
        rows = first_row, self.stream.rows - 1
        self._steps.add(Step(self.step, rows, waited, values.learning_rate, result, timer))

    def _write_pending(self) -> bool:
        """Look at the steps since the last look. Whether the run went back to an earlier step because of what it saw."""
        self._report_save()
        self.watchdog.enter("log", self.step)
        taken = self._steps.read()
        if not taken:
            return False
        steps, rollback = self._recovery.examine(taken, self.start.skipped_rows if self.distributed.is_main else None)
        lines = [self._steps.line(step) for step in steps]
        self.metrics.write(lines)
        gc.collect()
        recent = float(np.median([line["tokens_per_second"] for line in lines]))
        left = (self.plan.total_tokens - lines[-1]["tokens"]) / recent
        self.console.progress(progress_line(lines[-1], self.plan.max_steps, left))
        for step in steps:
            if step.is_spike:
                self.say(f"step {step.number} | spike: loss {step.loss:.4f} above {step.limit:.4f}, rows {list(step.rows)}")
            elif self._was_spike and math.isinf(step.limit):
                self.say(f"step {step.number} | the loss has found another level, from which spikes count anew")
            self._was_spike = step.is_spike
        self._record_position(lines[-1]["step"])
        if self.distributed.is_main:
            self.folder.status("running", None, lines[-1]["step"], lines[-1]["tokens"])
        if rollback is None:
            return False
        self._roll_back(rollback)
        return True

    def _roll_back(self, rollback: Rollback) -> None:
        self._recovery.rolls_back(rollback)
        self.saver.wait()
        self.start.go_back(rollback)
        self.stream.close()
        self.metrics.close()
        self.stream = self.start.open_stream(self.inputs)
        self._begin()
        self._open_metrics(self.step)

    def _record_position(self, step: int) -> None:
        """Note where the text stands, so that scripts/inspect_data.py need not read it all to show a batch."""
        position = self.stream.position()
        if self.distributed.is_main:
            with open(self.folder.positions, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, "fingerprint": self.stream.fingerprint, **position}) + "\n")

    # --- periodic work --------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, last: bool) -> None:
        """Evaluate what is due; Interrupted if there is a reason to stop, and then a checkpoint knows what is done."""
        for finding in self.evaluation.evaluate(step, last):
            if finding.fields:
                self.metrics.write([{"step": step, "tokens": self.plan.tokens_after(step), **finding.fields}])
            for line in finding.lines:
                self.say(line)

    def _save(self, step: int) -> None:
        self.watchdog.enter("save", step)
        state = {
            "tokens": self.plan.tokens_after(step),
            "data": self.stream.state(),
            "validation_rows": self.inputs.validation_hash,
            "n_head": self.config.n_head,
            "spike_losses": self.spikes.state() if self.spikes else [],
            "spikes_in_a_row": self.spikes.in_a_row() if self.spikes else 0,
            "left_out": self.start.left_out,
            "lineage": self.start.lineage,
            **self.evaluation.state(),
        }
        about = {"val_loss": self.evaluation.val_loss_at(step), "versions": self._versions, "lineage": self.start.lineage}
        self.saver.save(step, self.engine, state, about)
        self._recovery.saved(step)

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
            path = done.pop("path")
            self.say(f"step {done['step']} | saved {path} in {whole:.1f} s, training stood {stall:.2f} s for it")
            if self._push:
                self._push.saved(checkpoint.Checkpoint(path, done["step"]))
            self.metrics.write([done])
