"""The results of a scaling run as Markdown, fit for docs/results.md. Imports no torch."""

from __future__ import annotations

from typing import Any

from recipe.overlap import KINDS
from recipe.scaling_run import STAGES, TOLERANCE

TITLES = {
    "speed": "Speed", "profile": "Communication in a step", "losses": "The same losses", "topology": "Other numbers of ranks",
    "kill": "A rank killed",
}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The result of `scripts/scaling.py` as a section: about the machine, a table of the stages, and a table for each."""
    about, stages = result["about"], result["stages"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['device']}, {about['host_gpus'] or 'no'} GPUs in this host, {versions}, "
        + ", ".join(f"{name}={value}" for name, value in about["environment"].items()) + f", {about['seconds']:.0f} s in all.",
        "",
        f"    {about['command']}",
        "",
        *_table(
            ["stage", "result", "seconds"],
            [[TITLES[name], _result(stages[name]), f"{stages[name]['seconds']:.0f}"] for name in STAGES if name in stages],
        ),
    ]  # fmt: skip
    makers = {"speed": _speed, "profile": _profile, "losses": _losses, "topology": _topology, "kill": _kill}
    for name, make in makers.items():
        if stages.get(name, {}).get("rows"):
            lines += ["", f"### {TITLES[name]}", "", *make(stages[name])]
    return "\n".join(lines) + "\n"


def _result(stage: dict[str, Any]) -> str:
    return stage["state"] + (f": {stage['problem']}".replace("|", "/").replace("\n", " ") if stage["problem"] else "")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, rows and ["---"] * len(head), *rows)]


def _speed(stage: dict[str, Any]) -> list[str]:
    head = ["config", "engine", "ranks", "tokens/s", "step, ms", "efficiency", "causal MFU", "waiting for data", "GiB a rank"]
    return _table(
        head,
        [
            [
                row["config"], row["engine"], str(row["ranks"]), f"{row['tokens_per_second']:,.0f}", f"{row['step_ms']:.1f}",
                _percent(row["efficiency"]), _percent(row["mfu"]), f"{row['data_wait_fraction']:.2%}",
                f"{row['peak_memory_bytes'] / 2**30:.1f}" if row["peak_memory_bytes"] else "n/a",
            ]
            for row in stage["rows"]
        ],
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}"


def _profile(stage: dict[str, Any]) -> list[str]:
    head = ["config", "engine", "collective", "calls", "ms", "overlapped", "exposed", "exposed, of the step"]
    kinds = [(row, kind, row[kind]) for row in stage["rows"] for kind in ("all", *dict(KINDS), "other") if kind in row]
    rows = [
        [
            row["config"], row["engine"], kind, str(one["calls"]), f"{one['ms']:.2f}", f"{one['overlapped_ms']:.2f}",
            f"{one['exposed_ms']:.2f}", f"{one['exposed_ms'] / row['span_ms']:.2%}",
        ]
        for row, kind, one in kinds
    ]  # fmt: skip
    waits = ", ".join(
        f"{row['config']} {row['engine']} rank {row['rank']}, {row['all']['ms']:.2f} ms (the longest {row['longest_ms']:.2f})"
        for row in stage["rows"]
    )
    return [
        *_table(head, rows),
        "",
        f"Of the rank that spends least time in collectives, waiting for others included: {waits}.",
    ]


def _losses(stage: dict[str, Any]) -> list[str]:
    head = ["config", "ranks against one", "tokens a step", "steps", "loss from, to", "largest difference", "at step", "mean"]
    head += ["one rank with smaller micro-batches: largest", "mean"]
    return [
        *_table(
            head,
            [
                [
                    f"{row['config']}, {row['precision']}", str(row["ranks"]), f"{row['batch_tokens']:,}", str(row["steps"]),
                    f"{row['first_loss']:.4f}, {row['last_loss']:.4f}", f"{row['largest']:.1e}", str(row["at_step"]),
                    f"{row['mean']:.1e}",
                    *(f"{row['rounding'][key]:.1e}" if row["rounding"] else "n/a" for key in ("largest", "mean")),
                ]
                for row in stage["rows"]
            ],
        ),
        "",
        f"ZeRO-1; {TOLERANCE:g} is allowed.",
    ]  # fmt: skip


def _topology(stage: dict[str, Any]) -> list[str]:
    rows = [
        [str(row["ranks"]), f"{row['from_step']} to {row['to_step']}", f"{row['largest']:.1e}", str(row["at_step"])]
        for row in stage["rows"]
    ]
    said = f"Against the run that nothing disturbed, whose last loss is {stage['last_loss']:.4f}; {TOLERANCE:g} is allowed."
    return [*_table(["ranks", "steps", "largest difference of the loss", "at step"], rows), "", said]


def _kill(stage: dict[str, Any]) -> list[str]:
    (row,) = stage["rows"]
    status = row["status"]
    return [
        f"SIGKILL to rank {row['rank']} of {row['ranks']}: the launcher ended {row['seconds']:.1f} s later with code "
        f"{row['launcher_code']}; status.json: {status['state']}, rank {status['rank']}, step {status['step']}: "
        f"{status['reason']}"
    ]
