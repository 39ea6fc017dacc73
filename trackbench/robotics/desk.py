"""What the review page asks for and does, on the files of a work folder and its database; no HTTP in here."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from trackbench.files import sha256, written_whole
from trackbench.robotics.follow import FrameSource
from trackbench.robotics.keypoints import Keypoints, read_annotation, read_origin, write_annotation
from trackbench.robotics.messages import (
    AnnotatedPoint,
    AnnotationView,
    AnnotationWish,
    CameraView,
    CorrectionWish,
    DecisionWish,
    EpisodeList,
    EpisodeRow,
    EpisodeView,
    EventView,
    JobView,
    PointView,
    State,
    TracksView,
    UndoWish,
)
from trackbench.robotics.quality import jump_frames, rate_points
from trackbench.robotics.store import Decisions, Event, Verdict
from trackbench.robotics.track import CameraFrames, NamedTracker, load, open_source, restore, retrack
from trackbench.robotics.track_file import CameraTracks, read_tracks
from trackbench.robotics.workspace import EpisodeInfo, Kind, Workspace, read_info
from trackbench.visualization import spectrum

Value = TypeVar("Value")
Progress = Callable[[int, int], None]
SERVED: tuple[Kind, ...] = ("video", "image", "overlay", "table")


class RefusedError(Exception):
    """A wish that cannot be granted as things are; ``status`` is HTTP's, ``code`` lets the page translate it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class CancelledError(Exception):
    """The reviewer does not want the result of a job any more."""


class Jobs:
    """One piece of work at a time, in a thread of its own, with progress."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view = JobView()
        self._cancel = threading.Event()

    def view(self) -> JobView:
        """How it goes."""
        with self._lock:
            return self._view.model_copy()

    def refuse_if_busy(self, episode: str | None = None) -> None:
        """Refuse while there is work, on ``episode`` or on any."""
        view = self.view()
        if view.state == "running" and episode in (None, view.episode):
            raise RefusedError(409, f"{view.episode}: the {view.what} is still going on", "busy")

    def start(self, job: JobView, work: Callable[[Progress], None]) -> JobView:
        """Start ``work(progress)`` unless something is going on; ``job`` says what it is."""
        with self._lock:
            if self._view.state == "running":
                raise RefusedError(409, f"{self._view.episode}: the {self._view.what} is still going on", "busy")
            number = self._view.number + 1
            self._view = job.model_copy(update={"number": number, "state": "running"})
            self._cancel.clear()
            started = self._view.model_copy()
        threading.Thread(target=self._run, args=(work,), name=f"job {number}", daemon=True).start()
        return started

    def cancel(self, number: int) -> JobView:
        """Stop that work where it next can, if it still goes on."""
        with self._lock:
            if self._view.number == number and self._view.state == "running":
                self._cancel.set()
        return self.view()

    def _run(self, work: Callable[[Progress], None]) -> None:
        try:
            work(self._progress)
        except CancelledError:
            self._finish("cancelled", "")
        except (RefusedError, ValueError, OSError, ImportError) as error:
            self._finish("failed", " ".join(str(error).split()))
        except BaseException as error:
            self._finish("failed", f"{type(error).__name__}: {error}")
            raise
        else:
            self._finish("done", "")

    def stop_if_asked(self) -> None:
        """For the work to call where it can stop without harm."""
        if self._cancel.is_set():
            raise CancelledError

    def _progress(self, done: int, total: int) -> None:
        with self._lock:
            self._view.done, self._view.total = done, total

    def _finish(self, state: Literal["done", "failed", "cancelled"], message: str) -> None:
        with self._lock:
            self._view.state, self._view.message = state, message


class StoppableFrames:
    """A ``FrameSource`` that ends where the reviewer cancels: only tracking reads it, not the writing after it."""

    def __init__(self, source: FrameSource, jobs: Jobs) -> None:
        self._source = source
        self._jobs = jobs
        self.num_frames = source.num_frames
        self.height = source.height
        self.width = source.width

    def frames(self, order: range) -> Iterator[NDArray[np.uint8]]:
        """(H, W, 3) uint8 RGB."""
        for frame in self._source.frames(order):
            self._jobs.stop_if_asked()
            yield frame


class Cache(Generic[Value]):
    """What was read from files, as long as they stay the same."""

    def __init__(self, read: Callable[[Path], Value]) -> None:
        self._read = read
        self._known: dict[Path, tuple[tuple[int, int, int], Value]] = {}

    def __call__(self, path: Path) -> Value:
        """The value of the file as it is now."""
        status = path.stat()
        signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._known.get(path)
        if known is None or known[0] != signature:
            known = self._known[path] = (signature, self._read(path))
        return known[1]


class Desk:
    """The review of one work folder.

    Args:
        workspace: the work folder.
        source: the folder of the original episodes, which corrections need.
        model: tracker of corrections; None: the one of the tracks.
        checkpoint: its weights.
        device: where it runs.

    Every method raises :class:`RefusedError` for an episode, camera or file that is not there, and ValueError for
    files that are damaged.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        source: Path | None = None,
        model: str | None = None,
        checkpoint: Path | None = None,
        device: str = "cpu",
    ) -> None:
        self.workspace = workspace
        self.decisions = Decisions(workspace.review)
        self.jobs = Jobs()
        self._source = source
        self._choice = (model, checkpoint, device)
        self._trackers: dict[str, NamedTracker] = {}
        self._digest = Cache(sha256)
        self._doubt = Cache(_read_doubt)
        self._read_info = Cache(read_info)
        self._folders: dict[str, Path] = {}
        self._names: dict[
            int, dict[Kind, str]
        ] = {}  # of a camera's files: asked for thousands of episodes at once
        self._writing = threading.Lock()

    def list_episodes(self) -> EpisodeList:
        """All episodes, the most doubtful first, those without tracks last."""
        decisions = self.decisions.all_current()
        rows = []
        for episode in self.workspace.episodes():
            try:
                info = self._known_info(episode)
                doubt = self._doubt_of(episode)
                cameras = self._cameras(info)
            except (RefusedError, ValueError, OSError) as error:
                rows.append(EpisodeRow(episode=episode, state="broken", note=" ".join(str(error).split())))
                continue
            decision = decisions.get(episode)
            holds = decision is not None and decision.holds(_digests(cameras))
            rows.append(
                EpisodeRow(
                    episode=episode,
                    state=_state(cameras, decision.verdict if decision is not None and holds else None),
                    stale=decision is not None and not holds,
                    doubt=doubt,
                    num_frames=info.num_frames,
                    cameras=info.cameras,
                    note="" if decision is None else decision.reason,
                )
            )
        rows.sort(key=lambda row: -1.0 if row.doubt is None else row.doubt, reverse=True)
        return EpisodeList(episodes=rows)

    def episode(self, episode: str) -> EpisodeView:
        """One episode."""
        info = self.info(episode)
        cameras = self._cameras(info)
        history = self.decisions.history(episode)
        decision = self.decisions.current(episode)
        holds = decision is not None and decision.holds(_digests(cameras))
        left = [event.id for event in history if event.kind != "undo" and not event.undone]
        return EpisodeView(
            episode=episode,
            state=_state(cameras, decision.verdict if decision is not None and holds else None),
            stale=decision is not None and not holds,
            doubt=self._doubt_of(episode),
            fps=info.fps,
            num_frames=info.num_frames,
            height=info.height,
            width=info.width,
            cameras=cameras,
            verdict=None if decision is None else decision.verdict,
            reason="" if decision is None else decision.reason,
            history=[_event_view(event) for event in history],
            undoable=left[-1] if left else None,
        )

    def file(self, episode: str, camera: int, kind: Kind) -> Path:
        """A file that the page may load."""
        if kind not in SERVED:
            raise RefusedError(404, f"there is no kind of file {kind!r}, only {', '.join(SERVED)}")
        self._camera(episode, camera)
        path = self.workspace.file(episode, camera, kind)
        if not path.is_file() or not path.resolve().is_relative_to(self.workspace.root.resolve()):
            raise RefusedError(404, f"{episode}: camera {camera} has no {kind}")
        return path

    def tracks(self, episode: str, camera: int) -> TracksView:
        """The tracks of a camera."""
        info = self._camera(episode, camera)
        tracks, digest = self._tracks(info, camera)
        rated = rate_points(tracks.names, tracks.xy, tracks.visible, tracks.error, info.height, info.width)
        colours = spectrum(len(tracks.names))
        diagonal = math.hypot(info.height, info.width)
        points = [
            PointView(
                name=point.name,
                colour="#{:02x}{:02x}{:02x}".format(*colours[k]),
                score=point.score,
                forward_backward_px=point.forward_backward_px,
                jumps=jump_frames(tracks.xy[k], tracks.visible[k], diagonal).tolist(),
                lost=point.lost,
                x=_numbers(tracks.xy[k, :, 0], 2),
                y=_numbers(tracks.xy[k, :, 1], 2),
                visible=tracks.visible[k].tolist(),
                visibility=_numbers(tracks.visibility[k], 3),
                error=_numbers(tracks.error[k], 2),
                corrected=sorted({int(t) for row, t, _, _ in tracks.corrections if row == k}),
            )
            for k, point in enumerate(rated)
        ]
        annotation = self._confirmed(info, camera)
        outdated = annotation is not None and annotation.digest != tracks.annotation_sha256
        return TracksView(tracks_sha256=digest, model=tracks.model, outdated=outdated, points=points)

    def annotation(self, episode: str, camera: int) -> AnnotationView:
        """The keypoints of a camera: the confirmed ones, or else those that were transferred."""
        info = self._camera(episode, camera)
        usual_episode, usual = self._usual_names(camera)
        kind: Literal["annotation", "proposal", "none"] = "none"
        keypoints = self._confirmed(info, camera)
        if keypoints is not None:
            kind = "annotation"
        else:
            path = self.workspace.file(episode, camera, "proposal")
            if path.is_file():
                kind, keypoints = "proposal", read_annotation(path, info.height, info.width, info.num_frames)
        return AnnotationView(
            kind=kind,
            points=[] if keypoints is None else _annotated(keypoints),
            seen=self._seen(info, camera),
            usual=list(usual),
            usual_episode=usual_episode,
        )

    def decide(self, wish: DecisionWish) -> EpisodeView:
        """Accept or reject; refused where the tracks are not those that the reviewer saw."""
        info = self.info(wish.episode)
        self.jobs.refuse_if_busy(wish.episode)
        with self._writing:
            now = _digests(self._cameras(info))
            if {int(camera): digest for camera, digest in wish.tracks_sha256.items()} != now:
                raise RefusedError(409, f"{wish.episode}: the tracks have changed, look again", "stale_tracks")
            self.decisions.decide(wish.episode, wish.verdict, now, wish.reason.strip())
        return self.episode(wish.episode)

    def annotate(self, wish: AnnotationWish) -> AnnotationView:
        """Save keypoints; those of a proposal are confirmed by it."""
        info = self._camera(wish.episode, wish.camera)
        self.jobs.refuse_if_busy(wish.episode)
        keypoints = _checked(wish, info)
        with self._writing:
            if self._seen(info, wish.camera) != wish.seen:
                raise RefusedError(
                    409, f"{wish.episode}: the annotation has changed, look again", "stale_annotation"
                )
            path = self.workspace.file(wish.episode, wish.camera, "annotation")
            proposal = self.workspace.file(wish.episode, wish.camera, "proposal")
            before = self._keep(path) if path.is_file() else None
            proposed = self._keep(proposal) if before is None and proposal.is_file() else None
            origin = None if proposed is None else read_origin(proposal)
            image = self.workspace.file(wish.episode, wish.camera, "image").name
            write_annotation(
                path, keypoints, image=image, height=info.height, width=info.width, origin=origin or None
            )
            if proposed is not None:
                proposal.unlink()  # its copy lies in the history
            content = {
                "camera": wish.camera,
                "points": [point.model_dump() for point in wish.points],
                "before": before,
                "after": sha256(path),
                "proposal": proposed,
            }
            self.decisions.record(wish.episode, "annotation" if proposed is None else "confirmation", content)
        return self.annotation(wish.episode, wish.camera)

    def correct(self, wish: CorrectionWish) -> JobView:
        """Start tracking a point again from where the reviewer put it."""
        info = self._camera(wish.episode, wish.camera)
        tracks, digest = self._tracks(info, wish.camera)
        if digest != wish.tracks_sha256:
            raise RefusedError(409, f"{wish.episode}: the tracks have changed, look again", "stale_tracks")
        if wish.point >= len(tracks.names) or wish.t >= info.num_frames:
            raise RefusedError(422, f"{wish.episode}: there is no point {wish.point} on frame {wish.t}")
        if not (0 <= wish.x <= info.width and 0 <= wish.y <= info.height):
            raise RefusedError(
                422, f"({wish.x:g}, {wish.y:g}) lies outside the frame, {info.width} x {info.height}"
            )
        if self._source is None:
            raise RefusedError(
                409, "corrections need the original episodes: `trackbench h5 serve OUT --in IN`", "no_source"
            )
        source = self._source

        def work(progress: Progress) -> None:
            tracker = self._tracker(tracks)
            with open_source(source, info) as file:
                changed = retrack(
                    self.workspace,
                    StoppableFrames(CameraFrames(file, wish.camera), self.jobs),
                    wish.episode,
                    wish.camera,
                    wish.point,
                    wish.t,
                    (wish.x, wish.y),
                    tracker,
                    backward=wish.backward,
                    progress=progress,
                )
            content = {
                **wish.model_dump(exclude={"episode", "tracks_sha256"}),
                "name": tracks.names[wish.point],
                "before": changed.superseded_sha256,
                "after": changed.tracks_sha256,
            }
            self.decisions.record(wish.episode, "correction", content)

        name = tracks.names[wish.point]
        return self.jobs.start(
            JobView(episode=wish.episode, camera=wish.camera, what="correction", name=name), work
        )

    def undo(self, wish: UndoWish) -> JobView | None:
        """Take an event back, with what it did to files; tracks are put back in the background."""
        events = {event.id: event for event in self.decisions.history()}
        event = events.get(wish.event)
        if event is None:
            raise RefusedError(404, f"there is no event {wish.event}", "stale_event")
        self.jobs.refuse_if_busy(event.episode)
        left = self.decisions.undoable(event.episode)
        if left is None or left.id != event.id:
            raise RefusedError(409, f"{event.episode}: event {event.id} cannot be undone now", "stale_event")
        if event.kind == "correction":
            return self._undo_correction(event)
        with self._writing:
            if event.kind in ("annotation", "confirmation"):
                self._undo_annotation(event)
            self.decisions.undo(event.id)
        return None

    def info(self, episode: str) -> EpisodeInfo:
        """What is known of an episode."""
        try:
            return self._known_info(episode)
        except FileNotFoundError:
            raise RefusedError(404, f"there is no episode {_short(episode)}") from None
        except OSError as error:  # a name that no file can have
            raise RefusedError(404, f"there is no episode {_short(episode)}: {error.strerror}") from None

    def _known_info(self, episode: str) -> EpisodeInfo:
        folder = self._folder(episode)
        info = self._read_info(folder / "episode.json")
        if info.episode != episode:
            raise ValueError(f"{folder}/episode.json: is of the episode {_short(info.episode)}")
        return info

    def _folder(self, episode: str) -> Path:
        """The folder of an episode, checked once: lists of thousands are asked for again and again."""
        if episode not in self._folders:
            try:
                folder = self.workspace.folder(episode)
            except (ValueError, OSError, RuntimeError):
                raise RefusedError(404, f"there is no episode {_short(episode)}") from None
            if folder.relative_to(self.workspace.root / "episodes").as_posix() != episode:
                raise RefusedError(404, f"there is no episode {_short(episode)}")  # one spelling per episode
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder")
            self._folders[episode] = folder
        return self._folders[episode]

    def _camera(self, episode: str, camera: int) -> EpisodeInfo:
        info = self.info(episode)
        if camera >= info.cameras:
            raise RefusedError(404, f"{episode}: there is no camera {camera}, only {info.cameras}")
        return info

    def _cameras(self, info: EpisodeInfo) -> list[CameraView]:
        folder = self._folder(info.episode)
        present = {path.name for path in folder.iterdir()}
        views = []
        for camera in range(info.cameras):
            if camera not in self._names:
                files = {kind: self.workspace.file(info.episode, camera, kind) for kind in _LISTED}
                self._names[camera] = {kind: path.name for kind, path in files.items()}
            names = self._names[camera]
            there = {kind: name in present for kind, name in names.items()}
            views.append(
                CameraView(
                    annotated=there["annotation"],
                    proposed=there["proposal"] and not there["annotation"],
                    overlay=there["overlay"],
                    tracks_sha256=self._digest(folder / names["tracks"]) if there["tracks"] else "",
                )
            )
        return views

    def _tracks(self, info: EpisodeInfo, camera: int) -> tuple[CameraTracks, str]:
        """Tracks and the digest of the very file that they were read from."""
        path = self.workspace.file(info.episode, camera, "tracks")
        if not path.is_file():
            raise RefusedError(404, f"{info.episode}: camera {camera} is not tracked yet")
        while True:
            digest = sha256(path)
            tracks = read_tracks(path)
            if sha256(path) == digest:
                return tracks, digest

    def _tracker(self, tracks: CameraTracks) -> NamedTracker:
        from trackbench.composition import model_names

        model, checkpoint, device = self._choice
        if model is None and checkpoint is None:
            if tracks.weights_sha256 or tracks.model not in model_names():
                raise RefusedError(
                    409,
                    f"the tracks come from {tracks.model}: start the server with its --checkpoint to correct them",
                    "no_model",
                )
            model = tracks.model
        key = model or ""
        if key not in self._trackers:
            self._trackers[key] = load(model, checkpoint, device)
        return self._trackers[key]

    def _undo_correction(self, event: Event) -> JobView:
        camera = int(event.content["camera"])
        info = self._camera(event.episode, camera)
        if self._tracks(info, camera)[1] != event.content["after"]:
            raise RefusedError(409, f"{event.episode}: camera {camera} was tracked anew since", "stale_event")

        def work(progress: Progress) -> None:
            restore(self.workspace, event.episode, camera, event.content["before"], progress)
            self.decisions.undo(event.id)

        name = event.content["name"]
        return self.jobs.start(JobView(episode=event.episode, camera=camera, what="undo", name=name), work)

    def _undo_annotation(self, event: Event) -> None:
        camera = int(event.content["camera"])
        info = self._camera(event.episode, camera)
        path = self.workspace.file(info.episode, camera, "annotation")
        if not path.is_file() or sha256(path) != event.content["after"]:
            raise RefusedError(409, f"{event.episode}: camera {camera} was annotated anew since", "stale_event")
        proposal = self.workspace.file(info.episode, camera, "proposal")
        back = {path: event.content["before"], proposal: event.content["proposal"]}
        kept = {to: self._kept(to, digest) for to, digest in back.items() if digest is not None}
        for source in kept.values():
            if not source.is_file():
                raise RefusedError(
                    409, f"{source}: this file is missing, so nothing can be put back", "stale_event"
                )
        self._keep(path)
        if path not in kept:
            path.unlink()
        for to, source in kept.items():
            with written_whole(to) as unfinished:
                shutil.copyfile(source, unfinished)

    def _keep(self, path: Path) -> str:
        """Copy an annotation or proposal to the episode's history; its digest."""
        digest = sha256(path)
        kept = self._kept(path, digest)
        if not kept.is_file():
            with written_whole(kept) as unfinished:
                shutil.copyfile(path, unfinished)
        return digest

    def _kept(self, path: Path, digest: str) -> Path:
        camera, _, suffix = path.name.partition(".")
        return path.parent / "history" / f"{camera}.{digest}.{suffix}"

    def _confirmed(self, info: EpisodeInfo, camera: int) -> Keypoints | None:
        path = self.workspace.file(info.episode, camera, "annotation")
        return read_annotation(path, info.height, info.width, info.num_frames) if path.is_file() else None

    def _seen(self, info: EpisodeInfo, camera: int) -> str:
        """Digest of the annotation and proposal as they are."""
        paths = [self.workspace.file(info.episode, camera, kind) for kind in ("annotation", "proposal")]
        return "-".join(self._digest(path) if path.is_file() else "" for path in paths)

    def _usual_names(self, camera: int) -> tuple[str, tuple[str, ...]]:
        """The first annotated episode, whose names the others are to have, and its names."""
        for episode in self.workspace.episodes():
            try:
                info = self._known_info(episode)
                keypoints = self._confirmed(info, camera) if camera < info.cameras else None
            except (RefusedError, ValueError, OSError):
                continue
            if keypoints is not None:
                return episode, keypoints.names
        return "", ()

    def _doubt_of(self, episode: str) -> float | None:
        path = self._folder(episode) / "quality.json"
        return self._doubt(path) if path.is_file() else None


_LISTED: tuple[Kind, ...] = ("annotation", "proposal", "tracks", "overlay")


def _state(cameras: list[CameraView], verdict: Verdict | None) -> State:
    if any(camera.proposed for camera in cameras):
        return "proposal"
    if not any(camera.annotated or camera.tracks_sha256 for camera in cameras):
        return "unannotated"
    if any(camera.annotated and not camera.tracks_sha256 for camera in cameras):
        return "untracked"
    if verdict is None:
        return "review"
    return "accepted" if verdict == "accept" else "rejected"


def _digests(cameras: list[CameraView]) -> dict[int, str]:
    return {index: camera.tracks_sha256 for index, camera in enumerate(cameras) if camera.tracks_sha256}


def _event_view(event: Event) -> EventView:
    return EventView(id=event.id, time=event.time, kind=event.kind, content=event.content, undone=event.undone)


def _read_doubt(path: Path) -> float | None:
    try:
        doubt = json.loads(path.read_bytes())["doubt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of scores: {error}") from None
    if not isinstance(doubt, float | int) or not 0 <= doubt <= 1:
        raise ValueError(f"{path}: doubt must lie in [0, 1], got {str(doubt)[:40]}")
    return float(doubt)


def _checked(wish: AnnotationWish, info: EpisodeInfo) -> Keypoints:
    names = [point.name.strip() for point in wish.points]
    for point, name in zip(wish.points, names, strict=True):
        if not name or not name.isprintable():
            raise RefusedError(422, f"{_short(point.name)}: a keypoint needs a printable name")
        if names.count(name) > 1:
            raise RefusedError(422, f"{_short(name)}: two keypoints have this name")
        if not (0 <= point.x <= info.width and 0 <= point.y <= info.height):
            raise RefusedError(422, f"{_short(name)}: ({point.x:g}, {point.y:g}) lies outside the frame")
        if point.frame >= info.num_frames:
            raise RefusedError(422, f"{_short(name)}: there is no frame {point.frame}, only {info.num_frames}")
    xy = np.array([(point.x, point.y) for point in wish.points])
    return Keypoints(tuple(names), xy, np.array([point.frame for point in wish.points]))


def _annotated(keypoints: Keypoints) -> list[AnnotatedPoint]:
    confidence = [None] * len(keypoints.names) if keypoints.confidence is None else keypoints.confidence.tolist()
    return [
        AnnotatedPoint(name=name, x=xy[0], y=xy[1], frame=frame, confidence=sure)
        for name, xy, frame, sure in zip(
            keypoints.names, keypoints.xy.tolist(), keypoints.frame.tolist(), confidence, strict=True
        )
    ]


def _numbers(values: NDArray[np.floating[Any]], digits: int) -> list[float | None]:
    return [round(value, digits) if math.isfinite(value) else None for value in values.tolist()]


def _short(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")
