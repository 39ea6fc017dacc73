"""``trackbench prepare kinetics``: TAP-Vid Kinetics (Doersch et al., NeurIPS 2022) from annotations and raw clips.

The annotations are published, the videos are not: the clips come from Kinetics-700-2020's validation set, and
some are gone. What google-deepmind/tapnet's ``tapvid/generate_tapvid.py`` makes of them is made here: frames at
25 per second in the clip's own size as ffmpeg's JPEGs at its default quality, at most 250, in ten pickles of
equally many videos in the order of the csv. The scaling to 256 x 256 comes later, when a video is read.

Three things differ. The published generator moves every point by half a source pixel, from the raster of the csv
to whole numbers at pixel centres, and every reader then takes it for raster again; that is an option here. The
frames of a video are a list, not an array of strings as long as its largest frame, which is four times larger
(the first frame has the best quality); the published readers take both. And what was there is kept beside the
shards, see :class:`~trackbench.data.manifest.Manifest`.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import pickle
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from trackbench.data.manifest import Manifest
from trackbench.data.tapvid import FILES
from trackbench.data.video_io import VideoReader
from trackbench.files import remove_unfinished, written_whole
from trackbench.jobs import run_jobs

NUM_FRAMES = 250
FPS = 25
NUM_SHARDS = 10
COLUMNS = 3 + 3 * NUM_FRAMES
JPEG_BYTES_PER_PIXEL = (
    0.05  # at ffmpeg's default quality, measured on clips of 340 x 256 to 1280 x 720: up to that
)
_PART = re.compile(rb"\r?\n?--ffmpeg\r\nContent-type: image/jpeg\r\nContent-length: (\d+)\r\n\r\n")
_YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]+")
_HELP = """
TAP-Vid Kinetics from its published annotations and raw clips, as shards like the published ones:
25 frames per second, at most 250, in the clip's own size. Clips that are missing or broken are left out
and listed in missing.csv; how many were there is in manifest.json, and every result states it.
A run that was stopped goes on where it was.

Points: the csv has them on the raster (0 is the left edge, 1 the right edge), and so has everything here.
The published generator subtracts half a source pixel, which puts them 0.5 * 256 / width pixels (0.4 at a
width of 340) to the left of and above what was annotated when they are read. --half-pixel-shift does that
too: for numbers beside those of papers."""


@dataclass(frozen=True)
class Annotation:
    """The tracks of one video of the csv.

    Attributes:
        points: (N, 250, 2) float64, x and y in [0, 1] of the frame, 1 being its right or lower edge.
        occluded: (N, 250) bool.
    """

    points: NDArray[np.float64]
    occluded: NDArray[np.bool_]


def add_command(names: Any) -> None:
    """Add the command."""
    command = names.add_parser(
        "kinetics",
        help="TAP-Vid Kinetics from its csv and raw clips",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--csv",
        type=Path,
        required=True,
        help="tapvid_kinetics.csv of https://storage.googleapis.com/dm-tapnet/tapvid_kinetics.zip",
    )
    command.add_argument(
        "--videos",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with ID_SSSSSS_EEEEEE.mp4 (start and end in seconds) in it or in its subfolders",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    command.add_argument(
        "--half-pixel-shift", action="store_true", help="move the points as the published generator does"
    )
    command.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes (default: %(default)s)",
    )
    command.add_argument(
        "--keep-clips",
        action="store_true",
        help="keep DIR/.clips, as large as the shards, so that another run need only do what is new",
    )
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    manifest, missing = prepare_kinetics(
        options.csv,
        options.videos,
        options.out,
        half_pixel_shift=options.half_pixel_shift,
        workers=options.workers,
        keep_clips=options.keep_clips,
        console=console,
    )
    there = sum(len(names) for names in manifest.files.values())
    listed = f"; {len(missing)} missing or broken: {options.out / 'missing.csv'}" if missing else ""
    console.print(f"{there} of {manifest.num_annotated} videos -> {options.out}{listed}", markup=False)
    return 0


def prepare_kinetics(
    annotations: Path,
    videos: Path,
    out: Path,
    *,
    half_pixel_shift: bool = False,
    workers: int = 1,
    keep_clips: bool = False,
    console: Console | None = None,
) -> tuple[Manifest, dict[str, str]]:
    """Write the shards ``out/NNNN_of_0010.pkl``, ``out/manifest.json`` and ``out/missing.csv``.

    Each clip's frames are kept in ``out/.clips`` until the shards are whole, and used again by a run after a
    stopped one, where the clip and ffmpeg are still the same. A shard is written video by video.

    Args:
        annotations: the published csv.
        videos: the folder of the raw clips, or one above.
        out: a folder without other shards.
        half_pixel_shift: move the points as the published generator does, (p * size - 0.5) / size.
        workers: processes.
        keep_clips: leave ``out/.clips`` there.
        console: for messages and the progress bar; None: standard error.

    Returns:
        The manifest, and the videos that are not in the shards with the reason.

    Raises:
        FileNotFoundError: no csv, or no folder of videos.
        ValueError: a csv of another form, a clip that is there twice, none that is readable, or an ``out`` that
            holds shards of other origin.
        OSError: no room or no access; the next run goes on from there.
    """
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    if not videos.is_dir():
        raise FileNotFoundError(f"{videos}: no such folder of videos")
    if list(out.glob(FILES["kinetics"])) and Manifest.read(out) is None:
        raise ValueError(f"{out} holds shards without a manifest.json, not made here; choose another folder")
    annotated = read_annotations(annotations)
    paths = _find_clips(videos, annotated)
    found = [name for name in annotated if name in paths]
    if not found:
        raise ValueError(
            f"{videos}: none of the {len(annotated)} clips of {annotations}, such as {next(iter(annotated))}.mp4"
        )
    clips = out / ".clips"
    clips.mkdir(parents=True, exist_ok=True)
    remove_unfinished(clips)
    remove_unfinished(out)
    need = 2 * len(found) * _bytes_per_clip([paths[name] for name in found])
    console.print(
        f"{len(found)} of {len(annotated)} clips found; about {_gigabytes(need)} needed in {out}, half of it only "
        f"meanwhile; {_gigabytes(shutil.disk_usage(out).free)} free"
    )

    missing = {name: "not found" for name in annotated if name not in paths}
    stopped = []
    jobs = [(name, paths[name]) for name in found]
    for outcome in run_jobs(partial(_keep_frames, clips), jobs, workers, "clips", console):
        if outcome.error is not None:
            stopped.append(f"{outcome.item[0]}: {outcome.error}")
        elif outcome.result is not None:
            missing[outcome.item[0]] = outcome.result
    if stopped:  # the machine's fault, not the clip's: it must not count as broken
        raise OSError(f"{len(stopped)} clips not done, run it again to go on; {stopped[0]}")
    there = [name for name in found if name not in missing]
    if not there:
        raise ValueError(f"{videos}: all {len(found)} clips are broken; {found[0]}: {missing[found[0]]}")

    missing = {name: missing[name] for name in annotated if name in missing}
    size = math.ceil(len(there) / NUM_SHARDS)
    shards = [there[start : start + size] for start in range(0, len(there), size)]
    files = {f"{number:04}_of_{NUM_SHARDS:04}.pkl": names for number, names in enumerate(shards)}
    manifest = Manifest(len(annotated), half_pixel_shift, files)
    for old in out.glob(FILES["kinetics"]):
        old.unlink()
    _write_missing(out / "missing.csv", missing)
    manifest.write(out)  # first: until all of its files are there, readers refuse the folder
    for written in run_jobs(
        partial(_write_shard, out, annotated, half_pixel_shift), list(files.items()), 1, "shards", console
    ):
        if written.error is not None:
            raise OSError(f"{written.item[0]}: {written.error}; run it again to go on")
    if not keep_clips:
        shutil.rmtree(clips)
    return manifest, missing


def read_annotations(path: Path) -> dict[str, Annotation]:
    """The published csv: a row per track of ``youtube_id, start, end`` and 250 times ``x, y, occluded``.

    Returns:
        Video name ``{youtube_id}_{start:06}_{end:06}`` -> its tracks, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row of another form; the line is named.
    """
    rows: dict[str, list[NDArray[np.float64]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        try:
            for row in reader:
                name, values = _track_of(row)
                rows.setdefault(name, []).append(values)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}:{reader.line_num}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: expected a row per track, it is empty")
    tracks = {name: np.stack(values) for name, values in rows.items()}
    return {name: Annotation(values[:, :, :2], values[:, :, 2] == 1) for name, values in tracks.items()}


def _track_of(row: Sequence[str]) -> tuple[str, NDArray[np.float64]]:
    """Video name and (250, 3) x, y, occluded."""
    if len(row) != COLUMNS:
        raise ValueError(
            f"expected {COLUMNS} columns (id, start, end and {NUM_FRAMES} times x, y, occluded), got {len(row)}"
        )
    video, start, end = row[:3]
    if not (_YOUTUBE_ID.fullmatch(video) and start.isdecimal() and end.isdecimal()):
        raise ValueError(
            f"expected a YouTube id, start and end in whole seconds, got {video!r}, {start!r}, {end!r}"
        )
    unknown = set(row[5::3]) - {"0", "1"}
    if unknown:
        raise ValueError(f"expected occluded to be 0 or 1, got {sorted(unknown)[0]!r}")
    values = np.array([float(value) for value in row[3:]]).reshape(NUM_FRAMES, 3)
    if not np.isfinite(values).all():
        raise ValueError("expected finite coordinates")
    return f"{video}_{int(start):06}_{int(end):06}", values


def encode_frames(video: Path) -> list[bytes]:
    """The frames of a clip as the published generator takes them: JPEG files at 25 per second, at most 250.

    Raises:
        ValueError: ffmpeg cannot read it, or reports damage among these frames.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-nostats", "-v", "error"]
    command += ["-threads", "1", "-i", f"file:{video}", "-map", "0:V:0", "-vf", f"fps={FPS}"]
    command += ["-frames:v", str(NUM_FRAMES), "-fps_mode", "cfr", "-c:v", "mjpeg", "-threads", "1"]
    command += ["-f", "mpjpeg", "-"]  # as image2pipe, but with the length of every frame
    done = subprocess.run(command, capture_output=True, check=False)
    messages = re.sub(" @ 0x[0-9a-f]+", "", done.stderr.decode(errors="replace").strip())  # addresses in memory
    if done.returncode or messages:
        reason = "; ".join(messages.splitlines()[-2:]) or f"ffmpeg ended with code {done.returncode}"
        raise ValueError(f"{video}: broken: {reason}")
    frames, at = [], 0
    while part := _PART.match(done.stdout, at):
        at = part.end() + int(part[1])
        frames.append(done.stdout[part.end() : at])
    if not frames:
        raise ValueError(f"{video}: broken: no frame in it")
    return frames


def _find_clips(root: Path, wanted: Iterable[str]) -> dict[str, Path]:
    names = set(wanted)
    paths: dict[str, Path] = {}
    for path in sorted(root.rglob("*.mp4")):
        if path.stem in names and paths.setdefault(path.stem, path) != path:
            raise ValueError(f"{path.stem} is there twice: {paths[path.stem]} and {path}; remove one")
    return paths


def _bytes_per_clip(videos: Sequence[Path]) -> int:
    """About what the frames of a clip take, from the sizes of a few."""
    pixels = []
    for video in videos[:: max(1, len(videos) // 5)][:5]:
        try:
            reader = VideoReader(video)
        except ValueError:  # it will be listed
            continue
        pixels.append(reader.height * reader.width)
    return int(NUM_FRAMES * JPEG_BYTES_PER_PIXEL * np.mean(pixels or [340 * 256]))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _keep_frames(folder: Path, job: tuple[str, Path]) -> str | None:
    """Put a clip's frames into ``folder`` unless they are there; the reason where it has none."""
    name, video = job
    stat = video.stat()
    source = f"{stat.st_size} bytes of {stat.st_mtime_ns} by ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}"
    path = folder / f"{name}.npz"
    if _has_frames(path, source):
        return None
    try:
        frames = encode_frames(video)
    except ValueError as error:
        return " ".join(str(error).split())
    with written_whole(path) as unfinished:
        np.savez(
            unfinished,
            source=np.array(source),
            jpeg_offsets=np.cumsum([0, *map(len, frames)]),
            jpeg_blob=np.frombuffer(b"".join(frames), np.uint8),
        )
    return None


def _has_frames(path: Path, source: str) -> bool:
    try:
        with np.load(path, allow_pickle=False) as stored:  # a zip file: it checks what it reads
            return str(stored["source"]) == source and len(stored["jpeg_blob"]) == stored["jpeg_offsets"][-1]
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return False


def _video(name: str, clips: Path, annotation: Annotation, half_pixel_shift: bool) -> dict[str, Any]:
    """One video as published, but for the list of frames."""
    with np.load(clips / f"{name}.npz", allow_pickle=False) as stored:
        blob, offsets = stored["jpeg_blob"].tobytes(), stored["jpeg_offsets"].tolist()
    frames = [blob[start:end] for start, end in pairwise(offsets)]
    points = np.ascontiguousarray(annotation.points[:, : len(frames)])
    if half_pixel_shift:
        with Image.open(BytesIO(frames[0])) as image:
            size = np.array(image.size, np.float64)
        points = (points * size - 0.5) / size
    occluded = np.ascontiguousarray(annotation.occluded[:, : len(frames)])
    return {"video": frames, "points": points, "occluded": occluded}


def _write_shard(
    out: Path, annotated: dict[str, Annotation], half_pixel_shift: bool, shard: tuple[str, list[str]]
) -> None:
    file, names = shard
    videos = (_video(name, out / ".clips", annotated[name], half_pixel_shift) for name in names)
    with written_whole(out / file) as unfinished:
        write_pickled_list(unfinished, videos)


def write_pickled_list(path: Path, values: Iterator[Any]) -> None:
    """Pickle a list, one element in memory at a time.

    Protocol 3, the newest without frames: its elements can be pickled apart and written one after the other,
    where none refers back to an earlier one (``fast``). Values must not contain themselves.
    """
    with path.open("wb") as file:
        file.write(pickle.PROTO + b"\x03" + pickle.EMPTY_LIST + pickle.MARK)
        for value in values:
            pickler = pickle.Pickler(buffer := BytesIO(), protocol=3)
            pickler.fast = True
            pickler.dump(value)
            file.write(buffer.getvalue()[2:-1])  # without its own PROTO and STOP
        file.write(pickle.APPENDS + pickle.STOP)


def _write_missing(path: Path, reasons: dict[str, str]) -> None:
    with written_whole(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "reason"])
        writer.writerows(reasons.items())
