"""Dynamic Replica in its published layout: which points are kept, lengths, and what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_fakes import panning, write_dynamic_replica

from trackbench.baselines import LucasKanade
from trackbench.composition import compose_config, instantiate
from trackbench.data.dynamic_replica import DynamicReplicaDataset
from trackbench.evaluation.runner import score

T, N, SIZE = 16, 50, (60, 100)


def annotated(seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    frames, xy, _ = panning(T, SIZE, N, seed)
    xy += rng.uniform(-30, 30, (1, N, 2)).astype(np.float32)
    return frames, xy, rng.random((T, N)) < 0.9


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dynamic_replica(tmp_path, {"009850-3_obj": annotated(0), "13a144-3_obj": annotated(1)})
    return tmp_path


def test_points_are_the_published_ones(root: Path) -> None:
    dataset = DynamicReplicaDataset(root, resolution=None, num_points=None)
    assert dataset.names == ["009850-3_obj", "13a144-3_obj"]
    for index, batch in enumerate(dataset):
        frames, xy, visible = annotated(index)
        visible = visible & (xy[..., 0] >= 0) & (xy[..., 0] <= 99) & (xy[..., 1] >= 0) & (xy[..., 1] <= 59)
        kept = visible.sum(axis=0) > 10
        assert 5 < kept.sum() < N
        np.testing.assert_array_equal(batch.video[0].permute(0, 2, 3, 1), frames)
        np.testing.assert_array_equal(batch.visible[0], visible[:, kept].T)
        np.testing.assert_allclose(batch.xy[0], xy[:, kept].swapaxes(0, 1), atol=1e-4)
        first = visible[:, kept].argmax(axis=0)
        np.testing.assert_array_equal(batch.queries[0, :, 0], first)
        assert first.max() > 0
        assert batch.labelled is None


def test_points_are_drawn_by_the_seed(root: Path) -> None:
    every = DynamicReplicaDataset(root, num_points=None)[0].xy[0]
    drawn = [DynamicReplicaDataset(root, num_points=20, seed=seed)[0].xy[0] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not (len(drawn[0]) == len(drawn[2]) and torch.equal(drawn[0], drawn[2]))
    for tracks in drawn:
        assert 0 < len(tracks) < len(every)
        assert all(any(torch.equal(track, other) for other in every) for track in tracks)


def test_the_first_frames(root: Path) -> None:
    whole = DynamicReplicaDataset(root, resolution=(30, 200), num_points=None)[0]
    assert whole.video.shape == (1, T, 3, 30, 200)
    part = DynamicReplicaDataset(root, resolution=(30, 200), num_points=None, max_frames=12)[0]
    assert torch.equal(part.video, whole.video[:, :12])
    assert part.xy.shape[2] == 12


def test_lucas_kanade_follows_the_texture(tmp_path: Path) -> None:
    write_dynamic_replica(tmp_path, {"a": panning(16, (120, 200), 60)})
    config = compose_config("eval", ["benchmark=dynamic_replica", f"benchmark.path={tmp_path}"])
    batch = instantiate(config.benchmark.dataset)[0]
    tracks = LucasKanade().track(batch.video[0].permute(0, 2, 3, 1), batch.queries[0])
    assert score(batch, tracks, "first")["average_pts_within_thresh"] > 0.97


class Trap:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def change(file: Path, **entries: Any) -> None:
    content = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in {**content, **entries}.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "not a readable frame"),
        (lambda file: file.write_bytes(b""), "not a readable frame"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "not a readable frame"),
        (lambda file: torch.save([1, 2], file), "not a readable frame"),
        (lambda file: change(file, traj_2d=None), "not a readable frame.*traj_2d"),
        (lambda file: torch.save({"img": Trap()}, file), "not a readable frame.*Unpickling"),
        (lambda file: change(file, img=torch.zeros(60, 100, 4)), r"img must be uint8 \(H, W, 3\), got float32"),
        (lambda file: change(file, traj_2d=torch.zeros(N)), r"traj_2d must be float \(N, 2 or more\)"),
        (lambda file: change(file, verts_inds_vis=torch.zeros(3) > 0), r"verts_inds_vis must be bool \(50,\)"),
        (
            lambda file: change(file, traj_2d=torch.zeros(9, 3), verts_inds_vis=torch.zeros(9) > 0),
            "expected 50 points as in frame 0, got 9",
        ),
        (
            lambda file: change(
                file, traj_2d=torch.full((N, 3), torch.nan), verts_inds_vis=torch.ones(N, dtype=torch.bool)
            ),
            "traj_2d of visible points must be finite",
        ),
    ],
)
def test_damaged_frames_name_themselves(root: Path, damage: Any, message: str) -> None:
    damage(root / "valid" / "009850-3_obj_source_left" / "trajectories" / "000003.pth")
    dataset = DynamicReplicaDataset(root)
    with pytest.raises(ValueError, match=rf"000003\.pth: {message}"):
        dataset[0]
    dataset[1]


def rewrite(file: Path, edit: Any) -> None:
    with gzip.open(file, "rt") as opened:
        frames = json.load(opened)
    with gzip.open(file, "wt") as opened:
        json.dump(edit(frames), opened)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda frames: {"a": 1}, "expected a list of frames"),
        (lambda frames: [{**frame, "trajectories": None} for frame in frames], "expected a list of frames"),
        (lambda frames: [{**frame, "frame_number": None} for frame in frames], "expected a list of frames"),
        (lambda frames: [], "no frame of the left camera"),
        (lambda frames: frames[:3] + frames[4:], r"009850-3_obj must have the frames 0 to 14"),
    ],
)
def test_annotations_of_another_structure(root: Path, edit: Any, message: str) -> None:
    rewrite(root / "valid" / "frame_annotations_valid.jgz", edit)
    with pytest.raises(ValueError, match=rf"frame_annotations_valid\.jgz: {message}"):
        DynamicReplicaDataset(root)


def test_annotations_that_are_missing_damaged_or_point_elsewhere(root: Path) -> None:
    file = root / "valid" / "frame_annotations_valid.jgz"
    rewrite(file, lambda frames: [{**frame, "trajectories": {"path": "../../x.pth"}} for frame in frames])
    dataset = DynamicReplicaDataset(root)
    with pytest.raises(ValueError, match=r"frame_annotations_valid\.jgz: '\.\./\.\./x\.pth': expected a relative"):
        dataset[0]
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"frame_annotations_valid\.jgz: not readable"):
        DynamicReplicaDataset(root)
    with pytest.raises(FileNotFoundError, match=r"frame_annotations_test\.jgz: no such file"):
        DynamicReplicaDataset(root, split="test")


def test_no_point_that_is_seen(tmp_path: Path) -> None:
    frames, xy, visible = annotated()
    write_dynamic_replica(tmp_path, {"a": (frames, xy, np.zeros_like(visible))})
    with pytest.raises(ValueError, match="a: none of 50 points is seen in 11 frames"):
        DynamicReplicaDataset(tmp_path)[0]
