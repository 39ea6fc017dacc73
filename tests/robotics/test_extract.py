from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import imageio_ffmpeg
import numpy as np
import pytest
from episode_fakes import H, T, V, W, pixels, write_episode
from PIL import Image

from trackbench.cli import main
from trackbench.data.video_io import VideoReader, read_video
from trackbench.files import sha256
from trackbench.robotics.episodes import EpisodeSettings
from trackbench.robotics.extract import VideoEncoder, extract
from trackbench.robotics.workspace import Workspace


def outcomes(source: Path, root: Path, **options: object) -> dict[str, str | None]:
    """Episode -> its error."""
    done = extract(source, Workspace(root), workers=1, **options)  # type: ignore[arg-type]
    return {outcome.item: outcome.error for outcome in done}


def digests(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


def streams(video: Path) -> tuple[str, list[float]]:
    """What ffmpeg says of a video, and the times of its keyframes."""
    program = imageio_ffmpeg.get_ffmpeg_exe()
    told = subprocess.run([program, "-i", video], capture_output=True, text=True, check=False).stderr
    shown = subprocess.run(
        [program, "-skip_frame", "nokey", "-i", video, "-vf", "showinfo", "-f", "null", "-"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    times = [float(time) for time in re.findall(r"pts_time:([\d.]+)", shown)]
    return told, times


def test_videos_and_first_frames(tmp_path: Path) -> None:
    write_episode(tmp_path / "in" / "day 1" / "run_2.h5", range(0, 2 * T, 2), compression="gzip")
    assert outcomes(tmp_path / "in", tmp_path / "out") == {"day 1/run_2": None}
    workspace = Workspace(tmp_path / "out")
    info = workspace.info("day 1/run_2")
    assert (info.source, info.fps, info.num_frames, info.cameras) == ("day 1/run_2.h5", 30.0, T, V)
    assert (info.height, info.width, info.axes, info.value_range) == (H, W, "b v c h w", 255)
    assert info.steps == tuple(f"step_{n}" for n in range(0, 2 * T, 2))
    names = {path.name for path in workspace.folder("day 1/run_2").iterdir()}
    assert names == {"episode.json", "cam0.mp4", "cam0.png", "cam1.mp4", "cam1.png"}
    for camera in range(V):
        with Image.open(workspace.file("day 1/run_2", camera, "image")) as image:
            np.testing.assert_array_equal(np.array(image), pixels(0, camera))
        video = read_video(workspace.file("day 1/run_2", camera, "video")).astype(float)
        expected = np.stack([pixels(t, camera) for t in range(T)])
        assert video.shape == expected.shape
        assert abs(video - expected).mean() < 3  # the colours are right, and the frames in order
        for t in range(T):
            nearest = abs(video[t][None] - expected).mean(axis=(1, 2, 3)).argmin()
            assert nearest == t


def test_videos_are_what_browsers_play_and_scrub(tmp_path: Path) -> None:
    write_episode(tmp_path / "in" / "a.h5", range(35), fps=10)
    assert outcomes(tmp_path / "in", tmp_path / "out") == {"a": None}
    video = Workspace(tmp_path / "out").file("a", 0, "video")
    told, key_times = streams(video)
    assert re.search(r"Video: h264 \(High\) .*yuv420p\(tv, bt709.* 10 fps", told)
    assert key_times == [0.0, 1.0, 2.0, 3.0]  # one a second
    content = video.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is loaded whole


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.transpose(0, 1, 3, 4, 2),
        lambda a: (a / 255).astype(np.float32),
        lambda a: a[0].transpose(1, 2, 3, 0),
    ],
    ids=["channels last", "floats", "cameras last"],
)
def test_every_layout_gives_the_same_pictures(tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    write_episode(tmp_path / "in" / "usual.h5")
    other = write_episode(tmp_path / "other" / "a.h5", change=change)
    with h5py.File(other) as file:
        axes = "c h w v" if file["step_0/obs/image"].shape == (3, H, W, V) else None
    assert outcomes(tmp_path / "in", tmp_path / "out") == {"usual": None}
    assert outcomes(tmp_path / "other", tmp_path / "out", settings=EpisodeSettings(axes=axes)) == {"a": None}
    workspace = Workspace(tmp_path / "out")
    for camera in range(V):
        assert sha256(workspace.file("a", camera, "image")) == sha256(workspace.file("usual", camera, "image"))
        mine, usual = (read_video(workspace.file(name, camera, "video")).astype(int) for name in ("a", "usual"))
        assert abs(mine - usual).max() <= 4


@pytest.mark.parametrize("layout", ["planar", "packed"])
def test_odd_sizes_grow_by_a_copy_of_the_edge(tmp_path: Path, layout: str) -> None:
    change = (lambda a: a) if layout == "planar" else (lambda a: a.transpose(0, 1, 3, 4, 2))
    write_episode(tmp_path / "in" / "a.h5", height=23, width=31, change=change)
    assert outcomes(tmp_path / "in", tmp_path / "out") == {"a": None}
    workspace = Workspace(tmp_path / "out")
    info = workspace.info("a")
    assert (info.height, info.width) == (23, 31)
    video = read_video(workspace.file("a", 1, "video")).astype(float)
    assert video.shape == (T, 24, 32, 3)
    assert abs(video[3, :23, :31] - pixels(3, 1, 23, 31)).mean() < 3
    assert abs(video[3, 23, :31] - pixels(3, 1, 23, 31)[22]).mean() < 6
    with Image.open(workspace.file("a", 1, "image")) as image:
        assert image.size == (31, 23)


def test_fps_comes_from_the_command_the_file_or_is_30(tmp_path: Path) -> None:
    write_episode(tmp_path / "in" / "a.h5", fps=12.5)
    write_episode(tmp_path / "in" / "b.h5")
    outcomes(tmp_path / "in", tmp_path / "out")
    assert [Workspace(tmp_path / "out").info(name).fps for name in "ab"] == [12.5, 30.0]
    assert VideoReader(Workspace(tmp_path / "out").file("a", 0, "video")).fps == 12.5
    outcomes(tmp_path / "in", tmp_path / "other", fps=24.0)
    assert [Workspace(tmp_path / "other").info(name).fps for name in "ab"] == [24.0, 24.0]


def test_finished_episodes_stay_as_they_are(tmp_path: Path) -> None:
    for name in "ab":
        write_episode(tmp_path / "in" / f"{name}.h5")
    outcomes(tmp_path / "in", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    done = list(extract(tmp_path / "in", Workspace(tmp_path / "out"), workers=1))
    assert [outcome.result and outcome.result.fresh for outcome in done] == [False, False]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    Workspace(tmp_path / "out").file("a", 1, "video").unlink()  # lost: made again
    assert outcomes(tmp_path / "in", tmp_path / "out") == {"a": None, "b": None}
    assert Workspace(tmp_path / "out").file("a", 1, "video").is_file()


def test_an_episode_that_changed_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    for name in "ab":
        write_episode(tmp_path / "in" / f"{name}.h5")
    outcomes(tmp_path / "in", tmp_path / "out")
    kept = digests(tmp_path / "out")
    write_episode(tmp_path / "in" / "a.h5", change=lambda a: a + 1)
    told = outcomes(tmp_path / "in", tmp_path / "out")
    assert told["b"] is None
    assert "changed since it was extracted" in str(told["a"])
    assert digests(tmp_path / "out") == kept


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fps": 25.0}, "with fps 30.0, not 25.0"),
        ({"settings": EpisodeSettings(image_key="obs/rgb")}, "with image_key obs/image, not obs/rgb"),
        ({"settings": EpisodeSettings(axes="b v c w h")}, "with axes b v c h w, not b v c w h"),
    ],
)
def test_other_settings_than_before_are_refused(tmp_path: Path, options: dict[str, object], told: str) -> None:
    write_episode(tmp_path / "in" / "a.h5")
    outcomes(tmp_path / "in", tmp_path / "out")
    assert told in str(outcomes(tmp_path / "in", tmp_path / "out", **options)["a"])


def test_bad_episodes_get_a_line_each_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    for name in ("good_1", "good_2", "cut", "hole", "two_fps", "late", "12:30"):
        write_episode(source / f"{name}.h5", compression="gzip")
    (source / "empty.h5").touch()
    (source / "text.h5").write_text("not at all")
    os.truncate(source / "cut.h5", 5000)
    with h5py.File(source / "hole.h5", "r+") as file:
        del file["step_3"]
    with h5py.File(source / "two_fps.h5", "r+") as file:
        file.attrs["fps"], file["step_2"].attrs["fps"] = 10, 20
    with h5py.File(source / "late.h5", "r") as file:
        place = file["step_5/obs/image"].id.get_chunk_info(0)
    with (source / "late.h5").open("r+b") as raw:  # found only after half of the video
        raw.seek(place.byte_offset)
        raw.write(bytes(place.size))
    (source / "away.h5").symlink_to(write_episode(tmp_path / "elsewhere.h5"))
    (source / "dangling.h5").symlink_to(source / "nothing.h5")
    assert main(["h5", "extract", str(source), str(tmp_path / "out"), "--workers", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    for name, told in {
        "cut": "truncated",
        "hole": "step 3 is missing",
        "two_fps": "two different fps: 10 in /, 20 in step_2",
        "late": "step_5|inflate|filter|read",
        "12:30": "expected a relative name",
        "empty": "the file is empty",
        "text": "not an HDF5 file",
        "away": "leads out of",
        "dangling": "No such file",
    }.items():
        mine = [line for line in lines if line.startswith(f"{name}: ")]
        assert len(mine) == 1
        assert re.search(told, mine[0])
    assert lines[-1] == "2 episodes extracted, 0 were there, 9 failed"
    assert Workspace(tmp_path / "out").episodes() == ["good_1", "good_2"]
    left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(left) == 2 * 5


def test_what_is_wrong_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_episode(tmp_path / "in" / "a.h5")
    for arguments, told in (
        ([tmp_path / "none", tmp_path / "out"], "no such file or folder"),
        ([tmp_path / "in", tmp_path / "in" / "out"], "must not lie in the folder of episodes"),
        ([tmp_path / "in", tmp_path / "out", "--fps", "0"], "fps must be positive"),
        ([tmp_path / "in", tmp_path / "out", "--axes", "c h"], "axes 'c h'"),
        ([tmp_path / "in", tmp_path / "out", "--workers", "-1"], "workers must be at least 1"),
    ):
        assert main(["h5", "extract", *map(str, arguments)]) == 1
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from trackbench.robotics import extract
from trackbench.robotics.workspace import Workspace
write, count = extract.VideoEncoder.write, 0
def counting(self, frame):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, frame)
extract.VideoEncoder.write = counting
list(extract.extract(Path(sys.argv[1]), Workspace(Path(sys.argv[2])), workers=1))
"""


def test_a_killed_run_is_completed_by_the_next(tmp_path: Path) -> None:
    for name in "abc":
        write_episode(tmp_path / "in" / f"{name}.h5")
    outcomes(tmp_path / "in", tmp_path / "expected")
    where = [str(tmp_path / "in"), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *where, str(2 * T + 5)], check=False)
    assert killed.returncode == -9
    assert Workspace(tmp_path / "out").episodes() == ["a"]
    assert [path.name[:6] for path in Workspace(tmp_path / "out").folder("b").iterdir()] == [".part-"]
    assert outcomes(tmp_path / "in", tmp_path / "out") == dict.fromkeys("abc")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    for name in "ab":
        write_episode(tmp_path / "in" / f"{name}.h5")
    outcomes(tmp_path / "in", tmp_path / "one")
    assert main(["h5", "extract", str(tmp_path / "in"), str(tmp_path / "two"), "--workers", "2"]) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


LIMITED = """
import resource, sys
from pathlib import Path
from trackbench.robotics.extract import extract
from trackbench.robotics.workspace import Workspace
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for outcome in extract(Path(sys.argv[1]), Workspace(Path(sys.argv[2])), workers=1):
    print(outcome.error)
"""


def test_a_full_disk_leaves_nothing_half_done(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    noise = np.random.default_rng(0)
    shape = (1, V, 3, 120, 160)
    write_episode(
        tmp_path / "in" / "a.h5", range(30), change=lambda a: noise.integers(0, 256, shape).astype(np.uint8)
    )
    command = [sys.executable, "-c", LIMITED, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search("too large|ffmpeg", done.stdout), done.stdout
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def encode(path: Path, frames: int) -> None:
    with VideoEncoder(path, 16, 16, 30, planar=False) as encoder:
        for _ in range(frames):
            encoder.write(np.zeros((16, 16, 3), np.uint8))


@pytest.mark.parametrize("frames", [1, 2000])
def test_the_encoder_says_why_ffmpeg_failed(tmp_path: Path, frames: int) -> None:
    with pytest.raises(OSError, match=r"x\.mp4: ffmpeg failed: .*No such file"):
        encode(tmp_path / "none" / "x.mp4", frames)


def test_episode_json_is_readable(tmp_path: Path) -> None:
    write_episode(tmp_path / "in" / "é.h5")
    outcomes(tmp_path / "in", tmp_path / "out")
    content = json.loads((tmp_path / "out" / "episodes" / "é" / "episode.json").read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert content["episode"] == "é"
