"""The folder format: what is read, against the official loaders' output, and what is refused."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folder_fakes import wander, write_sequence, write_sequences
from PIL import Image

from trackbench.data.clip import as_batch, centre_crop, choose_points, hide_outside
from trackbench.data.folder import TrackFolder
from trackbench.data.safe_pickle import PickledArray, UnsafePickleError

CROPS = {"T24_crop48": (24, (48, 48)), "T16_full": (16, (64, 64)), "T24_crop40x56": (24, (40, 56))}


@pytest.fixture
def reference(data_fixtures: Path) -> Any:
    return np.load(data_fixtures / "movi_f_disk_expected.npz", allow_pickle=False)


@pytest.mark.parametrize("name", list(CROPS))
@pytest.mark.parametrize("sequence", [0, 1])
@pytest.mark.parametrize("with_border", [False, True])
def test_tracks_are_those_of_the_official_loader(
    data_fixtures: Path, reference: Any, name: str, sequence: int, with_border: bool
) -> None:
    num_frames, size = CROPS[name]
    clip = TrackFolder(data_fixtures / "movi_f_disk")[sequence].clip(0, num_frames)
    ours = hide_outside(centre_crop(clip, size), with_border=with_border)
    key = f"intended/{name}/{sequence:04}"
    np.testing.assert_array_equal(ours.xy.astype(np.float32).swapaxes(0, 1), reference[f"{key}/trajs_all"])
    np.testing.assert_array_equal(ours.visible.T, reference[f"{key}/visibles_all_trackon"])


@pytest.mark.parametrize(
    ("name", "size", "count", "sequence"),
    [
        ("T24_N64_crop48", (48, 48), 64, 0),
        ("T24_N32_crop40x56", (40, 56), 32, 0),
        ("T24_N32_crop40x56", (40, 56), 32, 1),
    ],
)
def test_frames_and_chosen_points_are_those_of_the_official_loader(
    data_fixtures: Path, reference: Any, name: str, size: tuple[int, int], count: int, sequence: int
) -> None:
    key = f"trackon1/{name}/{sequence:04}"
    clip = hide_outside(centre_crop(TrackFolder(data_fixtures / "movi_f_disk")[sequence].clip(0, 24), size))
    ends = clip.frames[[0, -1]].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(ends, reference[f"{key}/rgbs_u8_frames_0_last"])

    every = choose_points(clip, 10**6, None)
    chosen = np.flatnonzero(clip.visible[:, 0])[:count]  # the official code indexes twice; ours does not
    np.testing.assert_array_equal(every.xy[chosen].astype(np.float32).swapaxes(0, 1), reference[f"{key}/trajs"])
    np.testing.assert_array_equal(every.visible[chosen].T, reference[f"{key}/visibles"])
    np.testing.assert_array_equal(choose_points(clip, count, None).xy, every.xy[:count])


def test_frames_are_in_order_of_number_and_windows_match_their_tracks(tmp_path: Path) -> None:
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    xy = np.arange(24, dtype=np.float32).reshape(1, 12, 2) / 10
    write_sequence(tmp_path / "a", frames, xy, np.zeros((1, 12), bool), depth=np.ones((12, 64, 64), np.float32))
    for t in range(12):  # 0.png, ..., 11.png: by name 10 would come before 2
        (tmp_path / "a" / "frames" / f"{t:03}.png").rename(tmp_path / "a" / "frames" / f"{t}.png")
    (tmp_path / "a" / "frames" / "notes.txt").write_text("not a frame")
    sequence = TrackFolder(tmp_path)[0]
    clip = sequence.clip(3, 8)
    assert clip.frames[:, 0, 0, 0].tolist() == list(range(3, 11))
    np.testing.assert_array_equal(clip.xy, xy[:, 3:11])
    assert clip.visible.all()
    with pytest.raises(ValueError, match=r"/a: expected at least 13 frames from 5 on, it has 12"):
        sequence.clip(5, 8)


def test_cotracker3_sequences_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    T, N, size = 120, 600, (40, 48)
    xy = wander(rng, N, T, size)
    outside = ((xy < 0) | (xy >= size[::-1])).any(axis=2)
    frames = rng.integers(0, 256, (T, *size, 3), dtype=np.uint8)
    extra = {
        "coords_depth": np.ones((N, T), np.float32),
        "depth": np.ones((T, *size, 1), np.float32),
        "segmentations": np.zeros((T, *size, 1), np.uint8),
        "camera": {
            "focal_length": np.float32(35),
            "positions": np.asfortranarray(rng.random((T, 3))),
            "quaternions": [np.ones(4)] * T,
        },
    }
    write_sequence(tmp_path / "0576", frames, xy, outside, **extra)
    (tmp_path / "0576" / "depths").mkdir()
    for t in range(T):
        np.save(tmp_path / "0576" / "depths" / f"{t:03}.npy", extra["depth"][t])
    for t in (0, 9, 34, 119):  # not of the clip, so nobody sees that they are damaged
        (tmp_path / "0576" / "frames" / f"{t:03}.png").write_bytes(b"")

    loaded = []
    load = PickledArray.load
    monkeypatch.setattr(PickledArray, "load", lambda array: loaded.append(array.shape) or load(array))
    sequence = TrackFolder(tmp_path)[0]
    clip = sequence.clip(10, 24)
    assert loaded == [(N, T, 2), (N, T)]
    np.testing.assert_array_equal(clip.frames, frames[10:34])
    np.testing.assert_array_equal(clip.xy, xy.astype(np.float32)[:, 10:34])
    np.testing.assert_array_equal(clip.visible, ~outside[:, 10:34])
    assert clip.xy.dtype == np.float64


def test_points_without_position_must_be_occluded(tmp_path: Path) -> None:
    frames, xy = np.zeros((2, 4, 6, 3), np.uint8), np.ones((3, 2, 2))
    xy[1, 1] = np.inf
    occluded = np.zeros((3, 2), bool)
    write_sequence(tmp_path / "bad" / "0", frames, xy, occluded)
    with pytest.raises(ValueError, match=r"0\.npy: coords of visible points must be finite"):
        TrackFolder(tmp_path / "bad")[0]
    occluded[1, 1] = True
    write_sequence(tmp_path / "good" / "0", frames, xy, occluded)
    assert np.isfinite(TrackFolder(tmp_path / "good")[0].xy).all()


def test_centre_crop_needs_frames_that_are_large_enough(tmp_path: Path) -> None:
    clip = TrackFolder(write_sequences(tmp_path, count=1))[0].clip(0, 2)
    with pytest.raises(ValueError, match=r"0000: frames of 64x80 are smaller than the crop of 64x81"):
        centre_crop(clip, (64, 81))


def test_no_folder_or_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        TrackFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="expected folders NAME"):
        TrackFolder(tmp_path)
    (tmp_path / "0000.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"expected folders NAME .* got archives: unpack each"):
        TrackFolder(tmp_path)


def save(file: Path, content: Any) -> None:
    np.save(file, np.array(content, dtype=object), allow_pickle=True)


COORDS, OCCLUDED = np.zeros((5, 6, 2), np.float32), np.zeros((5, 6), bool)


class Trap:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda seq: (seq / "0000.npy").unlink(), r"0000\.npy: no such file"),
        (lambda seq: (seq / "0000.npy").write_bytes(b"no"), r"0000\.npy: not an \.npy file"),
        (lambda seq: shutil.rmtree(seq / "frames"), r"frames: expected frames 000\.png.*got none"),
        (lambda seq: (seq / "frames" / "003.png").unlink(), r"004\.png: expected frame 3 after frame 2, got 4"),
        (lambda seq: (seq / "frames" / "005.png").unlink(), r"frames: expected 6 frames as in 0000\.npy, got 5"),
        (lambda seq: (seq / "frames" / "x.png").touch(), r"x\.png: expected a number as its name"),
        (lambda seq: save(seq / "0000.npy", {"coords": COORDS}), r"0000\.npy: lacks visibility"),
        (
            lambda seq: save(seq / "0000.npy", {"coords": COORDS[..., :1], "visibility": OCCLUDED}),
            r"0000\.npy: coords must be float \(N, T, 2\), got float32 \(5, 6, 1\)",
        ),
        (
            lambda seq: save(seq / "0000.npy", {"coords": COORDS, "visibility": OCCLUDED.T}),
            r"0000\.npy: visibility must be bool \(5, 6\), got bool \(6, 5\)",
        ),
        (
            lambda seq: save(seq / "0000.npy", {"coords": COORDS, "visibility": np.ones((5, 6))}),
            r"0000\.npy: visibility must be bool \(5, 6\), got float64",
        ),
        (lambda seq: (seq / "frames" / "002.png").write_bytes(b""), r"002\.png: not a readable PNG"),
        (
            lambda seq: Image.new("RGB", (8, 8)).save(seq / "frames" / "004.png"),
            r"004\.png: is \(8, 8\).*before it are \(64, 80\)",
        ),
    ],
)
def test_damage_is_a_value_error_that_names_the_file(tmp_path: Path, damage: Any, message: str) -> None:
    write_sequences(tmp_path, count=1)
    damage(tmp_path / "0000")
    with pytest.raises(ValueError, match=message):
        TrackFolder(tmp_path)[0].clip(0, 6)


def test_cut_or_changed_files_never_give_another_error(tmp_path: Path) -> None:
    write_sequences(tmp_path, count=1)
    rng = np.random.default_rng(0)
    for file in (tmp_path / "0000" / "0000.npy", tmp_path / "0000" / "frames" / "001.png"):
        whole = file.read_bytes()
        for end in (0, 1, 20, 200, len(whole) // 2, len(whole) - 64):
            file.write_bytes(whole[:end])
            with pytest.raises(ValueError, match=file.name):
                TrackFolder(tmp_path)[0].clip(0, 6)
        for _ in range(60):
            changed = bytearray(whole)
            changed[rng.integers(len(whole) if file.suffix == ".png" else 400)] ^= 1 << rng.integers(8)
            file.write_bytes(bytes(changed))
            with suppress(ValueError):  # most changes are harmless, the others must be said
                TrackFolder(tmp_path)[0].clip(0, 6)
        file.write_bytes(whole)


def test_the_pickle_is_not_run(tmp_path: Path) -> None:
    write_sequences(tmp_path, count=1)
    save(tmp_path / "0000" / "0000.npy", {"coords": Trap(), "visibility": OCCLUDED})
    with pytest.raises(UnsafePickleError, match=r"0000\.npy: refused.*exec"):
        TrackFolder(tmp_path)[0]


def test_padding_is_unlabelled_and_chosen_points_keep_their_tracks(tmp_path: Path) -> None:
    clip = TrackFolder(write_sequences(tmp_path, count=1))[0].clip(0, 6)
    chosen = choose_points(clip, 7, np.random.default_rng(0))
    assert chosen.visible[:, 0].all()
    rows = [int(np.flatnonzero((clip.xy == track).all(axis=(1, 2)))[0]) for track in chosen.xy]
    assert len(set(rows)) == 7
    assert rows != sorted(rows)
    np.testing.assert_array_equal(chosen.visible, clip.visible[rows])

    frames = np.zeros(7, np.int64)
    assert as_batch(chosen, frames, 7).labelled is None
    batch = as_batch(chosen, frames, 10)
    assert batch.labelled is not None
    assert batch.labelled[0, :7].all()
    assert not batch.labelled[0, 7:].any()
    assert not batch.visible[0, 7:].any()
    assert batch.queries[0, 7:].tolist() == [[5.0, 0.0, 0.0]] * 3
    np.testing.assert_array_equal(batch.queries[0, :7, 1:], chosen.xy[:, 0].astype(np.float32))
