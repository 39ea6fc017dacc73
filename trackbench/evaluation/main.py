"""Models x benchmarks from a composed config: what ``eval.py`` and the demo run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from trackbench.composition import compose_config, load_checkpoint, load_tracker
from trackbench.evaluation.logging import log_results
from trackbench.evaluation.report import Clip, write_report
from trackbench.evaluation.results import (
    ResultsStore,
    Row,
    describe_environment,
    fingerprint,
    has_half_pixel_shift,
    headline_rows,
    markdown_table,
    per_video_rows,
    rich_table,
    videos_of,
    write_atomically,
)
from trackbench.evaluation.runner import (
    Benchmark,
    EvaluationError,
    evaluate,
    head_settings_for,
    iterate_groups,
    use_head_settings,
)
from trackbench.evaluation.speed import measure_speed
from trackbench.structures import Tracks, VideoBatch
from trackbench.visualization import ground_truth, overlay

log = logging.getLogger(__name__)
TASKS = ("accuracy", "speed", "both")
FILE_WIDTH = 160  # columns of the tables where the output is no terminal
COST_COLUMNS = ("frames/s", "peak MiB", "params M")


@dataclass
class Contender:
    """One model of the comparison.

    Attributes:
        name: its name in the tables.
        tracker: the model.
        checkpoint: what its results depend on, see :func:`trackbench.evaluation.results.fingerprint`.
        overrides: settings that the user chose; they win over those of a benchmark.
        runs: benchmark -> (checkpoint with the benchmark's settings, the head's settings in force as text).
    """

    name: str
    tracker: Any
    checkpoint: str
    overrides: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def checkpoints(self) -> set[str]:
        """Every ``checkpoint`` that rows of this run can have."""
        return {self.checkpoint, *(checkpoint for checkpoint, _ in self.runs.values())}


def evaluate_models(config: DictConfig) -> float | None:
    """Evaluate ``config.models`` as ``configs/eval.yaml`` says; print the table, write results and report.

    Returns:
        The average Jaccard of the first model on the first benchmark; None for ``task=speed``.

    Raises:
        ValueError: an unknown task, model or setting.
        EvaluationError: some videos failed; everything else was evaluated and written.
    """
    if config.task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {config.task!r}")
    if not config.models:
        raise ValueError("no models: model=[trackon_tiny,static]")
    if config.threads:
        torch.set_num_threads(config.threads)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    output = Path(config.output_dir)
    store = ResultsStore(output / "results", resume=config.resume)
    models = list(_contenders(config))
    clips: list[Clip] = []
    problems: list[EvaluationError] = []
    if config.task != "speed":
        for benchmark in _benchmarks(config):
            clips += _accuracy(config, benchmark, models, store, problems)
    speed = _speed(config, models) if config.task != "accuracy" else []
    _publish(config, output, store, models, speed, clips)
    if problems:
        raise problems[0]
    if config.task == "speed":
        return None
    first, (checkpoint, _) = next(iter(models[0].runs.items()))
    scores = [
        row["average_jaccard"]
        for row in store.rows
        if (row["benchmark"], row["checkpoint"], row["query_mode"]) == (first, checkpoint, config.query_mode)
    ]
    return float(torch.tensor(scores).nanmean()) if scores else None


def _contenders(config: DictConfig) -> Iterator[Contender]:
    """The models of the comparison, loaded; names stay unique."""
    taken: set[str] = set()
    for entry in config.models:
        settings = dict((config.overrides or {}).get(entry, {}))
        if str(entry).endswith(".ckpt"):
            tracker: Any = load_checkpoint(entry, config.device, **settings)
            name = "/".join(Path(entry).parts[-4:-2]) or Path(entry).stem
        else:
            tracker = load_tracker(entry, (config.checkpoints or {}).get(entry), config.device, **settings)
            name = str(entry)
        if name in taken:
            raise ValueError(f"two models are called {name!r}")
        taken.add(name)
        yield Contender(name, tracker, fingerprint(tracker, settings), settings)


def _benchmarks(config: DictConfig) -> Iterator[DictConfig]:
    if config.benchmarks is None:
        yield config.benchmark
        return
    for name in config.benchmarks:
        overrides = [f"benchmark={name}", f"query_mode={config.query_mode}"]
        if name in (config.paths or {}):
            overrides.append(f"benchmark.path={config.paths[name]}")
        composed = compose_config("eval", overrides)
        yield composed.benchmark


def _accuracy(
    config: DictConfig,
    benchmark: DictConfig,
    models: list[Contender],
    store: ResultsStore,
    problems: list[EvaluationError],
) -> list[Clip]:
    """Rows of every model on one benchmark go to the store; the first videos become overlays.

    Heads have the benchmark's ``head_settings`` meanwhile, but for those that the user chose.
    """
    published: Any = OmegaConf.to_container(benchmark, resolve=False)
    published = published.get("head_settings")
    changes = [head_settings_for(m.tracker, published, keep=m.overrides) for m in models]
    dataset: Benchmark = instantiate(benchmark.dataset)
    about = getattr(dataset, "about", {})
    wanted = range(min(config.overlays if config.report else 0, len(dataset)))
    drawn: dict[str, dict[str, Any]] = {}
    for model, settings in zip(models, changes, strict=True):
        checkpoint = model.checkpoint
        if settings:
            checkpoint = fingerprint(model.tracker, {**model.overrides, **settings})

        def keep(batch: VideoBatch, tracks: Tracks, name: str = model.name) -> None:
            video = batch.names[0]
            if video in drawn or len(drawn) < len(wanted):
                panels = drawn.setdefault(video, {"truth": _draw(batch, ground_truth(batch))})
                panels[name] = _draw(batch, tracks)

        def known(video: str, name: str = model.name, checkpoint: str = checkpoint) -> bool:
            return store.has(name, checkpoint, benchmark.name, video, benchmark.query_mode, about)

        try:
            with use_head_settings(model.tracker, settings) as in_force:
                model.runs[benchmark.name] = (checkpoint, in_force)
                evaluate(
                    model.tracker,
                    dataset,
                    benchmark.query_mode,
                    model=model.name,
                    benchmark=benchmark.name,
                    tags={"checkpoint": checkpoint, "head_settings": in_force},
                    skip=known,
                    on_row=store.add,
                    on_video=keep if wanted else None,
                    limit=config.limit,
                )
        except EvaluationError as error:
            log.error("%s on %s: %s", model.name, benchmark.name, error)
            problems.append(error)
    return [Clip(title=f"{benchmark.name}: {video}", panels=panels) for video, panels in drawn.items()]


def _draw(batch: VideoBatch, tracks: Tracks, max_points: int = 32) -> Any:
    few = slice(max_points)
    part = Tracks(tracks.xy[few], tracks.visible[few], tracks.visibility[few], tracks.queries[few])
    return overlay(batch.video[0].permute(0, 2, 3, 1).numpy(), part)


def _speed(config: DictConfig, models: list[Contender]) -> list[Row]:
    """Speed does not belong to a benchmark: models are measured with their own settings."""
    rows = []
    settings = config.speed
    for model in models:
        log.info("measuring the speed of %s", model.name)
        rows += measure_speed(
            model.tracker,
            list(settings.points),
            model=model.name,
            num_frames=settings.num_frames,
            height=settings.height,
            width=settings.width,
            warmup=settings.warmup,
            device=config.device,
        )
    return rows


def _publish(
    config: DictConfig,
    output: Path,
    store: ResultsStore,
    models: list[Contender],
    speed: list[Row],
    clips: list[Clip],
) -> None:
    """Table on the terminal, files in the folder, rows to every logger that is on."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    current = {checkpoint: model for model in models for checkpoint in model.checkpoints}
    order = {model.name: place for place, model in enumerate(models)}
    rows = [row for row in store.rows if row["checkpoint"] in current]
    summaries = sorted(
        (row for row in store.summary() if row["checkpoint"] in current),
        key=lambda row: (row["benchmark"], order.get(row["model"], len(order))),
    )
    environment = describe_environment(config.device)
    used = [
        f"{model.name} on {where}: {text}" for model in models for where, (_, text) in model.runs.items() if text
    ]
    environment["head_settings"] = "; ".join(used) or None
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    store.write_summary(environment=environment, config=plain, speed=speed)
    if summaries:
        write_atomically(output / "results" / "table.md", markdown_table(headline_rows(summaries, speed)))
    for (benchmark, mode), group in iterate_groups(summaries, "benchmark", "query_mode"):
        videos = [row for row in rows if (row["benchmark"], row["query_mode"]) == (benchmark, mode)]
        if config.per_video:
            videos.sort(key=lambda row: order.get(row["model"], len(order)))
            console.print(rich_table(per_video_rows(videos), title=f"{benchmark} ({mode}): AJ per video, percent"))
        title = f"{benchmark} ({mode}): mean over {videos_of(group[0])} videos, percent"
        if has_half_pixel_shift(group[0]):
            title += "; points with the half-pixel shift"
        if speed:
            title += f"; speed with {max(row['num_points'] for row in speed)} points"
        columns = ("model", "AJ", "delta_avg", "OA", *COST_COLUMNS)
        lines = [{name: line[name] for name in columns if name in line} for line in headline_rows(group, speed)]
        console.print(rich_table(lines, title=title))
    if speed:
        write_atomically(output / "results" / "speed.md", markdown_table(speed_table(speed)))
        if config.task == "speed":
            title = f"speed on {environment['gpu'] or environment['cpu'] or config.device}"
            console.print(rich_table(speed_table(speed), title=title))
    if config.report and rows:
        path = write_report(
            output / "report.html",
            # a model is one model, also where benchmarks give its head different settings
            [{**row, "checkpoint": current[row["checkpoint"]].checkpoint} for row in rows],
            speed=speed,
            environment=environment,
            config=plain,
            clips=clips,
            reference=models[0].name if any(row["model"] == models[0].name for row in rows) else None,
        )
        console.print(f"report: {path}", highlight=False, soft_wrap=True)
    loggers = [instantiate(node) for node in config.logger.values() if node is not None]
    log_results(loggers, rows, speed)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
    console.print(f"results: {output / 'results'}", highlight=False, soft_wrap=True)


def speed_table(rows: list[Row]) -> list[Row]:
    """Speed rows as text for tables."""

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        {
            "model": row["model"],
            "points": str(row["num_points"]),
            "mode": row["mode"],
            "lag frames": str(row["lag_frames"]),
            "frames/s": number(row["fps"]),
            "median ms": number(row["latency_ms"]),
            "p95 ms": number(row["latency_p95_ms"]),
            "peak MiB": number(row["peak_memory_mib"], 0),
            "params M": number(row["parameters"] / 1e6, 2),
            "GFLOP/frame": number(row["gflops_per_frame"], 2),
        }
        for row in rows
    ]
