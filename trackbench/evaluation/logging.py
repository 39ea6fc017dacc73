"""Results to experiment loggers: tables and curves for Weights & Biases, scalars for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from trackbench.evaluation.results import HEADLINE, headline_rows, markdown_table, metric_names, summarise
from trackbench.evaluation.runner import Row, iterate_groups

SPEED_SCALARS = ("latency_ms", "latency_p95_ms", "fps", "peak_memory_mib", "gflops_per_frame")


def log_results(loggers: Sequence[Logger], rows: Sequence[Row], speed_rows: Sequence[Row] = ()) -> None:
    """Send results to loggers.

    Weights & Biases gets tables (per video, summary, speed), the curves "latency against points" and
    "accuracy against speed", and every number in the run's summary. TensorBoard gets scalars (those of speed
    over the number of points) and the summary as text. Every other logger gets the scalars.

    Args:
        loggers: loggers of Lightning; they are not finished here.
        rows: per-video rows of :func:`trackbench.evaluation.runner.evaluate`, with the column ``checkpoint``.
        speed_rows: rows of :func:`trackbench.evaluation.speed.measure_speed`.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger.experiment, rows, speed_rows)
        elif isinstance(logger, TensorBoardLogger):
            _log_to_tensorboard(logger.experiment, rows, speed_rows)
        else:
            logger.log_metrics(result_scalars(rows, speed_rows))
        logger.save()


def result_scalars(rows: Sequence[Row], speed_rows: Sequence[Row] = ()) -> dict[str, float]:
    """Every mean as ``<benchmark>/<query mode>/<model>/<metric>``, every cost as ``speed/<model>/...``."""
    scalars = {
        f"{summary['benchmark']}/{summary['query_mode']}/{summary['model']}/{name}": summary[name]
        for summary in summarise(rows)
        for name in metric_names([summary])
    }
    for row in speed_rows:
        for name in SPEED_SCALARS:
            if row[name] is not None:
                scalars[f"speed/{row['model']}/{row['num_points']}_points/{name}"] = row[name]
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def _log_to_wandb(run: Any, rows: Sequence[Row], speed_rows: Sequence[Row]) -> None:
    import wandb

    summaries = summarise(rows)
    content: dict[str, Any] = {}
    if rows:
        content["results/videos"] = _wandb_table(rows)
        content["results/summary"] = _wandb_table(summaries)
    if speed_rows:
        content["speed/table"] = _wandb_table(speed_rows)
        curves = [(str(key[0]), group) for key, group in iterate_groups(speed_rows, "model")]
        content["speed/latency_against_points"] = wandb.plot.line_series(
            xs=[[row["num_points"] for row in group] for _, group in curves],
            ys=[[row["latency_ms"] for row in group] for _, group in curves],
            keys=[model for model, _ in curves],
            title="Latency (ms) against points",
            xname="points",
        )
        fastest = {model: max(group, key=lambda row: row["num_points"]) for model, group in curves}
        pairs = [
            [s["model"], s["benchmark"], fastest[s["model"]]["fps"], *(s[metric] for metric in HEADLINE)]
            for s in summaries
            if s["model"] in fastest
        ]
        if pairs:
            table = wandb.Table(columns=["model", "benchmark", "fps", *HEADLINE], data=pairs)
            content["speed/accuracy_against_speed"] = wandb.plot.scatter(
                table, "fps", "average_jaccard", title="Average Jaccard against frames per second"
            )
    run.log(content)
    run.summary.update(result_scalars(rows, speed_rows))


def _wandb_table(rows: Sequence[Row]) -> Any:
    import wandb

    columns: list[str | int] = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(str(column)) for column in columns] for row in rows]
    return wandb.Table(columns=columns, data=cells, allow_mixed_types=True)


def _log_to_tensorboard(writer: Any, rows: Sequence[Row], speed_rows: Sequence[Row]) -> None:
    for name, value in result_scalars(rows).items():
        writer.add_scalar(name, value)
    for row in speed_rows:
        for name in SPEED_SCALARS:
            if row[name] is not None:
                writer.add_scalar(f"speed/{name}/{row['model']}", row[name], global_step=row["num_points"])
    if rows:
        writer.add_text("results", markdown_table(headline_rows(summarise(rows), speed_rows)))
    writer.flush()
