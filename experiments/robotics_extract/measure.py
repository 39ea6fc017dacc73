"""How fast episodes are extracted, beside ffmpeg alone on the same frames, and how much memory that takes."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np

from trackbench.data.video_io import FOR_BROWSERS
from trackbench.robotics.episodes import EpisodeFile
from trackbench.robotics.miniature import MiniatureSettings, make_episodes


class Run(NamedTuple):
    """One measurement: seconds of wall and CPU time, share of the machine that others used, peak memory in MiB."""

    wall: float
    cpu: float
    others: float
    pss: float
    rss: float


def tree(root: int) -> list[int]:
    """Ids of a process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting += children.get(found[-1], [])
    return found


def memory(root: int) -> tuple[float, float]:
    """Proportional (shared pages count once) and resident memory of a process and all below it, MiB."""
    totals = {"Pss": 0, "Rss": 0}
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            key, value = line.split(":")
            if key in totals:
                totals[key] += int(value.split()[0])
    return totals["Pss"] / 1024, totals["Rss"] / 1024


def busy() -> float:
    """CPU seconds that the machine has spent on anything."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:8]
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@contextmanager
def sampled(peak: dict[str, float]) -> Iterator[None]:
    """Keep the peak of the memory of this process's children."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            for key, total, own in zip(("pss", "rss"), memory(os.getpid()), own_memory(), strict=True):
                peak[key] = max(peak.get(key, 0.0), total - own)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def own_memory() -> tuple[float, float]:
    """As :func:`memory`, of this process alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split(":")[1].split()[0]) / 1024 for line in lines}
    return values["Pss"], values["Rss"]


def run(commands: list[list[str]], at_once: int) -> Run:
    """Run commands, ``at_once`` of them at a time."""
    before, machine, start = os.times(), busy(), time.perf_counter()
    peak: dict[str, float] = {}
    with sampled(peak), ThreadPoolExecutor(at_once) as pool:
        for done in pool.map(lambda command: subprocess.run(command, capture_output=True, check=False), commands):
            if done.returncode:
                raise SystemExit(f"status {done.returncode}: {done.stderr.decode()}")
    wall, after = time.perf_counter() - start, os.times()
    cpu = sum(getattr(after, key) - getattr(before, key) for key in ("children_user", "children_system"))
    mine = cpu + after.user - before.user + after.system - before.system
    others = (busy() - machine - mine) / (wall * len(os.sched_getaffinity(0)))
    return Run(wall, cpu, others, peak.get("pss", 0.0), peak.get("rss", 0.0))


def ffmpeg(raw: Path, height: int, width: int, fps: float, threads: int) -> list[str]:
    """Command of ffmpeg alone with the settings of `extract`, reading raw frames from a file."""
    return [
        *(imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y", "-f", "rawvideo"),
        *("-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", str(raw), "-an"),
        *FOR_BROWSERS,
        *("-c:v", "libx264", "-threads", str(threads), "-preset", "veryfast", "-crf", "18"),
        *("-pix_fmt", "yuv420p", "-g", str(round(fps)), "-f", "mp4", f"{raw}.mp4"),
    ]


def main() -> None:
    """Make episodes, measure in turns, and print one line per kind of run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="for the data; about 1 GB per 500 steps, twice")
    parser.add_argument("--episodes", type=int, default=8, help="hard links to one made episode")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--compression", default="none", choices=("none", "gzip", "lzf"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    settings = MiniatureSettings(steps=options.steps, compression=options.compression)
    made = options.folder / f"made_{options.steps}_{options.compression}"
    episode = made / "episode_0.h5"
    raws = [made / f"camera_{camera}.rgb" for camera in range(settings.cameras)]
    if not episode.is_file():
        make_episodes(made, 1, settings)
    if not all(raw.is_file() for raw in raws):
        with EpisodeFile(episode) as opened:
            for camera, raw in enumerate(raws):
                with raw.open("wb") as file:
                    for frame in opened.frames(camera):
                        file.write(np.ascontiguousarray(frame))
    source, out = options.folder / "in", options.folder / "out"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for number in range(options.episodes):
        os.link(episode, source / f"episode_{number}.h5")
    extract = [sys.executable, "-m", "trackbench.cli", "h5", "extract", str(source), str(out)]
    extract += ["--workers", str(options.workers)]
    shape = (settings.height, settings.width, settings.fps)
    kinds = {
        "ffmpeg alone, its own threads, one after another": ([ffmpeg(raw, *shape, 0) for raw in raws], 1),
        "ffmpeg alone, one thread each, as many as cores": (
            [ffmpeg(raw, *shape, 1) for raw in raws] * max(1, options.workers // 2),
            len(os.sched_getaffinity(0)),
        ),
        "trackbench h5 extract": ([extract], 1),
        "trackbench h5 extract, all there already": ([extract], 1),
    }
    results: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for _ in range(options.repeats):
        shutil.rmtree(out, ignore_errors=True)
        for kind, (commands, at_once) in kinds.items():
            results[kind].append(run(commands, at_once))
    per_episode = options.steps * settings.cameras
    frames = {
        kind: per_episode * options.episodes if commands == [extract] else options.steps * len(commands)
        for kind, (commands, _) in kinds.items()
    }
    sys.stdout.write(f"{options.episodes} episodes of {options.steps} steps, {options.compression}, ")
    sys.stdout.write(f"{options.workers} processes, {len(os.sched_getaffinity(0))} cores\n")
    for kind, runs in results.items():
        rates = sorted(frames[kind] / each.wall for each in runs)
        sys.stdout.write(
            f"{kind}: {statistics.median(rates):.0f} frames/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
            f"{1000 * statistics.median(each.cpu / frames[kind] for each in runs):.2f} ms CPU per frame, "
            f"{statistics.median(each.wall for each in runs):.1f} s, "
            f"peak {max(each.pss for each in runs):.0f} MiB ({max(each.rss for each in runs):.0f} resident), "
            f"others used {statistics.median(each.others for each in runs):.0%} of the machine\n"
        )


if __name__ == "__main__":
    main()
