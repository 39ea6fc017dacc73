"""``trackbench h5 annotate``: keypoints on first frames, from labelme's files or transferred from a template.

A template's keypoints are found on another episode's first frame by tracking over the pair of frames. The two can
differ by more than trackers bridge, so each point is tried from several starts: where it was, and where features
that the frames have in common say that it went: those of the whole frame, or those around the point. The template
is moved so, and the point is tracked from there to the other frame and back, by the tracker and by a Lucas-Kanade
that looks at its surroundings only (what is around it may have moved otherwise). The best try is taken.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from trackbench.baselines import LucasKanade
from trackbench.files import remove_unfinished, sha256
from trackbench.jobs import Outcome, run_jobs
from trackbench.robotics.keypoints import (
    LOW_CONFIDENCE,
    Keypoints,
    read_annotation,
    read_origin,
    write_annotation,
)
from trackbench.robotics.track import load
from trackbench.robotics.workspace import EpisodeInfo, Workspace

Picture = NDArray[np.uint8]
Affine = NDArray[np.float64]  # (2, 3), first pixel centre 0.5
State = Literal["annotated", "proposed", "missing", "damaged"]

MOST_FEATURES = 4000
NEAREST_FEATURES = 40  # around a point, that say where it went
RATIO = 0.8  # of the distances to the best and the second-best match (Lowe, IJCV 2004, section 7.1)
INLIER = 3.0  # pixels
FEWEST_INLIERS = 6
SURE_ERROR = 2.0  # pixels there and back that halve a confidence
LIKELY_SHIFT = 0.25  # of the diagonal: so far from the template's place, a confidence is half
LIKELY_TURN = 45.0  # degrees: so much against the template, a confidence is half
SAME = 10.0  # pixels: tries that end nearer to each other agree
PATCH = 31  # side of the patches that are compared, pixels


@dataclass(frozen=True)
class CameraState:
    """How far the annotation of a camera is.

    Attributes:
        episode: its id.
        camera: its index.
        state: "annotated" (confirmed), "proposed", "missing", or "damaged".
        names: of the keypoints.
        confidence: the lowest among the points of a proposal; None where there is none.
        problem: what is wrong with the file, one line; "" where nothing is.
    """

    episode: str
    camera: int
    state: State
    names: tuple[str, ...] = ()
    confidence: float | None = None
    problem: str = ""


def states(workspace: Workspace, episodes: Sequence[str] | None = None) -> Iterator[CameraState]:
    """The state of every episode and camera; of an episode whose folder is damaged, that of camera 0."""
    for episode in workspace.episodes() if episodes is None else episodes:
        try:
            info = workspace.info(episode)
        except (ValueError, OSError) as error:
            yield CameraState(episode, 0, "damaged", problem=str(error))
            continue
        for camera in range(info.cameras):
            yield _state(workspace, info, camera)


def import_annotations(
    folder: Path, workspace: Workspace, *, overwrite: bool = False, keep: bool = False
) -> Iterator[Outcome[str, tuple[str, int]]]:
    """Check labelme's files and put them in their places.

    A file belongs to an episode and camera by its name: ``<episode>/cam0.json``, as labelme saves it beside the
    picture in the work folder, or ``<episode>_cam0.json``.

    Args:
        folder: the files, also in folders below.
        workspace: the work folder.
        overwrite: replace annotations that differ; the old ones go to the history.
        keep: leave annotations that are there as they are, such as those corrected since; without either, one
            that differs is an error.

    Yields:
        What became of each file, with the episode and camera that it is for.

    Raises:
        ValueError: there are no ``.json`` files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    files = [name for name in files if not _is_ours(Path(name))]
    if not files:
        raise ValueError(f"{folder}: no .json files of labelme in this folder")
    places = _places(workspace)
    reference = _Reference(workspace)
    for name in sorted(files, key=lambda name: list(places).index(name) if name in places else len(places)):
        try:
            if name not in places:
                raise ValueError(
                    "belongs to no extracted episode; expected EPISODE/cam0.json or EPISODE_cam0.json"
                )
            info, camera = places[name]
            if keep and workspace.file(info.episode, camera, "annotation").exists():
                yield Outcome(name, (info.episode, camera), None)
                continue
            path = folder / name
            keypoints = reference.check(
                read_annotation(path, info.height, info.width, info.num_frames), camera, path
            )
            _place(workspace, info, camera, keypoints, overwrite)
            reference.learn(info.episode, camera, keypoints)
            yield Outcome(name, (info.episode, camera), None)
        except (ValueError, OSError) as error:
            yield Outcome(name, None, " ".join(str(error).split()))


def propose(
    workspace: Workspace,
    template: str,
    *,
    model: str | None = None,
    checkpoint: Path | None = None,
    device: str = "cpu",
    workers: int = 1,
    overwrite: bool = False,
    episodes: Sequence[str] | None = None,
    console: Console | None = None,
) -> Iterator[Outcome[str, dict[int, float]]]:
    """Transfer an episode's keypoints to the first frames of others, as proposals to be confirmed.

    Cameras that are annotated, or have a proposal from the same keypoints and tracker, stay as they are.

    Args:
        workspace: the work folder.
        template: an annotated episode.
        model: tracks across the pair of frames; a name of ``trackbench models``.
        checkpoint: its weights.
        device: where it runs.
        workers: processes.
        overwrite: replace proposals that come from something else.
        episodes: ids; None: all others.
        console: for the progress bar; None: standard error.

    Returns:
        Per episode: camera -> the lowest confidence among its points, for the proposals made now.

    Raises:
        ValueError: the template is not annotated, or not on its first frames.
    """
    info = workspace.info(template)
    found = {}
    for camera in range(info.cameras):
        path = workspace.file(template, camera, "annotation")
        if path.is_file():
            keypoints = read_annotation(path, info.height, info.width, info.num_frames)
            if keypoints.frame.any():
                raise ValueError(f"{path}: a template's keypoints must stand on frame 0")
            found[camera] = keypoints
    if not found:
        raise ValueError(f"{template} is not annotated, so it cannot be a template: {path} is missing")
    named = _load_once(model, checkpoint, device)
    ids = workspace.episodes() if episodes is None else list(episodes)
    work = partial(
        _propose_episode,
        workspace=workspace,
        template=template,
        keypoints=found,
        choice=(model, checkpoint, device),
        identity=(named.model, named.weights_sha256),
        overwrite=overwrite,
    )
    return run_jobs(work, [episode for episode in ids if episode != template], workers, "transferring", console)


def confirm(
    workspace: Workspace,
    episodes: Sequence[str] | None = None,
    *,
    min_confidence: float = 0.0,
    overwrite: bool = False,
) -> Iterator[Outcome[str, list[int]]]:
    """Make proposals the annotations of their cameras.

    Args:
        workspace: the work folder.
        episodes: ids; None: all that have a proposal.
        min_confidence: leave proposals with a point below it.
        overwrite: replace annotations that are there; they go to the history.

    Yields:
        Per episode the cameras that were confirmed; an error where one was not.
    """
    reference = _Reference(workspace)
    for episode in workspace.episodes() if episodes is None else episodes:
        try:
            info = workspace.info(episode)
            waiting = [
                camera for camera in range(info.cameras) if workspace.file(episode, camera, "proposal").is_file()
            ]
            if episodes is None and not waiting:
                continue
            if not waiting:
                raise ValueError("there is no proposal to confirm")
            left = []
            for camera in waiting:
                path = workspace.file(episode, camera, "proposal")
                keypoints = read_annotation(path, info.height, info.width, info.num_frames)
                keypoints = reference.check(keypoints, camera, path)
                lowest = 1.0 if keypoints.confidence is None else float(keypoints.confidence.min())
                if lowest < min_confidence:
                    left.append(f"cam{camera} has a point of confidence {lowest:.2f}, below {min_confidence:g}")
                    continue
                _place(workspace, info, camera, keypoints, overwrite, origin=read_origin(path))
                path.unlink()
            if left:
                raise ValueError("; ".join(left))
            yield Outcome(episode, waiting, None)
        except (ValueError, OSError) as error:
            yield Outcome(episode, None, " ".join(str(error).split()))


def transfer(template: Picture, keypoints: Keypoints, other: Picture, tracker: Any) -> Keypoints:
    """Find the keypoints of one picture on another.

    Tries (see the top of this module) have a confidence in [0, 1]::

        max(0, c) / (1 + (e / 2)^2) / (1 + (d / (0.25 D))^2) / (1 + (a / 45)^2)

    with the correlation c of the patches around the point in both frames, the forward-backward error e and the
    distance d from the template's place in pixels, the frame's diagonal D, and the turn a in degrees. A point
    whose best try has w, and the best of those that end elsewhere r, gets the confidence w^2 / (w + r).

    Args:
        template: (H, W, 3) uint8.
        keypoints: on it.
        other: (H, W, 3) uint8.
        tracker: any of the project.

    Returns:
        The same names, with places on ``other`` and their confidence.

    Raises:
        ValueError: the pictures differ in size.
    """
    if template.shape != other.shape:
        raise ValueError(f"the template is {template.shape[:2]}, the other picture {other.shape[:2]}")
    tries: list[list[tuple[float, float, float]]] = [[] for _ in keypoints.names]
    for rows, move in _starts(_grey(template), _grey(other), keypoints.xy):
        for follower in (tracker, LucasKanade(levels=1)):
            found, confidence = _try(template, keypoints.xy[rows], other, move, follower)
            for row, value, (x, y) in zip(rows, confidence.tolist(), found.tolist(), strict=True):
                tries[row].append((value, x, y))
    xy, sure = np.empty((len(tries), 2)), np.empty(len(tries))
    for row, ends in enumerate(tries):
        best, *xy[row] = max(ends)
        rival = max((value for value, *end in ends if np.linalg.norm(xy[row] - end) > SAME), default=0.0)
        sure[row] = best**2 / (best + rival) if best else 0.0
    return Keypoints(keypoints.names, xy, confidence=sure)


def add_command(stages: Any) -> None:
    """Add ``annotate``."""
    parser = stages.add_parser("annotate", help="keypoints on first frames: import, transfer, confirm, list")
    parser.add_argument("root", type=Path, metavar="OUT", help="work folder")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--import", dest="folder", type=Path, metavar="DIR", help="labelme files, EPISODE/cam0.json")
    task.add_argument("--template", metavar="EPISODE", help="propose its keypoints for the other episodes")
    task.add_argument("--confirm", nargs="+", metavar="EPISODE", help="take the proposals of these episodes")
    task.add_argument("--confirm-all", action="store_true", help="take all proposals, see --min-confidence")
    task.add_argument("--list", action="store_true", help="show the state of every episode and camera")
    parser.add_argument("--model", help="tracks from template to episode (default: lucas_kanade)")
    parser.add_argument("--checkpoint", type=Path, help="its weights; without --model, a checkpoint of trackbench")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument("--workers", type=int, default=1, help="processes of --template (default: 1)")
    parser.add_argument(
        "--min-confidence",
        type=float,
        default=0.0,
        metavar="X",
        help="leave proposals with a point below X, in [0, 1]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there; annotations are kept")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    workspace = Workspace(options.root)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if not workspace.episodes():
        raise ValueError(f"{workspace.root}: no extracted episodes; run `trackbench h5 extract` first")
    if options.list:
        return _list(workspace)
    if options.folder is not None:
        outcomes: Iterator[Outcome[str, Any]] = import_annotations(
            options.folder, workspace, overwrite=options.overwrite
        )
        done = "annotations imported"
    elif options.template is not None:
        outcomes = propose(
            workspace,
            options.template,
            model=options.model,
            checkpoint=options.checkpoint,
            device=options.device,
            workers=options.workers,
            overwrite=options.overwrite,
            console=console,
        )
        done = "episodes have proposals or annotations"
    else:
        outcomes = confirm(
            workspace, options.confirm, min_confidence=options.min_confidence, overwrite=options.overwrite
        )
        done = "episodes confirmed"
    good, failed, unsure = 0, 0, 0
    for outcome in outcomes:
        if outcome.error is not None:
            failed += 1
            console.print(f"{outcome.item}: {outcome.error}", markup=False)
            continue
        good += 1
        lowest = min([1.0, *outcome.result.values()]) if isinstance(outcome.result, dict) else 1.0
        if lowest < LOW_CONFIDENCE:
            unsure += 1
            console.print(f"{outcome.item}: look at it: lowest confidence {lowest:.2f}", markup=False)
    told = f", {unsure} of them unsure" if unsure else ""
    console.print(f"{good} {done}{told}, {failed} failed", markup=False)
    return 1 if failed else 0


def _list(workspace: Workspace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    found = list(states(workspace))
    for state in found:
        lowest = "" if state.confidence is None else f", lowest confidence {state.confidence:.2f}"
        about = state.problem or f"{', '.join(state.names)}{lowest}"
        console.print(
            f"{state.episode} cam{state.camera}: {state.state}{f': {about}' if about else ''}", markup=False
        )
    count = {kind: sum(state.state == kind for state in found) for kind in ("annotated", "proposed", "missing")}
    console.print(", ".join(f"{number} {kind}" for kind, number in count.items()), markup=False)
    return 1 if any(state.state == "damaged" for state in found) else 0


def _state(workspace: Workspace, info: EpisodeInfo, camera: int) -> CameraState:
    for kind, state in (("annotation", "annotated"), ("proposal", "proposed")):
        path = workspace.file(info.episode, camera, kind)  # type: ignore[arg-type]
        if not path.is_file():
            continue
        try:
            keypoints = read_annotation(path, info.height, info.width, info.num_frames)
        except (ValueError, OSError) as error:
            return CameraState(info.episode, camera, "damaged", problem=str(error))
        lowest = None if keypoints.confidence is None else float(keypoints.confidence.min())
        return CameraState(info.episode, camera, state, keypoints.names, lowest)  # type: ignore[arg-type]
    return CameraState(info.episode, camera, "missing")


class _Reference:
    """The names that the keypoints of a camera have: those of the first episode that is annotated."""

    def __init__(self, workspace: Workspace) -> None:
        self._found: dict[int, tuple[str, tuple[str, ...]]] = {}
        for state in states(workspace):
            if state.state == "annotated":
                self._found.setdefault(state.camera, (state.episode, state.names))

    def learn(self, episode: str, camera: int, keypoints: Keypoints) -> None:
        self._found.setdefault(camera, (episode, keypoints.names))

    def check(self, keypoints: Keypoints, camera: int, path: Path) -> Keypoints:
        """In the order of the others; ValueError where the names differ."""
        if camera not in self._found:
            return keypoints
        episode, names = self._found[camera]
        try:
            return keypoints.in_order_of(names)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, beside the keypoints of {episode}") from None


def _is_ours(name: Path) -> bool:
    """Whether it is another file of a work folder, where labelme may have saved its own."""
    return name.name in ("episode.json", "quality.json") or ".proposal" in name.suffixes or "history" in name.parts


def _places(workspace: Workspace) -> dict[str, tuple[EpisodeInfo, int]]:
    """Names that a file to import can have, in the order of episodes."""
    places = {}
    for episode in workspace.episodes():
        try:
            info = workspace.info(episode)
        except (ValueError, OSError):  # states() tells it
            continue
        for camera in range(info.cameras):
            for name in (f"{episode}/cam{camera}.json", f"{episode}_cam{camera}.json"):
                places[name] = info, camera
    return places


def _place(
    workspace: Workspace,
    info: EpisodeInfo,
    camera: int,
    keypoints: Keypoints,
    overwrite: bool,
    origin: dict[str, Any] | None = None,
) -> None:
    """Write an annotation; what another took the place of goes to the history."""
    path = workspace.file(info.episode, camera, "annotation")
    if path.is_file():
        try:
            same = read_annotation(path, info.height, info.width, info.num_frames).digest == keypoints.digest
        except ValueError:
            same = False
        if same:
            return
        if not overwrite:
            raise ValueError(f"{path}: another annotation is there; --overwrite replaces it (the old one is kept)")
        kept = workspace.history(info.episode) / f"cam{camera}.{sha256(path)}.json"
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, kept)
    image = workspace.file(info.episode, camera, "image").name
    write_annotation(path, keypoints, image=image, height=info.height, width=info.width, origin=origin)


_load_once = lru_cache(maxsize=1)(load)


def _propose_episode(
    episode: str,
    *,
    workspace: Workspace,
    template: str,
    keypoints: dict[int, Keypoints],
    choice: tuple[str | None, Path | None, str],
    identity: tuple[str, str],
    overwrite: bool,
) -> dict[int, float]:
    """The work of one process."""
    info = workspace.info(episode)
    remove_unfinished(workspace.folder(episode))
    made = {}
    for camera, points in keypoints.items():
        if camera >= info.cameras:
            raise ValueError(f"has no camera {camera}, which the template {template} has")
        if workspace.file(episode, camera, "annotation").is_file():
            continue
        path = workspace.file(episode, camera, "proposal")
        origin = {
            "template": template,
            "annotation_sha256": points.digest,
            "model": identity[0],
            "weights_sha256": identity[1],
        }
        if path.is_file() and not overwrite:
            if read_origin(path) != origin:
                raise ValueError(f"{path}: a proposal from something else is there; --overwrite replaces it")
            continue
        pictures = [_picture(workspace.file(name, camera, "image")) for name in (template, episode)]
        if pictures[1].shape[:2] != (info.height, info.width):
            raise ValueError(f"{path.with_name(f'cam{camera}.png')}: expected {info.height} x {info.width} pixels")
        found = transfer(pictures[0], points, pictures[1], _load_once(*choice).tracker)
        image = workspace.file(episode, camera, "image").name
        write_annotation(path, found, image=image, height=info.height, width=info.width, origin=origin)
        assert found.confidence is not None
        made[camera] = float(found.confidence.min())
    return made


def _picture(path: Path) -> Picture:
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's for damaged files
        raise ValueError(f"{path}: not a readable image: {error}") from error


def _starts(
    template: Picture, other: Picture, xy: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.int64], Affine]]:
    """Rows of points, and how to move the template before they are tracked."""
    every = np.arange(len(xy))
    yield every, np.eye(2, 3)
    here, there = _matches(template, other)
    move = _fit(here, there)
    if move is not None:
        yield every, move
    for row in every:
        near = np.argsort(np.linalg.norm(here - (xy[row] - 0.5), axis=1))[:NEAREST_FEATURES]
        move = _fit(here[near], there[near])
        if move is not None:
            yield every[row : row + 1], move


def _matches(template: Picture, other: Picture) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, 2) places of features that both pictures have, first pixel centre 0."""
    sift = cv2.SIFT.create(MOST_FEATURES)
    here, described = sift.detectAndCompute(template, None)
    there, described_there = sift.detectAndCompute(other, None)
    if described is None or described_there is None or len(there) < 2:
        return np.empty((0, 2)), np.empty((0, 2))
    pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(described, described_there, k=2)
    good = [best for best, second in pairs if best.distance < RATIO * second.distance]
    return (
        np.array([here[match.queryIdx].pt for match in good]).reshape(-1, 2),
        np.array([there[match.trainIdx].pt for match in good]).reshape(-1, 2),
    )


def _fit(here: NDArray[np.float64], there: NDArray[np.float64]) -> Affine | None:
    """The similarity that most matches agree on; None where too few do."""
    if len(here) < FEWEST_INLIERS:
        return None
    move, inliers = cv2.estimateAffinePartial2D(here, there, ransacReprojThreshold=INLIER)
    return None if move is None or inliers.sum() < FEWEST_INLIERS else np.asarray(move, np.float64)


def _try(
    template: Picture, xy: NDArray[np.float64], other: Picture, move: Affine, tracker: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Places (n, 2) on the other picture, and the confidence (n,) in each, see :func:`transfer`."""
    H, W = template.shape[:2]
    warped = cv2.warpAffine(template, move, (W, H), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    moved = warped.astype(np.uint8, copy=False)
    start = (xy - 0.5) @ move[:, :2].T + move[:, 2] + 0.5
    found, confidence = start.copy(), np.zeros(len(xy))
    inside = ((start >= 0) & (start <= (W, H))).all(axis=1)
    found = np.clip(found, 0, (W, H))
    if not inside.any():
        return found, confidence
    there = _across(tracker, moved, other, start[inside])
    back = _across(tracker, other, moved, np.clip(there, 0, (W, H)))
    error = np.linalg.norm(back - start[inside], axis=1)
    alike = _likeness(_grey(moved), _grey(other), start[inside], there)
    stays = ((there >= 0) & (there <= (W, H))).all(axis=1)
    found[inside] = np.clip(there, 0, (W, H))
    shift = np.linalg.norm(there - xy[inside], axis=1) / (LIKELY_SHIFT * np.hypot(H, W))
    turn = np.degrees(np.arctan2(move[1, 0], move[0, 0])) / LIKELY_TURN
    confidence[inside] = stays * np.maximum(alike, 0) / (1 + (error / SURE_ERROR) ** 2)
    confidence[inside] /= (1 + shift**2) * (1 + turn**2)
    return found, np.clip(confidence, 0, 1)


def _across(tracker: Any, first: Picture, second: Picture, xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points (n, 2) of the first picture on the second."""
    queries = np.concatenate([np.zeros((len(xy), 1)), xy], axis=1)
    return tracker.track(np.stack([first, second]), queries).xy[:, 1].numpy().astype(np.float64)


def _likeness(
    first: Picture, second: Picture, xy: NDArray[np.float64], other_xy: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Correlation (n,) of the patches around points of two grey pictures; 0 where one is flat."""
    result = np.zeros(len(xy))
    for row, (here, there) in enumerate(zip(xy - 0.5, other_xy - 0.5, strict=True)):
        patches = [
            cv2.getRectSubPix(picture, (PATCH, PATCH), tuple(map(float, centre))).astype(np.float64).ravel()
            for picture, centre in ((first, here), (second, there))
        ]
        deviations = [patch - patch.mean() for patch in patches]
        norms = [float(np.linalg.norm(deviation)) for deviation in deviations]
        if min(norms) > PATCH:  # one grey level per pixel
            result[row] = float(deviations[0] @ deviations[1]) / (norms[0] * norms[1])
    return result


def _grey(picture: Picture) -> Picture:
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8)
