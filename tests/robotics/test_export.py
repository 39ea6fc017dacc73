"""Exports, read back with pyarrow, numpy and trackbench's own benchmarks, and compared with what went in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from episode_fakes import H, T, V, W, pixels, write_episode

from trackbench.cli import main
from trackbench.data.tapvid import TapVidDataset, TapVidFilesDataset
from trackbench.files import sha256
from trackbench.robotics.export import Exported, ExportSettings, export
from trackbench.robotics.extract import extract
from trackbench.robotics.review import decide
from trackbench.robotics.track_file import CameraTracks, read_tracks, write_tracks
from trackbench.robotics.workspace import Workspace

NAMES = ("grip", "杯")


def make_tracks(camera: int, seed: int) -> CameraTracks:
    K = len(NAMES)
    rng = np.random.default_rng([seed, camera])
    visible = rng.random((K, T)) < 0.7
    visible[:, 0] = True
    return CameraTracks(
        names=NAMES,
        queries=np.zeros((K, 3), np.float32),
        xy=rng.uniform(0, (W, H), (K, T, 2)).astype(np.float32),
        visible=visible,
        visibility=rng.random((K, T)).astype(np.float32),
        error=np.zeros((K, T), np.float32),
        corrections=np.zeros((0, 4)),
        model="lucas_kanade",
        weights_sha256="",
        annotation_sha256="ab",
        trackbench_version="0.0",
    )


def prepare(folder: Path, names: tuple[str, ...] = ("a", "day/b"), **layout: Any) -> tuple[Path, Workspace]:
    """Episodes, extracted, with random tracks, accepted; each step also has obs/state (1, 2)."""
    source, workspace = folder / "in", Workspace(folder / "out")
    for number, name in enumerate(names):
        path = write_episode(source / f"{name}.h5", fps=10.0, **layout)
        with h5py.File(path, "a") as file:
            file.attrs["task"] = "stack" if number == 0 else "sort"
            for t in range(T):
                file[f"step_{t}/obs/state"] = np.array([[t, number]], np.float64)
                file[f"step_{t}/obs/depth"] = np.zeros((1, 2, 4, 4), np.float32)
    ready(source, workspace)
    return source, workspace


def ready(source: Path, workspace: Workspace) -> None:
    assert all(outcome.error is None for outcome in extract(source, workspace, workers=1))
    for number, name in enumerate(workspace.episodes()):
        for camera in range(workspace.info(name).cameras):
            if not workspace.file(name, camera, "tracks").is_file():
                write_tracks(workspace.file(name, camera, "tracks"), make_tracks(camera, number))
    decide(workspace, workspace.episodes(), "accept", "looks right")


def tracks_of(workspace: Workspace, episode: str) -> list[CameraTracks]:
    return [read_tracks(workspace.file(episode, camera, "tracks")) for camera in range(V)]


def digests(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workspace, Exported]:
    source, workspace = prepare(tmp_path_factory.mktemp("export"))
    return source, workspace, export(source, workspace, "lerobot")


def test_lerobot_rows_are_what_was_recorded_and_tracked(made: tuple[Path, Workspace, Exported]) -> None:
    source, workspace, exported = made
    assert (exported.episodes, exported.fresh, exported.failed) == (("a", "day/b"), True, {})
    assert exported.left_out == {"obs/depth": "shape (1, 2, 4, 4) is no vector"}
    root = exported.folder
    info = json.loads((root / "meta/info.json").read_text())
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pylist()
    assert [row["task"] for row in sorted(tasks, key=lambda row: row["task_index"])] == ["stack", "sort"]
    for number, episode in enumerate(exported.episodes):
        table = pq.read_table(root / info["data_path"].format(chunk_index=0, file_index=number))
        assert set(table.column_names) == {
            key for key, feature in info["features"].items() if feature["dtype"] != "video"
        }
        rows = {key: np.array(table[key].to_pylist()) for key in table.column_names}
        cameras = tracks_of(workspace, episode)
        for t in range(T):
            xy = np.concatenate([tracks.xy[:, t].ravel() for tracks in cameras])
            np.testing.assert_array_equal(rows["observation.keypoints"][t].astype(np.float32), xy)
            visible = np.concatenate([tracks.visible[:, t] for tracks in cameras])
            np.testing.assert_array_equal(rows["observation.keypoints_visible"][t], visible)
            sure = np.concatenate([tracks.visibility[:, t] for tracks in cameras])
            np.testing.assert_array_equal(rows["observation.keypoints_confidence"][t].astype(np.float32), sure)
        with h5py.File(source / f"{episode}.h5") as file:
            np.testing.assert_allclose(rows["action"], [file[f"step_{t}/action"][()] for t in range(T)])
            state = [file[f"step_{t}/obs/state"][0] for t in range(T)]
            np.testing.assert_allclose(rows["observation.state"], state)
        np.testing.assert_allclose(rows["timestamp"], np.arange(T) / 10)
        np.testing.assert_array_equal(rows["frame_index"], np.arange(T))
        np.testing.assert_array_equal(rows["index"], number * T + np.arange(T))
        assert set(rows["episode_index"]) == {number}
        assert set(rows["task_index"]) == {number}


def test_lerobot_metadata_describe_the_rows(made: tuple[Path, Workspace, Exported]) -> None:
    """Keys, types and shapes as LeRobot 0.4.4 writes and reads them."""
    _, workspace, exported = made
    root = exported.folder
    info = json.loads((root / "meta/info.json").read_text())
    expected = {
        "codebase_version": "v3.0",
        "robot_type": None,
        "total_episodes": 2,
        "total_frames": 2 * T,
        "total_tasks": 2,
        "chunks_size": 1000,
        "fps": 10,
        "splits": {"train": "0:2"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    assert {key: info[key] for key in expected} == expected
    features = info["features"]
    assert features["observation.images.cam1"]["shape"] == [H, W, 3]
    assert features["observation.images.cam1"]["names"] == ["height", "width", "channels"]
    names = [f"cam{camera}.{name}" for camera in range(V) for name in NAMES]
    assert features["observation.keypoints"] == {
        "dtype": "float32",
        "shape": [2 * len(names)],
        "names": [f"{name}.{axis}" for name in names for axis in "xy"],
    }
    assert features["observation.keypoints_visible"]["dtype"] == "bool"
    assert features["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    schema = pq.read_schema(root / "data/chunk-000/file-000.parquet")
    for key, feature in features.items():
        if feature["dtype"] != "video":
            (size,) = feature["shape"]
            kind = {"float32": "float", "int64": "int64", "bool": "bool"}[feature["dtype"]]
            told = str(schema.field(key).type)
            assert told == kind if size == 1 else told.startswith("fixed_size_list") and told.endswith(f"[{size}]")
    index = json.loads(pq.read_schema(root / "meta/tasks.parquet").metadata[b"pandas"])["index_columns"]
    assert index == ["task"]  # LeRobot looks tasks up by the index of the table, through pandas

    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for number, (row, episode) in enumerate(zip(rows, exported.episodes, strict=True)):
        assert (row["episode_index"], row["length"], row["tasks"]) == (number, T, [("stack", "sort")[number]])
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (number * T, number * T + T)
        assert (row["data/chunk_index"], row["data/file_index"]) == (0, number)
        for camera in range(V):
            key = f"observation.images.cam{camera}"
            assert row[f"videos/{key}/from_timestamp"] == 0
            assert row[f"videos/{key}/to_timestamp"] == pytest.approx(T / 10)
            place = {
                "chunk_index": row[f"videos/{key}/chunk_index"],
                "file_index": row[f"videos/{key}/file_index"],
            }
            video = root / info["video_path"].format(video_key=key, **place)
            assert sha256(video) == sha256(workspace.file(episode, camera, "video"))


def test_lerobot_statistics_are_those_of_the_rows_and_images(made: tuple[Path, Workspace, Exported]) -> None:
    _, _, exported = made
    statistics = json.loads((exported.folder / "meta/stats.json").read_text())
    files = sorted((exported.folder / "data").rglob("*.parquet"))
    rows = {
        key: np.concatenate([np.array(pq.read_table(file)[key].to_pylist(), np.float64) for file in files])
        for key in statistics
        if ".images." not in key
    }
    for key, values in rows.items():
        for name in ("min", "max", "mean", "std"):
            found = np.asarray(statistics[key][name])
            assert found.shape == values.shape[1:] or found.shape == (1,)
            np.testing.assert_allclose(found, getattr(values, name)(axis=0), atol=1e-6)
        assert statistics[key]["count"] == [2 * T]
    for camera in range(V):
        found = statistics[f"observation.images.cam{camera}"]
        images = np.stack([pixels(t, camera) for t in range(T)])[:, ::4, ::4].reshape(-1, 3) / 255
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(
                np.array(found[name]), getattr(images, name)(axis=0)[:, None, None], atol=1e-9
            )
        median = np.quantile(images, 0.5, axis=0, method="inverted_cdf")
        np.testing.assert_allclose(np.array(found["q50"])[:, 0, 0], median)
        assert found["count"] == [2 * T]


def test_only_what_was_accepted_as_it_is_now_is_exported(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, ("a", "b", "c", "d"))
    decide(workspace, ["b"], "reject", "slipped")
    write_tracks(workspace.file("c", 0, "tracks"), make_tracks(0, seed=99))
    exported = export(source, workspace, "lerobot")
    assert exported.episodes == ("a", "d")
    assert exported.skipped == {
        "b": "rejected: slipped",
        "c": "its tracks changed since it was accepted; review it again",
    }
    decide(workspace, ["c"], "accept")
    before = {path: path.stat().st_mtime_ns for path in (workspace.root / "export/parts").rglob("*.npz")}
    again = export(source, workspace, "lerobot")
    assert (again.episodes, again.fresh) == (("a", "c", "d"), True)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # they are not made again
    rows = pq.read_table(again.folder / "meta/episodes/chunk-000/file-000.parquet")
    assert rows["dataset_to_index"].to_pylist() == [T, 2 * T, 3 * T]


@pytest.mark.parametrize("kind", ["lerobot", "tapvid"])
def test_an_export_that_is_there_stays_and_a_damaged_one_is_made_again(tmp_path: Path, kind: Any) -> None:
    source, workspace = prepare(tmp_path)
    folder = export(source, workspace, kind).folder
    expected = digests(folder)
    changed = folder.stat().st_ctime_ns
    assert not export(source, workspace, kind).fresh
    assert folder.stat().st_ctime_ns == changed
    for name in expected.keys() - {"trackbench.json"}:
        (folder / name).unlink()
        assert export(source, workspace, kind).fresh
        assert digests(folder) == expected


def test_datasets_of_the_steps_get_the_keys_that_are_asked_for(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, ("a",))
    keys = {"obs/state": "observation.environment_state", "obs/depth": "observation.depth", "action": ""}
    exported = export(source, workspace, "lerobot", settings=ExportSettings(keys, task="push", robot_type="arm"))
    assert exported.left_out == {"action": "as asked for"}
    table = pq.read_table(exported.folder / "data/chunk-000/file-000.parquet")
    assert np.array(table["observation.environment_state"].to_pylist())[:, 0].tolist() == list(range(T))
    assert np.array(table["observation.depth"].to_pylist()).shape == (T, 32)
    info = json.loads((exported.folder / "meta/info.json").read_text())
    assert info["robot_type"] == "arm"
    assert pq.read_table(exported.folder / "meta/tasks.parquet")["task"].to_pylist() == ["push"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"obs/pose": "pose"}, "step_0 has no obs/pose; it has action, obs/depth, obs/state"),
        ({"action": "timestamp"}, "action: its key timestamp belongs to LeRobot"),
        ({"action": "observation.state", "obs/state": "observation.state"}, "belongs to action"),
        ({"action": "a/b"}, "a key of LeRobot has no /"),
    ],
)
def test_impossible_keys_are_told(tmp_path: Path, keys: dict[str, str], message: str) -> None:
    source, workspace = prepare(tmp_path, ("a",))
    exported = export(source, workspace, "lerobot", settings=ExportSettings(keys))
    assert message in exported.failed["a"]
    assert exported.episodes == ()
    assert not exported.folder.exists()


def test_episodes_that_do_not_fit_to_most_others_fail_and_the_rest_goes_on(tmp_path: Path) -> None:
    names = ("a", "b", "c", "faster", "nan", "short", "wide")
    source, workspace = prepare(tmp_path, names)
    for name in names[3:]:
        (source / f"{name}.h5").unlink()
        for path in sorted(workspace.folder(name).iterdir()):
            path.unlink()
        wide = {"width": W + 2} if name == "wide" else {}
        path = write_episode(source / f"{name}.h5", fps=20.0 if name == "faster" else 10.0, **wide)
        with h5py.File(path, "a") as file:
            for t in range(T):
                file[f"step_{t}/obs/state"] = np.array([[t, np.nan if name == "nan" else 0]], np.float64)
            if name == "short":
                del file["step_3/action"]
                file["step_3/action"] = np.zeros(2)
    ready(source, workspace)
    exported = export(source, workspace, "lerobot")
    assert exported.episodes == ("a", "b", "c")
    assert exported.failed["faster"] == "has 20 frames per second, most episodes 10"
    assert exported.failed["nan"].endswith("observation.state of step_0 is not finite; NAME= leaves a dataset out")
    assert "has no action, which most episodes have (step_3/action is float64 (2,)" in exported.failed["short"]
    assert "shape of observation.images.cam0 is 24, 34, 3" in exported.failed["wide"]


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, ("a",))
    mine = tmp_path / "mine"
    mine.mkdir()
    assert export(source, workspace, "tapvid", to=mine).fresh  # an empty one is free
    with pytest.raises(ValueError, match="something else than an export to lerobot"):
        export(source, workspace, "lerobot", to=mine)
    (source / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="something else than an export to tapvid"):
        export(source, workspace, "tapvid", to=source)
    assert (source / "notes.txt").read_text() == "keep"


def test_npz_clips_give_the_tracks_back(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path)
    folder = export(source, workspace, "tapvid").folder
    clips = TapVidFilesDataset(folder, resolution=None)
    assert clips.names == ["a_cam0", "a_cam1", "day__b_cam0", "day__b_cam1"]
    for index, (episode, camera) in enumerate([("a", 0), ("a", 1), ("day/b", 0), ("day/b", 1)]):
        clip = clips[index]
        tracks = tracks_of(workspace, episode)[camera]
        np.testing.assert_allclose(clip.xy[0].numpy(), tracks.xy, atol=1e-4)
        np.testing.assert_array_equal(clip.visible[0].numpy(), tracks.visible)
        for t in range(T):
            image = clip.video[0, t].permute(1, 2, 0).numpy().astype(int)
            assert np.abs(image - pixels(t, camera)).max() <= 4  # JPEG


def test_pickles_give_exact_pixels_and_the_tracks_back(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path)
    folder = export(source, workspace, "tapvid", settings=ExportSettings(container="pickle")).folder
    assert sorted(path.name for path in folder.glob("*.pkl")) == [
        "a_cam0.pkl",
        "a_cam1.pkl",
        "day__b_cam0.pkl",
        "day__b_cam1.pkl",
    ]
    clip = TapVidDataset("davis", folder / "day__b_cam1.pkl", resolution=None)[0]
    assert clip.names == ["day__b_cam1"]
    np.testing.assert_array_equal(clip.video[0].permute(0, 2, 3, 1), [pixels(t, 1) for t in range(T)])
    tracks = tracks_of(workspace, "day/b")[1]
    np.testing.assert_allclose(clip.xy[0].numpy(), tracks.xy, atol=1e-4)
    np.testing.assert_array_equal(clip.visible[0].numpy(), tracks.visible)


def test_clips_without_a_visible_point_or_with_a_taken_name_fail_alone(tmp_path: Path) -> None:
    source, workspace = prepare(tmp_path, ("a", "day/b", "day__b", "hidden"))
    tracks = make_tracks(1, 0)
    write_tracks(workspace.file("hidden", 1, "tracks"), replace(tracks, visible=np.zeros_like(tracks.visible)))
    outside = make_tracks(0, 0)
    outside.xy[0, 1:] = -5
    outside.visible[0] = True
    write_tracks(workspace.file("a", 0, "tracks"), outside)
    decide(workspace, ["hidden", "a"], "accept")
    exported = export(source, workspace, "tapvid")
    assert exported.episodes == ("a", "day/b")
    assert exported.failed == {
        "hidden": "cam1: no keypoint is ever visible, so there is nothing to evaluate",
        "day__b": "its clips would have the names of those of day/b",
    }
    clip = TapVidFilesDataset(exported.folder / "a_cam0.npz", resolution=None)[0]
    assert clip.visible[0, 0].tolist() == [True] + [False] * (T - 1)  # outside the frame is occluded


KILLED = """
import os, signal, sys
from pathlib import Path
from trackbench.robotics import clips, export, lerobot
from trackbench.robotics.workspace import Workspace
kind, place, number = sys.argv[3], sys.argv[4], int(sys.argv[5])
module, name = {"part": {"lerobot": (lerobot, "write_piece"), "tapvid": (export, "write_clip")}[kind],
                "file": {"lerobot": (lerobot, "_write_table"), "tapvid": (export, "link_or_copy")}[kind]}[place]
real, count = getattr(module, name), 0
def counting(*arguments, **options):
    global count
    count += 1
    if count == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
setattr(module, name, counting)
export.export(Path(sys.argv[1]), Workspace(Path(sys.argv[2])), kind)
"""


@pytest.mark.parametrize(
    ("kind", "place"), [("lerobot", "part"), ("lerobot", "file"), ("tapvid", "part"), ("tapvid", "file")]
)
def test_a_killed_export_is_completed_by_the_next(tmp_path: Path, kind: Any, place: str) -> None:
    source, workspace = prepare(tmp_path)
    command = [sys.executable, "-c", KILLED, source, workspace.root, kind, place, "2"]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -9
    folder = workspace.root / "export" / kind
    assert not folder.exists()
    assert export(source, workspace, kind).fresh
    expected = export(source, workspace, kind, to=tmp_path / "expected").folder
    assert digests(folder) == digests(expected)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([kind, "parts"])


LIMITED = """
import resource, sys
from pathlib import Path
from trackbench.robotics import export
from trackbench.robotics.workspace import Workspace
real = export.run_jobs
def limited(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return real(*arguments)
export.run_jobs = limited
print(export.export(Path(sys.argv[1]), Workspace(Path(sys.argv[2])), sys.argv[3]).failed)
"""


@pytest.mark.parametrize("kind", ["lerobot", "tapvid"])
def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path, kind: str) -> None:
    """A limit on the size of files stands for a full disk."""
    source, workspace = prepare(tmp_path, ("a",))
    command = [sys.executable, "-c", LIMITED, source, workspace.root, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "File too large" in done.stdout, done.stderr
    assert [path for path in (workspace.root / "export").rglob("*") if path.is_file()] == []


def test_the_command_tells_what_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, workspace = prepare(tmp_path)
    decide(workspace, ["a"], "reject", "blurred")
    arguments = ["h5", "export", str(source), str(workspace.root), "--format", "tapvid"]
    assert main([*arguments, "--to", str(tmp_path / "to")]) == 0
    told = capsys.readouterr().err.splitlines()
    assert "a: not exported: rejected: blurred" in told
    assert told[-1] == f"1 episodes exported to {tmp_path / 'to'}, 1 not accepted, 0 failed"
    assert main([*arguments, "--episodes", "a"]) == 1
    assert main([*arguments, "--key", "x"]) == 1
    assert "--key x: expected NAME=KEY" in capsys.readouterr().err


def test_videos_are_linked_not_copied(made: tuple[Path, Workspace, Exported]) -> None:
    _, workspace, exported = made
    video = exported.folder / "videos/observation.images.cam0/chunk-000/file-000.mp4"
    assert video.samefile(workspace.file("a", 0, "video"))
