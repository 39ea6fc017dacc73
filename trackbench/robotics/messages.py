"""What the review page and its server say to each other, as JSON: wishes one way, views the other."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trackbench.robotics.keypoints import LONGEST_NAME
from trackbench.robotics.store import LONGEST_REASON, Verdict

State = Literal["review", "accepted", "rejected", "proposal", "untracked", "unannotated", "broken"]

MOST_POINTS = 1000  # of an annotation
LARGEST_COORDINATE = 1e5  # pixels


class Wish(BaseModel):
    """Base of what the page sends: nothing beyond the fields, no numbers as texts, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


EpisodeName = Annotated[str, Field(min_length=1, max_length=1024)]
Camera = Annotated[int, Field(ge=0, lt=1000)]
Frame = Annotated[int, Field(ge=0, lt=2**31)]
Coordinate = Annotated[float, Field(ge=-LARGEST_COORDINATE, le=LARGEST_COORDINATE)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class DecisionWish(Wish):
    """Accept or reject an episode; ``tracks_sha256`` (camera -> digest) is what the reviewer saw."""

    episode: EpisodeName
    verdict: Verdict
    reason: Annotated[str, Field(max_length=LONGEST_REASON)] = ""
    tracks_sha256: Annotated[dict[Annotated[str, Field(pattern="^[0-9]{1,3}$")], Digest], Field(max_length=1000)]


class UndoWish(Wish):
    """Take an event back."""

    event: Annotated[int, Field(ge=1, lt=2**63)]


class CancelWish(Wish):
    """Stop a job."""

    number: Annotated[int, Field(ge=0, lt=2**31)]


class CorrectionWish(Wish):
    """Put a point where it is on a frame and track it again from there, and before it too if ``backward``."""

    episode: EpisodeName
    camera: Camera
    point: Annotated[int, Field(ge=0, lt=2**31)]
    t: Frame
    x: Coordinate
    y: Coordinate
    backward: bool = False
    tracks_sha256: Digest


class PointWish(Wish):
    """A keypoint as the reviewer placed it, in pixels of its frame."""

    name: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    x: Coordinate
    y: Coordinate
    frame: Frame = 0


class AnnotationWish(Wish):
    """Save the keypoints of a camera; ``seen`` is :attr:`AnnotationView.seen` of what the reviewer changed."""

    episode: EpisodeName
    camera: Camera
    points: Annotated[list[PointWish], Field(min_length=1, max_length=MOST_POINTS)]
    seen: Annotated[str, Field(max_length=200)]


class EpisodeRow(BaseModel):
    """An episode in the list.

    ``doubt`` lies in [0, 1], None before tracking; ``note`` is the decision's reason, or what is damaged;
    ``stale``: there is a decision, on other tracks.
    """

    episode: str
    state: State
    stale: bool = False
    doubt: float | None = None
    num_frames: int = 0
    cameras: int = 0
    note: str = ""


class EpisodeList(BaseModel):
    """All episodes, the most doubtful first."""

    episodes: list[EpisodeRow]


class CameraView(BaseModel):
    """Which files of a camera are there; ``tracks_sha256`` is "" before tracking."""

    annotated: bool
    proposed: bool
    overlay: bool
    tracks_sha256: str


class EventView(BaseModel):
    """One row of the history."""

    id: int
    time: str
    kind: str
    content: dict[str, Any]
    undone: bool


class EpisodeView(BaseModel):
    """An episode with its decision and history; ``undoable`` is the event that can be taken back."""

    episode: str
    state: State
    stale: bool
    doubt: float | None
    fps: float
    num_frames: int
    height: int
    width: int
    cameras: list[CameraView]
    verdict: Verdict | None
    reason: str
    history: list[EventView]
    undoable: int | None


class PointView(BaseModel):
    """A tracked point: its scores, and its track through T frames (None: no number there)."""

    name: str
    colour: str
    score: float
    forward_backward_px: float
    jumps: list[int]
    lost: float
    x: list[float | None]
    y: list[float | None]
    visible: list[bool]
    visibility: list[float | None]
    error: list[float | None]
    corrected: list[int]


class TracksView(BaseModel):
    """The tracks of a camera; ``outdated``: the annotation changed since."""

    tracks_sha256: str
    model: str
    outdated: bool
    points: list[PointView]


class AnnotatedPoint(BaseModel):
    """A keypoint of an annotation; ``confidence`` is None where a person placed it."""

    name: str
    x: float
    y: float
    frame: int
    confidence: float | None


class AnnotationView(BaseModel):
    """The keypoints of a camera: confirmed, proposed or none; ``usual`` are the names that others have."""

    kind: Literal["annotation", "proposal", "none"]
    points: list[AnnotatedPoint]
    seen: str
    usual: list[str]
    usual_episode: str


class JobView(BaseModel):
    """Work in the background on the keypoint ``name``; ``number`` 0: there was none yet."""

    number: int = 0
    episode: str = ""
    camera: int = 0
    what: Literal["", "correction", "undo"] = ""
    name: str = ""
    state: Literal["none", "running", "done", "failed", "cancelled"] = "none"
    done: int = 0
    total: int = 0
    message: str = ""
