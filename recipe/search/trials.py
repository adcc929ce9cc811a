"""The stages of a search: YAML files of trials, checked against the run's configuration before anything is launched.

    stage: 3-candidates           its name in the results
    base: ../gpt2-124m-fast.yaml  configuration of its trials, relative to this file
    compare: trials               each trial with the baseline; or groups: each group's best with the others'
    baseline: muon                a trial of this stage, or STAGE/NAME of another
    budgets: [50M]                tokens; k, M and B are thousands, millions and billions
    seeds: [0]
    points: 20                    validation losses of a run, step 0 not counted
    set: {batch_tokens: 65536}    fields of all trials
    trials:
      - name: muon
        group: fast               llmc, adamw or fast
        seeds: [0, 1, 2]          base, budgets, seeds and points may differ from the stage's
        seeds_at: {50M: [0, 1]}   other seeds at a budget
        set: {schedule: trapezoidal, warmup_steps: 8, decay_steps: 0.4}
        branch: true              all budgets are decays of one stable run
        keep: true                keep the run folder, with its model

HellaSwag, where hellaswag_every is set, is evaluated at a trial's largest budget only.
Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from recipe.config import Config, ConfigError
from recipe.parsing import parse_config
from recipe.plan import Plan, make_plan

GROUPS = ("llmc", "adamw", "fast")
"""llm.c's hyperparameters, AdamW at its best, and the recipe that is searched for."""
TEXT_FIELDS = frozenset("data validation_data validation_tokens text_column tokenizer".split())
"""Fields that all trials share, or their losses would not compare."""
OWN_FIELDS = frozenset(
    "max_steps max_tokens seed output_dir resume save_every save_at keep_model keep_checkpoints keep_best eval_every "
    "sample_every dry_run".split()
)
"""Fields that follow from the trial."""
_STAGE_KEYS = "stage base compare baseline budgets seeds points set trials".split()
_TRIAL_KEYS = "name group base budgets seeds seeds_at points set branch keep".split()
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_TOKENS = re.compile(r"(\d+(?:\.\d+)?)([kMB])")
_SIZES = {"k": 10**3, "M": 10**6, "B": 10**9}
POINTS = 40


@dataclass(frozen=True)
class Trial:
    """One recipe: what is trained, over which budgets, with which seeds."""

    stage: str
    name: str
    group: str
    base: str
    """Path of its configuration file."""
    fields: dict[str, Any]
    """Of the configuration, over the base: the stage's and its own."""
    budgets: tuple[int, ...]
    """Tokens, in ascending order."""
    seeds: tuple[int, ...]
    seeds_at: dict[int, tuple[int, ...]]
    """Other seeds, by budget."""
    points: int
    branch: bool
    keep: bool

    def budgets_of(self, seed: int) -> list[int]:
        """The budgets that are run with a seed, in ascending order."""
        return [budget for budget in self.budgets if seed in self.seeds_at.get(budget, self.seeds)]

    @property
    def all_seeds(self) -> list[int]:
        """Those of any budget, in the order in which they are given."""
        return list(dict.fromkeys([*self.seeds, *(seed for seeds in self.seeds_at.values() for seed in seeds)]))

    def config(self, budget: int, seed: int, **fields: Any) -> tuple[Config, list[str]]:
        """Its configuration at a budget, with `fields` over its own, and the problems found in it."""
        return parse_config(self.arguments({"max_tokens": budget, "seed": seed} | fields))

    def arguments(self, fields: dict[str, Any]) -> list[str]:
        """Command-line words for pretrain.py; `fields` take precedence over the trial's."""
        merged = self.fields | fields
        return [self.base, *(word for name, value in merged.items() for word in (f"--{name}", _word(value)))]

    def plan(self, budget: int) -> Plan:
        """Steps, warm-up and decay at a budget.

        Raises:
            ConfigError: for a configuration that is not sound.
        """
        config, problems = self.config(budget, self.seeds[0])
        if problems:
            raise ConfigError(*problems)
        return make_plan(config, 1)


@dataclass(frozen=True)
class Stage:
    """The trials of a file."""

    file: str
    name: str
    compare: Literal["trials", "groups"]
    baseline: str | None
    """STAGE/NAME of the trial that the others are compared with."""
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Job:
    """One run: a whole trial at a budget, the stable part of several, or a decay that branches off it."""

    kind: Literal["run", "stable", "branch"]
    trial: Trial
    seed: int
    budget: int
    """Tokens that the run ends at. Of a stable part: 0."""
    start: int = 0
    """Step of the stable part's checkpoint that a branch goes on from."""
    save_at: tuple[int, ...] = ()
    """Steps at which a stable part saves; it ends with the last."""

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What tells it from all others in the results."""
        return self.trial.stage, self.trial.name, self.seed, self.kind, self.budget

    @property
    def label(self) -> str:
        what = "stable" if self.kind == "stable" else show_tokens(self.budget)
        return f"{self.trial.stage}-{self.trial.name}-seed{self.seed}-{what}"

    @property
    def steps(self) -> int:
        """At which the run ends."""
        return self.save_at[-1] if self.kind == "stable" else self.trial.plan(self.budget).max_steps

    @property
    def tokens(self) -> int:
        """That it trains on itself."""
        plan = self.trial.plan(self.budget or self.trial.budgets[-1])
        return plan.tokens_after(self.steps) - plan.tokens_after(self.start)

    def arguments(self, folder: Path, checkpoint: Path | None, more: dict[str, Any]) -> list[str]:
        """Command-line words for pretrain.py.

        Args:
            folder: of the run.
            checkpoint: of the stable part, for a branch.
            more: fields of all trials, such as where the text lies.
        """
        keep_model = self.trial.keep and self.kind != "stable"
        whole = self.trial.plan(self.budget or self.trial.budgets[-1]).max_steps
        fields: dict[str, Any] = {"evaluate_tasks": "none"} | self.trial.fields | more
        fields |= {
            "seed": self.seed, "output_dir": folder, "save_every": 0, "sample_every": 0, "keep_best": False,
            "keep_model": keep_model, "eval_every": max(1, round(whole / self.trial.points)),
        }  # fmt: skip
        if self.budget != self.trial.budgets[-1]:
            fields["hellaswag_every"] = 0
        if self.kind == "stable":
            fields |= {"max_steps": self.steps, "decay_steps": 0, "save_at": ",".join(map(str, self.save_at))}
        else:
            fields |= {"max_tokens": self.budget, "resume": checkpoint or "none"}
        return self.trial.arguments(fields)


def jobs_of(trial: Trial) -> list[Job]:
    """All runs of a trial, in order: of a branched one, for each seed the stable part and then the decays, shortest first."""
    if not trial.branch:
        return [Job("run", trial, seed, budget) for seed in trial.all_seeds for budget in trial.budgets_of(seed)]
    plans = {budget: trial.plan(budget) for budget in trial.budgets}
    starts = {budget: plan.max_steps - plan.decay_steps for budget, plan in plans.items()}
    jobs = []
    for seed in trial.all_seeds:
        own = {budget: starts[budget] for budget in trial.budgets_of(seed)}
        if own:
            jobs.append(Job("stable", trial, seed, 0, save_at=tuple(sorted(set(own.values())))))
            jobs += [Job("branch", trial, seed, budget, start=start) for budget, start in own.items()]
    return jobs


def load_stages(files: Iterable[str | Path]) -> list[Stage]:
    """Read and check stage files.

    Raises:
        ConfigError: with all problems of all files, each naming the file, the trial and the field.
    """
    problems: list[str] = []
    stages = [stage for file in files if (stage := _load(str(file), problems)) is not None]
    names = [stage.name for stage in stages]
    problems += [f"stage: {name} is in two files; rename one" for name in dict.fromkeys(names) if names.count(name) > 1]
    if not problems:
        known = {f"{stage.name}/{trial.name}" for stage in stages for trial in stage.trials}
        for stage in stages:
            # A stage that was not given may hold it, too.
            if stage.baseline and stage.baseline.split("/")[0] in names and stage.baseline not in known:
                problems.append(f"{stage.file}: baseline: there is no trial {stage.baseline}; name one of the trials")
    if problems:
        raise ConfigError(*problems)
    return stages


def parse_tokens(value: object) -> int:
    """25M, 1.5B, 800k or a whole number as tokens.

    Raises:
        ValueError: for anything else, and for numbers below 1.
    """
    match = _TOKENS.fullmatch(value) if isinstance(value, str) else None
    tokens = round(float(match[1]) * _SIZES[match[2]]) if match else value
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(value)
    return tokens


def show_tokens(tokens: float) -> str:
    """25000000 as 25M."""
    for letter, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.4g}{letter}"
    return f"{tokens:g}"


def _word(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)


def _load(file: str, problems: list[str]) -> Stage | None:
    """The stage of a file, None if it has problems."""
    count = len(problems)
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{file}: cannot be read: {error.strerror}; the stages are in configs/search/")
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(f"{file}: not valid YAML: {' '.join(str(error).split())}")
        return None
    if not isinstance(values, dict):
        problems.append(f"{file}: expected `stage: NAME`, `trials:` and so on, found {type(values).__name__}")
        return None
    reader = _Reader(file, problems)
    reader.unknown(values, _STAGE_KEYS)
    name = reader.name(values, "stage")
    compare = values.get("compare", "trials")
    if compare not in ("trials", "groups"):
        reader.add("compare", f"{compare!r} is neither trials nor groups")
    baseline = values.get("baseline")
    if compare == "trials" and not isinstance(baseline, str):
        reader.add("baseline", "not given; name the trial that the others are compared with, or set compare: groups")
    entries = values.get("trials")
    if not isinstance(entries, list) or not entries:
        reader.add("trials", "expected a list of trials, each with a name and a group")
        entries = []
    trials = [trial for entry in entries if (trial := _load_trial(file, values, entry, problems)) is not None]
    names = [trial.name for trial in trials]
    for double in dict.fromkeys(n for n in names if names.count(n) > 1):
        reader.add("name", f"{double} is given to two trials; rename one")
    if len(problems) > count:
        return None
    if baseline is not None and "/" not in baseline:
        baseline = f"{name}/{baseline}"
    return Stage(file, name, compare, baseline, tuple(trials))


def _load_trial(file: str, stage: dict, entry: object, problems: list[str]) -> Trial | None:
    count = len(problems)
    if not isinstance(entry, dict):
        problems.append(f"{file}: trials: expected `name: ...` and so on, found {entry!r}")
        return None
    reader = _Reader(f"{file}: {entry.get('name', 'a trial without a name')}", problems)
    reader.unknown(entry, _TRIAL_KEYS)
    name = reader.name(entry, "name")
    group = entry.get("group")
    if group not in GROUPS:
        reader.add("group", f"{group!r} is not one of {', '.join(GROUPS)}")
    both = stage | entry
    fields = {**reader.fields(stage, file), **reader.fields(entry, "the trial")}
    budgets = reader.list_of(both, "budgets", parse_tokens, "tokens such as 25M")
    seeds = reader.list_of(both, "seeds", _seed, "whole numbers from 0 on")
    points = both.get("points", POINTS)
    if not isinstance(points, int) or isinstance(points, bool) or points < 1:
        reader.add("points", f"{points!r} is not a whole number from 1 on")
    seeds_at = reader.seeds_at(entry, budgets)
    branch, keep = (reader.switch(entry, key) for key in ("branch", "keep"))
    base = both.get("base")
    if not isinstance(base, str):
        reader.add("base", f"{base!r} is not the path of a configuration file, relative to this one")
    if len(problems) > count:
        return None
    base = str(Path(file).parent / base)
    trial = Trial(
        stage["stage"], name, group, base, fields, tuple(sorted(budgets)), tuple(seeds), seeds_at, points, branch, keep
    )
    for budget in trial.budgets:
        config, found = trial.config(budget, trial.seeds[0])
        if not found:
            try:
                make_plan(config, 1)
            except ConfigError as error:
                found = error.problems
        if branch and config.schedule != "trapezoidal":
            found.append(f"schedule: {config.schedule} has no stable part to branch off; set trapezoidal, or drop branch")
        elif branch and 0 < config.warmup_steps < 1:
            found.append("warmup_steps: a share of the run differs with the budget; branches need a count of steps")
        elif branch and config.decay_steps == 0:
            found.append("decay_steps: 0 leaves branches nothing to decay over; set a share such as 0.4")
        problems += [f"{reader.where}: {problem}" for problem in found]
        if found:
            return None
    return trial


def _seed(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value


@dataclass
class _Reader:
    """Reads values and notes what is wrong with them."""

    where: str
    problems: list[str]

    def add(self, field: str, problem: str) -> None:
        self.problems.append(f"{self.where}: {field}: {problem}")

    def unknown(self, values: dict, known: list[str]) -> None:
        for key in values:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"
                self.add(str(key), f"unknown; {hint} Fields of the configuration belong below `set`")

    def name(self, values: dict, key: str) -> str:
        name = values.get(key)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self.add(key, f"{name!r} is not a name of letters, digits, '.', '_' and '-'")
            return ""
        return name

    def switch(self, values: dict, key: str) -> bool:
        value = values.get(key, False)
        if not isinstance(value, bool):
            self.add(key, f"{value!r} is not true or false")
        return bool(value)

    def list_of(self, values: dict, key: str, convert: Any, what: str) -> list:
        found, given = [], values.get(key)
        if not isinstance(given, list) or not given:
            self.add(key, f"{given!r} is not a list of {what}")
            return []
        for value in given:
            try:
                found.append(convert(value))
            except ValueError:
                self.add(key, f"{value!r} is not a list of {what}" if isinstance(value, list) else f"{value!r} is not {what}")
        if len(set(found)) < len(found):
            self.add(key, "holds one twice")
        return found

    def seeds_at(self, values: dict, budgets: list[int]) -> dict[int, tuple[int, ...]]:
        given, found = values.get("seeds_at", {}), {}
        for budget in given if isinstance(given, dict) else ():
            try:
                tokens = parse_tokens(budget)
            except ValueError:
                tokens = 0
            if tokens not in budgets:
                self.add("seeds_at", f"{budget!r} is not one of the trial's budgets")
            found[tokens] = tuple(self.list_of(given, budget, _seed, "whole numbers from 0 on"))
        if not isinstance(given, dict):
            self.add("seeds_at", f"{given!r} does not map budgets to lists of seeds")
        return found

    def fields(self, values: dict, source: str) -> dict[str, Any]:
        fields = values.get("set") or {}
        if not isinstance(fields, dict):
            self.add("set", f"{fields!r} ({source}) is not a mapping of fields to values")
            return {}
        for name in fields:
            if name in OWN_FIELDS:
                self.add(str(name), f"({source}) follows from the trial's budgets, seeds and keep; drop it")
            if name in TEXT_FIELDS and source == "the trial":
                self.add(str(name), "is the same for all trials, or their losses do not compare; set it for the stage")
        return {str(name): value for name, value in fields.items()}
