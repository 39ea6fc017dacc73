"""Results as one HTML file that needs nothing else: tables, figures and clips are inside it."""

from __future__ import annotations

import base64
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from trackbench.data.video_io import write_video
from trackbench.evaluation import plots
from trackbench.evaluation.markup import cell, image, number_cell, short_number, shown_range, table, text
from trackbench.evaluation.results import HEADLINE, has_half_pixel_shift, summarise, videos_of, write_atomically
from trackbench.evaluation.runner import Row, iterate_groups
from trackbench.evaluation.statistics import Interval, bootstrap_mean, paired_difference

# nothing is loaded from anywhere, whatever a name in the results holds
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; media-src data:"
)
CLIP_SIDE = 320
CLIP_FRAMES = 96
FEW_VIDEOS = 10


@dataclass(frozen=True)
class Clip:
    """One video, drawn several times side by side.

    Attributes:
        title: what it shows.
        panels: caption -> (T, H, W, 3) uint8 RGB, such as the ground truth and each model.
        fps: frames per second.
    """

    title: str
    panels: Mapping[str, NDArray[np.uint8]]
    fps: float = 12


def write_report(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    speed: Sequence[Row] = (),
    environment: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    clips: Sequence[Clip] = (),
    reference: str | None = None,
    title: str = "Point tracking results",
) -> Path:
    """Write a report.

    Args:
        path: the ``.html`` file.
        rows: per-video rows of :func:`trackbench.evaluation.runner.evaluate`, with the column ``checkpoint``.
        speed: rows of :func:`trackbench.evaluation.speed.measure_speed`.
        environment: see :func:`trackbench.evaluation.results.describe_environment`.
        config: the composed config of the run.
        clips: overlays; they are scaled down to 320 pixels, and cut to 96 frames.
        reference: model that the others are compared with; None: the first one in ``rows``.
        title: heading.

    Returns:
        ``path``.

    Raises:
        ValueError: without rows, or with an unknown ``reference``.
    """
    if not rows:
        raise ValueError("a report needs at least one row of results")
    labels = _labels(rows)
    rows = [{**row, "label": labels[row["model"], row["checkpoint"]]} for row in rows]
    names = list(dict.fromkeys(row["label"] for row in rows))
    reference = names[0] if reference is None else reference
    if reference not in names:
        raise ValueError(f"reference must be one of {names}, got {reference!r}")
    colours = plots.colour_of(list(dict.fromkeys([*names, *(row["model"] for row in speed)])))
    sections = [
        _benchmark_section(str(benchmark), str(mode), group, speed, reference, colours)
        for (benchmark, mode), group in iterate_groups(rows, "benchmark", "query_mode")
    ]
    if speed:
        sections.append(_speed_section(speed, colours))
    sections.append(_videos_section(rows))
    sections += [_clip_section(clip) for clip in clips]
    sections.append(_environment_section(environment or {}, config or {}))
    document = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{text(title)}</title>
<style>{_asset("report.css")}</style>
</head>
<body><main>
<h1>{text(title)}</h1>
<p class="soft">{_subtitle(rows, environment or {})}</p>
{"".join(sections)}
</main>
<script>{_asset("report.js")}</script>
</body>
</html>
"""
    write_atomically(path, document)
    return Path(path)


def _benchmark_section(
    benchmark: str,
    mode: str,
    rows: Sequence[Row],
    speed: Sequence[Row],
    reference: str,
    colours: Mapping[str, str],
) -> str:
    by_model = {str(key[0]): group for key, group in iterate_groups(rows, "label")}
    intervals = {model: _intervals(group) for model, group in by_model.items()}
    means = {model: summarise(group)[0] for model, group in by_model.items()}
    costs = _largest(speed)
    shift = ' <span class="tag">half-pixel shift</span>' if has_half_pixel_shift(rows[-1]) else ""
    figures = [
        image(plots.accuracy_bars(intervals, colours), f"Accuracy on {benchmark}"),
        image(plots.threshold_curves(means, colours), f"Points within a distance on {benchmark}"),
    ]
    if any(model in costs for model in means):
        picture = plots.speed_against_accuracy(means, costs, colours)
        figures.append(image(picture, f"Accuracy against speed on {benchmark}"))
    return f"""<section>
<h2>{text(benchmark)} <span class="tag">queries: {text(mode)}</span>{shift}</h2>
{_headline_table(intervals, means, costs, colours)}
{_difference_table(by_model, reference)}
<div class="figures">{"".join(f'<div class="card">{figure}</div>' for figure in figures)}</div>
</section>
"""


def _headline_table(
    intervals: Mapping[str, Mapping[str, Interval]],
    means: Mapping[str, Row],
    costs: Mapping[str, Row],
    colours: Mapping[str, str],
) -> str:
    best = {
        metric: max((known[metric].mean for known in intervals.values() if metric in known), default=math.nan)
        for metric in HEADLINE
    }
    headers = [
        "Model",
        "AJ",
        "δ<sub>avg</sub>",
        "OA",
        "Videos",
        "Frames/s",
        "Latency",
        "Peak memory",
        "Parameters",
    ]
    body = []
    for model, known in intervals.items():
        cells = [
            cell(f'<span class="swatch" style="background:{colours[model]}"></span>{text(model)}', is_text=True)
        ]
        for metric in HEADLINE:
            if metric not in known:
                cells.append(cell("&ndash;", -1))
                continue
            interval = known[metric]
            value = f'{100 * interval.mean:.1f}<span class="interval">{shown_range(interval)}</span>'
            cells.append(cell(value, interval.mean, best=len(intervals) > 1 and interval.mean == best[metric]))
        cells.append(cell(videos_of(means[model]), means[model]["num_videos"]))
        cells += _cost_cells(means[model], costs.get(model))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"""<div class="card">{table(headers, body, text_columns=1)}</div>
<p class="soft">Percent, mean over videos; in brackets the 95 % bootstrap interval. Accuracy is measured at
256 &times; 256. Frames per second without a latency are those of the evaluation itself.</p>"""


def _cost_cells(mean: Row, cost: Row | None) -> list[str]:
    if cost is None:
        return [cell(short_number(mean["fps"]), mean["fps"]), *[cell("&ndash;", -1)] * 3]
    at_points = f'<span class="interval">{cost["num_points"]} points</span>'
    memory = cost["peak_memory_mib"]
    return [
        cell(short_number(cost["fps"]), cost["fps"]),
        cell(f"{short_number(cost['latency_ms'])} ms{at_points}", cost["latency_ms"]),
        cell("&ndash;" if memory is None else f"{memory:.0f} MiB", -1 if memory is None else memory),
        cell(f"{cost['parameters'] / 1e6:.2f} M", cost["parameters"]),
    ]


def _difference_table(by_model: Mapping[str, Sequence[Row]], reference: str) -> str:
    others = [model for model in by_model if model != reference]
    if reference not in by_model or not others:
        return ""
    body = []
    fewest = math.inf
    for model in others:
        cells = [cell(text(model), is_text=True)]
        for metric in HEADLINE:
            difference = _difference(by_model[reference], by_model[model], metric)
            if difference is None:
                cells.append(cell("&ndash;", 0))
                continue
            fewest = min(fewest, difference.num_videos)
            verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "unclear"
            value = (
                f'{100 * difference.mean:+.1f}<span class="interval">{shown_range(difference, "+")}</span> '
                f'<span class="tag {verdict}">{verdict}</span>'
            )
            cells.append(cell(value, difference.mean))
        body.append(f"<tr>{''.join(cells)}</tr>")
    caution = (
        f" With only {fewest} videos in common the intervals are uncertain themselves."
        if fewest < FEW_VIDEOS
        else ""
    )
    headers = ["Model", *(f"{name}, difference" for name in ("AJ", "δ<sub>avg</sub>", "OA"))]
    return f"""<h3>Is the difference to {text(reference)} real?</h3>
<div class="card">{table(headers, body, text_columns=1)}</div>
<p class="soft">Points of percent, paired over the videos that both have; a difference is called better or
worse where the 95 % interval excludes zero.{caution}</p>"""


def _speed_section(speed: Sequence[Row], colours: Mapping[str, str]) -> str:
    headers = ["Model", "Device", "Frame", "Points", "Mode", "Lag", "Median", "p95", "Frames/s"]
    headers += ["Peak memory", "Process", "GFLOP", "Params"]
    body = []
    for row in speed:
        memory, total, operations = row["peak_memory_mib"], row["peak_total_mib"], row["gflops_per_frame"]
        cells = [
            cell(text(row["model"]), is_text=True),
            cell(text(row["device"]), is_text=True),
            cell(f"{row['width']} &times; {row['height']}", row["width"] * row["height"]),
            cell(str(row["num_points"]), row["num_points"]),
            cell(text(row["mode"])),
            cell(f"{row['lag_frames']} frames", row["lag_frames"]),
            cell(f"{short_number(row['latency_ms'])} ms", row["latency_ms"]),
            cell(f"{short_number(row['latency_p95_ms'])} ms", row["latency_p95_ms"]),
            cell(short_number(row["fps"]), row["fps"]),
            cell("&ndash;" if memory is None else f"{memory:.0f} MiB", -1 if memory is None else memory),
            cell("&ndash;" if total is None else f"{total:.0f} MiB", -1 if total is None else total),
            cell(
                "&ndash;" if operations is None else f"{operations:.2f}",
                -1 if operations is None else operations,
            ),
            cell(f"{row['parameters'] / 1e6:.2f} M", row["parameters"]),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    grouped = {str(key[0]): group for key, group in iterate_groups(speed, "model")}
    kinds = ", ".join(sorted({str(row["memory_kind"]) for row in speed}))
    return f"""<section><h2>Speed</h2>
<div class="card">{table(headers, body, text_columns=2)}</div>
<p class="soft">From a frame in main memory to its points. Lag: frames that must arrive first. Mode “clip”:
the whole clip is tracked at once, its time divided by its frames. Peak memory is what tracking adds
({text(kinds)}), “process” the whole. GFLOP: per frame, of
matrix products and convolutions.</p>
<div class="figures"><div class="card">{image(plots.latency_curves(grouped, colours), "Latency")}</div></div>
</section>
"""


def _videos_section(rows: Sequence[Row]) -> str:
    headers = ["Video", "Benchmark", "Model", "AJ", "δ<sub>avg</sub>", "OA", "Points", "Frames", "Seconds"]
    body = []
    for row in sorted(rows, key=lambda row: (row["benchmark"], row["video"])):
        cells = [cell(text(row[key]), is_text=True) for key in ("video", "benchmark", "label")]
        cells += [number_cell(row[metric], f"{100 * row[metric]:.1f}") for metric in HEADLINE]
        cells += [cell(str(row[key]), row[key]) for key in ("num_points", "num_frames")]
        cells.append(cell(f"{row['seconds']:.2f}", row["seconds"]))
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"""<section><h2>Videos</h2>
<p class="soft">A click on a column sorts by it.</p>
<div class="card">{table(headers, body, text_columns=3)}</div></section>
"""


def _clip_section(clip: Clip) -> str:
    panels = "".join(
        f'<figure><video src="{_video_uri(frames, clip.fps)}" autoplay loop muted playsinline controls>'
        f"</video><figcaption>{text(caption)}</figcaption></figure>"
        for caption, frames in clip.panels.items()
    )
    return f"""<section><h2>{text(clip.title)}</h2>
<p class="soft">Filled: visible; ring: occluded.
<button class="replay" type="button">Replay together</button></p>
<div class="clips">{panels}</div></section>
"""


def _environment_section(environment: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    entries = "".join(
        f"<dt>{text(key)}</dt><dd>{text(value)}</dd>"
        for key, value in environment.items()
        if key != "command" and value is not None
    )
    command = environment.get("command")
    parts = ["<section><h2>How these numbers came about</h2>"]
    if command:
        parts.append(f'<h3>Command</h3><div class="card"><pre>{text(command)}</pre></div>')
    if entries:
        parts.append(f'<h3>Environment</h3><div class="card"><dl>{entries}</dl></div>')
    if config:
        content = json.dumps(config, indent=2, default=str)
        parts.append(f'<h3>Config</h3><div class="card"><pre>{text(content)}</pre></div>')
    return "".join([*parts, "</section>"])


def _labels(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """(model, checkpoint) -> the model's name, with the checkpoint where there are several."""
    checkpoints: dict[str, list[str]] = {}
    for row in rows:
        known = checkpoints.setdefault(row["model"], [])
        if row["checkpoint"] not in known:
            known.append(row["checkpoint"])
    return {
        (model, checkpoint): model if len(known) == 1 else f"{model} ({checkpoint})"
        for model, known in checkpoints.items()
        for checkpoint in known
    }


def _intervals(rows: Sequence[Row]) -> dict[str, Interval]:
    """Bootstrap intervals over the videos that have a value."""
    values = {metric: [row[metric] for row in rows if math.isfinite(row[metric])] for metric in HEADLINE}
    return {metric: bootstrap_mean(known) for metric, known in values.items() if known}


def _difference(reference: Sequence[Row], model: Sequence[Row], metric: str) -> Interval | None:
    """Over the videos where both have a value; None without any."""
    one, two = (
        {row["video"]: row[metric] for row in rows if math.isfinite(row[metric])} for rows in (reference, model)
    )
    shared = one.keys() & two.keys()
    if not shared:
        return None
    return paired_difference({v: one[v] for v in shared}, {v: two[v] for v in shared})


def _largest(speed: Sequence[Row]) -> dict[str, Row]:
    """Model -> its speed row with the most points."""
    return {
        str(key[0]): max(group, key=lambda row: row["num_points"]) for key, group in iterate_groups(speed, "model")
    }


def _subtitle(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    models, videos = ({row[key] for row in rows} for key in ("label", "video"))
    parts = [f"{len(models)} models, {len(videos)} videos"]
    parts += [str(environment[key]) for key in ("date", "gpu", "cpu") if environment.get(key)]
    if environment.get("commit"):
        parts.append(f"commit {str(environment['commit'])[:10]}")
    return text(" · ".join(parts))


def _video_uri(frames: NDArray[np.uint8], fps: float) -> str:
    """An H.264 file of at most 320 pixels and 96 frames, inside an address."""
    H, W = frames.shape[1:3]
    scale = min(1.0, CLIP_SIDE / max(H, W))
    size = (2 * max(1, round(W * scale / 2)), 2 * max(1, round(H * scale / 2)))
    small = (np.asarray(cv2.resize(f, size, interpolation=cv2.INTER_AREA), np.uint8) for f in frames[:CLIP_FRAMES])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_video(file, small, fps=fps)
        content = file.read_bytes()
    return "data:video/mp4;base64," + base64.b64encode(content).decode()


def _asset(name: str) -> str:
    return resources.files("trackbench.evaluation").joinpath("assets", name).read_text(encoding="utf-8")
