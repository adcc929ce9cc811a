"""report.html: its figures are those of metrics.jsonl, at any time and length of a run, on a page that needs nothing else."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from launch import ROOT, metrics
from recipe.config import ConfigError
from recipe.evaluation.references import LLMC_CURVES
from recipe.monitor.charts import MAX_POINTS, MAX_ROWS, Chart, Series, number, steps_series, ticks
from recipe.monitor.metrics import format_duration
from recipe.monitor.report import Report, cost, write_report
from recipe.monitor.run_record import GPT2_VOCAB_SHA256, RunRecord
from run_helpers import training_record, write_run

BATCH = 524_288


class Page(HTMLParser):
    """Figures of a page: the points of their lines in the units of their axes, and their tables; every link; every tag."""

    def __init__(self, text: str):
        super().__init__()
        self.figures: dict[str, dict] = {}
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = text
        self._figure, self._cell = None, None
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "xlink:href")]
        if tag == "figure":
            self._figure = self.figures[given["id"]] = {"lines": [], "rows": [], "title": ""}
        if self._figure is None:
            return
        if tag == "svg" and "data-x-end" in given:
            self._figure |= {"x": float(given["data-x-end"])}
            self._figure |= {"low": float(given["data-y-min"]), "high": float(given["data-y-max"])}
        elif tag == "path" and given.get("class") == "line" and "x" in self._figure:
            self._figure["lines"].append([self._place(point) for point in re.split("[LM]", given["d"][1:])])
        elif tag == "tr":
            self._figure["rows"].append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._figure = None
        elif tag in ("td", "th") and self._figure and self._cell is not None:
            self._figure["rows"][-1].append(self._cell)
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell += data
        elif self._figure is not None:
            self._figure["title"] += data

    def _place(self, point: str) -> tuple[float, float]:
        x, y = map(float, point.split())
        figure = self._figure
        return figure["x"] * x / 1000, figure["high"] - (figure["high"] - figure["low"]) * y / 1000


def html(*runs: Path, **options: object) -> str:
    """The page, without the PNG files."""
    return Report([RunRecord.read(run) for run in runs], **options).html()


def close(drawn: list[tuple[float, float]], expected: list[tuple[float, float]], figure: dict) -> bool:
    """Whether points were drawn where they belong, to a five-thousandth of the figure."""
    width, height = figure["x"], figure["high"] - figure["low"]
    return len(drawn) == len(expected) and all(
        abs(a - c) <= width / 5000 and abs(b - d) <= max(height, abs(d)) / 5000
        for (a, b), (c, d) in zip(drawn, expected, strict=True)
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", 60, "--price_per_hour", "14")


def test_the_figures_in_the_page_equal_metrics_jsonl(run: Path) -> None:
    page = Page(html(run))
    records = metrics(run)
    training = [r for r in records if "train_loss" in r]
    validation = [r for r in records if "val_loss" in r]
    loss = page.figures["loss_tokens"]
    lines = loss["lines"]
    assert close(lines[0], [(r["tokens"], r["train_loss"]) for r in training], loss)
    assert close(lines[1], [(r["tokens"], r["val_loss"]) for r in validation], loss)
    timed = page.figures["loss_time"]
    assert "seconds, wall clock" in timed["title"]
    assert close(timed["lines"][0], [(r["wall_seconds"], r["train_loss"]) for r in training], timed)
    clock = {0: 0.0} | {r["step"]: r["wall_seconds"] for r in training}
    assert close(timed["lines"][1], [(clock[r["step"]], r["val_loss"]) for r in validation], timed)
    for name, field in {
        "learning_rate": "lr", "gradient_norm": "grad_norm", "throughput": "tokens_per_second", "mfu": "mfu",
        "data_wait": "data_wait_fraction", "gpu_memory": "gpu_memory_gib",
    }.items():  # fmt: skip
        figure = page.figures[name]
        assert close(figure["lines"][0], [(r["tokens"], r[field]) for r in training], figure), name


def test_the_table_below_a_figure_has_its_numbers(run: Path) -> None:
    rows = Page(html(run)).figures["loss_tokens"]["rows"]
    assert rows[0] == ["run", "step", "tokens", "training loss", "validation loss"]
    training = {r["step"]: r["train_loss"] for r in metrics(run) if "train_loss" in r}
    validation = {r["step"]: r["val_loss"] for r in metrics(run) if "val_loss" in r}
    own = [row for row in rows[1:] if row[0] == "run"]
    assert [row[4] for row in own if row[4]] == [f"{loss:.4f}" for loss in validation.values()]
    shown = {int(row[1]): row[3] for row in own if row[3]}
    assert len(shown) >= MAX_ROWS and {1, 60} <= set(shown)
    assert shown == {step: f"{training[step]:.4f}" for step in shown}
    published = [row for row in rows[1:] if row[0] == "llm.c 8×A100"]
    assert [row[4] for row in published] == [f"{p.val_loss:.4f}" for p in LLMC_CURVES["8×A100"]]


def test_a_long_run_is_drawn_by_means_that_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20_000)
    began = time.monotonic()
    path = write_report([run])
    assert time.monotonic() - began < 30
    assert path.stat().st_size < 400_000
    page = Page(path.read_text())
    figure = page.figures["loss_tokens"]
    training = [r for r in metrics(run) if "train_loss" in r]
    buckets = [training[n : n + 50] for n in range(0, 20_000, 50)]
    assert len(buckets) == MAX_POINTS
    means = [(b[-1]["tokens"], sum(r["train_loss"] for r in b) / 50) for b in buckets]
    assert close(figure["lines"][0], means, figure)
    assert "a point is the mean of 50 steps, the band their lowest to highest" in figure["title"]
    assert re.search(r"The first steps, above \d+\.\d\d, lie off the top", figure["title"])


def test_a_run_can_be_looked_at_before_its_first_step_and_after_its_first(tmp_path: Path) -> None:
    started = write_run(tmp_path / "started", 20, records=[], state="running")
    assert "Loss against" not in html(started)
    one = write_run(tmp_path / "one", 20, records=[training_record(1, BATCH)], state="running")
    page = Page(html(one))
    assert "loss_tokens" in page.figures and "1 of 20 steps" in page.text
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(one / "config.yaml", bare)
    assert "starting" in html(bare)


def test_a_cut_off_line_does_not_hinder(run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 61, "tok')
    assert "60 of 60 steps" in html(run)


def test_it_needs_nothing_from_elsewhere(run: Path) -> None:
    page = Page(html(run))
    assert set(page.links) == {"data:,"}
    assert "script" not in page.tags and not re.search(r"url\(|@import|javascript:|\son\w+=", page.text)


def test_text_from_the_run_cannot_become_markup(run: Path) -> None:
    evil = "<script>alert(1)</script>&amp;"
    sample = {"step": 10, "samples": [{"prompt": "The", "continuation": evil, "greedy": "\n" * 40}]}
    (run / "eval" / "samples-step-00000010.json").write_text(json.dumps(sample))
    page = Page(html(run))
    assert "script" not in page.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in page.text and "[39 empty lines]" in page.text


def test_every_figure_has_words_for_those_who_do_not_see_it(run: Path) -> None:
    page = Page(html(run))
    titles = re.findall(r'role="img" aria-labelledby="(.*?)".*?<title id="(.*?)">(.*?)</title>', page.text, re.DOTALL)
    assert len(titles) == len(page.figures) >= 7
    assert all(label == name and len(words) > 40 for label, name, words in titles)
    assert all(figure["rows"] for figure in page.figures.values())


def test_styles_of_hellaswag_have_their_own_figures_and_references(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 300)
    scores = {"hellaswag_acc_norm": 0.2801, "hellaswag_completion_acc_norm": 0.2702, "hellaswag_n": 10_042}
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps({"step": 300, "tokens": 300 * BATCH, **scores}) + "\n")
    figures = Page(html(run)).figures
    harness, completion = figures["hellaswag_lm_eval"], figures["hellaswag_completion"]
    assert [r[3] for r in harness["rows"][1:]] == ["0.2801"]
    assert "gpt2 0.3114" in harness["title"] and "0.2955" not in harness["title"] and "llm.c 124M" not in harness["title"]
    assert [r[3] for r in completion["rows"][1:] if r[0] == "run"] == ["0.2702"]
    assert "gpt2 0.2955" in completion["title"] and "0.3114" not in completion["title"] and "llm.c 124M" in completion["title"]
    assert len(completion["lines"]) == 2 and not harness["lines"]  # llm.c's two runs with scores, a point of ours


def test_a_reference_that_begins_after_the_end_of_the_run_is_named_not_drawn(tmp_path: Path) -> None:
    """llm.c's first value after step 0 is at 131M tokens: a shorter run would have it in its legend and not in its figure."""
    short, long = (Page(html(write_run(tmp_path / str(n), n))).figures["loss_tokens"] for n in (100, 300))
    assert len(short["lines"]) == 2 and len(long["lines"]) == 2 + len(LLMC_CURVES)
    note = "llm.c 124M, its three published runs: not drawn, its first value after the start is at 131.1M tokens"
    assert short["title"].count(note) == 1 and note not in long["title"]
    assert [row for row in short["rows"] if row[0] == "llm.c 8×A100"]


def test_the_fall_at_the_start_does_not_take_up_loss_against_time(tmp_path: Path) -> None:
    """Of a run of minutes, whose first step comes after a sixth of them."""
    records = [training_record(s, 65_536, wall_seconds=32 + 0.12 * s) for s in range(1, 764)]
    records += [{"step": 0, "tokens": 0, "val_loss": 10.9}, {"step": 763, "tokens": 763 * 65_536, "val_loss": 4.7}]
    figure = Page(html(write_run(tmp_path / "run", 763, records=records))).figures["loss_time"]
    early = next(r["train_loss"] for r in records if r["wall_seconds"] > 32 + 0.06 * (763 * 0.12))
    assert early < figure["high"] < 0.9 * records[0]["train_loss"]
    assert re.search(r"The first steps, above \d+\.\d\d, lie off the top", figure["title"])


def test_words_on_a_level_keep_clear_of_the_points() -> None:
    chart = Chart("x", "x", "x", "y", "tokens", levels=[("chance", 0.25), ("gpt2", 0.31)])
    chart.series = [Series("x", [50.0], [0.253], 0, [0.249], [0.257], dots=True)]
    assert chart.fit().level_side(0.25) == "left"
    chart.series = [Series("x", [1.0, 25.0, 50.0], [0.25, 0.28, 0.309], 0, dots=True)]
    assert [chart.fit().level_side(level) for level in (0.25, 0.31)] == ["right", "left"]


def test_no_reference_beside_what_it_does_not_compare_with(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 60, "--data", "installed-docs", "--evaluate_data", "mini")
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps({"step": 40, "tokens": 40 * BATCH, "hellaswag_acc_norm": 0.25, "hellaswag_n": 64}) + "\n")
    figures = Page(html(run)).figures
    assert "losses of other texts do not compare" in figures["loss_tokens"]["title"]
    assert not [row for row in figures["loss_tokens"]["rows"] if row[0].startswith("llm.c")]
    assert "no reference compares" in figures["hellaswag_lm_eval"]["title"]
    assert "gpt2" not in figures["hellaswag_lm_eval"]["title"]
    figures = Page(html(run, llmc=True)).figures
    assert [row for row in figures["loss_tokens"]["rows"] if row[0].startswith("llm.c")]


def test_evaluations_of_the_export(run: Path) -> None:
    data = {"name": "items.jsonl", "sha256": "12"}
    numbers = {"n": 64, "acc": 0.25, "acc_stderr": 0.05, "acc_norm": 0.3, "acc_norm_stderr": 0.06, "data": data}
    (run / "eval" / "hellaswag.json").write_text(json.dumps({"tasks": {"hellaswag": numbers}, "step": 60}))
    text = html(run)
    for metric, value in {"acc": "0.2500 ± 0.0500", "acc_norm": "0.3000 ± 0.0600"}.items():
        assert f"<td>hellaswag (items.jsonl)</td><td>64</td><td>{metric}</td><td>{value}</td>" in text


def test_styles_of_the_exports_evaluations_have_their_own_tables(run: Path) -> None:
    for task, value in (("hellaswag", 0.3), ("hellaswag_completion", 0.29)):
        numbers = {"n": 10_042, "acc_norm": value, "acc_norm_stderr": 0.0046, "data": {"name": "Rowan/hellaswag"}}
        (run / "eval" / f"{task}.json").write_text(json.dumps({"tasks": {task: numbers}, "step": 60}))
    tables = html(run).partition('id="results"')[2].partition("</section>")[0].split("</table>")
    harness, completion = (next(t for t in tables if words in t) for words in ("By lm-evaluation-harness", "completion style"))
    assert "0.3000 ± 0.0046" in harness and "0.2900" not in harness
    assert "0.2900 ± 0.0046" in completion and "0.3000" not in completion


def test_a_later_small_evaluation_does_not_stand_for_the_whole_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 60)
    with open(run / "metrics.jsonl", "a") as handle:
        for n, kind, score in ((10_042, "whole", 0.28), (64, "mini", 0.5), (100, "part", 0.4)):
            line = {"step": 60, "hellaswag_acc_norm": score, "hellaswag_n": n, "hellaswag_kind": kind}
            handle.write(json.dumps(line) + "\n")
    page = Page(html(run))
    assert '<dd>0.2800</dd><dd class="about">acc_norm, 10,042 items</dd>' in page.text
    figure = page.figures["hellaswag_lm_eval"]
    assert [(row[3], row[5]) for row in figure["rows"][1:]] == [("0.2800", "10,042"), ("0.4000", "100")]
    assert "gpt2 0.3114" in figure["title"] and "scores on 64 items of our own are left out" in figure["title"]
    assert "scores are of 100 items, the references of all 10,042" in figure["title"]


@pytest.mark.parametrize("kind, n, own", [("mini", 64, True), ("part", 100, False)])
def test_a_small_evaluation_alone_says_so(tmp_path: Path, kind: str, n: int, own: bool) -> None:
    """Of a run whose configuration says nothing of it; our own items are not compared with anything."""
    run = write_run(tmp_path / "run", 60)
    with open(run / "metrics.jsonl", "a") as handle:
        handle.write(json.dumps({"step": 60, "hellaswag_acc_norm": 0.5, "hellaswag_n": n, "hellaswag_kind": kind}) + "\n")
    page = Page(html(run))
    title = page.figures["hellaswag_lm_eval"]["title"]
    assert ("gpt2 0.3114" in title and "the references of all 10,042" in title) != own
    assert ("no reference compares" in page.text) == own
    assert f"acc_norm, {n} {'of our own ' * own}items</dd>" in page.text


def test_the_real_hellaswag_of_a_quickstart_run_is_not_our_own(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 60, "--evaluate_data", "mini")
    scores = {"hellaswag_acc_norm": 0.25, "hellaswag_n": 64}, {"hellaswag_acc_norm": 0.28, "hellaswag_n": 10_042}
    with open(run / "metrics.jsonl", "a") as handle:  # the first of an older version's loop
        handle.write(json.dumps({"step": 60, **scores[0]}) + "\n")
        handle.write(json.dumps({"step": 60, **scores[1], "hellaswag_kind": "whole"}) + "\n")
    page = Page(html(run))
    assert "acc_norm, 10,042 items</dd>" in page.text
    assert "gpt2 0.3114" in page.figures["hellaswag_lm_eval"]["title"]


@pytest.mark.parametrize(
    "known, tokenizer, drawn, millions",
    [
        ({}, "openai-community/gpt2", True, "124.4M"),  # an old run
        ({}, "train:8192", False, "92.1M"),
        ({"vocab_size": 50_257, "vocab_sha256": GPT2_VOCAB_SHA256}, "copies/gpt2", True, "124.4M"),
        ({"vocab_size": 50_257, "vocab_sha256": "0" * 64}, "runs/deutsch/export", False, "124.4M"),
        ({"vocab_size": 8192, "vocab_sha256": "0" * 64}, "openai-community/gpt2", False, "92.1M"),  # of prepared tokens
    ],
)
def test_the_tokens_say_what_compares(tmp_path: Path, known: dict, tokenizer: str, drawn: bool, millions: str) -> None:
    run = write_run(tmp_path / "run", 60)
    set_fields(run, "config.yaml", tokenizer=tokenizer)
    set_fields(run, "environment.json", **known)
    page = Page(html(run))
    assert any(row[0].startswith("llm.c") for row in page.figures["loss_tokens"]["rows"]) == drawn
    assert ("FineWeb in GPT-2's tokens" in page.figures["loss_tokens"]["title"]) != drawn
    assert f"<dt>Parameters</dt><dd>{millions}</dd>" in page.text


def set_fields(run: Path, name: str, **values: object) -> None:
    fields = yaml.safe_load((run / name).read_text()) | values
    (run / name).write_text(json.dumps(fields))  # which is YAML, too


def start(step: int, ranks: int = 8, device: str = "A100", **lost: float) -> str:
    fields = {"time": "2026-11-24T12:00:00+00:00", "step": step, "ranks": ranks, "engine": "Zero1Engine", "device": device}
    return json.dumps(fields | {"lost_steps": 0, "lost_seconds": 0.0} | lost) + "\n"


def test_a_branch_counts_its_own_part_alone(tmp_path: Path) -> None:
    """Steps 801 to 900 of 1,000 are its own: 0.35 s each and a minute before, by the wall clock."""
    records = [training_record(s, BATCH, wall_seconds=60 + 0.35 * (s - 800)) for s in range(801, 901)]
    run = write_run(tmp_path / "run", 1000, "--price_per_hour", "36", records=records, state="running")
    (run / "starts.jsonl").write_text(start(800))
    rows = [row for row in cost(RunRecord.read(run), None) if row[0].startswith(("a billion", "all", "the whole"))]
    assert rows == [
        ["a billion tokens", format_duration(95 * 1e9 / (100 * BATCH)), f"{95 * 1e9 / (100 * BATCH) / 100:,.2f}"],
        ["all from step 800 on, at the rate so far", "3m10s", "1.90"],
    ]
    text = html(run)
    assert "of a run that branched off another one, its own part alone" in text
    assert '<dt>Time</dt><dd>1m35s</dd><dd class="about">wall clock, from step 800 on</dd>' in text


def test_a_run_on_several_machines_has_no_dollars(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 60, "--price_per_hour", "36")
    (run / "starts.jsonl").write_text(start(0) + start(50, 1, "H100", lost_steps=2, lost_seconds=0.66))
    text = html(run)
    assert "<dt>Money</dt>" not in text and "<td>8 × A100, then 1 × H100</td>" in text
    assert "a run on several machines has no dollars" in text
    assert "<dt>Money</dt>" not in html(run, price_per_hour=72)
    (run / "starts.jsonl").write_text(start(0) + start(50))
    assert "<dt>Money</dt>" in html(run) and "several machines" not in html(run)


def test_samples_from_beyond_where_the_run_went_back_to_are_not_shown(run: Path) -> None:
    for step in (20, 60, 80):
        sample = {"step": step, "samples": [{"prompt": "The", "continuation": f" one of {step}", "greedy": ""}]}
        (run / "eval" / f"samples-step-{step:08d}.json").write_text(json.dumps(sample))
    text = html(run)
    assert "one of 20" in text and "one of 60" in text and "one of 80" not in text


def test_restarts_skipped_steps_and_money(tmp_path: Path) -> None:
    records = [training_record(step, BATCH, skipped=int(step == 30)) for step in range(1, 61)]
    records[29]["train_loss"] = None
    run = write_run(tmp_path / "run", 60, "--price_per_hour", "36", records=records)
    (run / "starts.jsonl").write_text(start(0) + start(20, lost_steps=7, lost_seconds=2.5))
    text = html(run)
    assert '<dt>Restarts</dt><dd>1</dd><dd class="about">7 steps done again</dd>' in text
    assert "2026-11-24 12:00:00 UTC" in text and 'class="mark" d="M32' in text  # 20 of 60 steps, and room behind
    mark = re.findall(r'class="mark" d="M([\d.]+) ', text.partition('id="loss_time"')[2].partition("</figure>")[0])
    went_on, end = 60 + 0.35 * 21 - 0.33, 60 + 0.35 * 60  # against time, where the step after the checkpoint's began
    assert [float(x) for x in mark] == [pytest.approx(1000 * went_on / (1.02 * end), abs=0.01)]
    drawn = [
        re.findall(r'class="line" d="(.*?)"', text.partition(f'id="{name}-title"')[2])[0]
        for name in ("loss_tokens", "loss_time")
    ]
    assert [path.count("M") for path in drawn] == [1, 2]  # no line through the time between the starts
    assert drawn[1].split("M")[1].count("L") == 19
    assert "<dt>Skipped steps</dt><dd>1</dd>" in text
    assert '<tr><th scope="row">run</th><td>30</td><td>gradient not finite</td><td>left out</td>' in text
    seconds = 60 + 0.35 * 60
    assert f"<dt>Money</dt><dd>${36 * seconds / 3600:.2f}</dd>" in text
    assert f"<td>in all</td><td>1m21s</td><td>{36 * seconds / 3600:.2f}</td>" in text
    assert "<dt>Money</dt><dd>$1.62</dd>" in html(run, price_per_hour=72)


def test_two_runs_are_compared(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", 60), write_run(tmp_path / "b", 60, "--learning_rate", "0.002")
    path = write_report([a, b], tmp_path / "out" / "comparison.html")
    page = Page(path.read_text())
    assert "<td>0.0006</td><td>0.002</td>" in page.text
    differences = page.text.partition('id="differences"')[2].partition("</section>")[0]
    assert "learning_rate" in differences and "weight_decay" not in differences and "(+0.0000)" in differences
    assert len(page.figures["learning_rate"]["lines"]) == 2
    assert {row[0] for row in page.figures["loss_tokens"]["rows"][1:]} >= {"a", "b"}
    for run, said in ((a, "of a"), (b, "of b")):
        samples = [{"prompt": p, "continuation": f" {said}", "greedy": ""} for p in ("The", "Once")]
        (run / "eval" / "samples-step-00000060.json").write_text(json.dumps({"step": 60, "samples": samples}))
    told = html(a, b).partition('id="samples"')[2].partition("</section>")[0]
    found = re.findall(r"“(\w+)”, not picked|>(\w), step 60<|</b> (of \w)<", told)
    one = [("", "a", ""), ("", "", "of a"), ("", "b", ""), ("", "", "of b")]  # by prompt, so that the runs stand together
    assert found == [("The", "", ""), *one, ("Once", "", ""), *one]
    assert (tmp_path / "out" / "plots" / "loss_tokens.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "x" / "run", 20), write_run(tmp_path / "y" / "run", 20)
    assert f"{b}</th>" in html(a, b)


def test_a_run_without_a_wall_clock_is_compared_by_its_steps(tmp_path: Path) -> None:
    old = [{k: v for k, v in training_record(s, BATCH).items() if k != "wall_seconds"} for s in range(1, 61)]
    a, b = write_run(tmp_path / "a", 60), write_run(tmp_path / "b", 60, records=old)
    figure = Page(html(a, b)).figures["loss_time"]
    assert "training steps alone" in figure["title"]
    for line in (figure["lines"][0], figure["lines"][2]):  # the old run has no validation losses
        assert math.isclose(line[-1][0], 60 * 0.33, rel_tol=1e-3)


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 20, state="failed", reason="OutOfMemoryError: 3 GiB", rank=3)
    assert "failed at step 20 on rank 3: OutOfMemoryError: 3 GiB" in html(run)


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"nowhere: no such run; there are {re.escape(str(run))}"):
        write_report([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="holds no run"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="at most 6"):
        write_report([run] * 7)


def test_the_command(run: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "report.py")]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == f"{run / 'report.html'}\n" and not done.stderr
    assert {p.name for p in (run / "plots").iterdir()} >= {"loss_tokens.png", "loss_time.png", "learning_rate.png"}
    done = subprocess.run([*command, str(run / "not")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no such run" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian's package is chromium)")
    return found


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 1200), ("light", 390)])
def test_a_browser_shows_it_without_complaint(browser: str, tmp_path: Path, scheme: str, width: int) -> None:
    from PIL import Image

    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(html(write_run(tmp_path / "a", 60), write_run(tmp_path / "b", 60, "--learning_rate", "0.002")))
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", f"--screenshot={shot}",
            f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shot.is_file(), done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    picture = Image.open(shot).convert("RGB")
    assert picture.width == width
    assert (sum(picture.getpixel((2, 2))) < 150) == (scheme == "dark")
    colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours or scheme == "dark"
    assert {(0x56, 0xB4, 0xE9), (0xF0, 0x8C, 0x3C)} <= colours or scheme == "light"


def test_a_print_does_not_part_words_from_what_they_head(browser: str, tmp_path: Path) -> None:
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext on this machine (Debian's package is poppler-utils)")
    runs = [write_run(tmp_path / name, 60) for name in "ab"]
    for run in runs:
        # Texts of many lengths, so that pages end at many places.
        samples = [
            {"prompt": f"Prompt {n}", "continuation": " word" * (30 + 17 * n), "greedy": " same" * (150 - 9 * n)}
            for n in range(16)
        ]
        (run / "eval" / "samples-step-00000060.json").write_text(json.dumps({"step": 60, "samples": samples}))
    path, paper = tmp_path / "report.html", tmp_path / "report.pdf"
    path.write_text(html(*runs))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--no-pdf-header-footer", f"--print-to-pdf={paper}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert paper.is_file(), done.stderr
    text = subprocess.run(["pdftotext", "-layout", paper, "-"], capture_output=True, text=True, timeout=60).stdout
    pages = [page.rstrip().splitlines() for page in text.split("\f") if page.strip()]
    assert len(pages) > 6
    heads = re.compile(
        r"\s*(.*step 60(, greedy)?|.*not picked|Environment|Starts|run +what.*|Time and money|dollars need.*)\s*"
    )
    assert not [page[-1] for page in pages if heads.fullmatch(page[-1])]
    assert not re.search(r"^\s*Configuration\n+\s*Environment", text, re.MULTILINE)  # a heading of nothing but a closed fold


def test_points_stand_for_equally_many_steps_and_know_their_extremes() -> None:
    values = [float(n % 10) for n in range(4000)]
    values[1234] = None
    values[2000] = 99.0
    line, width = steps_series("x", list(range(4000)), values, 0)
    assert width == 10 and len(line.x) == 400 and line.x[-1] == 3999
    assert max(line.high) == 99.0 and min(line.low) == 0.0
    known = [v for v in values if v is not None]
    assert math.isclose(sum(y * 10 for y in line.y[:-1]) + line.y[-1] * 9, sum(known))


def test_short_lines_are_drawn_as_they_are() -> None:
    line, width = steps_series("x", [1, 2, 3], [3.0, None, 1.0], 0)
    assert (width, line.x, line.y, line.low) == (1, [1, 3], [3.0, 1.0], [])


@pytest.mark.parametrize("low, high", [(0, 1), (3.1, 11.2), (0, 9.9e9), (-0.02, 0.31), (0, 6e-4)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 3 <= len(found) <= 9 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    steps = {round((b - a) / (high - low), 6) for a, b in zip(found, found[1:], strict=False)}
    assert len(steps) == 1


def test_ticks_on_an_axis_are_told_apart() -> None:
    chart = Chart("x", "x", "x", "y", "tokens", "{:.1%}", series=[Series("x", [0.0, 1.0], [0.0, 0.001], 0)]).fit(from_zero=True)
    words = [word for _, word in chart.y_ticks()]
    assert len(set(words)) == len(words) > 3 and words[1] == "0.02%"


@pytest.mark.parametrize(
    "value, unit, text", [(2.5e9, "tokens", "2.5B"), (0, "tokens", "0"), (491_520, "tokens", "491.5k"), (1.5, "hours", "1.5")]
)
def test_numbers_on_an_axis(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text
