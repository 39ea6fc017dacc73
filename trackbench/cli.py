"""``trackbench ...``: what is not training (train.py) or evaluation (eval.py)."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from trackbench.structures import Tracks

WIDEST_TABLE = 160  # columns; a narrow terminal wraps lines rather than losing numbers


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"trackbench {options.command}: {error}", markup=False
        )
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """A parser that can get its arguments when it is its turn: other commands need not load what it needs.

    Args:
        fill: called with this parser and what it is to parse, before the first parsing.
    """

    def __init__(
        self, *args: Any, fill: Callable[[argparse.ArgumentParser, Sequence[str]], None] | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self._fill = fill

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self, args or ())
        return super().parse_known_args(args, namespace)


def _fill_prepare(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    from trackbench.data.prepare.command import add_prepare_commands

    add_prepare_commands(parser)


def _fill_h5(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    from trackbench.robotics.command import add_h5_commands

    add_h5_commands(parser, arguments[0] if arguments else "")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trackbench", description="Train, evaluate and compare point trackers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    track = commands.add_parser("track", help="track points through a video file")
    track.add_argument("video", type=Path, help="video file, or folder of images")
    points = track.add_mutually_exclusive_group()
    points.add_argument("--points", nargs="+", metavar="X,Y", help="points on the frame --start, in pixels")
    points.add_argument("--grid", type=int, metavar="N", help="an N x N grid on the frame --start (default: 12)")
    points.add_argument(
        "--queries",
        type=Path,
        metavar="FILE",
        help=".csv with columns t,x,y, or .npy with (N, 3): frame, pixels",
    )
    track.add_argument("--start", type=int, default=0, help="frame of --points and --grid (default: 0)")
    track.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.mp4", help="overlay video")
    track.add_argument("--model", help="a name of `trackbench models` (default: lucas_kanade)")
    track.add_argument("--checkpoint", type=Path, help="its weights; without --model, a checkpoint of trackbench")
    track.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    track.add_argument("--max-frames", type=int, metavar="T", help="only the first T frames")
    track.add_argument(
        "--both-directions", action="store_true", help="track causal models also backward from each query"
    )
    track.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    track.set_defaults(run=_track)

    models = commands.add_parser("models", help="list the models that --model and load_tracker take")
    models.set_defaults(run=_models)

    bench = commands.add_parser(
        "bench",
        help="measure what a tracker costs, or how fast training data is loaded, part by part",
        add_help=False,
    )
    bench.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    bench.add_argument("-h", "--help", action="store_true", help="explain every key and its default")
    bench.set_defaults(run=_bench, usage=bench.format_usage())

    commands.add_parser("prepare", help="make, convert or fetch training data and benchmarks", fill=_fill_prepare)
    commands.add_parser("h5", help="robotics: HDF5 episodes to reviewed keypoint tracks and back", fill=_fill_h5)

    demo = commands.add_parser("demo", help="train tiny trackers, compare them, write a report")
    demo.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder (default: outputs/demo)")
    demo.add_argument("--steps", type=int, help="training steps per model (default: the demo's own)")
    demo.add_argument("--fresh", action="store_true", help="train again even where a finished run is there")
    demo.set_defaults(run=_demo)
    return parser


def _track(options: argparse.Namespace) -> int:
    from trackbench.composition import load_checkpoint, load_tracker
    from trackbench.data.video_io import VideoReader, read_video, write_video
    from trackbench.tracker import check_queries
    from trackbench.visualization import overlay

    outputs = [options.output, options.output.with_suffix(".npz"), options.output.with_suffix(".csv")]
    if options.output.suffix != ".mp4":
        raise ValueError(f"-o {options.output}: expected a name that ends in .mp4")
    taken = [str(path) for path in outputs if path.exists()]
    if taken and not options.overwrite:
        raise ValueError(f"{', '.join(taken)} exists; --overwrite replaces it")

    fps = VideoReader(options.video).fps or 25.0
    video = read_video(options.video, max_frames=options.max_frames)
    T, H, W = video.shape[:3]
    queries = check_queries(_queries(options, H, W), T, H, W)
    if options.model is None and options.checkpoint is not None:
        tracker = load_checkpoint(options.checkpoint, options.device)
    else:
        tracker = load_tracker(options.model or "lucas_kanade", options.checkpoint, options.device)

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f"tracking {len(queries)} points", total=T)
        tracks = tracker.track(
            video,
            queries,
            both_directions=options.both_directions,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_tracks_npz(outputs[1], tracks)
    write_tracks_csv(outputs[2], tracks)
    write_video(options.output, overlay(video, tracks), fps=fps)
    share = float(tracks.visible.float().mean())
    console.print(
        f"{len(queries)} points, {T} frames, {share:.0%} visible -> {', '.join(str(path) for path in outputs)}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _queries(options: argparse.Namespace, height: int, width: int) -> np.ndarray:
    """(N, 3) queries as (t, x, y) from --queries, --points or --grid."""
    if options.queries is not None:
        return read_queries(options.queries)
    if options.points is not None:
        points = []
        for text in options.points:
            try:
                x, y = (float(part) for part in text.split(","))
            except ValueError:
                raise ValueError(f"--points {text}: expected X,Y in pixels, e.g. 120.5,64") from None
            points.append((options.start, x, y))
        return np.array(points, dtype=np.float64)
    side = 12 if options.grid is None else options.grid
    if side < 1:
        raise ValueError(f"--grid {side}: expected at least 1 point a side")
    centres = (np.arange(side) + 0.5) / side
    columns, rows = np.meshgrid(centres * width, centres * height)
    return np.stack([np.full(columns.size, float(options.start)), columns.ravel(), rows.ravel()], axis=1)


def read_queries(path: Path) -> np.ndarray:
    """(N, 3) queries as (t, x, y) from a .csv with the columns t, x, y, or a .npy of that shape.

    Raises:
        ValueError: another format, missing columns, or a cell that is not a number; the file and line are named.
    """
    if path.suffix == ".npy":
        queries = np.load(path, allow_pickle=False)
        if queries.ndim != 2 or queries.shape[1] != 3 or queries.dtype.kind not in "fiu":
            raise ValueError(f"{path}: expected numbers of shape (N, 3) as t, x, y; got {queries.shape}")
        return queries.astype(np.float64)
    if path.suffix != ".csv":
        raise ValueError(f"{path}: expected a .csv or .npy file")
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = {"t", "x", "y"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"{path}: its first line must name the columns t,x,y; missing {sorted(missing)}")
        for row in reader:
            try:
                rows.append([float(row[key]) for key in ("t", "x", "y")])
            except (TypeError, ValueError):
                raise ValueError(f"{path}:{reader.line_num}: expected three numbers, got {row}") from None
    return np.array(rows, dtype=np.float64).reshape(-1, 3)


def write_tracks_npz(path: Path, tracks: Tracks) -> None:
    """``xy`` (N, T, 2), ``visible`` (N, T), ``visibility`` (N, T), ``queries`` (N, 3)."""
    temporary = path.with_name(f".{path.name}.part.npz")
    np.savez_compressed(
        temporary,
        xy=tracks.xy.numpy(),
        visible=tracks.visible.numpy(),
        visibility=tracks.visibility.numpy(),
        queries=tracks.queries.numpy(),
    )
    temporary.replace(path)


def write_tracks_csv(path: Path, tracks: Tracks) -> None:
    """One row per point and frame: point, t, x, y, visible, visibility."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["point", "t", "x", "y", "visible", "visibility"])
        for n in range(tracks.xy.shape[0]):
            for t in range(tracks.xy.shape[1]):
                x, y = tracks.xy[n, t].tolist()
                writer.writerow(
                    [
                        n,
                        t,
                        f"{x:.3f}",
                        f"{y:.3f}",
                        int(tracks.visible[n, t]),
                        f"{tracks.visibility[n, t]:.4f}",
                    ]
                )
    temporary.replace(path)


def _models(options: argparse.Namespace) -> int:
    from trackbench.composition import model_names, tracker_config

    console = Console()
    for name in model_names():
        config = tracker_config(name)
        parts = [config[node]._target_.rsplit(".", 1)[-1] for node in ("backbone", "head") if node in config]
        console.print(
            f"{name:28s} {' x '.join(parts) or config.tracker._target_.rsplit('.', 1)[-1]}", highlight=False
        )
    return 0


def _bench(options: argparse.Namespace) -> int:
    from trackbench.evaluation import bench, bench_data
    from trackbench.evaluation.bench_common import settings_help
    from trackbench.evaluation.results import markdown_table, rich_table

    console = Console(highlight=False, soft_wrap=True)
    if options.help:
        lines = [
            options.usage,
            "A tracker: model=NAME ...\n",
            settings_help(bench.BenchSettings),
            "\nTraining data: data=NAME ..., or any other key that only this list has\n",
            settings_help(bench_data.DataBenchSettings),
        ]
        console.print("\n".join(lines), markup=False)
        return 0
    subject = bench_data if bench_data.is_meant(options.settings) else bench
    settings = subject.read_settings(options.settings)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    result = subject.run_bench(settings, lambda line: progress.print(f"{line} ...", markup=False))
    for line in subject.header_lines(result):
        console.print(line, markup=False)
    for title, lines in subject.tables(result):
        if console.is_terminal:
            console.print(rich_table(lines, title=title), width=max(console.width, WIDEST_TABLE))
        else:
            console.print(f"\n{title}\n\n{markdown_table(lines)}", markup=False, end="")
    if settings.output is not None:
        console.print(f"\nresults: {settings.output}", markup=False)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from trackbench.demo import run_demo

    run_demo(options.output, steps=options.steps, fresh=options.fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
