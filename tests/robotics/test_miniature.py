from __future__ import annotations

from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest

from trackbench.cli import main
from trackbench.files import sha256
from trackbench.robotics.episodes import EpisodeFile, find_episodes
from trackbench.robotics.miniature import KEYPOINTS, MiniatureSettings, make_episodes, read_truth

SMALL = MiniatureSettings(steps=70, height=120, width=160, compression="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    make_episodes(folder, 2, SMALL)
    return folder


def test_the_layout_is_that_of_the_robots(folder: Path) -> None:
    assert list(find_episodes(folder)) == ["episode_0", "episode_1"]
    with h5py.File(folder / "episode_0.h5") as file:
        image = file["step_69/obs/image"]
        assert (image.shape, image.dtype) == ((1, 2, 3, 120, 160), np.uint8)
        assert (image.chunks, image.compression) == (None, None)
        assert isinstance(file.get("first", getlink=True), h5py.SoftLink)
        assert file["trajectory/state"].dims[0][0].name == "/trajectory/time"
        assert file[file["trajectory/ends"][1]].name == "/step_69"
    with EpisodeFile(folder / "episode_0.h5") as episode:
        assert (episode.num_frames, episode.cameras, episode.fps) == (70, 2, 30.0)


def test_truth_is_in_sight_at_first_and_hidden_at_times(folder: Path) -> None:
    for index in range(2):
        truth = read_truth(folder / "truth" / f"episode_{index}.npz")
        assert truth.names == KEYPOINTS
        assert truth.xy.shape == (2, 5, 70, 2)
        assert truth.visible.shape == (2, 5, 70)
        assert truth.visible[:, :, 0].all()
        assert 0.8 < truth.visible.mean() < 1
        assert (truth.xy[:, :, 0] >= 0).all()
        assert (truth.xy[:, :, 0] <= (160, 120)).all()
        assert np.linalg.norm(np.diff(truth.xy, axis=2), axis=-1).max() > 0.3  # something moves


def test_the_truth_is_where_optical_flow_finds_the_points(folder: Path) -> None:
    """Lucas-Kanade of OpenCV knows nothing of the scene, and meets the truth where points stay in sight."""
    errors = []
    for index in range(2):
        truth = read_truth(folder / "truth" / f"episode_{index}.npz")
        with EpisodeFile(folder / f"episode_{index}.h5") as episode:
            for camera in range(2):
                points = truth.xy[camera, :, 0] - 0.5
                before = None
                for t, image in enumerate(episode.frames(camera)):
                    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
                    if before is not None:
                        points, _, _ = cv2.calcOpticalFlowPyrLK(before, grey, points, None, winSize=(11, 11))
                    before = grey
                    always = truth.visible[camera].all(axis=1)
                    errors.append(np.linalg.norm(points + 0.5 - truth.xy[camera, :, t], axis=-1)[always])
    assert np.median(np.concatenate(errors)) < 0.5


def test_the_same_settings_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    make_episodes(tmp_path, 1, SMALL)
    for name in ("episode_0.h5", "truth/episode_0.npz"):
        assert sha256(tmp_path / name) == sha256(folder / name)
    assert sha256(folder / "episode_0.h5") != sha256(folder / "episode_1.h5")


@pytest.mark.parametrize(("image_type", "white"), [("float32", 1), ("float32_255", 255)])
def test_float_images_with_channels_last(tmp_path: Path, image_type: str, white: int) -> None:
    settings = {"steps": 2, "height": 64, "width": 80, "cameras": 3}
    make_episodes(tmp_path / "bytes", 1, MiniatureSettings(**settings))
    other = MiniatureSettings(**settings, image_type=image_type, channels_last=True, image_key="obs/rgb")
    make_episodes(tmp_path / "floats", 1, other)
    with (
        EpisodeFile(tmp_path / "bytes" / "episode_0.h5") as expected,
        EpisodeFile(tmp_path / "floats" / "episode_0.h5") as episode,
    ):
        assert (episode.axes, episode.image_key, episode.value_range) == ("b v h w c", "obs/rgb", white)
        for t in range(2):
            np.testing.assert_array_equal(episode.images(t), expected.images(t))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["h5", "example", str(tmp_path), "--episodes", "1", "--steps", "2", "--size", "64", "80"]
    assert main(arguments) == 0
    assert "1 episodes" in capsys.readouterr().err
    assert read_truth(tmp_path / "truth" / "episode_0.npz").visible.shape == (2, 5, 2)
    with h5py.File(tmp_path / "episode_0.h5") as file:
        assert file["step_1/obs/image"].compression == "gzip"
    assert main([*arguments, "--steps", "0"]) == 1
    assert "steps must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="image_type must be one of"):
        MiniatureSettings(image_type="int8")  # type: ignore[arg-type]
