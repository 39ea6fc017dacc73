"""The results of evaluations on disk: one CSV row per video, one JSON summary, tables to read.

``<folder>/<benchmark>/<model>-<checkpoint>-<query mode>.csv`` holds the rows of one model on one benchmark,
so that runs in parallel never write the same file. ``summary.json`` beside them holds the means, the speed
rows and the environment. Files are written whole and then renamed: a killed run leaves none
half-written.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text

from trackbench.evaluation.runner import Row, average, iterate_groups
from trackbench.metrics import METRICS

KEY = ("model", "checkpoint", "benchmark", "video", "query_mode")
GROUP = ("model", "checkpoint", "benchmark", "query_mode")
HEADLINE = {"average_jaccard": "AJ", "average_pts_within_thresh": "delta_avg", "occlusion_accuracy": "OA"}
# columns that say what the videos are, where the benchmark has them as its attribute `about`: videos of the
# complete benchmark, and whether points are shifted as the generator of TAP-Vid Kinetics does it
ABOUT = ("benchmark_videos", "half_pixel_shift")
INTEGER_COLUMNS = {"num_points", "num_frames", "height", "width", "benchmark_videos"}


class ResultsStore:
    """Per-video rows that outlive the run.

    Args:
        folder: where the files lie; made when missing.
        resume: keep the rows that are there, so that :meth:`has` finds them; otherwise a model's old rows are
            replaced when its first new row comes.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume: bool = True) -> None:
        self.folder = Path(folder)
        self.resume = resume
        self._rows: dict[tuple[Any, ...], Row] = {}
        for path in sorted(self.folder.glob("*/*.csv")):
            for row in read_rows(path):
                self._rows[_key(row, KEY)] = row
        self._fresh: set[tuple[Any, ...]] = set()

    @property
    def rows(self) -> list[Row]:
        """All rows, sorted by benchmark, query mode, model and video."""
        return sorted(
            self._rows.values(),
            key=lambda r: _key(r, ("benchmark", "query_mode", "model", "checkpoint", "video")),
        )

    def has(
        self,
        model: str,
        checkpoint: str,
        benchmark: str,
        video: str,
        query_mode: str,
        about: Mapping[str, Any] | None = None,
    ) -> bool:
        """Whether this row is there already and need not be run again (never, without ``resume``).

        Args:
            model: as in the row, like the next four.
            checkpoint: see :func:`fingerprint`.
            benchmark: its name.
            video: its name.
            query_mode: ``first`` or ``strided``.
            about: values of ``ABOUT`` that the row must have.
        """
        row = self._rows.get((model, checkpoint, benchmark, video, query_mode)) if self.resume else None
        return row is not None and all(row.get(name) == (about or {}).get(name) for name in ABOUT)

    def add(self, row: Row) -> None:
        """Keep a row, and write the file it belongs to.

        Rows of the same model, benchmark and query mode that differ in ``ABOUT`` are dropped: they do not belong
        into one mean.

        Raises:
            ValueError: when the row lacks one of the columns of ``KEY``.
        """
        missing = [key for key in KEY if key not in row]
        if missing:
            raise ValueError(f"a result row needs {list(KEY)}, it lacks {missing}")
        group = _key(row, GROUP)
        if not self.resume and group not in self._fresh:
            self._rows = {key: old for key, old in self._rows.items() if _key(old, GROUP) != group}
        self._fresh.add(group)
        about = [row.get(name) for name in ABOUT]
        self._rows = {
            key: old
            for key, old in self._rows.items()
            if _key(old, GROUP) != group or [old.get(name) for name in ABOUT] == about
        }
        self._rows[_key(row, KEY)] = row
        path = self._path(row)
        write_rows(path, [other for other in self.rows if self._path(other) == path])

    def summary(self) -> list[Row]:
        """Plain means over videos: one row per model, checkpoint, benchmark and query mode."""
        return summarise(self.rows)

    def write_summary(
        self,
        *,
        environment: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        speed: Sequence[Row] = (),
    ) -> Path:
        """Write ``summary.json``; return its path.

        Args:
            environment: see :func:`describe_environment`.
            config: the composed config of the run.
            speed: rows of :func:`trackbench.evaluation.speed.measure_speed`.
        """
        path = self.folder / "summary.json"
        content = {
            "results": self.summary(),
            "speed": list(speed),
            "environment": dict(environment),
            "config": dict(config or {}),
        }
        write_atomically(path, json.dumps(_json_safe(content), indent=2, allow_nan=False) + "\n")
        return path

    def _path(self, row: Row) -> Path:
        name = f"{_slug(row['model'])}-{_slug(row['checkpoint'])[:12]}-{_slug(row['query_mode'])}.csv"
        return self.folder / _slug(row["benchmark"]) / name


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Means over videos per model, checkpoint, benchmark and query mode, with ``num_videos`` and ``fps``.

    Where the rows say what the videos are (``ABOUT``), so do the means.
    """
    summaries = []
    for key, group in iterate_groups(rows, *GROUP):
        seconds = sum(row["seconds"] for row in group)
        summaries.append(
            {
                **dict(zip(GROUP, key, strict=True)),
                "num_videos": len(group),
                **{name: group[-1][name] for name in ABOUT if group[-1].get(name) is not None},
                **average(group, metric_names(group)),
                "fps": sum(row["num_frames"] for row in group) / seconds if seconds else math.nan,
            }
        )
    return summaries


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics that every row has."""
    return [name for name in METRICS if rows and all(name in row for row in rows)]


def fingerprint(tracker: object, settings: Mapping[str, Any] | None = None) -> str:
    """What a tracker's results depend on, as 12 hex digits: its class, its weights and its settings.

    Two checkpoints with the same weights have the same fingerprint; a changed setting changes it.
    """
    digest = hashlib.sha256(type(tracker).__qualname__.encode())
    digest.update(json.dumps(_json_safe(dict(settings or {})), sort_keys=True, default=str).encode())
    if isinstance(tracker, torch.nn.Module):
        for name, tensor in sorted(tracker.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    else:
        digest.update(json.dumps(_json_safe(vars(tracker)), sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]


def describe_environment(device: torch.device | str = "cpu", command: Sequence[str] | None = None) -> Row:
    """Where and how numbers came about: versions, device, threads, commit, date, command.

    Args:
        device: the device of the tracker.
        command: the command line; None: that of this process.
    """
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]] if command is None else command),
        "commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None,
    }


def videos_of(summary: Row) -> str:
    """How many videos a mean is over: "30", or "1071 of 1189" where the complete benchmark has more."""
    complete = summary.get("benchmark_videos")
    return str(summary["num_videos"]) if complete is None else f"{summary['num_videos']} of {complete}"


def has_half_pixel_shift(summary: Row) -> bool:
    """Whether the points are shifted as the generator of TAP-Vid Kinetics does it."""
    return summary.get("half_pixel_shift") == "yes"


def headline_rows(summaries: Sequence[Row], speed: Sequence[Row] = ()) -> list[Row]:
    """Models against AJ, delta_avg, OA and what they cost, in percent and as text.

    The speed columns are those of the largest number of points that was measured for the model.
    """
    costs: dict[str, Row] = {}
    for row in speed:
        if row["model"] not in costs or row["num_points"] > costs[row["model"]]["num_points"]:
            costs[row["model"]] = row
    table = []
    for row in summaries:
        cost = costs.get(row["model"], {})
        shift = ", half-pixel shift" if has_half_pixel_shift(row) else ""
        latency = f"{cost['latency_ms']:.1f} @ {cost['num_points']}" if cost else "-"
        table.append(
            {
                "benchmark": f"{row['benchmark']} ({row['query_mode']}{shift})",
                "model": row["model"],
                **{name: f"{100 * row[key]:.1f}" for key, name in HEADLINE.items() if key in row},
                "videos": videos_of(row),
                "frames/s": f"{cost.get('fps', row['fps']):.1f}",
                "ms @ points": latency,
                "peak MiB": f"{cost['peak_memory_mib']:.0f}" if cost.get("peak_memory_mib") is not None else "-",
                "params M": f"{cost['parameters'] / 1e6:.2f}" if cost else "-",
            }
        )
    return table


def per_video_rows(rows: Sequence[Row], metric: str = "average_jaccard") -> list[Row]:
    """Videos against models, one metric in percent, as text."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    table: dict[str, Row] = {}
    for row in rows:
        line = table.setdefault(row["video"], {"video": row["video"], **dict.fromkeys(models, "-")})
        line[row["model"]] = f"{100 * row[metric]:.1f}"
    return list(table.values())


def rich_table(rows: Sequence[Row], title: str = "") -> Table:
    """Rows as a table for the terminal; text is on the left, numbers are on the right."""
    table = Table(title=Text(title) if title else None, pad_edge=False)
    columns = _columns(rows)
    for name in columns:
        justify: Literal["right", "left"] = "right" if _is_numeric(rows, name) else "left"
        table.add_column(Text(name), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(row.get(name, "-"))) for name in columns))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a GitHub-flavoured Markdown table."""
    columns = _columns(rows)
    lines = [
        columns,
        ["---:" if _is_numeric(rows, name) else "---" for name in columns],
        *([_markdown_cell(row.get(name, "-")) for name in columns] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a CSV file written by :func:`write_rows`: metrics as float, counts as int.

    Raises:
        ValueError: naming the file, when it lacks a column or holds no number where one belongs.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [key for key in KEY if key not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: not a results file, it lacks the columns {missing}")
        rows = []
        for raw in reader:
            try:
                rows.append({key: _parse(key, value) for key, value in raw.items()})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write rows as CSV, whole or not at all. Numbers keep all their digits; missing cells are empty."""
    columns = _columns(rows)
    with _replacing(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, whole or not at all."""
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _key(row: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row[column] for column in columns)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _parse(column: str, value: str) -> str | int | float | None:
    if column in KEY:
        return value
    if column in INTEGER_COLUMNS:
        return int(value)
    if column == "seconds" or column in METRICS:
        return float(value)
    return value or None


def _slug(text: str) -> str:
    """A file name without separators or dots at its ends."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._") or "unnamed"


def _is_numeric(rows: Sequence[Row], column: str) -> bool:
    cells = [str(row[column]) for row in rows if row.get(column) not in (None, "-")]
    return bool(cells) and all(cell[:1].isdigit() or cell[:1] in "-+" for cell in cells)


def _markdown_cell(value: object) -> str:
    return re.sub(r"\s+", " ", str(value)).replace("|", "\\|")


def _json_safe(value: Any) -> Any:
    """JSON knows no NaN: null instead."""
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _git_commit() -> str | None:
    """Commit of the checkout that this package lies in, with "+" where files differ from it."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
