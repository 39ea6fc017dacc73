"""How fast training data is loaded on this machine, and where the time goes: ``trackbench bench data=...``.

Batches come from the training loader of a data module, as in training, and are dropped at once.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from trackbench.composition import compose_config, configs_dir
from trackbench.data.loading import single_thread
from trackbench.evaluation.bench_common import (
    check_output,
    fill_settings,
    in_own_process,
    number_text,
    parse_arguments,
    percent_text,
    write_result,
)
from trackbench.evaluation.memory import MIB, peak_memory_of_all
from trackbench.evaluation.parts import Breakdown, CpuClock, Function, WallClock
from trackbench.evaluation.results import Row, describe_environment
from trackbench.structures import VideoBatch

# which functions belong to which stage, where they are looked up; what none of them does is `rest`
STAGES = (
    Function("read", "trackbench.data.tfds.shards:TfRecordShard.record"),
    Function("read", "trackbench.data.tfds.shards:RemoteTfRecordShard.record"),
    Function("read", "trackbench.data.tfds.shards:ArrayRecordShard.record"),
    Function("read", "trackbench.data.tfds.dataset:read_features"),
    Function("read", "trackbench.data.folder:TrackFolder.__getitem__"),  # the annotations
    Function("decode", "trackbench.data.tfds.features:Feature.decode"),
    Function(
        "decode", "trackbench.data.folder:TrackedSequence.clip"
    ),  # with reading: a file is decoded as it is read
    Function("scene", "trackbench.data.synthetic.dataset:SyntheticDataset.scene"),
    Function("render", "trackbench.data.synthetic.dataset:render"),
    Function("tracks", "trackbench.data.tfds.scenes:sample_tracks"),
    Function("tracks", "trackbench.data.synthetic.dataset:sample_tracks"),
    Function("augmentation: crop", "trackbench.data.kubric.sampling:crop_frames"),
    Function("augmentation: colours", "trackbench.data.colour:ColourAugmentation.__call__"),
    Function("augmentation: rest", "trackbench.data.augmentation:TrackOnAugmentation.__call__"),
    Function("augmentation: boxes", "trackbench.data.augmentation:erase"),
    Function("augmentation: boxes", "trackbench.data.augmentation:replace_boxes"),
    Function("augmentation: colours", "trackbench.data.augmentation:jitter_colours"),
    Function("augmentation: blur", "trackbench.data.augmentation:blur"),
    Function("augmentation: crop", "trackbench.data.augmentation:pad"),
    Function("augmentation: crop", "trackbench.data.augmentation:scale_and_crop"),
    Function("augmentation: crop", "trackbench.data.augmentation:flip"),
    Function("batching", "trackbench.data.movi:as_batch"),
    Function("batching", "trackbench.data.panning_movi_e:asked_as_sampled"),
    Function("batching", "trackbench.structures:VideoBatch.collate"),
    Function("transfer", "trackbench.evaluation.bench_data:to_another_process"),
)
OVERRIDES = "data."  # what these keys start with


@dataclass
class DataBenchSettings:
    """What is measured; ``trackbench bench --help`` explains every key."""

    data: str = field(
        default="synthetic",
        metadata={"help": "a name of configs/data; data.KEY=VALUE changes its settings, as in training"},
    )
    workers: list[int] = field(
        default_factory=lambda: [0, 1, 2, 4],
        metadata={"help": "numbers of loading processes, one row each; 0: in the training process"},
    )
    samples: int = field(default=64, metadata={"help": "of each repetition, and of the breakdown"})
    repeats: int = field(default=3, metadata={"help": "repetitions, one after the other; one more is for memory"})
    warmup: int = field(
        default=16, metadata={"help": "samples that do not count; at least two batches for each process"}
    )
    isolate: bool = field(default=True, metadata={"help": "a new process for each row"})
    output: str | None = field(
        default=None, metadata={"help": "write everything to this .json, or the rows to this .csv"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an output that exists"})
    overrides: list[str] = field(default_factory=list)  # data.KEY=VALUE, as given

    def check(self) -> None:
        """Raises ValueError where a setting, or a combination, makes no sense."""
        if not self.workers or min(self.workers) < 0:
            raise ValueError(f"workers={self.workers}: expected numbers of at least 0, e.g. workers=[0,1,2]")
        for name, least in (("samples", 1), ("repeats", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least {least}")
        check_output(self.output, self.overwrite)
        self.config()

    def config(self) -> DictConfig:
        """The data module's config.

        Raises:
            ValueError: an unknown name or setting, or one that is missing.
        """
        names = sorted(path.stem for path in (configs_dir() / "data").glob("*.yaml"))
        if self.data not in names:
            raise ValueError(f"unknown data {self.data!r}; expected one of {', '.join(names)}")
        try:
            config = compose_config("train", [f"data={self.data}", *self.overrides]).data
        except HydraException as error:
            raise ValueError(f"data={self.data}: {str(error).splitlines()[0]}") from None
        if any(text.lstrip("+").startswith(f"{OVERRIDES}num_workers=") for text in self.overrides):
            raise ValueError("data.num_workers: workers=[...] says how many")
        if "num_workers" not in config:
            raise ValueError(f"data={self.data} has no num_workers: it loads in the training process only")
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(f"data={self.data} needs {', '.join(f'{key}=...' for key in missing)}")
        return config


def is_meant(arguments: Sequence[str]) -> bool:
    """Whether ``KEY=VALUE`` arguments are of a bench of data: one of the keys that no bench of a model has."""
    keys = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    return not keys.isdisjoint(("data", "workers", "samples")) or any(key.startswith(OVERRIDES) for key in keys)


def read_settings(arguments: Sequence[str]) -> DataBenchSettings:
    """Settings from ``KEY=VALUE`` in Hydra's syntax, as train.py takes them.

    Raises:
        ValueError: something else, an unknown key, a value of another type, or one that makes no sense.
    """
    plain, overrides = [], []
    for key, value, argument in parse_arguments(arguments, appended=OVERRIDES):
        if key.startswith(OVERRIDES):
            overrides.append(argument)
        else:
            plain.append((key, value, argument))
    settings = fill_settings(DataBenchSettings, plain)
    settings.overrides = overrides
    settings.check()
    return settings


def run_bench(settings: DataBenchSettings, progress: Callable[[str], None] = lambda line: None) -> Row:
    """Split the time of a sample into stages, then measure once per number of workers.

    Args:
        settings: what to measure.
        progress: called with a line of text before each step.

    Returns:
        ``environment``, ``load`` (the system's load average before, None where it is unknown), ``settings``,
        ``data`` (the data module's config), ``stages`` (see :func:`measure_stages`) and ``rows``: those of
        :func:`measure_loading`. The whole can be written as JSON.

    Raises:
        ValueError: see :meth:`DataBenchSettings.check`, or of the data module: bad data.
        OSError: of the data module, such as FileNotFoundError: no data.
        ChildProcessError: the process of a row died.
    """
    settings.check()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    train_loader(settings, 0)  # so that missing data is said at once
    progress(f"measuring the stages of {settings.data}")
    measure: Callable[..., Row] = partial(in_own_process, settings.data) if settings.isolate else _here
    stages = measure(measure_stages, settings)
    rows = []
    for workers in settings.workers:
        progress(f"measuring {settings.data} with {workers} workers")
        rows.append(measure(measure_loading, settings, workers))
    result = {
        "environment": describe_environment(),
        "load": load,
        "settings": vars(settings).copy(),
        "data": OmegaConf.to_container(settings.config(), resolve=True),
        "stages": stages,
        "rows": rows,
    }
    if settings.output is not None:
        write_result(settings.output, result, rows)
    return result


def measure_loading(settings: DataBenchSettings, workers: int) -> Row:
    """Measure the rate of the training loader, from this process.

    Returns:
        ``data``, ``workers``, ``batch_size``, ``samples`` (of a repetition), ``repeats``,
        ``samples_per_second``: the median repetition's, as ``samples_per_second_min`` and ``_max``;
        ``cpu_s_per_sample`` (median) of all processes, None where the system does not tell; ``peak_memory_mib``
        of all processes while loading, with interpreters and libraries, and ``memory_kind``.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores: as asked for
        loader = train_loader(settings, workers)
        batches = endless(loader)
        batch_size = next(batches).video.shape[0]
    count = math.ceil(settings.samples / batch_size)
    # what the processes had prepared before the clock starts would come for nothing
    prepared = (loader.prefetch_factor or 0) * workers
    for _ in range(max(math.ceil(settings.warmup / batch_size), prepared)):
        next(batches)
    seconds, cpu_seconds = [], []
    for _ in range(settings.repeats):
        cpu, start = processor_seconds(), perf_counter()
        for _ in range(count):
            next(batches)
        seconds.append(perf_counter() - start)
        now = processor_seconds()
        cpu_seconds.append(math.nan if cpu is None or now is None else now - cpu)
    with peak_memory_of_all() as peak:
        for _ in range(count):
            next(batches)
    batches.close()
    rates = count * batch_size / np.array(seconds)
    cpu_each = float(np.median(cpu_seconds)) / (count * batch_size)
    return {
        "data": settings.data,
        "workers": workers,
        "batch_size": batch_size,
        "samples": count * batch_size,
        "repeats": settings.repeats,
        "samples_per_second": float(np.median(rates)),
        "samples_per_second_min": float(rates.min()),
        "samples_per_second_max": float(rates.max()),
        "cpu_s_per_sample": None if math.isnan(cpu_each) else cpu_each,
        "peak_memory_mib": None if peak.total is None else peak.total / MIB,
        "memory_kind": peak.kind,
    }


def measure_stages(settings: DataBenchSettings) -> Row:
    """Split what a sample takes into stages, in this process, on one thread as in a loading process.

    Its way to the training process is taken as well: ``transfer``.

    Returns:
        ``samples``, ``batch_size``, ``num_frames``, ``height``, ``width``, ``num_points``, ``ms`` and ``cpu_ms``:
        stage -> mean per sample of time and of processor time, of the stages that were used; they add up to
        ``total_ms`` and ``total_cpu_ms``.
    """
    wall, cpu = (Breakdown(None, STAGES, clock) for clock in (WallClock(), CpuClock()))
    spent: list[tuple[dict[str, float], dict[str, float]]] = []
    with _one_thread(), wall.attached(), cpu.attached():
        batches = endless(train_loader(settings, 0))
        shape = next(batches)
        batch_size, num_frames, _, height, width = shape.video.shape
        for _ in range(math.ceil(settings.warmup / batch_size)):
            to_another_process(next(batches))
        count = math.ceil(settings.samples / batch_size)
        for _ in range(count):
            wall.record(lambda: cpu.record(lambda: to_another_process(next(batches))))
            spent.append((wall.spent(), cpu.spent()))
        batches.close()
    samples = count * batch_size
    ms, cpu_ms = (
        {name: 1000 * sum(each[kind][name] for each in spent) / samples for name in spent[0][kind]}
        for kind in (0, 1)
    )
    used = [name for name in ms if ms[name] > 0]
    return {
        "samples": samples,
        "batch_size": batch_size,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "num_points": shape.queries.shape[1],
        "ms": {name: ms[name] for name in used},
        "cpu_ms": {name: cpu_ms[name] for name in used},
        "total_ms": sum(ms.values()),
        "total_cpu_ms": sum(cpu_ms.values()),
    }


def to_another_process(batch: VideoBatch) -> VideoBatch:
    """What a batch goes through on its way between processes: into shared memory and a message, and back."""
    sent: VideoBatch = ForkingPickler.loads(ForkingPickler.dumps(batch))
    return sent


def train_loader(settings: DataBenchSettings, workers: int) -> DataLoader[VideoBatch]:
    """The training loader of the data module, as a trainer gets it.

    Raises:
        ValueError: the data module refuses its settings or its data.
        OSError: it finds no data.
    """
    try:
        data: pl.LightningDataModule = instantiate(settings.config(), num_workers=workers)
    except HydraException as error:
        raise ValueError(f"data={settings.data}: {str(error.__cause__ or error).splitlines()[0]}") from None
    data.setup("fit")
    loader: DataLoader[VideoBatch] = data.train_dataloader()
    return loader


def endless(loader: DataLoader[VideoBatch]) -> Generator[VideoBatch, None, None]:
    """Batches of a loader, again and again where it ends."""
    while True:
        batch = None
        for batch in loader:
            yield batch
        if batch is None:
            raise ValueError("the training loader gives no batch")


def processor_seconds() -> float | None:
    """Processor time of this process and its children; None where the system does not tell."""
    total = process_time()
    for child in multiprocessing.active_children():
        try:
            stat = Path(f"/proc/{child.pid}/stat").read_text()
        except OSError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]  # after the name, which may hold anything
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def header_lines(result: Row) -> list[str]:
    """The machine, what else it does, and what a sample is."""
    environment, stages = result["environment"], result["stages"]
    load = "unknown" if result["load"] is None else f"{result['load']:.1f}"
    return [
        f"{environment['cpu']}, {environment['cpu_count']} cores, load {load} before, "
        f"torch {environment['torch']}, {environment['date']}",
        f"{result['settings']['data']}: {stages['num_frames']} frames of {stages['height']} x {stages['width']}, "
        f"{stages['num_points']} points, batches of {stages['batch_size']}",
    ]


def tables(result: Row) -> list[tuple[str, list[Row]]]:
    """Titles and lines of all tables of a result."""
    return [
        ("loading", loading_table(result)),
        ("one sample on one thread, stage by stage", stages_table(result["stages"])),
    ]


def loading_table(result: Row) -> list[Row]:
    """A line per number of workers, as text for tables."""
    lines = []
    for row in result["rows"]:
        cpu = row["cpu_s_per_sample"]
        lines.append(
            {
                "workers": str(row["workers"]),
                "samples/s": number_text(row["samples_per_second"], 2),
                "min": number_text(row["samples_per_second_min"], 2),
                "max": number_text(row["samples_per_second_max"], 2),
                "CPU s/sample": number_text(cpu, 3),
                "cores busy": number_text(None if cpu is None else cpu * row["samples_per_second"], 2),
                "peak MiB": number_text(row["peak_memory_mib"], 0),
            }
        )
    return lines


def stages_table(stages: Row) -> list[Row]:
    """A line per stage, and their sum, as text for tables."""
    times = {**stages["ms"], "total": stages["total_ms"]}
    cpu_times = {**stages["cpu_ms"], "total": stages["total_cpu_ms"]}
    return [
        {
            "stage": name,
            "ms/sample": number_text(milliseconds, 2),
            "of time": percent_text(milliseconds / stages["total_ms"]),
            "CPU ms/sample": number_text(cpu_times[name], 2),
        }
        for name, milliseconds in times.items()
    ]


def _here(call: Callable[..., Row], *arguments: Any) -> Row:
    return call(*arguments)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads(), cv2.getNumThreads()
    single_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
