"""The report's figures as PNG files, for slides and chats, by matplotlib."""

from __future__ import annotations

from pathlib import Path

from recipe.monitor.charts import Chart, number, ticks

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a3467f", "#b57d00", "#3a8fc2")
"""As in report.css, for a light page."""
STYLES = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1)))
GREY = "#595959"


def draw(charts: list[Chart], folder: Path) -> list[Path]:
    """Write `<name>.png` for each chart that has anything to show."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chart in charts:
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for s in chart.series:
            colour = GREY if s.colour is None else COLOURS[s.colour % len(COLOURS)]
            style = "--" if s.colour is None else STYLES[s.colour % len(STYLES)]
            for n, piece in enumerate(s.pieces()):
                axes.plot(
                    s.x[piece], s.y[piece], linestyle=style, color=colour, alpha=0.6 if s.faint else 1.0,
                    linewidth=1.0 if s.faint or s.colour is None else 1.7, marker="o" if s.dots or len(s.x) == 1 else "",
                    markersize=4, label=s.label if s.in_legend and not n else "_",
                )  # fmt: skip
            if s.low and s.dots:
                axes.vlines(s.x, s.low, s.high, color=colour, linewidth=1)
            for piece in s.pieces() if s.low and not s.dots else []:
                axes.fill_between(s.x[piece], s.low[piece], s.high[piece], color=colour, alpha=0.2, linewidth=0)
        for label, level in chart.levels:
            axes.axhline(level, color="#1a1a1a", linewidth=0.8, linestyle=":")
            side = chart.level_side(level)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": side}
            axes.annotate(label, (side == "right", level), (4 if side == "left" else -4, 2), fontsize=8, **place)
        for n, x in enumerate(chart.marks):
            axes.axvline(x, color="#1a1a1a", linewidth=0.8, linestyle="--", label="restart" if not n else "_")
        axes.set(xlim=(0, chart.x_end), ylim=(chart.y_min, chart.y_max))
        axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
        axes.set_xticks(x_ticks := ticks(0, chart.x_max), [number(x, chart.x_unit) for x in x_ticks])
        axes.set_yticks(*zip(*chart.y_ticks(), strict=True))
        axes.grid(color="#d5d5d5", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
        paths.append(folder / f"{chart.name}.png")
        figure.savefig(paths[-1])
    return paths
