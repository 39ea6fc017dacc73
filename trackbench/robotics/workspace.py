"""The work folder of the robotics stages: where each file of an episode lies.

::

    episodes/<episode id>/episode.json      what `extract` found; written last, so that its presence says "done"
                          cam0.mp4 cam0.png the camera's video and its first frame
                          cam0.json         the confirmed annotation, labelme's format
                          cam0.proposal.json a transferred annotation, not confirmed yet
                          cam0.tracks.npz   tracks; cam0.tracks.csv: the same as a table
                          cam0.overlay.mp4  the tracks drawn on the video
                          quality.json      scores of the tracks
                          history/          tracks that others took the place of
    review.sqlite                           decisions of the review
    attached/<episode id>.h5                episodes with keypoints inside
    export/                                 other formats

The id of an episode is its file's path relative to the folder of episodes, without suffix.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trackbench.files import inside, natural_order, written_whole

FORMAT = 1

Kind = Literal["video", "image", "annotation", "proposal", "tracks", "table", "overlay"]

_SUFFIXES: dict[Kind, str] = {
    "video": ".mp4",
    "image": ".png",
    "annotation": ".json",
    "proposal": ".proposal.json",
    "tracks": ".tracks.npz",
    "table": ".tracks.csv",
    "overlay": ".overlay.mp4",
}


@dataclass(frozen=True)
class EpisodeInfo:
    """What `extract` wrote about an episode, ``episode.json``.

    Attributes:
        episode: its id.
        source: the file it comes from, relative to the folder of episodes.
        source_size: bytes of that file.
        source_fingerprint: :func:`trackbench.robotics.episodes.fingerprint` of that file.
        fps: frames per second of its videos.
        num_frames: T; frame t is step t of ``steps``.
        cameras: number of cameras.
        height: of the images, pixels; a video of odd size has one more row (and column), copies of the last.
        width: of the images, pixels.
        steps: (T,) names of the groups of the steps in the file, in numeric order.
        image_key: name of the image dataset within a step.
        axes: of the image dataset, e.g. ``"b v c h w"``.
        value_range: value of white in the image dataset, 1 or 255.
    """

    episode: str
    source: str
    source_size: int
    source_fingerprint: str
    fps: float
    num_frames: int
    cameras: int
    height: int
    width: int
    steps: tuple[str, ...]
    image_key: str
    axes: str
    value_range: int


class Workspace:
    """Names of all files under a work folder; nothing is made before something is written to it.

    Attributes:
        root: the work folder.
        review: the database of decisions.
        attached: the folder of episodes with keypoints inside, unless another is chosen.
    """

    root: Path

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.review = self.root / "review.sqlite"
        self.attached = self.root / "attached"

    def episodes(self) -> list[str]:
        """Ids of the extracted episodes, in natural order."""
        top = self.root / "episodes"
        return sorted((path.parent.relative_to(top).as_posix() for path in top.rglob("episode.json")), key=_order)

    def folder(self, episode: str) -> Path:
        """The folder of an episode.

        Raises:
            ValueError: the id would lead out of the work folder, or holds a character that some systems refuse.
        """
        return inside(self.root / "episodes", episode)

    def file(self, episode: str, camera: int, kind: Kind) -> Path:
        """A file of an episode's camera; it need not exist."""
        if camera < 0:
            raise ValueError(f"{episode}: camera {camera}: expected 0 or more")
        return self.folder(episode) / f"cam{camera}{_SUFFIXES[kind]}"

    def quality(self, episode: str) -> Path:
        """The scores of an episode's tracks; the file need not exist."""
        return self.folder(episode) / "quality.json"

    def history(self, episode: str) -> Path:
        """The folder of an episode's superseded tracks; it need not exist."""
        return self.folder(episode) / "history"

    def info(self, episode: str) -> EpisodeInfo:
        """What `extract` wrote about an episode.

        Raises:
            FileNotFoundError: it is not extracted (yet).
            ValueError: the file is damaged, or of another version.
        """
        path = self.folder(episode) / "episode.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; was the episode extracted?")
        return read_info(path)

    def write_info(self, info: EpisodeInfo) -> None:
        """Say that an episode is extracted."""
        with written_whole(self.folder(info.episode) / "episode.json") as path:
            text = json.dumps({"format": FORMAT, **asdict(info)}, indent=1, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")


def read_info(path: Path) -> EpisodeInfo:
    """Read an ``episode.json``.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{path}: expected an episode.json of format {FORMAT}")
    for key, (expected, holds) in _FIELDS.items():
        if key not in data or not holds(data[key]):
            raise ValueError(f"{path}: {key}: expected {expected}, got {data.get(key)!r:.80}")
    if len(data["steps"]) != data["num_frames"]:
        raise ValueError(f"{path}: {len(data['steps'])} steps, but num_frames is {data['num_frames']}")
    values = {key: data[key] for key in _FIELDS}
    return EpisodeInfo(**{**values, "fps": float(data["fps"]), "steps": tuple(data["steps"])})


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


_COUNT, _TEXT = ("a positive number", _is_count), ("a text", _is_text)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "episode": _TEXT,
    "source": _TEXT,
    "source_size": _COUNT,
    "source_fingerprint": _TEXT,
    "fps": ("a positive number", lambda value: type(value) in (int, float) and 0 < value < float("inf")),
    "num_frames": _COUNT,
    "cameras": _COUNT,
    "height": _COUNT,
    "width": _COUNT,
    "steps": ("a list of names", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "image_key": _TEXT,
    "axes": _TEXT,
    "value_range": ("1 or 255", lambda value: type(value) is int and value in (1, 255)),
}


def _order(name: str) -> list[list[tuple[int, str]]]:
    return [natural_order(part) for part in name.split("/")]
