"""Figures of a report, as SVG: accuracy, threshold curves, speed against accuracy, latency against points."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from trackbench.evaluation.results import HEADLINE
from trackbench.evaluation.runner import Row
from trackbench.evaluation.statistics import Interval
from trackbench.metrics import THRESHOLDS

# Okabe and Ito's colours: told apart with any colour vision; then their darker half
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#004d78", "#8f3f00")
WIDTH, HEIGHT = 5.6, 3.6  # inches
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a949e",
    "axes.labelcolor": "#1c2430",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "xtick.color": "#5c6773",
    "ytick.color": "#5c6773",
    "legend.frameon": False,
    "text.parse_math": False,  # names are text, also with dollar signs
    "svg.hashsalt": "trackbench",  # the same figure gives the same file
}


def colour_of(labels: Sequence[str]) -> dict[str, str]:
    """One colour per model, the same in every figure."""
    return {label: PALETTE[index % len(PALETTE)] for index, label in enumerate(labels)}


def accuracy_bars(intervals: Mapping[str, Mapping[str, Interval]], colours: Mapping[str, str]) -> str:
    """AJ, delta_avg and OA in percent with confidence intervals.

    Args:
        intervals: model -> metric -> interval.
        colours: model -> colour.
    """
    with _figure("Accuracy, with 95 % intervals over videos") as (figure, axes):
        width = 0.82 / max(len(intervals), 1)
        for index, (model, metrics) in enumerate(intervals.items()):
            at = [group + (index - (len(intervals) - 1) / 2) * width for group in range(len(HEADLINE))]
            known = [(x, metrics[name]) for x, name in zip(at, HEADLINE, strict=True) if name in metrics]
            means = [100 * interval.mean for _, interval in known]
            spread = [
                [100 * (interval.mean - interval.low) for _, interval in known],
                [100 * (interval.high - interval.mean) for _, interval in known],
            ]
            axes.bar(
                [x for x, _ in known],
                means,
                0.92 * width,
                yerr=spread,
                color=colours[model],
                label=model,
                error_kw={"ecolor": "#1c2430", "elinewidth": 1.1, "capsize": 2.5},
            )
        axes.set_xticks(range(len(HEADLINE)), [_pretty(name) for name in HEADLINE.values()])
        axes.set_ylim(0, 100)
        axes.set_ylabel("percent")
        axes.grid(axis="x", visible=False)
        _legend(axes, len(intervals))
    return _svg(figure)


def threshold_curves(means: Mapping[str, Row], colours: Mapping[str, str]) -> str:
    """Share of the visible points within 1, 2, 4, 8 and 16 px of the 256 x 256 raster.

    Args:
        means: model -> its summary row.
        colours: model -> colour.
    """
    with _figure("Visible points within a distance") as (figure, axes):
        for model, row in means.items():
            heights = [100 * row[f"pts_within_{threshold}"] for threshold in THRESHOLDS]
            axes.plot(THRESHOLDS, heights, marker="o", color=colours[model], label=model)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(THRESHOLDS)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_ylim(0, 100)
        axes.set_xlabel("distance in pixels at 256 x 256")
        axes.set_ylabel("percent of points")
        _legend(axes, len(means))
    return _svg(figure)


def speed_against_accuracy(means: Mapping[str, Row], speed: Mapping[str, Row], colours: Mapping[str, str]) -> str:
    """AJ against frames per second; the area of a dot grows with the parameters.

    Args:
        means: model -> its summary row.
        speed: model -> one of its speed rows.
        colours: model -> colour.
    """
    with _figure("Accuracy against speed") as (figure, axes):
        shown = [model for model in means if model in speed]
        for model in shown:
            x, y = speed[model]["fps"], 100 * means[model]["average_jaccard"]
            area = 50 + 30 * math.sqrt(speed[model]["parameters"] / 1e6)
            axes.scatter(
                [x], [y], s=area, color=colours[model], alpha=0.9, edgecolors="white", label=model, zorder=3
            )
        axes.set_xscale("log")
        _plain_log_ticks(axes.xaxis, [speed[model]["fps"] for model in shown])
        axes.set_ylim(0, 100)
        axes.margins(x=0.2)
        counts = sorted({speed[model]["num_points"] for model in shown})
        axes.set_xlabel(f"frames per second with {' or '.join(map(str, counts))} points")
        axes.set_ylabel("average Jaccard, percent")
        _legend(axes, len(shown))
    return _svg(figure)


def latency_curves(speed: Mapping[str, Sequence[Row]], colours: Mapping[str, str]) -> str:
    """Milliseconds per frame against the number of points: median, and a band up to the 95th percentile.

    Args:
        speed: model -> its speed rows.
        colours: model -> colour.
    """
    with _figure("Latency against points") as (figure, axes):
        for model, rows in speed.items():
            ordered = sorted(rows, key=lambda row: row["num_points"])
            x = [row["num_points"] for row in ordered]
            median = [row["latency_ms"] for row in ordered]
            axes.fill_between(
                x, median, [row["latency_p95_ms"] for row in ordered], color=colours[model], alpha=0.15, lw=0
            )
            axes.plot(x, median, marker="o", color=colours[model], label=model)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        counts = sorted({row["num_points"] for rows in speed.values() for row in rows})
        axes.xaxis.set_major_locator(FixedLocator(counts))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        times = [row[key] for rows in speed.values() for row in rows for key in ("latency_ms", "latency_p95_ms")]
        _plain_log_ticks(axes.yaxis, times)
        axes.set_xlabel("points")
        axes.set_ylabel("milliseconds per frame")
        _legend(axes, len(speed))
    return _svg(figure)


@contextmanager
def _figure(title: str) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        yield figure, axes


def _legend(axes: Axes, count: int) -> None:
    if count:
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(count, 3), fontsize=9, handlelength=1.2
        )


def _plain_log_ticks(axis: Axis, values: Sequence[float]) -> None:
    """Plain numbers: decades, and 2 and 5 between them where few decades would leave the axis bare."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [digit * 10.0**decade for decade in range(low - 1, high + 1) for digit in digits]
    axis.set_major_locator(FixedLocator([t for t in ticks if min(positive) / 2 <= t <= 2 * max(positive)]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def _pretty(name: str) -> str:
    return {"delta_avg": "δ_avg"}.get(name, name)


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
