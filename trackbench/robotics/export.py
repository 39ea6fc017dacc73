"""``trackbench h5 export``: accepted episodes as a LeRobot dataset, or as clips for evaluation.

What an episode adds is made first and kept under ``export/parts``, named by all that it depends on, so that a run
that was killed, or one with more episodes, makes only what is missing. The export is then put together in a folder
beside its place, and takes it at once. ``trackbench.json`` in it says what it was made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from rich.console import Console

import trackbench
from trackbench.files import folder_written_whole, inside, link_or_copy, remove_unfinished, sha256
from trackbench.jobs import run_jobs
from trackbench.robotics import lerobot
from trackbench.robotics.clips import SUFFIXES, Container, clip_name, write_clip
from trackbench.robotics.review import tracks_sha256
from trackbench.robotics.store import Decision, Decisions
from trackbench.robotics.track import open_source
from trackbench.robotics.track_file import CameraTracks, read_tracks
from trackbench.robotics.workspace import Workspace

Format = Literal["lerobot", "tapvid"]

FORMAT = 1  # of what is under export/parts; a new one makes all anew
MARKER = "trackbench.json"


@dataclass(frozen=True)
class ExportSettings:
    """How episodes are exported.

    Attributes:
        keys: for ``lerobot``: dataset of a step -> key of its feature, see
            :func:`trackbench.robotics.lerobot.collect`.
        task: for ``lerobot``: what is done, in words; None: the attribute ``task`` of each file.
        robot_type: for ``lerobot``, in its words.
        container: for ``tapvid``: "npz" or "pickle".
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    task: str | None = None
    robot_type: str | None = None
    container: Container = "npz"

    def __post_init__(self) -> None:
        if self.container not in get_args(Container):
            raise ValueError(f"container must be one of {', '.join(get_args(Container))}, got {self.container!r}")


@dataclass(frozen=True)
class Exported:
    """What became of an export.

    Attributes:
        folder: of the export.
        episodes: that are in it, in natural order.
        fresh: whether it was written now; otherwise it was there as it should be.
        skipped: episode -> why it is not meant to be in it (not accepted).
        failed: episode -> why it could not be.
        left_out: datasets of the steps that are not in it -> why.
    """

    folder: Path
    episodes: tuple[str, ...]
    fresh: bool
    skipped: dict[str, str]
    failed: dict[str, str]
    left_out: dict[str, str]


def export(
    source: Path,
    workspace: Workspace,
    kind: Format,
    *,
    to: Path | None = None,
    settings: ExportSettings | None = None,
    episodes: Sequence[str] | None = None,
    workers: int = 1,
    console: Console | None = None,
) -> Exported:
    """Export the accepted episodes whose tracks are still those that were accepted.

    An earlier export of trackbench in the same place is replaced.

    Args:
        source: the folder of the original episodes, or the one file; only read.
        workspace: with their tracks and decisions.
        kind: "lerobot" or "tapvid".
        to: folder to write; None: ``export/lerobot`` or ``export/tapvid`` in the work folder.
        settings: see :class:`ExportSettings`.
        episodes: ids; None: all.
        workers: processes.
        console: for the progress bar; None: standard error.

    Raises:
        ValueError: an unknown kind; something else lies at ``to``; no episode is left to export.
        OSError: the folder cannot be written, for example for a full disk.
        ImportError: a package is missing.
    """
    if kind not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {kind!r}")
    settings = settings or ExportSettings()
    folder = Path(to).resolve() if to is not None else workspace.root / "export" / kind
    _check_replaceable(folder, kind)
    if kind == "lerobot":
        _import_pyarrow()
    accepted, skipped, failed = accepted_episodes(workspace, episodes)
    parts = workspace.root / "export" / "parts" / kind
    remove_unfinished(parts)
    make = _make_piece if kind == "lerobot" else _make_clips
    work = partial(make, source=Path(source), workspace=workspace, parts=parts, settings=settings)
    made: dict[str, list[Path]] = {}
    for outcome in run_jobs(
        work, [_Item(*item) for item in accepted.items()], workers, f"exporting to {kind}", console
    ):
        if outcome.result is None:
            failed[outcome.item.episode] = str(outcome.error)
        else:
            made[outcome.item.episode] = outcome.result
    made = {episode: made[episode] for episode in accepted if episode in made}
    left_out = _fitting_pieces(made, failed) if kind == "lerobot" else _different_clips(made, failed)
    fresh = False
    if made:
        content = {
            "format": FORMAT,
            "kind": kind,
            "trackbench_version": trackbench.__version__,
            "settings": asdict(settings),
            "episodes": [_about(episode, accepted[episode], paths) for episode, paths in made.items()],
            "left_out": left_out,
        }
        fill = _fill_lerobot if kind == "lerobot" else _fill_clips
        fresh = _put(folder, content, lambda place: fill(place, workspace, made, settings))
        used = {path for paths in made.values() for path in paths}
        for path in parts.iterdir():
            if path not in used:
                path.unlink()
    return Exported(folder, tuple(made), fresh, skipped, failed, left_out)


def accepted_episodes(
    workspace: Workspace, episodes: Sequence[str] | None = None
) -> tuple[dict[str, Decision], dict[str, str], dict[str, str]]:
    """Which episodes are accepted as they are tracked now.

    Args:
        workspace: with tracks and decisions.
        episodes: ids; None: all.

    Returns:
        Accepted episodes with their decisions; those that are not, with the reason; those whose files are damaged,
        with what is wrong. In natural order.
    """
    decisions = Decisions(workspace.review).all_current()
    accepted: dict[str, Decision] = {}
    skipped: dict[str, str] = {}
    damaged: dict[str, str] = {}
    for episode in workspace.episodes() if episodes is None else episodes:
        try:
            hashes = tracks_sha256(workspace, episode)
        except (ValueError, OSError) as error:
            damaged[episode] = " ".join(str(error).split())
            continue
        decision = decisions.get(episode)
        if decision is None:
            skipped[episode] = "not reviewed"
        elif decision.verdict != "accept":
            skipped[episode] = f"rejected{f': {decision.reason}' if decision.reason else ''}"
        elif not decision.holds(hashes):
            skipped[episode] = "its tracks changed since it was accepted; review it again"
        else:
            accepted[episode] = decision
    return accepted, skipped, damaged


def add_command(stages: Any) -> None:
    """Add ``export``."""
    parser = stages.add_parser("export", help="accepted episodes as a LeRobot dataset, or as clips for evaluation")
    parser.add_argument("source", type=Path, metavar="IN", help="folder of the original episodes")
    parser.add_argument("root", type=Path, metavar="OUT", help="work folder")
    parser.add_argument(
        "--format",
        choices=get_args(Format),
        required=True,
        help="lerobot: LeRobot dataset v3.0; tapvid: annotated clips, for benchmark=tapvid_files",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder to write (default: OUT/export/FORMAT)")
    parser.add_argument("--episodes", nargs="+", metavar="EPISODE", help="only these")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument(
        "--key",
        nargs="+",
        default=[],
        metavar="NAME=KEY",
        help="lerobot: key of a dataset of the steps, e.g. obs/qpos=observation.state; NAME= leaves it out",
    )
    parser.add_argument(
        "--task", help="lerobot: what is done, in words (default: the attribute task of each file)"
    )
    parser.add_argument("--robot-type", help="lerobot: the robot's type, in LeRobot's words")
    parser.add_argument(
        "--container", choices=get_args(Container), default="npz", help="tapvid: npz with JPEGs, or pickle"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    wrong = [text for text in options.key if "=" not in text]
    if wrong:
        raise ValueError(f"--key {wrong[0]}: expected NAME=KEY")
    keys = dict(text.split("=", 1) for text in options.key)
    settings = ExportSettings(keys, options.task, options.robot_type, options.container)
    exported = export(
        options.source,
        Workspace(options.root),
        options.format,
        to=options.to,
        settings=settings,
        episodes=options.episodes,
        workers=options.workers,
        console=console,
    )
    tell(exported, console)
    return 1 if exported.failed or not exported.episodes else 0


def tell(exported: Exported, console: Console) -> None:
    """Say what became of an export, a line per episode that is not in it."""
    for episode, why in exported.skipped.items():
        console.print(f"{episode}: not exported: {why}", markup=False)
    for episode, why in exported.failed.items():
        console.print(f"{episode}: {why}", markup=False)
    for name, why in exported.left_out.items():
        console.print(f"left out: {name}: {why}", markup=False)
    done = f"{len(exported.episodes)} episodes exported{'' if exported.fresh else ', as they were'}"
    where = f" to {exported.folder}" if exported.episodes else ""
    counts = f"{len(exported.skipped)} not accepted, {len(exported.failed)} failed"
    console.print(f"{done}{where}, {counts}", markup=False)


class _Item(NamedTuple):
    episode: str
    decision: Decision


def _make_piece(
    item: _Item, *, source: Path, workspace: Workspace, parts: Path, settings: ExportSettings
) -> list[Path]:
    """The work of one process: the piece of an episode, unless it is there."""
    info = workspace.info(item.episode)
    options = {"keys": dict(settings.keys), "task": settings.task}
    path = parts / f"{_digest(item, info.source_fingerprint, options)}.npz"
    if not path.is_file():
        tracks = {camera: _tracks(workspace, item, camera, info.num_frames) for camera in _cameras(item)}
        with open_source(source, info) as episode:
            lerobot.write_piece(path, lerobot.collect(episode, info, tracks, settings.keys, settings.task))
    return [path]


def _make_clips(
    item: _Item, *, source: Path, workspace: Workspace, parts: Path, settings: ExportSettings
) -> list[Path]:
    """The work of one process: the clips of an episode, those that are not there."""
    info = workspace.info(item.episode)
    digest = _digest(item, info.source_fingerprint, {"container": settings.container})
    paths = {camera: parts / f"{digest}_{camera}{SUFFIXES[settings.container]}" for camera in _cameras(item)}
    missing = {camera: path for camera, path in paths.items() if not path.is_file()}
    if missing:
        with open_source(source, info) as episode:
            for camera, path in missing.items():
                tracks = _tracks(workspace, item, camera, info.num_frames)
                write_clip(path, clip_name(item.episode, camera), episode, camera, tracks, settings.container)
    return list(paths.values())


def _cameras(item: _Item) -> list[int]:
    """The cameras whose tracks were accepted."""
    return sorted(item.decision.tracks_sha256)


def _digest(item: _Item, fingerprint: str, options: dict[str, Any]) -> str:
    """Names what a part is made from."""
    tracks = sorted(item.decision.tracks_sha256.items())
    content = [FORMAT, trackbench.__version__, item.episode, fingerprint, tracks, options]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _tracks(workspace: Workspace, item: _Item, camera: int, num_frames: int) -> CameraTracks:
    """The tracks of a camera that were accepted."""
    path = workspace.file(item.episode, camera, "tracks")
    tracks = read_tracks(path)
    if sha256(path) != item.decision.tracks_sha256[camera]:
        raise ValueError(f"{path}: changed since the export began")
    if tracks.num_frames != num_frames:
        raise ValueError(f"{path}: {tracks.num_frames} frames, the episode has {num_frames}")
    return tracks


def _fitting_pieces(made: dict[str, list[Path]], failed: dict[str, str]) -> dict[str, str]:
    """Move the episodes that do not fit to the others to ``failed``; returns what is left out of the rest."""
    pieces = {episode: lerobot.read_piece(path, with_vectors=False) for episode, (path,) in made.items()}
    if not pieces:
        return {}
    usual = lerobot.most_usual(list(pieces.values()))
    for episode, piece in pieces.items():
        why = lerobot.difference(piece, usual)
        if why:
            failed[episode] = why
            del made[episode]
    return usual.left_out


def _different_clips(made: dict[str, list[Path]], failed: dict[str, str]) -> dict[str, str]:
    """Move an episode whose clips would have another's names to ``failed``."""
    taken: dict[str, str] = {}
    for episode, paths in list(made.items()):
        names = [clip_name(episode, _camera(path)) for path in paths]
        other = next((taken[name] for name in names if name in taken), None)
        if other is not None:
            failed[episode] = f"its clips would have the names of those of {other}"
            del made[episode]
        taken |= {} if other is not None else dict.fromkeys(names, episode)
    return {}


def _fill_lerobot(
    folder: Path, workspace: Workspace, made: Mapping[str, list[Path]], settings: ExportSettings
) -> None:
    videos = [
        [workspace.file(episode, camera, "video") for camera in range(workspace.info(episode).cameras)]
        for episode in made
    ]
    lerobot.write_dataset(folder, [path for (path,) in made.values()], videos, settings.robot_type)


def _fill_clips(
    folder: Path, workspace: Workspace, made: Mapping[str, list[Path]], settings: ExportSettings
) -> None:
    for episode, paths in made.items():
        for path in paths:
            link_or_copy(path, inside(folder, f"{clip_name(episode, _camera(path))}{path.suffix}"))


def _camera(part: Path) -> int:
    """Of a part that :func:`_make_clips` named."""
    return int(part.stem.rpartition("_")[2])


def _about(episode: str, decision: Decision, paths: Sequence[Path]) -> dict[str, Any]:
    return {
        "episode": episode,
        "tracks_sha256": {str(camera): digest for camera, digest in sorted(decision.tracks_sha256.items())},
        "accepted": decision.time,
        "reason": decision.reason,
        "parts": [path.name for path in paths],
    }


def _put(folder: Path, content: dict[str, Any], fill: Callable[[Path], None]) -> bool:
    """Fill a folder that takes the place of ``folder``, unless that is as it should be; whether it was filled."""
    content = json.loads(json.dumps(content))
    there = _marker(folder)
    files = there.pop("files", None)
    if there == content and isinstance(files, dict) and files == _files(folder):
        return False
    remove_unfinished(folder.parent)
    with folder_written_whole(folder) as place:
        fill(place)
        text = json.dumps({**content, "files": _files(place)}, indent=1, ensure_ascii=False)
        (place / MARKER).write_text(text + "\n", encoding="utf-8")
    return True


def _files(folder: Path) -> dict[str, int]:
    """Name -> bytes of all files but the marker."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.stat().st_size for name, path in found.items() if name != MARKER}


def _check_replaceable(folder: Path, kind: Format) -> None:
    """Refuse to replace anything but an export of the same kind."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if _marker(folder).get("kind") != kind:
        raise ValueError(
            f"{folder}: holds something else than an export to {kind}; choose another folder, or remove it"
        )


def _marker(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _import_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError('LeRobot datasets need pyarrow: pip install "trackbench[robotics]"') from error
