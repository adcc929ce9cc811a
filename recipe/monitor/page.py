"""HTML without a script: charts whose lines stretch with the page while their words keep their size, tables, samples."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from recipe.monitor.charts import Chart, Series, number, ticks

DASHES = ("", "7 4", "2 4", "9 4 2 4", "12 3", "4 2 1 2")
"""Of the runs' lines, so that they can be told apart without colour."""
NUM_COLOURS = 6
SIZE = 1000
"""Width and height of a figure's own coordinates; what it takes on the screen is up to the style."""


def page(title: str, sections: list[str]) -> str:
    """A whole document."""
    style = files("recipe.monitor").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str, name: str = "") -> str:
    """A section with a heading, or nothing if it has no parts."""
    body = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{body}\n</section>' if body else ""


def paragraph(text: str, style: str = "note") -> str:
    return f'<p class="{style}">{escape(text)}</p>' if text else ""


def table(header: list[str], rows: list[list[str]], caption: str = "", style: str = "") -> str:
    """A table whose first column names its rows; on a narrow screen it scrolls on its own."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    words = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
    label = escape(caption or header[0] or "table", quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table class="{style}">{words}\n'
        f"{head}<tbody>\n{body}\n</tbody></table></div>"
    )


def fold(summary: str, body: str) -> str:
    """Something that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}\n</details>" if body else ""


def cards(items: list[tuple[str, str, str]]) -> str:
    """Numbers that stand out: name, value and a word about it."""
    cells = "\n".join(
        f'<div class="card"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="about">{escape(about)}</dd></div>'
        for name, value, about in items
    )
    return f'<dl class="cards">\n{cells}\n</dl>'


def figure(chart: Chart) -> str:
    """A chart, its legend, and the numbers behind it."""
    if not any(s.x for s in chart.series):
        return ""
    items = [_legend_item(f"{_class(s)}{' dotted' * s.dots}", s.label, _dash(s)) for s in chart.series if s.in_legend]
    items += [_legend_item("mark", "restart", ' stroke-dasharray="4 3"')] if chart.marks else []
    legend = f'<ul class="legend">{"".join(items)}</ul>\n' if len(items) > 1 else ""
    notes = f"<p class='note'>{escape(' '.join(chart.notes))}</p>" if chart.notes else ""
    numbers = fold("Numbers", table(chart.header, chart.rows, f"{chart.title}: numbers", "numbers"))
    return (
        f'<figure id="{chart.name}">\n<figcaption>{escape(chart.title)}</figcaption>\n{legend}'
        f'<p class="axis">{escape(chart.y_label)}</p>\n{_plot(chart)}\n<p class="axis x">{escape(chart.x_label)}</p>\n'
        f"{notes}\n{numbers}\n</figure>"
    )


def _legend_item(kind: str, label: str, dash: str) -> str:
    path = "M15 -3V13" if kind == "mark" else "M0 5H30"
    dots = '<path class="dots" d="M15 5h0"/>' if kind.endswith("dotted") else ""
    key = f'<svg class="key {kind}" viewBox="0 0 30 10" aria-hidden="true"{dash}><path class="line" d="{path}"/>{dots}</svg>'
    return f"<li>{key}{escape(label)}</li>"


def _class(s: Series) -> str:
    kind = "ref" if s.colour is None else f"c{s.colour % NUM_COLOURS}"
    return kind + (" faint" if s.faint else "")


def _dash(s: Series) -> str:
    dash = "5 4" if s.colour is None else DASHES[s.colour % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _plot(chart: Chart) -> str:
    def px(x: float) -> str:
        return f"{SIZE * x / chart.x_end:.2f}".rstrip("0").rstrip(".")

    def py(y: float) -> str:
        return f"{SIZE * (chart.y_max - y) / (chart.y_max - chart.y_min):.2f}".rstrip("0").rstrip(".")

    x_ticks, y_ticks = ticks(0, chart.x_max, 4), chart.y_ticks()
    lines = [f'<path class="grid" d="M0 {py(y)}H{SIZE}"/>' for y, _ in y_ticks]
    lines += [f'<path class="mark" d="M{px(x)} 0V{SIZE}"/>' for x in chart.marks]
    lines += [f'<path class="level" d="M0 {py(level)}H{SIZE}"/>' for _, level in chart.levels]
    for s in chart.series:
        points = [f"{px(x)} {py(y)}" for x, y in zip(s.x, s.y, strict=True)]
        shapes = []
        if s.low and not s.dots:
            edge = [f"{px(x)} {py(y)}" for x, y in zip(s.x, s.high, strict=True)]
            back = [f"{px(x)} {py(y)}" for x, y in zip(s.x, s.low, strict=True)]
            around = "".join(f"M{'L'.join(edge[piece] + back[piece][::-1])}Z" for piece in s.pieces())
            shapes.append(f'<path class="band" d="{around}"/>')
        elif s.low:
            bars = zip(s.x, s.low, s.high, strict=True)
            shapes.append(f'<path class="bar" d="{"".join(f"M{px(x)} {py(a)}V{py(b)}" for x, a, b in bars)}"/>')
        if len(points) > 1:
            through = "".join(f"M{'L'.join(points[piece])}" for piece in s.pieces())
            shapes.append(f'<path class="line" d="{through}"{_dash(s)}/>')
        if s.dots or len(points) == 1:
            for x, y, point in zip(s.x, s.y, points, strict=True):
                words = f"{s.label}: {chart.y_format.format(y)} at {number(x, chart.x_unit)}"
                shapes.append(f'<path class="dots" d="M{point}h0"><title>{escape(words)}</title></path>')
        lines.append(f'<g class="{_class(s)}">{"".join(shapes)}</g>')
    labels = [f'<span class="y" style="top:{float(py(y)) / SIZE:.2%}">{escape(words)}</span>' for y, words in y_ticks]
    labels += [
        f'<span class="x" style="left:{float(px(x)) / SIZE:.2%}">{escape(number(x, chart.x_unit))}</span>' for x in x_ticks
    ]
    for name, level in chart.levels:
        labels.append(
            f'<span class="level {chart.level_side(level)}" style="top:{float(py(level)) / SIZE:.2%}">{escape(name)}</span>'
        )
    title = f"{chart.name}-title"
    return (
        f'<div class="plot"><svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-labelledby="{title}" '
        f'data-x-end="{chart.x_end!r}" data-y-min="{chart.y_min!r}" data-y-max="{chart.y_max!r}">'
        f'<title id="{title}">{escape(chart.description)}</title>\n'
        + "\n".join(lines)
        + '</svg>\n<div aria-hidden="true">'
        + "".join(labels)
        + "</div></div>"
    )
