"""``trackbench h5 attach``: new episode files with the keypoints of accepted episodes inside; and ``verify``.

A new file starts as a copy of the original's bytes, so that everything in it stays as it was: datasets,
attributes, compression, links, references. Beside the images of each step it gets

- ``keypoints`` (1, cameras, K, 2) float32: x, y in pixels, the centre of the first pixel is (0.5, 0.5),
- ``keypoints_visible`` (1, cameras, K) bool,
- ``keypoints_confidence`` (1, cameras, K) float32 in [0, 1],

and the file gets a group ``trackbench_keypoints`` that says where they come from. K counts the names of all
cameras; a name that a camera does not have is NaN there, not visible, with confidence 0. The file is read back and
compared before it gets its name, and the original is only ever opened for reading.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import trackbench
from trackbench import jobs
from trackbench.files import inside, remove_unfinished, written_whole
from trackbench.robotics.content import address, content_sha256
from trackbench.robotics.episodes import find_episodes, import_h5py, member, open_hdf5
from trackbench.robotics.extract import default_workers
from trackbench.robotics.review import tracks_sha256
from trackbench.robotics.store import Decision, Decisions
from trackbench.robotics.track import open_source
from trackbench.robotics.track_file import read_tracks
from trackbench.robotics.workspace import EpisodeInfo, Workspace

FORMAT = 1
ABOUT = "trackbench_keypoints"
COORDINATES = "pixels x right, y down, centre of the first pixel (0.5, 0.5)"
_RESERVED_PER_STEP = 4096  # bytes that HDF5 takes for three small datasets and their names: about half of it
_KINDS = ("keypoints", "keypoints_visible", "keypoints_confidence")


@dataclass(frozen=True)
class AttachedKeypoints:
    """The keypoints of an episode as they are attached.

    Attributes:
        names: (K,).
        xy: (T, cameras, K, 2) float32, pixels; NaN where a camera does not have a keypoint.
        visible: (T, cameras, K) bool.
        confidence: (T, cameras, K) float32 in [0, 1].
    """

    names: tuple[str, ...]
    xy: NDArray[np.float32]
    visible: NDArray[np.bool_]
    confidence: NDArray[np.float32]

    @property
    def digest(self) -> str:
        """SHA-256 of names, numbers and shape."""
        digest = hashlib.sha256(repr((self.names, self.visible.shape)).encode())
        for values in (self.xy.astype("<f4"), self.visible, self.confidence.astype("<f4")):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Attached:
    """What became of an episode.

    Attributes:
        episode: its id.
        path: its file with keypoints.
        state: the file was written now, was there already (and fits), or there is none because the decision was
            made on other tracks than there are now.
    """

    episode: str
    path: Path
    state: Literal["written", "there", "stale"]


def attach(
    source: Path,
    workspace: Workspace,
    *,
    to: Path | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> Iterator[jobs.Outcome[str, Attached]]:
    """Write a file with keypoints for every accepted episode, in the order in which they finish.

    A file that is there stays if it comes from the same original, tracks and decision, and is written again
    otherwise. A file of an episode that is not accepted (any more) fails the episode, and is left as it is. One
    run at a time per folder.

    Args:
        source: the folder of the original episodes, or the one file.
        workspace: where the other stages wrote to.
        to: folder to write to; None: ``workspace.attached``.
        workers: processes; None: one per core, at most 4.
        console: for the progress bar; None: standard error.

    Raises:
        ValueError: the folder to write to lies among the episodes, or the database of decisions is damaged.
        FileNotFoundError: there is nothing at ``source``.
        ImportError: h5py is not installed.
    """
    import_h5py()
    source, folder = Path(source), Path(to or workspace.attached)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    among = source.resolve() if source.is_dir() else source.resolve().parent
    if folder.resolve().is_relative_to(among):
        raise ValueError(f"{folder}: attached files must not lie in the folder of episodes, {among}")
    decisions = Decisions(workspace.review).all_current()
    accepted = {name: decision for name, decision in decisions.items() if decision.verdict == "accept"}
    items: list[tuple[str, Decision | None]] = []
    for episode in workspace.episodes():
        if episode in accepted or _target(folder, episode).is_file():
            items.append((episode, accepted.get(episode)))
    for parent in {_target(folder, episode).parent for episode, _ in items}:
        remove_unfinished(parent)
    work = partial(_attach_episode, source=source, workspace=workspace, folder=folder)
    for outcome in jobs.run_jobs(work, items, workers or default_workers(), "attaching", console):
        yield jobs.Outcome(outcome.item[0], outcome.result, outcome.error)


def verify(
    folder: Path, source: Path | None = None, *, workers: int | None = None, console: Console | None = None
) -> Iterator[jobs.Outcome[str, Attached]]:
    """Check all files that :func:`attach` wrote to a folder.

    The keypoints and the content beside them must have the digests that the file states, and so must the original
    as it is now, if given.

    Args:
        folder: with attached files.
        source: the folder of the original episodes, or the one file; None: do not compare.
        workers: processes; None: one per core, at most 4.
        console: for the progress bar; None: standard error.

    Raises:
        ValueError: there are no files.
        FileNotFoundError: there is no such folder.
    """
    files = find_episodes(Path(folder))
    work = partial(_verify_file, source=source)
    for outcome in jobs.run_jobs(work, list(files.items()), workers or default_workers(), "verifying", console):
        yield jobs.Outcome(outcome.item[0], outcome.result, outcome.error)


def read_attached(file: Any) -> AttachedKeypoints:
    """The keypoints in an open ``h5py.File`` that :func:`attach` wrote.

    Raises:
        ValueError: there are none, or some are missing.
    """
    about = file.get(ABOUT)
    try:
        if about is None or int(about.attrs["format"]) != FORMAT:
            raise ValueError(f"no group {ABOUT} of format {FORMAT}: not a file that `trackbench h5 attach` wrote")
        names = tuple(str(name) for name in about.attrs["names"])
        steps = [step.decode() for step in about["steps"][()]]
        keys = _keys(str(about.attrs["image_key"]))
        values = [np.concatenate([member(file, f"{step}/{key}")[()] for step in steps]) for key in keys]
    except (KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"keypoints are missing or damaged: {error}") from error
    return AttachedKeypoints(names, *values)


def _attach_episode(
    item: tuple[str, Decision | None], *, source: Path, workspace: Workspace, folder: Path
) -> Attached:
    """The work of one process."""
    episode, decision = item
    target = _target(folder, episode)
    if decision is None:
        raise ValueError(f"{target} is there, but the episode is not accepted (any more); take it away")
    info = workspace.info(episode)
    keypoints, origin = _gather(workspace, info)
    if not decision.holds(tracks_sha256(workspace, episode)):
        if target.is_file():
            raise ValueError(f"{target} has earlier tracks, and nobody decided on those of now; decide again")
        return Attached(episode, target, "stale")
    with open_source(source, info) as original:
        path = original.path
    about = _about(info, decision, keypoints, origin)
    if target.is_file():
        _check_ours(target)
        if _is_current(target, about):
            return Attached(episode, target, "there")
    with written_whole(target) as unfinished:
        shutil.copyfile(path, unfinished)
        _reserve(unfinished, keypoints)
        _write_keypoints(unfinished, info, keypoints, about, path)
    return Attached(episode, target, "written")


def _gather(workspace: Workspace, info: EpisodeInfo) -> tuple[AttachedKeypoints, dict[str, list[str]]]:
    """The keypoints of all cameras, and where they come from, per camera."""
    paths = [workspace.file(info.episode, camera, "tracks") for camera in range(info.cameras)]
    tracks = [read_tracks(path) if path.is_file() else None for path in paths]
    names = tuple(dict.fromkeys(name for camera in tracks if camera for name in camera.names))
    shape = (info.num_frames, info.cameras, len(names))
    keypoints = AttachedKeypoints(
        names, np.full((*shape, 2), np.nan, np.float32), np.zeros(shape, bool), np.zeros(shape, np.float32)
    )
    for number, (camera, path) in enumerate(zip(tracks, paths, strict=True)):
        if camera is None:
            continue
        if camera.num_frames != info.num_frames:
            raise ValueError(f"{path}: {camera.num_frames} frames, the episode has {info.num_frames}")
        columns = [names.index(name) for name in camera.names]
        keypoints.xy[:, number, columns] = camera.xy.transpose(1, 0, 2)
        keypoints.visible[:, number, columns] = camera.visible.T
        keypoints.confidence[:, number, columns] = camera.visibility.T
    origin = {
        key: ["" if camera is None else getattr(camera, key) for camera in tracks]
        for key in ("model", "weights_sha256", "annotation_sha256", "trackbench_version")
    }
    return keypoints, origin


def _about(
    info: EpisodeInfo, decision: Decision, keypoints: AttachedKeypoints, origin: dict[str, list[str]]
) -> dict[str, Any]:
    """The attributes of the group that says where keypoints come from; lists have one entry per camera."""
    return {
        "format": FORMAT,
        "episode": info.episode,
        "source": info.source,
        "source_fingerprint": info.source_fingerprint,
        "image_key": info.image_key,
        "names": list(keypoints.names),
        "coordinates": COORDINATES,
        "height": info.height,
        "width": info.width,
        "model": origin["model"],
        "weights_sha256": origin["weights_sha256"],
        "annotation_sha256": origin["annotation_sha256"],
        "tracks_sha256": [decision.tracks_sha256.get(camera, "") for camera in range(info.cameras)],
        "tracked_with": origin["trackbench_version"],
        "trackbench_version": trackbench.__version__,
        "decision": decision.verdict,
        "decision_reason": decision.reason,
        "decision_time": decision.time,
        "keypoints_sha256": keypoints.digest,
    }


def _reserve(path: Path, keypoints: AttachedKeypoints) -> None:
    """Lengthen a file by more than the keypoints take, so that a full disk is noticed here.

    HDF5 can crash when it cannot write; it cuts off on closing what it did not need.
    """
    T, V, K, _ = keypoints.xy.shape
    names = sum(len(name.encode()) for name in keypoints.names)
    size = _RESERVED_PER_STEP * T + (4 * 2 + 4 + 1) * T * V * K + 8 * names + 2**18
    with path.open("ab") as file:
        for start in range(0, size, 2**20):
            file.write(bytes(min(2**20, size - start)))


def _write_keypoints(
    path: Path, info: EpisodeInfo, keypoints: AttachedKeypoints, about: dict[str, Any], original: Path
) -> None:
    """Add the keypoints to a copy of the original, and read all of it back."""
    h5py = import_h5py()
    keys = _keys(info.image_key)
    above = info.image_key.rpartition("/")[0]
    with open_hdf5(original) as file, _told(original):
        before = content_sha256(file)
    with _told(path, writing=True), h5py.File(path, "r+") as file:
        if ABOUT in file:
            raise ValueError(f"{original}: holds keypoints already, the group {ABOUT}")
        for t, step in enumerate(info.steps):
            group = member(file, f"{step}/{above}")  # never in another file
            for key, values in zip(keys, (keypoints.xy, keypoints.visible, keypoints.confidence), strict=True):
                name = key.rpartition("/")[2]
                if group.get(name, getlink=True) is not None:
                    raise ValueError(f"{original}: {step} holds {key} already")
                group.create_dataset(name, data=values[None, t])
        group = file.create_group(ABOUT)
        for name, value in {**about, "content_sha256": before}.items():
            group.attrs[name] = value
        group.create_dataset("steps", data=list(info.steps), dtype=h5py.string_dtype())
    with open_hdf5(path) as file, _told(path):
        found = read_attached(file)
        if found.digest != keypoints.digest or content_sha256(file, _added(file)) != before:
            raise OSError(f"{path}: what was read back is not what was written")


def _verify_file(item: tuple[str, Path], *, source: Path | None) -> Attached:
    """The work of one process."""
    name, path = item
    with open_hdf5(path) as file, _told(path):
        found = read_attached(file)
        about = dict(file[ABOUT].attrs)
        missing = [key for key in ("keypoints_sha256", "content_sha256", "source") if key not in about]
        if missing:
            raise ValueError(f"attribute {missing[0]} of {ABOUT} is missing")
        if found.digest != about["keypoints_sha256"]:
            raise ValueError("the keypoints are not those that were written")
        if content_sha256(file, _added(file)) != about["content_sha256"]:
            raise ValueError("the content beside the keypoints is not that of the original")
    if source is not None:
        original = source if source.is_file() else inside(source, str(about["source"]))
        with open_hdf5(original) as file, _told(original):
            if content_sha256(file) != about["content_sha256"]:
                raise ValueError(f"the original is not what {path} was made from")
    return Attached(name, path, "there")


def _added(file: Any) -> set[int]:
    """Addresses of what :func:`attach` added to a file."""
    about = file[ABOUT]
    keys = _keys(str(about.attrs["image_key"]))
    steps = [step.decode() for step in about["steps"][()]]
    return {address(about), *(address(member(file, f"{step}/{key}")) for step in steps for key in keys)}


def _keys(image_key: str) -> list[str]:
    """Names of the keypoint datasets within a step, beside the images."""
    above, slash, _ = image_key.rpartition("/")
    return [f"{above}{slash}{kind}" for kind in _KINDS]


def _target(folder: Path, episode: str) -> Path:
    path = inside(folder, episode)
    return path.with_name(path.name + ".h5")


def _check_ours(path: Path) -> None:
    """Nothing that was not written by attach is replaced."""
    with open_hdf5(path) as file, _told(path):
        if ABOUT not in file:
            raise ValueError("is there, and was not written by `trackbench h5 attach`; it is left as it is")


def _is_current(path: Path, about: dict[str, Any]) -> bool:
    with open_hdf5(path) as file, _told(path):
        stated = file[ABOUT].attrs
        kept = {key: value for key, value in about.items() if key != "trackbench_version"}
        return all(key in stated and np.array_equal(stated[key], value) for key, value in kept.items())


@contextmanager
def _told(path: Path, writing: bool = False) -> Iterator[None]:
    """HDF5's errors, of many types, as one line that names the file."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, OSError, ValueError) as error:
        text = " ".join(str(error).split())
        if writing and not isinstance(error, ValueError):
            raise OSError(f"{path}: could not be written: {text}") from error
        raise ValueError(text if str(path) in text else f"{path}: {text}") from error


def add_command(stages: Any) -> None:
    """Add ``attach`` and ``verify``."""
    parser = stages.add_parser("attach", help="new .h5 files with the keypoints of accepted episodes inside")
    parser.add_argument("source", type=Path, metavar="IN", help="folder of the original episodes; only read")
    parser.add_argument("root", type=Path, metavar="OUT", help="work folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to write to (default: OUT/attached)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 4)")
    parser.set_defaults(run=_run_attach)

    parser = stages.add_parser("verify", help="check files that attach wrote")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of attached files, or one file")
    parser.add_argument("--against", type=Path, metavar="IN", help="compare with the original episodes too")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, at most 4)")
    parser.set_defaults(run=_run_verify)


def _run_attach(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    workspace = Workspace(options.root)
    if not workspace.episodes():
        raise ValueError(f"{options.root}: no extracted episodes; run `trackbench h5 extract` first")
    done, failed = jobs.collect(
        attach(options.source, workspace, to=options.to, workers=options.workers, console=console), console
    )
    count = Counter(result.state for result in done)
    others = len(workspace.episodes()) - len(done) - failed
    console.print(
        f"{count['written']} episodes attached, {count['there']} were there, {others} not accepted, "
        f"{count['stale']} accepted on earlier tracks, {failed} failed",
        markup=False,
    )
    return 1 if failed else 0


def _run_verify(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    outcomes = verify(options.folder, options.against, workers=options.workers, console=console)
    done, failed = jobs.collect(outcomes, console)
    console.print(f"{len(done)} files are as they were written, {failed} are not", markup=False)
    return 1 if failed else 0
