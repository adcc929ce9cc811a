"""The run's configuration: dataclasses, one per concern. recipe/parsing.py reads them. Nothing here imports torch."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import json
import re
import typing
from dataclasses import dataclass, field

import yaml

FINEWEB = "HuggingFaceFW/fineweb:sample-10BT@9bb295ddab0e05d785b879661af7260fed5140fc"
"""FineWeb's 10-billion-token sample at the commit tagged v1.4.0. It was rebuilt twice in 2024: pin it."""

INSTALLED_DOCS = "installed-docs"
"""The value of `data` that stands for the documentation of the installed packages (see recipe/data/installed_docs.py)."""


HUB_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
"""USER/NAME of a repository on the Hub."""

HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")
"""An access token of the Hub."""


class ConfigError(ValueError):
    """One or more problems with the configuration or the input; `problems` holds one line each. Exit code 2."""

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


def first_line(error: Exception) -> str:
    """What an error says, short enough to stand in a problem: its first line, or its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(kw_only=True)
class DataConfig:
    data: str = FINEWEB
    """Training text: a Hub dataset `USER/NAME[:config][@revision]`; a folder, file or glob of .parquet, .jsonl, .jsonl.gz
    or .txt; `installed-docs`, the documentation of the installed Python packages; or what scripts/prepare_data.py made of
    one of these, a folder or a Hub dataset."""
    validation_data: str | None = None
    """Validation text, in the same forms. Default: the validation split of `data` (in a folder the files and subfolders with
    validation, valid, val or dev in their names; those with test are left out of both), else its first documents."""
    validation_tokens: int = 10_485_760
    """Tokens of the validation set (llm.c's number). Held out from `data`, it is at most a twentieth of the text."""
    text_column: str = "text"
    """Column or JSON key that holds the text."""
    tokenizer: str = "openai-community/gpt2"
    """Hub id or folder of a tokenizer, or `train:VOCAB_SIZE` for a byte-level BPE trained on the training text."""
    sequence_length: int = 1024
    """Targets a row; a row holds one token more."""
    packing: typing.Literal["stream", "documents"] = "stream"
    """stream: documents end to end, cut every sequence_length tokens, none left out. documents: a row begins at a document, or
    goes on with one that fills it; what is left of a document that the row before has cut is left out, if it fills none."""
    max_epochs: int = 1
    """How often the text may be read. A run longer than that is refused before it starts."""
    skip_rows: str | None = None
    """Rows to leave out, numbered through the run from 0: ranges and numbers as in `1200-1263,5000`. Rows that are
    still to come may be added to a run. They are recorded in the checkpoints."""
    accept_other_data: bool = False
    """Continue although the text or the tokenizer differs from the run's; the difference is recorded in the checkpoints."""
    data_workers: int = 2
    """Threads a rank that tokenise ahead of the training; 0 tokenises in the training thread. Text on the Hub gets at least 8,
    which mostly wait for it."""


@dataclass(kw_only=True)
class ModelConfig:
    n_layer: int = 12
    """Transformer blocks (GPT2Config.n_layer)."""
    n_head: int = 12
    """Attention heads a block; must divide n_embd (GPT2Config.n_head)."""
    n_embd: int = 768
    """Width of the residual stream (GPT2Config.n_embd)."""
    n_positions: int | None = None
    """Learned positions (GPT2Config.n_positions). Default: sequence_length."""


@dataclass(kw_only=True)
class OptimizerConfig:
    optimizer: typing.Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: Muon for the blocks' matrices and AdamW for embeddings, positions, biases and LayerNorms."""
    learning_rate: float = 6e-4
    """Peak learning rate of AdamW."""
    embedding_learning_rate: float | None = None
    """Peak learning rate of the token embedding, which is the head as well, and of the positions: they may take higher rates
    than matrices (Yang et al. 2022, mu-Transfer). Default: learning_rate."""
    warmup_steps: float = 700
    """Linear warm-up: a count of steps, or a share of the run if below 1."""
    schedule: typing.Literal["constant", "cosine", "linear", "trapezoidal"] = "cosine"
    """Learning rates after the warm-up. trapezoidal is stable until the last decay_steps, so that shorter and longer runs can
    branch off its checkpoints: --resume CHECKPOINT --output_dir NEW --max_steps N."""
    decay_steps: float = 0.2
    """Linear decay at the end of the trapezoidal schedule: a count of steps, or a share of the run if below 1."""
    final_learning_rate: float = 0.0
    """Where cosine, linear and trapezoidal end, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay of matrices and embeddings; biases and LayerNorms have none."""
    cautious_weight_decay: bool = False
    """Let weights decay only where the update shrinks them as well, AdamW's and Muon's (Chen et al. 2025)."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    z_loss: float = 0.0
    """Weight in the training of the squared log of the softmax's denominator, which keeps logits from drifting (Chowdhery et
    al. 2022, PaLM: 1e-4). The losses that are told do not contain it."""
    muon_variant: typing.Literal["muon", "normuon"] = "muon"
    """normuon: bring the neurons of a matrix, its outputs, to updates of about one length by their running mean square, and
    keep the length of the whole (NorMuon, Li et al. 2025)."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of Muon, with the same schedule; of each matrix times max(1, outputs / inputs)^0.5."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov's)."""
    muon_momentum_warmup_steps: int = 0
    """Steps over which Muon's momentum rises from 0.85."""
    muon_weight_decay: float = 0.0
    """Decoupled weight decay of the matrices that Muon trains."""
    muon_polynomial: typing.Literal["quintic", "polar_express"] = "quintic"
    """Coefficients of Newton-Schulz: Keller Jordan's, or those of The Polar Express (Amsel et al. 2025)."""
    muon_ns_steps: int = 5
    """Iterations of Newton-Schulz."""
    muon_ns_dtype: typing.Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of Newton-Schulz. auto: bf16 on a GPU that trains in bf16, else fp32."""


@dataclass(kw_only=True)
class TrainingConfig:
    batch_tokens: int = 524_288
    """Tokens an optimizer step, over all ranks and accumulation steps."""
    batch_ramp: str | None = None
    """Smaller batches at first, as TOKENSxSTEPS: `131072x1000,262144x500` takes 131,072 tokens a step for 1000 steps, 262,144
    for the next 500, and batch_tokens from then on."""
    sequence_ramp: str | None = None
    """Shorter sequences at first, as LENGTHxSTEPS: with `128x500,256x1000` each row is read as sequences of 128 tokens that
    know nothing of each other for 500 steps, of 256 for the next 1000, and whole from then on. Rows, batches and the
    validation, which takes whole rows, stay the same: its loss is high while most positions are untrained."""
    micro_batch_size: int | None = None
    """Rows a rank takes through the model at a time. Default: the largest power of two that divides its part of the batch and
    fits the card's memory by the estimate of scripts/plan.py; 8 at most on a CPU."""
    activation_checkpointing: bool | None = None
    """Keep of each block only its input and compute the rest again in the backward: less memory for a third more work, the same
    numbers. Default: where otherwise less than 4,096 tokens a micro-step fit."""
    max_steps: int | None = None
    """Optimizer steps of the run. Give this or max_tokens."""
    max_tokens: int | None = None
    """Tokens of the run, rounded up to whole steps. Give this or max_steps."""
    seed: int = 0
    """Seed of the weights, the order of the text and the samples."""
    precision: typing.Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: bf16 weights and products with fp32 master weights, gradient sums and moments. auto: bf16 where the hardware
    has it, else fp32."""
    compile: bool | None = None
    """torch.compile the model. Default: on a GPU only."""
    kernels: typing.Literal["auto", "fused", "plain"] = "auto"
    """auto: the fastest that the machine has; fused: ours, or an error; plain: torch's."""
    fp8_head: bool = False
    """Compute the products of the language-model head in fp8 (Ada, Hopper or newer): faster, and less exact."""
    output_dir: str | None = None
    """The run folder. Default: runs/<name of the YAML file>."""
    resume: str = "auto"
    """auto: continue from the newest checkpoint of the run folder, if any; none: start afresh, refused on a folder that
    holds a run; the path of a checkpoint; or `hub:USER/NAME@REVISION`, what a run with push_state has pushed there."""
    zero_init_projections: bool = False
    """Start the last matrix of each attention and MLP (c_proj) at zero, so that every block begins as the identity (Zhang et
    al. 2019, Fixup; Yang et al. 2022, mu-Transfer). Else they are normal, scaled by 1/sqrt(2 n_layer), as GPT-2's."""
    init_from: str | None = None
    """Start from these weights instead of random ones: a folder or `USER/NAME[@revision]` with any GPT-2 checkpoint of the
    same n_layer, n_head, n_embd, n_positions and vocabulary. Default: from scratch."""
    save_every: int = 500
    """Steps between checkpoints; 0 saves only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this (a multiple of save_every) are never deleted; 0: no others are kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss as well (of those saved at a step with one)."""
    save_at: str | None = None
    """Steps at which to save as well, as in `229,458`; these checkpoints are never deleted. Runs of other lengths can branch
    off them, see schedule."""
    keep_model: bool = True
    """false: neither save, sample nor export at the end, for trials of which only metrics.jsonl is wanted."""
    log_every: int = 10
    """Steps between progress lines. metrics.jsonl has every step regardless."""


@dataclass(kw_only=True)
class FaultConfig:
    max_hours: float | None = None
    """Hours after which the run saves and stops by itself, with code 75, early enough for the save. Default: no limit."""
    watchdog_seconds: float = 540
    """End the run, with the rank and what it was doing named, if a rank is frozen, waits for text, computes or saves for this
    long; 0 switches that off. Reading from the Hub is retried for up to seven minutes: shorter ends such runs sooner."""
    on_nonfinite: typing.Literal["stop", "rollback"] = "stop"
    """After three steps in a row whose gradient is not finite (each is left out): stop, or go back to the last checkpoint
    before them and leave their rows out."""
    spike_action: typing.Literal["none", "skip", "rollback"] = "none"
    """What to do about a step whose loss lies far above those before it. skip: leave out its update; rollback: go back to the
    last checkpoint before it and leave its rows out. The rows are recorded in skipped_rows.jsonl. Sixteen in a row are no
    spikes but another level of the loss, which is accepted."""
    spike_threshold: float = 6.0
    """Standard deviations above the mean of the steps accepted before, from which a loss is a spike."""
    spike_window: int = 128
    """Accepted steps that a loss is compared with. Before there are a quarter of them no loss is a spike."""


@dataclass(kw_only=True)
class EvaluationConfig:
    eval_every: int = 250
    """Steps between validation losses, which are also taken at step 0 and at the end; 0 takes only those two."""
    hellaswag_every: int = 0
    """Steps between evaluations on HellaSwag in the loop, in both styles, with another at the end; 0 for none. The items are
    those of evaluate_data."""
    hellaswag_items: int | None = None
    """First HellaSwag items to take in the loop. Default: all 10,042."""
    sample_every: int = 1000
    """Steps between generated samples, which are also taken at the end; 0 takes only those."""
    evaluate_tasks: str = "hellaswag"
    """Tasks of the finished model, separated by commas: lm-evaluation-harness', and hellaswag_completion, HellaSwag in llm.c's
    style; `none` for none."""
    evaluate_data: str | None = None
    """Local copy of HellaSwag's items instead of the Hub's, .jsonl or .parquet, a file or a folder; `mini` is the small set in
    this package."""
    evaluate_limit: int | None = None
    """First items of each task to evaluate. Default: all."""


@dataclass(kw_only=True)
class MonitorConfig:
    report_to: typing.Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """A tracker that gets what metrics.jsonl has; its package must be installed."""
    price_per_hour: float | None = None
    """Dollars that the whole machine costs an hour, for the money in the live view, the report and the model card. Default:
    unknown."""


@dataclass(kw_only=True)
class PublishConfig:
    export_dtype: typing.Literal["fp32", "bf16"] = "fp32"
    """Weights of the export: the fp32 masters, or these rounded to bf16 in half the space."""
    push_to_hub: str | None = None
    """Push the finished model to this repository, `USER/NAME`, with the token of HF_TOKEN or of `hf auth login`. It is made if
    it does not exist; one that another run or somebody else made is refused. Default: nothing leaves the machine."""
    push_every: int = 0
    """Steps between checkpoints that are pushed to branches `step-N` while the training goes on (a multiple of save_every);
    0 pushes only the finished model."""
    push_state: bool = False
    """Push the checkpoint itself, too, three times the size of the model, so that `resume hub:USER/NAME@step-N` can continue
    the run."""
    push_patience: float = 120
    """Seconds to keep trying at the end of the run when the Hub does not answer. What is left is pushed at the next start."""
    hub_private: bool = True
    """Make the repository private, and push nothing to one that is not. false: make it public."""
    hub_into_existing: bool = False
    """Push also into a repository that this run did not make, over files of the same names."""


@dataclass(kw_only=True)
class Config(
    DataConfig, ModelConfig, OptimizerConfig, TrainingConfig, FaultConfig, EvaluationConfig, MonitorConfig, PublishConfig
):
    """All fields of a run, flat, as in the YAML file and on the command line."""

    dry_run: bool = False
    """Print the resolved configuration and the derived numbers, check what can be checked, and stop."""
    name: str = field(default="run", metadata={"internal": True})
    """Name of the YAML file without its ending."""


NOT_PART_OF_THE_RUN = frozenset(
    "dry_run name output_dir resume save_every keep_checkpoints log_every eval_every hellaswag_every hellaswag_items "
    "sample_every evaluate_tasks evaluate_data evaluate_limit accept_other_data skip_rows data_workers micro_batch_size "
    "activation_checkpointing compile kernels max_epochs keep_every keep_best max_hours watchdog_seconds on_nonfinite "
    "spike_action spike_threshold spike_window report_to price_per_hour export_dtype push_to_hub push_every push_state "
    "push_patience hub_private hub_into_existing save_at keep_model".split()
)
"""Fields that may differ between a run and its continuation: they change neither the data nor the arithmetic's meaning."""


def config_fields() -> dict[str, dataclasses.Field]:
    """The fields a user may set, by name, in the order of their sections."""
    order = [name for section in (*Config.__bases__, Config) for name in section.__annotations__]
    known = {f.name: f for f in dataclasses.fields(Config) if not f.metadata.get("internal")}
    return {name: known[name] for name in dict.fromkeys(order) if name in known}


def field_docs() -> dict[str, str]:
    """The docstring under each field."""
    docs = {}
    for section in Config.__mro__:
        if not dataclasses.is_dataclass(section):
            continue
        body = ast.parse(inspect.getsource(section)).body[0].body
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[statement.target.id] = " ".join(following.value.value.split())
    return docs


def parse_ranges(text: str | None) -> list[tuple[int, int]]:
    """`1200-1263,5000` as [(1200, 1263), (5000, 5000)].

    Raises:
        ValueError: for anything else, and for a range that ends before it begins.
    """
    ranges = []
    for part in text.split(",") if text else []:
        first, dash, last = part.strip().partition("-")
        ranges.append((int(first), int(last if dash else first)))
        if ranges[-1][0] > ranges[-1][1] or int(first) < 0:
            raise ValueError(part)
    return ranges


def parse_ramp(text: str | None) -> tuple[tuple[int, int], ...]:
    """`131072x1000,262144x500` as ((131072, 1000), (262144, 500)): a value, and for how many steps.

    Raises:
        ValueError: for anything else, and for numbers below 1.
    """
    ramp = []
    for stage in text.split(",") if text else []:
        value, _, steps = stage.strip().partition("x")
        ramp.append((int(value), int(steps)))
        if min(ramp[-1]) < 1:
            raise ValueError(stage)
    return tuple(ramp)


def parse_steps(text: str | None) -> tuple[int, ...]:
    """`229,458` as (229, 458).

    Raises:
        ValueError: for anything else, and for numbers below 1.
    """
    steps = tuple(int(part) for part in text.split(",")) if text else ()
    if min(steps, default=1) < 1:
        raise ValueError(text)
    return steps


def compiles(config: Config, cuda: bool) -> bool:
    """Whether torch.compile makes the model's forward: by itself on a GPU alone."""
    return cuda if config.compile is None else config.compile


def config_hash(config: Config) -> str:
    """Hex sha256 of the fields that make the run what it is: equal for a run and its continuations."""
    fields = {name: getattr(config, name) for name in config_fields() if name not in NOT_PART_OF_THE_RUN}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same values."""
    return yaml.safe_dump(
        {name: getattr(config, name) for name in config_fields() if name != "dry_run"}, sort_keys=False, width=10_000
    )
