from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trackbench.robotics.workspace import EpisodeInfo, Workspace, read_info

INFO = EpisodeInfo(
    episode="day 1/run_2",
    source="day 1/run_2.h5",
    source_size=10,
    source_fingerprint="f" * 64,
    fps=29.97,
    num_frames=2,
    cameras=2,
    height=5,
    width=7,
    steps=("step_0", "step_1"),
    image_key="obs/image",
    axes="b v c h w",
    value_range=255,
)


def test_info_survives_the_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.write_info(INFO)
    assert workspace.info("day 1/run_2") == INFO
    assert [path.name for path in workspace.folder("day 1/run_2").iterdir()] == ["episode.json"]


def test_episodes_are_in_natural_order_and_only_finished_ones_count(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.episodes() == []
    for name in ("run_10", "run_9", "a/run_2", "a/run_11"):
        workspace.write_info(replace(INFO, episode=name))
    (workspace.folder("run_8")).mkdir(parents=True)
    assert workspace.episodes() == ["a/run_2", "a/run_11", "run_9", "run_10"]


def test_names_of_files(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = tmp_path / "episodes" / "a" / "b"
    assert workspace.file("a/b", 0, "video") == folder / "cam0.mp4"
    assert workspace.file("a/b", 1, "tracks") == folder / "cam1.tracks.npz"
    assert workspace.quality("a/b") == folder / "quality.json"
    with pytest.raises(ValueError, match="camera -1"):
        workspace.file("a/b", -1, "video")


@pytest.mark.parametrize("name", ["../x", "/etc", "a/../../x", "", "a\\b", "c:x", "a\0"])
def test_names_stay_in_the_work_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="relative name"):
        Workspace(tmp_path).folder(name)


def test_an_episode_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="was the episode extracted"):
        Workspace(tmp_path).info("x")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "format 1"),
        ({"cameras": 0}, "cameras"),
        ({"cameras": True}, "cameras"),
        ({"fps": float("inf")}, "fps"),
        ({"fps": "30"}, "fps"),
        ({"steps": ["step_0", 1]}, "steps"),
        ({"steps": ["step_0"]}, "1 steps, but num_frames is 2"),
        ({"value_range": 2}, "value_range"),
        ({"source": None}, "source"),
    ],
)
def test_damaged_info_is_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    Workspace(tmp_path).write_info(INFO)
    path = tmp_path / "episodes" / "day 1" / "run_2" / "episode.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=told) as error:
        read_info(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\ufeff{"])
def test_what_is_no_info_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "episode.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"episode\.json"):
        read_info(path)
