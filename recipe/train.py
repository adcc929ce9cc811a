"""The run: config -> documents -> rows -> batches -> loss -> checkpoint -> export."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from recipe import checkpoint
from recipe.config import Config, ConfigError, config_hash, parse_ranges, parse_steps
from recipe.data.stream import RowStream
from recipe.distributed import COLLECTIVE_TIMEOUT, Distributed, resolve_precision
from recipe.engine import Engine, make_engine
from recipe.evaluation.in_loop import InLoopHellaSwag, sample, validate
from recipe.evaluation.items import read_items
from recipe.evaluation.scoring import Interrupted
from recipe.files import write_json
from recipe.initial_weights import load_initial_weights
from recipe.inputs import Inputs
from recipe.micro_batch import check_alike, predicted_memory
from recipe.model import build_model, cut_rows
from recipe.monitor.console import Console
from recipe.monitor.live import LiveRun
from recipe.monitor.metrics import MetricsLog, WallClock, format_duration, progress_line
from recipe.monitor.run_record import record_start
from recipe.monitor.trackers import Reporter, start_reporting
from recipe.optim.groups import parameter_groups, state_kinds
from recipe.optim.schedule import hyperparameters
from recipe.plan import Plan, flops_per_token, peak_flops
from recipe.publish.finish import finish_run
from recipe.publish.outbox import BackgroundPush, check_destination
from recipe.publish.training_state import is_pulled, keep_pulled, pull_on_main
from recipe.recovery import Recovery, Rollback, TrainingError
from recipe.rng import gather_rng, restore_rng
from recipe.run_folder import RunFolder, describe_environment
from recipe.saving import Saver, check_disk
from recipe.signals import StopSignals
from recipe.spikes import SkippedRows, SpikeFinder
from recipe.steps import Step, Steps, StepTimer
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
        self._evaluation_due, self._evaluated = False, []
        self._lineage: list[int] = []
        self._compiled: set[int] = set()
        """Lengths of sequences that the model has been compiled for, if it is compiled."""
        self._validated: tuple[int, float] | None = None
        self._push: BackgroundPush | None = None
        """On rank 0, if the run is pushed."""

    def execute(self) -> str | None:
        """Set up, train, and on rank 0 export and evaluate. What stopped the training early, if anything did."""
        limit = self.config.watchdog_seconds
        self.distributed = Distributed(max(COLLECTIVE_TIMEOUT, timedelta(seconds=min(2 * limit, 1e6))))
        self.watchdog = Watchdog(self.distributed, limit, self._fail)
        self.console = Console(self.distributed.is_main)
        self.saver = Saver(self.folder.checkpoints, self.config, self.distributed, self.watchdog)
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
        self._pulled = None
        if config.resume.startswith("hub:"):
            self._pulled = pull_on_main(config.resume, self.folder, distributed)
        if config.push_to_hub:
            distributed.on_main(check_destination, config, self.folder, self.say)
        self.hellaswag = None
        items = distributed.on_main(read_items, config.evaluate_data, config.hellaswag_items) if config.hellaswag_every else []
        self.inputs = Inputs(config, self.plan, self.folder, distributed)
        self.tokenizer = self.inputs.tokenizer
        if items:
            self.hellaswag = InLoopHellaSwag(items, self.tokenizer, config)
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
        if config.init_from and not start:
            load_initial_weights(model, config, self.encoder.vocab_size, distributed)
        full_state = start.full_state() if start else {}
        shapes = {n: t.shape for n, t in full_state.items() if n.startswith("model.")}
        if start and shapes != {f"model.{n.removeprefix('gpt2.')}": p.shape for n, p in model.named_parameters()}:
            raise ConfigError(f"resume: {start.path} holds another model; give its n_layer, n_embd and n_positions")
        kinds = state_kinds(parameter_groups(model, config))
        expected = {f"{kind}.{name.removeprefix('gpt2.')}" for name in kinds for kind in kinds[name]}
        if start and not expected <= full_state.keys():
            theirs = "muon" if any(n.startswith("momentum_buffer.") for n in full_state) else "adamw"
            name = "optimizer" if theirs != config.optimizer else "muon_variant"
            raise ConfigError(
                f"{name}: {start.path} holds the state of {theirs}, not of {getattr(config, name)}; set {name} {theirs}"
            )
        self.engine: Engine = make_engine(model, config, self.plan, distributed, self.precision)
        flops = functools.partial(flops_per_token, config, self.encoder.vocab_size)
        self._steps = Steps(self.plan, flops, self._peak_flops(), distributed)
        self.best_val_loss = float("inf")
        self._restore_history(state)
        if start:
            self._load(start, full_state, state)
            self.say(f"continuing from {start.path} at step {start.step}")
        distributed.on_main(self._claim_folder, self.inputs.training.name, start)
        if distributed.is_main:
            self.reporter = start_reporting(config, self.folder.path, self.say)
        self._clock = WallClock(self._metrics_path, self._started)
        self._live = LiveRun(self.config, self.plan, self.folder.path, self._clock, self.watchdog)
        self._open_metrics(start.step if start else -1)
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
        return predicted_memory(self.config, self.plan.num_processes, self.encoder.vocab_size)

    def _open_stream(self, state: dict | None) -> None:
        """The rows from a checkpoint's state on, without what the user or a rollback has ruled out."""
        config = self.config
        self._skipped_rows = SkippedRows(self.folder.skipped_rows)
        recorded = self.distributed.on_main(self._skipped_rows.left_out)
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
                config.packing,
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
        # An evaluation at the checkpoint's step that a stop cut short is taken up again.
        self._evaluation_due, self._evaluated = state.get("evaluation_due", False), state.get("evaluated", [])

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

    def _claim_folder(self, text: str, start: checkpoint.Checkpoint | None) -> None:
        environment = describe_environment(self.plan.num_processes, type(self.engine).__name__, self.precision)
        settled = {
            "micro_batch_size": self.config.micro_batch_size,
            "activation_checkpointing": self.config.activation_checkpointing,
            "predicted_memory_gib": self._predicted_memory(),
        }
        validation = {"validation_sha256": self.inputs.validation_hash}
        self.folder.claim(self.config, environment | settled | validation | {"text": text})
        record_start(self.folder.path, self.step, environment)
        if start and self.config.resume != "auto":
            self._set_aside(start)
        if start and is_pulled(start, self.folder):
            keep_pulled(start, self.folder)
        if self.config.push_to_hub:
            self._push = BackgroundPush(self.folder, self.config, self.say)
        self.tokenizer.save_pretrained(self.folder.cache / "tokenizer")
        self.folder.status("running", None, self.step, self.plan.tokens_after(self.step))
        self._versions = environment["versions"]

    def _set_aside(self, start: checkpoint.Checkpoint) -> None:
        for path in checkpoint.set_aside(self.folder.checkpoints, start):
            self.say(f"set aside: {path}, which the run from step {start.step} on replaces")

    def _find_checkpoint(self) -> checkpoint.Checkpoint | None:
        if self.config.resume == "none":
            return None
        if self._pulled:
            return self._pulled
        if self.config.resume != "auto" and not self.config.resume.startswith("hub:"):
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
        save_at, keep_model = parse_steps(self.config.save_at), self.config.keep_model
        self.console.go_live(self._live.lines)
        # A collection of garbage in the middle of a step would hold up every rank; it has its time in _write_pending.
        gc.collect()
        gc.freeze()
        gc.disable()
        while True:
            last = step == self.plan.max_steps
            stop = self._reason_to_stop()
            save = (last and keep_model) or stop or _due(step, self.config.save_every) or step in save_at
            if (last or save or step % self.config.log_every == 0) and self._write_pending():
                step = first = self.step  # it went back
                continue
            new = step > first or step == 0  # what a continued run did at this step before is not done again
            if new or self._evaluation_due:
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
            self.spikes.accept(loss, result.skipped + (loss > limit))
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
        steps, rollback = self._recovery.examine(taken, self._skipped_rows if self.distributed.is_main else None)
        lines = [self._steps.line(step) for step in steps]
        self.metrics.write(lines)
        gc.collect()
        recent = float(np.median([line["tokens_per_second"] for line in lines]))
        left = (self.plan.total_tokens - lines[-1]["tokens"]) / recent
        self.console.progress(progress_line(lines[-1], self.plan.max_steps, left))
        for step in steps:
            if step.is_spike:
                self.say(f"step {step.number} | spike: loss {step.loss:.4f} above {step.limit:.4f}, rows {list(step.rows)}")
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
        reason, bad = rollback.reason, rollback.bad
        found, _ = self.distributed.on_main(checkpoint.find_newest, self.folder.checkpoints, rollback.last_good_step)
        if found is None:
            raise TrainingError(f"{reason}, and there is no checkpoint before step {bad[0]['step']} to go back to")

        def record() -> None:
            self._skipped_rows.add([one | {"action": "rollback", "to_step": found.step} for one in bad])
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

    def _peak_flops(self) -> float | None:
        return peak_flops(torch.cuda.get_device_name()) if self.distributed.cuda else None

    # --- periodic work --------------------------------------------------------------------------------------------

    def _evaluate(self, step: int, last: bool) -> None:
        """What is due at this step, but for what is done already if it was given up before.

        Raises:
            Interrupted: if there is a reason to stop; the checkpoint then knows what is done.
        """
        config = self.config
        evaluations = (
            ("validation", self._validate, step == 0 or last or _due(step, config.eval_every)),
            ("hellaswag", self._evaluate_hellaswag, self.hellaswag and step and (last or _due(step, config.hellaswag_every))),
            ("samples", self._sample, (last and config.keep_model) or (step and _due(step, config.sample_every))),
        )
        self._evaluation_due = True
        for name, evaluate, due in evaluations:
            if due and name not in self._evaluated:
                evaluate(step)
                self._evaluated.append(name)
        self._evaluation_due, self._evaluated = False, []

    def _validate(self, step: int) -> None:
        began = time.perf_counter()
        size = self.config.micro_batch_size
        found = validate(self.engine, self.inputs, size, self.distributed, self.watchdog, step, self._reason_to_stop)
        self.best_val_loss = min(self.best_val_loss, found["val_loss"])
        self._validated = step, found["val_loss"]
        self.metrics.write([{"step": step, "tokens": self.plan.tokens_after(step), **found}])
        self.say(
            f"step {step} | validation loss {found['val_loss']:.4f} | {found['val_bits_per_byte']:.4f} bits a byte | "
            f"{format_duration(time.perf_counter() - began)}"
        )

    def _evaluate_hellaswag(self, step: int) -> None:
        began = time.perf_counter()
        self.watchdog.enter("evaluate", step)
        found = self.hellaswag.evaluate(self.engine.model, self.distributed, self._reason_to_stop)
        self.metrics.write([{"step": step, "tokens": self.plan.tokens_after(step), **found}])
        cut = f" | {found['hellaswag_truncated']} inputs cut" if found["hellaswag_truncated"] else ""
        self.say(
            f"step {step} | HellaSwag acc {found['hellaswag_acc']:.4f}, acc_norm {found['hellaswag_acc_norm']:.4f} (lm-eval), "
            f"acc_norm {found['hellaswag_completion_acc_norm']:.4f} (completion), {found['hellaswag_n']} items{cut} | "
            f"{format_duration(time.perf_counter() - began)}"
        )

    def _sample(self, step: int) -> None:
        self.watchdog.enter("sample", step)
        if self.distributed.is_main:
            samples = sample(self.engine.model, self.tokenizer, self.encoder.vocab_size, self.config.seed)
            write_json(self.folder.evaluation / f"samples-step-{step:08d}.json", {"step": step, "samples": samples})
            for one in samples:
                self.say(f"  sample: {one['prompt']}{one['continuation']!r}")
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
            "evaluation_due": self._evaluation_due,
            "evaluated": self._evaluated,
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


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
