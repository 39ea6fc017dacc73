"""What a tracker costs on this machine, part by part, against what it can do: ``trackbench bench model=...``.

The ceiling is the rate of plain matrix products. Time is end to end, from a uint8 frame in main memory to tracks.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import nn

from trackbench.composition import load_checkpoint, load_tracker, tracker_config
from trackbench.evaluation.bench_common import (
    check_output,
    fill_settings,
    in_own_process,
    number_text,
    parse_arguments,
    percent_text,
    write_result,
)
from trackbench.evaluation.memory import MIB, peak_memory
from trackbench.evaluation.parts import REST, Breakdown, OperationClock, device_clock, parts_of
from trackbench.evaluation.results import describe_environment
from trackbench.evaluation.runner import Row
from trackbench.evaluation.speed import (
    Run,
    count_parameters,
    counted_operations,
    measure_calls,
    moving_texture,
    scattered_points,
    timed,
)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CEILING_REPEATS = 10


@dataclass
class BenchSettings:
    """What is measured; ``trackbench bench --help`` explains every key."""

    model: str = field(
        default="trackon_tiny", metadata={"help": "a name of `trackbench models`, or a .ckpt of trackbench"}
    )
    checkpoint: str | None = field(default=None, metadata={"help": "its weights; time does not depend on them"})
    overrides: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "its settings as in load_tracker: '{memory_size:48}', or overrides.KEY=VALUE"},
    )
    points: list[int] = field(
        default_factory=lambda: [1, 64, 256],
        metadata={"help": "numbers of points, one row each; all enter at the first frame"},
    )
    frames: int = field(default=24, metadata={"help": "frames of the video, a texture that moves"})
    size: list[int] = field(
        default_factory=lambda: [256, 256],
        metadata={"help": "height and width of the video; the model resizes it to its own input"},
    )
    warmup: int = field(default=4, metadata={"help": "frames of a stream that do not count"})
    repeats: int = field(
        default=3, metadata={"help": "clips that count where the model needs whole clips; one more comes before"}
    )
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, cuda:1"})
    precision: str = field(default="fp32", metadata={"help": "fp32, bf16 or fp16 (CUDA only), by torch.autocast"})
    compile: bool | str = field(
        default=False, metadata={"help": "torch.compile; true, or one of its modes, e.g. reduce-overhead"}
    )
    threads: int | None = field(default=None, metadata={"help": "torch threads; null: as many as cores"})
    operations: bool = field(
        default=True, metadata={"help": "count floating-point operations, by running once more"}
    )
    ceiling_size: int | None = field(
        default=None, metadata={"help": "side of the ceiling's matrices; null: 2048, on CUDA 8192"}
    )
    isolate: bool = field(
        default=True, metadata={"help": "a new process for each row, so that peak memory is that row's own"}
    )
    reference: str | None = field(
        default=None, metadata={"help": "a .json with measurements of the original code to compare with"}
    )
    output: str | None = field(
        default=None, metadata={"help": "write everything to this .json, or the rows to this .csv"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})

    def check(self) -> None:
        """Raises ValueError where a setting, or a combination, makes no sense or cannot run here."""
        if not self.points or min(self.points) < 1:
            raise ValueError(f"points={self.points}: expected numbers of at least 1, e.g. points=[1,64,256]")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size={self.size}: expected [height,width] in pixels")
        if not 0 <= self.warmup < self.frames or self.repeats < 1:
            raise ValueError(
                f"frames={self.frames} with warmup={self.warmup} and repeats={self.repeats} times nothing: "
                "expected 0 <= warmup < frames and repeats >= 1"
            )
        for name in ("threads", "ceiling_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1, or null")
        self._check_device()
        if isinstance(self.compile, str) and self.compile not in COMPILE_MODES:
            raise ValueError(f"compile={self.compile}: expected true, false or one of {', '.join(COMPILE_MODES)}")
        if self.checkpoint is not None and not Path(self.checkpoint).is_file():
            raise ValueError(f"checkpoint={self.checkpoint}: no such file")
        check_output(self.output, self.overwrite)
        if not self.model.endswith(".ckpt"):
            tracker_config(self.model, self.overrides)

    def _check_device(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device}: expected cpu, cuda or cuda:N")
        if self.device != "cpu":
            found = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if (torch.device(self.device).index or 0) >= found:
                raise ValueError(f"device={self.device}: torch {torch.__version__} finds {found} CUDA devices")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision}: expected one of {', '.join(PRECISIONS)}")
        if self.precision == "fp16" and self.device == "cpu":
            raise ValueError("precision=fp16 needs a CUDA device; use bf16 or fp32 on the CPU")


def read_settings(arguments: Sequence[str]) -> BenchSettings:
    """Settings from ``KEY=VALUE`` in Hydra's syntax, as train.py takes them.

    Raises:
        ValueError: something else, an unknown key, a value of another type, or one that makes no sense.
    """
    plain: list[tuple[str, Any, str]] = []
    overrides: dict[str, Any] = {}
    for key, value, argument in parse_arguments(arguments):
        if key.startswith("overrides."):
            overrides[key.removeprefix("overrides.")] = value
        else:
            plain.append((key, value, argument))
    settings = fill_settings(BenchSettings, plain)
    settings.overrides.update(overrides)
    settings.check()
    return settings


def run_bench(settings: BenchSettings, progress: Callable[[str], None] = lambda line: None) -> Row:
    """Measure the ceiling, then the tracker once per number of points.

    Args:
        settings: what to measure.
        progress: called with a line of text before each step.

    Returns:
        ``environment``, ``settings``, ``ceiling`` (see :func:`matmul_ceiling`), ``reference`` (None, or the file's
        ``machine`` and ``note``) and ``rows``: those of :func:`measure_row`, with ``gflops_per_second``,
        ``ceiling_share`` (of the best rate), and where the reference has that number of points
        ``original_s_per_frame``, ``ratio`` (original / ours, of the medians), ``original_cpu_s_per_frame``,
        ``cpu_ratio``, ``original_peak_mib``. The whole can be written as JSON.

    Raises:
        ValueError: see :meth:`BenchSettings.check`; a model that cannot be compiled; a broken reference.
        ChildProcessError: the process of a row died.
    """
    settings.check()
    reference = None if settings.reference is None else read_reference(settings.reference)
    device = torch.device(settings.device)
    with _threads(settings.threads):
        environment = describe_environment(device)
        progress("measuring the ceiling")
        ceiling = matmul_ceiling(device, PRECISIONS[settings.precision], settings.ceiling_size)
        rows = []
        for count in settings.points:
            what = f"{settings.model} with {count} points"
            progress(f"measuring {what}")
            if settings.isolate:
                row = in_own_process(what, _measure_alone, settings, count)
            else:
                row = measure_row(settings, count)
            _compare(row, ceiling, None if reference is None else reference.rows.get(count))
            rows.append(row)
    result = {
        "environment": environment,
        "settings": vars(settings).copy(),
        "ceiling": ceiling,
        "reference": None if reference is None else {"machine": reference.machine, "note": reference.note},
        "rows": rows,
    }
    if settings.output is not None:
        write_result(settings.output, result, [_flat(row) for row in rows])
    return result


def measure_row(settings: BenchSettings, count: int) -> Row:
    """Measure the tracker with one number of points, in this process and with its threads.

    Returns:
        ``model``, ``device``, ``precision``, ``compiled``, ``num_points``, ``num_frames``, ``height``, ``width``,
        ``mode``, ``lag_frames``, ``latency_ms`` (median), ``latency_p95_ms``, ``mean_ms``, ``fps``, ``cpu_ms``
        (median processor time of all threads; None on CUDA), ``peak_memory_mib`` (above what was in use before
        the first frame), ``peak_total_mib``, ``memory_kind``, ``parameters``, ``trainable_parameters``,
        ``parts_ms`` (part -> mean; they add up to ``mean_ms``), ``gflops_per_frame`` and ``parts_gflops`` (None:
        not counted). All per frame.
    """
    device = torch.device(settings.device)
    tracker = _load(settings)
    generator = torch.Generator().manual_seed(0)
    height, width = settings.size
    video = moving_texture(settings.frames, height, width, generator)
    xy = scattered_points(count, height, width, generator)
    measure = partial(measure_calls, tracker, video, xy, warmup=settings.warmup)
    dtype = PRECISIONS[settings.precision]
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)

    parts = parts_of(tracker, compiled=bool(settings.compile))
    breakdown = Breakdown(tracker, parts, device_clock(device))

    def take(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        cpu = process_time()
        result, seconds = timed(partial(breakdown.record, call), device)
        cpu = process_time() - cpu
        return result, _closed(breakdown.spent(), seconds) | {"total": seconds, "cpu": cpu}

    with _on(device), breakdown.attached(), peak_memory(device) as peak, autocast():
        run = measure(take, clips=settings.repeats, warmup_clips=1)
    spent = _per_frame(run)
    milliseconds = {name: 1000 * values for name, values in spent.items()}
    total = milliseconds.pop("total")
    cpu = milliseconds.pop("cpu")
    row: Row = {
        "model": settings.model,
        "device": settings.device,
        "precision": settings.precision,
        "compiled": bool(settings.compile),
        "num_points": count,
        "num_frames": settings.frames,
        "height": height,
        "width": width,
        "mode": run.mode,
        "lag_frames": run.lag,
        "latency_ms": float(np.median(total)),
        "latency_p95_ms": float(np.quantile(total, 0.95)),
        "mean_ms": float(total.mean()),
        "fps": 1000 / float(total.mean()),
        "cpu_ms": float(np.median(cpu)) if device.type == "cpu" else None,
        "peak_memory_mib": None if peak.added is None else peak.added / MIB,
        "peak_total_mib": None if peak.total is None else peak.total / MIB,
        "memory_kind": peak.kind,
        **count_parameters(tracker),
        "parts_ms": {name: float(values.mean()) for name, values in milliseconds.items()},
        "gflops_per_frame": None,
        "parts_gflops": None,
    }
    if settings.operations:
        with _on(device), _eager(bool(settings.compile)), counted_operations() as counter, autocast():
            counted = Breakdown(tracker, parts, OperationClock(counter))

            def count_in(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
                return counted.record(call), counted.spent()

            with counted.attached():
                operations = _per_frame(measure(count_in, clips=1, warmup_clips=0))
        row["parts_gflops"] = {name: float(values.mean()) / 1e9 for name, values in operations.items()}
        row["gflops_per_frame"] = sum(row["parts_gflops"].values())
    return row


def matmul_ceiling(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    repeats: int = CEILING_REPEATS,
) -> Row:
    """The rate of products of two square matrices, on this process's threads.

    Args:
        device: cpu or CUDA.
        dtype: of the matrices.
        size: their side; None: 2048, on CUDA 8192.
        repeats: products that are timed, after three to warm up.

    Returns:
        ``gflops_median`` and ``gflops_best`` per second, ``size``, ``dtype``, ``repeats``.
    """
    device = torch.device(device)
    side = size or (8192 if device.type == "cuda" else 2048)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    product = torch.empty_like(a)
    clock = device_clock(device)
    with _on(device), torch.no_grad():
        for _ in range(3):
            torch.mm(a, b, out=product)
        readings = [clock.read()]
        for _ in range(repeats):
            torch.mm(a, b, out=product)
            readings.append(clock.read())
        seconds = np.asarray(clock.differences(readings))
    rates = 2 * side**3 / seconds / 1e9
    return {
        "gflops_median": float(np.median(rates)),
        "gflops_best": float(rates.max()),
        "size": side,
        "dtype": str(dtype).removeprefix("torch."),
        "repeats": repeats,
    }


@dataclass(frozen=True)
class Reference:
    """Measurements of the original code.

    Attributes:
        rows: number of points -> ``s_per_frame``, ``cpu_s_per_frame`` and ``peak_mib``, where known.
        machine: what they were taken on.
        note: what the file says about them.
    """

    rows: dict[int, dict[str, float]]
    machine: str | None
    note: str | None


# our name -> names in the files, with what makes them our unit
REFERENCE_KEYS: dict[str, dict[str, float]] = {
    "s_per_frame": {"median_s_per_frame": 1.0, "wall_seconds_per_frame_best": 1.0},
    "cpu_s_per_frame": {"median_cpu_s_per_frame": 1.0, "cpu_seconds_per_frame_median": 1.0},
    "peak_mib": {"peak_rss_mib": 1.0, "peak_rss_mb": 1e6 / MIB},
}


def read_reference(path: str | Path) -> Reference:
    """Measurements of the original code from a JSON file.

    It holds an object for each number of points N under the key ``"N<N>"``, or is one itself that names it as
    ``N=<N>`` in ``"case"``. The objects have the keys of ``REFERENCE_KEYS``, or some of them.

    Raises:
        ValueError: no JSON, or nothing of that kind in it.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    found = {
        int(key[1:]): value
        for key, value in content.items()
        if re.fullmatch(r"N\d+", key) and isinstance(value, dict)
    }
    case = re.search(r"\bN=(\d+)", str(content.get("case", "")))
    if case is not None:
        found[int(case.group(1))] = content
    rows = {count: _reference_row(value, f"{path}: N{count}") for count, value in found.items()}
    if not any(rows.values()):
        names = ", ".join(name for names in REFERENCE_KEYS.values() for name in names)
        raise ValueError(f'{path}: expected "N<points>" objects, or "case" with N=<points>, with some of {names}')
    machine = content.get("machine")
    machine = machine.get("cpu") if isinstance(machine, dict) else machine
    return Reference(rows, machine, content.get("note"))


def _reference_row(value: Mapping[str, Any], origin: str) -> dict[str, float]:
    row = {}
    for ours, names in REFERENCE_KEYS.items():
        for name, factor in names.items():
            if name not in value:
                continue
            number = value[name]
            if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < float("inf"):
                raise ValueError(f"{origin} {name} must be a positive number, got {number!r}")
            row[ours] = factor * number
    return row


def _flat(row: Row) -> Row:
    flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
    for unit in ("ms", "gflops"):
        flat |= {f"{unit} {name}": value for name, value in (row[f"parts_{unit}"] or {}).items()}
    return flat


def tables(result: Row) -> list[tuple[str, list[Row]]]:
    """Titles and lines of all tables of a result."""
    shown = [("end to end, per frame", bench_table(result))]
    if result["reference"] is not None:
        shown.append(("beside the original (ratio: original / ours)", comparison_table(result)))
    return shown + [
        (f"{row['num_points']} points, part by part", parts_table(row, result["ceiling"]))
        for row in result["rows"]
    ]


def bench_table(result: Row) -> list[Row]:
    """A line per number of points, as text for tables."""
    return [
        {
            "model": row["model"],
            "points": str(row["num_points"]),
            "mode": row["mode"] if not row["lag_frames"] else f"{row['mode']}, lag {row['lag_frames']}",
            "frames/s": number_text(row["fps"], 2),
            "median ms": number_text(row["latency_ms"]),
            "p95 ms": number_text(row["latency_p95_ms"]),
            "CPU ms": number_text(row["cpu_ms"]),
            "GFLOP/frame": number_text(row["gflops_per_frame"]),
            "GFLOP/s": number_text(row["gflops_per_second"]),
            "of ceiling": percent_text(row["ceiling_share"]),
            "peak MiB above": number_text(row["peak_memory_mib"], 0),
            "in total": number_text(row["peak_total_mib"], 0),
        }
        for row in result["rows"]
    ]


def comparison_table(result: Row) -> list[Row]:
    """A line per number of points, ours beside the original, as text for tables; ratios are original / ours."""
    return [
        {
            "points": str(row["num_points"]),
            "s/frame": number_text(row["latency_ms"] / 1000, 3),
            "original": number_text(row["original_s_per_frame"], 3),
            "ratio": number_text(row["ratio"], 2),
            "CPU s/frame": number_text(None if row["cpu_ms"] is None else row["cpu_ms"] / 1000, 3),
            "original CPU": number_text(row["original_cpu_s_per_frame"], 3),
            "CPU ratio": number_text(row["cpu_ratio"], 2),
            "peak MiB": number_text(row["peak_total_mib"], 0),
            "original peak": number_text(row["original_peak_mib"], 0),
        }
        for row in result["rows"]
    ]


def parts_table(row: Row, ceiling: Row) -> list[Row]:
    """A line per part of one row, and their sum, as text for tables."""
    operations = row["parts_gflops"] or {}
    times = {**row["parts_ms"], "total (mean)": row["mean_ms"]}
    counts = {**operations, "total (mean)": row["gflops_per_frame"]}
    lines = []
    for name, milliseconds in times.items():
        amount = counts.get(name)
        rate = None if amount is None or milliseconds <= 0 else amount / milliseconds * 1000
        lines.append(
            {
                "part": name,
                "ms/frame": number_text(milliseconds, 2),
                "of time": percent_text(milliseconds / row["mean_ms"]),
                "GFLOP/frame": number_text(amount, 2),
                "of ceiling": percent_text(None if rate is None else rate / ceiling["gflops_best"]),
            }
        )
    return lines


def header_lines(result: Row) -> list[str]:
    """The machine, its ceiling, and where the reference comes from."""
    environment, settings, ceiling = result["environment"], result["settings"], result["ceiling"]
    compiled = f", compile={settings['compile']}" if settings["compile"] else ""
    lines = [
        f"{environment['gpu'] or environment['cpu']}, torch {environment['torch']}, "
        f"{environment['threads']} threads, {environment['date']}",
        f"ceiling: {ceiling['gflops_median']:.0f} GFLOP/s median, {ceiling['gflops_best']:.0f} best of "
        f"{ceiling['repeats']} {ceiling['dtype']} products of {ceiling['size']} x {ceiling['size']} matrices",
        f"{settings['model']}: {settings['frames']} frames of {settings['size'][0]} x {settings['size'][1]}, "
        f"{settings['precision']}{compiled}",
    ]
    if result["reference"] is not None:
        said = [text for text in result["reference"].values() if text]
        lines.append(f"original: {'; '.join(said) or 'on an unknown machine'}")
    return lines


def _compare(row: Row, ceiling: Row, original: Mapping[str, float] | None) -> None:
    """Add the columns against the ceiling and against the original code."""
    operations, seconds = row["gflops_per_frame"], row["latency_ms"] / 1000
    rate = None if operations is None else operations / seconds
    row["gflops_per_second"] = rate
    row["ceiling_share"] = None if rate is None else rate / ceiling["gflops_best"]
    known = original or {}
    ours = {"s_per_frame": seconds, "cpu_s_per_frame": None if row["cpu_ms"] is None else row["cpu_ms"] / 1000}
    for name, ratio in (("s_per_frame", "ratio"), ("cpu_s_per_frame", "cpu_ratio")):
        theirs, own = known.get(name), ours[name]
        row[f"original_{name}"] = theirs
        row[ratio] = None if theirs is None or not own else theirs / own
    row["original_peak_mib"] = known.get("peak_mib")


def _per_frame(run: Run[dict[str, float]]) -> dict[str, np.ndarray]:
    """Each name's amounts, one for every call, per frame."""
    return {name: np.array([cost[name] for cost in run.costs]) / run.frames for name in run.costs[0]}


def _closed(parts: dict[str, float], total: float) -> dict[str, float]:
    """The parts with the rest that is missing to ``total``."""
    return parts | {REST: total - sum(value for name, value in parts.items() if name != REST)}


def _load(settings: BenchSettings) -> Any:
    """The tracker, compiled where asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no checkpoint given")  # time does not depend on the weights
        if settings.model.endswith(".ckpt"):
            tracker: Any = load_checkpoint(settings.model, settings.device, **settings.overrides)
        else:
            tracker = load_tracker(settings.model, settings.checkpoint, settings.device, **settings.overrides)
    if settings.compile:
        # every module has a `compile`, which takes `forward` only; streams and clips do not call a tracker's
        if getattr(type(tracker), "compile", nn.Module.compile) is nn.Module.compile:
            raise ValueError(f"compile=true: {type(tracker).__name__} cannot be compiled")
        tracker.compile(**({"mode": settings.compile} if isinstance(settings.compile, str) else {}))
    return tracker


def _measure_alone(settings: BenchSettings, count: int) -> Row:
    with _threads(settings.threads):
        return measure_row(settings, count)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one, whose queue and events are meant."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _eager(compiled: bool) -> AbstractContextManager[Any]:
    """Run compiled code as it was written: the counter does not see into it."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
