"""``trackbench h5 track``: annotated keypoints through every episode and camera; corrections of single points.

``cam0.tracks.npz`` is the truth; table, overlay and scores are made from it. It is written first, the scores last,
with the digest of the tracks that they belong to, so that a run that was killed is completed by the next one.
Tracking reads the images of the original file (exact pixels), overlays are drawn on the extracted video.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import trackbench
from trackbench import jobs
from trackbench.files import inside, remove_unfinished, sha256, written_whole
from trackbench.robotics.episodes import EpisodeFile, EpisodeSettings, fingerprint
from trackbench.robotics.extract import VideoEncoder
from trackbench.robotics.follow import CLIP_FRAMES, FrameSource, follow, stretches
from trackbench.robotics.keypoints import Keypoints, read_annotation
from trackbench.robotics.quality import PointQuality, episode_score, rate_points
from trackbench.robotics.track_file import CameraTracks, read_tracks, write_table, write_tracks
from trackbench.robotics.workspace import EpisodeInfo, Workspace

FORMAT = 1  # of quality.json
DEFAULT_MODEL = "lucas_kanade"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NamedTracker:
    """A tracker with what its tracks say about it.

    Attributes:
        tracker: any of the project.
        model: its name.
        weights_sha256: of its checkpoint; "" without one.
    """

    tracker: Any
    model: str
    weights_sha256: str


@dataclass(frozen=True)
class TrackedEpisode:
    """What the stage did with an episode.

    Attributes:
        episode: its id.
        score: of all its tracks, in [0, 1].
        tracked: cameras that were tracked now.
        kept: cameras whose tracks were there already.
    """

    episode: str
    score: float
    tracked: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Retracked:
    """Tracks of a camera after a change.

    Attributes:
        tracks_sha256: of the file now; :func:`restore` takes it as a revision later on.
        superseded_sha256: of the file before, which lies in the episode's history.
        score: of the episode.
        points: quality of the camera's points.
    """

    tracks_sha256: str
    superseded_sha256: str
    score: float
    points: tuple[PointQuality, ...]


class CameraFrames:
    """The frames of one camera of an open episode, in any order; a ``FrameSource``.

    Args:
        episode: open.
        camera: its index.
    """

    def __init__(self, episode: EpisodeFile, camera: int) -> None:
        self._episode = episode
        self._camera = camera
        self.num_frames = episode.num_frames
        self.height = episode.height
        self.width = episode.width

    def frames(self, order: range) -> Iterator[NDArray[np.uint8]]:
        """(H, W, 3) uint8 RGB."""
        return (self._episode.frame(t, self._camera) for t in order)


@contextmanager
def open_source(source: Path, info: EpisodeInfo) -> Iterator[EpisodeFile]:
    """The original file of an extracted episode.

    Args:
        source: the folder of episodes, or the one file.
        info: of the episode.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not the file that was extracted.
    """
    path = source if source.is_file() else inside(source, info.source)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; episode {info.episode} was extracted from it")
    if path.stat().st_size != info.source_size or fingerprint(path) != info.source_fingerprint:
        raise ValueError(f"{path}: changed since {info.episode} was extracted from it")
    settings = EpisodeSettings(
        image_key=info.image_key,
        step_pattern=_step_pattern(info.steps),
        axes=info.axes,
        value_range=info.value_range,
        allow_gaps=True,
    )
    with EpisodeFile(path, settings) as episode:
        if episode.steps != info.steps or (episode.height, episode.width) != (info.height, info.width):
            raise ValueError(f"{path}: holds other steps or images than {info.episode} was extracted from")
        yield episode


def load(model: str | None, checkpoint: Path | None, device: str = "cpu") -> NamedTracker:
    """A tracker by name, or the one that a checkpoint of trackbench holds, or Lucas-Kanade where both are None."""
    from trackbench.composition import load_checkpoint, load_tracker

    weights = "" if checkpoint is None else sha256(checkpoint)
    if model is None and checkpoint is not None:
        return NamedTracker(load_checkpoint(checkpoint, device), checkpoint.stem, weights)
    return NamedTracker(load_tracker(model or DEFAULT_MODEL, checkpoint, device), model or DEFAULT_MODEL, weights)


_load_once = lru_cache(maxsize=1)(load)


def track_camera(
    source: FrameSource,
    keypoints: Keypoints,
    tracker: NamedTracker,
    *,
    clip_frames: int = CLIP_FRAMES,
    progress: Progress | None = None,
) -> CameraTracks:
    """Track the keypoints of a camera through its episode; one frame is in memory at a time.

    Args:
        source: the frames.
        keypoints: the annotation; points that stand on a later frame are tracked backward before it.
        tracker: a tracker that looks at whole videos takes at most ``clip_frames``, all in memory.
        clip_frames: see there.
        progress: called with (frames done, frames in all).

    Raises:
        ValueError: too many frames for such a tracker.
    """
    K, T = len(keypoints.names), source.num_frames
    tracks = CameraTracks(
        names=keypoints.names,
        queries=np.concatenate([keypoints.frame[:, None], keypoints.xy], axis=1).astype(np.float32),
        xy=np.zeros((K, T, 2), np.float32),
        visible=np.zeros((K, T), bool),
        visibility=np.zeros((K, T), np.float32),
        error=np.full((K, T), np.nan, np.float32),
        corrections=np.zeros((0, 4)),
        model=tracker.model,
        weights_sha256=tracker.weights_sha256,
        annotation_sha256=keypoints.digest,
        trackbench_version=trackbench.__version__,
    )
    wanted = [stretch for point in range(K) for stretch in stretches(tracks, point)]
    follow(tracker.tracker, source, tracks, wanted, clip_frames=clip_frames, progress=progress)
    return tracks


def track(
    source: Path,
    workspace: Workspace,
    *,
    model: str | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    workers: int | None = None,
    overwrite: bool = False,
    clip_frames: int = CLIP_FRAMES,
    episodes: Sequence[str] | None = None,
    console: Console | None = None,
) -> Iterator[jobs.Outcome[str, TrackedEpisode]]:
    """Track all annotated episodes of a work folder, in the order in which they finish.

    A camera that no episode has keypoints in is left out; one that others have, but not this episode, is an error.
    Tracks of the same model, weights and annotation stay as they are, with their corrections.

    Args:
        source: the folder of the original episodes.
        workspace: where `extract` and `annotate` wrote to.
        model: a name of ``trackbench models``.
        checkpoint: its weights; alone, a checkpoint of trackbench.
        device: where the tracker runs.
        workers: processes; None: one per core on the CPU, one on another device.
        overwrite: replace tracks of another model, other weights or another annotation; they go to the history.
        clip_frames: see :func:`track_camera`.
        episodes: ids; None: all.
        console: for the progress bar; None: standard error.

    Raises:
        ValueError: an unknown model, a checkpoint that does not fit, or a work folder without episodes.
    """
    ids = workspace.episodes() if episodes is None else list(episodes)
    if not ids:
        raise ValueError(f"{workspace.root}: no extracted episodes; run `trackbench h5 extract` first")
    named = _load_once(model, checkpoint, device)  # an unfit model is one error, not one per episode
    if workers is None:
        workers = (os.cpu_count() or 1) if device == "cpu" else 1
    work = partial(
        _track_episode,
        workspace=workspace,
        source=source,
        choice=(model, checkpoint, device),
        identity=(named.model, named.weights_sha256),
        names=_reference_names(workspace),
        overwrite=overwrite,
        clip_frames=clip_frames,
        threads=None if workers == 1 or len(ids) == 1 else max(1, (os.cpu_count() or 1) // workers),
    )
    total = sum(_units(workspace, episode) for episode in ids)
    return jobs.run_jobs(work, ids, workers, "tracking frames", console, total=total)


def retrack(
    workspace: Workspace,
    source: FrameSource,
    episode: str,
    camera: int,
    point: int,
    frame: int,
    xy: tuple[float, float],
    tracker: NamedTracker,
    *,
    backward: bool = False,
    clip_frames: int = CLIP_FRAMES,
    progress: Progress | None = None,
) -> Retracked:
    """Put a point where it is on a frame, and track it from there to its next known place or the end.

    The tracks before go to the episode's history; table, overlay and scores are made anew. One call at a time per
    episode.

    Args:
        workspace: the work folder.
        source: the camera's frames, see :func:`open_source` and :class:`CameraFrames`.
        episode: its id.
        camera: its index.
        point: row of the point.
        frame: the frame that was looked at.
        xy: where the point is there, pixels.
        tracker: the one that the tracks come from.
        backward: track the point from there backward too, and let that replace the frames since its last known
            place, from where it meets the track best. Otherwise they stay, with their error measured anew.
        clip_frames: see :func:`track_camera`.
        progress: called with (frames done, frames in all).

    Raises:
        ValueError: a point, frame or place that is not there; tracks of another model or other weights.
        FileNotFoundError: there are no tracks.
    """
    path = workspace.file(episode, camera, "tracks")
    tracks = read_tracks(path)
    K, T = tracks.visible.shape
    if not 0 <= point < K or not 0 <= frame < T:
        raise ValueError(f"{episode}: point {point} on frame {frame}: there are {K} points and {T} frames")
    if not (0 <= xy[0] <= source.width and 0 <= xy[1] <= source.height):
        raise ValueError(
            f"{episode}: ({xy[0]:g}, {xy[1]:g}) lies outside the frame, {source.width} x {source.height}"
        )
    if source.num_frames != T:
        raise ValueError(f"{episode}: the tracks have {T} frames, the images {source.num_frames}")
    if (tracks.model, tracks.weights_sha256) != (tracker.model, tracker.weights_sha256):
        raise ValueError(f"{episode}: {_told(tracks)}; corrections need the same model, here {tracker.model}")
    correction = np.array([[point, frame, *xy]])
    tracks = replace(
        tracks,
        corrections=np.concatenate([tracks.corrections, correction]),
        trackbench_version=trackbench.__version__,
    )
    wanted = []
    for stretch in stretches(tracks, point):
        if stretch.begin is not None and stretch.begin[0] == frame:
            wanted.append(stretch)
        elif stretch.end is not None and stretch.end[0] == frame:
            fresh = stretch.begin is None  # what leads to the first known place has no other origin
            wanted.append(stretch if fresh else replace(stretch, keep=True, join=backward))
    T = source.num_frames
    follow(
        tracker.tracker,
        source,
        tracks,
        wanted,
        clip_frames=clip_frames,
        progress=None if progress is None else lambda done, total: progress(done, total + T),
    )
    superseded = _to_history(workspace, episode, camera)
    write_tracks(path, tracks)
    return _changed(workspace, episode, camera, superseded, progress)


def restore(
    workspace: Workspace, episode: str, camera: int, revision: str, progress: Progress | None = None
) -> Retracked:
    """Take tracks from the episode's history again; those of now go there. One call at a time per episode.

    Args:
        workspace: the work folder.
        episode: its id.
        camera: its index.
        revision: SHA-256 of the tracks, as :class:`Retracked` says it.
        progress: called with (frames done, frames in all).

    Raises:
        ValueError: no SHA-256, or the file in the history is damaged.
        FileNotFoundError: it is not there.
    """
    kept = _revision(workspace, episode, camera, revision)
    read_tracks(kept)
    if sha256(kept) != revision:
        raise ValueError(f"{kept}: damaged: its content is not what its name says")
    superseded = _to_history(workspace, episode, camera)
    with written_whole(workspace.file(episode, camera, "tracks")) as unfinished:
        shutil.copyfile(kept, unfinished)
    return _changed(workspace, episode, camera, superseded, progress)


def refresh(workspace: Workspace, episode: str, progress: Progress | None = None) -> float:
    """Make table, overlay and scores anew for the cameras whose tracks are not the ones that they belong to.

    Args:
        workspace: the work folder.
        episode: its id.
        progress: called with (frames done, frames in all).

    Returns:
        The episode's score.
    """
    info = workspace.info(episode)
    before = _read_quality(workspace.quality(episode))
    paths = {camera: workspace.file(episode, camera, "tracks") for camera in range(info.cameras)}
    digests = {camera: sha256(path) for camera, path in paths.items() if path.is_file()}
    stale = [
        camera
        for camera, digest in digests.items()
        if before.get(camera) != digest
        or not all(workspace.file(episode, camera, kind).is_file() for kind in ("table", "overlay"))
    ]
    cameras, rated = [], []
    for camera, digest in digests.items():
        tracks = read_tracks(paths[camera])
        if camera in stale:
            offset = info.num_frames * stale.index(camera)
            write_table(workspace.file(episode, camera, "table"), tracks)
            _write_overlay(workspace, info, camera, tracks, offset, info.num_frames * len(stale), progress)
        points = rate_points(tracks.names, tracks.xy, tracks.visible, tracks.error, info.height, info.width)
        rated += points
        cameras.append({"camera": camera, "tracks_sha256": digest, "points": [asdict(point) for point in points]})
    score = episode_score(rated)
    content = {"format": FORMAT, "score": score, "doubt": 1 - score, "cameras": cameras}
    with written_whole(workspace.quality(episode)) as unfinished:
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return score


def add_command(stages: Any) -> None:
    """Add ``track``."""
    parser = stages.add_parser("track", help="track the annotated keypoints through all episodes and cameras")
    parser.add_argument("source", type=Path, metavar="IN", help="folder of the original episodes")
    parser.add_argument("root", type=Path, metavar="OUT", help="work folder")
    parser.add_argument("--model", help=f"a name of `trackbench models` (default: {DEFAULT_MODEL})")
    parser.add_argument("--checkpoint", type=Path, help="its weights; without --model, a checkpoint of trackbench")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core on the CPU, else 1)")
    parser.add_argument("--episodes", nargs="+", metavar="EPISODE", help="only these")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace tracks of another model or annotation; the old ones are kept",
    )
    parser.add_argument(
        "--clip-frames",
        type=int,
        default=CLIP_FRAMES,
        metavar="T",
        help=f"longest episode for models that look at whole videos (default: {CLIP_FRAMES})",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    workspace = Workspace(options.root)
    outcomes = track(
        options.source,
        workspace,
        model=options.model,
        checkpoint=options.checkpoint,
        device=options.device,
        workers=options.workers,
        overwrite=options.overwrite,
        clip_frames=options.clip_frames,
        episodes=options.episodes,
        console=console,
    )
    done, failed = jobs.collect(outcomes, console)
    fresh = sum(bool(result.tracked) for result in done)
    console.print(f"{fresh} episodes tracked, {len(done) - fresh} were there, {failed} failed", markup=False)
    if done:
        worst = min(done, key=lambda result: result.score)
        console.print(f"least sure: {worst.episode}, score {worst.score:.2f}", markup=False)
    return 1 if failed else 0


def _track_episode(
    episode: str,
    *,
    workspace: Workspace,
    source: Path,
    choice: tuple[str | None, Path | None, str],
    identity: tuple[str, str],
    names: dict[int, tuple[str, tuple[str, ...]]],
    overwrite: bool,
    clip_frames: int,
    threads: int | None,
) -> TrackedEpisode:
    """The work of one process."""
    info = workspace.info(episode)
    total, reported = _units(workspace, episode), 0

    def report(done: int) -> None:
        nonlocal reported
        jobs.advance(done - reported)
        reported = done

    try:
        if threads is not None:
            _use_threads(threads)
        for folder in (workspace.folder(episode), workspace.history(episode)):
            remove_unfinished(folder)
        wanted: dict[int, Keypoints] = {}
        kept = []
        for camera in range(info.cameras):
            if _is_left_out(workspace, episode, camera, names):
                continue
            keypoints = _annotation(workspace, info, camera, names.get(camera))
            if _is_done(workspace, episode, camera, keypoints, identity, overwrite):
                kept.append(camera)
            else:
                wanted[camera] = keypoints
        if not wanted and not kept:
            raise ValueError("not annotated: `trackbench h5 annotate` comes before")
        T = info.num_frames
        report(3 * T * len(kept))
        if wanted:
            named = _load_once(*choice)
            with open_source(source, info) as file:
                for camera, keypoints in wanted.items():
                    start = reported
                    tracks = track_camera(
                        CameraFrames(file, camera),
                        keypoints,
                        named,
                        clip_frames=clip_frames,
                        progress=lambda done, of, start=start: report(start + 2 * T * done // of),  # type: ignore[misc]
                    )
                    if workspace.file(episode, camera, "tracks").exists():
                        _to_history(workspace, episode, camera)
                    write_tracks(workspace.file(episode, camera, "tracks"), tracks)
        start = reported
        score = refresh(workspace, episode, lambda done, of: report(min(total, start + done)))
        return TrackedEpisode(episode, score, tuple(wanted), tuple(kept))
    finally:
        report(total)


def _units(workspace: Workspace, episode: str) -> int:
    """Frames that an episode's progress counts: forward, backward, overlay; none of a damaged one."""
    try:
        info = workspace.info(episode)
    except (ValueError, OSError):
        return 0
    return 3 * info.num_frames * info.cameras


def _use_threads(threads: int) -> None:
    import cv2
    import torch

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)


def _is_left_out(
    workspace: Workspace, episode: str, camera: int, names: dict[int, tuple[str, tuple[str, ...]]]
) -> bool:
    """Whether no episode has keypoints in this camera."""
    there = [workspace.file(episode, camera, kind).is_file() for kind in ("annotation", "proposal")]
    return camera not in names and not any(there)


def _annotation(
    workspace: Workspace, info: EpisodeInfo, camera: int, reference: tuple[str, tuple[str, ...]] | None
) -> Keypoints:
    """The confirmed keypoints of a camera, in the order of the first annotated episode."""
    path = workspace.file(info.episode, camera, "annotation")
    if not path.is_file():
        waiting = workspace.file(info.episode, camera, "proposal").is_file()
        hint = f"--confirm {info.episode}" if waiting else "--import or --template"
        raise ValueError(
            f"cam{camera} is not annotated{', its proposal is not confirmed' * waiting}: "
            f"`trackbench h5 annotate {workspace.root} {hint}`"
        )
    keypoints = read_annotation(path, info.height, info.width, info.num_frames)
    if reference is None:
        return keypoints
    try:
        return keypoints.in_order_of(reference[1])
    except ValueError as error:
        raise ValueError(f"{path}: {error}, beside the keypoints of {reference[0]}") from None


def _reference_names(workspace: Workspace) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Camera -> the first episode whose annotation can be read, and its names."""
    found: dict[int, tuple[str, tuple[str, ...]]] = {}
    missing: set[int] | None = None
    for episode in workspace.episodes():
        try:
            info = workspace.info(episode)
        except ValueError:
            continue
        for camera in set(range(info.cameras)) if missing is None else set(missing):
            path = workspace.file(episode, camera, "annotation")
            if camera in found or not path.is_file():
                continue
            try:
                found[camera] = episode, read_annotation(path, info.height, info.width, info.num_frames).names
            except (ValueError, OSError):
                continue
        missing = set(range(info.cameras)) - set(found)
        if not missing:
            break
    return found


def _is_done(
    workspace: Workspace,
    episode: str,
    camera: int,
    keypoints: Keypoints,
    identity: tuple[str, str],
    overwrite: bool,
) -> bool:
    """Whether the tracks that are wanted are there; ValueError where others are, and may not be replaced."""
    path = workspace.file(episode, camera, "tracks")
    if not path.exists():
        return False
    try:
        tracks = read_tracks(path)
    except ValueError:
        if overwrite:
            return False
        raise
    same_points = tracks.annotation_sha256 == keypoints.digest and tracks.names == keypoints.names
    if same_points and (tracks.model, tracks.weights_sha256) == identity:
        return True
    if overwrite:
        return False
    why = _told(tracks) if same_points else "the annotation changed since it was tracked"
    raise ValueError(f"cam{camera}: {why}; --overwrite tracks it anew (the old tracks are kept in history/)")


def _told(tracks: CameraTracks) -> str:
    weights = f" with weights {tracks.weights_sha256[:8]}" if tracks.weights_sha256 else ""
    return f"its tracks come from {tracks.model}{weights}"


def _to_history(workspace: Workspace, episode: str, camera: int) -> str:
    """Keep the tracks of now in the history; their digest."""
    path = workspace.file(episode, camera, "tracks")
    digest = sha256(path)
    kept = _revision(workspace, episode, camera, digest)
    if not kept.is_file():
        with written_whole(kept) as unfinished:
            shutil.copyfile(path, unfinished)
    return digest


def _revision(workspace: Workspace, episode: str, camera: int, digest: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"{episode}: {digest!r:.80} is no SHA-256 of tracks")
    return workspace.history(episode) / f"cam{camera}.{digest}.tracks.npz"


def _changed(
    workspace: Workspace, episode: str, camera: int, superseded: str, progress: Progress | None
) -> Retracked:
    """Everything that follows from tracks that changed."""
    score = refresh(workspace, episode, progress)
    info = workspace.info(episode)
    path = workspace.file(episode, camera, "tracks")
    tracks = read_tracks(path)
    points = rate_points(tracks.names, tracks.xy, tracks.visible, tracks.error, info.height, info.width)
    return Retracked(sha256(path), superseded, score, tuple(points))


def _read_quality(path: Path) -> dict[int, str]:
    """Camera -> digest of the tracks that the derived files belong to; {} where they have to be made anew."""
    try:
        content = json.loads(path.read_bytes())
        return {int(entry["camera"]): str(entry["tracks_sha256"]) for entry in content["cameras"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_overlay(
    workspace: Workspace,
    info: EpisodeInfo,
    camera: int,
    tracks: CameraTracks,
    offset: int,
    total: int,
    progress: Progress | None,
) -> None:
    from trackbench.data.video_io import VideoReader
    from trackbench.visualization import overlay_frames, spectrum

    def frames() -> Iterator[NDArray[np.uint8]]:
        video = VideoReader(workspace.file(info.episode, camera, "video"))
        for t, frame in enumerate(video, start=1):
            yield np.ascontiguousarray(frame[: info.height, : info.width])
            if progress is not None:
                progress(offset + t, total)

    # by the order of names: a keypoint has the same colour in all cameras
    drawn = overlay_frames(frames(), tracks.drawable(), colours=spectrum(len(tracks.names)))
    with (
        written_whole(workspace.file(info.episode, camera, "overlay")) as unfinished,
        VideoEncoder(unfinished, info.height, info.width, info.fps, planar=False) as encoder,
    ):
        for frame in drawn:
            encoder.write(frame)


def _step_pattern(steps: Sequence[str]) -> str | None:
    """The pattern that all names of steps have in common; None: to be inferred."""
    above, slash, name = steps[0].rpartition("/")
    for number in re.finditer(r"\d+", name):
        prefix, suffix = above + slash + name[: number.start()], name[number.end() :]
        wanted = re.compile(re.escape(prefix) + r"\d+" + re.escape(suffix))
        if all(wanted.fullmatch(step) for step in steps):
            return prefix + "{}" + suffix
    return None
