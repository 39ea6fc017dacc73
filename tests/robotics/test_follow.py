"""Following and checking stretches, with a tracker whose drift is known, so that every number is known too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from trackbench.baselines import BaselineStream, LucasKanade
from trackbench.composition import load_tracker
from trackbench.robotics.follow import Stretch, follow, stretches
from trackbench.robotics.keypoints import Keypoints
from trackbench.robotics.track import NamedTracker, track_camera
from trackbench.robotics.track_file import CameraTracks
from trackbench.structures import Tracks

T, H, W = 12, 40, 60


class Drifting:
    """Every point moves 1 px to the right per frame, whichever way the frames go; hidden in frame ``hidden``."""

    def __init__(self, hidden: tuple[int, ...] = ()) -> None:
        self.hidden = hidden

    def stream(self) -> BaselineStream:
        def step(before: np.ndarray, frame: np.ndarray, xy: np.ndarray, active: np.ndarray) -> tuple:
            return xy + np.array([1, 0]), np.full(len(xy), frame[0, 0, 0] not in self.hidden), active

        return BaselineStream(step)


class WholeVideos:
    """The same, of clips."""

    lookahead = None

    def track(self, video: np.ndarray, queries: np.ndarray) -> Tracks:
        asked = torch.as_tensor(queries, dtype=torch.float32)
        shift = torch.arange(len(video)) - asked[:, :1]
        xy = torch.stack([asked[:, 1:2] + shift, asked[:, 2:].expand(-1, len(video))], dim=2)
        visible = torch.ones(xy.shape[:2], dtype=torch.bool)
        return Tracks(xy, visible, visible.float(), asked)


class Numbered:
    """Frames that say their number; it counts how many of them are held."""

    num_frames, height, width = T, H, W

    def __init__(self, num_frames: int = T, noise: bool = False) -> None:
        self.num_frames = num_frames
        self.noise = noise
        self.read: list[int] = []
        self.most_held = 0
        self._held: list[weakref.ref] = []

    def frames(self, order: range) -> Iterator[np.ndarray]:
        for t in order:
            if self.noise:
                frame = np.random.default_rng(0).integers(0, 255, (self.height, self.width, 3), np.uint8)
            else:
                frame = np.full((self.height, self.width, 3), t, np.uint8)
            self.read.append(t)
            self._held = [ref for ref in self._held if ref() is not None] + [weakref.ref(frame)]
            self.most_held = max(self.most_held, len(self._held))
            yield frame
            del frame


def keypoints(*points: tuple[int, float, float]) -> Keypoints:
    values = np.array(points)
    return Keypoints(tuple(f"p{k}" for k in range(len(points))), values[:, 1:], values[:, 0].astype(np.int64))


def camera(points: Keypoints, tracker: object, source: Numbered | None = None, **more: int) -> CameraTracks:
    return track_camera(source or Numbered(), points, NamedTracker(tracker, "test", ""), **more)


@pytest.mark.parametrize("tracker", [Drifting(), WholeVideos()])
def test_forward_from_the_annotation_and_checked_backward(tracker: object) -> None:
    tracks = camera(keypoints((0, 5, 7), (0, 20, 9)), tracker)
    t = np.arange(T)
    np.testing.assert_allclose(tracks.xy[:, :, 0], [5 + t, 20 + t])
    np.testing.assert_allclose(tracks.xy[:, :, 1], [[7] * T, [9] * T])
    np.testing.assert_allclose(tracks.error, [2 * (T - 1 - t)] * 2)  # drift there and drift back
    assert tracks.visible.all()


@pytest.mark.parametrize("tracker", [Drifting(), WholeVideos()])
def test_annotations_on_a_later_frame_are_followed_both_ways(tracker: object) -> None:
    tracks = camera(keypoints((4, 5, 7), (0, 20, 9), (T - 1, 8, 8)), tracker)
    t = np.arange(T)
    np.testing.assert_allclose(tracks.xy[0, :, 0], 5 + np.abs(t - 4))
    np.testing.assert_allclose(tracks.xy[2, :, 0], 8 + np.abs(t - (T - 1)))
    np.testing.assert_allclose(tracks.error[0, :4], 2 * t[:4])  # checked forward from frame 0
    np.testing.assert_allclose(tracks.error[0, 5:], 2 * (T - 1 - t[5:]))
    np.testing.assert_array_equal(tracks.queries[:, 0], [4, 0, T - 1])


def test_the_check_starts_where_the_point_was_last_seen() -> None:
    tracks = camera(keypoints((0, 5, 7)), Drifting(hidden=(3, 9, 10, 11)))
    t = np.arange(T)
    np.testing.assert_allclose(tracks.error[0, :9], 2 * (8 - t[:9]))
    assert np.isnan(tracks.error[0, 9:]).all()
    np.testing.assert_array_equal(np.flatnonzero(~tracks.visible[0]), [3, 9, 10, 11])


def test_known_places_cut_a_track_into_stretches() -> None:
    tracks = camera(keypoints((2, 5, 7)), Drifting())
    corrections = np.array([[0, 8, 50, 7], [0, 5, 40, 7], [0, 8, 30, 7]])  # the later one of two on a frame counts
    cut = CameraTracks(**{**vars(tracks), "corrections": corrections})
    found = [
        (part.begin and part.begin[0], part.end and (part.end[0], part.end[1][0])) for part in stretches(cut, 0)
    ]
    assert found == [(None, (2, 5)), (2, (5, 40)), (5, (8, 30)), (8, None)]


@pytest.mark.parametrize("join", [False, True])
def test_a_correction_checks_or_joins_what_came_before(join: bool) -> None:
    tracks = camera(keypoints((0, 5, 7)), Drifting())
    t, place = np.arange(T), np.array([10.0, 7.0])
    source = Numbered()
    follow(
        Drifting(),
        source,
        tracks,
        [
            Stretch(0, (0, np.array([5.0, 7.0])), (8, place), keep=True, join=join),
            Stretch(0, (8, place), None),
        ],
    )
    np.testing.assert_allclose(tracks.xy[0, 8:, 0], 10 + t[8:] - 8)
    kept, back = 5 + t[:8], 10 + 8 - t[:8]  # both tracks of the first stretch meet between frames 6 and 7
    apart = np.abs(kept - back)
    if join:
        seam = int(np.argmin(apart))
        assert 0 < seam < 7
        np.testing.assert_allclose(tracks.xy[0, :8, 0], np.where(t[:8] < seam, kept, back))
    else:
        np.testing.assert_allclose(tracks.xy[0, :8, 0], kept)
    np.testing.assert_allclose(tracks.error[0, :8], apart)
    assert source.read[:4] == [8, 9, 10, 11]  # forward, nothing before the correction is read


def test_whole_videos_have_a_limit_that_is_told() -> None:
    with pytest.raises(ValueError, match=r"12 frames \(0 MiB\) are more than the 11 of --clip-frames"):
        camera(keypoints((0, 5, 7)), WholeVideos(), clip_frames=11)


def test_progress_counts_to_its_end() -> None:
    told: list[tuple[int, int]] = []
    points = keypoints((4, 5, 7), (0, 20, 9))
    track_camera(Numbered(), points, NamedTracker(Drifting(), "", ""), progress=lambda *p: told.append(p))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (T + T + 5, T + T + 5)  # forward, backward, and the check of the part before frame 4


@pytest.mark.filterwarnings("ignore:.*no checkpoint given")
@pytest.mark.filterwarnings("ignore:.*CNN weights")
@pytest.mark.parametrize(("name", "few"), [("lucas_kanade", 3), ("trackon_tiny", 3), ("trackon_chrono_tiny", 12)])
def test_memory_does_not_grow_with_the_episode(name: str, few: int) -> None:
    tracker = LucasKanade() if name == "lucas_kanade" else load_tracker(name)
    for num_frames in (20, 60):
        source = Numbered(num_frames, noise=True)
        gc.collect()
        tracks = camera(keypoints((0, 30, 20), (5, 10, 10)), tracker, source)
        assert tracks.num_frames == num_frames
        assert len(source.read) >= num_frames
        assert source.most_held <= few
