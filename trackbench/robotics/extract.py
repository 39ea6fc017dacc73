"""``trackbench h5 extract``: per episode and camera a video that browsers play, and its first frame as PNG.

One step is in memory at a time. Raw frames go straight to one ffmpeg program per camera, in the order of planes
that they have in the file. An episode is done when its ``episode.json`` is there, which is written last; a run
that was killed does unfinished episodes again. Videos do not depend on the number of processes or cores.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import imageio_ffmpeg
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from trackbench import jobs
from trackbench.data.video_io import FOR_BROWSERS
from trackbench.files import inside, remove_unfinished, written_whole
from trackbench.robotics.episodes import INFERRED, EpisodeFile, EpisodeSettings, find_episodes, fingerprint
from trackbench.robotics.workspace import EpisodeInfo, Kind, Workspace

DEFAULT_FPS = 30.0
MOST_WORKERS = 4  # by default; each takes about 250 MB with its ffmpeg programs
_MIB = 2**20
_PART = ".part-"  # begins the names of folders of unfinished files


class Extracted(NamedTuple):
    """What became of an episode: ``fresh`` says whether it was extracted now or was there already."""

    episode: str
    fresh: bool
    num_frames: int


class _Item(NamedTuple):
    episode: str
    path: Path


class VideoEncoder:
    """An H.264 ``.mp4`` that browsers play and scrub, from raw frames; a context manager.

    yuv420p, BT.709, index at the front, a keyframe every second. That format needs even sides: an odd one grows by
    a copy of its last row or column. One thread, so that the same frames give the same file everywhere.

    Args:
        path: file to write; what is there is replaced.
        height: of the frames, pixels.
        width: of the frames, pixels.
        fps: frames per second.
        planar: frames are written as (3, H, W) instead of (H, W, 3).

    Raises:
        OSError: (:meth:`write` and the end of the block) ffmpeg failed, for example for a full disk.
    """

    def __init__(self, path: Path, height: int, width: int, fps: float, planar: bool) -> None:
        self.path = path
        self._planar = planar
        self._padding = ((0, height % 2), (0, width % 2))
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-loglevel", "error", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "gbrp" if planar else "rgb24"]
        command += ["-s", f"{width + width % 2}x{height + height % 2}", "-r", repr(float(fps)), "-i", "pipe:0"]
        command += ["-an", "-filter_threads", "1", *FOR_BROWSERS, "-c:v", "libx264", "-threads", "1"]
        command += ["-preset", "veryfast", "-crf", "18", "-pix_fmt", "yuv420p", "-g", str(max(1, round(fps)))]
        command += ["-f", "mp4", f"file:{path}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._log, bufsize=0
        )
        with suppress(OSError, AttributeError):  # Linux: a frame at once, for fewer turns between the programs
            fcntl.fcntl(self._pipe, fcntl.F_SETPIPE_SZ, _MIB)

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Append a frame, contiguous uint8 RGB (H, W, 3), or (3, H, W) if planar."""
        if any(after for _, after in self._padding):
            padding = ((0, 0), *self._padding) if self._planar else (*self._padding, (0, 0))
            frame = np.pad(frame, padding, mode="edge")
        # ffmpeg's planes are in the order G, B, R
        for part in (frame[1], frame[2], frame[0]) if self._planar else (frame,):
            self._send(part.data.cast("B"))

    def __enter__(self) -> VideoEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._process.kill()
            with suppress(OSError):
                self._pipe.close()
            self._process.wait()
            self._log.close()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _send(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._pipe.write(data) :]
        except BrokenPipeError:
            self._finish()
            raise OSError(f"{self.path}: ffmpeg stopped before all frames were written") from None

    def _finish(self) -> None:
        with suppress(BrokenPipeError):
            self._pipe.close()
        status = self._process.wait()
        if status:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
            raise OSError(f"{self.path}: ffmpeg failed: {'; '.join(lines[-2:]) or f'status {status}'}")


def extract(
    source: Path,
    workspace: Workspace,
    *,
    fps: float | None = None,
    settings: EpisodeSettings = INFERRED,
    workers: int | None = None,
    console: Console | None = None,
) -> Iterator[jobs.Outcome[str, Extracted]]:
    """Extract all episodes of a folder, in the order in which they finish; finished ones stay as they are.

    An episode whose file changed since then, or that was extracted with other settings, fails: its annotations and
    tracks belong to what was there.

    Args:
        source: the folder of episodes, or one file; only read.
        workspace: where to write to.
        fps: frames per second; None: what the file says (its attribute ``fps``), or else 30.
        settings: of the layout of all files.
        workers: processes; None: one per core, at most 4. Each runs one ffmpeg program per camera.
        console: for the progress bar; None: standard error.

    Raises:
        FileNotFoundError: there is nothing at ``source``.
        ValueError: there are no episodes, ``fps`` is not positive, or the work folder lies among the episodes.
        ImportError: h5py is not installed.
    """
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps must be positive, got {fps}")
    source = Path(source)
    files = find_episodes(source)
    root = source if source.is_dir() else source.parent
    if source.is_dir() and workspace.root.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{workspace.root}: the work folder must not lie in the folder of episodes, {source}")
    work = partial(_extract_episode, root=root, workspace=workspace, fps=fps, settings=settings)
    items = [_Item(episode, path) for episode, path in files.items()]
    total = sum(_units(path) for path in files.values())
    for outcome in jobs.run_jobs(work, items, workers or default_workers(), "extracting, MiB", console, total):
        yield jobs.Outcome(outcome.item.episode, outcome.result, outcome.error)


def default_workers() -> int:
    """Processes for stages that unpack, encode and copy: one per core, at most 4."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_WORKERS, cores or 1)


def _extract_episode(
    item: _Item, *, root: Path, workspace: Workspace, fps: float | None, settings: EpisodeSettings
) -> Extracted:
    """The work of one process."""
    total, reported = _units(item.path), 0
    try:
        known = _known(item, workspace, fps, settings)
        if known is not None:
            return Extracted(item.episode, False, known.num_frames)
        source = item.path.relative_to(root).as_posix()
        inside(root, source)  # no link to somewhere else
        with EpisodeFile(item.path, settings) as episode:
            mark = fingerprint(item.path)
            info = EpisodeInfo(
                episode=item.episode,
                source=source,
                source_size=item.path.stat().st_size,
                source_fingerprint=mark,
                fps=fps or episode.fps or DEFAULT_FPS,
                num_frames=episode.num_frames,
                cameras=episode.cameras,
                height=episode.height,
                width=episode.width,
                steps=episode.steps,
                image_key=episode.image_key,
                axes=episode.axes,
                value_range=episode.value_range,
            )
            for t in _write_videos(episode, workspace, info):
                done = total * (t + 1) // episode.num_frames
                jobs.advance(done - reported)
                reported = done
        if fingerprint(item.path) != mark:
            raise ValueError(f"{item.path}: changed while it was extracted")
        workspace.write_info(info)
        return Extracted(item.episode, True, info.num_frames)
    finally:
        jobs.advance(total - reported)


def _known(item: _Item, workspace: Workspace, fps: float | None, settings: EpisodeSettings) -> EpisodeInfo | None:
    """What is known of an episode that is extracted already; None if it is not."""
    if not (workspace.folder(item.episode) / "episode.json").is_file():
        return None
    info = workspace.info(item.episode)
    where = workspace.folder(item.episode)
    if item.path.stat().st_size != info.source_size or fingerprint(item.path) != info.source_fingerprint:
        raise ValueError(
            f"{item.path}: changed since it was extracted, and its annotations and tracks belong to what it was; "
            f"move {where} away to start over"
        )
    axes = None if settings.axes is None else " ".join(settings.axes.split())
    key = None if settings.image_key is None else settings.image_key.strip("/")
    for name, asked, was in (
        ("fps", fps, info.fps),
        ("image_key", key, info.image_key),
        ("axes", axes, info.axes),
        ("value_range", settings.value_range, info.value_range),
    ):
        if asked is not None and asked != was:
            raise ValueError(
                f"{item.path}: was extracted with {name} {was}, not {asked}; move {where} away to start over"
            )
    kinds: tuple[Kind, ...] = ("video", "image")
    files = [workspace.file(item.episode, camera, kind) for camera in range(info.cameras) for kind in kinds]
    return info if all(file.is_file() for file in files) else None


def _write_videos(episode: EpisodeFile, workspace: Workspace, info: EpisodeInfo) -> Iterator[int]:
    """Write all files but ``episode.json`` in one pass over the episode; yields frame numbers as they are done.

    What is unfinished lies in a folder of its own: ffmpeg programs outlive a killed run for a moment, and what
    they still write must not appear beside what the next run writes.
    """
    folder = workspace.folder(info.episode)
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    for left in folder.glob(f"{_PART}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_PART, dir=folder, ignore_cleanup_errors=True) as name:
        finished: dict[Path, Path] = {}
        with ExitStack() as stack:
            encoders: list[VideoEncoder] = []
            for t in range(info.num_frames):
                for camera, image in enumerate(episode.images(t)):
                    planes = image.transpose(2, 0, 1)
                    planar = planes.flags.c_contiguous
                    if t == 0:
                        first, video = Path(name, f"cam{camera}.png"), Path(name, f"cam{camera}.mp4")
                        finished[workspace.file(info.episode, camera, "image")] = first
                        finished[workspace.file(info.episode, camera, "video")] = video
                        Image.fromarray(np.ascontiguousarray(image)).save(first, compress_level=1)
                        encoder = VideoEncoder(video, info.height, info.width, info.fps, planar)
                        encoders.append(stack.enter_context(encoder))
                    encoders[camera].write(planes if planar else np.ascontiguousarray(image))
                yield t
        for path, made in finished.items():
            with written_whole(path) as unfinished:
                made.replace(unfinished)


def _units(path: Path) -> int:
    """How much there is to do, for the progress bar."""
    try:
        return max(1, path.stat().st_size // _MIB)
    except OSError:
        return 1


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`read_settings` reads."""
    layout = parser.add_argument_group("layout of the files, where it is not to be inferred")
    layout.add_argument("--image-key", metavar="NAME", help="images within a step, e.g. obs/image")
    layout.add_argument("--step-pattern", metavar="NAME", help="steps with {} for the number, e.g. step_{}")
    layout.add_argument("--axes", help="of the images: b v(iews) c h w, e.g. 'b v c h w'")
    layout.add_argument("--value-range", type=int, choices=(1, 255), help="value of white")
    layout.add_argument("--allow-gaps", action="store_true", help="take steps with uneven gaps as they are")


def read_settings(options: argparse.Namespace) -> EpisodeSettings:
    """The settings of a command line."""
    return EpisodeSettings(
        image_key=options.image_key,
        step_pattern=options.step_pattern,
        axes=options.axes,
        value_range=options.value_range,
        allow_gaps=options.allow_gaps,
    )


def add_command(stages: Any) -> None:
    """Add ``extract``."""
    parser = stages.add_parser("extract", help="videos and first frames of all episodes and cameras")
    parser.add_argument(
        "source", type=Path, metavar="IN", help="folder of the episodes, .h5 or .hdf5, or one file"
    )
    parser.add_argument("root", type=Path, metavar="OUT", help="work folder")
    parser.add_argument("--fps", type=float, help="frames per second (default: what the file says, or 30)")
    parser.add_argument("--workers", type=int, help=f"processes (default: one per core, at most {MOST_WORKERS})")
    add_settings(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    outcomes = extract(
        options.source,
        Workspace(options.root),
        fps=options.fps,
        settings=read_settings(options),
        workers=options.workers,
        console=console,
    )
    done, failed = jobs.collect(outcomes, console)
    fresh = sum(result.fresh for result in done)
    console.print(f"{fresh} episodes extracted, {len(done) - fresh} were there, {failed} failed", markup=False)
    return 1 if failed else 0
