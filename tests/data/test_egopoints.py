"""EgoPoints in its published layout: which entries count, the published metric, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_fakes import panning, write_egopoints

from trackbench.baselines import LucasKanade
from trackbench.composition import compose_config, instantiate
from trackbench.data.egopoints import EgoPointsDataset
from trackbench.evaluation.runner import score

T, SIZE = 6, (80, 120)


def annotated() -> tuple[Any, dict[str, Any]]:
    """Frames and, for 4 points, entries of every kind."""
    frames, xy, _ = panning(T, SIZE, 4)
    valid = np.zeros((T, 4))
    valid[0] = valid[3] = 1
    valid[0, 3] = 0
    seen, judged = valid.copy(), valid.copy()
    judged[[1, 2], 0] = 1  # known to be hidden
    seen[2, 1] = judged[2, 1] = 1  # known to be visible, but not where
    seen[3, 2] = 0  # has a position, is said to be hidden
    xy = np.where(valid[..., None] == 1, xy, np.nan)
    occluded = judged * (1 - seen)
    return frames, {
        "trajs_2d": xy,
        "valids": valid,
        "visibs": seen,
        "vis_valids": judged,
        "occluded": occluded,
        "dynamic_obj_tracks": np.zeros(4),
    }


def test_what_counts(tmp_path: Path) -> None:
    frames, arrays = annotated()
    write_egopoints(tmp_path / "P01_01_start_1_end_6", frames, **arrays)
    batch = EgoPointsDataset(tmp_path, resolution=None)[0]
    assert batch.names == ["P01_01_start_1_end_6"]
    assert batch.video.shape == (1, T, 3, *SIZE)
    assert batch.queries[0, :, 0].tolist() == [0, 0, 0, 3]
    valid = arrays["valids"].T == 1
    np.testing.assert_array_equal(batch.visible[0], valid)
    np.testing.assert_allclose(batch.xy[0][valid], arrays["trajs_2d"].swapaxes(0, 1)[valid], atol=1e-4)
    hidden = np.zeros_like(valid)
    hidden[0, [1, 2]] = True
    assert batch.labelled is not None
    np.testing.assert_array_equal(batch.labelled[0], valid | hidden)
    assert bool(torch.isfinite(batch.xy).all())

    small = EgoPointsDataset(tmp_path, resolution=(40, 120), max_frames=4)[0]
    assert small.video.shape == (1, 4, 3, 40, 120)
    torch.testing.assert_close(small.xy, batch.xy[:, :, :4] * torch.tensor([1.0, 0.5]))


def test_score_is_the_published_d_avg(tmp_path: Path) -> None:
    frames, xy, inside = panning(T, SIZE, 20)
    valid = inside & (np.arange(T)[:, None] % 2 == 0)
    ok = valid[0]
    write_egopoints(tmp_path / "a", frames, trajs_2d=xy[:, ok], valids=valid[:, ok].astype(float))
    config = compose_config("eval", ["benchmark=egopoints", f"benchmark.path={tmp_path}"])
    batch = instantiate(config.benchmark.dataset)[0]
    assert batch.video.shape[-2:] == (384, 512)
    tracks = LucasKanade().track(batch.video[0].permute(0, 2, 3, 1), batch.queries[0])
    assert score(batch, tracks, "first")["average_pts_within_thresh"] > 0.97

    truth = xy[:, ok] * 256 / np.array(SIZE[::-1])
    found = tracks.xy.numpy().swapaxes(0, 1) * 256 / np.array([512, 384]) + 3.0  # somewhat off
    near = [np.linalg.norm(found - truth, axis=2)[1:] < threshold for threshold in (1, 2, 4, 8, 16)]
    expected = np.mean([hits[valid[1:, ok]].mean() for hits in near])
    tracks.xy += 3.0 * torch.tensor([512, 384]) / 256
    found_here = score(batch, tracks, "first")["average_pts_within_thresh"]
    assert found_here == pytest.approx(expected, abs=1e-6)
    assert 0.2 < found_here < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"trajs_2d": np.zeros((T, 4, 3))},
            r"a/annot\.npz: trajs_2d must be \(T, N, 2\), got float64 \(6, 4, 3\)",
        ),
        ({"trajs_2d": np.full((T, 4, 2), np.nan)}, r"a/annot\.npz: trajs_2d must be finite where valids is 1"),
        ({"vis_valids": np.zeros((T, 5))}, r"a/annot\.npz: vis_valids must be 0 or 1, \(6, 4\), got \(6, 5\)"),
        ({"visibs": np.full((T, 4), 0.5)}, r"a/annot\.npz: visibs must be 0 or 1"),
        ({"valids": np.zeros((T, 4))}, r"a/annot\.npz: none of the 4 tracks is ever visible"),
        ({"trajs_2d": np.zeros((5, 4, 2))}, r"a/annot\.npz: valids must be 0 or 1, \(5, 4\)"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    frames, arrays = annotated()
    write_egopoints(tmp_path / "a", frames, **{**arrays, **change})
    with pytest.raises(ValueError, match=message):
        EgoPointsDataset(tmp_path)[0]


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected folders SEQUENCE with SEQUENCE/annot\.npz"):
        EgoPointsDataset(tmp_path)
    frames, arrays = annotated()
    write_egopoints(tmp_path / "a", frames, **arrays)
    write_egopoints(tmp_path / "b", frames[:5], **arrays)
    (tmp_path / "c" / "rgbs").mkdir(parents=True)
    write_egopoints(tmp_path / "d", frames[:0], **{key: values[:0] for key, values in arrays.items()})
    (tmp_path / "a" / "rgbs" / "frame_0000000002.jpg").write_bytes(b"no")
    dataset = EgoPointsDataset(tmp_path)
    assert dataset.names == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"frame_0000000002\.jpg is not a readable JPEG"):
        dataset[0]
    with pytest.raises(ValueError, match="b/rgbs: expected 6 frames as in the annotations, got 5"):
        dataset[1]
    with pytest.raises(ValueError, match=r"c/annot\.npz: not a readable annotation of points"):
        dataset[2]
    with pytest.raises(ValueError, match="d/rgbs: expected 0 frames as in the annotations, got 0"):
        dataset[3]
