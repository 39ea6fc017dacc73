"""Kinetics from raw clips, against what the official generator made of the same clips, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from trackbench.cli import main
from trackbench.data.manifest import Manifest
from trackbench.data.prepare import kinetics
from trackbench.data.prepare.kinetics import encode_frames, prepare_kinetics, read_annotations, write_pickled_list
from trackbench.data.safe_pickle import load_pickle
from trackbench.data.tapvid import TapVidDataset
from trackbench.data.video_io import write_video
from trackbench.jobs import run_jobs

A, B, GONE = "synthAAAAAA_000010_000020", "synthBBBBBB_000003_000013", "notdownload_000000_000010"


def load(folder: Path) -> list[dict[str, Any]]:
    """All videos, as the official loaders read them: with pickle itself."""
    videos = []
    for file in sorted(folder.glob("*_of_0010.pkl")):
        with file.open("rb") as opened:
            videos += pickle.load(opened)
    return videos


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*_of_0010.pkl"))}


def make_clip(path: Path, number: int, frames: int = 5, size: tuple[int, int] = (32, 48)) -> None:
    rng = np.random.default_rng(number)
    small = rng.integers(0, 255, (frames, 4, 6, 3), dtype=np.uint8)
    write_video(path, small.repeat(size[0] // 4, 1).repeat(size[1] // 6, 2), fps=25)


def make_rows(names: list[str], tracks: int = 2) -> list[list[str]]:
    rng = np.random.default_rng(0)
    rows = []
    for name in names:
        video, start, end = name.rsplit("_", 2)
        for _ in range(tracks):
            cells = [f"{value:.6f}" for value in rng.random(500)]
            flags = rng.integers(0, 2, 250)
            points = [cell for t in range(250) for cell in (*cells[2 * t : 2 * t + 2], str(flags[t]))]
            rows.append([video, str(int(start)), str(int(end)), *points])
    return rows


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def raw(data_fixtures: Path) -> Path:
    return data_fixtures / "tapvid" / "kinetics_raw"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """A csv of 12 videos and their clips."""
    names = [f"video{number:06}_{number:06}_{number + 10:06}" for number in range(12)]
    for number, name in enumerate(names):
        make_clip(tmp_path / "videos" / f"class{number % 3}" / f"{name}.mp4", number)
    return write_csv(tmp_path / "tracks.csv", make_rows(names)), tmp_path / "videos", names


def test_equals_the_official_generator(raw: Path, data_fixtures: Path, tmp_path: Path) -> None:
    options = ["--csv", f"{raw}/tapvid_kinetics.csv", "--videos", f"{raw}/videos", "--out", f"{tmp_path}/out"]
    assert main(["prepare", "kinetics", *options, "--half-pixel-shift", "--workers", "1"]) == 0
    ours, official = load(tmp_path / "out"), load(data_fixtures / "tapvid" / "kinetics_generated")
    assert len(ours) == len(official) == 2
    for mine, theirs in zip(ours, official, strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("points", "occluded"):
            assert mine[key].dtype == theirs[key].dtype
            np.testing.assert_array_equal(mine[key], theirs[key])
        assert isinstance(mine["video"][0], bytes)  # what the official loaders look at
        for frame, reference in zip(mine["video"], theirs["video"], strict=True):
            if frame != reference:  # another build of ffmpeg
                pixels, expected = (np.array(Image.open(BytesIO(data)), int) for data in (frame, reference))
                assert abs(pixels - expected).mean() < 2


def test_the_encoding_is_the_one_of_the_official_command(raw: Path) -> None:
    clip = next(raw.rglob(f"{B}.mp4"))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-i", str(clip)]
    command += ["-filter_complex", "[0]fps=fps=25.0[s0]", "-map", "[s0]", "-f", "image2pipe", "pipe:"]
    stream = subprocess.run(command, capture_output=True, check=True).stdout
    assert b"".join(encode_frames(clip)) == stream


def test_points_are_on_the_raster_of_the_csv(raw: Path, data_fixtures: Path, tmp_path: Path) -> None:
    prepare_kinetics(raw / "tapvid_kinetics.csv", raw / "videos", tmp_path)
    ours = TapVidDataset("kinetics", tmp_path, resolution=None)
    shifted = TapVidDataset("kinetics", data_fixtures / "tapvid" / "kinetics_generated", resolution=None)
    annotated = read_annotations(raw / "tapvid_kinetics.csv")
    for index, name in enumerate([A, B]):
        mine, theirs = ours[index], shifted[index]
        T, H, W = mine.video.shape[1], *mine.video.shape[-2:]
        points, occluded = annotated[name].points[:, :T], annotated[name].occluded[:, :T]
        seen = ~occluded.all(axis=1)
        expected = torch.from_numpy(points[seen] * (W, H)).float()
        torch.testing.assert_close(mine.xy[0], expected)
        torch.testing.assert_close(theirs.xy[0] + 0.5, expected)  # half a source pixel
        assert torch.equal(mine.visible[0], torch.from_numpy(~occluded[seen]))


def test_what_was_there_is_written_down(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--csv", f"{raw}/tapvid_kinetics.csv", "--videos", f"{raw}/videos", "--out", f"{tmp_path}/out"]
    assert main(["prepare", "kinetics", *options, "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert "2 of 3 clips found" in said
    assert "needed in" in said
    assert "2 of 3 videos" in said
    assert (tmp_path / "out" / "missing.csv").read_text().splitlines() == ["video,reason", f"{GONE},not found"]
    dataset = TapVidDataset("kinetics", tmp_path / "out")
    assert dataset.names == [A, B]
    assert dataset.about == {"benchmark_videos": 3, "half_pixel_shift": "no"}
    one = TapVidDataset("kinetics", tmp_path / "out" / "0001_of_0010.pkl")
    assert one.names == one[0].names == [B]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "0000_of_0010.pkl",
        "0001_of_0010.pkl",
        "manifest.json",
        "missing.csv",
    ]


def test_shards_as_published(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    table, videos, names = made
    manifest, missing = prepare_kinetics(table, videos, tmp_path / "out")
    assert not missing
    files = [f"{number:04}_of_0010.pkl" for number in range(6)]  # ceil(12 / 10) = 2 videos each
    assert manifest.files == {file: names[2 * k : 2 * k + 2] for k, file in enumerate(files)}
    assert list(shards(tmp_path / "out")) == files
    videos_read = load(tmp_path / "out")
    lazily = TapVidDataset("kinetics", tmp_path / "out", "strided", resolution=None)
    for index, (name, annotation) in enumerate(read_annotations(table).items()):
        assert lazily.names[index] == name
        np.testing.assert_array_equal(videos_read[index]["points"], annotation.points[:, :5])
        np.testing.assert_array_equal(videos_read[index]["occluded"], annotation.occluded[:, :5])
        frames = np.stack([np.array(Image.open(BytesIO(frame))) for frame in videos_read[index]["video"]])
        assert frames.shape == (5, 32, 48, 3)
        assert torch.equal(lazily[index].video[0].permute(0, 2, 3, 1), torch.from_numpy(frames))


def test_at_most_250_frames_at_25_per_second(tmp_path: Path) -> None:
    grey = np.full((320, 16, 16, 3), 90, np.uint8)
    write_video(tmp_path / "long.mp4", grey, fps=25)
    assert len(encode_frames(tmp_path / "long.mp4")) == 250
    write_video(tmp_path / "fast.mp4", grey[:60], fps=50)
    assert len(encode_frames(tmp_path / "fast.mp4")) == 30
    write_video(tmp_path / "slow.mp4", grey[:10], fps=12.5)
    assert len(encode_frames(tmp_path / "slow.mp4")) == 20


def test_broken_clips_are_listed_and_the_others_kept(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    table, videos, names = made
    cut, empty, text = (videos / f"class{number % 3}" / f"{names[number]}.mp4" for number in (2, 5, 7))
    cut.write_bytes(cut.read_bytes()[:-300])
    empty.write_bytes(b"")
    text.write_text("<html>video unavailable</html>")
    (videos / "class0" / f"{names[0]}.mp4").unlink()
    manifest, missing = prepare_kinetics(table, videos, tmp_path / "out")
    assert list(missing) == [names[0], names[2], names[5], names[7]]
    assert missing[names[0]] == "not found"
    assert all("broken" in missing[names[number]] for number in (2, 5, 7))
    assert "0x" not in " ".join(missing.values())
    assert [name for file in manifest.files.values() for name in file] == [
        name for name in names if name not in missing
    ]
    with (tmp_path / "out" / "missing.csv").open(newline="") as file:
        assert {row["video"]: row["reason"] for row in csv.DictReader(file)} == missing
    dataset = TapVidDataset("kinetics", tmp_path / "out")
    assert len(dataset) == 8
    assert dataset.about["benchmark_videos"] == 12

    make_clip(cut, 2)  # it was fetched again
    manifest, missing = prepare_kinetics(table, videos, tmp_path / "out")
    assert names[2] not in missing
    assert len(TapVidDataset("kinetics", tmp_path / "out")) == 9


def test_clips_are_work_for_other_processes(
    made: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, videos, names = made
    asked: list[int] = []

    def as_in_another_process(work: Any, items: Any, workers: int, *rest: Any) -> Any:
        asked.append(workers)  # what is there in a fresh interpreter came through a pickle
        return run_jobs(pickle.loads(pickle.dumps(work)), pickle.loads(pickle.dumps(items)), 1, *rest)

    monkeypatch.setattr(kinetics, "run_jobs", as_in_another_process)
    prepare_kinetics(table, videos, tmp_path / "out", workers=5)
    assert asked[0] == 5
    assert TapVidDataset("kinetics", tmp_path / "out").names == names


def test_a_killed_run_goes_on_and_gives_the_same(
    made: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, videos, names = made
    prepare_kinetics(table, videos, tmp_path / "whole")
    done: list[str] = []

    def killed_after_five(path: Path) -> list[bytes]:
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(path.stem)
        return encode_frames(path)

    monkeypatch.setattr(kinetics, "encode_frames", killed_after_five)
    with pytest.raises(KeyboardInterrupt):
        prepare_kinetics(table, videos, tmp_path / "out")
    assert not shards(tmp_path / "out")

    kept = sorted((tmp_path / "out" / ".clips").glob("*.npz"))
    assert len(kept) == 5
    content = bytearray(kept[0].read_bytes())
    content[len(content) // 2] ^= 1  # in the frames: the disk was bad
    kept[0].write_bytes(content)
    kept[1].write_bytes(kept[1].read_bytes()[:1000])
    os.utime(videos / "class2" / f"{names[2]}.mp4")  # another clip of the same size
    (tmp_path / "out" / ".clips" / ".01234567.part-x.npz").write_bytes(b"of the killed run")
    done.clear()
    monkeypatch.setattr(kinetics, "encode_frames", lambda path: (done.append(path.stem), encode_frames(path))[1])
    manifest = prepare_kinetics(table, videos, tmp_path / "out")[0]
    assert done == [names[0], names[1], names[2], *names[5:]]
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")
    assert Manifest.read(tmp_path / "out") == manifest == Manifest.read(tmp_path / "whole")
    assert not (tmp_path / "out" / ".clips").exists()


def test_a_run_killed_at_the_shards_is_noticed(
    made: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, videos, _ = made
    written: list[Path] = []

    def killed_at_the_third(path: Path, values: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write_pickled_list(path, values)

    prepare_kinetics(table, videos, tmp_path / "out", half_pixel_shift=True, keep_clips=True)
    monkeypatch.setattr(kinetics, "write_pickled_list", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_kinetics(table, videos, tmp_path / "out")
    assert list(shards(tmp_path / "out")) == ["0000_of_0010.pkl", "0001_of_0010.pkl"]  # no old ones among them
    with pytest.raises(ValueError, match=r"missing: 0002_of_0010.pkl, .*`trackbench prepare kinetics` again"):
        TapVidDataset("kinetics", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(kinetics, "encode_frames", None)  # all clips were kept
    prepare_kinetics(table, videos, tmp_path / "out")
    assert len(TapVidDataset("kinetics", tmp_path / "out")) == 12


def test_a_full_disk_does_not_count_as_broken_clips(
    made: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, videos, _ = made

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"12 clips not done, run it again to go on; .*No space left"):
        prepare_kinetics(table, videos, tmp_path / "out")
    assert not shards(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row[:711], r":2: expected 753 columns .* got 711"),
        (lambda row: [*row, "0"], ":2: expected 753 columns .* got 754"),
        (lambda row: [*row[:5], "2", *row[6:]], ":2: expected occluded to be 0 or 1, got '2'"),
        (lambda row: [*row[:3], "left", *row[4:]], ":2: could not convert string to float: 'left'"),
        (lambda row: [*row[:3], "nan", *row[4:]], ":2: expected finite coordinates"),
        (lambda row: ["../../etc", *row[1:]], ":2: expected a YouTube id"),
        (lambda row: [row[0], "1.5", *row[2:]], ":2: expected a YouTube id, start and end in whole seconds"),
    ],
)
def test_bad_rows_name_their_line(tmp_path: Path, change: Any, message: str) -> None:
    rows = make_rows([A], tracks=2)
    with pytest.raises(ValueError, match=message):
        read_annotations(write_csv(tmp_path / "bad.csv", [rows[0], change(rows[1])]))


def test_bad_input_is_refused_before_work_starts(made: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    table, videos, names = made
    out = tmp_path / "out"
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="it is empty"):
        prepare_kinetics(tmp_path / "empty.csv", videos, out)
    with pytest.raises(FileNotFoundError, match="no such folder of videos"):
        prepare_kinetics(table, tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match=f"none of the 1 clips of .*, such as {GONE}.mp4"):
        prepare_kinetics(write_csv(tmp_path / "other.csv", make_rows([GONE])), videos, out)
    out.mkdir(exist_ok=True)
    (out / "0003_of_0010.pkl").write_bytes(b"somebody's")
    with pytest.raises(ValueError, match=r"shards without a manifest\.json, not made here"):
        prepare_kinetics(table, videos, out)
    assert (out / "0003_of_0010.pkl").read_bytes() == b"somebody's"
    shutil.copy(videos / "class0" / f"{names[0]}.mp4", videos / f"{names[0]}.mp4")
    with pytest.raises(ValueError, match=f"{names[0]} is there twice"):
        prepare_kinetics(table, videos, tmp_path / "out2")


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"num_annotated": 3}', '{"num_annotated": "3", "half_pixel_shift": false, "files": {}}'],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json: not a manifest of `trackbench prepare kinetics`"):
        Manifest.read(tmp_path)


def test_shards_other_than_those_of_the_manifest_are_refused(raw: Path, tmp_path: Path) -> None:
    prepare_kinetics(raw / "tapvid_kinetics.csv", raw / "videos", tmp_path)
    shutil.copy(tmp_path / "0000_of_0010.pkl", tmp_path / "0007_of_0010.pkl")
    with pytest.raises(ValueError, match=r"missing: none; with other videos: 0007_of_0010\.pkl"):
        TapVidDataset("kinetics", tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["files"]["0007_of_0010.pkl"] = ["one", "two"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"with other videos: 0007_of_0010\.pkl"):
        TapVidDataset("kinetics", tmp_path)


def test_pickles_written_in_pieces_read_as_lists(tmp_path: Path) -> None:
    shared = np.arange(6.0).reshape(2, 3)
    values = [{"points": shared, "again": shared, "video": [b"x" * 5000, b""]}, {"points": shared.T > 2}]
    write_pickled_list(tmp_path / "list.pkl", iter(values))
    for read in (pickle.loads((tmp_path / "list.pkl").read_bytes()), load_pickle(tmp_path / "list.pkl")):
        assert len(read) == 2
        np.testing.assert_array_equal(read[0]["points"], shared)
        np.testing.assert_array_equal(read[0]["again"], shared)
        assert read[0]["video"] == values[0]["video"]
        np.testing.assert_array_equal(read[1]["points"], values[1]["points"])
    write_pickled_list(tmp_path / "empty.pkl", iter([]))
    assert pickle.loads((tmp_path / "empty.pkl").read_bytes()) == []
