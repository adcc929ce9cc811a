"""Where the training starts: with new weights, or at a checkpoint; a rollback starts it again at an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipe import checkpoint
from recipe.checkpoint import Checkpoint
from recipe.config import Config, ConfigError, parse_ranges
from recipe.data.stream import RowStream
from recipe.distributed import Distributed
from recipe.engine import Engine
from recipe.files import read_json, write_json
from recipe.inputs import Inputs
from recipe.model import PretrainingModel
from recipe.optim.groups import parameter_groups, state_kinds
from recipe.publish.training_state import is_pulled, keep_pulled, pull_on_main
from recipe.recovery import Rollback, TrainingError
from recipe.rng import restore_rng
from recipe.run_folder import RunFolder
from recipe.spikes import SkippedRows, SpikeFinder


class Start:
    """The checkpoint to go on from, and what a run takes out of it. Its methods are collective.

    Attributes:
        checkpoint: None for new weights.
        step: optimizer steps done there.
        state: what its state.json holds; empty for new weights.
        skipped_rows: the run's record of them.
        left_out: ranges (first, last) of rows that rollbacks have ruled out.
        lineage: steps of the checkpoints that the run was continued from, this one last.
    """

    def __init__(self, config: Config, folder: RunFolder, distributed: Distributed, say: Callable[[str], None]):
        """Download what `resume` names on the Hub: the run's tokenizer and metrics come with it.

        Raises:
            ConfigError: if it cannot be had.
        """
        self._config, self._folder, self._distributed, self._say = config, folder, distributed, say
        self.skipped_rows = SkippedRows(folder.skipped_rows)
        self._pulled = pull_on_main(config.resume, folder, distributed) if config.resume.startswith("hub:") else None

    def find(self) -> None:
        """Take the checkpoint that `resume` means.

        Raises:
            ConfigError: if that one, or every one of the run, is damaged.
        """
        resume = self._config.resume
        if resume == "none" or self._pulled:
            self._take(self._pulled)
        elif resume == "auto" or resume.startswith("hub:"):
            self._take(self._find_newest())
        else:
            try:
                self._take(self._find_since() or self._distributed.on_main(checkpoint.verify, Path(resume)))
            except checkpoint.CheckpointError as error:
                raise ConfigError(f"resume: {error}") from error

    def go_back(self, rollback: Rollback) -> None:
        """Take the newest checkpoint before a rollback's steps instead, record their rows, and leave them out from here on.

        Raises:
            TrainingError: if there is none.
        """
        reason, bad = rollback.reason, rollback.bad
        found, _ = self._distributed.on_main(checkpoint.find_newest, self._folder.checkpoints, rollback.last_good_step)
        if found is None:
            raise TrainingError(f"{reason}, and there is no checkpoint before step {bad[0]['step']} to go back to")

        def record() -> None:
            self.skipped_rows.add([one | {"action": "rollback", "to_step": found.step} for one in bad])
            self._set_aside(found)

        self._distributed.on_main(record)
        self._say(f"{reason}: back to step {found.step}, without rows {', '.join(str(one['rows']) for one in bad)}")
        self._take(found)

    def _find_newest(self) -> Checkpoint | None:
        found, skipped = self._distributed.on_main(checkpoint.find_newest, self._folder.checkpoints)
        for reason in skipped:
            self._say(f"passed over: {reason}")
        if found is None and skipped:
            raise ConfigError(
                f"resume: none of the {len(skipped)} checkpoints in {self._folder.checkpoints} is whole; choose another "
                "output_dir to start afresh"
            )
        return found

    def _find_since(self) -> Checkpoint | None:
        """The newest checkpoint since the run was continued from the one that `resume` names: schedulers and supervise.sh give
        the same words again and again, and who goes on does not go back once more. None if it never was, or has saved nothing
        since."""
        step = self._distributed.on_main(self._resumed_at)
        found = self._find_newest() if step is not None else None
        if found is None or found.step < step:
            return None
        self._say(
            f"{self._config.resume} was taken up already: going on from step {found.step}; to go back to it again, delete "
            f"{self._folder.resumed}"
        )
        return found

    def _resumed_at(self) -> int | None:
        """The step of the checkpoint that `resume` names, if the run was continued from there by the same words."""
        noted = read_json(self._folder.resumed)
        return noted["step"] if noted.get("words") == self._resume_words() else None

    def _resume_words(self) -> list[str | None]:
        # With other rows left out it is another way to go on.
        return [str(Path(self._config.resume).absolute()), self._config.skip_rows]

    def _take(self, found: Checkpoint | None) -> None:
        self.checkpoint, self.step = found, found.step if found else 0
        self.state: dict[str, Any] = found.state() if found else {}
        self.lineage = [*self.state.get("lineage", ()), found.step] if found else []
        recorded = self._distributed.on_main(self.skipped_rows.left_out)
        self.left_out = sorted({*recorded, *((a, b) for a, b in self.state.get("left_out", ()))})

    def open_stream(self, inputs: Inputs) -> RowStream:
        """The rows from here on, without what the user or a rollback has ruled out.

        Raises:
            ConfigError: if the text, for training or validation, is not that of the run.
        """
        config = self._config
        try:
            stream = RowStream(
                inputs.training,
                inputs.encoder,
                config.sequence_length,
                config.seed,
                config.max_epochs,
                self._distributed,
                config.data_workers,
                self.state.get("data"),
                list(dict.fromkeys([*parse_ranges(config.skip_rows), *self.left_out])),
                config.accept_other_data,
                config.packing,
            )
        except ValueError as error:
            raise ConfigError(f"data: {error}; restore it, name another output_dir, or set accept_other_data") from error
        for accepted in stream.accepted:
            self._say(f"accepted: {accepted}")
        if self.checkpoint and self.state["validation_rows"] != inputs.validation_hash:
            raise ConfigError(
                "validation_data: the text differs from what the run began with; restore it, or name another output_dir"
            )
        return stream

    def check_model(self, model: PretrainingModel) -> None:
        """Whether the checkpoint holds weights and optimizer state of this model and configuration.

        Raises:
            ConfigError: naming the field that differs.
        """
        if not self.checkpoint:
            return
        config, path, shapes = self._config, self.checkpoint.path, self.checkpoint.shapes()
        heads = self.state.get("n_head", config.n_head)  # which no shape tells
        if heads != config.n_head:
            raise ConfigError(f"n_head: {path} holds a model of {heads} heads, not of {config.n_head}; set n_head {heads}")
        weights = {name: shape for name, shape in shapes.items() if name.startswith("model.")}
        if weights != {f"model.{n.removeprefix('gpt2.')}": p.shape for n, p in model.named_parameters()}:
            raise ConfigError(f"resume: {path} holds another model; give its n_layer, n_embd and n_positions")
        kinds = state_kinds(parameter_groups(model, config))
        if not {f"{kind}.{name.removeprefix('gpt2.')}" for name in kinds for kind in kinds[name]} <= shapes.keys():
            theirs = "muon" if any(name.startswith("momentum_buffer.") for name in shapes) else "adamw"
            field = "optimizer" if theirs != config.optimizer else "muon_variant"
            ours = getattr(config, field)
            raise ConfigError(f"{field}: {path} holds the state of {theirs}, not of {ours}; set {field} {theirs}")

    def load(self, engine: Engine) -> None:
        """Give the engine the checkpoint's weights and optimizer state, and this rank its random generators."""
        if self.checkpoint:
            engine.load_full_state(self.checkpoint.full_state())
            restore_rng(self.checkpoint.rng(), self._distributed)

    def spike_finder(self) -> SpikeFinder | None:
        """Looks for spikes, if the run does, from the losses before here on."""
        config = self._config
        if config.spike_action == "none":
            return None
        history, in_a_row = self.state.get("spike_losses", ()), self.state.get("spikes_in_a_row", 0)
        return SpikeFinder(config.spike_window, config.spike_threshold, self._distributed.device, history, in_a_row)

    def settle(self) -> None:
        """Make the checkpoint the newest of the run folder, which is claimed. On rank 0 alone, once it is loaded."""
        if not self.checkpoint or self._config.resume == "auto":
            return
        self._set_aside(self.checkpoint)
        if is_pulled(self.checkpoint, self._folder):
            keep_pulled(self.checkpoint, self._folder)
        elif not self._config.resume.startswith("hub:") and self._resumed_at() is None:
            write_json(self._folder.resumed, {"words": self._resume_words(), "step": self.step})

    def _set_aside(self, found: Checkpoint) -> None:
        for path in checkpoint.set_aside(self._folder.checkpoints, found):
            self._say(f"set aside: {path}, which the run from step {found.step} on replaces")
